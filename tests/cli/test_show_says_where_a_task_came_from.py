"""tasks.py show: a task's times on a clock with its zone, how long it took, where it came from and
what it led to.
"""

from __future__ import annotations

import json
import re


def shown(installation, ident: str) -> dict:
    done = installation.run("tasks.py", "show", ident, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_result_names_its_source(installation):
    installation.handler("review", '#!/bin/sh\necho \'{"summary": "fine"}\'\n')
    installation.enqueue("approvals", "review", "{}", "--task-id", "first")
    done = installation.run(
        "worker.py",
        "approvals",
        "--handlers",
        installation.handlers,
        "--then",
        "completions",
        "--drain",
    )
    assert done.returncode == 0, done.stderr
    first = shown(installation, "first")
    assert first["came_from"] == []
    ((result,),) = installation.rows("select task_id from completions")
    task = shown(installation, result)
    assert task["came_from"] == [{"queue": "approvals", "task_id": "first", "status": "completed"}]
    text = installation.run("tasks.py", "show", result).stdout
    assert re.search(r"^came from +approvals first \(completed\)$", text, re.MULTILINE)
    # Its source may be gone.
    installation.sqlite3("delete from task_history where task_id = 'first'")
    assert shown(installation, result)["came_from"][0]["status"] == "gone"


def test_times_have_their_zone_and_their_distance(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "later", "--delay", "1h")
    # A process takes its zone from TZ at its start.
    installation.is_inside = False
    installation.env["TZ"] = "Asia/Tokyo"
    text = installation.run("tasks.py", "show", "later").stdout
    assert re.search(
        r"^enqueued_at +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d JST, .* ago$", text, re.MULTILINE
    )
    assert re.search(
        r"^due_at +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d JST, in (59|60) m$", text, re.MULTILINE
    )
    # Scripts get UTC text, as the database has it.
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", shown(installation, "later")["due_at"]
    )


def test_json_is_indented_and_durations_are_given(installation):
    installation.enqueue("approvals", "review", '{"deep": {"er": 1}}', "--task-id", "ended")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at, result)"
        " select 'approvals', id, task_id, task_type, 'completed', data, '2026-01-01 00:00:00.000', '2026-01-01 00:00:05.000',"
        ' \'2026-01-01 00:02:05.000\', \'{"summary": "s", "n": 1}\' from approvals; delete from approvals'
    )
    text = installation.run("tasks.py", "show", "ended").stdout
    assert (
        '"deep": {\n      "er": 1\n    }' in text
        and '\nstdout\n{\n  "summary": "s",\n  "n": 1\n}\n' in text
    )
    assert re.search(r"^waited +5\.0s$", text, re.MULTILINE) and re.search(
        r"^ran +2m$", text, re.MULTILINE
    )


def test_a_held_task_says_what_it_waits_for(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "h", "--hold")
    text = installation.run("tasks.py", "show", "h").stdout
    assert "held" in text and "until ./tasks.py approve or ./tasks.py reject" in text
