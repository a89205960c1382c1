"""A hook with nothing but sqlite3 made the table before any Python ran: it becomes a queue, its
rows and ids kept.
"""

import json
import sqlite3
import subprocess

import pytest
from conftest import one_line

BARE = "CREATE TABLE IF NOT EXISTS {} (id INTEGER PRIMARY KEY AUTOINCREMENT, data TEXT NOT NULL);"


def by_hook(state, script: str) -> str:
    """Do as a hook does: make the directory, and run the statements with the sqlite3 command."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    done = subprocess.run(
        ["sqlite3", "-bail", state / "tasks.db"],
        input=f".timeout 10000\n{script}",
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(data) -> str:
    text = (data if isinstance(data, str) else json.dumps(data)).replace("'", "''")
    return f"INSERT INTO notifications (data) VALUES ('{text}');"


def envelope(task_id: str, **data) -> dict:
    return {"task_id": task_id, "task_type": "t", "data": data}


def test_its_rows_and_ids_are_kept_and_are_claimed_in_their_order(installation, queue):
    rows = [{"n": 1}, envelope("an id of its own", n=2), {"hook_event_name": "Stop", "n": 3}]
    by_hook(
        installation.state,
        BARE.format("notifications")
        + "\n".join(map(row, rows))
        + "DELETE FROM notifications WHERE id = 1;",
    )
    mine = queue.get_ack_queue("notifications")
    assert installation.rows(
        "select id, task_id, task_type, status, attempts from notifications order by id"
    ) == [
        (2, "an id of its own", "t", 1, 0),
        (3, None, "Stop", 1, 0),
    ]
    assert [json.loads(text) for _, text in (mine.get(), mine.get())] == rows[1:]
    assert installation.rows("select count(*) from sqlite_master where name like '%bare%'") == [
        (0,)
    ]


@pytest.mark.parametrize("left", ["all", "some", "none"])
def test_an_id_is_never_used_again(installation, queue, left):
    condition = {"all": "0", "some": "id > 3", "none": "1"}[left]
    by_hook(
        installation.state,
        BARE.format("notifications")
        + row({"n": 1}) * 5
        + f"DELETE FROM notifications WHERE {condition};",
    )
    queue.enqueue_task("notifications", "t", {}, "new")
    assert installation.rows("select id from notifications where task_id = 'new'") == [(6,)]
    while queue.dequeue_task("notifications"):
        pass
    assert queue.get_queue("notifications").put({"n": 7}) == 7


def test_what_is_no_json_object_goes_to_the_history_as_failed(installation, queue):
    bad = [
        *("not json", "[1]", "null", '"text"', "{'a': 1}", '{"a": 1', ""),
        '{"a":' * 3000 + "1" + "}" * 3000,
    ]
    blob = "INSERT INTO notifications (data) VALUES (x'7b7d');"
    by_hook(
        installation.state,
        BARE.format("notifications")
        + row({"n": 1})
        + "".join(map(row, bad))
        + blob
        + row({"n": 2}),
    )
    assert queue.get_queue("notifications").qsize() == 2
    failed = installation.rows(
        "select row_id, status, task_id, error, data from task_history order by id"
    )
    assert [(row_id, status, task_id) for row_id, status, task_id, _, _ in failed] == [
        (number, "failed", f"notifications-{number}") for number in range(2, 11)
    ]
    assert [data for *_, data in failed] == [*bad, "{}"]
    assert all("not a JSON object" in error for *_, error, _ in failed)
    assert queue.get_queue("notifications").put({}) == 12


def test_of_duplicates_the_first_stays(installation, queue):
    ids = [envelope(name, n=n) for n, name in enumerate(("same", "other", "same"))]
    rows = [*ids, {"n": 4}, {"n": 4}]
    by_hook(installation.state, BARE.format("notifications") + "".join(map(row, rows)))
    queue.connect()
    assert installation.rows("select id, task_id from notifications order by id") == [
        (1, "same"), (2, "other"), (4, None), (5, None),
    ]  # fmt: skip


def test_of_any_allowed_name_and_together_with_others(installation, queue):
    for name in ("aardvarks", "approvals", "zebras"):
        by_hook(
            installation.state, BARE.format(name) + row({"q": name}).replace("notifications", name)
        )
    for name in ("aardvarks", "approvals", "zebras"):
        assert queue.dequeue_task(name)["data"] == {"q": name}
    assert {queue for (queue,) in installation.rows("select distinct queue from task_history")} == {
        "aardvarks",
        "approvals",
        "zebras",
    }


def test_made_beside_a_database_that_python_already_uses(installation, queue):
    installation.enqueue("notifications", "t")
    conn = queue.connect()
    by_hook(
        installation.state, BARE.format("late") + row({"n": 1}).replace("notifications", "late")
    )
    queue.enqueue_task("late", "t", {"n": 2})
    assert [queue.dequeue_task("late")["data"]["n"] for _ in range(2)] == [1, 2]
    assert conn is queue.connect()
    assert ("late",) in installation.rows("select distinct queue from task_queue")


@pytest.mark.parametrize(
    "columns",
    [
        "id INTEGER PRIMARY KEY, data TEXT NOT NULL",
        "id INTEGER PRIMARY KEY, data TEXT",
        "id INTEGER PRIMARY KEY AUTOINCREMENT, data",
    ],
)
@pytest.mark.parametrize("name", ["approvals", "notifications"])
def test_made_with_less_care(installation, queue, columns, name):
    by_hook(
        installation.state,
        f"CREATE TABLE {name} ({columns}); INSERT INTO {name} (data) VALUES ('{{}}');",
    )
    if "NOT NULL" not in columns:
        by_hook(installation.state, f"INSERT INTO {name} (data) VALUES (NULL), (7);")
    assert queue.get_queue(name).qsize() == 1
    assert queue.enqueue_task(name, "t", {}) and queue.get_queue(name).qsize() == 2


def test_the_hooks_statements_work_before_and_after_and_bad_json_is_refused_from_then_on(
    installation, queue
):
    hook = BARE.format("notifications") + row({"n": 1})
    by_hook(installation.state, hook)
    queue.connect()
    by_hook(installation.state, hook)
    assert installation.rows("select id from notifications") == [(1,), (2,)]
    done = subprocess.run(
        ["sqlite3", installation.db, row("broken")], capture_output=True, text=True
    )
    assert done.returncode != 0 and done.stderr


ADOPT = """
import os, sys
import queue_helpers as q
from pathlib import Path
state = Path(sys.argv[1])
go, gone = os.pipe()
children = []
for n in range(16):
    pid = os.fork()
    if not pid:
        os.close(gone)
        os.read(go, 1)
        try:
            q.enqueue_tasks("notifications", [{"task_type": "t", "data": {}, "task_id": f"new {n}"}], state=state)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    children.append(pid)
