#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Put the queue where Claude Code's hooks find it, and take it away again.

    install.py install                       into ~/.claude/automation/lychee; asks about the hook on a terminal
    install.py install --hook yes --dry-run  shows what would be done, and the change to settings.json
    install.py service --enable              a worker that runs only when there is work (systemd, launchd)

install copies the scripts to PREFIX/runtime/lib and the example handlers to PREFIX/handlers (those that you changed stay
yours), makes PREFIX/state (or TASK_QUEUE_STATE) with its queues, fills uv's cache so that no hook ever downloads, and
offers a Stop hook for settings.json. Run it again to upgrade: running workers are not disturbed. uninstall takes out
what install and service put in, never the state and nothing that you changed.

exit codes: 0 done; 1 something was left undone, and the message says what; 64 usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

EX_USAGE = 64
LOCK_SECONDS = 120.0  # how long to wait for another install
WARM_SECONDS = 600.0  # for one script's packages to be downloaded
LOOK_TWICE_SECONDS = 1.0  # between the two looks of a service that found nothing; also what keeps it from spinning
SERVICE_TICK_SECONDS = 60  # the service looks this often for tasks that have become due
IDLE_EXIT_SECONDS = 30

HERE = Path(__file__).resolve().parent
# The helper comes first: an old script works with a newer helper.
SCRIPTS = ("queue_helpers.py", "enqueue.py", "worker.py", "cleanup.py", "tasks.py", "dashboard.py", "relay.py", "install.py")
HOOK_EVENT = "Stop"
HOOK_ARGUMENTS = "notifications link_validation --start-worker"
HOOK_TIMEOUT_SECONDS = 10
SPOOLS = ("notifications", "approvals", "completions")

HOOK_SCRIPT = """\
#!/bin/sh
# Hands the payload of a Claude Code hook to the queue: hook QUEUE [TASK_TYPE] [OPTION ...]. Written by install.py.
# Exit status 2 would block Claude, and stdout can end up in its context: neither leaves this file.
lib={lib}
python={python}
uv={uv}
[ -n "${{TASK_QUEUE_STATE:-}}" ] || TASK_QUEUE_STATE={state}
PATH="${{PATH:+$PATH:}}${{uv:+${{uv%/*}}:}}/usr/bin:/bin"
export TASK_QUEUE_STATE PATH
exec >/dev/null

# 2, 126 and 127 come from an interpreter that did not get as far as the script: stdin is still unread.
status=127
if [ -x "$python" ] && [ -r "$lib/enqueue.py" ]; then
    "$python" -E -s "$lib/enqueue.py" --hook "$@"
    status=$?
fi
case $status in 2 | 126 | 127)
    if [ -x "$uv" ] && [ -r "$lib/enqueue.py" ]; then  # whatever uv.toml or .python-version is in the workspace
        "$uv" run -qq --offline --no-config --script "$lib/enqueue.py" --hook "$@"
        status=$?
    fi ;;
esac
case $status in 2 | 126 | 127) ;; *) exit $status ;; esac

# No Python: a file in the spool is a task, too.
[ "${{TASK_DEPTH:-0}}" = 0 ] || exit 0
umask 077
spool=$TASK_QUEUE_STATE/spool/$1
name=$(date +%s)-$$
mkdir -p "$spool" && {{
    case ${{2:--}} in
    -*) cat ;;
    *) printf '{{"task_id": "hook-%s", "task_type": "%s", "data": ' "$name" "$2" && cat && printf '}}\\n' ;;
    esac >"$spool/.$name"
}} && mv "$spool/.$name" "$spool/$name.json" && exit 0
echo "the task was not stored: no Python 3.11 was found, and $spool cannot be written" >&2
exit 1
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


class Trouble(Exception):
    """Something could not be done; the message says what, why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="install.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("prefix", metavar="PREFIX", nargs="?", help="default ~/.claude/automation/lychee")
        return sub

    sub = command("install", "copy the scripts, make the queues, offer the hook")
    sub.add_argument("--hook", choices=("yes", "no"), help="add the hook to settings.json, or not (default: ask on a terminal)")
    sub.add_argument("--yes", action="store_true", help="answer yes to every question")
    sub.add_argument("--no-warm", action="store_true", help="leave uv's cache alone; a first run may then download")
    sub.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    sub = command("uninstall", "take out what install and service put in, never the state")
    sub.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    sub = command("service", "have a worker started whenever there is work")
    sub.add_argument("--queue", metavar="QUEUE", action="append", help="which queues it serves (default notifications)")
    sub.add_argument("--enable", action="store_true", help="load it, too: now and at each login")
    sub.add_argument("--kind", choices=("systemd", "launchd"), default="launchd" if sys.platform == "darwin" else "systemd",
                     help="default: what this system has")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="show the files, and write nothing")
    sub = commands.add_parser("work", help="what the service runs: a worker, if there is work", description=None)
    sub.add_argument("prefix", metavar="PREFIX")
    sub.add_argument("queue", metavar="QUEUE", nargs="+")
    args = parser.parse_args(argv)

    sys.dont_write_bytecode = getattr(args, "dry_run", False)
    try:
        place = Place(args.prefix)
        if args.command == "work":
            return work(place, args.queue)
        if args.dry_run:
            return COMMANDS[args.command](place, args)
        if args.command == "install":
            place.prefix.mkdir(mode=0o700, parents=True, exist_ok=True)
        elif not place.prefix.is_dir():
            raise Trouble(f"{place.prefix} is not there: nothing is installed; see just install")
        with only_one(place.prefix):
            return COMMANDS[args.command](place, args)
    except Trouble as trouble:
        return complain(trouble)
    except OSError as error:
        return complain(f"{error.filename or args.prefix or ''}: {error.strerror}; mend that, then run the same command again")
    except KeyboardInterrupt:
        return complain("interrupted; run the same command again to finish what was begun")


