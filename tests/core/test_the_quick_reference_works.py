"""Every snippet of the quick reference, as people have it in their scripts and hooks."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import copy_scripts, wait_for

OPTION_A = """#!/usr/bin/env -S uv run
from pathlib import Path
import sys
sys.path.insert(0, str(Path.home() / ".claude/automation/lychee/runtime/lib"))
from queue_helpers import enqueue_task, TASK_QUEUE_NOTIFICATION

enqueue_task(
    TASK_QUEUE_NOTIFICATION,
    "link_validation",
    {"workspace_path": str(Path.cwd())}
)
"""

OPTION_B = """sqlite3 "$HOME/.claude/automation/lychee/state/tasks.db" <<EOF
PRAGMA journal_mode=WAL;
INSERT INTO notifications (data) VALUES ('{"workspace": "$(pwd)"}');
EOF
"""

CONSUMER = """from queue_helpers import get_queue, TASK_QUEUE_NOTIFICATION
import asyncio
import json

queue = get_queue(TASK_QUEUE_NOTIFICATION)

while True:
    loop = asyncio.get_event_loop()
    task = await loop.run_in_executor(
        None,
        lambda: queue.get(block=False) if not queue.empty() else None
    )

    if task:
        data = json.loads(task)
        await process_task(data)
    else:
        await asyncio.sleep(1)
"""

ACK_LOOP = """from queue_helpers import get_ack_queue, TASK_QUEUE_APPROVAL

queue = get_ack_queue(TASK_QUEUE_APPROVAL)

while True:
    task_id, task_json = queue.get(block=True, timeout=5)

    try:
        await long_running_subprocess(task_json)
        queue.ack(task_id)  # Success - remove from queue
    except Exception:
        queue.nack(task_id)  # Failure - return to queue for retry
"""

DEDUPLICATION = """from queue_helpers import enqueue_task, TASK_QUEUE_NOTIFICATION
# Use deterministic task_id for automatic deduplication
task_id = f"{workspace_hash}_{session_id}"

enqueue_task(
    queue_name=TASK_QUEUE_NOTIFICATION,
    task_type="link_validation",
    data=data,
    task_id=task_id  # Prevents duplicate tasks
)
"""

# The class is ours: the one printed there compares with a path that never is, and wants a loop in
# watchdog's thread.
WATCHER = """from queue_helpers import QueueWatcher, QUEUE_PATH
from watchdog.observers import Observer
# Trigger immediate dequeue when queue file changes (WAL writes)
observer = Observer()
observer.schedule(QueueWatcher(QUEUE_PATH, process_queue), QUEUE_PATH)
observer.start()
"""

LOCKED = """from queue_helpers import SQLiteQueue
queue = SQLiteQueue(
    path="./state",
    name="tasks",
    multithreading=True,  # Enables WAL mode
    timeout=30.0  # Increase timeout
)
"""

# As printed it never commits, and the transaction it leaves open would hold the write lock for an
# hour.
CLEANUP = """import asyncio, sqlite3
from queue_helpers import QUEUE_DB
async def cleanup_old_tasks():
    while True:
        conn = sqlite3.connect(QUEUE_DB)
        conn.execute(
            "DELETE FROM task_history WHERE completed_at < datetime('now', '-24 hours')"
        )
        conn.commit()
        await asyncio.sleep(3600)  # Cleanup every hour
