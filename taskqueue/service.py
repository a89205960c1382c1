"""Start workers without a person: `--start-worker`, and the units of `tq service`.

systemd or launchd starts a worker by these units when a queue has work. The session of a hook and the
manager of a unit have an environment and a working directory, perhaps those of a workspace. The worker
takes neither: it starts with an empty environment, and reads the file that taskqueue.environment
describes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import queue_helpers as q
from taskqueue import cli, environment, every, serving
from taskqueue.installation import (
    File,
    Installation,
    Trouble,
    WrongUse,
    default_prefix,
    digest,
    digest_there,
    installed,
    is_plain,
    only_one,
)

IDLE_EXIT_SECONDS = 60

# The pause between two looks for work. It also keeps a unit without work from spinning.
LOOK_TWICE_SECONDS = 1.0

# The units look this often for tasks that have become due.
TICK_SECONDS = 60

HELP = """\
Have systemd or launchd start a worker whenever a queue has work.

    tq service --queue approvals --enable     write the units and load them: now and at each login
    tq service                                write them again, for the queues that they serve
    tq service --remove approvals             serve a queue no more
    tq service -- --then completions          give the workers these options (-- alone: none)
    tq service --dry-run                      show the units

--queue adds a queue to those that the units serve; the first time, the default is notifications.
Nothing runs without work: the units watch the state directory, and look once a minute for tasks that
have become due. uninstall removes the units.

exit codes: 0 done; 1 something was left undone, and the message says what; 64 usage.
"""

complain = partial(cli.complain, cli.EX_FAILED, "tasks.py service")

# ------------------------------------------------------------------------------- starting a worker


def start_worker(queue: str) -> None:
    """Start a detached worker unless one serves the queue. Raises OSError, ValueError.

    A worker that does not get the queue's lock leaves, so ten calls at once are safe.
    """
    try:
        fd = q.lock_file(serving.lock_file(q.STATE_DIR, queue), probe=True)
        if fd is None:
            return
        os.close(fd)
    except OSError:
        # No worker has ever served it.
        pass
    lib = Path(q.__file__).resolve().parent
    command = worker_command(lib, [queue])
    log = q.make_private(q.STATE_DIR / "logs") / f"worker.{queue}.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            env=bare_environment(q.STATE_DIR),
            cwd="/",
        )
    finally:
        os.close(fd)


def have_run(conn: q.Connection, queues: Iterable[str]) -> list[str]:
    """Start a worker for each queue of which a hook may; a line for each queue that gets none."""
    lines = []
    for queue in dict.fromkeys(queues):
        kind = (
            serving.runner_of(conn, conn.state, queue).kind
            if serving.waits(conn, queue)
            else "consumer"
        )
        if kind == "hook":
            try:
                start_worker(queue)
            except (OSError, ValueError) as error:
                lines.append(f"no worker could be started ({error}): {serving.remark(queue, '')}")
        else:
            lines.append(serving.remark(queue, kind))
    return [line for line in lines if line]


def worker_command(lib: Path, queues: Sequence[str]) -> list[str]:
    """Return the command for a worker of the scripts in lib that leaves when it is idle."""
    file = environment_file(lib)
    how = ["--environment", str(file), "--single", "--idle-exit", str(IDLE_EXIT_SECONDS)]
    return [*interpreter(lib), str(lib / "worker.py"), *queues, *how]


def interpreter(lib: Path) -> list[str]:
    """Return the command that runs a worker in lib, which install.py has recorded; else this Python.

    The Python with the worker's packages is the first choice: it needs no uv to start.
    """
    record = lib.parent.parent / "installed.json"
    recorded = json.loads(record.read_bytes()) if record.is_file() else {}
    for name in ("packages", "python", "uv"):
        program = recorded.get(name) or ""
        if os.access(program, os.X_OK):
            uv_run = ["run", "-q", "--no-config", "--script"]
            return [program, *(uv_run if name == "uv" else ["-E", "-s"])]
    return [environment.own_python(), "-E", "-s"]


def environment_file(lib: Path) -> Path:
    """Return the environment file for the scripts in lib: their installation's, else the default."""
    prefix = lib.parent.parent
    return (prefix if (prefix / "installed.json").is_file() else default_prefix()) / "environment"


