#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=13,<16"]
# ///
"""See what waits, runs, failed and why, and act on it.

    tasks.py stats --watch                          counts, waiting and run times, redrawn as they change
    tasks.py list --status failed --since 1h        the dead letters of the last hour, newest first
    tasks.py retry --failed --queue approvals       put them all back
    tasks.py doctor                                 what is wrong with the queue, and what to do about it

ID is a task's id, or its beginning where only one task's id begins so. AGE is a number and s, m, h, d or w, like 90m.
Every command has --help, and --json for scripts. A status is pending, scheduled, blocked, in_progress, completed,
failed or cancelled. None but import makes a database where there is none.

exit codes: 0 fine; 1 not found, not possible, or the database cannot be used; 64 usage; 65 lines or files of an
import were refused (they are named, the others are in); 75 the database is locked, try again; 130 interrupted.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import queue_helpers as q

EX_FAILED, EX_USAGE, EX_DATAERR, EX_TEMPFAIL, EX_INTERRUPTED = 1, 64, 65, 75, 130
UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
HOUR, DAY = 3_600, 86_400
SAMPLE = 2_000  # finished tasks of a queue, type and status, the newest, that medians and percentiles are made of
MATCHES = 10  # how many an ambiguous ID lists
SCAN_SECONDS = 0.4  # how long `list --text` looks, unless --all
HOLD_SECONDS, PAUSE_SECONDS = 0.01, 0.01  # many changes: the write lock is held this long, then free this long
LINES_AT_A_TIME = 500  # of an import, read and checked
POLL_SECONDS = 0.02
RECOVER_SECONDS = 0.25
CONSUMER_SECONDS = 1.0  # a worker has made its run's output file by then
CANCEL_SECONDS = 30.0
LEGACY = {"notify": ("notifications", "notification"), "approval": ("approvals", "approval"),
          "completion": ("completions", "completion")}  # fmt: skip
MAX_WAIT_SECONDS = 600.0
SPOOL_TOO_OLD_SECONDS = 60.0  # a worker takes spooled tasks in at once
QUICK_CHECK_SECONDS = 20.0
LOW_DISK_BYTES, SHORT_DISK_BYTES = 50 * 2**20, 2**30
LONG_WAL_BYTES = 256 * 2**20
GUI_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"  # what programs get that no shell started
NETWORK_FILE_SYSTEMS = {"9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
                        "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "osxfuse", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs",
                        "webdav"}  # fmt: skip
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_MINUTES = 60

# Literal conditions, so that SQLite sees that the partial index of each status serves them.
LIVE = {"in_progress": "status = 2", "pending": "status < 2", "scheduled": "status = 3", "blocked": "status = 4"}
CLAIM_ORDER = {"in_progress": "claimed_at", "pending": "-priority", "scheduled": "due_at", "blocked": "id"}
FINISHED = ("completed", "failed", "cancelled")
SAME = {"waiting": "pending", "running": "in_progress", "done": "completed"}  # words that people use
STATUSES = (*LIVE, *FINISHED)

# ---------------------------------------------------------------------------------------------------------- statements

COUNT_BY_TYPE = {status: f"""
select coalesce(task_type, '{{queue}}'), count(*), min(timestamp) from "{{queue}}" where {condition}
group by task_type""" for status, condition in LIVE.items()}  # fmt: skip
# The + keeps SQLite from picking an index by that column: the one wanted is the one that has the order.
COUNT_FINISHED = """
select queue, task_type, status, count(*), sum(completed_at >= :hour_ago) from task_history
where +completed_at >= :day_ago group by queue, task_type, status"""
NEWEST_TIMES = """
select completed_at, (julianday(started_at) - julianday(enqueued_at)) * 86400.0,
       (julianday(completed_at) - julianday(started_at)) * 86400.0
from task_history
where queue = :queue and task_type = :task_type and status = :status and completed_at >= :day_ago and started_at is not null
order by completed_at desc limit :sample"""
COUNT_BETWEEN = """
select count(*) from task_history where completed_at >= :since and completed_at < :until"""
PAUSED = """
select queue from task_paused"""

LIST_LIVE = """
select id, {{match}}, {{key}} from "{queue}"
where {{condition}} and timestamp >= :since and timestamp <= :before and {{of_type}}
order by {{order}}, id"""
LIVE_MATCHES = """
(data like :text escape '\\' or '{queue}-' || id like :text escape '\\' or coalesce(error, '') like :text escape '\\')"""
LIST_FINISHED = """
select id, {match} from task_history
where completed_at >= :since and completed_at <= :before and +status in (select value from json_each(:statuses))
  and (:queues is null or +queue in (select value from json_each(:queues)))
  and (:task_type is null or +task_type = :task_type)
order by completed_at desc"""
FINISHED_MATCHES = """
(data like :text escape '\\' or task_id like :text escape '\\' or coalesce(error, '') like :text escape '\\'
  or coalesce(result, '') like :text escape '\\' or coalesce(log, '') like :text escape '\\')"""

LIVE_ROW = """
select '{queue}' as queue, id, coalesce(task_id, '{queue}-' || id) as task_id, coalesce(task_type, '{queue}') as task_type,
       case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status,
       priority, group_id, attempts, max_attempts, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
       strftime('%Y-%m-%d %H:%M:%f', due_at, 'unixepoch') as due_at,
       strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at, owner,
       cancel_requested, then_queue, error, data
from "{queue}" where id = :id"""
FINISHED_ROW = """
select queue, row_id as id, task_id, task_type, status, priority, group_id, attempts, max_attempts, enqueued_at,
       null as due_at, started_at, completed_at, exit_code, error, result, log, data
from task_history where id = :id"""

LIVE_ID = """
select id from "{queue}" where task_id = :task_id
union all select id from "{queue}" where id = :row_id and task_id is null"""
LIVE_PREFIX = """
select task_id from "{queue}" where task_id >= :prefix and task_id < :prefix || char(1114111) limit :limit"""
BARE_PREFIX = """
select '{queue}-' || id from "{queue}" where task_id is null and substr(id, 1, length(:digits)) = :digits limit :limit"""
FINISHED_ID = """
select distinct queue from task_history where task_id = :task_id"""
FINISHED_PREFIX = """
select distinct queue, task_id from task_history
where task_id >= :prefix and task_id < :prefix || char(1114111) and (:queue is null or +queue = :queue) limit :limit"""
HISTORY_OF = """
select id from task_history where task_id = :task_id and +queue = :queue order by id desc"""

CLAIMED_TASK = """
select status, task_id, task_type, data, timestamp, priority, attempts, max_attempts, backoff, then_queue, owner, claimed_at
from "{queue}" where id = :id"""
REQUEST_CANCEL = """
update "{queue}" set cancel_requested = 1 where id = :id and status = 2 and owner = :owner and attempts = :attempts"""
START_NOW = """
update "{queue}" set status = 1, due_at = null where id = :id and status = 3"""
FAILED = """
select id, queue, task_id from task_history
where status = 'failed' and completed_at >= :since and (:queue is null or queue = :queue)
  and (:task_type is null or task_type = :task_type) order by completed_at, id"""

PAUSE = """
insert or ignore into task_paused (queue) values (:queue)"""
RESUME = """
delete from task_paused where queue = :queue"""

MOVED = """
insert into "{queue}" (data, timestamp, status, priority, due_at, group_id, attempts, error)
values (:data, :timestamp, :status, :priority, :due_at, :group_id, :attempts, :error)"""
WAITING_ROW = """
select data, timestamp, status, priority, due_at, group_id, attempts, error, task_id, task_type
from "{queue}" where id = :id and status <> 2"""
WAITING_IDS = """
select id from "{queue}" where {{condition}} and (:task_type is null or task_type = :task_type) and timestamp <= :before
order by id"""
FINISHED_IDS = """
select id from task_history where status = :status and queue = :queue and completed_at <= :before
  and (:task_type is null or task_type = :task_type)"""
DELETE_WAITING = """
delete from "{queue}" where id = :id and status <> 2"""

EXPORT_FINISHED = """
select json_object('queue', queue, 'id', row_id, 'task_id', task_id, 'task_type', task_type, 'status', status,
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 'max_attempts', max_attempts,
                   'enqueued_at', enqueued_at, 'started_at', started_at, 'completed_at', completed_at,
                   'exit_code', exit_code, 'error', error, 'result', result, 'log', log), json_valid(data), data
from task_history where :queues is null or queue in (select value from json_each(:queues)) order by id"""
EXPORT_LIVE = """
select json_object('queue', '{queue}', 'id', id, 'task_id', coalesce(task_id, '{queue}-' || id), 'task_type', task_type,
                   'status', case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked'
                             else 'pending' end,
                   'priority', priority, 'group_id', group_id, 'attempts', attempts, 'due_at', json(printf('%!.17g', due_at)),
                   'enqueued_at', json(printf('%!.17g', timestamp)), 'error', error), 1, data
from "{queue}" order by id"""

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

OLDEST_READY = """
select count(*), min(timestamp) from "{queue}" where status < 2"""
OVERDUE = """
select count(*), min(due_at) from "{queue}" where status = 3 and due_at <= :now"""
CLAIMS = """
select owner, count(*), min(claimed_at) from "{queue}" where status = 2 group by owner"""
WITHOUT_HANDLER = """
select task_type, count(*), max(error) from "{queue}" where status = 3 and error like 'no handler %' group by task_type"""
FAILED_LATELY = """
select count(*) from task_history where queue = :queue and status = 'failed' and completed_at > :since"""


class Refused(q.QueueError):
    """What was asked for cannot be done; the message says why and what to do."""


# -------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def age(text: str) -> float:
    """Seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age: write a number and s, m, h, d or w, like 90m")
    return float(match[1]) * UNITS[match[2]]


def status(text: str) -> str:
    text = SAME.get(text, text)
    if text not in STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status: {', '.join(STATUSES)}")
    return text


