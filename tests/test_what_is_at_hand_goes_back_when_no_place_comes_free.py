"""Where runs are short, a worker claims the next tasks before there is a place for them."""

import pytest
from conftest import wait_for
from processes import lines, stays_true

SHORT_THEN_LONG = """#!/bin/sh
echo "$TASK_ID" >>"$HOME/runs"
case $TASK_ID in
long) until [ -e "$HOME/go" ]; do sleep 0.02; done ;;
esac
"""


@pytest.fixture
def busy(installation):
    """A worker that has run many short tasks, and now runs a long one, with others behind it."""
    installation.handler("any", SHORT_THEN_LONG)
    names = [*(f"short-{n}" for n in range(40)), "long", *(f"behind-{n}" for n in range(5))]
    tasks = "".join(f'{{"task_type": "any", "data": {{}}, "task_id": "{name}"}}\n' for name in names)
    installation.enqueue("notifications", "--jsonl", input=tasks)
    worker = installation.worker("notifications")
    wait_for(lambda: "long" in lines(installation.directory / "runs"))
    yield worker
    (installation.directory / "go").touch()


def claimed(installation) -> list[str]:
    return [name for (name,) in installation.rows("select task_id from notifications where status = 2")]


def waiting(installation) -> list[tuple]:
    return installation.rows("select task_id, attempts from notifications where status = 1 order by id")


def test_behind_a_long_run(installation, busy):
    wait_for(lambda: claimed(installation) == ["long"], 2, "the return of what had no place")
    assert waiting(installation) == [(f"behind-{n}", 0) for n in range(5)]
    assert stays_true(lambda: claimed(installation) == ["long"], 0.5), "it was claimed again, in vain"
    (installation.directory / "go").touch()
    wait_for(lambda: not installation.rows("select 1 from notifications"))
    assert sorted(set(lines(installation.directory / "runs"))) == sorted(lines(installation.directory / "runs"))
    assert installation.rows("select max(attempts), count(*) from task_history where status = 'completed'") == [(1, 46)]


def test_another_worker_takes_it(installation, busy):
    installation.worker("notifications")
    wait_for(lambda: len(lines(installation.directory / "runs")) == 46, 5, "the runs of those behind")
    wait_for(lambda: claimed(installation) == ["long"], 2, "the record of those behind")


def test_when_the_worker_is_stopped(installation, busy):
    busy.terminate()
    wait_for(lambda: len(waiting(installation)) == 5, 2, "the return of what had no place")
    assert [attempts for _, attempts in waiting(installation)] == [0] * 5
    (installation.directory / "go").touch()
    assert busy.wait(10) == 0
    assert "behind-0" not in lines(installation.directory / "runs")


def test_when_the_worker_is_killed(installation, busy):
    busy.kill()
    busy.wait()
    (installation.directory / "go").touch()
    installation.worker("notifications")
    wait_for(lambda: not installation.rows("select 1 from notifications"))
    runs = lines(installation.directory / "runs")
    assert sorted(set(runs)) == sorted(runs), "the supervisor, or the new worker; not both"
    assert installation.rows("select count(*) from task_history where status = 'completed'") == [(46,)]
