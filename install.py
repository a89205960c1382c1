#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Install the queue where Claude Code's hooks find it, and uninstall it.

    install.py install               into ~/.claude/automation/lychee
    install.py install --dry-run     show what it would do, and the change to settings.json

install asks first, then acts. It copies the scripts to PREFIX/runtime/lib and the example handlers
to PREFIX/handlers; handlers that you changed stay yours. It makes PREFIX/state (or
TASK_QUEUE_STATE) with its queues, and fills uv's cache so that no hook downloads anything. It
offers hooks for settings.json (a link check when Claude has answered, a report of what tasks have
found with your next prompt, and one that wakes an idle session), the command tq, and a skill that
tells Claude how to use it. Run it again to upgrade: running workers
go on. uninstall removes what install and `tq service` put in place, never the state and nothing
that you changed.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

# A dry run writes nothing, compiled modules included.
sys.dont_write_bytecode |= "--dry-run" in sys.argv

from taskqueue import cli, environment, files, installation, service  # noqa: E402
from taskqueue import settings as queue_settings  # noqa: E402
from taskqueue.installation import (  # noqa: E402
    File,
    Installation,
    Trouble,
    WrongUse,
    begun,
    digest,
    digest_there,
    is_plain,
    only_one,
    write_file,
)
from taskqueue.remedies import as_typed  # noqa: E402
from taskqueue.text import plural  # noqa: E402

# Long enough for one script's packages to be downloaded.
WARM_SECONDS = 600.0
# What a first install fetches; the hub's demo fetches PostgreSQL, 75 MB, at its first run.
DOWNLOAD = "up to 410 MB to download, of which lychee has 300"
# Up to so many files are named one by one.
FEW = 3

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
        default = "default ~/.claude/automation/lychee"
        sub.add_argument("prefix", metavar="PREFIX", nargs="?", help=default)
        sub.add_argument("--dry-run", action="store_true", help="show it all, and write nothing")
        return sub.add_argument

    add = verb("install", "copy the scripts, make the queues, offer the hooks and the command")
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
    add("--environment", choices=("yes", "no"), help=f"give workers what is set here, {ask}")
    add("--command", metavar="NAME", type=program, help="put it into ~/.local/bin as NAME (or ask)")
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