"""

CRASHES = """import sys
from queue_helpers import get_ack_queue
# Use AckQueue instead of SQLiteQueue
queue = get_ack_queue("approvals")  # Tasks persist until ack'd
print(queue.get()[0], flush=True)
sys.stdin.read()
"""


class Enough(BaseException):
    """Ends the endless loops of the snippets; their `except Exception` lets it through."""


def run(snippet: str, **names) -> dict:
    """Run a snippet; one that awaits is the body of a coroutine function."""
    if "await " in snippet and "async def" not in snippet:
        exec("async def main():\n" + textwrap.indent(snippet, "    "), names)
        try:
            asyncio.run(asyncio.wait_for(names["main"](), 30))
        except Enough:
            pass
    else:
        exec(snippet, names)
    return names


@pytest.fixture
def home(tmp_path):
    """A HOME with queue_helpers.py where the quick reference has it, a workspace, and no
    TASK_QUEUE_STATE.
    """
    library = tmp_path / ".claude/automation/lychee/runtime/lib"
    copy_scripts(library)
    (tmp_path / "workspace").mkdir()
    (tmp_path / "hook.py").write_text(OPTION_A)
    return tmp_path


def hook(home, *command) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=home / "workspace",
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
    )


def stored(home) -> list:
    conn = sqlite3.connect(home / ".claude/automation/lychee/state/tasks.db")
    rows = [
        (task_type, json.loads(data))
        for task_type, data in conn.execute("select task_type, data from notifications")
    ]
    conn.close()
    return rows


def test_option_a_the_python_hook(home):
    done = hook(home, sys.executable, str(home / "hook.py"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [(task_type, envelope)] = stored(home)
    assert task_type == "link_validation" and envelope["data"] == {
        "workspace_path": str(home / "workspace")
    }


def test_option_b_the_sqlite3_hook(home):
    hook(home, sys.executable, str(home / "hook.py"))
    done = hook(home, "bash", "-c", OPTION_B)
    assert (done.returncode, done.stdout, done.stderr) == (0, "wal\n", "")
    assert stored(home)[1] == ("notifications", {"workspace": str(home / "workspace")})


def test_option_b_before_any_python_ran_and_option_a_after_it(home):
    state = home / ".claude/automation/lychee/state"
    state.mkdir(parents=True)
    bare = "CREATE TABLE IF NOT EXISTS notifications (id INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL);"
    for _ in range(2):
        done = hook(home, "bash", "-c", OPTION_B.replace("INSERT", f"{bare}\nINSERT", 1))
        assert done.returncode == 0, done.stderr
    assert hook(home, sys.executable, str(home / "hook.py")).returncode == 0
    types = [task_type for task_type, _ in stored(home)]
    assert types == ["notifications", "notifications", "link_validation"]


def test_the_consumer_loop_sees_the_tasks_of_other_processes(installation, queue):
    seen = []

    async def process_task(data):
        seen.append(data)
        # The loop has its queue open, and has found it empty at least once when these come.
        if len(seen) == 1:
            await asyncio.to_thread(
                installation.enqueue, "notifications", "link_validation", '{"workspace_path": "/w"}'
            )
            await asyncio.to_thread(
                installation.sqlite3,
                """INSERT INTO notifications (data) VALUES ('{"workspace": "/x"}')""",
            )
        if len(seen) == 3:
            raise Enough

    later = threading.Timer(0.5, installation.enqueue, ["notifications", "first"])
    later.start()
    run(CONSUMER, process_task=process_task)
    later.join()
    assert (
        seen[0]["task_type"] == "first"
        and seen[1]["data"] == {"workspace_path": "/w"}
        and seen[2] == {"workspace": "/x"}
    )
    assert installation.rows("select count(*) from notifications") == [(0,)]


def test_the_ack_loop_tries_a_failed_task_again_and_finishes_the_others(installation, queue):
    seen = []

    async def long_running_subprocess(task_json):
        number = json.loads(task_json)["data"]["n"]
        seen.append(number)
        done = await asyncio.create_subprocess_exec(
            "true" if seen.count(2) != 1 or number != 2 else "false"
        )
        if await done.wait():
            raise RuntimeError("failed")
        if len(seen) == 5:
            raise Enough

    for number in (1, 2, 3):
        installation.enqueue("approvals", "review", json.dumps({"n": number}))
    later = threading.Timer(
        0.5, installation.enqueue, ["approvals", "review", '{"n": 4}', "--delay", "1.2"]
    )
    later.start()
    run(ACK_LOOP, long_running_subprocess=long_running_subprocess)
    later.join()
    assert sorted(seen) == [1, 2, 2, 3, 4] and seen[-1] == 4
    finished = installation.rows(
        "select row_id, status, attempts from task_history order by row_id"
    )
    assert finished == [(1, "completed", 1), (2, "completed", 2), (3, "completed", 1)]


def test_the_ack_loop_ends_with_empty_after_its_timeout(queue):
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        run(ACK_LOOP.replace("timeout=5", "timeout=0.5"), long_running_subprocess=None)
    assert 0.5 <= time.monotonic() - began < 2


def test_a_deterministic_task_id_prevents_duplicates(installation, queue):
    names = {"workspace_hash": "a1b2", "session_id": "s-1", "data": {"workspace_path": "/w"}}
    run(DEDUPLICATION, **names)
    run(DEDUPLICATION, **names)
    assert installation.rows("select task_id from notifications") == [("a1b2_s-1",)]
    run(DEDUPLICATION, **names | {"session_id": "s-2"})
    assert installation.rows("select count(*) from notifications") == [(2,)]


class Drain:
    """Callbacks for QueueWatcher that drain the queue and remember what, and in which loop."""

    def __init__(self, queue, expected_loop=None) -> None:
        self.queue, self.seen, self.loops = queue, [], set()

    def plain(self) -> None:
        while (task := self.queue.dequeue_task("notifications")) is not None:
            self.seen.append(task["task_type"])

    async def coroutine(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        await asyncio.to_thread(self.plain)


def put_and_see(installation, seen: list) -> None:
    """Three writers of three kinds; each is heard well before any tick."""
    for number, put in enumerate(
        [
            lambda: installation.enqueue("notifications", "python"),
            lambda: installation.sqlite3(
                """INSERT INTO notifications (data) VALUES ('{"hook_event_name": "bash"}')"""
            ),
            lambda: installation.enqueue("notifications", "again"),
        ]
    ):
        put()
        wait_for(lambda number=number: len(seen) == number + 1, 2, f"callback {number}")
    assert seen == ["python", "bash", "again"]


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_queue_watcher_made_outside_of_a_loop_calls_back(installation, queue, kind):
    queue.connect()
    drain = Drain(queue)
    observer = run(WATCHER, process_queue=getattr(drain, kind))["observer"]
    try:
        put_and_see(installation, drain.seen)
    finally:
        observer.stop()
        observer.join()


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_queue_watcher_made_in_a_running_loop_calls_back_in_that_loop(installation, queue, kind):
    queue.connect()
    drain = Drain(queue)

    async def main():
        observer = run(WATCHER, process_queue=getattr(drain, kind))["observer"]
        try:
            await asyncio.to_thread(put_and_see, installation, drain.seen)
        finally:
            observer.stop()
        return asyncio.get_running_loop()

    loop = asyncio.run(main())
    assert drain.loops == ({loop} if kind == "coroutine" else set())


def test_a_queue_watcher_may_be_the_first_thing_that_a_fresh_machine_sees(installation, queue):
    drain = Drain(queue)
    observer = run(WATCHER, process_queue=drain.plain)["observer"]
    try:
        put_and_see(installation, drain.seen)
    finally:
        observer.stop()
        observer.join()


def test_a_queue_watcher_survives_a_callback_that_raises(installation, queue):
    queue.connect()
    drain, calls = Drain(queue), []

    def broken_at_first():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the first call")
        drain.plain()

    observer = run(WATCHER, process_queue=broken_at_first)["observer"]
    try:
        installation.enqueue("notifications", "one")
        wait_for(lambda: calls, 2)
        installation.enqueue("notifications", "two")
        wait_for(lambda: drain.seen == ["one", "two"], 2)
    finally:
        observer.stop()
        observer.join()


def test_a_queue_of_ones_own_in_a_relative_directory(tmp_path, monkeypatch, queue):
    monkeypatch.chdir(tmp_path)
    mine = run(LOCKED)["queue"]
    try:
        assert mine.put({"n": 1}) == 1
        # The path meant the directory of that time.
        monkeypatch.chdir("/")
        insert = """INSERT INTO tasks (data) VALUES ('{"n": 2}'); PRAGMA journal_mode; SELECT count(*) FROM tasks"""
        done = subprocess.run(
            ["sqlite3", tmp_path / "state/tasks.db", insert], capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("wal\n2\n", "")
        assert [json.loads(mine.get(timeout=1)) for _ in range(2)] == [{"n": 1}, {"n": 2}]
    finally:
        queue.resign(tmp_path / "state")


def test_a_timeout_outlasts_a_locked_database(tmp_path, monkeypatch, queue):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 500)
    mine = run(LOCKED)["queue"]
    lock = sqlite3.connect(
        tmp_path / "state/tasks.db", isolation_level=None, check_same_thread=False
    )
    lock.execute("begin immediate")
    hold = queue.BUSY_TIMEOUT_MS / 1000 + 0.7
    release = threading.Timer(hold, lock.execute, ["rollback"])
    release.start()
    began = time.monotonic()
    assert mine.put({"n": 1}) == 1
    assert time.monotonic() - began >= hold - 0.1
    release.join()
    lock.close()


@pytest.mark.parametrize("by_hand", ["python", "sqlite3"])
def test_the_cleanup_deletes_what_finished_more_than_a_day_ago(installation, queue, by_hand):
    for hours in (1, 23, 25, 48):
        task_id = installation.enqueue("notifications", "t", "--task-id", f"{hours}-hours")
        assert queue.dequeue_task("notifications")["task_id"] == task_id
        at = f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{hours} hours')"
        installation.sqlite3(
            f"update task_history set completed_at = {at} where task_id = '{task_id}'"
        )
    installation.enqueue("notifications", "t", "--task-id", "waits")
    if by_hand == "python":
        cleanup = run(CLEANUP)["cleanup_old_tasks"]

        async def main():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(cleanup(), 0.2)

        asyncio.run(main())
    else:
        installation.sqlite3(
            "DELETE FROM task_history WHERE completed_at < datetime('now', '-24 hours')"
        )
    kept = installation.rows("select task_id from task_history order by id")
    assert kept == [("1-hours",), ("23-hours",)]
    assert installation.rows("select task_id from notifications") == [("waits",)]


def test_a_claim_survives_the_kill_of_its_process(installation, queue):
    installation.enqueue("approvals", "review", '{"n": 1}')
    doomed = installation.start_python(CRASHES)
    with doomed:
        row_id = int(doomed.stdout.readline())
        # Opening takes nothing from processes that run.
        survivor = queue.get_ack_queue("approvals")
        with pytest.raises(queue.Empty):
            survivor.get(timeout=0.5)
        doomed.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        task_id, task_json = survivor.get(timeout=10)
        # The kernel told of it; it was not found by a tick.
        assert time.monotonic() - killed < 2
    assert task_id == row_id and json.loads(task_json)["data"] == {"n": 1}
    assert survivor.ack(task_id) == task_id
    assert installation.rows("select attempts, status from task_history") == [(2, "completed")]
