"""Write to the spool, and take it in: hooks' firings, and tasks that could not reach the database.

Each is a file in state/spool/QUEUE, and none stops another. A file that can be no task moves to
spool/QUEUE/malformed, one that cannot be read stays where it is, and each makes one complaint.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import queue_helpers as q
from taskqueue import hook
from taskqueue.text import visible

SPOOLED = """
insert or ignore into task_spooled (file) values (:file)"""
UNSPOOLED = """
delete from task_spooled where file = :file"""

# No hook writes a larger file.
MOST_BYTES = 64 * 2**20
SET_ASIDE = "malformed"
# How many files one transaction takes in.
BATCH = 200
# How long after a directory's last change another file may come without a new mtime.
SETTLED_NS = 2 * 10**9

# A spooled file; sorted, the oldest comes first.
File = namedtuple("File", "mtime_ns name inode")
# A file and the row that it becomes.
Found = namedtuple("Found", "path file identity row")
# The errors of reading a file that can be no task. NoTask and InvalidTask are ValueErrors, too.
NO_TASK = (ValueError, OverflowError, RecursionError)


def spool(
    queue: str, content: str | bytes, state: Path | None = None, suffix: str = ".json"
) -> Path:
    """Write a task that could not reach the database to state/spool/QUEUE.

    It is on disk when this returns. `content` is what would be a row's data, or with ".hook" what
    bin/hook.sh writes. Raises OSError, InvalidTask. A shell can do the same: write a file elsewhere
    on the disk, and mv it there.
    """
    state = state or q.STATE_DIR
    q.make_private(state, parents=True)
    directory = q.make_private(q.make_private(state / "spool") / q.check_queue_name(queue))
    name = f"{time.time_ns()}-{os.urandom(4).hex()}{suffix}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(directory / f".{name}", flags, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(fd)
        os.rename(directory / f".{name}", directory / name)
    except BaseException:
        os.unlink(directory / f".{name}")
        raise
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    q.wake(state)
    return directory / name


def spool_directories(state: Path) -> list[Path]:
    """Return the state's spool/QUEUE directories."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(state / "spool") if entry.is_dir())
    except OSError:
        return []


def spooled_files(directory: Path) -> list[File]:
    """Return the tasks in a spool/QUEUE directory, the oldest first. Raises OSError."""
    return look_through(directory)[0]


def look_through(directory: Path) -> tuple[list[File], list[str]]:
    """Return the tasks in a spool/QUEUE directory, and a complaint of each entry that can be none."""
    found = _Directory(directory, [])
    return found.look_through(), found.complaints


def take_in_spool(state: Path | None = None) -> tuple[int, list[str]]:
    """Move all spooled tasks into the database, the oldest first, each exactly once.

    Returns how many, and the complaints. Raises QueueBusy, and QueueUnavailable where no database
    can be had.
    """
    state, taken, complaints = state or q.STATE_DIR, 0, []
    for path in _entries(state, complaints):
        directory = _Directory(path, complaints)
        if files := directory.files():
            taken += directory.take_in(q.connect(state), files)
    return taken, [visible(complaint) for complaint in complaints]


def take_in_first() -> None:
    """Take in the spool before a command looks. doctor says what hinders that."""
    with suppress(q.QueueError, sqlite3.Error, OSError):
        take_in_spool()


def take_in(conn: q.Connection, queue: str) -> bool:
    """Move one queue's spooled tasks into the database; return whether there were any.

    Where the directory is empty, the connection remembers its mtime. Raises QueueBusy, OSError.
    """
    directory = _Directory(conn.state / "spool" / queue, [])
    seen = os.stat(directory.path).st_mtime_ns
    files = directory.files()
    if files:
        return directory.take_in(conn, files) > 0
    if not directory.complaints and time.time_ns() - seen > SETTLED_NS:
        conn.spools[queue] = seen
    return False


def why_set_aside(path: Path) -> str:
    """Return why a file in a malformed directory is no task, "" where it would be one now."""
    try:
        spooled_row(path, time.time())
        return ""
    except (*NO_TASK, OSError) as error:
        return str(error)


