"""tq add --after ID: a task waits until that very one has completed, and ends if it cannot."""

from __future__ import annotations

import pytest
from conftest import ROOT, one_line, wait_for

import queue_helpers as q


def refused(installation, words: str) -> str:
    done = installation.run("enqueue.py", *words.split())
    return one_line(done, 65 if "rerun" in words else 64)


def why(installation, task_id: str) -> str:
    [(error,)] = installation.rows("select error from task_history where task_id = ?", task_id)
    return error


def links(installation) -> list[tuple]:
    return installation.rows(
        "select after_queue, after_id, after_task, queue, row_id, whatever, ended from task_after"
    )


@pytest.fixture
def work(installation):
    """Run what is ready, with handlers that end well or not; return the order of their starts."""
    installation.handler("good", "#!/bin/sh\n")
    installation.handler("bad", '#!/bin/sh\necho "it rains" >&2\nexit 65\n')

    def drain(*queues: str) -> list[str]:
        said = installation.drain(" ".join(queues or ("approvals", "notifications"))).stderr
        return [line.split()[4] for line in said.splitlines() if " started " in line]

    return drain


def test_a_chain_of_three_runs_in_its_order(installation, work):
    """A higher priority does not overtake the task that it waits for, and queues may differ."""
    installation.add("approvals good --task-id build")
    installation.add("notifications good --task-id test --after build --priority 9")
    installation.add("approvals good --task-id deploy --after test --priority 99")
    assert installation.statuses() == {"build": "pending", "test": "blocked", "deploy": "blocked"}
    assert work() == ["build", "test", "deploy"]
    assert set(installation.statuses().values()) == {"completed"} and links(installation) == []


def test_what_waits_for_a_task_that_fails_ends_with_the_reason(installation, work):
    installation.add("approvals bad --task-id build")
    installation.add("approvals good --task-id test --after build")
    installation.add("approvals good --task-id deploy --after test")
    installation.add("approvals good --task-id tell --after-any deploy")
    installation.add("approvals good --task-id clean --after-any build")
    assert sorted(work()) == ["build", "clean", "tell"]
    assert installation.statuses() == {
        "build": "failed", "test": "cancelled", "deploy": "cancelled", "tell": "completed", "clean": "completed"
    }  # fmt: skip
    because = "task build of approvals failed: refused by its handler (exit 65): it rains"
    assert why(installation, "test") == f"not run: {because}"
    assert (
        why(installation, "deploy")
        == f"not run: task test of approvals cancelled: not run: {because}"
    )
    # A person may want it all the same.
    assert installation.told("retry deploy")["retried"] == 1
    assert work() == ["deploy"]


def test_an_import_holds_a_task_that_waited_for_another(installation, other, tmp_path):
    """A row's number means another task there, and it must not run before."""
    installation.add("approvals good --task-id build --hold")
    installation.add("approvals good --task-id deploy --after build --delay 1h --group g")
    file = tmp_path / "tasks.jsonl"
    installation.told("export", file)
    other.tq("import", file)
    [deploy] = [task for task in other.told("list") if task["task_id"] == "deploy"]
    why = "before its import it waited for build"
    assert (deploy["status"], deploy["error"], deploy["group_id"]) == ("held", why, "g")


def test_it_waits_for_all_that_are_named(installation, work):
    for name in ("a", "b", "c"):
        installation.add(f"approvals {'bad' if name == 'b' else 'good'} --task-id {name}")
    installation.add("approvals good --task-id end --after a --after-any b --after c")
    assert len(links(installation)) == 3
    assert work()[-1] == "end"


@pytest.mark.parametrize("option", ["--after", "--after-any"])
def test_an_id_that_no_task_has_is_refused(installation, option):
    said = refused(installation, f"approvals good {option} nope")
    assert "after nope: no task has this id" in said
    assert installation.statuses() == {}


def test_a_task_that_has_ended_already_decides_at_once(installation, work):
    installation.add("approvals good --task-id well")
    installation.add("approvals bad --task-id ill")
    work()
    installation.add("approvals good --task-id 1st --after well")
    installation.add("approvals good --task-id 2nd --after-any ill")
    said = refused(installation, "approvals good --task-id 3rd --after ill")
    assert "that task has ended as failed" in said and "--after-any" in said
    assert installation.statuses()["1st"] == installation.statuses()["2nd"] == "pending"
    assert "3rd" not in installation.statuses()
    # Where two queues have the id, the queue says which is meant.
    installation.add("notifications good --task-id well")
    refused(installation, "approvals good --task-id 4th --after well")
    installation.add("approvals good --task-id 4th --after notifications/well")
    assert installation.statuses()["4th"] == "blocked"


