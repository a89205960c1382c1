"""The queries people monitor with, typed into the real sqlite3 command, on the view task_queue."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import wait_for


def filled(installation) -> None:
    """Five completed, two failed (after two attempts), one cancelled, three waiting, one scheduled,
    one that runs for long.
    """
    installation.handler("good", "#!/bin/sh\nsleep 0.05\n")
    installation.handler("bad", "#!/bin/sh\necho no such host >&2; exit 3\n")
    gate = installation.directory / "gate"
    os.mkfifo(gate)
    installation.handler("slow", f"#!/bin/sh\nread line < '{gate}'\n")
    installation.enqueue("notifications", "good", "--jsonl", input="{}\n" * 5)
    installation.enqueue("notifications", "bad", "--jsonl", input="{}\n" * 2)
    done = installation.run(
        "worker.py",
        "notifications",
        "--handlers",
        installation.handlers,
        "--drain",
        "--max-attempts",
        "2",
        "--backoff",
        "0.01",
    )
    assert done.returncode == 0, done.stderr
    wait_for(
        lambda: (
            installation.rows("select count(*) from task_history") == [(7,)]
            or installation.run(
                "worker.py",
                "notifications",
                "--handlers",
                installation.handlers,
                "--drain",
                "--max-attempts",
                "2",
                "--backoff",
                "0.01",
            )
            and False
        )
    )
    installation.enqueue("completions", "slow", "{}", "--task-id", "slow-1")
    installation.worker("completions")
    wait_for(lambda: installation.rows("select 1 from completions where status = 2"))
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 3)
    installation.enqueue("approvals", "review", "{}", "--delay", "900")
    installation.enqueue("approvals", "review", "{}", "--task-id", "gone")
    assert installation.run("tasks.py", "cancel", "gone").returncode == 0


def test_depth_by_type_and_status(installation):
    filled(installation)
    text = installation.sqlite3(
        "SELECT task_type, status, COUNT(*) AS count FROM task_queue GROUP BY task_type, status ORDER BY 1, 2;"
    )
    assert text.splitlines() == [
        "bad|failed|2",
        "good|completed|5",
        "review|cancelled|1",
        "review|pending|3",
        "review|scheduled|1",
        "slow|in_progress|1",
    ]
    text = installation.sqlite3(
        "SELECT COUNT(*) FROM task_queue WHERE status = 'pending' AND queue = 'approvals';"
    )
    assert text == "3"


def test_average_processing_time_by_type(installation):
    filled(installation)
    text = installation.sqlite3(
        "SELECT task_type, AVG((julianday(completed_at) - julianday(started_at)) * 86400) FROM task_queue "
        "WHERE status = 'completed' GROUP BY task_type;"
    )
    task_type, average = text.split("|")
    assert task_type == "good" and 0.05 <= float(average) < 5


def test_failed_tasks_with_their_error_and_retries(installation):
    filled(installation)
    text = installation.sqlite3(
        "SELECT task_id, task_type, error_message, retry_count, max_retries FROM task_queue "
        "WHERE status = 'failed' ORDER BY completed_at DESC LIMIT 10;"
    )
    rows = [line.split("|") for line in text.splitlines()]
    assert [(row[1], row[3], row[4]) for row in rows] == [("bad", "1", "1")] * 2
    assert all("exit 3: no such host" in row[2] for row in rows)


def test_what_is_in_progress_for_more_than_five_minutes(installation):
    filled(installation)
    query = (
        "SELECT task_id, started_at FROM task_queue WHERE status = 'in_progress' "
        "AND started_at < datetime('now', '-5 minutes');"
    )
    assert installation.sqlite3(query) == ""
    installation.sqlite3("update completions set claimed_at = claimed_at - 301")
    assert installation.sqlite3(query).startswith("slow-1|2")


def test_pruning_by_hand_takes_what_is_older_than_a_day(installation):
    filled(installation)
    installation.sqlite3(
        "update task_history set completed_at = strftime('%Y-%m-%d %H:%M:%f', 'now', '-1441 minutes') where rowid % 2"
    )
    installation.sqlite3(
        "update task_history set completed_at = strftime('%Y-%m-%d %H:%M:%f', 'now', '-1439 minutes') where not rowid % 2"
    )
    kept = installation.sqlite3("select count(*) from task_history where not rowid % 2")
    installation.sqlite3(
        "DELETE FROM task_history WHERE completed_at < datetime('now', '-24 hours');"
    )
    assert installation.sqlite3("select count(*) from task_history") == kept
    assert Path(installation.db).stat().st_mode & 0o777 == 0o600