def is_utf8(name: str) -> bool:
    """Return whether a file's name is UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _entries(state: Path, complaints: list[str]) -> list[Path]:
    """Return what lies in the state's spool: directories, but for accidents."""
    spool = state / "spool"
    try:
        found = [Path(entry.path) for entry in os.scandir(spool) if entry.name[0] != "."]
        q.make_private(spool)
        return sorted(found)
    except FileNotFoundError:
        return []
    except OSError as error:
        complaints.append(f"{spool}: {error.strerror}; {_take_back(spool)}")
        return []


def _take_back(path: Path | str) -> str:
    """Return the remedy for a file or directory that another user left."""
    return f"if it should be yours: sudo chown -R $USER '{path}'"


class _Directory:
    """A spool/QUEUE directory, and the complaints about it and its files."""

    def __init__(self, path: Path, complaints: list[str]) -> None:
        self.path, self.queue, self.complaints = path, path.name, complaints

    def files(self) -> list[File]:
        """Return the tasks in here, the oldest first, if this is a queue's directory."""
        try:
            if not self.path.is_dir():
                self.complaints.append(f"{self.path} is no directory of a queue; mv it into one")
                return []
            q.check_queue_name(self.queue)
            q.make_private(self.path)
            return self.look_through()
        except q.InvalidTask as error:
            mend = "mv what is in there to a queue's directory"
            self.complaints.append(f"{self.path}: {error}; {mend}")
        except OSError as error:
            self.complaints.append(f"{self.path}: {error.strerror}; {_take_back(self.path)}")
        return []

    def look_through(self) -> list[File]:
        """Return the tasks in here, and complain of each entry that can be none."""
        files, complain = [], self.complaints.append
        for entry in os.scandir(self.path) if self.path.exists() else ():
            if entry.name.startswith(".") or entry.name == SET_ASIDE:
                continue
            if not entry.is_file(follow_symlinks=False):
                complain(f"{entry.path} is no file, as a task is; remove it")
            elif not is_utf8(entry.name):
                complain(f"{entry.path}: its name is not UTF-8; mv it to another name")
            elif not os.access(entry.path, os.R_OK) and os.path.exists(entry.path):
                complain(f"{entry.path} cannot be read; {_take_back(entry.path)}")
            else:
                # Another worker may have taken it in.
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    files.append(File(found.st_mtime_ns, entry.name, found.st_ino))
        return sorted(files)

    def take_in(self, conn: q.Connection, files: list[File]) -> int:
        """Take in files of this directory; return how many were new tasks. Raises QueueBusy."""
        taken = 0
        try:
            q.ensure_queue(conn, self.queue)
            for at in range(0, len(files), BATCH):
                taken += self._take_in_batch(conn, files[at : at + BATCH])
        except q.QueueBusy:
            raise
        except (q.QueueError, sqlite3.Error) as error:
            self.complaints.append(f"{self.path}: the queue cannot be used: {error}")
        if taken:
            q.wake(conn.state)
        return taken

    def _take_in_batch(self, conn: q.Connection, files: list[File]) -> int:
        """Take in files with one transaction.

        It stores their identities beside the tasks, and they are forgotten once the files are
        removed. So neither a crash in between nor another process takes a file in twice.
        """
        taken, stored, refused = 0, [], []
        batch = self._read(files)
        with q.transaction(conn):
            for found in batch:
                conn.execute("savepoint spooled")
                try:
                    # Another process may have taken it in, and forgotten it.
                    if _is_still_there(found):
                        if conn.execute(SPOOLED, {"file": found.identity}).rowcount == 1:
                            taken += q.insert(conn, self.queue, found.row)
                        stored.append(found)
                except (sqlite3.Error, OverflowError) as error:
                    if not _is_refused(error, conn):
                        raise
                    conn.execute("rollback to spooled")
                    refused.append((found.path, error))
                conn.execute("release spooled")
        for path, error in refused:
            self._set_aside(path, error)
        self._remove(conn, stored)
        return taken

    def _read(self, files: list[File]) -> list[Found]:
        """Read the files that are tasks; set the others aside."""
        batch = []
        for file in files:
            path = self.path / file.name
            try:
                row = spooled_row(path, file.mtime_ns / 1e9)
            except FileNotFoundError:
                # Another process took it in.
                continue
            except OSError as error:
                why = f"{error.strerror}; it cannot be read"
                self.complaints.append(f"{path}: {why}; {_take_back(self.path)}")
            except NO_TASK as error:
                self._set_aside(path, error)
            else:
                identity = f"{self.queue}/{file.name}:{file.inode}:{file.mtime_ns}"
                batch.append(Found(path, file, identity, row))
        return batch

    def _remove(self, conn: q.Connection, stored: list[Found]) -> None:
        """Remove the files that were taken in, then their identities."""
        removed = []
        for found in stored:
            try:
                found.path.unlink(missing_ok=True)
                removed.append({"file": found.identity})
            except OSError as error:
                why = f"{error.strerror}; it cannot be removed"
                self.complaints.append(f"{found.path}: {why}; {_take_back(self.path)}")
        # A power cut that undoes this costs a row of task_spooled, and no task.
        with q.transaction(conn, durable=False):
            conn.executemany(UNSPOOLED, removed)

    def _set_aside(self, path: Path, why: Exception) -> None:
        """Move a file away that is no task, and complain of it."""
        try:
            aside = q.make_private(self.path / SET_ASIDE) / f"{path.lstat().st_ino}-{path.name}"
            path.rename(aside)
            self.complaints.append(f"{aside}: {why}")
        except OSError as error:
            self.complaints.append(f"{path}: {why}; nor can it be set aside: {error.strerror}")


