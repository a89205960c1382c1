#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Say what is wrong with the queue, each with its remedy. Changes nothing.

    doctor.py
    doctor.py --max-wait 1h                 a task may wait so long before that is a problem
    doctor.py --json                        for scripts

tasks.py doctor is the same command. Exit codes: 0 nothing is wrong; 1 something is (notes do not
count); 64 usage.
"""

import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import cli, database, environment, serving
from taskqueue import installation as queue_installation
from taskqueue import recovery as owners
from taskqueue.handlers import fault_of
from taskqueue.outcome import NO_HANDLER as NO_HANDLER_BEGINS
from taskqueue.outcome import Control
from taskqueue.remedies import command
from taskqueue.settings import hooks_in, our_hooks
from taskqueue.spool import is_utf8, why_set_aside
from taskqueue.text import pause_in_words, plural, sh, span, visible

MAX_WAIT_SECONDS = 600.0
# So many firings and files that are no tasks are named one by one.
MALFORMED_SHOWN = 5
# A worker takes spooled tasks in at once.
SPOOL_TOO_OLD_SECONDS = 60.0
HANDED_OVER_SECONDS = 86_400.0
QUICK_CHECK_SECONDS = 20.0
LOW_DISK_BYTES, SHORT_DISK_BYTES = 50 * 2**20, 2**30
LONG_WAL_BYTES = 256 * 2**20
# So many files of the state are looked at, the logs last.
MOST_FILES = 50_000
# What programs get as PATH that no shell started.
GUI_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
NETWORK_FILE_SYSTEMS = set(
    "9p afs beegfs ceph cifs drvfs fuse.rclone fuse.s3fs fuse.sshfs glusterfs gpfs lustre ncpfs "
    "nfs nfs4 osxfuse "
    "prl_fs smb3 smbfs vboxsf virtiofs webdav".split()
)
# Claude Code reads this hook's stdout as the path of the worktree, and takes no other answer.
NOT_FOR_THE_QUEUE = "WorktreeCreate"

# bash may have given a row a time that is no number: it is counted, and is never the oldest.
ENQUEUED = "iif(typeof(timestamp) = 'real', timestamp, null)"
OLDEST_READY = f"""
select count(*), min({ENQUEUED}) from "{{queue}}" where status < 2"""
OVERDUE = """
select count(*), min(due_at) from "{queue}" where status = 3 and due_at <= :now"""
# Not before it is due is a task late on the hub; and bash may have given any of the times a text.
HANDED_OVER = f"""
select count(*), min(since) from (
  select max(coalesce(iif(typeof(claimed_at) = 'real', claimed_at, null), {ENQUEUED}), coalesce(due_at, 0)) as since
  from "{{queue}}" where status = 5)
where since <= :before"""
HELD = f"""
select count(*), min({ENQUEUED}) from "{{queue}}" where status = 3 and due_at is null"""
NO_HANDLER = """
select task_type, sum(not dead), sum(dead), max(error) from (
  select coalesce(task_type, :queue) as task_type, 0 as dead, error from "{queue}" where status = 3
  union all
  select task_type, 1, error from task_history
  where queue = :queue and status = 'failed' and completed_at > :since)
