#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Measure how soon the task of a worker that got `kill -9` runs again, with another worker idle: p50, p99
and maximum.

    bench/recovery.py [KILLS]     default 200

The handler is killed with its worker (one that outlives it keeps its task). Measured from the kill
to the survivor's claim, and to the first line of the handler that it started. Linux: date has to
know nanoseconds.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
HANDLER = '#!/bin/sh\necho "$(date +%s.%N) $$" >>"$TASK_QUEUE_STATE/../runs"\nexec sleep 1000\n'


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{kills} kills; milliseconds from kill -9: p50, p99, maximum")
    for name, values in measure(kills).items():
        shares = (values[int(share * (kills - 1))] for share in (0.5, 0.99, 1.0))
        print(f"{name:14}" + "".join(f"{value:9.1f}" for value in shares))
    return 0


def measure(kills: int) -> dict[str, list[float]]:
    """Return the sorted milliseconds until the task is claimed again, and until it runs again."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        env = os.environ | {"TASK_QUEUE_STATE": f"{root}/state"}
        (root / "handlers").mkdir()
        (root / "handlers" / "long").write_text(HANDLER)
        (root / "handlers" / "long").chmod(0o755)
        subprocess.run(
            [sys.executable, HERE / "enqueue.py", "bench", "long"],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        workers = [start(root, env)]
        group, taken, running = wait_for_run(root, 1)[1], [], []
        conn = sqlite3.connect(root / "state" / "tasks.db", timeout=10)
        try:
            for number in range(1, kills + 1):
                workers.append(start(root, env))
                # By then it is idle.
                time.sleep(0.3)
                began = time.time()
                workers[0].kill()
                os.killpg(group, signal.SIGKILL)
                runs, group = wait_for_run(root, number + 1)
                running.append(runs - began)
                taken.append(conn.execute("select claimed_at from bench").fetchone()[0] - began)
                workers.pop(0).wait()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            os.killpg(group, signal.SIGKILL)
    found = {"claimed again": taken, "runs again": running}
    return {name: sorted(value * 1000 for value in values) for name, values in found.items()}


def start(root: Path, env: dict) -> subprocess.Popen:
    """A worker that serves."""
    with open(root / "log", "wb") as log:
        worker = subprocess.Popen(
            [
                sys.executable,
                HERE / "worker.py",
                "bench",
                "--handlers",
                root / "handlers",
                "--max-attempts",
                "1000",
            ],
            env=env,
            stderr=log,
        )
    while b"serves" not in (root / "log").read_bytes():
        time.sleep(0.005)
    return worker


def wait_for_run(root: Path, number: int) -> tuple[float, int]:
    """Return when run `number` began, and its process group."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        runs = (root / "runs").read_text().split("\n")[:-1] if (root / "runs").exists() else []
        if len(runs) == number:
            began, group = runs[-1].split()
            return float(began), int(group)
        time.sleep(0.001)
    raise SystemExit("the task did not run again within 30 s")


if __name__ == "__main__":
    raise SystemExit(main())
