import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT, wait_for, wait_for_word
from processes import WAIT, lines, stays_true

QUICK = "#!/bin/sh\n"


@pytest.fixture
def mount(installation):
    """mount(options…) puts something on the state directory, or skips; it is taken off at the end."""
    mounted = []

    def make(*options):
        done = subprocess.run(
            ["mount", *map(str, options), installation.state], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs root and mount: {done.stderr.strip()}")
        if "remount" not in str(options):
            mounted.append(installation.state)

    make.undo = lambda: subprocess.run(["umount", "-l", mounted.pop()], check=True)
    yield make
    for process in installation.processes:
        process.kill()
        process.wait()
    while mounted:
        make.undo()


@pytest.fixture
def immutable():
    """immutable(path) lets nobody write or remove a file, root included, or skips; undone at the end."""
    made = []

    def make(path):
        if not shutil.which("chattr") or subprocess.run(["chattr", "+i", path]).returncode:
            pytest.skip("needs root, chattr and a file system that knows it")
        made.append(path)

    def undo():
        while made:
            subprocess.run(["chattr", "-i", made.pop()], check=True)

    make.undo = undo
    yield make
    undo()


@pytest.fixture(autouse=True)
def commands_have_their_own_process(installation):
    """This process would remember the database from before the fault."""
    installation.is_inside = False


@contextmanager
def locked(installation, how: str = "immediate"):
    conn = sqlite3.connect(installation.db, isolation_level=None)
    conn.execute(f"begin {how}")
    yield
    conn.execute("rollback")
    conn.close()


def troubles(worker) -> list[str]:
    return [line for line in worker.log.read_text().splitlines() if "trouble" in line]


def it_said_so_once(worker, word: str, seconds: float = 1) -> None:
    """The worker says what the trouble is, goes on, and does not repeat it."""
    wait_for(lambda: troubles(worker) or worker.poll() is not None, what="a word on it")
    assert stays_true(lambda: len(troubles(worker)) == 1 and worker.poll() is None, seconds), (
        worker.log.read_text()
    )
    assert word in troubles(worker)[0]


def a_run(installation, *options, handler=WAIT):
    """Start a worker that runs a task; return it and the task's id."""
    installation.handler("wait", handler)
    installation.handler("quick", QUICK)
    task = installation.enqueue("notifications", "wait")
    worker = installation.worker("notifications", "--concurrency", 2, *options)
    wait_for(lambda: lines(installation.directory / "runs"))
    return worker, task


def it_ended_well(installation, task: str, worker, result: str = "done\n") -> None:
    """The handler that ended during the trouble is recorded, ran once, and the next task runs."""
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["result"]) == ("completed", 1, result)
    assert len(installation.lines()) == 1
    assert installation.ends_well("notifications", "quick") and worker.poll() is None


def copied(installation) -> str:
    """Copy the database, and take its sidecars away."""
    copy = str(installation.directory / "copy.db")
    installation.sqlite3(f"vacuum into '{copy}'")
    for name in ("tasks.db-wal", "tasks.db-shm"):
        (installation.state / name).unlink()
    return copy


def remove(directory) -> None:
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)


def test_the_state_directory_was_deleted_again_and_again(installation):
    installation.handler("quick", QUICK)
    worker = installation.worker("notifications")
    assert installation.ends_well("notifications", "quick")
    remove(installation.state)
    it_said_so_once(worker, "")
    # Whoever moves another there, a backup say, must find the place free.
    assert not installation.state.exists()

    def held() -> tuple[int, int]:
        return tuple(len(os.listdir(f"/proc/{worker.pid}/{what}")) for what in ("fd", "task"))

    counts = []
    for _ in range(8):
        assert installation.ends_well("notifications", "quick")
        assert stat.S_IMODE(installation.state.stat().st_mode) == 0o700
        counts.append(held())
        remove(installation.state)
    assert "can be used again" in worker.log.read_text() and worker.poll() is None
    descriptors, threads = counts[0]
    wait_for(
        lambda: held()[0] <= descriptors + 5 and held()[1] <= threads + 4,
        7,
        f"the release of what it held: {counts}",
    )


def test_the_state_directory_was_deleted_while_a_handler_ran(installation):
    worker, _ = a_run(installation)
    remove(installation.state)
    (installation.directory / "go").touch()
    wait_for(lambda: troubles(worker), what="a word on it")
    assert installation.ends_well("notifications", "quick")
    wait_for(lambda: "lost" in worker.log.read_text(), what="a word on the run whose task is gone")
    assert worker.poll() is None and len(troubles(worker)) == 1


def test_the_state_directory_was_moved_and_came_back(installation):
    worker = installation.worker("notifications")
    installation.state.rename(installation.directory / "moved")
    it_said_so_once(worker, "")
    assert not installation.state.exists()
    (installation.directory / "moved").rename(installation.state)
    installation.handler("quick", QUICK)
    assert installation.ends_well("notifications", "quick") and worker.poll() is None


