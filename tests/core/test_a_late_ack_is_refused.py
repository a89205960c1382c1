import logging
import signal

import pytest
from conftest import wait_for
from processes import lines

pytestmark = pytest.mark.core


def recorded(conn, task, code):
    from taskqueue import outcome

    return outcome.record(conn, task, code).status != "lost"


VERBS = {
    "ack": lambda q, conn, task: q.ack(conn, task, exit_code=0, result="late"),
    "nack": lambda q, conn, task: q.nack(conn, task, error="late"),
    "nack for the last time": lambda q, conn, task: q.nack(
        conn, task._replace(max_attempts=1), error="late"
    ),
    "bury": lambda q, conn, task: q.bury(conn, task, error="late"),
    "release": lambda q, conn, task: q.release(conn, task, error="late"),
    "cancel": lambda q, conn, task: q.finish(conn, task, "cancelled", error="late"),
    "settle as done": lambda q, conn, task: recorded(conn, task, 0),
    "settle as failed": lambda q, conn, task: recorded(conn, task, 3),
    "settle as not now": lambda q, conn, task: recorded(conn, task, 75),
    "settle as never": lambda q, conn, task: recorded(conn, task, 65),
}


@pytest.fixture
def claims(installation, queue):
    """claims(owner): claim the only task for owner, in a transaction."""
    installation.enqueue("notifications", "any", "--task-id", "it")
    conn = queue.connect()

    def claim(owner: str, **options):
        with queue.transaction(conn):
            (task,) = queue.claim(conn, "notifications", owner, then_queue="completions", **options)
        return task

    claim.conn = conn
    claim.do = lambda verb, task, **told: _in_transaction(queue, conn, verb, task, **told)
    return claim


def _in_transaction(queue, conn, verb, task, **told):
    with queue.transaction(conn):
        return verb(conn, task, **told)


def everything(installation) -> list:
    tables = ("notifications", "completions", "task_history")
    return [installation.rows(f"select * from {table} order by id") for table in tables]


def refused(installation, queue, claims, task) -> None:
    """Every verb is, and changes nothing."""
    before = everything(installation)
    for name, verb in VERBS.items():
        with queue.transaction(claims.conn):
            assert not verb(queue, claims.conn, task), name
        assert everything(installation) == before, name


def test_of_another_owner(installation, queue, claims):
    task = claims("alice")
    refused(installation, queue, claims, task._replace(owner="bob"))
    refused(installation, queue, claims, task._replace(owner=None))
    assert claims.do(queue.ack, task) is True


def test_of_another_attempt(installation, queue, claims):
    first = claims("alice")
    assert claims.do(queue.nack, first, error="no", delay=0) == "scheduled"
    second = claims("alice")
    assert second.attempts == 2
    refused(installation, queue, claims, first)
    refused(installation, queue, claims, second._replace(attempts=3))
    assert claims.do(queue.ack, second) is True


def test_of_a_task_that_waits_again(installation, queue, claims):
    task = claims("alice")
    assert claims.do(queue.release, task)
    refused(installation, queue, claims, task)
    refused(installation, queue, claims, task._replace(owner=None))


def test_of_a_task_that_is_scheduled_again(installation, queue, claims):
    task = claims("alice")
    assert claims.do(queue.nack, task, error="no", delay=3600)
    refused(installation, queue, claims, task)


def test_after_the_task_was_released_and_claimed_by_the_same_owner(installation, queue, claims):
    first = claims("alice")
    assert claims.do(queue.release, first)
    second = claims("alice")
    assert second.attempts == first.attempts == 1
    refused(installation, queue, claims, first)
    assert claims.do(queue.ack, second) is True


@pytest.mark.parametrize("outcome", ["ack", "bury"])
def test_of_a_finished_task(installation, queue, claims, outcome):
    task = claims("alice")
    assert (
        claims.do(queue.ack, task) if outcome == "ack" else claims.do(queue.bury, task, error="no")
    )
    refused(installation, queue, claims, task)


@pytest.mark.parametrize("owner", ["bob", "alice"])
def test_after_a_redrive(installation, queue, claims, owner):
    first = claims("alice")
    assert claims.do(queue.bury, first, error="no")
    ((history_id,),) = installation.rows("select id from task_history")
    assert claims.do(queue.redrive, "notifications", history_id=history_id)
    refused(installation, queue, claims, first)
    second = claims(owner)
    assert second.attempts == 1
    refused(installation, queue, claims, first)
    assert claims.do(queue.ack, second) is True


