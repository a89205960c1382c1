#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Show the whole way of a task, from a Stop hook's payload to the result on the completions queue,
step by step.

Everything is real: enqueue.py as a hook, an idle worker.py, handlers/link_validation and lychee.
The state directory and the workspace are thrown away at the end; nothing of yours is touched.

examples:
  just demo
  uv run --script demo.py
  uv run --script demo.py | tail -n 1 | python3 -m json.tool      the last line is the completion's payload

exit codes: 0 every step happened; 1 one did not, within 30 s; 64 usage.
"""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from taskqueue import cli, installation

HERE = Path(__file__).resolve().parent
# Each step may take so long.
STEP_SECONDS = 30
# The first time, uv downloads lychee: 75 MB.
WARM_SECONDS = 900
# A worker sleeps long before that. It is waited for so long where nobody can see it.
ASLEEP_SECONDS = 1
# Children have so long to end by themselves; a worker gives its handlers 5 seconds.
END_SECONDS = 8
POLL_SECONDS = 0.002
STOPS = (signal.SIGTERM, signal.SIGINT)

README = """# Harbour notes

The [tide table](tides.md) is right.
The [map of the pier](pier.md) was never drawn.
"""


class Failed(Exception):
    """A step did not happen; the message says which, and what is known."""


def main(argv: Sequence[str] | None = None) -> int:
    cli.make_parser("demo.py", __doc__).parse_args(argv)
    return perform(Demo)


def perform(make: "type[Demo]") -> int:
    """Give a demonstration in a directory that is removed at its end; the exit code."""
    # An exit runs the clean-up below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="task-queue-demo-") as directory:
        demo = make(Path(directory).resolve())
        try:
            demo.run()
        except (Failed, OSError, sqlite3.Error) as error:
            print(f"demo: {error}", file=sys.stderr)
            print(demo.worker_log(), end="", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 1
        finally:
            demo.end_children()
    return 0


class Demo:
    """One demonstration in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.started = time.monotonic()
        self.state, self.workspace, self.handlers = (
            directory / "state",
            directory / "workspace",
            HERE / "handlers",
        )
        self.log = directory / "worker.log"
        self.worker: subprocess.Popen | None = None
        self.children: list[subprocess.Popen] = []
        self.uv = installation.find_uv()
        # Whatever this was started from may have set these.
        names = ("TASK_", "LYCHEE_", "CLAUDE", "ANTHROPIC_")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(names)
        }
        self.environment["TASK_QUEUE_STATE"] = str(self.state)
        # The handler's first line asks PATH for uv.
        if self.uv:
            self.environment["PATH"] = os.pathsep.join(
                [os.path.dirname(self.uv), os.environ.get("PATH", os.defpath)]
            )

    def run(self) -> None:
        self.warm()
        self.make_workspace()
        self.start_worker()
        hook_ms = self.fire_hook()
        # Hook and worker run by themselves from here on: these wait for what they do, and say when
        # it was.
        claimed = self.wait_for(
            "no worker claimed the task",
            self.first(
                "select * from task_queue where queue = 'notifications' and started_at is not null"
            ),
        )
        self.say(
            f"task queued: {claimed['task_type']} {claimed['task_id']} (hook: {hook_ms:.0f} ms, exit 0, no output)"
        )
        self.say(
            f"worker woken {milliseconds(claimed['enqueued_at'], claimed['started_at'])} ms after the task was enqueued"
        )
        done = self.wait_for(
            "the handler did not finish",
            self.first("select * from task_history where queue = 'notifications'"),
        )
        if done["status"] != "completed":
            raise Failed(f"the task ended as {done['status']}: {done['error']}")
        summary = json.loads(done["result"])
        if (summary["successful"], summary["failed"]) != (1, 1):
            raise Failed(f"the handler found {summary}, not one good and one broken link")
        link = summary["broken"][0]
        took = milliseconds(done["started_at"], done["completed_at"])
        self.say(
            f"broken link found: {link['file']}:{link['line']} -> {os.path.basename(link['url'])} ({took} ms, real lychee)"
        )
        waiting = self.wait_for(
            "nothing came to completions",
            self.first("select * from task_queue where queue = 'completions'"),
        )
        self.say(
            f"completion queued: {waiting['task_type']} {waiting['task_id']} is {waiting['status']} on completions"
        )
        print(json.dumps(json.loads(waiting["data"])["data"]), flush=True)

    # ---------------------------------------------------------------------------------------------------------- steps

    def warm(self) -> None:
        """Have uv fetch what the scripts need, so that the times below are the scripts' own."""
        scripts = [HERE / "enqueue.py", HERE / "worker.py", self.handlers / "link_validation"]
        missing = [str(script) for script in scripts if not script.is_file()]
        if missing:
            raise Failed(f"{' and '.join(missing)} missing: run this from a whole checkout")
        for process in [
            self.start(script, "--help", stdout=subprocess.DEVNULL) for script in scripts
        ]:
            try:
                code = process.wait(WARM_SECONDS)
            except subprocess.TimeoutExpired:
                raise Failed(
                    f"what the scripts need was not downloaded within {WARM_SECONDS} s"
                ) from None
            if code != 0:
                raise Failed("a script could not be started; what it says is above")
        if not self.uv:
            self.handlers = self.handlers_without_uv()
        self.say(
            "scripts are ready to run" + ("" if self.uv else " (by this Python: there is no uv)")
        )

    def handlers_without_uv(self) -> Path:
        """A handlers directory whose link_validation is run by this Python."""
        directory = self.log.parent / "handlers"
        directory.mkdir()
        stand_in = directory / "link_validation"
        stand_in.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{self.handlers}/link_validation"\n'
        )
        stand_in.chmod(0o755)
        return directory

    def make_workspace(self) -> None:
        self.workspace.mkdir()
        (self.workspace / "README.md").write_text(README)
        (self.workspace / "tides.md").write_text("# Tides\n\nHigh at noon.\n")
        self.say("workspace made: README.md with one good link and one broken link")

    def start_worker(self) -> None:
        with self.log.open("wb") as log:
            self.worker = self.start(
                HERE / "worker.py",
                "notifications",
                "--handlers",
                str(self.handlers),
                "--then",
                "completions",
                "--grace",
                "0",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_for("the worker did not get ready", self.worker_serves)
        asleep_by = time.monotonic() + ASLEEP_SECONDS
        self.wait_for(
            "the worker did not fall asleep",
            lambda: self.worker_hears() or time.monotonic() > asleep_by,
        )
        self.say("worker started: worker.py notifications --then completions; it sleeps")

    def fire_hook(self) -> float:
        """Do what Claude Code does when it stops; how long it was held up, in ms."""
        payload = {
            "session_id": str(uuid.uuid4()), "transcript_path": str(self.workspace / "transcript.jsonl"),
            "cwd": str(self.workspace), "permission_mode": "acceptEdits", "hook_event_name": "Stop",
            "stop_hook_active": False, "last_assistant_message": "I updated the notes.", "background_tasks": [],
        }  # fmt: skip
        self.say(
            'hook payload in: {"hook_event_name": "Stop", "cwd": …} to enqueue.py --hook notifications link_validation'
        )
        before = time.monotonic()
        hook = self.start(
            HERE / "enqueue.py",
            "--hook",
            "notifications",
            "link_validation",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, err = hook.communicate(json.dumps(payload).encode(), timeout=STEP_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"the hook did not return within {STEP_SECONDS} s") from None
        if hook.returncode != 0 or out or err:
            raise Failed(
                f"the hook ended with exit {hook.returncode} and said {(out + err).decode()!r}"
            )
        return (time.monotonic() - before) * 1000

    # ---------------------------------------------------------------------------------------------------------- tools

    def start(self, script: Path, *arguments: str, **options) -> subprocess.Popen:
        """Run a script in a process group of its own, so that all of it can be ended."""
        runner = [self.uv, "run", "--script"] if self.uv else [sys.executable]
        # A stop in between would leave a child that nobody knows of.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            child = subprocess.Popen(
                [*runner, str(script), *arguments],
                env=self.environment,
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS),
                **options,
            )  # noqa: PLW1509
            self.children.append(child)
            return child
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def say(self, what: str) -> None:
        print(f"{(time.monotonic() - self.started) * 1000:6.0f} ms  {what}", flush=True)

    def wait_for(self, otherwise: str, look: Callable):
        """What look() returns once that is true; Failed when it is not in STEP_SECONDS, or when the
        worker is gone.
        """
        deadline = time.monotonic() + STEP_SECONDS
        while not (found := look()):
            if self.worker.poll() is not None:
                raise Failed(
                    f"{otherwise}: the worker ended with exit {self.worker.returncode} and said:"
                )
            if time.monotonic() > deadline:
                raise Failed(f"{otherwise} within {STEP_SECONDS} s; the worker said:")
            time.sleep(POLL_SECONDS)
        return found

    def first(self, query: str) -> Callable:
        """A look at the first row of a query, as a dict; None while there is none."""
        conn = sqlite3.connect(
            f"{(self.state / 'tasks.db').as_uri()}?mode=ro", uri=True, isolation_level=None
        )
        conn.row_factory = sqlite3.Row

        def look() -> dict | None:
            row = conn.execute(query).fetchone()
            if row:
                conn.close()
            return dict(row) if row else None

        return look

    def worker_serves(self) -> int:
        """The worker's process number once it says that it serves the queue, else 0."""
        said = re.search(r"worker (\d+)-\S+ serves ", self.worker_log())
        return int(said[1]) if said else 0

    def worker_hears(self) -> bool:
        """Whether the worker is told of writes to the state directory: it sleeps, and its wake can
        be timed.
        """
        # So Linux lists the watches of inotify; other systems do not.
        watched = f" ino:{os.stat(self.state).st_ino:x} "
        try:
            return any(
                watched in file.read_text()
                for file in Path(f"/proc/{self.worker_serves()}/fdinfo").iterdir()
            )
        except OSError:
            # A file was opened or closed while we read.
            return False

    def worker_log(self) -> str:
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def end_children(self) -> None:
        """End what was started and is still there; nothing writes into the directory any more when
        this returns.
        """
        for stop in STOPS:
            # The clean-up takes seconds at most, and is not to be interrupted.
            signal.signal(stop, signal.SIG_IGN)
        alive = [child for child in self.children if child.poll() is None]
        for child in alive:
            # uv passes the signal on, and the worker ends its handlers.
            child.terminate()
        deadline = time.monotonic() + END_SECONDS
        for child in alive:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            while has_members(child.pid) and time.monotonic() < deadline + END_SECONDS:
                # A zombie is a member of its group, too.
                child.poll()
                time.sleep(POLL_SECONDS)


def has_members(group: int) -> bool:
    """Kill what is left of a process group; whether there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
        return True
    except (ProcessLookupError, PermissionError):
        # macOS says the latter of zombies.
        return False


def milliseconds(start: str, end: str) -> int:
    """From one UTC text of the history to another."""
    with sqlite3.connect(":memory:") as conn:
        return round(
            conn.execute(
                "select (julianday(?) - julianday(?)) * 86400000", (end, start)
            ).fetchone()[0]
        )


if __name__ == "__main__":
    raise SystemExit(main())
