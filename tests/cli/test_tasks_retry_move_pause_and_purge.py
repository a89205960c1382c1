"""tasks.py retry, move, pause, resume and purge change what they are told to, and nothing else."""

from __future__ import annotations

import sqlite3
import threading
import time

import pytest
from conftest import wait_for
from terminal import answered

from taskqueue import running

FLAKY = '#!/bin/sh\n[ -e "$HOME/mended" ] && exit 0\nexit 65\n'


@pytest.fixture
def failed(installation):
    """Two queues with dead letters of two types, one of them old, and a completed task."""
    for name, text in (("flaky", FLAKY), ("other", FLAKY), ("good", "#!/bin/sh\n")):
        installation.handler(name, text)
    for queue in ("approvals", "completions"):
        for task_type in ("flaky", "other"):
            installation.add(f"{queue} {task_type} --task-id {queue}-{task_type}-1")
    installation.add("approvals flaky --task-id old-1")
    installation.add("approvals good --task-id good-1")
    installation.drain("approvals completions")
    two_hours_ago = "completed_at = datetime('now', '-2 hours')"
    installation.sqlite3(f"update task_history set {two_hours_ago} where task_id = 'old-1'")
    return installation


def places(installation) -> list[tuple]:
    return sorted(installation.rows("select queue, task_id, status from task_queue"))


def changed_meanwhile(installation, command: str, statement: str) -> str:
    """Run a command that waits for the write lock while a statement is done; return what it says."""
    holder = sqlite3.connect(installation.db, isolation_level=None)
    holder.execute("begin immediate")
    process = installation.start("tasks.py", *command.split())
    # Who waits for the lock has its turn, and knows by now what it is to change.
    wait_for(lambda: running.is_held(installation.state / "turn/turn"), what="a writer's turn")
    for each in f"{statement}; commit".split("; "):
        holder.execute(each)
    holder.close()
    assert process.wait(30) == 1
    return process.log.read_text()


# ---------------------------------------------------------------------------------------- retry


def test_a_dead_letter_is_retried_from_its_first_attempt(failed):
    assert failed.told("retry old")["retried"] == 1
    assert failed.rows("select status, attempts, error from approvals") == [(1, 0, None)]
    (failed.directory / "mended").touch()
    failed.drain("approvals")
    assert failed.history("old-1")["status"] == "completed"


def test_all_dead_letters_of_a_queue_a_type_and_an_age_are_retried_and_no_others(failed):
    of_one = "retry --failed --queue approvals --type flaky --since 1h"
    assert failed.told(of_one)["retried"] == 1
    pending = [task_id for task_id, status in failed.statuses().items() if status == "pending"]
    assert pending == ["approvals-flaky-1"]
    assert [failed.told("retry --failed")["retried"] for _ in "12"] == [4, 0]
    assert failed.statuses().pop("good-1") == "completed"


SPOILT = {
    "it waits again": ("insert into approvals (data) select data from task_history where task_id = 'old-1'",
                       {"old-1": "waiting"}),
    "no JSON, no object": ("update task_history set data = '{\"broken' where task_id = 'approvals-flaky-1';"
                           "update task_history set data = x'7b7d' where task_id = 'approvals-other-1';"
                           "update task_history set data = '[1]' where task_id = 'old-1'",
                           dict.fromkeys(("approvals-flaky-1", "approvals-other-1", "old-1"),
                                         "its data is no JSON object any more")),
    "no queue, no row": ("update task_history set queue = 'dropped' where task_id = 'old-1';"
                         "update task_history set row_id = 'first' where task_id = 'approvals-other-1'",
                         {"old-1": "its queue is gone", "approvals-other-1": "was not retried"}),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_one_that_cannot_be_retried_is_named_and_holds_no_other_back(failed, how):
    statement, why = SPOILT[how]
    failed.sqlite3(statement)
    done = failed.tq("retry --failed", code=1)
    assert done.stdout == f"retried {5 - len(why)} tasks\n", done.stderr
    said = {line.split()[3]: line for line in done.stderr.splitlines() if "not retried" in line}
    assert said.keys() == why.keys() and all(why[name] in said[name] for name in why), said
    assert all(failed.history(name)["status"] == "failed" for name in why)


@pytest.mark.parametrize("now", ["", ", queue = 'approvals', task_id = 'x'"], ids=["it", "another"])
def test_what_somebody_else_has_retried_meanwhile_is_not_run_again(failed, now):
    """It has completed in between; or another task's record has the id that its own had."""
    change = (
        f"update task_history set status = 'completed'{now} where task_id = 'completions-other-1'"
    )
    said = changed_meanwhile(failed, "retry --failed --queue completions", change)
    assert "completions-other-1 of completions was not retried" in said
    assert failed.rows("select task_id from completions") == [("completions-flaky-1",)]
    completed = "select count(*) from task_history where status = 'completed'"
    assert failed.rows(completed) == [(2,)]


def test_a_scheduled_task_is_retried_now_unless_it_has_run_meanwhile(installation):
    for name in ("it", "other"):
        installation.add(f"approvals flaky --task-id {name} --delay 1h")
    installation.sqlite3("update approvals set released_at = due_at - 3600 where task_id = 'other'")
    ended = (
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)"
        " select 'approvals', id, task_id, task_type, 'completed', data, datetime('now')"
        " from approvals where task_id = 'other'; delete from approvals where task_id = 'other'"
    )
    said = changed_meanwhile(installation, "retry --scheduled", ended)
    assert "it has run or gone meanwhile" in said
    installation.tq("retry it")
    assert installation.statuses() == {"it": "pending", "other": "completed"}
    assert "running already" in installation.tq("retry it", code=1).stderr


