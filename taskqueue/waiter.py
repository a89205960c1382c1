"""Wake an idle session when a task of its last answer needs Claude; the body of `report.py --wake`.

A Stop hook with asyncRewake starts a waiter beside the session. It sleeps on the queue's events until
the tasks of this stop have ended, the session goes on or ends, or a later waiter replaces it.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import queue_helpers as q
from taskqueue import report, spool, waits, workspaces
from taskqueue.database import queues_of
from taskqueue.wake import Watch

# bin/hook.sh makes 2 of it: Python itself exits 2 where it finds no script.
EX_WOKEN = 42
# How often a session is woken between two prompts of its person.
MOST = 3
# Both Stop hooks start at once. A task that is not seen so long after the stop was not enqueued.
UNSEEN_SECONDS = 10.0
LAST_LINE = (
    "You were woken since this needs work: mend what your answers broke. If it is not yours to mend,"
    " say so in one line."
)

LIVE = """
select 1 from "{queue}" where (task_id = :task_id or id = :row_id) and (status <> 3 or due_at is not null)"""
ENDED = """
select id from task_history where queue = :queue and task_id = :task_id and completed_at >= :since"""


def is_firing(data: str, names: tuple[str, ...]) -> str:
    """Return the SQL condition that a task's data is a hook's payload with these fields."""
    said = f"case when json_valid({data}) then {data} else '{{}}' end"
    return " and ".join(
        f"coalesce(json_extract({said}, '$.data.{name}'), json_extract({said}, '$.{name}')) is :{name}"
        for name in names
    )


def main() -> int:
    """Wait for the tasks of a Stop, or note that a session goes on or ends; return the exit code."""
    if os.environ.get("TASK_DEPTH"):
        return 0
    try:
        payload = report.read_payload(time.monotonic() + report.HOOK_SECONDS)
        event, session, cwd = (
            plain(payload[name]) for name in ("hook_event_name", "session_id", "cwd")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return fail("stdin is not the payload of a hook")
    file = waits.file_of(q.STATE_DIR, session)
    try:
        if event != "Stop":
            waits.goes_on(q.STATE_DIR, payload)
            return 0
        # Another Stop hook, or the wake-up itself, made Claude go on: no answer is checked for ever.
        if payload.get("stop_hook_active"):
            return 0
        return Waiter(file, payload, workspaces.session(project(), cwd)).run()
    except q.QueueError as error:
        return fail(error)


def fail(message: object) -> int:
    """Say why nobody waits. Exit code 1 would have the hook try another Python."""
    report.fail(0, message, hook=True)
    return 0


def plain(value: object) -> str:
    """Return a field as the database has it. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(value)
    return value.encode(errors="replace").decode()


def project() -> str:
    return os.environ.get("CLAUDE_PROJECT_DIR", "")


# ------------------------------------------------------------------------------------ the waiting


