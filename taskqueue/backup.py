"""Copy the whole database, and put such a copy back; files are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import cli, database, recovery, running
from taskqueue.cli import Refused, option, takes
from taskqueue.progress import progress
from taskqueue.remedies import command
from taskqueue.text import plural, sh

RESTORE_BUSY_SECONDS = 30.0

# --------------------------------------------------------------------------------------- statements

LAST_ID = """
select coalesce((select max(seq) from sqlite_sequence where name = :queue), 0)"""
USE_ID = """
update sqlite_sequence set seq = max(seq, :id) where name = :queue"""
FIRST_USED_ID = """
insert into sqlite_sequence (name, seq)
select :queue, :id where not exists (select 1 from sqlite_sequence where name = :queue)"""

COUNT_ALL = """
select count(*) from "{queue}" """
NOT_BACKED_UP = """
select count(*) from "{queue}" l
where not exists (select 1 from backed_up."{queue}" b where b.id = l.id and b.task_id is l.task_id)
  and (l.task_id is null or not exists (select 1 from backed_up."{queue}" b where b.task_id = l.task_id))
  and not exists (select 1 from backed_up.task_history h
                  where h.task_id = coalesce(l.task_id, '{queue}-' || l.id) and +h.queue = '{queue}')"""
FINISHED_NOT_BACKED_UP = """
select count(*) from task_history l
where not exists (select 1 from backed_up.task_history h where h.task_id = l.task_id and +h.queue = l.queue
                  and h.completed_at = l.completed_at)"""


def use_ids(conn: sqlite3.Connection, queue: str, last: int) -> None:
    """Keep the row ids of a queue up to `last` from being given again."""
    for statement in (USE_ID, FIRST_USED_ID):
        conn.execute(statement, {"queue": queue, "id": last})


# ----------------------------------------------------------------------------- writing a whole file


def check_target(path: Path, state: Path) -> None:
    """Raise Refused if a file cannot be written there, or belongs to the queue's state."""
    real = Path(os.path.realpath(path))
    if path.is_dir() or not path.name:
        raise Refused(f"{path} is a directory: give a file's name")
    if not real.parent.is_dir():
        raise Refused(
            f"{path} was not written: there is no directory {real.parent}; make it: mkdir -p "
            f"{sh(real.parent)}"
        )
    if is_within(real, state) or is_part_of(real, state):
        raise Refused(f"{path} belongs to the queue's state in {state}: give a file elsewhere")


def is_within(real: Path, directory: Path) -> bool:
    """Tell whether a path lies in a directory, through links, too."""
    for parent in real.parents:
        try:
            if os.path.samefile(parent, directory):
                return True
        except OSError:
            continue
    return False


def is_part_of(real: Path, state: Path) -> bool:
    """Tell whether a path is the database or a sidecar, or a hard link to a file of the state."""
    db = database.database_file(state)
    if real in (db, *(Path(f"{db}{ending}") for ending in database.SIDECARS)):
        return True
    try:
        found = os.stat(real)
    except OSError:
        return False
    if found.st_nlink < 2 or not stat.S_ISREG(found.st_mode):
        return False
    ours = [
        *database.database_files(state),
        *(Path(top) / name for top, _, names in os.walk(state) for name in names),
    ]
    return any(is_file(path, found) for path in ours)


def is_file(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), found)
    except OSError:
        return False


