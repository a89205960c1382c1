#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""What a claim and an ack cost while the queue grows: as many waiting, scheduled and finished tasks as each line says.

    bench/claim_cost.py [ROWS ROWS …]     default 100 10000 1000000
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROUNDS = 300
NUMBERS = "with recursive n (i) as (select :first union all select i + 1 from n where i < :last)"
FILL = {
    "waiting": """insert into bench (data) select json_object('task_id', 'w' || i, 'task_type', 't',
                  'data', json_object('workspace_path', '/home/user/docs/' || i)) from n""",
    "scheduled": """insert into bench (data, status, due_at) select json_object('task_id', 's' || i, 'task_type', 't',
                    'data', json_object('i', i)), 3, 4e9 + i from n""",
    "finished": """insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
                   select 'bench', i, 'h' || i, 't', 'completed', '{}', '2001-01-01 00:00:00.000' from n""",
}


def main(argv: list[str] | None = None) -> int:
    sizes = [int(text) for text in (sys.argv[1:] if argv is None else argv)] or [100, 10_000, 1_000_000]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TASK_QUEUE_STATE"] = f"{directory}/state"
        import queue_helpers as q

        conn = q.connect()
        q.ensure_queue(conn, "bench")
        print(f"{'of each':>10} {'look µs':>9} {'claim µs':>9} {'ack µs':>9} {'p99 claim':>10} {'put µs':>9}   filled in")
        filled = 0
        for size in sorted(sizes):
            began = time.perf_counter()
            for statement in FILL.values():
                with q.transaction(conn, durable=False):
                    conn.execute(f"{NUMBERS} {statement}", {"first": filled + 1, "last": size})
            conn.execute("pragma wal_checkpoint(truncate)")
            filled, took = size, time.perf_counter() - began
            times = {"look": [], "claim": [], "ack": [], "put": []}
            for _ in range(min(ROUNDS, size // 2)):
                measure(times["look"], lambda: q.has_ready(conn, "bench"))
                (task,) = measure(times["claim"], lambda: q.claim_ready(conn, "bench"))
                measure(times["ack"], lambda task=task: end(q, conn, task))
                measure(times["put"], lambda: q.enqueue_task("bench", "t", {}))
            look, claim, ack, put = (statistics.median(times[name]) for name in times)
            p99 = sorted(times["claim"])[int(len(times["claim"]) * 0.99)]
            print(f"{size:10} {look:9.1f} {claim:9.1f} {ack:9.1f} {p99:10.1f} {put:9.1f}   {took:.1f} s")
        q.resign()
        q.close(conn)
    return 0


def measure(times: list[float], action):
    """Run action, and remember how many microseconds it took."""
    began = time.perf_counter()
    result = action()
    times.append((time.perf_counter() - began) * 1e6)
    return result


def end(q, conn, task) -> None:
    with q.transaction(conn):
        q.ack(conn, task)


if __name__ == "__main__":
    raise SystemExit(main())
