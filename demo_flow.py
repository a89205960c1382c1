#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Show the whole way from one prompt to the next: Claude stops, a link check finds a broken link, a
task for Claude is held until it is approved, Claude mends the link, and the next prompt is told so.

The hooks are those of the plugin, run by Claude Code itself where it is installed. The model's
answers come from a stand-in for the API on this machine. Without Claude Code, or without the
stand-in, a fake command takes Claude's place, and the first line says so. The state, the workspace
and Claude's home are thrown away at the end; nothing of yours is touched.

examples:
  just demo-flow
  CLAUDE_DIR=.claude-code just demo-flow      the Claude Code that npm has put there

exit codes: 0 every step happened; 1 one did not, within 30 s; 64 usage.
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from demo import HERE, STEP_SECONDS, Demo, Failed, perform
from taskqueue import cli

STAND_IN = HERE / "tests/claude_stub/api.py"
# What the model is told to do, by the stand-in.
MEND = ["printf '# The pier\\n\\nIt is 80 m long.\\n' >pier.md"]
MENDED = "I drew the map of the pier: README.md leads to pier.md again."

# The link check of this demonstration: what the real one found, then, where a link is broken, a
# last line that enqueues the next task. It needs a worker with --chain.
LINK_CHECK = """#!{python}
import json, subprocess, sys

check = subprocess.run([{real!r}], stdout=subprocess.PIPE)
if check.returncode != 0:
    sys.exit(check.returncode)
found = json.loads(check.stdout)
print(json.dumps(found))
if found["failed"]:
    prompt = "Mend these links: " + found["summary"]
    data = {{"prompt": prompt, "workspace_path": found["workspace_path"], "permission_mode": "acceptEdits",
            "allowed_tools": ["Read", "Edit", "Write", "Bash"]}}
    print(json.dumps({{"enqueue": [
        {{"queue": "approvals", "task_type": "claude", "task_id": "mend-links", "data": data, "hold": True}}
    ]}}))
"""
# In Claude's place where there is none.
FAKE = """#!{python}
import json, subprocess, sys, uuid

subprocess.run({mend!r}, shell=True, check=True)
print(json.dumps({{"type": "system", "subtype": "init", "session_id": str(uuid.uuid4()), "model": "fake"}}))
print(json.dumps({{"type": "result", "is_error": False, "result": {mended!r}, "num_turns": 2, "total_cost_usd": 0}}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    cli.make_parser("demo_flow.py", __doc__).parse_args(argv)
    return perform(Flow)


class Flow(Demo):
    """One demonstration in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.api, self.home = directory / "api", directory / "home"
        self.claude = find_claude() if STAND_IN.is_file() else None
        self.session = str(uuid.uuid4())
        # A home of Claude's own must not hide what uv has downloaded.
        cache = (
            subprocess.run([self.uv, "cache", "dir"], capture_output=True, text=True)
            if self.uv
            else None
        )
        if cache and cache.returncode == 0:
            self.environment["UV_CACHE_DIR"] = cache.stdout.strip()

    def run(self) -> None:
        self.warm()
        self.make_workspace()
        self.make_home()
        self.start_workers()
        self.prompt("I updated the notes. Thank you.")
        self.say("Claude answered and stopped: its Stop hook enqueued a link check")
        check = self.ended("link_validation")
        self.say(f"link check: {json.loads(check['result'].splitlines()[0])['summary']}")
        held = self.wait_for(
            "no task was held", self.first("select * from task_queue where status = 'held'")
        )
        self.say(
            f"held in {held['queue']}: {held['task_type']} {held['task_id']}: {prompt_of(held)}"
        )
        self.approve(held["task_id"])
        mended = self.ended("claude")
        self.say(f"Claude ran: {json.loads(mended['result'])['summary']}")
        if not (self.workspace / "pier.md").is_file():
            raise Failed("Claude did not write pier.md")
        for row in self.rows("select * from completions order by id"):
            data = json.loads(row["data"])
            self.say(f"in completions: {data['task_type']}: {data['data']['summary']}")
        told = self.prompt("What is new in the harbour?")
        report = told[told.find("While you worked") :].splitlines()
        if len(report) < 3 or MENDED not in told:
            raise Failed(f"the next prompt was not told what happened, but: {told!r}")
        self.say("with the next prompt, Claude was told:")
        for line in report[:3]:
            print(f"           {line}", flush=True)

    # ---------------------------------------------------------------------------------------------------------- steps

    def make_home(self) -> None:
        """Claude's home, and the API that answers it."""
        (self.home / "bin").mkdir(parents=True)
        claude = self.home / "bin/claude"
        self.environment |= {
            "HOME": str(self.home),
            "PATH": f"{claude.parent}{os.pathsep}{self.environment.get('PATH', os.defpath)}",
        }
        if self.claude is None:
            claude.write_text(FAKE.format(python=sys.executable, mend=MEND[0], mended=MENDED))
            claude.chmod(0o755)
            self.say("there is no Claude Code here: a fake command takes its place")
            return
        claude.symlink_to(self.claude)
        self.api.mkdir()
        temporary = self.home / "tmp"
        temporary.mkdir()
        self.answer("fine", text="You are welcome.")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.start_alone([sys.executable, STAND_IN, port, self.api])
        self.wait_for("the stand-in for the API did not start", (self.api / "api.pid").exists)
        self.environment |= {
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
            "ANTHROPIC_API_KEY": "stub",
            # The stand-in is on this machine, where no proxy has a way to it.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            # Claude Code leaves directories of its own there.
            "TMPDIR": str(temporary),
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # Without it Claude Code refuses to run commands as root, as in a container.
            "IS_SANDBOX": "1",
        }
        self.say(f"{self.claude} is here, with a stand-in for the API; its home is a new one")

    def answer(self, kind: str, **how) -> None:
        """What the model says from now on."""
        new = self.api / "answer.new"
        new.write_text(json.dumps({"kind": kind, **how}))
        new.replace(self.api / "answer.json")

    def start_workers(self) -> None:
        """One worker for link checks, which may enqueue what follows; one for Claude, which may
        not.
        """
        handlers = self.home / "handlers"
        handlers.mkdir()
        check = handlers / "link_validation"
        real = str(self.handlers / "link_validation")
        check.write_text(LINK_CHECK.format(python=sys.executable, real=real))
        check.chmod(0o755)
        (handlers / "claude").symlink_to(HERE / "handlers/claude")
        if not self.uv:
            (handlers / "claude").unlink()
            (handlers / "claude").write_text(
                f'#!/bin/sh\nexec "{sys.executable}" "{HERE}/handlers/claude"\n'
            )
            (handlers / "claude").chmod(0o755)
        common = ["--handlers", str(handlers), "--then", "completions", "--grace", "0"]
        with self.log.open("ab") as log:
            for queue, more in (("approvals", []), ("notifications", ["--chain"])):
                self.worker = self.start(
                    HERE / "worker.py",
                    queue,
                    *common,
                    *more,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        self.wait_for(
            "the workers did not get ready", lambda: self.worker_log().count(" serves ") == 2
        )
        self.say("workers started: worker.py notifications --chain --then completions")
        self.say("                 worker.py approvals --then completions")

    def prompt(self, text: str) -> str:
        """Give Claude a prompt, in one session; what it was told with it."""
        if self.claude is None:
            told = self.fire("UserPromptSubmit", prompt=text)
            self.fire("Stop", last_assistant_message="You are welcome.", stop_hook_active=False)
            return json.loads(told)["hookSpecificOutput"]["additionalContext"] if told else ""
        self.answer("fine", text="You are welcome.")
        asked = self.api / "requests.jsonl"
        way = "--resume" if asked.exists() else "--session-id"
        command = ["claude", "-p", "--plugin-dir", str(HERE), way, self.session, text]
        ran = self.run_to_end(command)
        if ran.returncode != 0:
            raise Failed(f"claude ended with exit {ran.returncode}: {ran.stdout}{ran.stderr}")
        self.answer("tool", commands=MEND, text=MENDED)
        body = json.loads(asked.read_text().splitlines()[-1])["body"]
        return "\n".join(texts_of(body["messages"]))

    def fire(self, event: str, **payload) -> str:
        """Run the plugin's hook for an event as Claude Code would; what it prints."""
        hooks = json.loads((HERE / "hooks/hooks.json").read_text())["hooks"]
        (hook,) = hooks[event][0]["hooks"]
        words = [word.replace("${CLAUDE_PLUGIN_ROOT}", str(HERE)) for word in hook["args"]]
        payload |= {
            "session_id": self.session,
            "cwd": str(self.workspace),
            "hook_event_name": event,
        }
        ran = self.run_to_end([hook["command"], *words], json.dumps(payload))
        if ran.returncode != 0 or ran.stderr:
            raise Failed(f"the {event} hook ended with exit {ran.returncode}: {ran.stderr}")
        return ran.stdout

    def approve(self, task_id: str) -> None:
        runner = [self.uv, "run", "--script"] if self.uv else [sys.executable]
        ran = self.run_to_end([*runner, str(HERE / "tasks.py"), "approve", task_id])
        if ran.returncode != 0:
            raise Failed(f"it could not be approved: {ran.stderr}")
        self.say(f"approved: tasks.py approve {task_id}")

    def ended(self, task_type: str) -> dict:
        """The history's row of the first task of a type, which must have completed."""
        row = self.wait_for(
            f"no {task_type} task ended",
            self.first(f"select * from task_history where task_type = '{task_type}'"),
        )
        if row["status"] != "completed":
            raise Failed(f"the {task_type} task ended as {row['status']}: {row['error']}")
        return row

    # ---------------------------------------------------------------------------------------------------------- tools

    def run_to_end(self, command: list[str], stdin: str = "") -> subprocess.CompletedProcess:
        """Run a program in the workspace, with the demonstration's environment."""
        try:
            return subprocess.run(
                command,
                env=self.environment,
                cwd=self.workspace,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=STEP_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{command[0]} did not end within {STEP_SECONDS} s") from None

    def start_alone(self, command: list) -> None:
        """Start a program that is ended with the demonstration."""
        self.worker = subprocess.Popen(
            list(map(str, command)), env=self.environment, start_new_session=True
        )
        self.children.append(self.worker)

    def rows(self, query: str) -> list[dict]:
        with sqlite3.connect(f"{(self.state / 'tasks.db').as_uri()}?mode=ro", uri=True) as conn:
            conn.row_factory = sqlite3.Row
            return list(map(dict, conn.execute(query)))


def find_claude() -> str | None:
    """The Claude Code in CLAUDE_DIR, in .claude-code of this checkout, or on PATH."""
    for place in filter(None, (os.environ.get("CLAUDE_DIR"), HERE / ".claude-code")):
        program = Path(place, "node_modules/.bin/claude")
        if program.exists():
            return str(program.resolve())
    return shutil.which("claude")


def prompt_of(row: dict) -> str:
    data = json.loads(row["data"])
    return data.get("data", data)["prompt"]


def texts_of(messages: list[dict]) -> list[str]:
    """All texts that the model is told. What hooks say comes as a message of the system."""
    said = [message["content"] for message in messages if message["role"] != "assistant"]
    blocks = [
        block
        for content in said
        for block in ([{"text": content}] if isinstance(content, str) else content)
    ]
    return [block.get("text", "") for block in blocks]


if __name__ == "__main__":
    raise SystemExit(main())
