"""A stand-in for `claude`: it prints the lines that a test puts beside it.

The lines of the real client are recorded in the tests that use it; what the real client can be
brought to quickly is tested with that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from claude_stub.task import Task

# It notes how it was called, and then says what the test put beside it.
FAKE = f"""#!{sys.executable}
import json, os, sys
home = os.environ["HOME"]
with open(home + "/calls", "a") as file:
    print(json.dumps([sys.argv[1:], sys.stdin.read(), os.getcwd()]), file=file)
sys.stdout.buffer.write(open(home + "/says", "rb").read())
sys.stdout.flush()
os.write(2, open(home + "/errors", "rb").read())
if os.path.exists(home + "/then"):
    os.execv("/bin/sh", ["sh", home + "/then"])
"""
INIT = {"type": "system", "subtype": "init", "session_id": "s"}
DONE = {
    "type": "result",
    "is_error": False,
    "result": "Done.",
    "session_id": "s",
    "num_turns": 1,
    "total_cost_usd": 0.5,
}


class Fake:
    def __init__(self, directory: Path) -> None:
        self.home, self.workspace = directory, directory / "workspace"
        (directory / "bin").mkdir()
        self.workspace.mkdir()
        self.program = directory / "bin/claude"
        self.program.write_text(FAKE)
        self.program.chmod(0o755)
        self.env = {"HOME": str(directory), "PATH": f"{directory}/bin:/usr/bin:/bin"}
        self.says(INIT, DONE)

    def says(self, *lines: dict | bytes, errors: bytes = b"") -> None:
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (self.home / "says").write_bytes(b"".join(line + b"\n" for line in raw))
        (self.home / "errors").write_bytes(errors)

    def then(self, script: str) -> None:
        """What it goes on with, in the shell, instead of ending."""
        (self.home / "then").write_text(script)

    def task(self, **data) -> Task:
        return Task(self.home, self.env, **{"prompt": "Do it.", **data})

    def calls(self) -> list:
        file = self.home / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
