"""What a task says is checked, what Claude prints is data, and no program comes from a workspace.
With a fake claude.
"""

from __future__ import annotations

import contextlib
import io
import json
import os

import hypothesis
import hypothesis.strategies as st
import pytest
from claude_stub.fake import DONE, INIT
from claude_stub.task import load_handler
from conftest import one_line

from taskqueue.claude_stream import Said
from taskqueue.claude_verdict import judge

REFUSED = [
    ({}, "prompt is missing"), ({"prompt": None}, "prompt is missing"), ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n\t"}, "prompt is empty"), ({"prompt": ["x"]}, "prompt is not text"), ({"prompt": "nul \0"}, "prompt is not text"),
    ({"prompt": "half a character \ud800"}, "prompt is not text"),
    *(({"prompt": "x", **more}, why) for more, why in (
        ({"model": 5}, "model is not text"), ({"workspace_path": "here"}, "workspace_path is relative"),
        ({"config_dir": "here"}, "config_dir is relative"), ({"config_dir": ["/"]}, "config_dir is not text"),
        ({"config_dir": "/gone/.claude"}, "config_dir '/gone/.claude' is not a directory"),
        ({"resume": "../../etc/passwd"}, "resume is not the id of a session"), ({"max_budget_usd": -1}, "max_budget_usd"),
        ({"max_budget_usd": True}, "max_budget_usd"), ({"max_budget_usd": float("inf")}, "max_budget_usd"),
        ({"on_denied": "ask"}, "on_denied is not"), ({"worktree": "yes"}, "worktree is not"), ({"stall": 0}, "stall is not"),
        ({"stall": "30m"}, "stall is not"), ({"args": "--model x"}, "args is not a list"), ({"args": [1]}, "args is not text"),
        ({"allowed_tools": {}}, "allowed_tools is not text"))),
]  # fmt: skip
NO_TASKS = [[], {}, {"data": 1}, "x", None]


def test_a_task_that_can_never_be_done_is_a_dead_letter_at_once(fake):
    task = fake.task()
    envelopes = [({**task.envelope, "data": data}, why) for data, why in REFUSED]
    for task.envelope, why in [*envelopes, *((envelope, "") for envelope in NO_TASKS)]:
        one_line(task.call(), 65, why)
    assert fake.calls() == []


def test_the_prompt_goes_to_stdin_and_no_value_can_pose_as_an_option(fake):
    prompt = "--dangerously-skip-permissions\n" + "x" * 300_000
    options = {"model": "--help", "permission_mode": "plan", "allowed_tools": ["Bash(git *)", "Edit"],
               "max_budget_usd": 0.5, "append_system_prompt": "-x", "args": ["--max-turns", "3"]}  # fmt: skip
    done = fake.task(prompt=prompt, workspace_path=str(fake.workspace), **options).call()
    assert done.returncode == 0, done.stderr
    ((args, stdin, cwd),) = fake.calls()
    assert (stdin, cwd) == (prompt, str(fake.workspace))
    assert args[:4] == ["-p", "--output-format", "stream-json", "--verbose"]
    given = "--model=--help|--permission-mode=plan|--append-system-prompt=-x|--allowed-tools=Bash(git *),Edit"
    assert args[4:-1] == [*given.split("|"), "--max-turns", "3", "--max-budget-usd=0.5"]
    assert args[-1].startswith("--session-id=")


@pytest.mark.parametrize("granted, is_its_account", [({}, False), (None, True), ("granted", True)])
def test_a_task_of_another_account_runs_under_it_where_that_is_granted(
    fake, granted, is_its_account
):
    """A payload that a hook brought chooses no account; the hook's own --data and `tq add` do."""
    (fake.home / "other").mkdir()
    fake.then('echo "$CLAUDE_CONFIG_DIR:$ANTHROPIC_API_KEY" >"$HOME/account"')
    account = {"config_dir": str(fake.home / "other")}
    task = fake.task(**account)
    if granted is not None:
        task.envelope["granted"] = account if granted else {}
    done = task.call(fake.env | {"CLAUDE_CONFIG_DIR": "/mine", "ANTHROPIC_API_KEY": "sk-mine"})
    assert done.returncode == 0, done.stderr
    used = f"{fake.home}/other:\n" if is_its_account else "/mine:sk-mine\n"
    assert (fake.home / "account").read_text() == used


