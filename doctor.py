#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Say what is wrong with the queue, each with its remedy. Changes nothing.

    doctor.py
    doctor.py --max-wait 1h                 a task may wait so long before that is a problem
    doctor.py --json                        for scripts

tasks.py doctor is the same command. Exit codes: 0 nothing is wrong; 1 something is (notes do not count); 64 usage.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import queue_cli as cli
import queue_helpers as q
from queue_cli import sh, span

MAX_WAIT_SECONDS = 600.0
SPOOL_TOO_OLD_SECONDS = 60.0  # a worker takes spooled tasks in at once
QUICK_CHECK_SECONDS = 20.0
LOW_DISK_BYTES, SHORT_DISK_BYTES = 50 * 2**20, 2**30
LONG_WAL_BYTES = 256 * 2**20
GUI_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"  # what programs get that no shell started
NETWORK_FILE_SYSTEMS = {"9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "glusterfs",
                        "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "osxfuse", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs",
                        "webdav"}  # fmt: skip

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


class Finding(NamedTuple):
    """What a check yields."""

    level: str  # ok, note or problem
    what: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("doctor.py", __doc__)
    parser.add_argument("--max-wait", metavar="AGE", type=cli.duration, default=MAX_WAIT_SECONDS,
                        help=f"how long a task may wait before that is a problem (default {span(MAX_WAIT_SECONDS)})")  # fmt: skip
    parser.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
    args = parser.parse_args(argv)
    return cli.run("doctor.py", lambda: doctor(args.max_wait, args.as_json))


def doctor(max_wait: float, as_json: bool) -> int:
    """Print what every check finds. 1 when one of them is a problem."""
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
    cli.report(as_json, {"ok": not problems, "state": str(state), "findings": listed}, "\n".join(lines))
    return 1 if problems else 0


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
    was_in_use = cli.is_in_use(cli.database_file(state))
    with closing(cli.open_to_read(state / "tasks.db")) as conn:
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
    if found.level == "problem" and head and not was_in_use and cli.is_in_use(cli.database_file(state)):  # a worker started under our eyes
        with closing(cli.open_to_read(state / "tasks.db")) as conn:
            found = quick_check(conn, db)
    yield found
    wal = Path(f"{cli.database_file(state)}-wal")
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
    with closing(cli.open_to_read(state / "tasks.db")) as conn:
        if conn.execute("pragma user_version").fetchone()[0] != q.SCHEMA_VERSION:
            return
        now, dead, served = time.time(), set(), []
        for (queue,) in conn.execute(q.QUEUES).fetchall():
            ready, oldest = q.execute(conn, OLDEST_READY, queue).fetchone()
            overdue, due = q.execute(conn, OVERDUE, queue, now=now).fetchone()
            waiting, since = ready + overdue, min((t for t in (oldest, due) if t is not None), default=now)
            has_worker = cli.is_locked(cli.serving_lock(state, queue))
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
                if not cli.owner_is_alive(state, owner):
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
