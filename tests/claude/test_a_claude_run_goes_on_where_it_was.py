"""With the real Claude Code: a claude task has one session, and no end of a run has its work begun
again.
"""

from __future__ import annotations

import json
import os
import signal
import uuid

import pytest
from claude_stub.client import ClaudeCode, session_of, words_of
from claude_stub.task import PROMPT, Task
from conftest import end, wait_for
from processes import children, lives

GO_ON = "Go on; what you had done stands."


def wait_for_the_first_step(claude: ClaudeCode) -> None:
    """Until it is done and in the session's file, which Claude Code writes some 0.1 s after it."""
    wait_for(lambda: len(claude.requests()) == 2, 30, "the second request")
    wait_for(
        lambda: any("tool_result" in session.read_text() for session in claude.sessions()),
        what="the step in the session's file",
    )


@pytest.fixture
def interrupted(claude):
    """A task of two steps, the first of them done, the second waiting for the API; and its run."""
    task = claude.task(permission_mode="bypassPermissions")
    claude.answer("tool", commands=["echo red >>painted"], then_hang=True)
    process = task.start()
    wait_for_the_first_step(claude)
    yield task, process
    end(process)


def kill(process) -> None:
    """Kill a handler and its Claude."""
    (program,) = children(process.pid)
    os.kill(program, signal.SIGKILL)
    process.kill()
    process.wait()
    wait_for(lambda: not lives(program), 10, "the end of claude")


def went_on(claude: ClaudeCode, task: Task) -> None:
    """Run the task again; it goes on in the same session and does nothing twice."""
    before = len(claude.requests())
    claude.answer("fine", text="The lighthouse is red.\nAll of it.")
    done = task.run()
    assert done.returncode == 0, done.stderr
    asked = claude.requests()
    result = json.loads(done.stdout)
    assert {session_of(request) for request in asked} == {result["session_id"]}
    words = words_of(asked[before])
    assert (words.count(PROMPT), words.count(GO_ON)) == (1, 1)
    assert words.index(PROMPT) < words.index(GO_ON)
    assert (claude.workspace / "painted").read_text() == "red\n"


def test_a_run_that_is_not_disturbed_prints_its_result_and_its_steps(claude):
    text = "\nThe lighthouse is red.\nAll of it."
    claude.answer("tool", commands=["echo red >painted"], text=text)
    options = {"model": "claude-sonnet-5", "append_system_prompt": "Be brief."}
    task = claude.task(permission_mode="bypassPermissions", **options)
    done = task.run()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["summary", "result", "session_id", "num_turns", "cost_usd", "seconds"]
    assert result["summary"] == "The lighthouse is red."
    assert result["result"].strip().endswith("All of it.")
    assert result["num_turns"] == 2 and result["seconds"] > 0 and result["cost_usd"] > 0
    assert uuid.UUID(result["session_id"]).version == 5
    assert "Bash: echo red >painted" in done.stderr and "> The lighthouse is red." in done.stderr
    first = claude.requests()[0]["body"]
    assert first["model"] == "claude-sonnet-5" and "Be brief." in json.dumps(first["system"])
    assert PROMPT in words_of(claude.requests()[0])
    assert not list(task.state.rglob("*.json"))


def test_the_session_follows_from_the_task_and_its_time(fake):
    for name, value in (
        ("task_id", "t-1"),
        ("enqueued_at", "2026-11-26 10:00:00.000"),
        ("task_id", "t-3"),
    ):
        task = fake.task()
        task.envelope[name] = value
        assert task.call().returncode == 0
    options = [args[-1].split("=") for args, _, _ in fake.calls()]
    assert {name for name, _ in options} == {"--session-id"}
    assert len({session for _, session in options}) == 3


def test_a_completed_task_that_is_retried_gets_its_prompt(installation, claude, claude_handler):
    data = json.dumps({"prompt": PROMPT, "workspace_path": str(claude.workspace)})
    task = installation.enqueue("approvals", "claude", data)
    for _ in range(2):
        installation.drain("approvals", env=claude.env)
        assert installation.history(task)["status"] == "completed"
        installation.tq("retry", task)
    words = words_of(claude.requests()[-1])
    assert words.count(PROMPT) == 2 and GO_ON not in words
    assert len({session_of(request) for request in claude.requests()}) == 1


def test_one_whose_end_was_not_recorded_does_not_begin_again(claude):
    """Its worker and supervisor were killed: the next attempt is the second."""
    task = claude.task()
    assert task.run().returncode == 0
    task.env["TASK_ATTEMPT"] = "2"
    assert task.run().returncode == 0
    words = words_of(claude.requests()[-1])
    assert (words.count(PROMPT), words.count(GO_ON)) == (1, 1)


