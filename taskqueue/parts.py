"""The parts of an install that a person may refuse: the command, completion, hooks, skill, variables.

install.py shows them as a plan, asks, and puts in place those that are wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from taskqueue import environment, files, settings
from taskqueue.installation import (
    File,
    Installation,
    Trouble,
    WrongUse,
    digest,
    digest_there,
    from_home,
    is_plain,
    write_file,
)

COMMAND = "tq"
# What bin/tq.sh has said in its second line since its first version.
COMMAND_BEGINS = "\n# The task queue's command: "


@dataclass
class Part:
    """A part that install offers, and whether it is wanted: None if nobody has said so yet."""

    option: str
    action: str
    path: Path
    what: str
    question: str
    wanted: bool | None
    # What to say where nobody can be asked.
    hint: str = ""
    put: Callable[[Installation], None] | None = None
    # Hooks are put into settings.json together.
    offer: settings.Offer | None = None

    @property
    def is_change(self) -> bool:
        return self.action not in ("unchanged", "keep yours")

    @property
    def is_planned(self) -> bool:
        """Return whether a yes to all is a yes to this; what costs money is asked for by itself."""
        return self.wanted is not False and (self.option != "wake" or bool(self.wanted))


def wish(args: argparse.Namespace, option: str) -> bool | None:
    """Return what the options say about a part; None if they leave it to the person."""
    given = getattr(args, option)
    return given == "yes" if given else True if args.yes else None


def offered(place: Installation, args: argparse.Namespace, run: Callable) -> list[Part]:
    """Return the parts that this install offers. `run` calls each step, and tells its Trouble."""
    parts = run(command, place, args) or []
    for name in [part.path.name for part in parts]:
        parts += run(completion, place, args, name) or []
        parts += run(skill, place, args, name) or []
    for step in (hooks, wake_up, variables):
        parts += run(step, place, args) or []
    return parts


def decide(parts: Sequence[Part], args: argparse.Namespace) -> Iterator[str]:
    """Decide for the person where nobody can be asked; yield what is left out for that."""
    for part in parts:
        if part.wanted is None and not args.dry_run and (args.yes or not sys.stdin.isatty()):
            part.wanted = False
            if part.hint:
                yield part.hint


def agreed(parts: Sequence[Part]) -> bool:
    """Ask whether to go on, and where the person wants to choose, about each part."""
    unasked = [part for part in parts if part.wanted is None]
    typed = answer(f"Do all of this? [Y/n{', c to choose' if unasked else ''}] ", "n")
    chooses = bool(unasked) and typed in ("c", "choose")
    for part in unasked:
        if not chooses:
            part.wanted = part.is_planned
        elif part.option in ("completion", "skill") and not parts[0].wanted:
            part.wanted = False
        else:
            choices, default = ("[Y/n]", "y") if part.is_planned else ("[y/N]", "n")
            part.wanted = (answer(f"{part.question} {choices} ", "n") or default) in ("y", "yes")
    return chooses or typed in ("", "y", "yes")


def answer(question: str, at_end: str) -> str:
    """Return what the person types, in small letters; `at_end` at the end of stdin."""
    print(question, end="", flush=True)
    line = sys.stdin.readline()
    return line.strip().lower() if line else at_end


# ------------------------------------------------------------------------------------- the command


def command_directory() -> Path:
    return Path.home() / ".local/bin"


def program(name: str) -> str:
    """Check a name for the command. Raises ArgumentTypeError."""
    if not re.fullmatch("[a-z][a-z0-9_-]{0,30}", name):
        raise argparse.ArgumentTypeError(f"{name!r}: use small letters, digits, - and _")
    return name


def command(place: Installation, args: argparse.Namespace) -> list[Part]:
    """Offer the command, with a name that no other program has. Raises Trouble."""
    had = place.record.get("command")
    name = "" if args.no_command else args.command or (Path(had).name if had else COMMAND)
    while name and (taken := taken_by(place, command_directory() / name)):
        say = f"{taken} is another program called {name}"
        if args.command or not sys.stdin.isatty() or args.dry_run:
            raise Trouble(f"{say}: choose another name for the command, with --command NAME")
        name = answer(f"{say}. Another name for the command (empty for none): ", "")
        try:
            program(name or COMMAND)
        except argparse.ArgumentTypeError as error:
            raise WrongUse(error) from None
    if not name:
        return []
    path, before = command_directory() / name, runs(command_directory() / name)
    is_same = digest_there(path) == digest(files.filled_in(place, "tq.sh"))
    is_there = is_same and os.access(path, os.X_OK) and place.known(path)
    action = "unchanged" if is_there else "update" if before else "add"
    instead = ""
    if before and before != place.prefix:
        action, instead = "replace", f", instead of that of {from_home(before)}"
    return [
        Part(
            "command",
            action,
            path,
            f"the command{instead}",
            f"Put the command {name} into ~/.local/bin{instead}?",
            True if args.command or had or args.yes else None,
            f"no command was added to ~/.local/bin: say --command {COMMAND}",
            partial(put_command, path=path),
        )
    ]


def put_command(place: Installation, path: Path) -> None:
    """Put the command into ~/.local/bin, and say how to have that on PATH."""
    forget_command(place, except_for=path)
    if (before := runs(path)) and before != place.prefix:
        give_up_command(Installation(before))
    place.record["command"] = str(path)
    place.put([File(path, files.filled_in(place, "tq.sh"), 0o700)])
    if str(path.parent) not in os.environ.get("PATH", "").split(os.pathsep):
        print(f"{path.parent} is not on your PATH; this line in your shell's profile adds it:")
        print('export PATH="$HOME/.local/bin:$PATH"')


def give_up_command(other: Installation) -> None:
    """Take the command, and what belongs to it, out of the record of the installation that had it."""
    other.record.pop("command", None)
    for name in [*other.record["files"]]:
        if os.path.isabs(name) and name not in other.record.get("units", []):
            del other.record["files"][name]
    if other.record_file.exists():
        other.save()


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
    try:
        words = shlex.split(lib[1]) if lib else []
    except ValueError:
        words = []
    if not words or not words[0].endswith("/runtime/lib"):
        return None
    other = Installation(Path(words[0]).parent.parent)
    known = other.known(path)
    return other.prefix if not known or digest_there(path) in known else None


def forget_command(place: Installation, except_for: Path) -> None:
    """Remove the command of another name, and its completion, where they are as install put them."""
    had = Path(place.record.get("command", except_for))
    for path in map(Path, [*place.record["files"]]):
        if path.is_absolute() and path.stem == had.name != except_for.name:
            if digest_there(path) in place.known(path):
                path.unlink()
            del place.record["files"][str(path)]


# ---------------------------------------------------------------------- what belongs to the command


def completion(place: Installation, args: argparse.Namespace, name: str) -> list[Part]:
    """Offer the completion of the command, in the directory of the person's shell."""
    shell = os.path.basename(os.environ.get("SHELL", ""))
    path = completion_file(shell, name)
    if path is None or args.completion == "no":
        return []
    if shell == "zsh":
        return zsh_completion(args, path, name)
    wanted = wish(args, "completion")
    there, action = digest_there(path), "add"
    if there in place.known(path) or there and is_completion(path, shell):
        action, wanted = "update", True
    elif there:
        action, wanted = "keep yours", True
    return [
        Part(
            "completion",
            action,
            path,
            f"completion for {shell}",
            f"Have {shell} complete {name}'s commands, with {path}?",
            wanted,
            put=partial(put_completion, shell=shell, path=path),
        )
    ]


