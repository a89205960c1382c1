"""With the real Claude Code: a limit, a refused login, a lack of credit and a busy API each end as
the queue wants it.
"""

from __future__ import annotations

import json
import time

import pytest
from claude_stub.client import session_of, words_of
from claude_stub.task import PROMPT

pytestmark = pytest.mark.first

GO_ON = "Go on; what you had done stands."


def told(done) -> dict:
    """The last line of what the handler printed, which must be the only one."""
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_a_usage_limit_pauses_until_it_resets_and_then_the_session_goes_on(claude):
    claude.answer("limit", seconds=7200)
    task, began = claude.task(), time.time()
    done = task.run(claude.subscription())
    assert done.returncode == 75, done.stderr
    assert told(done).keys() == {"pause", "reason"} and "limit" in told(done)["reason"]
    resets = began + 7200
    assert resets - 1 <= time.time() + told(done)["pause"]
    assert began + told(done)["pause"] <= time.time() + 7200 + 2
    assert "resets at" in done.stderr
    claude.answer("fine")
    done = task.run(claude.subscription())
    assert done.returncode == 0, done.stderr
    assert {session_of(request) for request in claude.requests()} == {told(done)["session_id"]}
    assert GO_ON in words_of(claude.requests()[-1])


def test_a_limit_that_does_not_say_when_it_resets_pauses_for_half_an_hour(claude):
    claude.answer("limit", seconds=7200)
    done = claude.task().run()
    assert (done.returncode, told(done)["pause"]) == (75, 1800)


def test_a_limit_so_short_that_claude_waits_for_it_is_no_pause(claude):
    claude.answer("limit", seconds=2, may_retry=True, unified=False)
    done = claude.task().run()
    assert done.returncode == 0, done.stderr
    assert [request["kind"] for request in claude.requests()] == ["limit", "fine"]
    why = "no answer from the API (rate_limit, status 429); Claude tries again, 1 of "
    assert why in done.stderr


@pytest.mark.parametrize("kind, reason", [("auth", "not logged in"), ("credit", "no credit")])
def test_a_refused_account_pauses_until_a_person_has_mended_it(claude, kind, reason):
    claude.answer(kind)
    done = claude.task().run(claude.env | {"CLAUDE_CODE_MAX_RETRIES": "1"})
    assert done.returncode == 75, done.stderr
    assert told(done)["pause"] is None and reason in told(done)["reason"]
    assert len(claude.requests()) <= 2


def test_so_does_a_claude_that_nobody_logged_in(claude):
    env = {name: value for name, value in claude.env.items() if name != "ANTHROPIC_API_KEY"}
    done = claude.task().run(env)
    assert done.returncode == 75 and claude.requests() == []
    assert told(done)["pause"] is None and "not logged in" in told(done)["reason"]


@pytest.mark.parametrize("kind", ["overload", "broken"])
def test_a_busy_api_and_a_broken_network_delay_the_task(claude, kind):
    claude.answer(kind)
    done = claude.task().run(claude.env | {"CLAUDE_CODE_MAX_RETRIES": "0"})
    assert (done.returncode, told(done)) == (75, {"retry_after": 30}), done.stderr


@pytest.mark.parametrize(
    "bound", [{"max_budget_usd": 0.000001}, {"args": ["--max-turns", "1"]}], ids=["budget", "turns"]
)
def test_a_spent_bound_is_a_dead_letter_that_tells_cost_and_session(claude, bound):
    claude.answer("tool", commands=["echo 1", "echo 2", "echo 3"])
    done = claude.task(permission_mode="bypassPermissions", **bound).run()
    assert done.returncode == 65 and "used up" in done.stderr.splitlines()[-1]
    (session,) = claude.sessions()
    result = told(done)
    assert result["session_id"] == session.stem and result["cost_usd"] > 0
    assert "used up" in result["summary"] and "Reached maximum" in result["result"]


def test_a_401_that_passes_pauses_nothing(claude):
    claude.answer("auth", first=1)
    done = claude.task().run()
    assert done.returncode == 0, done.stderr
    assert "authentication_failed, status 401" in done.stderr
    assert [request["kind"] for request in claude.requests()] == ["auth", "fine"]


@pytest.mark.parametrize(
    "kind, code, reason",
    [
        ("overload", 75, "the API is overloaded or cannot be reached"),
        ("auth", 75, "Claude Code is not logged in"),
        ("credit", 75, "there is no credit left"),
        ("too_long", 65, "the prompt is too long"),
    ],
)
def test_a_cause_is_the_same_during_compaction(claude, kind, code, reason):
    """Claude Code shortens a conversation that is longer than its window before it goes on."""
    commands = ["echo 1", "echo 2"]
    claude.answer("tool", commands=commands, tokens=199_500, compacting=kind, seconds=7200)
    task = claude.task(model="claude-sonnet-4-5", permission_mode="bypassPermissions")
    compacting = {"CLAUDE_CODE_AUTO_COMPACT_WINDOW": "100000", "CLAUDE_CODE_MAX_RETRIES": "0"}
    done = task.run(claude.env | compacting)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(reason)


