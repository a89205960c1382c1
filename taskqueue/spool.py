"""Take in the spool: firings of hooks, and tasks that could not reach the database.

Each is a file in state/spool/QUEUE. Nothing in there stops anything else. What cannot be a task is
moved to spool/QUEUE/malformed, what cannot be read stays where it is, and each is named in a
complaint.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from contextlib import suppress
from pathlib import Path

import queue_helpers as q
from taskqueue import hook
from taskqueue.text import visible

SPOOLED = """
insert or ignore into task_spooled (file) values (:file)"""
UNSPOOLED = """
delete from task_spooled where file = :file"""

# A larger file is no task that a hook wrote.
MOST_BYTES = 64 * 2**20
SET_ASIDE = "malformed"
# So many files are taken in by one transaction.
BATCH = 200
# A directory that changed within this time may change again without another mtime.
SETTLED_NS = 2 * 10**9


class NotATask(Exception):
    """What was found in the spool can be no task."""


def spool_directories(state: Path) -> list[Path]:
    """The state's spool/QUEUE directories."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(state / "spool") if entry.is_dir())
    except OSError:
        return []


def spooled_files(directory: Path) -> list[tuple[int, str, int]]:
    """The tasks in a spool/QUEUE directory, oldest first: (mtime in ns, name, inode).

    Raises OSError.
    """
    return look_through(directory)[0]


def look_through(directory: Path) -> tuple[list[tuple[int, str, int]], list[str]]:
    """The tasks in a spool/QUEUE directory, oldest first, and a complaint of all that can be none."""
    files, complaints = [], []
    for entry in os.scandir(directory) if directory.exists() else ():
        if entry.name.startswith(".") or entry.name == SET_ASIDE:
            continue
        if not entry.is_file(follow_symlinks=False):
            complaints.append(f"{entry.path} is no file, as a task is; remove it")
        elif not is_utf8(entry.name):
            complaints.append(f"{entry.path}: its name is not UTF-8; mv it to another name")
        elif not os.access(entry.path, os.R_OK) and os.path.exists(entry.path):
            complaints.append(f"{entry.path} cannot be read; {take_back(entry.path)}")
        else:
            try:
                found = entry.stat(follow_symlinks=False)
                files.append((found.st_mtime_ns, entry.name, found.st_ino))
            except FileNotFoundError:
                # Another worker took it.
                pass
    return sorted(files), complaints


def is_utf8(name: str) -> bool:
    try:
        name.encode()
        return True
    except UnicodeEncodeError:
        return False


def take_back(path: Path | str) -> str:
    """What mends a file or directory that another user left."""
    return f"if it should be yours: sudo chown -R $USER '{path}'"


def take_in_spool(state: Path | None = None) -> tuple[int, list[str]]:
    """Move all spooled tasks into the database, oldest first, each exactly once.

    Returns how many, and complaints. Raises QueueBusy, and QueueUnavailable where there is no
    database to be had.
    """
    state, taken, complaints = state or q.STATE_DIR, 0, []
    for directory in _entries(state, complaints):
        files = _tasks_in(directory, complaints)
        if files:
            taken += _take_in_files(q.connect(state), directory, files, complaints)
    return taken, [visible(complaint) for complaint in complaints]


def take_in_first() -> None:
    """Take in what hooks have left, before a command looks; doctor says what hinders that."""
    with suppress(q.QueueError, sqlite3.Error, OSError):
        take_in_spool()


def take_in(conn: q.Connection, queue: str) -> bool:
    """Move one queue's spooled tasks into the database, or remember that there are none; whether
    there were any.
    """
    directory = conn.state / "spool" / queue
    seen = os.stat(directory).st_mtime_ns
    complaints: list[str] = []
    files = _tasks_in(directory, complaints)
    if files:
        return _take_in_files(conn, directory, files, complaints) > 0
    if not complaints and time.time_ns() - seen > SETTLED_NS:
        conn.spools[queue] = seen
    return False


def _entries(state: Path, complaints: list[str]) -> list[Path]:
    """What lies in the state's spool: directories, but for accidents."""
    spool = state / "spool"
    try:
        found = [Path(entry.path) for entry in os.scandir(spool) if entry.name[0] != "."]
        q.make_private(spool)
        return sorted(found)
    except FileNotFoundError:
        return []
    except OSError as error:
        complaints.append(f"{spool}: {error.strerror}; {take_back(spool)}")
        return []


def _tasks_in(directory: Path, complaints: list[str]) -> list[tuple[int, str, int]]:
    """The tasks in what should be a queue's directory of the spool."""
    try:
        if not directory.is_dir():
            complaints.append(f"{directory} is no directory of a queue; mv it into one")
            return []
        q.check_queue_name(directory.name)
        q.make_private(directory)
        files, found = look_through(directory)
        complaints += found
        return files
    except q.InvalidTask as error:
        complaints.append(f"{directory}: {error}; mv what is in there to a queue's directory")
    except OSError as error:
        complaints.append(f"{directory}: {error.strerror}; {take_back(directory)}")
    return []


def _take_in_files(conn: q.Connection, directory: Path, files: list, complaints: list[str]) -> int:
    """Take in files of a queue's directory; how many were new tasks. Raises QueueBusy."""
    taken = 0
    try:
        q.ensure_queue(conn, directory.name)
        for at in range(0, len(files), BATCH):
            taken += _take_in_batch(conn, directory, files[at : at + BATCH], complaints)
    except q.QueueBusy:
        raise
    except (q.QueueError, sqlite3.Error) as error:
        complaints.append(f"{directory}: the queue cannot be used: {error}")
    if taken:
        q.wake(conn.state)
    return taken


