#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=13,<16"]
# ///
"""Tidy up: prune old history and its logs, take in the spool, take back the tasks of dead owners,
give space back.

    cleanup.py                                  done tasks go after 24 h, dead letters after 30 d
    cleanup.py --dry-run --keep 7d              say what would go, change nothing
    cleanup.py --every 1h --keep-failed 90d     stay and repeat, until SIGTERM or Ctrl-C

Waiting and running tasks are never touched, but those whose time (--ttl) is over: they end as
expired; nor are the logs of a run that still goes on. The write
lock is held for some milliseconds at a time: whoever enqueues meanwhile hardly notices. DURATION is
like 30, 90m, 5min, 1.5h or 2d.

exit codes: 0 done (with --every: stopped by a signal); 1 the database cannot be used, or something
was left undone: it is named, and the rest was done; 64 usage; 75 the database is locked, try again;
128 + n a single run was stopped by signal n.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import cli, costs, database
from taskqueue import recovery as owners
from taskqueue.cli import EX_FAILED
from taskqueue.progress import progress
from taskqueue.remedies import command, remedies_as_typed
from taskqueue.report import IS_NEWS, make_is_told
from taskqueue.text import plural, size, visible
from taskqueue.workspaces import DIRECTORIES

# How many rows are looked up, and pages given back, before other writers get their turn.
BATCH_ROWS, BATCH_PAGES = 250, 64
# A batch of deletions holds the write lock this long: SQLite's busy handler looks after 1, 3, 8 ms,
# and finds it free soon.
HOLD_SECONDS = 0.004
# This share of the database's pages stays free: tomorrow's tasks need them.
SPARE_SHARE = 0.1
# How long the history keeps what report.py has not told.
UNTOLD_SECONDS = 7 * 86_400.0
# A lock file this young may not be locked yet.
NEWBORN_SECONDS = 60.0
# Files that a killed process left half done are removed after this time.
LEFT_BEHIND_SECONDS = 86_400.0
NOTES_SECONDS = 60 * 86_400.0
# A detached worker's own log of this size is set aside; the one before it goes.
WORKER_LOG_BYTES = 10 * 2**20
RUN_FILE = re.compile(r"(?P<run>(?P<id>\d+)-\d+-.+)\.(?:out|err)", re.DOTALL)

# --------------------------------------------------------------------------------------- statements

# Within a week, what report.py has yet to tell stays, too.
EXPIRED_IF = f"""
completed_at < case status when 'failed' then :failed_before else :finished_before end
and (completed_at < :untold_before or not {IS_NEWS} or not json_valid(data) or is_told(id, {DIRECTORIES}))"""
COUNT_EXPIRED = f"""
select status, count(*) from task_history
where completed_at < max(:finished_before, :failed_before) and {EXPIRED_IF} group by status"""
EXPIRED = f"""
select id, completed_at, status from task_history
where completed_at >= :since and completed_at < max(:finished_before, :failed_before) and {EXPIRED_IF}
order by completed_at limit :limit"""
PRUNE = """
delete from task_history where id = :id and completed_at = :completed_at"""
KEPT_HISTORY = f"""
select queue, row_id from task_history where not ({EXPIRED_IF})"""
UNFINISHED = """
select id from "{queue}" """
COUNT_EXPIRING = """
select count(*) from "{queue}" where expires_at <= :now"""
LAST_ID = """
select coalesce(max(seq), 0) from sqlite_sequence where name = '{queue}'"""

# ------------------------------------------------------------------------------------- command line


def interval(text: str) -> float:
    seconds = cli.duration(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a second")
    return seconds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser("cleanup.py", __doc__)
    for name, default, of_what in (
        (
            "--keep",
            "24h",
            "completed, cancelled and expired tasks, and link reports; 0s keeps none",
        ),
        ("--keep-failed", "30d", "dead letters"),
    ):
        parser.add_argument(
            name,
            metavar="DURATION",
            type=cli.duration,
            default=default,
            help=f"of {of_what} (default {default})",
        )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, change nothing")
    parser.add_argument(
        "--every", metavar="DURATION", type=interval, help="stay, and do it again this often"
    )
    parser.add_argument(
        "--json", action="store_true", help="the summary as one line of JSON, one per run"
    )
    return parser.parse_args(argv)


class Stop(threading.Event):
    """Set by SIGTERM and SIGINT. The second signal ends the process at once."""

    signal = 0

    def catch(self, number: int, frame: object) -> None:
        self.signal = number
        self.set()
        signal.signal(number, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cli.open_standard_streams()
    # A state that cannot be used must not be replaced by the usual one.
    if q.state_complaint:
        return cli.complain(cli.EX_USAGE, "cleanup.py", q.state_complaint)
    stop, before, told = Stop(), {}, ()
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, stop.catch)
    try:
        while True:
            began = time.monotonic()
            code, complaints = clean_and_tell(args, stop)
            # With --every each is said when it begins, not every time.
            for complaint in complaints:
                if complaint not in told:
                    cli.complain(code, "cleanup.py", remedies_as_typed(complaint))
            told = complaints
            if args.every is None:
                return 128 + stop.signal if stop.is_set() else code
            if stop.wait(max(0.0, began + args.every - time.monotonic())):
                return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_and_tell(args: argparse.Namespace, stop: Stop) -> tuple[int, tuple[str, ...]]:
    """Clean up once and print the summary. Return the exit code and the complaints."""
    try:
        report = clean(q.STATE_DIR, args.keep, args.keep_failed, stop, dry_run=args.dry_run)
    except (q.QueueError, sqlite3.Error) as error:
        told = q.explain(error, q.STATE_DIR) if isinstance(error, sqlite3.Error) else error
        return cli.code_of(told), (str(told),)
    try:
        text = (
            json.dumps(asdict(report)) if args.json else "\n".join(map(visible, sentences(report)))
        )
        print(
            text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding),
            flush=True,
        )
    except BrokenPipeError:
        # The reader has gone; the work is done.
        cli.mute(1)
    except OSError as error:
        cli.mute(1)
        return EX_FAILED, (*report.left_undone, f"standard output: {error.strerror}")
    return EX_FAILED if report.left_undone else 0, tuple(report.left_undone)


# ------------------------------------------------------------------------------------- one clean-up


@dataclass
class Report:
    """Counts of what one clean-up did; with `dry_run`, what it would do."""

    state: str
    dry_run: bool
    stopped: bool = False
    pruned: dict[str, int] = field(
        default_factory=lambda: {"completed": 0, "failed": 0, "cancelled": 0}
    )
    # Waiting tasks that have expired.
    expired: int = 0
    # Old reports of link checks.
    reports: int = 0
    log_files: int = 0
    log_bytes: int = 0
    # Workers' own logs.
    set_aside: int = 0
    spooled: int = 0
    # About files in the spool.
    complaints: list[str] = field(default_factory=list)
    # Failures, and their reasons.
    left_undone: list[str] = field(default_factory=list)
    recovered: int = 0
    # Handlers that outlive their worker; their tasks are left alone.
    orphans: int = 0
    lock_files: int = 0
    # Of the database with its write-ahead log.
    bytes_before: int = 0
    bytes_after: int = 0
    # Inside the database.
    free_bytes: int = 0
    wal_bytes: int = 0
    can_shrink: bool = True
    seconds: float = 0.0


def clean(
    state: Path, keep: float, keep_failed: float, stop: Stop, *, dry_run: bool = False
) -> Report:
    """Clean up once. Raise QueueBusy or QueueUnavailable; work that was done stays done."""
    began, now = time.monotonic(), time.time()
    conn = q.connect(state, create=False)
    report = Report(str(state), dry_run, bytes_before=size_of(state, "", "-wal"))
    limits = {"finished_before": q.utc(now - keep), "failed_before": q.utc(now - keep_failed)}
    # With --keep 0s, untold results go, too.
    limits["untold_before"] = q.utc(now - (UNTOLD_SECONDS if keep else 0.0))
    conn.create_function("is_told", 3, make_is_told(conn))
    conn.execute("pragma wal_autocheckpoint = 0")
    if dry_run:
        count(conn, limits, report)
    else:
        with left_undone(report, "the spool"):
            report.spooled, report.complaints = q.take_in_spool(state)
            if report.complaints and any(spool_files(state)):
                report.left_undone += report.complaints
        with left_undone(report, "tasks of dead owners"):
            recovered, report.orphans = q.recover(state)
            report.recovered = len(recovered)
        expire(conn, stop, report)
        prune(conn, limits, stop, report)
        prune_costs(conn)
    for kind in kinds(conn, limits, keep, keep_failed, dry_run):
        remove(state, kind, stop, report)
    if not dry_run:
        give_back(conn, stop)
        checkpoint(conn)
    page_size = conn.execute("pragma page_size").fetchone()[0]
    report.free_bytes = conn.execute("pragma freelist_count").fetchone()[0] * page_size
    report.can_shrink = conn.execute("pragma auto_vacuum").fetchone()[0] == 2
    report.wal_bytes, report.bytes_after = size_of(state, "-wal"), size_of(state, "", "-wal")
    report.stopped, report.seconds = stop.is_set(), round(time.monotonic() - began, 3)
    return report


def count(conn: q.Connection, limits: dict[str, str], report: Report) -> None:
    """Count what a clean-up would do to the tables."""
    report.spooled = sum(1 for _ in spool_files(conn.state))
    report.recovered, report.orphans = count_dead_claims(conn)
    now = time.time()
    expiring = (
        q.execute(conn, COUNT_EXPIRING, queue, now=now) for queue in database.queues_of(conn)
    )
    report.expired = sum(found.fetchone()[0] for found in expiring)
    report.pruned |= dict(conn.execute(COUNT_EXPIRED, limits).fetchall())


@contextmanager
def left_undone(report: Report, what: object) -> Iterator[None]:
    """Note an entry that could not be cleaned up, so that the rest is."""
    try:
        yield
    except FileNotFoundError:
        # Another process has removed it meanwhile.
        pass
    except q.QueueBusy:
        raise
    except (OSError, UnicodeError, q.QueueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        where = getattr(error, "filename", None) or what
        report.left_undone.append(
            f"{os.fsdecode(where) if isinstance(where, bytes) else where}: {why}; see: "
            f"{command('doctor')}"
        )


# ---------------------------------------------------------------------------------------- the tables


def expire(conn: q.Connection, stop: Stop, report: Report) -> None:
    """End the waiting tasks whose time is over. In a queue that is served, a claim does that."""
    for queue in database.queues_of(conn):
        while q.execute(conn, COUNT_EXPIRING, queue, now=time.time()).fetchone()[0]:
            if stop.wait(database.PAUSE_SECONDS):
                return
            with q.transaction(conn):
                ended = q.expire(conn, queue, time.time())
            report.expired += ended
            if not ended:
                break


def prune_costs(conn: q.Connection) -> None:
    """Delete the costs of runs that ended long ago."""
    before = {"before": time.time() - costs.KEEP_SECONDS, "limit": BATCH_ROWS}
    if conn.execute(costs.OLD, before).fetchone():
        with q.transaction(conn):
            conn.execute(costs.PRUNE, before)


def prune(conn: q.Connection, limits: dict[str, str], stop: Stop, report: Report) -> None:
    """Delete old history, oldest first, in batches with a pause between."""
    expired = sum(count for _, count in conn.execute(COUNT_EXPIRED, limits))
    since = ""

    def delete(row: tuple) -> None:
        row_id, completed_at, status = row
        found = conn.execute(PRUNE, {"id": row_id, "completed_at": completed_at}).rowcount
        report.pruned[status] = report.pruned.get(status, 0) + found

    with progress("history", expired, "tasks") as shown:
        while not stop.is_set():
            told = {**limits, "since": since, "limit": BATCH_ROWS}
            rows = conn.execute(EXPIRED, told).fetchall()
            if not rows:
                break
            done = sum(1 for _ in database.in_steps(conn, until(stop, rows), delete, HOLD_SECONDS))
            write_back(conn)
            shown.advance(done)
            since = rows[done - 1][1] if done else since


def write_back(conn: q.Connection) -> None:
    """Write the log back, so that no enqueue has to do it at its commit."""
    conn.execute("pragma wal_checkpoint(passive)").fetchall()


def until(stop: Stop, items: Sequence) -> Iterator:
    return (item for item in items if not stop.is_set())


def give_back(conn: q.Connection, stop: Stop) -> None:
    """Shrink the file, if auto_vacuum is incremental; SPARE_SHARE of its pages stay free."""
    while conn.execute("pragma auto_vacuum").fetchone()[0] == 2 and not stop.is_set():
        pages = conn.execute("pragma page_count").fetchone()[0]
        free = conn.execute("pragma freelist_count").fetchone()[0]
        more = free - int((pages - free) * SPARE_SHARE)
        if more <= 0:
            return
        with q.transaction(conn, durable=False):
            for _ in range(min(more, BATCH_PAGES)):
                # Python takes one step of it, whatever the number.
                conn.execute("pragma incremental_vacuum(1)")
        write_back(conn)
        stop.wait(database.PAUSE_SECONDS)


def checkpoint(conn: q.Connection) -> None:
    """Write the log into the database, and empty it unless another process is using it."""
    write_back(conn)
    # Waiting for readers, it would hold the write lock all the time.
    conn.execute("pragma busy_timeout = 0")
    try:
        conn.execute("pragma wal_checkpoint(truncate)").fetchall()
    finally:
        conn.execute(f"pragma busy_timeout = {q.BUSY_TIMEOUT_MS}")


# ----------------------------------------------------------------------------------------- the files


class Kind(NamedTuple):
    """Files to prune: where they lie, which of them are over, and how they go."""

    counted_as: str
    pattern: str
    is_over: Callable[[Path], bool]
    remove: Callable[[Path], object]


def kinds(
    conn: q.Connection, limits: dict[str, str], keep: float, keep_failed: float, dry_run: bool
) -> Iterator[Kind]:
    """Yield the kinds of files to prune."""
    limits = limits if dry_run else {name: "" for name in limits}
    run_is_over = runs_that_are_over(conn, limits)
    held = {task.owner for _, task in database.claims(conn)}
    workers = conn.state / "workers"

    def is_stale_lock(path: Path) -> bool:
        known = path.name in held or not path.is_file() or path.is_symlink()
        return not known and is_older(NEWBORN_SECONDS)(path) and is_free(path)

    def has_no_owner(path: Path) -> bool:
        return path.name not in held and not (workers / path.name).exists()

    yield Kind("log_files", "logs/*/*", run_is_over, Path.unlink)
    yield Kind("set_aside", "logs/worker.*.log", is_large, lambda path: path.replace(f"{path}.old"))
    yield Kind("reports", "reports/link_validation/*.json", is_older(keep), Path.unlink)
    # Of claude tasks that nobody retried; Claude Code keeps a session for 30 days.
    yield Kind("", "claude/*.json", is_older(NOTES_SECONDS), Path.unlink)
    yield Kind("lock_files", "workers/*", is_stale_lock, Path.unlink)
    yield Kind("", "runs/*", has_no_owner, shutil.rmtree)
    # Only a cache, of one name for each session's directory.
    yield Kind("", "told", lambda path: True, shutil.rmtree)
    yield Kind("", ".restore-*", is_older(LEFT_BEHIND_SECONDS), shutil.rmtree)
    yield Kind("", ".page.*", is_older(LEFT_BEHIND_SECONDS), Path.unlink)


def remove(state: Path, kind: Kind, stop: Stop, report: Report) -> None:
    """Remove the files of a kind that are over, or only count them for a dry run."""
    for path in entries(state, kind.pattern, report):
        if stop.is_set():
            return
        with left_undone(report, path):
            length = path.lstat().st_size
            if not kind.is_over(path):
                continue
            if not report.dry_run:
                kind.remove(path)
            if kind.counted_as:
                setattr(report, kind.counted_as, getattr(report, kind.counted_as) + 1)
            if kind.counted_as == "log_files":
                report.log_bytes += length


def entries(place: Path, pattern: str, report: Report) -> Iterator[Path]:
    """Yield what a pattern names, and note each directory that cannot be read: Path.glob says nothing."""
    first, _, rest = pattern.partition("/")
    names: list[str] = []
    with left_undone(report, place):
        names = fnmatch.filter(os.listdir(place), first)
    for path in (place / name for name in names):
        if not rest:
            yield path
        elif path.is_dir():
            yield from entries(path, rest, report)


def is_older(seconds: float) -> Callable[[Path], bool]:
    return lambda path: time.time() - path.lstat().st_mtime > seconds


def is_large(path: Path) -> bool:
    return path.stat().st_size > WORKER_LOG_BYTES


def is_free(path: Path) -> bool:
    """Tell whether no process holds a lock file."""
    fd = q.lock_file(path, probe=True)
    if fd is not None:
        os.close(fd)
    return fd is not None


def is_quiet(path: Path) -> bool:
    """Tell whether no handler holds the output of a file's run any more."""
    try:
        return is_free(path.with_suffix(".out"))
    except FileNotFoundError:
        return True