def bare_environment(state: Path) -> dict[str, str]:
    """Return the variables with which a worker finds its state and its environment file."""
    home = os.environ.get("HOME") or environment.account().pw_dir
    return {"HOME": home, "PATH": os.defpath, "TASK_QUEUE_STATE": str(state)}


def no_work(queues: Sequence[str]) -> bool:
    """Return whether a worker would find nothing.

    It looks twice, because a commit's event comes before others can see the commit.
    """
    for pause in (0.0, LOOK_TWICE_SECONDS):
        time.sleep(pause)
        try:
            if is_work(q.STATE_DIR, queues):
                return False
        except q.QueueError as error:
            complain(error)
    return True


def is_work(state: Path, queues: Sequence[str]) -> bool:
    """Return whether a worker would find anything, after taking back the tasks of dead workers."""
    spools = [state / "spool" / queue for queue in queues]
    if any(
        not file.name.startswith(".") and file.is_file()
        for spool in spools
        for file in spool.glob("*")
    ):
        return True
    if not (state / "tasks.db").exists():
        return False
    conn = q.connect(state)
    q.recover(state)
    if every.is_due(conn, queues):
        return True
    for queue in queues:
        q.ensure_queue(conn, queue)
        if q.has_ready(conn, queue):
            return True
    return False


# --------------------------------------------------------------------------------------- tq service


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    os.umask(0o077)
    return cli.answer_for("tasks.py service", lambda: serve(args))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("tasks.py service", HELP)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", nargs="?", help="of an installation (default: this one's)")
    add(
        "--queue",
        metavar="QUEUE",
        action="append",
        default=[],
        type=queue_name,
        help="serve it, too",
    )
    add("--remove", metavar="QUEUE", action="append", default=[], help="serve it no more")
    add("--enable", action="store_true", help="load the units: now and at each login")
    here = "launchd" if sys.platform == "darwin" else "systemd"
    add(
        "--kind", choices=("systemd", "launchd"), default=here, help="default: what this system has"
    )
    add("--dry-run", action="store_true", help="show the units, and write nothing")
    words = list(argv)
    first = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:first])
    # None leaves the options of the workers as they are.
    args.options = words[first + 1 :] if first < len(words) else None
    return args


def queue_name(name: str) -> str:
    try:
        return q.check_queue_name(name)
    except q.InvalidTask as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def serve(args: argparse.Namespace) -> int:
    here = installed(q.__file__)
    prefix = args.prefix or (here.prefix if here else None)
    place = Installation(prefix)
    if args.dry_run:
        return change(place, args)
    if not place.prefix.is_dir():
        raise Trouble(f"{place.prefix} is not there: nothing is installed; see just install")
    with only_one(place.prefix):
        return change(Installation(prefix), args)


def change(place: Installation, args: argparse.Namespace) -> int:
    """Write the units for the queues that are wanted, and load them if that is wanted."""
    if not (place.lib / "worker.py").is_file():
        raise Trouble(f"{place.prefix} has no worker to run: run just install first")
    before = served(place)
    if unknown := [queue for queue in args.remove if queue not in before]:
        raise Trouble(f"{unknown[0]} is not served; the units serve {', '.join(before) or 'none'}")
    wanted = [*before, *args.queue] if before or args.queue else ["notifications"]
    queues = [queue for queue in dict.fromkeys(wanted) if queue not in args.remove]
    if args.options is not None:
        check_options(place, args.options)
        place.record["worker_options"] = args.options
    if args.dry_run:
        for path, content in units_of(place, args.kind, queues).items():
            print(f"# {path}\n{content}")
        return 0
    if not queues:
        return take_out(place)
    for path in write_units(place, args.kind, queues):
        print(f"{'written':<10} {path}")
    print(f"{'serves':<10} {', '.join(queues)}")
    if args.enable or is_loaded(args.kind, place):
        enable(args.kind, place, queues)
    elif why_no_manager(args.kind):
        print(by_hand(args.kind, place, queues))
    else:
        print(f"to load the units: {place.typed()} service --enable")
    return 0


def check_options(place: Installation, options: list[str]) -> None:
    """Have a worker that finds no work read its options. Raises Trouble."""
    with tempfile.TemporaryDirectory() as nothing:
        command = [*worker_command(place.lib, ["notifications"]), *options, "--when-work"]
        env = {**os.environ, "TASK_QUEUE_STATE": f"{nothing}/state"}
        ran = subprocess.run(command, check=False, env=env, stdin=subprocess.DEVNULL,
                             capture_output=True, text=True)  # fmt: skip
    if ran.returncode:
        raise Trouble(f"the worker's options: {ran.stderr.strip()}")