def complain(message: object) -> int:
    print(f"install.py: {message}", file=sys.stderr)
    return 1


def is_plain(path: str) -> bool:
    """Whether a path can stand in a line of a unit file or a script: no control characters, and UTF-8."""
    return not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", path)


class Place:
    """Where things are, and what was put there: the record is PREFIX/installed.json."""

    def __init__(self, prefix: str | None) -> None:
        home = Path.home()
        self.default = home / ".claude/automation/lychee"
        self.prefix = Path(os.path.abspath(os.path.expanduser(prefix))) if prefix else self.default
        if not is_plain(str(self.prefix)):
            raise Trouble(f"{str(self.prefix)!r} has control characters or is not UTF-8: choose another PREFIX")
        self.lib, self.handlers = self.prefix / "runtime/lib", self.prefix / "handlers"
        self.hook, self.record_file = self.prefix / "runtime/hook", self.prefix / "installed.json"
        self.settings = Path(os.environ.get("CLAUDE_CONFIG_DIR") or home / ".claude").absolute() / "settings.json"
        self.record = {"files": {}}
        try:
            found = json.loads(self.record_file.read_bytes())
            if isinstance(found, dict) and isinstance(found.get("files"), dict):
                self.record = found
        except FileNotFoundError:
            pass
        except ValueError:
            pass  # not ours any more: what is there counts as the user's
        state = os.environ.get("TASK_QUEUE_STATE") or self.record.get("state") or self.prefix / "state"
        self.state = Path(state).expanduser().absolute()

    def known(self, path: Path) -> list[str]:
        """The digests under which this file was put here."""
        return self.record["files"].get(self.name(path), [])

    def name(self, path: Path) -> str:
        """How the record and the messages call a file."""
        return str(path.relative_to(self.prefix)) if path.is_relative_to(self.prefix) else str(path)

    def save(self) -> None:
        write_file(self.record_file, json.dumps(self.record, indent=1, ensure_ascii=False).encode() + b"\n", 0o600)

    def put(self, files: list[tuple[Path, bytes, int]]) -> None:
        """Write files, each whole or not at all; recorded before, so that uninstall knows even the last of a killed run."""
        for path, content, _ in files:
            digests = self.record["files"].setdefault(self.name(path), [])
            digests += [digest(content)] if digest(content) not in digests else []
        self.save()
        for path, content, mode in files:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(path, content, mode)
        for path, content, _ in files:
            self.record["files"][self.name(path)] = [digest(content)]
        self.save()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_there(path: Path) -> str | None:
    """The digest of what is at path, None when nothing is; what is not a plain file has one that nothing matches."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "not a file"
        return digest(path.read_bytes())
    except FileNotFoundError:
        return None


def begun(path: Path) -> Path:
    """Where a file is written before it takes path's place."""
    return path.with_name(f".{path.name}.new")


