"""With the real Claude Code: a limit, a refused login, a lack of credit and a busy API each end as
the queue wants it.
"""

from __future__ import annotations

import json
import time

import pytest
from claude_stub.client import ClaudeCode, session_of, words_of


@pytest.fixture
def claude(tmp_path):
    made = ClaudeCode(tmp_path)
    yield made
    made.close()


def told(done) -> dict:
    """The last line of what the handler printed, which must be the only one."""
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_a_usage_limit_pauses_until_it_resets(claude):
    claude.answer("limit", seconds=7200)
    began = time.time()
    done = claude.task().run(claude.subscription())
    assert done.returncode == 75, done.stderr
    assert told(done).keys() == {"pause", "reason"} and "limit" in told(done)["reason"]
    assert (
        began + 7200 - 1 <= time.time() + told(done)["pause"]
        and began + told(done)["pause"] <= time.time() + 7200 + 2
    )
    assert "resets at" in done.stderr


def test_after_the_limit_the_same_session_goes_on(claude):
    claude.answer("limit", seconds=3)
    task = claude.task()
    limited = task.run(claude.subscription())
    assert limited.returncode == 75
    time.sleep(told(limited)["pause"])
    done = task.run(claude.subscription())
    assert done.returncode == 0, done.stderr
    assert {session_of(request) for request in claude.requests()} == {told(done)["session_id"]}
    assert "Go on; what you had done stands." in words_of(claude.requests()[-1])


def test_a_limit_that_does_not_say_when_it_resets_pauses_for_half_an_hour(claude):
    claude.answer("limit", seconds=7200)
    done = claude.task().run()
    assert (done.returncode, told(done)["pause"]) == (75, 1800)


def test_a_limit_so_short_that_claude_waits_for_it_is_no_pause(claude):
    claude.answer("limit", seconds=2, may_retry=True, unified=False)
    done = claude.task().run()
    assert done.returncode == 0, done.stderr
    assert [request["kind"] for request in claude.requests()] == ["limit", "fine"]
    assert (
        "no answer from the API (rate_limit, status 429); Claude tries again, 1 of " in done.stderr
    )


@pytest.mark.parametrize("kind, reason", [("auth", "not logged in"), ("credit", "no credit")])
def test_what_only_a_person_can_mend_pauses_without_end_at_the_first_sign(claude, kind, reason):
    """Claude Code by itself would try again for minutes after a 401, and say nothing."""
    claude.answer(kind)
    done = claude.task().run(timeout=60)
    assert done.returncode == 75, done.stderr
    assert told(done)["pause"] is None and reason in told(done)["reason"]
    assert len(claude.requests()) <= 2
    # Once it is mended, the same session goes on.
    claude.answer("fine")
    done = claude.task().run()
    assert done.returncode == 0 and {session_of(request) for request in claude.requests()} == {
        told(done)["session_id"]
    }


def test_nobody_logged_in_is_the_same(claude):
    env = {name: value for name, value in claude.env.items() if name != "ANTHROPIC_API_KEY"}
    done = claude.task().run(env)
    assert (
        done.returncode == 75
        and told(done)["pause"] is None
        and "not logged in" in told(done)["reason"]
    )
    assert claude.requests() == []


@pytest.mark.parametrize("kind", ["overload", "broken"])
def test_a_busy_api_and_a_broken_network_delay_the_task_ever_longer(claude, kind):
    claude.answer(kind)
    task, env = claude.task(), claude.env | {"CLAUDE_CODE_MAX_RETRIES": "0"}
    waits = []
    for _ in range(3):
        done = task.run(env)
        assert done.returncode == 75, done.stderr
        assert told(done).keys() == {"retry_after"}
        waits.append(told(done)["retry_after"])
    assert waits == [30, 60, 120]
    # Another task has nothing to do with it, and an answer ends the series.
    other = claude.task()
    other.envelope["task_id"] = "t-2"
    assert told(other.run(env))["retry_after"] == 30
    claude.answer("fine")
    assert task.run(env).returncode == 0
    claude.answer(kind)
    assert told(task.run(env))["retry_after"] == 30


def test_a_spent_budget_is_a_dead_letter_and_not_spent_again(claude):
    claude.answer("tool", commands=["echo 1", "echo 2", "echo 3"])
    done = claude.task(permission_mode="bypassPermissions", max_budget_usd=0.000001).run()
    assert (done.returncode, done.stdout) == (65, "") and "used up" in done.stderr.splitlines()[-1]


def test_any_other_end_is_a_failed_attempt_that_says_what_claude_said(claude):
    done = claude.task(args=["--no-such-option"]).run()
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown option '--no-such-option'" in done.stderr.splitlines()[-1]
    assert claude.requests() == []
