"""tasks.py restore puts a whole backup in place of the database while nothing runs, keeps what it
replaces, and says what was lost.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import threading

import pytest
from conftest import ROOT, one_line, wait_for


def restore(installation, file) -> dict:
    return installation.told("restore", file)


def refused(installation, file, *words: str) -> str:
    return one_line(installation.run("tasks.py", "restore", file), 1, *words)


def ids(installation) -> set[str]:
    return {*installation.statuses()}


def is_sound(installation) -> bool:
    return installation.sqlite3("pragma integrity_check") == "ok"


BEFORE = {"done-before", "waited-before"}


@pytest.fixture
def backed_up(installation):
    """An installation with a backup of one waiting and one finished task; two more came afterwards."""
    installation.handler("good", "#!/bin/sh\n")
    installation.backup = installation.directory / "the backup's file"
    for queue, when in (("approvals", "before"), ("completions", "after")):
        installation.add(f"{queue} good --task-id done-{when}")
        installation.drain(queue)
        installation.add(f"{queue} good --task-id wait{'s' if when == 'after' else 'ed'}-{when}")
        if when == "before":
            installation.tq("backup", installation.backup)
    return installation


def test_the_tasks_of_the_backup_are_there_and_what_they_replace_is_counted_and_kept(backed_up):
    told = restore(backed_up, backed_up.backup)
    assert ids(backed_up) == BEFORE and is_sound(backed_up)
    assert told["missing"] == {"waiting": 1, "finished": 1}
    kept = told["kept"]
    assert os.path.dirname(kept) == str(backed_up.state) and "tasks.db.before-restore-" in kept
    assert os.stat(kept).st_mode & 0o777 == 0o600 and not os.path.exists(f"{kept}-wal")
    assert not list(backed_up.state.glob(".restore-*"))
    # What was kept is a whole backup in its turn.
    assert restore(backed_up, kept)["missing"] == {"waiting": 0, "finished": 0}
    assert ids(backed_up) == BEFORE | {"done-after", "waits-after"}
    said = backed_up.tq("restore", backed_up.backup).stdout
    assert "tasks.db.before-restore-" in said and "to go back: ./tasks.py restore '" in said
    assert "not in the backup: 1 task that waited or ran, and 1 that had finished" in said


def test_a_restore_amid_enqueues_keeps_every_acknowledged_task_in_one_of_both(backed_up):
    """What is enqueued while the restore runs is in the restored database, or in what was kept:
    never in neither.
    """
    # Threads of one process would share its environment.
    backed_up.is_inside = False
    acknowledged, stop = [], threading.Event()

    def enqueue() -> None:
        while not stop.is_set():
            done = backed_up.run("enqueue.py", "notifications", "note", "{}")
            if done.returncode == 0:
                acknowledged.append(done.stdout.split()[1])

    threads = [threading.Thread(target=enqueue) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(acknowledged) > 2)
        told = [restore(backed_up, backed_up.backup) for _ in range(3)]
        seen = len(acknowledged)
        wait_for(lambda: len(acknowledged) > seen)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    found = {*backed_up.rows("select task_id from notifications")}
    for each in told:
        with sqlite3.connect(each["kept"]) as conn:
            kept = {*conn.execute("select task_id from notifications")}
        assert each["missing"]["waiting"] >= len(kept)
        found |= kept
    assert {(task_id,) for task_id in acknowledged} <= found


def test_a_worker_that_lives_refuses_it_and_is_named(backed_up):
    worker = backed_up.worker("approvals", "completions", "--idle-exit", "1h")
    wait_for(lambda: not backed_up.rows("select 1 from task_queue where status = 'pending'"))
    before = ids(backed_up)
    said = refused(backed_up, backed_up.backup, "nothing may run during a restore")
    assert ids(backed_up) == before
    os.kill(int(re.search(r"kill (\d+)$", said.rstrip())[1]), signal.SIGTERM)
    assert worker.wait(20) == 0
    restore(backed_up, backed_up.backup)


def test_a_handler_that_outlives_its_worker_refuses_it_and_is_named(backed_up):
    backed_up.handler("sleeper", '#!/bin/sh\necho $$ >"$HOME/pid"\nexec sleep 600\n')
    worker = backed_up.worker("approvals")
    backed_up.enqueue("approvals", "sleeper", "{}", "--task-id", "runs on")
    pid = backed_up.directory / "pid"
    wait_for(lambda: pid.exists() and pid.read_text(), what="the handler")
    worker.kill()
    worker.wait()
    words = ("the handler of task runs on does", "tasks.py cancel 'runs on'")
    refused(backed_up, backed_up.backup, *words)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_for(lambda: backed_up.run("tasks.py", "restore", backed_up.backup).returncode == 0)


def test_a_task_that_ran_at_the_backup_runs_again(backed_up):
    backed_up.handler("sleeper", "#!/bin/sh\nexec sleep 600\n")
    worker = backed_up.worker("approvals")
    backed_up.add("approvals sleeper --task-id ran-then")
    wait_for(lambda: backed_up.statuses().get("ran-then") == "in_progress")
    backed_up.tq("backup", backed_up.backup)
    backed_up.tq("cancel ran-then")
    worker.terminate()
    worker.wait()
    restore(backed_up, backed_up.backup)
    backed_up.handler("sleeper", "#!/bin/sh\n")
    backed_up.worker("approvals")
    assert backed_up.finished("ran-then")["attempts"] == 2


def test_no_row_id_is_used_again_and_no_queue_that_others_know_is_missing(backed_up):
    backed_up.add("a_new_queue good")
    [(last,)] = backed_up.rows("select max(id) from completions")
    restore(backed_up, backed_up.backup)
    backed_up.add("completions good --task-id fresh")
    assert backed_up.rows("select id > ? from completions where task_id = 'fresh'", last) == [(1,)]
    assert backed_up.rows("select count(*) from a_new_queue") == [(0,)]


def test_an_old_log_beside_the_database_is_not_applied_to_the_backup(backed_up):
    """The database is three files: under a reader the log stays, and must not undo what was
    restored.
    """
    reader = sqlite3.connect(backed_up.db, isolation_level=None)
    reader.execute("begin")
    reader.execute("select count(*) from approvals").fetchone()
    restore(backed_up, backed_up.backup)
    reader.close()
    assert ids(backed_up) == BEFORE and is_sound(backed_up)


DAMAGE = {
    "no database": (0, b"certainly not"),
    "a damaged page": (4096 * 2, b"\xa5" * 4000),
    "a damaged schema": (100, b"\xa5" * 4000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_is_moved_aside_whole_and_replaced(backed_up, damage):
    backed_up.sqlite3("pragma wal_checkpoint(truncate)")
    place, text = DAMAGE[damage]
    with open(backed_up.db, "r+b") as file:
        file.seek(place)
        file.write(text)
    size = backed_up.db.stat().st_size
    told = restore(backed_up, backed_up.backup)
    assert ids(backed_up) == BEFORE and is_sound(backed_up)
    assert os.stat(told["kept"]).st_size == size
    backed_up.add("approvals good --task-id goes-on")
    assert "goes-on" in ids(backed_up)


def test_a_missing_database_is_made_of_the_backup(backed_up):
    shutil.rmtree(backed_up.state)
    assert restore(backed_up, backed_up.backup)["kept"] is None
    assert ids(backed_up) == BEFORE
    modes = [path.stat().st_mode & 0o777 for path in (backed_up.state, backed_up.db)]
    assert modes == [0o700, 0o600]


def damaged(path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 2))


def is_now(statement: str, *, anew: bool = False):
    """Return what does a statement in a backup, or in a new file in its place."""

    def spoil(path) -> None:
        path.unlink() if anew else None
        with sqlite3.connect(path) as conn:
            conn.execute(statement)

    return spoil


SPOILT = {
    "damaged": damaged,
    "999": is_now("pragma user_version = 999"),
    "not a task queue's database": is_now("create table places (url text)", anew=True),
    "empty": lambda path: path.write_bytes(b""),
    "not a database": lambda path: path.write_bytes(b"words" * 1000),
    "No such file": lambda path: path.unlink(),
    "is not a file": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("why", SPOILT)
def test_what_is_no_whole_backup_is_refused_and_nothing_changes(backed_up, why):
    before, names = ids(backed_up), {*backed_up.state.iterdir()}
    SPOILT[why](backed_up.backup)
    refused(backed_up, backed_up.backup, why, str(backed_up.backup))
    assert ids(backed_up) == before
    new = {*backed_up.state.iterdir()} - names
    assert {path.name for path in new} <= {"tasks.db-wal", "tasks.db-shm"}


def test_the_database_itself_is_no_backup_of_itself(backed_up):
    link = backed_up.directory / "link"
    link.symlink_to(backed_up.db)
    for file in (backed_up.db, link):
        refused(backed_up, file, "is the database itself")


@pytest.mark.parametrize("endings", [("", "-wal", "-shm"), ("", "-wal")], ids=["all", "no -shm"])
def test_a_backup_with_its_log_beside_it_is_taken_whole(backed_up, tmp_path, endings):
    """As cp makes it of a database that is in use; its index in shared memory can be made anew."""
    holder = sqlite3.connect(backed_up.db, isolation_level=None)
    holder.execute("select count(*) from approvals").fetchone()
    backed_up.add("approvals good --task-id in-the-log")
    for ending in endings:
        shutil.copy(f"{backed_up.db}{ending}", tmp_path / f"copy{ending}")
    holder.close()
    there = sorted(tmp_path.iterdir())
    restore(backed_up, tmp_path / "copy")
    assert "in-the-log" in ids(backed_up) and sorted(tmp_path.iterdir()) == there


def test_a_restore_that_is_killed_leaves_all_as_it_was_or_all_restored(backed_up):
    backed_up.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)"
        " insert into notifications (data) select json_object('n', i, 'm', hex(zeroblob(20))) from n"
    )
    big = backed_up.directory / "big"
    backed_up.tq("backup", big)
    backed_up.sqlite3("delete from notifications where id > 10")
    moments = {
        ".restore-*": signal.SIGKILL,
        ".restore-*/.tasks.db.before-restore-*": signal.SIGKILL,
        "tasks.db.before*": signal.SIGTERM,
    }
    for moment, number in moments.items():
        process = backed_up.start("tasks.py", "restore", big)
        wait_for(lambda m=moment, p=process: any(backed_up.state.glob(m)) or p.poll() is not None)
        process.send_signal(number)
        assert process.wait() in ((0, 130) if number == signal.SIGTERM else (0, -9))
        assert backed_up.rows("select count(*) from notifications")[0][0] in (10, 60000)
        assert is_sound(backed_up)
        # What is left lies where cleanup.py takes it away.
        assert not list(backed_up.state.glob(".tasks.db.before-restore-*"))


def test_a_locked_database_is_said(backed_up, monkeypatch):
    import queue_helpers
    import tasks
    from taskqueue import backup

    monkeypatch.setattr(backup, "RESTORE_BUSY_SECONDS", 0.2)
    monkeypatch.setattr(queue_helpers, "STATE_DIR", backed_up.state)
    before = ids(backed_up)
    conn = sqlite3.connect(backed_up.db, isolation_level=None)
    conn.execute("begin immediate")
    try:
        assert tasks.main(["restore", str(backed_up.backup)]) == 75
    finally:
        conn.close()
    assert ids(backed_up) == before and not list(backed_up.state.glob("tasks.db.before*"))


def test_a_backup_of_version_1_is_restored_under_a_database_of_today(backed_up):
    """Its tables are brought to the present schema on the way."""
    schema = (ROOT / "tests/schema_1.sql").read_text()
    old = backed_up.directory / "old"
    conn = sqlite3.connect(old, isolation_level=None)
    conn.execute("pragma auto_vacuum = incremental")
    conn.executescript(f"begin; {schema}; pragma user_version = 1; commit")
    tables = "select tbl_name from sqlite_master where name like '%.ready'"
    queues = [name for (name,) in conn.execute(tables)]

    def live(rows) -> set:
        return {row for name in queues for row in rows(f"select '{name}', id from \"{name}\"")}

    ended = "select queue, row_id, completed_at from task_history"
    waiting, finished = live(conn.execute), {*conn.execute(ended)}
    conn.close()
    assert waiting and finished
    before = old.read_bytes()
    assert restore(backed_up, old)["missing"]["waiting"] == 2
    assert backed_up.rows("pragma user_version") == [(4,)] and is_sound(backed_up)
    now = {*backed_up.rows(ended)}
    assert finished <= now and old.read_bytes() == before
    assert waiting == live(backed_up.rows) | ({row[:2] for row in now} & waiting)
    backed_up.add("approvals good --task-id goes-on")
    assert "goes-on" in ids(backed_up)