def program(name: str) -> str:
    """Check a name for the command. Raises ArgumentTypeError."""
    if not re.fullmatch("[a-z][a-z0-9_-]{0,30}", name):
        raise argparse.ArgumentTypeError(f"{name!r}: use small letters, digits, - and _")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    # New files are private, whatever umask the session has.
    os.umask(0o077)
    return cli.answer_for("install.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    command = {"install": install, "uninstall": uninstall}[args.verb]
    place = Installation(args.prefix)
    if args.dry_run:
        return command(place, args)
    if args.verb == "install":
        place.prefix.mkdir(parents=True, exist_ok=True)
    elif not place.prefix.is_dir():
        raise Trouble(f"{place.prefix} is not there: nothing is installed; see just install")
    with only_one(place.prefix):
        # Another install may have finished while this one waited for the lock.
        return command(Installation(args.prefix), args)


complain = partial(cli.complain, cli.EX_FAILED, "install.py")


# ------------------------------------------------------------------------------------------ install


class Steps:
    """Steps of an install: one that fails is told, and the others still run."""

    def __init__(self) -> None:
        self.failed = 0

    def run(self, step: Callable, *args):
        """Return what the step returns, or None after its Trouble was told."""
        try:
            return step(*args)
        except Trouble as trouble:
            self.failed = complain(trouble)

    def collect(self, steps: Iterable[Callable], *args) -> list:
        """Return all that the steps return, each a list."""
        return [found for step in steps for found in self.run(step, *args) or ()]


def install(place: Installation, args: argparse.Namespace) -> int:
    needed = [HERE / name for name in ("queue_helpers.py", "enqueue.py", "bin/hook.sh")]
    if not all(path.is_file() for path in needed):
        raise Trouble(
            f"{HERE} lacks queue_helpers.py, enqueue.py or bin/hook.sh: use a whole checkout"
        )
    uv, python = installation.find_uv(), find_python()
    place.record.update(state=str(place.state), uv=uv, python=python)
    planned, steps = files.plan(place), Steps()
    tell_files(actions_of(place, planned, uv is not None and not args.no_warm), args.dry_run)
    command = steps.run(wanted_command, place, args)
    variables = steps.run(wanted_variables, place, args)
    hooks = steps.collect((wanted_hooks, wanted_wake), place, args)
    skill = steps.run(wanted_skill, place, args, command)
    if args.dry_run:
        if command:
            print(f"{'put':<10} {command_directory() / command}")
        return steps.failed
    files.put_in_order(place, planned)
    steps.run(make_state, place)
    if variables is not None:
        write_environment(place, variables)
    if uv and not args.no_warm:
        for path in [*place.lib.glob("*.py"), *place.handlers.iterdir()]:
            if path.is_file() and files.is_script(path.read_bytes()):
                steps.run(warm, place, uv, path)
        use_packages(place, uv)
    steps.run(service.rewrite, place)
    if hooks:
        steps.run(add_hooks, place, hooks)
    steps.run(take_out_wake, place, args)
    if command:
        put_command(place, command)
    put_skill(place, skill)
    if not uv:
        needs = "workers need it" if python else "there is no Python 3.11 either: hooks only store"
        steps.failed = complain(f"uv was not found, and {needs}: python3 -m pip install uv")
    print(f"installed in {place.prefix}; check it with: {place.typed()} doctor")
    return steps.failed


def actions_of(place: Installation, planned: list[File], warms: bool) -> list[tuple[str, str]]:
    """Return what install will do to files, (action, name), before it has asked anything."""
    actions = [(file.action, place.name(file.path)) for file in planned]
    if not (place.state / "tasks.db").exists():
        actions.append(("make", f"the queues in {place.state}"))
    if warms and not place.lib.is_dir():
        actions.append(("fill", f"uv's cache: {DOWNLOAD}"))
    return actions


def tell_files(actions: list[tuple[str, str]], each: bool) -> None:
    """Print each file with its action; with `each` false, only the number where there are many."""
    for action in dict.fromkeys(action for action, _ in actions):
        names = [name for found, name in actions if found == action]
        if not each and action != "keep yours" and len(names) > FEW:
            names = [plural(len(names), "file")]
        for name in names:
            print(f"{action:<10} {name}")


def wanted_variables(place: Installation, args: argparse.Namespace) -> dict[str, str]:
    """Return the variables set here that workers shall get, too. Raises Trouble."""
    path = place.prefix / "environment"
    there = read_environment(path)
    found = environment.decisive(os.environ)
    offered = {name: value for name, value in found.items() if name not in there}
    which = ", ".join(offered)
    if not offered or args.environment == "no":
        return {}
    if args.environment or args.yes:
        return offered
    if args.dry_run or not sys.stdin.isatty():
        print(f"workers get none of what is set here ({which}): say --environment yes")
        return {}
    wanted = agrees(f"Set here: {which}. Add them to {path}, for workers? [Y/n] ")
    return offered if wanted else {}


def read_environment(path: Path) -> dict[str, str]:
    try:
        return environment.read(path)
    except environment.Unfit as error:
        raise Trouble(error) from None


def write_environment(place: Installation, added: dict[str, str]) -> None:
    """Write the environment file of workers, or add lines to the person's."""
    path = place.prefix / "environment"
    if path.exists():
        text = path.read_text("utf-8", "surrogateescape")
        new = environment.with_lines(text, programs(place, read_environment(path)) | added)
    else:
        new = environment.text_of(first_variables(place) | added)
    content = new.encode("utf-8", "surrogateescape")
    old = digest_there(path)
    if old == digest(content):
        return
    print(f"{'update' if old else 'add':<10} {place.name(path)}: the environment of workers")
    if old is None or old in place.known(path):
        place.put([File(path, content, 0o600)])
    else:
        # The person's lines are in it, so uninstall leaves it.
        write_file(path, content, 0o600)


def first_variables(place: Installation) -> dict[str, str]:
    home = str(Path.home())
    entries = os.environ.get("PATH", "").split(os.pathsep)
    cache = os.environ.get("UV_CACHE_DIR", "")
    found = {
        "HOME": home,
        "LANG": os.environ.get("LANG") or "C.UTF-8",
        "PATH": environment.search_path(entries, home, place.record["uv"]),
        "UV": place.record["uv"] or "",
        "UV_CACHE_DIR": cache if os.path.isabs(cache) else "",
        "UV_PYTHON": place.record["python"] or "",
    }
    if not all(map(is_plain, found.values())):
        raise WrongUse(
            "HOME or PATH has control characters or is not UTF-8: workers need plain ones"
        )
    return found


def programs(place: Installation, there: dict[str, str]) -> dict[str, str]:
    """Return new values where the file names programs that are gone, or comes from another HOME."""
    now = {"UV": place.record["uv"], "UV_PYTHON": place.record["python"]}
    found = {
        name: path
        for name, path in now.items()
        if path and not os.access(there.get(name, ""), os.X_OK)
    }
    home, before = Path.home(), there.get("HOME", "/")
    if place.prefix.is_relative_to(home) and not place.prefix.is_relative_to(before):
        path = there.get("PATH", "").replace(f"{before}/", f"{home}/")
        entries = (entry for entry in path.split(os.pathsep) if environment.is_ours(entry))
        found |= {"HOME": str(home), "PATH": os.pathsep.join(entries)}
    return found


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


# ------------------------------------------------------------------------------------- the command

COMMAND = "tq"
# What bin/tq.sh has said in its second line since its first version.
COMMAND_BEGINS = "\n# The task queue's command: "


def command_directory() -> Path:
    return Path.home() / ".local/bin"


def wanted_command(place: Installation, args: argparse.Namespace) -> str:
    """Return the name of the command, one that no other program has; "" for none. Raises Trouble."""
    name = asked_command(place, args)
    while name and (taken := taken_by(place, command_directory() / name)):
        say = f"{taken} is another program called {name}"
        if args.command or not sys.stdin.isatty() or args.dry_run:
            raise Trouble(f"{say}: choose another name for the command, with --command NAME")
        name = answer(f"{say}. Another name for the command (empty for none): ")
        try:
            program(name or COMMAND)
        except argparse.ArgumentTypeError as error:
            raise WrongUse(error) from None
    return name


def asked_command(place: Installation, args: argparse.Namespace) -> str:
    """Return the name that the options, an earlier install or the person give the command."""
    if args.no_command:
        return ""
    had = place.record.get("command")
    if args.command or had or args.yes:
        return args.command or (Path(had).name if had else COMMAND)
    if args.dry_run or not sys.stdin.isatty():
        print(f"no command was added to ~/.local/bin: say --command {COMMAND}")
        return ""
    return COMMAND if agrees(f"Put the command {COMMAND} into ~/.local/bin? [Y/n] ") else ""


def put_command(place: Installation, name: str) -> None:
    """Put the command into ~/.local/bin, and say how to have that on PATH."""
    path, content = command_directory() / name, files.filled_in(place, "tq.sh")
    there = digest_there(path) == digest(content) and os.access(path, os.X_OK)
    before = runs(path)
    if before and before != place.prefix:
        print(f"{'replace':<10} {path}: it ran {before}")
    else:
        print(f"{'unchanged' if there else 'update' if path.exists() else 'add':<10} {path}")
    forget_command(place, except_for=path)
    place.record["command"] = str(path)
    place.put([File(path, content, 0o700)])
    if str(path.parent) not in os.environ.get("PATH", "").split(os.pathsep):
        print(f"{path.parent} is not on your PATH; this line in your shell's profile adds it:")
        print('export PATH="$HOME/.local/bin:$PATH"')


def answer(question: str) -> str:
    print(question, end="", flush=True)
    return sys.stdin.readline().strip()


def agrees(question: str) -> bool:
    """Return whether the person says yes or presses Enter. The end of stdin is a no."""
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    return line != "" and line.strip().lower() in ("", "y", "yes")


def taken_by(place: Installation, path: Path) -> str | None:
    """Return another program of this name, there or elsewhere on PATH, if one exists."""
    there = digest_there(path)
    if there is not None and there not in place.known(path) and not runs(path):
        return str(path)
    here = os.path.realpath(path.parent)
    entries = [
        entry for entry in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(entry)
    ]
    elsewhere = os.pathsep.join(entry for entry in entries if os.path.realpath(entry) != here)
    found = shutil.which(path.name, path=elsewhere) if elsewhere else None
    return found if found and not runs(Path(found)) else None


def runs(path: Path) -> Path | None:
    """Return the prefix of the installation that a command runs; None for another program.

    A command that the person changed is another program.
    """
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lib = re.search("^lib=(.+)$", text, re.MULTILINE) if COMMAND_BEGINS in text else None
    words = shlex.split(lib[1]) if lib else []
    if not words or not words[0].endswith("/runtime/lib"):
        return None
    other = Installation(Path(words[0]).parent.parent)
    known = other.known(path)
    return other.prefix if not known or digest_there(path) in known else None


def forget_command(place: Installation, except_for: Path) -> None:
    """Remove the command that an earlier install put there under another name, if it is unchanged."""
    had = place.record.get("command")
    if had and had != str(except_for):
        if digest_there(Path(had)) in place.known(Path(had)):
            Path(had).unlink()
        place.record["files"].pop(had, None)


def wanted_skill(place: Installation, args: argparse.Namespace, command: str | None) -> File | None:
    """Return the file that tells Claude how to use the command, where the person wants it."""
    path = place.settings.parent / "skills/task-queue/SKILL.md"
    source = HERE / "skills/task-queue/SKILL.md"
    if not source.is_file():
        return None
    text = source.read_text().replace("`task-queue", f"`{command}")
    content = text.replace("\ntask-queue ", f"\n{command} ").encode()
    there = digest_there(path)
    if not command or args.skill == "no" or there == digest(content):
        return None
    if there is not None and there not in place.known(path):
        print(f"{'keep yours':<10} {path}")
        return None
    skill = File(path, content, 0o600, "update" if there else "add")
    if there or args.yes or args.skill == "yes":
        return None if args.dry_run else skill
    if args.dry_run or not sys.stdin.isatty():
        print(f"Claude is not told how to use {command}: say --skill yes")
        return None
    return skill if agrees(f"Tell Claude how to use {command}, with {path}? [Y/n] ") else None


def put_skill(place: Installation, skill: File | None) -> None:
    if skill:
        place.put([skill])
        print(f"{skill.action:<10} {skill.path}")


def remove_skill(place: Installation) -> None:
    """Remove the skill's directory; its file is gone, unless the person changed it."""
    for skill in (Path(name).parent for name in place.record["files"] if name.endswith("SKILL.md")):
        remove_empty(skill, skill.parent)


# -------------------------------------------------------------------------------- the offered hooks


def wanted_hooks(place: Installation, args: argparse.Namespace) -> list[queue_settings.Offer]:
    """Return the offered hooks that settings.json shall get. Raises Trouble."""
    link_check = replace(queue_settings.LINK_CHECK, events=(args.event,))
    offers = [link_check, queue_settings.REPORT]
    offers = [offer for offer in offers if getattr(args, offer.option) != "no"]
    try:
        return list(chosen_hooks(place, args, offers))
    except Trouble as trouble:
        raise left_alone(place, trouble, offers) from None


def chosen_hooks(
    place: Installation, args: argparse.Namespace, offers: list[queue_settings.Offer]
) -> Iterator[queue_settings.Offer]:
    """Show what each hook changes in settings.json, and yield those that the person wants."""
    text = queue_settings.read(place.settings)
    for offer in offers:
        new, action, remark = queue_settings.with_hook(text, place, offer)
        if action in ("replace", "unchanged"):
            print(f"{action:<10} {place.settings}: the {offer.name}: {remark}")
        if new == text:
            continue
        print("".join(queue_settings.difference(text, new, place.settings)), end="")
        if not args.dry_run and wants_hook(place, args, offer):
            yield offer
            text = new


def wants_hook(place: Installation, args: argparse.Namespace, offer: queue_settings.Offer) -> bool:
    if getattr(args, offer.option) == "yes" or args.yes:
        return True
    if not sys.stdin.isatty():
        print(
            f"no hook is added to {place.settings} for the {offer.name}: say --{offer.option} yes,"
            f" or add by hand: {hooks_by_hand(place, [offer])}"
        )
        return False
    return agrees(f"{offer.what} Add this hook to {place.settings}? [Y/n] ")


def wanted_wake(place: Installation, args: argparse.Namespace) -> list[queue_settings.Offer]:
    """Return the hook that wakes sessions where the person wants it, who has to say so.

    Raises Trouble for a client that was not seen to support it.
    """
    offer, path = queue_settings.WAKE, place.settings
    try:
        text = queue_settings.read(path)
    except Trouble:
        # wanted_hooks() told it, unless it was not asked to read the file.
        if args.wake == "yes":
            raise
        return []
    is_there = queue_settings.has_wake(json.loads(text or "{}"))
    may_ask = not args.yes and not args.dry_run and sys.stdin.isatty()
    if args.wake == "no" or not (args.wake or is_there or may_ask):
        return []
    why = queue_settings.why_no_wake(queue_settings.claude_version())
    new, action, remark = queue_settings.with_hook(text, place, offer)
    if why:
        if not args.wake:
            return []
        raise Trouble(f"{why}: no hook was added for the {offer.name}")
    if action in ("replace", "unchanged"):
        print(f"{action:<10} {path}: the {offer.name}: {remark}")
    if new == text:
        return []
    if not (args.wake or is_there):
        answered = answer(f"{offer.what} Add this hook to {path}? [y/N] ").lower()
        return [offer] if answered in ("y", "yes") else []
    print("".join(queue_settings.difference(text, new, path)), end="")
    return [offer]


def take_out_wake(place: Installation, args: argparse.Namespace) -> None:
    """Take the hook that wakes sessions out of settings.json where that was asked. Raises Trouble."""

    def change(text: str | None) -> str | None:
        offer = queue_settings.WAKE
        return text and queue_settings.without_hooks(text, place, place.settings, offer)

    if args.wake != "no":
        return
    queue_settings.edit(place, place.settings, change)
    text = queue_settings.read(place.settings)
    if queue_settings.has_wake(json.loads(text or "{}")):
        raise Trouble(
            f"{place.settings} has a hook with --wake that you changed: take it out by hand"
        )


def add_hooks(place: Installation, offers: list[queue_settings.Offer]) -> None:
    """Write the hooks into settings.json. Raises Trouble."""

    actions = {}

    def change(text: str | None) -> str | None:
        for offer in offers:
            text, actions[offer.name], _ = queue_settings.with_hook(text, place, offer)
        return text

    commands = [queue_settings.hook_command(place, offer) for offer in offers]
    try:
        queue_settings.edit(place, place.settings, change, commands=commands)
    except OSError as error:
        why = f"{error.filename or place.settings}: {error.strerror}"
        raise left_alone(place, why, offers) from None
    except Trouble as trouble:
        raise left_alone(place, trouble, offers) from None
    for name, action in actions.items():
        print(f"{action:<10} {place.settings}: the {name}")


def left_alone(place: Installation, why: object, offers: list[queue_settings.Offer]) -> Trouble:
    by_hand = hooks_by_hand(place, offers)
    return Trouble(f"{why}; settings.json was left alone. To have the hook, add by hand: {by_hand}")


def hooks_by_hand(place: Installation, offers: list[queue_settings.Offer]) -> str:
    groups = {}
    for offer in offers:
        groups |= queue_settings.hook_groups(place, offer)
    return json.dumps({"hooks": groups}, ensure_ascii=False)


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
    tell_files(actions, args.dry_run)
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