def test_after_recovery(installation, queue, claims):
    # This owner has no lock file.
    task = claims("1-dead")
    ((_, outcome),) = queue.recover()[0]
    assert outcome.status == "scheduled"
    refused(installation, queue, claims, task)
    assert claims(queue.owner_name()).attempts == 2
    refused(installation, queue, claims, task)


CONSUMER = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
import queue_helpers
queue = queue_helpers.get_ack_queue("notifications")
row_id, _ = queue.get(timeout=20)
print(row_id, flush=True)
verb = sys.stdin.readline().strip()
print(getattr(queue, verb)(row_id), flush=True)
"""


@pytest.mark.parametrize("verb", ["ack", "nack", "ack_failed"])
def test_by_a_process_whose_lock_file_was_removed_returns_false_and_says_why(
    installation, queue, verb
):
    installation.enqueue("notifications", "any")
    late = installation.start_python(CONSUMER)
    try:
        row_id = int(late.stdout.readline())
        for file in (installation.state / "workers").iterdir():
            file.unlink()
        ((_, outcome),) = queue.recover()[0]
        assert outcome.status == "scheduled"
        mine = queue.get_ack_queue("notifications")
        assert mine.get(timeout=5)[0] == row_id
        before = everything(installation)
        said, _ = late.communicate(f"{verb}\n", timeout=20)
        assert everything(installation) == before
        complaint, result = said.splitlines()
        assert result == "False"
        assert (
            complaint.startswith("LOG")
            and f"task {row_id} was not" in complaint
            and queue.owner_name() in complaint
        )
        assert mine.ack(row_id) == row_id
    finally:
        late.kill()
        late.wait()


@pytest.mark.parametrize("verb", ["ack", "nack", "ack_failed"])
def test_of_what_was_never_claimed_here_returns_false_and_says_why(
    installation, queue, caplog, verb
):
    installation.enqueue("notifications", "any")
    mine = queue.get_ack_queue("notifications")
    before = everything(installation)
    with caplog.at_level(logging.WARNING):
        assert getattr(mine, verb)(1) is False and getattr(mine, verb)(17) is False
    assert everything(installation) == before
    assert "task 1 was not" in caplog.text and "waiting" in caplog.text
    assert "task 17 was not" in caplog.text and "gone" in caplog.text


def test_twice_returns_false_the_second_time(installation, queue, caplog):
    installation.enqueue("notifications", "any")
    mine = queue.get_ack_queue("notifications")
    row_id, _ = mine.get(timeout=5)
    assert mine.ack(row_id) == row_id
    with caplog.at_level(logging.WARNING):
        assert mine.ack(row_id) is False and mine.nack(row_id) is False
    assert "finished" in caplog.text and installation.rows("select status from task_history") == [
        ("completed",)
    ]


def test_a_worker_that_lost_its_lock_file_does_not_lose_the_task_it_runs(installation, queue):
    installation.handler(
        "wait", '#!/bin/sh\necho run >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.02; done\n'
    )
    task = installation.enqueue("notifications", "wait")
    installation.worker("notifications")
    wait_for(lambda: lines(installation.directory / "runs"))
    for file in (installation.state / "workers").iterdir():
        file.unlink()
    installation.worker("notifications")
    # Its lock file is back, or else the handler's output is locked.
    assert queue.recover()[0] == []
    (installation.directory / "go").touch()
    assert installation.finished(task)["status"] == "completed"
    assert lines(installation.directory / "runs") == ["run"]


def test_a_worker_says_what_it_lost(installation):
    installation.handler(
        "wait", '#!/bin/sh\necho run >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.02; done\n'
    )
    task = installation.enqueue("notifications", "wait")
    worker = installation.worker("notifications")
    wait_for(lambda: lines(installation.directory / "runs"))
    worker.send_signal(signal.SIGSTOP)
    installation.sqlite3("update notifications set owner = null, status = 1, attempts = 0")
    (installation.directory / "go").touch()
    worker.send_signal(signal.SIGCONT)
    wait_for(lambda: f"{task} lost" in worker.log.read_text(), what="a line on the lost run")
    # It ran again, and that run counts.
    done = installation.finished(task)
    assert (done["status"], done["attempts"]) == ("completed", 1) and len(
        lines(installation.directory / "runs")
    ) == 2
