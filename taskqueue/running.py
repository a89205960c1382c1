"""Run the handlers of tasks: find them, start them through a supervisor, and keep their output.

The record of a run is STATE_DIR/runs/OWNER/RUN (see supervisor.py for its lines); its output is
STATE_DIR/logs/RUN.out and RUN.err. They lie apart, so that emptying one of the two directories does
not make a running handler invisible.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import queue_helpers as q
from taskqueue import environment
from taskqueue import outcome as outcomes
from taskqueue.supervisor import (
    NOT_STARTED,
    RESET_SIGNALS,
    START_AGAIN_SECONDS,
    add_to_run,
    process,
)
from taskqueue.text import sh, visible

# Seconds until a task without a usable handler is tried again. Each try is a failed attempt, so the
# task ends as a dead letter.
NO_HANDLER_SECONDS = 60.0
# env and shells exit with this when they do not find a program.
EXIT_NOT_FOUND = 127

# Each handler's own variables.
TOLD = ("TASK_ID", "TASK_TYPE", "TASK_QUEUE", "TASK_ATTEMPT", "TASK_DEPTH", "TASK_QUEUE_STATE")
# Of its costs: those that it may have, and those of earlier attempts.
COSTS = ("TASK_BUDGET_USD", "TASK_SPENT_USD")

SUPERVISE = (
    "import sys; sys.path.append(sys.argv[1]); from taskqueue.supervisor import main; main()"
)


class End(NamedTuple):
    """The end of a task's run; outcome.record() explains `code` and `why`."""

    task: q.Task
    code: int | None
    why: outcomes.Outcome | None
    seconds: float = 0.0


class SupervisorProcess:
    """The worker's side of its supervisor (see supervisor.py)."""

    def __init__(self, env: dict[str, str]) -> None:
        """Start a supervisor; handlers get `env`."""
        self.socket, theirs = socket.socketpair()
        self.heard = bytearray()
        # It needs no packages, and uv may have removed this process's environment meanwhile.
        python = environment.own_python()
        how = ["-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"]
        root = os.path.dirname(os.path.abspath(q.__file__))
        self.pid = os.posix_spawn(
            python,
            [python, *how, "-c", SUPERVISE, root],
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            # Whoever sends these to all processes means the worker.
            setsigmask=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
            setsigdef=RESET_SIGNALS,
        )
        theirs.close()
        self.started = (process(self.pid) or ("", ""))[1]

    def start(self, order: dict, fds: Sequence[int]) -> None:
        """Order a handler's start. Raises OSError when too many descriptors are under way."""
        self._send({"start": order}, fds)

    def end(self, run: str, why: outcomes.Outcome, *, now: bool = False) -> None:
        """Order a run's end: TERM, then KILL; or KILL `now`. Safe to call twice."""
        self._send({"end": run, "why": why, "now": now})

    def _send(self, what: dict, fds: Sequence[int] = ()) -> None:
        line = json.dumps(what).encode() + b"\n"
        # When the supervisor was killed, hear() raises.
        with suppress(ConnectionError):
            sent = socket.send_fds(self.socket, [line], fds)
            self.socket.sendall(line[sent:])

    def hear(self) -> list[dict]:
        """Return what the supervisor has told until now. Raises EOFError when it was killed."""
        try:
            heard = self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionError:
            heard = b""
        if not heard:
            raise EOFError
        *lines, self.heard = (self.heard + heard).split(b"\n")
        return [json.loads(line) for line in lines]

    def leave(self, wait: bool) -> None:
        """Let the supervisor end once no handler runs, and wait for that if wanted."""
        self.socket.close()
        # The handler of SIGCHLD may be faster.
        with suppress(ChildProcessError):
            if wait:
                os.waitpid(self.pid, 0)


