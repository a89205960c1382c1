"""demo_flow.py: a Stop hook, a broken link, a held task that a person approves, Claude,
completions, the next prompt.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from claude_stub.client import find_claude, needs_a_namespace
from conftest import ROOT
from link_check import UV, UV_CACHE

import demo_flow

STEPS = [
    "its Stop hook enqueued a link check",
    "link check: 1 broken link: README.md:4 → pier.md",
    "held in approvals: claude mend-links: Mend these links: 1 broken link: README.md:4 → pier.md",
    "approved: tasks.py approve mend-links",
    "Claude ran: I drew the map of the pier",
    "in completions: link_validation: 1 broken link",
    "in completions: claude: I drew the map of the pier",
    "with the next prompt, Claude was told",
    'link_validation completed: "1 broken link: README.md:4 → pier.md"',
    'claude completed: "I drew the map of the pier',
]


def run(tmp_path, within=(), **env) -> list[str]:
    """What the demonstration prints."""
    env = {
        "HOME": str(tmp_path),
        "PATH": f"{os.path.dirname(UV)}:/usr/bin:/bin:/usr/sbin:/sbin",
        "UV_CACHE_DIR": UV_CACHE,
        "UV_OFFLINE": "1",
        **env,
    }
    ran = subprocess.run(
        [*within, sys.executable, ROOT / "demo_flow.py"],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.splitlines()


def assert_steps(lines: list[str]) -> None:
    at = 0
    for step in STEPS:
        at = next((number for number in range(at, len(lines)) if step in lines[number]), None)
        assert at is not None, (step, lines)


def test_with_the_real_claude_code_and_a_stand_in_for_its_api(tmp_path):
    program = find_claude()
    if program is None:
        pytest.skip(
            "there is no Claude Code: npm install --prefix .claude-code @anthropic-ai/claude-code@2.1.332"
        )
    needs_a_namespace()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/claude").symlink_to(program)
    within = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    path = f"{tmp_path}/bin:{os.path.dirname(UV)}:/usr/bin:/bin:/usr/sbin:/sbin"
    # What a person may have set for another Claude is not for this one.
    elsewhere = "http://127.0.0.1:9"
    odd = {"ANTHROPIC_AUTH_TOKEN": "secret", "ANTHROPIC_MODEL": "none"}
    odd |= {"HTTP_PROXY": elsewhere, "http_proxy": elsewhere, "HTTPS_PROXY": elsewhere}
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    lines = run(tmp_path, within, PATH=path, TMPDIR=str(temporary), **odd)
    # uv has locks of its own there.
    assert [path.name for path in temporary.iterdir() if path.suffix != ".lock"] == []
    assert any("is here, with a stand-in for the API" in line for line in lines)
    assert_steps(lines)


def test_without_claude_code_it_says_so_and_shows_the_same(tmp_path):
    lines = run(tmp_path)
    # Where a checkout has its own, there is one.
    assert (
        any("there is no Claude Code here: a fake command" in line for line in lines)
        or find_claude()
    )
    assert_steps(lines)


def test_a_step_that_does_not_end_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_flow, "STEP_SECONDS", 0.1)
    flow = demo_flow.Flow(tmp_path)
    flow.workspace.mkdir()
    with pytest.raises(demo_flow.Failed, match="sleep did not end within 0.1 s"):
        flow.run_to_end(["sleep", "60"])


def test_nothing_is_left_behind(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    assert_steps(run(tmp_path, TMPDIR=str(temporary)))
    # uv has locks of its own there.
    assert list(temporary.glob("task-queue-*")) == []
    assert not (tmp_path / ".claude").exists()
