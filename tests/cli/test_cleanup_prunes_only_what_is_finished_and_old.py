"""cleanup.py prunes what is finished and old, with its logs, and leaves everything else as it was;
it does the rest when one entry hinders it, and says which.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT, wait_for, without_overrides

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
    installation.add("notifications first")
    number = "update sqlite_sequence set seq = 1000 where name = 'notifications'"
    installation.sqlite3(f"update notifications set id = 500; {number}")
    rows = [FINISHED.format(id=n, status=status, age=age) for n, (status, age) in AGES.items()]
    installation.sqlite3(";".join(rows))
    return installation


def history_ids(installation) -> set[int]:
    return {row_id for (row_id,) in installation.rows("select id from task_history")}


def cleanup(installation, *args, code: int = 0, **options) -> dict:
    done = installation.run("cleanup.py", "--json", *args, **options)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


def test_completed_go_after_24_hours_and_dead_letters_after_30_days(old):
    assert cleanup(old)["pruned"] == {"completed": 2, "failed": 1, "cancelled": 1}
    assert history_ids(old) == {2, 4, 5, 7}
    assert cleanup(old)["pruned"] == {"completed": 0, "failed": 0, "cancelled": 0}


@pytest.mark.parametrize("options, left", [
    (["--keep", "30d", "--keep-failed", "30d"], {1, 2, 3, 4, 5, 7}),
    (["--keep", "0s", "--keep-failed", "1d"], set()),
    (["--keep", "90m", "--keep-failed", "52w"], {4, 5, 6, 7}),
    (["--keep", "24h", "--keep-failed", "24h"], {2, 4}),
])  # fmt: skip
def test_keep_and_keep_failed_decide(old, options, left):
    cleanup(old, *options)
    assert history_ids(old) == left


def test_the_sql_by_hand_prunes_as_keep_24h_does(old):
    old.sqlite3("DELETE FROM task_history WHERE completed_at < datetime('now','-24 hours')")
    assert history_ids(old) == {2, 4}


def test_a_dry_run_says_the_same_and_changes_nothing(old):
    log, lock = make_log(old, 1), make_lock(old, "1-dead")
    spool(old, "approvals", a="{}")
    dry = cleanup(old, "--dry-run")
    assert history_ids(old) == set(AGES) and log.exists() and lock.exists()
    assert old.rows("select count(*) from approvals") == [(0,)]
    real = cleanup(old)
    for what in ("pruned", "log_files", "log_bytes", "lock_files", "spooled"):
        assert dry[what] == real[what] and dry[what], what


def test_waiting_scheduled_and_running_tasks_are_never_touched(old):
    old.handler("sleeper", "#!/bin/sh\necho begun\nexec sleep 60\n")
    old.add("approvals sleeper")
    old.add("notifications t --delay 1000")
    old.worker("approvals")
    wait_for(lambda: old.rows("select 1 from approvals where status = 2"), what="a running task")
    [output] = wait_for(lambda: [*old.state.glob("logs/approvals/*.out")], what="the output file")
    os.utime(output, (0, 0))
    live = "select * from notifications union all select * from approvals"
    before = old.rows(live)
    assert cleanup(old, "--keep", "0s", "--keep-failed", "0s")["recovered"] == 0
    assert old.rows(live) == before and len(before) == 3
    assert output.exists() and [*(old.state / "workers").iterdir()]


def make_log(installation, row_id: int, queue: str = "notifications"):
    """Make the output files of a finished run; return its .out."""
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


def spool(installation, queue: str, **files: str):
    """Put files into a queue's spool."""
    directory = installation.state / "spool" / queue
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"{name}.json").write_text(text)


