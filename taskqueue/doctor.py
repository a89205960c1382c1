"""`tq doctor`: say what is wrong with the queue, and what mends it. It changes nothing.

Each check is a function that yields findings; CHECKS lists them in the order in which they run.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import (
    environment,
    every,
    installation,
    notify,
    outcome,
    recovery,
    service,
    serving,
    spool,
)
from taskqueue.cli import put_json
from taskqueue.control import Control, controls_of
from taskqueue.database import claims, database_file, is_in_use, open_to_read, queues_of
from taskqueue.installation import Installation, installed
from taskqueue.remedies import command, lets_go_on
from taskqueue.running import fault_of
from taskqueue.settings import (
    LINK_CHECK,
    REPORT,
    WAKE,
    Hook,
    claude_version,
    has_wake,
    hooks_in,
    our_hooks,
    why_no_wake,
)
from taskqueue.text import pause_in_words, plural, sh, span, visible

DAY_SECONDS = 86_400.0
# A worker takes a spooled file in at once.
SPOOL_SECONDS = 60.0
# How long to look for damage in a large database.
DAMAGE_SECONDS = 20.0
PROGRAM_SECONDS = 10.0
LOW_DISK_BYTES = 50 * 2**20
LONG_WAL_BYTES = 64 * 2**20
MALFORMED_SHOWN = 5
# How many files of the state to look at, the logs last.
MOST_FILES = 50_000
# What puts scripts in place again, wherever a person is.
REINSTALL = "in a checkout of the queue: just install"
# The PATH of bin/hook.sh.
HOOK_PATH = "/usr/bin:/bin"
# A script's PEP 723 header names packages.
DEPENDS = re.compile(rb"^# dependencies = \[.+\]$", re.MULTILINE)

WAITING = """
select count(*), min(iif(status = 3, due_at, timestamp)) from "{queue}"
where status < 2 or status = 3 and due_at <= :now"""
HELD = """
select count(*), min(timestamp) from "{queue}" where status = 3 and due_at is null"""
# A task whose time has not come is not late on another machine either.
HANDED_OVER = """
select count(*), min(since) from (
  select max(coalesce(claimed_at, timestamp), coalesce(due_at, 0)) as since from "{queue}" where status = 5)
where since <= :a_day_ago"""
TYPES = f"""
select task_type, sum(not dead), sum(dead) from (
  select task_type, 0 as dead from "{{queue}}" where {serving.IS_WAITING}
  union all
  select task_type, 1 from task_history where queue = '{{queue}}' and status = 'failed'
    and completed_at > :since and substr(error, 1, length(:begins)) = :begins)
group by task_type order by task_type"""
FAILED_LATELY = """
select count(*) from task_history where queue = '{queue}' and status = 'failed' and completed_at > :since"""


class Finding(NamedTuple):
    level: str  # ok, note or problem
    message: str
    remedy: str


Findings = Iterator[Finding]


class Place(NamedTuple):
    """A state to look at, and the installation whose hooks and units use it."""

    state: Path
    installation: Installation | None
    max_wait: float  # seconds that a task may wait

    @property
    def database(self) -> Path:
        return self.state / "tasks.db"


def problem(message: str, remedy: str) -> Finding:
    return Finding("problem", message, remedy)


def note(message: str, remedy: str) -> Finding:
    return Finding("note", message, remedy)


def fact(message: str) -> Finding:
    """Return what is good to know, and asks for nothing."""
    return Finding("ok", message, "")


def examine(max_wait: float, as_json: bool) -> int:
    """Print what each check finds. Return 1 if one of the findings is a problem, else 0."""
    place = Place(q.STATE_DIR, installed(q.__file__) or installed(), max_wait)
    found = [(name, finding) for name in CHECKS for finding in run(name, place)]
    counts = {level: sum(f.level == level for _, f in found) for level in ("problem", "note")}
    if as_json:
        listed = [
            {"check": name, "level": f.level, "message": f.message, "remedy": f.remedy or None}
            for name, f in found
        ]
        ok = not counts["problem"]
        put_json({"ok": ok, "state": str(place.state), "findings": listed})
        return 1 if counts["problem"] else 0
    for name, finding in found:
        print(f"{finding.level:<8} {name}{visible(finding.message and f': {finding.message}')}")
        if finding.remedy:
            print(f"         -> {visible(finding.remedy)}")
    total = (plural(count, noun) if count else f"no {noun}s" for noun, count in counts.items())
    print(f"{', '.join(total)} ({visible(str(place.state))})")
    return 1 if counts["problem"] else 0


def run(name: str, place: Place) -> list[Finding]:
    """Return a check's findings; an error that ends the check is one of them."""
    found = []
    try:
        for finding in CHECKS[name](place):
            found.append(finding)
    # SQLite's message may quote the bytes of a damaged schema.
    except (OSError, sqlite3.Error, UnicodeDecodeError, subprocess.TimeoutExpired) as error:
        found.append(problem(f"could not be checked: {error}", "mend that first"))
    return found or [Finding("ok", "", "")]


