"""The files that install.py puts in place: which ones, and in which order."""

from __future__ import annotations

import os
import re
import shlex
import stat
from pathlib import Path

import queue_helpers as q
from taskqueue.installation import File, Installation, begun, digest, digest_there

# Where this is installed from: a checkout, the plugin, or runtime/lib.
SOURCE = Path(q.__file__).resolve().parent


def plan(place: Installation) -> list[File]:
    """Return every file of the installation, each with what is to be done about it.

    Scripts are always replaced, handlers only where the person did not change them. Files that only
    an older version had in runtime/lib are removed.
    """
    wanted = [from_source(path, place.lib) for path in modules() + scripts()]
    wanted += [from_source(path, place.lib) for path in sorted(SOURCE.glob("bin/*.sh"))]
    wanted += [hook(place), File(place.hook.with_name("tq"), filled_in(place, "tq.sh"), 0o700)]
    for path in sorted((SOURCE / "handlers").glob("[!._]*")):
        if path.is_file():
            mode = 0o700 if os.access(path, os.X_OK) else 0o600
            wanted.append(File(place.handlers / path.name, path.read_bytes(), mode))
    files = [file._replace(action=action_for(place, file)) for file in wanted]
    for name in sorted(place.record["files"].keys() - {place.name(file.path) for file in wanted}):
        path = place.prefix / name
        if path.is_relative_to(place.lib) and digest_there(path) in place.known(path):
            files.append(File(path, b"", 0, "remove"))
    return files


def modules() -> list[Path]:
    return [SOURCE / "queue_helpers.py", *sorted(SOURCE.glob("taskqueue/*.py"))]


def scripts() -> list[Path]:
    return [path for path in sorted(SOURCE.glob("*.py")) if is_script(path.read_bytes())]


def is_script(content: bytes) -> bool:
    """Return whether a file has a PEP 723 header."""
    return re.search(rb"^# /// script$", content, re.MULTILINE) is not None


def from_source(path: Path, directory: Path) -> File:
    content = path.read_bytes()
    mode = 0o700 if is_script(content) else 0o600
    return File(directory / path.relative_to(SOURCE), content, mode)


def hook(place: Installation) -> File:
    return File(place.hook, filled_in(place, "hook.sh"), 0o700)


def filled_in(place: Installation, name: str) -> bytes:
    """Return bin/hook.sh or bin/tq.sh with its paths, each in the line that has its name."""
    recorded = {key: place.record.get(key) or "" for key in ("python", "uv", "packages")}
    values = recorded | {"lib": place.lib, "state": place.state, "home": Path.home()}
    text = (SOURCE / "bin" / name).read_text()
    for key, value in values.items():
        text = text.replace(f"\n{key}=\n", f"\n{key}={shlex.quote(str(value))}\n", 1)
    return text.encode()


def action_for(place: Installation, file: File) -> str:
    there = digest_there(file.path)
    if there is None:
        return "add"
    if there == digest(file.content):
        has_mode = stat.S_IMODE(file.path.stat().st_mode) == file.mode
        return "unchanged" if has_mode else "update"
    if file.path.parent == place.handlers and there not in place.known(file.path):
        return "keep yours"
    return "update"


def put_in_order(place: Installation, files: list[File]) -> None:
    """Write the files, the modules first, because an old script works with newer modules."""
    for path in (place.settings, *(file.path for file in files)):
        # A killed run may have left it.
        begun(path).unlink(missing_ok=True)
    package = place.lib / "taskqueue"
    # Python would make __pycache__ with the umask of the first person who runs a script.
    caches = [directory / "__pycache__" for directory in (place.lib, package)]
    for directory in (place.lib.parent, place.lib, package, *caches):
        q.make_private(directory, parents=True)
    # The plan has them in this order.
    place.put([file for file in files if file.action in ("add", "update")])
    for file in files:
        if file.action == "remove":
            file.path.unlink(missing_ok=True)
            del place.record["files"][place.name(file.path)]
    place.save()