where substr(error, 1, length(:begins)) = :begins group by task_type"""
FAILED_LATELY = """
select count(*) from task_history where queue = :queue and status = 'failed' and completed_at > :since"""


class Finding(NamedTuple):
    """What a check yields."""

    # ok, note or problem
    level: str
    what: str
    remedy: str = ""


def problem(what: str, remedy: str) -> Finding:
    return Finding("problem", what, remedy)


def note(what: str, remedy: str = "") -> Finding:
    return Finding("note", what, remedy)


def ok(what: str) -> Finding:
    return Finding("ok", what)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("doctor.py", __doc__)
    parser.add_argument(
        "--max-wait",
        metavar="AGE",
        type=cli.duration,
        default=MAX_WAIT_SECONDS,
        help="how long a task may wait before that is a problem (default "
        f"{span(MAX_WAIT_SECONDS)})",
    )
    parser.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
    args = parser.parse_args(argv)
    return cli.run("doctor.py", lambda: doctor(args.max_wait, args.as_json))


def doctor(max_wait: float, as_json: bool) -> int:
    """Print what every check finds. 1 when one of them is a problem."""
    state = q.STATE_DIR
    place = Place.find()
    checks = {
        "versions": check_versions,
        "installation": lambda: check_installation(place.prefix),
        "state": lambda: check_state(state),
        "file system": lambda: check_file_system(state),
        "disk": lambda: check_disk(state),
        "database": lambda: check_database(state),
        "tasks": lambda: check_tasks(state, place.handlers, max_wait),
        "spool": lambda: check_spool(state),
        "handlers": lambda: check_handlers(place.handlers),
        "environment": lambda: check_environment(place.prefix),
        "hook": lambda: check_hook(place),
        "plugin": check_plugin,
        "file events": check_inotify,
    }
    findings = []
    for name, check in checks.items():
        # What a check has found before it failed counts.
        try:
            for finding in check():
                findings.append((name, finding))
        except (
            OSError,
            ValueError,
            sqlite3.Error,
            subprocess.SubprocessError,
            q.QueueError,
        ) as error:
            findings.append((name, problem(f"could not be checked: {error}", "mend that first")))
    say(findings, state, as_json)
    return 1 if any(finding.level == "problem" for _, finding in findings) else 0


def say(findings: list[tuple[str, Finding]], state: Path, as_json: bool) -> None:
    problems = sum(finding.level == "problem" for _, finding in findings)
    notes = sum(finding.level == "note" for _, finding in findings)
    listed = [
        {"check": name, "level": f.level, "message": f.what, "remedy": f.remedy or None}
        for name, f in findings
    ]
    lines = []
    for name, finding in findings:
        lines.append(f"{finding.level:<8} {name}: {visible(finding.what)}")
        if finding.remedy:
            lines.append(f"         -> {visible(finding.remedy)}")
    total = ", ".join(
        plural(number, noun) if number else f"no {noun}s"
        for number, noun in ((problems, "problem"), (notes, "note"))
    )
    lines.append(f"{total} ({state})")
    cli.report(
        as_json, {"ok": not problems, "state": str(state), "findings": listed}, "\n".join(lines)
    )


class Place(NamedTuple):
    """Where these scripts are installed; prefix and record are None in a checkout."""

    prefix: Path | None
    handlers: Path
    record: dict

    @classmethod
    def find(cls) -> "Place":
        lib = Path(__file__).resolve().parent
        installation = queue_installation.installed(__file__)
        prefix = installation.prefix if installation else None
        places = (lib / "handlers", lib.parent.parent / "handlers")
        handlers = next((path for path in places if path.is_dir()), places[0])
        record = read_record(prefix) if prefix else None
        return cls(prefix, handlers, record or {})


def read_record(prefix: Path) -> dict | None:
    """What install.py wrote down, None when that is damaged."""
    try:
        record = json.loads((prefix / "installed.json").read_bytes())
        return record if isinstance(record["files"], dict) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def check_versions() -> Iterator[Finding]:
    import platform

    version = sqlite3.sqlite_version_info
    if version < (3, 35):
        yield problem(
            f"Python's SQLite {sqlite3.sqlite_version} is older than 3.35",
            "uv python install 3.12",
        )
    else:
        yield ok(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    if has_wal_reset_bug(version):
        yield note(
            f"SQLite {sqlite3.sqlite_version} can, very rarely, damage a database in WAL "
            "mode that several processes use",
            "fixed in 3.51.3, 3.50.7 and 3.44.6: update Python when you can, keep a backup: "
            f"{command('backup')} FILE",
        )
    sqlite = shutil.which("sqlite3", path=GUI_PATH) or shutil.which("sqlite3")
    if not sqlite:
        yield note(
            "the sqlite3 command is not there; only hooks that are written in bash need it",
            f"install it with your package manager, or use {command('add')}",
        )
        return
    ran = subprocess.run(
        [sqlite, "-version"],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=10,
    )
    number = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", ran.stdout)
    if not number or tuple(int(part or 0) for part in number.groups()) < (3, 31):
        yield problem(
            f"{sqlite} is version {ran.stdout.split(' ')[0].strip() or 'unknown'}: it "
            "cannot read the tables",
            "install sqlite3 3.31 or newer",
        )


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether a commit can be lost when two processes reset the log at the same moment."""
    fixed = (
        version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    )
    return version >= (3, 7) and not fixed


def check_installation(prefix: Path | None) -> Iterator[Finding]:
    if prefix is None:
        yield note(
            "these scripts run from where they lie; hooks need a place that stays",
            "just install",
        )
        return
    record = read_record(prefix)
    if record is None:
        yield problem(f"{prefix / 'installed.json'} is damaged", "just install")
        return
    names = {name: set(digests) for name, digests in record["files"].items()}
    from hashlib import sha256

    missing = [name for name in names if not (prefix / name).exists()]
    changed = [
        name
        for name in names
        if name.startswith("runtime/")
        and name not in missing
        and sha256((prefix / name).read_bytes()).hexdigest() not in names[name]
    ]
    if missing or any(len(digests) != 1 for digests in names.values()):
        yield problem(
            f"the installation is incomplete: {', '.join(missing) or 'it was interrupted'}",
            "just install",
        )
    elif changed:
        yield note(
            f"changed since they were installed: {', '.join(changed)}",
            "just install puts them back",
        )
    else:
        yield ok(f"complete in {prefix}")