# -------------------------------------------------------------------------------------- pause


def test_a_paused_queue_is_not_served_until_it_is_resumed_even_by_a_new_worker(installation):
    installation.handler("touch", "#!/bin/sh\n")
    worker = installation.worker("approvals", "completions")
    assert installation.ends_well("completions", "touch")
    for changed in (True, False):
        told = {"queue": "approvals", "paused": True, "changed": changed}
        assert installation.told("pause approvals") == [told]
    installation.add("approvals touch --task-id held")
    assert installation.ends_well("completions", "touch")
    worker.terminate()
    worker.wait(10)
    installation.worker("approvals", "completions")
    assert installation.ends_well("completions", "touch")
    assert installation.statuses()["held"] == "pending"
    assert installation.told("stats")["queues"]["approvals"]["paused"] is True
    began = time.monotonic()
    assert installation.told("resume approvals")[0]["changed"] is True
    installation.finished("held")
    assert time.monotonic() - began < 1.5, "an idle worker was not woken by resume"
    assert "was not paused" in installation.tq("resume approvals").stdout


def test_a_busy_worker_obeys_a_pause_within_a_second(installation):
    installation.handler("short", '#!/bin/sh\ndate +%s.%N >> "$HOME/starts"\n')
    installation.add("approvals short --jsonl", input="{}\n" * 2000)
    installation.worker("approvals")
    starts = installation.directory / "starts"
    wait_for(lambda: starts.exists() and starts.read_text().count("\n") > 5)
    installation.tq("pause approvals")
    paused_at = time.time()
    wait_for(lambda: not installation.rows("select 1 from approvals where status = 2"))
    assert installation.rows("select count(*) > 0 from approvals") == [(1,)]
    assert float(starts.read_text().split()[-1]) < paused_at + 1


# --------------------------------------------------------------------------------------- move


def test_a_task_moves_with_all_that_is_set_for_it(installation):
    options = "--task-id m --delay 1h --ttl 1d --priority 7 --group g"
    installation.add(f"approvals review {options}", '{"a": 1}')
    installation.sqlite3("update approvals set own_attempts = 9, approved = 1, error = 'before'")
    names = "data, timestamp, status, priority, due_at, delayed_at, expires_at, group_id"
    names += ", own_attempts, approved, error"
    before = installation.rows(f"select {names} from approvals")
    assert installation.told("move m completions")["moved"] == 1
    assert installation.rows(f"select {names} from completions") == before
    assert installation.rows("select 1 from approvals") == []


def test_a_bare_payload_keeps_its_id_when_it_moves(installation):
    installation.add("approvals review")
    bare = '{"hook_event_name": "Stop", "n": 1e2}'
    installation.sqlite3(f"insert into notifications (data) values ('{bare}')")
    installation.tq("move notifications-1 completions")
    columns = "task_id, task_type, json_extract(data, '$.data')"
    row = ("notifications-1", "Stop", bare.replace(" ", ""))
    assert installation.rows(f"select {columns} from completions") == [row]


