"""Name our commands as a person here types them. Every remedy in a message comes from here.

With an installation that is `tq list`, with the plugin `task-queue list`, in a checkout
`./tasks.py list`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import queue_helpers as q
from taskqueue import installation
from taskqueue.text import sh

PLUGIN_COMMAND = "task-queue"
# The commands that are scripts of their own; all others belong to tasks.py.
SCRIPTS = {
    "add": "enqueue.py",
    "run": "enqueue.py --run",
    "work": "worker.py",
    "cleanup": "cleanup.py",
    "relay": "relay.py",
    "report": "report.py",
    "install": "install.py install",
    "uninstall": "install.py uninstall",
}


def command(words: str) -> str:
    """Return a command as a person here types it; `words` are a command and its arguments."""
    name, space, rest = words.partition(" ")
    tq = installed_command()
    if tq:
        return f"{tq} {words}"
    script = f"{SCRIPTS[name]}{space}{rest}" if name in SCRIPTS else f"tasks.py {words}"
    return f"{_place()}{script}"


def _place() -> str:
    """Return the scripts' directory as a shell here takes it."""
    here = Path(q.__file__).resolve().parent
    try:
        return "./" if os.path.samefile(here, os.curdir) else f"{sh(here)}/"
    except OSError:
        return f"{sh(here)}/"


def lets_go_on(queue: str, paused_by: str | None) -> str:
    """Return the command that lets a paused queue go on now."""
    return command(f"limit {queue} --cost N/day" if paused_by == "costs" else f"resume {queue}")


def as_typed(script: str) -> str:
    """Return the name of a script and its command, like "tasks.py list", as a person here knows it."""
    name, found, rest = script.partition(".py")
    if not found or not installed_command():
        return script
    if name == "tasks" or name == "install" and rest:
        return command(rest.strip()) if rest else str(installed_command())
    name = next((short for short, whole in SCRIPTS.items() if whole == f"{name}.py"), name)
    return command(f"{name}{rest}")


def remedies_as_typed(text: str) -> str:
    """Return a text with each script and command in it as a person here types it."""
    scripts = "tasks|worker|cleanup|enqueue|report|relay"
    return re.sub(rf"(?<![\w/.-])({scripts})\.py(?: [a-z]+)?", _typed, text)


def _typed(found: re.Match) -> str:
    return as_typed(found[0]) if installed_command() else f"{_place()}{found[0]}"


@lru_cache(1)
def installed_command() -> str | None:
    """Return the name of our command on PATH, install.py's or the plugin's; None in a checkout."""
    here = Path(q.__file__).resolve().parent
    try:
        place = installation.installed(q.__file__)
    except (OSError, installation.WrongUse):
        return None
    path = str(place.record.get("command") or "") if place else ""
    if path and _is_on_path(os.path.basename(path), [Path(path)]):
        return os.path.basename(path)
    # Claude Code puts a plugin's bin on the PATH of its shell, though not of its hooks.
    plugins = [plugin.resolve() for plugin in installation.plugins().values()]
    commands = [plugin / "bin/task-queue" for plugin in (here, *plugins)]
    return PLUGIN_COMMAND if here in plugins or _is_on_path(PLUGIN_COMMAND, commands) else None


def _is_on_path(name: str, files: Iterable[Path]) -> bool:
    """Tell whether a person who types the name runs one of these files."""
    found = shutil.which(name)
    return found is not None and os.path.realpath(found) in map(os.path.realpath, files)