def search_text(text: str) -> str:
    if not 0 < len(text) <= 1000:
        raise argparse.ArgumentTypeError("a text to look for has 1 to 1000 characters")
    return text


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its arguments."""
    parser = Parser(prog="tasks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(run: Callable[..., int]) -> Parser:
        says = " ".join(run.__doc__.split())
        entry = commands.add_parser(run.__name__.rstrip("_"), help=says.split(". ")[0].rstrip("."), description=says)
        entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
        entry.set_defaults(run=run)
        return entry

    def one_or_more_ids(entry: Parser) -> None:
        entry.add_argument("ids", metavar="ID", nargs="+")
        entry.add_argument("--queue", help="where several queues have that id")

    entry = command(stats)
    entry.add_argument("--watch", action="store_true", help="redraw until Ctrl-C, with the last hour as a sparkline")
    entry.add_argument("--interval", metavar="SECONDS", type=seconds, default=1.0, help="of --watch (default 1)")
    entry.add_argument("--prometheus", action="store_true", help="in Prometheus's text format")

    entry = command(list_)
    entry.add_argument("--queue", dest="queues", metavar="QUEUE", action="append", help="may be given several times")
    entry.add_argument("--status", dest="statuses", metavar="STATUS", action="append", type=status, help="the same")
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--since", metavar="AGE", type=age, help="enqueued (finished tasks: finished) at most this long ago")
    entry.add_argument("--before", metavar="AGE", type=age, help="… at least this long ago")
    entry.add_argument("--text", type=search_text, help="in the task, its error or its output")
    entry.add_argument("--all", dest="look_at_all", action="store_true",
                       help=f"look for --text in every task, not only for {SCAN_SECONDS:g} s")  # fmt: skip
    entry.add_argument("--limit", metavar="N", type=count, default=50, help="(default 50)")

    one_or_more_ids(command(show))

    entry = command(logs)
    entry.add_argument("id", metavar="ID")
    entry.add_argument("--queue", help="where several queues have that id")
    entry.add_argument("-f", "--follow", action="store_true", help="go on until the task is finished")

    entry = command(retry)
    entry.add_argument("ids", metavar="ID", nargs="*")
    entry.add_argument("--failed", action="store_true", help="all dead letters, of --queue, --type and --since if given")
    entry.add_argument("--queue")
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--since", metavar="AGE", type=age, help="failed at most this long ago")

    entry = command(cancel)
    one_or_more_ids(entry)
    entry.add_argument("--wait", metavar="SECONDS", type=seconds, default=CANCEL_SECONDS,
                       help=f"for a running task to end (default {CANCEL_SECONDS:g})")  # fmt: skip

    for run in (pause, resume):
        command(run).add_argument("queues", metavar="QUEUE", nargs="+")

    entry = command(move)
    entry.add_argument("ids", metavar="ID", nargs="*")
    entry.add_argument("to", metavar="QUEUE", help="where to")
    entry.add_argument("--from", dest="source", metavar="QUEUE", help="all that wait there, or where the IDs are")
    entry.add_argument("--type", dest="task_type", metavar="TYPE", help="of these, only the tasks of this type")

    entry = command(purge)
    entry.add_argument("queue", metavar="QUEUE")
    entry.add_argument("--status", dest="statuses", metavar="STATUS", action="append", type=status,
                       help="(default: pending, scheduled and blocked); may be given several times")  # fmt: skip
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--before", metavar="AGE", type=age, help="enqueued, or finished, at least this long ago")
    entry.add_argument("--yes", action="store_true", help="do not ask")

    entry = command(export)
    entry.add_argument("file", metavar="FILE", nargs="?", default="-", help="(default: stdout)")
    entry.add_argument("--queue", dest="queues", metavar="QUEUE", action="append", help="may be given several times")
    entry.add_argument("--history", action="store_true", help="finished tasks, too")

    entry = command(import_)
    entry.add_argument("file", metavar="FILE", nargs="?", help="of export; - for stdin")
    entry.add_argument("--legacy", metavar="DIR", type=Path, help="take in notify_*, approval_* and completion_*.json of DIR")
    entry.add_argument("--type", dest="task_type", metavar="TYPE", help="of legacy tasks that name none")

    command(backup).add_argument("file", metavar="FILE", type=Path)

    command(doctor).add_argument("--max-wait", metavar="AGE", type=age, default=MAX_WAIT_SECONDS,
                                 help=f"how long a task may wait before that is a problem (default {span(MAX_WAIT_SECONDS)})")  # fmt: skip

    args = parser.parse_args(argv)
    fault = ""
    if args.run is retry and args.failed == bool(args.ids):
        fault = "give the IDs to retry, or --failed"
    elif args.run is retry and args.ids and (args.task_type or args.since is not None):
        fault = "--type and --since go with --failed"
    elif args.run is move and not args.ids and not args.source:
        fault = "give the IDs to move, or --from"
    elif args.run is move and args.ids and args.task_type:
        fault = "--type goes with --from and no ID"
    elif args.run is import_ and (args.file is None) == (args.legacy is None):
        fault = "give FILE, or --legacy DIR"
    elif args.run is purge and "in_progress" in (args.statuses or ()):
        fault = "a running task is not purged: cancel it"
    elif args.run is stats and args.prometheus and (args.watch or args.as_json):
        fault = "--prometheus goes with neither --watch nor --json"
    if fault:
        parser.exit(EX_USAGE, f"tasks.py {args.command}: {fault}; see tasks.py {args.command} --help\n")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")
    try:
        sys.stdout.reconfigure(errors="backslashreplace")
        code = run(**args)
        sys.stdout.flush()
        return code
    except q.QueueBusy as error:
        return complain(EX_TEMPFAIL, name, error)
    except q.InvalidTask as error:
        return complain(EX_DATAERR, name, error)
    except q.QueueError as error:
        return complain(EX_FAILED, name, error)
    except sqlite3.Error as error:
        explained = q.explain(error, q.STATE_DIR)
        return complain(EX_TEMPFAIL if isinstance(explained, q.QueueBusy) else EX_FAILED, name, explained)
    except UnicodeEncodeError:  # a lone surrogate stands for such a byte
        return complain(EX_USAGE, name, "an argument is not valid UTF-8, and so no id or text of a task's")
    except BrokenPipeError:
        mute_stdout()
        return 0  # head and less have what they wanted
    except KeyboardInterrupt:
        mute_stdout()
        return complain(EX_INTERRUPTED, name, "interrupted")
    except OSError as error:
        mute_stdout()
        return complain(EX_FAILED, name, f"{error.filename or 'standard output'}: {error.strerror}")


def complain(code: int, name: str, error: object) -> int:
    print(f"tasks.py {name}: {clean(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def mute_stdout() -> None:
    """Nobody reads it any more: what is still buffered must not fail again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ------------------------------------------------------------------------------------------------------------ database


def open_queue() -> q.Connection:
    """The database as it is: a missing one is not made, and one of somebody else's not touched."""
    return q.connect(create=False)


@contextmanager
def snapshot(conn: q.Connection) -> Iterator[None]:
    """Several reads of one state of the database. Nobody waits for it."""
    conn.execute("begin")
    try:
        yield
    finally:
        conn.execute("rollback")


def queues_of(conn: q.Connection) -> list[str]:
    return [name for (name,) in conn.execute(q.QUEUES)]


def check_known(conn: q.Connection, queues: Iterable[str]) -> None:
    known = queues_of(conn)
    for queue in queues:
        if queue not in known:
            raise Refused(f"there is no queue {queue!r}; there are: {', '.join(known)}")


def in_steps(conn: q.Connection, items: Iterable, change: Callable) -> Iterator:
    """change(item) for each, in transactions so short that nobody waits for long; yields what they return."""
    items, more = iter(items), True
    while more:
        results, began = [], time.monotonic()
        with q.transaction(conn):
            for item in items:
                results.append(change(item))
                if time.monotonic() - began > HOLD_SECONDS:
                    break
            else:
                more = False
        yield from results
        if more:
            time.sleep(PAUSE_SECONDS)


class Found(NamedTuple):
    """A task that an ID named. row_id is its row, None when it is in the history alone."""

    queue: str
    task_id: str
    row_id: int | None


def find(conn: q.Connection, ident: str, queue: str | None = None) -> Found:
    """The task of this id, or else the only one whose id begins so."""
    if queue is not None:
        check_known(conn, [queue])
    queues = [queue] if queue else queues_of(conn)
    matches = {(name, ident) for name in queues if live_id(conn, name, ident) is not None}
    matches |= {(name, ident) for (name,) in conn.execute(FINISHED_ID, {"task_id": ident}) if name in queues}
    if not matches:
        limit = {"limit": MATCHES + 1}
        for name in queues:
            matches |= {(name, found) for (found,) in q.execute(conn, LIVE_PREFIX, name, prefix=ident, **limit)}
            if f"{name}-".startswith(ident) or ident.startswith(f"{name}-"):
                digits = ident[len(name) + 1 :]
                matches |= {(name, found) for (found,) in q.execute(conn, BARE_PREFIX, name, digits=digits, **limit)}
        matches |= set(conn.execute(FINISHED_PREFIX, {"prefix": ident, "queue": queue, **limit}))
    if not matches:
        raise Refused(f"no task has the id {ident!r}, nor one that begins so; see: tasks.py list")
    if len(matches) > 1:
        named = [f"{found} ({name})" for name, found in sorted(matches)]
        named = named[:MATCHES] + (["…"] if len(named) > MATCHES else [])
        raise Refused(f"{ident!r} fits several tasks: {', '.join(named)}; give more of the id, or --queue")
    ((name, found),) = matches
    return Found(name, found, live_id(conn, name, found))


def live_id(conn: q.Connection, queue: str, task_id: str) -> int | None:
    """The row of a waiting or running task."""
    bare = re.fullmatch(rf"{queue}-(\d{{1,18}})", task_id)
    row = q.execute(conn, LIVE_ID, queue, task_id=task_id, row_id=int(bare[1]) if bare else None).fetchone()
    return row[0] if row else None


def as_dict(cursor: sqlite3.Cursor) -> dict | None:
    row = cursor.fetchone()
    return None if row is None else dict(zip((column[0] for column in cursor.description), row, strict=True))


# -------------------------------------------------------------------------------------------------------------- output


