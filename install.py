#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Install the queue where Claude Code's hooks find it, and uninstall it.

    install.py install               into ~/.claude/automation/lychee
    install.py install --dry-run     show what it would do, and the change to settings.json

install says what it will do, asks, and then does it. It copies the scripts to PREFIX/runtime/lib and
the example handlers to PREFIX/handlers; handlers that you changed stay yours. It makes PREFIX/state
(or TASK_QUEUE_STATE) with its queues, and fills uv's cache so that no hook downloads anything. It
offers the command tq with completion for your shell, hooks for settings.json (a link check when
Claude has answered, a report of what tasks have found with your next prompt, and one that wakes an
idle session), and a skill that tells Claude how to use tq. Run it again to upgrade: running workers
finish what they run, and leave. uninstall removes what install and `tq service` put in place, never
the state and nothing that you changed.

exit codes: 0 done; 1 something was left undone, and the message says what; 64 usage.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

# A dry run writes nothing, compiled modules included.
sys.dont_write_bytecode |= "--dry-run" in sys.argv

from taskqueue import cli, files, installation, parts, service  # noqa: E402
from taskqueue import settings as queue_settings  # noqa: E402
from taskqueue.installation import (  # noqa: E402
    Installation,
    Trouble,
    begun,
    digest_there,
    from_home,
    only_one,
)
from taskqueue.remedies import as_typed  # noqa: E402

# Long enough for one script's packages to be downloaded.
WARM_SECONDS = 600.0
# What a first install fetches; the hub's demo fetches PostgreSQL, 75 MB, at its first run.
DOWNLOAD = "up to 410 MB to download, of which lychee has 300"

FILE_ACTIONS = ("add", "update", "remove", "unchanged")

HERE = Path(__file__).resolve().parent
QUEUES = ("notifications", "approvals", "completions")


def parser() -> cli.Parser:
    top = cli.make_parser("install.py", __doc__)
    # The option --command names the installed program, so argparse's command is a verb here.
    verbs = top.add_subparsers(
        dest="verb", metavar="COMMAND", required=True, parser_class=cli.Parser
    )

    def verb(name: str, help: str) -> Callable:
        prog = as_typed(f"install.py {name}")
        sub = verbs.add_parser(name, prog=prog, help=help, description=help)
        default = "default: this installation's; in a checkout ~/.claude/automation/lychee"
        sub.add_argument("prefix", metavar="PREFIX", nargs="?", help=default)
        sub.add_argument("--dry-run", action="store_true", help="show it all, and write nothing")
        return sub.add_argument

    add = verb("install", "say what it will do, ask, and do it")
    ask = "or not (default: ask on a terminal)"
    add("--hook", choices=("yes", "no"), help=f"add the hook that checks links, {ask}")
    add("--event", metavar="NAME", type=event, default="Stop", help="which fires it (default Stop)")
    add("--report", choices=("yes", "no"), help=f"add the hook that tells what was found, {ask}")
    add(
        "--wake",
        choices=("yes", "no"),
        help="add the hook that wakes idle sessions, or take it out",
    )
    add("--skill", choices=("yes", "no"), help=f"tell Claude how to use the command, {ask}")
    add("--completion", choices=("yes", "no"), help=f"have your shell complete the command, {ask}")
    add("--environment", choices=("yes", "no"), help=f"give workers what is set here, {ask}")
    add(
        "--command",
        metavar="NAME",
        type=parts.program,
        help="put it into ~/.local/bin as NAME (or ask)",
    )
    add("--no-command", action="store_true", help="put no command there")
    add("--yes", action="store_true", help="answer yes to every question but the wake-up")
    add("--no-warm", action="store_true", help="leave uv's cache alone; a first run may download")
    add = verb("uninstall", "take out what install and `tq service` put in, never the state")
    add("--yes", action="store_true", help="accepted, as uninstall asks nothing")
    return top


