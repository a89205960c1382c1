"""approve, reject, pause, resume, limit and retry: what a person says is what workers do, and
everybody says it alike.
"""

from __future__ import annotations

import json

import pytest
from conftest import wait_for


def tasks(installation, *args, code: int = 0):
    done = installation.run("tasks.py", *args, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def hold(installation, task_id: str, *args: str) -> None:
    installation.enqueue("approvals", "review", "{}", "--task-id", task_id, "--hold", *args)


def statuses(installation) -> dict[str, str]:
    return dict(installation.rows("select task_id, status from task_queue"))


def drain(installation) -> None:
    done = installation.run(
        "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
    )
    assert done.returncode == 0, done.stderr


def test_a_held_task_runs_once_it_is_approved_and_not_before(installation):
    installation.handler("review", "#!/bin/sh\n")
    hold(installation, "h-1")
    drain(installation)
    assert statuses(installation) == {"h-1": "held"}
    assert [row["task_id"] for row in tasks(installation, "list", "--status", "held")] == ["h-1"]
    assert tasks(installation, "stats")["queues"]["approvals"]["held"] == 1
    worker = installation.worker("approvals")
    assert installation.run("tasks.py", "approve", "h-1").stdout == "approved h-1\n"
    assert installation.finished("h-1")["status"] == "completed"
    assert worker.poll() is None


def test_approval_keeps_the_groups_rule(installation):
    for name in ("g-1", "g-2"):
        hold(installation, name, "--group", "one")
    assert tasks(installation, "approve", "g-1", "g-2")["approved"] == 2
    assert statuses(installation) == {"g-1": "pending", "g-2": "blocked"}


def test_a_rejected_task_is_cancelled_and_the_history_says_why(installation):
    hold(installation, "r-1")
    hold(installation, "r-2")
    assert tasks(installation, "reject", "r-1", "--reason", "not  on a\nFriday")["rejected"] == 1
    assert installation.history("r-1")["error"] == "rejected: not on a Friday"
    assert installation.run("tasks.py", "reject", "r-2").stdout == "rejected r-2\n"
    assert (installation.history("r-2")["status"], installation.history("r-2")["error"]) == (
        "cancelled",
        "rejected",
    )


@pytest.mark.parametrize("verb", ("approve", "reject"))
def test_only_what_is_held_is_approved_or_rejected(installation, verb):
    installation.enqueue("approvals", "review", "{}", "--task-id", "ready")
    installation.enqueue("approvals", "review", "{}", "--task-id", "later", "--delay", "1h")
    hold(installation, "held")
    installation.run("tasks.py", "cancel", "ready")
    before = installation.rows("select task_id, status from approvals where task_id = 'later'")
    done = installation.run("tasks.py", verb, "ready", "later", "held")
    assert done.returncode == 1 and done.stdout in ("approved held\n", "rejected held\n")
    assert (
        "task ready of approvals was not " in done.stderr and "it has ended already" in done.stderr
    )
    assert (
        "task later of approvals was not " in done.stderr
        and "it is scheduled, not held" in done.stderr
    )
    assert (
        installation.rows("select task_id, status from approvals where task_id = 'later'") == before
    )


def test_retry_of_a_held_task_names_approve(installation):
    hold(installation, "h-1")
    done = installation.run("tasks.py", "retry", "h-1")
    assert done.returncode == 1 and "it is held for a person: ./tasks.py approve h-1" in done.stderr
    assert statuses(installation) == {"h-1": "held"}


def test_a_pause_is_said_by_everybody_until_when_and_why(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "p-1")
    (told,) = tasks(installation, "pause", "approvals", "--for", "1h", "--reason", "usage limit")
    until = told["until"]
    assert told["changed"] and told["reason"] == "usage limit"
    numbers = tasks(installation, "stats")["queues"]["approvals"]
    assert (numbers["paused"], numbers["paused_until"], numbers["pause_reason"]) == (
        True,
        until,
        "usage limit",
    )
    assert numbers["paused_by"] == "person"
    for command in (["tasks.py", "doctor"], ["tasks.py", "stats"], ["tasks.py", "list"]):
        assert ": usage limit" in installation.run(*command).stdout, command


def test_a_pause_ends_by_itself(installation):
    installation.handler("review", "#!/bin/sh\n")
    installation.enqueue("completions", "review")
    assert installation.run("tasks.py", "pause", "approvals", "--for", "1s").returncode == 0
    installation.enqueue("approvals", "review", "{}", "--task-id", "p-1")
    installation.worker("approvals")
    assert installation.finished("p-1")["status"] == "completed"
    started = "(julianday(started_at) - 2440587.5) * 86400.0"
    assert installation.rows(
        f"select {started} > paused_until - 0.01 from task_history, task_controls"
    ) == [(1,)]
    assert tasks(installation, "stats")["queues"]["approvals"]["paused"] is False


def test_the_later_end_wins_and_the_shorter_one_is_told_so(installation):
    installation.enqueue("approvals", "review")
    tasks(installation, "pause", "approvals", "--for", "2h")
    done = installation.run("tasks.py", "pause", "approvals", "--for", "1h")
    assert done.returncode == 0 and "was paused already, until" in done.stdout
    assert "to shorten that: ./tasks.py resume approvals" in done.stdout
    assert tasks(installation, "pause", "approvals")[0]["changed"] is True
    assert tasks(installation, "stats")["queues"]["approvals"]["paused_until"] is None
    assert "until a person resumes it" in installation.run("tasks.py", "stats").stdout
    assert tasks(installation, "resume", "approvals")[0]["changed"] is True


def test_slots_hold_and_are_shown(installation):
    gate = installation.directory / "gate"
    installation.handler("gated", f"#!/bin/sh\nwhile [ ! -e '{gate}' ]; do sleep 0.02; done\n")
    installation.enqueue("approvals", "gated", "--jsonl", input="{}\n" * 5)
    assert tasks(installation, "limit", "approvals", "--slots", "2") == [
        {"queue": "approvals", "slots": 2}
    ]
    installation.worker("approvals", "--concurrency", "4")
    running = "select count(*) from approvals where status = 2"
    wait_for(lambda: installation.rows(running) == [(2,)], what="two running tasks")
    assert (
        "approvals runs at most 2 tasks at a time" in installation.run("tasks.py", "stats").stdout
    )
    assert tasks(installation, "limit", "approvals", "--slots", "none") == [
        {"queue": "approvals", "slots": None}
    ]
    wait_for(lambda: installation.rows(running) == [(4,)], what="four running tasks")
    gate.touch()
    wait_for(
        lambda: installation.rows("select count(*) from task_history") == [(5,)], what="the end"
    )


def test_a_retry_drops_the_time_that_a_task_had(installation):
    installation.enqueue(
        "approvals", "review", "{}", "--task-id", "t-1", "--ttl", "1h", "--delay", "30m"
    )
    tasks(installation, "retry", "t-1")
    assert installation.rows("select expires_at, due_at, status from approvals") == [
        (None, None, 1)
    ]
    installation.sqlite3("update approvals set expires_at = 1.0")
    assert installation.run("cleanup.py").returncode == 0
    assert installation.history("t-1")["status"] == "expired"
    tasks(installation, "retry", "t-1")
    assert installation.rows("select expires_at, status from approvals") == [(None, 1)]


def test_what_waits_for_its_next_attempt_runs_now_and_nothing_else(installation):
    installation.handler("flaky", "#!/bin/sh\nexit 1\n")
    installation.handler("other", "#!/bin/sh\nexit 1\n")
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "f-1")
    installation.enqueue("approvals", "other", "{}", "--task-id", "o-1")
    assert (
        installation.run(
            "worker.py",
            "approvals",
            "--handlers",
            installation.handlers,
            "--backoff",
            "3600",
            "--drain",
        ).returncode
        == 0
    )
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "delayed", "--delay", "1h")
    assert statuses(installation) == {
        "f-1": "scheduled",
        "o-1": "scheduled",
        "delayed": "scheduled",
    }
    assert (
        installation.run("tasks.py", "retry", "--scheduled", "--type", "flaky").stdout
        == "retried 1 task\n"
    )
    assert statuses(installation) == {"f-1": "pending", "o-1": "scheduled", "delayed": "scheduled"}
    assert tasks(installation, "retry", "--scheduled")["retried"] == 1
    assert statuses(installation) == {"f-1": "pending", "o-1": "pending", "delayed": "scheduled"}


def test_a_task_that_another_machine_has_is_listed_and_left_alone(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "away")
    installation.sqlite3("update approvals set status = 5, owner = 'hub-1'")
    assert [row["status"] for row in tasks(installation, "list")] == ["handed_over"]
    assert tasks(installation, "stats")["queues"]["approvals"]["handed_over"] == 1
    done = installation.run("tasks.py", "cancel", "away")
    assert done.returncode == 1 and "another machine has it" in done.stderr
    assert (
        installation.run("tasks.py", "purge", "approvals", "--yes").stdout
        == "deleted 0 tasks of approvals\n"
    )
    assert tasks(installation, "move", "--from", "approvals", "completions")["moved"] == 0
    done = installation.run("tasks.py", "move", "away", "completions")
    assert done.returncode == 1 and "it is running, handed over, or gone" in done.stderr
    assert installation.rows("select task_id, status from approvals") == [("away", 5)]
