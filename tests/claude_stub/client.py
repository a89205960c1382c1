"""The real Claude Code against the stand-in API, both in a network namespace of their own: nothing leaves the machine.

Claude Code is looked for in $CLAUDE_DIR, where `npm install --prefix DIR @anthropic-ai/claude-code@2.1.332` put it, then
in .claude-code of the checkout, then on PATH. Tests are skipped where there is none, or no way to have a namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from claude_stub.task import PROMPT, Task
from conftest import ROOT, end, wait_for

HERE = Path(__file__).resolve().parent
PORT = 8123


def find_claude() -> str | None:
    places = [os.environ.get("CLAUDE_DIR"), ROOT / ".claude-code"]
    for place in filter(None, places):
        program = Path(place, "node_modules/.bin/claude")
        if program.exists():
            return str(program.resolve())
    return shutil.which("claude")


def needs_a_namespace() -> None:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("there is no unshare or nsenter to make a network namespace with")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
        pytest.skip("a network namespace needs root")


class ClaudeCode:
    """A HOME with `claude` on its PATH, a workspace, and the API that this claude talks to."""

    def __init__(self, directory: Path) -> None:
        program = find_claude()
        if program is None:
            pytest.skip(
                "there is no Claude Code: npm install --prefix .claude-code @anthropic-ai/claude-code@2.1.332"
            )
        needs_a_namespace()
        self.home, self.workspace, self.asked = (
            directory / "home",
            directory / "workspace",
            directory / "api",
        )
        for path in (self.home / "bin", self.workspace, self.asked):
            path.mkdir(parents=True)
        (self.home / "bin/claude").symlink_to(program)
        self.answer("fine")
        self.api = subprocess.Popen(["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
                                     sys.executable, HERE / "api.py", str(PORT), self.asked])  # fmt: skip
        wait_for((self.asked / "api.pid").exists, what="the stand-in API")
        self.env = {
            "HOME": str(self.home),
            "PATH": f"{self.home}/bin:{os.environ['PATH']}",
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{PORT}",
            "ANTHROPIC_API_KEY": "stub",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # It runs as root where tests do, and is asked to run commands.
            "IS_SANDBOX": "1",
        }

    def subscription(self) -> dict[str, str]:
        """An environment with a subscription's login in place of a key: those are told when a limit resets."""
        env = {name: value for name, value in self.env.items() if name != "ANTHROPIC_API_KEY"}
        return env | {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-stub"}

    def answer(self, kind: str, **how) -> None:
        """Have the API answer this from now on."""
        temporary = self.asked / "answer.new"
        temporary.write_text(json.dumps({"kind": kind, **how}))
        temporary.replace(self.asked / "answer.json")

    def requests(self) -> list[dict]:
        """Return what the API was asked, {"time", "kind", "headers", "body"} each."""
        file = self.asked / "requests.jsonl"
        # The last line may be half written at this moment.
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def within(self) -> tuple[str, ...]:
        """Return what a command begins with that can reach the API."""
        return "nsenter", "-t", str(self.api.pid), "-n"

    def task(self, **data) -> Task:
        """A claude task in the workspace."""
        data = {"prompt": PROMPT, "workspace_path": str(self.workspace), **data}
        return Task(self.home.parent, self.env, self.within, **data)

    def sessions(self) -> list[Path]:
        """The files of Claude Code's sessions."""
        return list(self.home.glob(".claude/projects/*/*.jsonl"))

    def close(self) -> None:
        end(self.api)


def words_of(request: dict) -> str:
    """All that a request says to the model in the user's place."""
    said = [
        message["content"] for message in request["body"]["messages"] if message["role"] == "user"
    ]
    blocks = [
        block
        for content in said
        for block in ([{"text": content}] if isinstance(content, str) else content)
    ]
    return "\n".join(block.get("text", "") for block in blocks)


def session_of(request: dict) -> str:
    """The session that a request belongs to."""
    headers = {name.lower(): value for name, value in request["headers"].items()}
    return headers["x-claude-code-session-id"]
