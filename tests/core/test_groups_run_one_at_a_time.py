"""Tasks of one group run one at a time and in order, whoever runs them, whoever is killed, and
whoever inserts them.
"""

import json
import multiprocessing
import os
import random
import signal
from itertools import groupby

import pytest
from conftest import end, wait_for
from processes import lines

GROUPS, OF_EACH = 16, 40

# Its lines are appended in one write each, so their order is that of what happened.
HANDLER = """#!/bin/sh
echo "begin $TASK_ID $$" >> {log}
sleep 0.01
echo "end $TASK_ID $$" >> {log}
"""


def statuses(installation, queue: str = "notifications") -> list[tuple]:
    return installation.rows(f"select id, status from {queue} order by id")


@pytest.mark.timeout(240)
def test_four_workers_and_kills_run_each_group_in_order(installation, queue):
    log = installation.directory / "log"
    installation.handler("t", HANDLER.format(log=log))
    # The first of a group is ready before the others come; then the highest priority comes first.
    order = [0, *sorted(range(1, OF_EACH), key=lambda n: (-(n % 3), n))]
    rows = [
        queue.new_row("t", {}, f"{group}-{n}", group=str(group), priority=n % 3 if n else 0)
        for n in range(OF_EACH)
        for group in range(GROUPS)
    ]
    queue.enqueue_tasks("notifications", rows)
    dice, killed = random.Random(7), set()

    def worker():
        return installation.worker(
            "notifications", "--concurrency", 4, "--max-attempts", 99, "--backoff", 0.01
        )

    workers = [worker() for _ in range(4)]
    for share in range(1, 13):
        wait_for(lambda share=share: len(lines(log)) > share * 80, 60, "more lines")
        if share % 3:
            dead = dice.randrange(4)
            workers[dead].kill()
            workers[dead].wait()
            workers[dead] = worker()
        else:
            begun = [line.split()[2] for line in lines(log) if line.startswith("begin")]
            ended = {line.split()[2] for line in lines(log) if line.startswith("end")}
            for pid in [int(pid) for pid in begun if pid not in ended][:2]:
                try:
                    os.killpg(pid, signal.SIGKILL)
                    killed.add(str(pid))
                except ProcessLookupError:
                    pass
    finished = "select count(*) from task_history where status = 'completed'"
    wait_for(
        lambda: installation.rows(finished) == [(GROUPS * OF_EACH,)], 120, "the end of all tasks"
    )
    assert killed and statuses(installation) == []
    told = [line.split() for line in lines(log)]
    for group in range(GROUPS):
        mine = [
            (what, task_id.split("-")[1], pid)
            for what, task_id, pid in told
            if task_id.split("-")[0] == str(group)
        ]
        assert [int(n) for n, _ in groupby(n for what, n, _ in mine if what == "begin")] == order
        running = None
        for what, n, pid in mine:
            if what == "begin":
                assert running is None or running in killed, (
                    f"{group}-{n} began while {running} ran"
                )
                running = pid
            else:
                assert running == pid
                running = None


def consume(state, log) -> None:
    """A consumer of another program: it notes when it has a task and when it is about to give it
    up.
    """
    import queue_helpers

    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    tasks = queue_helpers.SQLiteAckQueue(state, name="notifications")
    while True:
        try:
            row_id, text = tasks.get(timeout=0.2)
        except queue_helpers.Empty:
            return
        name = json.loads(text)["task_id"]
        os.write(fd, f"begin {name} {os.getpid()}\n".encode())
        os.write(fd, f"end {name} {os.getpid()}\n".encode())
        (tasks.nack if name.endswith("-0") and tasks.size % 2 else tasks.ack)(id=row_id)


