#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Measure how long an enqueue takes while cleanup.py prunes a big history.

    bench/cleanup_latency.py                       a million finished tasks, in a throw-away state directory
    bench/cleanup_latency.py --rows 200000 --json

Prints the median, the 99th percentile and the worst of the enqueues before and during the clean-up,
in milliseconds.

exit codes: 0 no enqueue took more than 100 ms; 1 one did; 64 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MS = 100.0
ROOT = Path(__file__).resolve().parent.parent

FILL = """
with recursive n (n) as (select 1 union all select n + 1 from n where n < :rows)
insert into task_history (queue, row_id, task_id, task_type, status, data, attempts, enqueued_at, started_at, completed_at, result)
select 'notifications', n, lower(hex(randomblob(8))), 'link_validation', case when n % 20 then 'completed' else 'failed' end,
  json_object('workspace_path', '/home/user/docs', 'padding', hex(zeroblob(100))), 1,
  strftime('%Y-%m-%d %H:%M:%f', 'now', '-3 days', (n * 86400.0 / :rows) || ' seconds'),
  strftime('%Y-%m-%d %H:%M:%f', 'now', '-3 days', (n * 86400.0 / :rows + 1) || ' seconds'),
  strftime('%Y-%m-%d %H:%M:%f', 'now', '-3 days', (n * 86400.0 / :rows + 3) || ' seconds'),
  hex(zeroblob(case when n % 50 then 50 else 4000 end))
from n"""

ENQUEUER = """
import json, os, sys, time
import queue_helpers as q
lines = iter(sys.stdin.readline, "")
q.enqueue_task("approvals", "review", {})
for phase in ("before", "during"):
    took, last = [], time.monotonic() + 2
    while time.monotonic() < last if phase == "before" else os.getppid() == int(sys.argv[1]):
        began = time.perf_counter()
        q.enqueue_task("approvals", "review", {"phase": phase})
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(0.002)
        if phase == "during" and os.path.exists(sys.argv[2]):
            break
    took.sort()
    print(json.dumps({"phase": phase, "enqueued": len(took), "median_ms": round(took[len(took) // 2], 2),
                      "p99_ms": round(took[len(took) * 99 // 100], 2), "worst_ms": round(took[-1], 2),
                      "over_100_ms": sum(ms > 100 for ms in took)}), flush=True)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(64, f"cleanup_latency.py: {message}\n")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="in the history (default a million)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cleanup_latency.") as folder:
        result = measure(Path(folder), args.rows)
    print(
        json.dumps(result)
        if args.json
        else "\n".join(f"{key:8} {value}" for key, value in result.items())
    )
    return 1 if result["during"]["worst_ms"] > LIMIT_MS else 0


def measure(folder: Path, rows: int) -> dict:
    state, done = folder / "state", folder / "done"
    env = {**os.environ, "TASK_QUEUE_STATE": str(state), "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, ROOT / "enqueue.py", "notifications", "first"],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    conn = sqlite3.connect(state / "tasks.db", isolation_level=None)
    conn.execute("pragma synchronous = off")
    conn.execute(FILL, {"rows": rows})
    conn.execute("pragma wal_checkpoint(truncate)")
    conn.close()
    with subprocess.Popen(
        [sys.executable, "-c", ENQUEUER, str(os.getpid()), done],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    ) as enqueuer:
        before = json.loads(enqueuer.stdout.readline())
        began = time.monotonic()
        cleanup = subprocess.run(
            [sys.executable, ROOT / "cleanup.py", "--json"],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.monotonic() - began
        done.touch()
        during = json.loads(enqueuer.stdout.readline())
    report = json.loads(cleanup.stdout)
    told = {
        key: report[key]
        for key in ("pruned", "bytes_before", "bytes_after", "free_bytes", "wal_bytes")
    }
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "before": before,
        "during": during,
        "cleanup": told,
    }


if __name__ == "__main__":
    raise SystemExit(main())
