"""At most N tasks of a queue run at a time, with whatever number of workers and consumers; each
place is used.
"""

import json
import multiprocessing
import os
import signal
import sqlite3
import time

import pytest
from conftest import end, wait_for
from processes import lines, processor_seconds

from taskqueue import control

HANDLER = """#!/bin/sh
echo "begin $TASK_ID $$" >> {log}
sleep 0.03
echo "end $TASK_ID $$" >> {log}
"""


def limit(queue, slots: int | None) -> None:
    conn = queue.connect()
    with queue.transaction(conn):
        control.limit_slots(conn, "notifications", slots)
    queue.wake(conn.state)


def fill(queue, count: int) -> None:
    queue.enqueue_tasks(
        "notifications", [queue.new_row("t", {}, str(number)) for number in range(count)]
    )


def most_at_once(log) -> int:
    """Return how many ran at a time at most; a run that is killed ends where that is noted."""
    running, most = set(), 0
    for line in lines(log):
        what, task_id, pid = line.split()
        (running.add if what == "begin" else running.discard)((task_id, pid))
        most = max(most, len(running))
    return most


def consume(state, log) -> None:
    import queue_helpers

    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    tasks = queue_helpers.SQLiteAckQueue(state, name="notifications")
    while True:
        try:
            row_id, text = tasks.get(timeout=1)
        except queue_helpers.Empty:
            return
        name = json.loads(text)["task_id"]
        os.write(fd, f"begin {name} {os.getpid()}\n".encode())
        time.sleep(0.01)
        os.write(fd, f"end {name} {os.getpid()}\n".encode())
        tasks.ack(id=row_id)


@pytest.mark.timeout(120)
def test_two_slots_three_workers_two_consumers_and_kills(installation, queue):
    log = installation.directory / "log"
    installation.handler("t", HANDLER.format(log=log))
    queue.connect()
    limit(queue, 2)
    fill(queue, 200)
    spawn = multiprocessing.get_context("spawn")
    consumers = [spawn.Process(target=consume, args=(installation.state, log)) for _ in range(2)]
    workers = [installation.worker("notifications", "--concurrency", 4) for _ in range(3)]
    for consumer in consumers:
        consumer.start()
    # Workers die and leave their handlers behind, which keep their slots.
    for number, share in enumerate((20, 50, 80)):
        wait_for(lambda share=share: len(lines(log)) > share, 30, "more lines")
        end(workers[number])
        workers.append(installation.worker("notifications", "--concurrency", 4))
    wait_for(
        lambda: installation.rows("select count(*) from task_history") == [(200,)],
        60,
        "the end of all tasks",
    )
    for consumer in consumers:
        consumer.join(20)
    assert most_at_once(log) == 2
    assert installation.rows("select distinct status from task_history") == [("completed",)]


def test_a_dead_workers_slot_is_free_when_its_task_is_recovered_and_an_orphan_keeps_its_own(
    installation, queue
):
    log = installation.directory / "log"
    installation.handler(
        "t",
        f'#!/bin/sh\necho "begin $TASK_ID $$" >> {log}\n[ "$TASK_ATTEMPT" = 2 ] || [ $TASK_ID != 0 ] || sleep 600\n',
    )
    queue.connect()
    limit(queue, 1)
    fill(queue, 3)
    first = installation.worker("notifications")
    (line,) = wait_for(lambda: lines(log))
    second = installation.worker("notifications", "--concurrency", 4)
    end(first)
    # The orphan runs on: nobody else may, and whoever waits for its slot costs nothing.
    before = processor_seconds(second.pid)
    time.sleep(1)
    assert lines(log) == [line] and processor_seconds(second.pid) - before < 0.3
    os.killpg(int(line.split()[2]), signal.SIGKILL)
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(3,)])
    assert [line.split()[1] for line in lines(log)] == ["0", "0", "1", "2"]


def test_a_worker_sleeps_while_others_have_all_slots_whatever_is_overdue(installation, queue):
    conn = queue.connect()
    limit(queue, 1)
    fill(queue, 1)
    assert len(queue.claim_ready(conn, "notifications")) == 1
    queue.enqueue_task("notifications", "t", {}, "expired", ttl=0.001)
    queue.enqueue_task("notifications", "t", {}, "due", delay=0.001)
    wait_for(lambda: queue.look(conn, "notifications") == (False, True))
    assert queue.next_due(conn, "notifications") is None
    limit(queue, 2)
    assert queue.next_due(conn, "notifications") <= time.time()


def test_the_limit_is_lifted_and_lowered_while_tasks_run(installation, queue):
    conn = queue.connect()
    limit(queue, 2)
    fill(queue, 10)
    tasks = queue.claim_ready(conn, "notifications", limit=9)
    assert len(tasks) == 2
    limit(queue, 1)
    with queue.transaction(conn):
        assert queue.ack(conn, tasks[0])
    assert queue.claim_ready(conn, "notifications", limit=9) == []
    limit(queue, None)
    assert len(queue.claim_ready(conn, "notifications", limit=9)) == 8


@pytest.mark.parametrize("slots", [0, -1, "many", 1.5])
def test_a_limit_is_a_whole_number_from_one_on(installation, queue, slots):
    queue.connect()
    with pytest.raises(queue.InvalidTask):
        limit(queue, slots)
    with pytest.raises(sqlite3.IntegrityError), sqlite3.connect(installation.db) as bash:
        bash.execute(
            "insert into task_controls (queue, slots) values ('notifications', ?)", (slots,)
        )
