"""With the real Claude Code and a worker: a limit pauses the queue, costs no attempt, and all tasks
complete after it.
"""

from __future__ import annotations

import json

from claude_stub.client import session_of
from conftest import wait_for


def test_tasks_of_which_the_third_meets_the_limit_all_complete(
    installation, claude, claude_handler
):
    data = json.dumps({"prompt": "Paint a boat.", "workspace_path": str(claude.workspace)})
    tasks = [installation.enqueue("approvals", "claude", data) for _ in range(5)]
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
