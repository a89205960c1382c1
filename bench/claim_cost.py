#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Measure what a task costs while the queue grows: of the rows of each line, half are scheduled, three
tenths are one group, and a fifth waits; as many are finished.

    bench/claim_cost.py [ROWS ROWS …]     default 100 10000 1000000

The group's tasks have the higher priority: the end of one makes the next one ready. The last line
compares the last size with the first.
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
# A statement and the part of the rows that it makes.
FILL = {
    """insert into bench (data, status, due_at) select json_object('task_id', 's' || i, 'task_type', 't',
       'data', json_object('i', i)), 3, 4e9 + i from n""": 0.5,
    """insert into bench (data, group_id, priority) select json_object('task_id', 'g' || i, 'task_type', 't',
       'data', json_object('i', i)), 'big', 1 from n""": 0.3,
    """insert into bench (data) select json_object('task_id', 'w' || i, 'task_type', 't',
       'data', json_object('workspace_path', '/home/user/docs/' || i)) from n""": 0.2,
    """insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
       select 'bench', i, 'h' || i, 't', 'completed', '{}', '2001-01-01 00:00:00.000' from n""": 1.0,
}
COLUMNS = ("look", "claim", "ack", "put", "group claim", "group ack", "group put")


def main(argv: list[str] | None = None) -> int:
    sizes = [int(text) for text in (sys.argv[1:] if argv is None else argv)] or [
        100,
        10_000,
        1_000_000,
    ]
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TASK_QUEUE_STATE"] = f"{directory}/state"
        import queue_helpers as q

        conn = q.connect()
        q.ensure_queue(conn, "bench")
        print(f"{'µs of':>10}" + "".join(f"{name:>12}" for name in COLUMNS) + "   filled in")
        filled, medians = 0, []
        for size in sorted(sizes):
            began = time.perf_counter()
            fill(q, conn, filled, size)
            filled, took = size, time.perf_counter() - began
            medians.append(measure_all(q, conn, min(ROUNDS, size // 10)))
            print(
                f"{size:10}"
                + "".join(f"{medians[-1][name]:12.1f}" for name in COLUMNS)
                + f"   {took:.1f} s"
            )
        print(
            f"{'times':>10}"
            + "".join(f"{medians[-1][name] / medians[0][name]:12.2f}" for name in COLUMNS)
        )
        q.resign()
        q.close(conn)
    return 0


def fill(q, conn, filled: int, size: int) -> None:
    for statement, part in FILL.items():
        with q.transaction(conn, durable=False):
            conn.execute(
                f"{NUMBERS} {statement}",
                {"first": int(filled * part) + 1, "last": int(size * part)},
            )
    conn.execute("pragma wal_checkpoint(truncate)")


def measure_all(q, conn, rounds: int) -> dict[str, float]:
    """The median of each column in microseconds."""
    times = {name: [] for name in COLUMNS}
    for _ in range(rounds):
        measure(times["look"], lambda: q.has_ready(conn, "bench"))
        for group in ("group ", ""):
            (task,) = measure(times[f"{group}claim"], lambda: q.claim_ready(conn, "bench"))
            assert task.task_id.startswith("g") == bool(group)
            if group:
                grouped = task
        measure(times["ack"], lambda task=task: end(q, conn, task))
        measure(times["group ack"], lambda task=grouped: end(q, conn, task))
        measure(times["put"], lambda: q.enqueue_task("bench", "t", {}))
        measure(
            times["group put"],
            lambda: q.enqueue_task(
                "bench", "t", {}, f"g{os.urandom(8).hex()}", group="big", priority=1
            ),
        )
    return {name: statistics.median(values) for name, values in times.items()}


def measure(times: list[float], action):
    """Run action, and remember how many microseconds it took."""
    began = time.perf_counter()
    result = action()
    times.append((time.perf_counter() - began) * 1e6)
    return result


def end(q, conn, task) -> None:
    with q.transaction(conn):
        assert q.ack(conn, task)


if __name__ == "__main__":
    raise SystemExit(main())
