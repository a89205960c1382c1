"""tasks.py retry, move, pause, resume and purge change what they are told to, and nothing else."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, wait_for

from taskqueue import running


def tasks(installation, *args, code: int = 0, **options) -> object:
    """What tasks.py prints with --json."""
    done = installation.run("tasks.py", *args, "--json", **options)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def statuses(installation) -> dict[str, str]:
    return {
        task_id: f"{queue} {status}"
        for queue, task_id, status in installation.rows(
            "select queue, task_id, status from task_queue"
        )
    }


@pytest.fixture
def with_failures(installation):
    """Two queues with dead letters of two types, one of them old, and a completed task."""
    installation.handler("flaky", '#!/bin/sh\n[ -e "$HOME/mended" ] && exit 0\nexit 65\n')
    installation.handler("other", '#!/bin/sh\n[ -e "$HOME/mended" ] && exit 0\nexit 65\n')
    installation.handler("good", "#!/bin/sh\n")
    for queue in ("approvals", "completions"):
        for task_type in ("flaky", "other"):
            installation.enqueue(queue, task_type, "{}", "--task-id", f"{queue}-{task_type}-1")
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "old-1")
    installation.enqueue("approvals", "good", "{}", "--task-id", "good-1")
    assert (
        installation.run(
            "worker.py", "approvals", "completions", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    installation.sqlite3(
        "update task_history set completed_at = datetime('now', '-2 hours') where task_id = 'old-1'"
    )
    return installation


def test_a_dead_letter_is_retried_from_its_first_attempt(with_failures):
    assert tasks(with_failures, "retry", "old")["retried"] == 1
    assert statuses(with_failures)["old-1"] == "approvals pending"
    assert with_failures.rows("select attempts, error from approvals where task_id = 'old-1'") == [
        (0, None)
    ]
    (with_failures.directory / "mended").touch()
    assert (
        with_failures.run(
            "worker.py", "approvals", "--handlers", with_failures.handlers, "--drain"
        ).returncode
        == 0
    )
    assert with_failures.history("old-1")["status"] == "completed"


def test_all_dead_letters_of_a_queue_a_type_and_an_age_are_retried_and_no_others(with_failures):
    assert (
        tasks(
            with_failures,
            "retry",
            "--failed",
            "--queue",
            "approvals",
            "--type",
            "flaky",
            "--since",
            "1h",
        )["retried"]
        == 1
    )
    after = statuses(with_failures)
    assert after.pop("approvals-flaky-1") == "approvals pending"
    assert after == {
        "approvals-other-1": "approvals failed",
        "old-1": "approvals failed",
        "good-1": "approvals completed",
        "completions-flaky-1": "completions failed",
        "completions-other-1": "completions failed",
    }
    assert tasks(with_failures, "retry", "--failed")["retried"] == 4
    assert sorted(statuses(with_failures).values()).count("approvals completed") == 1
    assert tasks(with_failures, "retry", "--failed")["retried"] == 0


def test_a_task_that_waits_again_under_the_same_id_is_not_doubled(with_failures):
    with_failures.enqueue("approvals", "flaky", "{}", "--task-id", "old-1")
    done = with_failures.run(
        "tasks.py", "retry", "--failed", "--queue", "approvals", "--type", "flaky"
    )
    assert done.returncode == 1 and "old-1" in done.stderr and "retried 1 task" in done.stdout
    assert len(with_failures.rows("select 1 from approvals where task_id = 'old-1'")) == 1
    assert with_failures.history("old-1")["status"] == "failed"


def test_a_dead_letter_that_no_queue_takes_is_named_and_holds_no_other_back(with_failures):
    """Its data was written over by hand: JSON no more, or no object."""
    with_failures.sqlite3(
        "update task_history set data = '{\"broken' where task_id = 'approvals-flaky-1';"
        "update task_history set data = x'7b7d' where task_id = 'approvals-other-1';"
        "update task_history set data = '[1]' where task_id = 'old-1'"
    )
    done = with_failures.run("tasks.py", "retry", "--failed")
    assert done.returncode == 1 and done.stdout == "retried 2 tasks\n"
    broken = ("approvals-flaky-1", "approvals-other-1", "old-1")
    assert sorted(line.split()[3] for line in done.stderr.splitlines()) == sorted(broken), (
        done.stderr
    )
    assert done.stderr.count("its data is no JSON object any more") == 3
    now = statuses(with_failures)
    assert [now[f"completions-{name}-1"] for name in ("flaky", "other")] == [
        "completions pending"
    ] * 2
    assert [now[name] for name in broken] == ["approvals failed"] * 3


def test_a_dead_letter_whose_queue_is_gone_is_named_and_holds_no_other_back(with_failures):
    with_failures.sqlite3(
        "update task_history set queue = 'dropped' where task_id = 'old-1';"
        "update task_history set row_id = 'first' where task_id = 'approvals-other-1'"
    )
    done = with_failures.run("tasks.py", "retry", "--failed")
    assert done.returncode == 1 and done.stdout == "retried 3 tasks\n", done.stderr
    assert "task old-1 of dropped was not retried: its queue is gone" in done.stderr
    assert "task approvals-other-1 of approvals was not retried" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "was not retried" in line]) == 2


@pytest.mark.parametrize("now", ["", ", queue = 'approvals', task_id = 'good-2'"], ids=["it", "another"])  # fmt: skip
def test_what_somebody_else_has_retried_meanwhile_is_not_run_again(with_failures, now):
    """It has completed in between; or another task's record has the id that its own had."""
    holder = sqlite3.connect(with_failures.db, isolation_level=None)
    holder.execute("begin immediate")
    process = with_failures.start("tasks.py", "retry", "--failed", "--queue", "completions")
    # Who waits for the lock has its turn, and knows by now what it is to put back.
    wait_for(lambda: running.is_held(with_failures.state / "turn/turn"), what="a writer's turn")
    holder.execute(
        f"update task_history set status = 'completed'{now} where task_id = 'completions-other-1'"
    )
    completed = "select * from task_history where status = 'completed'"
    before = holder.execute(completed).fetchall()
    holder.execute("commit")
    assert process.wait(30) == 1
    assert holder.execute(completed).fetchall() == before
    holder.close()
    assert "completions-other-1 of completions was not retried" in process.log.read_text()
    assert with_failures.rows("select task_id from completions") == [("completions-flaky-1",)]


