"""What --on-duplicate promises, with fifty processes at once: skip, replace or rerun.

Whoever writes notes so in a file before its transaction ends, so the file's order is the order of
the commits.
"""

import json
import os
from itertools import pairwise

import pytest
from crowd import PROCESSES, Crowd

pytestmark = pytest.mark.first

ROUNDS = 8


def rows(conn) -> list[tuple]:
    return [
        (
            json.loads(data)["data"]["n"],
            json.loads(json.loads(again)[0])["data"]["n"] if again else None,
            status,
            attempts,
        )
        for data, again, status, attempts in conn.execute(
            "select data, rerun, status, attempts from notifications"
        )
    ]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("how", ["skip", "replace", "rerun"])
def test_fifty_at_once_many_times(installation, queue, how, is_running):
    conn = queue.connect()
    crowd = Crowd(installation, how, ROUNDS)
    for number in range(ROUNDS):
        task = None
        if is_running:
            queue.enqueue_task("notifications", "t", {"n": "running"}, "one")
            (task,) = queue.claim_ready(conn, "notifications")
        crowd.start()
        crowd.wait()
        told = crowd.told()[number * PROCESSES :]
        first, last = told[0][1], told[-1][1]
        assert len(told) == PROCESSES and [word for word, _ in told].count("new") == (
            not is_running
        )
        if is_running:
            assert rows(conn) == [("running", None if how == "skip" else last, 2, 1)]
            with queue.transaction(conn):
                assert queue.ack(conn, task)
            # One more run, with the latest data, and nothing piled up.
            assert rows(conn) == ([] if how == "skip" else [(last, None, 1, 0)])
        else:
            assert rows(conn) == [(first if how == "skip" else last, None, 1, 0)]
        queue.dequeue_task("notifications")
        assert rows(conn) == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["replace", "rerun"])
def test_no_change_is_missed_and_none_piles_up_while_runs_come_and_go(installation, queue, how):
    conn = queue.connect()
    crowd = Crowd(installation, how, 10)
    fd, runs, owner = os.open(crowd.log, os.O_WRONLY | os.O_APPEND), 0, queue.owner_name()
    crowd.start(10)
    while len(crowd.told()) < PROCESSES * 10 + runs or queue.has_ready(conn, "notifications"):
        with queue.transaction(conn, durable=False):
            tasks = queue.claim(conn, "notifications", owner, limit=9)
            for task in tasks:
                os.write(fd, f"run {task.data['n']}\n".encode())
        assert len(tasks) <= 1
        for task in tasks:
            runs += 1
            with queue.transaction(conn, durable=False):
                assert (
                    queue.nack(conn, task, error="no", delay=0)
                    if runs % 3 == 0
                    else queue.ack(conn, task)
                )
    os.close(fd)
    crowd.wait(10)
    told = crowd.told()
    assert len(told) == PROCESSES * 10 + runs and rows(conn) == []
    # Each run has the data of the latest firing before it, and the last firing was followed by a
    # run.
    assert told[-1][0] == "run"
    assert all(n == latest for (_, latest), (what, n) in pairwise(told) if what == "run")


def test_a_task_keeps_its_row_and_place_and_a_delay_moves_its_time(installation, queue):
    conn = queue.connect()
    for name in ("one", "two"):
        queue.enqueue_task("notifications", "t", {"n": 1}, name)
    assert queue.enqueue_tasks(
        "notifications", [queue.new_row("t", {"n": 2}, "one", on_duplicate="replace")]
    ) == [("one", False)]
    assert [(task.id, task.data) for task in queue.claim_ready(conn, "notifications", limit=1)] == [
        (1, {"n": 2})
    ]
    for n, delay in ((3, 50.0), (4, 0.0), (5, 5_000.0)):
        queue.enqueue_task(
            "notifications", "t", {"n": n}, "two", delay=delay, on_duplicate="replace"
        )
    assert queue.claim_ready(conn, "notifications") == []
    [(due,)] = installation.rows("select due_at from notifications where id = 2")
    assert due == pytest.approx(queue.time.time() + 5_000, abs=60)
    assert installation.rows("select data ->> '$.data.n' from notifications where id = 2") == [(5,)]


def test_a_failed_run_is_tried_again_with_the_latest_data_and_all_its_attempts(queue):
    conn = queue.connect()
    queue.enqueue_task("notifications", "t", {"n": 1}, "one")
    for n in (1, 2, 3):
        (task,) = queue.claim_ready(conn, "notifications", max_attempts=2)
        assert (task.attempts, task.data["n"]) == (1, n)
        queue.enqueue_task("notifications", "t", {"n": n + 1}, "one", on_duplicate="rerun")
        with queue.transaction(conn):
            assert queue.nack(conn, task, error="no", delay=0) == "scheduled"
    for attempt in (1, 2):
        (task,) = queue.claim_ready(conn, "notifications", max_attempts=2)
        assert task.attempts == attempt
        with queue.transaction(conn):
            queue.nack(conn, task, error="no", delay=0)
    assert conn.execute("select status from task_history").fetchall() == [("failed",)]


def test_so_has_the_latest_data_of_one_that_waits_for_its_retry(queue):
    conn = queue.connect()
    queue.enqueue_task("notifications", "t", {"n": 1}, "one")
    for n in (2, 3, 4):
        (task,) = queue.claim_ready(conn, "notifications", max_attempts=2)
        assert task.attempts == 1
        with queue.transaction(conn):
            assert queue.nack(conn, task, error="no", delay=0) == "scheduled"
        queue.enqueue_task("notifications", "t", {"n": n}, "one", on_duplicate="replace")


