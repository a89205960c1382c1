"""Claude Code's settings.json: which hooks are in it, which of them are ours, and how ours are
added and taken out.

install.py and doctor.py use this. A person's settings keep every byte outside of "hooks", a backup
is made before each change, and when nobody has written to the file since, taking our hooks out
gives the very file back.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from taskqueue.installation import Installation, Trouble, digest, digest_there, only_one, write_file

HOOK_TIMEOUT_SECONDS = 10
# A resumed session drops what equals an earlier context: its first prompt tells it.
SESSION_STARTS = "startup|clear|compact"


@dataclass(frozen=True)
class Offer:
    """A hook that install.py offers: what it is called, what it does, when it fires, what it runs."""

    name: str
    what: str
    events: tuple[str, ...]
    arguments: str

    def is_like(self, words: list[str]) -> bool:
        """Whether a hook of ours does what this one does."""
        reports = any(word == "--report" or word.endswith("/report.py") for word in words)
        return reports == (self.arguments == "--report")


LINK_CHECK = Offer(
    "link check",
    "When Claude has answered, a worker checks the links in the workspace's Markdown files.",
    ("Stop",),
    "notifications link_validation --on-duplicate rerun --once-per workspace --start-worker",
)
REPORT = Offer(
    "report",
    "With your next prompt, Claude is told what the workspace's tasks have found.",
    ("UserPromptSubmit", "SessionStart"),
    "--report",
)

# ------------------------------------------------------------------------------------ hooks of ours


def hooks_in(settings: object) -> Iterator[tuple[str, list, dict, list[str]]]:
    """(event, the group's list of hooks, hook, its words) of every command hook in parsed settings.

    The words are those of `command` as a shell reads them, then `args` where the hook is in exec
    form. What is not of the shape that Claude Code reads is passed over.
    """
    hooks = settings.get("hooks") if isinstance(settings, dict) else None
    for event, groups in hooks.items() if isinstance(hooks, dict) else ():
        for group in groups if isinstance(groups, list) else ():
            listed = group.get("hooks") if isinstance(group, dict) else None
            if not isinstance(listed, list):
                continue
            for hook in listed:
                if isinstance(hook, dict) and isinstance(hook.get("command"), str):
                    yield event, listed, hook, words_of(hook)


def words_of(hook: dict) -> list[str]:
    """The words of a hook's command; in exec form those are the program and its `args`."""
    arguments = hook.get("args")
    if isinstance(arguments, list):
        return [hook["command"], *(word for word in arguments if isinstance(word, str))]
    try:
        return shlex.split(hook["command"])
    except ValueError:
        return hook["command"].split()


def calls(words: list[str], prefix: Path) -> bool:
    """Whether a hook runs runtime/hook, enqueue.py or report.py of the installation in prefix.

    Symbolic links count as what they point to.
    """
    ours = {
        os.path.realpath(prefix / name)
        for name in ("runtime/hook", "runtime/lib/enqueue.py", "runtime/lib/report.py")
    }
    paths = (
        os.path.expanduser(re.sub(r"^(\$HOME|\$\{HOME\})(?=/)", "~", word))
        for word in words
        if "/" in word
    )
    return any(os.path.realpath(path) in ours for path in paths if os.path.isabs(path))


def our_hooks(
    settings: object, prefix: Path | None = None
) -> Iterator[tuple[str, list, dict, list[str]]]:
    """Those of hooks_in() that run the installation in prefix; without a prefix, those of any queue
    of this kind.

    A hook that is written in bash, with the sqlite3 command, belongs to nobody's prefix, but to a
    queue.
    """
    for found in hooks_in(settings):
        words = found[3]
        if prefix is not None and calls(words, prefix):
            yield found
        elif prefix is None and any(
            re.search(r"enqueue\.py|tasks\.db|lychee/runtime/hook", word) for word in words
        ):
            yield found


# ---------------------------------------------------------------------------------------- the hooks


def hook_command(place: Installation, offer: Offer) -> str:
    """The command of a hook.

    It ends well even when everything has been removed, and never with 2, as sh alone would.
    """
    hook = shlex.quote(str(place.hook))
    return f"test ! -r {hook} || /bin/sh {hook} {offer.arguments} || exit 1"


def hook_group(place: Installation, offer: Offer, event: str) -> dict:
    """A group of "hooks" that fires for the event."""
    command = hook_command(place, offer)
    matcher = {"matcher": SESSION_STARTS} if event == "SessionStart" else {}
    hook = {"type": "command", "command": command, "timeout": HOOK_TIMEOUT_SECONDS}
    return {**matcher, "hooks": [hook]}


def hook_groups(place: Installation, offer: Offer) -> dict:
    """What has to be in "hooks" for the offered hook."""
    return {event: [hook_group(place, offer, event)] for event in offer.events}


def recorded_commands(place: Installation) -> list[str]:
    """The commands of the hooks that were added. An older version had one, and recorded it alone."""
    recorded = place.record.get("hook", {})
    return recorded.get("commands") or [recorded[key] for key in ("command",) if key in recorded]


def with_hook(text: str | None, place: Installation, offer: Offer) -> tuple[str, str]:
    """The settings with the hook, and what was done: added, updated, or why nothing needs to be."""
    text = "{}\n" if text is None else text
    done = []
    for event in offer.events:
        text, action = with_hook_of(text, place, offer, event)
        done.append(action)
    return text, next((action for action in ("added", "updated") if action in done), done[0])


def with_hook_of(text: str, place: Installation, offer: Offer, event: str) -> tuple[str, str]:
    """with_hook() for one event."""
    settings = json.loads(text)
    command, recorded = hook_command(place, offer), recorded_commands(place)
    for found, _, hook, words in hooks_in(settings):
        if found != event:
            continue
        if hook["command"] == command:
            return text, "the hook is there"
        if not offer.is_like(words):
            continue
        if hook["command"] in recorded:
            hook["command"] = command
            return with_value(text, "hooks", settings["hooks"]), "updated"
        if calls(words, place.prefix):
            return text, "the hook is there, and yours"
    hooks = settings.setdefault("hooks", {})
    hooks.setdefault(event, []).append(hook_group(place, offer, event))
    return with_value(text, "hooks", hooks), "added"


def without_hooks(text: str, place: Installation) -> str:
    """The settings without our hooks, and without what was made for them; a changed one is left."""
    settings, recorded = json.loads(text), recorded_commands(place)
    found = [
        (event, listed, hook)
        for event, listed, hook, _ in hooks_in(settings)
        if hook["command"] in recorded
    ]
    for event, listed, hook in found:
        listed.remove(hook)
        groups = settings["hooks"][event]
        groups[:] = [
            group
            for group in groups
            if group.get("hooks") != [] or group.keys() - {"hooks", "matcher"}
        ]
        if not groups:
            del settings["hooks"][event]
    return with_value(text, "hooks", settings["hooks"] or None) if found else text


def settings_before(place: Installation, text: str | None) -> str | None:
    """The settings as they would be had no hook of ours been added; None if there would be none.

    When nobody has written to them since, they are what they were, byte for byte.
    """
    recorded = place.record.get("hook")
    if recorded is None or text is None:
        return text
    backup = recorded.get("backup")
    if recorded.get("written") == digest(text.encode()) and (
        backup is None or os.path.isfile(backup)
    ):
        # A backup that was made between our two hooks has the first of them.
        return None if backup is None else without_hooks(Path(backup).read_bytes().decode(), place)
    new = without_hooks(text, place)
    return None if "backup" in recorded and backup is None and json.loads(new) == {} else new


# ----------------------------------------------------------------------------------------- the file


def read(path: Path) -> str | None:
    """The text of settings.json, None when there is none.

    Raises Trouble for what had better be left alone.
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
    change: Callable[[str | None], str | None],
    commands: Sequence[str] = (),
    remember: bool = True,
) -> None:
    """Write change(text) over settings.json, a copy kept beside it; anew when somebody else writes
    meanwhile.

    With remember, the record says how to undo it: `commands` are those of the hooks in there.
    """
    path = place.settings
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if path.parent.samefile(place.prefix) else only_one(path.parent):
        while True:
            text = read(path)
            new = change(text)
            if new is None or new == text:
                return
            owner = None if text is None else path.stat()
            mode = stat.S_IMODE(owner.st_mode) if owner else 0o600
            backup = keep_backup(path, text, mode, owner) if text is not None else None
            if remember:
                remember_hooks(place, text, new, backup, commands)
            if read(path) == text:
                write_file(path, new.encode(), mode, owner)
                return


def remember_hooks(
    place: Installation, text: str | None, new: str, backup: Path | None, commands: Sequence[str]
) -> None:
    """Record how to undo a change of settings.json, and the changes of ours before it."""
    recorded = place.record.get("hook", {})
    commands = list(dict.fromkeys([*recorded_commands(place), *commands]))
    if "backup" not in recorded or recorded.get("written") != digest((text or "").encode()):
        recorded = {"backup": backup and str(backup)}
    place.record["hook"] = {
        "backup": recorded["backup"],
        "commands": commands,
        "written": digest(new.encode()),
    }
    place.save()


def keep_backup(path: Path, text: str, mode: int, owner: os.stat_result | None) -> Path:
    """A copy beside the file, under a name that no other copy has."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in chain([stamp], (f"{stamp}-{number}" for number in range(1, 100))):
        backup = path.with_name(f"{path.name}.{name}.backup")
        if digest_there(backup) in (None, digest(text.encode())):
            write_file(backup, text.encode(), mode, owner)
            return backup
    raise Trouble(f"{path} has a hundred backups of this second")


def difference(old: str | None, new: str | None, path: Path) -> Iterator[str]:
    import difflib

    before, after = (old or "").splitlines(True), (new or "").splitlines(True)
    lines = difflib.unified_diff(before, after, str(path), f"{path} (new)")
    for line in lines:
        yield line if line.endswith("\n") else f"{line}\n\\ no newline at the end\n"


# Only the value of one key is written, with the file's own indent.


def with_value(text: str, key: str, value: object) -> str:
    """A JSON object's text with another value of a key; None removes the key."""
    found, close = members(text)
    newline, indent, separators = style(text)
    index = next((i for i in reversed(range(len(found))) if found[i][0] == key), None)
    if value is None:
        return without_member(text, found, index) if index is not None else text
    rendered = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    rendered = rendered.replace("\n", f"{newline}{indent}")
    if index is not None:
        return text[: found[index][2]] + rendered + text[found[index][3] :]
    label = f"{json.dumps(key)}{separators[1]}"
    if found:
        between = f",{newline}{indent}" if indent else f",{separators[0][1:]}"
        return text[: found[-1][3]] + between + label + rendered + text[found[-1][3] :]
    start, end = (f"{newline}{indent}", newline) if indent else ("", "")
    return text[: text.index("{") + 1] + start + label + rendered + end + text[close:]


def without_member(text: str, found: list[tuple[str, int, int, int]], index: int) -> str:
    if index > 0:
        return text[: found[index - 1][3]] + text[found[index][3] :]
    if len(found) > 1:
        return text[: found[0][1]] + text[found[1][1] :]
    return text[: text.index("{") + 1] + text[text.rindex("}") :]


def members(text: str) -> tuple[list[tuple[str, int, int, int]], int]:
    """[(key, its start, its value's start and end), …] of a JSON object's text, and its close."""
    decode, found = json.JSONDecoder().raw_decode, []
    at = after_space(text, text.index("{") + 1)
    while text[at] != "}":
        key, end = decode(text, at)
        value = after_space(text, end)
        _, end = decode(text, value)
        found.append((key, at, value, end))
        at = after_space(text, end)
    return found, at


def after_space(text: str, at: int) -> int:
    """The position of what comes after blanks, a colon or a comma. The text is known to be JSON."""
    while text[at] in " \t\n\r,:":
        at += 1
    return at


def style(text: str) -> tuple[str, str | None, tuple[str, str]]:
    """A JSON text's line end, its indent (None when it is on one line), and its separators."""
    newline = "\r\n" if "\r\n" in text else "\n"
    indent = re.search(r'\n([ \t]+)["}]', text)
    if indent or text.strip() == "{}" or "\n" in text.strip():
        return newline, indent[1] if indent else "  ", (",", ": ")
    return newline, None, (", ", ": ") if re.search(r'": |, "', text) else (",", ":")
