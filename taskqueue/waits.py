"""The file that a session has while it is waited for, or was woken.

STATE/waits/SESSION says how often the session was woken since the last prompt of its person, then
which waiter waits now. A waiter that finds another text there, or no file, leaves: a later one has
come, or the session goes on.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import queue_helpers as q
from taskqueue.hook import digest

# The prompts that Claude Code writes itself begin so, those that wake a session among them.
NOT_A_PERSON = "<task-notification>"
KEPT_SECONDS = 7 * 86_400.0


def file_of(state: Path, session: str) -> Path:
    """Return the file of a session, whose id may be any text."""
    is_name = re.fullmatch(r"[A-Za-z0-9_-]{1,100}", session)
    return state / "waits" / (session if is_name else digest(session))


def goes_on(state: Path, payload: dict) -> None:
    """Have a session's waiter leave. A person's prompt and the session's end reset the count."""
    file, prompt = file_of(state, str(payload.get("session_id"))), payload.get("prompt")
    with suppress(OSError):
        if isinstance(prompt, str) and prompt.startswith(NOT_A_PERSON):
            write(file, count_in(file.read_text()))
        else:
            remove(file)
        q.wake(state)


def prune(state: Path) -> None:
    """Remove the files of sessions that were killed."""
    with suppress(OSError):
        for entry in os.scandir(state / "waits"):
            if entry.stat().st_mtime < time.time() - KEPT_SECONDS:
                os.unlink(entry)


def count_in(text: str) -> int:
    count = text.partition(" ")[0]
    return int(count) if count.isdecimal() else 0


def write(file: Path, count: int, waiter: str = "") -> str:
    """Write a session's file, and return its text. Raises OSError."""
    q.make_private(file.parent)
    text = f"{count} {waiter}"
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(file)
    return text


def remove(file: Path) -> None:
    """Remove a session's file. Without a directory, the report's hook starts Python less often."""
    file.unlink()
    with suppress(OSError):
        file.parent.rmdir()


def text_of(file: Path) -> str:
    """Return the text of a session's file, "" where it has none."""
    try:
        return file.read_text()
    except OSError:
        return ""