def _take_in_batch(conn: q.Connection, directory: Path, files: list, complaints: list[str]) -> int:
    """Take in files with one transaction.

    Their identities are stored in the transaction that stores the tasks, and forgotten after the
    files are removed: a crash in between, or another process at the same time, takes nothing in
    twice.
    """
    taken, stored, refused = 0, [], []
    rows = _rows(directory, files, complaints)
    with q.transaction(conn):
        for path, found, identity, row in rows:
            conn.execute("savepoint spooled")
            try:
                # Another process may have taken it in, and forgotten it.
                if same_file(path) == found:
                    if conn.execute(SPOOLED, identity).rowcount == 1:
                        taken += q.insert(conn, directory.name, row)
                    stored.append((path, identity))
            except FileNotFoundError:
                pass
            except (sqlite3.Error, OverflowError) as error:
                if not _is_refused(error, conn):
                    raise
                conn.execute("rollback to spooled")
                refused.append((path, found[0], error))
            conn.execute("release spooled")
    complaints += [_set_aside(*why) for why in refused]
    _forget(conn, stored, complaints)
    return taken


def same_file(path: Path) -> tuple[int, int]:
    """What tells a file from another one of the same name."""
    found = path.lstat()
    return found.st_ino, found.st_mtime_ns


def _is_refused(error: Exception, conn: q.Connection) -> bool:
    """Whether the database refused this row, and can go on with others."""
    return not isinstance(error, sqlite3.Error) or isinstance(
        q.explain(error, conn.state), q.InvalidTask
    )


def _rows(directory: Path, files: list, complaints: list[str]) -> list[tuple]:
    """(path, (inode, mtime), identity, row) of the files that are tasks."""
    rows = []
    for mtime, name, inode in files:
        path = directory / name
        try:
            identity = {"file": f"{directory.name}/{name}:{inode}:{mtime}"}
            rows.append((path, (inode, mtime), identity, spooled_row(path, mtime / 1e9)))
        except FileNotFoundError:
            # Another process took it in.
            continue
        except OSError as error:
            complaints.append(
                f"{path}: {error.strerror}; it cannot be read; {take_back(directory)}"
            )
        except (NotATask, hook.NoTask, q.InvalidTask) as error:
            complaints.append(_set_aside(path, inode, error))
    return rows


def _forget(conn: q.Connection, stored: list[tuple], complaints: list[str]) -> None:
    """Remove the files that were taken in, then their identities."""
    removed = []
    for path, identity in stored:
        try:
            path.unlink(missing_ok=True)
            removed.append(identity)
        except OSError as error:
            complaints.append(
                f"{path}: {error.strerror}; it cannot be removed; {take_back(path.parent)}"
            )
    # To lose this costs a line in the table, no task.
    with q.transaction(conn, durable=False):
        conn.executemany(UNSPOOLED, removed)


def why_set_aside(path: Path) -> str:
    """Why a file in a malformed directory is no task; "" where it would be taken in."""
    try:
        spooled_row(path, time.time())
        return ""
    except (NotATask, hook.NoTask, q.InvalidTask, OSError) as error:
        return str(error)


def _set_aside(path: Path, inode: int, why: Exception) -> str:
    """Move a file away that is no task; the complaint about it."""
    try:
        aside = q.make_private(path.parent / SET_ASIDE) / f"{inode}-{path.name}"
        path.rename(aside)
        return f"{aside}: {why}"
    except OSError as error:
        return f"{path}: {why}; nor can it be set aside: {error.strerror}"


def spooled_row(path: Path, at: float) -> q.Row:
    """The row of a spooled task that was left at that time.

    Raises NotATask, NoTask, InvalidTask, OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(path)
        if found.st_size > MOST_BYTES:
            raise NotATask(f"it has {found.st_size:,} bytes, and a task {MOST_BYTES:,} at most")
        raw = file.read(MOST_BYTES)
    # The clock may have been set back since.
    at = max(0.0, min(at, time.time()))
    try:
        return hook.row_of(hook.read(raw, at)) if path.suffix == ".hook" else row_of_text(raw, at)
    except q.InvalidTask:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        raise NotATask(str(error)) from None


def row_of_text(raw: bytes, at: float) -> q.Row:
    """The row of what would be a row's data: a bare payload, or an envelope.

    Hooks of an older version added the columns that are not in there.
    """
    text = raw.decode("utf-8-sig")
    columns = {
        "status": q.READY,
        "due_at": None,
        "priority": 0,
        "group_id": None,
        "expires_at": None,
        "delayed_at": None,
    }
    columns |= {"task_id": None, "window": 0.0, "on_duplicate": "skip", "firing": None}
    stored, odd = q.read_task(text)
    told = stored.get("spooled_row") if isinstance(stored, dict) else None
    # They knew no delayed_at.
    if isinstance(told, dict) and {*told, "delayed_at"} == columns.keys():
        columns |= stored.pop("spooled_row")
        if not isinstance(columns["window"], (int, float)):
            raise ValueError(f"window {columns['window']!r} is no number")
        text = q.to_json(stored)
    elif odd:
        text = q.to_json(stored)
    return q.Row(text, timestamp=at, **columns)
