"""tasks.py on a database that is missing, locked, damaged, newer or foreign, and on unknown names:
one line, no traceback.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT

READING = (["stats"], ["stats", "--watch"], ["list"], ["show", "x"], ["logs", "x"], ["logs", "-f", "x"],
           ["export"], ["backup", "copy"])  # fmt: skip
CHANGING = (["retry", "x"], ["retry", "--failed"], ["cancel", "x"], ["resume", "approvals"],
            ["move", "x", "approvals"], ["purge", "approvals", "--yes"])  # fmt: skip


def refused(done, code: int, *words: str) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == 1 and done.stdout == "", (done.stdout, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("command", [*READING, *CHANGING], ids=" ".join)
def test_a_missing_database_is_said_and_not_made(installation, command):
    refused(
        installation.run("tasks.py", *command, cwd=installation.directory),
        1,
        "tasks.db",
        "No such file",
    )
    assert not installation.state.exists()


@pytest.mark.parametrize(
    "command", [["list"], ["stats"], ["pause", "approvals"], ["import", "-"]], ids=" ".join
)
def test_a_database_of_somebody_else_is_left_as_it_is(installation, command):
    installation.state.mkdir()
    with sqlite3.connect(installation.db) as conn:
        conn.execute("create table places (url text, visits integer)")
    before = installation.db.read_bytes()
    refused(installation.run("tasks.py", *command, input=""), 1, "is not a task queue's database")
    assert installation.db.read_bytes() == before


def test_a_newer_database_is_refused(installation):
    installation.enqueue("approvals", "review")
    installation.sqlite3("pragma user_version = 999")
    # An open connection has seen the version that was there.
    installation.is_inside = False
    for command in (["list"], ["stats"], ["pause", "approvals"]):
        refused(installation.run("tasks.py", *command), 1, "999", "update")


def test_a_file_that_is_no_database_is_refused(installation):
    installation.state.mkdir()
    installation.db.write_bytes(b"not a database, " * 400)
    for command in (["list"], ["stats"], ["export"]):
        refused(installation.run("tasks.py", *command), 1, "not a database")


def test_a_damaged_database_is_said(installation):
    installation.enqueue(
        "approvals", "review", "--jsonl", input='{"a": "' + "x" * 200 + '"}\n' * 1 + "{}\n" * 5000
    )
    installation.sqlite3("pragma wal_checkpoint(truncate)")
    size = installation.db.stat().st_size
    with open(installation.db, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 2))
    refused(installation.run("tasks.py", "backup", installation.directory / "copy"), 1, "damaged")
    assert not (installation.directory / "copy").exists()
    done = installation.run("tasks.py", "list", "--text", "nowhere")
    assert done.returncode == 1 and "damaged" in done.stderr and "Traceback" not in done.stderr


def test_a_locked_database_is_said_after_a_bounded_wait(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "a-1")
    conn = sqlite3.connect(installation.db, isolation_level=None)
    conn.execute("begin immediate")
    try:
        assert installation.run("tasks.py", "list").returncode == 0, "reading waits for nobody"
        processes = [
            subprocess.Popen(
                [sys.executable, ROOT / "tasks.py", *command],
                env=installation.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in (["pause", "approvals"], ["cancel", "a-1"])
        ]
        for process in processes:
            out, err = process.communicate(timeout=20)
            assert (
                process.returncode == 75
                and out == ""
                and len(err.splitlines()) == 1
                and "is locked by another process" in err
            )
    finally:
        conn.close()


@pytest.mark.parametrize("command", [
    ["list", "--status", "odd"], ["list", "--limit", "0"], ["list", "--since", "yesterday"], ["list", "--text", ""], ["list", "--nope"],
    ["retry"], ["retry", "x", "--failed"], ["move", "approvals"], ["import"], ["export", "a", "b"],
    ["purge", "approvals", "--status", "running"], ["stats", "--interval", "-1"], ["nope"], [],
    ["cancel"], ["pause"], ["backup"], ["show"],
    *([command, ""] for command in ("show", "logs", "wait", "approve", "reject", "retry", "cancel")), ["move", "", "approvals"]], ids=" ".join)  # fmt: skip
def test_a_wrong_command_line_exits_64(installation, command):
    refused(installation.run("tasks.py", *command), 64, "--help")


@pytest.mark.parametrize("command", [
    ["list", "--queue", "nope"], ["show", "x", "--queue", "nope"], ["wait", "x", "--queue", "nope"], ["resume", "approvals", "nope"],
    ["move", "--from", "nope", "approvals"], ["move", "--from", "approvals", "nope"], ["purge", "nope", "--yes"],
    ["export", "--queue", "nope"], ["retry", "--failed", "--queue", "nope"],
    ["resume", 'x"; drop table approvals; --'], ["list", "--queue", "../x"]], ids=" ".join)  # fmt: skip
def test_an_unknown_queue_is_named_with_those_that_there_are(installation, command):
    installation.enqueue("approvals", "review")
    refused(
        installation.run("tasks.py", *command),
        64,
        "there is no queue",
        "approvals, completions, notifications",
    )


def test_an_unknown_id_is_said(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "a-1")
    for command in (["show", "b"], ["wait", "b"], ["logs", "b"], ["retry", "b"], ["cancel", "b"], ["move", "b", "completions"], ["show", "a_1"],
                    ["show", "a-1 "], ["show", "a-%"], ["show", "approvals-1"], ["show", "approvals-" + "9" * 40]):  # fmt: skip
        refused(installation.run("tasks.py", *command), 64, "no task has the id")


def test_an_argument_that_is_not_utf_8_is_refused(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "a-1")
    for command in (
        ["show", b"\xff"],
        ["list", "--text", b"\xff"],
        ["list", "--type", b"\xff"],
        ["retry", "--failed", "--type", b"\xff"],
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "tasks.py", *command],
            check=False,
            env=installation.env,
            capture_output=True,
            text=True,
        )
        refused(done, 64, "not valid UTF-8")


def test_an_ambiguous_id_lists_what_it_fits_and_an_exact_one_wins(installation):
    for name in ("job-1", "job-11", "job-12"):
        installation.enqueue("approvals", "review", "{}", "--task-id", name)
    installation.enqueue("completions", "review", "{}", "--task-id", "job-11")
    done = installation.run("tasks.py", "cancel", "job")
    refused(
        done,
        64,
        "job-1 (approvals)",
        "job-11 (approvals)",
        "job-12 (approvals)",
        "job-11 (completions)",
    )
    refused(installation.run("tasks.py", "show", "job-11"), 64, "--queue")
    assert installation.run("tasks.py", "show", "job-11", "--queue", "completions").returncode == 0
    assert installation.run("tasks.py", "cancel", "job-1").stdout == "cancelled job-1\n"
    installation.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 30) insert into approvals (data) "
        "select json_object('task_id', 'many-' || i, 'task_type', 't', 'data', json('{}')) from n"
    )
    done = installation.run("tasks.py", "show", "many")
    refused(done, 64, "…")
    assert done.stderr.count("(approvals)") == 10


def test_a_reader_that_closes_the_pipe_is_no_error(installation):
    installation.enqueue(
        "approvals", "review", "--jsonl", input='{"a": "' + "x" * 100 + '"}\n' * 1 + "{}\n" * 3000
    )
    for command in (
        "list --limit 3000",
        "list --limit 3000 --json",
        "stats",
        "stats --json",
    ):
        for reader in ("head -1", "true") if "list" in command else ("head -1",):
            done = subprocess.run(
                [
                    "bash",
                    "-c",
                    f'set -o pipefail; "$@" {command} | {reader} >/dev/null; echo $?',
                    "bash",
                    sys.executable,
                    ROOT / "tasks.py",
                ],
                check=False,
                env=installation.env,
                capture_output=True,
                text=True,
            )
            assert (
                done.stdout,
                done.stderr.replace("only the first 3000; --limit N shows more\n", ""),
            ) == ("0\n", ""), command


def test_a_full_standard_output_is_an_error_of_one_line(installation):
    installation.enqueue("approvals", "review")
    for command in (["list"], ["stats", "--json"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, ROOT / "tasks.py", *command],
                check=False,
                env=installation.env,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert (
            done.returncode == 1
            and len(done.stderr.splitlines()) == 1
            and "No space left" in done.stderr
        )


def test_a_terminal_of_another_encoding_gets_something_readable(installation):
    installation.state.mkdir()
    installation.sqlite3(
        "create table notifications (id integer primary key autoincrement, data text not null);"
        'insert into notifications (data) values (\'{"hook_event_name": "ä🙂"}\')'
    )
    for encoding in ("ascii", "latin-1", "utf-8"):
        for command in (["list"], ["list", "--json"], ["stats"], ["show", "notifications-1"]):
            done = subprocess.run(
                [sys.executable, ROOT / "tasks.py", *command],
                check=False,
                env=installation.env | {"PYTHONIOENCODING": encoding},
                capture_output=True,
            )
            assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr
