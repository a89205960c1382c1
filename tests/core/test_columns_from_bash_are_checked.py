"""What bash writes into a queue's columns means what the options of enqueue.py mean; nonsense is
refused at the INSERT.
"""

import subprocess

import pytest
from conftest import wait_for

NONSENSE = {
    "priority": ["'high'", "1.5", "1000001", "-1000001", "9e999", "x'01'", "'1e3x'"],
    "due_at": ["'tomorrow'", "'2026-12-01T09:00'", "1200000000000", "-1", "-9e999", "x'01'"],
    "expires_at": ["'soon'", "'in 1h'", "1200000000000", "-1", "9e999", "x'01'"],
    "group_id": ["''", "x'6161'", "printf('%.*c', 501, 'x')", "zeroblob(1000000)"],
}
MOMENTS = ["'tomorrow'", "'2026-12-01'", "1764547200000", "-1", "9e999", "x'01'"]
NONSENSE |= {name: MOMENTS for name in ("timestamp", "claimed_at", "released_at", "delayed_at")}
NONSENSE |= {
    "status": ["'held'", "99", "-1", "7", "1.5", "4", "null", "x'01'"],
    "attempts": ["'many'", "-1", "1.5", "null", "9e999"],
    "approved": ["'yes'", "2", "-1", "null"],
    "cancel_requested": ["'yes'", "2", "null"],
    "then_hold": ["'yes'", "2", "null"],
    "chain": ["'yes'", "2", "null"],
    "max_attempts": ["0", "-1", "'few'", "1.5"],
    "backoff": ["'long'", "-1", "9e999"],
    "owner": ["x'01'"],
    "rerun": ["'{'", "'[]'", "'[1,2,3,4,5,6,7]'"],
}
# What is said names the column in any case; of these, the constraint is named.
CONSTRAINT = {
    "priority": "priority_must_be_a_whole_number_within_a_million",
    "due_at": "due_at_and_expires_at_must_be_unix_seconds",
    "expires_at": "due_at_and_expires_at_must_be_unix_seconds",
    "group_id": "group_id_must_be_a_text_of_500_characters_at_most",
}


def refused(installation, statement: str) -> str:
    """Return what the sqlite3 command says of a statement that it refuses."""
    done = subprocess.run(["sqlite3", installation.db, statement], capture_output=True, text=True)
    assert done.returncode != 0, statement
    return done.stderr


@pytest.mark.parametrize("column", NONSENSE)
def test_nonsense_is_refused_by_name(installation, queue, column):
    queue.connect()
    installation.sqlite3("insert into approvals (data) values ('{}')")
    for value in NONSENSE[column]:
        for statement in (
            f"insert into approvals (data, {column}) values ('{{}}', {value})",
            f"update approvals set {column} = {value}",
        ):
            said = refused(installation, statement)
            assert CONSTRAINT.get(column, column) in said or column == "rerun", said
    assert installation.rows("select count(*) from approvals where status = 1") == [(1,)]


@pytest.mark.parametrize("column", ["paused_at", "paused_until", "slots", "paused_by"])
def test_a_pause_that_would_not_end_or_not_hold_is_refused_by_name(installation, queue, column):
    queue.connect()
    nonsense = {"slots": ["0", "-1", "'two'", "1.5"], "paused_by": ["'nobody'"]}
    for value in nonsense.get(column, MOMENTS):
        statement = f"insert into task_controls (queue, {column}) values ('approvals', {value})"
        assert column in refused(installation, statement)


def test_what_bash_blocks_or_moves_to_another_group_is_not_left_there(installation, queue):
    """A row that says that it is blocked waits for its group's turn like any other."""
    conn = queue.connect()
    installation.sqlite3("insert into approvals (data, status, group_id) values ('{}', 4, 'free')")
    assert len(queue.claim_ready(conn, "approvals")) == 1
    installation.sqlite3(
        "insert into approvals (data, group_id) values ('{}', 'a'), ('{}', 'a'), ('{}', 'b')"
    )
    # The blocked one goes where nobody is, and the head of the one group to the end of the other.
    installation.sqlite3("update approvals set group_id = 'c' where id = 3")
    installation.sqlite3("update approvals set group_id = 'b' where id = 2")
    rows = installation.rows("select id, status from approvals where id > 1")
    assert rows == [(2, 4), (3, 1), (4, 1)]


def test_what_is_no_json_object_is_refused_whatever_else_it_has(installation, queue):
    queue.connect()
    for data in ("'[1]'", "'{'", "x'7b7d'", "null", "''"):
        assert refused(
            installation,
            f"insert into approvals (data, group_id, priority) values ({data}, 'a', 1)",
        )
    assert installation.rows("select count(*) from approvals") == [(0,)]