def runs_that_are_over(conn: q.Connection, limits: dict[str, str]) -> Callable[[Path], bool]:
    """Return a test for files of runs whose task is neither in its queue nor in the history."""
    # One snapshot: a task on its way from queue to history is in exactly one of them.
    with database.snapshot(conn):
        queues = database.queues_of(conn)
        last = {queue: q.execute(conn, LAST_ID, queue).fetchone()[0] for queue in queues}
        kept = {
            queue: {row_id for (row_id,) in q.execute(conn, UNFINISHED, queue)} for queue in queues
        }
        for queue, row_id in conn.execute(KEPT_HISTORY, limits):
            kept.setdefault(queue, set()).add(row_id)

    def is_over(path: Path) -> bool:
        queue, match = path.parent.name, RUN_FILE.fullmatch(path.name)
        if not match or queue not in last:
            return False
        row_id = int(match["id"])
        return row_id <= last[queue] and row_id not in kept[queue] and is_quiet(path)

    return is_over


def spool_files(state: Path) -> Iterator[Path]:
    for path in (state / "spool").glob("*/*"):
        if not path.name.startswith(".") and path.is_file():
            yield path


def count_dead_claims(conn: q.Connection) -> tuple[int, int]:
    """Count the tasks of dead owners to take back, and those whose handlers still run."""
    dead = [task for _, task in database.claims(conn) if owners.is_dead(conn.state, task.owner)]
    orphans = sum(owners.look_at_run(conn.state, task)[1] for task in dead)
    return len(dead) - orphans, orphans


