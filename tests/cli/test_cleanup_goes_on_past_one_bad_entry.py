"""cleanup.py does the rest when one entry hinders it, says which, and its exit code says so; it
mends modes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time

import pytest


@pytest.fixture
def filled(installation):
    """Something to do in each part: spooled tasks of two queues, logs of two, a dead owner's claim,
    a stale lock.
    """
    installation.enqueue("approvals", "t", "{}", "--task-id", "claimed")
    installation.sqlite3(
        "update approvals set status = 2, owner = '1-dead', attempts = 1, claimed_at = 1"
    )
    installation.sqlite3(
        "update sqlite_sequence set seq = 1000; insert into sqlite_sequence (name, seq) values ('completions', 1000), "
        "('notifications', 1000)"
    )
    for queue in ("completions", "notifications"):
        (installation.state / "spool" / queue).mkdir(parents=True)
        (installation.state / "spool" / queue / "1.json").write_text("{}")
        (installation.state / "logs" / queue).mkdir(parents=True)
        (installation.state / "logs" / queue / "7-1-9-x-1.out").write_text("words")
    (installation.state / "workers").mkdir(exist_ok=True)
    (installation.state / "workers" / "2-stale").touch()
    os.utime(installation.state / "workers" / "2-stale", (0, 0))
    return installation


def test_a_directory_that_cannot_be_read_stops_nothing_else(filled):
    if os.geteuid() == 0:
        pytest.skip("root reads everything; the next test has another way")
    (filled.state / "logs" / "completions").chmod(0)
    done = filled.run("cleanup.py", "--json")
    assert done.returncode == 1 and str(filled.state / "logs" / "completions") in done.stderr
    assert json.loads(done.stdout)["recovered"] == 1


@pytest.mark.parametrize("part", ["logs", "workers"])
def test_an_entry_that_cannot_be_removed_is_named_once_and_the_rest_is_done(
    filled, monkeypatch, part, capsys
):
    """What a file of another user does: the system refuses."""
    import cleanup
    import queue_helpers as q

    monkeypatch.setattr(q, "STATE_DIR", filled.state)
    bad = (
        filled.state / "logs/completions/7-1-9-x-1.out"
        if part == "logs"
        else filled.state / "workers/2-stale"
    )
    real_lock_file = q.lock_file

    def refusing(path, **options):
        if os.fspath(path) == os.fspath(bad):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real_lock_file(path, **options)

    monkeypatch.setattr(q, "lock_file", refusing)
    assert cleanup.main(["--json"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and str(bad) in said.err and "Permission denied" in said.err
    report = json.loads(said.out)
    assert bad.exists() and report["recovered"] == 1 and report["spooled"] == 2
    assert report["log_files"] == (1 if part == "logs" else 2) and report["lock_files"] == (
        1 if part == "logs" else 0
    )


def test_with_every_a_complaint_is_said_once(filled, monkeypatch, capsys):
    import cleanup
    import queue_helpers as q

    monkeypatch.setattr(q, "STATE_DIR", filled.state)

    def refused(state):
        raise PermissionError(13, "Permission denied", str(state / "spool"))

    monkeypatch.setattr(q, "take_in_spool", refused)
    stop = cleanup.Stop
    runs = []

    class Twice(stop):
        def wait(self, timeout=None):
            if timeout is not None and timeout > 0.5:
                runs.append(timeout)
                return len(runs) == 3
            return super().wait(timeout)

    monkeypatch.setattr(cleanup, "Stop", Twice)
    assert cleanup.main(["--every", "100s", "--json"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 3 and said.err.count("Permission denied") == 1


def test_rows_of_persist_queues_own_making_are_counted_and_taken_back(filled):
    filled.sqlite3("update approvals set owner = null, claimed_at = null, attempts = 0")
    dry = filled.run("cleanup.py", "--dry-run", "--json")
    assert dry.returncode == 0 and json.loads(dry.stdout)["recovered"] == 1, dry.stderr
    assert json.loads(filled.run("cleanup.py", "--json").stdout)["recovered"] == 1
    assert filled.rows("select status from approvals") == [(1,)]


def test_a_restore_that_ends_at_this_moment_hinders_nothing(filled, monkeypatch, capsys):
    """Its directory was listed, and is gone when it is looked at."""
    import cleanup
    import queue_helpers as q

    monkeypatch.setattr(q, "STATE_DIR", filled.state)
    listed = [(str(filled.state), [".restore-00000001"], [])]
    monkeypatch.setattr(cleanup.os, "walk", lambda top: listed)
    assert cleanup.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recovered"] == 1


def test_what_a_killed_restore_left_is_removed_after_a_day(filled):
    old, new = filled.state / ".restore-00000001", filled.state / ".restore-00000002"
    for directory in (old, new):
        directory.mkdir(0o700)
        sqlite3.connect(directory / "tasks.db").close()
    os.utime(old, (time.time() - 90_000,) * 2)
    assert filled.run("cleanup.py").returncode == 0
    assert not old.exists() and new.exists()
