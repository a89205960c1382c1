"""A handler that meets a limit pauses its queue for all workers; nothing is counted, and it goes on
by itself.
"""

import time

import pytest
from conftest import settle, wait_for
from processes import lines, stays_true

from taskqueue.control import controls_of, pause_queue, resume_queue

# Task 2 pauses the queue when it runs for the first time.
HANDLER = """#!/bin/sh
echo "begin $TASK_ID $(date +%s.%N)" >> {directory}/log
if [ "$TASK_ID" = 2 ] && mkdir {directory}/paused 2> /dev/null; then
    echo 'the limit is reached' >&2
    echo '{{"pause": {seconds}, "reason": "until the limit resets"}}'
    exit 75
fi
sleep {takes}
"""


def pausing(installation, seconds: str, takes: str = "0.2") -> None:
    installation.handler(
        "t", HANDLER.format(directory=installation.directory, seconds=seconds, takes=takes)
    )


def fill(queue, count: int) -> None:
    queue.enqueue_tasks(
        "notifications", [queue.new_row("t", {}, str(number)) for number in range(count)]
    )


def control(installation) -> tuple | None:
    found = installation.rows(
        "select paused_at, paused_until, pause_reason, paused_by from task_controls where paused_at is not null"
    )
    return found[0] if found else None


def begun(installation) -> list[tuple[str, float]]:
    return [
        (line.split()[1], float(line.split()[2])) for line in lines(installation.directory / "log")
    ]


@pytest.mark.timeout(120)
def test_at_most_four_more_start_none_counts_and_all_finish(installation, queue):
    pausing(installation, "2")
    fill(queue, 80)
    for _ in range(4):
        installation.worker("notifications")
    at, until, reason, by = wait_for(lambda: control(installation), what="the pause")
    assert (
        until == pytest.approx(at + 2, abs=0.1)
        and reason == "until the limit resets"
        and by == "handler"
    )
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(80,)], 60)
    # The kernel's clock for files and processes may be some milliseconds behind.
    assert len([when for _, when in begun(installation) if at < when < until - 0.02]) <= 4
    assert sorted(name for name, _ in begun(installation)) == sorted([*map(str, range(80)), "2"])
    assert installation.rows("select distinct status, attempts from task_history") == [
        ("completed", 1)
    ]


def test_its_own_worker_claims_nothing_more_before_a_person_resumes_it(installation, queue):
    pausing(installation, "null", takes="0")
    fill(queue, 40)
    worker = installation.worker("notifications")
    wait_for(lambda: control(installation), what="the pause")
    assert [name for name, _ in begun(installation)] == ["0", "1", "2"]
    assert stays_true(lambda: len(begun(installation)) == 3, 0.5)
    assert control(installation)[1] is None
    # It is ready again, uncounted.
    assert installation.rows("select status, attempts from notifications where task_id = '2'") == [
        (1, 0)
    ]
    conn = queue.connect()
    with queue.transaction(conn):
        assert resume_queue(conn, "notifications")
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(40,)])
    assert worker.poll() is None


def test_what_runs_goes_on(installation, queue):
    pausing(installation, "null", takes="1")
    fill(queue, 10)
    installation.worker("notifications", "--concurrency", 4)
    wait_for(lambda: control(installation), what="the pause")
    wait_for(
        lambda: installation.rows("select count(*) from notifications where status = 2") == [(0,)]
    )
    assert installation.rows("select status, count(*) from task_history") == [("completed", 3)]


def test_other_queues_of_the_same_worker_go_on(installation, queue):
    pausing(installation, "null")
    fill(queue, 10)
    worker = installation.worker("notifications", "completions")
    wait_for(lambda: control(installation), what="the pause")
    queue.enqueue_task("completions", "t", {}, "elsewhere")
    installation.finished("elsewhere")
    assert worker.poll() is None


def test_idle_exit_waits_for_a_pause_that_ends_and_drain_does_not(installation, queue):
    conn = queue.connect()
    installation.handler("t", "#!/bin/sh\n")
    fill(queue, 3)
    with queue.transaction(conn):
        pause_queue(conn, "notifications", time.time() + 1.5, "for a while", by="person")
    assert (
        installation.run(
            "worker.py", "notifications", "--drain", "--handlers", installation.handlers
        ).returncode
        == 0
    )
    assert installation.rows("select count(*) from task_history") == [(0,)]
    worker = installation.worker("notifications", "--idle-exit", "0.3")
    assert worker.wait(20) == 0
    assert installation.rows("select count(*) from task_history") == [(3,)]


def test_consumers_of_other_programs_are_held_back_as_well(installation, queue):
    conn = queue.connect()
    fill(queue, 2)
    with queue.transaction(conn):
        pause_queue(conn, "notifications", None, "by hand", by="person")
    with pytest.raises(queue.Empty):
        queue.get_ack_queue("notifications").get(timeout=0.1)
    with pytest.raises(queue.Empty):
        queue.get_queue("notifications").get(block=False)
    assert queue.dequeue_task("notifications") is None
    with queue.transaction(conn):
        resume_queue(conn, "notifications")
    assert queue.dequeue_task("notifications")["task_id"] == "0"


@pytest.mark.parametrize(
    ("said", "status", "until"),
    [
        ('{"pause": 60}', 1, 60),
        ('{"pause": 1e300}', 1, 30 * 86_400),
        ('{"pause": null}', 1, None),
        # None of these is a time: the task alone waits, for a minute.
        ('{"pause": NaN}', 3, ...),
        ('{"pause": -5}', 3, ...),
        ('{"pause": true}', 3, ...),
        ('{"pause": "60"}', 3, ...),
        ('{"pause": [60]}', 3, ...),
        ("pause 60", 3, ...),
    ],
)
def test_only_a_number_of_seconds_or_null_pauses(installation, queue, said, status, until):
    settle(queue, f"some text\n{said}\n", 75)
    assert installation.rows("select status, attempts from notifications") == [(status, 0)]
    held = control(installation)
    if until is ...:
        assert held is None
    else:
        assert (held[1] and held[1] - held[0]) == (until and pytest.approx(until, abs=1))
        assert held[3] == "handler"


def test_who_no_longer_holds_the_task_pauses_nothing(installation, queue):
    def finish(conn, task) -> None:
        assert queue.ack(conn, task)

    assert settle(queue, '{"pause": null}', 75, before=finish).status == "lost"
    assert control(installation) is None


def test_a_handler_never_shortens_a_persons_pause(installation, queue):
    conn, now = queue.connect(), time.time()
    for until, by, holds in ((now + 60, "person", now + 60), (now + 9, "handler", now + 60), (now + 99, "handler", now + 99),
                             (None, "person", None), (now + 999, "handler", None)):  # fmt: skip
        with queue.transaction(conn):
            assert pause_queue(conn, "notifications", until, by, by=by) == (until == holds)
        assert controls_of(conn)["notifications"].until == holds
