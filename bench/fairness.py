#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["persist-queue>=1.1,<2"]
# ///
"""Whether every writer gets its turn: processes that write without a pause, all begun together.

    bench/fairness.py [SCENARIO …] [--seconds 5] [--json]

A scenario is a name and a number of processes; default: put-2 put-8 put-32 work-8 shell-8.
  put-N    enqueue_task
  work-N   get and ack of get_ack_queue, on a queue that was filled before
  shell-N  enqueue_task, beside half as many that run the sqlite3 command for each INSERT
Of each: what the slowest and the fastest process got done, the longest that one call took, and how many calls ended in
QueueBusy. The sqlite3 writers are compared with each other; each of theirs has `.timeout 5000` and must exit 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
SCENARIOS = ["put-2", "put-8", "put-32", "work-8", "shell-8"]
# What one process can finish in a second at most; the queue is filled for all of them together.
TASKS_PER_SECOND = 8_000
PAYLOAD = {"hook_event_name": "PostToolUse", "cwd": "/home/user/project", "tool_input": {"content": "x" * 200}}
INSERT = """insert into bench (data) values ('{"workspace_path": "/home/user/project"}')"""


def write(kind: str, seconds: float) -> dict:
    """What one process does: how many calls came to their end, how many failed, the longest."""
    if kind == "shell":
        call, busy = shell_writer(), subprocess.CalledProcessError
    else:
        sys.path.insert(0, str(HERE))
        import queue_helpers as q

        call, busy = {"put": put_writer, "work": work_writer}[kind](q), q.QueueBusy
    print("ready", flush=True)
    # CLOCK_MONOTONIC is the same in all processes, so all of them begin at this very moment.
    begin = float(sys.stdin.readline())
    time.sleep(max(0.0, begin - time.monotonic()))
    done, failed, longest, now = 0, 0, 0.0, time.monotonic()
    while now < begin + seconds:
        try:
            if not call():
                break
            done += 1
        except busy:
            failed += 1
        before, now = now, time.monotonic()
        longest = max(longest, now - before)
    return {"done": done, "failed": failed, "longest_ms": longest * 1000, "ran_dry": now < begin + seconds}


def put_writer(q):
    """One enqueue a call."""
    q.ensure_queue(q.connect(), "bench")
    return lambda: q.enqueue_task("bench", "link_validation", PAYLOAD)


def work_writer(q):
    """One get and its ack a call."""
    import persistqueue

    queue, held = q.get_ack_queue("bench"), []

    def work() -> bool:
        # What was claimed stays claimed when its ack found the database busy: the next call tries that again.
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
    command = ["sqlite3", "-cmd", ".timeout 5000", f"{os.environ['TASK_QUEUE_STATE']}/tasks.db", INSERT]
    return lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL) is not None


def compare(reports: list[dict]) -> dict:
    """The slowest and the fastest of some processes."""
    done = sorted(report["done"] for report in reports)
    return {
        "processes": len(reports),
        "slowest": done[0],
        "fastest": done[-1],
        "longest_ms": round(max(report["longest_ms"] for report in reports), 1),
        "busy": sum(report["failed"] for report in reports),
        "ran_dry": any(report["ran_dry"] for report in reports),
    }


def run(scenario: str, seconds: float) -> list[dict]:
    """One scenario on a database of its own: a comparison for each kind of writer."""
    kind, number = scenario.rsplit("-", 1)
    kinds = {"put": ["put"], "work": ["work"], "shell": ["put"]}[kind] * int(number)
    kinds += ["shell"] * (int(number) // 2 if kind == "shell" else 0)
    with tempfile.TemporaryDirectory() as directory:
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        fill = int(seconds * TASKS_PER_SECOND) if kind == "work" else 0
        subprocess.run([sys.executable, __file__, "--fill", str(fill)], env=env, check=True)
        processes = [
            subprocess.Popen([sys.executable, __file__, "--write", kind, "--seconds", str(seconds)], env=env,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for kind in kinds
        ]  # fmt: skip
        try:
            for process in processes:
                process.stdout.readline()
            begin = time.monotonic() + 0.2
            for process in processes:
                process.stdin.write(f"{begin}\n")
                process.stdin.flush()
            reports = [(kind, json.loads(process.communicate()[0])) for kind, process in zip(kinds, processes, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = []
        for kind in dict.fromkeys(kinds):
            compared = compare([report for its_kind, report in reports if its_kind == kind])
            results.append({"scenario": scenario, "writers": kind, "seconds": seconds, **compared})
        return results


def fill(number: int) -> None:
    """Make the database and put so many tasks into it."""
    sys.path.insert(0, str(HERE))
    import queue_helpers as q

    q.ensure_queue(q.connect(), "bench")
    for first in range(0, number, 2_000):
        tasks = [{"task_type": "t", "data": PAYLOAD} for _ in range(min(2_000, number - first))]
        q.enqueue_tasks("bench", tasks)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"default: {' '.join(SCENARIOS)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each scenario (default 5)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, in place of the table")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--fill", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.fill is not None:
        fill(args.fill)
        return 0
    if args.write:
        print(json.dumps(write(args.write, args.seconds)))
        return 0
    scenarios = args.scenarios or SCENARIOS
    for scenario in scenarios:
        kind, _, number = scenario.rpartition("-")
        if kind not in ("put", "work", "shell") or not number.isdecimal() or int(number) < 2:
            parser.error(f"{scenario!r} is not a scenario: put-N, work-N or shell-N, N from 2")
    if not args.json:
        print(f"{'scenario':10} {'writers':8} {'processes':>9} {'slowest':>8} {'fastest':>8} {'ratio':>6} {'longest ms':>11} {'busy':>5}")
    for scenario in scenarios:
        for result in run(scenario, args.seconds):
            print(json.dumps(result) if args.json else line(result), flush=True)
    return 0


def line(result: dict) -> str:
    """A comparison as a line of the table."""
    ratio = result["slowest"] / max(1, result["fastest"])
    return (f"{result['scenario']:10} {result['writers']:8} {result['processes']:9} {result['slowest']:8} {result['fastest']:8} "
            f"{ratio:6.2f} {result['longest_ms']:11.1f} {result['busy']:5}")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