def take_out(place: Installation) -> int:
    """Stop and remove the units, because no queue is left."""
    units = place.record.pop("units", [])
    unload(units)
    for unit in map(Path, units):
        if digest_there(unit) in place.known(unit):
            unit.unlink()
            print(f"{'removed':<10} {unit}")
        place.record["files"].pop(str(unit), None)
    place.save()
    reload(units)
    print("no queue is left: nothing starts a worker by itself but hooks")
    return 0


def served(place: Installation) -> list[str]:
    """Return the queues that the units serve."""
    units = map(Path, place.record.get("units", []))
    return next(filter(None, map(serving.queues_of_unit, units)), [])


def write_units(place: Installation, kind: str, queues: list[str]) -> list[Path]:
    """Write the units. Raises Trouble if a person changed one of them."""
    units = units_of(place, kind, queues)
    for path, content in units.items():
        if digest_there(path) not in (None, digest(content.encode()), *place.known(path)):
            raise Trouble(f"{path} was changed by hand: move it away, then run this again")
    place.record["units"] = sorted({*place.record.get("units", []), *map(str, units)})
    place.put([File(path, content.encode(), 0o600) for path, content in units.items()])
    return list(units)


def rewrite(place: Installation) -> None:
    """Write the units again where an older version wrote them otherwise. Raises Trouble."""
    units, queues = place.record.get("units", []), served(place)
    if not units or not queues:
        return
    kind = "launchd" if units[0].endswith(".plist") else "systemd"
    wanted = units_of(place, kind, queues)
    if all(digest_there(path) == digest(text.encode()) for path, text in wanted.items()):
        return
    for path in write_units(place, kind, queues):
        print(f"{'update':<10} {path}")
    if is_loaded(kind, place):
        enable(kind, place, queues)


# ---------------------------------------------------------------------------------------- the units


def name_of(place: Installation) -> str:
    """Return the units' name; each prefix has units of its own."""
    suffix = (
        "" if place.prefix == default_prefix() else f"-{digest(str(place.prefix).encode())[:8]}"
    )
    return f"lychee-queue{suffix}"


def unit_command(place: Installation, queues: list[str]) -> list[str]:
    """Return the command of the units. Without env -i, the worker would inherit a manager's variables."""
    home = str(Path.home())
    if not is_plain(home) or not os.path.isabs(home):
        raise WrongUse(f"HOME={home!r} has control characters, is not UTF-8 or is relative")
    variables = {"HOME": home, "PATH": os.defpath, "TASK_QUEUE_STATE": str(place.state)}
    given = [f"{name}={value}" for name, value in variables.items()]
    worker = [*worker_command(place.lib, queues), *place.record.get("worker_options", [])]
    return ["/usr/bin/env", "-i", *given, *worker, "--when-work"]


def watched(place: Installation, queues: list[str]) -> list[Path]:
    """Return the paths that change when a task comes in.

    Python and hooks touch wake, the sqlite3 command writes the WAL, a shell may fill the spool.
    """
    return [
        place.state / "wake",
        place.state / "tasks.db-wal",
        *(place.state / "spool" / queue for queue in queues),
    ]


def units_of(place: Installation, kind: str, queues: list[str]) -> dict[Path, str]:
    return systemd_units(place, queues) if kind == "systemd" else launchd_plist(place, queues)


def systemd_units(place: Installation, queues: list[str]) -> dict[Path, str]:
    name = name_of(place)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    directory = Path(config if os.path.isabs(config) else Path.home() / ".config") / "systemd/user"
    command = " ".join(quoted(word).replace("$", "$$") for word in unit_command(place, queues))
    paths = "\n".join(f"PathModified={unquoted(path)}" for path in watched(place, queues))
    return {
        directory / f"{name}.service": f"""\
[Unit]
Description=Worker of the task queue, while there is work
# Many short runs in a row are normal; the default limit would stop the path unit for good.
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory=/
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
{paths}

[Install]
WantedBy=default.target
""",
        directory / f"{name}.timer": f"""\
[Unit]
Description=Start the task queue's worker for what was left and what has become due

[Timer]
OnActiveSec=1
OnUnitInactiveSec={TICK_SECONDS}
AccuracySec=10

[Install]
WantedBy=default.target
""",
    }


