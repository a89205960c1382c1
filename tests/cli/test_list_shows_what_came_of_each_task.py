"""tasks.py list on a terminal: what came of each task, in columns that stand, on one screen."""

from __future__ import annotations

import json
import os
import re

import pytest
from conftest import wait_for
from rich.cells import cell_len
from terminal import on_terminal

LONG = "link_validation_8b1a9953c4611296a827abf8c478_s{:04d}"


def listed(installation, *args, **options) -> list[str]:
    """The lines of a list on a terminal, but for the remarks below it."""
    lines = on_terminal(installation, "tasks.py", "list", *args, **options)
    return [line for line in lines if not line.startswith(("no worker", "no handler"))]


def ended(
    installation, task_id: str, status: str, result: str = "", error: str | None = None
) -> None:
    """Put a finished task into the history."""
    said = "null" if error is None else f"'{error}'"
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, result, error)"
        f" values ('approvals', abs(random()) % 1000000, '{task_id}', 'link_validation', '{status}', '{{}}',"
        f" datetime('now', '-9 seconds'), datetime('now', '-5 seconds'), '{result}', {said})"
    )


def filled(installation) -> None:
    for number in range(3):
        installation.enqueue(
            "notifications", "link_validation", "{}", "--task-id", LONG.format(number)
        )
    installation.enqueue(
        "approvals", "claude", '{"prompt": "mend"}', "--task-id", "later", "--delay", "3600"
    )
    ended(
        installation,
        "with-summary",
        "completed",
        json.dumps({"summary": "2 broken links: README.md:4", "n": 1}),
    )
    ended(installation, "with-lines", "completed", "first line\nsecond line\n")
    ended(installation, "refused", "failed", "", "refused by its handler (exit 65): no prompt")


@pytest.mark.parametrize("columns", (80, 120))
def test_columns_stand_and_nothing_is_wider_than_the_screen(installation, columns):
    filled(installation)
    head, rule, *rows = listed(installation, columns=columns)
    assert len(rows) == 7, rows
    assert all(cell_len(line.rstrip()) <= columns for line in (head, rule, *rows))
    # Every row begins its last column where the head does.
    start = head.index("what came of it")
    for row in rows:
        assert row[start - 1] == " " and row[start] != " ", (head, row)
    # Ids that begin alike are told apart.
    ids = [row.split()[3] for row in rows if row.split()[3].startswith("lin")]
    assert len(set(ids)) == 3, rows


@pytest.mark.parametrize("columns", (80, 100))
def test_the_last_column_has_room_for_30_characters(installation, columns):
    filled(installation)
    ended(installation, "f" * 60, "failed", "", "the reason is of so many characters and more " * 3)
    (row,) = (line for line in listed(installation, columns=columns) if "the reason" in line)
    assert len(row) - row.index("the reason") >= 30, row
    # Queue and type are said once where all tasks share them, and an id is as short as it is unique.
    lines = listed(installation, "--status", "failed", columns=columns)
    assert lines[0].split()[:4] == ["#", "status", "id", "age"] and "f" * 8 + "…" in lines[2]
    assert lines[-1] == "each queue is approvals, each type is link_validation"
    assert len(lines[2]) - lines[2].index("the reason") > columns // 2
    assert installation.run("tasks.py", "show", "f" * 8).returncode == 0


def test_a_completion_shows_its_summary(installation):
    for data in ({"summary": "2 links\nare broken", "n": 1}, {"result": "first\nsecond"}):
        installation.enqueue("completions", "link_validation", json.dumps(data))
    said = installation.run("tasks.py", "list").stdout
    assert re.search(r"  2 links are broken$", said, re.M) and re.search(r"  first$", said, re.M)


def test_it_ends_with_how_many_more_there_are(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 1234)
    installation.enqueue("notifications", "note")
    said = installation.run("tasks.py", "list").stderr.splitlines()[-1]
    assert said == "50 of 1,235 (./tasks.py list -n 100)"
    said = installation.run("tasks.py", "list", "--queue", "approvals", "-n", "7").stderr
    assert said.splitlines()[-1] == "7 of 1,234 (-n 100 shows more)"
    assert len(json.loads(installation.run("tasks.py", "list", "--json").stdout)) == 1235
    assert len(json.loads(installation.run("tasks.py", "list", "--json", "-n", "9").stdout)) == 9


