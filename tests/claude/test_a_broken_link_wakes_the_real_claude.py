"""With the real Claude Code in a terminal, installed as a person installs it: an idle session hears of
its broken link, mends it, and is not woken again; one that the person goes on typing in hears once.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from claude_stub.client import ClaudeCode
from conftest import end, wait_for
from plugin import NAME, Home, copy_of_the_plugin, give_uv, is_alive

FOUND = "1 broken link: README.md:1 → pier.md"
WOKEN = "You were woken"


class Terminal(Home):
    """Claude Code in a terminal, in a fresh home."""

    def __init__(self, directory) -> None:
        self.claude = ClaudeCode(directory)
        super().__init__(self.claude.home)
        self.shown, self.pid, self.terminal = b"", 0, -1
        self.workspace = self.claude.workspace
        self.claude.env |= give_uv(self.home)

    def install_hooks(self) -> None:
        """Install all three hooks."""
        path = {"PATH": self.claude.env["PATH"]}
        self.install("--hook", "yes", "--report", "yes", "--wake", "yes", env=path)
        # The Python of the tests has what that of an installed worker has.
        hook = self.prefix / "runtime/hook"
        hook.write_text(
            hook.read_text().replace("\npackages=''\n", f"\npackages={sys.executable}\n")
        )

    def install_plugin(self, market) -> None:
        """Install the plugin, which has the hooks, too, with its option."""
        for words in (["marketplace", "add", copy_of_the_plugin(market)], ["install", NAME]):
            subprocess.run(
                [*self.claude.within, self.home / "bin/claude", "plugin", *words],
                env=self.claude.env,
                stdin=subprocess.DEVNULL,
                check=True,
            )
        settings = self.home / ".claude/settings.json"
        told = json.loads(settings.read_text())
        told["pluginConfigs"] = {NAME: {"options": {"wake": True}}}
        settings.write_text(json.dumps(told))

    def hold_checks(self) -> None:
        """Have link checks wait for ~/go."""
        check = self.prefix / "handlers/link_validation"
        check.rename(check.with_name("real"))
        check.write_text(
            '#!/bin/sh\nuntil [ -e "$HOME/go" ]; do sleep 0.01; done\nexec "${0%/*}/real"\n'
        )
        check.chmod(0o755)

    def start(self) -> None:
        told = {
            "hasCompletedOnboarding": True,
            "customApiKeyResponses": {"approved": ["stub"], "rejected": []},
            "projects": {str(self.workspace): {"hasTrustDialogAccepted": True}},
        }
        file = self.home / ".claude.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | told))
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(self.workspace)
            env = {**self.claude.env, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
            program = [
                *self.claude.within,
                str(self.home / "bin/claude"),
                "--permission-mode=acceptEdits",
            ]
            os.execvpe(program[0], program, env)
        threading.Thread(target=self.read, daemon=True).start()
        wait_for(lambda: "❯".encode() in self.shown, 60, "the prompt")

    def read(self) -> None:
        while True:
            try:
                self.shown += os.read(self.terminal, 65536)
            except OSError:
                # It has ended.
                return

    def type(self, text: str) -> None:
        """Type a prompt; the terminal has to show it before Enter counts."""
        before = len(self.shown)
        os.write(self.terminal, text.encode())
        wait_for(lambda: text.split()[-1].encode() in self.shown[before:], 30, "the text")
        os.write(self.terminal, b"\r")

    def told(self, word: str) -> str:
        """All that Claude was told by the first request with this word, once it was sent."""

        def found() -> str:
            bodies = (request["body"] for request in self.requests())
            said = [json.dumps(body["messages"], ensure_ascii=False) for body in bodies]
            return next((text for text in said if word in text), "")

        return wait_for(found, 60, f"a request with {word}")

    def requests(self) -> list[dict]:
        """The requests of the session, without Claude Code's side questions."""
        return [request for request in self.claude.requests() if request["body"].get("tools")]

    def waiting(self) -> int:
        """The process number of the waiter, 0 where there is none."""
        for file in self.state.glob("waits/*"):
            name = file.read_text().partition(" ")[2].partition("-")[0]
            if name.isdecimal() and is_alive(int(name)):
                return int(name)
        return 0

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.terminal)
            self.pid = 0

    def close(self) -> None:
        super().close()
        (self.home / "go").touch()
        self.kill()
        end(self.claude.api)


@pytest.fixture
def session(tmp_path):
    made = Terminal(tmp_path / "claude")
    yield made
    print(made.worker_log())
    made.close()


def test_an_idle_session_hears_of_its_broken_link_and_mends_it(session):
    session.install_hooks()
    session.start()
    readme = session.workspace / "README.md"
    readme.write_text("[the pier](pier.md)\n")
    session.type("Write about the harbour.")
    ((status, result),) = session.ended()
    ended_at = time.time()
    assert status == "completed" and json.loads(result)["summary"] == FOUND
    # The answer to the wake-up mends the link.
    pier = {"file_path": str(session.workspace / "pier.md"), "content": "The pier.\n"}
    write = {"name": "Write", "input": pier}
    session.claude.answer("tool", commands=[write], text="Mended.")
    assert session.told(WOKEN).count(FOUND) == 1
    assert session.requests()[1]["time"] - ended_at < 5
    # Its check finds nothing, and nobody wakes the session again.
    (_, (_, second)) = session.ended(2)
    assert json.loads(second)["failed"] == 0
    session.claude.answer("fine")
    wait_for(lambda: not session.waiting(), what="the end of the waiter")
    session.type("And about the lighthouse.")
    assert session.told("lighthouse").count(WOKEN) == 1


def test_a_session_that_its_person_goes_on_typing_in_hears_once(session):
    session.install_hooks()
    session.start()
    (session.workspace / "README.md").write_text("[the pier](pier.md)\n")
    session.hold_checks()
    session.type("Write about the harbour.")
    wait_for(session.waiting, 60, "the waiter")
    session.claude.answer("hang")
    session.type("And about the pier.")
    session.told("about the pier")
    wait_for(lambda: not session.waiting(), what="the waiter gives way to the prompt")
    (session.home / "go").touch()
    session.ended()
    # The second answer has its check, too, and that wakes the idle session.
    session.claude.answer("fine")
    session.told(WOKEN)
    wait_for(lambda: not session.waiting(), what="the end of the second waiter")
    session.type("And about the lighthouse.")
    assert session.told("lighthouse").count(FOUND) == 1


def test_the_plugin_wakes_where_its_option_says_so(session, tmp_path):
    session.install_plugin(tmp_path / "market")
    session.start()
    (session.workspace / "README.md").write_text("[the pier](pier.md)\n")
    session.type("Write about the harbour.")
    session.ended()
    assert session.told(WOKEN).count(FOUND) == 1


def test_a_session_that_ends_leaves_no_process_behind(session):
    session.install_hooks()
    session.hold_checks()
    session.start()
    session.type("Write about the harbour.")
    wait_for(session.waiting, 60, "the waiter")
    # Claude Code itself leaves the hooks of a cleared conversation running.
    session.type("/clear")
    wait_for(lambda: not session.waiting(), what="the end of the waiter")
    session.type("Write about the pier.")
    waiter = wait_for(session.waiting, 60, "the waiter of the new conversation")
    session.kill()
    wait_for(lambda: not is_alive(waiter), what="the end of the killed session's waiter")
    assert not session.waiting()
