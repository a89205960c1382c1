"""With the real Claude Code: what a Stop hook handed over comes back with the next prompt, once."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from taskqueue.settings import SESSION_STARTS

SUMMARY = "1 broken link: README.md:4 → pier.md"


@pytest.fixture
def flow(installation, claude):
    """A workspace whose hooks enqueue a link check and tell what became of it."""
    state = shlex.quote(str(installation.state))

    def hook(script: str) -> list:
        command = f"TASK_QUEUE_STATE={state} {shlex.quote(sys.executable)} {ROOT}/{script}"
        return [{"hooks": [{"type": "command", "command": command, "timeout": 20}]}]

    settings = claude.workspace / ".claude/settings.json"
    settings.parent.mkdir()
    settings.write_text(
        json.dumps(
            {
                "hooks": {
                    "Stop": hook("enqueue.py --hook notifications link_validation"),
                    "UserPromptSubmit": hook("report.py --hook"),
                    "SessionStart": [
                        {**group, "matcher": SESSION_STARTS} for group in hook("report.py --hook")
                    ],
                }
            }
        )
    )
    installation.handler(
        "link_validation", f"#!/bin/sh\necho '{json.dumps({'summary': SUMMARY})}'\n"
    )
    return installation


def prompt(claude, text: str, *options: str) -> str:
    """Give Claude a prompt; all that it was told by then."""
    command = [
        *claude.within, claude.home / "bin/claude", "-p", "--setting-sources=project", *options, text
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env=claude.env,
        cwd=claude.workspace,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    claude.said = done.stdout
    return last_request(claude)


def last_request(claude) -> str:
    """All that the API was told with the last request."""
    return json.dumps(claude.requests()[-1]["body"], ensure_ascii=False)


def test_a_broken_link_is_in_the_next_prompts_request_once(flow, claude):
    assert SUMMARY not in prompt(claude, "Write about the harbour.")
    assert flow.rows("select task_type from notifications") == [("link_validation",)]
    flow.worker("notifications", "--drain", ready=False).wait(30)
    second = prompt(claude, "And about the pier.")
    assert second.count(SUMMARY) == 1 and "no instruction" in second
    flow.sqlite3("delete from notifications")
    assert SUMMARY not in prompt(claude, "And about the lighthouse.")


def test_a_handlers_own_claude_is_told_nothing_and_enqueues_nothing(flow, claude):
    prompt(claude, "Write about the harbour.")
    flow.worker("notifications", "--drain", ready=False).wait(30)
    done = claude.task(args=["--setting-sources=project"]).run()
    assert done.returncode == 0, done.stderr
    assert SUMMARY not in last_request(claude)
    assert flow.rows("select * from notifications") == []
    assert SUMMARY in prompt(claude, "And about the pier.")


def test_the_hooks_of_a_session_fire_as_they_are_meant_to(flow, claude):
    """A start tells, a resumption does not, and the person's line is taken beside the context."""
    as_json = ("--output-format", "stream-json", "--verbose", "--include-hook-events")
    prompt(claude, "Write about the harbour.")
    flow.worker("notifications", "--drain", ready=False).wait(30)
    # Nothing but the start of the session tells.
    settings = claude.workspace / ".claude/settings.json"
    hooks = json.loads(settings.read_text())["hooks"]
    settings.write_text(json.dumps({"hooks": {"SessionStart": hooks["SessionStart"]}}))
    assert SUMMARY not in prompt(claude, "And about the pier.", "--continue", *as_json)
    assert "SessionStart:resume" not in claude.said
    assert prompt(claude, "And about the lighthouse.", *as_json).count(SUMMARY) == 1
    events = [json.loads(line) for line in claude.said.splitlines()]
    [ended] = [event for event in events if event.get("subtype") == "hook_response"]
    assert ended["hook_name"] == "SessionStart:startup" and ended["outcome"] == "success"
    assert json.loads(ended["stdout"])["systemMessage"].startswith("Claude was told: ")
