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
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import queue_helpers as q
from taskqueue import cli
from taskqueue import recovery as owners
from taskqueue.cli import EX_FAILED, plural, size
from taskqueue.report import DIRECTORIES, IS_NEWS, make_is_told
from taskqueue.text import visible

# SQLite's busy handler looks again after 1, 3, 8, 18, 33 … ms. A lock held for less than 7 ms and
# then left alone for 10 ms is therefore had at the third look; without the pause somebody unlucky
# could miss it ten times in a row.
HOLD_SECONDS = 0.004
PAUSE_SECONDS = 0.010
# The write-ahead log is written back so often that it stays short, and no enqueue has to do this
# work.
STEPS_PER_CHECKPOINT = 4
MOST_PER_STEP = 5_000
# More rows or pages than this get a progress bar.
LONG_WORK = 20_000
# This share of the database's pages stays free: tomorrow's tasks need them.
SPARE_SHARE = 0.1
# So long the history keeps what report.py has not told.
UNTOLD_SECONDS = 7 * 86_400.0
# A lock file this young may not be locked yet.
NEWBORN_SECONDS = 60.0
# What a restore that was killed left behind is removed after this time.
LEFT_BEHIND_SECONDS = 86_400.0
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
    # The usual state is not the one that was meant.
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
                    cli.complain(code, "cleanup.py", cli.remedies_as_typed(complaint))
            told = complaints
            if args.every is None:
                return 128 + stop.signal if stop.is_set() else code
            if stop.wait(max(0.0, began + args.every - time.monotonic())):
                return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clean_and_tell(args: argparse.Namespace, stop: Stop) -> tuple[int, tuple[str, ...]]:
    """One clean-up and its summary: (the exit code, what is to be complained about)."""
    try:
        report = clean(q.STATE_DIR, args.keep, args.keep_failed, stop, dry_run=args.dry_run)
    except q.QueueError as error:
        return cli.code_of(error), (str(error),)
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
    """What one run did; with dry_run, what it would do."""

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
    # What could not be done, and why.
    left_undone: list[str] = field(default_factory=list)
    # Files and directories that other users could read.
    modes: int = 0
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
    """Do everything once. Raises QueueBusy and QueueUnavailable; what was done until then stays
    done.
    """
    began, now = time.monotonic(), time.time()
    conn = q.connect(state, create=False)
    report = Report(str(state), dry_run, bytes_before=size_of(state, "", "-wal"))
    limits = {"finished_before": q.utc(now - keep), "failed_before": q.utc(now - keep_failed)}
    # Whoever keeps nothing means it.
    limits["untold_before"] = q.utc(now - (UNTOLD_SECONDS if keep else 0.0))
    conn.create_function("is_told", 3, make_is_told(conn))
    with errors_explained(state):
        if dry_run:
            report.spooled = sum(1 for _ in spool_files(state))
            report.recovered, report.orphans = count_dead_claims(conn)
            expiring = (
                q.execute(conn, COUNT_EXPIRING, queue, now=now) for queue in cli.queues_of(conn)
            )
            report.expired = sum(found.fetchone()[0] for found in expiring)
            report.pruned |= dict(conn.execute(COUNT_EXPIRED, limits).fetchall())
            remove_logs(conn, limits, stop, report)
            remove_locks(conn, report)
            tidy_state(state, report)
        else:
            tidy_state(state, report)
            with left_undone(report, "the spool"):
                report.spooled, report.complaints = q.take_in_spool(state)
                if report.complaints and any(spool_files(state)):
                    report.left_undone += report.complaints
            with left_undone(report, "tasks of dead owners"):
                recovered, report.orphans = q.recover(state)
                report.recovered = len(recovered)
            # Checkpoints are Pacer's business, outside of the write lock.
            conn.execute("pragma wal_autocheckpoint = 0")
            pacer = Pacer(conn, stop)
            expire(conn, pacer, report)
            prune(conn, limits, pacer, report)
            remove_logs(conn, dict.fromkeys(limits, ""), stop, report)
            remove_locks(conn, report)
            give_back(conn, pacer, report)
            checkpoint(conn)
        remove_reports(state, now - keep, report)
        if not dry_run:
            # Only a cache, of one name for each session's directory.
            shutil.rmtree(state / "told", ignore_errors=True)
        remove_job_logs(state, now - keep_failed, report)
        page_size = conn.execute("pragma page_size").fetchone()[0]
        report.free_bytes = conn.execute("pragma freelist_count").fetchone()[0] * page_size
        report.can_shrink = conn.execute("pragma auto_vacuum").fetchone()[0] == 2
    report.wal_bytes, report.bytes_after = size_of(state, "-wal"), size_of(state, "", "-wal")
    report.stopped, report.seconds = stop.is_set(), round(time.monotonic() - began, 3)
    return report


