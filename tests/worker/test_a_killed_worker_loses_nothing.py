import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, wait_for
from processes import lines, lives, stays_true

pytestmark = pytest.mark.core

LONG = '#!/bin/sh\necho "$TASK_ATTEMPT $$" >>"$HOME/runs"\nexec sleep 100\n'


@pytest.mark.alone
def test_the_task_of_a_killed_worker_runs_again_at_once(installation):
    installation.handler("long", LONG)
    runs, took = installation.directory / "runs", []
    installation.enqueue("notifications", "long")
    holder = installation.worker("notifications", "--max-attempts", 100)
    wait_for(lambda: lines(runs))
    for kills in range(1, 13):
        idle = installation.worker("notifications", "--max-attempts", 100)
        attempt, group = map(int, lines(runs)[-1].split())
        assert attempt == kills
        began = time.monotonic()
        holder.kill()
        os.killpg(group, signal.SIGKILL)
        wait_for(lambda: len(lines(runs)) > len(took) + 1, what="the task's next run")
        took.append(time.monotonic() - began)
        holder.wait()
        holder = idle
    assert max(took) < 0.5, took
    os.killpg(int(lines(runs)[-1].split()[1]), signal.SIGKILL)


def test_a_crash_can_be_backed_off(installation):
    installation.handler("long", LONG)
    installation.enqueue("notifications", "long")
    holder = installation.worker("notifications")
    (run,) = wait_for(lambda: lines(installation.directory / "runs"))
    survivor = installation.worker("notifications", "--crash-backoff", 3600)
    holder.kill()
    os.killpg(int(run.split()[1]), signal.SIGKILL)
    wait_for(
        lambda: installation.rows("select 1 from notifications where status = 3"),
        what="a scheduled task",
    )
    assert installation.rows(
        "select attempts from notifications where due_at > unixepoch() + 3000"
    ) == [(1,)]
    # It says so when it is committed.
    wait_for(lambda: "its worker died" in survivor.log.read_text(), what="a word on it")


def test_a_handler_that_kills_its_worker_ends_as_a_dead_letter_with_the_reason(installation):
    installation.handler(
        "killer",
        '#!/bin/sh\necho "$TASK_ATTEMPT" >>"$HOME/runs"\nkill -9 $(ps -o ppid= -p $PPID) $PPID\n',
    )
    task = installation.enqueue("notifications", "killer")
    for _ in range(3):
        worker = installation.worker("notifications", "--max-attempts", 3, ready=False)
        assert worker.wait(15) == -signal.SIGKILL
    installation.worker("notifications", "--max-attempts", 3)
    done = installation.finished(task)
    assert (done["status"], done["attempts"]) == ("failed", 3)
    assert "its worker died" in done["error"] and "attempt 3 of 3" in done["error"]
    assert lines(installation.directory / "runs") == ["1", "2", "3"]


def test_a_handler_that_kills_its_parent_ends_so_too_and_the_worker_goes_on(installation):
    """Its parent is the supervisor; the worker lives through that by beginning again, in the same
    process.
    """
    installation.handler(
        "patricide", '#!/bin/sh\necho "$TASK_ATTEMPT" >>"$HOME/runs"\nkill -9 $PPID\n'
    )
    installation.handler("fine", "#!/bin/sh\n")
    task = installation.enqueue("notifications", "patricide")
    worker = installation.worker("notifications", "--max-attempts", 3)
    done = installation.finished(task)
    assert (done["status"], done["attempts"]) == ("failed", 3) and "its worker died" in done[
        "error"
    ]
    assert lines(installation.directory / "runs") == ["1", "2", "3"]
    assert installation.ends_well("notifications", "fine")
    assert worker.poll() is None and worker.log.read_text().count("starting afresh") == 3