def completion_file(shell: str, name: str) -> Path | None:
    """Return where a shell looks for the completion of a command; None where it has no such place."""

    def directory(variable: str, default: str) -> Path:
        found = os.environ.get(variable, "")
        return Path(found) if os.path.isabs(found) else Path.home() / default

    if shell == "bash":
        data = directory("XDG_DATA_HOME", ".local/share") / "bash-completion"
        return directory("BASH_COMPLETION_USER_DIR", str(data)) / "completions" / name
    if shell == "fish":
        return directory("XDG_CONFIG_HOME", ".config") / f"fish/completions/{name}.fish"
    return directory("ZDOTDIR", "") / ".zshrc" if shell == "zsh" else None


def zsh_completion(args: argparse.Namespace, path: Path, name: str) -> list[Part]:
    """Offer the line that has zsh complete the command; the file it goes into is the person's."""
    line = f"source <({name} completion zsh)"
    if path.is_file() and line in path.read_text("utf-8", "replace"):
        return []
    tell = f"have zsh complete {name}'s commands with this line in {path}, below compinit:\n{line}"
    return [
        Part(
            "completion",
            "tell",
            path,
            f"the line with which zsh completes {name}'s commands",
            f"Have zsh complete {name}'s commands?",
            wish(args, "completion"),
            put=lambda place: print(tell),
        )
    ]


