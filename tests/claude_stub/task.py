"""A claude task, run by the handler alone as a worker would run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, end

PROMPT = "Paint the harbour's lighthouse red."


class Task:
    """`within` is what its command begins with."""

    def __init__(self, directory: Path, env: dict, within: tuple = (), **data) -> None:
        self.state, self.clean, self.within = directory / "state", env, within
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.envelope = {
            "task_id": "t-1",
            "task_type": "claude",
            "enqueued_at": "2026-11-26 09:00:00.000",
            "data": data,
        }
        self.env = {
            "TASK_QUEUE": "approvals",
            "TASK_ID": "t-1",
            "TASK_QUEUE_STATE": str(self.state),
            "TASK_DEPTH": "1",
        }

    def start(self, env: dict | None = None) -> subprocess.Popen:
        """Start the handler, in a group of its own."""
        command = [*self.within, sys.executable, ROOT / "handlers/claude"]
        process = subprocess.Popen(command, env=(env or self.clean) | self.env, cwd="/", stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
        process.stdin.write(json.dumps(self.envelope).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, env: dict | None = None, timeout: float = 60) -> subprocess.CompletedProcess:
        """Run the handler to its end."""
        process = self.start(env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            end(process)
        return subprocess.CompletedProcess((), process.returncode, stdout.decode(), stderr.decode())