@contextmanager
def whole_file(path: Path, directory: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file, beside `path` or in `directory`, that replaces `path` at the end.

    If the block fails, it is removed. Raises Refused if it cannot be written.
    """
    # The name is known before the file is made: a signal may come in between.
    name = f".{path.name[:200]}.{os.urandom(4).hex()}"
    temporary = (directory or path.parent) / name
    try:
        with cli.ending_by_signal():
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        if is_damage(error):
            raise
        raise Refused(not_written(path, error)) from None
    finally:
        for ending in ("", *database.SIDECARS):
            Path(f"{temporary}{ending}").unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Write a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def not_written(path: Path, error: OSError | sqlite3.Error) -> str:
    parent = sh(path.absolute().parent)
    check = f"ls -ld {parent}" if isinstance(error, PermissionError) else f"df -h {parent}"
    return (
        f"{path} was not written: {error.strerror if isinstance(error, OSError) else error}; "
        f"see: {check}"
    )


# ---------------------------------------------------------------------------------- backup, restore


@takes(option("file", metavar="FILE", type=Path))
def backup(file: Path, as_json: bool) -> int:
    """Copy the database to FILE as it is at this moment, while workers go on. FILE is replaced once
    the copy is whole."""
    conn = database.open_queue()
    check_target(file, conn.state)
    with whole_file(file) as temporary:
        copy_database(conn, temporary)
    length = file.stat().st_size
    cli.report(
        as_json, {"file": str(file), "bytes": length}, f"backed up {length:,} bytes to {file}"
    )
    return 0


def copy_database(conn: q.Connection, target: Path, check: bool = True) -> None:
    """Write one state of the database into a file. Raise Refused if it is damaged."""
    with closing(sqlite3.connect(target, isolation_level=None)) as copy:
        with database.snapshot(conn), progress("backup", None, "pages") as shown:
            # The first read makes the snapshot, so that the copy never has to start over.
            conn.execute("select 1 from sqlite_master").fetchone()

            def on_pages(status: int, remaining: int, total: int) -> None:
                shown.total = total
                shown.reach(total - remaining)

            conn.backup(copy, pages=1_000, progress=on_pages)
        copy.execute("pragma journal_mode = delete")
        fault = copy.execute("pragma quick_check(1)").fetchone()[0] if check else "ok"
    if fault != "ok":
        raise Refused(f"{conn.state / 'tasks.db'} is damaged, and so would be the copy: {fault}")


class Loss(NamedTuple):
    """Numbers of tasks of the replaced state that the backup lacks; None if it was unreadable."""

    waiting: int | None
    finished: int | None


@takes(option("file", metavar="FILE", type=Path, help="of backup"))
def restore(file: Path, as_json: bool) -> int:
    """Put a backup into the place of the database, while no worker runs. The present state is kept
    beside it."""
    state = q.STATE_DIR
    if any(is_file(path, os.stat(file)) for path in database.database_files(state)):
        raise Refused(f"{file} is the database itself: give a backup of it")
    q.make_private(state, parents=True)
    refuse_while_running(state, None)
    kept = unused_name(state)
    with cli.ending_by_signal(), prepared(file, state) as backed_up:
        try:
            was_there = database.database_file(state).exists()
            loss = put_in_place(backed_up, q.connect(state), kept if was_there else None, file)
        except (q.QueueUnavailable, sqlite3.DatabaseError) as error:
            if not is_damage(error):
                raise
            was_there, loss = True, replace_damaged(backed_up, state, kept)
    q.end_quiet(state)
    q.wake(state)
    told = {"file": str(file), "kept": str(kept) if was_there else None, "missing": loss._asdict()}
    cli.report(as_json, told, "\n".join(sentences(file, kept if was_there else None, loss)))
    return 0


def refuse_while_running(state: Path, conn: sqlite3.Connection | None) -> None:
    """Raise Refused when a worker lives, or a handler of a dead one: its task would run twice."""
    owners = sorted(
        entry.name
        for entry in (state / "workers").glob("*-*")
        if not entry.name.startswith("serving.") and running.is_held(entry)
    )
    if owners:
        pids = " ".join(owner.split("-")[0] for owner in owners)
        raise Refused(f"nothing may run during a restore, and a worker does: stop it: kill {pids}")
    for queue, task in database.claims(conn) if conn else ():
        if recovery.look_at_run(state, task)[1]:
            name = task.task_id or f"{queue}-{task.id}"
            raise Refused(
                f"nothing may run during a restore, and the handler of task {name} does: end it: "
                f"{command('cancel')} {sh(name)}"
            )


def unused_name(state: Path) -> Path:
    """Return a name under which to keep the present state."""
    name = f"tasks.db.before-restore-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(state / name for name in names if not (state / name).exists())


def sentences(file: Path, kept: Path | None, loss: Loss) -> Iterator[str]:
    yield f"restored {file}"
    if kept is None:
        return
    yield f"the state before is kept in {kept}; to go back: {command('restore')} {sh(kept)}"
    if loss.waiting is None:
        yield "that was damaged: which of its tasks are not in the backup could not be read"
    else:
        yield (
            f"not in the backup: {plural(loss.waiting, 'task')} that waited or ran, "
            f"and {loss.finished:,} that had finished"
        )


@contextmanager
def prepared(file: Path, state: Path) -> Iterator[q.Connection]:
    """Yield a checked copy of the backup in the present schema; remove it at the end."""
    directory = state / f".restore-{os.urandom(4).hex()}"
    conn = None
    try:
        q.make_private(directory)
        copy_of_backup(file, directory / "tasks.db")
        try:
            conn = q.connect(directory)
        except q.QueueUnavailable as error:
            raise Refused(str(error).replace(str(directory / "tasks.db"), str(file))) from None
        yield conn
    finally:
        if conn is not None:
            q.close(conn)
        shutil.rmtree(directory, ignore_errors=True)


def copy_of_backup(file: Path, target: Path) -> None:
    """Copy a backup, and check the copy."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise Refused(f"{file} is not a file")
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with (
            closing(database.open_to_read(file, target.parent)) as source,
            closing(sqlite3.connect(target, isolation_level=None)) as copy,
        ):
            source.backup(copy)
            fault = copy.execute("pragma integrity_check(1)").fetchone()[0]
            tables = copy.execute(
                "select count(*) from sqlite_master where type = 'table'"
            ).fetchone()[0]
    except sqlite3.OperationalError as error:
        raise Refused(
            f"{file} was not restored: {error}; see: df -h {sh(target.parent)}; ls -l {sh(file)}"
        ) from None
    except sqlite3.DatabaseError as error:
        fault, tables = str(error), 0
    if fault != "ok":
        raise Refused(f"{file} is damaged or not a database, and was not restored: {fault}")
    if not tables:
        raise Refused(f"{file} is not a task queue's database: it is empty")


def put_in_place(
    backed_up: q.Connection, present: q.Connection, kept: Path | None, file: Path
) -> Loss:
    """Copy the prepared backup into the live database, in one transaction.

    SQLite's backup takes the write lock with its first page. Only then the present state is copied
    and compared: no commit can come in between, so what is kept is complete, and what is counted is
    true.
    """
    loss, began = Loss(0, 0), time.monotonic()
    is_locked = False

    def on_page(status: int, remaining: int, total: int) -> None:
        nonlocal loss, is_locked
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            if time.monotonic() > began + RESTORE_BUSY_SECONDS:
                raise q.QueueBusy(
                    f"{present.state / 'tasks.db'} is locked by other processes; try again"
                )
        elif not is_locked:
            is_locked = True
            # A worker may have come meanwhile.
            refuse_while_running(present.state, present)
            if kept is not None:
                # cleanup removes the leftovers of a killed restore.
                with whole_file(kept, backed_up.state) as temporary:
                    copy_database(present, temporary, check=False)
                    loss = compare(temporary, backed_up)
            # SQLite sees that its source has changed, and copies it from its first page on.
            keep_ids(backed_up, present)

    live = sqlite3.connect(database.database_file(present.state), isolation_level=None, timeout=1.0)
    with closing(live):
        try:
            backed_up.backup(live, pages=1, progress=on_page)
        except sqlite3.OperationalError as error:
            raise Refused(f"{file} was not restored: {error}") from None
    return loss


def compare(kept: Path, backed_up: q.Connection) -> Loss:
    """Count the tasks of the replaced state that the backup lacks."""
    with closing(sqlite3.connect(kept, isolation_level=None)) as conn:
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.execute("attach ? as backed_up", (str(backed_up.state / "tasks.db"),))
        try:
            waiting, there = 0, set(database.queues_of(backed_up))
            for queue in database.queues_of(conn):
                statement = NOT_BACKED_UP if queue in there else COUNT_ALL
                waiting += conn.execute(q.on_queue(statement, queue)).fetchone()[0]
            return Loss(waiting, conn.execute(FINISHED_NOT_BACKED_UP).fetchone()[0])
        except sqlite3.DatabaseError:
            return Loss(None, None)


def keep_ids(backed_up: q.Connection, present: q.Connection) -> None:
    """Keep row ids whose logs still exist from being given again."""
    with q.transaction(backed_up):
        for queue in database.queues_of(present):
            q.ensure_queue(backed_up, queue)
            last = present.execute(LAST_ID, {"queue": queue}).fetchone()[0]
            use_ids(backed_up, queue, last)


def is_damage(error: BaseException) -> bool:
    """Tell whether SQLite found the database unreadable."""
    cause = error if isinstance(error, sqlite3.Error) else error.__cause__
    return (getattr(cause, "sqlite_errorname", None) or "").startswith(
        ("SQLITE_NOTADB", "SQLITE_CORRUPT")
    )


def replace_damaged(backed_up: q.Connection, state: Path, kept: Path) -> Loss:
    """Move an unreadable database and its sidecars aside, and put the backup into its place.

    The write-ahead log goes before the backup comes: SQLite would apply the old log to the new
    file.
    """
    db = database.database_file(state)
    source = backed_up.state / "whole.db"
    copy_database(backed_up, source)
    os.chmod(source, 0o600)
    sync(source)
    for ending in ("", *database.SIDECARS):
        if os.path.exists(f"{db}{ending}"):
            os.chmod(f"{db}{ending}", 0o600)
            os.replace(f"{db}{ending}", f"{kept}{ending}")
    try:
        os.link(source, db)
    except FileExistsError:
        raise Refused(
            f"another process made a new {db} at this moment: run the same command again"
        ) from None
    sync(db.parent)
    return Loss(None, None)
