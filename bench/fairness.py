#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["persist-queue>=1.1,<2"]
# ///
"""See whether every writer gets its turn: writers that write without a pause, all begun together.

    bench/fairness.py [SCENARIO …] [--seconds 5] [--json]

A scenario is a name and a number of writers; default: put-2 put-8 put-32 thread-8 work-8 shell-8.
  put-N     processes that enqueue_task
  thread-N  threads that do so, half of them in one process, half in another
  work-N    processes that get and ack (get_ack_queue), on a queue that was filled before
  raw-N     processes with an INSERT of their own through Python's sqlite3, which waits 5 s at most
  shell-N   processes that enqueue_task, beside half as many that run the sqlite3 command
Of each: what the slowest and the fastest writer got done, the longest that one call took, and how
many calls failed (QueueBusy). The sqlite3 commands are compared with each other; each is one INSERT
with `.timeout 5000`, and fails when it does not exit 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SCENARIOS = ["put-2", "put-8", "put-32", "thread-8", "work-8", "shell-8"]
# So much is put into the queue for work-N, which must not run out of it.
TASKS_PER_SECOND = 8_000
PAYLOAD = {
    "hook_event_name": "PostToolUse",
    "cwd": "/home/user/project",
    "tool_input": {"content": "x" * 200},
}
INSERT = """insert into bench (data) values ('{"workspace_path": "/home/user/project"}')"""


def write(kind: str, threads: int, seconds: float) -> list[dict]:
    """Return each thread's calls that ended well and ill, and the longest one."""
    make, busy = shell_writer, subprocess.CalledProcessError
    if kind != "shell":
        sys.path.insert(0, str(HERE))
        import queue_helpers as q

        make, busy = (lambda: WRITERS[kind](q)), q.QueueBusy
    begin: list[float] = []
    warm, told = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    reports: list[dict] = []

    def fall_over(failure) -> None:
        # One thread less would leave the others waiting at their barrier.
        sys.__excepthook__(*failure[:3])
        os._exit(1)

    threading.excepthook = fall_over

    def writer() -> None:
        call = make()
        warm.wait()
        told.wait()
        time.sleep(max(0.0, begin[0] - time.monotonic()))
        done, failed, longest, now = 0, 0, 0.0, time.monotonic()
        while now < begin[0] + seconds:
            try:
                if not call():
                    break
                done += 1
            except busy:
                failed += 1
            before, now = now, time.monotonic()
            longest = max(longest, now - before)
        dry = now < begin[0] + seconds
        reports.append({"done": done, "failed": failed, "longest": longest, "ran_dry": dry})

    running = [threading.Thread(target=writer, daemon=True) for _ in range(threads)]
    for thread in running:
        thread.start()
    warm.wait()
    print("ready", flush=True)
    # CLOCK_MONOTONIC is the same in all processes, so all of them begin at this very moment.
    begin.append(float(sys.stdin.readline()))
    told.wait()
    for thread in running:
        thread.join()
    return reports


def put_writer(q):
    """One enqueue a call."""
    q.ensure_queue(q.connect(), "bench")
    return lambda: q.enqueue_task("bench", "link_validation", PAYLOAD)


def work_writer(q):
    """One get and its ack a call."""
    import persistqueue

    queue, held = q.get_ack_queue("bench"), []

    def work() -> bool:
        # A task stays claimed when its ack found the database busy: the next call tries again.
        try:
            held[:] = held or [queue.get(block=False)[0]]
        except persistqueue.Empty:
            return False
        queue.ack(id=held[0])
        held.clear()
        return True

    return work


def shell_writer():
    """One sqlite3 command a call, as a hook written in bash has it."""
    db = f"{os.environ['TASK_QUEUE_STATE']}/tasks.db"
    command = ["sqlite3", "-cmd", ".timeout 5000", db, INSERT]
    return lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL) is not None


def raw_writer(q):
    """One INSERT a call, with SQLite's own way to wait for the lock."""
    import sqlite3

    conn = sqlite3.connect(f"{os.environ['TASK_QUEUE_STATE']}/raw.db", 5.0, isolation_level=None)
    conn.execute("pragma journal_mode = wal")
    conn.execute("create table if not exists raw (id integer primary key, data text)")
    text = json.dumps(PAYLOAD)

    def put() -> bool:
        try:
            conn.execute("insert into raw (data) values (?)", (text,))
        except sqlite3.OperationalError as error:
            raise q.QueueBusy(str(error)) from None
        return True

    return put


