"""The spool: tasks that could not reach the database, each a file in state/spool/QUEUE, are taken
in.

Nothing in there stops anything else. What cannot be a task is moved to spool/QUEUE/malformed, what
cannot be read stays where it is, and each is named in a complaint.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import queue_helpers as q
from taskqueue.text import visible

SPOOLED = """
insert or ignore into task_spooled (file) values (:file)"""
UNSPOOLED = """
delete from task_spooled where file = :file"""

# A larger file is no task that a hook wrote.
MOST_BYTES = 64 * 2**20
SET_ASIDE = "malformed"

# Makes the row of what hook.sh left: the hook's arguments, its payload, its directory, its
# project's directory, and how deep in handlers it was fired. A text says why there is no task.
HookRow = Callable[[list[str], bytes, str, str, int], "q.Row | str"]


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


def take_in_spool(
    state: Path | None = None, hook_row: HookRow | None = None
) -> tuple[int, list[str]]:
    """Move spooled tasks into the database, oldest first, each exactly once: (how many,
    complaints).

    hook_row is enqueue.hook_row; without it, what a hook without Python left is left for another.
    Raises QueueBusy, and QueueUnavailable where there is no database to be had.
    """
    state, taken, complaints = state or q.STATE_DIR, 0, []
    for directory in _entries(state, complaints):
        files = _tasks_in(directory, complaints)
        if files:
            conn = q.connect(state)
            for outcome in _take_in_directory(conn, directory, files, hook_row):
                if isinstance(outcome, str):
                    complaints.append(outcome)
                else:
                    taken += outcome
    if taken:
        q.wake(state)
    return taken, [visible(complaint) for complaint in complaints]


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


def _take_in_directory(
    conn: q.Connection, directory: Path, files: list, hook_row: HookRow | None
) -> Iterator[bool | str]:
    """Take in a queue's files: for each whether it was a new task, or a complaint."""
    try:
        q.ensure_queue(conn, directory.name)
    except q.QueueBusy:
        raise
    except Exception as error:
        yield f"{directory}: the queue cannot be used: {error}"
        return
    for mtime, name, inode in files:
        path = directory / name
        try:
            yield _take_in(conn, path, inode, mtime, hook_row)
        except FileNotFoundError:
            # Another worker took it.
            continue
        except q.InvalidTask as error:
            yield _set_aside(path, inode, error)
        except q.QueueBusy:
            raise
        except q.QueueError as error:
            yield f"{directory}: the queue cannot be used: {error}"
            return
        except OSError as error:
            yield f"{path}: {error.strerror}; it cannot be read or removed; {take_back(path.parent)}"
        except Exception as error:
            yield _set_aside(path, inode, error)


def _take_in(
    conn: q.Connection, path: Path, inode: int, mtime: int, hook_row: HookRow | None
) -> bool | str:
    """Whether this file was a new task, or a complaint.

    Its identity is stored in the transaction that stores the task, and forgotten after the file is
    removed: a crash in between, or another worker at the same time, takes nothing in twice.
    """
    queue, is_new = path.parent.name, False
    row = spooled_row(path, hook_row)
    if row is None:
        return f"{path}: a hook without Python left it; it waits for a worker or cleanup.py"
    if isinstance(row, str):
        path.unlink()
        return f"{path} was removed: {row}"
    identity = {"file": f"{queue}/{path.name}:{inode}:{mtime}"}
    with q.transaction(conn):
        if path.lstat().st_ino != inode:
            raise FileNotFoundError(path)
        if conn.execute(SPOOLED, identity).rowcount == 1:
            is_new = q.insert(conn, queue, row)
    path.unlink(missing_ok=True)
    # To lose this costs a line in the table, no task.
    with q.transaction(conn, durable=False):
        conn.execute(UNSPOOLED, identity)
    return is_new


def _set_aside(path: Path, inode: int, why: Exception) -> str:
    """Move a file away that is no task; the complaint about it."""
    try:
        aside = q.make_private(path.parent / SET_ASIDE) / f"{inode}-{path.name}"
        path.rename(aside)
        return f"{aside}: {why}"
    except OSError as error:
        return f"{path}: {why}; nor can it be set aside: {error.strerror}"


def spooled_row(path: Path, hook_row: HookRow | None = None) -> q.Row | str | None:
    """The row of a spooled task, why it is none, or None when it takes hook_row to know.

    Raises NotATask, InvalidTask, OSError.
    """
    if path.suffix == ".hook" and hook_row is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(path)
        if found.st_size > MOST_BYTES:
            raise NotATask(f"it has {found.st_size:,} bytes, and a task {MOST_BYTES:,} at most")
        raw = file.read(MOST_BYTES)
    try:
        return (
            row_of_hook(raw, hook_row) if path.suffix == ".hook" and hook_row else row_of_text(raw)
        )
    except (ValueError, OverflowError, RecursionError) as error:
        raise NotATask(str(error)) from None


def row_of_hook(raw: bytes, hook_row: HookRow) -> q.Row | str:
    """The row of what hook.sh writes where it finds no Python.

    That is fields that end with a NUL (how many arguments the hook was given, the arguments, its
    directory, CLAUDE_PROJECT_DIR, TASK_DEPTH), then the payload.
    """
    count, rest = raw.split(b"\0", 1)
    parts = rest.split(b"\0", int(count) + 3)
    if int(count) < 1 or len(parts) != int(count) + 4:
        raise NotATask("not as a hook writes it")
    fields = [part.decode("utf-8", "surrogateescape") for part in parts[:-1]]
    *words, directory, project, depth = fields
    return hook_row(words, parts[-1], directory, project, int(depth) if depth.isdecimal() else 0)


def row_of_text(raw: bytes) -> q.Row:
    """The row of what would be a row's data: a bare payload, an envelope, or with the columns that
    a hook adds.
    """
    text = raw.decode("utf-8-sig")
    columns = {
        "status": q.READY,
        "due_at": None,
        "priority": 0,
        "group_id": None,
        "expires_at": None,
    }
    columns |= {"task_id": None, "window": 0.0, "on_duplicate": "skip", "firing": None}
    stored, odd = q.read_task(text)
    told = stored.get("spooled_row") if isinstance(stored, dict) else None
    if isinstance(told, dict) and told.keys() == columns.keys():
        columns = stored.pop("spooled_row")
        text = q.to_json(stored)
    elif odd:
        text = q.to_json(stored)
    return q.Row(text, **columns)
