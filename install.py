#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Put the queue where Claude Code's hooks find it, and take it away again.

    install.py install               into ~/.claude/automation/lychee; asks about the hooks
    install.py install --dry-run     shows what would be done, and the change to settings.json

install copies the scripts to PREFIX/runtime/lib and the example handlers to PREFIX/handlers.
Handlers that you changed stay yours. It makes PREFIX/state (or TASK_QUEUE_STATE) with its queues,
fills uv's cache so that no hook ever downloads, and offers two hooks for settings.json: a link
check when Claude has answered, and a report of what tasks have found, which goes with your next
prompt. Run it again to upgrade: running workers are not disturbed. uninstall takes out what install
and `tq service` put in, never the state and nothing that you changed.

exit codes: 0 done; 1 something was left undone, and the message says what; 64 usage.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

# A dry run writes nothing, compiled modules included.
sys.dont_write_bytecode |= "--dry-run" in sys.argv

from taskqueue import cli, environment, installation, service  # noqa: E402
from taskqueue import settings as queue_settings  # noqa: E402
from taskqueue.installation import (  # noqa: E402
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

# Long enough for one script's packages to be downloaded.
WARM_SECONDS = 600.0

HERE = Path(__file__).resolve().parent
QUEUES = ("notifications", "approvals", "completions")


def parser() -> cli.Parser:
    top = cli.make_parser("install.py", __doc__)
    # --command is the program that is installed; what argparse calls a command is a verb here.
    verbs = top.add_subparsers(
        dest="verb", metavar="COMMAND", required=True, parser_class=cli.Parser
    )

    def verb(name: str, help: str) -> Callable:
        sub = verbs.add_parser(name, help=help, description=help)
        default = "default ~/.claude/automation/lychee"
        sub.add_argument("prefix", metavar="PREFIX", nargs="?", help=default)
        sub.add_argument("--dry-run", action="store_true", help="show it all, and write nothing")
        return sub.add_argument

    add = verb("install", "copy the scripts, make the queues, offer the hooks and the command")
    ask = "or not (default: ask on a terminal)"
    add("--hook", choices=("yes", "no"), help=f"add the hook that checks links, {ask}")
    add("--event", metavar="NAME", type=event, default="Stop", help="which fires it (default Stop)")
    add("--report", choices=("yes", "no"), help=f"add the hook that tells what was found, {ask}")
    add("--environment", choices=("yes", "no"), help=f"give workers what is set here, {ask}")
    add("--command", metavar="NAME", type=program, help="put it into ~/.local/bin as NAME (or ask)")
    add("--no-command", action="store_true", help="put no command there")
    add("--yes", action="store_true", help="answer yes to every question")
    add("--no-warm", action="store_true", help="leave uv's cache alone; a first run may download")
    verb("uninstall", "take out what install and `tq service` put in, never the state")
    return top


def event(name: str) -> str:
    """An event of Claude Code that may fire a hook of the queue."""
    if name == "WorktreeCreate":
        raise argparse.ArgumentTypeError(
            "Claude Code takes a worktree's path from what a WorktreeCreate hook prints, and a hook"
            " of the queue prints nothing: no worktree could be made any more"
        )
    if not re.fullmatch("[A-Z][A-Za-z]{0,63}", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not the name of an event, like SessionEnd")
    return name


def program(name: str) -> str:
    """A name for the command."""
    if not re.fullmatch("[a-z][a-z0-9_-]{0,30}", name):
        raise argparse.ArgumentTypeError(f"{name!r}: use small letters, digits, - and _")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    # What is made on the way is its owner's alone, whatever umask the session has.
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


def install(place: Installation, args: argparse.Namespace) -> int:
    needed = [HERE / "queue_helpers.py", HERE / "enqueue.py", template("hook.sh")]
    if not all(path.is_file() for path in needed):
        raise Trouble(f"{HERE} lacks queue_helpers.py, enqueue.py or hook.sh: use a whole checkout")
    uv, python = installation.find_uv(), find_python()
    place.record.update(state=str(place.state), uv=uv, python=python)
    files = plan(place)
    for path, _, _, action in files:
        print(f"{action:<10} {place.name(path)}")
    failed = 0
    if args.dry_run:
        action = "unchanged" if (place.state / "tasks.db").exists() else "make"
        print(f"{action:<10} {place.name(place.state)}: the queues")
    else:
        put_in_order(place, files)
        failed |= make_state(place)
    failed |= write_environment(place, args)
    if not args.dry_run:
        failed |= service.rewrite(place)
        failed |= warm(place, uv) if uv and not args.no_warm else 0
    if not uv:
        failed |= complain("uv was not found, and workers need it: python3 -m pip install uv")
    if not python and not uv:
        failed |= complain("no Python 3.11 was found either: until then hooks fill the spool")
    failed |= offer_hooks(place, args)
    failed |= offer_command(place, args)
    if not args.dry_run:
        print(f"installed in {place.prefix}; check it with: {place.typed()} doctor")
    return failed


def scripts() -> list[Path]:
    """What goes to runtime/lib: the modules, queue_helpers before all, then the scripts.

    A script is a Python file with a PEP 723 header; all else beside this file stays where it is.
    """
    modules = [HERE / "queue_helpers.py", *sorted(HERE.glob("taskqueue/*.py"))]
    others = [path for path in sorted(HERE.glob("*.py")) if path not in modules]
    return modules + [path for path in others if is_script(path.read_bytes())]


def is_script(content: bytes) -> bool:
    return re.search(rb"^# /// script$", content, re.MULTILINE) is not None


def plan(place: Installation) -> list[tuple[Path, bytes, int, str]]:
    """(path, content, mode, action) of every file.

    Scripts are always replaced, handlers only while they are ours. What an older version put into
    runtime/lib, and this one has no more, is removed.
    """
    wanted = []
    for path in scripts():
        mode = 0o700 if is_script(path.read_bytes()) else 0o600
        wanted.append((place.lib / path.relative_to(HERE), path.read_bytes(), mode))
    for path in sorted([*HERE.glob("*.sh"), *HERE.glob("bin/*.sh")]):
        # Whoever installs from the installed copy needs them.
        wanted.append((place.lib / path.relative_to(HERE), path.read_bytes(), 0o600))
    wanted.append((place.hook, filled_in(place, "hook.sh"), 0o700))
    wanted.append((place.hook.with_name("tq"), filled_in(place, "tq.sh"), 0o700))
    for path in sorted((HERE / "handlers").glob("[!._]*")):
        if path.is_file():
            mode = 0o700 if os.access(path, os.X_OK) else 0o600
            wanted.append((place.handlers / path.name, path.read_bytes(), mode))
    files = [(*file, action_for(place, *file)) for file in wanted]
    before = {place.prefix / name for name in place.record["files"]} - {path for path, *_ in wanted}
    for path in sorted(before):
        if path.is_relative_to(place.lib) and digest_there(path) in place.known(path):
            files.append((path, b"", 0, "remove"))
    return files


def action_for(place: Installation, path: Path, content: bytes, mode: int) -> str:
    there = digest_there(path)
    if there is None:
        return "add"
    if there == digest(content):
        return "unchanged" if stat.S_IMODE(path.stat().st_mode) == mode else "update"
    if path.parent == place.handlers and there not in place.known(path):
        return "keep yours"
    return "update"


def put_in_order(place: Installation, files: list[tuple[Path, bytes, int, str]]) -> None:
    """Write the files, the modules first: an old script works with newer modules."""
    import queue_helpers as q

    for path in (place.settings, *(path for path, *_ in files)):
        # What a killed run has left.
        begun(path).unlink(missing_ok=True)
    new = [file[:3] for file in files if file[3] in ("add", "update")]
    # Python makes the last one with the umask of whoever runs a script first.
    package = place.lib / "taskqueue"
    for directory in (
        place.lib.parent,
        place.lib,
        package,
        *(lib / "__pycache__" for lib in (place.lib, package)),
    ):
        q.make_private(directory, parents=True)
    modules = [file for file in new if not is_script(file[1]) and file[0].suffix == ".py"]
    rest = [file for file in new if file not in modules]
    place.put(modules + rest)
    for path, _, _, action in files:
        if action == "remove":
            path.unlink(missing_ok=True)
            del place.record["files"][place.name(path)]
    place.save()


def template(name: str) -> Path:
    """The sh script whose paths install fills in."""
    path = HERE / "bin" / name
    return path if path.is_file() else HERE / name


def filled_in(place: Installation, name: str) -> bytes:
    """bin/hook.sh or tq.sh with its paths, each in the line that has its name."""
    uv, python = place.record.get("uv"), place.record.get("python")
    values = {"lib": place.lib, "python": python or "", "uv": uv or ""}
    values |= {"state": place.state, "home": Path.home()}
    text = template(name).read_text()
    for key, value in values.items():
        text = text.replace(f"\n{key}=\n", f"\n{key}={shlex.quote(str(value))}\n", 1)
    return text.encode()


def write_environment(place: Installation, args: argparse.Namespace) -> int:
    """Write the environment of workers, or add to yours what is set now, if that is wanted."""
    path = place.prefix / "environment"
    try:
        there = environment.read(path)
    except environment.Unfit as error:
        return complain(error)
    offered = environment.decisive(os.environ).items() - there.items()
    offered = {name: value for name, value in sorted(offered) if name not in there}
    added = offered if offered and wants_variables(path, args, list(offered)) else {}
    if path.exists():
        text = path.read_text("utf-8", "surrogateescape")
        new = environment.with_lines(text, programs(place, there) | added)
    else:
        new = environment.text_of(first_variables(place) | added)
    content = new.encode("utf-8", "surrogateescape")
    old = digest_there(path)
    action = "add" if old is None else "unchanged" if old == digest(content) else "update"
    print(f"{action:<10} {place.name(path)}: what workers have that hooks and the service start")
    if args.dry_run or action == "unchanged":
        return 0
    if old is None or old in place.known(path):
        place.put([(path, content, 0o600)])
    else:
        # It has lines of yours: uninstall leaves it.
        write_file(path, content, 0o600)
    return 0


def wants_variables(path: Path, args: argparse.Namespace, names: list[str]) -> bool:
    """Whether variables that are set here go into the environment of workers."""
    which = ", ".join(names)
    if args.environment or args.yes:
        return args.environment != "no"
    if args.dry_run or not sys.stdin.isatty():
        print(f"workers get none of what is set here ({which}): say --environment yes")
        return False
    return agrees(f"Set here: {which}. Add them to {path}, for workers? [Y/n] ")


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
    """The lines for uv and Python whose programs are gone, as they are now."""
    now = {"UV": place.record["uv"], "UV_PYTHON": place.record["python"]}
    return {
        name: path
        for name, path in now.items()
        if path and not os.access(there.get(name, ""), os.X_OK)
    }


def make_state(place: Installation) -> int:
    """Make the database and the directories, their owner's alone, whoever made them first."""
    import queue_helpers as q

    directories = [place.state, *(place.state / name for name in ("spool", "workers", "logs"))]
    directories += [place.state / "spool" / queue for queue in QUEUES]
    try:
        q.close(q.connect(place.state))
        q.wake(place.state)
    except q.QueueError as error:
        return complain(error)
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    files = [
        path
        for path in place.state.iterdir()
        if path.name == "wake" or path.name.startswith("tasks.db")
    ]
    for path, mode in [(path, 0o700) for path in directories] + [
        (path, 0o600) for path in files if path.is_file()
    ]:
        path.chmod(mode)
    return 0


def warm(place: Installation, uv: str) -> int:
    """Have uv fetch what the scripts need; once they ran, they run without a network."""
    failed = 0
    for path in [
        *(place.lib / script.name for script in scripts()),
        *sorted(place.handlers.glob("*")),
    ]:
        if not path.is_file() or not is_script(path.read_bytes()):
            continue
        # A handler need not know --help.
        is_handler = path.parent == place.handlers
        command = (
            [uv, "sync", "--script", str(path)]
            if is_handler
            else [uv, "run", "--script", str(path), "--help"]
        )
        why = why_not(command, timeout=WARM_SECONDS, cwd=place.prefix, env=warm_environment(place))
        if why:
            failed |= complain(
                f"{place.name(path)} does not run yet: {why};"
                f" with a network, run: {shlex.join(command)}"
            )
    return failed


def warm_environment(place: Installation) -> dict[str, str]:
    """This one, with the Python that workers and handlers will have."""
    python = place.record["python"]
    return {**os.environ, **({"UV_PYTHON": python} if python else {})}


def why_not(command: list[str], **options) -> str:
    """Run a command; the last line of its complaint when it failed, else ''."""
    try:
        ran = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, **options
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = ran.stderr.decode("utf-8", "replace").strip().rsplit("\n", 1)[-1]
    return said or f"exit code {ran.returncode}" if ran.returncode else ""


def find_python() -> str | None:
    """The absolute path of a Python that can enqueue and works alone.

    Those that survive an upgrade come first.
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


def offer_command(place: Installation, args: argparse.Namespace) -> int:
    """Put the command into ~/.local/bin if it is wanted, under a name no other program has."""
    directory = Path.home() / ".local/bin"
    name = wanted_command(place, args)
    while name and (taken := taken_by(place, directory / name)):
        say = f"{taken} is another program called {name}"
        if args.command or not sys.stdin.isatty() or args.dry_run:
            return complain(f"{say}: choose another name for the command, with --command NAME")
        name = answer(f"{say}. Another name for the command (empty for none): ")
        try:
            program(name or COMMAND)
        except argparse.ArgumentTypeError as error:
            raise WrongUse(error) from None
    if not name:
        return 0
    path, content = directory / name, filled_in(place, "tq.sh")
    there = digest_there(path) == digest(content) and os.access(path, os.X_OK)
    print(f"{'unchanged' if there else 'update' if path.exists() else 'add':<10} {path}")
    if args.dry_run:
        return 0
    forget_command(place, except_for=path)
    place.record["command"] = str(path)
    place.put([(path, content, 0o700)])
    if str(directory) not in os.environ.get("PATH", "").split(os.pathsep):
        print(f"{directory} is not on your PATH; this line in your shell's profile adds it:")
        print('export PATH="$HOME/.local/bin:$PATH"')
    return 0


def wanted_command(place: Installation, args: argparse.Namespace) -> str:
    """The name of the command; '' when none is wanted. An upgrade need not be told again."""
    if args.no_command:
        return ""
    had = place.record.get("command")
    if args.command or had or args.yes:
        return args.command or (Path(had).name if had else COMMAND)
    if args.dry_run or not sys.stdin.isatty():
        print(f"no command was added to ~/.local/bin: say --command {COMMAND}")
        return ""
    wanted = answer(f"Put the command {COMMAND} into ~/.local/bin? [y/N] ").lower() in ("y", "yes")
    return COMMAND if wanted else ""


def answer(question: str) -> str:
    print(question, end="", flush=True)
    return sys.stdin.readline().strip()


def agrees(question: str) -> bool:
    """Whether a person says yes, or just presses Enter. The end of stdin is a no."""
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    return line != "" and line.strip().lower() in ("", "y", "yes")


def taken_by(place: Installation, path: Path) -> str | None:
    """Which other program a command of this name would replace, or stand behind or before."""
    there = digest_there(path)
    if there is not None and there not in place.known(path):
        return str(path)
    here = os.path.realpath(path.parent)
    entries = [
        entry for entry in os.environ.get("PATH", "").split(os.pathsep) if os.path.isabs(entry)
    ]
    elsewhere = os.pathsep.join(entry for entry in entries if os.path.realpath(entry) != here)
    return shutil.which(path.name, path=elsewhere) if elsewhere else None


def forget_command(place: Installation, except_for: Path) -> None:
    """Remove the command that was put there under another name before, if it is unchanged."""
    had = place.record.get("command")
    if had and had != str(except_for):
        if digest_there(Path(had)) in place.known(Path(had)):
            Path(had).unlink()
        place.record["files"].pop(had, None)


# -------------------------------------------------------------------------------- the offered hooks


def offer_hooks(place: Installation, args: argparse.Namespace) -> int:
    """Offer each hook; where settings.json had better be left alone, say so once."""
    link_check = replace(queue_settings.LINK_CHECK, events=(args.event,))
    offers = []
    for offer, option in ((link_check, "hook"), (queue_settings.REPORT, "report")):
        if getattr(args, option) == "no":
            print(f"no hook was added for the {offer.name} (--{option} no)")
        else:
            offers.append((offer, option))
    try:
        while offers:
            offer_hook(place, args, *offers[0])
            del offers[0]
        return 0
    except (Trouble, OSError) as error:
        by_hand = hooks_by_hand(place, *(offer for offer, _ in offers))
        if isinstance(error, OSError):
            error = f"{error.filename or place.settings}: {error.strerror}; settings.json"
        else:
            error = f"{error}; it"
        return complain(f"{error} was left alone. To have the hook, add by hand: {by_hand}")


def hooks_by_hand(place: Installation, *offers: queue_settings.Offer) -> str:
    groups = {}
    for offer in offers:
        groups |= queue_settings.hook_groups(place, offer)
    return json.dumps({"hooks": groups}, ensure_ascii=False)


def offer_hook(
    place: Installation, args: argparse.Namespace, offer: queue_settings.Offer, option: str
) -> None:
    """Show what settings.json would become with the hook, and write it if that is wanted."""
    text = queue_settings.read(place.settings)
    new, action = queue_settings.with_hook(text, place, offer)
    if new == text:
        print(f"unchanged  {place.settings}: the {offer.name}: {action}")
        return
    print("".join(queue_settings.difference(text, new, place.settings)), end="")
    if args.dry_run:
        return
    if getattr(args, option) != "yes" and not args.yes:
        if not sys.stdin.isatty():
            print(
                f"no hook was added to {place.settings} for the {offer.name}: say --{option} yes,"
                f" or add by hand: {hooks_by_hand(place, offer)}"
            )
            return
        if not agrees(f"{offer.what} Add this hook to {place.settings}? [Y/n] "):
            print(f"no hook was added for the {offer.name}")
            return
    queue_settings.edit(
        place,
        place.settings,
        lambda text: queue_settings.with_hook(text, place, offer)[0],
        commands=[queue_settings.hook_command(place, offer)],
    )
    print(f"{action:<10} {place.settings}: the {offer.name}")


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
    for name, digests in sorted(place.record["files"].items()):
        # Units are recorded with their absolute path.
        path = place.prefix / name
        there = digest_there(path)
        if there is not None:
            print(f"{'remove' if there in digests else 'keep yours':<10} {name}")
        if not args.dry_run:
            begun(path).unlink(missing_ok=True)
            if there in digests:
                path.unlink()
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
    # The record goes last: whoever is killed before that can begin again.
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
    """What Python made of our files goes with them."""
    ours = {Path(name).stem for name in place.record["files"] if name.startswith("runtime/lib/")}
    for compiled in place.lib.rglob("__pycache__/*.pyc"):
        if compiled.name.partition(".")[0] in ours:
            compiled.unlink(missing_ok=True)


def remove_empty(*directories: Path) -> None:
    """Remove those that are empty; others hold the state, or what the user put there."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            pass


def withdraw_hooks(place: Installation, dry_run: bool) -> int:
    """Take our hooks out of each settings.json that got one, and look at the present one."""
    paths = dict.fromkeys([*queue_settings.recorded(place), str(place.settings)])
    return max([withdraw_from(place, Path(path), dry_run) for path in paths])


def withdraw_from(place: Installation, path: Path, dry_run: bool) -> int:
    """Take our hooks out of one settings.json; one that a person changed stays, and is named."""
    try:
        text = queue_settings.read(path)
        if text is None:
            return 0
        new = queue_settings.without_hooks(text, place, path)
        if new != text:
            print("".join(queue_settings.difference(text, new, path)), end="")
        left = list(queue_settings.our_hooks(json.loads(new or "{}"), place.prefix))
        if not dry_run and new != text:
            queue_settings.edit(
                place, path, lambda text: text and queue_settings.without_hooks(text, place, path)
            )
        return name_left(path, left)
    except Trouble as trouble:
        commands = queue_settings.recorded_commands(place, path)
        if not commands:
            return 0
        by_hand = " and with: ".join(commands)
        return complain(f"{trouble}; it was left alone. Remove by hand the hook with: {by_hand}")


def name_left(path: Path, left: Iterable[tuple]) -> int:
    """Name the hooks that stay and call this installation; 1 if one of them now disturbs Claude."""
    failed = 0
    for event, _, hook, words in left:
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