def _is_still_there(found: Found) -> bool:
    try:
        there = found.path.lstat()
    except FileNotFoundError:
        return False
    return (there.st_mtime_ns, there.st_ino) == (found.file.mtime_ns, found.file.inode)


def _is_refused(error: sqlite3.Error | OverflowError, conn: q.Connection) -> bool:
    """Return whether the database refused this row, and can go on with others."""
    return isinstance(error, OverflowError) or isinstance(
        q.explain(error, conn.state), q.InvalidTask
    )


def spooled_row(path: Path, at: float) -> q.Row:
    """Read the row of a task that was left at that time, in Unix seconds.

    Raises OSError, and one of NO_TASK where the file is no task.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(path)
        if found.st_size > MOST_BYTES:
            raise ValueError(f"it has {found.st_size:,} bytes, and a task {MOST_BYTES:,} at most")
        raw = file.read(MOST_BYTES)
    # The clock may have been set back since.
    at = max(0.0, min(at, time.time()))
    return hook.row_of(hook.read(raw, at)) if path.suffix == ".hook" else row_of_text(raw, at)


def row_of_text(raw: bytes, at: float) -> q.Row:
    """Return the row of JSON text as a row's data is: a bare payload, or an envelope.

    Version 0.2.0 spooled a hook's task as an envelope with the other columns in "spooled_row".
    """
    text = raw.decode("utf-8-sig")
    columns = {
        "status": q.READY,
        "due_at": None,
        "priority": 0,
        "group_id": None,
        "expires_at": None,
        "delayed_at": None,
        "task_id": None,
        "window": 0.0,
        "on_duplicate": "skip",
        "firing": None,
    }
    stored = q.parse_json(text)
    told = stored.get("spooled_row") if isinstance(stored, dict) else None
    # It had no delayed_at.
    if isinstance(told, dict) and {*told, "delayed_at"} == columns.keys():
        columns |= stored.pop("spooled_row")
        if not isinstance(columns["window"], (int, float)):
            raise ValueError(f"window {columns['window']!r} is no number")
        text = q.to_json(stored)
    later = {"own_attempts": None, "timeout": None, "after": (), "after_any": ()}
    return q.Row(text, timestamp=at, **columns, **later)