def test_so_do_consumers_of_other_programs_beside_a_worker(installation, queue):
    log = installation.directory / "log"
    installation.handler("t", HANDLER.format(log=log))
    queue.enqueue_tasks(
        "notifications",
        [
            queue.new_row("t", {}, f"{group}-{n}", group=str(group))
            for n in range(20)
            for group in range(5)
        ],
    )
    installation.worker("notifications", "--concurrency", 2)
    spawn = multiprocessing.get_context("spawn")
    consumers = [spawn.Process(target=consume, args=(installation.state, log)) for _ in range(2)]
    for consumer in consumers:
        consumer.start()
    wait_for(
        lambda: (
            installation.rows("select count(*) from task_history where status = 'completed'")
            == [(100,)]
        ),
        60,
    )
    for consumer in consumers:
        consumer.join(20)
    told = [line.split() for line in lines(log)]
    assert len({pid for *_, pid in told}) > 3
    for group in range(5):
        mine = [line for line in told if line[1].split("-")[0] == str(group)]
        assert [line[0] for line in mine] == ["begin", "end"] * (len(mine) // 2)
        assert all(one[1:] == two[1:] for one, two in zip(mine[::2], mine[1::2], strict=True))
        assert [int(n) for n, _ in groupby(line[1].split("-")[1] for line in mine)] == [*range(20)]


def test_the_sqlite3_command_obeys_too(installation, queue):
    queue.connect()
    installation.sqlite3(
        "insert into notifications (data, group_id) values ('{}', 'a'), ('{}', 'a'), ('{}', 'b'), ('{}', null), ('{}', 'a')"
    )
    assert statuses(installation) == [(1, 1), (2, 4), (3, 1), (4, 1), (5, 4)]
    installation.sqlite3(
        "update notifications set priority = 5 where id = 5; delete from notifications where id = 1"
    )
    assert statuses(installation) == [(2, 4), (3, 1), (4, 1), (5, 1)]
    assert (
        installation.sqlite3("select status from task_queue where task_id = 'notifications-2'")
        == "blocked"
    )


def test_an_ignored_duplicate_moves_nothing(installation, queue):
    queue.connect()
    task = """'{"task_id": "x", "task_type": "t", "data": {}}', 'a'"""
    for _ in range(3):
        installation.sqlite3(f"insert into notifications (data, group_id) values ({task})")
    assert statuses(installation) == [(1, 1)]


def test_one_that_waits_for_its_retry_keeps_the_turn_and_one_that_was_only_delayed_does_not(
    installation, queue
):
    conn = queue.connect()
    queue.enqueue_task("notifications", "t", {}, "later", group="a", delay=600)
    queue.enqueue_task("notifications", "t", {}, "held", group="a", hold=True)
    queue.enqueue_task("notifications", "t", {}, "first", group="a")
    queue.enqueue_task("notifications", "t", {}, "next", group="a")
    (task,) = queue.claim_ready(conn, "notifications", limit=9)
    assert task.task_id == "first"
    with queue.transaction(conn):
        assert queue.release(conn, task, delay=600)
    assert queue.claim_ready(conn, "notifications", limit=9) == []
    installation.sqlite3("update notifications set due_at = 1 where task_id = 'first'")
    (task,) = queue.claim_ready(conn, "notifications", limit=9)
    assert task.task_id == "first"
    with queue.transaction(conn):
        assert queue.ack(conn, task)
    assert [task.task_id for task in queue.claim_ready(conn, "notifications", limit=9)] == ["next"]


def test_of_tasks_that_become_due_at_once_the_highest_priority_has_the_turn(installation, queue):
    conn = queue.connect()
    for priority in (0, 1, 0):
        queue.enqueue_task("notifications", "t", {}, group="a", delay=600.0, priority=priority)
    installation.sqlite3("update notifications set due_at = 1")
    order = []
    while tasks := queue.claim_ready(conn, "notifications", limit=9):
        order.append([task.id for task in tasks])
        with queue.transaction(conn):
            assert queue.ack(conn, tasks[0])
    assert order == [[2], [1], [3]]


def test_a_worker_that_is_killed_with_its_handler_leaves_the_turn_to_the_same_task(
    installation, queue
):
    log, go = installation.directory / "log", installation.directory / "go"
    installation.handler("t", f'#!/bin/sh\necho "$TASK_ID $$" >> {log}\n[ -e {go} ] || sleep 600\n')
    for name in ("one", "two"):
        queue.enqueue_task("notifications", "t", {}, name, group="a")
    worker = installation.worker("notifications", "--concurrency", 4)
    (first,) = wait_for(lambda: lines(log))
    end(worker)
    assert first.startswith("one ")
    go.touch()
    os.killpg(int(first.split()[1]), signal.SIGKILL)
    installation.worker("notifications", "--concurrency", 4)
    installation.finished("two")
    assert [line.split()[0] for line in lines(log)] == ["one", "one", "two"]
