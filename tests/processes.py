"""What the tests that kill things look at: processes, and the lines that handlers wrote."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

# A handler that notes its pid, and goes on when the file "go" is there.
WAIT = """#!/bin/sh
echo "$$" >>"$HOME/runs"
until [ -e "$HOME/go" ]; do sleep 0.02; done
echo done
"""


def lives(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def group_lives(group: int) -> bool:
    """Return whether anybody of a process group runs."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True
    ).stdout.splitlines()
    return any(
        line.split()[0] == str(group) and not line.split()[1].startswith("Z") for line in listed
    )


def children(pid: int) -> list[int]:
    """The processes that it started and that are not yet gone."""
    return [
        int(child)
        for child in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True
        ).stdout.split()
    ]


def lines(path: Path) -> list[str]:
    """The whole lines of a file that may not be there yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def processor_seconds(pid: int) -> float:
    """Return what a process has used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stays_true(condition, seconds: float) -> bool:
    """Return whether condition() holds for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not condition():
            return False
        time.sleep(0.02)
    return True
