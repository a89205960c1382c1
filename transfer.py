#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Take tasks out of the database and bring them in: export and import, backup and restore.

    transfer.py export --history tasks.jsonl        all tasks as JSON lines
    transfer.py import tasks.jsonl                  those that are not there yet
    transfer.py backup tasks.backup                 the whole database, while workers go on
    transfer.py restore tasks.backup                put it back, while workers go on

tasks.py export, import, backup and restore are the same commands. Every command has --help, and
--json for scripts.

exit codes: 0 fine; 1 not possible, or the database cannot be used; 64 usage; 65 lines or
files of an import were refused (they are named, the others are in); 75 the database is locked, try
again; 130 interrupted.
"""

import argparse
import json
import os
import re
import shutil
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import queue_helpers as q
from taskqueue import cli
from taskqueue.cli import EX_DATAERR, Refused, sh
from taskqueue.text import visible

# An import reads and checks so many lines before it stores them.
LINES_AT_A_TIME = 500
MOST_FAULTS_SHOWN = 20
# A file-based queue's files: their kind is the name's beginning, and decides on the queue and the
# type.
LEGACY = {
    "notify": ("notifications", "notification"),
    "approval": ("approvals", "approval"),
    "completion": ("completions", "completion"),
}
MOST_ATTEMPTS = 1_000_000
RESTORE_BUSY_SECONDS = 30.0

# --------------------------------------------------------------------------------------- statements

EXPORT_FINISHED = """
select json_object('queue', queue, 'id', row_id, 'task_id', task_id, 'task_type', coalesce(nullif(task_type, ''), queue), 'status', status,
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 'max_attempts', max_attempts,
                   'enqueued_at', enqueued_at, 'started_at', started_at, 'completed_at', completed_at,
                   'exit_code', exit_code, 'error', error, 'result', result, 'log', log), json_valid(data), data
from task_history where :queues is null or queue in (select value from json_each(:queues)) order by id"""
EXPORT_LIVE = f"""
select json_object('queue', '{{queue}}', 'id', id, 'task_id', coalesce(task_id, '{{queue}}-' || id),
                   'task_type', coalesce(nullif(task_type, ''), '{{queue}}'),
                   'status', {q.STATUS_WORD},
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 
                   'due_at', iif(due_at is null, null, json(printf('%!.17g', due_at))),
                   'expires_at', iif(expires_at is null, null, json(printf('%!.17g', expires_at))),
                   'enqueued_at', json(printf('%!.17g', min(max(iif(typeof(timestamp) = 'real', timestamp,
                     coalesce((julianday(timestamp) - 2440587.5) * 86400.0, 0)), 0), {q.LAST_SECOND}))), 'error', error), 1,
                   coalesce(rerun_data, data)
from "{{queue}}" order by id"""

LAST_ID = """
select coalesce((select max(seq) from sqlite_sequence where name = :queue), 0)"""
# A task comes in once: not while it waits or runs, nor when the history has this life of it, or a
# later one. A bare payload is called after its row, so that alone does not say that it is the same
# task.
SAME_DATA = """
case when json_valid(data) then json(readable(data)) else data end = :data"""
KNOWN_TASK = """
select exists (select 1 from "{queue}" where task_id = :task_id)
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{queue}'
             and enqueued_at >= :enqueued)"""
KNOWN_BARE = f"""
select exists (select 1 from "{{queue}}" where id = :id and task_id is null and {SAME_DATA})
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{{queue}}' and row_id = :id and {SAME_DATA})"""
KNOWN_FINISHED = f"""
select exists (select 1 from "{{queue}}" where id = :id and coalesce(task_id, '{{queue}}-' || id) = :task_id and {SAME_DATA})
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{{queue}}'
             and (row_id = :id and {SAME_DATA} or enqueued_at = :enqueued_at and completed_at = :completed_at))"""
KNOWN_LEGACY = """
select exists (select 1 from task_history where task_id = :task_id and +queue = :queue)"""
ID_IN_USE = """
select exists (select 1 from "{queue}" where id = :id)"""
DATA_OF = """
select iif(json_type(:line, '$.data') = 'object', json(readable(json_extract(:line, '$.data'))), json_extract(:line, '$.data'))"""
IMPORT_LIVE = """
insert into "{queue}" (id, data, timestamp, status, due_at, priority, group_id, expires_at, attempts, error)
values (:id, :data, :timestamp, :status, :due_at, :priority, :group_id, :expires_at, :attempts, :error)"""
IMPORT_FINISHED = """
insert into task_history (queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
                          enqueued_at, started_at, completed_at, exit_code, result, log, error)
values (:queue, :id, :task_id, :task_type, :status, :data, :priority, :group_id, :attempts, :max_attempts,
        :enqueued_at, :started_at, :completed_at, :exit_code, :result, :log, :error)"""
