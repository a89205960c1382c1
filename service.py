#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Have a worker started whenever there is work, by systemd or launchd.

    service.py                               writes the units, and says how to load them
    service.py --enable --queue approvals    writes and loads them: now and at each login
    service.py --dry-run                     shows them

Nothing runs while there is no work: the units watch the state directory, and look once a minute for
tasks that have become due. Run install.py first. install.py uninstall takes the units out again.

exit codes: 0 done; 1 something was left undone, and the message says what; 64 usage.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

# A dry run writes nothing, compiled modules included.
sys.dont_write_bytecode |= "--dry-run" in sys.argv

from taskqueue import cli  # noqa: E402
from taskqueue.installation import (  # noqa: E402
    Installation,
    Trouble,
    WrongUse,
    answer_for,
    default_prefix,
    digest,
    digest_there,
    is_plain,
    only_one,
)
from taskqueue.installation import complain as complain_of  # noqa: E402
from taskqueue.launch import become_worker  # noqa: E402

# Between the two looks of a run that found nothing at first; it also keeps a service that is
# started for nothing from spinning.
LOOK_TWICE_SECONDS = 1.0

# The units look this often for tasks that have become due.
TICK_SECONDS = 60


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser("service.py", __doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", nargs="?", help="default ~/.claude/automation/lychee")
    add(
        "--queue",
        metavar="QUEUE",
        action="append",
        help="which queues it serves (default notifications)",
    )
    add("--enable", action="store_true", help="load it, too: now and at each login")
    here = "launchd" if sys.platform == "darwin" else "systemd"
    add(
        "--kind", choices=("systemd", "launchd"), default=here, help="default: what this system has"
    )
    add("--dry-run", action="store_true", help="show the files, and write nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["work"]:
        # This is what the units run.
        parser = cli.Parser(prog="service.py work", description=work.__doc__)
        parser.add_argument("prefix", metavar="PREFIX")
        parser.add_argument("queues", metavar="QUEUE", nargs="+")
        told = parser.parse_args(argv[1:])
        return work(Installation(told.prefix), told.queues)
    args = parse(argv)
    os.umask(0o077)
    return answer_for("service.py", lambda: serve(args))


def serve(args: argparse.Namespace) -> int:
    place = Installation(args.prefix)
    if args.dry_run:
        return write_units(place, args)
    if not place.prefix.is_dir():
        raise Trouble(f"{place.prefix} is not there: nothing is installed; see just install")
    with only_one(place.prefix):
        return write_units(Installation(args.prefix), args)


complain = partial(complain_of, "service.py")


# ---------------------------------------------------------------------------------------- the units


def write_units(place: Installation, args: argparse.Namespace) -> int:
    import queue_helpers as q

    if not (place.lib / "service.py").is_file() or not (
        place.record.get("python") or place.record.get("uv")
    ):
        raise Trouble(f"{place.prefix} has no worker to run: run just install first")
    queues = args.queue or ["notifications"]
    for queue in queues:
        try:
            q.check_queue_name(queue)
        except q.InvalidTask as error:
            raise Trouble(error) from None
    units = systemd_units(place, queues) if args.kind == "systemd" else launchd_plist(place, queues)
    for path, content in units.items():
        if args.dry_run:
            print(f"# {path}\n{content}")
        elif digest_there(path) not in (None, digest(content.encode()), *place.known(path)):
            raise Trouble(
                f"{path} is not as it was written here: move it away, then run this again"
            )
    if args.dry_run:
        return 0
    place.record["units"] = sorted({*place.record.get("units", []), *map(str, units)})
    place.put([(path, content.encode(), 0o600) for path, content in units.items()])
    for path in units:
        print(f"{'written':<10} {path}")
    load = load_commands(args.kind, name_of(place), units)
    if args.enable:
        return enable(args.kind, load)
    print(
        "to load it: just service --enable, or: "
        + " && ".join(shlex.join(command) for command in load)
    )
    return 0


def name_of(place: Installation) -> str:
    """The units' name; each prefix has units of its own."""
    suffix = (
        "" if place.prefix == default_prefix() else f"-{digest(str(place.prefix).encode())[:8]}"
    )
    return f"lychee-queue{suffix}"


def unit_environment(place: Installation) -> dict[str, str]:
    """What handlers need of the environment: the user's own PATH, no more, so no secrets."""
    import getpass

    tools = [os.path.dirname(place.record.get("uv") or "")]
    standard = ["/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    # uv's environment for this very script is no place for a handler's programs.
    own = os.path.dirname(sys.executable)
    entries = [
        *os.environ.get("PATH", "").split(os.pathsep),
        *tools,
        str(Path.home() / ".local/bin"),
        *standard,
    ]
    fit = [
        entry
        for entry in entries
        if os.path.isabs(entry) and is_plain(entry) and os.path.isdir(entry)
    ]
    fit = [entry for entry in dict.fromkeys(fit) if entry in standard or entry != own]
    home = str(Path.home())
    if not is_plain(home) or not os.path.isabs(home):
        raise WrongUse(f"HOME={home!r} has control characters, is not UTF-8 or is relative")
    return {
        "PATH": os.pathsep.join(fit),
        "HOME": home,
        "USER": getpass.getuser(),
        "TASK_QUEUE_STATE": str(place.state),
    }


def unit_command(place: Installation, queues: list[str]) -> list[str]:
    python, uv = place.record.get("python"), place.record.get("uv")
    start = (
        [python, "-E", "-s"]
        if python
        else [uv, "run", "-qq", "--offline", "--no-config", "--script"]
    )
    return [*start, str(place.lib / "service.py"), "work", str(place.prefix), *queues]


def watched(place: Installation, queues: list[str]) -> list[Path]:
    """What changes when a task comes in.

    Python touches wake, the sqlite3 command writes the WAL, a hook without Python fills the spool.
    """
    return [
        place.state / "wake",
        place.state / "tasks.db-wal",
        *(place.state / "spool" / queue for queue in queues),
    ]


def systemd_units(place: Installation, queues: list[str]) -> dict[Path, str]:
    name = name_of(place)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    directory = Path(config if os.path.isabs(config) else Path.home() / ".config") / "systemd/user"
    command = " ".join(quoted(word).replace("$", "$$") for word in unit_command(place, queues))
    variables = unit_environment(place).items()
    environment = "\n".join(f"Environment={quoted(f'{key}={value}')}" for key, value in variables)
    paths = "\n".join(f"PathModified={unquoted(path)}" for path in watched(place, queues))
    return {
        directory / f"{name}.service": f"""\
[Unit]
Description=Worker of the task queue, while there is work
# Many short runs in a row are how this works; the default limit would stop the path unit for good.
StartLimitIntervalSec=0

[Service]
Type=exec
{environment}
WorkingDirectory={unquoted(Path.home())}
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
    """A word of a systemd unit in which words are quoted."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def unquoted(path: Path) -> str:
    """A value of a systemd unit that takes the rest of its line as it is."""
    return str(path).replace("%", "%%")


def launchd_plist(place: Installation, queues: list[str]) -> dict[Path, str]:
    import plistlib

    name, log = name_of(place), str(place.state / "logs" / "service.log")
    job = {
        "Label": name,
        "ProgramArguments": unit_command(place, queues),
        "EnvironmentVariables": unit_environment(place),
        "WorkingDirectory": str(Path.home()),
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


def enable(kind: str, load: list[list[str]]) -> int:
    for command in load:
        why = why_not(command)
        # What was not loaded before cannot be taken out.
        if why and command[1] != "bootout":
            return complain(
                f"the service is written but not loaded: {why};"
                f" in a login session, run: {shlex.join(command)}"
            )
    print("loaded: a worker starts when there is work")
    if kind == "systemd":
        print("to have it run while you are logged out, too: loginctl enable-linger")
    return 0


def unload(units: list[str]) -> None:
    """Stop what the recorded units do. Where nothing can be loaded, failures do not count."""
    names = [Path(unit).name for unit in units]
    watching = [name for name in names if name.endswith((".path", ".timer"))]
    if watching:
        why_not(["systemctl", "--user", "disable", "--now", *watching])
    for name in names:
        if name.endswith(".plist"):
            why_not(["launchctl", "bootout", f"gui/{os.getuid()}/{name.removesuffix('.plist')}"])


def reload(units: list[str]) -> None:
    """Tell systemd that units have gone."""
    if any(unit.endswith(".service") for unit in units):
        why_not(["systemctl", "--user", "daemon-reload"])


def why_not(command: list[str]) -> str:
    """Run a command; why it failed, in one line, else ''."""
    try:
        ran = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (
        ran.stderr.strip().replace("\n", "; ") or f"exit code {ran.returncode}"
        if ran.returncode
        else ""
    )


# ------------------------------------------------------------------------------- what the units run


def work(place: Installation, queues: list[str]) -> int:
    """Become a worker if there is work.

    Looks twice: what started this may have seen a commit before others can.
    """
    import queue_helpers as q

    for pause in (0.0, LOOK_TWICE_SECONDS):
        time.sleep(pause)
        try:
            if not is_work(place.state, queues):
                continue
        except q.QueueError as error:
            complain(error)
            continue
        become_worker(place.lib, queues, place.state)
    return 0


def is_work(state: Path, queues: list[str]) -> bool:
    """Whether a worker would find anything; tasks of dead workers are taken back first."""
    import queue_helpers as q

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
    for queue in queues:
        q.ensure_queue(conn, queue)
        if q.has_ready(conn, queue):
            return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
