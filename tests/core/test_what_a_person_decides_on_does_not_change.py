"""What is held runs only when it is approved, and what is approved is what was seen."""

from __future__ import annotations

import json

import pytest

import tasks


@pytest.fixture
def conn(installation, queue, monkeypatch):
    """The database, and tasks.main() on it in this process."""
    monkeypatch.setenv("TASK_QUEUE_STATE", str(installation.state))
    return queue.connect()


def fire(queue, n: int, how: str = "skip", **options) -> str:
    """Enqueue task x of approvals with this number, and return what is said of it."""
    row = queue.new_row("t", {"n": n}, "x", on_duplicate=how, **options)
    [stored] = queue.enqueue_tasks("approvals", [row])
    return "queued" if stored.is_new else "updated" if stored.is_updated else "duplicate"


def state(queue, conn) -> list[tuple]:
    statement = (
        f"select data ->> '$.data.n', {queue.STATUS_WORD}, approved from approvals order by id"
    )
    return conn.execute(statement).fetchall()


def approve(queue, conn) -> None:
    from taskqueue import approval

    (row_id,) = conn.execute("select id from approvals").fetchone()
    with queue.transaction(conn):
        assert approval.approve(conn, "approvals", row_id)


@pytest.mark.parametrize("how", ["replace", "rerun"])
@pytest.mark.parametrize("hold", [False, True])
def test_a_held_and_an_approved_task_take_no_new_data(queue, conn, how, hold):
    fire(queue, 1, hold=True)
    assert fire(queue, 2, how, hold=hold) == "duplicate"
    assert state(queue, conn) == [(1, "held", 0)]
    approve(queue, conn)
    assert fire(queue, 3, how, hold=hold) == "duplicate"
    (task,) = queue.claim_ready(conn, "approvals")
    with queue.transaction(conn):
        assert queue.nack(conn, task, error="no", delay=60) == "scheduled"
    assert fire(queue, 4, how, hold=hold) == "duplicate"
    assert state(queue, conn) == [(1, "scheduled", 1)]


def test_what_a_shell_lets_run_was_approved_too(installation, queue, conn):
    fire(queue, 1, hold=True)
    installation.sqlite3("update approvals set status = 1")
    assert fire(queue, 2, "replace") == "duplicate" and state(queue, conn) == [(1, "pending", 1)]


@pytest.mark.parametrize("ending", ["ack", "bury"])
@pytest.mark.parametrize("hold", [False, True])
def test_a_rerun_over_an_approved_task_that_runs_is_held_when_it_has_ended(
    queue, conn, hold, ending
):
    fire(queue, 1, hold=True)
    approve(queue, conn)
    (task,) = queue.claim_ready(conn, "approvals")
    assert fire(queue, 2, "replace", hold=hold) == "duplicate"
    assert fire(queue, 3, "rerun", hold=hold) == "updated"
    assert fire(queue, 4, "rerun", hold=hold) == "duplicate"
    with queue.transaction(conn):
        # What a failed attempt leaves is what was approved.
        assert queue.nack(conn, task, error="no", delay=0)
    (task,) = queue.claim_ready(conn, "approvals")
    assert task.data == {"n": 1} and state(queue, conn) == [(1, "in_progress", 1)]
    with queue.transaction(conn):
        if ending == "ack":
            assert queue.ack(conn, task)
        else:
            assert queue.bury(conn, task, error="no")
    assert state(queue, conn) == [(3, "held", 0)]
    assert queue.claim_ready(conn, "approvals") == []


@pytest.mark.parametrize("waits", ["ready", "scheduled", "retrying", "running"])
@pytest.mark.parametrize("how", ["replace", "rerun"])
def test_hold_holds_in_an_update(queue, conn, waits, how):
    fire(queue, 1, delay=60.0 if waits == "scheduled" else 0.0)
    if waits in ("retrying", "running"):
        (task,) = queue.claim_ready(conn, "approvals")
    if waits == "retrying":
        with queue.transaction(conn):
            queue.nack(conn, task, error="no", delay=60)
    assert fire(queue, 2, how, hold=True) == "updated"
    if waits == "running":
        with queue.transaction(conn):
            assert queue.ack(conn, task)
    assert state(queue, conn) == [(2, "held", 0)]


@pytest.mark.parametrize("how", ["replace", "rerun"])
@pytest.mark.parametrize("hold", [False, True])
def test_a_firing_that_is_kept_to_be_held_does_not_change(queue, conn, how, hold):
    fire(queue, 1)
    (task,) = queue.claim_ready(conn, "approvals")
    assert fire(queue, 2, "rerun", delay=60) == "updated"
    assert fire(queue, 3, "rerun", hold=True) == "updated"
    assert fire(queue, 4, how, hold=hold) == "duplicate"
    with queue.transaction(conn):
        assert queue.ack(conn, task)
    assert state(queue, conn) == [(3, "held", 0)]


