"""Thirty-two processes open a state directory that does not exist yet, at the same moment."""

import importlib
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.first

# The parent is warm and waits; its children start to open within a millisecond of each other. Some
# are hooks that have nothing but the sqlite3 command. Prints a line per round: the exit codes that
# were not 0, and what was said.
OPENERS = """
import os, subprocess, sys
import queue_helpers as q
from pathlib import Path
kind, directory = sys.argv[1], Path(sys.argv[2])
BARE = '''.timeout 10000
CREATE TABLE IF NOT EXISTS notifications (id INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL);
INSERT INTO notifications (data) VALUES ('{"n": %d}');
'''

def child(n, state):
    if kind == "mixed" and n % 4 == 0:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        run = subprocess.run(["sqlite3", "-bail", state / "tasks.db"], input=BARE % n, text=True, capture_output=True)
        if run.returncode:
            raise RuntimeError(run.stderr.strip())
    elif n % 3 == 0:
        q.connect(state)
        q.enqueue_tasks(f"own_{n % 2}", [{"task_type": "t", "data": {"n": n}}], state=state)
    else:
        q.enqueue_tasks("notifications", [{"task_type": "t", "data": {"n": n}}], state=state)

for round in range(int(sys.argv[3])):
    state = directory / str(round) / "state"
    go, gone = os.pipe()
    read, write = os.pipe()
    children = []
    for n in range(32):
        pid = os.fork()
        if not pid:
            os.close(gone)
            os.read(go, 1)
            try:
                child(n, state)
                os._exit(0)
            except BaseException as error:
                os.write(write, f"{n}: {type(error).__name__} {error}; ".encode())
                os._exit(1)
        children.append(pid)
    os.close(go); os.close(gone); os.close(write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    with open(read) as said:
        print(sum(map(bool, codes)), said.read().replace(chr(10), " "), flush=True)
"""


# An open that does not wait for long where somebody holds the lock.
OTHER = """
import queue_helpers as q
q.BUSY_TIMEOUT_MS = 300
q.enqueue_task("notifications", "t", {})
"""


def expected_layout(directory) -> list:
    """Return what one open after another makes."""
    env = {"TASK_QUEUE_STATE": str(directory), "PATH": os.environ["PATH"], "HOME": str(directory)}
    for queue in ("notifications", "own_0", "own_1"):
        subprocess.run(
            [sys.executable, ROOT / "enqueue.py", queue, "t"],
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return layout(directory)


def layout(state) -> list:
    conn = sqlite3.connect(state / "tasks.db")
    try:
        return sorted(conn.execute("select type, name, tbl_name, sql from sqlite_master"))
    finally:
        conn.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["python", "mixed"])
def test_all_tasks_are_stored_in_the_layout_of_one_open_after_another(installation, tmp_path, kind):
    done = installation.python(OPENERS, kind, tmp_path, 5)
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if not line.startswith("0 ")] == []
    assert len(done.stdout.splitlines()) == 5
    one_by_one = expected_layout(tmp_path / "one by one")
    for state in (path / "state" for path in tmp_path.iterdir() if path.name.isdecimal()):
        conn = sqlite3.connect(state / "tasks.db")
        seen = []
        for queue in ("notifications", "own_0", "own_1"):
            find = f"select coalesce(json_extract(data, '$.data.n'), json_extract(data, '$.n')) from {queue}"
            seen += [n for (n,) in conn.execute(find)]
        assert sorted(seen) == list(range(32))
        assert conn.execute("pragma journal_mode").fetchone() == ("wal",)
        assert conn.execute("pragma integrity_check").fetchone() == ("ok",)
        conn.close()
        assert layout(state) == one_by_one
        assert (
            state.stat().st_mode & 0o777 == 0o700
            and (state / "tasks.db").stat().st_mode & 0o777 == 0o600
        )


@pytest.mark.parametrize(
    "moment",
    [
        "table_names",
        "is_bare",
        "_switch_to_wal",
        "_make_schema",
        "transaction",
    ],
)
@pytest.mark.parametrize("bare", [False, True], ids=["nothing was there", "a bare table was there"])
def test_an_open_that_is_overtaken_half_way_by_another_first_open(
    installation, queue, monkeypatch, moment, bare
):
    """The other makes the whole schema at each of the moments in which ours has looked, and not yet
    acted.
    """
    if bare:
        installation.state.mkdir()
        installation.sqlite3(
            "CREATE TABLE notifications (id INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL)"
        )
    elif moment == "is_bare":
        pytest.skip("it is asked of tables")
    module = queue if hasattr(queue, moment) else importlib.import_module("taskqueue.migrate")
    real, overtakings = getattr(module, moment), []

    def overtaken(*args, **options):
        if not overtakings:
            overtakings.append(installation.python(OTHER))
        return real(*args, **options)

    monkeypatch.setattr(module, moment, overtaken)
    assert queue.enqueue_tasks("notifications", [{"task_type": "t", "data": {}}])[0][1]
    # Ours may hold a lock at that moment, and the other says so.
    [other] = overtakings
    assert other.returncode == 0 or "QueueBusy" in other.stderr, other.stderr
    stored = 1 + (other.returncode == 0)
    assert installation.rows("select count(*) from notifications") == [(stored,)]