@pytest.mark.parametrize("victim", ["handler", "claude"])
def test_a_run_that_was_killed_goes_on_in_its_session(claude, interrupted, victim):
    task, process = interrupted
    (program,) = children(process.pid)
    os.kill(process.pid if victim == "handler" else program, signal.SIGKILL)
    process.wait(30)
    # No second run may meet the first one's Claude in the session.
    wait_for(lambda: not lives(program), 10, "the end of claude")
    if victim == "claude":
        assert process.returncode == 1 and b"signal 9" in process.stderr.read()
    went_on(claude, task)


@pytest.mark.parametrize("whom", ["handler", "group"])
def test_a_run_that_is_stopped_has_its_session_saved(claude, interrupted, whom):
    """A worker sends TERM to the whole group; somebody at a terminal may send it to the handler
    alone.
    """
    task, process = interrupted
    (program,) = children(process.pid)
    (os.kill if whom == "handler" else os.killpg)(process.pid, signal.SIGTERM)
    assert process.wait(30) == 143
    assert not lives(program)
    told = json.loads(process.stdout.read())
    assert told["stopped"] and told["cost_usd"] > 0, "what Claude Code notes at its end"
    assert b"stopped; the session goes on" in process.stderr.read()
    (session,) = claude.sessions()
    assert '"cost-state"' in session.read_text(), "what Claude Code writes at an orderly end"
    went_on(claude, task)


def test_a_run_that_says_nothing_any_more_is_ended_and_goes_on_in_its_session(claude):
    """The API does not answer, and Claude Code prints nothing meanwhile."""
    task = claude.task(permission_mode="bypassPermissions", stall=4)
    claude.answer("tool", commands=["echo red >>painted"], then_hang=True)
    done = task.run()
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == "no sign of life for 4 s"
    went_on(claude, task)


@pytest.mark.parametrize(
    "handler_dies", [False, True], ids=["worker and supervisor", "and handler"]
)
def test_a_killed_worker_and_its_supervisor_do_not_begin_the_work_again(
    installation, claude, claude_handler, handler_dies
):
    data = {"prompt": PROMPT, "workspace_path": str(claude.workspace)}
    data["permission_mode"] = "bypassPermissions"
    task = installation.enqueue("approvals", "claude", json.dumps(data))
    claude.answer("tool", commands=["echo red >>painted"], then_hang=True)
    worker = installation.worker("approvals", env=claude.env)
    wait_for_the_first_step(claude)
    supervisors = children(worker.pid)
    (run,) = [child for supervisor in supervisors for child in children(supervisor)]
    for pid in [worker.pid, *supervisors, *([run] if handler_dies else [])]:
        os.kill(pid, signal.SIGKILL)
    # Where the handler lives on, it has the session until it has ended.
    claude.answer("fine", text="The lighthouse is red.")
    installation.worker("approvals", env=claude.env)
    done = installation.finished(task, 60)
    assert done["status"] == "completed", done
    result = json.loads(done["result"])
    assert {session_of(request) for request in claude.requests()} == {result["session_id"]}
    words = words_of(claude.requests()[-1])
    assert (words.count(PROMPT), words.count(GO_ON)) == (1, 1)
    assert (claude.workspace / "painted").read_text() == "red\n"


def test_a_kill_in_the_first_milliseconds_does_not_spoil_the_session(claude, interrupted):
    """Claude Code neither resumes nor starts a session whose file has only lines from before its
    first prompt.
    """
    task, process = interrupted
    kill(process)
    (session,) = claude.sessions()
    lines = session.read_text().splitlines(keepends=True)
    assert '"user"' not in "".join(lines[:2]) and '"type":"user"' in lines[2]
    claude.answer("fine")
    for left in (lines[0][:40], "".join(lines[:2])):
        session.write_text(left)
        done = task.run()
        assert done.returncode == 0, (left, done.stderr)
        words = words_of(claude.requests()[-1])
        assert PROMPT in words and GO_ON not in words
        assert json.loads(done.stdout)["session_id"] == session.stem


def test_a_session_that_is_there_although_its_file_was_not_found_is_resumed(claude, interrupted):
    """Claude Code says that the session is in use; the other way is tried once."""
    task, process = interrupted
    kill(process)
    claude.answer("fine")
    (session,) = claude.sessions()
    # A claude with a configuration of its own, which the handler knows nothing about.
    wrapper = claude.home / "bin/claude"
    real = wrapper.resolve()
    wrapper.unlink()
    wrapper.write_text(f'#!/bin/sh\nCLAUDE_CONFIG_DIR="{claude.home}/.claude" exec "{real}" "$@"\n')
    wrapper.chmod(0o755)
    done = task.run(claude.env | {"CLAUDE_CONFIG_DIR": str(claude.home / "elsewhere")})
    assert done.returncode == 0, done.stderr
    assert "already in use" in done.stderr and "cannot be started: resuming it" in done.stderr
    assert GO_ON in words_of(claude.requests()[-1])
    assert json.loads(done.stdout)["session_id"] == session.stem