def is_completion(path: Path, shell: str) -> bool:
    """Return whether `tq completion` has printed a file, for another installation perhaps."""
    begins = rb"# Completion of (\S+) for %s, printed by: \1 completion" % shell.encode()
    return path.is_file() and re.match(begins, path.read_bytes()) is not None


def put_completion(place: Installation, shell: str, path: Path) -> None:
    """Write what `tq completion` prints, which is known only now. Raises Trouble."""
    words = [place.record["python"] or sys.executable, "-E", "-s", place.lib / "tasks.py"]
    entries = (str(command_directory()), os.environ.get("PATH", os.defpath))
    env = {**os.environ, "PATH": os.pathsep.join(entries)}
    ran = subprocess.run([*words, "completion", shell], env=env, check=False, capture_output=True)
    if ran.returncode:
        raise Trouble(f"no completion for {shell}: {ran.stderr.decode('utf-8', 'replace').strip()}")
    place.put([File(path, ran.stdout, 0o600)])


def skill(place: Installation, args: argparse.Namespace, name: str) -> list[Part]:
    """Offer the file that tells Claude how to use the command."""
    path = place.settings.parent / "skills/task-queue/SKILL.md"
    source = files.SOURCE / "skills/task-queue/SKILL.md"
    if args.skill == "no" or not source.is_file():
        return []
    text = source.read_text().replace("`task-queue", f"`{name}")
    content = text.replace("\ntask-queue ", f"\n{name} ").encode()
    wanted = wish(args, "skill")
    there, action = digest_there(path), "add"
    if there in place.known(path):
        action, wanted = "unchanged" if there == digest(content) else "update", True
    elif there not in (None, digest(content)):
        action, wanted = "keep yours", True
    return [
        Part(
            "skill",
            action,
            path,
            f"tells Claude how to use {name}",
            f"Tell Claude how to use {name}, with {path}?",
            wanted,
            f"Claude is not told how to use {name}: say --skill yes",
            lambda place: place.put([File(path, content, 0o600)]),
        )
    ]


# ------------------------------------------------------------------------------------------ hooks


def hooks(place: Installation, args: argparse.Namespace) -> list[Part]:
    """Offer the hooks for settings.json. Raises Trouble."""
    link_check = replace(settings.LINK_CHECK, events=(args.event,))
    offers = [
        offer for offer in (link_check, settings.REPORT) if wish(args, offer.option) is not False
    ]
    try:
        text = settings.read(place.settings) if offers else None
    except Trouble as trouble:
        raise left_alone(place, trouble, offers) from None
    return [hook_part(place, text, offer, wish(args, offer.option)) for offer in offers]


def hook_part(
    place: Installation, text: str | None, offer: settings.Offer, wanted: bool | None
) -> Part:
    _, action, remark = settings.with_hook(text, place, offer)
    return Part(
        offer.option,
        action,
        place.settings,
        f"the {offer.name}{remark and f', {remark}'}",
        f"{offer.what} Add this hook to {place.settings}{remark and f', {remark}'}?",
        wanted if action != "unchanged" else True,
        f"no hook is added to {place.settings} for the {offer.name}: say --{offer.option} yes,"
        f" or add by hand: {hooks_by_hand(place, [offer])}",
        offer=offer,
    )


