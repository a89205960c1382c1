"""The Claude Code session that a task works in, and the task's notes about it.

A task has a session of its own, or goes on with the one that `resume` names. The notes are a small
file in the queue's state. The handler keeps them from run to run and removes them when the task is
done; cleanup.py removes those of dead letters that nobody retried.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from contextlib import nullcontext, suppress
from pathlib import Path

from taskqueue.claude_stream import say

# A task's session has a UUID in this name space.
NAMESPACE = uuid.UUID("6f0b2a0c-52a1-5c39-9d6f-3f3a6f2f6c11")


def id_of_task(envelope: dict) -> str:
    """Return the id of the task's own session.

    It follows from the task's id and the time when it was enqueued. The queue's name has no part
    in it, so that a task that is moved keeps its session.
    """
    named = "\n".join(str(envelope.get(name, "")) for name in ("task_id", "enqueued_at"))
    return str(uuid.uuid5(NAMESPACE, named.encode("utf-8", "surrogatepass").hex()))


class Session:
    """A session of Claude Code, with the notes of the task that works in it."""

    def __init__(self, own: str, resume: str | None) -> None:
        self.id = resume or own
        # The session was there before the task, and has a conversation of its own.
        self.is_given = resume is not None
        state = os.environ.get("TASK_QUEUE_STATE", "")
        self.folder = Path(state, "claude") if os.path.isabs(state) else None
        self.notes = self.folder and self.folder / f"{own}.json"
        # Whether the session has the task's prompt, and the work on it has not ended.
        self.handed = False
        # How many of the last runs got no answer from the API.
        self.waits = 0
        # Whether a person was asked to allow what Claude was denied.
        self.asked = False
        # A first run finds no notes, and a full disk leaves an empty file.
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(self.notes.read_bytes()) if self.notes else {}
            self.handed, self.waits = bool(noted["handed"]), int(noted["waits"])
            self.asked = bool(noted.get("asked"))

    def lock(self) -> bool:
        """Return whether no other run is in the session; none can be until this process ends.

        Claude Code would let two runs write into it, and forget the work of one. The lock is on a
        byte of one file for all sessions, so that nothing is left behind.
        """
        if self.folder is None:
            return True
        # In a state that cannot be written, no run can know of another.
        with suppress(OSError):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self.folder / "sessions", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, uuid.UUID(self.id).int >> 66)
            except (BlockingIOError, PermissionError):
                return False
        return True

    def note(self, **noted: bool | int) -> None:
        """Set `handed`, `waits` or `asked`, and write all down."""
        vars(self).update(noted)
        if self.notes is None:
            return
        try:
            self.notes.parent.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with open(os.open(self.notes, flags, 0o600), "w") as file:
                noted = {"handed": self.handed, "waits": self.waits, "asked": self.asked}
                json.dump(noted, file)
        except OSError as error:
            say(f"{self.notes}: {error.strerror}")

    def forget(self) -> None:
        """Remove the notes."""
        # In a state that cannot be written there are none.
        with suppress(OSError):
            if self.notes is not None:
                self.notes.unlink()

    def has_prompt(self, attempt: int) -> bool:
        """Return whether a resumed session has the task's prompt already.

        A session of the task's own has it, too, if an earlier attempt ended and no worker recorded
        that. A first attempt without notes is a person's retry of a completed task.
        """
        return self.handed or not self.is_given and attempt > 1

    def file(self) -> Path | None:
        """Find the file in which Claude Code keeps the session."""
        home = os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude"
        return next(Path(home, "projects").glob(f"*/{self.id}.jsonl"), None)

    def cost(self) -> tuple[int, float]:
        """Return (how many runs told it, what the session has cost), as Claude Code notes it.

        A resumed run counts on from there, in its total and against its budget.
        """
        told, total = 0, 0.0
        file = self.file()
        with open(file, "rb") if file else nullcontext(()) as lines:
            for line in lines:
                if b'"cost-state"' in line:
                    with suppress(ValueError, KeyError, TypeError):
                        total = float(json.loads(line)["totalCostUSD"])
                        told += 1
        return told, total


def set_aside_if_empty(file: Path) -> None:
    """Rename a session's file that has no conversation. Raises OSError.

    A kill in the first milliseconds leaves a file that Claude Code can neither resume nor start
    afresh. The file belongs to Claude Code, so it is kept under another name.
    """
    with open(file, "rb") as lines:
        has_conversation = any(map(is_message, lines))
    if not has_conversation:
        os.replace(file, f"{file}.without-conversation")


def is_message(line: bytes) -> bool:
    # The last line may be torn.
    with suppress(ValueError, AttributeError):
        return json.loads(line).get("type") in ("user", "assistant")
    return False
