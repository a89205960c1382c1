"""What is removed or replaced under living processes is noticed by each, and said; all go on
together.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time

import pytest
from conftest import wait_for

WRITER = """
import sys
import queue_helpers as q
q.enqueue_task("notifications", "t", {})
print("ready", flush=True)
for line in sys.stdin:
    try:
        q.enqueue_task("notifications", "t", {}, line.strip())
        print("stored", flush=True)
    except q.QueueError as error:
        print(error, flush=True)
"""


class Writer:
    """A process that stores the tasks that it is told."""

    def __init__(self, installation, name: str) -> None:
        self.log = installation.directory / f"{name}.log"
        with open(self.log, "w") as log:
            self.process = installation.start_python(WRITER, stderr=log)
        assert self.process.stdout.readline() == "ready\n", self.log.read_text()

    def store(self, task_id: str) -> str:
        """Return what the writer says of it."""
        self.process.stdin.write(f"{task_id}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def stored(installation) -> set[str]:
    return {task for (task,) in installation.rows("select task_id from notifications")}


@pytest.mark.parametrize("removed", ["-wal", "-wal -shm", "-shm"])
def test_a_log_that_was_removed_is_told_by_each_process_and_all_write_on(installation, removed):
    writers = [Writer(installation, name) for name in ("a", "b", "c")]
    assert [writer.store(f"before {n}") for n, writer in enumerate(writers)] == ["stored"] * 3
    for ending in removed.split():
        os.unlink(f"{installation.db}{ending}")
    for number, writer in enumerate(writers):
        tries = iter(range(100_000))
        # It looks once a second.
        wait_for(
            lambda writer=writer, number=number, tries=tries: (
                writer.store(f"meanwhile {number} {next(tries)}")
                and "tasks.py doctor" in writer.log.read_text()
            ),
            what="a word on the log that is lost",
        )
    for writer in writers:
        said = writer.log.read_text()
        assert said.count("was removed while it was in use") == 1, said
        assert "Traceback" not in said
    # Now all are on one database again: what one stores, the others have.
    assert [writer.store(f"after {n}") for n, writer in enumerate(writers)] == ["stored"] * 3
    assert {"after 0", "after 1", "after 2"} <= stored(installation)
    fresh = Writer(installation, "fresh")
    assert fresh.store("of another") == "stored" and writers[0].store("at last") == "stored"
    assert {"after 0", "after 1", "after 2", "of another", "at last"} <= stored(installation)
    assert installation.sqlite3("pragma integrity_check") == "ok"


@pytest.mark.parametrize("removed", ["-wal", "-wal -shm", "-shm"])
def test_a_worker_whose_log_was_removed_runs_what_comes_after(installation, removed):
    """It has a connection in each of two threads: SQLite lets go of the old log with the last of
    them.
    """
    installation.handler("t", "#!/bin/sh\n")
    installation.enqueue("notifications", "t", "{}", "--task-id", "before")
    worker = installation.worker("notifications")
    installation.finished("before")
    for ending in removed.split():
        os.unlink(f"{installation.db}{ending}")
    tries = iter(range(100_000))

    def comes_through() -> bool:
        """Return whether a task that is enqueued now is run within a second; the first ones may be
        refused.
        """
        task_id = f"after {next(tries)}"
        done = installation.run("enqueue.py", "notifications", "t", "{}", "--task-id", task_id)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr
        until = time.monotonic() + 1
        while done.returncode == 0 and time.monotonic() < until:
            if f"{task_id} completed" in worker.log.read_text():
                return True
            time.sleep(0.01)
        return False

    # It looks once a second.
    wait_for(
        lambda: comes_through() and "was removed" in worker.log.read_text(), 60, "a word on it"
    )
    wait_for(comes_through, 30, "a task that was enqueued after it")
    said = worker.log.read_text()
    assert said.count("was removed while it was in use") == 1 and "Traceback" not in said
    assert installation.sqlite3("pragma integrity_check") == "ok"


def test_no_acknowledged_task_is_lost_with_the_shared_memory(installation):
    """The write-ahead log is there: each process finds in it what the others have stored."""
    writers = [Writer(installation, name) for name in ("a", "b")]
    for turn in range(5):
        acknowledged = [f"{turn} {n}" for n in range(10)]
        os.unlink(f"{installation.db}-shm")
        # One that opens it now makes another one.
        installation.enqueue("notifications", "t", "{}", "--task-id", f"{turn} fresh")
        for number, task_id in enumerate(acknowledged):
            assert writers[number % 2].store(task_id) == "stored"
        assert {f"{turn} fresh", *acknowledged} <= stored(installation)
        assert installation.sqlite3("pragma integrity_check") == "ok"


IN_USE = """
import sqlite3, sys, threading, time
import queue_helpers as q

q.enqueue_task("notifications", "t", {})
holder = sqlite3.connect(q.QUEUE_DB, isolation_level=None, check_same_thread=False)
holder.execute("begin immediate")
used, waits = [], threading.Event()

def put():
    used.append(q.connect())
    used[0].set_trace_callback(lambda sql: sql == "begin immediate" and waits.set())
    q.enqueue_task("notifications", "t", {}, "meanwhile")