def test_one_bad_row_of_many_stores_none_of_them(installation, queue):
    queue.connect()
    refused(
        installation,
        "insert into approvals (data, group_id, priority) values ('{}', 'a', 1), ('{}', 'a', 2), ('{}', 'a', 'high')",
    )
    assert installation.rows("select count(*) from approvals") == [(0,)]
    # And the group is not taken.
    installation.sqlite3("insert into approvals (data, group_id) values ('{}', 'a')")
    assert installation.rows("select status from approvals") == [(1,)]


@pytest.mark.parametrize(
    ("columns", "values", "options"),
    [
        ("priority", "7", {"priority": 7}),
        ("priority", "'7'", {"priority": 7}),
        ("group_id", "'a'", {"group": "a"}),
        ("group_id", "5", {"group": "5"}),
        ("due_at", "unixepoch() + 600", {"delay": 600}),
        ("due_at", "strftime('%s', 'now', '+10 minutes')", {"delay": 600}),
        (
            "due_at, group_id, priority",
            "unixepoch() + 600, 'a', -1",
            {"delay": 600, "group": "a", "priority": -1},
        ),
        ("status", "3", {"hold": True}),
        ("status, group_id", "3, 'a'", {"hold": True, "group": "a"}),
        ("expires_at", "unixepoch() + 600", {"ttl": 600}),
        ("due_at, expires_at", "unixepoch() + 600, unixepoch() + 900", {"delay": 600, "ttl": 300}),
    ],
)
def test_the_columns_mean_what_the_options_mean(installation, queue, columns, values, options):
    queue.enqueue_task("approvals", "t", {}, group=options.get("group"))
    queue.enqueue_task("approvals", "t", {}, **options)
    installation.sqlite3(f"insert into approvals (data, {columns}) values ('{{}}', {values})")
    described = """select priority, group_id, case status when 1 then 'ready' when 4 then 'blocked' else status end, due_at is null,
                   expires_at is null, released_at, attempts, owner from approvals where id > 1 order by id"""
    ours, theirs = installation.rows(described)
    assert ours == theirs
    [(apart,)] = (
        installation.rows("""select max(abs(coalesce(a.due_at - b.due_at, 0)), abs(coalesce(a.expires_at - b.expires_at, 0)))
                                      from approvals a, approvals b where a.id = 2 and b.id = 3""")
    )
    assert apart < 30
    words = installation.rows(
        "select status from task_queue where queue = 'approvals' and task_id <> (select task_id from approvals where id = 1)"
    )
    assert len(words) == 2 and words[0] == words[1]


def test_a_time_that_has_passed_is_now(installation, queue):
    conn = queue.connect()
    installation.sqlite3(
        "insert into approvals (data, due_at) values ('{}', 0), ('{}', unixepoch() - 5)"
    )
    assert [task.id for task in queue.claim_ready(conn, "approvals", limit=9)] == [1, 2]


def test_what_has_expired_ends_in_the_history_and_is_never_run(installation, queue):
    conn = queue.connect()
    installation.sqlite3(
        "insert into approvals (data, expires_at, group_id) values ('{}', unixepoch() - 5, 'a'), ('{}', null, 'a')"
    )
    assert [task.id for task in queue.claim_ready(conn, "approvals", limit=9)] == [2]
    rows = installation.rows("select row_id, status, attempts from task_history")
    assert rows == [(1, "expired", 0)] and installation.statuses()["approvals-1"] == "expired"


def test_a_worker_runs_what_bash_scheduled_and_grouped(installation):
    log = installation.directory / "log"
    installation.handler("approvals", f"#!/bin/sh\necho $TASK_ID >> {log}\n")
    installation.worker("approvals", "--concurrency", 4)
    # Without the group's order, the last two would come before the one that sleeps.
    installation.handler(
        "approvals",
        f"#!/bin/sh\n[ $TASK_ID != approvals-1 ] || sleep 0.3\necho $TASK_ID >> {log}\n",
    )
    installation.sqlite3("""insert into approvals (data, priority, group_id, due_at) values
      ('{}', 5, 'a', null), ('{}', 0, 'a', null), ('{}', 9, 'a', null), ('{}', 0, null, unixepoch() + 1)""")
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(4,)])
    order = log.read_text().split()
    grouped = [name[-1] for name in order if name != "approvals-4"]
    assert grouped == ["1", "3", "2"]


def test_a_row_that_waits_for_nothing_is_an_ordinary_one(installation, queue):
    """Status 6 says that a task waits for another; one inserted by hand names none."""
    queue.connect()
    installation.sqlite3("insert into approvals (data, status) values ('{}', 6)")
    installation.sqlite3("insert into approvals (data, status, due_at) values ('{}', 6, 9e9)")
    assert installation.rows("select status from approvals order by id") == [(1,), (3,)]