def check_state(state: Path) -> Iterator[Finding]:
    if not state.is_dir():
        yield problem(
            f"{state} is not there",
            "just install, or set TASK_QUEUE_STATE to where your queue is",
        )
        return
    owner = state.stat().st_uid
    if owner != os.getuid() and os.getuid() == 0:
        yield problem(
            f"{state} belongs to the user {user_name(owner)}, and you are root: what "
            "root's workers write "
            "there its owner cannot use",
            f"run the scripts as that user: sudo -u {sh(user_name(owner))} ...",
        )
        return
    if owner != os.getuid():
        yield problem(f"{state} belongs to another user ({user_name(owner)})", give_me(state))
    if not os.access(state, os.R_OK | os.W_OK | os.X_OK):
        yield problem(f"{state} cannot be written", f"chmod u+rwx {sh(state)}")
        return
    faults = list(check_files(state))
    yield from faults
    if (state / "tasks.db").is_symlink():
        target = os.path.realpath(state / "tasks.db")
        yield note(
            f"tasks.db is a link to {target}: workers do not hear there what other programs "
            "write, and look "
            "every few seconds",
            f"TASK_QUEUE_STATE={sh(os.path.dirname(target))}, if the file is called tasks.db there",
        )
    if not faults:
        yield ok(f"{state} is yours alone")


def check_files(state: Path) -> Iterator[Finding]:
    """Whether everything in the state is this user's, readable by this user and by nobody else."""
    foreign, closed, open_to_others = [], [], []
    for number, (path, found) in enumerate(files_of(state)):
        if number == MOST_FILES:
            break
        wanted = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
        if found.st_uid != os.getuid():
            foreign.append((path, found.st_uid))
        elif found.st_mode & wanted != wanted:
            closed.append(path)
        elif found.st_mode & 0o077:
            open_to_others.append(path)
    if foreign:
        path, owner = foreign[0]
        yield problem(
            f"{count_of(foreign)} in {state} belong to another user, the first is {path} "
            f"of {user_name(owner)} "
            "(a worker that ran as that user made them): they hinder your workers",
            give_me(state),
        )
    if closed:
        yield problem(
            f"{count_of(closed)} in {state} cannot be read and written, the first is {closed[0]}",
            f"chmod -R u+rwX {sh(state)}",
        )
    if open_to_others:
        # Behind a closed state directory only the database counts: it may be a link to elsewhere.
        reached = [
            path for path in open_to_others if path == state or path.name.startswith("tasks.db")
        ]
        names = ", ".join(path.name for path in [*reached, *open_to_others][:3])
        yield Finding(
            "problem" if reached else "note",
            f"other users may read or write {names}: tasks hold prompts and paths",
            f"chmod -R go= {sh(state)}; {command('cleanup')} does the same",
        )


