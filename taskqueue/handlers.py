"""Find the handler of a task, start it through a supervisor, and keep what it prints."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import pwd
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import queue_helpers as q
from taskqueue import environment, runs
from taskqueue import outcome as outcomes
from taskqueue.cli import duration
from taskqueue.remedies import remedies_as_typed
from taskqueue.serving import default_handlers
from taskqueue.supervisor import SupervisorProcess, handler_environment
from taskqueue.text import sh, visible

# A task without a handler that can be started is tried again after so many seconds. Each time is a
# failed attempt, so that it ends as a dead letter, which people are told of.
NO_HANDLER_SECONDS = 60.0
# What could not be started by no fault of its handler is tried again after so many seconds.
START_AGAIN_SECONDS = 5.0
NOT_STARTED = "its handler could not be started"
# What env and shells exit with when there is no such program.
EXIT_NOT_FOUND = 127

# What each handler is told in its environment.
TOLD = ("TASK_ID", "TASK_TYPE", "TASK_QUEUE", "TASK_ATTEMPT", "TASK_DEPTH", "TASK_QUEUE_STATE")


class Unstarted(NamedTuple):
    """Why a handler was not started, and what is to be done with its task.

    do is "retry" (the attempt counts), "put back" (it does not) or "bury". The next attempt is made
    after `delay` seconds; None: after the task's back-off.
    """

    do: str
    error: str
    delay: float | None = None


class Handlers:
    """The handlers of one process: it starts them, and hears of their ends.

    To be made while the process has one thread, and nothing open that a child must not have.
    """

    def __init__(
        self,
        state: Path,
        env: dict[str, str],
        directory: Path,
        *,
        command: list[str] | None,
        timeout: float,
        kill_after: float,
    ) -> None:
        """`command` runs every task type; None: the executable in `directory` that bears its name."""
        self.state, self.logs, self.directory = state, f"{state}/logs", os.path.abspath(directory)
        self.timeout, self.kill_after = timeout, kill_after
        self.overdue = f"{q.TIMED_OUT} {timeout:g}"
        self.command, self.env = command, env
        try:
            self.cwd = os.getcwd()
        # The working directory was removed while this process was in it.
        except OSError:
            self.cwd = os.path.expanduser("~")
        # What runs, by run name.
        self.runs: dict[str, q.Task] = {}
        self.supervisor = SupervisorProcess(env)

    def start(self, task: q.Task) -> Unstarted | None:
        """Start the handler of a claimed task; None when it is under way."""
        try:
            envelope, command = task.envelope, self.command_for(task.task_type)
            workspace, text = envelope["data"].get("workspace_path"), json.dumps(envelope)
            env = self.environment(task, command[0])
        except LookupError as error:
            return Unstarted("retry", str(error), NO_HANDLER_SECONDS)
        # Whatever a writer that checks nothing has stored is that task's matter.
        except Exception as error:
            return Unstarted("bury", f"it cannot be run: {error}")
        if workspace is None:
            directories = [self.cwd, "/"]
        elif isinstance(workspace, str) and workspace:
            directories = [os.path.join(self.cwd, workspace)]
        else:
            return Unstarted(
                "retry", f"cannot run in {workspace!r}: workspace_path is not a directory"
            )
        order = {"run": task.run_name, "command": command, "cwd": directories, "timeout": self.timeout,
                 "env": env, "kill_after": self.kill_after, "overdue": self.overdue,
                 "record": runs.run_file(self.state, task)}  # fmt: skip
        fds: list[int] = []
        try:
            fds.append(stdin_file(text.encode()))
            # These locks are held until the handler and whatever it leaves behind are gone.
            for path in (f"{self.logs}/{task.run_name}.out", f"{self.logs}/{task.run_name}.err"):
                fds.append(new_file(path, locked=True))
            os.close(new_file(order["record"], locked=False))
            # A handler may stop the supervisor before that has written down anything.
            supervisor = (self.supervisor.pid, self.supervisor.started)
            runs.add_to_run(order["record"], supervisor=supervisor)
            self.supervisor.start(order, fds)
            self.runs[task.run_name] = task
        # The disk is full, there are too many files, …: not the task's fault.
        except OSError as error:
            why = with_remedy(error, self.state) if isinstance(error, PermissionError) else error
            return Unstarted("put back", f"{NOT_STARTED}: {why}", START_AGAIN_SECONDS)
        finally:
            for fd in fds:
                os.close(fd)
        return None

    def command_for(self, task_type: str) -> list[str]:
        """What to run. LookupError when there is no handler for the task type."""
        if self.command is not None:
            return self.command
        handler = f"{self.directory}/{task_type}"
        if "/" in task_type or task_type.startswith("."):
            raise ValueError(f"there can be no handler {task_type!r}")
        missing = f"{outcomes.NO_HANDLER} {task_type!r} in {self.directory}"
        if not os.path.isfile(handler):
            raise LookupError(
                f"{missing}: put an executable of that name there, then retry the task"
            )
        if not os.access(handler, os.X_OK):
            raise LookupError(
                f"{missing}: the file is not executable; chmod +x it, then retry the task"
            )
        return [handler]

    def environment(self, task: q.Task, program: str) -> dict[str, str]:
        """What a handler is told beside the worker's environment. LookupError: no Python fits it."""
        values = (task.task_id, task.task_type, task.queue, task.attempts, task.depth + 1)
        told = dict(zip(TOLD, map(str, (*values, self.state)), strict=True))
        return told | {"UV_PYTHON": environment.python_for(program, self.env)}

    def hear(self) -> list[tuple[q.Task, dict | Unstarted]]:
        """The tasks whose handlers have ended, with {"code", "why", "seconds"}, or were not
        started.

        Raises EOFError when the supervisor was killed: then start_afresh().
        """
        ended: list[tuple[q.Task, dict | Unstarted]] = []
        for one in self.supervisor.hear():
            task = self.runs.pop(one["run"])
            fault = self.fault_of_handler(task, one)
            if "code" in one:
                ended.append((task, one if fault is None else {**one, "why": fault}))
            elif one["do"] == "fail":
                ended.append((task, Unstarted("retry", one["error"])))
            elif fault:
                ended.append((task, Unstarted("retry", fault, NO_HANDLER_SECONDS)))
            else:
                delay = START_AGAIN_SECONDS if one["do"] == "put back" else None
                ended.append((task, Unstarted(one["do"], f"{NOT_STARTED}: {one['error']}", delay)))
        return ended

    def fault_of_handler(self, task: q.Task, told: dict) -> str | None:
        """What is wrong with the file of a handler that was not started, or whose interpreter env
        did not find.
        """
        not_found = told.get("code") == EXIT_NOT_FOUND and told["why"] is None
        if self.command is not None or not (not_found or told.get("do") == "put back"):
            return None
        try:
            fault = fault_of(f"{self.directory}/{task.task_type}", self.env["PATH"])
        except OSError:
            return None
        return fault and f"its handler {fault[0]}; {fault[1]}"

    def start_afresh(self) -> NoReturn:
        """The supervisor was killed, and nobody will hear how its handlers end: begin anew, and
        recovery sees to them.

        The process stays the same for whoever started it. What it had claimed is a dead owner's
        from here on.
        """
        say("the supervisor of handlers was killed; starting afresh")
        os.execv(sys.executable, sys.orig_argv)

    def end_all(self, why: str, *, now: bool = False) -> None:
        """End whatever runs."""
        for run in self.runs:
            self.supervisor.end(run, why, now=now)

    def children_changed(self, *_) -> None:
        """Hear of the supervisor, and reap what else became our child: all orphans, as process 1 of
        a container.
        """
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.supervisor.pid:
                self.supervisor.changed(status)

    def leave(self) -> None:
        """Let the supervisor end. Whatever runs is ended first."""
        self.end_all(q.STOPPED, now=True)
        self.supervisor.leave(wait=not self.runs)
        # Unless something is in it that is not recorded.
        try:
            os.rmdir(runs.run_directory(self.state, q.owner_name(self.state)))
        except (q.QueueError, OSError):
            pass