def test_a_retry_that_has_run_meanwhile_is_not_run_again(installation):
    """It waited for its next attempt when it was looked for, and has completed since."""
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "flaky-1", "--delay", "1h")
    installation.sqlite3("update approvals set released_at = due_at - 3600")
    holder = sqlite3.connect(installation.db, isolation_level=None)
    holder.execute("begin immediate")
    process = installation.start("tasks.py", "retry", "--scheduled")
    wait_for(lambda: running.is_held(installation.state / "turn/turn"), what="a writer's turn")
    holder.execute(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at) "
        "select 'approvals', id, task_id, task_type, 'completed', data, datetime('now') from approvals"
    )
    holder.execute("delete from approvals")
    holder.execute("commit")
    holder.close()
    assert process.wait(30) == 1 and "it has run or gone meanwhile" in process.log.read_text()
    assert statuses(installation) == {"flaky-1": "approvals completed"}


def test_a_scheduled_task_is_retried_now(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "later", "--delay", "600")
    tasks(installation, "retry", "later")
    assert statuses(installation) == {"later": "approvals pending"}
    assert "running already" in tasks(installation, "retry", "later", code=1).__str__()


def test_a_paused_queue_is_not_served_until_it_is_resumed_even_by_a_new_worker(installation):
    installation.handler("touch", '#!/bin/sh\ntouch "$HOME/$TASK_ID"\n')
    installation.enqueue("completions", "touch", "{}", "--task-id", "first")
    worker = installation.worker("approvals", "completions")
    installation.finished("first")
    assert tasks(installation, "pause", "approvals") == [
        {"queue": "approvals", "paused": True, "changed": True}
    ]
    assert tasks(installation, "pause", "approvals") == [
        {"queue": "approvals", "paused": True, "changed": False}
    ]
    installation.enqueue("approvals", "touch", "{}", "--task-id", "held")
    installation.enqueue("completions", "touch", "{}", "--task-id", "other-queue")
    installation.finished("other-queue")
    worker.terminate()
    worker.wait(10)
    installation.worker("approvals", "completions")
    installation.enqueue("completions", "touch", "{}", "--task-id", "after-the-restart")
    installation.finished("after-the-restart")
    assert statuses(installation)["held"] == "approvals pending"
    assert tasks(installation, "stats")["queues"]["approvals"]["paused"] is True
    began = time.monotonic()
    assert tasks(installation, "resume", "approvals")[0]["changed"] is True
    installation.finished("held")
    assert time.monotonic() - began < 1.5, "an idle worker was not woken by resume"
    assert "was not paused" in installation.run("tasks.py", "resume", "approvals").stdout


