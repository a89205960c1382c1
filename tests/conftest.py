"""What the tests share: a private state directory with an awkward path, real processes, and waiting
for conditions.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

MARKERS = {
    "core": "must hold on every Python: `just test-core 3.13`",
    "once": "takes minutes: enough on one Python",
    "alone": "a promise in milliseconds: runs after all others, while nothing else does",
    "first": "a file that takes long: runs before the others",
}


def pytest_configure(config) -> None:
    for marker in MARKERS.items():
        config.addinivalue_line("markers", ": ".join(marker))


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Leave files without a wanted marker unread: each of pytest's processes reads all others."""
    wanted = {"core", "alone"} & {*config.option.markexpr.split(" and ")}
    if not collection_path.name.startswith("test_") or not wanted:
        return None
    text = collection_path.read_text()
    return not all(f"mark.{marker}" in text for marker in wanted) or None


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def copy_scripts(directory: Path, *scripts: str) -> None:
    """Put scripts, and the modules that they share, into a directory as they lie here."""
    modules = [path.relative_to(ROOT) for path in ROOT.glob("taskqueue/*.py")]
    (directory / "taskqueue").mkdir(parents=True, exist_ok=True)
    for name in ("queue_helpers.py", *modules, *scripts):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)


def wait_for(condition, seconds: float = 30.0, what: str = "the condition"):
    """The first true value of condition(), looked for every few milliseconds; fails after
    `seconds`.
    """
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > seconds:
            pytest.fail(f"{what} did not come true within {seconds:g} s")
        # Many tests wait at once, and their looks would take the processor from what they wait for.
        time.sleep(0.005 if waited < 1 else 0.02)


def end(process: subprocess.Popen) -> None:
    """Kill a process; with its children (uv has one) when it leads a group of its own."""
    if process.poll() is None:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()


def without_overrides() -> None:
    """Have root obey file modes; a process calls this before it starts a program."""
    if sys.platform == "linux":
        drop, dac_override, dac_read_search = 24, 1, 2
        for capability in (dac_override, dac_read_search):
            ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


# These folders' tests call these scripts inside their own process; these words need one of theirs.
FOLDERS = {"cli", "worker", "claude"}
INSIDE = {"tasks.py", "enqueue.py", "cleanup.py"}
OUTSIDE = {"doctor", "service", "restore", "--hook", "--start-worker", "-"}


def wait_for_word(process: subprocess.Popen, *words: str, seconds: float = 30.0) -> None:
    """Wait until a process that Installation.start() made has said all these words."""
    said = process.log.read_text
    wait_for(lambda: all(word in said() for word in words), seconds, f"the words {words}")


