"""Tell a person at once: run the commands of --on-dead and --notify with the news of a worker.

Each command runs once a minute at most; news that come meanwhile go with the next run. Nobody waits
for a command, and one that still runs when the next is due is ended.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import queue_helpers as q
from taskqueue import cli, environment, service
from taskqueue.cli import Refused, flag, option, takes
from taskqueue.outcome import Outcome
from taskqueue.running import resolve, say, stdin_file
from taskqueue.supervisor import RESET_SIGNALS, process
from taskqueue.text import one_line

# A command runs this often at most.
TELL_SECONDS = 60.0
# The lines and characters of TASK_QUEUE_TEXT; stdin has everything.
LINES, LINE_CHARACTERS = 10, 200
# The names of a command and of the task types in the environment of workers.
COMMAND, DONE_TYPES = "TASK_QUEUE_NOTIFY", "TASK_QUEUE_NOTIFY_DONE"
EXAMPLE = {
    "event": "failed",
    "queue": "notifications",
    "task_id": "example",
    "task_type": "example",
    "attempts": 4,
    "error": "this is a test",
}


def program(text: str, path: str) -> list[str]:
    """Return the command in a text, its program found on `path`. Raises ValueError."""
    first, *rest = shlex.split(text) or [""]
    return resolve([os.path.expanduser(first), *rest], path)


def news_of(told: dict, outcome: Outcome, done_types: Collection[str]) -> list[dict]:
    """Return what a person is told of a task's end: a failure, a question, a result that waits."""
    news, status = [], outcome.status
    if status in ("failed", "held"):
        news.append({"event": status, **told})
    if status == "completed" and told["task_type"] in done_types:
        from taskqueue.show import summary

        news.append({"event": "done", **told, "summary": summary(outcome.result)})
    for queue, row in outcome.follow_ups:
        if row.status == q.SCHEDULED and row.due_at is None:
            which = {"queue": queue, "task_id": row.task_id}
            which["task_type"] = json.loads(row.data)["task_type"]
            reason = f"the result of {told['task_id']}"
            news.append({"event": "held", **which, "attempts": 0, "error": reason})
    return news


def line_of(event: Mapping) -> str:
    """Return an event as a person reads it: "approvals: mend failed: no such file"."""
    if "task_id" in event:
        what = f"{event['task_type']} {event['task_id']} {event['event']}"
    else:
        what = event["event"]
    why = event.get("error") or event.get("reason") or event.get("summary")
    return one_line(f"{event['queue']}: {what}{f': {why}' if why else ''}", LINE_CHARACTERS)


def text_of(events: Sequence[Mapping]) -> str:
    """Return the lines of the events; the last says how many more there are."""
    lines = [line_of(event) for event in events[:LINES]]
    if more := len(events) - LINES:
        lines += [f"and {more} more"] if more > 0 else []
    return "\n".join(lines)


def with_text(events: Sequence[Mapping], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the command: it can show TASK_QUEUE_TEXT without reading JSON."""
    return {**environ, "TASK_QUEUE_TEXT": text_of(events)}


class Teller:
    """A command, and the news that it is still to be told."""

    def __init__(self, option: str, command: list[str] | None, environ: dict[str, str]) -> None:
        """Without a command, nothing is told."""
        self.option, self.command, self.environ = option, command, environ
        self.news: list[dict] = []
        self.due_at = 0.0
        # The process id of the last run, and when that process was started.
        self.last: tuple[int, str] | None = None

    def add(self, **news) -> None:
        if self.command:
            self.news.append(news)

    def tell(self, now: bool = False) -> None:
        """Run the command if there are news and it is due, or `now`; do not wait for it."""
        is_due = time.monotonic() >= self.due_at
        if not (self.command and self.news and (now or is_due)):
            return
        if is_due:
            self._end_last()
        news, self.news = self.news, []
        self.due_at = time.monotonic() + TELL_SECONDS
        try:
            self._run(self.command, news)
        # The program was removed, or the machine has no room for one more process.
        except OSError as error:
            say(f"{self.option} could not be run: {error}")

    def _run(self, command: list[str], news: list[dict]) -> None:
        fd = stdin_file(json.dumps(news).encode())
        try:
            pid = os.posix_spawn(
                command[0],
                command,
                with_text([{"event": "failed"} | each for each in news], self.environ),
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, 2, 1)],
                setsid=True,
                setsigmask=(),
                setsigdef=RESET_SIGNALS,
            )
        finally:
            os.close(fd)
        self.last = (pid, (process(pid) or ("", ""))[1])

    def _end_last(self) -> None:
        """End a run that hangs: there would be one more of them each minute."""
        pid, started = self.last or (0, "")
        found = process(pid) if started else None
        if found and found[1] == started and found[0] != "Z":
            say(f"{self.option} still runs after {TELL_SECONDS:g} s: it is ended")
            os.killpg(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------- tq notify


@takes(
    option("line", metavar="COMMAND", nargs="?", type=cli.some_text,
           help=f"(default: {COMMAND} of the installation's environment file)"),
    flag("--test", help="run it with an example, and show how it ends"),
)  # fmt: skip
def notify(line: str | None, test: bool, as_json: bool) -> int:
    """Show the command by which workers tell you at once what failed, is held or paused, or test
    it."""
    file = service.environment_file(Path(q.__file__).resolve().parent)
    try:
        environ = environment.of_worker(file) if file.exists() else dict(os.environ)
        line = line or environ.get(COMMAND) or os.environ.get(COMMAND)
        if not line:
            raise Refused(f"no command is set: write {COMMAND}=COMMAND into {file}")
        command = program(line, environ["PATH"])
    except ValueError as error:
        raise Refused(str(error)) from None
    if not test:
        cli.report(as_json, {"command": line}, line)
        return 0
    code, seconds = run_example(command, environ)
    ended = f"exit {code}" if code is not None else f"it did not end within {TELL_SECONDS:g} s"
    told = {"command": line, "exit_code": code, "seconds": round(seconds, 3)}
    cli.report(as_json, told, f"{line}: {ended}, after {seconds:.1f} s")
    return 0 if code == 0 else cli.EX_FAILED


def run_example(command: list[str], environ: Mapping[str, str]) -> tuple[int | None, float]:
    """Run the command with an example; return its exit code (None: it hung) and its seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=with_text([EXAMPLE], environ),
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )
    code = None
    try:
        process.communicate(json.dumps([EXAMPLE]).encode(), TELL_SECONDS)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, time.monotonic() - began
