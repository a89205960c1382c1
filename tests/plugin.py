"""The plugin as people get it: a marketplace in a directory, a home with the real Claude Code, and
uv.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, wait_for
from link_check import UV, UV_CACHE

NAME = "task-queue@task-queue"
NOT_SHIPPED = shutil.ignore_patterns(
    ".git", "__pycache__", ".*_cache", ".claude-code", "bench", "tests"
)


def copy_of_the_plugin(directory: Path) -> Path:
    """Copy this checkout as a marketplace holds it: without what only its developers need."""
    return shutil.copytree(ROOT, directory, ignore=NOT_SHIPPED)


def give_uv(home: Path) -> dict[str, str]:
    """Put uv where its installer puts it; the variables that keep it off the network."""
    (home / ".local/bin").mkdir(parents=True, exist_ok=True)
    (home / ".local/bin/uv").symlink_to(UV)
    told = {"UV_CACHE_DIR": UV_CACHE, "UV_OFFLINE": "1"}
    file = home / ".claude/automation/lychee/environment"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o600)
    file.write_text("".join(f"{name}={value}\n" for name, value in told.items()))
    return told


def hook_command(event: str, root: Path) -> list[str]:
    """The plugin's hook for an event, as Claude Code runs it from a directory."""
    group = json.loads((root / "hooks/hooks.json").read_text())["hooks"][event][0]
    (hook,) = group["hooks"]
    return [
        hook["command"],
        *(word.replace("${CLAUDE_PLUGIN_ROOT}", str(root)) for word in hook["args"]),
    ]


class Home:
    """A home with a queue in the usual place."""

    def __init__(self, home: Path) -> None:
        self.home, self.prefix = home, home / ".claude/automation/lychee"
        self.state = self.prefix / "state"

    def rows(self, statement: str) -> list[tuple]:
        """The rows of a query; [] while there is no database or no table."""
        if not (self.state / "tasks.db").exists():
            return []
        conn = sqlite3.connect(f"file:{self.state}/tasks.db?mode=ro", uri=True, timeout=10)
        try:
            return conn.execute(statement).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            conn.close()

    def ended(self, count: int = 1) -> list[tuple]:
        """(status, result) of the link checks that have ended, once there are so many."""
        query = "select status, result from task_history where task_type = 'link_validation' order by id"
        found = wait_for(
            lambda: self.rows(query)[count - 1 :] and self.rows(query), 60, "the link check"
        )
        return found

    def worker_log(self) -> str:
        log = self.state / "logs/worker.notifications.log"
        return log.read_text() if log.exists() else ""

    def workers(self) -> list[int]:
        """The process numbers of the workers that hooks have started, the last one last."""
        return [int(pid) for pid in re.findall(r"worker (\d+)-\S+ serves", self.worker_log())]

    def spooled(self) -> list[Path]:
        return sorted((self.state / "spool").glob("notifications/[!.]*"))

    def install(
        self, *args: str, env: dict | None = None, root: Path = ROOT
    ) -> subprocess.CompletedProcess:
        """just install, into this home."""
        ran = subprocess.run(
            [sys.executable, root / "install.py", "install", "--no-warm", "--no-command", *args],
            env={"HOME": str(self.home), "PATH": os.environ["PATH"], **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    def close(self) -> None:
        """End the workers that hooks have started."""
        for pid in self.workers():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for has ended, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