def files_of(state: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files and directories of the state, but links; those of the logs last, since there may be
    many.
    """
    yield state, state.stat()
    later = []
    for entry in sorted(os.scandir(state), key=lambda entry: (entry.name == "logs", entry.name)):
        later.append(entry)
    while later:
        entry = later.pop(0)
        try:
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                continue
            yield Path(entry.path), found
            if stat.S_ISDIR(found.st_mode):
                later += os.scandir(entry.path)
        except OSError:
            # It was removed at this moment, or cannot be read, which its mode has told.
            continue


def count_of(found: list) -> str:
    return (
        plural(len(found), "file") if len(found) < MOST_FILES else f"at least {MOST_FILES:,} files"
    )


def give_me(path: Path) -> str:
    """The command that makes a path this user's, whoever made it."""
    return f"sudo chown -R {os.getuid()}:{os.getgid()} {sh(path)}"


def user_name(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"


def check_file_system(state: Path) -> Iterator[Finding]:
    kind, mount_point, options = file_system_of(os.path.realpath(state), mount_table())
    move = "put the state on a local disk: TASK_QUEUE_STATE=/a/local/directory"
    if (
        kind in NETWORK_FILE_SYSTEMS
        or re.match(r"/mnt/[a-z](/|$)", os.path.realpath(state))
        and kind in ("9p", "drvfs", "v9fs")
    ):
        yield problem(
            f"{mount_point} is {kind}, shared with another machine or system: SQLite's "
            "locks do not hold there",
            move,
        )
    elif "ro" in options:
        yield problem(f"{mount_point} is mounted read-only", "mount it for writing, or " + move)
    elif kind in ("tmpfs", "ramfs"):
        yield note(
            f"{mount_point} is {kind}: the tasks are gone after a restart of the machine",
            move,
        )
    else:
        yield ok(f"{kind or 'file system unknown'} on {mount_point or '/'}")


def mount_table() -> list[tuple[str, str, list[str]]]:
    """(mount point, kind, options) of everything that is mounted."""
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        ran = subprocess.run(
            ["/sbin/mount"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
        found = (re.match(r".* on (.+) \((\w+)(.*)\)$", line) for line in ran.stdout.splitlines())
        return [(m[1], m[2], ["ro"] if "read-only" in m[3] else []) for m in found if m]
    table = []
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        table.append(
            (
                point,
                source.split(" ")[0],
                [*fields[5].split(","), *source.split(" ")[-1].split(",")],
            )
        )
    return table


def file_system_of(
    path: str, table: list[tuple[str, str, list[str]]]
) -> tuple[str, str, list[str]]:
    """(kind, mount point, options) of the file system a path is on: the innermost mount, the last
    of equals.
    """
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
        yield problem(
            f"the disk is full, or nearly: {text}",
            f"make room: df -h {sh(existing)}; {command('cleanup')}",
        )
    elif free < SHORT_DISK_BYTES:
        yield note(f"only {text}", "make room soon")
    else:
        yield ok(text)


def check_database(state: Path) -> Iterator[Finding]:
    db = state / "tasks.db"
    if not db.exists():
        yield problem(f"{db} is not there", "just install makes it; so does the first enqueue")
        return
    # This process has no connection yet whose locks closing the file would drop.
    with open(db, "rb") as file:
        head = file.read(100)
    if head and head[:15] != b"SQLite format 3":
        yield problem(
            f"{db} is not a database",
            f"put a backup in its place: {command('restore')} FILE (it keeps {db.name} beside it)",
        )
        return
    was_in_use = database.is_in_use(database.database_file(state))
    with closing(database.open_to_read(state / "tasks.db")) as conn:
        try:
            version = conn.execute("pragma user_version").fetchone()[0]
            tables = {
                name
                for (name,) in conn.execute("select name from sqlite_master where type = 'table'")
            }
        except sqlite3.DatabaseError as error:
            yield problem(
                f"{db} cannot be read: {error}",
                f"put a backup in its place: {command('restore')} FILE",
            )
            return
        if version > q.SCHEMA_VERSION:
            yield problem(
                f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}",
                f"update them: {queue_installation.how_to_update(Path(__file__).parent)}",
            )
            return
        if (
            version == 0
            and tables - set(q.DEFAULT_QUEUES) - {"sqlite_sequence"}
            or version
            and "task_history" not in tables
        ):
            yield problem(
                f"{db} belongs to another program, or lost its tables",
                "set TASK_QUEUE_STATE to where your queue is; if that is here: "
                f"{command('restore')} FILE",
            )
            return
        if version < q.SCHEMA_VERSION:
            yield note(
                f"{db} has schema version {version}",
                f"the next enqueue or worker brings it to version {q.SCHEMA_VERSION}, tasks kept",
            )
        elif head[18:20] != b"\x02\x02":
            yield problem(
                f"{db} is not in WAL mode: readers and writers hold each other up",
                f"sqlite3 {sh(db)} 'pragma journal_mode = wal'",
            )
        found = quick_check(conn, db)
    # A worker may have started between the two looks; then the first one saw only a part.
    is_in_use = database.is_in_use(database.database_file(state))
    if found.level == "problem" and head and is_in_use and not was_in_use:
        with closing(database.open_to_read(state / "tasks.db")) as conn:
            found = quick_check(conn, db)
    yield found
    wal = Path(f"{database.database_file(state)}-wal")
    found = status_of(wal)
    if found is not None and found.st_size > LONG_WAL_BYTES:
        size = found.st_size >> 20
        yield note(
            f"{wal.name} has grown to {size} MiB: a long read holds it",
            f"fuser -v {sh(db)}",
        )


def quick_check(conn: sqlite3.Connection, db: Path) -> Finding:
    give_up = time.monotonic() + QUICK_CHECK_SECONDS
    conn.set_progress_handler(lambda: time.monotonic() > give_up, 100_000)
    restore = (
        f"put a backup in its place: {command('restore')} FILE; without one, save what can be "
        f"read: sqlite3 {sh(db)} .recover | sqlite3 recovered.db, then: {command('restore')} "
        "recovered.db"
    )
    try:
        said = [row[0] for row in conn.execute("pragma quick_check(3)")]
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        return note(
            f"the database is too large to check in {QUICK_CHECK_SECONDS:.0f} s",
            f"at a quiet hour: sqlite3 {sh(db)} 'pragma quick_check'",
        )
    except sqlite3.DatabaseError as error:
        said = [str(error)]
    finally:
        conn.set_progress_handler(None, 0)
    if said == ["ok"]:
        return ok("quick_check finds no damage")
    return problem(f"the database is damaged: {' '.join(said[0].split())}", restore)


def check_tasks(state: Path, handlers: Path, max_wait: float) -> Iterator[Finding]:
    if not (state / "tasks.db").exists():
        return
    with closing(database.open_to_read(state / "tasks.db")) as conn:
        if conn.execute("pragma user_version").fetchone()[0] != q.SCHEMA_VERSION:
            return
        queues = database.queues_of(conn)
        served = [queue for queue in queues if serving.is_served(state, queue)]
        controls = q.controls(conn)
        for queue in queues:
            runner = serving.runner_of(conn, state, queue)
            yield from check_waiting(conn, queue, max_wait, runner, controls.get(queue))
            yield from check_held(conn, queue, max_wait)
            yield from check_handed_over(conn, queue)
            since = {"queue": queue, "since": q.utc(time.time() - 86_400)}
            yield from check_without_handler(conn, queue, since, runner.handlers or handlers)
            yield from check_types(conn, queue, runner)
            failed = conn.execute(FAILED_LATELY, since).fetchone()[0]
            if failed:
                yield note(
                    f'queue "{queue}": {failed} failed for good in the last day',
                    f"{command('list')} --queue {queue} --status failed; then "
                    f"{command('retry')} --failed --queue {queue}",
                )
        if not served:
            yield from check_claims(conn, state)
        yield ok(
            f"workers serve: {', '.join(served)}" if served else "no worker runs now",
        )


def check_held(conn: sqlite3.Connection, queue: str, max_wait: float) -> Iterator[Finding]:
    """Tasks that wait for a person, who may not know it."""
    held, oldest = conn.execute(q.on_queue(HELD, queue)).fetchone()
    if oldest is not None and time.time() - oldest > max_wait:
        yield note(
            f'queue "{queue}": {held} held for a person, the oldest since {moment(oldest)} '
            f"({span(time.time() - oldest)})",
            f"{command('list')} --queue {queue} --status held; then {command('approve')} ID, or "
            f"{command('reject')} ID",
        )


def check_handed_over(conn: sqlite3.Connection, queue: str) -> Iterator[Finding]:
    """Tasks of which another machine, or the way back from there, has said nothing for long."""
    before = {"before": time.time() - HANDED_OVER_SECONDS}
    away, oldest = conn.execute(q.on_queue(HANDED_OVER, queue), before).fetchone()
    if away:
        yield note(
            f'queue "{queue}": {away} handed over to another machine for more than a day, the oldest '
            f"since {moment(oldest)} ({span(time.time() - oldest)})",
            f"is pull running, and does a machine work there? {command('relay status')}",
        )


def check_waiting(
    conn: sqlite3.Connection,
    queue: str,
    max_wait: float,
    runner: serving.Runner,
    control: Control | None,
) -> Iterator[Finding]:
    now, has_worker = time.time(), runner.kind == "worker"
    start = f"{command('work')} {queue}; or have it started: {command('service')} --enable --queue {queue}"
    ready, oldest = conn.execute(q.on_queue(OLDEST_READY, queue)).fetchone()
    overdue, due = conn.execute(q.on_queue(OVERDUE, queue), {"now": now}).fetchone()
    waiting, since = ready + overdue, min((t for t in (oldest, due) if t is not None), default=now)
    how_long = (
        f'queue "{queue}": {waiting} waiting, the oldest since {moment(since)} '
        f"({span(now - since)})"
    )
    coming = sum(serving.waiting_types(conn, queue).values())
    later = f'queue "{queue}": {coming} scheduled or blocked'
    if coming and not runner.kind:
        yield problem(
            f"{how_long if waiting else later}; no worker "
            "serves it, no unit is loaded for it, and no hook starts a worker for it",
            f"start one: {start}",
        )
    if waiting and control and control.paused:
        yield note(
            f"{how_long}; the queue is {pause_in_words(control)}",
            f"to let it go on now: {command('resume')} {queue}",
        )
    elif waiting and now - since > max_wait and control and control.slots and has_worker:
        yield problem(
            f"{how_long}, although a worker serves it: its tasks have "
            f"{plural(control.slots, 'slot')}",
            f"see what runs: {command('list')} --queue {queue} --status running; more at a time: "
            f"{command('limit')} {queue} --slots N",
        )
    elif waiting and now - since > max_wait and has_worker:
        yield problem(
            f"{how_long}, although a worker serves it",
            f"see what it does: {command('list')} --queue {queue}, and its log in state/logs; "
            f"more at a time: {command('work')} --concurrency N",
        )
    elif waiting and now - since > max_wait and runner.kind:
        yield problem(
            f"{how_long}, and no worker serves it",
            f"start one: {start}; or see to whoever else should take them",
        )


def check_without_handler(
    conn: sqlite3.Connection, queue: str, since: dict, handlers: Path
) -> Iterator[Finding]:
    """Tasks that wait or failed lately since no handler serves their type, while none does."""
    told = {**since, "begins": NO_HANDLER_BEGINS}
    for name, waiting, dead, error in conn.execute(q.on_queue(NO_HANDLER, queue), told).fetchall():
        if serving.has_handler(handlers, name):
            continue
        which = f"{queue} --type {sh(name)}"
        remedies = [
            f"there are handlers for: {', '.join(serving.handlers_in(handlers)) or 'nothing'}",
            f"put an executable of that name into {handlers}, or have a worker that serves {queue} "
            f"run one command for all: {command('work')} {queue} -- COMMAND",
            f"to see them: {command('list')} --queue {which}",
        ]
        if dead:
            remedies.append(
                f"then run again what has failed: {command('retry')} --failed --queue {which}"
            )
        if waiting:
            remedies.append(f"if nobody wants them: {command('purge')} {which}")
        # What follows is the remedy, which is said here at greater length.
        reason = error.partition(": ")[0]
        failed = f", {dead} of them failed for good in the last day" if dead else ""
        yield problem(
            f'queue "{queue}": {waiting + dead} of type {name!r} cannot run{failed}: {reason}',
            "; ".join(remedies),
        )


def check_types(conn: sqlite3.Connection, queue: str, runner: serving.Runner) -> Iterator[Finding]:
    """Waiting tasks, not tried yet, whose type has no handler."""
    for line in serving.unhandled_types(set(serving.untried_types(conn, queue)), runner):
        yield problem(
            f'queue "{queue}": {line}',
            f"put an executable of that name into {runner.handlers}, or end the tasks: "
            f"{command('list')} --queue {queue}, then {command('cancel')} ID",
        )


def check_claims(conn: sqlite3.Connection, state: Path) -> Iterator[Finding]:
    """Claims of dead owners that no running worker will recover; a handler that still runs keeps
    its task."""
    dead: dict[tuple[str, str], list[q.Task]] = {}
    for queue, task in database.claims(conn):
        if owners.is_dead(state, task.owner) and not owners.look_at_run(state, task)[1]:
            dead.setdefault((queue, task.owner or q.NOBODY), []).append(task)
    for (queue, owner), tasks in sorted(dead.items()):
        # A shell may have written a text there.
        times = [task.claimed_at for task in tasks if isinstance(task.claimed_at, float)]
        since = min(times, default=None)
        by = (
            f"by {owner}, which has died"
            if owner != q.NOBODY
            else "by nobody (by hand, or by another program)"
        )
        yield problem(
            f'queue "{queue}": {len(tasks)} claimed '
            f"{f'at {moment(since)} ' if since is not None else ''}{by}",
            f"any worker takes them back: {command('work')} {queue}; so does {command('cleanup')}",
        )


def moment(seconds: float) -> str:
    """A time of the database's, which may be any number."""
    try:
        return f"{q.utc(seconds)} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s after 1970"


def check_spool(state: Path) -> Iterator[Finding]:
    if not (state / "spool").is_dir():
        yield ok("empty")
        return
    faults, spooled = [], 0
    with os.scandir(state / "spool") as entries:
        directories = sorted(
            Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)
        )
    for directory in directories:
        try:
            waiting, found = check_spool_of(directory)
        except OSError as error:
            mine = directory.lstat().st_uid == os.getuid()
            remedy = f"chmod -R u+rwX {sh(directory)}" if mine else give_me(directory)
            waiting, found = (
                0,
                [problem(f"{directory} cannot be read: {error.strerror}", remedy)],
            )
        spooled, faults = spooled + waiting, faults + found
    yield from faults
    if not faults and not spooled:
        yield ok("empty")


def status_of(file: os.DirEntry | Path) -> os.stat_result | None:
    """What os.stat() says of a file; None for one that has gone since it was listed."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def check_spool_of(directory: Path) -> tuple[int, list[Finding]]:
    """(how many tasks wait in a queue's spool, what is wrong with it)."""
    with os.scandir(directory) as entries:
        files = [
            entry
            for entry in entries
            if entry.is_file(follow_symlinks=False) and not entry.name.startswith(".")
        ]
    try:
        q.check_queue_name(directory.name)
    except q.InvalidTask as error:
        remedy = f"mv its files into the right directory beside it, then rmdir {sh(directory)}"
        return len(files), [problem(f"{directory}: {error}", remedy)]
    found = []
    for entry in files:
        if not is_utf8(entry.name):
            new = directory / f"{re.sub('[^a-zA-Z0-9._-]', '_', entry.name)}"
            found.append(
                problem(
                    f"{entry.path}: its name is not UTF-8",
                    f"mv {sh(entry.path)} {sh(new)}",
                )
            )
    # A worker may be taking them in at this moment.
    written = [file.st_mtime for entry in files if (file := status_of(entry)) is not None]
    oldest = time.time() - min(written, default=time.time())
    if oldest > SPOOL_TOO_OLD_SECONDS:
        found.append(
            problem(
                f"{directory} is not draining: {len(files)} tasks, the oldest for {span(oldest)}",
                f"{command('work')} {directory.name} takes them in; so does {command('cleanup')}, "
                "which says what hinders it",
            )
        )
    malformed = sorted((directory / "malformed").glob("*"))
    for path in malformed[:MALFORMED_SHOWN]:
        why = why_set_aside(path) or "it could not be taken in; it could be now"
        found.append(
            problem(
                f"{path} is no task: {visible(why)}",
                f"mend the hook that wrote it; then mend the file and mv it to {sh(directory)}, or remove it",
            )
        )
    if len(malformed) > MALFORMED_SHOWN:
        found.append(
            problem(
                f"{len(malformed) - MALFORMED_SHOWN} more in {directory / 'malformed'} are no tasks",
                "mend them and mv them one directory up, or remove them",
            )
        )
    return len(files), found


def check_handlers(directory: Path) -> Iterator[Finding]:
    if not directory.is_dir():
        yield note(
            f"{directory} is not there: workers need --handlers or a command",
            "just install",
        )
        return
    handlers = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith((".", "_"))
    ]
    reach = os.pathsep.join(
        [
            os.environ.get("PATH", ""),
            GUI_PATH,
            os.path.expanduser("~/.local/bin"),
            os.path.expanduser("~/.cargo/bin"),
            "/opt/homebrew/bin",
            os.path.dirname(os.environ.get("UV", "")),
        ]
    )
    fine = []
    for path in handlers:
        if not os.access(path, os.X_OK):
            # Other files in there are data, and no handlers.
            with open(path, "rb") as file:
                if file.read(2) == b"#!":
                    yield problem(f"{path} is not executable", f"chmod +x {sh(path)}")
            continue
        fault = fault_of(path, reach)
        if fault:
            yield problem(f"{path} {fault[0]}", fault[1])
        else:
            fine.append(path.name)
    yield Finding("ok" if fine else "note", f"{', '.join(fine) or 'none'} in {directory}")


def check_plugin() -> Iterator[Finding]:
    """Whether Claude Code's plugin and the installation know the same version of the database."""
    installation = queue_installation.installed()
    ours = installation and queue_installation.schema_version(installation.lib)
    for name, path in queue_installation.plugins().items():
        theirs = queue_installation.schema_version(path) or 0
        if ours is None or ours == theirs:
            yield ok(f"{name} in {path}")
            continue
        older = path if theirs < ours else installation.lib
        yield problem(
            f"the plugin {name} knows schema version {theirs}, the installation {ours}: the tasks of"
            " the plugin's hooks go to the spool, and it tells of nothing",
            queue_installation.how_to_update(older),
        )


def check_environment(prefix: Path | None) -> Iterator[Finding]:
    """Whether a worker that nobody starts by hand can start, and has this terminal's account."""
    if prefix is None:
        return
    file = prefix / "environment"
    try:
        environ = environment.of_worker(file)
    except environment.Unfit as error:
        yield problem(f"no worker starts: {error}", "mend that line")
        return
    uv, worker = environment.find_uv(environ), prefix / "runtime/lib/worker.py"
    # Whether uv's cache still has what install put in.
    command = [uv or "uv", "run", "-qq", "--offline", "--no-config", "--script", str(worker)]
    if not runs([*command, "--version"], environ):
        yield problem(
            "without a network no worker starts: uv, or what uv's cache had for it, is gone",
            "just install",
        )
    differing = environment.differences(file, os.environ)
    if differing:
        yield note(
            f"workers that hooks start and this terminal differ in {', '.join(differing)}",
            f"edit {file}",
        )


def check_hook(place: Place) -> Iterator[Finding]:
    settings = (
        Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude") / "settings.json"
    )
    try:
        root = json.loads(settings.read_bytes().decode())
    except FileNotFoundError:
        yield note(f"{settings} is not there, so there is no hook", "just install --hook yes")
        return
    except (ValueError, RecursionError) as error:
        yield problem(
            f"{settings} is not valid JSON ({error}): Claude Code ignores all of it",
            "mend it, or take back a backup",
        )
        return
    if not is_of_known_shape(root):
        yield problem(
            f"{settings}: its hooks are not of the shape Claude Code reads",
            "mend it, or take back a backup",
        )
        return
    found = [*our_hooks(root), *(our_hooks(root, place.prefix) if place.prefix else ())]
    ours = [hook for hook in hooks_in(root) if any(hook[2] is one[2] for one in found)]
    if not ours and queue_installation.plugins():
        yield ok(f"the plugin's; none of the queue's is in {settings}")
        return
    if not ours:
        yield note(f"no hook of the queue is in {settings}", "just install --hook yes")
        return
    if root.get("disableAllHooks") is True:
        yield problem(f"{settings} has disableAllHooks: no hook runs", "set it to false")
    faults = [
        fault
        for event, _, _, words in ours
        for fault in check_hook_command(event, words, settings, place)
    ]
    yield from faults
    if not faults:
        yield ok(f"in {settings}: {', '.join(dict.fromkeys(event for event, *_ in ours))}")


def is_of_known_shape(root: object) -> bool:
    """Whether parsed settings have their hooks as Claude Code reads them."""
    hooks = root.get("hooks", {}) if isinstance(root, dict) else None
    return isinstance(hooks, dict) and all(
        isinstance(groups, list)
        and all(isinstance(group, dict) and is_list_of_hooks(group) for group in groups)
        for groups in hooks.values()
    )


def is_list_of_hooks(group: dict) -> bool:
    listed = group.get("hooks", [])
    return isinstance(listed, list) and all(isinstance(hook, dict) for hook in listed)


def path_of(word: str) -> str:
    """A word of a hook as a path: a shell would expand these two."""
    return os.path.expanduser(re.sub(r"^\$(HOME\b|\{HOME\})", "~", word))


def check_hook_command(
    event: str, words: list[str], settings: Path, place: Place
) -> Iterator[Finding]:
    if event == NOT_FOR_THE_QUEUE:
        yield problem(
            f"the {event} hook is the queue's: Claude Code expects that hook to make the "
            "worktree and print its path, "
            "so every worktree fails",
            f"take it out of {settings}, or put the queue's command into the end of your own",
        )
    command = " ".join(words)
    for program in dict.fromkeys(
        re.findall(r"(?<![\w/.-])(uv|python3|sqlite3|bash)(?=\s)", command)
    ):
        if not shutil.which(program, path=GUI_PATH):
            yield problem(
                f"the {event} hook calls {program}, which is not on the PATH of programs "
                "that no shell started",
                f"write its absolute path: {shutil.which(program) or program}",
            )
    for path in dict.fromkeys(path_of(word) for word in words):
        if path.startswith("/") and not path.startswith("/dev/") and not os.path.exists(path):
            yield problem(
                f"the {event} hook needs {path}, which is not there",
                "just install, or take the hook out",
            )
        elif place.prefix and os.path.realpath(path) == os.path.realpath(
            place.prefix / "runtime/hook"
        ):
            yield from check_interpreters(place)


def check_interpreters(place: Place) -> Iterator[Finding]:
    """Whether what the installed hook calls still exists; each stands in for the other."""
    if not place.record:
        return
    hook = place.prefix / "runtime/hook"
    try_out = {
        "python": ["-I", "-c", "import sys, sqlite3; sys.exit(sys.version_info < (3, 11))"],
        "uv": ["--version"],
    }
    paths = {name: place.record.get(name) or "" for name in try_out}
    gone = [name for name, arguments in try_out.items() if not runs([paths[name], *arguments])]
    if len(gone) == 2:
        yield problem(
            f"{hook} finds neither Python 3.11 nor uv: tasks go to the spool",
            "install uv, then: just install",
        )
    elif gone:
        yield note(
            f"{hook} can do without {gone[0]}, which has gone ({paths[gone[0]] or 'it never was'})",
            "just install",
        )
    state = place.record.get("state")
    if state and os.path.realpath(state) != os.path.realpath(q.STATE_DIR):
        yield note(
            f"the hook's tasks go to {state}; this looks at {q.STATE_DIR}",
            f"TASK_QUEUE_STATE={sh(state)} {command('doctor')}",
        )
    if not os.access(place.prefix / "runtime/lib/enqueue.py", os.R_OK):
        yield problem(f"{hook} finds no enqueue.py: tasks go to the spool", "just install")


def runs(command: list[str], environ: Mapping[str, str] | None = None) -> bool:
    try:
        return (
            subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=10,
                env=environ,
                cwd="/",
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def check_inotify() -> Iterator[Finding]:
    """Whether one more process could watch files, as every worker wants to; it polls when it
    cannot.
    """
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if not limit.exists():
        yield ok("not limited here")
        return
    import ctypes

    fd = ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        yield problem(
            f"{os.strerror(ctypes.get_errno())}: workers cannot be woken by file events, and poll",
            "sudo sysctl fs.inotify.max_user_instances=1024",
        )
        return
    os.close(fd)
    most, watches = int(limit.read_text()), int(limit.with_name("max_user_watches").read_text())
    used = inotify_instances()
    if used > 0.8 * most or watches < 1024:
        yield note(
            f"{used} of {most} inotify instances are in use, {watches} watches are allowed",
            "sudo sysctl fs.inotify.max_user_instances=1024 fs.inotify.max_user_watches=65536",
        )
    else:
        yield ok(f"{used} of {most} inotify instances are in use")


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
