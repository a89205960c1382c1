"""Every writer gets its turn; what happens to the turn's files keeps nobody from writing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, end, wait_for

pytestmark = pytest.mark.core

WRITER = """
import sys
import queue_helpers as q
q.enqueue_task("bench", "t", {})
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        q.enqueue_task("bench", "t", {})
    print("done", flush=True)
"""

HOLDER = """
import fcntl, os, signal, sys
held = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in sys.argv[1:]]
for fd in held:
    fcntl.flock(fd, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def compare(scenario: str, seconds: float = 3.0) -> list[dict]:
    """Return what bench/fairness.py says of a scenario."""
    command = [
        sys.executable,
        ROOT / "bench" / "fairness.py",
        scenario,
        "--seconds",
        str(seconds),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def start_writer(installation) -> subprocess.Popen:
    """A process that has written once, and writes as many tasks as it is told to."""
    process = installation.start_python(WRITER, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def tell(process: subprocess.Popen, number: int) -> None:
    """Have a writer write so many tasks."""
    process.stdin.write(f"{number}\n")
    process.stdin.flush()


def wrote(process: subprocess.Popen) -> None:
    """Wait until a writer has done what it was told to; no call may have failed."""
    assert process.stdout.readline() == "done\n", process.stderr.read()


def count(installation) -> int:
    """Return how many tasks there are in the queue."""
    return installation.rows("select count(*) from bench")[0][0]


def turn_files(installation) -> list:
    """The files of the turn, which every writer has to have made."""
    files = [installation.state / "turn" / name for name in ("next", "turn")]
    assert all(file.is_file() for file in files), f"no writer takes its turn: {files}"
    return files


@pytest.mark.alone
@pytest.mark.once
@pytest.mark.parametrize("scenario", ["put-8", "put-32", "thread-8", "work-8", "shell-8"])
def test_the_slowest_gets_half_of_what_the_fastest_gets(scenario):
    # With 32, each does so little a second that chance would weigh more than fairness.
    python, *shell = compare(scenario, seconds=5.0 if scenario == "put-32" else 3.0)
    assert python["busy"] == 0, python
    assert not python["ran_dry"], python
    assert python["slowest"] >= python["fastest"] / 2, python
    # The sqlite3 command takes no turn, and gets in all the same.
    assert len(shell) == (scenario == "shell-8")
    for each in shell:
        assert each["busy"] == 0 and each["slowest"] > 0, each


@pytest.mark.parametrize("held", ["next", "turn", "both"])
def test_a_stopped_holder_of_the_turn_keeps_nobody_from_writing(installation, held):
    writers = [start_writer(installation) for _ in range(3)]
    files = [str(file) for file in turn_files(installation) if held in (file.name, "both")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *files])
    try:
        # It stops itself as soon as it holds the turn.
        os.waitpid(holder.pid, os.WUNTRACED)
        before = count(installation)
        for writer in writers:
            tell(writer, 20)
        for writer in writers:
            wrote(writer)
        assert count(installation) == before + 60
        # A hook's whole deadline is one second: its task gets into the table, not into the spool.
        installation.enqueue(
            "--hook", "bench", "t", "--wait", "1", input='{"hook_event_name": "PostToolUse"}'
        )
        assert count(installation) == before + 61
        assert not list(installation.state.glob("spool/*/*"))
        holder.send_signal(signal.SIGCONT)
        assert holder.wait() == 0
        for writer in writers:
            tell(writer, 20)
        for writer in writers:
            wrote(writer)
        assert count(installation) == before + 121
    finally:
        end(holder)


@pytest.mark.parametrize("removed", ["next", "turn", "directory"])
def test_a_turn_that_is_removed_keeps_nobody_from_writing(installation, removed):
    writers = [start_writer(installation) for _ in range(4)]
    files = turn_files(installation)
    for writer in writers:
        tell(writer, 100)
    wait_for(lambda: count(installation) > 40, what="writers at work")
    for _ in range(3):
        if removed == "directory":
            shutil.rmtree(files[0].parent, ignore_errors=True)
        else:
            (files[0].parent / removed).unlink(missing_ok=True)
        now = count(installation)
        wait_for(
            lambda now=now: count(installation) > min(now + 20, 403), what="writers that go on"
        )
    for writer in writers:
        wrote(writer)
    # One that comes later does not mind either.
    tell(start_writer(installation), 5)
    wait_for(lambda: count(installation) == 4 * 101 + 6, what="all tasks")


@pytest.mark.parametrize("obstacle", ["read-only", "a file", "a dangling link"])
def test_a_turn_that_cannot_be_made_keeps_nobody_from_writing(installation, obstacle):
    start_writer(installation)
    directory = turn_files(installation)[0].parent
    shutil.rmtree(directory)
    as_anybody = []
    if obstacle == "read-only":
        directory.mkdir(mode=0o500)
        # Without its capabilities, root too is held to what a directory's mode says.
        as_anybody = (
            ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
        )
        if as_anybody and (
            not shutil.which("setpriv") or subprocess.run([*as_anybody, "true"]).returncode
        ):
            pytest.skip(
                "root may write into a read-only directory, and cannot be kept from it here"
            )
        made = subprocess.run([*as_anybody, "touch", directory / "next"], capture_output=True)
        assert made.returncode != 0, "the directory is not read-only"
    elif obstacle == "a file":
        directory.touch()
    else:
        directory.symlink_to(installation.directory / "nowhere" / "at all")
    before = count(installation)
    writer = [*as_anybody, sys.executable, "-c", WRITER]
    for _ in range(2):
        done = subprocess.run(
            writer,
            input="20\n",
            capture_output=True,
            text=True,
            env=installation.env | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "ready\ndone\n"
        assert not done.stderr
    assert count(installation) == before + 42


def test_a_writer_lets_go_of_the_turn(installation):
    writer = start_writer(installation)
    tell(writer, 20)
    wrote(writer)
    for file in turn_files(installation):
        # Not only when it ends: it still lives.
        with open(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
