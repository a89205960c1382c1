"""What a worker does on behalf of tasks: how a run's end becomes an outcome, spooled tasks taken in, dead owners' tasks taken back."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import queue_helpers as q

OWNERS = """
select distinct owner from "{queue}" where status = 2"""
CANCEL_REQUESTED = """
select id from "{queue}" where status = 2 and owner = :owner and cancel_requested"""
WHO_HOLDS = """
select owner, claimed_at, attempts from "{queue}" where id = :id"""
SPOOLED = """
insert or ignore into task_spooled (file) values (:file)"""
UNSPOOLED = """
delete from task_spooled where file = :file"""
REDRIVE = """
insert or ignore into "{queue}" (id, data, priority, group_id)
select row_id, data, priority, group_id from task_history where id = :history_id"""
FORGET = """
delete from task_history where id = :history_id"""


def spool_directories(state: Path) -> list[Path]:
    """The state's spool/QUEUE directories."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(state / "spool") if entry.is_dir())
    except OSError:
        return []


def spooled_files(directory: Path) -> list[tuple[int, str, int]]:
    """The tasks in a spool/QUEUE directory, oldest first: (mtime in ns, name, inode)."""
    files = []
    try:
        for entry in os.scandir(directory):
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                files.append((found.st_mtime_ns, entry.name, found.st_ino))
    except FileNotFoundError:
        pass
    return sorted(files)


def spooled_row(path: Path) -> q.Row:
    """The row of a spooled task: what would be a row's data, or in a .hook file a hook's payload, as it came.

    hook.sh writes the latter where it finds no Python: fields that end with a NUL (how many arguments the hook was
    given, the arguments, its directory, CLAUDE_PROJECT_DIR, TASK_DEPTH), then the payload. Raises InvalidTask.
    """
    raw = path.read_bytes()
    if path.suffix != ".hook":
        text = raw.decode("utf-8-sig")
        return q.Row(text, q.READY, None, 0, None, None, None, 0.0, "skip", None)
    import enqueue

    try:
        count, rest = raw.split(b"\0", 1)
        *fields, payload = rest.split(b"\0", int(count) + 3)
        *words, directory, _project_dir, depth = [os.fsdecode(field) for field in fields]
        arguments = enqueue.Arguments(["--hook", *words])
    except ValueError as error:
        raise q.InvalidTask(f"not as a hook writes it: {error}") from None
    except enqueue.getopt.GetoptError as error:
        raise q.InvalidTask(f"its hook has an option that is not known: {error}") from None
    return enqueue.hook_row(q, arguments, payload, directory, int(depth) if depth.isdecimal() else 0)


def take_in_spool(state: Path | None = None) -> tuple[int, list[str]]:
    """Move spooled tasks into the database, oldest first, each exactly once: (how many, complaints).

    A file's identity is stored in the transaction that stores its task, and forgotten after the file is removed: a
    crash in between, or another worker at the same time, takes nothing in twice. What is not a JSON object is moved
    to spool/QUEUE/malformed and named in the complaints.
    """
    state, taken, complaints = state or q.STATE_DIR, 0, []
    for directory in spool_directories(state):
        files = spooled_files(directory)
        if not files:
            continue
        try:
            queue = q.check_queue_name(directory.name)
        except q.InvalidTask as error:
            complaints.append(f"{directory}: {error}")
            continue
        conn = q.connect(state)
        q.ensure_queue(conn, queue)
        for mtime, name, inode in files:
            path, identity = directory / name, f"{queue}/{name}:{inode}:{mtime}"
            try:
                row = spooled_row(path)
                with q.transaction(conn):
                    if path.stat().st_ino != inode:
                        raise FileNotFoundError(path)
                    if conn.execute(SPOOLED, {"file": identity}).rowcount == 1:
                        taken += q.insert(conn, queue, row)
                path.unlink(missing_ok=True)
                with errors_explained(conn):
                    conn.execute(UNSPOOLED, {"file": identity})
            except FileNotFoundError:
                continue  # another worker took it
            except OSError as error:
                complaints.append(
                    f"{path}: {error.strerror}; it cannot be taken in, or not removed: check the permissions"
                )
            except (q.InvalidTask, UnicodeDecodeError) as error:
                aside = q.make_private(directory / "malformed") / f"{inode}-{name}"
                path.rename(aside)
                complaints.append(f"{aside}: {error}")
    if taken:
        q.wake(state)
    return taken, complaints