class Installation:
    """A state directory of its own, and the scripts run against it as real processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state of O'Brien – Hafen"
        self.handlers = directory / "handlers"
        self.handlers.mkdir()
        self.db = self.state / "tasks.db"
        self.processes: list[subprocess.Popen] = []
        self.is_inside = False
        keep = ("PATH", "LANG", "LC_ALL", "UV_CACHE_DIR", "PYTHONPATH", "VIRTUAL_ENV")
        self.env = {name: os.environ[name] for name in keep if name in os.environ}
        self.env |= {"TASK_QUEUE_STATE": str(self.state), "HOME": str(directory)}

    def run(
        self,
        script: str,
        *args,
        input: str | bytes | None = None,
        env: dict | None = None,
        timeout: float = 60,
        **options,
    ) -> subprocess.CompletedProcess:
        """Run one of our scripts to its end.

        In most folders these scripts run inside this process, unless an environment or
        another option asks for one of their own.
        """
        raw = input.encode() if isinstance(input, str) else input
        if self.is_inside and script in INSIDE and not (env or options):
            words = [str(word) for word in args]
            if not OUTSIDE & {*words}:
                return self.call(script, words, raw or b"")
        stdin = {"stdin": subprocess.DEVNULL} if raw is None else {"input": raw}
        done = subprocess.run(
            [sys.executable, ROOT / script, *map(str, args)],
            env=self.env | (env or {}),
            capture_output=True,
            timeout=timeout,
            **stdin,
            **options,
        )
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    def call(
        self, script: str, words: list[str], stdin: bytes = b""
    ) -> subprocess.CompletedProcess:
        """Call a script's main() with an environment and streams of its own."""
        import queue_helpers
        from taskqueue import remedies

        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
        state = {"STATE_DIR": self.state, "QUEUE_DB": self.db, "QUEUE_PATH": self.state}
        streams = {
            "stdin": io.TextIOWrapper(io.BytesIO(stdin), "utf-8"),
            "stdout": out,
            "stderr": err,
        }
        remedies.installed_command.cache_clear()
        with (
            mock.patch.multiple(queue_helpers, **state),
            mock.patch.dict(os.environ, self.env, clear=True),
            mock.patch.multiple(sys, **streams),
        ):
            try:
                code = importlib.import_module(script.removesuffix(".py")).main(words)
            except SystemExit as ended:
                code = ended.code or 0
            out.flush()
            err.flush()
            # The next call opens the database anew, as a process does.
            queue_helpers.resign(self.state)
        remedies.installed_command.cache_clear()
        texts = (stream.buffer.getvalue().decode() for stream in (out, err))
        return subprocess.CompletedProcess([script, *words], code, *texts)

    def start(self, script: str, *args, env: dict | None = None, **options) -> subprocess.Popen:
        """Start one of our scripts; it is killed when the test ends. Its stderr goes to a file:
        process.log.
        """
        log = self.directory / f"{Path(script).stem}-{len(self.processes)}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, ROOT / script, *map(str, args)],
                env=self.env | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                **options,
            )
        process.log = log
        self.processes.append(process)
        return process

    def python(self, code: str, *args, **options) -> subprocess.CompletedProcess:
        """Run Python code that may import our modules, to its end, in a process of its own."""
        options = {"capture_output": True, "text": True, "timeout": 100, **options}
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.run(command, env=self.python_env(options), **options)

    def start_python(self, code: str, *args, **options) -> subprocess.Popen:
        """Start such a process, with pipes for its stdin and stdout; it is killed at the end."""
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, **options}
        command = [sys.executable, "-c", code, *map(str, args)]
        process = subprocess.Popen(command, env=self.python_env(options), **options)
        self.processes.append(process)
        return process

    def python_env(self, options: dict) -> dict:
        return self.env | {"PYTHONPATH": str(ROOT)} | (options.pop("env", None) or {})

    def worker(self, *args, ready: bool = True, **options) -> subprocess.Popen:
        """Start a worker on this installation's handlers, and wait until it serves."""
        process = self.start("worker.py", *args, "--handlers", self.handlers, **options)
        if ready:
            wait_for(
                lambda: "serves" in process.log.read_text() or process.poll() is not None,
                what="a serving worker",
            )
        return process

    def handler(self, name: str, text: str) -> Path:
        """Make an executable handler."""
        path = self.handlers / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def enqueue(self, *args, **options) -> str:
        """enqueue.py, which must succeed; the last task's id."""
        done = self.run("enqueue.py", *args, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].split()[1] if done.stdout else ""

    def sqlite3(self, statement: str, **options) -> str:
        """Return what the sqlite3 command prints for a statement; it must succeed."""
        done = subprocess.run(
            ["sqlite3", "-cmd", ".timeout 10000", self.db, statement],
            capture_output=True,
            text=True,
            **options,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def rows(self, statement: str, *values) -> list[tuple]:
        """The rows of a query, read on a connection of the test's own; [] while there is no
        database.
        """
        if not self.db.exists():
            return []
        conn = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=10)
        try:
            return conn.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            conn.close()

    def lines(self, name: str = "runs") -> list[str]:
        """Return the whole lines of a file in HOME, into which handlers write."""
        path = self.directory / name
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def let_go(self) -> None:
        """Let the handlers go on that wait for the file "go" in HOME."""
        (self.directory / "go").touch()

    def ended(self, count: int, seconds: float = 60) -> None:
        """Wait until the history has that many tasks."""
        number = "select count(*) from task_history"
        wait_for(lambda: self.rows(number) == [(count,)], seconds, f"the end of {count} tasks")

    def history(self, task_id: str) -> dict | None:
        """The finished task's row."""
        names = ("status", "attempts", "exit_code", "result", "log", "error")
        rows = self.rows(f"select {', '.join(names)} from task_history where task_id = ?", task_id)
        return dict(zip(names, rows[0], strict=True)) if rows else None

    def finished(self, task_id: str, seconds: float = 30.0) -> dict:
        """The finished task's row, once there is one."""
        return wait_for(lambda: self.history(task_id), seconds, f"the end of task {task_id}")

    def tq(self, words: str, *more, code: int = 0, **options) -> subprocess.CompletedProcess:
        """Run tasks.py with words and further arguments; it must end with this code."""
        done = self.run("tasks.py", *shlex.split(words), *more, **options)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def told(self, words: str, *more, code: int = 0, **options) -> object:
        """Return what tasks.py prints with --json; its message where it prints nothing."""
        done = self.tq(words, *more, "--json", code=code, **options)
        return json.loads(done.stdout) if done.stdout else done.stderr

    def add(self, words: str, *more, **options) -> str:
        """Enqueue with words and further arguments; return the last task's id."""
        return self.enqueue(*shlex.split(words), *more, **options)

    def drain(self, words: str, *more, **options) -> subprocess.CompletedProcess:
        """Run a worker of some queues until no task is ready."""
        done = self.run(
            "worker.py",
            *shlex.split(words),
            *more,
            *("--handlers", self.handlers, "--drain"),
            **options,
        )
        assert done.returncode == 0, done.stderr
        return done

    def statuses(self) -> dict[str, str]:
        """Return the status of each task by its id."""
        return dict(self.rows("select task_id, status from task_queue"))

    def ends_well(self, *args) -> bool:
        """Enqueue a task, wait for its end, and return whether it was completed."""
        return self.finished(self.enqueue(*args))["status"] == "completed"