USE_ID = """
update sqlite_sequence set seq = max(seq, :id) where name = :queue"""
FIRST_USED_ID = """
insert into sqlite_sequence (name, seq) select :queue, :id where not exists (select 1 from sqlite_sequence where name = :queue)"""

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
DISOWN = """
update "{queue}" set owner = :owner where id = :id and status = 2"""

# ------------------------------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its
    arguments.
    """
    parser = cli.make_parser("transfer.py", __doc__)
    commands = parser.add_subparsers(
        metavar="COMMAND", required=True, dest="command", parser_class=cli.Parser
    )

    entry = cli.add_command(commands, export)
    entry.add_argument("file", metavar="FILE", nargs="?", default="-", help="(default: stdout)")
    entry.add_argument(
        "--queue",
        dest="queues",
        metavar="QUEUE",
        action="append",
        type=cli.utf8,
        help="may be given several times",
    )
    entry.add_argument("--history", action="store_true", help="finished tasks, too")

    entry = cli.add_command(commands, import_)
    entry.add_argument("file", metavar="FILE", nargs="?", help="of export; - for stdin")
    entry.add_argument(
        "--legacy",
        metavar="DIR",
        type=Path,
        help="take in notify_*, approval_* and completion_*.json of DIR",
    )
    entry.add_argument(
        "--type",
        dest="task_type",
        metavar="TYPE",
        type=cli.utf8,
        help="of legacy tasks that name none",
    )

    cli.add_command(commands, backup).add_argument("file", metavar="FILE", type=Path)
    cli.add_command(commands, restore).add_argument(
        "file", metavar="FILE", type=Path, help="of backup"
    )

    args = parser.parse_args(argv)
    if args.run is import_ and (args.file is None) == (args.legacy is None):
        cli.Parser(prog="transfer.py import").error("give FILE, or --legacy DIR")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")
    return cli.run(f"transfer.py {name}", lambda: run(**args))


# ----------------------------------------------------------------------------- writing a whole file


def check_target(path: Path, state: Path) -> None:
    """Raise Refused unless path can be written to and is no part of the queue's state, through any
    link.
    """
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
    """Whether a path lies in a directory, by whatever name that goes."""
    for parent in real.parents:
        try:
            if os.path.samefile(parent, directory):
                return True
        except OSError:
            continue
    return False


def is_part_of(real: Path, state: Path) -> bool:
    """Whether it is the database or a sidecar of it elsewhere, or another name (a hard link) of a
    file of the state.
    """
    db = cli.database_file(state)
    if real in (db, *(Path(f"{db}{ending}") for ending in cli.SIDECARS)):
        return True
    try:
        found = os.stat(real)
    except OSError:
        return False
    if found.st_nlink < 2 or not stat.S_ISREG(found.st_mode):
        return False
    ours = [
        *cli.database_files(state),
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
    """A temporary name beside path, or in that directory. It becomes path, on disk, when the block
    ends well; else it is removed.
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
        for ending in ("", *cli.SIDECARS):
            Path(f"{temporary}{ending}").unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file or a directory on disk when this returns."""
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


# ----------------------------------------------------------------------------------- export, backup


def export(file: str, queues: list[str] | None, history: bool, as_json: bool) -> int:
    """Write waiting and running tasks as JSON lines, for import; with --history the finished ones,
    too.
    """
    conn = cli.open_queue()
    cli.check_known(conn, queues or ())
    if file == "-" or (
        os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file)
    ):
        exported = export_to_stream(conn, file, queues, history)
    else:
        check_target(Path(file), conn.state)
        with whole_file(Path(file)) as temporary, open(temporary, "wb") as out:
            exported = write_lines(conn, out, queues, history)
    says = f"exported {cli.plural(exported, 'task')} to {file}"
    says = json.dumps({"exported": exported, "file": file}) if as_json else visible(says)
    print(says, file=sys.stderr if file == "-" else sys.stdout)
    return 0


def export_to_stream(conn: q.Connection, file: str, queues: list[str] | None, history: bool) -> int:
    """Export to standard output, a pipe or a device."""
    name = "standard output" if file == "-" else file
    if file == "-" and 1 in cli.closed_streams:
        raise Refused("standard output is closed: give a file's name")
    try:
        if file == "-":
            sys.stdout.flush()
            return write_lines(conn, sys.stdout.buffer, queues, history)
        with open(file, "wb") as out:
            return write_lines(conn, out, queues, history)
    except BrokenPipeError:
        cli.mute(1)
        raise Refused("the export is not whole: its reader closed the pipe") from None
    except OSError as error:
        cli.mute(1)
        raise Refused(f"{name} was not written: {error.strerror}") from None


def write_lines(conn: q.Connection, out: BinaryIO, queues: list[str] | None, history: bool) -> int:
    """Finished tasks first, in the order of their end, so that import meets a task's lives in their
    order.
    """
    exported, on_terminal = 0, out.isatty()
    named = {"queues": json.dumps(queues) if queues else None}
    with cli.snapshot(conn):
        sources = [conn.execute(EXPORT_FINISHED, named)] if history else []
        sources += [q.execute(conn, EXPORT_LIVE, queue) for queue in queues or cli.queues_of(conn)]
        for source in sources:
            for head, is_json, data in source:
                # The data goes in as it is stored, where any reader can read that: no number is
                # rounded, nothing reordered. Between JSON's tokens a newline is a space, and inside
                # its strings there is none.
                data = data.split("\0")[0]
                data = re.sub("[\r\n]", " ", readable(data)) if is_json else json.dumps(data)
                line = f'{head[:-1]},"data":{data}}}\n'
                out.write((escaped(line) if on_terminal else line).encode("utf-8", "replace"))
                exported += 1
    out.flush()
    return exported


def readable(data: str) -> str:
    """A task's data, its numbers kept as text that other readers of JSON could not read."""
    if re.search(q.ODD_NUMBER, data):
        try:
            stored, odd = q.read_task(data)
            return q.to_json(stored) if odd else data
        except (ValueError, RecursionError):
            # It is no JSON, or nested too deep for Python.
            pass
    return data


