"""state/spool/QUEUE, for tasks that cannot reach the database: each is taken in once, and none
stops another.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import wait_for

import queue_helpers

pytestmark = pytest.mark.core


def put(installation, name: str, text: str | bytes, queue: str = "notifications"):
    """Leave a file as README's shell does: write it elsewhere, mv it into the spool, and wake."""
    directory = installation.state / "spool" / queue
    directory.mkdir(parents=True, exist_ok=True)
    outside = installation.directory / name
    outside.write_bytes(text.encode() if isinstance(text, str) else text)
    os.rename(outside, directory / name)
    (installation.state / "wake").write_text("\n")
    return directory / name


def test_a_worker_is_woken_by_a_file_that_is_moved_in(installation):
    installation.handler("notifications", "#!/bin/sh\n")
    installation.worker("notifications")
    put(installation, "task.json", '{"workspace": "/x"}')
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(1,)])
    # The same name again is another task.
    put(installation, "task.json", '{"workspace": "/x"}')
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(2,)])


def test_files_come_in_by_age(installation, queue):
    for number in range(20):
        path = put(installation, f"{(number * 7) % 20}.json", json.dumps({"n": number}))
        os.utime(path, (number, number))
    assert queue.take_in_spool(installation.state) == (20, [])
    rows = installation.rows("select data from notifications order by id")
    assert [json.loads(data)["n"] for (data,) in rows] == list(range(20))


def test_a_malformed_file_is_set_aside_and_named(installation, queue):
    too_large = '{"task_id": "1", "task_type": "t", "data": {"n": 1e400}}'
    malformed = ["{", "[1]", b"\xff", "", '{"n": NaN}', too_large]
    names = [f"{number}.json" for number in range(len(malformed))]
    for name, text in [*zip(names, malformed, strict=True), ("good.json", "{}")]:
        put(installation, name, text)
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 1 and len(complaints) == len(malformed)
    aside = installation.state / "spool/notifications/malformed"
    assert sorted(path.name.rsplit("-", 1)[-1] for path in aside.iterdir()) == names
    assert queue.take_in_spool(installation.state) == (0, [])


def test_a_directory_that_is_no_queue_is_named_and_left(installation, queue):
    path = put(installation, "a.json", "{}", queue="No Queue")
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 0 and "No Queue" in complaints[0] and path.exists()


def take_in_until_killed(state, moment):
    import queue_helpers

    unlink = os.unlink

    def killed(*args, **options):
        if moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    os.unlink = killed
    queue_helpers.take_in_spool(state)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_commit_and_removal_takes_nothing_in_twice(installation, queue, moment):
    path = put(installation, "task.json", "{}")
    process = multiprocessing.get_context("spawn").Process(
        target=take_in_until_killed, args=(installation.state, moment)
    )
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL and path.exists() == (moment == "before")
    assert installation.rows("select count(*) from notifications") == [(1,)]
    queue.take_in_spool(installation.state)
    assert installation.rows("select count(*) from notifications") == [(1,)] and not path.exists()


def take_in(state, barrier, results):
    import queue_helpers

    barrier.wait()
    results.put(queue_helpers.take_in_spool(state)[0])


def test_four_at_once_take_each_file_in_once(installation, queue):
    for number in range(200):
        put(installation, f"{number}.json", json.dumps({"n": number}))
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(4), spawn.Queue()
    processes = [
        spawn.Process(target=take_in, args=(installation.state, barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=30) for _ in processes) == 200
    for process in processes:
        process.join(20)
    counts = "select count(*), count(distinct data) from notifications"
    assert installation.rows(counts) == [(200, 200)]


def test_while_the_database_is_locked_the_file_stays(installation, queue, monkeypatch):
    queue.connect()
    path = put(installation, "task.json", "{}")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    queue.connect().execute("pragma busy_timeout = 50")
    with pytest.raises(queue.QueueBusy):
        queue.take_in_spool(installation.state)
    assert path.exists()
    lock.execute("rollback")
    lock.close()
    assert queue.take_in_spool(installation.state) == (1, [])


HOOK = b"hook-2\0003\0notifications\0link_validation\0--priority=3\0/tmp\0/project\0001\0000\0"


def odd_entries(installation) -> dict:
    """Put entries into the spool that come by accident or malice; return a word of each complaint."""
    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True)
    put(installation, os.fsdecode(b"n\xff.json"), "{}")
    put(installation, "\x1b]0;title\x07.json", "no JSON")
    put(installation, "worktree.hook", HOOK + b'{"hook_event_name": "WorktreeCreate"}')
    put(installation, "option.hook", HOOK.replace(b"--priority", b"--pri-ority") + b"{}")
    (directory / "directory.json").mkdir()
    os.mkfifo(directory / "fifo.json")
    (directory / "link.json").symlink_to("/etc/passwd")
    with open(directory / "large.json", "wb") as file:
        file.truncate(5 * 2**30)
    (directory / "times.json").write_text(spooled_text(due_at="soon"))
    (directory / "window.json").write_text(spooled_text(window="long"))
    (installation.state / "spool/a file").write_text("{}")
    (installation.state / "spool" / os.fsdecode(b"no\xffqueue")).mkdir()
    return {"UTF-8", "title", "WorktreeCreate", "--pri-ority", "directory.json", "fifo.json", "link.json", "large.json",
            "times.json", "window.json", "a file", "queue"}  # fmt: skip


def spooled_text(**columns) -> str:
    """Return the file that a hook of an older version left."""
    row = queue_helpers.new_row("t", {}, "an id")._asdict() | columns
    newer = ("own_attempts", "timeout", "after", "after_any")
    kept = {name: row[name] for name in row if name not in ("data", "timestamp", *newer)}
    return f'{row["data"][:-1]}, "spooled_row": {json.dumps(kept)}}}'