os.close(go); os.close(gone)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in children]))
"""


def test_by_sixteen_processes_at_once_while_hooks_go_on_to_insert(installation):
    hook = BARE.format("notifications") + row({"n": 1})
    for number in range(3):
        state = installation.directory / str(number)
        by_hook(state, BARE.format("notifications") + row({"n": 0}) * 500)
        hooks = [
            subprocess.Popen(
                ["sqlite3", "-bail", state / "tasks.db"],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        adopt = installation.start_python(ADOPT, state, stderr=subprocess.PIPE)
        for process in hooks:
            process.stdin.write(".timeout 10000\n" + hook * 3)
            process.stdin.flush()
        for process in (*hooks, adopt):
            _, errors = process.communicate(timeout=30)
            assert (process.returncode, errors) == (0, "")
        conn = sqlite3.connect(state / "tasks.db")
        counts = "select count(*), count(distinct id), count(task_id), (select count(*) from task_history) from notifications"
        assert conn.execute(counts).fetchone() == (528, 528, 16, 0)
        assert conn.execute(
            "select id from notifications where id <= 500 order by id"
        ).fetchall() == [(n,) for n in range(1, 501)]
        conn.close()


def test_a_foreign_table_of_a_queues_name_is_refused_and_kept(installation, queue):
    installation.enqueue("notifications", "t")
    for columns in ("id, data, mine", "id", "data, id", "name text"):
        installation.sqlite3(
            f"create table foreign_one ({columns}); insert into foreign_one default values"
        )
        with pytest.raises(queue.QueueUnavailable, match="foreign_one.*not a queue"):
            queue.enqueue_task("foreign_one", "t", {})
        one_line(installation.run("enqueue.py", "foreign_one", "t"), 1)
        assert installation.rows("select count(*) from foreign_one") == [(1,)]
        installation.sqlite3("drop table foreign_one")
    queue.enqueue_task("foreign_one", "t", {})


def test_a_database_of_somebody_elses_is_refused_and_untouched(installation, queue):
    by_hook(
        installation.state,
        "create table notifications (id integer primary key, title text); create table t (a);",
    )
    before = installation.db.read_bytes()
    done = installation.run("enqueue.py", "notifications", "t")
    one_line(done, 1, "not a task queue's", "TASK_QUEUE_STATE")
    with pytest.raises(queue.QueueUnavailable):
        queue.get_queue("notifications")
    assert installation.db.read_bytes() == before


def test_a_newer_schema_is_refused_and_untouched(installation, queue):
    installation.enqueue("notifications", "t")
    installation.sqlite3("pragma user_version = 99; pragma wal_checkpoint(truncate)")
    dump = installation.sqlite3(".dump")
    with pytest.raises(
        queue.QueueUnavailable, match=f"version 99.*know {queue.SCHEMA_VERSION}.*update"
    ):
        queue.enqueue_task("notifications", "t", {})
    for script, *args in (
        ["enqueue.py", "notifications", "t"],
        ["worker.py", "notifications", "--drain"],
        ["tasks.py", "list"],
    ):
        one_line(installation.run(script, *args), 1, "has schema version 99", "update them")
    assert installation.sqlite3(".dump") == dump


def test_an_older_schema_is_migrated_by_all_or_nothing(installation, queue, monkeypatch):
    by_hook(
        installation.state,
        BARE.format("notifications")
        + row({"n": 1})
        + BARE.format("mine")
        + row("bad").replace("notifications", "mine"),
    )
    dump = installation.sqlite3(".dump")

    def fails(conn):
        raise sqlite3.OperationalError("as if the disk had failed")

    with monkeypatch.context() as patched:
        patched.setattr(queue, "create_view", fails)
        with pytest.raises(queue.QueueUnavailable, match="as if"):
            queue.connect()
    assert installation.sqlite3(".dump") == dump and installation.rows("pragma user_version") == [
        (0,)
    ]
    queue.connect()
    assert installation.rows("pragma user_version") == [(queue.SCHEMA_VERSION,)]
    assert installation.rows("select count(*) from notifications") == [(1,)]
    assert installation.rows("select queue, data from task_history") == [("mine", "bad")]