class Handlers:
    """The handlers of one process: start them, and hear of their ends."""

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
        """`command` runs every task type; None: the executable in `directory` that bears its name.

        `timeout` (0: none) and `kill_after` (from TERM to KILL) are seconds.
        """
        self.state, self.logs, self.directory = state, f"{state}/logs", os.path.abspath(directory)
        self.command, self.env = command, env
        self.timeout, self.kill_after = timeout, kill_after
        try:
            self.cwd = os.getcwd()
        # The working directory was removed while this process was in it.
        except OSError:
            self.cwd = os.path.expanduser("~")
        # The tasks whose handlers run, by run name.
        self.runs: dict[str, q.Task] = {}
        self.supervisor = SupervisorProcess(env)

    def start(self, task: q.Task, told: Mapping[str, str] | None = None) -> End | None:
        """Start the handler of a claimed task; return an End if that cannot be done.

        `told` are variables besides TOLD.
        """
        try:
            command = self.command_for(task.task_type)
            order = {
                "run": task.run_name,
                "command": command,
                "cwd": self.directories(task),
                "env": self.environment(task, command[0]) | dict(told or {}),
                "record": run_file(self.state, task),
                **self.terms(task),
            }
            envelope = json.dumps(task.envelope).encode()
        except LookupError as error:
            return unstarted(task, "scheduled", str(error), NO_HANDLER_SECONDS)
        # No file can have this task type's name, or bash stored JSON that Python finds too deep.
        except (ValueError, RecursionError) as error:
            return unstarted(task, "failed", f"it cannot be run: {error}")
        try:
            self.order(order, envelope)
        # A full disk, or too many open files: not the task's fault.
        except OSError as error:
            why = with_remedy(error, self.state) if isinstance(error, PermissionError) else error
            return unstarted(task, "put back", f"{NOT_STARTED}: {why}", START_AGAIN_SECONDS)
        self.runs[task.run_name] = task
        return None

    def terms(self, task: q.Task) -> dict:
        """Return a run's limits; of the worker's and the task's own timeout the smaller one counts."""
        timeout = min(filter(None, (self.timeout, task.timeout)), default=0.0)
        overdue = outcomes.timed_out(timeout)
        return {"timeout": timeout, "overdue": overdue, "kill_after": self.kill_after}

    def order(self, order: dict, envelope: bytes) -> None:
        """Make the run's files and hand them to the supervisor. Raises OSError."""
        fds: list[int] = []
        try:
            fds.append(stdin_file(envelope))
            # These locks are held until the handler and whatever it leaves behind are gone.
            for ending in ("out", "err"):
                fds.append(new_file(f"{self.logs}/{order['run']}.{ending}", locked=True))
            os.close(new_file(order["record"], locked=False))
            # A handler may stop the supervisor before that has written anything.
            supervisor = (self.supervisor.pid, self.supervisor.started)
            add_to_run(order["record"], supervisor=supervisor)
            self.supervisor.start(order, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def directories(self, task: q.Task) -> list[str]:
        """Return the directories to run in; the first that exists counts. Raises LookupError."""
        workspace = task.envelope["data"].get("workspace_path")
        if workspace is None:
            return [self.cwd, "/"]
        if isinstance(workspace, str) and workspace:
            return [os.path.join(self.cwd, workspace)]
        raise LookupError(f"cannot run in {workspace!r}: workspace_path is not a directory")

    def command_for(self, task_type: str) -> list[str]:
        """Return the command for a task type. Raises LookupError when it has no handler."""
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
        """Return a handler's own variables. Raises LookupError when no Python fits it."""
        values = (task.task_id, task.task_type, task.queue, task.attempts, task.depth + 1)
        told = dict(zip(TOLD, map(str, (*values, self.state)), strict=True))
        return told | {"UV_PYTHON": environment.python_for(program, self.env)}

    def hear(self) -> list[End]:
        """Return the runs that have ended, and those that the supervisor could not start.

        Raises EOFError when the supervisor was killed; then call start_afresh().
        """
        return [self.end_of(self.runs.pop(told["run"]), told) for told in self.supervisor.hear()]

    def end_of(self, task: q.Task, told: dict) -> End:
        """Return the end that the supervisor tells, with what is wrong with the handler's file."""
        code, why, seconds = told["code"], told["why"], told["seconds"]
        if fault := self.fault_of_handler(task, code, why):
            delay = NO_HANDLER_SECONDS if code is None else None
            return End(task, code, outcomes.Outcome("scheduled", fault, delay), seconds)
        return End(task, code, why and outcomes.Outcome(*why), seconds)

    def fault_of_handler(self, task: q.Task, code: int | None, why: list | None) -> str | None:
        """Explain why a handler was not started, or why env did not find its interpreter."""
        put_back = code is None and why is not None and why[0] == "put back"
        not_found = code == EXIT_NOT_FOUND and why is None
        if self.command is not None or not (put_back or not_found):
            return None
        try:
            fault = fault_of(f"{self.directory}/{task.task_type}", self.env["PATH"])
        # The handler was removed meanwhile.
        except OSError:
            return None
        return fault and f"its handler {fault[0]}; {fault[1]}"

    def start_afresh(self) -> NoReturn:
        """Begin this process anew, because its supervisor was killed and no end would be heard.

        The process id stays. The tasks it had claimed are a dead owner's, and are recovered.
        """
        say("the supervisor of handlers was killed; starting afresh")
        python = sys.executable if os.access(sys.executable, os.X_OK) else environment.own_python()
        os.execv(python, [python, *sys.orig_argv[1:]])

    def end_all(self, why: outcomes.Outcome, *, now: bool = False) -> None:
        """End all handlers that run."""
        for run in self.runs:
            self.supervisor.end(run, why, now=now)

    def children_changed(self, *_) -> None:
        """Reap children: the supervisor, and as process 1 of a container all orphans.

        A handler may stop the supervisor, which would end all timeouts: it goes on at once.
        """
        # No child is left.
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG | os.WUNTRACED))[0]:
                pid, status = found
                if pid == self.supervisor.pid and os.WIFSTOPPED(status):
                    os.kill(pid, signal.SIGCONT)

    def leave(self) -> None:
        """End what runs, and let the supervisor end."""
        self.end_all(outcomes.STOPPED, now=True)
        self.supervisor.leave(wait=not self.runs)
        # The directory is not empty while it holds an end that is not recorded.
        with suppress(q.QueueError, OSError):
            os.rmdir(run_directory(self.state, q.owner_name(self.state)))


