"""However many tasks expire or become due at once, nobody waits for the write lock for long."""

import subprocess

import pytest

MANY = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < 10000)
insert into notifications (data, {column}) select '{{}}', unixepoch() - 1 from n"""
# Another writer, with a fifth of the usual patience.
OTHER = """
import sys
import queue_helpers as q
q.connect(busy_timeout_ms=1_000)
print("begins", flush=True)
while sys.argv[1] not in (t.task_id for t in q.claim_ready(q.connect(busy_timeout_ms=1_000), "approvals")):
    q.enqueue_tasks("completions", [{"task_type": "t", "data": {}}], busy_timeout_ms=1_000)
"""


@pytest.mark.parametrize("column", ["expires_at", "due_at"])
def test_a_backlog_that_is_over_at_once_is_taken_in_steps(installation, queue, column):
    conn = queue.connect()
    installation.sqlite3(MANY.format(column=column))
    held = []
    conn.set_trace_callback(
        lambda sql: (
            held.append(queue.time.monotonic())
            if sql in ("BEGIN IMMEDIATE", "begin immediate", "COMMIT", "commit")
            else None
        )
    )
    other = installation.start_python(OTHER, "stop", stderr=subprocess.PIPE)
    assert other.stdout.readline() == "begins\n"
    while queue.look(conn, "notifications")[1]:
        queue.claim_ready(conn, "notifications", limit=1)
    conn.set_trace_callback(None)
    queue.enqueue_task("approvals", "t", {}, "stop")
    _, said = other.communicate(timeout=60)
    assert (other.returncode, said) == (0, ""), said
    # Each transaction was a small part of the whole.
    parts = [end - begin for begin, end in zip(held[::2], held[1::2], strict=False)]
    assert len(parts) >= 10_000 / queue.AT_ONCE and max(parts) < sum(parts) / 4
    if column == "expires_at":
        assert installation.rows("select count(*) from task_history where status = 'expired'") == [
            (10_000,)
        ]
    else:
        assert installation.rows("select count(*) from notifications where status = 3") == [(0,)]