def quoted(text: str) -> str:
    """Return a word in quotes, as a systemd unit has it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def unquoted(path: Path) -> str:
    """Return a value of a systemd unit that takes the rest of its line as it is."""
    return str(path).replace("%", "%%")


def launchd_plist(place: Installation, queues: list[str]) -> dict[Path, str]:
    import plistlib

    name, log = name_of(place), str(place.state / "logs" / "service.log")
    job = {
        "Label": name,
        "ProgramArguments": unit_command(place, queues),
        "WorkingDirectory": "/",
        "WatchPaths": [str(path) for path in watched(place, queues)],
        "StartInterval": TICK_SECONDS,
        "RunAtLoad": True,
        "ThrottleInterval": 1,
        # A handler that outlives a killed worker may finish.
        "AbandonProcessGroup": True,
        "ExitTimeOut": 60,
        "Umask": 0o077,
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    return {
        Path.home() / "Library/LaunchAgents" / f"{name}.plist": plistlib.dumps(
            job, sort_keys=False
        ).decode()
    }


# ------------------------------------------------------------------------------------- loading them


def load_commands(kind: str, name: str, units: Mapping[Path, str]) -> list[list[str]]:
    if kind == "systemd":
        watching = [f"{name}.path", f"{name}.timer"]
        verbs = (["daemon-reload"], ["enable", *watching], ["restart", *watching])
        return [["systemctl", "--user", *verb] for verb in verbs]
    domain = f"gui/{os.getuid()}"
    return [
        ["launchctl", "bootout", f"{domain}/{name}"],
        ["launchctl", "bootstrap", domain, str(next(iter(units)))],
    ]


def enable(kind: str, place: Installation, queues: list[str]) -> None:
    """Load the units, now and at each login. Raises Trouble."""
    if why_no_manager(kind):
        raise Trouble(by_hand(kind, place, queues))
    for command in load_commands(kind, name_of(place), units_of(place, kind, queues)):
        why = why_not(command)
        # bootout fails where nothing was loaded before.
        if why and command[1] != "bootout":
            raise Trouble(f"the units are written but not loaded: {shlex.join(command)}: {why}")
    print("loaded: a worker starts when there is work")
    if kind == "systemd":
        print("to have it run while you are logged out, too: loginctl enable-linger")


def why_no_manager(kind: str) -> str:
    """Return why no manager of this user's units answers here, or "" if one does."""
    if kind == "systemd":
        return why_not(["systemctl", "--user", "show-environment"])
    return why_not(["launchctl", "print", f"gui/{os.getuid()}"])


def by_hand(kind: str, place: Installation, queues: list[str]) -> str:
    """Return a message that says what works without a manager."""
    return (
        f"the units are written, and nothing can load them here: {why_no_manager(kind)}."
        f" In a login session: {place.typed()} service --enable."
        f" Until then, keep a worker running: {place.typed()} work {' '.join(queues)}"
    )


def is_loaded(kind: str, place: Installation) -> bool:
    name = name_of(place)
    if kind == "systemd":
        return not why_not(["systemctl", "--user", "is-active", f"{name}.path"])
    return not why_not(["launchctl", "print", f"gui/{os.getuid()}/{name}"])


def unload(units: list[str]) -> None:
    """Stop the recorded units, if a manager runs them."""
    names = [Path(unit).name for unit in units]
    watching = [name for name in names if name.endswith((".path", ".timer"))]
    if watching:
        why_not(["systemctl", "--user", "disable", "--now", *watching])
    for name in names:
        if name.endswith(".plist"):
            why_not(["launchctl", "bootout", f"gui/{os.getuid()}/{name.removesuffix('.plist')}"])


def reload(units: list[str]) -> None:
    """Have systemd forget the removed units."""
    if any(unit.endswith(".service") for unit in units):
        why_not(["systemctl", "--user", "daemon-reload"])


def why_not(command: list[str]) -> str:
    """Run a command; return why it failed, in one line, or ""."""
    try:
        ran = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **environment.of_the_account()},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (
        ran.stderr.strip().replace("\n", "; ") or f"exit code {ran.returncode}"
        if ran.returncode
        else ""
    )