def escaped(line: str) -> str:
    """A line of JSON in printable ASCII, for a terminal: what is not can only stand in strings."""
    return re.sub(
        "[^\\x20-\\x7e\\n]",
        lambda found: json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f"),
        line,
    )


def backup(file: Path, as_json: bool) -> int:
    """Copy the database to FILE as it is at this moment, while workers go on. FILE is replaced once
    the copy is whole.
    """
    conn = cli.open_queue()
    check_target(file, conn.state)
    with whole_file(file) as temporary:
        copy_database(conn, temporary)
    length = file.stat().st_size
    cli.report(
        as_json, {"file": str(file), "bytes": length}, f"backed up {length:,} bytes to {file}"
    )
    return 0


def copy_database(conn: q.Connection, target: Path, check: bool = True) -> None:
    """Write one state of the database into one file without sidecars. Raises Refused when that is
    damaged.
    """
    with closing(sqlite3.connect(target, isolation_level=None)) as copy:
        with cli.snapshot(conn):
            # The first read makes the snapshot, so that the copy never has to start over.
            conn.execute("select 1 from sqlite_master").fetchone()
            conn.backup(copy, pages=1_000)
        copy.execute("pragma journal_mode = delete")
        fault = copy.execute("pragma quick_check(1)").fetchone()[0] if check else "ok"
    if fault != "ok":
        raise Refused(f"{conn.state / 'tasks.db'} is damaged, and so would be the copy: {fault}")


# ------------------------------------------------------------------------------------------ restore


class Loss(NamedTuple):
    """How many tasks of the state before are in no form in the backup; None where that could not be
    read.
    """

    waiting: int | None
    finished: int | None