@contextmanager
def held(path):
    """Hold a file's lock, as its owner does while it lives."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (0, 0))
        yield


def test_logs_go_with_their_tasks_and_not_before(old):
    # One's task was pruned with SQL; one's is newer than what this run saw.
    pruned, kept, by_hand, unknown = (make_log(old, number) for number in (1, 2, 999, 5000))
    waiting = make_log(old, 500)
    other = old.state / "logs" / "notifications" / "notes.txt"
    other.write_text("mine")
    with held(pruned):
        assert cleanup(old)["log_files"] == 2 and pruned.with_suffix(".err").exists()
    assert cleanup(old)["log_files"] == 2
    assert not any(path.exists() for path in (pruned, pruned.with_suffix(".err"), by_hand))
    assert all(path.exists() for path in (kept, waiting, other, unknown))


def test_stale_lock_files_go_and_held_ones_stay(old):
    stale, serving, alive = (
        make_lock(old, name) for name in ("1-dead", "serving.notifications", "2-alive")
    )
    newborn = make_lock(old, "3-newborn", age=0)
    with held(alive):
        assert cleanup(old)["lock_files"] == 2
    assert not stale.exists() and not serving.exists()
    assert alive.exists() and newborn.exists()


@pytest.mark.parametrize("owner", ["owner = '99-dead', attempts = 1, claimed_at = 1, max_attempts = 4",
                                   "owner = null, attempts = 0"], ids=["ours", "persist-queue's"])  # fmt: skip
def test_tasks_of_dead_owners_are_taken_back(old, owner):
    old.sqlite3(f"update notifications set status = 2, {owner}")
    assert cleanup(old, "--dry-run")["recovered"] == 1
    assert old.rows("select status from notifications") == [(2,)]
    assert cleanup(old)["recovered"] == 1
    assert old.rows("select status from notifications") == [(1,)]


def test_a_task_whose_handler_outlives_its_owner_is_left_alone_with_its_lock_file(old):
    claim = "status = 2, owner = '99-dead', attempts = 1, claimed_at = 1"
    old.sqlite3(f"update notifications set {claim}")
    lock, output = make_lock(old, "99-dead"), make_log(old, 500)
    output = output.rename(output.with_name("500-1-99-dead-1000000.out"))
    with held(output):
        report = cleanup(old)
    assert (report["recovered"], report["orphans"], report["lock_files"]) == (0, 1, 0)
    assert lock.exists() and output.exists()
    assert old.rows("select status from notifications") == [(2,)]


def test_the_spool_is_taken_in_and_what_is_malformed_is_named(old):
    spool(old, "approvals", a='{"workspace_path": "/x"}', b="no json")
    report = cleanup(old)
    assert report["spooled"] == 1 and len(report["complaints"]) == 1
    assert old.rows("select data from approvals") == [('{"workspace_path": "/x"}',)]


def big(rows: int) -> str:
    return (
        f"with recursive n(n) as (select 1 union all select n + 1 from n where n < {rows}) "
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, completed_at) "
        "select 'notifications', n, n, 't', 'completed', hex(zeroblob(1000)), '2020', '2020-01-01' from n"
    )


def test_the_log_is_emptied_and_the_file_shrinks(old):
    old.sqlite3(big(3000))
    report = cleanup(old)
    assert report["pruned"]["completed"] == 3002 and report["wal_bytes"] == 0
    assert report["bytes_before"] > 6_000_000 and report["bytes_after"] < 1_000_000
    assert old.sqlite3("pragma integrity_check") == "ok"


def test_a_database_that_cannot_shrink_is_told_how(installation):
    installation.state.mkdir()
    table = "notifications (id integer primary key autoincrement, data text not null)"
    installation.sqlite3(f"create table {table}")
    installation.add("notifications t")
    installation.sqlite3(big(1000))
    remedy = "pragma auto_vacuum = incremental; vacuum"
    assert remedy in installation.run("cleanup.py").stdout
    before = installation.db.stat().st_size
    installation.sqlite3(remedy)
    assert "auto_vacuum" not in installation.run("cleanup.py").stdout
    assert installation.db.stat().st_size < before / 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_repeats_and_ends_with_0(old, number):
    command = [sys.executable, ROOT / "cleanup.py", "--every", "1s", "--json"]
    process = subprocess.Popen(command, env=old.env, stdout=-1, stderr=-1, text=True)
    old.processes.append(process)
    assert sum(json.loads(process.stdout.readline())["pruned"].values()) == 4
    old.sqlite3(FINISHED.format(id=50, status="completed", age="-2 days"))
    assert wait_for(lambda: sum(json.loads(process.stdout.readline())["pruned"].values())) == 1
    process.send_signal(number)
    assert process.wait(10) == 0 and process.stderr.read() == ""


def test_a_task_whose_time_is_over_ends_as_expired_and_is_pruned_like_a_completed_one(installation):
    installation.add("notifications t --task-id over --ttl 1h")
    installation.add("approvals t --task-id held --ttl 1h --hold")
    installation.add("approvals t --task-id intime --ttl 1h")
    for queue, name in (("notifications", "over"), ("approvals", "held")):
        installation.sqlite3(f"update {queue} set expires_at = 1 where task_id = '{name}'")
    assert cleanup(installation, "--dry-run")["expired"] == 2
    assert installation.history("over") is None
    assert cleanup(installation)["expired"] == 2
    assert installation.statuses() == {"over": "expired", "held": "expired", "intime": "pending"}
    assert "its time was over" in installation.history("over")["error"]
    assert cleanup(installation, "--keep", "0s")["pruned"]["expired"] == 2


@pytest.mark.parametrize(("place", "hours"), [("reports/link_validation", 24), ("claude", 1440)])
def test_reports_of_link_checks_and_notes_of_claude_tasks_go_in_their_time(old, place, hours):
    directory = old.state / place
    directory.mkdir(parents=True)
    for name, age in (("old.json", hours + 1), ("new.json", hours - 1), ("notes.txt", hours * 2)):
        (directory / name).write_text("{}")
        os.utime(directory / name, (time.time() - age * 3600,) * 2)
    assert cleanup(old, "--dry-run")["reports"] == int("reports" in place)
    assert (directory / "old.json").exists()
    assert cleanup(old)["reports"] == int("reports" in place)
    assert sorted(path.name for path in directory.iterdir()) == ["new.json", "notes.txt"]
    assert cleanup(old, "--keep", "1h")["reports"] == int("reports" in place)


# -------------------------------------------------------------------------------- one bad entry


@pytest.fixture
def filled(installation):
    """Something to do in each part: a dead owner's claim, spooled tasks and logs of two queues, a
    stale lock.
    """
    installation.add("approvals t --task-id claimed")
    claim = "status = 2, owner = '1-dead', attempts = 1, claimed_at = 1"
    installation.sqlite3(
        f"update approvals set {claim}; update sqlite_sequence set seq = 1000;"
        "insert into sqlite_sequence (name, seq) values ('completions', 1000), ('notifications', 1000)"
    )
    for queue in ("completions", "notifications"):
        spool(installation, queue, a="{}")
        make_log(installation, 7, queue).with_suffix(".err").unlink()
    make_lock(installation, "2-stale")
    return installation


@pytest.mark.parametrize(("entry", "logs", "locks"), [
    ("logs/completions", 1, 1), ("logs/completions/7-1-77-abcd.out", 1, 1), ("workers/2-stale", 2, 0)])  # fmt: skip
def test_an_entry_that_may_not_be_read_is_named_once_and_the_rest_is_done(
    filled, entry, logs, locks
):
    bad = filled.state / entry
    bad.chmod(0)
    try:
        report = cleanup(filled, code=1, preexec_fn=without_overrides)
    finally:
        bad.chmod(0o700)
    assert report["said"].count("\n") == 1 and str(bad) in report["said"]
    assert "ermission denied" in report["said"] and bad.exists()
    done = [report[name] for name in ("recovered", "spooled", "log_files", "lock_files")]
    assert done == [1, 2, logs, locks]


def test_with_every_a_complaint_is_said_once(filled, monkeypatch, capsys):
    import cleanup
    import queue_helpers as q

    monkeypatch.setattr(q, "STATE_DIR", filled.state)

    def refused(state):
        raise PermissionError(13, "Permission denied", str(state / "spool"))

    monkeypatch.setattr(q, "take_in_spool", refused)
    runs = []

    class Thrice(cleanup.Stop):
        def wait(self, timeout=None):
            if timeout is None or timeout < 1:
                return super().wait(timeout)
            runs.append(timeout)
            return len(runs) == 3

    monkeypatch.setattr(cleanup, "Stop", Thrice)
    assert cleanup.main(["--every", "100s", "--json"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 3 and said.err.count("Permission denied") == 1


def test_what_a_killed_restore_left_is_removed_after_a_day(filled):
    old, new = filled.state / ".restore-00000001", filled.state / ".restore-00000002"
    for directory in (old, new):
        directory.mkdir(0o700)
        sqlite3.connect(directory / "tasks.db").close()
    os.utime(old, (time.time() - 90_000,) * 2)
    cleanup(filled)
    assert not old.exists() and new.exists()
