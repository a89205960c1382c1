"""A HOME of a test's own, and install.py and `tq service` run against it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

PREFIX = Path(".claude/automation/lychee")


@pytest.fixture
def home(tmp_path):
    """A HOME without an installation."""
    made = tmp_path / "home"
    (made / ".claude").mkdir(parents=True)
    return made


def run(
    home: Path,
    *words,
    source: Path = ROOT,
    env: dict | None = None,
    python=(sys.executable, "-B"),
    **options,
):
    """Run install.py, or `tq service`, to its end, without a download and without a terminal."""
    script = "tasks.py" if words[0] == "service" else "install.py"
    more = ["--no-warm"] if words[0] == "install" else []
    return subprocess.run(
        [*python, source / script, *words, *more],
        env={"HOME": str(home), "PATH": os.environ["PATH"]} | (env or {}),
        stdin=options.pop("stdin", subprocess.DEVNULL),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def install(home: Path, *options, **named) -> str:
    """Install, which must succeed; return what it printed. Nobody is asked, so no hook is added."""
    ran = run(home, "install", *options, **named)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return installed(*options): a HOME as install.py leaves it with these options.

    A file's tests install once for each set of options; each test gets the same place as new.
    """
    places = {}

    def fresh(*options, name: str = "home") -> Path:
        key = (name, options)
        if key not in places:
            made, kept = (tmp_path_factory.mktemp("at") / name for _ in range(2))
            (made / ".claude").mkdir(parents=True)
            install(made, *options)
            shutil.copytree(made, kept, symlinks=True)
            places[key] = made, kept
        made, kept = places[key]
        shutil.rmtree(made)
        return shutil.copytree(kept, made, symlinks=True)

    return fresh


@contextmanager
def terminal(typed: str) -> Iterator[int]:
    """A terminal at which a person types this."""
    master, slave = os.openpty()
    os.write(master, typed.encode())
    yield slave
    os.close(slave)
    os.close(master)


def settings_of(home: Path) -> Path:
    return home / ".claude/settings.json"


def hooks_of(home: Path, event: str = "Stop") -> list[dict]:
    """The hooks in settings.json that fire for an event."""
    groups = json.loads(settings_of(home).read_text())["hooks"].get(event, [])
    return [hook for group in groups for hook in group["hooks"]]


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# ---------------------------------------- what a document has pasted

# What a login shell has, wherever it came from; uv and pip may need a proxy and its certificates.
LOGIN = re.compile(
    "LANG|LC_[A-Z]+|TERM|USER|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|PIP_[A-Z_]+"
)


def blocks_of(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


class Home:
    """A HOME, empty at first, and a login shell in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = directory / ".claude/automation/lychee"
        self.state = self.prefix / "state"
        self.db = self.state / "tasks.db"
        found = filter(None, map(shutil.which, ("just", "uv", "sqlite3", "jq")))
        tools = [os.path.dirname(program) for program in found]
        path = [f"{directory}/.local/bin", *tools, "/usr/local/bin", "/usr/bin", "/bin"]
        cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True)
        self.env = {name: value for name, value in os.environ.items() if LOGIN.fullmatch(name)}
        self.env |= {"HOME": str(directory), "PATH": os.pathsep.join(dict.fromkeys(path))}
        # A download for each test would be the only other way.
        self.env["UV_CACHE_DIR"] = cache.stdout.strip()

    def paste(self, text: str, cwd: Path | None = None, timeout: float = 120) -> str:
        """Return what a new shell prints for a block; each of its commands must succeed."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env=self.env,
            cwd=cwd or self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def rows(self, statement: str, *values) -> list[tuple]:
        conn = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=10)
        try:
            return conn.execute(statement, values).fetchall()
        finally:
            conn.close()

    def forget(self) -> None:
        """Take all tasks out."""
        conn = sqlite3.connect(self.db, timeout=10, isolation_level=None)
        for (table,) in conn.execute("select distinct queue from task_queue").fetchall():
            if table in ("notifications", "approvals", "completions", "reviews"):
                conn.execute(f"delete from {table}")
        for table in ("task_history", "task_controls", "task_marks"):
            conn.execute(f"delete from {table}")
        conn.close()

    def end_worker(self) -> None:
        """End the worker that a hook has started."""
        log = self.state / "logs/worker.notifications.log"
        text = wait_for(lambda: log.exists() and log.read_text(), what="the worker's log")
        wait_for(lambda: " serves " in log.read_text(), what="a serving worker")
        text = log.read_text()
        for number in re.findall(r"worker (\d+)-\S+ serves ", text):
            try:
                os.kill(int(number), signal.SIGTERM)
            except ProcessLookupError:
                pass
        wait_for(lambda: not self.serves(), what="the end of the worker")

    def serves(self) -> bool:
        """Return whether a worker still holds the queue's lock."""
        import fcntl

        with open(self.state / "workers/serving.notifications", "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            except BlockingIOError:
                return True