# -------------------------------------------------------------------------------- the installation


def check_installation(place: Place) -> Findings:
    if place.installation is None:
        if not installation.plugins():
            yield note("nothing is installed: hooks need scripts that stay in place", REINSTALL)
        return
    prefix, record = place.installation.prefix, place.installation.record
    files = record["files"]
    there = {name: installation.digest_there(prefix / name) for name in files}
    missing = [name for name in files if there[name] is None]
    changed = [n for n in files if n.startswith("runtime/") and there[n] not in (None, *files[n])]
    if missing or any(len(digests) != 1 for digests in files.values()):
        which = ", ".join(missing) or "an install was interrupted"
        yield problem(f"the installation is incomplete: {which}", REINSTALL)
    elif changed:
        yield note(f"changed since they were installed: {', '.join(changed)}", REINSTALL)
    gone = [name for name in ("python", "uv") if not os.access(record.get(name) or "", os.X_OK)]
    if gone:
        level = "problem" if len(gone) == 2 else "note"
        told = f"{' and '.join(gone)} gone from where install found them: hooks look elsewhere"
        yield Finding(level, told, f"{REINSTALL}; if there is no uv: python3 -m pip install uv")


def check_python(place: Place) -> Findings:
    """Say which Python runs what, and why that one."""
    record = place.installation.record if place.installation else {}
    python = record.get("python") or sys.executable
    if not os.access(python, os.X_OK):
        return
    ask = [python, "-I", "-c", "import platform; print(platform.python_version())"]
    ran = subprocess.run(ask, timeout=PROGRAM_SECONDS, capture_output=True, text=True, check=False)
    told = f"{python} ({ran.stdout.strip()}) runs commands and reports"
    if record.get("python"):
        told += ", the first of the system's from 3.11 on, as updates keep its path"
    if os.access(packages := record.get("packages") or "", os.X_OK):
        told += f"; workers run {packages}, which uv made with their packages"
    yield fact(told)


def check_plugin(place: Place) -> Findings:
    """Compare the versions of Claude Code's plugin and of the installation."""
    if place.installation is None:
        return
    lib = place.installation.lib
    ours = installation.schema_version(lib) or 0
    for name, path in installation.plugins().items():
        theirs = installation.schema_version(path) or 0
        if ours != theirs:
            yield problem(
                f"the plugin {name} knows schema version {theirs}, the installation {ours}: the"
                " older one cannot use the database, and its tasks stay in the spool",
                installation.how_to_update(path if theirs < ours else lib),
            )


