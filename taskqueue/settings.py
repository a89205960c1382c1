"""The hooks in Claude Code's settings.json: find ours, add them, take them out.

Claude Code writes the file as JSON with two spaces, and so does this, with a backup beside it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

from taskqueue.installation import (
    Installation,
    Trouble,
    digest,
    digest_there,
    from_home,
    only_one,
    write_file,
)

HOOK_TIMEOUT_SECONDS = 10
# A session that nobody comes back to is given up after half a day.
WAKE_TIMEOUT_SECONDS = 43_200
# The first version of Claude Code that was seen to take exit status 2 of an asyncRewake hook as a
# wake-up (bin/hook.sh names it, too). A client that ignores asyncRewake would be blocked by it.
WAKES_SINCE, WAKES_UNTIL = (2, 1, 332), (3,)
# The programs that hooks run, and what their first argument may be.
PROGRAM = re.compile(r"(/.*)/runtime/(hook|lib/enqueue\.py|lib/report\.py)")
ARGUMENT = re.compile("--(report|wake|hook)|[a-z][a-z0-9_]*")
# Not "resume": Claude Code drops a context there that equals an earlier one.
SESSION_STARTS = "startup|clear|compact"


@dataclass(frozen=True)
class Offer:
    """A hook that install.py offers.

    `option` is install's, `what` says what the hook does, `arguments` go to the hook script.
    """

    option: str
    name: str
    what: str
    events: tuple[str, ...]
    arguments: str

    def is_like(self, purpose: str) -> bool:
        """Return whether a hook with this purpose does the same; one may name no task type."""
        ours = purpose_of(self.arguments.split())
        return bool(purpose) and (ours.startswith(purpose) or purpose.startswith(ours))


def purpose_of(words: list[str]) -> str:
    """Return what a hook of ours is for: "--wake", "--report", or its queue and task type."""
    for option in ("--wake", "--report"):
        if option in words:
            return option
    task = words[words[:1] == ["--hook"] :]
    return " ".join(takewhile(re.compile(r"\w").match, task[:2]))


LINK_CHECK = Offer(
    "hook",
    "link check when Claude has answered",
    "When Claude has answered, a worker checks the links in the workspace's Markdown files.",
    ("Stop",),
    "notifications link_validation --on-duplicate rerun --once-per workspace --start-worker",
)
REPORT = Offer(
    "report",
    "report with your next prompt",
    "With your next prompt, Claude is told what the workspace's tasks have found.",
    ("UserPromptSubmit", "SessionStart"),
    "--report",
)
WAKE = Offer(
    "wake",
    "wake-up of idle sessions",
    "When a check finds a broken link or a task fails, an idle session is woken to mend it, which costs"
    " money; three times at most between two prompts of yours.",
    ("Stop", "SessionEnd"),
    "--wake",
)


def claude_version() -> str:
    """Return what `claude --version` prints, "" where that is unknown."""
    home = Path.home()
    places = (shutil.which("claude"), home / ".local/bin/claude", home / ".claude/local/claude")
    for place in places:
        if place and os.access(place, os.X_OK):
            words = [str(place), "--version"]
            try:
                ran = subprocess.run(
                    words, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
                )
            except (OSError, subprocess.TimeoutExpired):
                return ""
            return ran.stdout.decode("utf-8", "replace").strip()
    return ""


def why_no_wake(version: str) -> str:
    """Return why a client of this version gets no wake-up, "" if it was seen to support it."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)\b", version)
    since = ".".join(map(str, WAKES_SINCE))
    if not found:
        return f"the version of claude is unknown, and wake-ups need {since} or newer"
    if not WAKES_SINCE <= tuple(map(int, found.groups())) < WAKES_UNTIL:
        known = f"{since} or newer, below {WAKES_UNTIL[0]}"
        return f"claude is {found[0]}, and wake-ups were seen to work with {known}"
    return ""


def has_wake(settings: object) -> bool:
    """Return whether the settings have a hook of ours that wakes sessions."""
    return any(found.purpose == "--wake" for found in our_hooks(settings))


# ------------------------------------------------------------------------------------ hooks of ours


class Hook(NamedTuple):
    """A hook of ours in settings.json."""

    event: str
    # The list of the group that has it.
    listed: list
    hook: dict
    # The installation that it runs, which may be gone.
    prefix: Path
    purpose: str


def our_hooks(settings: object, recorded: Sequence[str] = ()) -> Iterator[Hook]:
    """Yield the hooks that run an installation, wherever that lies, and those of `recorded` commands."""
    for event, listed, hook, words in hooks_in(settings):
        found = call_of(words)
        if found is None and hook["command"] in recorded:
            found = Path(), words[-1:]
        if found:
            prefix, arguments = found
            yield Hook(event, listed, hook, prefix, purpose_of(arguments))


