"""cleanup.py prunes what is finished and old, with its logs, and leaves everything else as it was."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for

FINISHED = """
insert into task_history (id, queue, row_id, task_id, task_type, status, data, enqueued_at, completed_at)
values ({id}, 'notifications', {id}, 'task-{id}', 't', '{status}', '{{}}', datetime('now', '-90 days'),
        strftime('%Y-%m-%d %H:%M:%f', 'now', '{age}'))"""
AGES = {1: ("completed", "-25 hours"), 2: ("completed", "-23 hours"), 3: ("cancelled", "-25 hours"),
        4: ("cancelled", "-1 hours"), 5: ("failed", "-25 hours"), 6: ("failed", "-31 days"), 7: ("failed", "-29 days"),
        8: ("completed", "-40 days")}  # fmt: skip


@pytest.fixture
def old(installation):
    """An installation with finished tasks of several ages, and one that waits."""
    installation.enqueue("notifications", "first")
    installation.sqlite3(
        "update notifications set id = 500; update sqlite_sequence set seq = 1000 where name = 'notifications'"
    )
    installation.sqlite3(
        ";".join(FINISHED.format(id=n, status=s, age=age) for n, (s, age) in AGES.items())
    )
    return installation


def history_ids(installation) -> set[int]:
    return {row_id for (row_id,) in installation.rows("select id from task_history")}


def cleanup(installation, *args) -> dict:
    done = installation.run("cleanup.py", "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_completed_go_after_24_hours_and_dead_letters_after_30_days(old):
    report = cleanup(old)
    assert history_ids(old) == {2, 4, 5, 7}
    assert report["pruned"] == {"completed": 2, "failed": 1, "cancelled": 1}
    assert cleanup(old)["pruned"] == {"completed": 0, "failed": 0, "cancelled": 0}


@pytest.mark.parametrize("options, left", [
    (["--keep", "30d", "--keep-failed", "30d"], {1, 2, 3, 4, 5, 7}),
    (["--keep", "0s", "--keep-failed", "1d"], set()),
    (["--keep", "90m", "--keep-failed", "52w"], {4, 5, 6, 7}),
])  # fmt: skip
def test_keep_and_keep_failed_decide(old, options, left):
    cleanup(old, *options)
    assert history_ids(old) == left


def test_the_sql_by_hand_prunes_the_same(old, tmp_path):
    by_hand = tmp_path / "by_hand.db"
    old.sqlite3(f"vacuum into '{by_hand}'")
    subprocess.run(
        [
            "sqlite3",
            by_hand,
            "DELETE FROM task_history WHERE completed_at < datetime('now','-24 hours')",
        ],
        check=True,
    )
    cleanup(old, "--keep", "24h", "--keep-failed", "24h")
    left = {row_id for (row_id,) in sqlite3.connect(by_hand).execute("select id from task_history")}
    assert left == history_ids(old) == {2, 4}


def test_a_dry_run_says_the_same_and_changes_nothing(old):
    log = make_log(old, 1)
    lock = make_lock(old, "1-dead")
    (old.state / "spool" / "approvals").mkdir(parents=True)
    (old.state / "spool" / "approvals" / "a.json").write_text("{}")
    dry = cleanup(old, "--dry-run")
    assert history_ids(old) == set(AGES) and log.exists() and lock.exists()
    assert old.rows("select count(*) from approvals") == [(0,)]
    real = cleanup(old)
    for what in ("pruned", "log_files", "log_bytes", "lock_files", "spooled"):
        assert dry[what] == real[what] and dry[what], what


def test_waiting_scheduled_and_running_tasks_are_never_touched(old):
    old.handler("sleeper", "#!/bin/sh\necho begun\nexec sleep 60\n")
    old.enqueue("approvals", "sleeper")
    old.enqueue("notifications", "t", "{}", "--delay", "1000")
    old.worker("approvals")
    wait_for(lambda: old.rows("select 1 from approvals where status = 2"), what="a running task")
    output = wait_for(lambda: list(old.state.glob("logs/approvals/*.out")), what="the output file")[
        0
    ]
    os.utime(output, (0, 0))
    live = "select * from notifications union all select * from approvals"
    before = old.rows(live)
    assert cleanup(old, "--keep", "0s", "--keep-failed", "0s")["recovered"] == 0
    assert old.rows(live) == before and len(before) == 3
    assert output.exists()
    assert len(list((old.state / "workers").iterdir())) >= 1


def make_log(installation, row_id: int, queue: str = "notifications"):
    """The output files of a finished run; its .out."""
    directory = installation.state / "logs" / queue
    directory.mkdir(parents=True, exist_ok=True)
    for suffix in ("out", "err"):
        (directory / f"{row_id}-1-77-abcd.{suffix}").write_text("words")
    return directory / f"{row_id}-1-77-abcd.out"


def make_lock(installation, name: str, age: float = 3600):
    (installation.state / "workers").mkdir(exist_ok=True)
    path = installation.state / "workers" / name
    path.touch()
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_logs_go_with_their_tasks_and_not_before(old):
    pruned, kept, by_hand, unknown = (
        make_log(old, 1),
        make_log(old, 2),
        make_log(old, 999),
        make_log(old, 5000),
    )
    waiting = make_log(old, old.rows("select id from notifications")[0][0])
    other = old.state / "logs" / "notifications" / "notes.txt"
    other.write_text("mine")
    assert cleanup(old)["log_files"] == 4
    assert not pruned.exists() and not pruned.with_suffix(".err").exists()
    # This one's task was pruned with SQL.
    assert not by_hand.exists()
    assert kept.exists() and waiting.exists() and other.exists()
    # This one's task is newer than what this run saw.
    assert unknown.exists()


def test_the_log_of_a_living_handler_stays(old):
    log = make_log(old, 1)
    with open(log, "a") as handler:
        fcntl.flock(handler, fcntl.LOCK_EX)
        assert cleanup(old)["log_files"] == 0
        assert log.exists() and log.with_suffix(".err").exists()
    assert cleanup(old)["log_files"] == 2


def test_stale_lock_files_go_and_held_ones_stay(old):
    stale, serving, held = (
        make_lock(old, "1-dead"),
        make_lock(old, "serving.notifications"),
        make_lock(old, "2-alive"),
    )
    newborn = make_lock(old, "3-newborn", age=0)
    with open(held, "a") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.utime(held, (0, 0))
        assert cleanup(old)["lock_files"] == 2
    assert not stale.exists() and not serving.exists()
    assert held.exists() and newborn.exists()


def test_tasks_of_dead_owners_are_taken_back(old):
    old.sqlite3(
        "update notifications set status = 2, owner = '99-dead', attempts = 1, claimed_at = 1, max_attempts = 4"
    )
    assert cleanup(old, "--dry-run")["recovered"] == 1
    assert old.rows("select status from notifications") == [(2,)]
    assert cleanup(old)["recovered"] == 1
    assert old.rows("select status, attempts from notifications") == [(1, 1)]


def test_a_task_whose_handler_outlives_its_owner_is_left_alone_with_its_lock_file(old):
    old.sqlite3(
        "update notifications set status = 2, owner = '99-dead', attempts = 1, claimed_at = 1"
    )
    lock, output = (
        make_lock(old, "99-dead"),
        old.state / "logs" / "notifications" / "500-1-99-dead-1000000.out",
    )
    output.parent.mkdir(parents=True)
    with open(output, "w") as handler:
        fcntl.flock(handler, fcntl.LOCK_EX)
        report = cleanup(old)
    assert (report["recovered"], report["orphans"], report["lock_files"]) == (0, 1, 0)
    assert (
        lock.exists() and output.exists() and old.rows("select status from notifications") == [(2,)]
    )


def test_the_spool_is_taken_in_and_what_is_malformed_is_named(old):
    spool = old.state / "spool" / "approvals"
    spool.mkdir(parents=True)
    (spool / "a.json").write_text('{"workspace_path": "/x"}')
    (spool / "b.json").write_text("no json")
    report = cleanup(old)
    assert report["spooled"] == 1 and len(report["complaints"]) == 1
    assert old.rows("select data from approvals") == [('{"workspace_path": "/x"}',)]


def test_the_log_is_emptied_and_the_file_shrinks(old):
    old.sqlite3(
        "with recursive n(n) as (select 1 union all select n + 1 from n where n < 3000) "
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, completed_at) "
        "select 'notifications', n, n, 't', 'completed', hex(zeroblob(1000)), '2020', '2020-01-01' from n"
    )
    report = cleanup(old)
    assert report["pruned"]["completed"] == 3002
    assert (
        report["bytes_before"] > 6_000_000
        and report["bytes_after"] < 1_000_000
        and report["wal_bytes"] == 0
    )
    assert old.sqlite3("pragma integrity_check") == "ok"


def test_a_database_that_cannot_shrink_is_told_how(installation):
    installation.state.mkdir()
    installation.sqlite3(
        "create table notifications (id integer primary key autoincrement, data text not null)"
    )
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "with recursive n(n) as (select 1 union all select n + 1 from n where n < 1000) "
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, completed_at) "
        "select 'notifications', n, n, 't', 'completed', hex(zeroblob(1000)), '2020', '2020-01-01' from n"
    )
    done = installation.run("cleanup.py")
    assert done.returncode == 0 and "pragma auto_vacuum = incremental; vacuum" in done.stdout, (
        done.stdout
    )
    before = installation.db.stat().st_size
    installation.sqlite3("pragma auto_vacuum = incremental; vacuum")
    assert (
        "auto_vacuum" not in installation.run("cleanup.py").stdout
        and installation.db.stat().st_size < before / 4
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_repeats_and_ends_with_0(old, number):
    process = subprocess.Popen(
        [sys.executable, ROOT / "cleanup.py", "--every", "1s", "--json"],
        env=old.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    old.processes.append(process)
    assert sum(json.loads(process.stdout.readline())["pruned"].values()) == 4
    old.sqlite3(FINISHED.format(id=50, status="completed", age="-2 days"))
    assert wait_for(lambda: sum(json.loads(process.stdout.readline())["pruned"].values())) == 1
    process.send_signal(number)
    assert process.wait(10) == 0 and process.stderr.read() == ""


def test_long_work_shows_a_bar_on_a_terminal(old):
    pytest.importorskip("rich", reason="rich is not installed beside pytest")
    old.sqlite3(
        "with recursive n(n) as (select 1 union all select n + 1 from n where n < 25000) "
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, completed_at) "
        "select 'notifications', n, n, 't', 'completed', '{}', '2020', '2020-01-01' from n"
    )
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "cleanup.py"],
        env=old.env | {"TERM": "xterm"},
        stderr=end,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65_536)
        except OSError:
            # This is what Linux says at the end.
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    assert "25,002 completed" in process.stdout.read() and process.wait(10) == 0
    assert b"history" in shown and b"25,004 of 25,004 tasks" in shown


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(installation, *args) -> tuple[int, str]:
    # A process of its own has looked at no database before.
    done = installation.run("cleanup.py", *args, cwd=installation.directory)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (
        done.stderr
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("args", [
    ["--keep", "24 o'clock"], ["--keep", "-1h"], ["--keep", ""], ["--keep", "1y"], ["--keep-failed", "nan"], ["--keep", "9999999w"],
    ["--every", "0s"], ["--every"], ["--everything"], ["approvals"],
])  # fmt: skip
def test_a_usage_error_is_64_and_changes_nothing(old, args):
    assert refused(old, *args)[0] == 64
    assert history_ids(old) == set(AGES)


def test_a_missing_database_is_not_made(installation):
    code, said = refused(installation)
    assert code == 1 and "tasks.db" in said and not installation.state.exists()


@pytest.mark.parametrize("version", [0, 1])
def test_a_foreign_database_is_left_as_it_is(installation, version):
    installation.state.mkdir()
    installation.sqlite3(f"create table invoices (a, b); pragma user_version = {version}")
    before = installation.db.read_bytes()
    code, said = refused(installation)
    assert code == 1 and "not a task queue" in said and installation.db.read_bytes() == before


def test_a_newer_database_is_refused(old):
    old.sqlite3("pragma user_version = 99")
    code, said = refused(old)
    assert code == 1 and "schema version 99" in said and history_ids(old) == set(AGES)


def test_a_damaged_database_is_said(installation):
    installation.state.mkdir()
    installation.db.write_bytes(b"this is no database" * 500)
    code, said = refused(installation)
    assert code == 1 and "damaged or not a database" in said


def test_a_locked_database_is_75(old):
    holder = sqlite3.connect(old.db, isolation_level=None)
    holder.execute("begin immediate")
    code, said = refused(old)
    holder.execute("rollback")
    assert code == 75 and "locked" in said and history_ids(old) == set(AGES)


def test_a_task_whose_time_is_over_ends_as_expired_and_is_pruned_like_a_completed_one(installation):
    installation.enqueue("notifications", "t", "{}", "--task-id", "over", "--ttl", "0.001")
    installation.enqueue(
        "approvals", "t", "{}", "--task-id", "held and over", "--ttl", "0.001", "--hold"
    )
    installation.enqueue("approvals", "t", "{}", "--task-id", "in time", "--ttl", "1h")
    wait_for(
        lambda: (
            installation.rows(
                "select expires_at < (julianday('now') - 2440587.5) * 86400.0 from notifications"
            )
            == [(1,)]
        )
    )
    would = cleanup(installation, "--dry-run")
    assert would["expired"] == 2 and installation.history("over") is None
    assert cleanup(installation)["expired"] == 2
    assert (
        installation.history("over")["status"]
        == installation.history("held and over")["status"]
        == "expired"
    )
    assert "its time was over" in installation.history("over")["error"]
    assert installation.rows("select task_id from approvals") == [("in time",)]
    assert cleanup(installation, "--keep", "0s")["pruned"]["expired"] == 2


def test_reports_of_link_checks_go_with_the_history(installation):
    installation.enqueue("notifications", "t")
    reports = installation.state / "reports/link_validation"
    reports.mkdir(parents=True)
    for name, hours in (("old.json", 25), ("new.json", 23), ("notes.txt", 99)):
        (reports / name).write_text("{}")
        at = (reports / name).stat().st_mtime - hours * 3600
        os.utime(reports / name, (at, at))
    assert cleanup(installation, "--dry-run")["reports"] == 1 and (reports / "old.json").exists()
    assert cleanup(installation)["reports"] == 1
    assert sorted(path.name for path in reports.iterdir()) == ["new.json", "notes.txt"]
    assert cleanup(installation, "--keep", "1h")["reports"] == 1


def test_the_notes_of_claude_tasks_go_after_two_months(installation):
    installation.enqueue("notifications", "t")
    notes = installation.state / "claude"
    notes.mkdir()
    for name, days in (("old.json", 61), ("new.json", 59), ("sessions", 99)):
        (notes / name).write_text("{}")
        at = (notes / name).stat().st_mtime - days * 86_400
        os.utime(notes / name, (at, at))
    cleanup(installation)
    assert sorted(path.name for path in notes.iterdir()) == ["new.json", "sessions"]
