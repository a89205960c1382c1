"""tasks.py cancel: a waiting task at once, a running one with its whole process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, wait_for
from processes import children, lives

SLEEPER = """#!/bin/sh
sleep 300 &
echo $! $$ > "$HOME/$TASK_ID.pids"
echo begun
wait
"""


class Run:
    """A worker that runs a sleeping task or two: its handlers' processes, once they live."""

    def __init__(self, installation, *tasks: str) -> None:
        installation.handler("sleeper", SLEEPER)
        self.worker = installation.worker("approvals", "--concurrency", len(tasks))
        self.pids = {}
        for name in tasks:
            installation.add(f"approvals sleeper --task-id {name}")
        for name in tasks:
            path = installation.directory / f"{name}.pids"
            told = wait_for(lambda p=path: p.exists() and p.read_text().split(), what="a handler")
            self.pids[name] = [*map(int, told)]

    def lives(self, name: str) -> bool:
        return any(map(lives, self.pids[name]))


def is_cancelled(installation, name: str) -> bool:
    return installation.history(name)["status"] == "cancelled"


@pytest.mark.parametrize("delay", ["0", "600"])
def test_a_waiting_task_is_cancelled_at_once_and_kept_in_the_history(installation, delay):
    installation.add(f"approvals review --task-id w-1 --delay {delay}")
    assert installation.tq("cancel w").stdout == "cancelled w-1\n"
    assert is_cancelled(installation, "w-1") and installation.rows("select 1 from approvals") == []


def test_a_running_task_ends_with_its_grandchildren_and_its_worker_goes_on(installation):
    run = Run(installation, "r-1", "other")
    began = time.monotonic()
    told = {"queue": "approvals", "task_id": "r-1", "cancelled": True, "why": None}
    assert installation.told("cancel r-1") == [told]
    assert time.monotonic() - began < 3, "the worker was not woken"
    assert is_cancelled(installation, "r-1") and not run.lives("r-1")
    # Only the task that was named is ended.
    assert all(map(lives, run.pids["other"])) and installation.statuses()["other"] == "in_progress"
    installation.handler("good", "#!/bin/sh\n")
    assert installation.ends_well("approvals", "good") and run.worker.poll() is None


def test_a_task_whose_worker_does_not_answer_is_reported_as_such(installation):
    run = Run(installation, "r-1")
    run.worker.send_signal(signal.SIGSTOP)
    said = installation.tq("cancel r-1 --wait 0.3", code=1).stderr
    assert "was told, and has not ended it yet" in said
    run.worker.send_signal(signal.SIGCONT)
    assert installation.finished("r-1")["status"] == "cancelled" and not run.lives("r-1")


@pytest.mark.parametrize("dead", ["worker", "worker and supervisor", "worker and handler"])
def test_the_task_of_a_killed_worker_is_cancelled_without_running_again(installation, dead):
    run = Run(installation, "r-1")
    supervisors = children(run.worker.pid)
    run.worker.kill()
    run.worker.wait()
    # The handler goes before its child: with the child's end, it would end well.
    for pid in {"worker and supervisor": supervisors, "worker and handler": run.pids["r-1"][::-1]}.get(dead, ()):  # fmt: skip
        if lives(pid):
            os.kill(pid, signal.SIGKILL)
    assert installation.tq("cancel r-1").stdout == "cancelled r-1\n"
    wait_for(lambda: not run.lives("r-1"), 2, "the end of the group")
    assert is_cancelled(installation, "r-1")


def test_a_task_that_a_python_process_claimed_itself_is_only_its_own_to_end(installation):
    installation.add("approvals review --task-id p-1")
    program = (
        "import queue_helpers as q, sys; queue = q.get_ack_queue('approvals'); id, text = queue.get(); print(id, flush=True);"
        "sys.stdin.readline(); print(queue.ack(id), flush=True)"
    )
    env = installation.env | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    consumer = subprocess.Popen(command, env=env, stdin=-1, stdout=-1, text=True)
    installation.processes.append(consumer)
    row_id = consumer.stdout.readline()
    said = installation.tq("cancel p-1", code=1).stderr
    assert f"process {consumer.pid} claimed it itself" in said
    assert "only that process can end it" in said
    assert installation.rows("select cancel_requested from approvals") == [(0,)]
    consumer.stdin.write("\n")
    consumer.stdin.flush()
    assert consumer.stdout.readline() == row_id
    assert installation.history("p-1")["status"] == "completed"


def test_a_task_that_ends_by_itself_first_is_not_called_cancelled(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.add("approvals good --task-id g-1")
    installation.drain("approvals")
    assert "ended already (completed)" in installation.tq("cancel g-1", code=1).stderr
    assert installation.history("g-1")["status"] == "completed"