def hooks_in(settings: object) -> Iterator[tuple[str, list, dict, list[str]]]:
    """Yield (event, the group's list of hooks, hook, its words) of every command hook.

    Groups and hooks of another shape than Claude Code reads are skipped.
    """
    hooks = settings.get("hooks") if isinstance(settings, dict) else None
    for event, groups in hooks.items() if isinstance(hooks, dict) else ():
        for group in groups if isinstance(groups, list) else ():
            listed = group.get("hooks") if isinstance(group, dict) else None
            if not isinstance(listed, list):
                continue
            # A hook may be taken out meanwhile.
            for hook in list(listed):
                if isinstance(hook, dict) and isinstance(hook.get("command"), str):
                    yield event, listed, hook, words_of(hook)


def words_of(hook: dict) -> list[str]:
    """Return the words of a hook's command; in exec form, the program and its `args`."""
    arguments = hook.get("args")
    if isinstance(arguments, list):
        return [hook["command"], *(word for word in arguments if isinstance(word, str))]
    try:
        return shlex.split(hook["command"])
    except ValueError:
        return hook["command"].split()


def call_of(words: list[str]) -> tuple[Path, list[str]] | None:
    """Return (prefix, arguments) of the call of an installation's program; None for other commands.

    Symbolic links count as their targets. A program that is gone is known by its arguments.
    """
    for at, word in enumerate(words):
        path = os.path.expanduser(re.sub(r"^(\$HOME|\$\{HOME\})(?=/)", "~", word))
        found = PROGRAM.fullmatch(os.path.realpath(path)) if os.path.isabs(path) else None
        arguments = words[at + 1 :]
        if not found or not re.fullmatch(ARGUMENT, "".join(arguments[:1])):
            continue
        prefix, program = Path(found[1]), found[2]
        if not os.path.exists(found[0]) or (prefix / "runtime/lib/queue_helpers.py").exists():
            return prefix, ["--report"] if program.endswith("report.py") else arguments
    return None


# ---------------------------------------------------------------------------------------- the hooks


def hook_command(place: Installation, offer: Offer) -> str:
    """Return the command of a hook.

    It exits 0 after everything was removed, and never 2, as sh alone would; the wake-up alone does.
    """
    hook = shlex.quote(str(place.hook))
    if offer is WAKE:
        return f"test ! -r {hook} || exec /bin/sh {hook} {offer.arguments}"
    return f"test ! -r {hook} || /bin/sh {hook} {offer.arguments} || exit 1"


def hook_group(place: Installation, offer: Offer, event: str) -> dict:
    """Return a group of "hooks" that fires for the event."""
    command = hook_command(place, offer)
    matcher = {"matcher": SESSION_STARTS} if event == "SessionStart" else {}
    hook = {"type": "command", "command": command, "timeout": HOOK_TIMEOUT_SECONDS}
    if offer is WAKE and event == "Stop":
        hook |= {"asyncRewake": True, "timeout": WAKE_TIMEOUT_SECONDS}
    return {**matcher, "hooks": [hook]}


def hook_groups(place: Installation, offer: Offer) -> dict:
    """Return the part of "hooks" that has the offered hook."""
    return {event: [hook_group(place, offer, event)] for event in offer.events}


def recorded(place: Installation) -> dict[str, dict]:
    """Return {settings.json: {"commands": [...], "made": whether install made the file}}.

    Each install may have had another CLAUDE_CONFIG_DIR. An older version recorded one file.
    """
    found = dict(place.record.get("hooks", {}))
    old = place.record.get("hook")
    if old and str(place.settings) not in found:
        commands = old.get("commands") or [old[key] for key in ("command",) if key in old]
        found[str(place.settings)] = {"commands": commands, "made": old.get("backup", "") is None}
    return found


def recorded_commands(place: Installation, path: Path) -> list[str]:
    """Return the commands of the hooks that install added to a settings.json."""
    return recorded(place).get(str(path), {}).get("commands", [])


def with_hook(text: str | None, place: Installation, offer: Offer) -> tuple[str, str, str]:
    """Return the settings with the hook, what is done ("add", "update" ...), and a remark.

    A hook of another installation that does the same goes: each firing would be a task twice.
    """
    settings = json.loads(text or "{}")
    others = [
        found
        for found in our_hooks(settings)
        if found.prefix != place.prefix.resolve()
        and offer.is_like(found.purpose)
        and found.hook["command"] not in recorded_commands(place, place.settings)
    ]
    for found in others:
        take_out(settings, found.event, found.listed, found.hook)
    done = [with_hook_of(settings, place, offer, event) for event in offer.events]
    if others:
        which = " and ".join(dict.fromkeys(from_home(found.prefix) for found in others))
        return dumped(settings), "replace", f"instead of that of {which}"
    action = next((action for action in ("add", "update") if action in done), "")
    return (dumped(settings), action, "") if action else (text or "{}\n", "unchanged", done[0])