@contextmanager
def left_undone(report: Report, what: object) -> Iterator[None]:
    """One entry's trouble is written down, and the rest is done."""
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
            f"{cli.command('doctor')}"
        )


def tidy_state(state: Path, report: Report) -> None:
    """Close what other users could read, and remove what a restore that was killed left behind."""
    for top, directories, files in os.walk(state):
        for name in (".", *files):
            path = Path(top, name)
            with left_undone(report, path):
                found = path.lstat()
                if (
                    found.st_uid == os.getuid()
                    and found.st_mode & 0o077
                    and not stat.S_ISLNK(found.st_mode)
                ):
                    report.modes += 1
                    if not report.dry_run:
                        path.chmod(stat.S_IMODE(found.st_mode) & 0o700)
        if Path(top) == state:
            for name in [name for name in directories if name.startswith(".restore-")]:
                # A restore that ends at this moment removes its own.
                with left_undone(report, Path(top, name)):
                    is_old = time.time() - Path(top, name).stat().st_mtime > LEFT_BEHIND_SECONDS
                    if is_old and not report.dry_run:
                        shutil.rmtree(Path(top, name), ignore_errors=True)


@contextmanager
def errors_explained(state: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise q.explain(error, state) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise q.QueueUnavailable(
            f"{error.filename}: {error.strerror}; check the permissions: ls -laR '{state}'"
        ) from error


class Pacer:
    """Work in many short transactions, each as large as HOLD_SECONDS allow, with the write lock
    free in between.
    """

    def __init__(self, conn: q.Connection, stop: Stop) -> None:
        self.conn, self.stop, self.deadline, self.steps = conn, stop, 0.0, 0
        # Rows or pages of the next step.
        self.amount = 16

    @contextmanager
    def step(self) -> Iterator[None]:
        # A power cut may undo it: the next run does it again.
        with q.transaction(self.conn, durable=False):
            began = time.monotonic()
            self.deadline = began + HOLD_SECONDS
            yield
        held = time.monotonic() - began
        fitting = self.amount * HOLD_SECONDS / held
        self.amount = max(1, min(int(fitting), 2 * self.amount, MOST_PER_STEP))
        self.steps += 1
        if self.steps % STEPS_PER_CHECKPOINT == 0:
            self.conn.execute("pragma wal_checkpoint(passive)").fetchall()
        self.stop.wait(max(PAUSE_SECONDS, 2 * held))


def expire(conn: q.Connection, pacer: Pacer, report: Report) -> None:
    """End the waiting tasks whose time is over; a claim does the same in the queues that are
    served.
    """
    for queue in cli.queues_of(conn):
        while q.execute(conn, COUNT_EXPIRING, queue, now=time.time()).fetchone()[0]:
            if pacer.stop.is_set():
                return
            with pacer.step():
                report.expired += q.expire(conn, queue, time.time())


def prune(conn: q.Connection, limits: dict[str, str], pacer: Pacer, report: Report) -> None:
    """Delete expired history, oldest first."""
    expired = sum(count for _, count in conn.execute(COUNT_EXPIRED, limits))
    since = ""
    with progress(expired, "history") as advance:
        while not pacer.stop.is_set():
            rows = conn.execute(
                EXPIRED, {**limits, "since": since, "limit": pacer.amount}
            ).fetchall()
            if not rows:
                break
            with pacer.step():
                gone = 0
                for row_id, completed_at, status in rows:
                    found = conn.execute(
                        PRUNE, {"id": row_id, "completed_at": completed_at}
                    ).rowcount
                    report.pruned[status] = report.pruned.get(status, 0) + found
                    gone, since = gone + 1, completed_at
                    # Rows may be large.
                    if time.monotonic() > pacer.deadline:
                        break
            advance(gone)


def remove_logs(conn: q.Connection, limits: dict[str, str], stop: Stop, report: Report) -> None:
    """Remove the output files of tasks that are neither in their queue nor in the history."""
    logs = cli.logs_directory(conn.state)
    wanted = {directory.name for directory in logs.glob("*/")}
    for log in logs.glob("worker.*.log"):
        with left_undone(report, log):
            if log.stat().st_size > WORKER_LOG_BYTES:
                report.set_aside += 1
                if not report.dry_run:
                    log.replace(f"{log}.old")
    if not wanted:
        return
    queues = [queue for queue in cli.queues_of(conn) if queue in wanted]
    # One snapshot: a task on its way from queue to history is in exactly one of them.
    with cli.snapshot(conn):
        last = {queue: q.execute(conn, LAST_ID, queue).fetchone()[0] for queue in queues}
        kept = {
            queue: {row_id for (row_id,) in q.execute(conn, UNFINISHED, queue)} for queue in queues
        }
        for queue, row_id in conn.execute(KEPT_HISTORY, limits):
            if queue in kept:
                kept[queue].add(row_id)
    for queue in queues:
        with left_undone(report, logs / queue):
            for entry in os.scandir(logs / queue):
                if stop.is_set():
                    return
                match = RUN_FILE.fullmatch(entry.name)
                if (
                    match
                    and int(match["id"]) <= last[queue]
                    and int(match["id"]) not in kept[queue]
                ):
                    with left_undone(report, entry.path):
                        remove_log(entry, logs / queue / f"{match['run']}.out", report)


def remove_reports(state: Path, before: float, report: Report) -> None:
    """Remove link checks' reports that are as old as the history that is pruned."""
    for path in (state / "reports" / "link_validation").glob("*.json"):
        with left_undone(report, path):
            if path.lstat().st_mtime < before:
                report.reports += 1
                if not report.dry_run:
                    path.unlink()


def remove_job_logs(state: Path, before: float, report: Report) -> None:
    """Remove old output of jobs that ran here for other machines: no history of ours knows them."""
    for directory in cli.logs_directory(state).glob("relay.*/"):
        with left_undone(report, directory):
            for entry in os.scandir(directory):
                match = RUN_FILE.fullmatch(entry.name)
                with left_undone(report, entry.path):
                    if match and entry.stat(follow_symlinks=False).st_mtime < before:
                        remove_log(entry, directory / f"{match['run']}.out", report)


def remove_log(entry: os.DirEntry, output: Path, report: Report) -> None:
    """Remove one file of a run, unless a handler still holds its output's lock."""
    try:
        fd = q.lock_file(output, probe=True)
        if fd is None:
            return
    except FileNotFoundError:
        fd = None
    try:
        length = entry.stat(follow_symlinks=False).st_size
        if not report.dry_run:
            os.unlink(entry.path)
        report.log_files, report.log_bytes = report.log_files + 1, report.log_bytes + length
    finally:
        if fd is not None:
            os.close(fd)


def remove_locks(conn: q.Connection, report: Report) -> None:
    """Remove the lock files that nobody holds, but those of owners whose tasks and jobs could not
    be taken back yet.
    """
    workers = conn.state / "workers"
    if not workers.is_dir():
        return
    owners = {task.owner for _, task in cli.claims(conn)}
    # relay.py sees to the jobs of its dead ones: their handlers may still run.
    owners |= {hub.parent.name for hub in (conn.state / "runs").glob("*/hub")}
    with left_undone(report, workers):
        for entry in os.scandir(workers):
            with left_undone(report, entry.path):
                remove_lock(entry, owners, report)
    # What is on record about the handlers of owners that are gone.
    for directory in (conn.state / "runs").glob("*"):
        gone = directory.name not in owners and not (workers / directory.name).exists()
        if gone and not report.dry_run:
            shutil.rmtree(directory, ignore_errors=True)


def remove_lock(entry: os.DirEntry, owners: set[str | None], report: Report) -> None:
    young = time.time() - entry.stat(follow_symlinks=False).st_mtime < NEWBORN_SECONDS
    if young or entry.name in owners or not entry.is_file(follow_symlinks=False):
        return
    fd = q.lock_file(entry.path, probe=True)
    if fd is not None:
        if not report.dry_run:
            Path(entry.path).unlink(missing_ok=True)
        os.close(fd)
        report.lock_files += 1


def give_back(conn: q.Connection, pacer: Pacer, report: Report) -> None:
    """Shrink the file by its free pages, but SPARE_SHARE of it. Needs auto_vacuum = incremental,
    else does nothing.
    """
    pages = conn.execute("pragma page_count").fetchone()[0]
    free = conn.execute("pragma freelist_count").fetchone()[0]
    spare = int((pages - free) * SPARE_SHARE)
    if conn.execute("pragma auto_vacuum").fetchone()[0] != 2 or free <= spare:
        return
    pacer.amount = 16
    with progress(free - spare, "space") as advance:
        while free > spare and not pacer.stop.is_set():
            with pacer.step():
                for _ in range(min(pacer.amount, free - spare)):
                    # Python never takes a second step, whatever the number.
                    conn.execute("pragma incremental_vacuum(1)")
                    if time.monotonic() > pacer.deadline:
                        break
            was, free = free, conn.execute("pragma freelist_count").fetchone()[0]
            advance(was - free)


def checkpoint(conn: q.Connection) -> None:
    """Write the log into the database, and empty it unless somebody reads or writes right now."""
    conn.execute("pragma wal_checkpoint(passive)").fetchall()
    # Waiting for readers, it would hold the write lock all the time.
    conn.execute("pragma busy_timeout = 0")
    try:
        conn.execute("pragma wal_checkpoint(truncate)").fetchall()
    finally:
        conn.execute(f"pragma busy_timeout = {q.BUSY_TIMEOUT_MS}")


def spool_files(state: Path) -> Iterator[Path]:
    for path in cli.spool_directory(state).glob("*/*"):
        if not path.name.startswith(".") and path.is_file():
            yield path


def count_dead_claims(conn: q.Connection) -> tuple[int, int]:
    """(tasks of dead owners that can be taken back, those whose handlers still run)."""
    dead = [task for _, task in cli.claims(conn) if owners.is_dead(conn.state, task.owner)]
    orphans = sum(owners.look_at_run(conn.state, task)[1] for task in dead)
    return len(dead) - orphans, orphans


def size_of(state: Path, *suffixes: str) -> int:
    """Bytes of tasks.db and its sidecars."""
    sizes = 0
    for suffix in suffixes:
        try:
            sizes += os.stat(f"{cli.database_file(state)}{suffix}").st_size
        except OSError:
            # The log comes and goes.
            pass
    return sizes


# ------------------------------------------------------------------------------------------ telling


@contextmanager
def progress(total: int, what: str) -> Iterator:
    """A function that moves a bar on a terminal's stderr; without a terminal, or for little work,
    it does nothing.
    """
    bar = nullcontext()
    if total >= LONG_WORK and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
        except ImportError:
            # It was run by a Python without rich.
            pass
    with bar as shown:
        job = shown.add_task(what, total=total) if shown else None
        yield (lambda count: shown.advance(job, count)) if shown else (lambda count: None)


def sentences(report: Report) -> Iterator[str]:
    """The summary for people."""
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
    if report.modes:
        yield f"state: {plural(report.modes, 'file')} {would}closed to other users"
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