def restore(file: Path, as_json: bool) -> int:
    """Put a backup into the place of the database, while workers go on. The present state is kept
    beside it.
    """
    state = q.STATE_DIR
    if any(is_file(path, os.stat(file)) for path in cli.database_files(state)):
        raise Refused(f"{file} is the database itself: give a backup of it")
    q.make_private(state, parents=True)
    kept = unused_name(state)
    with cli.ending_by_signal(), prepared(file, state, page_size_of(state)) as backed_up:
        try:
            was_there = cli.database_file(state).exists()
            loss = put_in_place(backed_up, q.connect(state), kept if was_there else None)
        except (q.QueueUnavailable, sqlite3.DatabaseError) as error:
            if not is_damage(error):
                raise
            was_there, loss = True, replace_damaged(backed_up, state, kept)
    q.wake(state)
    told = {"file": str(file), "kept": str(kept) if was_there else None, "missing": loss._asdict()}
    cli.report(as_json, told, "\n".join(sentences(file, kept if was_there else None, loss)))
    return 0


def unused_name(state: Path) -> Path:
    """Where the present state is to be kept."""
    name = f"tasks.db.before-restore-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    return next(state / name for name in names if not (state / name).exists())


def sentences(file: Path, kept: Path | None, loss: Loss) -> Iterator[str]:
    yield f"restored {file}"
    if kept is None:
        return
    yield f"the state before is kept in {kept}; to go back: {cli.command('restore')} {sh(kept)}"
    if loss.waiting is None:
        yield "that was damaged: which of its tasks are not in the backup could not be read"
    else:
        yield (
            f"not in the backup: {cli.plural(loss.waiting, 'task')} that waited or ran, "
            f"and {loss.finished:,} that had finished"
        )


def page_size_of(state: Path) -> int | None:
    """Of the live database; None where there is none that can be read."""
    try:
        with closing(cli.open_to_read(state / "tasks.db")) as conn:
            # It is read with the first page, and not before.
            conn.execute("select 1 from sqlite_master").fetchone()
            return conn.execute("pragma page_size").fetchone()[0]
    except (OSError, sqlite3.Error):
        return None


@contextmanager
def prepared(file: Path, state: Path, page_size: int | None) -> Iterator[q.Connection]:
    """The backup as a database of its own within the state, checked, of the present schema, with
    pages of that size; removed at the end.
    """
    directory = state / f".restore-{os.urandom(4).hex()}"
    conn = None
    try:
        q.make_private(directory)
        copy_of_backup(file, directory / "tasks.db")
        if page_size is not None:
            bring_to_page_size(directory / "tasks.db", page_size, file)
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
            closing(cli.open_to_read(file, target.parent)) as source,
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


def bring_to_page_size(copy: Path, page_size: int, file: Path) -> None:
    """Have a copy of a backup written anew with pages of another size, which SQLite's backup needs.

    auto_vacuum stays as it is. Raises Refused.
    """
    try:
        with closing(sqlite3.connect(copy, isolation_level=None)) as conn:
            if conn.execute("pragma page_size").fetchone()[0] != page_size:
                conn.execute("pragma journal_mode = delete")
                conn.execute(f"pragma page_size = {page_size}")
                conn.execute("vacuum")
    except sqlite3.Error as error:
        raise Refused(
            f"{file} was not restored: {error}; see: df -h {sh(copy.parent.parent)}"
        ) from None


