#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Take tasks out of the database and bring them in: export and import, backup and restore.

    transfer.py export --history tasks.jsonl        all tasks as JSON lines
    transfer.py import tasks.jsonl                  those that are not there yet
    transfer.py backup tasks.backup                 the whole database, while workers go on

tasks.py export, import, backup and restore are the same commands. Every command has --help, and --json for scripts.

exit codes: 0 fine; 1 not possible, or the database cannot be used; 64 usage; 65 lines of an import were refused (they
are named, the others are in); 75 the database is locked, try again; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import queue_cli as cli
import queue_helpers as q
from queue_cli import EX_DATAERR, EX_FAILED, EX_USAGE, Refused

LINES_AT_A_TIME = 500
LEGACY = {"notify": ("notifications", "notification"), "approval": ("approvals", "approval"),
          "completion": ("completions", "completion")}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- statements

EXPORT_FINISHED = """
select json_object('queue', queue, 'id', row_id, 'task_id', task_id, 'task_type', task_type, 'status', status,
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 'max_attempts', max_attempts,
                   'enqueued_at', enqueued_at, 'started_at', started_at, 'completed_at', completed_at,
                   'exit_code', exit_code, 'error', error, 'result', result, 'log', log), json_valid(data), data
from task_history where :queues is null or queue in (select value from json_each(:queues)) order by id"""
EXPORT_LIVE = f"""
select json_object('queue', '{{queue}}', 'id', id, 'task_id', coalesce(task_id, '{{queue}}-' || id), 'task_type', task_type,
                   'status', {cli.STATUS_WORD},
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 'due_at', json(printf('%!.17g', due_at)),
                   'enqueued_at', json(printf('%!.17g', timestamp)), 'error', error), 1, data
from "{{queue}}" order by id"""

LAST_ID = """
select coalesce((select max(seq) from sqlite_sequence where name = :queue), 0)"""
# A task comes in once: not while it waits or runs, nor when the history has this life of it, or a later one. A bare
# payload is called after its row, so that alone does not say that it is the same task.
SAME_DATA = """
case when json_valid(data) then json(data) else data end = :data"""
KNOWN_TASK = """
select exists (select 1 from "{queue}" where task_id = :task_id)
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{queue}'
             and enqueued_at >= strftime('%Y-%m-%d %H:%M:%f', :timestamp, 'unixepoch'))"""
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
select json_extract(:line, '$.data')"""
IMPORT_LIVE = """
insert into "{queue}" (id, data, timestamp, status, due_at, priority, group_id, attempts, error)
values (:id, :data, :timestamp, :status, :due_at, :priority, :group_id, :attempts, :error)"""
IMPORT_FINISHED = """
insert into task_history (queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
                          enqueued_at, started_at, completed_at, exit_code, result, log, error)
values (:queue, :id, :task_id, :task_type, :status, :data, :priority, :group_id, :attempts, :max_attempts,
        :enqueued_at, :started_at, :completed_at, :exit_code, :result, :log, :error)"""
USE_ID = """
update sqlite_sequence set seq = max(seq, :id) where name = :queue"""
FIRST_USED_ID = """
insert into sqlite_sequence (name, seq) select :queue, :id where not exists (select 1 from sqlite_sequence where name = :queue)"""


# --------------------------------------------------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its arguments."""
    parser = cli.make_parser("transfer.py", __doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=cli.Parser)

    def command(run: Callable[..., int]) -> cli.Parser:
        says = " ".join(run.__doc__.split())
        name = run.__name__.rstrip("_")
        entry = commands.add_parser(name, help=says.split(". ")[0].rstrip("."), description=says)
        entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
        entry.set_defaults(run=run)
        return entry

    entry = command(export)
    entry.add_argument("file", metavar="FILE", nargs="?", default="-", help="(default: stdout)")
    entry.add_argument("--queue", dest="queues", metavar="QUEUE", action="append", help="may be given several times")
    entry.add_argument("--history", action="store_true", help="finished tasks, too")

    entry = command(import_)
    entry.add_argument("file", metavar="FILE", nargs="?", help="of export; - for stdin")
    entry.add_argument("--legacy", metavar="DIR", type=Path,
                       help="take in notify_*, approval_* and completion_*.json of DIR")  # fmt: skip
    entry.add_argument("--type", dest="task_type", metavar="TYPE", type=cli.utf8, help="of legacy tasks that name none")

    command(backup).add_argument("file", metavar="FILE", type=Path)

    args = parser.parse_args(argv)
    if args.run is import_ and (args.file is None) == (args.legacy is None):
        parser.exit(EX_USAGE, "transfer.py import: give FILE, or --legacy DIR; see transfer.py import --help\n")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")
    return cli.run(f"transfer.py {name}", lambda: run(**args))


