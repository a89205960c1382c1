"""An import refuses a line by its number and takes the others in; nothing absurd gets into the
database.
"""

from __future__ import annotations

import json

import pytest
from conftest import Installation

LIVE = {"queue": "approvals", "id": 1, "task_id": "bad", "task_type": "t", "status": "pending", "enqueued_at": 1.5, "priority": 0,
        "attempts": 0, "group_id": None, "error": None, "due_at": None, "data": {"task_id": "bad", "task_type": "t", "data": {}}}  # fmt: skip
ENDED = {"queue": "approvals", "id": 2, "task_id": "bad", "task_type": "t", "status": "failed", "enqueued_at": "2030-01-31 12:00:00.000",
         "started_at": None, "completed_at": "2030-01-31 12:00:01.000", "priority": 0, "attempts": 1, "max_attempts": 4,
         "exit_code": 1, "error": "e", "result": "", "log": "", "group_id": None, "data": {}}  # fmt: skip
GOOD = json.dumps(
    LIVE | {"task_id": "good", "id": 9, "data": {"task_id": "good", "task_type": "t", "data": {}}}
)
ABSURD = ["1e300", "-1", "NaN", "Infinity", "-Infinity", "1e400", '"12"', '"2030"', "true", "[]", "{}", str(2**63), str(10**400), '""',
          '"2030-13-45 12:00:00.000"', '"2030-01-31 12:00:00.000\\u0000"', "253402300800"]  # fmt: skip


def fields(task: dict, names: tuple[str, ...]) -> list[tuple[dict, str, str]]:
    return [(task, name, value) for name in names for value in ABSURD]


NUMBERS = ("id", "attempts")
CASES = [
    case
    for case in [
        *fields(LIVE, ("enqueued_at", *NUMBERS)),
        *fields(LIVE | {"status": "scheduled"}, ("due_at",)),
        *fields(LIVE | {"status": "held"}, ("expires_at",)),
        *fields(ENDED, ("enqueued_at", "started_at", "completed_at", *NUMBERS, "max_attempts")),
        *(
            (task, name, value)
            for task in (LIVE, ENDED)
            for name in ("priority", "exit_code")[: 1 + (task is ENDED)]
            for value in ABSURD
            if value != "-1" and (name, value) != ("exit_code", "-1")
        ),
        *(
            (task, name, value)
            for task in (LIVE, ENDED)
            for name in ("task_id", "group_id", "error", "queue", "status")
            for value in ("1", "true", "[]", '"\\ud800"')
        ),
    ]
    if case[1:] != ("id", "253402300800")
]


def line(task: dict, name: str, value: str) -> str:
    """The task as JSON, one field replaced by text that may be no JSON."""
    return json.dumps(task | {name: "@@"}).replace('"@@"', value)