def test_each_odd_entry_is_one_complaint_and_the_others_are_taken_in(installation, queue):
    words = odd_entries(installation)
    put(installation, "zz.json", '{"n": 1}')
    put(installation, "aa.hook", HOOK + b'{"n": 2}')
    put(installation, "task.json", '{"n": 3}', queue="approvals")
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 3, complaints
    assert all(any(word in complaint for complaint in complaints) for word in words), complaints
    assert len(complaints) == len(words)
    assert all(complaint.isprintable() for complaint in complaints)
    # What can be no task was moved away or removed; the rest needs a person, and a worker may leave
    # meanwhile.
    assert queue.take_in_spool(installation.state)[0] == 0
    assert queue.spooled_files(installation.state / "spool/notifications") == []


def test_a_worker_claims_beside_them_and_leaves_when_it_is_idle(installation):
    installation.handler("quick", "#!/bin/sh\n")
    odd_entries(installation)
    task = installation.enqueue("notifications", "quick")
    worker = installation.worker("notifications", "--idle-exit", 0.3)
    assert installation.finished(task)["status"] == "completed"
    assert worker.wait(20) == 0, worker.log.read_text()
    assert "UTF-8" in worker.log.read_text() and "\x1b" not in worker.log.read_text()


@pytest.mark.parametrize(
    "broken",
    [
        "drop table approvals; create table approvals (x)",
        "drop view task_queue; drop table approvals; create table approvals (id integer primary key, data text, more)",
        "create trigger stop before insert on approvals begin select raise(abort, 'no'); end",
        'drop index "approvals.ready"',
    ],
)
def test_one_queues_trouble_is_not_the_others(installation, queue, broken):
    queue.close(queue.connect())
    installation.sqlite3(broken)
    path = put(installation, "task.json", "{}", queue="approvals")
    for name in ("completions", "notifications"):
        put(installation, "task.json", "{}", queue=name)
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 2 and len(complaints) == 1 and "approvals" in complaints[0] and path.exists()


def taken_in_by_somebody(state: Path, user: int) -> tuple[int, list[str]]:
    """take_in_spool() in a process of another user."""
    assert queue_helpers.spooled_files(state / "nothing") == []
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if user != os.geteuid():
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            os.write(write, json.dumps(queue_helpers.take_in_spool(state)).encode())
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        told = json.loads(file.read())
    os.waitpid(pid, 0)
    return told


def test_what_another_user_left_is_one_complaint_each(queue):
    """Root reads everything, so this is done as somebody else."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    spool, me = place / "state/spool", os.geteuid()
    somebody = 65534 if me == 0 else me
    for name in ("approvals", "completions", "notifications"):
        (spool / name).mkdir(parents=True)
        (spool / name / "task.json").write_text("{}")
    try:
        place.chmod(0o755)
        for path in (place / "state", *(place / "state").rglob("*")):
            os.chown(path, somebody, -1)
        for path in (spool / "approvals", spool / "completions/task.json"):
            os.chown(path, me, -1)
            path.chmod(0o000)
        taken, complaints = taken_in_by_somebody(place / "state", somebody)
        assert taken == 1 and len(complaints) == 2
        assert all("chown" in complaint for complaint in complaints)
    finally:
        (spool / "approvals").chmod(0o700)
        shutil.rmtree(place)


def test_a_spool_that_others_can_read_is_made_private(installation, queue):
    put(installation, "task.json", "{}")
    for directory in (installation.state / "spool", installation.state / "spool/notifications"):
        directory.chmod(0o755)
    assert queue.take_in_spool(installation.state) == (1, [])
    for directory in (installation.state / "spool", installation.state / "spool/notifications"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_it_is_on_the_disk_when_spool_returns(installation, queue, monkeypatch):
    """Both the file and the directory that names it."""
    synced, fsync = [], os.fsync

    def seen(fd):
        found = os.fstat(fd)
        synced.append((stat.S_ISDIR(found.st_mode), found.st_ino))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", seen)
    path = queue.spool("notifications", "{}", installation.state)
    assert synced == [(False, path.stat().st_ino), (True, path.parent.stat().st_ino)]


@contextmanager
def locked(installation):
    """Hold the write lock, so that hooks leave their tasks in the spool."""
    installation.enqueue("notifications", "first", "--hold")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    yield
    lock.execute("rollback")
    lock.close()


def fire(installation, *words, n: int) -> None:
    words = ("--hook", "notifications", "t", "--wait", "0.2", *words)
    done = installation.run("enqueue.py", *words, input=json.dumps({"n": n}))
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_hook_was_told_of_its_task_survives_the_spool(installation, queue):
    with locked(installation):
        fire(installation, "--hold", "--priority", "7", "--group", "g", n=0)
        fire(installation, "--at", "2099-01-01", "--ttl", "1d", n=1)
    assert queue.take_in_spool(installation.state) == (2, [])
    columns = "status, due_at, priority, group_id, expires_at"
    rows = installation.rows(f"select {columns} from notifications where id > 1 order by id")
    held, later = rows
    assert held == (3, None, 7, "g", None)
    assert later[:1] == (3,) and later[1] > 4e9 and later[4] > 1.7e9
    assert not installation.rows("select 1 from notifications where data like '%spooled_row%'")


def test_the_same_firing_spooled_and_stored_is_one_task(installation, queue):
    with locked(installation):
        fire(installation, n=1)
    fire(installation, n=1)
    assert queue.dequeue_task("notifications")["data"]["n"] == 1
    assert queue.take_in_spool(installation.state) == (0, [])
    assert installation.rows("select count(*) from notifications") == [(1,)]
