"""state/spool/QUEUE: the door for tasks that cannot reach the database."""

import json
import multiprocessing
import os
import signal
import sqlite3

import pytest
from conftest import wait_for


def put(installation, name: str, text: str | bytes, queue: str = "notifications"):
    """What a shell does: write elsewhere, then mv into the spool."""
    directory = installation.state / "spool" / queue
    directory.mkdir(parents=True, exist_ok=True)
    outside = installation.directory / name
    outside.write_bytes(text.encode() if isinstance(text, str) else text)
    os.rename(outside, directory / name)
    return directory / name


def test_a_worker_is_woken_by_a_file_that_is_moved_in(installation):
    installation.handler("notifications", "#!/bin/sh\n")
    installation.worker("notifications")
    put(installation, "task.json", '{"workspace": "/x"}')
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(1,)])
    put(installation, "task.json", '{"workspace": "/x"}')  # the same name again is another task
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(2,)])


def test_files_come_in_by_age(installation, queue):
    for number in range(20):
        os.utime(put(installation, f"{(number * 7) % 20}.json", json.dumps({"n": number})), (number, number))
    assert queue.take_in_spool(installation.state) == (20, [])
    assert [json.loads(data)["n"] for (data,) in installation.rows("select data from notifications order by id")] == list(range(20))


def test_a_malformed_file_is_set_aside_and_named(installation, queue):
    for name, text in {"a.json": "{", "b.json": "[1]", "c.json": b"\xff", "d.json": "", "good.json": "{}"}.items():
        put(installation, name, text)
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 1 and len(complaints) == 4
    aside = installation.state / "spool/notifications/malformed"
    assert sorted(path.name.rsplit("-", 1)[-1] for path in aside.iterdir()) == ["a.json", "b.json", "c.json", "d.json"]
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
    process = multiprocessing.get_context("spawn").Process(target=take_in_until_killed, args=(installation.state, moment))
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
    processes = [spawn.Process(target=take_in, args=(installation.state, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sum(results.get(timeout=30) for _ in processes) == 200
    for process in processes:
        process.join(20)
    assert installation.rows("select count(*), count(distinct data) from notifications") == [(200, 200)]


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