# ------------------------------------------------------------------------------------------------------------- commands


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside path; it becomes path, on disk, when the block ends well, and is removed when it does not."""
    if path.is_dir() or not path.name:
        raise Refused(f"{path} is a directory: give a file's name")
    temporary = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}")  # known before it is made: a signal may come
    try:
        with cli.ending_by_signal():
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            yield temporary
            fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
    except OSError as error:
        raise Refused(f"{path} was not written: {error.strerror}; see: df -h '{path.absolute().parent}'") from None
    finally:
        for ending in ("", "-journal", "-wal", "-shm"):
            Path(f"{temporary}{ending}").unlink(missing_ok=True)


def export(file: str, queues: list[str] | None, history: bool, as_json: bool) -> int:
    """Write waiting and running tasks as JSON lines, for import; with --history the finished ones, too."""
    conn = cli.open_queue()
    cli.check_known(conn, queues or ())
    if file == "-" or (os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file)):
        try:
            if file == "-":
                sys.stdout.flush()
                exported = write_lines(conn, sys.stdout.buffer, queues, history)
            else:  # a pipe or a device
                with open(file, "wb") as out:
                    exported = write_lines(conn, out, queues, history)
        except BrokenPipeError:
            cli.mute(1)
            raise Refused("the export is not whole: its reader closed the pipe") from None
        except OSError as error:
            cli.mute(1)
            raise Refused(f"{'standard output' if file == '-' else file} was not written: {error.strerror}") from None
    else:
        with whole_file(Path(file)) as temporary, open(temporary, "wb") as out:
            exported = write_lines(conn, out, queues, history)
    says = json.dumps({"exported": exported, "file": file}) if as_json else f"exported {cli.plural(exported, 'task')} to {file}"
    print(says if as_json else cli.printable(says), file=sys.stderr if file == "-" else sys.stdout)
    return 0


def write_lines(conn: q.Connection, out: BinaryIO, queues: list[str] | None, history: bool) -> int:
    """Finished tasks first, in the order of their end, so that import meets a task's lives in their order."""
    exported = 0
    with cli.snapshot(conn):
        sources = [conn.execute(EXPORT_FINISHED, {"queues": json.dumps(queues) if queues else None})] if history else []
        sources += [q.execute(conn, EXPORT_LIVE, queue) for queue in queues or cli.queues_of(conn)]
        for source in sources:
            for head, is_json, data in source:
                # The data goes in as it is stored: no number is rounded, nothing reordered. Between JSON's tokens, a
                # newline is a space; inside its strings there is none.
                data = re.sub("[\r\n]", " ", data.split("\0")[0]) if is_json else json.dumps(data)
                out.write(f'{head[:-1]},"data":{data}}}\n'.encode("utf-8", "replace"))
                exported += 1
    out.flush()
    return exported


def import_(file: str | None, legacy: Path | None, task_type: str | None, as_json: bool) -> int:
    """Take in an export, or with --legacy the JSON files of a file-based queue. What came in before is not taken again."""
    if (q.STATE_DIR / "tasks.db").exists():
        cli.open_queue()
    conn = q.connect()
    if legacy is not None:
        imported, known, faults = import_legacy(conn, legacy, task_type)
    else:
        imported, known, faults = import_lines(conn, file)
    for fault in faults[:20]:
        cli.complain(EX_DATAERR, "transfer.py import", fault)
    if len(faults) > 20:
        cli.complain(EX_DATAERR, "transfer.py import", f"… and {len(faults) - 20:,} more")
    cli.report(as_json, {"imported": imported, "already_there": known, "refused": faults},
           f"imported {cli.plural(imported, 'task')}; {known:,} already there; {len(faults):,} refused")  # fmt: skip
    if not faults:
        return 0
    return EX_FAILED if legacy is not None else EX_DATAERR


class Ids(NamedTuple):
    """The row ids of a queue that an import may use: from first_free on, and not used by it yet."""

    first_free: int
    used: set[int]