@pytest.mark.parametrize("moment", ["it waits", "it runs", "it runs and will again", "it has run"])
@pytest.mark.parametrize("how", ["replace", "rerun"])
def test_the_same_firing_told_twice_makes_one_run(queue, how, moment):
    conn = queue.connect()

    def fire(firing: str) -> None:
        row = queue.new_row("t", {"n": firing}, "one", on_duplicate=how, firing=firing, window=10)
        queue.enqueue_tasks("notifications", [row])

    def run() -> list[str]:
        tasks = queue.claim_ready(conn, "notifications", limit=9)
        for task in tasks:
            with queue.transaction(conn):
                assert queue.ack(conn, task)
        return [task.data["n"] for task in tasks]

    fire("first")
    if moment.startswith("it runs"):
        (task,) = queue.claim_ready(conn, "notifications")
        if "again" in moment:
            fire("second")
        fire("first")
        with queue.transaction(conn):
            assert queue.ack(conn, task)
        assert run() == (["second"] if "again" in moment else [])
    else:
        if moment == "it has run":
            assert run() == ["first"]
        fire("first")
        assert run() == ([] if moment == "it has run" else ["first"])
    # Another firing is another run, however soon it comes.
    fire("third")
    assert run() == ["third"]


def test_rerun_ignores_the_window_and_skip_does_not(queue):
    conn = queue.connect()
    for how in ("skip", "rerun"):
        queue.enqueue_task("notifications", "t", {}, how)
        assert len(queue.claim_ready(conn, "notifications")) == 1
        conn.execute("delete from notifications")
        conn.execute(
            """insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
                        values ('notifications', 1, ?, 't', 'completed', '{}', ?)""",
            (how, queue.utc(queue.time.time() - 1)),
        )
        [stored] = queue.enqueue_tasks(
            "notifications", [queue.new_row("t", {}, how, window=60, on_duplicate=how)]
        )
        assert stored.is_new == (how == "rerun")


TERMS = "select due_at - :now > 3000, expires_at - due_at, priority, group_id, data ->> '$.data.n', attempts, released_at from notifications"


@pytest.mark.parametrize("waits", ["ready", "scheduled", "retrying", "running"])
@pytest.mark.parametrize("how", ["replace", "rerun"])
def test_the_later_firing_brings_its_own_terms(queue, how, waits):
    conn = queue.connect()
    first = {"ttl": 2.0, "priority": 5, "group": "old"}
    first |= {"delay": 60.0} if waits == "scheduled" else {}
    queue.enqueue_task("notifications", "t", {"n": 1}, "one", **first)
    if waits in ("retrying", "running"):
        (task,) = queue.claim_ready(conn, "notifications")
    if waits == "retrying":
        with queue.transaction(conn):
            queue.nack(conn, task, error="no", delay=60)
    later = {"delay": 3_600.0, "ttl": 60.0, "priority": -1, "group": "new", "on_duplicate": how}
    queue.enqueue_task("notifications", "t", {"n": 2}, "one", **later)
    if waits == "running":
        with queue.transaction(conn):
            queue.ack(conn, task)
    rows = conn.execute(TERMS, {"now": queue.time.time()}).fetchall()
    assert rows == [(1, pytest.approx(60.0, abs=1e-3), -1, "new", 2, 0, None)]
    # And none of the earlier one's are left: without terms it has none, and runs now.
    queue.enqueue_task("notifications", "t", {"n": 3}, "one", on_duplicate=how)
    columns = "due_at, expires_at, delayed_at, priority, group_id, status"
    assert conn.execute(f"select {columns} from notifications").fetchall() == [
        (None, None, None, 0, None, 1)
    ]


def test_a_head_that_is_replaced_with_a_delay_or_another_group_gives_its_turn_to_the_next(queue):
    conn = queue.connect()
    for options in ({"delay": 7 * 86_400.0, "group": "g"}, {"group": "other"}, {"hold": True}):
        for name in ("head", "next"):
            queue.enqueue_task("notifications", "t", {}, name, group="g")
        (task,) = queue.claim_ready(conn, "notifications", limit=9)
        with queue.transaction(conn):
            queue.nack(conn, task, error="no", delay=3_600)
        assert queue.claim_ready(conn, "notifications") == []
        queue.enqueue_task("notifications", "t", {}, "head", on_duplicate="replace", **options)
        claimed = [task.task_id for task in queue.claim_ready(conn, "notifications", limit=9)]
        assert "next" in claimed and ("head" in claimed) == (options == {"group": "other"})
        conn.execute("delete from notifications")


def test_a_ttl_counts_from_when_the_task_is_due(queue):
    conn, now = queue.connect(), queue.time.time()
    for name, options in {
        "delay": {"delay": 60.0},
        "at": {"at": now + 60},
        "now": {},
        "hold": {"hold": True},
    }.items():
        queue.enqueue_task("notifications", "t", {}, name, ttl=10.0, **options)
    left = dict(conn.execute("select task_id, expires_at from notifications"))
    assert {name: round((at - now) / 5) * 5 for name, at in left.items()} == {
        "delay": 70, "at": 70, "now": 10, "hold": 10,
    }  # fmt: skip