def with_hook_of(settings: dict, place: Installation, offer: Offer, event: str) -> str:
    """Put the hook into the settings for one event; return what was done."""
    command = hook_command(place, offer)
    ours = recorded_commands(place, place.settings)
    for found in our_hooks(settings, ours):
        if found.event != event or not offer.is_like(found.purpose):
            continue
        if found.hook["command"] == command:
            return "which is there"
        if found.hook["command"] not in ours:
            return "which is there, and yours"
        found.hook["command"] = command
        return "update"
    settings.setdefault("hooks", {}).setdefault(event, []).append(hook_group(place, offer, event))
    return "add"


def without_hooks(
    text: str, place: Installation, path: Path, offer: Offer | None = None
) -> str | None:
    """Return the settings without our hooks and the groups made for them; changed hooks stay.

    With an offer, only its hooks go, those of other installations included. Return None if install
    made the file, and nothing else is in it.
    """
    settings, ours = json.loads(text), recorded_commands(place, path)
    found = [
        found
        for found in our_hooks(settings, ours)
        if (offer is None or offer.is_like(found.purpose))
        and (found.hook["command"] in ours or offer and found.prefix != place.prefix.resolve())
    ]
    for event, listed, hook, *_ in found:
        take_out(settings, event, listed, hook)
    if not found:
        return text
    if not settings["hooks"]:
        del settings["hooks"]
    made = recorded(place).get(str(path), {}).get("made")
    return dumped(settings) if settings or not made else None


def take_out(settings: dict, event: str, listed: list, hook: dict) -> None:
    """Take a hook out of the settings, and its group and event where nothing is left of them."""
    listed.remove(hook)
    groups = settings["hooks"][event]
    # A group that the person made stays, even empty.
    groups[:] = [
        group
        for group in groups
        if group.get("hooks") is not listed or listed or group.keys() - {"hooks", "matcher"}
    ]
    if not groups:
        del settings["hooks"][event]


def dumped(settings: dict) -> str:
    """Return the settings as Claude Code writes them: two spaces, in the same order."""
    try:
        text = json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise Trouble(f"settings.json has a number that JSON does not know ({error})") from None
    # UTF-8 cannot encode lone surrogates.
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


# ----------------------------------------------------------------------------------------- the file


def read(path: Path) -> str | None:
    """Return the text of settings.json, or None if it does not exist.

    Raises Trouble for a file that we must not change.
    """
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
    if (
        not found.st_mode & 0o222
        or not os.access(path, os.W_OK)
        or not os.access(path.parent, os.W_OK)
    ):
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
    if not isinstance(hooks, dict) or not all(
        isinstance(groups, list) for groups in hooks.values()
    ):
        raise Trouble(f'{path} has "hooks" of a shape that is not known')
    return text


def not_json(name: str):
    raise ValueError(f"{name} is not JSON")


def edit(
    place: Installation,
    path: Path,
    change: Callable[[str | None], str | None],
    commands: Sequence[str] = (),
) -> Path | None:
    """Replace the text of settings.json by change(text); return the backup that stays beside it.

    Start again if another program writes meanwhile. The record gets `commands`, those of the hooks
    that the change adds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if path.parent.samefile(place.prefix) else only_one(path.parent):
        while True:
            text = read(path)
            new = change(text)
            if new == text:
                return None
            owner = None if text is None else path.stat()
            mode = stat.S_IMODE(owner.st_mode) if owner else 0o600
            # A file that goes had nothing but our hooks.
            backup = None
            if text is not None and new is not None:
                backup = keep_backup(path, text, mode, owner)
            if commands:
                remember(place, path, commands, made=text is None)
            if read(path) == text:
                if new is None:
                    path.unlink()
                else:
                    write_file(path, new.encode(), mode, owner)
                return backup


def remember(place: Installation, path: Path, commands: Sequence[str], made: bool) -> None:
    """Record that this settings.json has these hooks."""
    there = recorded(place)
    before = there.get(str(path), {"commands": [], "made": made})
    there[str(path)] = {**before, "commands": list(dict.fromkeys([*before["commands"], *commands]))}
    place.record["hooks"] = there
    place.record.pop("hook", None)
    place.save()


def keep_backup(path: Path, text: str, mode: int, owner: os.stat_result | None) -> Path:
    """Write a copy beside the file, under a new name, and return that."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in chain([stamp], (f"{stamp}-{number}" for number in range(1, 100))):
        backup = path.with_name(f"{path.name}.{name}.backup")
        if digest_there(backup) in (None, digest(text.encode())):
            write_file(backup, text.encode(), mode, owner)
            return backup
    raise Trouble(f"{path} has a hundred backups of this second")


def difference(old: str | None, new: str | None, path: Path) -> Iterator[str]:
    """Yield the lines of a unified diff."""
    import difflib

    before, after = (old or "").splitlines(True), (new or "").splitlines(True)
    lines = difflib.unified_diff(before, after, str(path), f"{path} (new)")
    for line in lines:
        yield line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n"
