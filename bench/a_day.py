#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Write docs/a-day.md: a day with the queue, as it is printed, each command really run.

    bench/a_day.py [FILE] [--fake]                  default: docs/a-day.md
    CLAUDE_DIR=.claude-code just bench a_day        with the Claude Code that npm has put there

HOME is a new directory, and the terminal has 80 columns. Claude Code is the real one where there is
one, and what the model says comes from tests/claude_stub on this machine. Without it, or with
--fake, a fake command takes its place, and the document says so. The directory is thrown away at
the end.

exit codes: 0 written; 1 a command did not do what the day needs; 64 usage.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taskqueue import cli, installation  # noqa: E402

STAND_IN = ROOT / "tests/claude_stub/api.py"
COLUMNS, ROWS = 80, 40
# As long as the path that stands for it in the document, so that nothing is cut at another place.
SHOWN_HOME = "/home/user"
STEP_SECONDS = 60
LIMIT_SECONDS = 5

NOTES = """# Harbour notes

The [tide table](tides.md) is right.
The [map of the pier](pier.md) was never drawn.
"""
MEND = "printf '# The pier\\n\\nIt is 80 m long.\\n' >pier.md"
# In Claude's place where there is none: it fires the Stop hooks, or does what a task asks for.
FAKE = """#!{python}
import json, subprocess, sys, time, uuid
from pathlib import Path

answer = json.loads(Path({answer!r}).read_text())
if "--output-format" not in sys.argv:
    settings = json.loads((Path.home() / ".claude/settings.json").read_text())
    payload = {{"session_id": str(uuid.uuid4()), "cwd": str(Path.cwd()), "hook_event_name": "Stop"}}
    for group in settings["hooks"]["Stop"]:
        for hook in group["hooks"]:
            subprocess.run(["sh", "-c", hook["command"]], input=json.dumps(payload).encode())
    print(answer["text"])
    sys.exit()

def say(**what):
    print(json.dumps(what), flush=True)

session = str(uuid.uuid4())
say(type="system", subtype="init", session_id=session, model="fake", cwd=str(Path.cwd()))
if answer["kind"] == "limit":
    resets_at = int(time.time()) + {seconds} + 1
    say(type="rate_limit_event", rate_limit_info={{"status": "rejected", "resetsAt": resets_at}})
    say(type="assistant", error="rate_limit", message={{"content": []}})
    say(type="result", is_error=True, result="You have reached your limit", session_id=session, api_error_status=429)
    sys.exit(1)
for command in answer.get("commands", []):
    call = {{"type": "tool_use", "name": "Bash", "input": {{"command": command}}}}
    say(type="assistant", message={{"content": [call]}})
    subprocess.run(command, shell=True, check=True)
say(type="assistant", message={{"content": [{{"type": "text", "text": answer["text"]}}]}})
say(type="result", is_error=False, result=answer["text"], session_id=session, num_turns=2, total_cost_usd=0.01)
"""


class Failed(Exception):
    """A command did not do what the day needs."""