def clean(text: str) -> str:
    """Text that a terminal only shows: a task's type or error may hold escape sequences."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def clean_lines(text: str) -> str:
    return "\n".join(clean(line.replace("\t", "    ")) for line in text.split("\n"))


def put_json(value: object, indent: int | None = 2) -> None:
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8, indent=indent))


def report(as_json: bool, value: object, text: str) -> None:
    if as_json:
        put_json(value)
    else:
        print(clean_lines(text))


def payload(text: str | None) -> object:
    """A task's data for --json: the object, or the text where that says more than JSON can."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    except (TypeError, ValueError, RecursionError):
        return text


def short(text: str | None, longest: int = 200) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def span(value: float | None) -> str:
    """Seconds for people."""
    if value is None:
        return "-"
    for unit, size in (("d", DAY), ("h", HOUR), ("m", 60)):
        if value >= 2 * size:
            return f"{value / size:.0f}{unit}"
    return f"{value:.0f}s" if value >= 10 else f"{value:.1f}s" if value >= 1 else f"{max(value, 0) * 1000:.0f}ms"


def seconds_since(moment: str | None) -> float | None:
    """… a time of the database's."""
    if not moment:
        return None
    from calendar import timegm

    return time.time() - timegm(time.strptime(moment[:19], "%Y-%m-%d %H:%M:%S")) - float(f"0{moment[19:]}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], bold: Iterable[int] = ()):
    """A rich table. Columns that begin with > are right-aligned; in a terminal the last is cut to what space there is,
    and one that begins with * is folded where even that is not enough.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    on_terminal, rows = sys.stdout.isatty(), [[clean(cell) for cell in row] for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD if on_terminal else None, show_edge=False, pad_edge=False,
                  padding=0 if on_terminal else (0, 2, 0, 0))  # fmt: skip
    left = console().width
    for number, name in enumerate(columns):
        head = name.lstrip(">*")
        widest = max(cell_len(cell) for cell in (*head.split("\n"), *(row[number] for row in rows)))
        room = max(8, left) if on_terminal and number == len(columns) - 1 else None
        drawn.add_column(head, justify="right" if name.startswith(">") else "left", no_wrap=not name.startswith("*"),
                         overflow="fold" if name.startswith("*") else "ellipsis", max_width=room,
                         min_width=min(widest, 12) if name.startswith("*") else None)  # fmt: skip
        left -= widest + 1
    for number, row in enumerate(rows):
        drawn.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row), style="bold" if number in bold else "")
    return drawn


COLOURS = {"failed": "red", "in_progress": "cyan", "completed": "green", "cancelled": "yellow", "scheduled": "blue"}


def console():
    from rich.console import Console

    # Into a pipe nothing is cut off or wrapped.
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)


def draw(*drawings: object) -> None:
    """Print; the text is made first and written by us, since rich has its own ideas of a closed pipe."""
    screen = console()
    with screen.capture() as captured:
        for drawing in drawings:
            screen.print(drawing)
    text = captured.get()
    if not sys.stdout.isatty():
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


# --------------------------------------------------------------------------------------------------------------- stats


def stats(watch: bool, interval: float, prometheus: bool, as_json: bool) -> int:
    """Show how many tasks of each queue and type wait, run, and ended in the last hour and day, and how long they took."""
    conn = open_queue()
    if watch:
        return watch_stats(interval, as_json)
    numbers = gather(conn)
    if prometheus:
        sys.stdout.flush()
        sys.stdout.buffer.write(prometheus_text(numbers).encode())
    elif as_json:
        put_json(numbers)
    else:
        draw(stats_table(numbers))
    return 0


def gather(conn: q.Connection) -> dict:
    """{"at", "queues": {queue: {…numbers, "paused", "types": {type: {…numbers}}}}}."""
    now = time.time()
    ago = {"hour_ago": q.utc(now - HOUR), "day_ago": q.utc(now - DAY)}
    types: dict[str, dict[str, dict]] = {}
    with snapshot(conn):
        paused = {queue for (queue,) in conn.execute(PAUSED)}
        for queue in queues_of(conn):
            types[queue] = {}
            for name, statement in COUNT_BY_TYPE.items():
                for task_type, tasks, oldest in q.execute(conn, statement, queue):
                    numbers = types[queue].setdefault(task_type, zeros())
                    numbers[name] += tasks
                    if name == "pending":
                        numbers["oldest_pending_seconds"] = round(max(now - oldest, 0), 3)
        samples: dict[tuple[str, str], list] = {}
        for queue, task_type, name, day, hour in conn.execute(COUNT_FINISHED, ago).fetchall():
            numbers = types.setdefault(queue, {}).setdefault(task_type, zeros())
            numbers[f"{name}_day"], numbers[f"{name}_hour"] = day, hour
            if name != "cancelled":
                which = {"queue": queue, "task_type": task_type, "status": name, "sample": SAMPLE, **ago}
                samples.setdefault((queue, task_type), []).extend(conn.execute(NEWEST_TIMES, which))
    queues = {}
    for queue in sorted(types):
        total, of_queue = zeros(), []
        for task_type, numbers in sorted(types[queue].items()):
            newest = sorted(samples.get((queue, task_type), ()), reverse=True)[:SAMPLE]
            numbers |= times(newest)
            of_queue += newest
            for name, value in numbers.items():
                if isinstance(value, int):
                    total[name] += value
        oldest = [n["oldest_pending_seconds"] for n in types[queue].values() if n["oldest_pending_seconds"] is not None]
        total["oldest_pending_seconds"] = max(oldest, default=None)
        total |= times(sorted(of_queue, reverse=True)[:SAMPLE])
        queues[queue] = {**total, "paused": queue in paused, "types": dict(sorted(types[queue].items()))}
    return {"at": q.utc(now), "queues": queues}


def zeros() -> dict:
    counts = {name: 0 for name in LIVE} | {f"{name}_{when}": 0 for name in FINISHED for when in ("hour", "day")}
    return counts | {"oldest_pending_seconds": None, "wait_seconds": None, "run_seconds": None}


def times(sample: list) -> dict:
    """Median and 95th percentile of the newest finished tasks' (completed_at, waited, ran)."""
    if not sample:
        return {}
    waited, ran = (sorted(max(0.0, row[column]) for row in sample) for column in (1, 2))
    return {name: {"median": percentile(values, 0.5), "p95": percentile(values, 0.95)}
            for name, values in (("wait_seconds", waited), ("run_seconds", ran))}  # fmt: skip


def percentile(ordered: list[float], share: float) -> float:
    place = (len(ordered) - 1) * share
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return round(low + (high - low) * (place - int(place)), 3)


def stats_table(numbers: dict):
    """A line per queue, and below it one per type. It fits into 80 columns."""
    shown = [name for name in LIVE if name in ("pending", "in_progress") or any(n[name] for n in numbers["queues"].values())]
    columns = ["*queue\n  type", *(f">{name.replace('_', chr(10))}" for name in shown), ">oldest\npending",
               ">completed\n1h/24h", ">failed\n1h/24h", ">waited\np50/p95", ">ran\np50/p95"]  # fmt: skip
    rows, bold = [], set()

    def row(name: str, n: dict) -> list[str]:
        return [name, *(amount(n[word]) for word in shown), span(n["oldest_pending_seconds"]),
                *(f"{amount(n[f'{word}_hour'])}/{amount(n[f'{word}_day'])}" for word in ("completed", "failed")),
                *(f"{span(n[word]['median'])}/{span(n[word]['p95'])}" if n[word] else "-"
                  for word in ("wait_seconds", "run_seconds"))]  # fmt: skip

    for queue, total in numbers["queues"].items():
        bold.add(len(rows))
        rows.append(row(f"{queue} (paused)" if total["paused"] else queue, total))
        rows += [row(f"  {task_type}", of_type) for task_type, of_type in total["types"].items()]
    return table(columns, rows, bold)


def amount(number: int) -> str:
    return f"{number:,}" if number < 10_000 else f"{number / 1000:,.0f}k" if number < 9_999_500 else f"{number / 1e6:,.0f}M"


def watch_stats(interval: float, as_json: bool) -> int:
    minutes: dict[int, int] = {}
    waiting: list[int] = []

    def look() -> tuple[dict, float]:
        began = time.monotonic()
        conn = open_queue()
        numbers = gather(conn)
        now = int(time.time()) // 60
        for minute in range(now - SPARK_MINUTES + 1, now + 1):
            if minute not in minutes or minute >= now - 1:
                between = {"since": q.utc(minute * 60), "until": q.utc(minute * 60 + 60)}
                minutes[minute] = conn.execute(COUNT_BETWEEN, between).fetchone()[0]
        waiting[:] = [*waiting, sum(queue["pending"] for queue in numbers["queues"].values())][-SPARK_MINUTES:]
        # A big database is looked at less often: this must not become the load that it shows.
        return numbers, max(interval, 4 * (time.monotonic() - began))

    def drawing(numbers: dict):
        from rich.console import Group
        from rich.text import Text

        finished = [minutes[minute] for minute in sorted(minutes)[-SPARK_MINUTES:]]
        lines = [f"finished a minute, last hour  {sparkline(finished)}  {sum(finished):,} in all, {max(finished):,} at most",
                 f"pending, since this began     {sparkline(waiting)}  {waiting[-1]:,} now",
                 f"{numbers['at'][:19]} UTC"]  # fmt: skip
        return Group(stats_table(numbers), Text("\n".join(lines)))

    try:
        if as_json or not sys.stdout.isatty():
            while True:
                numbers, pause = look()
                put_json(numbers, indent=None) if as_json else draw(drawing(numbers))
                sys.stdout.flush()
                time.sleep(pause)
        from rich.live import Live

        with Live(console=console(), auto_refresh=False) as live:
            while True:
                numbers, pause = look()
                live.update(drawing(numbers), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return 0


def sparkline(values: Sequence[int]) -> str:
    top = max(max(values, default=0), 1)
    return "".join(SPARKS[-(-value * (len(SPARKS) - 1) // top)] for value in values)  # rounded up: one is not none


def prometheus_text(numbers: dict) -> str:
    """The text format, version 0.0.4. All are gauges: finished tasks are pruned, so nothing here only grows."""
    families = {
        "task_queue_tasks": "Waiting and running tasks.",
        "task_queue_finished": "Tasks that ended within the window.",
        "task_queue_oldest_pending_seconds": "Age of the oldest pending task.",
        "task_queue_wait_seconds": "From enqueuing to the start of the last attempt, newest finished tasks of a day.",
        "task_queue_run_seconds": "From the start to the end of the last attempt, newest finished tasks of a day.",
        "task_queue_paused": "1 while claims of the queue are held back.",
    }
    samples: dict[str, list[str]] = {name: [] for name in families}

    def sample(family: str, value: float, **labels: str) -> None:
        escaped = {key: text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') for key, text in labels.items()}
        inside = ",".join(f'{key}="{text}"' for key, text in escaped.items())
        samples[family].append(f"{family}{{{inside}}} {value}")

    for queue, total in numbers["queues"].items():
        sample("task_queue_paused", int(total["paused"]), queue=queue)
        for task_type, n in (total["types"] or {queue: zeros()}).items():
            which = {"queue": queue, "task_type": task_type}
            for name in LIVE:
                sample("task_queue_tasks", n[name], **which, status=name)
            for name in FINISHED:
                for window, when in (("1h", "hour"), ("24h", "day")):
                    sample("task_queue_finished", n[f"{name}_{when}"], **which, status=name, window=window)
            if n["oldest_pending_seconds"] is not None:
                sample("task_queue_oldest_pending_seconds", n["oldest_pending_seconds"], **which)
            for name in ("wait_seconds", "run_seconds"):
                for quantile, key in (("0.5", "median"), ("0.95", "p95")):
                    if n[name]:
                        sample(f"task_queue_{name}", n[name][key], **which, quantile=quantile)
    return "".join(f"# HELP {name} {says}\n# TYPE {name} gauge\n" + "".join(f"{line}\n" for line in samples[name])
                   for name, says in families.items())  # fmt: skip


# ----------------------------------------------------------------------------------------------------- list, show, logs


class Scan:
    """How far a search for text went."""

    def __init__(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.looked, self.stopped = 0, False

    def matches(self, cursor: sqlite3.Cursor) -> Iterator[tuple]:
        """The rows whose second column says that they match, until the time is over."""
        for row in cursor:
            self.looked += 1
            if row[1]:
                yield row
            if self.deadline and self.looked % 256 == 0 and time.monotonic() > self.deadline:
                self.stopped = True
            if self.stopped:
                return


def list_(queues: list[str] | None, statuses: list[str] | None, task_type: str | None, since: float | None,
          before: float | None, text: str | None, look_at_all: bool, limit: int, as_json: bool) -> int:  # fmt: skip
    """List tasks: running ones, then waiting ones in the order of their claims, then finished ones, newest first."""
    conn, now = open_queue(), time.time()
    check_known(conn, queues or ())
    scan = Scan(None if text is None or look_at_all else SCAN_SECONDS)
    like = None if text is None else "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    newest, oldest = 1e11 if before is None else now - before, 0.0 if since is None else now - since
    rows: list[dict] = []
    with snapshot(conn):
        for read in find_tasks(conn, queues, statuses or STATUSES, task_type, oldest, newest, like, scan):
            if len(rows) == limit:
                rows.append({})
                break
            rows.append(read)
    more = rows and not rows[-1]
    rows = rows[:limit]
    if as_json:
        for row in rows:
            row["data"] = payload(row["data"])
        put_json(rows)
    else:
        draw(table(["status", "queue", "*id", "type", ">age", ">tries", "error, or the payload"],
                   [(row["status"], row["queue"], row["task_id"], row["task_type"], span(age_of(row)), str(row["attempts"]),
                     short(row["error"] or payload_text(row["data"]))) for row in rows]))  # fmt: skip
        sys.stdout.flush()
    if more:
        print(f"only the first {limit}; --limit N shows more", file=sys.stderr)
    elif scan.stopped:
        print(f"looked for the text in the first {scan.looked:,} tasks only ({SCAN_SECONDS:g} s); --all looks at every one",
              file=sys.stderr)  # fmt: skip
    return 0


def find_tasks(conn: q.Connection, queues: list[str] | None, statuses: Sequence[str], task_type: str | None, oldest: float,
               newest: float, like: str | None, scan: Scan) -> Iterator[dict]:  # fmt: skip
    """Matching tasks in list's order, as they are found."""
    which = {"task_type": task_type, "since": oldest, "before": newest, "text": like}
    for name, condition in LIVE.items():
        if name not in statuses:
            continue
        found = []
        for queue in queues or queues_of(conn):
            match = "1" if like is None else LIVE_MATCHES.format(queue=queue)
            key = CLAIM_ORDER[name]
            order = "priority desc" if name == "pending" else key  # as the index has it
            of_type = "1" if task_type is None else "task_type = :task_type"  # an OR would use no index
            parts = {"condition": condition, "key": key, "order": order, "match": match, "of_type": of_type}
            statement = q.on_queue(LIST_LIVE, queue).format(**parts)
            found.append(in_order(queue, scan.matches(conn.execute(statement, which))))
        for _, row_id, queue in heapq.merge(*found):  # each read only as far as needed
            yield as_dict(q.execute(conn, LIVE_ROW, queue, id=row_id))
    finished = [name for name in FINISHED if name in statuses]
    if finished and not scan.stopped:
        which |= {"statuses": json.dumps(finished), "queues": json.dumps(queues) if queues else None,
                  "since": q.utc(max(oldest, 0)), "before": q.utc(newest)}  # fmt: skip
        statement = LIST_FINISHED.format(match="1" if like is None else FINISHED_MATCHES)
        for row in scan.matches(conn.execute(statement, which)):
            yield as_dict(conn.execute(FINISHED_ROW, {"id": row[0]}))


def in_order(queue: str, rows: Iterator[tuple]) -> Iterator[tuple]:
    return ((key or 0, row_id, queue) for row_id, _, key in rows)


def age_of(row: dict) -> float | None:
    return seconds_since(row["completed_at"] or row["enqueued_at"])


def payload_text(text: str) -> str:
    """What the sender sent, without our envelope."""
    stored = payload(text)
    inner = stored.get("data") if isinstance(stored, dict) and {"task_id", "task_type"} <= stored.keys() else None
    return json.dumps(inner if isinstance(inner, dict) else stored, ensure_ascii=False) if isinstance(stored, dict) else text


def show(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Show everything about a task: its fields, its data, its history and its output."""
    conn, shown = open_queue(), []
    for ident in ids:
        with snapshot(conn):
            found = find(conn, ident, queue)
            lives = [] if found.row_id is None else [as_dict(q.execute(conn, LIVE_ROW, found.queue, id=found.row_id))]
            lives += [as_dict(conn.execute(FINISHED_ROW, {"id": row_id})) for row_id in history_ids(conn, found)]
        for life in lives:
            life["data"] = payload(life["data"])
        shown.append(lives[0] | {"history": lives[1:], "runs": [run._asdict() for run in runs_of(lives[0])]})
    if as_json:
        put_json(shown[0] if len(shown) == 1 else shown)
        return 0
    for task in shown:
        show_task(task)
    return 0


def history_ids(conn: q.Connection, found: Found) -> list[int]:
    """The finished lives of a task, newest first."""
    return [row_id for (row_id,) in conn.execute(HISTORY_OF, {"task_id": found.task_id, "queue": found.queue})]


def show_task(task: dict) -> None:
    history, runs = task.pop("history"), task.pop("runs")
    data, output = task.pop("data"), {"stdout": task.pop("result", None), "stderr": task.pop("log", None)}
    fields = [(name, str(value)) for name, value in task.items() if value is not None]
    lines = [f"{name:<17} {clean(value)}" for name, value in fields]
    lines += ["", "data", clean_lines(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, indent=2))]
    for name, text in output.items():
        if text:
            lines += ["", name, clean_lines(text.rstrip("\n"))]
    sys.stdout.write("\n".join(lines) + "\n")
    if history:
        sys.stdout.write("\nbefore\n")
        draw(table(["status", "started", "completed", ">attempts", ">exit", "error"],
                   [(life["status"], life["started_at"] or "-", life["completed_at"], str(life["attempts"]),
                     "-" if life["exit_code"] is None else str(life["exit_code"]), short(life["error"])) for life in history]))  # fmt: skip
    if runs:
        sys.stdout.write("\noutput files\n" + "".join(f"{run['path']}{ending}\n" for run in runs for ending in (".out", ".err")
                                                      if os.path.exists(f"{run['path']}{ending}")))  # fmt: skip


class RunFiles(NamedTuple):
    """The output files of one attempt: path, and .out or .err."""

    attempt: int
    path: str
    changed: float


def runs_of(life: dict) -> list[RunFiles]:
    """What its attempts left in the logs, oldest first."""
    pattern, runs = re.compile(rf"({life['id']}-(\d+)-.+)\.(?:out|err)"), {}
    try:
        with os.scandir(q.STATE_DIR / "logs" / life["queue"]) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match:
                    path = entry.path[: -len(".out")]
                    # Not the mtime: a file that served another run before keeps that one's while nothing is written.
                    changed = max(entry.stat().st_ctime, runs[path].changed if path in runs else 0.0)
                    runs[path] = RunFiles(int(match[2]), path, changed)
    except OSError:
        pass
    return sorted(runs.values(), key=lambda run: (run.changed, run.attempt))


def logs(id: str, queue: str | None, follow: bool, as_json: bool) -> int:
    """Print what the handler printed: its stdout on stdout, its stderr on stderr. Of the last attempt, or the running one."""
    conn = open_queue()
    found = find(conn, id, queue)
    if follow and not as_json:
        return follow_logs(conn, found)
    life = newest_life(conn, found)
    runs = runs_of(life)
    output = {"out": (life.get("result") or "").encode(), "err": (life.get("log") or "").encode()}
    if runs and runs[-1].attempt >= life["attempts"]:
        output = {ending: read_file(f"{runs[-1].path}.{ending}") or kept for ending, kept in output.items()}
    elif not life["attempts"]:
        raise Refused(f"task {found.task_id} has not run yet ({life['status']}); -f waits for it")
    if as_json:
        texts = {stream: output[ending].decode("utf-8", "replace") for stream, ending in (("stdout", "out"), ("stderr", "err"))}
        put_json({"queue": found.queue, "task_id": found.task_id, "status": life["status"], "attempt": life["attempts"], **texts})
    else:
        write_output(output)
    return 0


def newest_life(conn: q.Connection, found: Found) -> dict:
    """The task as it is now: waiting or running, else as it last ended."""
    with snapshot(conn):
        row_id = live_id(conn, found.queue, found.task_id)
        if row_id is not None:
            return as_dict(q.execute(conn, LIVE_ROW, found.queue, id=row_id))
        finished = history_ids(conn, found)
        if not finished:
            raise Refused(f"task {found.task_id} is gone: purged or pruned meanwhile")
        return as_dict(conn.execute(FINISHED_ROW, {"id": finished[0]}))


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def write_output(output: dict[str, bytes]) -> None:
    for ending, stream in (("err", sys.stderr), ("out", sys.stdout)):
        if output.get(ending):
            stream.flush()
            stream.buffer.write(output[ending])
            stream.buffer.flush()


def follow_logs(conn: q.Connection, found: Found) -> int:
    """Print what is there, then what comes, attempt after attempt, until the task is finished."""
    files: dict[str, BinaryIO] = {}
    waited = False
    while True:
        life = newest_life(conn, found)  # looked at before the files are: what is written until then is read
        runs = runs_of(life)
        for ending in ("out", "err") if runs else ():
            copy_new(files, ending)
            try:
                there = os.stat(f"{runs[-1].path}.{ending}")
                if ending not in files or os.fstat(files[ending].fileno()).st_ino != there.st_ino:  # the next attempt's
                    files[ending] = open(f"{runs[-1].path}.{ending}", "rb")  # noqa: SIM115
                    copy_new(files, ending)
            except FileNotFoundError:
                pass  # it was empty when the run ended, and serves another
        if life["completed_at"] is not None:
            if not files:
                write_output({"out": (life["result"] or "").encode(), "err": (life["log"] or "").encode()})
            return 0
        if not runs and not waited:
            waited = True
            print(f"task {clean(found.task_id)} has not run yet ({life['status']}); waiting for it", file=sys.stderr)
        time.sleep(5 * POLL_SECONDS)


def copy_new(files: dict[str, BinaryIO], ending: str) -> None:
    while ending in files and (new := files[ending].read(2**20)):
        write_output({ending: new})


# --------------------------------------------------------------------------------------- retry, cancel, pause and resume


def retry(ids: list[str], failed: bool, queue: str | None, task_type: str | None, since: float | None, as_json: bool) -> int:
    """Put finished tasks back into their queue, attempts at zero; a scheduled one becomes ready now."""
    conn = open_queue()
    if queue is not None:
        check_known(conn, [queue])
    if failed:
        which = {"queue": queue, "task_type": task_type, "since": q.utc(time.time() - since) if since is not None else ""}
        wanted = [(history_id, Found(name, task_id, None)) for history_id, name, task_id in conn.execute(FAILED, which)]
    else:
        wanted = [(None, find(conn, ident, queue)) for ident in ids]

    def put_back(item: tuple[int | None, Found]) -> dict:
        history_id, found = item
        outcome = {"queue": found.queue, "task_id": found.task_id, "retried": True}
        row_id = live_id(conn, found.queue, found.task_id) if history_id is None else None
        if row_id is not None:
            if q.execute(conn, START_NOW, found.queue, id=row_id).rowcount == 1:
                return outcome
            return outcome | {"retried": False, "why": "it is waiting or running already"}
        if history_id is None:
            history_id = next(iter(history_ids(conn, found)), None)
        if history_id is not None and q.redrive(conn, found.queue, history_id):
            return outcome
        return outcome | {"retried": False, "why": "a task of this id is waiting or running, or it was retried already"}

    outcomes = []
    try:
        outcomes.extend(in_steps(conn, wanted, put_back))
    finally:
        q.wake(conn.state)
    done = sum(outcome["retried"] for outcome in outcomes)
    lines = [f"retried {many(done)}"] if failed else [f"retried {o['task_id']}" for o in outcomes if o["retried"]]
    report(as_json, {"retried": done, "tasks": outcomes}, "\n".join(lines))
    for outcome in outcomes:
        if not outcome["retried"]:
            complain(EX_FAILED, "retry", f"task {outcome['task_id']} of {outcome['queue']} was not retried: {outcome['why']}")
    return 0 if done == len(outcomes) else EX_FAILED


def many(number: int) -> str:
    return f"{number:,} task{'' if number == 1 else 's'}"


def cancel(ids: list[str], queue: str | None, wait: float, as_json: bool) -> int:
    """Cancel tasks: a waiting one at once, a running one by ending its process group. The history keeps them as cancelled."""
    conn = open_queue()
    found = [find(conn, ident, queue) for ident in ids]
    outcomes = []
    for task in found:
        why = cancel_task(conn, task, time.monotonic() + wait)
        outcomes.append({"queue": task.queue, "task_id": task.task_id, "cancelled": why is None, "why": why})
        if why is not None:
            complain(EX_FAILED, "cancel", f"task {task.task_id} of {task.queue} was not cancelled: {why}")
    text = "\n".join(f"cancelled {outcome['task_id']}" for outcome in outcomes if outcome["cancelled"])
    if as_json or text:
        report(as_json, outcomes, text)
    return 0 if all(outcome["cancelled"] for outcome in outcomes) else EX_FAILED


def cancel_task(conn: q.Connection, found: Found, deadline: float) -> str | None:
    """None when the task is cancelled, else why not."""
    if found.row_id is None:
        return f"it has ended already ({newest_life(conn, found)['status']})"
    asked, first_seen, recover_at = None, {}, 0.0
    while True:
        row = q.execute(conn, CLAIMED_TASK, found.queue, id=found.row_id).fetchone()
        if row is None:
            ended = newest_life(conn, found)["status"]
            return None if ended == "cancelled" else f"it ended before that ({ended})"
        task = q.Task(found.queue, found.row_id, found.task_id, row[2] or found.queue, *row[3:])
        if row[0] != q.CLAIMED:
            with q.transaction(conn):
                done = q.finish(conn, task, "cancelled", error="cancelled while it waited")
            if done:
                q.wake(conn.state)
                return None
            continue  # somebody claimed it at this moment
        if time.monotonic() >= recover_at:
            recover_at = time.monotonic() + RECOVER_SECONDS
            if q.recover(conn.state)[0]:
                continue  # its worker was dead; now it waits, or has ended
        seen = first_seen.setdefault(task.run_name, time.monotonic())
        has_run = os.path.exists(conn.state / "logs" / f"{task.run_name}.out")
        if has_run and asked != task.run_name:
            with q.transaction(conn):
                q.execute(conn, REQUEST_CANCEL, task.queue, id=task.id, owner=task.owner, attempts=task.attempts)
            q.wake(conn.state)
            asked = task.run_name
        if asked != task.run_name and time.monotonic() > seen + CONSUMER_SECONDS:
            return (f"process {task.owner.split('-')[0]} claimed it itself, without a handler (get_ack_queue or the like): "
                    "only that process can end it")  # fmt: skip
        if time.monotonic() > deadline and asked == task.run_name:
            if not is_alive(conn.state / "workers" / task.owner):
                return f"its worker is dead and its handler goes on; see who holds: fuser -v '{conn.state}/logs/{task.run_name}.out'"
            return f"its worker {task.owner} was told, and has not ended it yet; it will, unless it hangs"
        time.sleep(POLL_SECONDS)


def is_alive(path: Path) -> bool:
    """Whether an owner holds its lock."""
    try:
        fd = q.lock_file(path, probe=True)
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


def pause(queues: list[str], as_json: bool) -> int:
    """Hold back claims of a queue, until resume. Running tasks go on, enqueuing works; a restart changes nothing."""
    return set_paused(queues, PAUSE, "paused", as_json)


def resume(queues: list[str], as_json: bool) -> int:
    """Let a paused queue's tasks be claimed again."""
    return set_paused(queues, RESUME, "resumed", as_json)


def set_paused(queues: list[str], statement: str, word: str, as_json: bool) -> int:
    conn = open_queue()
    check_known(conn, queues)
    with q.transaction(conn):
        changed = {queue: conn.execute(statement, {"queue": queue}).rowcount == 1 for queue in queues}
    q.wake(conn.state)
    already = {"paused": "was paused already", "resumed": "was not paused"}[word]
    report(as_json, [{"queue": queue, "paused": word == "paused", "changed": changed[queue]} for queue in queues],
           "\n".join(f"{word} {queue}" if changed[queue] else f"{queue} {already}" for queue in queues))  # fmt: skip
    return 0


# -------------------------------------------------------------------------------------------------------- move and purge


def move(ids: list[str], to: str, source: str | None, task_type: str | None, as_json: bool) -> int:
    """Move waiting tasks to another queue, each under its own id."""
    conn = open_queue()
    check_known(conn, [to, *([source] if source else [])])
    if ids:
        wanted = []
        for found in (find(conn, ident, source) for ident in ids):
            if found.row_id is None:
                raise Refused(f"task {found.task_id} has ended: retry it first, then move it")
            wanted.append(found)
    else:
        which = {"task_type": task_type, "before": 1e11}
        statement = q.on_queue(WAITING_IDS, source).format(condition="status <> 2")
        wanted = [Found(source, "", row_id) for (row_id,) in conn.execute(statement, which)]
    if any(found.queue == to for found in wanted):
        raise Refused(f"queue {to!r} is where it is already")
    outcomes = []
    try:
        outcomes.extend(in_steps(conn, wanted, lambda found: move_task(conn, found, to)))
    finally:
        q.wake(conn.state)
    moved = [outcome for outcome in outcomes if outcome["moved"]]
    report(as_json, {"moved": len(moved), "tasks": outcomes}, f"moved {many(len(moved))} to {to}")
    for outcome in outcomes:
        if not outcome["moved"]:
            complain(EX_FAILED, "move", f"task {outcome['task_id']} of {outcome['queue']} was not moved: {outcome['why']}")
    return 0 if len(moved) == len(outcomes) else EX_FAILED


def move_task(conn: q.Connection, found: Found, to: str) -> dict:
    row = as_dict(q.execute(conn, WAITING_ROW, found.queue, id=found.row_id))
    task_id = found.task_id or (row and row["task_id"]) or f"{found.queue}-{found.row_id}"
    outcome = {"queue": found.queue, "task_id": task_id, "moved": False}
    if row is None:
        return outcome | {"why": "it is running, or gone"}
    if row.pop("task_id") is None:  # a bare payload is called after its queue: an envelope keeps its name
        row["data"] = envelope_of(task_id, row["task_type"] or found.queue, row["timestamp"], row["data"])
    del row["task_type"]
    if q.execute(conn, MOVED, to, **row).rowcount != 1:
        return outcome | {"why": f"a task of this id is waiting or running in {to}"}
    q.execute(conn, DELETE_WAITING, found.queue, id=found.row_id)
    return outcome | {"moved": True}


def envelope_of(task_id: str, task_type: str, timestamp: float, text: str) -> str:
    head = {"task_id": task_id, "task_type": task_type, "enqueued_at": q.utc(timestamp)}
    return f'{q.to_json(head)[:-1]}, "data": {text}}}'


def purge(queue: str, statuses: list[str] | None, task_type: str | None, before: float | None, yes: bool, as_json: bool) -> int:
    """Delete waiting tasks of a queue, or finished ones with --status, for good. Asks first; never a running one."""
    conn = open_queue()
    check_known(conn, [queue])
    newest = time.time() - before if before is not None else 1e11
    wanted: list[tuple[str, int]] = []
    for name in statuses or ("pending", "scheduled", "blocked"):
        if name in LIVE:
            statement = q.on_queue(WAITING_IDS, queue).format(condition=LIVE[name])
            found = conn.execute(statement, {"task_type": task_type, "before": newest})
        else:
            found = conn.execute(FINISHED_IDS, {"task_type": task_type, "before": q.utc(newest), "status": name, "queue": queue})
        wanted += [(name, row_id) for (row_id,) in found]
    if wanted and not yes:
        kinds = ", ".join(f"{sum(kind == name for kind, _ in wanted):,} {name}" for name in dict(wanted))
        if as_json or not sys.stdin.isatty():
            raise Refused(f"this would delete {kinds} of {queue} for good; add --yes, there is nobody to ask")
        print(f"Delete {kinds} of {queue} for good? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("nothing was deleted")

    def delete(item: tuple[str, int]) -> int:
        if item[0] in LIVE:
            return q.execute(conn, DELETE_WAITING, queue, id=item[1]).rowcount
        return conn.execute(q.FORGET, {"history_id": item[1]}).rowcount

    deleted = sum(in_steps(conn, wanted, delete))
    report(as_json, {"queue": queue, "deleted": deleted}, f"deleted {many(deleted)} of {queue}")
    return 0


# --------------------------------------------------------------------------------------------- export, import and backup


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work in an orderly manner, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside path; it becomes path, on disk, when the block ends well, and is removed when it does not."""
    if path.is_dir() or not path.name:
        raise Refused(f"{path} is a directory: give a file's name")
    temporary = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}")  # known before it is made: a signal may come
    try:
        with ending_by_signal():
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
    conn = open_queue()
    check_known(conn, queues or ())
    if file == "-" or (os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file)):
        try:
            if file == "-":
                sys.stdout.flush()
                exported = write_lines(conn, sys.stdout.buffer, queues, history)
            else:  # a pipe or a device
                with open(file, "wb") as out:
                    exported = write_lines(conn, out, queues, history)
        except BrokenPipeError:
            mute_stdout()
            raise Refused("the export is not whole: its reader closed the pipe") from None
        except OSError as error:
            mute_stdout()
            raise Refused(f"{'standard output' if file == '-' else file} was not written: {error.strerror}") from None
    else:
        with whole_file(Path(file)) as temporary, open(temporary, "wb") as out:
            exported = write_lines(conn, out, queues, history)
    says = json.dumps({"exported": exported, "file": file}) if as_json else f"exported {many(exported)} to {file}"
    print(says if as_json else clean(says), file=sys.stderr if file == "-" else sys.stdout)
    return 0


def write_lines(conn: q.Connection, out: BinaryIO, queues: list[str] | None, history: bool) -> int:
    """Finished tasks first, in the order of their end, so that import meets a task's lives in their order."""
    exported = 0
    with snapshot(conn):
        sources = [conn.execute(EXPORT_FINISHED, {"queues": json.dumps(queues) if queues else None})] if history else []
        sources += [q.execute(conn, EXPORT_LIVE, queue) for queue in queues or queues_of(conn)]
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
        open_queue()
    conn = q.connect()
    if legacy is not None:
        imported, known, faults = import_legacy(conn, legacy, task_type)
    else:
        imported, known, faults = import_lines(conn, file)
    for fault in faults[:20]:
        complain(EX_DATAERR, "import", fault)
    if len(faults) > 20:
        complain(EX_DATAERR, "import", f"… and {len(faults) - 20:,} more")
    report(as_json, {"imported": imported, "already_there": known, "refused": faults},
           f"imported {many(imported)}; {known:,} already there; {len(faults):,} refused")  # fmt: skip
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
        faults.append(f"line {number} was refused: {short(why)}")

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
            results = list(in_steps(conn, parsed, store))
            imported, known = imported + results.count(True), known + results.count(False)
            q.wake(conn.state)
    return imported, known, faults


def parse_line(conn: q.Connection, line: bytes, ids: dict[str, Ids]) -> tuple[str, dict]:
    """The text and the task of a line; its queue exists when this returns."""
    text = line.decode("utf-8-sig").strip()
    task = json.loads(text)
    if not isinstance(task, dict):
        raise q.InvalidTask("it is not a JSON object")
    if task["status"] not in STATUSES:
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
    if name in FINISHED:
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
        row["data"] = envelope_of(row["task_id"], row["task_type"], row["timestamp"], row["data"])
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
            faults.append(f"{path} stays: {error.strerror if isinstance(error, OSError) else short(str(error))}")
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
    conn = open_queue()
    if file.exists() and os.path.samefile(file, conn.state / "tasks.db"):
        raise Refused(f"{file} is the database itself: give another name")
    try:
        with whole_file(file) as temporary, closing(sqlite3.connect(temporary, isolation_level=None)) as copy:
            with snapshot(conn):
                conn.execute(PAUSED).fetchone()  # the snapshot is of now, and the copy never has to start over
                conn.backup(copy, pages=1_000)
            copy.execute("pragma journal_mode = delete")  # one file, without sidecars
            fault = copy.execute("pragma quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise Refused(f"{conn.state / 'tasks.db'} is damaged, and so would be the copy: {fault}")
    except sqlite3.Error as error:
        raise Refused(f"{file} was not written: {error}; see: df -h '{file.absolute().parent}'") from None
    size = file.stat().st_size
    report(as_json, {"file": str(file), "bytes": size}, f"backed up {size:,} bytes to {file}")
    return 0


# -------------------------------------------------------------------------------------------------------------- doctor


class Finding(NamedTuple):
    """What a check yields."""

    level: str  # ok, note or problem
    what: str
    remedy: str = ""


def doctor(max_wait: float, as_json: bool) -> int:
    """Say what is wrong, each with its remedy. Exit 1 if anything is; notes do not count. Changes nothing."""
    home = Path(__file__).resolve().parent
    state = q.STATE_DIR
    installed = home.parent.parent if (home.parent.parent / "installed.json").is_file() else None
    handlers = next((path for path in (home / "handlers", home.parent.parent / "handlers") if path.is_dir()), home / "handlers")
    checks = {
        "versions": check_versions,
        "installation": lambda: check_installation(installed),
        "state": lambda: check_state(state),
        "file system": lambda: check_file_system(state),
        "disk": lambda: check_disk(state),
        "database": lambda: check_database(state),
        "tasks": lambda: check_tasks(state, max_wait),
        "spool": lambda: check_spool(state),
        "handlers": lambda: check_handlers(handlers),
        "hook": lambda: check_hook(installed),
        "file events": check_inotify,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings += [(name, finding) for finding in check()]
        except (OSError, sqlite3.Error, q.QueueError) as error:
            findings.append((name, Finding("problem", f"could not be checked: {error}", "mend that first")))
    problems = sum(finding.level == "problem" for _, finding in findings)
    notes = sum(finding.level == "note" for _, finding in findings)
    listed = [{"check": name, "level": f.level, "message": f.what, "remedy": f.remedy or None} for name, f in findings]
    lines = [f"{f.level:<8} {name}: {f.what}" + (f"\n         -> {f.remedy}" if f.remedy else "") for name, f in findings]
    lines.append(f"{problems or 'no'} problem{'s' * (problems != 1)}, {notes or 'no'} note{'s' * (notes != 1)} ({state})")
    report(as_json, {"ok": not problems, "state": str(state), "findings": listed}, "\n".join(lines))
    return 1 if problems else 0


def sh(word: object) -> str:
    """A word as a shell reads it, for remedies that people paste."""
    return shlex.quote(str(word))


def check_versions() -> Iterator[Finding]:
    import platform
    import shutil

    version = sqlite3.sqlite_version_info
    if version < (3, 35):
        yield Finding("problem", f"Python's SQLite {sqlite3.sqlite_version} is older than 3.35", "uv python install 3.12")
    else:
        yield Finding("ok", f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    if has_wal_reset_bug(version):
        yield Finding("note", f"SQLite {sqlite3.sqlite_version} can, very rarely, damage a database in WAL mode that several processes use",
                      "fixed in 3.51.3, 3.50.7 and 3.44.6: update Python when you can, keep a backup: tasks.py backup FILE")  # fmt: skip
    command = shutil.which("sqlite3", path=GUI_PATH) or shutil.which("sqlite3")
    if not command:
        yield Finding("note", "the sqlite3 command is not there; only hooks that are written in bash need it",
                      "install it with your package manager, or use enqueue.py")  # fmt: skip
        return
    ran = subprocess.run([command, "-version"], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    number = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", ran.stdout)
    if not number or tuple(int(part or 0) for part in number.groups()) < (3, 31):
        yield Finding("problem", f"{command} is version {ran.stdout.split(' ')[0].strip() or 'unknown'}: it cannot read the tables",
                      "install sqlite3 3.31 or newer")  # fmt: skip


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether a commit can be lost when two processes reset the write-ahead log at the same moment."""
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7) and not fixed


def check_installation(prefix: Path | None) -> Iterator[Finding]:
    if prefix is None:
        yield Finding("note", "these scripts run from where they lie; hooks need a place that stays", "just install")
        return
    try:
        files = json.loads((prefix / "installed.json").read_bytes())["files"]
        names = {name: set(digests) for name, digests in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("problem", f"{prefix / 'installed.json'} is damaged", "just install")
        return
    from hashlib import sha256

    missing = [name for name in names if not (prefix / name).exists()]
    changed = [name for name in names if name.startswith("runtime/") and name not in missing
               and sha256((prefix / name).read_bytes()).hexdigest() not in names[name]]  # fmt: skip
    if missing or any(len(digests) != 1 for digests in names.values()):
        yield Finding("problem", f"the installation is incomplete: {', '.join(missing) or 'it was interrupted'}", "just install")
    elif changed:
        yield Finding("note", f"changed since they were installed: {', '.join(changed)}", "just install puts them back")
    else:
        yield Finding("ok", f"complete in {prefix}")


def check_state(state: Path) -> Iterator[Finding]:
    if not state.is_dir():
        yield Finding("problem", f"{state} is not there", "just install, or set TASK_QUEUE_STATE to where your queue is")
        return
    found = state.stat()
    if found.st_uid != os.getuid():
        yield Finding("problem", f"{state} belongs to another user (id {found.st_uid})", f"sudo chown -R $(id -u) {sh(state)}")
    if not os.access(state, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("problem", f"{state} cannot be written", f"chmod u+rwx {sh(state)}")
        return
    open_to_others = [path for path in (state, *sorted(state.glob("tasks.db*"))) if path.stat().st_mode & 0o077]
    if open_to_others:
        names = ", ".join(path.name for path in open_to_others)
        yield Finding("problem", f"other users may read or write {names}: tasks hold prompts and paths",
                      f"chmod -R go= {sh(state)}")  # fmt: skip
    unwritable = [path for path in sorted(state.glob("tasks.db*")) if not os.access(path, os.R_OK | os.W_OK)]
    if unwritable:
        yield Finding("problem", f"{unwritable[0]} cannot be written", f"chmod u+rw {sh(unwritable[0])}; is it yours?")
    if not open_to_others and not unwritable:
        yield Finding("ok", f"{state} is yours alone")


def check_file_system(state: Path) -> Iterator[Finding]:
    kind, mount_point, options = file_system_of(os.path.realpath(state), mount_table())
    move = "put the state on a local disk: TASK_QUEUE_STATE=/a/local/directory"
    if kind in NETWORK_FILE_SYSTEMS or re.match(r"/mnt/[a-z](/|$)", os.path.realpath(state)) and kind in ("9p", "drvfs", "v9fs"):
        yield Finding("problem", f"{mount_point} is {kind}, shared with another machine or system: SQLite's locks do not hold there", move)
    elif "ro" in options:
        yield Finding("problem", f"{mount_point} is mounted read-only", "mount it for writing, or " + move)
    elif kind in ("tmpfs", "ramfs"):
        yield Finding("note", f"{mount_point} is {kind}: the tasks are gone after a restart of the machine", move)
    else:
        yield Finding("ok", f"{kind or 'file system unknown'} on {mount_point or '/'}")


def mount_table() -> list[tuple[str, str, list[str]]]:
    """(mount point, kind, options) of everything that is mounted."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        ran = subprocess.run(["/sbin/mount"], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
        found = (re.match(r".* on (.+) \((\w+)(.*)\)$", line) for line in ran.stdout.splitlines())
        return [(m[1], m[2], ["ro"] if "read-only" in m[3] else []) for m in found if m]
    table = []
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        table.append((point, source.split(" ")[0], [*fields[5].split(","), *source.split(" ")[-1].split(",")]))
    return table


def file_system_of(path: str, table: list[tuple[str, str, list[str]]]) -> tuple[str, str, list[str]]:
    """(kind, mount point, options) of the file system a path is on: the innermost mount, the last of equals."""
    best = ("", "", [])
    for point, kind, options in table:
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[1]):
            best = (kind, point, options)
    return best


def check_disk(state: Path) -> Iterator[Finding]:
    existing = next(path for path in (state, *state.parents) if path.exists())
    found = os.statvfs(existing)
    free = found.f_bavail * found.f_frsize
    text = f"{free / 2**20:,.0f} MiB free"
    if free < LOW_DISK_BYTES or found.f_files and not found.f_favail:
        text = text if free < LOW_DISK_BYTES else "no inodes are free"
        yield Finding("problem", f"the disk is full, or nearly: {text}", f"make room: df -h {sh(existing)}; cleanup.py")
    elif free < SHORT_DISK_BYTES:
        yield Finding("note", f"only {text}", "make room soon")
    else:
        yield Finding("ok", text)


def open_to_read(state: Path) -> sqlite3.Connection:
    """A connection that changes nothing: not even the sidecar files are made, as they are by an ordinary reader."""
    from urllib.parse import quote

    uri = f"file:{quote(str(state / 'tasks.db'))}?mode=ro{'' if in_use(state) else '&immutable=1'}"
    conn = sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None)
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return conn


def in_use(state: Path) -> bool:
    """Whether the sidecar files are there: some process has the database open, or died with it."""
    return all((state / f"tasks.db{end}").exists() for end in ("-wal", "-shm"))


def check_database(state: Path) -> Iterator[Finding]:
    db = state / "tasks.db"
    if not db.exists():
        yield Finding("problem", f"{db} is not there", "just install makes it; so does the first enqueue")
        return
    with open(db, "rb") as file:  # this process has no connection yet whose locks closing the file would drop
        head = file.read(100)
    if head and head[:15] != b"SQLite format 3":
        yield Finding("problem", f"{db} is not a database", f"mv {sh(db)} elsewhere, or restore a backup over it")
        return
    was_in_use = in_use(state)
    with closing(open_to_read(state)) as conn:
        try:
            version = conn.execute("pragma user_version").fetchone()[0]
            tables = {name for (name,) in conn.execute("select name from sqlite_master where type = 'table'")}
        except sqlite3.DatabaseError as error:
            yield Finding("problem", f"{db} cannot be read: {error}", "restore a backup over it; see the README")
            return
        if version > q.SCHEMA_VERSION:
            yield Finding("problem", f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}",
                          "update them: just install")  # fmt: skip
            return
        if version == 0 and tables - set(q.DEFAULT_QUEUES) - {"sqlite_sequence"} or version and "task_history" not in tables:
            yield Finding("problem", f"{db} belongs to another program, or lost its tables", "move it away, or set TASK_QUEUE_STATE")
            return
        if version < q.SCHEMA_VERSION:
            yield Finding("note", f"{db} has schema version {version}", "the next enqueue or worker brings it to "
                          f"version {q.SCHEMA_VERSION}, tasks kept")  # fmt: skip
        elif head[18:20] != b"\x02\x02":
            yield Finding("problem", f"{db} is not in WAL mode: readers and writers hold each other up",
                          f"sqlite3 {sh(db)} 'pragma journal_mode = wal'")  # fmt: skip
        found = quick_check(conn, db)
    if found.level == "problem" and head and not was_in_use and in_use(state):  # a worker started under our eyes
        with closing(open_to_read(state)) as conn:
            found = quick_check(conn, db)
    yield found
    wal = state / "tasks.db-wal"
    if wal.exists() and wal.stat().st_size > LONG_WAL_BYTES:
        size = wal.stat().st_size >> 20
        yield Finding("note", f"{wal.name} has grown to {size} MiB: a long read holds it", f"fuser -v {sh(db)}")


def quick_check(conn: sqlite3.Connection, db: Path) -> Finding:
    give_up = time.monotonic() + QUICK_CHECK_SECONDS
    conn.set_progress_handler(lambda: time.monotonic() > give_up, 100_000)
    restore = "stop the workers, then restore a backup, or save what can be read: sqlite3 tasks.db .recover | sqlite3 new.db"
    try:
        said = [row[0] for row in conn.execute("pragma quick_check(3)")]
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        return Finding("note", f"the database is too large to check in {QUICK_CHECK_SECONDS:.0f} s",
                       f"at a quiet hour: sqlite3 {sh(db)} 'pragma quick_check'")  # fmt: skip
    except sqlite3.DatabaseError as error:
        said = [str(error)]
    finally:
        conn.set_progress_handler(None, 0)
    if said == ["ok"]:
        return Finding("ok", "quick_check finds no damage")
    return Finding("problem", f"the database is damaged: {' '.join(said[0].split())}", restore)


def check_tasks(state: Path, max_wait: float) -> Iterator[Finding]:
    if not (state / "tasks.db").exists():
        return
    with closing(open_to_read(state)) as conn:
        if conn.execute("pragma user_version").fetchone()[0] != q.SCHEMA_VERSION:
            return
        now, dead, served = time.time(), set(), []
        for (queue,) in conn.execute(q.QUEUES).fetchall():
            ready, oldest = q.execute(conn, OLDEST_READY, queue).fetchone()
            overdue, due = q.execute(conn, OVERDUE, queue, now=now).fetchone()
            waiting, since = ready + overdue, min((t for t in (oldest, due) if t is not None), default=now)
            has_worker = is_alive(state / "workers" / f"serving.{queue}")
            served += [queue] if has_worker else []
            how_long = f'queue "{queue}": {waiting} waiting, the oldest since {q.utc(since)} UTC ({span(now - since)})'
            if waiting and q.is_paused(conn, queue):
                yield Finding("note", f"{how_long}; the queue is paused", f"tasks.py resume {queue}")
            elif waiting and now - since > max_wait and has_worker:
                yield Finding("problem", f"{how_long}, although a worker serves it",
                              f"see what it does: tasks.py list --queue {queue}, and its log in state/logs; "
                              "more at a time: worker.py --concurrency N")  # fmt: skip
            elif waiting and now - since > max_wait:
                yield Finding("problem", f"{how_long}, and no worker serves it",
                              f"start one: worker.py {queue}; or have it started: just service --enable; "
                              "or see to whoever else should take them")  # fmt: skip
            for task_type, count, error in q.execute(conn, WITHOUT_HANDLER, queue):
                yield Finding("problem", f'queue "{queue}": {count} of type {task_type!r} cannot run: {error}',
                              "put an executable of that name into the handlers' directory, or: "
                              f"tasks.py purge {queue} --type {sh(task_type)}")  # fmt: skip
            for owner, count, claimed_at in q.execute(conn, CLAIMS, queue):
                if not is_alive(state / "workers" / os.path.basename(owner or "")):
                    dead.add((queue, owner, count, claimed_at))
            failed = conn.execute(FAILED_LATELY, {"queue": queue, "since": q.utc(now - 86_400)}).fetchone()[0]
            if failed:
                yield Finding("note", f'queue "{queue}": {failed} failed for good in the last day',
                              f"tasks.py list --queue {queue} --status failed; then tasks.py retry --failed --queue {queue}")  # fmt: skip
        for queue, owner, count, claimed_at in sorted(dead):
            if not served:  # any worker takes them back, unless their handler still runs
                yield Finding("problem", f'queue "{queue}": {count} claimed at {q.utc(claimed_at)} UTC by {owner}, which has died',
                              f"any worker takes them back: worker.py {queue}; so does cleanup.py")  # fmt: skip
        yield Finding("ok", f"workers serve: {', '.join(served)}" if served else "no worker runs now; hooks and the service start one")


def check_spool(state: Path) -> Iterator[Finding]:
    spooled = bad = 0
    for directory in sorted((state / "spool").glob("*/")):
        files = [entry for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False)]
        waiting = [entry.stat().st_mtime for entry in files if not entry.name.startswith(".")]
        spooled += len(waiting)
        try:
            q.check_queue_name(directory.name)
        except q.InvalidTask as error:
            yield Finding("problem", f"{directory}: {error}",
                          f"mv its files into the right directory beside it, then rmdir {sh(directory)}")  # fmt: skip
            continue
        oldest = time.time() - min(waiting, default=time.time())
        if oldest > SPOOL_TOO_OLD_SECONDS:
            yield Finding("problem", f"{directory} is not draining: {len(waiting)} tasks, the oldest for {span(oldest)}",
                          f"worker.py {directory.name} takes them in; so does cleanup.py, which says what hinders it")  # fmt: skip
        malformed = sorted((directory / "malformed").glob("*"))
        if malformed:
            bad += len(malformed)
            yield Finding("problem", f"{len(malformed)} in {directory / 'malformed'} could not be taken in: they are not JSON objects",
                          "mend them and mv them one directory up, or remove them")  # fmt: skip
    if not bad and not spooled:
        yield Finding("ok", "empty")


def check_handlers(directory: Path) -> Iterator[Finding]:
    import shutil

    if not directory.is_dir():
        yield Finding("note", f"{directory} is not there: workers need --handlers or a command", "just install")
        return
    handlers = [path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith((".", "_"))]
    reach = os.pathsep.join([os.environ.get("PATH", ""), GUI_PATH, os.path.expanduser("~/.local/bin"), os.path.expanduser("~/.cargo/bin"),
                             "/opt/homebrew/bin", os.path.dirname(os.environ.get("UV", ""))])  # fmt: skip
    fine = []
    for path in handlers:
        with open(path, "rb") as file:
            first = file.readline(512)
        words = first[2:].decode("utf-8", "replace").split()
        if not os.access(path, os.X_OK):
            if first.startswith(b"#!"):  # others are data that lies there
                yield Finding("problem", f"{path} is not executable", f"chmod +x {sh(path)}")
        elif first.startswith(b"#!") and first.endswith(b"\r\n"):
            yield Finding("problem", f"{path} has Windows line ends: its interpreter is not found",
                          f"sed -i 's/\\r$//' {sh(path)}")  # fmt: skip
        elif first.startswith(b"#!") and words:
            program = words[0]
            if os.path.basename(program) == "env":
                program = next((word for word in words[1:] if not word.startswith("-") and "=" not in word), program)
            if not shutil.which(program, path=reach):
                yield Finding("problem", f"{path} needs {program}, which is not there",
                              f"install {os.path.basename(program)}, or mend the first line")  # fmt: skip
            else:
                fine.append(path.name)
        else:
            fine.append(path.name)
    yield Finding("ok" if fine else "note", f"{', '.join(fine) or 'none'} in {directory}")


def check_hook(prefix: Path | None) -> Iterator[Finding]:
    import shutil

    settings = Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude") / "settings.json"
    try:
        text = settings.read_bytes().decode()
        root = json.loads(text)
        groups = [(event, group) for event, groups in root.get("hooks", {}).items() for group in groups]
        commands = [(event, hook["command"]) for event, group in groups for hook in group.get("hooks", ())
                    if isinstance(hook.get("command"), str)]  # fmt: skip
    except FileNotFoundError:
        yield Finding("note", f"{settings} is not there, so there is no hook", "just install --hook yes")
        return
    except (ValueError, RecursionError) as error:
        yield Finding("problem", f"{settings} is not valid JSON ({error}): Claude Code ignores all of it", "mend it, or take back a backup")
        return
    except (TypeError, AttributeError, KeyError):
        yield Finding("problem", f"{settings}: its hooks are not of the shape Claude Code reads", "mend it, or take back a backup")
        return
    ours = [(event, command) for event, command in commands
            if "enqueue.py" in command or "tasks.db" in command or (prefix and str(prefix / "runtime/hook") in command)
            or "lychee/runtime/hook" in command]  # fmt: skip
    if not ours:
        yield Finding("note", f"no hook of the queue is in {settings}", "just install --hook yes")
        return
    if root.get("disableAllHooks") is True:
        yield Finding("problem", f"{settings} has disableAllHooks: no hook runs", "set it to false")
    bad = False
    for event, command in ours:
        for program in dict.fromkeys(re.findall(r"(?<![\w/.-])(uv|python3|sqlite3|bash)(?=\s)", command)):
            if not shutil.which(program, path=GUI_PATH):
                bad = True
                yield Finding("problem", f"the {event} hook calls {program}, which is not on the PATH of programs that no shell started",
                              f"write its absolute path: {shutil.which(program) or program}")  # fmt: skip
        for path in dict.fromkeys(word for word in words_of(command) if word.startswith("/") and not word.startswith("/dev/")):
            if not os.path.exists(path):
                bad = True
                yield Finding("problem", f"the {event} hook needs {path}, which is not there", "just install, or take the hook out")
            elif path.endswith("/runtime/hook"):
                for finding in check_interpreters(Path(path)):
                    bad = True
                    yield finding
    if not bad:
        yield Finding("ok", f"in {settings}: {', '.join(dict.fromkeys(event for event, _ in ours))}")


def words_of(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def check_interpreters(hook: Path) -> Iterator[Finding]:
    """Whether what the installed hook calls still exists; each stands in for the other."""
    lines = [line.rpartition("|| ")[2] for line in hook.read_text("utf-8", "replace").splitlines()]
    values = dict(line.split("=", 1) for line in lines if re.match(r"(python|uv|lib|TASK_QUEUE_STATE)=", line))
    paths = {name: next(iter(words_of(value)), "") for name, value in values.items()}
    try_out = {"python": ["-E", "-s", "-c", "import sys, sqlite3; sys.exit(sys.version_info < (3, 11))"], "uv": ["--version"]}
    gone = [name for name, arguments in try_out.items() if not runs([paths.get(name, ""), *arguments])]
    if len(gone) == 2:
        yield Finding("problem", f"{hook} finds neither Python 3.11 nor uv: tasks go to the spool", "install uv, then: just install")
    elif gone:
        yield Finding("note", f"{hook} can do without {gone[0]}, which has gone ({paths.get(gone[0]) or 'it never was'})", "just install")
    if Path(paths.get("TASK_QUEUE_STATE", q.STATE_DIR)) != q.STATE_DIR:
        yield Finding("note", f"the hook's tasks go to {paths['TASK_QUEUE_STATE']}; this looks at {q.STATE_DIR}",
                      f"TASK_QUEUE_STATE={sh(paths['TASK_QUEUE_STATE'])} tasks.py doctor")  # fmt: skip
    if not os.access(os.path.join(paths.get("lib", ""), "enqueue.py"), os.R_OK):
        yield Finding("problem", f"{hook} finds no enqueue.py: tasks go to the spool", "just install")


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def check_inotify() -> Iterator[Finding]:
    """Whether one more process could watch files, as every worker wants to; it polls when it cannot."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if not limit.exists():
        yield Finding("ok", "not limited here")
        return
    import ctypes

    fd = ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        yield Finding("problem", f"{os.strerror(ctypes.get_errno())}: workers cannot be woken by file events, and poll",
                      "sudo sysctl fs.inotify.max_user_instances=1024")  # fmt: skip
        return
    os.close(fd)
    most, watches = int(limit.read_text()), int(limit.with_name("max_user_watches").read_text())
    used = inotify_instances()
    if used > 0.8 * most or watches < 1024:
        yield Finding("note", f"{used} of {most} inotify instances are in use, {watches} watches are allowed",
                      "sudo sysctl fs.inotify.max_user_instances=1024 fs.inotify.max_user_watches=65536")  # fmt: skip
    else:
        yield Finding("ok", f"{used} of {most} inotify instances are in use")


def inotify_instances() -> int:
    """How many of them this user's processes have open."""
    count = 0
    for fds in Path("/proc").glob("[0-9]*/fd"):
        try:
            if fds.parent.stat().st_uid == os.getuid():
                count += sum(os.readlink(fd.path) == "anon_inode:inotify" for fd in os.scandir(fds))
        except OSError:
            continue
    return count


if __name__ == "__main__":
    raise SystemExit(main())
