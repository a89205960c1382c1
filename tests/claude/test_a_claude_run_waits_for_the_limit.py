"""With the real Claude Code and a worker: a limit pauses the queue, costs no attempt, and all tasks
complete after it.
"""

from __future__ import annotations

import json
import time

import pytest
from claude_stub.client import session_of
from conftest import wait_for


@pytest.fixture
def approvals(installation, claude, claude_handler):
    """Enqueues claude tasks into approvals, whose handler can reach the API."""

    def enqueue(text: str) -> str:
        data = {"prompt": text, "workspace_path": str(claude.workspace)}
        return installation.enqueue("approvals", "claude", json.dumps(data))

    return enqueue


def test_tasks_of_which_the_third_meets_the_limit_all_complete(installation, claude, approvals):
    tasks = [approvals(f"Paint boat {number}.") for number in range(5)]
    claude.answer("limit", after=2, seconds=3)
    installation.worker("approvals", "--concurrency", "2", env=claude.subscription())
    wait_for(lambda: any(one["kind"] == "limit" for one in claude.requests()), 60, "the limit")
    for task in tasks:
        done = installation.finished(task, 90)
        assert (done["status"], done["attempts"]) == ("completed", 1), done
    asked = claude.requests()
    limited = {session_of(request) for request in asked if request["kind"] == "limit"}
    assert 1 <= len(limited) <= 2, "only those that ran already see the limit"
    assert len({session_of(request) for request in asked}) == 5
    # Each of those that met it was asked again in its own session.
    for session in limited:
        kinds = [request["kind"] for request in asked if session_of(request) == session]
        assert kinds[-1] == "fine"


def test_what_a_person_must_mend_pauses_the_queue_until_they_resume_it(
    installation, claude, approvals
):
    claude.answer("auth")
    tasks = [approvals(f"Paint boat {number}.") for number in range(2)]
    installation.worker("approvals", env=claude.env | {"CLAUDE_CODE_MAX_RETRIES": "1"})
    paused = "select 1 from task_controls where queue = 'approvals' and paused_at is not null and paused_until is null"
    wait_for(lambda: installation.rows(paused), 60, "the pause")
    sessions = {session_of(request) for request in claude.requests()}
    assert len(sessions) == 1
    claude.answer("fine")
    installation.tq("resume approvals")
    for task in tasks:
        done = installation.finished(task, 90)
        assert (done["status"], done["attempts"]) == ("completed", 1), done
    assert sessions < {session_of(request) for request in claude.requests()}


def test_a_busy_api_delays_the_task_alone(installation, claude, approvals):
    claude.answer("overload")
    approvals("Paint a boat.")
    began = time.time()
    installation.worker("approvals", env=claude.env | {"CLAUDE_CODE_MAX_RETRIES": "0"})
    wait_for(lambda: installation.rows("select 1 from approvals where status = 3"), 60, "the delay")
    [(attempts, due_at)] = installation.rows("select attempts, due_at from approvals")
    assert attempts == 0 and began + 30 <= due_at <= time.time() + 30
    assert not installation.rows("select 1 from task_controls where paused_at is not null")