def fault_of(handler: Path | str, path: str) -> tuple[str, str] | None:
    """What an executable file has that keeps it from being started, and what mends it; None for
    nothing.

    `path` is the PATH on which its interpreter is looked for. Raises OSError.
    """
    with open(handler, "rb") as file:
        first = file.readline(512)
    words = first[2:].decode("utf-8", "replace").split()
    if not first.startswith(b"#!") or not words:
        # A program in machine code has zeros.
        is_text = b"\0" not in first
        remedy = "begin it with one, like #!/bin/sh"
        return ("names no interpreter in its first line", remedy) if is_text else None
    if first.endswith(b"\r\n"):
        remedy = f"sed -i 's/\\r$//' {sh(handler)}"
        return "has Windows line ends: its interpreter is not found", remedy
    program = words[0]
    if os.path.basename(program) == "env":
        named = (word for word in words[1:] if not word.startswith("-") and "=" not in word)
        program = next(named, program)
    if shutil.which(program, path=path):
        return None
    remedy = f"install {os.path.basename(program)}, or mend the first line"
    return f"needs {program}, which is not there", remedy


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ValueError
    return value


# fmt: off
def add_run_options(add: Callable, script: str) -> None:
    """The options of whoever runs handlers."""
    add("--handlers", metavar="DIR", type=Path, default=default_handlers(script),
        help="executables named after task types (default: %(default)s)")
    add("--concurrency", metavar="N", type=count,
        help="tasks at a time, all queues together; each queue has a place of its own (default: one for each queue)")
    add("--max-attempts", metavar="N", type=count, default=q.MAX_ATTEMPTS,
        help="then it is a dead letter (default %(default)s)")
    add("--backoff", metavar="DURATION", type=duration, default=q.BACKOFF_SECONDS,
        help="before the second attempt, doubling with each one after, an hour at most (default %(default)s)")
    add("--timeout", metavar="DURATION", type=duration, default=0.0,
        help="for one attempt (default 0: none)")
    add("--grace", metavar="DURATION", type=duration, default=10.0,
        help="for handlers to finish when stopped (default 10)")
    add("--kill-after", metavar="DURATION", type=duration, default=5.0,
        help="from TERM to KILL (default 5)")