def test_the_state_directory_was_replaced_by_one_that_knows_fewer_queues(installation):
    installation.handler("quick", "#!/bin/sh\necho '{}'\n")
    worker = installation.worker("emails", "--then", "replies")
    remove(installation.state)
    task = installation.enqueue("emails", "quick")
    assert installation.finished(task, 8)["status"] == "completed"
    assert len(installation.rows("select 1 from replies")) == 1 and worker.poll() is None


def test_a_backup_was_restored_that_knows_fewer_queues(installation):
    installation.handler("wait", WAIT)
    installation.enqueue("notifications", "wait", "--delay", 3600)
    backup = installation.directory / "backup.db"
    installation.sqlite3(f"vacuum into '{backup}'")
    installation.enqueue("emails", "wait")
    worker = installation.worker("emails", "--concurrency", 2, "--then", "replies")
    wait_for(installation.lines)
    subprocess.run(["sqlite3", installation.db, f".restore '{backup}'"], check=True)
    wait_for(lambda: troubles(worker) or worker.poll() is not None, what="a word on it")
    installation.let_go()
    task = installation.enqueue("emails", "wait")
    wait_for(lambda: installation.history(task) or worker.poll() is not None, 8, "the next end")
    assert worker.poll() is None, worker.log.read_text()


def test_the_database_was_replaced(installation):
    worker, task = a_run(installation)
    os.replace(copied(installation), installation.db)
    installation.let_go()
    # The claim was in the copy.
    it_ended_well(installation, task, worker)


def test_the_database_was_damaged_and_then_mended(installation):
    worker, task = a_run(installation)
    copy, garbage = copied(installation), installation.directory / "garbage"
    garbage.write_bytes(b"garbage" * 4096)
    os.replace(garbage, installation.db)
    installation.let_go()
    it_said_so_once(worker, "not a database")
    for sidecar in installation.state.glob("tasks.db-*"):
        sidecar.unlink()
    os.replace(copy, installation.db)
    it_ended_well(installation, task, worker)
    assert "can be used again" in worker.log.read_text()


def test_the_database_was_locked_for_longer_than_it_waits(installation):
    worker, task = a_run(installation)
    with locked(installation, "exclusive"):
        installation.let_go()
        it_said_so_once(worker, "locked")
        assert "fuser" in troubles(worker)[0]
    it_ended_well(installation, task, worker)


def test_timeouts_hold_while_the_database_is_locked(installation):
    installation.handler(
        "slow",
        """#!/bin/sh
trap 'date +%s.%N >"$HOME/termed"' TERM
date +%s.%N >"$HOME/began"
sleep 100 & wait; kill $!
""",
    )
    installation.enqueue("notifications", "slow")
    installation.worker("notifications", "--timeout", 1, "--concurrency", 2)
    wait_for(lambda: installation.lines("began"))
    with locked(installation):
        (installation.state / "wake").touch()
        wait_for(lambda: installation.lines("termed"), 10)
    began, termed = (float(installation.lines(name)[0]) for name in ("began", "termed"))
    assert 0.9 < termed - began < 3.5


def test_a_stop_is_heard_while_the_database_is_locked(installation):
    worker, _ = a_run(installation, "--grace", 0)
    with locked(installation):
        worker.send_signal(signal.SIGTERM)
        wait_for(lambda: troubles(worker), what="a word on it")
        # It still has to say that its task is free.
        assert worker.poll() is None
    assert worker.wait(10) == 0
    assert installation.rows("select status, attempts, owner from notifications") == [(1, 0, None)]


def test_the_disk_was_full(installation, mount):
    installation.state.mkdir(mode=0o700)
    mount("-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs")
    # With `echo`, it could not write its output.
    worker, task = a_run(installation, handler=WAIT.replace("echo done", ":"))
    with open(installation.state / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 512)
        except OSError:
            pass
    # This one does not fit into what is left of the log's last page.
    large = '{"x": "%s"}' % ("x" * 500_000)
    refused = installation.run("enqueue.py", "notifications", "quick", "-", input=large)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "disk is full" in refused.stderr
    installation.let_go()
    it_said_so_once(worker, "disk is full")
    (installation.state / "filler").unlink()
    it_ended_well(installation, task, worker, "")


def test_the_write_ahead_log_was_not_writable(installation, immutable):
    worker, task = a_run(installation)
    immutable(installation.state / "tasks.db-wal")
    installation.let_go()
    it_said_so_once(worker, "")
    immutable.undo()
    it_ended_well(installation, task, worker)
    assert "can be used again" in worker.log.read_text()


def test_the_state_directory_was_read_only(installation, mount):
    """What is open stays writable: the worker says that it cannot start handlers, uncounted."""
    installation.handler("quick", QUICK)
    installation.enqueue("notifications", "quick", "--delay", 3600)
    worker = installation.worker("notifications", "--max-attempts", 1)
    opened = sqlite3.connect(installation.db, isolation_level=None)
    opened.execute("select count(*) from notifications").fetchone()
    mount("--bind", installation.state)
    mount("-o", "remount,bind,ro")
    row = '{"task_id": "it", "task_type": "quick", "data": {}}'
    opened.execute("insert into notifications (data) values (?)", (row,))
    opened.close()
    wait_for_word(worker, "Read-only")
    assert worker.poll() is None and installation.history("it") is None
    mount.undo()
    done = installation.finished("it")
    assert (done["status"], done["attempts"]) == ("completed", 1)
    assert worker.log.read_text().count("Read-only") == 1