def test_each_absurd_field_is_refused_by_its_line_and_the_others_come_in(installation):
    lines = [line(*case) for case in CASES]
    text = "".join(f"{each}\n" for bad in lines for each in (bad, GOOD))
    done = installation.run("tasks.py", "import", "-", "--json", input=text)
    assert done.returncode == 65 and "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    refused = {int(fault.split()[1]) for fault in told["refused"]}
    accepted = [
        lines[number // 2] for number in range(1, 2 * len(lines), 2) if number not in refused
    ]
    assert accepted == [], accepted
    assert told["imported"] == 1 and told["already_there"] == len(lines) - 1
    assert installation.rows("select task_id, status from task_queue") == [("good", "pending")]


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_what_only_python_takes_for_json_is_refused_wherever_it_stands(installation, number):
    inside = json.dumps(
        LIVE | {"data": {"task_id": "bad", "task_type": "t", "data": {"n": "@@"}}}
    ).replace('"@@"', number)
    done = installation.run(
        "tasks.py",
        "import",
        "-",
        input=f"{GOOD}\n{inside}\n{GOOD.replace('good', 'fine').replace('9', '10')}\n",
    )
    assert done.returncode == 65 and f"line 2 was refused: {number} is a number that" in done.stderr
    assert sorted(installation.rows("select task_id from task_queue")) == [("fine",), ("good",)]


def test_data_that_sqlite_cannot_read_is_refused_by_its_line(installation):
    deep = "[" * 1500 + "]" * 1500
    inside = json.dumps(
        LIVE | {"data": {"task_id": "bad", "task_type": "t", "data": {"n": "@@"}}}
    ).replace('"@@"', deep)
    done = installation.run("tasks.py", "import", "-", input=f"{inside}\n{GOOD}\n")
    assert (
        done.returncode == 65
        and "line 1 was refused" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
    assert installation.rows("select task_id from task_queue") == [("good",)]


def test_imported_tasks_run_and_are_recorded(installation):
    """The bounds are such that the worker and the history can take them: the longest ago, the
    furthest off, the most.
    """
    extreme = [LIVE | {"id": n, "task_id": f"x-{n}", "enqueued_at": at, "priority": priority, "attempts": 0,
                       "data": {"task_id": f"x-{n}", "task_type": "t", "data": {}}}
               for n, (at, priority) in enumerate([(0, 1_000_000), (32503680000, -1_000_000), (1.5, 0)], 1)]  # fmt: skip
    assert (
        installation.run(
            "tasks.py", "import", "-", input="".join(json.dumps(task) + "\n" for task in extreme)
        ).returncode
        == 0
    )
    installation.handler("t", "#!/bin/sh\n")
    assert (
        installation.run(
            "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    assert installation.rows(
        "select count(*), count(enqueued_at) from task_history where status = 'completed'"
    ) == [(3, 3)]


def test_one_task_id_in_two_queues_is_two_tasks_everywhere(installation, tmp_path):
    for queue in ("approvals", "completions", "notifications"):
        installation.enqueue(queue, "t", json.dumps({"of": queue}), "--task-id", "same")
    for queue in ("approvals", "completions"):
        assert installation.run("tasks.py", "cancel", "same", "--queue", queue).returncode == 0
        installation.enqueue(queue, "t", json.dumps({"again": queue}), "--task-id", "same")
    done = installation.run("tasks.py", "export", "--history")
    other = Installation(tmp_path / "other") if (tmp_path / "other").mkdir() is None else None
    for expected in ({"imported": 5, "already_there": 0}, {"imported": 0, "already_there": 5}):
        told = json.loads(other.run("tasks.py", "import", "-", "--json", input=done.stdout).stdout)
        assert told == expected | {"refused": []}
    everything = (
        "select queue, task_id, status, json_extract(data, '$.data') from task_queue order by 1, 3"
    )
    assert other.rows(everything) == installation.rows(everything)

    some = "".join(
        f"{text}\n"
        for text in done.stdout.splitlines()
        if json.loads(text)["queue"] == "completions"
    )
    (tmp_path / "third").mkdir()
    third = Installation(tmp_path / "third")
    third.enqueue("approvals", "t", "{}", "--task-id", "same")
    assert (
        json.loads(third.run("tasks.py", "import", "-", "--json", input=some).stdout)["imported"]
        == 2
    )
    assert sorted(third.rows("select queue, status from task_queue")) == [
        ("approvals", "pending"), ("completions", "cancelled"), ("completions", "pending")]  # fmt: skip

    said = installation.run("tasks.py", "move", "same", "extra").stderr
    assert "there is no queue" in said
    installation.enqueue("extra", "t")
    said = installation.run("tasks.py", "move", "same", "extra").stderr
    assert "same (approvals)" in said and "same (completions)" in said and "--from" in said
    assert (
        installation.run("tasks.py", "move", "--from", "approvals", "same", "extra").returncode == 0
    )
    assert sorted(installation.rows("select queue, status from task_queue where task_id = 'same'")) == [
        ("approvals", "cancelled"), ("completions", "cancelled"), ("completions", "pending"), ("extra", "pending"),
        ("notifications", "pending")]  # fmt: skip
    assert (
        "waiting or running in extra"
        in installation.run("tasks.py", "move", "--from", "completions", "same", "extra").stderr
    )
    assert installation.rows("select count(*) from completions where task_id = 'same'") == [(1,)]


@pytest.mark.parametrize("number", ["1e400", "-1E+999", "9" * 5000], ids=lambda text: text[:9])
def test_a_number_that_other_readers_cannot_read_is_refused(installation, number):
    line = json.dumps(LIVE | {"data": {"n": "@@"}}).replace('"@@"', number)
    done = installation.run("tasks.py", "import", "-", input=f"{GOOD}\n{line}\n")
    assert done.returncode == 65
    assert done.stderr.count("\n") == 1 and f"line 2 was refused: {number[:40]}" in done.stderr
    assert installation.rows("select task_id from task_queue") == [("good",)]


@pytest.mark.parametrize("payload", [{"a": 1}, {}, {"task_id": "other"}, {"hook_event_name": "x"}])
def test_a_line_that_somebody_wrote_keeps_its_id_and_type(installation, payload):
    line = json.dumps(LIVE | {"task_id": "mine", "task_type": "review", "data": payload})
    for imported in (1, 0):
        done = installation.run("tasks.py", "import", "-", "--json", input=f"{line}\n")
        told = {"imported": imported, "already_there": 1 - imported, "refused": []}
        assert json.loads(done.stdout) == told, done.stderr
    [(task_id, task_type, data)] = installation.rows(
        "select task_id, task_type, json_extract(data, '$.data') from task_queue"
    )
    assert (task_id, task_type, json.loads(data)) == ("mine", "review", payload)
