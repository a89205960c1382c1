"""With the real Claude Code, in a fresh home: the plugin is valid, installed, fired, and updated
while a session lives.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess

import pytest
from claude_stub.client import ClaudeCode
from conftest import ROOT, end, wait_for
from plugin import NAME, Home, copy_of_the_plugin, give_uv, is_alive

import queue_helpers as q

SUMMARY = "1 broken link: README.md:2 → pier.md"


class Session(Home):
    """Claude Code with the plugin's marketplace, and a workspace with a broken link."""

    def __init__(self, directory) -> None:
        self.claude = ClaudeCode(directory)
        super().__init__(self.claude.home)
        self.market = copy_of_the_plugin(directory / "market")
        self.env = self.claude.env | give_uv(self.home)
        self.workspace = self.claude.workspace
        (self.workspace / "README.md").write_text("# Harbour\n[the pier](pier.md)\n")

    def run(self, *args: str, code: int = 0) -> str:
        """Run claude; what it prints."""
        command = [*self.claude.within, self.home / "bin/claude", *args]
        ran = subprocess.run(
            command,
            env=self.env,
            cwd=self.workspace,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    def install_plugin(self) -> None:
        """From this checkout's own marketplace: Claude Code runs it from there."""
        self.run("plugin", "marketplace", "add", str(self.market))
        self.run("plugin", "install", NAME)

    def install_from_git(self) -> None:
        """From a repository, as from a forge: Claude Code runs a copy, one a version."""
        market = self.home / "market/.claude-plugin/marketplace.json"
        market.parent.mkdir(parents=True)
        told = json.loads((self.market / ".claude-plugin/marketplace.json").read_text())
        told["plugins"][0]["source"] = {"source": "url", "url": self.market.as_uri()}
        market.write_text(json.dumps(told))
        self.publish()
        self.run("plugin", "marketplace", "add", str(self.home / "market"))
        self.run("plugin", "install", NAME)

    def publish(self, version: str = q.VERSION) -> None:
        """Commit a version of the plugin."""
        manifest = self.market / ".claude-plugin/plugin.json"
        manifest.write_text(manifest.read_text().replace(q.VERSION, version))
        git = [
            "git",
            "-c",
            "user.name=tests",
            "-c",
            "user.email=tests@localhost",
            "-c",
            "init.defaultBranch=main",
        ]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", version]):
            subprocess.run([*git, *command], cwd=self.market, check=True, env=self.env)

    def installed(self) -> str:
        """Return where Claude Code has the plugin's version of now."""
        record = json.loads((self.home / ".claude/plugins/installed_plugins.json").read_text())
        return record["plugins"][NAME][0]["installPath"]

    def told(self) -> str:
        """All that the API was told with the last request."""
        return json.dumps(self.claude.requests()[-1]["body"], ensure_ascii=False)

    def close(self) -> None:
        super().close()
        self.claude.close()


@pytest.fixture
def session(tmp_path):
    made = Session(tmp_path / "claude")
    yield made
    made.close()


def test_it_is_valid_without_a_warning(session):
    said = session.run(
        "plugin", "validate", "--strict", "--profile", "directory", str(session.market)
    )
    assert "Validation passed" in said and "warning" not in said.lower()


def test_its_manifest_says_what_is_so():
    manifest = json.loads((ROOT / ".claude-plugin/plugin.json").read_text())
    assert manifest["version"] == q.VERSION
    icon = (ROOT / manifest["icon"]).read_bytes()
    width, height = struct.unpack(">II", icon[16:24])
    assert icon.startswith(b"\x89PNG") and 512 <= width == height <= 2048
    assert len(re.findall(r"\w+", (ROOT / "README.md").read_text())) >= 40


def test_a_firing_is_checked_by_its_own_worker_and_told_with_the_next_prompt_once(session):
    session.install_plugin()
    session.run("-p", "Write about the harbour.")
    ((status, result),) = session.ended()
    assert status == "completed" and json.loads(result)["summary"] == SUMMARY
    command = session.rows("select data from task_history")[0][0]
    assert "plugins" not in command, "a task remembers no directory of the plugin"
    session.run("-p", "And about the pier.")
    assert session.told().count(SUMMARY) == 1
    # The second answer has had its check, too; the same result is not told again.
    session.ended(2)
    session.run("-p", "And about the lighthouse.")
    assert session.told().count("link_validation completed") == 0


def test_with_an_installations_hooks_a_firing_is_one_task_and_a_report_is_told_once(session):
    session.install("--hook", "yes", "--report", "yes")
    session.install_plugin()
    # The check goes on until both hooks have come.
    (session.prefix / "handlers/link_validation").write_text(
        '#!/bin/sh\nuntil [ -e go ]; do sleep 0.01; done\necho \'{"summary": "checked"}\'\n'
    )
    session.run("-p", "Write about the harbour.")
    (session.workspace / "go").touch()
    session.ended()
    assert session.rows("select count(*) from notifications") == [(0,)]
    assert len(session.ended()) == 1, "the second hook told of the same firing"
    # Its worker is the installation's.
    (worker,) = session.workers()
    with open(f"/proc/{worker}/cmdline") as file:
        assert str(session.prefix / "runtime/lib/worker.py") in file.read()
    session.run("-p", "And about the pier.")
    assert session.told().count("link_validation completed") == 1


def test_it_is_updated_while_a_session_lives(session):
    session.install_from_git()
    before = session.installed()
    command = [*session.claude.within, session.home / "bin/claude", "-p", "--verbose",
               "--input-format", "stream-json", "--output-format", "stream-json"]  # fmt: skip
    living = subprocess.Popen(
        command,
        env=session.env,
        cwd=session.workspace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def prompt(text: str) -> None:
        message = {"role": "user", "content": text}
        living.stdin.write(json.dumps({"type": "user", "message": message}) + "\n")
        living.stdin.flush()
        wait_for(lambda: json.loads(living.stdout.readline())["type"] == "result", 60, "the answer")

    try:
        prompt("Write about the harbour.")
        session.ended()
        session.publish("99.0.0")
        session.run("plugin", "marketplace", "update", "task-queue")
        session.run("plugin", "update", NAME)
        assert session.installed() != before and session.installed().endswith("99.0.0")
        prompt("And about the pier.")
        assert session.told().count(SUMMARY) == 1
        session.ended(2)
        # Claude Code removes the old directory after some days: the worker in there leaves.
        (worker,) = session.workers()
        with open(f"/proc/{worker}/cmdline") as file:
            assert f"{before}/worker.py" in file.read()
        shutil.rmtree(before)
        wait_for(lambda: not is_alive(worker), 30, "the end of the old version's worker")
        assert "is gone: leaving" in session.worker_log()
    finally:
        end(living)
    session.run("-p", "And about the lighthouse.")
    session.ended(3)
    with open(f"/proc/{session.workers()[-1]}/cmdline") as file:
        assert f"{session.installed()}/worker.py" in file.read()


def test_each_event_that_both_hooks_hear_is_one_task(session):
    """All events that Claude Code has a payload for here, told by settings and plugin at once."""
    payloads = (ROOT / "tests/hook_payloads").glob("*.json")
    found = {re.search(r'"hook_event_name": "(\w+)"', path.read_text()) for path in payloads}
    events = {event[1] for event in found if event}
    session.install("--hook", "no")
    log = session.home / "fired"
    log.mkdir()

    def groups(*commands: str) -> dict:
        hooks = [{"type": "command", "command": command} for command in commands]
        return {event: [{"hooks": hooks}] for event in events}

    installed = f"/bin/sh '{session.prefix}/runtime/hook' approvals --hold || exit 1"
    seen = f"cat >'{log}/'$$ || exit 1"
    settings = session.home / ".claude/settings.json"
    told = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(told | {"hooks": groups(seen, installed)}))
    plugin = '/bin/sh "${CLAUDE_PLUGIN_ROOT}/bin/hook.sh" approvals --hold || exit 1'
    (session.market / "hooks/hooks.json").write_text(json.dumps({"hooks": groups(plugin)}))
    session.install_plugin()
    spool = session.state / "spool/approvals"
    for file in (*log.iterdir(), *spool.glob("*.hook")):
        file.unlink()
    tool = {
        "name": "Write",
        "input": {"file_path": str(session.workspace / "new.md"), "content": "x"},
    }
    session.claude.answer("tool", commands=[tool])
    session.run("-p", "Write about the harbour.", "--permission-mode", "acceptEdits")
    fired = sorted(json.loads(file.read_bytes())["hook_event_name"] for file in log.iterdir())
    assert {"SessionStart", "UserPromptSubmit", "Stop", "SessionEnd"} <= set(fired)
    assert len(list(spool.glob("*.hook"))) == 2 * len(fired)
    q.take_in_spool(session.state)
    rows = session.rows("select task_type from approvals order by task_type")
    assert [event for (event,) in rows] == fired
