"""A stand-in for `claude`: it prints the lines that a test puts beside it.

The lines of the real client are recorded in the tests that use it; what the real client can be
brought to quickly is tested with that.
"""

from __future__ import annotations

import json
from pathlib import Path

from claude_stub.task import Task

# It notes how it was called, and then says the lines that the test put beside it.
FAKE = """#!/bin/sh
n=$(($(cat "$HOME/count" 2>/dev/null || echo 0) + 1))
echo $n >"$HOME/count"
printf '%s\\0' "$@" >"$HOME/call-$n.args"
cat >"$HOME/call-$n.stdin"
pwd >"$HOME/call-$n.cwd"
cat "$HOME/says"
cat "$HOME/errors" >&2
if [ -e "$HOME/then" ]; then exec sh "$HOME/then"; fi
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
        """Have it go on with this, in the shell, instead of ending."""
        (self.home / "then").write_text(script)

    def task(self, **data) -> Task:
        return Task(self.home, self.env, **{"prompt": "Do it.", **data})

    def calls(self) -> list[tuple[list[str], str, str]]:
        """Return the arguments, stdin and directory of each call."""
        calls = []
        while (file := self.home / f"call-{len(calls) + 1}.cwd").exists():
            args = file.with_suffix(".args").read_text().split("\0")[:-1]
            calls.append((args, file.with_suffix(".stdin").read_text(), file.read_text()[:-1]))
        return calls