def size_of(state: Path, *suffixes: str) -> int:
    """Return the bytes of tasks.db, with these of its sidecars."""
    sizes = 0
    for suffix in suffixes:
        try:
            sizes += os.stat(f"{database.database_file(state)}{suffix}").st_size
        except OSError:
            # The log comes and goes.
            pass
    return sizes


# ------------------------------------------------------------------------------------------ telling


def sentences(report: Report) -> Iterator[str]:
    """Yield the lines of the summary."""
    would = "would be " if report.dry_run else ""
    if report.spooled or report.complaints:
        yield f"spool: {plural(report.spooled, 'task')} {would}taken in"
    yield from (f"spool: set aside {complaint}" for complaint in report.complaints)
    if report.recovered:
        yield f"owners: {plural(report.recovered, 'task')} of dead owners {would}taken back"
    if report.orphans:
        yield (
            f"owners: {plural(report.orphans, 'task')} left alone: the handler outlives its worker"
        )
    if report.expired:
        yield f"tasks: {plural(report.expired, 'task')} {would}ended as expired"
    kinds = ", ".join(f"{count:,} {status}" for status, count in report.pruned.items() if count)
    yield f"history: {plural(sum(report.pruned.values()), 'task')} {would}pruned" + (
        f" ({kinds})" if kinds else ""
    )
    yield f"logs: {plural(report.log_files, 'file')} {would}removed, {size(report.log_bytes)}"
    if report.reports:
        yield f"reports: {plural(report.reports, 'link report')} {would}removed"
    if report.set_aside:
        yield f"logs: {plural(report.set_aside, 'log')} of workers {would}set aside as .old"
    if report.lock_files:
        yield f"workers: {plural(report.lock_files, 'stale lock file')} {would}removed"
    shrunk = f"{size(report.bytes_before)} -> " if not report.dry_run else ""
    yield (
        f"database: {shrunk}{size(report.bytes_after)}, of it {size(report.free_bytes)} free "
        "for "
        "new tasks"
    )
    if not report.can_shrink and report.free_bytes > SPARE_SHARE * report.bytes_after:
        yield (
            "database: made without auto_vacuum, so it does not shrink. To change that, once, with "
            "no worker running: "
            f"sqlite3 '{report.state}/tasks.db' 'pragma auto_vacuum = incremental; vacuum'"
        )
    yield f"{'stopped early after' if report.stopped else 'took'} {report.seconds:.1f} s"


if __name__ == "__main__":
    raise SystemExit(main())