class Terminal:
    """A terminal of 80 columns, and what is printed in it."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.printed = bytearray()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65_536)
            except OSError:
                return
            self.printed += data

    def take(self) -> str:
        """Return what was printed since this was last asked for."""
        # The reader's thread has what is printed a moment later; it has all when it has this.
        mark = f"[{secrets.token_hex(8)}]".encode()
        os.write(self.slave, mark)
        deadline = time.monotonic() + STEP_SECONDS
        while not self.printed.endswith(mark):
            if time.monotonic() > deadline:
                raise Failed("the terminal prints nothing any more")
            time.sleep(0.005)
        text, self.printed = self.printed[: -len(mark)].decode("utf-8", "replace"), bytearray()
        return text.replace("\r\n", "\n")


class Day:
    """A new HOME, a terminal in it, and the document."""

    def __init__(self, fake: bool) -> None:
        self.fake = fake
        name = secrets.token_hex(8)[: len(SHOWN_HOME) - len("/tmp/")]
        self.home = Path("/tmp", name)
        self.home.mkdir(mode=0o700)
        self.state = self.home / ".claude/automation/lychee/state"
        self.notes, self.api, self.bin = (self.home / name for name in ("notes", ".api", "bin"))
        for directory in (self.notes, self.api, self.bin):
            directory.mkdir()
        self.terminal, self.children, self.text = Terminal(), [], []
        self.env = self.environment()
        self.where = self.home

    def environment(self) -> dict[str, str]:
        """Return what a login shell has, and uv's cache."""
        kept = re.compile(
            "LANG|LC_[A-Z]+|USER|SSL_CERT_.*|NODE_EXTRA_CA_CERTS|(https?|no|all)_proxy", re.I
        )
        env = {name: value for name, value in os.environ.items() if kept.fullmatch(name)}
        uv = installation.find_uv()
        if not uv or not shutil.which("just"):
            raise Failed("uv and just are needed: python3 -m pip install uv rust-just")
        tools = [os.path.dirname(os.path.realpath(uv)), os.path.dirname(shutil.which("just"))]
        node = shutil.which("node")
        tools += [os.path.dirname(node)] if node else []
        path = [
            f"{self.home}/.local/bin",
            str(self.bin),
            *tools,
            "/usr/local/bin",
            "/usr/bin",
            "/bin",
        ]
        cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
        return env | {
            "HOME": str(self.home),
            "PATH": os.pathsep.join(dict.fromkeys(path)),
            "UV_CACHE_DIR": cache.stdout.strip(),
            "TERM": "xterm",
            "NO_COLOR": "1",
        }

    # ---------------------------------------------------------------------------------------- what is written

    def say(self, text: str) -> None:
        """Paragraphs or headings."""
        filled = [textwrap.fill(part, COLUMNS) for part in text.strip().split("\n\n")]
        self.text.append("\n\n".join(filled) + "\n")

    def run(self, *commands: str, until: Callable[[], object] | None = None) -> str:
        """Type commands one after the other, and write down what they print.

        `until` is waited for before, and is not a part of the document: a person would just look
        again.
        """
        if until:
            self.wait(until)
        block, everything = [], ""
        for command in commands:
            printed = self.typed(command)
            everything += printed
            block.append("$ " + command.replace("\n", "\n> ") + "\n" + printed)
        self.text.append(f"```console\n{self.as_shown(''.join(block))}\n```\n")
        return everything

    def as_shown(self, text: str) -> str:
        """Without colours, and with the lines that a terminal of 80 columns makes of long ones."""
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace(str(self.home), SHOWN_HOME)
        lines = [re.sub(rf"(.{{{COLUMNS}}})(?=.)", r"\1\n", line) for line in text.split("\n")]
        return "\n".join(line.rstrip() for line in "\n".join(lines).split("\n")).rstrip()

    def typed(self, command: str) -> str:
        """Return what a command prints; it runs in the last directory, and `cd` goes on."""
        marker = self.home / ".where"
        script = f"{command}\ncode=$?\npwd >'{marker}'\nexit $code"
        done = subprocess.run(
            ["bash", "-c", script],
            env=self.env,
            cwd=self.where,
            stdin=self.terminal.slave,
            stdout=self.terminal.slave,
            stderr=self.terminal.slave,
            timeout=STEP_SECONDS,
        )
        printed = self.terminal.take()
        if done.returncode != 0:
            raise Failed(f"{command}: exit {done.returncode}\n{printed}")
        self.where = Path(marker.read_text().rstrip("\n"))
        return printed

    # ------------------------------------------------------------------------------------- Claude and its model

    def make_claude(self) -> None:
        """Put `claude` on PATH: the real one with a stand-in for its API, or a fake."""
        program = None if self.fake or not STAND_IN.is_file() else find_claude()
        claude = self.bin / "claude"
        self.answer("fine", text="You are welcome.")
        if program is None:
            answer = str(self.api / "answer.json")
            claude.write_text(
                FAKE.format(python=sys.executable, answer=answer, seconds=LIMIT_SECONDS)
            )
            claude.chmod(0o755)
            self.say("Claude Code took no part in this day: a fake command took its place.")
            return
        claude.symlink_to(program)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.children.append(
            subprocess.Popen(
                [sys.executable, STAND_IN, str(port), self.api], start_new_session=True
            )
        )
        self.wait((self.api / "api.pid").exists)
        self.env |= {
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
            # A subscription is told when its limit resets.
            "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-stub",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            # Without it Claude Code refuses to run commands as root, as in a container.
            "IS_SANDBOX": "1",
        }
        self.say(
            "Claude Code is the real one. What the model says comes from a stand-in on this machine."
        )

    def answer(self, kind: str, **how) -> None:
        """Have the model say this from now on."""
        new = self.api / "answer.new"
        new.write_text(json.dumps({"kind": kind, **how}))
        new.replace(self.api / "answer.json")

    # --------------------------------------------------------------------------------------------------- looking

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise Failed("what the day waits for did not happen")
            time.sleep(0.05)

    def rows(self, query: str) -> list[tuple]:
        conn = sqlite3.connect(f"file:{self.state}/tasks.db?mode=ro", uri=True, timeout=10)
        try:
            return conn.execute(query).fetchall()
        finally:
            conn.close()

    def ended(self, where: str) -> Callable[[], object]:
        return lambda: self.rows(f"select 1 from task_history where {where}")

    def close(self) -> None:
        """End the worker that the hook started, and all else; then the directory goes."""
        log = self.state / "logs/worker.notifications.log"
        told = re.findall(r"worker (\d+)-\S+ serves ", log.read_text()) if log.exists() else []
        for number in told:
            try:
                os.kill(int(number), signal.SIGTERM)
            except ProcessLookupError:
                pass
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        deadline = time.monotonic() + 20
        while any(map(lives, map(int, told))) and time.monotonic() < deadline:
            time.sleep(0.05)
        shutil.rmtree(self.home, ignore_errors=True)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def find_claude() -> str | None:
    """The Claude Code in CLAUDE_DIR, in .claude-code of this checkout, or on PATH."""
    for place in filter(None, (os.environ.get("CLAUDE_DIR"), ROOT / ".claude-code")):
        program = Path(place, "node_modules/.bin/claude")
        if program.exists():
            return str(program.resolve())
    return shutil.which("claude")