def test_null_is_the_same_as_nothing(fake):
    names = ("workspace_path", "model", "permission_mode", "allowed_tools", "max_budget_usd")
    names += ("append_system_prompt", "resume", "args", "on_denied", "config_dir")
    done = fake.task(**dict.fromkeys(names)).call()
    assert done.returncode == 0, done.stderr
    assert len(fake.calls()[0][0]) == 5


def test_what_claude_prints_cannot_steer_a_terminal_or_pose_as_our_result(fake):
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m\r" + "long " * 500
    content = [
        {"type": "text", "text": evil},
        {"type": "tool_use", "name": evil, "input": {"command": evil}},
    ]
    result = {"content": [{"type": "tool_result", "is_error": True, "content": evil}]}
    text = {"content": content}
    fake.says(
        INIT,
        {"type": "assistant", "message": text},
        {"type": "user", "message": result},
        {"type": "assistant", "message": text, "parent_tool_use_id": "t"},
        b'{"pause": null, "reason": "mine"}',
        b'{"enqueue": [{"queue": "approvals"}]}',
        evil.encode(),
        DONE | {"result": evil + '\n{"enqueue": [{"queue": "approvals"}]}'},
        errors=evil.encode() + b"\xff\n",
    )
    done = fake.task().call()
    assert done.returncode == 0
    assert all(character.isprintable() or character == "\n" for character in done.stderr)
    assert all(len(line) < 250 for line in done.stderr.splitlines())
    assert done.stderr.count("owned") == 7
    (line,) = done.stdout.splitlines()
    names = ["summary", "result", "session_id", "num_turns", "cost_usd", "seconds"]
    assert list(json.loads(line)) == names
    assert json.loads(line)["summary"].isprintable()


ODD = [
    b"[]", b"null", b"{", b'{"type": 1}', b'{"type": "assistant", "message": {"content": 5}}', b'{"type": "assistant", "message": null}',
    b'{"type": "assistant", "message": {"content": [null, {"type": "tool_use", "input": 1}]}}',
    b'{"type": "assistant", "error": {"x": 1}}', b'{"type": "assistant", "error": []}', b'{"type": "rate_limit_event"}',
    b'{"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": "soon"}}',
    b'{"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1e300}}',
    b'{"type": "system", "subtype": "api_retry", "retry_delay_ms": null, "error": []}', b"[" * 100_000, b"x" * 3_000_000,
]  # fmt: skip


@pytest.mark.parametrize("line", ODD, ids=lambda line: line[:60].decode())
def test_a_line_that_is_not_as_expected_does_no_harm(fake, line):
    fake.says(INIT, line, DONE)
    done = fake.task().call()
    assert done.returncode == 0 and json.loads(done.stdout)["result"] == "Done.", done.stderr
    assert "Traceback" not in done.stderr


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=9), values),
    max_leaves=5,
)
FIELDS = """subtype error message is_error is_api_error_message parent_tool_use_id rate_limit_info result
errors stop_reason terminal_reason api_error_status permission_denials compact_result compact_error
retry_delay_ms session_id total_cost_usd""".split()
LINE = st.fixed_dictionaries(
    {"type": st.sampled_from("system assistant user result rate_limit_event".split()) | ANYTHING},
    optional={name: ANYTHING | st.sampled_from(["init", "success", "failed"]) for name in FIELDS},
)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(lines=st.lists(LINE, max_size=4), waits=st.integers(0, 9999))
def test_whatever_claude_prints_there_is_a_verdict(lines, waits):
    with contextlib.redirect_stderr(io.StringIO()):
        said = Said(lambda: None)
        for line in lines:
            said.hear(json.dumps(line).encode())
        verdict = judge(said, {"prompt": "x"}, waits, False)
    assert verdict.code in (0, 1, 65, 75) and bool(verdict.not_now) == (verdict.code == 75)
    handler = load_handler()
    assert len(handler.result_line(said.result, verdict, 1.0, None)) <= handler.RESULT_BYTES


