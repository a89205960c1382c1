"""task_id is unique among a queue's waiting and running tasks; the database sees to it, whoever
writes.
"""

import json
import subprocess
import time

import pytest

pytestmark = pytest.mark.core

ENVELOPE = {"task_id": "same", "task_type": "t", "enqueued_at": "now", "data": {"n": 1}}
INSERT = f"INSERT INTO notifications (data) VALUES ('{json.dumps(ENVELOPE)}')"


def by_python(installation, queue):
    assert queue.enqueue_task("notifications", "t", {"n": 2}, "same") == "same"


def by_python_among_others(installation, queue):
    tasks = [{"task_type": name, "data": {}, "task_id": "same"} for name in "tu"]
    stored = queue.enqueue_tasks("notifications", tasks)
    assert [task_id for task_id, _ in stored] == ["same", "same"]


def by_enqueue_py(installation, queue):
    done = installation.run("enqueue.py", "notifications", "t", "{}", "--task-id", "same")
    assert done.stdout.split()[:2] in (["queued", "same"], ["duplicate", "same"])
    assert (done.returncode, done.stderr) == (0, "")


def by_jsonl(installation, queue):
    line = json.dumps({"task_type": "t", "task_id": "same"}) + "\n"
    done = installation.run("enqueue.py", "notifications", "--jsonl", input=line * 2)
    assert done.returncode == 0 and done.stdout.endswith("duplicate same\n") and done.stderr == ""