def test_a_limit_during_compaction_pauses_until_it_resets(claude):
    claude.answer("tool", commands=["echo 1"], tokens=199_500, compacting="limit", seconds=7200)
    task = claude.task(model="claude-sonnet-4-5", permission_mode="bypassPermissions")
    began = time.time()
    done = task.run(claude.subscription() | {"CLAUDE_CODE_AUTO_COMPACT_WINDOW": "100000"})
    assert done.returncode == 75, done.stderr
    assert 7199 <= told(done)["pause"] - began + time.time() <= 7260
    # The conversation is in the session.
    claude.answer("fine")
    assert told(task.run(claude.subscription()))["session_id"] == session_of(claude.requests()[0])


@pytest.mark.parametrize(
    "kind, code, reason",
    [
        ("too_long", 65, "the prompt is too long: Prompt is too long"),
        ("no_model", 65, "no such model: There's an issue with the selected model"),
        ("refusal", 65, "Claude refuses it: API Error: "),
        ("nothing", 1, "failed: "),
    ],
)
def test_any_other_end_says_the_reason(claude, kind, code, reason):
    claude.answer(kind)
    done = claude.task().run()
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1].startswith(reason)
    assert told(done)["summary"].startswith(reason)


def test_a_client_that_does_not_start_is_a_failed_attempt_that_says_its_words(claude):
    done = claude.task(args=["--no-such-option"]).run()
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown option '--no-such-option'" in done.stderr.splitlines()[-1]
    assert claude.requests() == []


class TestDenied:
    """Claude Code says `success` where it was not allowed to do the work: the task asks."""

    def order(self, done) -> dict:
        assert done.returncode == 75, done.stderr
        return json.loads(done.stdout)

    def test_it_asks_for_just_that_and_goes_on_in_its_session(self, claude):
        (claude.workspace / "README.md").write_text("words")
        pier = {"file_path": str(claude.workspace / "pier.md"), "content": "words"}
        wanted = ["rm README.md", {"name": "Write", "input": pier}]
        claude.answer("tool", commands=wanted, text="I may not.")
        task = claude.task(allowed_tools="Read")
        order = self.order(task.run())
        assert order["hold"] == "wants: Bash(rm README.md), Write pier.md"
        rules = ["Read", "Bash(rm README.md)", f"Edit(/{claude.workspace}/pier.md)"]
        assert order["data"] == {"allowed_tools": rules} and order["cost_usd"] > 0
        task.envelope["data"] |= order["data"]
        claude.answer("tool", commands=[None, None, *wanted], text="Removed.")
        done = task.run()
        assert done.returncode == 0, done.stderr
        assert not (claude.workspace / "README.md").exists()
        assert (claude.workspace / "pier.md").read_text() == "words"
        assert len({session_of(request) for request in claude.requests()}) == 1
        words = words_of(claude.requests()[-1])
        assert words.count(PROMPT) == 1 and f"{GO_ON} A person has seen" in words

    def test_a_rule_allows_nothing_but_what_it_was_made_for(self, claude):
        """Each use is one for which the rule was made, then others that are near."""
        here = str(claude.workspace)
        write = lambda path: {"name": "Write", "input": {"file_path": path, "content": "x"}}  # noqa: E731
        made_for = ["touch one", "touch 'a, b' && touch c", "FOO=1 touch d 2>&1",
                    write(f"{here}/x y.md")]  # fmt: skip
        near = ["touch one two", "touch one && touch z", "touch one >z", "touch c", "touch d",
                "FOO=1 touch d >z", "touch 'a, b'", write(f"{here}/sub/x y.md"),
                write(f"{here}/x"), write(f"{here}/x y.mdx")]  # fmt: skip
        claude.answer("tool", commands=made_for)
        task = claude.task()
        order = self.order(task.run())
        task.envelope["data"] |= order["data"]
        claude.answer("tool", commands=[*[None] * len(made_for), *made_for, *near])
        assert self.order(task.run())["hold"].startswith("wants: Bash(touch one two), ")
        made = {path.name for path in claude.workspace.iterdir()}
        assert made == {"one", "a, b", "c", "d", "x y.md"}

    def test_what_no_rule_allows_is_not_offered_again(self, claude):
        """Claude Code allows no write into .git by a rule."""
        call = {"file_path": str(claude.workspace / ".git/config"), "content": "x"}
        claude.answer("tool", commands=[{"name": "Write", "input": call}])
        task = claude.task()
        order = self.order(task.run())
        task.envelope["data"] |= order["data"]
        claude.answer("tool", commands=[None, {"name": "Write", "input": call}])
        again = self.order(task.run())
        assert again["data"] is None
        assert again["hold"] == "wants: Write .git/config; no exact rule allows that"

    def test_the_mode_that_a_person_names_counts(self, claude):
        edit = {"file_path": str(claude.workspace / "a.md"), "content": "words"}
        claude.answer("tool", commands=[{"name": "Write", "input": edit}])
        task = claude.task()
        assert self.order(task.run())["hold"] == "wants: Write a.md"
        task.envelope["data"]["permission_mode"] = "acceptEdits"
        claude.answer("tool", commands=[None, {"name": "Write", "input": edit}])
        assert task.run().returncode == 0
        assert (claude.workspace / "a.md").read_text() == "words"

    def test_who_accepts_it_has_a_completed_task_that_names_it(self, claude):
        claude.answer("tool", commands=["git push"], text="All but the push.")
        done = claude.task(on_denied="accept").run()
        assert done.returncode == 0, done.stderr
        assert told(done)["summary"] == "(Claude was denied: Bash(git push)) All but the push."
