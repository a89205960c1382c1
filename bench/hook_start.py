#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Measure what a hook costs, and how soon its handler starts: whole processes, in turn.

The installed hook runs against the sqlite3 one-liner, a bare Python script in a file that inserts
one row, and an sh that does nothing. Then a worker waits, and each firing is timed until its
handler starts, warm; and with no worker there, cold. With CHECKOUT the hook of another version is
measured as well. The goal: at most twice the one-liner.

    bench/hook_start.py [ROUNDS] [CHECKOUT]      default 40
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PLAIN = """import json, sqlite3, sys
conn = sqlite3.connect("{db}")
conn.execute("pragma synchronous = full")
conn.execute("insert into plain (data) values (?)", (json.dumps(json.load(sys.stdin)),))
conn.commit()
"""
PAYLOAD = '{"session_id": "%s", "cwd": "/", "hook_event_name": "Stop", "stop_hook_active": false}'
COLD_ROUNDS = 7
ONE_LINER = "sqlite3 one-liner"


class Installed:
    """A version of the queue, installed into a home of its own."""

    def __init__(self, checkout: Path, home: Path) -> None:
        self.home, self.prefix = home, home / ".claude/automation/lychee"
        home.mkdir()
        self.env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
        # An older version hands the session's environment on, this one has a file.
        cache = os.environ.get("UV_CACHE_DIR") or f"{Path.home()}/.cache/uv"
        self.env |= {"UV_CACHE_DIR": cache, "UV_OFFLINE": "1"}
        install = [
            sys.executable,
            checkout / "install.py",
            "install",
            "--hook",
            "no",
            "--no-command",
        ]
        env = self.env | {"PATH": os.environ["PATH"]}
        subprocess.run(
            install, env=env, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        with open(self.prefix / "environment", "a") as file:
            file.write(f"UV_CACHE_DIR={cache}\nUV_OFFLINE=1\n")
        handler = self.prefix / "handlers/quick"
        handler.write_text(f"#!/bin/sh\nmkdir '{home}/started'\n")
        handler.chmod(0o755)

    def command(self, *words: str) -> list:
        return ["/bin/sh", self.prefix / "runtime/hook", "notifications", "quick", *words]

    def fire(self, number: object, *words: str) -> None:
        run(self.command(*words), number, self.env)

    def until_started(self, number: object) -> float:
        """Seconds from the firing to the start of its handler."""
        began = time.perf_counter()
        self.fire(number, "--start-worker")
        while not (self.home / "started").exists():
            time.sleep(0.0002)
        took = time.perf_counter() - began
        (self.home / "started").rmdir()
        return took

    def end_worker(self) -> None:
        """Kill the worker that the hook started, and have the next firing find none."""
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if f"{self.prefix}/runtime/lib/worker.py".encode() in cmdline.read_bytes():
                    os.kill(int(cmdline.parent.name), signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.3)


def run(command: list, number: object, env: dict) -> None:
    payload = (PAYLOAD % number).encode()
    subprocess.run(command, input=payload, env=env, check=True, stdout=subprocess.DEVNULL)


def medians(commands: dict[str, tuple[list, dict]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each command, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(-3, rounds):
        for name, (command, env) in list(commands.items())[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            run(command, number, env)
            # The first rounds warm the caches.
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def measure(rounds: int, checkout: Path | None = None) -> dict[str, float]:
    """Return the median milliseconds of each command, and from firing to handler cold and warm."""
    with tempfile.TemporaryDirectory() as directory:
        installed = {"hook": Installed(HERE, Path(directory, "home"))}
        if checkout:
            installed["hook of CHECKOUT"] = Installed(checkout, Path(directory, "other"))
        commands = other_commands(directory)
        for name, each in installed.items():
            commands[name] = (each.command(), each.env)
        found = medians(commands, rounds)
        for name, each in installed.items():
            cold, warm = starts(each, rounds)
            found |= {
                f"{name}: fired to handler, cold": cold,
                f"{name}: fired to handler, warm": warm,
            }
        return found


def other_commands(directory: str) -> dict[str, tuple[list, dict]]:
    """Return the commands that the hook is compared with, and their environments."""
    plain = f"{directory}/plain.db"
    make = "pragma journal_mode = wal; create table plain (id integer primary key, data text)"
    subprocess.run(["sqlite3", plain, make], check=True, stdout=subprocess.DEVNULL)
    script = Path(directory, "plain.py")
    script.write_text(PLAIN.format(db=plain))
    one_liner = ["sqlite3", plain, f"insert into plain (data) values ('{PAYLOAD % 1}')"]
    env = {"HOME": directory, "PATH": "/usr/bin:/bin"}
    commands = {
        "sh that does nothing": (["/bin/sh", "-c", ":"], env),
        ONE_LINER: (["/bin/sh", "-c", '"$@"', "sh", *one_liner], env),
    }
    pythons = {"/usr/bin/python3": "Debian's", os.path.realpath(sys.executable): "uv's"}
    for python, whose in pythons.items():
        if os.access(python, os.X_OK):
            name = f"a script for {whose} Python, one INSERT"
            commands[name] = ([python, script], env | {"PATH": os.environ["PATH"]})
    return commands


def starts(each: Installed, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds from firing to handler: without a worker, and with one."""
    try:
        each.fire("first", "--start-worker")
        shutil.rmtree(each.home / "started", ignore_errors=True)
        cold = []
        for number in range(COLD_ROUNDS):
            each.end_worker()
            shutil.rmtree(each.home / "started", ignore_errors=True)
            cold.append(each.until_started(f"cold {number}"))
        warm = [each.until_started(f"warm {number}") for number in range(rounds)]
    finally:
        each.end_worker()
    return statistics.median(cold) * 1000, statistics.median(warm) * 1000


def main() -> int:
    found = measure(int((sys.argv + ["40"])[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    for name, milliseconds in found.items():
        times = milliseconds / found[ONE_LINER]
        print(f"{name:50} {milliseconds:7.1f} ms   {times:5.2f} times the one-liner")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
