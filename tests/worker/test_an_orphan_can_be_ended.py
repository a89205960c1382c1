"""Whatever is killed or stopped: a handler is held to its timeout, can be cancelled, and is not run
beside itself.
"""

import json
import os
import shutil
import signal
import time

import pytest
from conftest import wait_for
from processes import WAIT, children, group_lives, lives, stays_true

pytestmark = pytest.mark.core

SLEEPER = """#!/bin/sh
echo "$$" >>"$HOME/runs"
sleep 300 &
wait
"""
DEAF = """#!/bin/sh
trap '' TERM
echo "$$" >>"$HOME/runs"
while :; do sleep 0.02; done
"""


def groups(installation) -> list[int]:
    return [int(line) for line in installation.lines()]


def kill(installation, worker, runs: int, supervisor: bool = True) -> None:
    """Kill a worker that runs so many handlers, and their supervisors."""
    wait_for(lambda: len(installation.lines()) == runs, what=f"{runs} runs")
    found = lambda: list((installation.state / "runs").glob("*/*"))  # noqa: E731
    records = lambda: [path for path in found() if '"group"' in path.read_text()]  # noqa: E731
    wait_for(lambda: len(records()) == runs, what="the records of the runs")
    supervisors = children(worker.pid)
    worker.kill()
    worker.wait()
    if supervisor:
        for pid in supervisors:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(map(lives, supervisors)))


@pytest.fixture
def orphan(installation):
    """Leave a handler whose worker and supervisor were killed; return its task's id and its group."""

    def make(*options, handler=SLEEPER, supervisor=True):
        installation.handler("it", handler)
        task = installation.enqueue("notifications", "it")
        worker = installation.worker("notifications", "--max-attempts", 1, *options)
        kill(installation, worker, 1, supervisor)
        return task, groups(installation)[0]

    yield make
    for group in filter(group_lives, groups(installation)):
        os.killpg(group, signal.SIGKILL)


def test_without_a_supervisor_each_run_is_timed_out_cancelled_or_left_alone(installation, orphan):
    installation.handler("sleeper", SLEEPER)
    installation.handler("deaf", DEAF)
    for kind in ("sleeper", "deaf"):
        installation.add(f"notifications {kind} --task-id {kind}-slow --timeout 2")
        installation.add(f"notifications {kind} --task-id {kind}-unwanted")
    installation.add("notifications sleeper --task-id alone")
    options = ("--concurrency", 5, "--kill-after", 0.5, "--max-attempts", 1)
    kill(installation, installation.worker("notifications", *options), 5)
    assert all(map(lives, groups(installation)))
    installation.worker("notifications")
    installation.sqlite3(
        "update notifications set cancel_requested = 1 where task_id like '%unwanted'"
    )
    for kind in ("sleeper", "deaf"):
        assert installation.finished(f"{kind}-unwanted")["status"] == "cancelled"
        done = installation.finished(f"{kind}-slow")
        assert done["status"] == "failed" and done["error"].startswith("timed out after 2 s"), done
    [group] = filter(group_lives, groups(installation))
    rows = "select task_id, status from notifications"
    assert stays_true(lambda: lives(group) and installation.rows(rows) == [("alone", 2)], 0.5)
    assert len(installation.lines()) == 5


def test_a_group_is_signalled_only_while_its_leader_is_the_recorded_one(installation, orphan):
    """The number of a process is used again; its start tells it from a later one."""
    task, group = orphan("--timeout", 1, "--kill-after", 0.1)
    (record,) = (installation.state / "runs").glob("*/*")
    text = record.read_text()
    record.write_text(text.replace('"started": "', '"started": "1'))
    installation.worker("notifications")
    assert stays_true(lambda: lives(group), 2.5), "another process's group was ended"
    record.write_text(text)
    assert installation.finished(task)["error"].startswith("timed out")


@pytest.mark.parametrize("written", ["the start is on record", "not yet"])
def test_the_supervisor_was_stopped_when_its_worker_died(installation, written):
    """Recovery has it go on, so the end is known."""
    installation.handler("it", WAIT.replace("echo", "kill -STOP $PPID\necho", 1))
    task = installation.enqueue("notifications", "it")
    worker = installation.worker("notifications")
    wait_for(installation.lines)
    (supervisor,) = children(worker.pid)
    worker.kill()
    worker.wait()
    os.kill(supervisor, signal.SIGSTOP)
    if written == "not yet":
        # The handler may stop it as soon as there is a handler.
        (record,) = (installation.state / "runs").glob("*/*")
        first = record.read_text().split("\n")[0]
        assert '"supervisor"' in first and '"group"' not in first
        record.write_text(first + "\n")
    installation.let_go()
    installation.worker("notifications")
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["exit_code"]) == ("completed", 1, 0)
    wait_for(lambda: not lives(supervisor), 5, "the supervisor's end")


def test_a_handler_that_stops_its_parent_holds_up_neither_others_nor_the_end(installation):
    stops = '#!/bin/sh\nkill -STOP $PPID\ntouch "$HOME/stopped"\nexec sleep 300\n'
    installation.handler("stops", stops)
    installation.handler("fine", "#!/bin/sh\n")
    installation.add("notifications stops --task-id slow --timeout 1 --max-attempts 1")
    worker = installation.worker("notifications", "--concurrency", 2)
    assert installation.finished("slow")["error"].startswith("timed out after 1 s")
    (installation.directory / "stopped").unlink()
    installation.add("notifications stops --task-id stops")
    wait_for((installation.directory / "stopped").exists)
    assert installation.ends_well("notifications", "fine")
    worker.terminate()
    assert stays_true(lambda: worker.poll() is None, 0.3)
    worker.terminate()
    assert worker.wait(5) == 0
    rows = "select task_id, status, attempts from notifications"
    assert installation.rows(rows) == [("stops", 1, 0)]