def import_lines(conn: q.Connection, file: str) -> tuple[int, int, list[str]]:
    ids: dict[str, Ids] = {}
    faults: list[str] = []
    imported = known = 0
    refusals = (q.QueueError, ValueError, TypeError, KeyError, RecursionError, OverflowError, sqlite3.IntegrityError)

    def refuse(number: int, error: Exception) -> None:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        faults.append(f"line {number} was refused: {cli.short(why)}")

    def store(item: tuple[int, str, dict]) -> bool | None:
        number, text, task = item
        conn.execute("savepoint line")
        try:
            return import_task(conn, text, task, ids)
        except refusals as error:
            conn.execute("rollback to line")
            return refuse(number, error)
        finally:
            conn.execute("release line")

    with open(0, "rb", closefd=False) if file == "-" else open(file, "rb") as lines:
        numbered = enumerate(lines, 1)
        while batch := list(islice(numbered, LINES_AT_A_TIME)):
            parsed = []  # outside of the transaction: it takes longer than storing
            for number, line in batch:
                try:
                    if line.strip():
                        parsed.append((number, *parse_line(conn, line, ids)))
                except refusals as error:
                    refuse(number, error)
            results = list(cli.in_steps(conn, parsed, store))
            imported, known = imported + results.count(True), known + results.count(False)
            q.wake(conn.state)
    return imported, known, faults


def parse_line(conn: q.Connection, line: bytes, ids: dict[str, Ids]) -> tuple[str, dict]:
    """The text and the task of a line; its queue exists when this returns."""
    text = line.decode("utf-8-sig").strip()
    task = json.loads(text)
    if not isinstance(task, dict):
        raise q.InvalidTask("it is not a JSON object")
    if task["status"] not in cli.STATUSES:
        raise q.InvalidTask(f"{task['status']!r} is not a status")
    if not 0 < int(task["id"]) < 2**62 or not str(task["task_id"]):
        raise q.InvalidTask("its id is not a row's")
    queue = q.check_queue_name(task["queue"])
    if queue not in ids:
        q.ensure_queue(conn, queue)
        ids[queue] = Ids(conn.execute(LAST_ID, {"queue": queue}).fetchone()[0] + 1, set())
    return text, task


def import_task(conn: q.Connection, text: str, task: dict, ids: dict[str, Ids]) -> bool:
    """Store one exported task, within a transaction; False when it is known already."""
    queue, name = task["queue"], task["status"]
    row = {key: task.get(key) for key in ("group_id", "error", "max_attempts", "started_at", "completed_at", "exit_code",
                                          "result", "log")}  # fmt: skip
    row |= {"queue": queue, "id": int(task["id"]), "task_id": str(task["task_id"]), "task_type": str(task["task_type"]),
            "priority": int(task.get("priority") or 0), "attempts": int(task.get("attempts") or 0),
            "data": conn.execute(DATA_OF, {"line": text}).fetchone()[0], "enqueued_at": task["enqueued_at"]}  # fmt: skip
    if name in cli.FINISHED:
        if not all(isinstance(row[key], str) for key in ("enqueued_at", "completed_at", "data")):
            raise q.InvalidTask("enqueued_at, completed_at or data is not a text")
        row["status"] = name
        if conn.execute(q.on_queue(KNOWN_FINISHED, queue), row).fetchone()[0]:
            return False
        row["id"] = own_id(conn, row, ids)
        conn.execute(IMPORT_FINISHED, row)
        return True
    if not isinstance(task.get("data"), dict):
        raise q.InvalidTask("its data is not a JSON object")
    row |= {"timestamp": float(row["enqueued_at"]), "status": q.READY, "due_at": None}
    if name == "scheduled":
        row |= {"status": q.SCHEDULED, "due_at": float(task["due_at"])}
    inner = task["data"]
    is_bare = not (isinstance(inner.get("task_id"), str) and inner["task_id"] and isinstance(inner.get("task_type"), str)
                   and isinstance(inner.get("data"), dict))  # fmt: skip
    if conn.execute(q.on_queue(KNOWN_BARE if is_bare else KNOWN_TASK, queue), row).fetchone()[0]:
        return False
    row["id"] = own_id(conn, row, ids)
    if is_bare and row["id"] != int(task["id"]):  # the row after which it is called is another task here
        import hashlib

        row["task_id"] += "-" + hashlib.sha256(row["data"].encode()).hexdigest()[:12]
        row["data"] = cli.envelope_of(row["task_id"], row["task_type"], row["timestamp"], row["data"])
        if conn.execute(q.on_queue(KNOWN_TASK, queue), row).fetchone()[0]:
            return False
    return conn.execute(q.on_queue(IMPORT_LIVE, queue), row).rowcount == 1


