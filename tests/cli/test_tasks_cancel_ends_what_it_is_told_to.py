"""tasks.py cancel: a waiting task at once, a running one with its whole process group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import wait_for
from processes import children

SLEEPER = """#!/bin/sh
sleep 300 &
echo $! $$ > "$HOME/$TASK_ID.pids"
echo begun
wait
"""


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def pids(installation, task_id: str) -> list[str]:
    """The handler's processes, once they run."""
    path = installation.directory / f"{task_id}.pids"
    return wait_for(lambda: path.exists() and path.read_text().split(), what="a running handler")


@pytest.mark.parametrize("delay", ["0", "600"])
def test_a_waiting_task_is_cancelled_at_once_and_kept_in_the_history(installation, delay):
    installation.enqueue("approvals", "review", "{}", "--task-id", "w-1", "--delay", delay)
    done = installation.run("tasks.py", "cancel", "w")
    assert (done.returncode, done.stdout) == (0, "cancelled w-1\n"), done.stderr
    assert installation.history("w-1")["status"] == "cancelled"
    assert installation.rows("select 1 from approvals") == []
    done = installation.run("tasks.py", "cancel", "w-1")
    assert done.returncode == 1 and "ended already (cancelled)" in done.stderr


def test_a_running_task_ends_with_its_grandchildren_and_its_worker_goes_on(installation):
    installation.handler("sleeper", SLEEPER)
    installation.handler("good", "#!/bin/sh\n")
    worker = installation.worker("approvals")
    installation.enqueue("approvals", "sleeper", "{}", "--task-id", "r-1")
    processes = pids(installation, "r-1")
    began = time.monotonic()
    done = installation.run("tasks.py", "cancel", "r-1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"queue": "approvals", "task_id": "r-1", "cancelled": True, "why": None}
    ]
    assert time.monotonic() - began < 3, "the worker was not woken"
    assert installation.history("r-1")["status"] == "cancelled"
    assert not any(alive(pid) for pid in processes)
    installation.enqueue("approvals", "good", "{}", "--task-id", "next")
    assert installation.finished("next")["status"] == "completed"
    assert worker.poll() is None


def test_only_the_task_that_was_named_is_ended(installation):
    installation.handler("sleeper", SLEEPER)
    installation.worker("approvals", "--concurrency", "2")
    for name in ("one", "two"):
        installation.enqueue("approvals", "sleeper", "{}", "--task-id", name)
    kept = pids(installation, "one")
    pids(installation, "two")
    assert installation.run("tasks.py", "cancel", "two").returncode == 0
    assert all(alive(pid) for pid in kept)
    assert installation.rows("select task_id, status from approvals") == [("one", 2)]


def test_a_task_whose_worker_does_not_answer_is_reported_as_such(installation):
    import signal

    installation.handler("sleeper", SLEEPER)
    worker = installation.worker("approvals")
    installation.enqueue("approvals", "sleeper", "{}", "--task-id", "r-1")
    processes = pids(installation, "r-1")
    worker.send_signal(signal.SIGSTOP)
    done = installation.run("tasks.py", "cancel", "r-1", "--wait", "0.3")
    assert done.returncode == 1 and "was told, and has not ended it yet" in done.stderr
    worker.send_signal(signal.SIGCONT)
    assert installation.finished("r-1")["status"] == "cancelled"
    assert not any(alive(pid) for pid in processes)


def test_the_task_of_a_killed_worker_is_cancelled_without_running_again(installation):
    installation.handler("sleeper", SLEEPER)
    worker = installation.worker("approvals")
    installation.enqueue("approvals", "sleeper", "{}", "--task-id", "r-1")
    processes = pids(installation, "r-1")
    worker.kill()
    worker.wait()
    # The handler goes before its child: with the child's end, it would end well.
    for pid in reversed(processes):
        if alive(pid):
            os.kill(int(pid), 9)
    done = installation.run("tasks.py", "cancel", "r-1")
    assert done.returncode == 0, done.stderr
    assert installation.history("r-1")["status"] == "cancelled"


@pytest.mark.parametrize("dead", ["the worker", "the worker and its supervisor"])
def test_a_handler_that_outlives_its_worker_is_ended_too(installation, dead):
    installation.handler("sleeper", SLEEPER)
    worker = installation.worker("approvals")
    installation.enqueue("approvals", "sleeper", "{}", "--task-id", "r-1")
    processes = pids(installation, "r-1")
    supervisors = children(worker.pid)
    worker.kill()
    worker.wait()
    if dead != "the worker":
        for supervisor in supervisors:
            os.kill(supervisor, 9)
    done = installation.run("tasks.py", "cancel", "r-1")
    assert (done.returncode, done.stdout) == (0, "cancelled r-1\n"), done.stderr
    wait_for(lambda: not any(map(alive, processes)), 2, "the end of the group")
    assert installation.history("r-1")["status"] == "cancelled"


def test_a_task_that_a_python_process_claimed_itself_is_only_its_own_to_end(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "p-1")
    program = (
        "import queue_helpers as q, sys; queue = q.get_ack_queue('approvals'); id, text = queue.get(); print(id, flush=True);"
        "sys.stdin.readline(); print(queue.ack(id), flush=True)"
    )
    consumer = subprocess.Popen(
        [sys.executable, "-c", program],
        env=installation.env | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    installation.processes.append(consumer)
    row_id = consumer.stdout.readline()
    done = installation.run("tasks.py", "cancel", "p-1")
    assert done.returncode == 1 and f"process {consumer.pid} claimed it itself" in done.stderr
    assert "only that process can end it" in done.stderr
    assert installation.rows("select cancel_requested from approvals") == [(0,)]
    consumer.stdin.write("\n")
    consumer.stdin.flush()
    assert consumer.stdout.readline() == row_id
    assert installation.history("p-1")["status"] == "completed"


def test_a_task_that_ends_by_itself_first_is_not_called_cancelled(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "g-1")
    installation.run("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
    done = installation.run("tasks.py", "cancel", "g-1")
    assert done.returncode == 1 and "ended already (completed)" in done.stderr
    assert installation.history("g-1")["status"] == "completed"
