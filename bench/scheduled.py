#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Measure how long after its time a scheduled task starts, while a worker sleeps: from its due time to its
handler's first words.

    bench/scheduled.py [TASKS]     default 50, each due 0.3 to 1 s after it is enqueued

An immediate task beside each shows what is the way to the handler, and what is the clock.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

HANDLER = """#!/bin/sh
echo "$TASK_ID $(date +%s.%N)" >> {log}
"""


def main(argv: list[str] | None = None) -> int:
    count = int(([*(sys.argv[1:] if argv is None else argv)] or ["50"])[0])
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.environ["TASK_QUEUE_STATE"] = f"{directory}/state"
        import queue_helpers as q

        log, handlers = directory / "log", directory / "handlers"
        handlers.mkdir()
        log.touch()
        (handlers / "t").write_text(HANDLER.format(log=log))
        (handlers / "t").chmod(0o755)
        q.connect()
        worker = subprocess.Popen(
            [
                sys.executable,
                HERE / "worker.py",
                "notifications",
                "--handlers",
                handlers,
                "--concurrency",
                "2",
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            late = measure(q, log, count)
        finally:
            worker.terminate()
            worker.wait()
    for what, values in late.items():
        values.sort()
        p95 = values[int(len(values) * 0.95)]
        print(
            f"{what:10} median {statistics.median(values):6.1f} ms   p95 {p95:6.1f} ms   worst {values[-1]:6.1f} ms"
        )
    return 0


def measure(q, log: Path, count: int) -> dict[str, list[float]]:
    """Milliseconds from when each task should have started to when it did."""
    late: dict[str, list[float]] = {"at once": [], "scheduled": []}
    # The first one waits for the worker to start.
    for number in range(-1, count):
        for what, delay in (("at once", 0.0), ("scheduled", random.uniform(0.3, 1.0))):
            due = time.time() + delay
            q.enqueue_task(
                "notifications", "t", {}, f"{what}.{number}", **({"at": due} if delay else {})
            )
            started = wait(log, f"{what}.{number}")
            if number >= 0:
                late[what].append((started - due) * 1000)
    return late


def wait(log: Path, task_id: str) -> float:
    """Return when the task's handler began."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            name, _, when = line.rpartition(" ")
            if name == task_id and when:
                return float(when)
        time.sleep(0.005)
    raise SystemExit(f"task {task_id} did not start within a minute")


if __name__ == "__main__":
    raise SystemExit(main())
