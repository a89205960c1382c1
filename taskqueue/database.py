"""Open the database as it is, read it, and change many rows in short steps."""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import queue_helpers as q
from taskqueue.cli import Unknown

# The files that SQLite may put beside a database, after its name.
SIDECARS = ("-wal", "-shm", "-journal")

# The statuses of waiting and running tasks, as conditions. They are literal, so that SQLite sees
# which partial index serves each.
LIVE = {
    "in_progress": "status = 2",
    "pending": "status < 2",
    "scheduled": "status = 3 and due_at is not null",
    "held": "status = 3 and due_at is null",
    "blocked": "status in (4, 6)",
    "handed_over": "status = 5",
}
FINISHED = ("completed", "failed", "cancelled", "expired")
STATUSES = (*LIVE, *FINISHED)


# Words that people use for a status.
SAME = {"waiting": "pending", "running": "in_progress", "done": "completed"}


def status(text: str) -> str:
    """Return the status that a word names."""
    text = SAME.get(text, text)
    if text not in STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status: {', '.join(STATUSES)}")
    return text


STATUS_TERMS = {"dest": "statuses", "metavar": "STATUS", "type": status, "action": "append"}

# Many changes hold the write lock for at most HOLD_SECONDS at a time, and leave it free for
# PAUSE_SECONDS in between.
HOLD_SECONDS, PAUSE_SECONDS = 0.01, 0.01

STATUS = f"""
select {q.STATUS_WORD} from "{{queue}}" where id = :id"""
# The tasks that a row waits for, in words.
WAITS_FOR = """(select group_concat(after_task || iif(whatever, ' (however it ends)', ''), ', ') from task_after
        where queue = '{queue}' and row_id = id)"""
CLAIMS = """
select {task} from "{queue}" where status = 2"""


# ------------------------------------------------------------------------------------------ opening


def database_file(state: Path) -> Path:
    """Return the database file itself, behind symbolic links: its sidecars lie beside it."""
    return Path(os.path.realpath(state / "tasks.db"))


def database_files(state: Path) -> list[Path]:
    """Return the database and its sidecars, as far as they exist."""
    db = database_file(state)
    return [path for path in (db, *(Path(f"{db}{ending}") for ending in SIDECARS)) if path.exists()]


def open_queue() -> q.Connection:
    """Open the database. Raise QueueUnavailable if there is none: it is not made."""
    return q.connect(create=False)


class Reader(sqlite3.Connection):
    """A connection that only reads. `state` is the state directory."""

    state: Path


def open_to_read(db: Path, directory: Path | None = None) -> Reader:
    """Open a database to read, without making the sidecar files that an ordinary reader makes.

    If the write-ahead log has lost its index, SQLite would make that anew. Then this opens a copy,
    which takes room in `directory` (default: the system's temporary one) until it is closed.
    """
    real, conn = Path(os.path.realpath(db)), None
    # Its last user may be closing it at this moment, and then the log goes.
    with suppress(FileNotFoundError):
        if not is_in_use(real) and os.path.getsize(f"{real}-wal"):
            conn = _open_copy(real, directory)
    if conn is None:
        conn = _open_unchanged(real, "" if is_in_use(real) else "&immutable=1")
    conn.state = db.parent
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return conn


def _open_unchanged(real: Path, how: str = "") -> Reader:
    from urllib.parse import quote

    # The name is quoted as the bytes that it is on disk, whatever the locale.
    uri = f"file:{quote(os.fsencode(real))}?mode=ro{how}"
    return sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None, factory=Reader)


def _open_copy(real: Path, directory: Path | None) -> Reader:
    """Open a copy of a database and its log; the copy has no name any more when this returns."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(dir=directory) as made:
        copy = Path(made, "copy.db")
        for ending in ("", "-wal"):
            shutil.copyfile(f"{real}{ending}", f"{copy}{ending}")
        conn = _open_unchanged(copy)
        # The log is opened by the first read. What is wrong is the reader's to hear.
        with suppress(sqlite3.Error):
            conn.execute("select 1 from sqlite_master").fetchone()
    return conn


def is_in_use(real: Path) -> bool:
    """Tell whether a database has its sidecars: a process has it open, or died while it had."""
    return all(os.path.exists(f"{real}{ending}") for ending in ("-wal", "-shm"))


# ------------------------------------------------------------------------------ reading and changing


@contextmanager
def snapshot(conn: sqlite3.Connection) -> Iterator[None]:
    """Let several reads see one state of the database. No writer waits for it."""
    conn.execute("begin")
    try:
        yield
    finally:
        # An error of the disk has ended it.
        if conn.in_transaction:
            conn.execute("rollback")


def queues_of(conn: sqlite3.Connection) -> list[str]:
    """Return the names of all queues."""
    return [name for (name,) in conn.execute(q.QUEUES)]


def check_known(conn: sqlite3.Connection, queues: Iterable[str]) -> None:
    """Raise Refused unless each of these queues exists."""
    known = queues_of(conn)
    for queue in queues:
        if queue not in known:
            raise Unknown(f"there is no queue {queue!r}; there are: {', '.join(known)}")


def status_of(conn: q.Connection, queue: str, row_id: int | None) -> str | None:
    """Return the status of a waiting or running task, or None if the row is gone."""
    row = row_id and q.execute(conn, STATUS, queue, id=row_id).fetchone()
    return row[0] if row else None


def as_dict(cursor: sqlite3.Cursor) -> dict:
    """Return the next row by its columns' names, {} if there is none."""
    row = cursor.fetchone()
    names = (column[0] for column in cursor.description)
    return {} if row is None else dict(zip(names, row, strict=True))


def claims(conn: sqlite3.Connection) -> Iterator[tuple[str, q.Task]]:
    """Yield (queue, task) of every claimed row."""
    for queue in queues_of(conn):
        for row in conn.execute(q.on_queue(CLAIMS, queue)).fetchall():
            yield queue, q.Task.from_row(queue, row)


def in_steps(
    conn: q.Connection,
    items: Iterable,
    change: Callable,
    hold: float = HOLD_SECONDS,
    durable: bool = True,
) -> Iterator:
    """Call change(item) for each item, in short transactions; yield what it returns."""
    items, more = iter(items), True
    while more:
        results, began = [], time.monotonic()
        with q.transaction(conn, durable):
            for item in items:
                results.append(change(item))
                if time.monotonic() - began > hold:
                    break
            else:
                more = False
        yield from results
        if more:
            time.sleep(PAUSE_SECONDS)