def by_bash(installation, queue):
    done = subprocess.run(
        ["sqlite3", installation.db, f"{INSERT}; SELECT changes()"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout in ("0\n", "1\n") and done.stderr == ""


def by_persist_queues_put(installation, queue):
    assert queue.get_queue("notifications").put(ENVELOPE) in (None, *range(1, 100))


def by_persist_queues_put_in_an_ack_queue(installation, queue):
    assert queue.get_ack_queue("notifications").put(json.dumps(ENVELOPE)) in (None, *range(1, 100))


WRITERS = [by_python, by_python_among_others, by_enqueue_py, by_jsonl, by_bash, by_persist_queues_put,
           by_persist_queues_put_in_an_ack_queue]  # fmt: skip


def everybody(installation, queue) -> None:
    for writer in WRITERS:
        writer(installation, queue)


def same(installation) -> list:
    return installation.rows("select id, status from notifications where task_id = 'same'")


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def first(request, installation, queue):
    """The task is there, by one of the writers."""
    queue.connect()
    request.param(installation, queue)
    assert same(installation) == [(1, 1)]
    return request.param


def test_while_the_first_waits(installation, queue, first):
    data = installation.rows("select data from notifications")
    everybody(installation, queue)
    assert (
        same(installation) == [(1, 1)]
        and installation.rows("select data from notifications") == data
    )
    assert queue.get_queue("notifications").qsize() == 1


def test_whoever_ignores_it_says_so(installation, queue):
    queue.enqueue_task("notifications", "t", {}, "same")
    assert queue.enqueue_tasks(
        "notifications", [{"task_type": "t", "data": {}, "task_id": "same"}]
    ) == [("same", False)]
    assert installation.run("enqueue.py", "notifications", "t", "--task-id", "same").stdout.split()[
        :2
    ] == ["duplicate", "same"]
    assert installation.sqlite3(f"{INSERT}; SELECT changes()") == "0"
    assert queue.get_queue("notifications").put(ENVELOPE) is None
    assert queue.get_ack_queue("notifications").put(ENVELOPE) is None


def test_while_the_first_runs_waits_for_its_retry_or_is_scheduled(installation, queue):
    mine = queue.get_ack_queue("notifications", backoff=3600)
    by_bash(installation, queue)
    row_id, _ = mine.get(timeout=5)
    everybody(installation, queue)
    assert same(installation) == [(row_id, 2)]
    assert mine.nack(row_id) == row_id
    everybody(installation, queue)
    assert same(installation) == [(row_id, 3)]
    installation.sqlite3("delete from notifications")
    queue.enqueue_task("notifications", "t", {}, "same", delay=3600)
    everybody(installation, queue)
    assert [status for _, status in same(installation)] == [3]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_once_the_first_is_finished_it_is_a_task_again(installation, queue, writer):
    mine = queue.get_ack_queue("notifications")
    by_python(installation, queue)
    mine.ack(mine.get(timeout=5)[0])
    writer(installation, queue)
    assert [row_id for row_id, _ in same(installation)] != [1] and len(same(installation)) == 1
    mine.ack_failed(mine.get(timeout=5)[0])
    writer(installation, queue)
    assert len(same(installation)) == 1


def test_in_another_queue_it_is_another_task(installation, queue):
    everybody(installation, queue)
    queue.enqueue_task("approvals", "t", {}, "same")
    assert installation.rows("select count(*) from approvals") == [(1,)]


def test_bare_payloads_are_never_duplicates_of_each_other(installation, queue):
    queue.connect()
    for _ in range(3):
        installation.sqlite3(
            """INSERT INTO notifications (data) VALUES ('{"task_id": "same", "n": 1}')"""
        )
        queue.get_queue("notifications").put({"task_id": "same", "n": 1})
    queue.get_queue("notifications").put({**ENVELOPE, "task_id": ""})
    queue.get_queue("notifications").put({**ENVELOPE, "task_id": ""})
    assert installation.rows("select count(*), count(task_id) from notifications") == [(8, 0)]


def test_of_many_rows_in_one_insert_only_the_duplicates_are_left_out(installation, queue):
    by_python(installation, queue)
    text = json.dumps(ENVELOPE)
    values = ", ".join(
        f"('{text.replace('same', name)}')" for name in ("one", "same", "two", "one")
    )
    assert (
        installation.sqlite3(f"INSERT INTO notifications (data) VALUES {values}; SELECT changes()")
        == "2"
    )
    rows = installation.rows("select task_id from notifications order by id")
    assert rows == [("same",), ("one",), ("two",)]


def test_an_insert_that_is_ignored_does_not_abort_the_transaction_around_it(installation, queue):
    by_python(installation, queue)
    other = "INSERT INTO notifications (data) VALUES ('{}')"
    installation.sqlite3(f"BEGIN; {other}; {INSERT}; {other}; COMMIT")
    assert installation.rows("select count(*) from notifications") == [(3,)]


def test_a_window_keeps_finished_ones_in_mind(installation, queue):
    def put(window: float) -> bool:
        task = {"task_type": "t", "data": {}, "task_id": "same", "window": window}
        return queue.enqueue_tasks("notifications", [task])[0][1]

    began = time.monotonic()
    assert put(60) is True and put(60) is False
    assert queue.dequeue_task("notifications")["task_id"] == "same"
    assert put(60) is False and queue.dequeue_task("notifications") is None
    # The window looks at its own queue alone.
    assert queue.enqueue_task("approvals", "t", {}, "same", window=60) and queue.dequeue_task(
        "approvals"
    )
    done = installation.run(
        "enqueue.py", "notifications", "t", "--task-id", "same", "--window", "60"
    )
    assert done.stdout.startswith("duplicate same ")
    installation.sqlite3(
        "update task_history set enqueued_at = strftime('%Y-%m-%d %H:%M:%f', 'now', '-61 seconds')"
    )
    assert put(60) is True
    assert queue.dequeue_task("notifications")
    assert put(0) is True and time.monotonic() - began < 60


RACE = """
import sys
import queue_helpers as q
q.BUSY_TIMEOUT_MS = 30_000
new = 0
for n in range(200):
    new += q.enqueue_tasks("notifications", [{"task_type": "t", "data": {}, "task_id": f"task {n}"}])[0][1]
print(new)
"""


def test_of_four_processes_that_put_the_same_exactly_one_is_told_that_it_is_new(
    installation, queue
):
    queue.connect()
    racers = [installation.start_python(RACE) for _ in range(4)]
    new = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(new) == 200 and installation.rows(
        "select count(*), count(distinct task_id) from notifications"
    ) == [(200, 200)]
