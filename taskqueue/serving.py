"""Tell who will run a queue's tasks, and which handlers exist.

A live worker holds the serving lock of its queues. Without one, a loaded unit or a hook with
--start-worker may start one. All commands that show waiting tasks ask here.
"""

from __future__ import annotations

import os
import sqlite3
from collections import namedtuple
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import queue_helpers as q

# A worker whose one command runs all task types writes this into its serving lock.
ANY_TYPE = "*"
# A service manager that does not answer within this time counts as one that loaded nothing.
MANAGER_SECONDS = 2.0
# This file beside the handlers is a command for --notify.
NOTIFIER = "notify.sh"
# The statuses of tasks that need a worker; a held task needs its person first.
WAITING = ("pending", "scheduled", "blocked")

OWNERS = """
select distinct owner from "{queue}" where status = 2"""
IS_WAITING = "(status < 2 or status = 3 and due_at is not null or status in (4, 6))"
WAITING_TYPES = f"""
select coalesce(task_type, '{{queue}}'), count(*) from "{{queue}}" where {IS_WAITING} group by 1"""
UNTRIED_TYPES = WAITING_TYPES.replace(" group by", " and attempts = 0 group by")
WAITS = f"""
select exists (select 1 from "{{queue}}" where {IS_WAITING})"""


# `kind` is worker, consumer, service, hook, or "" for nobody; `handlers` is the directory of the
# handlers, or None if any task type will do.
Runner = namedtuple("Runner", "kind handlers")


# ------------------------------------------------------------------------------------- the handlers


def default_handlers(script: str | Path) -> Path:
    """Return the installation's handlers directory if it has one, else the one beside the script.

    So a checkout runs a person's own handlers.
    """
    from taskqueue import installation

    here = Path(script).resolve().parent
    for prefix in (here.parent.parent, installation.default_prefix()):
        record = prefix / "installed.json"
        if (prefix / "handlers").is_dir() and (record.exists() or not (here / "handlers").is_dir()):
            return prefix / "handlers"
    return here / "handlers"


def handlers_in(directory: Path) -> list[str]:
    """Return the task types that have a handler in a directory."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [name for name in names if has_handler(directory, name)]


def has_handler(directory: Path, task_type: str) -> bool:
    """Return whether a directory has an executable of a task type's name."""
    if "/" in task_type or task_type.startswith(".") or task_type == NOTIFIER:
        return False
    handler = f"{directory}/{task_type}"
    return os.path.isfile(handler) and os.access(handler, os.X_OK)


def unhandled(task_type: str, directory: Path) -> str:
    """Say that no handler has this name, and list the others, the most similar first."""
    from difflib import SequenceMatcher

    def likeness(name: str) -> float:
        return -SequenceMatcher(None, name, task_type).ratio()

    names = ", ".join(sorted(handlers_in(directory), key=likeness)) or "none"
    return f"no handler is called {task_type}; there are {names}"


# -------------------------------------------------------------------------------------- who runs it


def lock_file(state: Path, queue: str) -> Path:
    """Return the lock file that the workers of a queue share."""
    return state / "workers" / f"serving.{queue}"


def is_served(state: Path, queue: str) -> bool:
    """Return whether a worker serves the queue now."""
    from taskqueue.running import is_held

    return is_held(lock_file(state, queue))


