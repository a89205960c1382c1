"""tasks.py restore: checked first, in one transaction while nothing runs, and what was there before
is kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import threading

import pytest
from conftest import ROOT, wait_for


def restore(installation, file, code: int = 0) -> dict:
    done = installation.run("tasks.py", "restore", file, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if done.stdout else {"said": done.stderr}


def ids(installation, where: str = "task_queue") -> set[str]:
    return {task_id for (task_id,) in installation.rows(f"select task_id from {where}")}


@pytest.fixture
def backed_up(installation):
    """An installation with a backup of one waiting and one finished task; two more came afterwards."""
    installation.handler("good", "#!/bin/sh\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "done-before")
    assert (
        installation.run(
            "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    installation.enqueue("approvals", "good", "{}", "--task-id", "waited-before")
    installation.backup = installation.directory / "the backup's file"
    assert installation.run("tasks.py", "backup", installation.backup).returncode == 0
    installation.enqueue("completions", "good", "{}", "--task-id", "done-after")
    assert (
        installation.run(
            "worker.py", "completions", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    installation.enqueue("completions", "good", "{}", "--task-id", "waits-after")
    return installation


def test_the_tasks_of_the_backup_are_there_and_what_they_replace_is_counted_and_kept(backed_up):
    told = restore(backed_up, backed_up.backup)
    assert ids(backed_up) == {"done-before", "waited-before"}
    assert told["missing"] == {"waiting": 1, "finished": 1}
    assert backed_up.sqlite3("pragma integrity_check") == "ok"
    kept = told["kept"]
    assert os.path.dirname(kept) == str(backed_up.state) and "tasks.db.before-restore-" in kept
    assert os.stat(kept).st_mode & 0o777 == 0o600 and not os.path.exists(f"{kept}-wal")
    with sqlite3.connect(kept) as conn:
        assert conn.execute("pragma integrity_check").fetchall() == [("ok",)]
        found = {row[0] for row in conn.execute("select task_id from task_queue")}
    assert found == {"done-before", "waited-before", "done-after", "waits-after"}
    assert not list(backed_up.state.glob(".restore-*"))
    assert restore(backed_up, kept)["missing"] == {"waiting": 0, "finished": 0}
    assert ids(backed_up) == found


def test_people_are_told_where_the_state_before_is_and_what_is_missing(backed_up):
    said = backed_up.run("tasks.py", "restore", backed_up.backup).stdout
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
    found = ids(backed_up, "notifications")
    for each in told:
        with sqlite3.connect(each["kept"]) as conn:
            kept = {row[0] for row in conn.execute("select task_id from notifications")}
        assert each["missing"]["waiting"] >= len(kept)
        found |= kept
    assert set(acknowledged) <= found


def test_a_worker_that_lives_refuses_it_and_is_named(backed_up):
    worker = backed_up.worker("approvals", "completions", "--idle-exit", "1h")
    before = ids(backed_up)
    said = restore(backed_up, backed_up.backup, code=1)["said"]
    assert said.count("\n") == 1 and "nothing may run during a restore" in said
    pid = re.search(r"kill (\d+)$", said.rstrip())[1]
    assert ids(backed_up) >= before - {"waits-after", "waited-before"}
    os.kill(int(pid), signal.SIGTERM)
    assert worker.wait(20) == 0
    restore(backed_up, backed_up.backup)


def test_a_handler_that_outlives_its_worker_refuses_it_and_is_named(backed_up):
    backed_up.handler("sleeper", '#!/bin/sh\necho $$ >"$HOME/pid"\nexec sleep 600\n')
    worker = backed_up.worker("approvals")
    backed_up.enqueue("approvals", "sleeper", "{}", "--task-id", "runs on")
    pid = backed_up.directory / "pid"
    wait_for(lambda: pid.exists() and pid.read_text(), what="the handler")
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    said = restore(backed_up, backed_up.backup, code=1)["said"]
    assert "the handler of task runs on does" in said and "tasks.py cancel 'runs on'" in said
    os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_for(lambda: backed_up.run("tasks.py", "restore", backed_up.backup).returncode == 0)


def test_a_task_that_ran_at_the_backup_runs_again(backed_up):
    backed_up.handler("sleeper", "#!/bin/sh\nexec sleep 600\n")
    worker = backed_up.worker("approvals")
    backed_up.enqueue("approvals", "sleeper", "{}", "--task-id", "ran-then")
    wait_for(
        lambda: backed_up.rows("select 1 from approvals where task_id = 'ran-then' and status = 2")
    )
    assert backed_up.run("tasks.py", "backup", backed_up.backup).returncode == 0
    assert backed_up.run("tasks.py", "cancel", "ran-then").returncode == 0
    worker.terminate()
    worker.wait()
    restore(backed_up, backed_up.backup)
    backed_up.handler("sleeper", "#!/bin/sh\n")
    backed_up.worker("approvals")
    assert backed_up.finished("ran-then")["attempts"] == 2


def test_no_row_id_is_used_again_and_no_queue_that_others_know_is_missing(backed_up):
    backed_up.enqueue("a_new_queue", "good")
    (last,) = backed_up.rows("select max(id) from completions")[0]
    restore(backed_up, backed_up.backup)
    backed_up.enqueue("completions", "good", "{}", "--task-id", "fresh")
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
    assert ids(backed_up) == {"done-before", "waited-before"}
    assert backed_up.sqlite3("pragma integrity_check") == "ok"


@pytest.mark.parametrize("damage", ["no database", "a damaged page", "a damaged schema"])
def test_a_damaged_database_is_moved_aside_whole_and_replaced(backed_up, damage):
    backed_up.sqlite3("pragma wal_checkpoint(truncate)")
    with open(backed_up.db, "r+b") as file:
        if damage == "no database":
            file.write(b"certainly not")
        else:
            file.seek(100 if damage == "a damaged schema" else 4096 * 2)
            file.write(b"\xa5" * 4000)
    before = backed_up.db.read_bytes()
    told = restore(backed_up, backed_up.backup)
    assert ids(backed_up) == {"done-before", "waited-before"}
    assert backed_up.sqlite3("pragma integrity_check") == "ok"
    assert len(open(told["kept"], "rb").read()) == len(before)
    backed_up.enqueue("approvals", "good", "{}", "--task-id", "goes-on")
    assert "goes-on" in ids(backed_up)


def test_a_missing_database_is_made_of_the_backup(backed_up):
    shutil.rmtree(backed_up.state)
    assert restore(backed_up, backed_up.backup)["kept"] is None
    assert ids(backed_up) == {"done-before", "waited-before"}
    assert (
        backed_up.state.stat().st_mode & 0o777 == 0o700
        and backed_up.db.stat().st_mode & 0o777 == 0o600
    )


def damaged(path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 2))


def newer(path) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("pragma user_version = 999")


def foreign(path) -> None:
    path.unlink()
    with sqlite3.connect(path) as conn:
        conn.execute("create table places (url text)")


def directory(path) -> None:
    path.unlink()
    path.mkdir()


SPOILT = {
    "damaged": (damaged, "damaged"),
    "newer": (newer, "999"),
    "foreign": (foreign, "not a task queue's database"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_bytes(b"words" * 1000), "not a database"),
    "missing": (lambda path: path.unlink(), "No such file"),
    "directory": (directory, "is not a file"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_whole_backup_is_refused_and_nothing_changes(backed_up, how):
    spoil, word = SPOILT[how]
    before, names = ids(backed_up), {path.name for path in backed_up.state.iterdir()}
    spoil(backed_up.backup)
    said = restore(backed_up, backed_up.backup, code=1)["said"]
    assert len(said.splitlines()) == 1 and word in said and str(backed_up.backup) in said, said
    assert ids(backed_up) == before
    assert {path.name for path in backed_up.state.iterdir()} - {
        "tasks.db-wal",
        "tasks.db-shm",
    } <= names


def test_the_database_itself_is_no_backup_of_itself(backed_up):
    link = backed_up.directory / "link"
    link.symlink_to(backed_up.db)
    for file in (backed_up.db, link):
        assert "is the database itself" in restore(backed_up, file, code=1)["said"]


@pytest.mark.parametrize("endings", [("", "-wal", "-shm"), ("", "-wal")], ids=["all", "no -shm"])
def test_a_backup_with_its_log_beside_it_is_taken_whole(backed_up, tmp_path, endings):
    """As cp makes it of a database that is in use; its index in shared memory can be made anew."""
    holder = sqlite3.connect(backed_up.db, isolation_level=None)
    holder.execute("select count(*) from approvals").fetchone()
    backed_up.enqueue("approvals", "good", "{}", "--task-id", "in-the-log")
    for ending in endings:
        shutil.copy(f"{backed_up.db}{ending}", tmp_path / f"copy{ending}")
    holder.close()
    there = sorted(tmp_path.iterdir())
    restore(backed_up, tmp_path / "copy")
    assert "in-the-log" in ids(backed_up)
    assert sorted(tmp_path.iterdir()) == there


def test_a_restore_that_is_killed_leaves_all_as_it_was_or_all_restored(backed_up):
    backed_up.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000) insert into notifications (data) "
        "select json_object('n', i, 'more', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx') from n"
    )
    big = backed_up.directory / "big"
    assert backed_up.run("tasks.py", "backup", big).returncode == 0
    backed_up.sqlite3("delete from notifications where id > 10")
    for phase in (".restore-*", ".restore-*/.tasks.db.before-restore-*"):
        process = backed_up.start("tasks.py", "restore", big)
        wait_for(
            lambda phase=phase, process=process: (
                list(backed_up.state.glob(phase)) or process.poll() is not None
            )
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert backed_up.rows("select count(*) from notifications")[0][0] in (10, 60000)
        assert backed_up.sqlite3("pragma integrity_check") == "ok"
    # What was left lies where cleanup.py takes it away.
    assert not list(backed_up.state.glob(".tasks.db.before-restore-*"))
    process = backed_up.start("tasks.py", "restore", big)
    wait_for(lambda: list(backed_up.state.glob("tasks.db.before*")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert process.returncode in (0, 130)
    assert backed_up.sqlite3("pragma integrity_check") == "ok"


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
    with sqlite3.connect(old, isolation_level=None) as conn:
        conn.execute("pragma auto_vacuum = incremental")
        conn.executescript(f"begin; {schema}; pragma user_version = 1; commit")
        tables = [
            name
            for (name,) in conn.execute(
                "select tbl_name from sqlite_master where name like '%.ready'"
            )
        ]
        waiting = {
            row for name in tables for row in conn.execute(f"select '{name}', id from \"{name}\"")
        }
        finished = conn.execute(
            "select queue, row_id, completed_at from task_history order by id"
        ).fetchall()
    conn.close()
    assert waiting and finished
    before = old.read_bytes()
    told = restore(backed_up, old)
    assert told["missing"]["waiting"] == 2
    assert (
        backed_up.rows("pragma user_version") == [(4,)]
        and backed_up.sqlite3("pragma integrity_check") == "ok"
    )
    assert {
        row for name in tables for row in backed_up.rows(f"select '{name}', id from \"{name}\"")
    } <= waiting
    ended = backed_up.rows("select queue, row_id, completed_at from task_history order by id")
    assert set(finished) <= set(ended)
    live = {
        row for name in tables for row in backed_up.rows(f"select '{name}', id from \"{name}\"")
    }
    assert waiting == live | {row[:2] for row in ended if row[:2] in waiting}
    assert old.read_bytes() == before
    backed_up.enqueue("approvals", "good", "{}", "--task-id", "goes-on")
    assert "goes-on" in ids(backed_up)