WRITERS = {"put": put_writer, "work": work_writer, "raw": raw_writer}


def compare(reports: list[dict]) -> dict:
    """The slowest and the fastest of some writers."""
    done = sorted(report["done"] for report in reports)
    return {
        "writers": len(reports),
        "slowest": done[0],
        "fastest": done[-1],
        "longest_ms": round(max(report["longest"] for report in reports) * 1000, 1),
        "busy": sum(report["failed"] for report in reports),
        "ran_dry": any(report["ran_dry"] for report in reports),
    }


def run(scenario: str, seconds: float) -> list[dict]:
    """One scenario on a database of its own: a comparison for each kind of writer."""
    name, number = scenario.split("-")[0], int(scenario.split("-")[1])
    processes = {
        "put": [("put", 1)] * number,
        "thread": [("put", number // 2), ("put", number - number // 2)],
        "work": [("work", 1)] * number,
        "raw": [("raw", 1)] * number,
        "shell": [("put", 1)] * number + [("shell", 1)] * (number // 2),
    }[name]
    with tempfile.TemporaryDirectory() as directory:
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        ours = [sys.executable, __file__, "--seconds", str(seconds)]
        number = int(seconds * TASKS_PER_SECOND) if name == "work" else 0
        subprocess.run([*ours, "--fill", str(number)], env=env, check=True)
        running = []
        try:
            for kind, threads in processes:
                command = [*ours, "--write", kind, str(threads)]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                running.append((kind, subprocess.Popen(command, env=env, text=True, **pipes)))
            for kind, process in running:
                if process.stdout.readline() != "ready\n":
                    raise SystemExit(f"{scenario}: a {kind} writer ended with {process.wait()}")
            begin = time.monotonic() + 0.2
            for _, process in running:
                process.stdin.write(f"{begin}\n")
                process.stdin.flush()
            reports: dict[str, list[dict]] = {}
            for kind, process in running:
                said = process.communicate()[0]
                if process.returncode != 0:
                    raise SystemExit(f"{scenario}: a {kind} writer ended with {process.returncode}")
                reports.setdefault(kind, []).extend(json.loads(said))
        finally:
            for _, process in running:
                process.kill()
                process.wait()
    return [{"scenario": scenario, "kind": kind, **compare(of)} for kind, of in reports.items()]


def fill(number: int) -> None:
    """Make the database, and put so many tasks into it."""
    sys.path.insert(0, str(HERE))
    import queue_helpers as q

    q.ensure_queue(q.connect(), "bench")
    for first in range(0, number, 2_000):
        size = min(2_000, number - first)
        q.enqueue_tasks("bench", [{"task_type": "t", "data": PAYLOAD} for _ in range(size)])


def line(result: dict) -> str:
    """A comparison as a line of the table."""
    ratio = result["slowest"] / max(1, result["fastest"])
    first = "".join(f"{result[name]:>9}" for name in ("scenario", "kind", *COUNTS))
    return f"{first}{ratio:9.2f}{result['longest_ms']:12.1f}{result['busy']:6}"


COUNTS = ("writers", "slowest", "fastest")


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each scenario (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.fill is not None:
        fill(args.fill)
        return 0
    if args.write:
        print(json.dumps(write(args.write[0], int(args.write[1]), args.seconds)))
        return 0
    scenarios = args.scenarios or SCENARIOS
    for scenario in scenarios:
        if not re.fullmatch("(put|thread|work|raw|shell)-([2-9]|[1-9][0-9]+)", scenario):
            parser.error(
                f"{scenario!r} is no scenario: put-N, thread-N, work-N, raw-N or shell-N, N from 2"
            )
    if not args.json:
        names = "".join(f"{name:>9}" for name in ("scenario", "kind", *COUNTS, "ratio"))
        print(f"{names}  longest ms  busy")
    for scenario in scenarios:
        for result in run(scenario, args.seconds):
            print(json.dumps(result) if args.json else line(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