def test_a_busy_worker_obeys_a_pause_within_a_second(installation):
    installation.handler("short", '#!/bin/sh\ndate +%s.%N >> "$HOME/starts"\n')
    installation.enqueue("approvals", "short", "--jsonl", input="{}\n" * 2000)
    installation.worker("approvals")
    starts = installation.directory / "starts"
    wait_for(lambda: starts.exists() and starts.read_text().count("\n") > 5)
    installation.run("tasks.py", "pause", "approvals")
    paused_at = time.time()
    left = wait_for(
        lambda: (
            not installation.rows("select 1 from approvals where status = 2")
            and installation.rows("select count(*) from approvals")
        )
    )
    assert left[0][0] > 0
    assert float(starts.read_text().split()[-1]) < paused_at + 1


def test_a_waiting_task_moves_with_its_id_priority_and_time(installation):
    installation.enqueue(
        "approvals", "review", '{"a": 1}', "--task-id", "m-1", "--priority", "7", "--delay", "500"
    )
    before = installation.rows("select data, timestamp, status, priority, due_at from approvals")
    assert tasks(installation, "move", "m-1", "completions")["moved"] == 1
    assert (
        installation.rows("select data, timestamp, status, priority, due_at from completions")
        == before
    )
    assert installation.rows("select 1 from approvals") == []


def test_a_bare_payload_keeps_its_id_when_it_moves(installation):
    installation.enqueue("approvals", "review")
    installation.sqlite3(
        'insert into notifications (data) values (\'{"hook_event_name": "Stop", "n": 1e2}\')'
    )
    tasks(installation, "move", "notifications-1", "completions")
    (row,) = installation.rows(
        "select task_id, task_type, json_extract(data, '$.data') from completions"
    )
    assert row == ("notifications-1", "Stop", '{"hook_event_name":"Stop","n":1e2}')


def test_all_that_waits_in_a_queue_moves_and_what_cannot_is_named(installation):
    for name in ("a", "b", "c"):
        installation.enqueue("approvals", "review", "{}", "--task-id", name)
    installation.enqueue("approvals", "deploy", "{}", "--task-id", "d")
    installation.enqueue("completions", "review", "{}", "--task-id", "b")
    installation.sqlite3("update approvals set status = 2, owner = 'x' where task_id = 'c'")
    done = installation.run(
        "tasks.py", "move", "--from", "approvals", "--type", "review", "completions"
    )
    assert done.returncode == 1 and "task b of approvals was not moved" in done.stderr
    assert sorted(installation.rows("select queue, task_id, status from task_queue")) == [
        ("approvals", "b", "pending"), ("approvals", "c", "in_progress"), ("approvals", "d", "pending"),
        ("completions", "a", "pending"), ("completions", "b", "pending")]  # fmt: skip
    done = installation.run("tasks.py", "move", "c", "completions")
    assert done.returncode == 1 and "running" in done.stderr


def test_purge_asks_first_and_takes_only_a_yes(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 3)
    for answer, left in (("n", 3), ("", 3), ("y", 0)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, ROOT / "tasks.py", "purge", "approvals"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=installation.env,
        )
        os.close(theirs)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(ours, 1000)
        assert b"3 pending of approvals for good" in seen
        os.write(ours, f"{answer}\n".encode())
        assert process.wait(10) == (0 if answer == "y" else 1)
        os.close(ours)
        assert installation.rows("select count(*) from approvals") == [(left,)]