def event(name: str) -> str:
    """Check the name of an event that fires a hook of the queue. Raises ArgumentTypeError."""
    if name == "WorktreeCreate":
        raise argparse.ArgumentTypeError(
            "a WorktreeCreate hook must print the path of the worktree, and hooks of the queue print"
            " nothing: Claude Code could make no worktree any more"
        )
    if not re.fullmatch("[A-Z][A-Za-z]{0,63}", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not the name of an event, like SessionEnd")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    # New files are private, whatever umask the session has.
    os.umask(0o077)
    return cli.answer_for("install.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    # An installed copy is about its own installation.
    here = installation.installed(__file__)
    if args.prefix is None and here:
        args.prefix = here.prefix
    if args.verb == "install":
        return install(args)
    place = Installation(args.prefix)
    if args.dry_run:
        return uninstall(place, args)
    if not place.prefix.is_dir():
        raise Trouble(f"{place.prefix} is not there: nothing is installed; see just install")
    with only_one(place.prefix):
        return uninstall(Installation(args.prefix), args)


complain = partial(cli.complain, cli.EX_FAILED, "install.py")


# ------------------------------------------------------------------------------------------ install


class Steps:
    """The steps of an install: one that fails is told, and the others still run."""

    def __init__(self) -> None:
        self.failed = 0

    def run(self, step: Callable, *args):
        """Return what the step returns, or None after its Trouble was told."""
        try:
            return step(*args)
        except Trouble as trouble:
            self.failed = complain(trouble)


def install(args: argparse.Namespace) -> int:
    needed = [HERE / name for name in ("queue_helpers.py", "enqueue.py", "bin/hook.sh")]
    if not all(path.is_file() for path in needed):
        raise Trouble(
            f"{HERE} lacks queue_helpers.py, enqueue.py or bin/hook.sh: use a whole checkout"
        )
    programs = {"uv": installation.find_uv(), "python": find_python()}
    place, steps = prepared(args, programs), Steps()
    offered = parts.offered(place, args, steps.run)
    hints = list(parts.decide(offered, args))
    show_plan(place, args, offered)
    for hint in hints:
        print(hint)
    if args.dry_run:
        return steps.failed
    if not args.yes and sys.stdin.isatty() and not parts.agreed(offered):
        print("nothing was changed")
        return cli.EX_FAILED
    place.prefix.mkdir(parents=True, exist_ok=True)
    with only_one(place.prefix):
        # Another install may have finished meanwhile.
        place = prepared(args, programs)
        put_in_place(place, args, [part for part in offered if part.wanted], steps)
    return steps.failed


def prepared(args: argparse.Namespace, programs: dict[str, str | None]) -> Installation:
    place = Installation(args.prefix)
    place.record.update(state=str(place.state), **programs)
    return place


def put_in_place(
    place: Installation, args: argparse.Namespace, wanted: list[parts.Part], steps: Steps
) -> None:
    uv = place.record["uv"]
    if uv and not args.no_warm and not place.lib.is_dir():
        print("filling uv's cache, which takes minutes the first time", flush=True)
    files.put_in_order(place, files.plan(place))
    steps.run(make_state, place)
    if uv and not args.no_warm:
        for path in [*place.lib.glob("*.py"), *place.handlers.iterdir()]:
            if path.is_file() and files.is_script(path.read_bytes()):
                steps.run(warm, place, uv, path)
        use_packages(place, uv)
    steps.run(service.rewrite, place)
    changes = [part for part in wanted if part.is_change]
    for part in changes:
        if part.put:
            steps.run(part.put, place)
    if hooks := [part for part in changes if part.offer]:
        steps.run(parts.put_hooks, place, hooks)
    if not uv:
        python = place.record["python"]
        needs = "workers need it" if python else "there is no Python 3.11 either: hooks only store"
        steps.failed = complain(f"uv was not found, and {needs}: python3 -m pip install uv")
    print(f"installed in {place.prefix}; check it with: {place.typed()} doctor")


def show_plan(place: Installation, args: argparse.Namespace, offered: list[parts.Part]) -> None:
    """Print the change to settings.json, then a line for each thing that install will do."""
    shown = [part for part in offered if part.is_planned]
    if any(part.offer for part in shown):
        before = queue_settings.read(place.settings)
        after = parts.change_in(place, before, shown)
        print("".join(queue_settings.difference(before, after, place.settings)), end="")
    planned = [(file.action, place.name(file.path)) for file in files.plan(place)]
    tell_files(planned, place.prefix, args.dry_run)
    lines = [(part.action, f"{from_home(part.path)}: {part.what}") for part in shown]
    if not (place.state / "tasks.db").exists():
        lines.insert(0, ("make", f"{from_home(place.state)}: the queues"))
    if not args.no_warm and place.record["uv"] and not place.lib.is_dir():
        lines.insert(0, ("fill", f"uv's cache: {DOWNLOAD}"))
    if place.record.get("units"):
        lines.append(("update", "the units of `tq service`, where they changed"))
    if any(part.wanted is None and not part.is_planned for part in offered):
        lines.append(("leave out", "the wake-up of idle sessions, which costs money"))
    for action, what in lines:
        print(f"{action:<10} {what}")


def tell_files(actions: list[tuple[str, str]], prefix: Path, each: bool) -> None:
    """Print how many files get which action, and the person's; with `each`, all by name."""
    counts = Counter(action for action, _ in actions)
    told = [f"{action} {counts[action]}" for action in FILE_ACTIONS if counts[action]]
    if told and not each:
        print(f"{'files':<10} {from_home(prefix)}: {', '.join(told)}")
    for action, name in actions:
        if each or action == "keep yours":
            print(f"{action:<10} {name}")


def make_state(place: Installation) -> None:
    """Make the database and the directories, and make them private. Raises Trouble."""
    import queue_helpers as q

    try:
        q.close(q.connect(place.state))
        q.wake(place.state)
    except q.QueueError as error:
        raise Trouble(error) from None
    directories = [place.state, *(place.state / name for name in ("spool", "workers", "logs"))]
    directories += [place.state / "spool" / queue for queue in QUEUES]
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    for path in [place.state / "wake", *place.state.glob("tasks.db*")]:
        if path.is_file():
            path.chmod(0o600)


def warm(place: Installation, uv: str, script: Path) -> None:
    """Have uv fetch a script's packages, so that it runs without a network. Raises Trouble."""
    # A handler need not know --help.
    is_handler = script.parent == place.handlers
    words = (
        ["sync", "--script", str(script)]
        if is_handler
        else ["run", "--script", str(script), "--help"]
    )
    command = [uv, *words]
    why = why_not(command, timeout=WARM_SECONDS, cwd=place.prefix, env=warm_environment(place))
    if why:
        raise Trouble(
            f"{place.name(script)} does not run yet: {why}; with a network, run: {shlex.join(command)}"
        )


def use_packages(place: Installation, uv: str) -> None:
    """Have the hook start workers with the Python of the environment that uv made for worker.py."""
    command = [uv, "python", "find", "--no-config", "--script", str(place.lib / "worker.py")]
    ran = subprocess.run(
        command, check=False, cwd=place.prefix, env=warm_environment(place), capture_output=True
    )
    python = os.fsdecode(ran.stdout).strip()
    has_packages = installation.works_alone([python, "-I", "-c", "import watchdog"])
    place.record["packages"] = python if has_packages else ""
    place.put([files.hook(place)])


def warm_environment(place: Installation) -> dict[str, str]:
    """Return this process's environment with the Python that workers and handlers will have."""
    python = place.record["python"]
    # An error of uv is quoted by its last line.
    return {**os.environ, "UV_NO_WRAP": "1", **({"UV_PYTHON": python} if python else {})}


def why_not(command: list[str], **options) -> str:
    """Run a command; return the last line of its complaint if it failed, else "".

    After its complaint uv may give a hint about something else.
    """
    try:
        ran = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, **options
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = ran.stderr.decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and not line.strip().startswith("hint:")]
    return (said[-1] if said else "") or f"exit code {ran.returncode}" if ran.returncode else ""


def find_python() -> str | None:
    """Return the absolute path of a Python that can enqueue and needs no variables, or None.

    Pythons that survive an upgrade of the system come first.
    """
    # Outside of any virtual environment, uv's own included.
    base = getattr(sys, "_base_executable", None)
    places = [
        "/usr/local/bin/python3",
        "/opt/homebrew/bin/python3",
        base,
        shutil.which("python3"),
        sys.executable,
    ]
    if sys.platform != "darwin":
        # On macOS it may be a stub that opens a window.
        places.insert(0, "/usr/bin/python3")
    versions = "sys.version_info < (3, 11) or sqlite3.sqlite_version_info < (3, 35)"
    fit = f"import sys, sqlite3; sys.exit({versions})"
    for python in places:
        if (
            python
            and os.access(python, os.X_OK)
            and installation.works_alone([os.path.abspath(python), "-I", "-c", fit])
        ):
            return os.path.abspath(python)
    return None


# ---------------------------------------------------------------------------------------- uninstall


def uninstall(place: Installation, args: argparse.Namespace) -> int:
    if not place.record_file.is_file():
        raise Trouble(
            f"{place.prefix} has no installed.json: nothing is installed there, or by hand"
        )
    failed = withdraw_hooks(place, args.dry_run)
    units = place.record.get("units", [])
    if units and not args.dry_run:
        service.unload(units)
    actions = []
    for name, digests in sorted(place.record["files"].items()):
        # Units are recorded with their absolute path.
        path = place.prefix / name
        there = digest_there(path)
        if there is not None:
            actions.append(("remove" if there in digests else "keep yours", name))
        if not args.dry_run:
            begun(path).unlink(missing_ok=True)
            if there in digests:
                path.unlink()
    tell_files(actions, place.prefix, args.dry_run)
    if args.dry_run:
        return failed
    for path in (place.settings, place.record_file):
        begun(path).unlink(missing_ok=True)
    if units:
        service.reload(units)
    remove_compiled(place)
    package = place.lib / "taskqueue"
    remove_empty(place.lib / "bin", package / "__pycache__", package)
    remove_empty(place.lib / "__pycache__", place.lib)
    remove_empty(place.lib.parent, place.handlers)
    remove_skill(place)
    # The record goes last, so that an uninstall that was killed can run again.
    if failed:
        place.record = {**place.record, "files": {}, "units": []}
        place.save()
    else:
        place.record_file.unlink()
    remove_empty(place.prefix)
    if place.state.exists():
        print(f"{'keep':<10} {place.state}: the queues")
    return failed


def remove_skill(place: Installation) -> None:
    """Remove the skill's directory; its file is gone, unless the person changed it."""
    for skill in (Path(name).parent for name in place.record["files"] if name.endswith("SKILL.md")):
        remove_empty(skill, skill.parent)


def remove_compiled(place: Installation) -> None:
    """Remove the compiled modules of our files."""
    ours = {Path(name).stem for name in place.record["files"] if name.startswith("runtime/lib/")}
    for compiled in place.lib.rglob("__pycache__/*.pyc"):
        if compiled.name.partition(".")[0] in ours:
            compiled.unlink(missing_ok=True)


def remove_empty(*directories: Path) -> None:
    """Remove the directories that are empty; others hold the state or the person's files."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            pass


def withdraw_hooks(place: Installation, dry_run: bool) -> int:
    """Take our hooks out of each settings.json that got one, and of the present one."""
    paths = dict.fromkeys([*queue_settings.recorded(place), str(place.settings)])
    return max([withdraw_from(place, Path(path), dry_run) for path in paths])


def withdraw_from(place: Installation, path: Path, dry_run: bool) -> int:
    """Take our hooks out of one settings.json; name those that the person changed."""
    try:
        text = queue_settings.read(path)
        if text is None:
            return 0
        new = queue_settings.without_hooks(text, place, path)
        if new != text:
            print("".join(queue_settings.difference(text, new, path)), end="")
        left = list(queue_settings.our_hooks(json.loads(new or "{}")))
        if not dry_run and new != text:
            queue_settings.edit(
                place, path, lambda text: text and queue_settings.without_hooks(text, place, path)
            )
        here = place.prefix.resolve()
        return name_left(path, [found for found in left if found.prefix == here])
    except Trouble as trouble:
        commands = queue_settings.recorded_commands(place, path)
        if not commands:
            return 0
        by_hand = " and with: ".join(commands)
        return complain(f"{trouble}; it was left alone. Remove by hand the hook with: {by_hand}")


def name_left(path: Path, left: Iterable[queue_settings.Hook]) -> int:
    """Name the hooks that stay and call this installation; return 1 if one of them blocks Claude."""
    failed = 0
    for event, _, hook, *_ in left:
        words = queue_settings.words_of(hook)
        script = next((word for word in words if word.endswith(("enqueue.py", "report.py"))), None)
        if script:
            failed = complain(
                f"the {event} hook in {path} calls {script},"
                " which is gone: Python then exits 2, and that blocks Claude."
                " Take this hook out by hand: " + json.dumps(hook, ensure_ascii=False)
            )
        else:
            print(f"{'keep yours':<10} {path}: you changed the {event} hook")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
