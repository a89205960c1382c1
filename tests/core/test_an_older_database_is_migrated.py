"""A database of any earlier schema version becomes one of the present version in one transaction:
nothing is lost or runs twice, and what a CHECK refuses is held for a person.
"""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest
from conftest import wait_for

from taskqueue import control

SCHEMA_1, SCHEMA_2, SCHEMA_3 = (
    (Path(__file__).parents[1] / f"schema_{version}.sql").read_text() for version in (1, 2, 3)
)
MANY = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < 15000)
insert into notifications (data) select json_object('task_id', 'many ' || i, 'task_type', 't', 'data', json_object('i', i)) from n"""
OPEN = "import queue_helpers; queue_helpers.connect()"


def make_old(installation, schema: str = SCHEMA_1, version: int = 1) -> sqlite3.Connection:
    """The database as the scripts of an earlier version left it."""
    installation.state.mkdir()
    conn = sqlite3.connect(installation.db, isolation_level=None)
    conn.execute("pragma page_size = 4096")
    conn.execute("pragma auto_vacuum = incremental")
    conn.execute("pragma journal_mode = wal")
    conn.executescript(f"begin; {schema}; pragma user_version = {version}; commit")
    return conn


@pytest.fixture
def old(installation):
    conn = make_old(installation)
    yield conn
    conn.close()


def content(conn) -> list:
    """All that is in it, whatever its version."""
    tables = [
        name for (name,) in conn.execute("select name from sqlite_master where type = 'table'")
    ]
    return [(name, conn.execute(f'select * from "{name}"').fetchall()) for name in sorted(tables)]


COLUMNS = """id, data, timestamp, attempts, owner, claimed_at, max_attempts, backoff, then_queue, cancel_requested, error,
  task_id, task_type"""


@pytest.mark.parametrize("table", ["notifications", "approvals", "completions", "nightly"])
def test_rows_and_ids_are_kept(old, queue, table):
    same = (
        f"select {COLUMNS} from {table} where id < 20 or '{table}' <> 'notifications' order by id"
    )
    before = old.execute(same).fetchall()
    (newest,) = old.execute(f"select coalesce(max(id), 0) from {table}").fetchone()
    conn = queue.connect()
    assert conn.execute("pragma user_version").fetchone() == (queue.SCHEMA_VERSION,)
    assert conn.execute(same).fetchall() == before
    last_id = conn.execute("select seq from sqlite_sequence where name = ?", (table,)).fetchall()
    assert last_id == [(newest,)]
    queue.enqueue_task(table, "t", {}, "next")
    assert (
        conn.execute(f"select id from {table} where task_id = 'next'").fetchone()[0]
        == last_id[0][0] + 1
    )


def test_an_id_that_was_given_once_is_not_given_again(old, queue):
    old.execute("delete from notifications where id > 8")
    queue.enqueue_task("notifications", "t", {}, "next")
    assert old.execute("select id from notifications where task_id = 'next'").fetchone() == (31,)


def test_history_pauses_and_spooled_files_are_kept(old, queue):
    columns = ", ".join(row[1] for row in old.execute("pragma table_info(task_history)"))
    every = f"select {columns} from task_history order by id"
    before = old.execute(every).fetchall()
    conn = queue.connect()
    assert conn.execute(every).fetchall() == before
    assert conn.execute("select * from task_spooled").fetchall() == [("notifications/1.json:1:1",)]
    controls = control.controls_of(conn)
    assert {name: control[:2] for name, control in controls.items()} == {
        "approvals": (True, None),
        "nightly": (True, None),
    }
    assert conn.execute("select paused_at from task_controls order by queue").fetchall() == [
        (pytest.approx(1767268800.5, abs=0.001),),
        (0.0,),
    ]
    assert queue.claim_ready(conn, "approvals") == []


def test_each_status_means_what_it_meant(old, queue):
    conn = queue.connect()
    words = dict(conn.execute(f"select id, {queue.STATUS_WORD} from notifications").fetchall())
    expected = ["pending"] * 3 + ["in_progress"] * 2 + ["scheduled"] * 2 + ["held"]
    assert [words[row_id] for row_id in range(1, 9)] == expected
    tasks = {task.id: task for task in queue.claim_ready(conn, "notifications", limit=99)}
    # What was due; the highest priority first.
    assert [*tasks] == [3, 1, 2, 7]
    assert queue.claim_ready(conn, "notifications", limit=99) == []


def test_what_a_check_refuses_is_held_with_the_reason(old, queue, installation):
    conn = queue.connect()
    rows = conn.execute(
        f"select id, priority, due_at, group_id, {queue.STATUS_WORD} from notifications where id between 20 and 28"
    ).fetchall()
    assert rows == [(row_id, 0, None, None, "held") for row_id in range(20, 29)]
    (told,) = conn.execute("select error from notifications where id = 21").fetchone()
    assert "held, since an earlier version stored what is refused now" in told
    assert "priority_must_be_a_whole_number_within_a_million" in told and '"priority": ' in told
    done = installation.run("tasks.py", "list", "--status", "held", "--json")
    assert done.stdout.count("held, since an earlier version") == 11


@pytest.fixture
def second(installation):
    conn = make_old(installation, SCHEMA_2, 2)
    yield conn
    conn.close()


def test_what_version_2_has_is_kept(second, queue):
    conn = queue.connect()
    rows = conn.execute(
        f"""select coalesce(task_id, id), {queue.STATUS_WORD}, priority, group_id, owner, released_at, delayed_at, approved,
                   rerun is not null from approvals where id < 20"""
    ).fetchall()
    assert rows == [
        ("runs", "in_progress", 3, "g", "1-dead", None, None, 0, 1),
        ("blocked", "blocked", 0, "g", None, None, None, 0, 0),
        ("held", "held", 0, None, None, None, None, 0, 0),
        ("later", "scheduled", 0, "h", None, None, None, 0, 0),
        ("retries", "scheduled", 0, None, None, 4e9, 4e9, 0, 0),
        ("away", "handed_over", 0, None, "hub-1", None, None, 0, 0),
    ]
    assert conn.execute("select workspace, history_id from task_marks").fetchall() == [("/w", 1)]
    assert conn.execute("select task_id, status, approval from task_history").fetchall() == [
        ("old", "expired", None)
    ]
    assert conn.execute("select id, data from bare").fetchall() == [(1, "{}")]
    # The rerun comes when the dead worker's task has ended, with the terms that it had.
    queue.recover(conn.state)
    [task] = conn.execute(
        "select priority, group_id, json_extract(data, '$.data.n') from approvals where task_id = 'runs'"
    ).fetchall()
    assert task == (3, "g", 7)


def test_what_version_3_has_is_kept(installation, queue):
    third = make_old(installation, SCHEMA_3, 3)
    names = "id, data, timestamp, status, due_at, priority, group_id, attempts, own_attempts, owner, delayed_at, approved, rerun"
    tables = ("approvals", "notifications", "nightly")
    before = [third.execute(f"select {names} from {table}").fetchall() for table in tables]
    finished = third.execute("select * from task_history").fetchall()
    controls = third.execute("select * from task_controls").fetchall()
    third.close()
    conn = queue.connect()
    assert before == [conn.execute(f"select {names} from {table}").fetchall() for table in tables]
    assert [(*row, None, 0) for row in finished] == conn.execute(
        "select * from task_history"
    ).fetchall()
    unbound = [(*row, None, None) for row in controls]
    assert unbound == conn.execute("select * from task_controls").fetchall()
    assert conn.execute("select told from task_told").fetchall() == [("x",)]
    assert len(before[0]) == 6 and len(finished) == 2 and len(controls) == 2


def test_a_row_of_bash_that_never_ran_and_was_in_no_list_is_held_now(second, queue):
    conn = queue.connect()
    rows = conn.execute(
        f"select id, {queue.STATUS_WORD}, error from approvals where id >= 20"
    ).fetchall()
    assert [row[:2] for row in rows] == [(row_id, "held") for row_id in range(20, 28)]
    refused = "status", "99", "status", "2026-12-01", "many", "yesterday", "soon", "-1"
    for (*_, error), why in zip(rows, refused, strict=True):
        assert why in error, error
    controls = control.controls_of(conn)
    assert controls["approvals"].slots == 2 and controls["completions"].reason == "lunch"
    assert controls["notifications"].paused and controls["notifications"].until is None


def test_a_group_waits_for_the_one_of_it_that_runs(old, queue):
    conn = queue.connect()
    with queue.transaction(conn):
        control.resume_queue(conn, "approvals")
    assert queue.claim_ready(conn, "approvals") == []
    # Its owner is dead.
    recovered, _ = queue.recover(conn.state)
    assert {task.id for task, *_ in recovered if task.queue == "approvals"} == {3}
    assert [task.id for task in queue.claim_ready(conn, "approvals", limit=9)] == [3]


def test_what_the_schema_refuses_is_in_the_history_and_no_reason_to_stay_behind(old, queue):
    """As where another version of SQLite let it in."""
    old.execute("pragma ignore_check_constraints = on")
    old.execute("insert into completions (id, data) values (1, '{}'), (2, '[1]'), (3, '{}')")
    conn = queue.connect()
    assert conn.execute("select id from completions").fetchall() == [(1,), (3,)]
    rows = conn.execute(
        "select queue, row_id, task_id, status from task_history where id > 7"
    ).fetchall()
    assert rows == [("completions", 2, "completions-2", "failed")]


def test_page_size_and_auto_vacuum_stay(old, queue):
    conn = queue.connect()
    assert [
        conn.execute(f"pragma {name}").fetchone()
        for name in ("page_size", "auto_vacuum", "journal_mode")
    ] == [(4096,), (2,), ("wal",)]
    assert conn.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_it_is_the_schema_that_a_new_database_has(old, queue, installation, tmp_path):
    def schema(conn) -> list:
        return sorted(
            conn.execute(
                "select type, name, tbl_name, sql from sqlite_master where name not like 'sqlite_%'"
            ).fetchall()
        )

    migrated, new = queue.connect(), queue.connect(tmp_path / "new")
    queue.ensure_queue(new, "nightly")
    assert schema(migrated) == schema(new)
    queue.close(new)


def migrate_and_die(state) -> None:
    """Die where all is written and nothing committed."""
    import queue_helpers

    queue_helpers.create_view = lambda conn: os.kill(os.getpid(), signal.SIGKILL)
    queue_helpers.connect(state)


def test_killed_in_the_middle_it_is_whole_and_of_version_1(old, queue, installation):
    before = content(old)
    process = multiprocessing.get_context("spawn").Process(
        target=migrate_and_die, args=(installation.state,)
    )
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    assert old.execute("pragma user_version").fetchone() == (1,) and content(old) == before
    assert queue.connect().execute("pragma user_version").fetchone() == (queue.SCHEMA_VERSION,)


@pytest.mark.timeout(120)
def test_killed_at_any_moment_it_is_whole(old, queue, installation):
    """The write-ahead log grows while rows are copied: that is when it is killed."""
    old.execute(MANY)
    before = content(old)
    log = Path(f"{installation.db}-wal")
    old.execute("pragma wal_checkpoint(truncate)")
    for size in (1, 2**20, 2**22):
        process = installation.start_python(OPEN, stderr=subprocess.DEVNULL)
        wait_for(
            lambda size=size, process=process: (
                log.stat().st_size > size or process.poll() is not None
            ),
            30,
        )
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (version,) = old.execute("pragma user_version").fetchone()
        if version == queue.SCHEMA_VERSION:
            # It had just been committed; that is whole, too.
            break
        assert version == 1 and content(old) == before
    queue.connect()
    assert installation.rows("select count(*) from notifications where task_id like 'many %'") == [
        (15_000,)
    ]


def open_at_once(state, barrier, results) -> None:
    import queue_helpers

    barrier.wait()
    conn = queue_helpers.connect(state)
    queue_helpers.enqueue_tasks("completions", [{"task_type": "t", "data": {}}])
    results.put(conn.execute("select count(*) from notifications").fetchone()[0])


def test_eight_at_once_migrate_it_once(old, installation, queue, monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_STATE", str(installation.state))
    (count,) = old.execute("select count(*) from notifications").fetchone()
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(8), spawn.Queue()
    processes = [
        spawn.Process(target=open_at_once, args=(installation.state, barrier, results))
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [count] * 8
    for process in processes:
        process.join(20)
    assert old.execute("select count(*) from completions").fetchone() == (8,)
    assert old.execute("select count(*) from task_history").fetchone() == (3,)


def test_many_rows_are_told_of_and_few_are_not(old, installation, queue):
    old.close()
    told = OPEN.replace(
        "import queue_helpers",
        "import queue_helpers, taskqueue.migrate; taskqueue.migrate.TELL_FROM_ROWS = 25",
    )
    done = installation.python(told)
    first, second = done.stderr.splitlines()
    said = f"bringing {installation.db} to schema version {queue.SCHEMA_VERSION}: 26 rows"
    assert done.returncode == 0 and said in first and " s" in second
    again = installation.python(OPEN)
    assert (again.returncode, again.stderr) == (0, "")


def test_few_rows_are_not_told_of(old, installation):
    done = installation.python(OPEN)
    assert (done.returncode, done.stderr) == (0, "")


def test_connections_that_were_open_before_obey_the_rules(old, queue):
    """What a program of version 1 still does: it enqueues and ends what it has; the triggers see to
    the groups.
    """
    old.execute("select count(*) from notifications").fetchall()
    conn = queue.connect()
    old.execute("insert into approvals (data, status, due_at, priority) values ('{}', 1, null, 0)")
    for _ in range(2):
        old.execute("insert into approvals (data, group_id) values ('{}', 'a')")
    statuses = "select group_concat(status, '') from (select status from approvals order by id)"
    assert old.execute(statuses).fetchone() == ("442144",)
    old.execute("""insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
                   select 'approvals', id, 'approvals-' || id, task_type, 'completed', data, '2026' from approvals where id = 3""")
    old.execute("delete from approvals where id = 3 and owner is '1-dead' and attempts = 1")
    assert conn.execute(statuses).fetchone() == ("14144",)
    # It claims nothing more: what it looks at for that is no longer there.
    with pytest.raises(sqlite3.OperationalError, match="task_paused"):
        old.execute("select exists (select 1 from task_paused where queue = 'approvals')")