def test_all_that_waits_in_a_queue_moves_and_what_cannot_is_named(installation):
    for name in ("a", "b", "c"):
        installation.add(f"approvals review --task-id {name}")
    installation.add("approvals deploy --task-id d")
    installation.add("completions review --task-id b")
    installation.sqlite3("update approvals set status = 2, owner = 'x' where task_id = 'c'")
    said = installation.tq("move --from approvals --type review completions", code=1).stderr
    assert "task b of approvals was not moved" in said
    assert places(installation) == [
        ("approvals", "b", "pending"), ("approvals", "c", "in_progress"), ("approvals", "d", "pending"),
        ("completions", "a", "pending"), ("completions", "b", "pending")]  # fmt: skip
    assert "running" in installation.tq("move c completions", code=1).stderr


# -------------------------------------------------------------------------------------- purge


def count(installation) -> int:
    return installation.rows("select count(*) from approvals")[0][0]


def test_purge_asks_first_and_takes_only_a_yes(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 3)
    for answer, left in (("n", 3), ("", 3), ("y", 0)):
        code, asked = answered(installation, "purge approvals", answer)
        assert code == (0 if answer == "y" else 1)
        assert "3 pending of approvals for good" in asked and count(installation) == left


@pytest.mark.parametrize(
    ("status", "how", "verb"), [("held", "--hold", "approve"), ("scheduled", "--delay 1h", "retry")]
)
def test_what_was_approved_or_retried_while_purge_asked_stays(installation, status, how, verb):
    for name in ("waits-1", "runs-1"):
        installation.add(f"approvals review --task-id {name} {how}")
    purge = f"purge approvals --status {status}"
    assert answered(installation, purge, "y", lambda: installation.tq(f"{verb} runs-1"))[0] == 0
    assert installation.rows("select task_id from approvals") == [("runs-1",)]


def test_what_was_retried_and_has_completed_while_purge_asked_stays(installation):
    """Its record has the id that the dead letter had."""
    installation.handler("flaky", FLAKY)
    installation.add("approvals flaky --task-id flaky-1")
    records = "select id, status from task_history"

    def meanwhile() -> None:
        (installation.directory / "mended").touch()
        installation.tq("retry flaky-1")
        installation.drain("approvals")
        assert installation.rows(records) == [(1, "completed")]

    installation.drain("approvals")
    assert installation.rows(records) == [(1, "failed")]
    assert answered(installation, "purge approvals --status failed", "y", meanwhile)[0] == 0
    assert installation.rows(records) == [(1, "completed")]


def test_purge_takes_a_group_whole_although_its_next_task_becomes_ready(installation):
    for _ in range(3):
        installation.add("approvals review --group g")
    assert installation.told("purge approvals --yes")["deleted"] == 3 and count(installation) == 0


def test_purge_never_touches_a_running_task_and_only_what_was_named(failed):
    failed.add("approvals flaky --jsonl", input="{}\n" * 2)
    failed.add("approvals good")
    runs = "id = (select min(id) from approvals)"
    failed.sqlite3(f"update approvals set status = 2, owner = 'x' where {runs}")
    assert failed.told("purge approvals --type flaky --yes")["deleted"] == 1
    left = failed.rows("select status, task_type from approvals order by id")
    assert left == [(2, "flaky"), (1, "good")]
    assert failed.told("purge approvals --status failed --before 1h --yes")["deleted"] == 1
    assert failed.history("old-1") is None and failed.history("approvals-flaky-1")
    failed.tq("purge approvals --status in_progress --yes", code=64)


def test_nobody_waits_long_for_the_lock_while_many_tasks_change(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 30_000)
    conn = sqlite3.connect(
        installation.db, timeout=10, isolation_level=None, check_same_thread=False
    )
    took, stop = [], threading.Event()

    def insert() -> None:
        while not stop.is_set():
            began = time.monotonic()
            conn.execute("insert into notifications (data) values ('{}')")
            took.append(time.monotonic() - began)
            stop.wait(0.005)

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        assert installation.told("purge approvals --yes")["deleted"] == 30_000
    finally:
        stop.set()
        thread.join()
    conn.close()
    assert len(took) > 10 and sorted(took)[int(len(took) * 0.95)] < 0.25