class TestAnotherSession:
    """data.resume names a session that was there before the task."""

    @pytest.fixture
    def earlier(self, claude) -> str:
        done = claude.task(prompt="Remember the number 4711.").run()
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["session_id"]

    def test_it_gets_the_prompt(self, claude, earlier):
        task = claude.task(resume=earlier.upper(), prompt="Paint the pier.")
        task.envelope["task_id"] = "t-2"
        done = task.run()
        assert done.returncode == 0 and json.loads(done.stdout)["session_id"] == earlier
        words = words_of(claude.requests()[-1])
        assert "4711" in words and "Paint the pier." in words and GO_ON not in words
        assert not list(task.state.rglob("*.json"))

    def test_its_id_may_be_spelled_in_each_way(self, fake):
        session = str(uuid.uuid4())
        for spelled in (str, str.upper, "{{{}}}".format, "urn:uuid:{}".format):
            assert fake.task(resume=spelled(session)).call().returncode == 0
        assert {call[0][-1] for call in fake.calls()} == {f"--resume={session}"}

    def test_it_gets_the_prompt_once_however_often_the_run_is_killed(self, claude, earlier):
        task = claude.task(resume=earlier, permission_mode="bypassPermissions")
        task.envelope["task_id"] = "t-2"
        before = len(claude.requests())
        claude.answer("tool", commands=["echo red >>painted"], then_hang=True)
        process = task.start()
        wait_for(lambda: len(claude.requests()) == before + 2, 30, "the second request")
        kill(process)
        went_on(claude, task)

    def test_it_gets_the_prompt_once_where_a_retry_by_hand_goes_on_after_a_spent_budget(
        self, claude, earlier
    ):
        task = claude.task(resume=earlier, permission_mode="bypassPermissions", max_budget_usd=1e-6)
        task.envelope["task_id"] = "t-2"
        claude.answer("tool", commands=["echo red >>painted", "echo red >>painted"])
        assert task.run().returncode == 65
        del task.envelope["data"]["max_budget_usd"]
        claude.answer("fine")
        assert task.run().returncode == 0
        words = words_of(claude.requests()[-1])
        assert (words.count(PROMPT), words.count(GO_ON)) == (1, 1)
        assert not list(task.state.rglob("*.json"))

    def test_of_two_at_once_one_is_put_back_and_the_session_knows_both(self, claude, earlier):
        tasks = [claude.task(resume=earlier, prompt=f"Paint number {n}.") for n in (1, 2)]
        for number, task in enumerate(tasks):
            task.envelope["task_id"] = f"at-once-{number}"
        before = len(claude.requests())
        claude.answer("hang")
        first = tasks[0].start()
        wait_for(lambda: len(claude.requests()) > before, 30, "the first one's request")
        try:
            second = tasks[1].run()
            assert second.returncode == 75 and second.stdout.count("\n") == 1, second.stderr
            assert json.loads(second.stdout).keys() == {"retry_after", "reason"}
            # Another session has nothing to do with it; nor has the first one once it has ended.
            claude.answer("fine")
            other = claude.task()
            other.envelope["task_id"] = "other"
            assert other.run().returncode == 0
            assert first.wait(60) == 0
        finally:
            end(first)
        assert tasks[1].run().returncode == 0
        assert session_of(claude.requests()[-1]) == earlier
        words = words_of(claude.requests()[-1])
        assert words.count("Paint number 1.") == words.count("Paint number 2.") == 1

    def test_one_that_is_gone_is_a_dead_letter_and_not_started_without_context(
        self, claude, earlier
    ):
        """A kill leaves a file without a conversation."""
        (session,) = claude.sessions()
        lines = session.read_text().splitlines(keepends=True)
        before = len(claude.requests())
        for left in (None, 2):
            unknown = str(uuid.uuid4())
            if left is not None:
                text = "".join(lines[:left]).replace(earlier, unknown)
                session.with_stem(unknown).write_text(text)
            done = claude.task(resume=unknown).run()
            assert done.returncode == 65, done.stderr
            assert f"the session to resume is gone: {unknown}" in done.stderr.splitlines()[-1]
        assert len(claude.requests()) == before
