"""A HOME of a test's own, and install.py and `tq service` run against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

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