def test_a_held_a_retried_and_a_moved_task_count(installation, work):
    installation.handler("once", '#!/bin/sh\n[ "$TASK_ATTEMPT" = 2 ]\n')
    installation.add("approvals good --task-id held --hold")
    installation.add("approvals once --task-id retried")
    installation.add("approvals good --task-id moved --delay 1h")
    for name in ("held", "retried", "moved"):
        installation.add(f"approvals good --task-id after-{name} --after {name}")
    installation.told("move moved notifications")
    installation.told("move after-moved completions")
    assert work() == ["retried"]
    installation.told("approve held")
    installation.told("retry retried moved")
    # An id that has ended and one that moved are the same for the task that waits.
    assert {*work("approvals", "notifications", "completions")} == {
        "held", "retried", "moved", "after-held", "after-retried", "after-moved"
    }  # fmt: skip
    assert links(installation) == []


def test_a_later_firing_is_the_same_row(installation, work):
    """Where a waiting task is replaced, the task after it waits for the new one; a rerun is another."""
    installation.add("approvals bad --task-id x")
    installation.add("approvals good --task-id y --after x")
    installation.add("approvals good --task-id x --on-duplicate replace")
    assert work() == ["x", "y"]
    said = refused(installation, "approvals good --after x --on-duplicate rerun")
    assert "on_duplicate" in said


def test_a_waiting_task_that_is_replaced_waits_no_longer(installation, work):
    installation.add("approvals bad --task-id x --hold")
    installation.add("approvals bad --task-id y --after x")
    installation.add("approvals good --task-id y --on-duplicate replace --group g")
    assert links(installation) == []
    assert work() == ["y"]


def test_hold_delay_and_group_hold_after_the_wait(installation, work):
    installation.add("approvals good --task-id first --hold")
    installation.add("approvals good --task-id holder --group g --hold")
    installation.add("approvals good --task-id held --after first --hold")
    installation.add("approvals good --task-id later --after first --delay 1h")
    installation.add("approvals good --task-id grouped --after first --group g")
    installation.add("approvals good --task-id free --group g")
    # What waits for another does not hold up its group.
    assert work() == ["free"]
    # Approved before its time, it waits on.
    installation.told("approve held")
    assert installation.statuses()["held"] == "blocked"
    installation.told("approve first")
    assert work("approvals")[0] == "first"
    assert installation.statuses() == {
        "first": "completed", "free": "completed", "held": "completed", "grouped": "completed",
        "later": "scheduled", "holder": "held"
    }  # fmt: skip


def test_released_tasks_of_one_group_take_turns(installation, queue):
    """Two that wait for one task, and are of one group, do not become ready together."""
    queue.enqueue_task("approvals", "t", {}, "first")
    for name in ("a", "b"):
        queue.enqueue_task("approvals", "t", {}, name, after="first", group="g")
    conn = queue.connect()
    with queue.transaction(conn):
        [task] = queue.claim(conn, "approvals", "me", limit=9)
        queue.ack(conn, task)
    assert installation.statuses() == {"first": "completed", "a": "pending", "b": "blocked"}


def test_a_task_that_is_deleted_ends_those_that_wait_for_it(installation):
    for name in ("purged", "byhand"):
        queue = "approvals" if name == "purged" else "notifications"
        installation.add(f"{queue} good --task-id {name}")
        installation.add(f"completions good --task-id after-{name} --after {name}")
        installation.add(f"completions good --task-id any-{name} --after-any {name}")
    assert installation.told("purge approvals --yes")["deleted"] == 1
    installation.sqlite3("delete from notifications")
    # Each consumer does this every few seconds.
    q.recover(installation.state)
    assert installation.statuses() == {
        "after-purged": "cancelled", "any-purged": "pending",
        "after-byhand": "cancelled", "any-byhand": "pending",
    }  # fmt: skip
    assert why(installation, "after-byhand") == "not run: task byhand of notifications deleted"


def test_a_task_that_waits_may_be_cancelled_purged_and_deleted(installation, work):
    installation.add("approvals good --task-id x")
    for name in ("cancelled", "purged", "deleted"):
        installation.add(f"notifications good --task-id {name} --after x")
    installation.add("notifications good --task-id rejected --after x --hold")
    installation.told("cancel cancelled")
    installation.told("reject rejected")
    installation.sqlite3("delete from notifications where task_id = 'deleted'")
    installation.told("purge notifications --status blocked --yes")
    assert links(installation) == [] and work() == ["x"]