def check_hook(place: Place) -> Findings:
    file = installation.settings_file()
    try:
        settings = json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError as error:
        yield problem(f"{file} is not valid JSON ({error}): Claude Code ignores it", "mend it")
        return
    hooks = list(our_hooks(settings))
    if not hooks and not any("tasks.db" in " ".join(words) for *_, words in hooks_in(settings)):
        if not installation.plugins():
            yield note(f"no hook of the queue is in {file}", command("install --hook yes"))
    elif settings.get("disableAllHooks") is True:
        yield problem(f"{file} has disableAllHooks: no hook runs", "set it to false")
    for found in hooks:
        yield from check_prefix(found, file, place.installation)
    state = place.installation and place.installation.record.get("state")
    if state and os.path.realpath(state) != os.path.realpath(place.state):
        look = f"TASK_QUEUE_STATE={sh(state)} {command('doctor')}"
        yield note(f"the hooks' tasks go to {state}; this looks at {place.state}", look)


def check_prefix(found: Hook, file: Path, here: Installation | None) -> Findings:
    """Say where a hook leads that does not run this installation."""
    told = f"the {found.event} hook in {file} runs {found.prefix}"
    offers = (offer for offer in (LINK_CHECK, REPORT, WAKE) if offer.is_like(found.purpose))
    option = next(
        (f"{command(f'install --{offer.option} yes')} replaces it; or " for offer in offers), ""
    )
    if not (found.prefix / "runtime/hook").exists():
        yield problem(f"{told}, which is gone", f"{option}take it out by hand")
    elif here and found.prefix != here.prefix.resolve():
        see = f"see its tasks: {sh(found.prefix / 'runtime/tq')} list"
        yield note(f"{told}, not {here.prefix}", f"{option}{see}")


def check_wake(place: Place) -> Findings:
    """Compare the version of Claude Code with those that take the wake-up's exit status as one."""
    file = installation.settings_file()
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return
    if not has_wake(settings):
        return
    why = why_no_wake(claude_version())
    if why:
        yield problem(
            f"{why}: another version may take exit status 2 of its hook as a block",
            f"{command('install --wake no')} takes the hook out",
        )


def check_sync(place: Place) -> Findings:
    """Ask a hook's `sync` for a file that is not there: it refuses, if it takes files at all."""
    words = ["/bin/sh", "-c", 'PATH=$1; sync "$2"', "sh", HOOK_PATH, place.state / "no such file"]
    if succeeds(words):
        yield fact(
            "`sync` takes no files here: a power cut may lose what hooks left in the last seconds,"
            f" but nothing of {command('add')} or Python"
        )


def succeeds(words: list, **options) -> bool:
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": False}
    return subprocess.run(words, timeout=PROGRAM_SECONDS, **quiet, **options).returncode == 0


def check_environment(place: Place) -> Findings:
    """Compare workers that hooks and the service start with those that this terminal starts."""
    if place.installation is None:
        return
    file = service.environment_file(place.installation.lib)
    try:
        env = environment.of_worker(file)
    except environment.Unfit as error:
        yield problem(f"{error}", "until it is mended, no hook and no service starts a worker")
        return
    if told := env.get(notify.COMMAND):
        try:
            notify.program(told, env["PATH"])
        except ValueError as error:
            mend = f"mend {notify.COMMAND} in {file}; then: {command('notify --test')}"
            yield problem(f"workers tell nobody what fails: {error}", mend)
    lacking, different = environment.differences(file, os.environ)
    begins = "workers that hooks and the service start"
    if lacking:
        told = f"{begins} lack what is set here: {', '.join(lacking)}"
        yield note(told, f"{command('install --environment yes')} puts it into {file}")
    if different:
        yield note(
            f"{begins} have another {', '.join(different)} than this terminal", f"edit {file}"
        )
    missing = ", ".join(not_in_cache(place.installation, env))
    if missing:
        told = f"without a network these do not start, since uv's cache lacks what they need: {missing}"
        yield problem(told, f"with a network: {command('install')}")