@pytest.mark.parametrize("removed", ["logs", "runs"])
@pytest.mark.parametrize("supervisor", [True, False], ids=["supervisor and worker", "the worker"])
def test_a_run_is_seen_though_a_directory_of_the_state_was_removed(
    installation, orphan, removed, supervisor
):
    _, group = orphan(handler=WAIT, supervisor=supervisor)
    shutil.rmtree(installation.state / removed)
    installation.worker("notifications", "--max-attempts", 2)
    assert stays_true(lambda: lives(group) and len(installation.lines()) == 1, 1), (
        "it ran beside itself"
    )
    installation.let_go()
    wait_for(lambda: not installation.rows("select 1 from notifications"), what="the task's end")


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_daemon_that_holds_the_output_after_nobody_saw_the_handlers_end(
    installation, orphan, cancelled
):
    """It may be a part of the handler that still works, so the task waits, until a person cancels."""
    handler = SLEEPER.replace("sleep 300 &\nwait", 'sleep 300 &\necho $! >"$HOME/daemon"\nwait')
    task, group = orphan(handler=handler)
    daemon = int(installation.lines("daemon")[0])
    os.kill(group, signal.SIGKILL)
    installation.worker("notifications")
    claimed = "select status from notifications"
    assert stays_true(lambda: installation.rows(claimed) == [(2,)], 0.7)
    if cancelled:
        installation.sqlite3("update notifications set cancel_requested = 1")
        assert installation.finished(task)["status"] == "cancelled" and lives(daemon)
    os.kill(daemon, signal.SIGKILL)
    if not cancelled:
        assert "its worker died" in installation.finished(task)["error"]


def test_the_records_of_runs_go_with_their_ends(installation):
    """A worker that is never idle: the one long run keeps its record, the others have none."""
    installation.handler("fine", "#!/bin/sh\n")
    installation.handler("it", WAIT)
    installation.enqueue("notifications", "it")
    installation.worker("notifications", "--concurrency", 2)
    wait_for(installation.lines)
    glob = (installation.state / "runs").glob
    for count in (20, 40):
        installation.enqueue("notifications", "fine", "--jsonl", input='{"n": 1}\n' * 20)
        installation.ended(count)
        wait_for(lambda: len(list(glob("*/*"))) == 1, what="the removal of the records")
    installation.let_go()


def test_taking_many_tasks_back_lets_others_write_in_between(installation, queue, monkeypatch):
    from taskqueue import recovery as queue_owners

    installation.enqueue("notifications", "any", "--jsonl", input='{"n": 1}\n' * 500)
    with queue.transaction(conn := queue.connect()):
        queue.claim(conn, "notifications", "1-dead", limit=500)
    sizes, transaction = [], queue.transaction

    def counted(conn, **options):
        sizes.append(0)
        return transaction(conn, **options)

    recover_task = queue_owners._recover_task

    def count(*args):
        sizes[-1] += 1
        return recover_task(*args)

    monkeypatch.setattr(queue, "transaction", counted)
    monkeypatch.setattr(queue_owners, "_recover_task", count)
    assert len(queue.recover()[0]) == 500
    assert sum(sizes) == 500 and max(sizes) <= queue_owners.RECOVER_AT_ONCE


OWNERS = "null '' '.' '..' '../..' '/' '../workers' cast(x'3100'as\ttext) 17".split(" ")


@pytest.mark.parametrize("owner", OWNERS)
def test_an_owner_of_any_name_costs_no_file(installation, queue, owner):
    installation.enqueue("notifications", "any", "--delay", 0)
    installation.sqlite3(f"update notifications set status = 2, owner = {owner}")
    (installation.state / "kept").touch()
    ((task, outcome),) = queue.recover()[0]
    assert (
        outcome.status == "scheduled"
        and (installation.state / "kept").exists()
        and installation.db.exists()
    )
    assert time.time() - task.enqueued_at < 60


def test_doctor_and_a_dry_run_say_what_recovery_does(installation, orphan):
    """A lock alone does not tell whether a run goes on: what is on record comes first."""
    daemon = WAIT.replace("until", "sleep 300 2>/dev/null &\nuntil")
    task, group = orphan(handler=daemon, supervisor=False)

    def told() -> tuple[int, int, bool]:
        dry = json.loads(installation.run("cleanup.py", "--dry-run", "--json").stdout)
        doctor = installation.run("tasks.py", "doctor", "--json").stdout
        return dry["recovered"], dry["orphans"], "which has died" in doctor

    assert told() == (0, 1, False)
    installation.let_go()
    (record,) = installation.state.glob("runs/*/*")
    wait_for(lambda: '"code"' in record.read_text(), what="the end on record")
    # The daemon holds the output's lock, and the end is on record.
    assert group_lives(group) and told() == (1, 0, True)
    assert installation.run("cleanup.py").returncode == 0
    assert installation.history(task)["status"] == "completed"


def test_of_an_owner_that_cannot_be_looked_at_nobody_says_that_it_is_dead(installation):
    from taskqueue import recovery as queue_owners

    assert queue_owners.is_dead(installation.state, "of nobody")
    workers = installation.state / "workers"
    workers.mkdir(parents=True)
    (workers / "loop").symlink_to("loop")
    assert not queue_owners.is_dead(installation.state, "loop")