class Alarm:
    """Sleep until the queue may have changed, or the session has ended."""

    def __init__(self, processes: list[int]) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)
        # Claude Code reads stderr as long as it lives.
        self._poll.register(2, 0)
        self._processes = processes
        for process in processes if hasattr(os, "pidfd_open") else ():
            with suppress(OSError):
                self._poll.register(os.pidfd_open(process), select.POLLIN)

    def set(self) -> None:
        # A full pipe wakes as well.
        with suppress(BlockingIOError):
            os.write(self._write, b"\0")

    def sleep(self) -> bool:
        """Return whether the session still lives, after an event or a few seconds."""
        heard = {fd for fd, _ in self._poll.poll(q.SAFETY_TICK_SECONDS * 1000)}
        if self._read in heard:
            os.read(self._read, 4096)
        return not heard - {self._read} and all(map(is_alive, self._processes))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Waiter:
    """Waits for the tasks that one stop of a session enqueued."""

    def __init__(self, file: Path, payload: dict, reader: workspaces.Reader) -> None:
        self.file, self.reader = file, reader
        names = ("hook_event_name", "session_id", "prompt_id", "cwd")
        fields = {name: payload.get(name) for name in names}
        # An older client names no prompt.
        self.fields = {
            name: plain(each) if isinstance(each, str) else None for name, each in fields.items()
        }
        self.began, self.tasks = time.monotonic(), set[tuple[str, str, int]]()
        self.since = time.time() - UNSEEN_SECONDS
        self.count, self.text = 0, ""

    def run(self) -> int:
        """Return EX_WOKEN once the session is to wake up, 0 once it is to sleep on."""
        self.count = waits.count_in(waits.text_of(self.file))
        if self.count >= MOST:
            return 0
        waits.prune(q.STATE_DIR)
        q.connect()
        alarm = Alarm([os.getppid(), *claude_process()])
        try:
            self.text = waits.write(self.file, self.count, f"{os.getpid()}-{time.time_ns()}")
            Watch.of(q.STATE_DIR).listeners.add(alarm)
            while self.is_mine():
                with suppress(q.QueueBusy):
                    code = self.look()
                    if code is not None:
                        return code
                if not alarm.sleep():
                    return 0
            return 0
        except OSError as error:
            return fail(f"{self.file}: {error.strerror}")
        finally:
            self.leave()

    def is_mine(self) -> bool:
        return waits.text_of(self.file) == self.text

    def leave(self) -> None:
        with suppress(OSError):
            if self.is_mine() and self.count:
                waits.write(self.file, self.count)
            elif self.is_mine():
                waits.remove(self.file)

    def look(self) -> int | None:
        """Return the exit code if all tasks of the stop have ended, or it enqueued none."""
        spool.take_in_first()
        conn = q.connect()
        if not self.tasks:
            self.tasks = {*self.found(conn, ("session_id", "prompt_id", "hook_event_name"))}
        if not self.tasks:
            if time.monotonic() < self.began + UNSEEN_SECONDS:
                return None
            # A later firing for this directory may have taken its place at once.
            self.tasks = {*self.found(conn, ("cwd", "hook_event_name"))}
        if any(self.is_live(conn, *task) for task in self.tasks):
            return None
        return EX_WOKEN if self.wake(self.ended(conn)) else 0

    def found(self, conn: q.Connection, names: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
        """Yield (queue, id, row) of the tasks that this stop enqueued, as far as they are known by now."""
        values = {**self.fields, "since": self.since}
        for queue in queues_of(conn):
            yield from conn.execute(
                f"""select '{queue}', coalesce(task_id, '{queue}-' || id), id from "{queue}"
                where timestamp >= :since and {is_firing("data", names)}
                  or rerun is not null and {is_firing("json_extract(rerun, '$[0]')", names)}""",
                values,
            )
        values["since"] = q.utc(self.since)
        yield from conn.execute(
            f"""select queue, task_id, row_id from task_history
            where completed_at >= :since and {is_firing("data", names)}""",
            values,
        )

    def is_live(self, conn: q.Connection, queue: str, task_id: str, row: int) -> bool:
        """Return whether a task still ends by itself: one that is held does not."""
        values = {"task_id": task_id, "row_id": row}
        return conn.execute(q.on_queue(LIVE, queue), values).fetchone() is not None

    def ended(self, conn: q.Connection) -> set[int]:
        """Return the rows of the history that the tasks have left since the stop."""
        values = {"since": q.utc(self.since)}
        rows = (
            conn.execute(ENDED, {"queue": queue, "task_id": task_id, **values}).fetchall()
            for queue, task_id, _ in self.tasks
        )
        return {row for found in rows for (row,) in found}

    def wake(self, ended: set[int]) -> bool:
        """Tell the news on stderr if one of them needs Claude, and return whether it did."""

        def wants(news: list[report.Ended]) -> bool:
            needed = any(each.row in ended and needs_claude(each) for each in news)
            return needed and self.is_mine()

        def show(news: list[report.Ended], more: int) -> None:
            self.count += 1
            self.text = waits.write(self.file, self.count, "woke")
            text = f"{report.report(news, more)}\n{LAST_LINE}\n"
            os.write(2, text.encode("utf-8", "backslashreplace"))

        deadline = time.monotonic() + q.BUSY_TIMEOUT_MS / 1000
        return report.tell(self.reader, show, False, deadline, wants=wants)


def needs_claude(ended: report.Ended) -> bool:
    """Return whether a task failed, or found something broken."""
    return ended.status == "failed" or ended.is_state and not ended.told.startswith(report.FINE)


def claude_process() -> list[int]:
    told = os.environ.get("CLAUDE_PID", "")
    return [int(told)] if told.isdecimal() and len(told) < 10 else []
