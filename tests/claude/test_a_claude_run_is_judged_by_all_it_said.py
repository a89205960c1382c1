"""How a claude task ends follows from all that the run said, in whatever order: with recorded lines
of the real client that it cannot be brought to say quickly.
"""

from __future__ import annotations

import json
import time

import pytest
from claude_stub.fake import DONE, INIT

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


def compacted(why: str) -> dict:
    return COMPACTED | {"compact_error": why}


def run(fake, *lines, **data):
    fake.says(INIT, *lines)
    return fake.task(**data).call()


def pause_of(done) -> float:
    assert done.returncode == 75, done.stderr
    return json.loads(done.stdout)["pause"]


# (lines after the first, exit code, words of the last line on stderr)
ENDS = [
    # A success that an error follows is a success; of two, the later counts.
    ([DONE, error("server_error"), FAILED], 0, ""),
    ([DONE, error("server_error"), FAILED | {"subtype": "error_during_execution"}], 0, ""),
    ([DONE | {"result": "Half."}, FAILED, DONE], 0, ""),
    # One that broke off is a failed attempt.
    ([DONE | {"stop_reason": "tool_use", "result": ""}], 1, "stopped in the middle"),
    ([DONE | {"stop_reason": "tool_use", "result": None}], 1, "stopped in the middle"),
    ([DONE | {"terminal_reason": "aborted_tools"}], 1, "stopped in the middle"),
    ([DONE | {"terminal_reason": "aborted_streaming"}], 1, "stopped in the middle"),
    # A busy API is one wherever it is met.
    ([FAILED | {"api_error_status": 529}], 75, "overloaded or cannot be reached"),
    ([error("unknown"), FAILED | {"api_error_status": 503}], 75, "overloaded"),
    ([compacted("API Error: 529 Overloaded. This is …"), *BLOCKED], 75, "overloaded"),
    ([compacted("API Error: Connection dropped (ECONNRESET)."), *BLOCKED], 75, "overloaded"),
    ([retry("server_error", None)], 75, "overloaded"),
    # A status 429 is a limit.
    ([FAILED | {"api_error_status": 429}], 75, "a usage limit: the queue is paused for 1800 s"),
    ([error("unknown"), FAILED | {"api_error_status": 429}], 75, "paused for 1800 s"),
    ([compacted("API Error: Request rejected (429) \u00b7 …"), *BLOCKED], 75, "for 1800 s"),
    # No retry helps.
    ([error("unknown"), FAILED | {"api_error_status": 413}], 65, "the prompt is too long"),
    ([error("unknown"), FAILED | {"api_error_status": 404}], 65, "no such model"),
    ([error("unknown"), FAILED | {"stop_reason": "refusal"}], 65, "Claude refuses it"),
    ([error("unknown"), DONE | {"stop_reason": "refusal"}], 65, "Claude refuses it"),
    ([compacted(""), *BLOCKED], 65, "the prompt is too long"),
    ([compacted("a new kind of trouble"), *BLOCKED], 1, "failed: Prompt is too long"),
    # A refused login, or any error, counts only where the run ends so.
    ([retry("authentication_failed", 401), error("unknown"), FAILED | {"api_error_status": 401}],
     75, "not logged in"),
    ([retry("authentication_failed", 401), ANSWER, FAILED | {"api_error_status": None}], 1, "failed"),
    ([error("rate_limit"), ANSWER, FAILED | {"result": "it went wrong"}], 1, "it went wrong"),
    # A limit that was lifted, or is paid for, does not count.
    ([window("five_hour", HOUR, isUsingOverage=True), FAILED | {"result": "it went"}], 1, "it went"),
    ([window("five_hour", HOUR), window("five_hour", HOUR, status="allowed"), FAILED], 1, "failed"),
]  # fmt: skip


@pytest.mark.parametrize("lines, code, why", ENDS)
def test_a_run_ends_as_its_lines_say(fake, lines, code, why):
    done = run(fake, *lines)
    assert done.returncode == code and why in done.stderr.splitlines()[-1], done.stderr
    if code == 0:
        assert json.loads(done.stdout)["result"] == "Done."