def purge_that_asks(installation, status: str, meanwhile) -> None:
    """purge approvals --status, where a person does something before the answer, which is yes."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", "purge", "approvals", "--status", status],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=installation.env,
    )
    os.close(theirs)
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(ours, 1000)
    meanwhile()
    os.write(ours, b"y\n")
    assert process.wait(10) == 0
    os.close(ours)


@pytest.mark.parametrize(
    ("status", "how", "verb"),
    [("held", ["--hold"], "approve"), ("scheduled", ["--delay", "1h"], "retry")],
)
def test_what_was_approved_or_retried_while_purge_asked_stays(installation, status, how, verb):
    for name in ("waits-1", "runs-1"):
        installation.enqueue("approvals", "review", "{}", "--task-id", name, *how)
    purge_that_asks(installation, status, lambda: tasks(installation, verb, "runs-1"))
    assert installation.rows("select task_id from approvals") == [("runs-1",)]


def test_what_was_retried_and_has_completed_while_purge_asked_stays(installation):
    """Its record has the id that the dead letter had."""
    installation.handler("flaky", '#!/bin/sh\n[ -e "$HOME/mended" ] && exit 0\nexit 65\n')
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "flaky-1")

    def drain() -> list[tuple]:
        work = ("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
        assert installation.run(*work).returncode == 0
        return installation.rows("select id, status from task_history")

    def meanwhile() -> None:
        (installation.directory / "mended").touch()
        tasks(installation, "retry", "flaky-1")
        assert drain() == [(1, "completed")]

    assert drain() == [(1, "failed")]
    purge_that_asks(installation, "failed", meanwhile)
    assert installation.rows("select id, status from task_history") == [(1, "completed")]


def test_purge_takes_a_group_whole_although_its_next_task_becomes_ready(installation):
    for _ in range(3):
        installation.enqueue("approvals", "review", "{}", "--group", "g")
    assert tasks(installation, "purge", "approvals", "--yes")["deleted"] == 3
    assert installation.rows("select count(*) from approvals") == [(0,)]


def test_purge_refuses_when_there_is_nobody_to_ask(installation):
    installation.enqueue("approvals", "review")
    done = installation.run("tasks.py", "purge", "approvals")
    assert done.returncode == 1 and "--yes" in done.stderr
    assert installation.rows("select count(*) from approvals") == [(1,)]


def test_purge_never_touches_a_running_task_and_only_what_was_named(with_failures):
    with_failures.enqueue("approvals", "flaky", "--jsonl", input="{}\n" * 2)
    with_failures.enqueue("approvals", "good")
    with_failures.sqlite3(
        "update approvals set status = 2, owner = 'x' where id = (select min(id) from approvals)"
    )
    assert tasks(with_failures, "purge", "approvals", "--type", "flaky", "--yes")["deleted"] == 1
    assert with_failures.rows("select status, task_type from approvals order by id") == [
        (2, "flaky"),
        (1, "good"),
    ]
    assert (
        tasks(with_failures, "purge", "approvals", "--status", "failed", "--before", "1h", "--yes")[
            "deleted"
        ]
        == 1
    )
    assert (
        with_failures.history("old-1") is None
        and with_failures.history("approvals-flaky-1") is not None
    )
    done = with_failures.run("tasks.py", "purge", "approvals", "--status", "in_progress", "--yes")
    assert done.returncode == 64


def test_nobody_waits_long_for_the_lock_while_many_tasks_change(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 30_000)
    import sqlite3

    conn, slowest, stop = (
        sqlite3.connect(installation.db, timeout=10, isolation_level=None, check_same_thread=False),
        [],
        threading.Event(),
    )

    def insert() -> None:
        while not stop.is_set():
            began = time.monotonic()
            conn.execute("insert into notifications (data) values ('{}')")
            slowest.append(time.monotonic() - began)
            stop.wait(0.005)

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        assert tasks(installation, "purge", "approvals", "--yes")["deleted"] == 30_000
    finally:
        stop.set()
        thread.join()
    conn.close()
    assert len(slowest) > 10 and sorted(slowest)[int(len(slowest) * 0.95)] < 0.25


def test_a_move_keeps_all_that_is_set_for_a_task(installation):
    installation.enqueue(
        *("approvals", "review", "{}", "--task-id", "m", "--delay", "1h"),
        *("--ttl", "1d", "--priority", "7", "--group", "g"),
    )
    installation.sqlite3("update approvals set own_attempts = 9, approved = 1, error = 'before'")
    names = "data, timestamp, status, priority, due_at, delayed_at, expires_at, group_id"
    names += ", own_attempts, approved, error"
    before = installation.rows(f"select {names} from approvals")
    assert installation.run("tasks.py", "move", "m", "notifications").returncode == 0
    assert installation.rows(f"select {names} from notifications") == before
    assert installation.rows("select count(*) from approvals") == [(0,)]