def recover(state: Path | None = None, *, crash_backoff: float = 0.0) -> tuple[list, int]:
    """Take back the tasks of dead owners. Returns ([(task, outcome, error), …], how many handlers outlive them).

    An owner is dead when its lock is free. While a handler of its still runs (it holds its output file's lock), its
    task is left alone; one that ended left its exit status, which counts. Otherwise the task is ready again after
    crash_backoff seconds, or buried when its attempts are spent.
    """
    conn, recovered, orphans = q.connect(state, create=False), [], 0
    with errors_explained(conn):
        claims = [(owner, queue) for (queue,) in conn.execute(q.QUEUES).fetchall()
                  for (owner,) in q.execute(conn, OWNERS, queue)]  # fmt: skip
    mine = q._process.owners.get(conn.state, (None, None))[0]
    for owner in {owner for owner, _ in claims if owner != mine}:
        path, fd = conn.state / "workers" / os.path.basename(owner or q.NOBODY), None
        try:
            fd = q.lock_file(path, probe=True)
            if fd is None:
                continue  # alive
        except FileNotFoundError:
            pass  # nobody can hold what is not there
        except OSError:
            continue
        try:
            left = 0
            with q.transaction(conn):
                for queue in [queue for name, queue in claims if name == owner]:
                    for row in q.execute(conn, q.CLAIMED_BY, queue, owner=owner).fetchall():
                        done = _recover_task(conn, q.Task.from_row(queue, row), crash_backoff)
                        left += done is None
                        recovered += [done] if done else []
            orphans += left
            if not left:
                exits_file(conn.state, owner).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        finally:
            if fd is not None:
                os.close(fd)
    if recovered:
        q.wake(conn.state)
    return recovered, orphans


@lru_cache(64)
def exits_file(state: Path, owner: str | None) -> Path:
    """Where an owner's supervisor appends a line `run_name exit_code` as handlers end, and why if they were ended."""
    return state / "logs" / f"{os.path.basename(owner or q.NOBODY)}.exits"


def _recover_task(conn: q.Connection, task: q.Task, crash_backoff: float) -> tuple[q.Task, str, str | None] | None:
    """(task, outcome, error) of a dead owner's task, None while its handler runs."""
    run = f"{conn.state / 'logs' / task.run_name}"
    try:
        fd = q.lock_file(f"{run}.out", probe=True)
        if fd is None:
            return None
        os.close(fd)
    except OSError:
        pass  # it never started one
    exits = q.tail(str(exits_file(conn.state, task.owner)), q.RESULT_BYTES)  # complete: the lock is free
    end = re.search(rf"^{re.escape(task.run_name)} ([0-9]+)(?: (.+))?$", exits, re.MULTILINE)
    if end and (int(end[1]) <= 128 or end[2]):
        outcome, error = q.settle(conn, task, int(end[1]), why=end[2])
    elif end:  # it was killed: fell with its worker
        error = f"its worker died ({task.owner}), and its handler was killed by {q.signal_name(int(end[1]) - 128)}"
        outcome, error = q.settle(conn, task, int(end[1]), why=error, delay=crash_backoff)
    else:
        error = f"its worker died ({task.owner})"
        outcome = q.nack(conn, task, error=error, delay=crash_backoff)
    return task, outcome or "lost", error


def redrive(conn: q.Connection, queue: str, history_id: int) -> bool:
    """Put a finished task back into its queue under its old id, attempts at zero.

    False when the same task_id is waiting or running already; the history is kept then.
    """
    if q.execute(conn, REDRIVE, queue, history_id=history_id).rowcount != 1:
        return False
    conn.execute(FORGET, {"history_id": history_id})
    return True


def not_held(conn: q.Connection, task: q.Task, verb: str = "acknowledged") -> None:
    """Log that a task was not ours to end."""
    row = q.execute(conn, WHO_HOLDS, task.queue, id=task.id).fetchone()
    if row is None:
        why = "it is finished or gone"
    elif row[0] is None:
        why = "it is waiting again"
    else:
        why = f"{row[0]} holds it since {q.utc(row[1] or 0)} UTC, attempt {row[2]}"
    logging.getLogger(__name__).warning(
        'queue "%s": task %s was not %s: %s (this process lost it when its lock file or the state '
        "was removed)",
        task.queue,
        task.id,
        verb,
        why,
    )


@contextmanager
def errors_explained(conn: q.Connection):
    """Have SQLite's errors raised as QueueErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise q.explain(error, conn.state) from error


def log_is_lost(db: str) -> None:
    """Say that the write-ahead log was removed while it was in use."""
    logging.getLogger(__name__).error(
        "%s-wal was removed while it was in use: what was committed since it was last written back "
        "may be lost; see tasks.py doctor",
        db,
    )
