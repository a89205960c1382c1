"""The clock steps by hours (NTP, a virtual machine, a person): no firing is dropped for it, and no
retry waits longer.
"""

import json
import time

import pytest

STOP = json.dumps({"hook_event_name": "Stop", "session_id": "s", "cwd": "/", "prompt": "x"})
HOURS = 3600.0


def fire(installation, *args) -> None:
    done = installation.run(
        "enqueue.py",
        "--hook",
        "notifications",
        "check",
        "--once-per",
        "workspace",
        *args,
        input=STOP,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def step_clock(installation, hours: float) -> None:
    """What the database says after the clock was set by so many hours: all its times are as much
    off.
    """
    steps = f"{-hours} hours"
    for name in ("enqueued_at", "started_at", "completed_at"):
        installation.sqlite3(
            f"update task_history set {name} = strftime('%Y-%m-%d %H:%M:%f', {name}, '{steps}')"
        )


@pytest.mark.parametrize("hours", [-25.0, -3.0, -0.1, 0.1, 3.0, 25.0])
@pytest.mark.parametrize(
    "how", [[], ["--on-duplicate", "rerun"], ["--window", "5min"]], ids=" ".join
)
def test_a_firing_after_the_step_is_a_task_of_its_own(installation, queue, hours, how):
    fire(installation, *how)
    assert queue.dequeue_task("notifications")
    fire(installation, *how)
    assert queue.dequeue_task("notifications") is None, "so the rest of this test can fail"
    step_clock(installation, hours)
    fire(installation, *how)
    assert queue.dequeue_task("notifications")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: [seconds it is off]."""
    real, off = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + off[0])
    return off


def fail_once(queue, delay: float):
    conn = queue.connect()
    (task,) = queue.claim_ready(conn, "notifications")
    with queue.transaction(conn):
        assert queue.nack(conn, task, error="no", delay=delay) == "scheduled"
    return conn


@pytest.mark.parametrize("hours", [-24, -2, 2, 24])
def test_a_retry_is_not_held_back_beyond_its_own_delay(queue, clock, hours):
    queue.enqueue_task("notifications", "t", {})
    conn = fail_once(queue, 60.0)
    assert queue.claim_ready(conn, "notifications") == [], "its delay is not over"
    clock[0] += hours * HOURS
    clock[0] += 61.0
    assert len(queue.claim_ready(conn, "notifications")) == 1


def test_a_step_back_gives_a_task_of_a_later_time_no_earlier_one(queue, clock):
    """A person's --at means the clock's time, whatever the clock was when that was said."""
    queue.enqueue_task("notifications", "t", {}, at=time.time() + 60.0)
    clock[0] -= 2 * HOURS
    conn = queue.connect()
    assert queue.claim_ready(conn, "notifications") == []
    clock[0] += 2 * HOURS + 61.0
    assert len(queue.claim_ready(conn, "notifications")) == 1


@pytest.mark.parametrize("hours", [-24, -1])
def test_a_clock_that_was_set_back_leaves_no_delay_and_no_pause_in_force_for_so_long(
    queue, clock, hours
):
    """A person's --at and a pause without an end stay as they are."""
    from taskqueue import control

    queue.enqueue_task("notifications", "t", {}, "delayed", delay=1.0)
    queue.enqueue_task("notifications", "t", {}, "at", at=time.time() + 60.0)
    conn = queue.connect()
    with queue.transaction(conn):
        control.pause_queue(conn, "notifications", time.time() + 2.0, "limit", by="handler")
    assert queue.claim_ready(conn, "notifications") == []
    clock[0] += hours * HOURS
    assert [t.task_id for t in queue.claim_ready(conn, "notifications", limit=9)] == ["delayed"]
    assert control.controls_of(conn) == {}
    with queue.transaction(conn):
        # A pause that is over is no later one.
        assert control.pause_queue(conn, "notifications", time.time() + 1.0, None, by="handler")
        assert control.pause_queue(conn, "approvals", None, None, by="person")
    clock[0] += hours * HOURS
    assert control.controls_of(conn)["approvals"].paused


def test_a_small_step_back_starts_nothing_early(queue, clock):
    queue.enqueue_task("notifications", "t", {}, delay=8 * HOURS)
    clock[0] -= 60.0
    assert queue.claim_ready(queue.connect(), "notifications") == []