def put_in_place(backed_up: q.Connection, present: q.Connection, kept: Path | None) -> Loss:
    """Copy the prepared backup into the live database, in one transaction that all processes see at
    once.

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
            if kept is not None:
                # What a killed restore leaves there is removed by cleanup.
                with whole_file(kept, backed_up.state) as temporary:
                    copy_database(present, temporary, check=False)
                    loss = compare(temporary, backed_up)
            # SQLite sees that its source has changed, and copies it from its first page on.
            fit_in(backed_up, present)

    with closing(
        sqlite3.connect(cli.database_file(present.state), isolation_level=None, timeout=1.0)
    ) as live:
        backed_up.backup(live, pages=1, progress=on_page)
    return loss


def compare(kept: Path, backed_up: q.Connection) -> Loss:
    """What the state before has, and the backup has not."""
    with closing(sqlite3.connect(kept, isolation_level=None)) as conn:
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.execute("attach ? as backed_up", (str(backed_up.state / "tasks.db"),))
        try:
            waiting, there = 0, set(cli.queues_of(backed_up))
            for queue in cli.queues_of(conn):
                statement = NOT_BACKED_UP if queue in there else COUNT_ALL
                waiting += conn.execute(q.on_queue(statement, queue)).fetchone()[0]
            return Loss(waiting, conn.execute(FINISHED_NOT_BACKED_UP).fetchone()[0])
        except sqlite3.DatabaseError:
            return Loss(None, None)


def fit_in(backed_up: q.Connection, present: q.Connection) -> None:
    """Prepare the backup for the processes that live now.

    No queue that they know is missing, no row id that they have seen is used again, and a task that
    the backup calls claimed is claimed by nobody who lives, so that it is taken back: but for a
    claim that is still held as it was.
    """
    held = {(queue, *claim_of(task)) for queue, task in cli.claims(present)}
    with q.transaction(backed_up):
        for queue in cli.queues_of(present):
            q.ensure_queue(backed_up, queue)
            used = {"queue": queue, "id": present.execute(LAST_ID, {"queue": queue}).fetchone()[0]}
            backed_up.execute(USE_ID, used)
            backed_up.execute(FIRST_USED_ID, used)
        lost = f"restored-{os.urandom(4).hex()}"
        for queue, task in list(cli.claims(backed_up)):
            if (queue, *claim_of(task)) not in held:
                q.execute(backed_up, DISOWN, queue, id=task.id, owner=lost)


def claim_of(task: q.Task) -> tuple:
    return task.id, task.task_id, task.owner, task.attempts, task.claimed_at


def is_damage(error: BaseException) -> bool:
    """Whether the live database is one that SQLite cannot read."""
    cause = error if isinstance(error, sqlite3.Error) else error.__cause__
    return (getattr(cause, "sqlite_errorname", None) or "").startswith(
        ("SQLITE_NOTADB", "SQLITE_CORRUPT")
    )


def replace_damaged(backed_up: q.Connection, state: Path, kept: Path) -> Loss:
    """Move a database that SQLite cannot read aside, with its sidecars, and put the backup into its
    place.

    The write-ahead log goes before the backup comes: SQLite would apply the old log to the new
    file.
    """
    db = cli.database_file(state)
    with q.transaction(backed_up):
        lost = f"restored-{os.urandom(4).hex()}"
        for queue, task in list(cli.claims(backed_up)):
            q.execute(backed_up, DISOWN, queue, id=task.id, owner=lost)
    source = backed_up.state / "whole.db"
    copy_database(backed_up, source)
    os.chmod(source, 0o600)
    sync(source)
    os.chmod(db, 0o600)
    os.replace(db, kept)
    for ending in cli.SIDECARS:
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


# ------------------------------------------------------------------------------------------- import


def import_(file: str | None, legacy: Path | None, task_type: str | None, as_json: bool) -> int:
    """Take in an export, or with --legacy the JSON files of a file-based queue. What came in before
    is not taken again.
    """
    if file == "-" and 0 in cli.closed_streams:
        raise Refused("standard input is closed: give a file's name")
    if (q.STATE_DIR / "tasks.db").exists():
        cli.open_queue()
    conn = q.connect()
    conn.create_function("readable", 1, readable, deterministic=True)
    # What is said of lines and files: why they were refused, and what was changed in others.
    faults: list[str] = []
    notes: list[str] = []
    if legacy is not None:
        imported, known = import_legacy(conn, legacy, task_type, faults, notes)
    else:
        imported, known = import_lines(conn, file or "-", faults, notes)
    for said in (faults, notes):
        for line in said[:MOST_FAULTS_SHOWN]:
            cli.complain(EX_DATAERR, "transfer.py import", line)
        if len(said) > MOST_FAULTS_SHOWN:
            more = f"… and {len(said) - MOST_FAULTS_SHOWN:,} more"
            cli.complain(EX_DATAERR, "transfer.py import", more)
    told = {"imported": imported, "already_there": known, "refused": faults}
    says = (
        f"imported {cli.plural(imported, 'task')}; {known:,} already there; {len(faults):,} refused"
    )
    cli.report(as_json, told, says)
    if not faults:
        return 0
    return EX_DATAERR


# The columns of a task that an import takes over as they are.
FIELDS = (
    "queue",
    "id",
    "task_id",
    "task_type",
    "status",
    "priority",
    "group_id",
    "attempts",
    "max_attempts",
    "enqueued_at",
    "due_at",
    "expires_at",
    "started_at",
    "completed_at",
    "exit_code",
    "error",
    "result",
    "log",
)


class Ids(NamedTuple):
    """The row ids of a queue that an import may use: from first_free on, and not used by it yet."""

    first_free: int
    used: set[int]


def import_lines(
    conn: q.Connection, file: str, faults: list[str], notes: list[str]
) -> tuple[int, int]:
    """(imported, known already)."""
    ids: dict[str, Ids] = {}
    imported = known = 0

    def refuse(number: int, error: Exception) -> None:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        faults.append(f"line {number} was refused: {cli.short(why)}")

    def store(item: tuple[int, str, dict]) -> bool | None:
        number, text, task = item
        conn.execute("savepoint line")
        try:
            return import_task(conn, text, task, ids)
        except Exception as error:
            if not is_about_the_task(error, conn.state):
                raise
            conn.execute("rollback to line")
            return refuse(number, error)
        finally:
            if conn.in_transaction:
                conn.execute("release line")

    with open(0, "rb", closefd=False) if file == "-" else open(file, "rb") as lines:
        numbered = enumerate(lines, 1)
        while batch := list(islice(numbered, LINES_AT_A_TIME)):
            # Read outside of the transaction: that takes longer than storing.
            parsed = []
            for number, line in batch:
                try:
                    if line.strip():
                        text, task, odd = parse_line(conn, line, ids)
                        parsed.append((number, text, task))
                        notes += [f"line {number}: {kept_as_text(odd)}"] if odd else []
                except Exception as error:
                    if not is_about_the_task(error, conn.state):
                        raise
                    refuse(number, error)
            results = list(cli.in_steps(conn, parsed, store))
            imported, known = imported + results.count(True), known + results.count(False)
            q.wake(conn.state)
    return imported, known


def is_about_the_task(error: Exception, state: Path) -> bool:
    """Whether a line or a file is at fault, and not the database or the disk."""
    if isinstance(error, sqlite3.Error) and not isinstance(
        error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)
    ):
        error = q.explain(error, state)
    if isinstance(error, q.QueueError):
        return isinstance(error, q.InvalidTask)
    return isinstance(
        error, (ValueError, TypeError, KeyError, RecursionError, OverflowError, sqlite3.Error)
    )


def read_json(text: str) -> tuple[dict, list[str]]:
    """A JSON object, and the numbers like 1e400 in it, which are kept as text; no field of ours may
    be one. ValueError for what is none, NaN and Infinity among it, which only Python takes for
    JSON."""
    value, odd = q.read_task(text)
    for number in odd:
        if number.strip("-") in ("NaN", "Infinity"):
            raise ValueError(f"{number} is not JSON")
    if not isinstance(value, dict):
        raise q.InvalidTask("it is not a JSON object")
    return value, odd


def kept_as_text(odd: list[str]) -> str:
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"the number {odd[0]}{more} is kept as text: not every reader of JSON can read it"


def parse_line(conn: q.Connection, line: bytes, ids: dict[str, Ids]) -> tuple[str, dict, list[str]]:
    """The text and the task of a line, all of its fields checked, and its numbers that are kept as
    text; its queue exists when this returns.
    """
    text = line.decode("utf-8-sig").strip()
    task, odd = read_json(text)
    if task["status"] not in cli.STATUSES:
        raise q.InvalidTask(f"{task['status']!r} is not a status")
    queue = q.check_queue_name(task["queue"])
    check_number(task, "id", 1, 2**53)
    check_number(task, "priority", -1_000_000, 1_000_000, default=0)
    check_number(task, "attempts", 0, MOST_ATTEMPTS, default=0)
    check_number(task, "max_attempts", 1, MOST_ATTEMPTS, default=None)
    check_number(task, "exit_code", -(2**31), 2**31, default=None)
    for name in ("task_id", "task_type", "group_id", "error", "result", "log"):
        check_text(task, name, may_be_missing=name not in ("task_id", "task_type"))
    check_times(task)
    if queue not in ids:
        q.ensure_queue(conn, queue)
        ids[queue] = Ids(conn.execute(LAST_ID, {"queue": queue}).fetchone()[0] + 1, set())
    return text, task, odd


REQUIRED = object()


def check_number(task: dict, name: str, least: int, most: int, default: object = REQUIRED) -> None:
    """Raise InvalidTask unless a field is a whole number within its bounds, or may be missing and
    is.
    """
    value = task[name] if default is REQUIRED else task.setdefault(name, default)
    if value is None and default is not REQUIRED:
        task[name] = default
    elif type(value) is not int or not least <= value <= most:
        raise q.InvalidTask(
            f"its {name} is {cli.short(repr(value), 40)}: not a whole number from {least} to {most}"
        )


def check_text(task: dict, name: str, may_be_missing: bool) -> None:
    """Raise InvalidTask unless a field is a text that UTF-8 can say, or may be missing and is."""
    value = task.setdefault(name, None) if may_be_missing else task[name]
    # A live task's type is null where its row has none to tell.
    if value is None and (may_be_missing or name == "task_type"):
        return
    if not isinstance(value, str) or not (value or may_be_missing):
        raise q.InvalidTask(f"its {name} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise q.InvalidTask(f"its {name} has a lone surrogate") from None


def check_times(task: dict) -> None:
    """Raise InvalidTask unless the task's moments are such: seconds for a live task, text for a
    finished one.
    """
    if task["status"] in cli.FINISHED:
        for name in ("enqueued_at", "started_at", "completed_at"):
            value = task.get(name)
            if not (name == "started_at" and value is None) and not is_moment(value):
                raise q.InvalidTask(
                    f"its {name} is {cli.short(repr(value), 40)}: not a time like 2030-01-31 "
                    "12:00:00.000"
                )
        return
    names = ["enqueued_at"]
    names += ["due_at"] if task["status"] == "scheduled" else []
    names += ["expires_at"] if task.get("expires_at") is not None else []
    for name in names:
        value = task[name]
        if type(value) not in (int, float) or not 0 <= value <= q.LAST_SECOND:
            raise q.InvalidTask(
                f"its {name} is {cli.short(repr(value), 40)}: not seconds since 1970"
            )


def is_moment(value: object) -> bool:
    """Whether it is a UTC time as the history has them."""
    if not isinstance(value, str) or not re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?", value
    ):
        return False
    try:
        datetime.fromisoformat(value[:19])
    except ValueError:
        return False
    return True


def import_task(conn: q.Connection, text: str, task: dict, ids: dict[str, Ids]) -> bool:
    """Store one exported task, within a transaction; False when it is known already."""
    row = {name: task.get(name) for name in FIELDS} | {
        "data": conn.execute(DATA_OF, {"line": text}).fetchone()[0]
    }
    row["task_type"] = row["task_type"] or row["queue"]
    if row["status"] in cli.FINISHED:
        return import_finished(conn, row, ids)
    if not isinstance(task.get("data"), dict):
        raise q.InvalidTask("its data is not a JSON object")
    return import_live(conn, row, task["data"], ids)


def import_finished(conn: q.Connection, row: dict, ids: dict[str, Ids]) -> bool:
    if not isinstance(row["data"], str):
        raise q.InvalidTask("its data is neither a text nor a JSON object")
    if conn.execute(q.on_queue(KNOWN_FINISHED, row["queue"]), row).fetchone()[0]:
        return False
    row["id"] = own_id(conn, row, ids)
    conn.execute(IMPORT_FINISHED, row)
    q.end_quiet(conn.state)
    return True


def import_live(conn: q.Connection, row: dict, data: dict, ids: dict[str, Ids]) -> bool:
    queue, was_id = row["queue"], row["id"]
    is_later = row["status"] in ("scheduled", "held")
    row |= {
        "timestamp": float(row["enqueued_at"]),
        # The history's time of it; SQLite's strftime() rounds some of them otherwise.
        "enqueued": q.utc(row["enqueued_at"]),
        "due_at": float(row["due_at"]) if row["status"] == "scheduled" else None,
        "status": q.SCHEDULED if is_later else q.READY,
        "expires_at": None if row["expires_at"] is None else float(row["expires_at"]),
    }
    is_bare = not (
        isinstance(data.get("task_id"), str)
        and data["task_id"]
        and isinstance(data.get("task_type"), str)
        and isinstance(data.get("data"), dict)
    )
    if not is_bare:
        # The database reads the id out of the data, and so do we.
        row["task_id"] = data["task_id"]
    elif (row["task_id"], row["task_type"]) != (f"{queue}-{was_id}", type_of_bare(queue, data)):
        # It was not exported, but written by hand: the row itself could not tell its id and type.
        is_bare = False
        wrap(row)
    if conn.execute(q.on_queue(KNOWN_BARE if is_bare else KNOWN_TASK, queue), row).fetchone()[0]:
        return False
    row["id"] = own_id(conn, row, ids)
    if is_bare and row["id"] != was_id:
        # The row after which it is called is another task here.
        import hashlib

        row["task_id"] += "-" + hashlib.sha256(row["data"].encode()).hexdigest()[:12]
        wrap(row)
        if conn.execute(q.on_queue(KNOWN_TASK, queue), row).fetchone()[0]:
            return False
    return conn.execute(q.on_queue(IMPORT_LIVE, queue), row).rowcount == 1


def type_of_bare(queue: str, data: dict) -> str:
    """The type that the database gives a bare payload."""
    is_envelope = isinstance(data.get("data"), dict) and all(
        isinstance(data.get(name), str) for name in ("task_id", "task_type")
    )
    named = data.get("task_type" if is_envelope else "hook_event_name")
    return named if isinstance(named, str) and named else queue


def wrap(row: dict) -> None:
    """Give a payload an envelope, which says its task's id and type."""
    row["data"] = cli.envelope_of(row["task_id"], row["task_type"], row["timestamp"], row["data"])