def test_each_says_what_came_of_it(installation):
    filled(installation)
    shown = {row.split()[3]: row for row in listed(installation, columns=160)[2:]}
    assert "2 broken links: README.md:4" in shown["with-summary"]
    assert "first line" in shown["with-lines"] and "second line" not in shown["with-lines"]
    assert "refused by its handler (exit 65): no prompt" in shown["refused"]
    assert 'in 60 m: {"prompt": "mend"}' in shown["later"]


def test_a_pipe_gets_the_same_uncut(installation):
    filled(installation)
    lines = installation.run("tasks.py", "list").stdout.splitlines()
    assert len(lines) == 8 and LONG.format(2) in "\n".join(lines)
    assert "2 broken links: README.md:4" in "\n".join(lines)


def test_a_paused_queue_says_until_when_and_why(installation):
    installation.enqueue("approvals", "claude", "{}")
    assert (
        installation.run(
            "tasks.py", "pause", "approvals", "--for", "90m", "--reason", "usage limit"
        ).returncode
        == 0
    )
    row = listed(installation, columns=140)[2]
    assert "paused until " in row and "usage limit" in row and "(in 90 m)" in row


def test_as_many_rows_as_the_screen_has(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 60)
    shown = listed(installation, rows=20)
    assert 12 <= len(shown) < 20 and shown[-1].startswith("12 of 60 (")
    assert len(listed(installation, rows=50)) > 40


def test_what_runs_is_first_and_never_scrolls_away(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 60)
    installation.sqlite3(
        "update approvals set status = 2, owner = 'x', claimed_at = timestamp where id = 30"
    )
    assert "in_progress" in listed(installation, rows=20)[2]
    long = listed(installation, "--limit", "60", rows=20)
    assert len(long) == 63 and "in_progress" in long[-2]


def test_a_row_is_named_by_the_number_that_this_terminal_was_shown(installation):
    filled(installation)
    rows = listed(installation, columns=140)[2:]
    for row in rows:
        number, _, queue, shown_id = row.split()[:4]
        task = json.loads(installation.run("tasks.py", "show", number, "--json").stdout)
        assert task["queue"] == queue and task["task_id"][:3] == shown_id[:3]
    (number,) = (row.split()[0] for row in rows if "later" in row)
    # A new task above it changes nothing: the number is that of what was shown.
    installation.enqueue("notifications", "link_validation", "{}", "--priority", "9")
    assert installation.run("tasks.py", "cancel", number).stdout == "cancelled later\n"
    done = installation.run("tasks.py", "show", "99")
    assert done.returncode == 64 and "no task has the id '99'" in done.stderr


def test_a_number_that_is_a_row_and_an_id_is_refused_and_a_task_that_went_is_said(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "2")
    installation.enqueue("approvals", "review", "{}", "--task-id", "other")
    listed(installation)
    done = installation.run("tasks.py", "show", "2")
    assert done.returncode == 64 and "other (approvals)" in done.stderr, done.stderr
    assert "2 (approvals)" in done.stderr
    installation.sqlite3("delete from approvals where task_id = '2'")
    done = installation.run("tasks.py", "show", "1")
    assert done.returncode == 1 and "task 2 of approvals is gone" in done.stderr


def test_another_terminals_list_names_nothing_here(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "only")
    listed(installation)
    done = installation.run("tasks.py", "show", "1", start_new_session=True)
    assert done.returncode == 64 and "no task has the id" in done.stderr


def test_list_is_sorted_as_asked(installation):
    filled(installation)

    def order(key: str) -> list[dict]:
        return json.loads(installation.run("tasks.py", "list", "--sort", key, "--json").stdout)

    assert [row["task_type"] for row in order("type")] == ["claude"] + ["link_validation"] * 6
    assert [row["queue"] for row in order("queue")] == ["approvals"] * 4 + ["notifications"] * 3
    newest = [row["completed_at"] or row["enqueued_at"] for row in order("newest")]
    assert newest == sorted(newest, reverse=True)
    assert [row["completed_at"] or row["enqueued_at"] for row in order("oldest")] == sorted(newest)
    installation.sqlite3("update approvals set attempts = 3")
    assert order("tries")[0]["task_id"] == "later"


