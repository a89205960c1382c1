"""A failed attempt waits twice as long as the one before, and an hour at the most."""

import time

import pytest


@pytest.mark.parametrize(
    ("attempts", "least", "most"),
    [(1, 0.5, 1), (2, 1, 2), (5, 8, 16), (13, 1800, 3600), (10_000, 1800, 3600)],
)
def test_the_next_attempt_is_due_within_bounds(queue, installation, attempts, least, most):
    queue.enqueue_task("notifications", "t", {})
    installation.sqlite3(
        f"update notifications set attempts = {attempts - 1}, own_attempts = 100000"
    )
    conn = queue.connect()
    [task] = queue.claim_ready(conn, "notifications")
    with queue.transaction(conn):
        before = time.time()
        assert queue.nack(conn, task, error="no") == "scheduled"
    [(due_at,)] = installation.rows("select due_at from notifications")
    assert least <= due_at - before <= most + 5