class ServingLocks:
    """The locks by which a worker says which queues it serves, and with which handlers."""

    def __init__(self, state: Path, handlers: str, single: bool) -> None:
        """`handlers` is a directory or ANY_TYPE; a `single` worker leaves queues to others."""
        self.state, self.handlers, self.single = state, handlers, single
        self.held: dict[str, int] = {}

    def take(self, queues: Iterable[str], *, full: bool) -> bool:
        """Take the locks that are not held. Return False if a single worker gets none of them.

        A `full` single worker takes none: the queue's tasks would wait for a place, while a hook
        that finds no worker starts one.
        """
        q.make_private(self.state / "workers")
        for queue in queues:
            path = lock_file(self.state, queue)
            if queue in self.held and not _is_file(self.held[queue], path):
                os.close(self.held.pop(queue))
            elif queue in self.held or self.single and full:
                continue
            # Commands probe the lock for a moment: the first lock of a single worker outlasts that.
            patience = q.PROBE_SECONDS if self.single and not self.held else 0
            fd = q.lock_file(path, shared=not self.single, patience=patience)
            if fd is not None:
                self.held[queue] = fd
                os.ftruncate(fd, 0)
                os.pwrite(fd, os.fsencode(self.handlers), 0)
        return bool(self.held) or not self.single

    def serves(self, queue: str) -> bool:
        return not self.single or queue in self.held

    def release(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


def _is_file(fd: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    # It was removed, with the state directory perhaps.
    except OSError:
        return False


def runner_of(conn: sqlite3.Connection, state: Path, queue: str) -> Runner:
    """Return who runs a queue's tasks. A live worker, the usual case, costs one look at a lock."""
    if is_served(state, queue):
        told = lock_file(state, queue).read_text("utf-8", "surrogateescape").strip()
        return Runner("worker", None if told == ANY_TYPE or not told else Path(told))
    # Results wait in this queue for a person's own program.
    if queue == q.TASK_QUEUE_COMPLETION or _is_consumed(conn, state, queue):
        return Runner("consumer", None)
    kind = "hook" if queue in hooks(state) else ""
    kind = "service" if has_loaded_unit(state, queue) else kind
    return Runner(kind, default_handlers(q.__file__))


def _is_consumed(conn: sqlite3.Connection, state: Path, queue: str) -> bool:
    """Return whether a live process has claimed tasks: a consumer takes no serving lock."""
    owners = conn.execute(q.on_queue(OWNERS, queue)).fetchall()
    if not owners:
        return False
    from taskqueue import recovery

    return any(not recovery.is_dead(state, owner) for (owner,) in owners)


def _place(state: Path):
    """Return the installation whose hooks and units start workers for this state, or None."""
    from taskqueue import installation

    try:
        place = installation.installed(q.__file__) or installation.installed()
    except installation.WrongUse:
        return None
    its_state = place and (place.record.get("state") or place.prefix / "state")
    return place if its_state and os.path.realpath(its_state) == os.path.realpath(state) else None


def has_loaded_unit(state: Path, queue: str) -> bool:
    """Return whether systemd or launchd starts a worker for the queue."""
    place = _place(state)
    units = map(Path, place.record.get("units", ()) if place else ())
    return any(queue in queues_of_unit(unit) and _is_loaded(unit) for unit in units)


def queues_of_unit(unit: Path) -> list[str]:
    """Return the queues in a unit's command: after worker.py, or in older units after `work PREFIX`."""
    try:
        raw = unit.read_bytes()
    except OSError:
        return []
    if unit.suffix == ".plist":
        import plistlib

        words = plistlib.loads(raw)["ProgramArguments"]
    else:
        import shlex

        lines = [line for line in raw.decode().splitlines() if line.startswith("ExecStart=")]
        words = shlex.split(lines[-1].partition("=")[2]) if lines else []
    begins = [at + 1 for at, word in enumerate(words) if word.endswith("/worker.py")]
    begins += [at + 2 for at, word in enumerate(words) if word == "work"]
    named = words[begins[0] :] if begins else []
    end = next((at for at, word in enumerate(named) if word.startswith("-")), len(named))
    return named[:end]


def _is_loaded(unit: Path) -> bool:
    """Return whether the service manager has loaded a unit."""
    import subprocess

    if unit.suffix == ".plist":
        command = ["launchctl", "print", f"gui/{os.getuid()}/{unit.stem}"]
    else:
        watching = [f"{unit.stem}.path", f"{unit.stem}.timer"]
        command = ["systemctl", "--user", "is-active", "--quiet", *watching]
    none = subprocess.DEVNULL
    try:
        ran = subprocess.run(
            command, stdin=none, stdout=none, stderr=none, check=False, timeout=MANAGER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0


def hooks(state: Path) -> set[str]:
    """Return the queues for which a hook of the settings or of the plugin starts a worker."""
    import json

    from taskqueue import installation

    def read(path: Path) -> dict:
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    usual = os.path.realpath(installation.default_prefix() / "state")
    if not _place(state) and os.path.realpath(state) != usual:
        return set()
    settings = read(installation.settings_file())
    if settings.get("disableAllHooks") is True:
        return set()
    enabled = settings.get("enabledPlugins")
    off = (
        {name for name, is_on in enabled.items() if not is_on} if isinstance(enabled, dict) else ()
    )
    plugins = [path for name, path in installation.plugins().items() if name not in off]
    sources = [settings, *(read(path / "hooks/hooks.json") for path in plugins)]
    return {queue for source in sources if source for queue in _started_by(source)}


def _started_by(source: dict) -> Iterable[str]:
    """Return the queues of the hooks that carry --start-worker."""
    from taskqueue.settings import hooks_in

    for _, _, _, words in hooks_in(source):
        programs = [
            at for at, word in enumerate(words) if word.endswith(("hook", "hook.sh", "enqueue.py"))
        ]
        if programs and "--start-worker" in words:
            yield from [word for word in words[programs[-1] + 1 :] if word != "--hook"][:1]


# --------------------------------------------------------------------------------- what people read


def remark(queue: str, kind: str) -> str:
    """Say that no worker serves a queue, and how to start one; "" if one will be started."""
    if kind not in ("", "hook"):
        return ""
    from taskqueue.remedies import command

    until, now = (" until a hook starts one", " now") if kind else ("", "")
    return f"no worker serves {queue}{until}; start one{now}: {command(f'work {queue}')}"


def remarks(
    conn: sqlite3.Connection, state: Path, waiting: Mapping[str, Collection[str]]
) -> list[str]:
    """Return a line for each reason why waiting tasks, {queue: types}, will not run."""
    lines = []
    for queue, types in waiting.items():
        runner = runner_of(conn, state, queue)
        lines.append(remark(queue, runner.kind))
        lines += unhandled_types(types, runner)
    return [line for line in dict.fromkeys(lines) if line]


def unhandled_types(types: Collection[str], runner: Runner) -> list[str]:
    """Return a line for each task type that has no handler."""
    directory = runner.handlers
    if directory is None or not directory.is_dir():
        return []
    return [
        unhandled(name, directory) for name in sorted(types) if not has_handler(directory, name)
    ]


def waiting_types(conn: sqlite3.Connection, queue: str) -> dict[str, int]:
    """Return how many tasks of each type wait in a queue; held ones do not count."""
    return dict(conn.execute(q.on_queue(WAITING_TYPES, queue)).fetchall())


def untried_types(conn: sqlite3.Connection, queue: str) -> list[str]:
    """Return the types of waiting tasks that have had no attempt."""
    return [name for name, _ in conn.execute(q.on_queue(UNTRIED_TYPES, queue))]


def waits(conn: sqlite3.Connection, queue: str) -> bool:
    """Tell whether tasks of a queue wait for a worker."""
    return bool(conn.execute(q.on_queue(WAITS, queue)).fetchone()[0])