def write_file(path: Path, content: bytes, mode: int, owner: os.stat_result | None = None) -> None:
    """Replace path in one step: a reader sees the old file or the new one, and after a power cut one of them is there."""
    new = begun(path)
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        os.fchmod(fd, mode)
        if owner and (owner.st_uid, owner.st_gid) != (os.getuid(), os.getgid()):
            os.fchown(fd, owner.st_uid, owner.st_gid)
        file.flush()
        os.fsync(fd)
    os.replace(new, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def only_one(directory: Path):
    """Hold the lock on a directory, so that two installs do not meet."""
    import queue_helpers as q

    deadline = time.monotonic() + LOCK_SECONDS
    while (fd := q.lock_file(directory, probe=True)) is None:
        if time.monotonic() > deadline:
            raise Trouble(f"{directory} is locked by another install since {LOCK_SECONDS:.0f} s; is one waiting for an answer?")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------------------------- install


def install(place: Place, args: argparse.Namespace) -> int:
    uv, python = find_uv(), find_python()
    if not (HERE / "queue_helpers.py").is_file() or not (HERE / "enqueue.py").is_file():
        raise Trouble(f"{HERE} lacks queue_helpers.py or enqueue.py: run install.py from a whole checkout")
    failed = 0
    files = plan(place, hook_script(place, uv, python))
    for path, _, _, action in files:
        print(f"{action:<10} {place.name(path)}")
    if args.dry_run:
        print(f"{'make' if not (place.state / 'tasks.db').exists() else 'unchanged':<10} {place.name(place.state)}: the queues")
    else:
        place.record.update(state=str(place.state), uv=uv, python=python)
        for path in (place.settings, *(path for path, *_ in files)):
            begun(path).unlink(missing_ok=True)  # of a run that was killed
        place.put([(path, content, mode) for path, content, mode, action in files if action in ("add", "update")])
        failed |= make_state(place)
        failed |= warm(place, uv) if not args.no_warm else 0
    if not uv:
        failed |= complain("uv was not found: workers need it (python3 -m pip install uv); the hook works without")
    if not python and not uv:
        failed |= complain("no Python 3.11 that runs on its own was found: until then hooks put their tasks into the spool")
    failed |= offer_hook(place, args)
    if not args.dry_run:
        where = "" if place.state == place.default / "state" else f"TASK_QUEUE_STATE={shlex.quote(str(place.state))} "
        print(f"installed in {place.prefix}; check it with: {where}{shlex.quote(str(place.lib / 'tasks.py'))} doctor")
    return failed


def plan(place: Place, hook: str) -> list[tuple[Path, bytes, int, str]]:
    """(path, content, mode, action) of every file; scripts are always replaced, handlers only while they are ours."""
    wanted = []
    for name in SCRIPTS:
        if (HERE / name).is_file():
            wanted.append((place.lib / name, (HERE / name).read_bytes(), 0o644 if name == "queue_helpers.py" else 0o755))
    wanted.append((place.hook, hook.encode(), 0o755))
    for source in sorted((HERE / "handlers").glob("[!._]*")):
        if source.is_file():
            wanted.append((place.handlers / source.name, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644))
    result = []
    for path, content, mode in wanted:
        there = digest_there(path)
        if there is None:
            action = "add"
        elif there == digest(content):
            action = "unchanged" if stat.S_IMODE(path.stat().st_mode) == mode else "update"
        elif path.parent == place.handlers and there not in place.known(path):
            action = "keep yours"
        else:
            action = "update"
        result.append((path, content, mode, action))
    return result


def hook_script(place: Place, uv: str | None, python: str | None) -> str:
    values = {"lib": place.lib, "python": python or "", "uv": uv or "", "state": place.state}
    return HOOK_SCRIPT.format(**{key: shlex.quote(str(value)) for key, value in values.items()})


def make_state(place: Place) -> int:
    """Make the database with its queues, and the doors of the spool."""
    import queue_helpers as q

    try:
        q.close(q.connect(place.state))
        for queue in SPOOLS:
            q.make_private(place.state / "spool" / queue, parents=True)
        q.make_private(place.state / "workers")
        q.make_private(place.state / "logs")
        q.wake(place.state)
    except q.QueueError as error:
        return complain(error)
    return 0


def warm(place: Place, uv: str | None) -> int:
    """Have uv fetch what the scripts need; once they ran, they run without a network."""
    failed = 0
    if not uv:
        return 0
    for path in [*(place.lib / name for name in SCRIPTS), *sorted(place.handlers.glob("*"))]:
        if not path.is_file() or b"# /// script" not in path.read_bytes():
            continue
        is_handler = path.parent == place.handlers  # a handler need not know --help
        command = [uv, "sync", "--script", str(path)] if is_handler else [uv, "run", "--script", str(path), "--help"]
        try:
            ran = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=WARM_SECONDS,
                                 cwd=place.prefix)  # fmt: skip
            why = ran.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1] if ran.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        if why:
            failed |= complain(f"{place.name(path)} does not run yet: {why}; with a network, run: {shlex.join(command)}")
    return failed