@pytest.mark.parametrize("end", ["cancel", "reject", "expire"])
def test_retry_of_what_ended_while_it_was_held_is_held_again(
    installation, queue, conn, end, capsys
):
    fire(queue, 1, hold=True, ttl=0.0 if end == "expire" else None)
    if end == "expire":
        assert queue.claim_ready(conn, "approvals") == []
    else:
        assert tasks.main([end, "x"]) == 0
    assert tasks.main(["retry", "x"]) == 0
    assert "task x is held again" in capsys.readouterr().err
    assert state(queue, conn) == [(1, "held", 0)]


def test_move_export_and_import_keep_held_approved_and_the_groups_turn(queue, conn, tmp_path):
    for name, options in {"h": {"hold": True}, "a": {"hold": True}, "r": {}, "b": {}}.items():
        group = {"group": "g"} if name in "rb" else {}
        queue.enqueue_task("approvals", "t", {"n": 1}, name, **options, **group)
    assert tasks.main(["approve", "a"]) == 0
    for task in queue.claim_ready(conn, "approvals", limit=9):
        if task.task_id == "r":
            with queue.transaction(conn):
                queue.nack(conn, task, error="no", delay=3_600)
        else:
            queue.enqueue_task("approvals", "t", {"n": 2}, "a", on_duplicate="rerun", delay=9.0)
            with queue.transaction(conn):
                queue.release(conn, task)

    def rows(table: str) -> list:
        statement = f"""select task_id, {queue.STATUS_WORD}, due_at, delayed_at, released_at, approved, attempts, json(rerun)
                        from {table} order by task_id"""
        return conn.execute(statement).fetchall()

    before = rows("approvals")
    assert [row[1] for row in before] == ["pending", "blocked", "held", "scheduled"]
    file = str(tmp_path / "all.jsonl")
    assert tasks.main(["export", file]) == 0
    assert tasks.main(["move", "--from", "approvals", "completions"]) == 0
    assert rows("completions") == before
    assert tasks.main(["purge", "completions", "--yes"]) == 0
    assert tasks.main(["import", file]) == 0
    assert rows("approvals") == before


def test_a_rows_number_and_an_id_are_not_confused(queue, conn, capsys):
    from taskqueue.find import remember

    for name in ("fix", "1", "12"):
        queue.enqueue_task("approvals", "t", {}, name, hold=True)
    shown = [{"queue": "approvals", "task_id": "fix", "id": 1}]
    remember(conn.state, shown)
    assert tasks.main(["approve", "1"]) == 64
    said = capsys.readouterr().err
    assert (
        "'1' names two tasks: fix (approvals), row 1" in said and "1 (approvals), by its id" in said
    )
    assert len(state(queue, conn)) == 3 and {row[1] for row in state(queue, conn)} == {"held"}
    # A number is no beginning of an id.
    remember(conn.state, [])
    queue.enqueue_task("approvals", "t", {}, "777", hold=True)
    assert tasks.main(["approve", "7"]) == 64
    # Another task of the same id is not the one that was listed.
    remember(conn.state, [{"queue": "approvals", "task_id": "12", "id": 3}])
    assert tasks.main(["reject", "12"]) == 0
    queue.enqueue_task("approvals", "t", {"n": "other"}, "12", hold=True)
    conn.execute("delete from approvals where task_id = '1'")
    assert tasks.main(["approve", "1"]) == 1
    assert "a later task has its id" in capsys.readouterr().err
    assert {row[1] for row in state(queue, conn)} == {"held"}


def test_cancel_of_a_running_task_cancels_its_rerun(installation, queue, conn):
    installation.handler("t", "#!/bin/sh\nexec sleep 60\n")
    fire(queue, 1)
    installation.worker("approvals")
    from conftest import wait_for

    wait_for(lambda: list((installation.state / "logs").glob("approvals/*.out")))
    assert fire(queue, 2, "rerun") == "updated"
    assert tasks.main(["cancel", "x"]) == 0
    assert installation.history("x")["status"] == "cancelled"
    assert state(queue, conn) == []


def test_an_approved_tasks_held_rerun_goes_with_its_cancel(queue, conn):
    fire(queue, 1, hold=True)
    approve(queue, conn)
    (task,) = queue.claim_ready(conn, "approvals")
    fire(queue, 2, "rerun")
    with queue.transaction(conn):
        queue.nack(conn, task, error="no", delay=60)
    assert tasks.main(["cancel", "x"]) == 0 and state(queue, conn) == []


def test_limit_and_pause_work_before_the_first_enqueue(installation, queue, conn, capsys):
    assert tasks.main(["limit", "nightly", "--slots", "1"]) == 0
    assert tasks.main(["pause", "nightly", "--for", "1h"]) == 0
    queue.enqueue_tasks("nightly", [{"task_type": "t", "data": {}}] * 2)
    assert queue.claim_ready(conn, "nightly", limit=2) == []
    assert tasks.main(["resume", "nightly"]) == 0
    assert len(queue.claim_ready(conn, "nightly", limit=2)) == 1


def test_json_lines_say_when_once(installation):
    line = json.dumps({"task_type": "t", "delay": 5, "at": "2030-01-01T00:00"})
    done = installation.run("enqueue.py", "approvals", "--jsonl", input=line)
    assert done.returncode == 65 and "give one of them" in done.stderr