def own_id(conn: q.Connection, row: dict, ids: dict[str, Ids]) -> int:
    """A row id for a task that comes in: the one it had, unless this database has used that
    already.
    """
    queue, wanted, known = row["queue"], row["id"], ids[row["queue"]]
    if (
        wanted < known.first_free
        or wanted in known.used
        or q.execute(conn, ID_IN_USE, queue, id=wanted).fetchone()[0]
    ):
        wanted = conn.execute(LAST_ID, {"queue": queue}).fetchone()[0] + 1
    known.used.add(wanted)
    used = {"queue": queue, "id": wanted}
    conn.execute(USE_ID, used)
    conn.execute(FIRST_USED_ID, used)
    return wanted


def import_legacy(
    conn: q.Connection,
    directory: Path,
    task_type: str | None,
    faults: list[str],
    notes: list[str],
) -> tuple[int, int]:
    """(imported, known already). Each file is one task, whose id comes from its name and content;
    it moves to DIR/migrated once that is on disk."""
    if not directory.is_dir():
        raise Refused(f"{directory} is not a directory")
    files, imported, known = [], 0, 0
    for path in directory.iterdir():
        kind = path.name.split("_")[0]
        if kind in LEGACY and path.name.startswith(f"{kind}_") and path.suffix == ".json":
            if path.is_file():
                files.append((path.stat().st_mtime_ns, path, kind))
            else:
                faults.append(f"{path} stays: it is not a file")
    for _, path, kind in sorted(files):
        try:
            is_new, task_id, odd = import_file(conn, path, kind, task_type)
        except Exception as error:
            if not isinstance(error, OSError) and not is_about_the_task(error, conn.state):
                raise
            faults.append(
                f"{path} stays: "
                f"{error.strerror if isinstance(error, OSError) else cli.short(str(error))}"
            )
            continue
        imported, known = imported + is_new, known + (not is_new)
        notes += [f"{path}: {kept_as_text(odd)}"] if odd else []
        try:
            migrated = q.make_private(directory / "migrated")
            target = migrated / path.name
            os.rename(
                path,
                target if not target.exists() else target.with_suffix(f".{task_id[7:19]}.json"),
            )
        except OSError as error:
            faults.append(f"{path} is in, but could not be moved to migrated: {error.strerror}")
    faults.sort()
    q.wake(conn.state)
    return imported, known


def import_file(
    conn: q.Connection, path: Path, kind: str, task_type: str | None
) -> tuple[bool, str, list[str]]:
    """(whether the file has become a task just now, its id, its numbers that are kept as text)."""
    import hashlib

    queue, usual_type = LEGACY[kind]
    raw = path.read_bytes()
    data, odd = read_json(raw.decode("utf-8-sig"))
    task_id = "legacy-" + hashlib.sha256(os.fsencode(path.name) + b"\0" + raw).hexdigest()[:24]
    named = data.get("task_type")
    named = named if isinstance(named, str) and named else task_type or usual_type
    row = q.new_row(named, data, task_id, depth=0)
    q.ensure_queue(conn, queue)
    with q.transaction(conn):
        finished = conn.execute(KNOWN_LEGACY, {"task_id": task_id, "queue": queue}).fetchone()[0]
        return not finished and q.insert(conn, queue, row), task_id, odd


if __name__ == "__main__":
    raise SystemExit(main())