def works_alone(command: list[str]) -> bool:
    """Whether a program runs with nothing on PATH, as a graphical start has it: the shims of version managers do not."""
    try:
        return subprocess.run(command, check=False, env={"HOME": str(Path.home())}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, timeout=30).returncode == 0  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_uv() -> str | None:
    """The absolute path of a uv that works alone."""
    home = Path.home()
    places = [os.environ.get("UV"), shutil.which("uv"), home / ".local/bin/uv", home / ".cargo/bin/uv", "/opt/homebrew/bin/uv",
              "/usr/local/bin/uv"]  # fmt: skip
    found = [os.path.abspath(place) for place in places if place and os.access(place, os.X_OK)]
    for uv in found:
        if works_alone([uv, "--version"]):
            return uv
    for shim in found:  # uv tells its children where it is
        ask = [shim, "run", "--no-project", "--no-config", "--offline", "python", "-c", "import os; print(os.environ['UV'])"]
        try:
            uv = subprocess.run(ask, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            continue
        if uv and works_alone([uv, "--version"]):
            return uv
    return None


def find_python() -> str | None:
    """The absolute path of a Python that can enqueue and works alone; those that survive an upgrade come first."""
    base = getattr(sys, "_base_executable", None)  # outside of any virtual environment, uv's own included
    places = ["/usr/local/bin/python3", "/opt/homebrew/bin/python3", base, shutil.which("python3"), sys.executable]
    if sys.platform != "darwin":  # there it may be a stub that opens a window
        places.insert(0, "/usr/bin/python3")
    fit = "import sys, sqlite3; sys.exit(sys.version_info < (3, 11) or sqlite3.sqlite_version_info < (3, 35))"
    for python in places:
        if python and os.access(python, os.X_OK) and works_alone([os.path.abspath(python), "-E", "-s", "-c", fit]):
            return os.path.abspath(python)
    return None


# ------------------------------------------------------------------------------------------------------- settings.json


def hook_command(place: Place) -> str:
    """The command of the hook: ends well even when everything has been removed, and never with 2, as sh alone would."""
    hook = shlex.quote(str(place.hook))
    return f"test ! -r {hook} || /bin/sh {hook} {HOOK_ARGUMENTS} || exit 1"


def hook_group(place: Place) -> dict:
    return {"hooks": [{"type": "command", "command": hook_command(place), "timeout": HOOK_TIMEOUT_SECONDS}]}


def offer_hook(place: Place, args: argparse.Namespace) -> int:
    """Show what settings.json would become, and write it if that is wanted."""
    by_hand = json.dumps({"hooks": {HOOK_EVENT: [hook_group(place)]}}, ensure_ascii=False)
    try:
        if args.hook == "no":
            print("no hook was added (--hook no)")
            return 0
        text = read_settings(place.settings)
        new, state = with_hook(text, place)
        if new == text:
            print(f"unchanged  {place.settings}: {state}")
            return 0
        print("".join(diff(text, new, place.settings)), end="")
        if args.dry_run:
            return 0
        if args.hook != "yes" and not args.yes:
            if not sys.stdin.isatty():
                print(f"no hook was added to {place.settings}: say --hook yes, or add by hand: {by_hand}")
                return 0
            print(f"Add this hook to {place.settings}? [y/N] ", end="", flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("no hook was added")
                return 0
        edit_settings(place, lambda text: with_hook(text, place)[0])
        print(f"{state:<10} {place.settings}: the hook")
        return 0
    except Trouble as trouble:
        return complain(f"{trouble}; it was left alone. To have the hook, add by hand: {by_hand}")
    except OSError as error:
        return complain(f"{error.filename or place.settings}: {error.strerror}; settings.json was left alone. "
                        f"To have the hook, add by hand: {by_hand}")  # fmt: skip


def read_settings(path: Path) -> str | None:
    """The text of settings.json, None when there is none; raises Trouble for what had better be left alone."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Trouble(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode):
        raise Trouble(f"{path} is a symbolic link to {os.readlink(path)}")
    if not stat.S_ISREG(found.st_mode):
        raise Trouble(f"{path} is not a file")
    if not found.st_mode & 0o222 or not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise Trouble(f"{path} cannot be written (its permissions)")
    try:
        text = path.read_bytes().decode()
        settings = json.loads(text, parse_constant=not_json)
    except OSError as error:
        raise Trouble(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Trouble(f"{path} is not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise Trouble(f"{path} is not a JSON object")
    hooks = settings.get("hooks", {})
    if not isinstance(hooks, dict) or not isinstance(hooks.get(HOOK_EVENT, []), list):
        raise Trouble(f'{path} has "hooks" of a shape that is not known')
    return text


def not_json(name: str):
    raise ValueError(f"{name} is not JSON")


def with_hook(text: str | None, place: Place) -> tuple[str, str]:
    """The settings with the hook, and what was done: added, updated, or why nothing needs to be."""
    source = "{}\n" if text is None else text
    command, recorded = hook_command(place), place.record.get("hook", {}).get("command")
    for path, there in hooks_in(source):
        if there == command:
            return source, "the hook is there"
        if there == recorded:
            start, end = value_span(source, path)
            return source[:start] + json.dumps(command, ensure_ascii=False) + source[end:], "updated"
        if shlex.quote(str(place.hook)) in there or str(place.hook) in there:
            return source, "the hook is there, and yours"
    hooks = json.loads(source).get("hooks", {})
    if HOOK_EVENT in hooks:
        return add(source, ["hooks", HOOK_EVENT], None, hook_group(place)), "added"
    if "hooks" in json.loads(source):
        return add(source, ["hooks"], HOOK_EVENT, [hook_group(place)]), "added"
    return add(source, [], "hooks", {HOOK_EVENT: [hook_group(place)]}), "added"


def without_hook(text: str, place: Place, recorded: dict) -> str:
    """The settings as they would be had the hook never been added; a hook that was changed since is left."""
    for path, command in reversed(list(hooks_in(text))):
        if command == recorded["command"]:
            group_path = path[:3]
            group = at_path(json.loads(text), group_path)
            alone = len(group["hooks"]) == 1 and group.keys() <= {"hooks", "matcher"}
            text = remove(text, group_path if alone else path[:5])
    for path in (["hooks", HOOK_EVENT], ["hooks"]):
        if path[-1] in recorded.get("created", []) and at_path(json.loads(text), path) in ([], {}):
            text = remove(text, path)
    return text


def hooks_in(text: str):
    """(path, command) of every command hook, whatever else is in the settings."""
    hooks = json.loads(text).get("hooks", {})
    for event, groups in hooks.items():
        for g, group in enumerate(groups if isinstance(groups, list) else []):
            inner = group.get("hooks") if isinstance(group, dict) else None
            for h, hook in enumerate(inner if isinstance(inner, list) else []):
                if isinstance(hook, dict) and isinstance(hook.get("command"), str):
                    yield ["hooks", event, g, "hooks", h, "command"], hook["command"]


def edit_settings(place: Place, edit) -> None:
    """Write edit(text) over settings.json, a copy kept beside it; anew when somebody else writes meanwhile."""
    path = place.settings
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if path.parent.samefile(place.prefix) else only_one(path.parent):
        while True:
            text = read_settings(path)
            new = edit(text)
            if new == text:
                return
            mode, owner = 0o600, None
            if text is None:
                place.record["hook"] = {"command": hook_command(place), "created": [".", "hooks", HOOK_EVENT]}
            else:
                owner = path.stat()
                mode = stat.S_IMODE(owner.st_mode)
                backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.backup")
                if not backup.exists():
                    write_file(backup, text.encode(), mode, owner)
                was = json.loads(text)
                created = [] if "hooks" in was else ["hooks"]
                created += [] if HOOK_EVENT in was.get("hooks", {}) else [HOOK_EVENT]
                before = place.record.get("hook", {}).get("created")
                place.record["hook"] = {"command": hook_command(place), "created": created if before is None else before}
            place.save()
            if read_settings(path) == text:
                write_file(path, new.encode(), mode, owner)
                return


def diff(old: str | None, new: str, path: Path):
    import difflib

    lines = difflib.unified_diff((old or "").splitlines(True), new.splitlines(True), str(path), f"{path} (new)")
    for line in lines:
        yield line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n"


# JSON is edited as text, so that everything else in the file stays as it is, byte for byte.

SPACE = re.compile(r"[ \t\n\r]*")
decode_at = json.JSONDecoder().raw_decode


def items(text: str, at: int) -> tuple[list[tuple[object, int, int, int]], int]:
    """What is in the object or array that opens at `at`: [(key or index, start, value's start, end), …], and its close."""
    found, is_object, at = [], text[at] == "{", SPACE.match(text, at + 1).end()
    while text[at] not in "}]":
        start = value = at
        key: object = len(found)
        if is_object:
            key, at = decode_at(text, at)
            value = SPACE.match(text, SPACE.match(text, at).end() + 1).end()
        _, end = decode_at(text, value)
        found.append((key, start, value, end))
        at = SPACE.match(text, end).end()
        if text[at] == ",":
            at = SPACE.match(text, at + 1).end()
    return found, at


def value_span(text: str, path: list) -> tuple[int, int]:
    """Where the value at a path starts and ends; of a key that is there twice, the last one, as JSON readers have it."""
    start, end = SPACE.match(text).end(), len(text)
    for step in path:
        start, end = [(value, end) for key, _, value, end in items(text, start)[0] if key == step][-1]
    return start, end


def at_path(value, path: list):
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def add(text: str, path: list, key: str | None, value: object) -> str:
    """Put a value at the end of the array, or under a new key at the end of the object, that is at path."""
    at, _ = value_span(text, path)
    found, close = items(text, at)
    newline = "\r\n" if "\r\n" in text else "\n"
    first, _ = items(text, SPACE.match(text).end())
    gap = text[SPACE.match(text).end() + 1 : first[0][1]] if first else ""
    unit = gap.rpartition("\n")[2] if "\n" in gap else "  "
    if found:
        between = text[at + 1 : found[0][1]]
        if "\n" not in between:
            between = text[found[0][3] : found[1][1]].partition(",")[2] if len(found) > 1 else " " if ", " in text else ""
    else:
        base = re.match(r"[ \t]*", text[text.rfind("\n", 0, at) + 1 :]).group()
        between = newline + base + unit if "\n" in text.strip() or text.strip() == "{}" else ""
    label = json.dumps(key) + ": " if key is not None else ""
    if "\n" in between:
        indent = between.rpartition("\n")[2]
        rendered = json.dumps(value, indent=unit, ensure_ascii=False).replace("\n", newline + indent)
    else:
        rendered = json.dumps(value, ensure_ascii=False)
    if found:
        end = found[-1][3]
        return f"{text[:end]},{between}{label}{rendered}{text[end:]}"
    closing = newline + between.rpartition("\n")[2].removesuffix(unit) if "\n" in between else ""
    return f"{text[: at + 1]}{between}{label}{rendered}{closing}{text[close:]}"


def remove(text: str, path: list) -> str:
    """Take the value at path out, with its key and its comma."""
    at, _ = value_span(text, path[:-1])
    found, close = items(text, at)
    index = [i for i, item in enumerate(found) if item[0] == path[-1]][-1]
    if len(found) == 1:
        return text[: at + 1] + text[close:]
    if index:
        return text[: found[index - 1][3]] + text[found[index][3] :]
    return text[: found[0][1]] + text[found[1][1] :]


# ----------------------------------------------------------------------------------------------------------- uninstall


def uninstall(place: Place, args: argparse.Namespace) -> int:
    if not place.record_file.is_file():
        raise Trouble(f"{place.prefix} has no installed.json: nothing is installed there, or by hand")
    failed = 0
    if place.record.get("hook"):
        failed |= withdraw_hook(place, args.dry_run)
    if place.record.get("units") and not args.dry_run:
        unload(place.record["units"])
    kept = {}
    for name, digests in sorted(place.record["files"].items()):
        path = place.prefix / name  # units are recorded with their absolute path
        there = digest_there(path)
        if there is not None and there not in digests:
            print(f"{'keep yours':<10} {name}")
            kept[name] = digests
        elif there is not None:
            print(f"{'remove':<10} {name}")
            if not args.dry_run:
                path.unlink()
        if not args.dry_run:
            begun(path).unlink(missing_ok=True)
    if args.dry_run:
        return failed
    for path in (place.settings, place.record_file):
        begun(path).unlink(missing_ok=True)
    if place.record.get("units"):
        reload_units(place.record["units"])
    ours = {Path(name).stem for name in SCRIPTS}
    for compiled in (place.lib / "__pycache__").glob("*.pyc"):
        if compiled.name.partition(".")[0] in ours:
            compiled.unlink(missing_ok=True)
    remove_empty(place.lib / "__pycache__", place.lib, place.lib.parent, place.handlers)
    if failed:  # the record goes last: whoever is killed before that can begin again
        place.record = {**place.record, "files": {}, "units": []}
        place.save()
    else:
        place.record_file.unlink()
    remove_empty(place.prefix)
    if place.state.exists():
        print(f"{'keep':<10} {place.state}: the queues")
    return failed


def remove_empty(*directories: Path) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            pass  # not empty: the state, or what the user put there; or gone


def withdraw_hook(place: Place, dry_run: bool) -> int:
    recorded, path = place.record["hook"], place.settings
    try:
        text = read_settings(path)
        if text is None:
            return 0
        new = without_hook(text, place, recorded)
        if new == text:
            changed = any(str(place.hook) in command for _, command in hooks_in(text))
            print(f"{'keep yours' if changed else 'unchanged':<10} {path}" + (": you changed the hook" if changed else ""))
            return 0
        print("".join(diff(text, new, path)), end="")
        if not dry_run:
            if "." in recorded.get("created", []) and json.loads(new) == {}:
                path.unlink()
            else:
                edit_settings(place, lambda text: without_hook(text, place, recorded))
        return 0
    except Trouble as trouble:
        return complain(f"{trouble}; it was left alone. Remove by hand the hook with: {recorded['command']}")


# ------------------------------------------------------------------------------------------------------------- service


def service(place: Place, args: argparse.Namespace) -> int:
    import queue_helpers as q

    python = place.record.get("python") or place.record.get("uv")
    if not (place.lib / "install.py").is_file() or not python:
        raise Trouble(f"{place.prefix} has no worker to run: run just install first")
    queues = args.queue or ["notifications"]
    for queue in queues:
        try:
            q.check_queue_name(queue)
        except q.InvalidTask as error:
            return complain(error)
    name = "lychee-queue" if place.prefix == place.default else f"lychee-queue-{digest(str(place.prefix).encode())[:8]}"
    units = systemd_units(place, name, queues) if args.kind == "systemd" else launchd_plist(place, name, queues)
    for path, content in units.items():
        if args.dry_run:
            print(f"# {path}\n{content}")
        elif digest_there(path) not in (None, digest(content.encode()), *place.known(path)):
            raise Trouble(f"{path} is not as it was written here: move it away, then run the same command again")
    if args.dry_run:
        return 0
    place.record["units"] = sorted({*place.record.get("units", []), *map(str, units)})
    place.put([(path, content.encode(), 0o644) for path, content in units.items()])
    for path in units:
        print(f"{'written':<10} {path}")
    load = load_commands(args.kind, name, units)
    if not args.enable:
        print("to load it: just service --enable, or: " + " && ".join(shlex.join(command) for command in load))
        return 0
    for command in load:
        try:
            ran = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
            why = ran.stderr.strip().replace("\n", "; ") if ran.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
        if why and command[1] != "bootout":
            return complain(f"the service is written but not loaded: {why}; in a login session, run: {shlex.join(command)}")
    print("loaded: a worker starts when there is work")
    if args.kind == "systemd":
        print("to have it run while you are logged out, too: loginctl enable-linger")
    return 0


def service_environment(place: Place) -> dict[str, str]:
    """What a worker's handlers need of the environment: the user's own PATH, no more, so no secrets."""
    import getpass

    tools = [os.path.dirname(place.record.get("uv") or "")]
    standard = ["/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    own = os.path.dirname(sys.executable)  # uv's environment for this script
    entries = [*os.environ.get("PATH", "").split(os.pathsep), *tools, str(Path.home() / ".local/bin"), *standard]
    fit = [entry for entry in entries if os.path.isabs(entry) and is_plain(entry) and os.path.isdir(entry)]
    fit = [entry for entry in dict.fromkeys(fit) if entry in standard or entry != own]
    return {"PATH": os.pathsep.join(fit), "HOME": str(Path.home()), "USER": getpass.getuser(), "TASK_QUEUE_STATE": str(place.state)}


def service_command(place: Place, queues: list[str]) -> list[str]:
    python, uv = place.record.get("python"), place.record.get("uv")
    start = [python, "-E", "-s"] if python else [uv, "run", "-qq", "--offline", "--no-config", "--script"]
    return [*start, str(place.lib / "install.py"), "work", str(place.prefix), *queues]


def wakers(place: Place, queues: list[str]) -> list[Path]:
    """What changes when a task comes in: Python touches wake, the sqlite3 command writes the log, the spool fills."""
    return [place.state / "wake", place.state / "tasks.db-wal", *(place.state / "spool" / queue for queue in queues)]


def systemd_units(place: Place, name: str, queues: list[str]) -> dict[Path, str]:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'

    def plain(path: Path) -> str:  # takes the rest of the line as it is
        return str(path).replace("%", "%%")

    directory = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").absolute() / "systemd/user"
    command = " ".join(quoted(word).replace("$", "$$") for word in service_command(place, queues))
    environment = "\n".join(f"Environment={quoted(f'{key}={value}')}" for key, value in service_environment(place).items())
    watched = "\n".join(f"PathModified={plain(path)}" for path in wakers(place, queues))
    return {
        directory / f"{name}.service": f"""\
[Unit]
Description=Worker of the task queue, while there is work
# Many short runs in a row are how this works; the default limit would stop the path unit for good.
StartLimitIntervalSec=0

[Service]
Type=exec
{environment}
WorkingDirectory={plain(Path.home())}
ExecStart={command}
Restart=on-failure
RestartSec=2
UMask=0077
# The worker ends its handlers itself; one that outlives a killed worker may finish.
KillMode=process
TimeoutStopSec=60
""",
        directory / f"{name}.path": f"""\
[Unit]
Description=Start the task queue's worker when a task comes in

[Path]
{watched}

[Install]
WantedBy=default.target
""",
        directory / f"{name}.timer": f"""\
[Unit]
Description=Start the task queue's worker for what was left and what has become due

[Timer]
OnActiveSec=1
OnUnitInactiveSec={SERVICE_TICK_SECONDS}
AccuracySec=10

[Install]
WantedBy=default.target
""",
    }


def launchd_plist(place: Place, name: str, queues: list[str]) -> dict[Path, str]:
    import plistlib

    log = str(place.state / "logs" / "service.log")
    job = {
        "Label": name,
        "ProgramArguments": service_command(place, queues),
        "EnvironmentVariables": service_environment(place),
        "WorkingDirectory": str(Path.home()),
        "WatchPaths": [str(path) for path in wakers(place, queues)],
        "StartInterval": SERVICE_TICK_SECONDS,
        "RunAtLoad": True,
        "ThrottleInterval": 1,
        "AbandonProcessGroup": True,  # a handler that outlives a killed worker may finish
        "ExitTimeOut": 60,
        "Umask": 0o077,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    return {Path.home() / "Library/LaunchAgents" / f"{name}.plist": plistlib.dumps(job, sort_keys=False).decode()}


def load_commands(kind: str, name: str, units: dict[Path, str]) -> list[list[str]]:
    if kind == "systemd":
        start = ["systemctl", "--user", "restart", f"{name}.path", f"{name}.timer"]
        return [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", *start[3:]], start]
    domain = f"gui/{os.getuid()}"
    return [["launchctl", "bootout", f"{domain}/{name}"], ["launchctl", "bootstrap", domain, str(next(iter(units)))]]


def unload(units: list[str]) -> None:
    names = [Path(unit).name for unit in units]
    systemd = [name for name in names if name.endswith((".path", ".timer"))]
    commands = [["systemctl", "--user", "disable", "--now", *systemd]] if systemd else []
    commands += [["launchctl", "bootout", f"gui/{os.getuid()}/{name.removesuffix('.plist')}"] for name in names
                 if name.endswith(".plist")]  # fmt: skip
    run_quietly(commands)


def reload_units(units: list[str]) -> None:
    run_quietly([["systemctl", "--user", "daemon-reload"]] if any(unit.endswith(".service") for unit in units) else [])


def run_quietly(commands: list[list[str]]) -> None:
    for command in commands:
        try:
            subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            pass  # where nothing can be loaded, nothing is


def work(place: Place, queues: list[str]) -> int:
    """Become a worker if there is work. Looks twice: what started us may have seen a commit before others can."""
    import queue_helpers as q

    for pause in (0.0, LOOK_TWICE_SECONDS):
        time.sleep(pause)
        try:
            if not is_work(q, place.state, queues):
                continue
        except q.QueueError as error:
            print(f"install.py: {error}", file=sys.stderr)
            continue
        uv, worker = place.record.get("uv"), str(place.lib / "worker.py")
        start = [uv, "run", "--script"] if uv and os.access(uv, os.X_OK) else [sys.executable]
        os.environ["TASK_QUEUE_STATE"] = str(place.state)
        os.execv(start[0], [*start, worker, *queues, "--handlers", str(place.handlers), "--single", "--idle-exit", str(IDLE_EXIT_SECONDS)])
    return 0


def is_work(q, state: Path, queues: list[str]) -> bool:
    """Whether a worker of these queues would find anything; tasks of dead workers are taken back first."""
    if any(not file.name.startswith(".") and file.is_file() for queue in queues for file in (state / "spool" / queue).glob("*")):
        return True
    if not (state / "tasks.db").exists():
        return False
    conn = q.connect(state)
    q.recover(state)
    for queue in queues:
        q.ensure_queue(conn, queue)
        if q.has_ready(conn, queue):
            return True
    return False


COMMANDS = {"install": install, "uninstall": uninstall, "service": service}

if __name__ == "__main__":
    raise SystemExit(main())
