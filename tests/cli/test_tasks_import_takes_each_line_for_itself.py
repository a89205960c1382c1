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
GOOD = json.dumps(LIVE | {"task_id": "good", "id": 9, "data": {"task_id": "good", "task_type": "t", "data": {}}})  # fmt: skip
ABSURD = ["1e300", "-1", "NaN", "Infinity", "-Infinity", "1e400", '"12"', '"2030"', "true", "[]", "{}", str(2**63), str(10**400), '""',
          '"2030-13-45 12:00:00.000"', '"2030-01-31 12:00:00.000\\u0000"', "253402300800"]  # fmt: skip
WORDS = ("1", "true", "[]", '"\\ud800"')
# The fields of a task, and values that each of them refuses.
FIELDS = [
    (LIVE, ("enqueued_at", "id", "attempts"), ABSURD),
    (LIVE | {"status": "scheduled"}, ("due_at",), ABSURD),
    (LIVE | {"status": "held"}, ("expires_at",), ABSURD),
    (ENDED, ("enqueued_at", "started_at", "completed_at", "id", "attempts", "max_attempts"), ABSURD),
    *((task, ("priority",), {*ABSURD} - {"-1"}) for task in (LIVE, ENDED)),
    (ENDED, ("exit_code",), {*ABSURD} - {"-1"}),
    *((task, ("task_id", "group_id", "error", "queue", "status"), WORDS) for task in (LIVE, ENDED)),
    (LIVE, ("queue",), ['"x; drop table approvals"']),
    (LIVE, ("status",), ['"odd"', '"completed"', '"scheduled"']),
    (LIVE, ("enqueued_at",), ["null"]),
]  # fmt: skip
# What the payload may not hold, and what is said of it.
PAYLOADS = {
    "NaN": "NaN is a number that", "-Infinity": "-Infinity is a number that", "1e400": "1e400",
    "-1E+999": "-1E+999", "9" * 5000: "9" * 40, "[" * 1500 + "]" * 1500: "",
}  # fmt: skip
NO_TASKS = [b"{", b"[]", b"\xff\xfe", b'{"queue": "approvals"}', b"[" * 5000]


def line(task: dict, name: str, value: str) -> bytes:
    """The task as JSON, one field replaced by text that may be no JSON."""
    return json.dumps(task | {name: "@@"}).replace('"@@"', value).encode()


def test_each_bad_line_is_refused_by_its_number_and_the_others_come_in(installation):
    lines = [line(task, name, value) for task, names, values in FIELDS for name in names
             for value in values if (name, value) != ("id", "253402300800")]  # fmt: skip
    for value in PAYLOADS:
        lines.append(line(LIVE, "data", f'{{"task_id": "bad", "task_type": "t", "data": {{"n": {value}}}}}'))  # fmt: skip
    lines += [line(LIVE, "data", "[]"), *NO_TASKS]
    text = b"".join(bad + b"\n" + GOOD.encode() + b"\n" for bad in lines)
    done = installation.tq("import - --json", input=text, code=65)
    told = json.loads(done.stdout)
    faults = {int(fault.split()[1]): fault for fault in told["refused"]}
    assert [bad for at, bad in enumerate(lines) if 2 * at + 1 not in faults] == []
    assert len(faults) == len(lines) and told["imported"] == 1
    first = 2 * (len(lines) - len(NO_TASKS) - 1 - len(PAYLOADS)) + 1
    assert all(why in faults[first + 2 * at] for at, why in enumerate(PAYLOADS.values())), faults
    assert installation.rows("select task_id, status from task_queue") == [("good", "pending")]
    # Without --json, each is a line on stderr.
    done = installation.tq("import -", input=b"\n".join(NO_TASKS), code=65)
    said = [each.split("line ")[1].split()[0] for each in done.stderr.splitlines()]
    assert said == ["1", "2", "3", "4", "5"] and "Traceback" not in done.stderr


def test_imported_tasks_run_and_are_recorded(installation):
    """The bounds are such that the worker and the history can take them: the longest ago, the
    furthest off, the most.
    """
    extreme = [LIVE | {"id": n, "task_id": f"x-{n}", "enqueued_at": at, "priority": priority,
                       "data": {"task_id": f"x-{n}", "task_type": "t", "data": {}}}
               for n, (at, priority) in enumerate([(0, 1_000_000), (32503680000, -1_000_000), (1.5, 0)], 1)]  # fmt: skip
    installation.tq("import -", input="".join(json.dumps(task) + "\n" for task in extreme))
    installation.handler("t", "#!/bin/sh\n")
    installation.drain("approvals")
    ended = "select count(*), count(enqueued_at) from task_history where status = 'completed'"
    assert installation.rows(ended) == [(3, 3)]


def places(installation) -> list[tuple]:
    found = "select queue, status from task_queue where task_id = 'same'"
    return sorted(installation.rows(found))


def test_one_task_id_in_two_queues_is_two_tasks_everywhere(installation, other, tmp_path):
    for queue in ("approvals", "completions", "notifications"):
        installation.add(f"{queue} t --task-id same", json.dumps({"of": queue}))
    for queue in ("approvals", "completions"):
        installation.tq(f"cancel same --queue {queue}")
        installation.add(f"{queue} t --task-id same", json.dumps({"again": queue}))
    text = installation.tq("export --history").stdout
    for new, known in ((5, 0), (0, 5)):
        told = other.told("import -", input=text)
        assert told == {"imported": new, "already_there": known, "refused": []}
    everything = (
        "select queue, task_id, status, json_extract(data, '$.data') from task_queue order by 1, 3"
    )
    assert other.rows(everything) == installation.rows(everything)

    some = [row for row in text.splitlines() if json.loads(row)["queue"] == "completions"]
    (tmp_path / "third").mkdir()
    third = Installation(tmp_path / "third")
    third.add("approvals t --task-id same")
    assert third.told("import -", input="\n".join(some))["imported"] == 2
    assert places(third) == [
        ("approvals", "pending"), ("completions", "cancelled"), ("completions", "pending")]  # fmt: skip

    installation.add("extra t")
    said = installation.tq("move same extra", code=64).stderr
    assert "same (approvals)" in said and "same (completions)" in said and "--from" in said
    installation.tq("move --from approvals same extra")
    assert places(installation) == [
        ("approvals", "cancelled"), ("completions", "cancelled"), ("completions", "pending"),
        ("extra", "pending"), ("notifications", "pending")]  # fmt: skip
    said = installation.tq("move --from completions same extra", code=1).stderr
    assert "waiting or running in extra" in said
    assert installation.rows("select count(*) from completions where task_id = 'same'") == [(1,)]


@pytest.mark.parametrize("payload", [{"a": 1}, {}, {"task_id": "other"}, {"hook_event_name": "x"}])
def test_a_line_that_somebody_wrote_keeps_its_id_and_type(installation, payload):
    text = json.dumps(LIVE | {"task_id": "mine", "task_type": "review", "data": payload})
    for new in (1, 0):
        told = installation.told("import -", input=f"{text}\n")
        assert told == {"imported": new, "already_there": 1 - new, "refused": []}
    stored = "select task_id, task_type, json_extract(data, '$.data') from task_queue"
    [(task_id, task_type, data)] = installation.rows(stored)
    assert (task_id, task_type, json.loads(data)) == ("mine", "review", payload)
