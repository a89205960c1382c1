"""A hook pays for the standard library alone, and has its task on disk when the call returns."""

import fcntl
import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.core

HEAVY = ("persistqueue", "watchdog", "asyncio", "dataclasses", "inspect", "logging", "subprocess", "argparse", "uuid", "random",
         "datetime", "hashlib", "socket", "concurrent.futures", "typing")  # fmt: skip

ENQUEUE = """
import sys
sys.path.insert(0, sys.argv[1])
import queue_helpers
from queue_helpers import *
after_import = set(sys.modules)
queue_helpers.enqueue_task("notifications", "t", {"n": 1})
queue_helpers.enqueue_task("notifications", "t", {"n": 2}, "an id", delay=1, priority=2, window=3)
queue_helpers.enqueue_tasks("notifications", [{"task_type": "t", "data": {}}] * 3)
try:
    queue_helpers.enqueue_task("notifications", "t", {"n": {1}})
except queue_helpers.InvalidTask:
    pass
import json
print(json.dumps(sorted(sys.modules)))
"""


def test_it_loads_nothing_heavy_and_needs_no_site_packages(installation):
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ENQUEUE, ROOT],
        env=installation.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    # sqlite3 of Python 3.11 to 3.13 needs datetime for its adapters and collections for its rows.
    allowed = {"datetime"}
    assert [name for name in HEAVY if name in loaded and name not in allowed] == []
    assert installation.rows("select count(*) from notifications") == [(5,)]


@pytest.mark.parametrize(
    "args",
    [["notifications", "t", "{}"], ["--hook", "notifications"], ["notifications", "t", "--jsonl"]],
    ids=" ".join,
)
def test_nor_does_enqueue_py(installation, args):
    code = """if True:
        import runpy, sys, os
        script = sys.argv.pop(1)
        sys.path.insert(0, os.path.dirname(script))
        del sys.argv[0]
        sys.argv.insert(0, script)
        leave = os._exit
        def tell(code):
            sys.stderr.write(" ".join(sys.modules)); sys.stderr.flush(); leave(code)
        os._exit = tell
        runpy.run_path(script, run_name="__main__")
    """
    # A worker serves the queue, as it usually does.
    lock = installation.state / "workers/serving.notifications"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, ROOT / "enqueue.py", *args],
            env=installation.env,
            input='{"a": 1}',
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0
    loaded = done.stderr.split()
    assert "queue_helpers" in loaded
    heavy = "persistqueue watchdog asyncio dataclasses argparse subprocess logging"
    assert {*heavy.split()}.isdisjoint(loaded)
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_importing_touches_no_disk(installation):
    installation.python("import queue_helpers", check=True)
    assert not installation.state.exists()


RETURNS = {
    "enqueue_task": "q.enqueue_task('notifications', 't', {'n': %d})",
    "enqueue_tasks": "q.enqueue_tasks('notifications', [{'task_type': 't', 'data': {'n': %d}}])",
    "put of a queue": "q.get_queue('notifications').put({'n': %d})",
    "put of an ack queue": "q.get_ack_queue('notifications').put({'n': %d})",
    "spool": "q.spool('notifications', '{\"n\": %d}')",
}


@pytest.mark.parametrize("how", RETURNS)
def test_what_returned_is_there_although_the_process_was_killed_at_once(installation, queue, how):
    code = f"import os, queue_helpers as q; {RETURNS[how]}; os.kill(os.getpid(), 9)"
    for number in range(5):
        done = installation.python(code % number)
        assert done.returncode == -signal.SIGKILL
    queue.take_in_spool()
    found = "select coalesce(json_extract(data, '$.data.n'), json_extract(data, '$.n')) from notifications order by id"
    assert installation.rows(found) == [(number,) for number in range(5)]


def test_what_was_printed_as_queued_is_there_although_the_process_was_killed_at_once(installation):
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, ROOT / "enqueue.py", "notifications", "t"],
            env=installation.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        task_id = process.stdout.readline().split()[1]
        process.kill()
        process.communicate()
        assert installation.rows("select 1 from notifications where task_id = ?", task_id)


def test_a_put_is_synced_to_the_disk_before_it_returns_and_so_is_an_ack(installation, queue):
    """A claim need not be: to lose one means to claim again."""
    mine = queue.get_ack_queue("notifications")
    conn, level, seen = queue.connect(), "pragma synchronous", []

    def at_commit(statement):
        if statement == "commit":
            seen.append(level_now[0])
        if statement.startswith(level) and "=" in statement:
            level_now[0] = statement.split()[-1]

    level_now = [{1: "normal", 2: "full"}[conn.execute(level).fetchone()[0]]]
    conn.set_trace_callback(at_commit)
    try:
        queue.enqueue_task("notifications", "t", {})
        mine.put({})
        mine.ack(mine.get()[0])
        mine.nack(mine.get()[0])
        queue.get_queue("notifications").put({})
        queue.dequeue_task("notifications")
    finally:
        conn.set_trace_callback(None)
    assert seen == ["full", "full", "normal", "full", "normal", "full", "full", "full"]