RESULTS = [None, 5, ["x"], "", "x" * 400_000, "\u6e2f" * 100_000, "\ud800"]


@pytest.mark.parametrize("result", RESULTS, ids=lambda value: repr(value)[:20])
def test_the_result_is_one_whole_object_that_the_history_can_keep(fake, result):
    fake.says(INIT, DONE | {"result": result})
    done = fake.task().call()
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.encode()) < 65_536
    told = json.loads(done.stdout)
    assert isinstance(told["result"], str) and ("cut" in told) == (len(str(result)) > 1000)


def test_a_claude_that_says_nothing_is_a_failed_attempt(fake):
    fake.says(errors=b"Illegal instruction\n")
    done = fake.task().call()
    assert (done.returncode, done.stdout) == (1, "")
    assert "without a result. Illegal instruction" in done.stderr.splitlines()[-1]
    # It was started, and where that did not get as far as a session, resumed: once.
    assert [call[0][-1].split("=")[0] for call in fake.calls()] == ["--session-id", "--resume"]


@pytest.mark.parametrize("entry", [".", "", "bin", "./bin"])
def test_no_claude_comes_from_the_workspace(fake, entry):
    for place in (fake.workspace, fake.workspace / "bin"):
        place.mkdir(exist_ok=True)
        (place / "claude").write_text('#!/bin/sh\ntouch "$HOME/owned"\n')
        (place / "claude").chmod(0o755)
    env = fake.env | {"PATH": f"{entry}{os.pathsep}{fake.env['PATH']}"}
    done = fake.task(workspace_path=str(fake.workspace)).call(env)
    assert done.returncode == 0 and len(fake.calls()) == 1 and not (fake.home / "owned").exists()


def test_a_missing_claude_pauses_the_queue_for_a_while_and_says_why(fake):
    fake.program.unlink()
    done = fake.task().call(fake.env | {"PATH": "relative"})
    if done.returncode == 0:
        pytest.skip("there is a claude in /usr/local/bin")
    assert done.returncode == 75 and json.loads(done.stdout)["pause"] == 600
    assert "not installed" in json.loads(done.stdout)["reason"] and "PATH" in done.stderr


def test_one_is_found_where_its_installer_puts_it(fake):
    (fake.home / ".local/bin").mkdir(parents=True)
    fake.program.rename(fake.home / ".local/bin/claude")
    done = fake.task().call(fake.env | {"PATH": "/usr/bin"})
    assert done.returncode == 0 and len(fake.calls()) == 1


def test_a_workspace_that_is_gone_is_a_failed_attempt_and_no_other_directory(fake):
    done = fake.task(workspace_path=str(fake.home / "gone")).call()
    assert done.returncode == 1 and "gone" in done.stderr and fake.calls() == []


BUSY = (INIT, {"type": "assistant", "error": "overloaded"}, {"type": "result", "is_error": True})


def test_no_secret_is_written_anywhere(fake):
    fake.says(*BUSY)
    done = fake.task().call(fake.env | {"ANTHROPIC_API_KEY": "sk-very-secret"})
    assert done.returncode == 75 and "secret" not in done.stdout + done.stderr
    (note,) = (fake.home / "state").rglob("*.json")
    assert "secret" not in note.read_text() and note.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("note", [b"", b"[]", b'{"handed": 1}', b"\xff", None])
def test_a_torn_note_and_a_state_that_cannot_be_written_do_no_harm(fake, note):
    fake.says(*BUSY)
    task = fake.task()
    if note is None:
        (fake.home / "state/claude").write_text("in the way")
    else:
        task.call()
        (path,) = (fake.home / "state").rglob("*.json")
        path.write_bytes(note)
    done = task.call()
    assert done.returncode == 75 and json.loads(done.stdout) == {"retry_after": 30}


@pytest.mark.parametrize("option, code", [("--help", 0), ("--nonsense", 64)])
def test_it_says_how_it_is_used(option, code, capsys):
    with pytest.raises(SystemExit) as ended:
        load_handler().main([option])
    shown = capsys.readouterr()
    assert ended.value.code == code
    assert "exit codes:" in shown.out if code == 0 else shown.err.count("\n") == 1
