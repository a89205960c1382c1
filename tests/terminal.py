"""A script on a terminal of a size of the test's choice."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from conftest import ROOT

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(
    installation, *args, columns: int = 80, rows: int = 24, code: int = 0, cwd: str | None = None
) -> list[str]:
    """The lines that a script shows on a terminal, without colours; it must end with that code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, ROOT / args[0], *map(str, args[1:])],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=installation.env | {"TERM": "xterm"},
        start_new_session=False,
        cwd=cwd,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            # The other end is closed.
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(20) == code, shown.decode()
    return CONTROL.sub("", shown.decode()).replace("\r", "").rstrip("\n").split("\n")


def answered(installation, words: str, answer: str, meanwhile=lambda: None) -> tuple[int, str]:
    """Run tasks.py on a terminal until it asks; return its exit code and what it asked.

    `meanwhile` is done before the answer is typed.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", *words.split()],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=installation.env,
    )
    installation.processes.append(process)
    os.close(theirs)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(ours, 1000)
    meanwhile()
    os.write(ours, f"{answer}\n".encode())
    code = process.wait(10)
    os.close(ours)
    return code, shown.decode()