def test_a_handler_that_outlives_its_killed_parent_is_not_run_twice(installation):
    installation.handler(
        "patricide",
        '#!/bin/sh\necho $$ >>"$HOME/runs"\n[ "$TASK_ATTEMPT" = 2 ] && exit\nkill -9 $PPID\n'
        'until [ -e "$HOME/go" ]; do sleep 0.02; done\n',
    )
    task = installation.enqueue("notifications", "patricide")
    worker = installation.worker("notifications")
    wait_for(lambda: "starting afresh" in worker.log.read_text())
    assert stays_true(lambda: len(lines(installation.directory / "runs")) == 1, 1)
    (installation.directory / "go").touch()
    assert installation.finished(task)["attempts"] == 2


def test_nothing_is_taken_from_a_stopped_worker(installation):
    installation.handler(
        "wait",
        '#!/bin/sh\necho $$ >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.02; done\necho done\n',
    )
    runs, go = installation.directory / "runs", installation.directory / "go"
    task = installation.enqueue("notifications", "wait")
    holder = installation.worker("notifications")
    (pid,) = wait_for(lambda: lines(runs))
    holder.send_signal(signal.SIGSTOP)
    try:
        installation.worker("notifications")
        go.touch()
        wait_for(lambda: not lives(int(pid)), what="the handler's end")
        # nobody holds its output now, and its exit status lies there: only the owner's lock says
        # that it is not ours
        assert stays_true(
            lambda: installation.rows("select status from notifications") == [(2,)], 6.5
        )
    finally:
        holder.send_signal(signal.SIGCONT)
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["result"]) == ("completed", 1, "done\n")
    assert len(lines(runs)) == 1


def consumer_of_a_task(installation, how: str) -> tuple[subprocess.Popen, int]:
    """A process that has claimed a task, and the child that will outlive it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(ROOT), how],
        env=installation.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


CONSUMER = """
import os, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import queue_helpers
queue = queue_helpers.get_ack_queue("notifications")
queue.get(timeout=20)
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
else:
    child = subprocess.Popen(["sleep", "60"], close_fds=False).pid
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["fork", "exec"])
def test_a_child_that_outlives_a_consumer_does_not_keep_its_task(installation, queue, how):
    installation.enqueue("notifications", "any")
    consumer, child = consumer_of_a_task(installation, how)
    try:
        assert queue.recover() == ([], 0)
        consumer.kill()
        consumer.wait()
        ((task, outcome),) = wait_for(lambda: queue.recover()[0], 5)
        assert outcome.status == "scheduled" and "its worker died" in outcome.error
        assert task.attempts == 1
        assert lives(child)
        assert installation.rows("select status, attempts, owner from notifications") == [
            (1, 1, None)
        ]
    finally:
        os.kill(child, signal.SIGKILL)
        consumer.stdout.close()


def test_a_consumer_is_told_of_the_task_of_a_killed_one(installation, queue):
    installation.enqueue("notifications", "any")
    consumer, child = consumer_of_a_task(installation, "exec")
    os.kill(child, signal.SIGKILL)
    mine = queue.get_ack_queue("notifications")
    with pytest.raises(queue.Empty):
        mine.get(timeout=0.3)
    consumer.kill()
    began = time.monotonic()
    row_id, _ = mine.get(timeout=4)
    assert time.monotonic() - began < 2
    assert mine.ack(row_id) == row_id
    consumer.wait()
    consumer.stdout.close()


def test_a_death_between_a_look_and_a_pause_is_heard_too(installation, queue, monkeypatch):
    from watchdog.events import FileClosedEvent

    from taskqueue.wake import Heard

    installation.enqueue("notifications", "any")
    pause, looks, died = Heard.pause, [], []

    def die_and_pause(heard, longest):
        looks.append(1)
        if len(looks) == 10:
            with queue.transaction(conn := queue.connect()):
                queue.claim(conn, "notifications", "1-dead")
            died.append(time.monotonic())
            # As after an hour without an event: else the next look comes soon anyway.
            heard._at -= 3600
            watch.dispatch(FileClosedEvent(str(installation.state / "workers" / "1-dead")))
        pause(heard, longest)

    monkeypatch.setattr(Heard, "pause", die_and_pause)
    watch = queue.Watch(installation.state)
    watch.start()
    theirs = "select 1 from notifications where owner = '1-dead'"
    wait_for(lambda: died and not installation.rows(theirs), what="the recovery")
    assert time.monotonic() - died[0] < 1