def let_go():
    while used[0].file:
        time.sleep(0.001)
    holder.close()

putting = threading.Thread(target=put)
putting.start()
waits.wait()
q.QUEUE_DB.with_name("tasks.db-wal").unlink()
threading.Thread(target=let_go).start()
end = time.monotonic() + 10
while True:
    try:
        q.enqueue_task("notifications", "t", {}, "after")
        break
    except q.QueueUnavailable:
        # The holder may be yet to close the old log.
        assert time.monotonic() < end
putting.join()
"""


def test_a_connection_that_another_thread_uses_is_closed_when_that_one_is_done(installation):
    """Closed under a thread that was inside SQLite, it crashed the process."""
    done = installation.python(IN_USE, env={"PYTHONFAULTHANDLER": "1"})
    assert done.returncode == 0, done.stderr
    assert "was removed while it was in use" in done.stderr and "Traceback" not in done.stderr
    assert {"meanwhile", "after"} <= stored(installation)
    assert installation.sqlite3("pragma integrity_check") == "ok"


@pytest.mark.parametrize("how", ["removed", "moved away", "replaced"])
def test_another_state_directory_is_used_at_once(installation, how):
    writer = Writer(installation, "a")
    assert writer.store("before") == "stored"
    if how == "removed":
        shutil.rmtree(installation.state)
    else:
        installation.state.rename(installation.directory / "elsewhere")
    if how == "replaced":
        Writer(installation, "b")
    assert writer.store("after") == "stored"
    assert "after" in stored(installation) and "before" not in stored(installation)
    # The turn is the new directory's, too, and the old one is left as it was.
    assert (installation.state / "turn" / "turn").exists()
    for number in range(20):
        assert writer.store(f"more {number}") == "stored"


def test_each_directory_that_is_made_is_private_and_what_was_there_stays(installation, tmp_path):
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    there.chmod(0o755)
    env = {"TASK_QUEUE_STATE": str(there / "a" / "b" / "state")}
    done = installation.run("enqueue.py", "notifications", "t", env=env, umask=0o022)
    assert done.returncode == 0, done.stderr
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in [there, *there.rglob("*")]}
    assert found.pop(there) == 0o755
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}


def test_a_directorys_name_may_be_any_bytes_whatever_the_locale(installation, tmp_path):
    state = os.fsencode(tmp_path) + "/Zustände für Łukasz".encode()
    code = "import queue_helpers as q; q.enqueue_task('notifications', 't', {})"
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more in (bare, {}):
        done = installation.python(code, env={**more, "TASK_QUEUE_STATE": state})
        assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path).count("Zustände für Łukasz") == 1
    done = subprocess.run(
        ["sqlite3", state + b"/tasks.db", "select count(*) from notifications"], capture_output=True
    )
    assert done.stdout == b"2\n", done.stderr


@pytest.mark.parametrize("name", [b"a\nb", b"a\x1b[31m", b"a\x7f", "a\x85".encode(), b"relative"])
def test_a_directorys_name_with_control_characters_is_refused(installation, tmp_path, name):
    state = name if name == b"relative" else os.fsencode(tmp_path) + b"/" + name
    code = "import queue_helpers as q; q.connect()"
    done = installation.python(code, env={"TASK_QUEUE_STATE": state})
    assert done.returncode == 1 and "QueueUnavailable: TASK_QUEUE_STATE" in done.stderr
    assert "is not an absolute path" in done.stderr and "\x1b" not in done.stderr


def test_a_database_that_is_a_symbolic_link_is_used(installation, tmp_path):
    installation.enqueue("notifications", "t", "{}", "--task-id", "before")
    # The last to close it writes all of it into the one file.
    installation.sqlite3("select count(*) from notifications")
    installation.db.rename(tmp_path / "elsewhere.db")
    installation.db.symlink_to(tmp_path / "elsewhere.db")
    installation.enqueue("notifications", "t", "{}", "--task-id", "after")
    done = installation.run("worker.py", "notifications", "--drain", "--", "cat")
    assert done.returncode == 0 and "2 done" in done.stderr
    assert installation.run("tasks.py", "stats").returncode == 0


SLEEPER = """if True:
    import sys, threading, time
    import queue_helpers as q
    q.SAFETY_TICK_SECONDS = 3600.0
    queue = q.get_ack_queue("notifications")
    got = threading.Thread(target=lambda: print("got", queue.get(timeout=60)[1], flush=True))
    got.start()
    while not q.Watch.of().listening:
        time.sleep(0.005)
    print("listens", flush=True)
    got.join()
"""


@pytest.mark.parametrize("name", ["elsewhere.db", "state/real.db"])
def test_a_write_of_bash_behind_a_symbolic_link_wakes(installation, tmp_path, name):
    installation.enqueue("approvals", "t")
    installation.sqlite3("select count(*) from notifications")
    real = installation.state / "real.db" if "/" in name else tmp_path / name
    installation.db.rename(real)
    installation.db.symlink_to(real)
    process = installation.start_python(SLEEPER)
    assert process.stdout.readline() == "listens\n"
    installation.sqlite3("""insert into notifications (data) values ('{"from": "bash"}')""")
    assert process.stdout.readline().startswith("got ") and process.wait(15) == 0