# fmt: on


def check_run_options(args: argparse.Namespace, command: list[str] | None) -> None:
    """Set args.command, resolved, and args.env, the handlers' environment. Raises ValueError."""
    # The hub's URL may hold a password.
    args.env = handler_environment(os.environ, without=(*TOLD, "TASK_QUEUE_HUB"))
    args.command = None if command is None else resolve(command, args.env["PATH"])
    args.concurrency = args.concurrency or len(args.queues)
    if command is None and not args.handlers.is_dir():
        raise ValueError(f"--handlers {args.handlers}: there is no such directory")


def resolve(command: list[str], path: str) -> list[str]:
    """The command with the absolute path of its program: from here on nobody's working directory
    has a say in it.
    """
    if not command:
        raise ValueError("the command is empty: give a program and its arguments")
    name = os.path.abspath(command[0]) if "/" in command[0] else command[0]
    found = shutil.which(name, path=path)
    if found is None:
        raise ValueError(f"{command[0]}: there is no such program, or it is not executable")
    return [found, *command[1:]]


def start_clean() -> None:
    """Make up for closed streams, whose numbers other files would get, and for blocked signals."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def with_remedy(error: Exception, state: Path) -> str:
    """What an error says, and if something in the state belongs to another user: what, whose it is,
    and what mends it.

    Commands are named as people type them.
    """
    said = remedies_as_typed(str(error))
    me = os.geteuid()
    below = ("*", "workers/*", "logs/*", "runs/*", "spool/*")
    for path in [state, *(path for pattern in below for path in state.glob(pattern))]:
        try:
            owner = os.stat(path, follow_symlinks=False).st_uid
        except OSError:
            continue
        # root may use everybody's files.
        if me not in (0, owner):
            them, us = user(owner), user(me)
            return (
                f"{said}; {path} belongs to {them}, not to {us}: a worker ran as {them}, perhaps by sudo;"
                f" give all of it back with: sudo chown -R {us} {shlex.quote(str(state))}"
            )
    return said


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def stdin_file(raw: bytes) -> int:
    """A file for a handler's stdin, in memory where that can be had. No pipe: nothing blocks that
    is not read.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("task")
    else:
        import tempfile

        fd = os.dup(tempfile.TemporaryFile().fileno())
    # pwrite leaves the position at 0.
    if os.pwrite(fd, raw, 0) < len(raw):
        os.close(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fd


def new_file(path: str, locked: bool) -> int:
    """A new file of a run, in a directory that is made if it is missing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileNotFoundError:
        directory = Path(path).parent
        q.make_private(directory.parent)
        q.make_private(directory)
        fd = os.open(path, flags, 0o600)
    if locked:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def say(line: str) -> None:
    """One line on stderr, in one piece; a closed terminal or a full disk is no reason to stop
    working.
    """
    try:
        os.write(
            2,
            (time.strftime("%Y-%m-%d %H:%M:%S ") + visible(" ".join(line.split())) + "\n").encode(),
        )
    except OSError:
        pass