def the_day(day: Day) -> None:
    """Go through the day, from the morning to the evening."""
    day.say("# A day with the queue")
    day.say(
        "Printed by `just bench a_day`, which runs every command in a new HOME, with 80 columns."
    )
    day.make_claude()

    day.say("## Morning: install\n\nIn a checkout of this repository:")
    day.where = ROOT
    day.run("just install --yes | sed -n '/^files/,/report/p'")
    day.where = day.home

    day.say("## Claude stops, and a link is broken")
    (day.notes / "README.md").write_text(NOTES)
    (day.notes / "tides.md").write_text("# Tides\n\nHigh at noon.\n")
    day.run("cd notes", "claude -p 'I updated the notes. Thank you.'")
    day.say(
        "Claude answered and stopped. Its Stop hook enqueued a link check and started a worker. A second later:"
    )
    day.run("tq list", "tq report", until=day.ended("task_type = 'link_validation'"))

    day.say("## A task for Claude, which waits until it is approved")
    day.answer("tool", commands=[MEND], text="I drew the map of the pier.")
    day.run(
        "tq limit approvals --slots 1",
        "cat >task.json <<END\n"
        '{"prompt": "Mend the links in README.md.", "workspace_path": "$PWD",\n'
        ' "permission_mode": "acceptEdits", "allowed_tools": ["Bash"]}\nEND',
        "tq add approvals claude - --task-id mend-links --hold <task.json",
        "tq list --status held",
        "tq approve mend-links",
        "tq work approvals --then completions --drain",
        "tq logs mend-links",
    )
    if not (day.notes / "pier.md").is_file():
        raise Failed("Claude did not write pier.md")

    day.say(
        "## A usage limit\n\nThe account's limit is reached, here for some seconds. The queue pauses by itself."
    )
    day.answer("limit", seconds=LIMIT_SECONDS, may_retry=False, text="High tide is at noon.")
    day.run(
        'tq add approvals claude \'{"prompt": "When is high tide?"}\' --task-id tide',
        "tq work approvals --then completions --drain",
        "tq list --queue approvals --status pending --status scheduled",
    )
    day.say("When the limit has reset, the task runs. No attempt was counted.")
    paused = (
        "select 1 from task_controls where paused_until > (julianday('now') - 2440587.5) * 86400"
    )
    day.wait(lambda: not day.rows(paused))
    day.answer("fine", text="High tide is at noon.")
    day.run(
        "tq work approvals --then completions --drain",
        "tq wait tide --timeout 1m",
    )

    day.say(
        "## A dead letter, and its retry\n\nA handler of one's own is a copy of `command`. The file\nis not there yet, and one attempt is all that it gets."
    )
    day.run(
        "cp ~/.claude/automation/lychee/handlers/{command,checksum}",
        'tq add files checksum \'{"workspace_path": "\'"$PWD"\'", "file": "log.md"}\'',
        "tq work files --max-attempts 1 --drain",
        "tq list --status failed",
    )
    day.say("The reason is in the list. Once it is mended:")
    day.run(
        "echo 'All is well.' >log.md",
        "tq retry --failed",
        "tq work files --drain",
        "tq list --queue files",
    )

    day.say("## Evening")
    day.run("tq stats", "tq backup ~/tasks.backup", "tq cleanup --keep 0s", "tq doctor | tail -n 1")
    day.say("And all of it as a page, which `--open` shows in the browser:")
    day.run("tq page")
    day.say("![The page on its first day](page-day-one.png)")


def main(argv: list[str]) -> int:
    parser = cli.make_parser("a_day.py", __doc__)
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, default=ROOT / "docs/a-day.md"
    )
    parser.add_argument("--fake", action="store_true", help="do without Claude Code")
    args = parser.parse_args(argv)
    day = None
    try:
        day = Day(args.fake)
        the_day(day)
        args.file.write_text("\n".join(day.text))
        return 0
    except (Failed, OSError, subprocess.TimeoutExpired, sqlite3.Error) as error:
        print("\n".join(day.text if day else ()), f"a_day.py: {error}", sep="\n", file=sys.stderr)
        return 1
    finally:
        if day:
            day.close()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