@pytest.fixture
def installation(tmp_path, request):
    """An Installation; its processes are killed at the end."""
    made = Installation(tmp_path)
    made.is_inside = request.path.parent.name in FOLDERS
    yield made
    if made.is_inside:
        import queue_helpers

        queue_helpers.resign(made.state)
    # A worker that gets a second signal ends its handlers, too.
    for _ in range(10):
        running = [process for process in made.processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass
    for process in made.processes:
        end(process)
    # pytest shows this where the test has failed.
    for log in filter(Path.is_file, sorted(tmp_path.glob("*.log"))):
        print(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}")
    shutil.rmtree(made.state, ignore_errors=True)


@pytest.fixture
def queue(installation, monkeypatch):
    """queue_helpers, on the installation's state directory."""
    import queue_helpers

    monkeypatch.setattr(queue_helpers, "STATE_DIR", installation.state)
    monkeypatch.setattr(queue_helpers, "QUEUE_DB", installation.db)
    monkeypatch.setattr(queue_helpers, "QUEUE_PATH", installation.state)
    yield queue_helpers
    queue_helpers.resign(installation.state)


def settle(queue, said: str, code: int = 0, before=None, **terms):
    """Record the end of a task whose handler said that; it is claimed with those terms.

    `before(conn, task)` runs while the task is claimed, in a transaction of its own.
    """
    from taskqueue import outcome

    conn = queue.connect()
    queue.enqueue_task("notifications", "t", {}, "parent")
    (task,) = queue.claim_ready(conn, "notifications", **terms)
    output = conn.state / "logs" / f"{task.run_name}.out"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(said)
    if before:
        with queue.transaction(conn):
            before(conn, task)
    with queue.transaction(conn):
        return outcome.record(conn, task, code)


@pytest.fixture
def other(tmp_path):
    """A second installation."""
    (tmp_path / "other").mkdir()
    return Installation(tmp_path / "other")


def one_line(done: subprocess.CompletedProcess, code: int, *words: str) -> str:
    """Return the one line on stderr with which a command ended; it has these words."""
    assert (done.returncode, done.stdout) == (code, ""), (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    return done.stderr


@pytest.fixture
def claude(tmp_path):
    """The real Claude Code, with a stand-in for its API."""
    from claude_stub.client import ClaudeCode

    made = ClaudeCode(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fake(tmp_path):
    """A stand-in for Claude Code that prints the lines that a test gives it."""
    from claude_stub.fake import Fake

    return Fake(tmp_path)


@pytest.fixture
def claude_handler(installation, request):
    """Have the installation's workers run handlers/claude; the real client can reach its API."""
    within = request.getfixturevalue("claude").within if "claude" in request.fixturenames else ()
    command = shlex.join([*within, sys.executable, str(ROOT / "handlers/claude")])
    return installation.handler("claude", f"#!/bin/sh\nexec {command}\n")
