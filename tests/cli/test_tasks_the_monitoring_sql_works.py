"""The queries people monitor with, typed into the real sqlite3 command, on the view task_queue."""

from __future__ import annotations

import os

from conftest import wait_for


def test_depth_times_failures_long_runs_and_pruning_by_hand(installation):
    """Five completed, two failed after two attempts, one cancelled, three waiting, one scheduled,
    one that runs for long.
    """
    gate = installation.directory / "gate"
    os.mkfifo(gate)
    installation.handler("good", "#!/bin/sh\nsleep 0.05\n")
    installation.handler("bad", "#!/bin/sh\necho no such host >&2; exit 3\n")
    installation.handler("slow", f"#!/bin/sh\nread line < '{gate}'\n")
    installation.add("notifications good --jsonl", input="{}\n" * 5)
    installation.add("notifications bad --jsonl", input="{}\n" * 2)
    installation.drain("notifications --max-attempts 2 --backoff 0")
    installation.add("completions slow --task-id slow-1")
    installation.worker("completions")
    wait_for(lambda: installation.rows("select 1 from completions where status = 2"))
    installation.add("approvals review --jsonl", input="{}\n" * 3)
    installation.add("approvals review --delay 900")
    installation.add("approvals review --task-id gone")
    installation.tq("cancel gone")

    ask = installation.sqlite3
    assert ask(
        "SELECT task_type, status, COUNT(*) AS count FROM task_queue GROUP BY task_type, status ORDER BY 1, 2;"
    ).split() == "bad|failed|2 good|completed|5 review|cancelled|1 review|pending|3 review|scheduled|1 slow|in_progress|1".split()  # fmt: skip
    assert ask("SELECT COUNT(*) FROM task_queue WHERE status = 'pending' AND queue = 'approvals';") == "3"  # fmt: skip

    task_type, average = ask(
        "SELECT task_type, AVG((julianday(completed_at) - julianday(started_at)) * 86400) FROM task_queue "
        "WHERE status = 'completed' GROUP BY task_type;"
    ).split("|")
    assert task_type == "good" and 0.05 <= float(average) < 5

    failed = ask(
        "SELECT task_id, task_type, error_message, retry_count, max_retries FROM task_queue "
        "WHERE status = 'failed' ORDER BY completed_at DESC LIMIT 10;"
    )
    rows = [line.split("|")[1:] for line in failed.splitlines()]
    assert [(row[0], *row[2:]) for row in rows] == [("bad", "1", "1")] * 2
    assert all("exit 3: no such host" in row[1] for row in rows)

    long_runs = (
        "SELECT task_id, started_at FROM task_queue WHERE status = 'in_progress' "
        "AND started_at < datetime('now', '-5 minutes');"
    )
    assert ask(long_runs) == ""
    ask("update completions set claimed_at = claimed_at - 301")
    assert ask(long_runs).startswith("slow-1|2")

    minutes = (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', iif(rowid % 2, '-1441 minutes', '-1439 minutes'))"
    )
    ask(f"update task_history set completed_at = {minutes}")
    kept = ask("select count(*) from task_history where not rowid % 2")
    ask("DELETE FROM task_history WHERE completed_at < datetime('now', '-24 hours');")
    assert ask("select count(*) from task_history") == kept
    assert installation.db.stat().st_mode & 0o777 == 0o600