@pytest.mark.parametrize("columns", (80, 120))
def test_queues_and_types_stand_whole_before_ids_do(installation, columns):
    installation.enqueue(
        "notifications", "link_validation", "{}", "--task-id", "link_val-219c96b20cfe7d34"
    )
    for number in range(12):
        installation.enqueue("approvals", "claude", "{}", "--task-id", f"claude-{number:016x}")
    installation.sqlite3(
        "update approvals set status = 2, owner = 'x', claimed_at = timestamp where id = 3"
    )
    shown = listed(installation, columns=columns, rows=40)
    assert all(cell_len(line) <= columns for line in shown)
    (link,) = (line.split() for line in shown if "link" in line)
    assert link[1:3] == ["pending", "notifications"] and link[4] == "link_validation"
    assert link[3] in ("link_val…", "link_val-219c96b20cfe7d34")
    assert sum(" in_progress approvals " in line for line in shown) == 1


def test_stats_at_80_columns_name_the_shipped_types_whole(installation):
    installation.enqueue("notifications", "link_validation")
    ended(installation, "done", "completed")
    shown = on_terminal(installation, "tasks.py", "stats")
    assert any(line.startswith("  link_validation ") for line in shown), shown


def test_what_is_overdue_is_due(installation):
    installation.enqueue("approvals", "claude", "{}", "--delay", "3600", "--task-id", "later")
    assert "in 60 m: {}" in installation.run("tasks.py", "list").stdout
    installation.sqlite3("update approvals set due_at = due_at - 7200")
    assert "due 60 m ago: {}" in installation.run("tasks.py", "list").stdout


@pytest.mark.parametrize("columns", (80, 120))
def test_show_keeps_values_in_their_column_and_paths_whole(installation, columns):
    filled(installation)
    path = "/home/user/.claude/automation/lychee/handlers"
    installation.sqlite3(
        f"update task_history set error = 'no handler in {path}: ' || replace('a b ', ' ', ' word ') ||"
        f" 'put an executable of that name there, then retry the task' where task_id = 'refused'"
    )
    shown = on_terminal(installation, "tasks.py", "show", "refused", columns=columns)
    at = next(number for number, line in enumerate(shown) if line.startswith("error "))
    assert all(len(line) <= columns for line in shown)
    assert any(f"{path}:" in line for line in shown[at : at + 3])
    assert shown[at + 1].startswith(" " * 18) and shown[at + 1][18] != " "
    assert any(
        line.startswith(" " * 18 + "runs again after ./tasks.py retry refused") for line in shown
    )
    piped = installation.run("tasks.py", "show", "refused").stdout
    assert "put an executable of that name there, then retry the task\n" in piped


def test_an_empty_list_says_so(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "a")
    installation.run("tasks.py", "purge", "approvals", "--yes")
    assert listed(installation) == ["no matching tasks"]
    assert "no task waits or runs" in on_terminal(installation, "tasks.py", "stats")


@pytest.mark.parametrize("columns", (60, 80, 100, 120))
def test_stats_never_cut_a_unit(installation, columns):
    filled(installation)
    for number in range(20):
        ended(installation, f"slow-{number}", "failed" if number % 2 else "completed")
    installation.sqlite3(
        "update task_history set enqueued_at = datetime('now', '-57 minutes');"
        "update notifications set timestamp = timestamp - 57.5 * 60"
    )
    whole = installation.run("tasks.py", "stats").stdout
    shown = on_terminal(installation, "tasks.py", "stats", columns=columns)
    assert all(cell_len(line) <= columns for line in shown)
    words = set(whole.split())
    for line in shown[3:-1]:
        assert "…" not in line[18:], line
        assert {word for word in line[18:].split() if word[0].isdigit()} <= words | {
            cell.partition("/")[0] for cell in words
        }, line
    if columns >= 80:
        assert any("57m" in line for line in shown), shown


def test_colours_are_left_out_where_nobody_wants_them(installation):
    filled(installation)
    installation.env["NO_COLOR"] = "1"
    import subprocess
    import sys

    from conftest import ROOT

    done = subprocess.run(
        ["script", "-qec", f"{sys.executable} '{ROOT}/tasks.py' list", "/dev/null"],
        env=installation.env | {"TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "refused" in done.stdout and not re.search(r"\x1b\[3[0-9]m", done.stdout)


def test_the_lists_that_terminals_were_shown_are_private_and_go_after_a_day(installation):
    filled(installation)
    listed(installation)
    directory = installation.state / "listed"
    (file,) = directory.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    old = directory / "1"
    old.write_text("[]")
    os.utime(old, (1, 1))
    listed(installation)
    wait_for(lambda: not old.exists(), what="the end of an old list")
