"""What the tests share: a private state directory with an awkward path, real processes, and waiting
for conditions.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

# What must hold on every Python, and not only on the one that runs all tests: `just test-core 3.13`.
# What is SQLite's alone, like migrations, indexes and triggers, is the same on all.
CORE = """
test_a_consumer_ends_when_it_is_told_to test_a_duplicate_is_ignored_for_every_writer test_a_killed_worker_loses_nothing
test_a_late_ack_is_refused test_a_sleeping_consumer_hears_every_commit test_an_orphaned_handler_is_not_run_twice
test_asyncio_consumers test_counts_are_true_across_processes test_enqueuing_is_light test_no_task_is_claimed_twice
test_no_writer_starves test_the_queue_classes_keep_their_meaning test_the_spool_loses_nothing
test_the_write_lock_is_let_go test_an_orphan_can_be_ended
""".split()


# Minutes of a processor each: once, on the Python that runs all tests, is enough.
LONG = """
test_by_eight_processes_with_twenty_thousand_tasks_each test_of_four_processes_that_put_the_same_exactly_one_is_told
test_the_slowest_gets_half_of_what_the_fastest_gets test_a_shell_that_takes_no_turn_gets_in_beside_saturating_writers
test_an_idle_consumer_uses_no_processor
""".split()


# Files that take longest: they come first, so that nobody waits for them alone at the end.
LONG_FILES = """
test_no_task_is_claimed_twice test_the_hub_runs_a_task_of_another_machine test_the_latest_firing_wins
test_the_plugin_shares_an_installation test_a_hook_never_disturbs test_first_opens_at_once_all_succeed
test_tasks_end_well_with_closed_streams test_a_day_is_as_printed test_a_claude_run_says_why_it_ended
""".split()


# What holds a promise in milliseconds, and therefore runs while nothing else does: files, and tests
# of others.
ALONE = """
test_a_sleeping_consumer_hears_every_commit test_a_stopped_worker_gives_its_tasks_back
test_cleanup_never_holds_up_an_enqueue test_tasks_answer_at_once_on_a_big_database
test_the_slowest_gets_half_of_what_the_fastest_gets test_a_shell_that_takes_no_turn_gets_in_beside_saturating_writers
test_it_wakes_promptly_and_the_loop_is_not_blocked_meanwhile
""".split()


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "core: the queue itself; it must hold on every Python")
    config.addinivalue_line("markers", "alone: a promise in milliseconds; nothing else runs then")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """Where few are wanted, other files are not even read: each of pytest's processes reads all that are."""
    wanted = config.option.markexpr.split(" and ")
    if not collection_path.name.startswith("test_") or not {"core", "alone"} & {*wanted}:
        return None
    stem = collection_path.stem
    if "core" in wanted and stem not in CORE:
        return True
    if "alone" in wanted and stem not in ALONE:
        text = collection_path.read_text()
        return not any(name in text for name in ALONE) or None
    return None


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.stem in CORE and item.originalname not in LONG:
            item.add_marker(pytest.mark.core)
        if item.path.stem in ALONE or item.originalname in ALONE:
            item.add_marker(pytest.mark.alone)
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


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


class Installation:
    """A state directory of its own, and the scripts run against it as real processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state of O'Brien – Hafen"
        self.handlers = directory / "handlers"
        self.handlers.mkdir()
        self.db = self.state / "tasks.db"
        self.processes: list[subprocess.Popen] = []
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
        """Run one of our scripts to its end."""
        raw = input.encode() if isinstance(input, str) else input
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
        """What the sqlite3 command prints for a statement; it must succeed."""
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

    def history(self, task_id: str) -> dict | None:
        """The finished task's row."""
        names = ("status", "attempts", "exit_code", "result", "log", "error")
        rows = self.rows(f"select {', '.join(names)} from task_history where task_id = ?", task_id)
        return dict(zip(names, rows[0], strict=True)) if rows else None

    def finished(self, task_id: str, seconds: float = 30.0) -> dict:
        """The finished task's row, once there is one."""
        return wait_for(lambda: self.history(task_id), seconds, f"the end of task {task_id}")


@pytest.fixture
def installation(tmp_path):
    """An Installation; its processes are killed at the end."""
    made = Installation(tmp_path)
    yield made
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