def not_in_cache(place: Installation, env: dict[str, str]) -> list[str]:
    """Return the names of scripts and handlers that uv cannot run without a network."""
    uv = environment.find_uv(env)
    if uv is None:
        return []
    ask = [uv, "sync", "--offline", "--dry-run", "--no-config", "--script"]
    scripts = [place.lib / "worker.py", place.lib / "tasks.py"]
    scripts += [place.handlers / name for name in serving.handlers_in(place.handlers)]
    need = [script for script in scripts if script.is_file() and DEPENDS.search(head_of(script))]
    return [script.name for script in need if not succeeds([*ask, script], cwd="/", env=env)]


def head_of(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(4096)


def check_handlers(place: Place) -> Findings:
    directory = serving.default_handlers(q.__file__)
    if not directory.is_dir():
        yield note(f"{directory} is not there: workers need --handlers or a command", REINSTALL)
    path = f"{os.environ.get('PATH', '')}:{environment.defaults(str(Path.home()))['PATH']}"
    for handler in sorted(directory.glob("[!._]*")):
        if not handler.is_file():
            continue
        if not os.access(handler, os.X_OK):
            # Other files in there are the handlers' data.
            if head_of(handler)[:2] == b"#!":
                yield problem(f"{handler} is not executable", f"chmod +x {sh(handler)}")
        elif fault := fault_of(handler, path):
            yield problem(f"{handler} {fault[0]}", fault[1])


# --------------------------------------------------------------------------------------- the state


def check_state(place: Place) -> Findings:
    state, me = place.state, os.getuid()
    if not state.is_dir():
        mend = f"{command('install')}, or set TASK_QUEUE_STATE to where your queue is"
        yield problem(f"{state} is not there", mend)
        return
    owner = user(state)
    if me == 0 and state.stat().st_uid != me:
        theirs = f"{owner} could not use what root's workers write there"
        run_as = f"run commands as that user: sudo -u {sh(owner)} ..."
        yield problem(f"{state} belongs to {owner}, and you are root: {theirs}", run_as)
        return
    files = list(islice(files_of(state), MOST_FILES))
    foreign = [path for path, found in files if found.st_uid != me]
    modes = {path: found.st_mode for path, found in files if found.st_uid == me}
    wanted = {path: 0o700 if stat.S_ISDIR(mode) else 0o600 for path, mode in modes.items()}
    closed = [path for path, mode in modes.items() if mode & wanted[path] != wanted[path]]
    seen = [path for path, mode in modes.items() if mode & 0o077]
    if foreign:
        yield problem(
            f"{plural(len(foreign), 'file')} in {state} belong to another user, the first is"
            f" {foreign[0]} of {user(foreign[0])}: a worker of that user made them",
            f"sudo chown -R {me}:{os.getgid()} {sh(state)}",
        )
    if closed:
        first = f"the first is {closed[0]}"
        count = plural(len(closed), "file")
        mend = f"chmod -R u+rwX {sh(state)}"
        yield problem(f"{count} in {state} cannot be read and written, {first}", mend)
    if seen:
        # A closed state directory keeps others from all that is in it, but not from what a link
        # leads to.
        level = "problem" if {state, place.database} & {*seen} else "note"
        names = ", ".join(path.name for path in seen[:3])
        told = f"other users may read or write {names}: tasks hold prompts and paths"
        yield Finding(level, told, f"chmod -R go= {sh(state)}")


def files_of(state: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the state directory and all below it but symbolic links, the logs last."""
    yield state, state.stat()
    for directory, names, files in os.walk(state):
        names.sort(key="logs".__eq__)
        for path in (Path(directory, name) for name in (*files, *names)):
            # A worker may remove it at this moment.
            with suppress(FileNotFoundError):
                found = path.lstat()
                if not stat.S_ISLNK(found.st_mode):
                    yield path, found


def user(path: Path) -> str:
    number = path.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"#{number}"


def check_disk(place: Place) -> Findings:
    there = next(path for path in (place.state, *place.state.parents) if path.exists())
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    if free < LOW_DISK_BYTES:
        mend = f"make room: df -h {sh(there)}; {command('cleanup')}"
        yield problem(f"the disk is full, or nearly: {free >> 20} MiB are free", mend)


# ------------------------------------------------------------------------------------ the database


def check_database(place: Place) -> Findings:
    db, file = place.database, database_file(place.state)
    if not db.exists():
        yield problem(
            f"{db} is not there", f"{command('install')} makes it; so does the first task"
        )
        return
    was_in_use = is_in_use(file)
    found = look_at(db)
    if found and is_in_use(file) != was_in_use:
        # A worker has started or left meanwhile, and this look saw only a part.
        found = look_at(db)
    if found:
        yield found
    wal = Path(f"{file}-wal")
    if wal.exists() and wal.stat().st_size > LONG_WAL_BYTES:
        grown = f"{wal.name} has grown to {wal.stat().st_size >> 20} MiB"
        yield note(f"{grown}: a long read keeps it so", f"see who reads: fuser -v {sh(file)}")


def look_at(db: Path) -> Finding | None:
    """Return what is wrong with a database: with its version, its tables or its pages."""
    restore = f"put a backup in its place: {command('restore')} FILE"
    try:
        with closing(open_to_read(db)) as conn:
            version = conn.execute("pragma user_version").fetchone()[0]
            tables = {row[0] for row in conn.execute("select name from sqlite_master")}
            if version > q.SCHEMA_VERSION:
                told = f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}"
                here = Path(q.__file__).parent
                return problem(told, f"update them: {installation.how_to_update(here)}")
            bare = {*q.DEFAULT_QUEUES, "sqlite_sequence"}
            if "task_history" not in tables if version else tables - bare:
                told = f"{db} belongs to another program, or has lost its tables"
                mend = f"set TASK_QUEUE_STATE to where your queue is, or {restore}"
                return problem(told, mend)
            if version < q.SCHEMA_VERSION:
                told = (
                    f"{db} has schema version {version}: the next task or worker makes it version"
                )
                return fact(f"{told} {q.SCHEMA_VERSION}, and keeps all tasks")
            return look_for_damage(conn, db)
    except sqlite3.OperationalError:
        # It is locked or cannot be opened, and that is no damage.
        raise
    # SQLite's message may quote the bytes of a damaged schema.
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        rescue = f"sqlite3 {sh(db)} .recover | sqlite3 recovered.db, then: {command('restore')}"
        mend = f"{restore}; without one, save what can be read: {rescue} recovered.db"
        return problem(f"{db} is damaged or no database: {error}", mend)


def look_for_damage(conn: sqlite3.Connection, db: Path) -> Finding | None:
    """Check the pages of a database. Raises DatabaseError where they are damaged."""
    give_up = time.monotonic() + DAMAGE_SECONDS
    conn.set_progress_handler(lambda: time.monotonic() > give_up, 100_000)
    try:
        said = conn.execute("pragma quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        told = f"{db} is too large to check for damage in {DAMAGE_SECONDS:.0f} s"
        return note(told, f"at a quiet hour: sqlite3 {sh(db)} 'pragma quick_check'")
    if said != "ok":
        raise sqlite3.DatabaseError(" ".join(said.split()))
    return None


# --------------------------------------------------------------------------------------- the spool


def check_spool(place: Place) -> Findings:
    for directory in spool.spool_directories(place.state):
        try:
            q.check_queue_name(directory.name)
        except q.InvalidTask as error:
            mend = f"mv its files into the right directory beside it, then rmdir {sh(directory)}"
            yield problem(f"{directory}: {error}", mend)
            continue
        files, complaints = spool.look_through(directory)
        for complaint in complaints:
            message, _, mend = complaint.partition("; ")
            yield problem(message, mend)
        waited = time.time() - files[0].mtime_ns / 1e9 if files else 0.0
        if waited > SPOOL_SECONDS:
            told = f"{plural(len(files), 'task')}, the oldest for {span(waited)}"
            mend = f"{command('take-in')} takes them in, or says what hinders it"
            yield problem(f"{directory} is not draining: {told}", mend)
        yield from check_malformed(directory, sorted((directory / spool.SET_ASIDE).glob("*")))


def check_malformed(directory: Path, files: list[Path]) -> Findings:
    """Say why each file that was set aside is no task."""
    mend = f"mend the hook that wrote it; then mend the file and mv it to {sh(directory)}, or remove it"
    for path in files[:MALFORMED_SHOWN]:
        why = spool.why_set_aside(path) or "it could not be taken in; it could be now"
        yield problem(f"{path} is no task: {why}", mend)
    if files[MALFORMED_SHOWN:]:
        more = f"{len(files) - MALFORMED_SHOWN} more in {directory / spool.SET_ASIDE} are no tasks"
        yield problem(more, "mend and mv them, or remove them")


# --------------------------------------------------------------------------------------- the tasks


def check_tasks(place: Place) -> Findings:
    if not place.database.exists():
        return
    with closing(open_to_read(place.database)) as conn:
        if conn.execute("pragma user_version").fetchone()[0] != q.SCHEMA_VERSION:
            return
        queues, recurring = queues_of(conn), every.types(conn)
        for queue in queues:
            runner = serving.runner_of(conn, place.state, queue)
            control = controls_of(conn).get(queue)
            for finding in (
                *check_waiting(conn, queue, runner, control, place.max_wait),
                *check_held(conn, queue, place.max_wait),
                *check_handed_over(conn, queue),
                *check_types(conn, queue, runner),
                *(check_recurring(queue, runner) if queue in recurring else ()),
                *check_failed(conn, queue),
            ):
                yield finding._replace(message=f'queue "{queue}": {finding.message}')
        if not any(serving.is_served(place.state, queue) for queue in queues):
            yield from check_claims(conn, place.state)


def since(moment: float) -> str:
    return f"the oldest since {q.utc(moment)} UTC ({span(time.time() - moment)})"


def check_waiting(
    conn: sqlite3.Connection,
    queue: str,
    runner: serving.Runner,
    control: Control | None,
    max_wait: float,
) -> Findings:
    """Find tasks that nobody will run, and those that wait for long."""
    now = time.time()
    ready, oldest = conn.execute(q.on_queue(WAITING, queue), {"now": now}).fetchone()
    coming = sum(serving.waiting_types(conn, queue).values())
    what = f"{ready} waiting, {since(oldest)}" if ready else f"{coming} scheduled or blocked"
    start = f"start one: {command('work')} {queue}; or have it started: {command('service')}"
    start += f" --enable --queue {queue}"
    if coming and not runner.kind:
        nobody = "no worker serves it, no unit is loaded for it, and no hook starts a worker for it"
        yield problem(f"{what}; {nobody}", start)
    if ready and control and control.paused:
        resume = f"to let it go on now: {lets_go_on(queue, control.by)}"
        yield note(f"{what}; the queue is {pause_in_words(control)}", resume)
    elif ready and now - oldest > max_wait and runner.kind == "worker":
        slots = control and control.slots
        why = f": the queue has {plural(slots, 'slot')}" if slots else ""
        more = f"limit {queue} --slots N" if slots else f"work {queue} --concurrency N"
        see = f"see what runs: {command('list')} --queue {queue}; more at a time: {command(more)}"
        yield problem(f"{what}, although a worker serves it{why}", see)
    elif ready and now - oldest > max_wait and runner.kind:
        yield problem(f"{what}, and no worker serves it", start)


def check_recurring(queue: str, runner: serving.Runner) -> Findings:
    """Find a queue whose recurring tasks nobody enqueues when their time comes."""
    if runner.kind not in ("worker", "service"):
        start = f"{command('service')} --enable --queue {queue}, or {command('work')} {queue}"
        yield problem("tasks recur in it, and no worker or unit enqueues them", start)


def check_held(conn: sqlite3.Connection, queue: str, max_wait: float) -> Findings:
    """Find tasks that wait for a person, who may not know it."""
    held, oldest = conn.execute(q.on_queue(HELD, queue)).fetchone()
    if held and time.time() - oldest > max_wait:
        see = f"{command('list')} --queue {queue} --status held"
        decide = f"{see}; then {command('approve')} ID, or {command('reject')} ID"
        yield note(f"{held} held for a person, {since(oldest)}", decide)


def check_handed_over(conn: sqlite3.Connection, queue: str) -> Findings:
    a_day_ago = {"a_day_ago": time.time() - DAY_SECONDS}
    away, oldest = conn.execute(q.on_queue(HANDED_OVER, queue), a_day_ago).fetchone()
    if away:
        told = f"{away} handed over to another machine for more than a day, {since(oldest)}"
        see = f"is pull running, and does a machine work there? {command('relay status')}"
        yield note(told, see)


def check_types(conn: sqlite3.Connection, queue: str, runner: serving.Runner) -> Findings:
    """Find tasks that wait, or failed in the last day, because no handler has their type's name."""
    values = {"since": q.utc(time.time() - DAY_SECONDS), "begins": outcome.NO_HANDLER}
    for name, waiting, dead in conn.execute(q.on_queue(TYPES, queue), values).fetchall():
        if runner.handlers is None or serving.has_handler(runner.handlers, name):
            continue
        which = f"{queue} --type {sh(name)}"
        counts = [f"{waiting} waiting"] if waiting else []
        mend = f"put an executable of that name into {runner.handlers}"
        if dead:
            counts.append(f"{dead} failed in the last day")
            mend += f"; then run again what has failed: {command('retry')} --failed --queue {which}"
        if waiting:
            mend += f"; if nobody wants them: {command('purge')} {which}"
        yield problem(f"{', '.join(counts)}: {serving.unhandled(name, runner.handlers)}", mend)


def check_failed(conn: sqlite3.Connection, queue: str) -> Findings:
    values = {"since": q.utc(time.time() - DAY_SECONDS)}
    failed = conn.execute(q.on_queue(FAILED_LATELY, queue), values).fetchone()[0]
    if failed:
        see = f"{command('list')} --queue {queue} --status failed"
        again = f"{command('retry')} --failed --queue {queue}"
        yield note(f"{failed} failed for good in the last day", f"{see}; then {again}")


def check_claims(conn: sqlite3.Connection, state: Path) -> Findings:
    """Find claims of dead owners, while no worker recovers them.

    A handler that still runs keeps its task.
    """
    dead: dict[tuple[str, str | None], list[float]] = {}
    for queue, task in claims(conn):
        if recovery.is_dead(state, task.owner) and not recovery.look_at_run(state, task)[1]:
            dead.setdefault((queue, task.owner), []).append(task.claimed_at or task.enqueued_at)
    for (queue, owner), times in sorted(dead.items(), key=str):
        by = f"{owner}, which has died" if owner else "nobody (by hand, or by another program)"
        told = f"{len(times)} claimed at {q.utc(min(times))} UTC by {by}"
        recover = (
            f"any worker takes them back: {command('work')} {queue}; so does {command('cleanup')}"
        )
        yield problem(f'queue "{queue}": {told}', recover)


CHECKS: dict[str, Callable[[Place], Findings]] = {
    "installation": check_installation,
    "python": check_python,
    "plugin": check_plugin,
    "hook": check_hook,
    "wake": check_wake,
    "sync": check_sync,
    "environment": check_environment,
    "handlers": check_handlers,
    "state": check_state,
    "disk": check_disk,
    "database": check_database,
    "spool": check_spool,
    "tasks": check_tasks,
}