def test_a_spooled_file_that_cannot_be_removed_holds_up_nothing(installation, immutable):
    installation.handler("quick", QUICK)
    installation.enqueue("notifications", "quick")
    spool = installation.state / "spool" / "notifications"
    spool.mkdir(parents=True)
    (spool / "stuck.json").write_text('{"task_id": "stuck", "task_type": "quick", "data": {}}')
    immutable(spool / "stuck.json")
    worker = installation.worker("notifications")
    installation.finished("stuck", 8)
    assert installation.ends_well("notifications", "quick")
    immutable.undo()
    assert installation.rows("select count(*) from task_history where task_id = 'stuck'") == [(1,)]
    assert worker.poll() is None


def test_a_lock_between_the_two_steps_of_taking_in_the_spool_is_explained(
    installation, queue, monkeypatch
):
    queue.ensure_queue(queue.connect(), "notifications")
    path = queue.spool("notifications", '{"task_id": "it", "task_type": "quick", "data": {}}')
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 50)
    queue.close(queue.connect())
    other = sqlite3.connect(installation.db, isolation_level=None)
    unlink = queue.Path.unlink

    def locked_meanwhile(self, *args, **kwargs):
        if self == path:
            other.execute("begin immediate")
        return unlink(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(queue.Path, "unlink", locked_meanwhile)
        try:
            queue.take_in_spool()
        except queue.QueueError:
            # A worker goes on after this one, and not after sqlite3's.
            pass
    other.execute("rollback")
    other.close()
    queue.take_in_spool()
    assert installation.rows("select task_id from notifications") == [("it",)]


@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_no_file_events_could_be_had(installation, limit):
    inside = f'echo 0 >/proc/sys/user/{limit} && exec "$@"'
    unshare = ["unshare", "-Ur", "sh", "-c", inside, "sh"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs user namespaces")
    installation.handler("quick", QUICK)
    words = [sys.executable, ROOT / "worker.py", "notifications"]
    log = installation.directory / "polls.log"
    with open(log, "w") as file:
        worker = subprocess.Popen(
            [*unshare, *words, "--handlers", installation.handlers],
            env=installation.env,
            stderr=file,
        )
    worker.log = log
    installation.processes.append(worker)
    wait_for_word(worker, "no file events", seconds=60)
    for _ in range(3):
        task = installation.enqueue("notifications", "quick")
        began = time.monotonic()
        installation.finished(task)
        assert time.monotonic() - began < 1
        # By then it sleeps again.
        time.sleep(0.4)
    assert log.read_text().count("no file events") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the number was measured on Linux")
def test_there_were_too_few_descriptors_for_all_its_places(installation):
    """The supervisor keeps one for each handler that runs."""

    def few_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

    installation.handler("any", WAIT)
    worker = installation.worker("notifications", "--concurrency", 60, preexec_fn=few_descriptors)
    installation.enqueue("notifications", "any", "--jsonl", input='{"n": 1}\n' * 60)
    wait_for_word(worker, "could not be started")
    installation.let_go()
    installation.ended(60)
    counts = "select status, attempts, count(*) from task_history"
    assert installation.rows(counts) == [("completed", 1, 60)]
    assert len(installation.lines()) == 60


def test_nobody_reads_what_it_says_and_its_terminal_was_closed(installation):
    """As with nohup, and a pipe whose reader has gone."""
    installation.handler("quick", QUICK)
    worker = subprocess.Popen(
        [sys.executable, ROOT / "worker.py", "notifications", "--handlers", installation.handlers],
        env=installation.env,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    installation.processes.append(worker)
    assert b"serves" in worker.stderr.readline()
    worker.stderr.close()
    worker.send_signal(signal.SIGHUP)
    for _ in range(2):
        assert installation.ends_well("notifications", "quick")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 0


def test_a_row_was_claimed_by_somebody_who_leaves_no_name(installation):
    """persist-queue itself does it like that, on the same table."""
    installation.handler("quick", QUICK)
    installation.handler("long", '#!/bin/sh\necho "$$" >>"$HOME/runs"\nexec sleep 100\n')
    installation.enqueue("notifications", "quick")
    installation.sqlite3("update notifications set status = 2")
    installation.enqueue("notifications", "long")
    holder = installation.worker("notifications")
    wait_for(installation.lines)
    survivor = installation.worker("notifications", "--max-attempts", 4)
    holder.kill()
    holder.wait()
    os.killpg(int(installation.lines()[0]), signal.SIGKILL)
    wait_for(lambda: len(installation.lines()) == 2, 4, "the next run of a dead worker's task")
    assert "Traceback" not in survivor.log.read_text()
    os.killpg(int(installation.lines()[1]), signal.SIGKILL)