def unstarted(task: q.Task, status: str, error: str, delay: float | None = None) -> End:
    """Return the end of a task whose handler was not started (see outcome.Outcome)."""
    return End(task, None, outcomes.Outcome(status, error, delay))


def fault_of(handler: Path | str, path: str) -> tuple[str, str] | None:
    """Return (why an executable file cannot be started, what mends it), or None if it can.

    Its interpreter is looked for on `path`, a PATH. Raises OSError.
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


def resolve(command: list[str], path: str) -> list[str]:
    """Return the command with its program's absolute path: a handler starts in another directory.

    Raises ValueError when PATH has no such program.
    """
    if not command:
        raise ValueError("the command is empty: give a program and its arguments")
    name = os.path.abspath(command[0]) if "/" in command[0] else command[0]
    found = shutil.which(name, path=path)
    if found is None:
        raise ValueError(f"{command[0]}: there is no such program, or it is not executable")
    return [found, *command[1:]]


def start_clean() -> None:
    """Open /dev/null for closed standard streams, and unblock all signals.

    The next file to be opened would get the number of a closed stream.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def with_remedy(error: Exception, state: Path) -> str:
    """Return what an error says, with commands as people type them.

    If a file of the state belongs to another user, say which and how to get it back.
    """
    from taskqueue.remedies import remedies_as_typed

    said = remedies_as_typed(str(error))
    me = os.geteuid()
    below = ("*", "workers/*", "logs/*", "runs/*", "spool/*")
    for path in [state, *(path for pattern in below for path in state.glob(pattern))]:
        try:
            owner = os.stat(path, follow_symlinks=False).st_uid
        # It was removed meanwhile.
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
    """Return a user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def stdin_file(raw: bytes) -> int:
    """Return a descriptor that reads these bytes; no pipe, so nobody waits for a slow reader."""
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
    """Make a file of a run, with its directories, and return its descriptor. Raises OSError."""
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
    """Write a line with the time to stderr, in one piece."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(' '.join(line.split()))}\n"
    # A closed terminal or a full disk stops no work.
    with suppress(OSError):
        os.write(2, text.encode())


# ------------------------------------------------------------------------------- the files of a run


def run_file(state: os.PathLike | str, task: q.Task) -> str:
    """Return the path of the record of a claimed task's run."""
    return f"{run_directory(state, task.owner)}/{task.run_name.replace('/', '.', 1)}"


def run_directory(state: os.PathLike | str, owner: str | None) -> str:
    """Return the directory of the records of an owner's runs."""
    return f"{state}/runs/{file_name(owner)}"


def file_name(owner: str | None) -> str:
    """Return the name of an owner's lock file; bash may have written anything into the row."""
    name = os.path.basename(owner) if isinstance(owner, str) else ""
    return q.NOBODY if name in ("", ".", "..") or "\0" in name else name


def read_run(path: str) -> dict:
    """Return a run's record, {} if it has none."""
    run = {}
    try:
        with open(path, "rb") as file:
            lines = file.read(65_536).splitlines()
    # The record was removed, or the row's owner is a name that no file can have.
    except (OSError, ValueError):
        return run
    for line in lines:
        # A full disk cut this line short.
        with suppress(ValueError):
            run.update(json.loads(line))
    return run


def is_held(path: os.PathLike[str] | str) -> bool:
    """Return whether a process holds the lock of a file."""
    try:
        fd = q.lock_file(os.fspath(path), probe=True)
    # No file has this name, or none can: an owner's name in a row may hold a NUL.
    except (OSError, ValueError):
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


def tidy_run(state: os.PathLike | str, task: q.Task) -> None:
    """Remove the record of a run whose end is in the database, and its empty output files.

    A file that a process holds stays: a daemon may print into it later.
    """
    with suppress(OSError, ValueError):
        os.unlink(run_file(state, task))
    for ending in (".out", ".err"):
        # It is gone, a daemon holds it, or bash stored a NUL in the row.
        with suppress(OSError, ValueError):
            _remove_if_empty(f"{state}/logs/{task.run_name}{ending}")


def _remove_if_empty(path: str) -> None:
    """Remove an empty file that no process has locked. Raises OSError if one has."""
    if os.stat(path).st_size:
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_size == 0:
            os.unlink(path)
    finally:
        os.close(fd)