def test_bash_approves_a_held_task_that_waits(installation, work):
    installation.add("approvals good --task-id x")
    installation.add("approvals good --task-id y --after x --hold --priority 5")
    installation.sqlite3("update approvals set status = 1 where task_id = 'y'")
    assert work() == ["x", "y"]


def test_list_show_wait_and_page_name_the_task_it_waits_for(installation):
    installation.add("approvals good --task-id build")
    installation.add("approvals good --task-id deploy --after build", '{"n": 1}')
    assert installation.told("show deploy")["after"] == "build"
    assert 'after build: {"n": 1}' in installation.tq("list").stdout
    assert "after             build" in installation.tq("show deploy").stdout
    assert installation.told("stats")["queues"]["approvals"]["blocked"] == 1
    waited = installation.tq("wait deploy --timeout 0", code=75)
    assert "deploy waits for build" in waited.stderr
    page = installation.directory / "page.html"
    installation.tq("page", page)
    assert "after build" in page.read_text()


def bury_the_first(queue) -> None:
    conn = queue.connect()
    with queue.transaction(conn):
        [task] = queue.claim(conn, "approvals", "me")
        queue.bury(conn, task, error="it rains")


def test_one_end_releases_any_number_in_bounded_steps(installation, queue):
    """A thousand that wait for one: the transaction of its end takes the first 200, a sweep the rest."""
    queue.enqueue_task("approvals", "t", {}, "first")
    many = [{"task_type": "t", "data": {}, "after": "first"} for _ in range(1000)]
    queue.enqueue_tasks("notifications", many)
    bury_the_first(queue)
    assert installation.rows("select count(*) from notifications") == [(800,)]
    queue.recover(installation.state)
    assert installation.rows("select count(*) from notifications") == [(0,)]
    because = "not run: task first of approvals failed: it rains"
    ended = f"select count(*) from task_history where error = '{because}'"
    assert installation.rows(ended) == [(1000,)]


def test_a_chain_of_hundreds_ends_with_its_first(installation, queue):
    for number in range(700):
        after = f"t{number - 1}" if number else ()
        queue.enqueue_task("approvals", "t", {}, f"t{number}", after=after)
    bury_the_first(queue)
    queue.recover(installation.state)
    assert {*installation.statuses().values()} == {"failed", "cancelled"}


def test_a_line_of_json_and_python_say_the_same(installation, queue):
    installation.add("approvals good --task-id x")
    lines = '{"task_type": "good", "task_id": "y", "after": "x"}\n{"task_type": "good", "task_id": "z", "after_any": ["x", "y"]}\n'
    done = installation.run("enqueue.py", "approvals", "--jsonl", input=lines)
    assert done.returncode == 0, done.stderr
    assert [(link[2], link[5]) for link in links(installation)] == [("x", 0), ("x", 1), ("y", 1)]
    with pytest.raises(queue.InvalidTask, match="after nope: no task has this id"):
        queue.enqueue_task("approvals", "good", {}, after="nope")
    assert (
        installation.run("enqueue.py", "approvals", "good", "--hook", "--after", "x").returncode
        == 64
    )


def test_a_waiting_worker_starts_what_is_released(installation):
    """Whoever records the end wakes the worker of another queue."""
    installation.handler("good", "#!/bin/sh\n")
    installation.start("worker.py", "approvals", "--handlers", installation.handlers)
    installation.start("worker.py", "notifications", "--handlers", installation.handlers)
    installation.add("approvals good --task-id x --delay 0.2")
    installation.add("notifications good --task-id y --after x")
    wait_for(lambda: installation.statuses().get("y") == "completed", 4.0)


def test_without_the_modules_the_next_worker_releases_it(installation, queue, monkeypatch):
    """queue_helpers.py may be vendored alone: it notes the end."""
    import subprocess
    import sys

    installation.add("approvals good --task-id x")
    installation.add("approvals good --task-id y --after x")
    alone = installation.directory / "alone"
    alone.mkdir()
    (alone / "queue_helpers.py").write_text((ROOT / "queue_helpers.py").read_text())
    code = (
        "import queue_helpers as q; conn = q.connect()\n"
        "with q.transaction(conn): [task] = q.claim(conn, 'approvals', 'me'); q.ack(conn, task)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=alone, env=installation.env, check=True)
    assert installation.statuses()["y"] == "blocked"
    # Each consumer does this every few seconds.
    q.recover(installation.state)
    assert installation.statuses()["y"] == "pending"
