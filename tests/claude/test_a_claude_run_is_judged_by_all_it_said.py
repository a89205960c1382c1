"""How a claude task ends follows from all that the run said, in whatever order: with recorded lines
of the real client that it cannot be brought to say quickly.
"""

from __future__ import annotations

import json
import sys
import time

import pytest
from claude_stub.fake import DONE, INIT, Fake
from conftest import ROOT


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


HOUR = 3600
ANSWER = {"type": "assistant", "message": {"content": [{"type": "text", "text": "I see."}]}}
FAILED = {"type": "result", "subtype": "success", "is_error": True, "terminal_reason": "api_error"}
COMPACTED = {"type": "system", "subtype": "status", "compact_result": "failed"}
BLOCKED = [
    {"type": "assistant", "error": "invalid_request", "is_api_error_message": True},
    FAILED | {"terminal_reason": "blocking_limit", "result": "Prompt is too long"},
]


def error(name: str) -> dict:
    return {"type": "assistant", "error": name, "is_api_error_message": True}


def window(kind: str, resets_in: float | None, status: str = "rejected", **more) -> dict:
    info = {"status": status, "rateLimitType": kind, **more}
    if resets_in is not None:
        info["resetsAt"] = int(time.time() + resets_in)
    return {"type": "rate_limit_event", "rate_limit_info": info}


def retry(name: str, status: int | None) -> dict:
    return {"type": "system", "subtype": "api_retry", "error": name, "error_status": status}


def run(fake, *lines, **data):
    fake.says(INIT, *lines)
    return fake.task(**data).run()


def pause_of(done) -> float:
    assert done.returncode == 75, done.stderr
    return json.loads(done.stdout)["pause"]


@pytest.mark.parametrize("last", ["error_during_execution", "success"])
def test_a_success_that_an_error_follows_is_a_success(fake, last):
    done = run(fake, DONE, error("server_error"), FAILED | {"subtype": last})
    assert done.returncode == 0 and json.loads(done.stdout)["result"] == "Done.", done.stderr


def test_of_two_successes_the_later_counts(fake):
    done = run(fake, DONE, FAILED, DONE | {"result": "All of it."})
    assert done.returncode == 0 and json.loads(done.stdout)["result"] == "All of it."


@pytest.mark.parametrize(
    "result",
    [
        {"stop_reason": "tool_use", "result": ""},
        {"stop_reason": "tool_use", "result": None},
        {"terminal_reason": "aborted_tools"},
        {"terminal_reason": "aborted_streaming"},
    ],
    ids=str,
)
def test_a_success_that_broke_off_is_a_failed_attempt(fake, result):
    done = run(fake, DONE | result)
    assert done.returncode == 1, done.stderr
    assert "stopped in the middle" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["five_hour", "seven_day"])
def test_of_two_limits_the_later_reset_counts(fake, order, kind):
    windows = [window(kind, HOUR), window("seven_day", 48 * HOUR)][::order]
    done = run(fake, *windows, error("rate_limit"), FAILED)
    assert 47.9 * HOUR < pause_of(done) <= 48 * HOUR


def test_a_limit_that_was_lifted_does_not_count(fake):
    windows = [window("five_hour", HOUR), window("seven_day", 48 * HOUR)]
    lifted = window("seven_day", 48 * HOUR, status="allowed_warning")
    done = run(fake, *windows, lifted, error("rate_limit"), FAILED)
    assert 0.9 * HOUR < pause_of(done) <= HOUR
    over = window("five_hour", HOUR, isUsingOverage=True)
    assert run(fake, over, FAILED | {"result": "it went wrong"}).returncode == 1


@pytest.mark.parametrize(
    "lines",
    [
        [window("five_hour", HOUR), *BLOCKED],
        [window("five_hour", HOUR), COMPACTED | {"compact_error": "You have hit"}, *BLOCKED],
        [window("five_hour", HOUR), error("unknown"), FAILED],
        [window("five_hour", HOUR)],
    ],
)
def test_a_limit_is_one_whatever_the_last_line_says(fake, lines):
    assert 0.9 * HOUR < pause_of(run(fake, *lines)) <= HOUR


@pytest.mark.parametrize(
    "lines",
    [
        [FAILED | {"api_error_status": 429}],
        [error("unknown"), FAILED | {"api_error_status": 429}],
        [COMPACTED | {"compact_error": "API Error: Request rejected (429) \u00b7 …"}, *BLOCKED],
    ],
)
def test_a_status_429_is_a_limit(fake, lines):
    assert pause_of(run(fake, *lines)) == 1800


@pytest.mark.parametrize(
    "lines",
    [
        [FAILED | {"api_error_status": 529}],
        [error("unknown"), FAILED | {"api_error_status": 503}],
        [COMPACTED | {"compact_error": "API Error: 529 Overloaded. This is …"}, *BLOCKED],
        [COMPACTED | {"compact_error": "API Error: Connection dropped (ECONNRESET)."}, *BLOCKED],
        [retry("server_error", None)],
    ],
)
def test_a_busy_api_is_one_wherever_it_is_met(fake, lines):
    done = run(fake, ANSWER, *lines)
    assert (done.returncode, json.loads(done.stdout)) == (75, {"retry_after": 30}), done.stderr