def wake_up(place: Installation, args: argparse.Namespace) -> list[Part]:
    """Offer the hook that wakes sessions to a person, who has to say so; or take it out.

    Raises Trouble for a client that was not seen to support it.
    """
    offer, may_ask = settings.WAKE, not args.yes and not args.dry_run and sys.stdin.isatty()
    try:
        text = settings.read(place.settings)
    except Trouble:
        # hooks() told it, unless it was not asked to read the file.
        if args.wake:
            raise
        return []
    is_there = settings.has_wake(json.loads(text or "{}"))
    if args.wake == "no":
        part = Part("wake", "remove", place.settings, f"the {offer.name}", "", True, offer=offer)
        return [part] if is_there else []
    if not (args.wake or is_there or may_ask):
        return []
    if why := settings.why_no_wake(settings.claude_version()):
        if args.wake:
            raise Trouble(f"{why}: no hook was added for the {offer.name}")
        return []
    part = hook_part(place, text, offer, True if args.wake or is_there else None)
    return [replace(part, hint="")]


def change_in(place: Installation, text: str | None, parts: Sequence[Part]) -> str | None:
    """Return the settings with the wanted hooks."""
    for part in parts:
        if part.offer and part.action == "remove":
            text = text and settings.without_hooks(text, place, place.settings, part.offer)
        elif part.offer and part.is_change:
            text, *_ = settings.with_hook(text, place, part.offer)
    return text


def put_hooks(place: Installation, parts: Sequence[Part]) -> None:
    """Write the wanted hooks into settings.json. Raises Trouble."""
    offers = [part.offer for part in parts if part.offer and part.action != "remove"]
    commands = [settings.hook_command(place, offer) for offer in offers]
    try:
        change = partial(change_in, place, parts=parts)
        backup = settings.edit(place, place.settings, change, commands=commands)
    except OSError as error:
        why = f"{error.filename or place.settings}: {error.strerror}"
        raise left_alone(place, why, offers) from None
    except Trouble as trouble:
        raise left_alone(place, trouble, offers) from None
    if backup:
        print(f"{'backup':<10} {backup}")
    text = settings.read(place.settings)
    if any(part.action == "remove" for part in parts) and settings.has_wake(
        json.loads(text or "{}")
    ):
        raise Trouble(
            f"{place.settings} has a hook with --wake that you changed: take it out by hand"
        )


def left_alone(place: Installation, why: object, offers: list[settings.Offer]) -> Trouble:
    by_hand = hooks_by_hand(place, offers)
    return Trouble(f"{why}; settings.json was left alone. To have the hook, add by hand: {by_hand}")


def hooks_by_hand(place: Installation, offers: list[settings.Offer]) -> str:
    groups = {}
    for offer in offers:
        groups |= settings.hook_groups(place, offer)
    return json.dumps({"hooks": groups}, ensure_ascii=False)


# -------------------------------------------------------------------------- the workers' variables


def variables(place: Installation, args: argparse.Namespace) -> list[Part]:
    """Offer the environment of workers, and the variables that are set here. Raises Trouble."""
    path = place.prefix / "environment"
    there = read_environment(path)
    found = environment.decisive(os.environ)
    added = {name: value for name, value in found.items() if name not in there}
    which = ", ".join(added)
    changed = environment_of(place, {}) != (path.read_bytes() if path.exists() else None)
    file = Part(
        "environment",
        "unchanged" if not changed else "update" if path.exists() else "add",
        path,
        "variables of workers",
        "",
        True,
        put=partial(write_environment, added={}),
    )
    if not added or args.environment == "no":
        return [file]
    return [
        file,
        Part(
            "environment",
            "add",
            path,
            f"{which}, as set here",
            f"Set here: {which}. Add them to {path}, for workers?",
            wish(args, "environment"),
            f"workers get none of what is set here ({which}): say --environment yes",
            partial(write_environment, added=added),
        ),
    ]


def read_environment(path: Path) -> dict[str, str]:
    try:
        return environment.read(path)
    except environment.Unfit as error:
        raise Trouble(error) from None


def environment_of(place: Installation, added: dict[str, str]) -> bytes:
    """Return the text of the environment file: the person's, with lines that are new."""
    path = place.prefix / "environment"
    if path.exists():
        text = path.read_text("utf-8", "surrogateescape")
        new = environment.with_lines(text, programs(place, read_environment(path)) | added)
    else:
        new = environment.text_of(first_variables(place) | added)
    return new.encode("utf-8", "surrogateescape")


def write_environment(place: Installation, added: dict[str, str]) -> None:
    """Write the environment file of workers, or add lines to the person's."""
    path = place.prefix / "environment"
    content, old = environment_of(place, added), digest_there(path)
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
