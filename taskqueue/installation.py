"""An installation: its directories, and the record of what install.py put there.

The record is PREFIX/installed.json. It has the digest of each file, which tells our files from those
that the person changed, and the paths of the state, of Python and of uv.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# An install that downloads holds the lock; another install gives up after this time.
LOCK_SECONDS = 120.0


class Trouble(Exception):
    """A step failed; the message says what, why and what to do."""


class WrongUse(Exception):
    """The request makes no sense; the message says why. Exit code 64."""


def default_prefix() -> Path:
    return Path.home() / ".claude/automation/lychee"


def settings_file() -> Path:
    """Return the path of Claude Code's settings of this user."""
    return (
        Path(os.environ.get("CLAUDE_CONFIG_DIR") or Path.home() / ".claude").absolute()
        / "settings.json"
    )


def installed(script: str | Path | None = None) -> Installation | None:
    """Return the installation that has this script, or None.

    Without a script, return the one in the default place: in a checkout, installed(__file__) is None,
    and installed() is what `just install` made.
    """
    prefix = Path(script).resolve().parent.parent.parent if script else default_prefix()
    return Installation(prefix) if (prefix / "installed.json").is_file() else None


def plugins() -> dict[str, Path]:
    """Return Claude Code's copies of this plugin: {"task-queue@market": directory}."""
    record = settings_file().with_name("plugins") / "installed_plugins.json"
    try:
        listed = json.loads(record.read_bytes())["plugins"]
        found = {name: Path(copies[0]["installPath"]) for name, copies in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
    # A fork may have another name, but not another module.
    return {name: path for name, path in found.items() if schema_version(path) is not None}


def schema_version(lib: Path) -> int | None:
    """Return the schema version of the scripts in a directory, or None if it has no scripts."""
    try:
        text = (lib / "queue_helpers.py").read_text("utf-8", "replace")
    except OSError:
        return None
    version = re.search(r"^SCHEMA_VERSION = (\d+)$", text, re.MULTILINE)
    return int(version[1]) if version else None


def how_to_update(lib: Path) -> str:
    """Return the command that updates the scripts in a directory."""
    names = [name for name, path in plugins().items() if path.resolve() == lib.resolve()]
    return f"claude plugin update {names[0]}" if names else "just install"


def from_home(path: Path) -> str:
    """Return a path as a person reads it: with ~ for the home directory."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def is_plain(path: str) -> bool:
    """Return whether a path fits a line of a unit or a script: UTF-8, no control characters."""
    return not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", path)


class File(NamedTuple):
    """A file to put in place: `mode` as chmod takes it, `action` as install.py prints it."""

    path: Path
    content: bytes
    mode: int
    action: str = ""


class Installation:
    """The paths in PREFIX and the record of its files. PREFIX need not exist yet.

    Raises WrongUse for a prefix or a state that does not fit a line of a unit, and for a relative
    state.
    """

    def __init__(self, prefix: str | Path | None = None) -> None:
        self.prefix = Path(os.path.abspath(os.path.expanduser(prefix or default_prefix())))
        self.lib, self.handlers = self.prefix / "runtime/lib", self.prefix / "handlers"
        self.hook, self.record_file = self.prefix / "runtime/hook", self.prefix / "installed.json"
        self.settings = settings_file()
        self.record = self._read_record()
        asked = os.environ.get("TASK_QUEUE_STATE")
        state = os.path.expanduser(asked or self.record.get("state") or self.prefix / "state")
        if not os.path.isabs(state):
            raise WrongUse(
                f"TASK_QUEUE_STATE={asked!r} is relative: each directory would have its own"
            )
        self.state = Path(os.path.abspath(state))
        for path, what in ((self.prefix, "PREFIX"), (self.state, "TASK_QUEUE_STATE")):
            if not is_plain(str(path)):
                raise WrongUse(
                    f"{str(path)!r} has control characters or is not UTF-8: choose another {what}"
                )

    def _read_record(self) -> dict:
        """Return the record. Without a readable one, every file counts as the person's."""
        try:
            found = json.loads(self.record_file.read_bytes())
        except (FileNotFoundError, ValueError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("files"), dict):
            return found
        return {"files": {}}

    def typed(self) -> str:
        """Return the command as a person types it: its name if that is on PATH, else its path."""
        path = self.record.get("command")
        if not path:
            return shlex.quote(str(self.hook.with_name("tq")))
        found = shutil.which(Path(path).name)
        if found and os.path.realpath(found) == os.path.realpath(path):
            return Path(path).name
        return shlex.quote(path)

    def save(self) -> None:
        write_file(
            self.record_file,
            json.dumps(self.record, indent=1, ensure_ascii=False).encode() + b"\n",
            0o600,
        )

    def name(self, path: Path) -> str:
        """Return a file's name in the record and in messages."""
        return str(path.relative_to(self.prefix)) if path.is_relative_to(self.prefix) else str(path)

    def known(self, path: Path) -> list[str]:
        """Return the digests of this file as install wrote it; several while an install runs."""
        return self.record["files"].get(self.name(path), [])

    def put(self, files: list[File]) -> None:
        """Write the files in this order, each whole or not at all.

        The record names them first, so that uninstall knows even the last file of an install that
        was killed.
        """
        for file in files:
            digests = self.record["files"].setdefault(self.name(file.path), [])
            if digest(file.content) not in digests:
                digests.append(digest(file.content))
        self.save()
        for file in files:
            file.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(file.path, file.content, file.mode)
        for file in files:
            self.record["files"][self.name(file.path)] = [digest(file.content)]
        self.save()


class Update:
    """Sees that an install has replaced the scripts that a process began with."""

    def __init__(self, lib: Path) -> None:
        self.record = lib.parent.parent / "installed.json"
        self.written, self.scripts = self._written(), self._scripts()

    def has_come(self) -> bool:
        """Return whether other scripts are in place, all of them. Outside an installation, never."""
        if (written := self._written()) != self.written:
            self.written, scripts = written, self._scripts()
            # A script has several digests while an install runs.
            if scripts != self.scripts and all(len(known) == 1 for known in scripts.values()):
                return bool(scripts)
        return False

    def _written(self) -> int:
        try:
            return self.record.stat().st_mtime_ns
        except OSError:
            return 0

    def _scripts(self) -> dict[str, list[str]]:
        """Return the digests of the installed scripts; none where there is no record to read."""
        try:
            files = json.loads(self.record.read_bytes()).get("files", {})
        except (OSError, ValueError):
            return {}
        return {name: known for name, known in files.items() if name.startswith("runtime/lib/")}


# --------------------------------------------------------------------------------------- finding uv


def find_uv() -> str | None:
    """Return the absolute path of a uv that runs in an empty environment, or None.

    A version manager's stand-in on PATH needs its environment; it is asked for the uv behind it.
    """
    import subprocess

    home = Path.home()
    places = (
        os.environ.get("UV"),
        shutil.which("uv"),
        home / ".local/bin/uv",
        home / ".cargo/bin/uv",
        "/opt/homebrew/bin/uv",
        "/usr/local/bin/uv",
    )
    found = [
        str(place)
        for place in places
        if place and os.path.isabs(place) and os.access(place, os.X_OK)
    ]
    for uv in found:
        if works_alone([uv, "--version"]):
            return uv
    for stand_in in found:
        ask = [
            stand_in,
            "run",
            "--no-project",
            "--no-config",
            "--offline",
            "python",
            "-c",
            "import os; print(os.environ['UV'])",
        ]
        try:
            ran = subprocess.run(
                ask,
                check=False,
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        uv = ran.stdout.strip()
        if uv and works_alone([uv, "--version"]):
            return uv
    return None


def works_alone(command: Sequence[str]) -> bool:
    """Tell whether a command succeeds with next to no environment, as under a service."""
    import subprocess

    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": "/usr/bin:/bin"}
    try:
        return (
            subprocess.run(
                command,
                check=False,
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=30,
                env=environment,
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


# -------------------------------------------------------------------------------------------- files


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_there(path: Path) -> str | None:
    """Return the digest of the file at path, or None if nothing is there.

    Anything but a plain file has a digest that matches no file's.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "not a file"
        return digest(path.read_bytes())
    except FileNotFoundError:
        return None


def begun(path: Path) -> Path:
    """Return the path at which a file is written before it replaces `path`."""
    return path.with_name(f".{path.name}.new")


def write_file(path: Path, content: bytes, mode: int, owner: os.stat_result | None = None) -> None:
    """Replace path in one step: readers and power cuts find the old file or the new one."""
    new = begun(path)
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        os.fchmod(fd, mode)
        if owner and (owner.st_uid, owner.st_gid) != (os.getuid(), os.getgid()):
            os.fchown(fd, owner.st_uid, owner.st_gid)
        file.flush()
        os.fsync(fd)
    os.replace(new, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the lock on a directory, so that two installs do not meet. Raises Trouble."""
    import queue_helpers as q

    deadline = time.monotonic() + LOCK_SECONDS
    while (fd := q.lock_file(directory, probe=True)) is None:
        if time.monotonic() > deadline:
            raise Trouble(
                f"{directory} is locked by another install since {LOCK_SECONDS:.0f} s;"
                " is one downloading?"
            )
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(fd)