@pytest.mark.parametrize(
    "line, reason",
    [
        (FAILED | {"api_error_status": 413}, "the prompt is too long"),
        (FAILED | {"api_error_status": 404}, "no such model"),
        (FAILED | {"stop_reason": "refusal"}, "Claude refuses it"),
        (DONE | {"stop_reason": "refusal"}, "Claude refuses it"),
    ],
)
def test_what_no_retry_helps_is_a_dead_letter(fake, line, reason):
    done = run(fake, error("unknown"), line)
    assert done.returncode == 65 and reason in done.stderr.splitlines()[-1], done.stderr


def test_a_session_that_is_gone_is_one_where_only_stderr_says_so(fake):
    fake.says(errors=b"No conversation found with session ID: 0d6e2f0a\n")
    done = fake.task(resume="0d6e2f0a-5a0a-4c56-9a8e-6f7a3a4b5c6d").run()
    assert done.returncode == 65 and len(fake.calls()) == 1, done.stderr


def test_a_compaction_that_fails_otherwise_is_a_failed_attempt(fake):
    done = run(fake, COMPACTED | {"compact_error": "a new kind of trouble"}, *BLOCKED)
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize("answered", [True, False])
def test_a_refused_login_counts_where_the_run_ends_so(fake, answered):
    lines = [retry("authentication_failed", 401), ANSWER if answered else error("unknown")]
    done = run(fake, *lines, FAILED | {"api_error_status": None if answered else 401})
    assert done.returncode == (1 if answered else 75), done.stderr


def test_a_limit_that_goes_on_after_its_reset_is_asked_ever_less(fake):
    fake.says(INIT, window("five_hour", -60), error("rate_limit"), FAILED)
    task = fake.task()
    assert [pause_of(task.run()) for _ in range(4)] == [30, 60, 120, 240]
    # One that resets again and again, a moment from now.
    soon = []
    for _ in range(4):
        fake.says(INIT, window("five_hour", 3), error("rate_limit"), FAILED)
        soon.append(pause_of(task.run()))
    assert soon == [80, 160, 320, 640]
    fake.says(INIT, ANSWER, window("five_hour", -60), error("rate_limit"), FAILED)
    assert pause_of(task.run()) == 30


def test_a_denial_is_told_whatever_its_tool_and_input(fake):
    denials = [
        {"tool_name": "Bash", "tool_input": {"command": "ls *"}},
        {"tool_name": "Bash", "tool_input": {"command": "a\nb"}},
        {"tool_name": "Edit", "tool_input": {"file_path": "/x/README.md"}},
        {"tool_name": "mcp__bank__pay", "tool_input": {"sum": 5}},
        {"tool_name": "WebFetch", "tool_input": None},
        "nonsense",
    ]
    done = run(fake, DONE | {"permission_denials": denials}, allowed_tools="Read")
    assert done.returncode == 65
    error = done.stderr.splitlines()[-1]
    assert error == (
        "Claude was denied: Bash ls *, Bash a b, 3 more; "
        "to allow it: permission_mode and allowed_tools"
    )
    assert json.loads(done.stdout)["summary"] == error
    # Rules are exact, or none is: no wildcard, no second line.
    assert json.loads(done.stdout)["to_allow"] == {
        "permission_mode": "acceptEdits",
        "allowed_tools": ["Read", "Bash", "mcp__bank__pay", "WebFetch"],
    }


def test_an_error_names_the_option_however_long_the_command(fake):
    denials = [
        {"tool_name": "Bash", "tool_input": {"command": f"echo {n} " + "x" * 300}} for n in range(9)
    ]
    error = run(fake, DONE | {"permission_denials": denials}).stderr.splitlines()[-1]
    assert len(error) <= 200 and error.endswith("; to allow it: allowed_tools")


class TestThroughAWorker:
    @pytest.fixture
    def drain(self, installation, fake):
        handler = f"#!/bin/sh\nexec {sys.executable} {ROOT}/handlers/claude\n"
        installation.handler("claude", handler)

        def drain(queue: str) -> None:
            done = installation.run("worker.py", queue, "--drain", "--handlers",
                                    installation.handlers, env={"PATH": fake.env["PATH"]})  # fmt: skip
            assert done.returncode == 0, done.stderr

        return drain

    def test_a_denial_is_the_error_of_the_task_and_its_cost_is_recorded(
        self, installation, fake, drain
    ):
        denial = {"tool_name": "Bash", "tool_input": {"command": "git push"}}
        fake.says(INIT, DONE | {"permission_denials": [denial]})
        task = installation.enqueue("approvals", "claude", '{"prompt": "Do it."}')
        drain("approvals")
        ended = installation.history(task)
        assert (ended["status"], ended["attempts"]) == ("failed", 1)
        assert (
            'denied: Bash git push; to allow it: "allowed_tools": ["Bash(git push)"]'
            in (ended["error"])
        )
        assert json.loads(ended["result"])["cost_usd"] == 0.5

    def test_a_task_that_is_moved_keeps_its_session(self, installation, fake, drain):
        fake.says(INIT, error("overloaded"), FAILED)
        task = installation.enqueue("approvals", "claude", '{"prompt": "Do it."}')
        drain("approvals")
        assert not installation.history(task)
        moved = installation.run("tasks.py", "move", task, "notifications")
        assert moved.returncode == 0, moved.stderr
        fake.says(INIT, DONE)
        installation.sqlite3("update notifications set status = 1, due_at = null")
        drain("notifications")
        left = installation.rows("select task_id, status, due_at from notifications")
        assert not left and installation.history(task)["status"] == "completed"
        assert len(fake.calls()) == 2
        sessions = {call[0][-1].partition("=")[2] for call in fake.calls()}
        assert len(sessions) == 1
