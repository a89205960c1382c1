"""tasks.py list on a terminal: what came of each task, in columns that stand, on one screen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, one_line, wait_for
from rich.cells import cell_len
from terminal import on_terminal

LONG = "link_validation_8b1a9953c4611296a827abf8c478_s{:04d}"
RUNS = "update approvals set status = 2, owner = 'x', claimed_at = timestamp where id = {}"


def listed(installation, *args, **options) -> list[str]:
    """The lines of a list on a terminal, but for the remarks below it."""
    lines = on_terminal(installation, "tasks.py", "list", *args, **options)
    return [line for line in lines if not line.startswith(("no worker", "no handler"))]


def ended(installation, task_id: str, status: str, result: str = "", error: str = "") -> None:
    """Put a finished task into the history."""
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, result, error)"
        f" values ('approvals', abs(random()) % 1000000, '{task_id}', 'link_validation', '{status}', '{{}}',"
        f" datetime('now', '-9 seconds'), datetime('now', '-5 seconds'), '{result}', nullif('{error}', ''))"
    )


@pytest.fixture
def filled(installation):
    for number in range(3):
        installation.add(f"notifications link_validation --task-id {LONG.format(number)}")
    installation.add("approvals claude --task-id later --delay 3600", '{"prompt": "mend"}')
    summary = '{"summary": "2 broken links: README.md:4", "n": 1}'
    ended(installation, "with-summary", "completed", summary)
    ended(installation, "with-lines", "completed", "first line\nsecond line\n")
    ended(installation, "refused", "failed", error="refused by its handler (exit 65): no prompt")
    return installation


# -------------------------------------------------------------------- columns on a terminal


@pytest.mark.parametrize("columns", (80, 120))
def test_columns_stand_and_nothing_is_wider_than_the_screen(filled, columns):
    head, rule, *rows = listed(filled, columns=columns)
    assert len(rows) == 7, rows
    assert all(cell_len(line.rstrip()) <= columns for line in (head, rule, *rows))
    # Every row begins its last column where the head does.
    start = head.index("what came of it")
    assert all(row[start - 1] == " " and row[start] != " " for row in rows), (head, rows)
    # Ids that begin alike are told apart.
    ids = [row.split()[3] for row in rows if row.split()[3].startswith("lin")]
    assert len(set(ids)) == 3, rows


@pytest.mark.parametrize("columns", (80, 100))
def test_the_last_column_has_room_for_30_characters(filled, columns):
    ended(filled, "f" * 60, "failed", "", "the reason is of so many characters and more " * 3)
    (row,) = (line for line in listed(filled, columns=columns) if "the reason" in line)
    assert len(row) - row.index("the reason") >= 30, row
    # Queue and type are said once where all tasks share them, and an id is as short as it is unique.
    lines = listed(filled, "--status", "failed", columns=columns)
    assert lines[0].split()[:4] == ["#", "status", "id", "age"] and "f" * 8 + "…" in lines[2]
    assert lines[-1] == "each queue is approvals, each type is link_validation"
    assert len(lines[2]) - lines[2].index("the reason") > columns // 2
    filled.tq("show", "f" * 8)


@pytest.mark.parametrize("columns", (80, 120))
def test_queues_and_types_stand_whole_before_ids_do(installation, columns):
    installation.add("notifications link_validation --task-id link_val-219c96b20cfe7d34")
    for number in range(12):
        installation.add(f"approvals claude --task-id claude-{number:016x}")
    installation.sqlite3(RUNS.format(3))
    shown = listed(installation, columns=columns, rows=40)
    assert all(cell_len(line) <= columns for line in shown)
    (link,) = (line.split() for line in shown if "link" in line)
    assert link[1:3] == ["pending", "notifications"] and link[4] == "link_validation"
    assert link[3] in ("link_val…", "link_val-219c96b20cfe7d34")
    assert sum(" in_progress approvals " in line for line in shown) == 1


@pytest.mark.parametrize("columns", (80, 120))
def test_show_keeps_values_in_their_column_and_paths_whole(filled, columns):
    path = "/home/user/.claude/automation/lychee/handlers"
    remedy = "put an executable of that name there, then retry the task"
    error = f"no handler in {path}: a word b word {remedy}"
    filled.sqlite3(f"update task_history set error = '{error}' where task_id = 'refused'")
    shown = on_terminal(filled, "tasks.py", "show", "refused", columns=columns)
    at = next(number for number, line in enumerate(shown) if line.startswith("error "))
    assert all(len(line) <= columns for line in shown)
    assert any(f"{path}:" in line for line in shown[at : at + 3])
    indent = " " * 18
    assert shown[at + 1].startswith(indent) and shown[at + 1][18] != " "
    again = f"{indent}runs again after ./tasks.py retry refused"
    assert any(line.startswith(again) for line in shown)
    assert f"{remedy}\n" in filled.tq("show refused").stdout


@pytest.mark.parametrize("columns", (60, 80, 100, 120))
def test_stats_never_cut_a_unit(filled, columns):
    for number in range(20):
        ended(filled, f"slow-{number}", "failed" if number % 2 else "completed")
    filled.sqlite3(
        "update task_history set enqueued_at = datetime('now', '-57 minutes');"
        "update notifications set timestamp = timestamp - 57.5 * 60"
    )
    words = set(filled.tq("stats").stdout.split())
    words |= {cell.partition("/")[0] for cell in words}
    shown = on_terminal(filled, "tasks.py", "stats", columns=columns)
    assert all(cell_len(line) <= columns for line in shown)
    for line in shown[3:-1]:
        assert "…" not in line[18:], line
        assert {word for word in line[18:].split() if word[0].isdigit()} <= words, line
    if columns >= 80:
        assert any("57m" in line for line in shown), shown


def test_as_many_rows_as_the_screen_has_and_what_runs_is_among_them(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 60)
    installation.sqlite3(RUNS.format(30))
    shown = listed(installation, rows=20)
    assert 12 <= len(shown) < 20 and shown[-1].startswith("12 of 60 (")
    assert "in_progress" in shown[2] and len(listed(installation, rows=50)) > 40
    long = listed(installation, "--limit", "60", rows=20)
    assert len(long) == 63 and "in_progress" in long[-2]


def test_an_empty_list_says_so(installation):
    installation.add("approvals review --task-id a")
    installation.tq("purge approvals --yes")
    assert listed(installation) == ["no matching tasks"]
    assert "no task waits or runs" in on_terminal(installation, "tasks.py", "stats")
    # The types that we ship stand whole on 80 columns.
    installation.add("notifications link_validation")
    shown = on_terminal(installation, "tasks.py", "stats")
    assert any(line.startswith("  link_validation ") for line in shown), shown


def test_colours_are_left_out_where_nobody_wants_them(filled):
    command = ["script", "-qec", f"{sys.executable} '{ROOT}/tasks.py' list", "/dev/null"]
    env = filled.env | {"TERM": "xterm", "NO_COLOR": "1"}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=-1, text=True)
    assert "refused" in done.stdout and not re.search(r"\x1b\[3[0-9]m", done.stdout)


# ----------------------------------------------------------------------- what came of a task


def test_each_says_what_came_of_it(filled):
    shown = {row.split()[3]: row for row in listed(filled, columns=160)[2:]}
    assert "2 broken links: README.md:4" in shown["with-summary"]
    assert "first line" in shown["with-lines"] and "second line" not in shown["with-lines"]
    assert "refused by its handler (exit 65): no prompt" in shown["refused"]
    assert 'in 60 m: {"prompt": "mend"}' in shown["later"]
    # A pipe gets the same, uncut.
    piped = filled.tq("list").stdout
    assert piped.count("\n") == 8 and LONG.format(2) in piped
    assert "2 broken links: README.md:4" in piped
    filled.sqlite3("update approvals set due_at = due_at - 7200")
    assert 'due 60 m ago: {"prompt": "mend"}' in filled.tq("list").stdout


def test_a_completion_shows_its_summary(installation):
    for data in ({"summary": "2 links\nare broken", "n": 1}, {"result": "first\nsecond"}):
        installation.add("completions link_validation", json.dumps(data))
    said = installation.tq("list").stdout
    assert re.search(r"  2 links are broken$", said, re.M) and re.search(r"  first$", said, re.M)


def test_a_paused_queue_says_until_when_and_why(installation):
    installation.add("approvals claude")
    installation.tq("pause approvals --for 90m --reason 'usage limit'")
    row = listed(installation, columns=140)[2]
    assert "paused until " in row and "usage limit" in row and "(in 90 m)" in row


def test_it_ends_with_how_many_more_there_are(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 1234)
    installation.add("notifications note")
    for words, last in (
        ("list", "50 of 1,235 (./tasks.py list -n 100)"),
        ("list --queue approvals -n 7", "7 of 1,234 (-n 100 shows more)"),
    ):
        assert installation.tq(words).stderr.splitlines()[-1] == last
    assert len(installation.told("list")) == 1235 and len(installation.told("list -n 9")) == 9


def test_list_is_sorted_as_asked(filled):
    def order(key: str, name: str) -> list:
        return [row[name] for row in filled.told(f"list --sort {key}")]

    assert order("type", "task_type") == ["claude"] + ["link_validation"] * 6
    assert order("queue", "queue") == ["approvals"] * 4 + ["notifications"] * 3
    times = [row["completed_at"] or row["enqueued_at"] for row in filled.told("list --sort newest")]
    assert times == sorted(times, reverse=True)
    assert order("oldest", "task_id")[-1] == order("newest", "task_id")[0]
    filled.sqlite3("update approvals set attempts = 3")
    assert order("tries", "task_id")[0] == "later"


# --------------------------------------------------------------------------- numbers of rows


def test_a_row_is_named_by_the_number_that_this_terminal_was_shown(filled):
    rows = listed(filled, columns=140)[2:]
    for row in rows:
        number, _, queue, shown_id = row.split()[:4]
        task = filled.told("show", number)
        assert task["queue"] == queue and task["task_id"][:3] == shown_id[:3]
    (number,) = (row.split()[0] for row in rows if "later" in row)
    # A new task above it changes nothing: the number is that of what was shown.
    filled.add("notifications link_validation --priority 9")
    assert filled.tq("cancel", number).stdout == "cancelled later\n"
    one_line(filled.run("tasks.py", "show", "99"), 64, "no task has the id '99'")
    # Another terminal was shown nothing.
    elsewhere = filled.run("tasks.py", "show", "1", start_new_session=True)
    one_line(elsewhere, 64, "no task has the id")


def test_a_number_that_is_a_row_and_an_id_is_refused_and_a_task_that_went_is_said(installation):
    for name in ("2", "other"):
        installation.add(f"approvals review --task-id {name}")
    listed(installation)
    said = installation.tq("show 2", code=64).stderr
    assert "other (approvals)" in said and "2 (approvals)" in said
    installation.sqlite3("delete from approvals where task_id = '2'")
    assert "task 2 of approvals is gone" in installation.tq("show 1", code=1).stderr


def test_the_lists_that_terminals_were_shown_are_private_and_go_after_a_day(filled):
    listed(filled)
    directory = filled.state / "listed"
    (file,) = directory.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (directory, file)] == [0o700, 0o600]
    old = directory / "1"
    old.write_text("[]")
    os.utime(old, (1, 1))
    listed(filled)
    wait_for(lambda: not old.exists(), what="the end of an old list")