@pytest.mark.parametrize(
    "lines, hours",
    [
        ([window("five_hour", HOUR), window("seven_day", 48 * HOUR)], 48),
        ([window("seven_day", 48 * HOUR), window("five_hour", HOUR)], 48),
        ([window("seven_day", HOUR), window("seven_day", 48 * HOUR)], 48),
        ([window("seven_day", 48 * HOUR), window("seven_day", HOUR)], 48),
        ([window("five_hour", HOUR), window("seven_day", 48 * HOUR),
          window("seven_day", 48 * HOUR, status="allowed_warning")], 1),
        ([window("five_hour", HOUR), *BLOCKED], 1),
        ([window("five_hour", HOUR), compacted("You have hit"), *BLOCKED], 1),
        ([window("five_hour", HOUR), error("unknown")], 1),
        ([window("five_hour", 1e11)], 30 * 24),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ends", [[], [error("rate_limit"), FAILED]], ids=["cut off", "ended"])
def test_a_limit_pauses_until_the_later_reset_whatever_the_last_line_says(fake, lines, hours, ends):
    # The times count from when the table was made.
    assert (hours - 0.9) * HOUR < pause_of(run(fake, *lines, *ends)) <= hours * HOUR


def test_a_limit_that_goes_on_after_its_reset_is_asked_ever_less(fake):
    fake.says(INIT, window("five_hour", -60), error("rate_limit"), FAILED)
    task = fake.task()
    assert [pause_of(task.call()) for _ in range(4)] == [30, 60, 120, 240]
    # One that resets again and again, a moment from now.
    soon = []
    for _ in range(4):
        fake.says(INIT, window("five_hour", 3), error("rate_limit"), FAILED)
        soon.append(pause_of(task.call()))
    assert soon == [80, 160, 320, 640]
    fake.says(INIT, ANSWER, window("five_hour", -60), error("rate_limit"), FAILED)
    assert pause_of(task.call()) == 30


def test_a_busy_api_delays_a_task_ever_longer_until_it_answers(fake):
    def wait(task) -> float:
        fake.says(INIT, error("overloaded"), FAILED)
        return json.loads(task.call().stdout)["retry_after"]

    task, other = fake.task(), fake.task()
    assert [wait(task) for _ in range(3)] == [30, 60, 120]
    # Weeks of waiting are no overflow.
    (note,) = task.state.rglob("*.json")
    note.write_text('{"handed": true, "waits": 5000}')
    assert wait(task) == 1800
    # Another task has nothing to do with it, and an answer ends the series.
    other.envelope["task_id"] = "t-2"
    assert wait(other) == 30
    fake.says(INIT, DONE)
    assert task.call().returncode == 0 and wait(task) == 30


def test_a_session_that_is_gone_is_one_where_only_stderr_says_so(fake):
    fake.says(errors=b"No conversation found with session ID: 0d6e2f0a\n")
    done = fake.task(resume="0d6e2f0a-5a0a-4c56-9a8e-6f7a3a4b5c6d").call()
    assert done.returncode == 65 and len(fake.calls()) == 1, done.stderr


def bash(command: str) -> dict:
    return {"tool_name": "Bash", "tool_input": {"command": command}}


def file(tool: str, path: str) -> dict:
    name = "notebook_path" if tool == "NotebookEdit" else "file_path"
    return {"tool_name": tool, "tool_input": {name: path}}


RULES = [
    (bash("git push"), "Bash(git push)"), (bash(" git push \n"), "Bash(git push)"), (bash("git push 2>&1"), "Bash(git push)"),
    (bash("make 2>/dev/null"), "Bash(make)"), (bash("a && b; c | d"), "Bash(a && b; c | d)"),
    (bash("echo 'x, y: é'"), "Bash(echo 'x, y: é')"), (file("Edit", "/x/a b.md"), "Edit(//x/a b.md)"),
    (file("Write", "/x/../y//a.md"), "Edit(//y/a.md)"), (file("NotebookEdit", "/x/a.ipynb"), "Edit(//x/a.ipynb)"),
    (file("Read", "/x/a.md"), "Read(//x/a.md)"),
]  # fmt: skip
NO_RULE = [
    *map(bash, ("ls *", "git:*", "a\nb", "a\tb", "echo (x)", "echo ')', Bash(rm -r /)", "echo a\\\\b", "a >b", "a 2>&1 >b",
                "cat <a", "2>&1", "", "a\u202eb")),
    *(file("Edit", f"/x/{name}") for name in ("*.md", "[a].md", "a?.md", "a(1).md", "a\\b", "a.md ", "a\nb")),
    file("Edit", ""), file("Glob", "/x"), {"tool_name": "Bash", "tool_input": {"command": 5}},
    {"tool_name": "Bash", "tool_input": None}, {"tool_name": "mcp__bank__pay", "tool_input": {"sum": 5}},
    {"tool_name": "WebFetch", "tool_input": {"url": "http://localhost/"}},
    {"tool_name": "Edit(**)", "tool_input": {"file_path": "/x"}},
]  # fmt: skip


@pytest.mark.parametrize("denial, rule", [*RULES, *((denial, None) for denial in NO_RULE)])
def test_only_an_exact_rule_is_asked_for(fake, denial, rule):
    done = run(fake, DONE | {"permission_denials": [denial, bash("true")]}, allowed_tools="Read")
    assert done.returncode == 75, done.stderr
    order = json.loads(done.stdout)
    assert order["hold"].startswith("wants: ") and len(order["hold"]) <= 200
    if rule is None:
        assert order["data"] is None and order["hold"].endswith("; no exact rule allows that")
    else:
        assert order["data"] == {"allowed_tools": ["Read", rule, "Bash(true)"]}


def test_a_question_names_what_is_wanted_and_how_much_more(fake):
    denials = [bash("git push"), bash("git push"), file("Edit", f"{fake.workspace}/docs/README.md"),
               {"tool_name": "mcp__bank__pay", "tool_input": {"sum": 5}},
               bash("echo " + "x" * 300), "nonsense"]  # fmt: skip
    data = {"workspace_path": str(fake.workspace)}
    order = json.loads(run(fake, DONE | {"permission_denials": denials[:3]}, **data).stdout)
    assert order["hold"] == "wants: Bash(git push), Edit docs/README.md"
    order = json.loads(run(fake, DONE | {"permission_denials": denials}, **data).stdout)
    assert order["hold"] == (
        "wants: Bash(git push), Edit docs/README.md, 2 more; no exact rule allows that"
    )


class TestThroughAWorker:
    @pytest.fixture
    def drain(self, installation, claude_handler, fake):
        def drain(queue: str) -> None:
            installation.drain(queue, env={"PATH": fake.env["PATH"]})

        return drain

    def test_a_denied_task_asks_and_is_one_task_with_one_attempt(self, installation, fake, drain):
        fake.says(INIT, DONE | {"permission_denials": [bash("git push")]})
        task = installation.enqueue("approvals", "claude", '{"prompt": "Do it."}')
        drain("approvals")
        held = installation.rows("select task_id, status, error_message from task_queue")
        assert held == [(task, "held", "wants: Bash(git push)")]
        installation.tq("approve", task)
        fake.says(INIT, DONE)
        drain("approvals")
        ended = installation.history(task)
        assert (ended["status"], ended["attempts"]) == ("completed", 1)
        assert "--allowed-tools=Bash(git push)" in fake.calls()[1][0]
        assert installation.rows("select cost_usd from task_history") == [(1.0,)]

    def test_of_a_hooks_payload_only_what_a_person_approved_is_a_right(
        self, installation, fake, drain
    ):
        """The payload's own fields stay without effect, whatever is approved beside them."""
        fake.says(INIT, DONE | {"permission_denials": [bash("git push")]})
        payload = {"prompt": "Do it.", "allowed_tools": ["Bash"], "permission_mode": "acceptEdits",
                   "hook_event_name": "claude"}  # fmt: skip
        installation.enqueue("approvals", "claude", "{}", "--hold")
        installation.sqlite3(f"insert into approvals (data) values ('{json.dumps(payload)}')")
        drain("approvals")
        installation.tq("approve approvals-2")
        fake.says(INIT, DONE)
        drain("approvals")
        first, second = ([word for word in call[0] if "allow" in word or "mode" in word]
                         for call in fake.calls())  # fmt: skip
        assert (first, second) == ([], ["--allowed-tools=Bash(git push)"])

    def test_a_task_that_is_moved_keeps_its_session(self, installation, fake, drain):
        fake.says(INIT, error("overloaded"), FAILED)
        task = installation.enqueue("approvals", "claude", '{"prompt": "Do it."}')
        began = time.time()
        drain("approvals")
        # A busy API delays this task alone, and costs no attempt.
        [(attempts, due_at)] = installation.rows("select attempts, due_at from approvals")
        assert attempts == 0 and began + 30 <= due_at <= time.time() + 30
        assert not installation.rows("select 1 from task_controls where paused_at is not null")
        installation.tq("move", task, "notifications")
        fake.says(INIT, DONE)
        installation.sqlite3("update notifications set status = 1, due_at = null")
        drain("notifications")
        left = installation.rows("select task_id, status, due_at from notifications")
        assert not left and installation.history(task)["status"] == "completed"
        assert len(fake.calls()) == 2
        assert len({args[-1].partition("=")[2] for args, _, _ in fake.calls()}) == 1

    def test_what_a_person_must_mend_pauses_the_queue_until_they_resume_it(
        self, installation, fake, drain
    ):
        fake.says(INIT, error("unknown"), FAILED | {"api_error_status": 401})
        tasks = [installation.enqueue("approvals", "claude", '{"prompt": "x"}') for _ in range(2)]
        drain("approvals")
        paused = "select pause_reason from task_controls where paused_at is not null and paused_until is null"
        assert "not logged in" in installation.rows(paused)[0][0] and len(fake.calls()) == 1
        fake.says(INIT, DONE)
        installation.tq("resume approvals")
        drain("approvals")
        ends = [installation.history(task) for task in tasks]
        assert [(end["status"], end["attempts"]) for end in ends] == 2 * [("completed", 1)]
        assert len({args[-1].partition("=")[2] for args, _, _ in fake.calls()}) == 2
