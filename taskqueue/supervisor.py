"""The process that starts handlers, ends them when they are overdue, and writes down how each of
them ended.

    worker ──fork──> supervisor ──posix_spawn──> handler, in a session and process group of its own
       └── a socket, lines of JSON ──┘

A supervisor outlives its worker for as long as a handler runs: so the exit code of an orphan is
known, and its timeout holds. What it writes down is in runs. It serves whoever has handlers
to run and files for their output: worker.py is one, and need not be the only one.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from taskqueue import runs

# A supervisor that has left so many questions in a row without an answer, one each safety tick, is
# stuck.
ANSWERS_OWED = 6
# One that takes no more orders for so long is stuck, too.
SEND_SECONDS = 10.0
# poll() takes no number of milliseconds that is larger than an int of C: that is 24 days.
LONGEST_POLL_SECONDS = 86_400.0
# The signals that a handler begins with at their defaults, whatever the worker was started with.
RESET_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

# What a person sets for `claude`, by its documentation: sign-in and provider, limits, switches, how
# it runs commands. Whatever else begins with CLAUDE tells a process which session it is a part of,
# and a handler is part of none.
CLAUDE_SETTINGS = frozenset((
    "CLAUDE_CONFIG_DIR", "CLAUDE_AUTOCOMPACT_PCT_OVERRIDE", "CLAUDE_STREAM_IDLE_TIMEOUT_MS", "CLAUDE_CODE_OAUTH_TOKEN",
    "CLAUDE_CODE_API_KEY_HELPER_TTL_MS", "CLAUDE_CODE_EFFORT_LEVEL", "CLAUDE_CODE_EXTRA_BODY", "CLAUDE_CODE_SUBAGENT_MODEL",
    "CLAUDE_CODE_FILE_READ_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_GIT_BASH_PATH", "CLAUDE_CODE_PROXY_RESOLVES_HOSTS",
    "CLAUDE_CODE_SHELL", "CLAUDE_CODE_SHELL_PREFIX", "CLAUDE_CODE_TMPDIR",
))  # fmt: skip
CLAUDE_SETTING_FAMILIES = (
    "CLAUDE_BASH_", "CLAUDE_ENABLE_", "CLAUDE_CODE_CLIENT_", "CLAUDE_CODE_DISABLE_", "CLAUDE_CODE_ENABLE_", "CLAUDE_CODE_MAX_",
    "CLAUDE_CODE_OTEL_", "CLAUDE_CODE_SKIP_", "CLAUDE_CODE_USE_",
)  # fmt: skip


def handler_environment(
    environ: Mapping[str, str], without: Collection[str] = ()
) -> dict[str, str]:
    """The environment for handlers, without what names a session, uv's run of the worker, or a
    relative place.

    And without the names given, which each handler is told for itself. uv obeys no uv.toml there.

    An empty or relative entry of PATH or PYTHONPATH would be looked for in the workspace, which is
    somebody else's.
    """
    env = {
        name: value
        for name, value in environ.items()
        if name not in without and not _names_a_session(name)
    }
    env.pop("UV_RUN_RECURSION_DEPTH", None)
    env["UV_NO_CONFIG"] = "1"
    ours = os.path.join(env.pop("VIRTUAL_ENV", "/dev/null"), "bin")
    path = [entry for entry in absolute_entries(env.get("PATH", "")) if entry != ours]
    env["PATH"] = os.pathsep.join(path) or os.defpath
    modules = absolute_entries(env.pop("PYTHONPATH", ""))
    return env | ({"PYTHONPATH": os.pathsep.join(modules)} if modules else {})


def _names_a_session(name: str) -> bool:
    return (
        name.startswith("CLAUDE")
        and name not in CLAUDE_SETTINGS
        and not name.startswith(CLAUDE_SETTING_FAMILIES)
    )


def absolute_entries(path: str) -> list[str]:
    """The absolute entries of a search path."""
    return [entry for entry in path.split(os.pathsep) if os.path.isabs(entry)]


class Run:
    """A handler at work."""

    def __init__(self, order: dict, pid: int, out: int) -> None:
        self.name, self.record, self.kill_after = order["run"], order["record"], order["kill_after"]
        self.pid = pid
        # Its locked stdout stays open here as well, until its exit code is written down.
        self.out = out
        self.started = time.monotonic()
        timeout = order["timeout"]
        self.signal_at = self.started + timeout if timeout else None
        self.next_signal = signal.SIGTERM
        # Why it was ended, which holds only once it was sent a signal.
        self.why = order["overdue"]
        self.signalled = False

    def note(self, **what) -> None:
        """Write something down about the run."""
        if self.record is not None:
            runs.add_to_run(self.record, **what)

    def end(self, why: str, now: bool) -> None:
        """Have the group ended: TERM first, or KILL now."""
        if not self.signalled or now:
            self.why = self.why if self.signalled else why
            self.signal_at = time.monotonic()
            self.next_signal = signal.SIGKILL if now else signal.SIGTERM

    def signal_when_due(self) -> None:
        if self.signal_at is not None and time.monotonic() >= self.signal_at:
            self.signal_at = time.monotonic() + self.kill_after
            if not self.signalled:
                self.note(why=self.why, kill_at=self.signal_at)
            self.signalled = True
            self.kill(self.next_signal)
            self.next_signal = signal.SIGKILL

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        # The group is gone. macOS raises PermissionError for a group of zombies.
        except (ProcessLookupError, PermissionError):
            pass


class Supervisor:
    """The supervisor's side. See SupervisorProcess for what it is told and what it tells."""

    def __init__(self, worker: socket.socket, env: dict[str, str]) -> None:
        self.worker = worker
        # As bytes, which spares each start their conversion.
        self.env = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
        self.alive = True
        self.runs: dict[int, Run] = {}
        # The descriptors of orders that have not been read yet, a list for each.
        self.files: deque[list[int]] = deque()
        self.heard = bytearray()
        self.unsent = bytearray()

    def run(self) -> None:
        """Serve until the worker is gone and no handler runs."""
        self.leave_the_worker()
        wakeup, waker = wakeup_pipe()
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Only the first is for us; whoever sends the others to all processes means the worker.
            signal.signal(number, lambda *_: None)
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        while self.alive or self.runs:
            if self.alive:
                poll.register(self.worker, select.POLLIN | (select.POLLOUT if self.unsent else 0))
            now = time.monotonic()
            due = [run.signal_at - now for run in self.runs.values() if run.signal_at is not None]
            ready = dict(poll.poll(max(0.0, min([LONGEST_POLL_SECONDS, *due])) * 1000))
            if wakeup in ready:
                os.read(wakeup, 65536)
            if self.alive and self.worker.fileno() in ready:
                self.alive = self.listen()
                if not self.alive:
                    poll.unregister(self.worker)
            for run in self.runs.values():
                run.signal_when_due()
            self.reap()
            self.send()

    def leave_the_worker(self) -> None:
        """Keep nothing that the worker has open, and no directory in use."""
        os.setsid()
        try:
            with open("/proc/self/comm", "w") as file:
                file.write("task-supervisor")
        except OSError:
            pass
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, self.worker.fileno())
        os.closerange(self.worker.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")

    def listen(self) -> bool:
        """Do what the worker says; False when it is gone."""
        try:
            heard, fds, flags, _ = socket.recv_fds(self.worker, 65536, 3)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        # Where we had no room for all descriptors of an order, its list is shorter, or empty.
        if fds or flags & socket.MSG_CTRUNC:
            self.files.append(fds)
        *lines, self.heard = (self.heard + heard).split(b"\n")
        for told in map(json.loads, lines):
            if "start" in told:
                self.start(told["start"], self.files.popleft())
            elif "end" in told:
                for run in self.runs.values():
                    if run.name == told["end"]:
                        run.end(told["why"], told["now"])
            else:
                self.tell({"answer": True})
        return bool(heard)

    def start(self, order: dict, fds: list[int]) -> None:
        """Start a handler, or say why that cannot be done and what is to be done instead."""
        kept = None
        try:
            if len(fds) < 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if trouble := enter(order["cwd"]):
                return self.tell({"run": order["run"], "error": trouble, "do": "fail"})
            told = {os.fsencode(name): os.fsencode(value) for name, value in order["env"].items()}
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
            pid = os.posix_spawn(
                order["command"][0],
                order["command"],
                self.env | told,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=RESET_SIGNALS,
            )
            kept = fds[1]
            self.runs[pid] = run = Run(order, pid, kept)
            started = (runs.process(pid) or ("", ""))[1]
            run.note(
                group=pid,
                started=started,
                deadline=run.signal_at,
                overdue=order["overdue"],
                kill_after=run.kill_after,
            )
        # ValueError is for a NUL, from a writer that checks nothing.
        except (OSError, ValueError) as error:
            refused = isinstance(error, ValueError) or error.errno == errno.E2BIG
            do = "bury" if refused else "put back"
            self.tell({"run": order["run"], "error": str(error), "do": do})
        finally:
            # A working directory elsewhere would keep that file system from being unmounted.
            os.chdir("/")
            for fd in fds:
                if fd != kept:
                    os.close(fd)

    def reap(self) -> None:
        """Write down and tell how handlers ended, then let their output's locks go."""
        while self.runs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            run, code = self.runs.pop(pid, None), os.waitstatus_to_exitcode(status)
            if run is None:
                continue
            if run.signalled or code < 0:
                # Kill what is left of its group. A daemon of a handler that ended well stays.
                run.kill(signal.SIGKILL)
            code = 128 - code if code < 0 else code
            why = {"why": run.why} if run.signalled else {}
            run.note(code=code, **why)
            seconds = time.monotonic() - run.started
            self.tell({"run": run.name, "code": code, "why": None, "seconds": seconds} | why)
            os.close(run.out)

    def tell(self, message: dict) -> None:
        self.unsent += json.dumps(message).encode() + b"\n"

    def send(self) -> None:
        """Tell the worker as much as it takes now; the rest waits until it reads."""
        if not self.alive:
            self.unsent.clear()
        if self.unsent:
            try:
                del self.unsent[: self.worker.send(self.unsent, socket.MSG_DONTWAIT)]
            except BlockingIOError:
                pass
            # The worker is gone, and listen() will see it.
            except OSError:
                self.unsent.clear()


def enter(directories: Sequence[str]) -> str | None:
    """Change to the first of the directories that is one; else what hinders it."""
    trouble = None
    for directory in directories:
        try:
            os.chdir(directory)
            return None
        except (OSError, ValueError) as error:
            trouble = f"cannot run in {directory!r}: {getattr(error, 'strerror', None) or error}"
    return trouble


def wakeup_pipe() -> tuple[int, int]:
    """(the end to poll, the end to write to) of a pipe that wakes a loop; neither end blocks."""
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


class SupervisorProcess:
    """The worker's side: a supervisor, started when this is made.

    It is told {"start": {"run", "command", "cwd", "env", "timeout", "overdue", "kill_after",
    "record"}}, and with that come three descriptors: the run's stdin, its locked stdout, and its
    stderr. "cwd" is a list of directories, of which the first that exists is taken; "overdue" is
    the `why` of a run that was not done in time; "record" is the file in which to write down how
    the run goes, or null. Or it is told {"end": run, "why", "now"}, or {"answer": true}.

    It tells {"run", "code", "why", "seconds"} of a handler that has ended. Of one that was not
    started it tells {"run", "error", "do"}: "fail" when the attempt counts, "bury" when it can
    never be started, "put back" when it is no fault of the task.
    """

    def __init__(self, env: dict[str, str]) -> None:
        """Fork one. To be done while there is no other thread."""
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        theirs.setblocking(False)
        self.heard = bytearray()
        self.unanswered = 0
        self.reaped = False
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                Supervisor(theirs, env).run()
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        # What tells this process from a later one of the same number.
        self.started = (runs.process(self.pid) or ("", ""))[1]

    def start(self, order: dict, fds: Sequence[int]) -> None:
        """Have a handler started. Raises OSError when too many descriptors are under way."""
        self._say({"start": order}, fds)

    def end(self, run: str, why: str, *, now: bool = False) -> None:
        """Have a run ended: TERM, then KILL; or KILL at once. Saying it again changes nothing."""
        self._say({"end": run, "why": why, "now": now})

    def ask(self) -> None:
        """Have it show that it still works. Called each safety tick; one that owes too many answers
        is killed.
        """
        self.unanswered += 1
        if self.unanswered > ANSWERS_OWED:
            self.kill()
        else:
            self._say({"answer": True})

    def _say(self, what: dict, fds: Sequence[int] = ()) -> None:
        line = memoryview(json.dumps(what).encode() + b"\n")
        while line:
            try:
                sent = socket.send_fds(self.socket, [line], fds) if fds else self.socket.send(line)
                line, fds = line[sent:], ()
            except BlockingIOError:
                writable = select.poll()
                writable.register(self.socket, select.POLLOUT)
                if not writable.poll(SEND_SECONDS * 1000):
                    return self.kill()
            # It was killed, and hear() will say so.
            except ConnectionError:
                return

    def hear(self) -> list[dict]:
        """What it has to tell, now. Raises EOFError when it has been killed."""
        try:
            heard = self.socket.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            heard = b""
        if not heard:
            raise EOFError
        *lines, self.heard = (self.heard + heard).split(b"\n")
        told = [json.loads(line) for line in lines]
        self.unanswered = 0
        return [one for one in told if "run" in one]

    def changed(self, status: int) -> None:
        """Hear what waitpid says of it. A handler may stop it, which would end all timeouts: it
        goes on at once.
        """
        if os.WIFSTOPPED(status):
            os.kill(self.pid, signal.SIGCONT)
        else:
            self.reaped = True

    def leave(self, wait: bool) -> None:
        """Have it end once no handler runs, and wait for that if wanted."""
        self.socket.close()
        try:
            if wait and not self.reaped:
                os.waitpid(self.pid, 0)
        # A signal handler was faster.
        except ChildProcessError:
            pass

    def kill(self) -> None:
        """End a supervisor that does not answer. Once it was reaped, its number may be another's."""
        if not self.reaped:
            os.kill(self.pid, signal.SIGKILL)