def own_id(conn: q.Connection, row: dict, ids: dict[str, Ids]) -> int:
    """A row id for a task that comes in: the one it had, unless this database has used that already."""
    queue, wanted, known = row["queue"], row["id"], ids[row["queue"]]
    if wanted < known.first_free or wanted in known.used or q.execute(conn, ID_IN_USE, queue, id=wanted).fetchone()[0]:
        wanted = conn.execute(LAST_ID, {"queue": queue}).fetchone()[0] + 1
    known.used.add(wanted)
    used = {"queue": queue, "id": wanted}
    conn.execute(USE_ID, used)
    conn.execute(FIRST_USED_ID, used)
    return wanted


def import_legacy(conn: q.Connection, directory: Path, task_type: str | None) -> tuple[int, int, list[str]]:
    """Each file is one task, whose id comes from its name and content; it moves to DIR/migrated once that is on disk."""
    import hashlib

    if not directory.is_dir():
        raise Refused(f"{directory} is not a directory")
    files, faults, imported, known = [], [], 0, 0
    for path in directory.iterdir():
        kind = path.name.split("_")[0]
        if kind in LEGACY and path.name.startswith(f"{kind}_") and path.suffix == ".json":
            if path.is_file():
                files.append((path.stat().st_mtime_ns, path.name, kind))
            else:
                faults.append(f"{path} stays: it is not a file")
    for _, name, kind in sorted(files):
        path, (queue, usual_type) = directory / name, LEGACY[kind]
        try:
            raw = path.read_bytes()
            data = json.loads(raw.decode("utf-8-sig"))
            if not isinstance(data, dict):
                raise q.InvalidTask("it is not a JSON object")
            task_id = "legacy-" + hashlib.sha256(os.fsencode(name) + b"\0" + raw).hexdigest()[:24]
            named = data.get("task_type")
            row = q.new_row(named if isinstance(named, str) and named else task_type or usual_type, data, task_id, depth=0)
        except (OSError, ValueError, RecursionError) as error:
            faults.append(f"{path} stays: {error.strerror if isinstance(error, OSError) else cli.short(str(error))}")
            continue
        q.ensure_queue(conn, queue)
        with q.transaction(conn):
            finished = conn.execute(KNOWN_LEGACY, {"task_id": task_id, "queue": queue}).fetchone()[0]
            is_new = not finished and q.insert(conn, queue, row)
        imported, known = imported + is_new, known + (not is_new)
        try:
            (directory / "migrated").mkdir(exist_ok=True)
            target = directory / "migrated" / name
            os.rename(path, target if not target.exists() else target.with_suffix(f".{task_id[7:19]}.json"))
        except OSError as error:
            faults.append(f"{path} is in, but could not be moved to migrated: {error.strerror}")
    q.wake(conn.state)
    return imported, known, sorted(faults)


def backup(file: Path, as_json: bool) -> int:
    """Copy the database to FILE as it is at this moment, while workers go on. FILE is replaced once the copy is whole."""
    conn = cli.open_queue()
    if file.exists() and os.path.samefile(file, conn.state / "tasks.db"):
        raise Refused(f"{file} is the database itself: give another name")
    try:
        with whole_file(file) as temporary, closing(sqlite3.connect(temporary, isolation_level=None)) as copy:
            with cli.snapshot(conn):
                conn.execute("select 1 from task_history").fetchone()  # the snapshot is of now, and the copy never has to start over
                conn.backup(copy, pages=1_000)
            copy.execute("pragma journal_mode = delete")  # one file, without sidecars
            fault = copy.execute("pragma quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise Refused(f"{conn.state / 'tasks.db'} is damaged, and so would be the copy: {fault}")
    except sqlite3.Error as error:
        raise Refused(f"{file} was not written: {error}; see: df -h '{file.absolute().parent}'") from None
    size = file.stat().st_size
    cli.report(as_json, {"file": str(file), "bytes": size}, f"backed up {size:,} bytes to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
