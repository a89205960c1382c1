"""A claude task, given to the handler as a worker gives it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from unittest import mock

from conftest import ROOT, end

PROMPT = "Paint the harbour's lighthouse red."
HANDLER = str(ROOT / "handlers/claude")


@functools.cache
def load_handler():
    """Return handlers/claude as a module."""
    loader = SourceFileLoader("claude_handler", HANDLER)
    module = module_from_spec(spec_from_loader("claude_handler", loader))
    loader.exec_module(module)
    return module


class Task:
    """`within` is the beginning of the handler's command."""

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
        command = [*self.within, sys.executable, HANDLER]
        process = subprocess.Popen(command, env=(env or self.clean) | self.env, cwd="/", stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
        process.stdin.write(json.dumps(self.envelope).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def run(self, env: dict | None = None) -> subprocess.CompletedProcess:
        """Run the handler to its end."""
        return self.ended(self.start(env))

    def ended(self, process: subprocess.Popen) -> subprocess.CompletedProcess:
        """Wait for the end of a handler."""
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            end(process)
        return subprocess.CompletedProcess((), process.returncode, stdout.decode(), stderr.decode())

    def call(self, env: dict | None = None) -> subprocess.CompletedProcess:
        """Call the handler's main() in this process: sooner than run(), and otherwise the same."""
        streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8") for name in ("stdout", "stderr")}
        stdin = io.TextIOWrapper(io.BytesIO(json.dumps(self.envelope).encode()))
        environment = mock.patch.dict(os.environ, (env or self.clean) | self.env, clear=True)
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with environment, mock.patch.multiple(sys, stdin=stdin, **streams), contextlib.chdir("/"):
            try:
                code = load_handler().main([])
            finally:
                for number, action in before.items():
                    signal.signal(number, action)
            said = []
            for stream in streams.values():
                stream.flush()
                said.append(stream.buffer.getvalue().decode())
        return subprocess.CompletedProcess((), code, *said)
