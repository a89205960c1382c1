"""A result's last line enqueues tasks where the worker was started with --chain: together with its
own end, or not at all.
"""

import json
import math

import pytest
from conftest import end, settle, wait_for

HANDLER = "#!/bin/sh\ncat > /dev/null\nprintf '%s\\n' {said}\n"


def say(installation, name: str, *said: str) -> None:
    quoted = " ".join("'" + line.replace("'", "'\\''") + "'" for line in said)
    installation.handler(name, HANDLER.format(said=quoted))


def enqueue_line(*entries) -> str:
    return json.dumps({"enqueue": entries})


def envelopes(installation, queue: str) -> list[dict]:
    return [
        json.loads(data) for (data,) in installation.rows(f"select data from {queue} order by id")
    ]


def test_the_last_line_enqueues(installation, queue):
    say(installation, "t", "some words", enqueue_line(
        {"queue": "approvals", "task_type": "ask", "data": {"n": 1}, "task_id": "child", "priority": 3, "group": "a"},
        {"queue": "approvals", "task_type": "ask", "group": "a"},
        {"queue": "completions", "task_type": "later", "delay": 600},
        {"queue": "completions", "task_type": "held", "hold": True}))  # fmt: skip
    queue.enqueue_task("notifications", "t", {}, "parent")
    installation.worker("notifications", "--chain")
    assert installation.finished("parent")["status"] == "completed"
    columns = "task_type, priority, group_id, status, due_at is null"
    assert installation.rows(f"select {columns} from approvals order by id") == [
        ("ask", 3, "a", 1, 1),
        ("ask", 0, "a", 4, 1),
    ]
    assert installation.rows(f"select {columns} from completions order by id") == [
        ("later", 0, None, 3, 0),
        ("held", 0, None, 3, 1),
    ]
    child, *others = envelopes(installation, "approvals") + envelopes(installation, "completions")
    assert (child["task_id"], child["data"]) == ("child", {"n": 1})
    for envelope in (child, *others):
        assert envelope["depth"] == 1 and envelope["source"] == {
            "queue": "notifications",
            "task_id": "parent",
        }
    # All that it printed is kept.
    assert installation.history("parent")["result"].startswith('some words\n{"enqueue"')


def test_without_chain_the_line_is_only_words(installation, queue):
    say(installation, "t", enqueue_line({"queue": "approvals", "task_type": "ask"}))
    queue.enqueue_task("notifications", "t", {}, "parent")
    installation.worker("notifications", "--then", "completions")
    assert installation.finished("parent")["status"] == "completed"
    assert envelopes(installation, "approvals") == []
    [result] = envelopes(installation, "completions")
    assert result["data"] == {"enqueue": [{"queue": "approvals", "task_type": "ask"}]}


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ('{"answer": 42}', {"answer": 42}),
        ("two\nlines", {"result": "two\nlines\n"}),
        ("", {"result": ""}),
    ],
)
def test_with_then_the_line_is_no_part_of_the_result(installation, queue, said, data):
    line = enqueue_line({"queue": "approvals", "task_type": "ask"})
    assert (
        settle(
            queue, f"{said}\n{line}\n" if said else line, chain=True, then_queue="completions"
        ).status
        == "completed"
    )
    assert [envelope["data"] for envelope in envelopes(installation, "completions")] == [data]
    assert [envelope["task_type"] for envelope in envelopes(installation, "approvals")] == ["ask"]


GOOD = {"queue": "approvals", "task_type": "ask"}
DEEP = json.loads("[" * 250 + "]" * 250)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({}, "a list of at most 100"),
        ("approvals", "a list of at most 100"),
        ([GOOD] * 101, "a list of at most 100"),
        ([GOOD, "ask"], "entry 2"),
        ([GOOD, None], "entry 2"),
        ([{"task_type": "ask"}], "queue and task_type"),
        ([{"queue": "approvals"}], "queue and task_type"),
        ([{**GOOD, "owner": "me"}], "queue and task_type"),
        ([{**GOOD, "at": 5}], "queue and task_type"),
        ([{**GOOD, "queue": "no_such_queue"}], "no queue 'no_such_queue'"),
        ([{**GOOD, "queue": "task_history"}], "reserved"),
        ([{**GOOD, "queue": 'x"; drop table approvals; --'}], "not a queue name"),
        ([{**GOOD, "queue": ["approvals"]}], "not a queue name"),
        ([{**GOOD, "task_type": "../evil"}], "names a handler"),
        ([{**GOOD, "task_type": 5}], "task_type"),
        ([{**GOOD, "data": "text"}], "data is a str"),
        ([{**GOOD, "data": None}], "data is a NoneType"),
        ([{**GOOD, "task_id": 5}], "task_id"),
        ([{**GOOD, "task_id": "a\nb"}], "control characters"),
        ([{**GOOD, "priority": "high"}], "priority"),
        ([{**GOOD, "priority": 1.5}], "priority"),
        ([{**GOOD, "priority": True}], "priority"),
        ([{**GOOD, "delay": -1}], "delay"),
        ([{**GOOD, "delay": 1e300}], "delay"),
        ([{**GOOD, "delay": "10m"}], "delay"),
        ([{**GOOD, "group": "x" * 501}], "group"),
        ([{**GOOD, "group": ""}], "group"),
        ([{**GOOD, "hold": "yes"}], "hold"),
    ],
)
def test_one_invalid_entry_buries_the_task_with_the_reason(installation, queue, entries, why):
    said = "words\n" + json.dumps({"enqueue": entries})
    settled = settle(queue, said, chain=True, then_queue="completions")
    assert settled.status == "failed" and why in settled.error
    assert installation.history("parent")["error"] == settled.error
    assert envelopes(installation, "approvals") == envelopes(installation, "completions") == []


@pytest.mark.parametrize(
    "last",
    [
        '{"tasks": {"enqueue": []}}',
        '[{"queue": "approvals", "task_type": "ask"}]',
        f"so: {enqueue_line(GOOD)}",
        f"{enqueue_line(GOOD)}\nlast words",
    ],
)
def test_what_is_no_such_line_enqueues_nothing_and_is_only_words(installation, queue, last):
    assert settle(queue, f"words\n{last}", chain=True).status == "completed"
    assert envelopes(installation, "approvals") == []


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (json.dumps({"enqueue": [{**GOOD, "data": {"deep": DEEP}}]}), "nested more than 200 deep"),
        ('{"enqueue": [' * 100_000, "not JSON"),
        ('{"enqueue": nonsense}', "not JSON"),
        (f"{enqueue_line(GOOD)} and more", "not JSON"),
        ('  { "enqueue" : null}', "a list of at most 100"),
        (enqueue_line(GOOD)[:-2], "not JSON"),
        (enqueue_line({**GOOD, "data": {"n": math.inf}}), "Infinity is a number that"),
        (enqueue_line({**GOOD, "data": {"n": 7}}).replace("7", "1e400"), "1e400 is a number that"),
    ],
)
def test_a_line_that_means_to_enqueue_and_cannot_is_not_passed_over(installation, queue, last, why):
    settled = settle(queue, f"words\n{last}", chain=True)
    assert settled.status == "failed" and why in settled.error
    assert envelopes(installation, "approvals") == []


def test_a_hundred_are_enqueued_and_a_duplicate_is_none(installation, queue):
    queue.enqueue_task("approvals", "ask", {"n": "there"}, "7")
    said = enqueue_line(*({**GOOD, "task_id": str(number % 99)} for number in range(100)))
    assert settle(queue, said, chain=True).status == "completed"
    assert installation.rows("select count(*) from approvals") == [(99,)]
    assert envelopes(installation, "approvals")[0]["data"] == {"n": "there"}


def test_a_failed_run_enqueues_nothing(installation, queue):
    say(installation, "t", enqueue_line(GOOD))
    handler = installation.handlers / "t"
    installation.handler("t", f"{handler.read_text()}exit 65\n")
    queue.enqueue_task("notifications", "t", {}, "parent")
    installation.worker("notifications", "--chain")
    assert installation.finished("parent")["status"] == "failed"
    assert envelopes(installation, "approvals") == []


def test_a_chain_that_never_ends_is_ended(installation, queue):
    say(installation, "t", enqueue_line({"queue": "notifications", "task_type": "t"}))
    queue.enqueue_task("notifications", "t", {})
    worker = installation.worker("notifications", "--chain", "--drain")
    assert worker.wait(60) == 0
    ended = installation.rows(
        "select status, count(*) from task_history group by status order by status"
    )
    assert ended == [("completed", queue.MAX_DEPTH), ("failed", 1)]
    [(error,)] = installation.rows("select error from task_history where status = 'failed'")
    assert f"more than {queue.MAX_DEPTH} deep" in error


@pytest.mark.timeout(120)
def test_parent_and_child_commit_together_whoever_is_killed(installation, queue):
    """Also an orphan's: what its worker wanted done is kept with the task."""
    said = '{"enqueue": [{"queue": "approvals", "task_type": "ask", "data": {"of": "%s"}}]}'
    installation.handler(
        "t", f"#!/bin/sh\ncat > /dev/null\nsleep 0.02\nprintf '{said}\\n' \"$TASK_ID\"\n"
    )
    queue.enqueue_tasks(
        "notifications", [queue.new_row("t", {}, str(number)) for number in range(150)]
    )
    for share in (20, 50, 80, 110):
        worker = installation.worker(
            "notifications", "--chain", "--then", "completions", "--concurrency", 4
        )
        wait_for(
            lambda share=share: (
                installation.rows("select count(*) > ? from task_history", share) == [(1,)]
            ),
            30,
        )
        end(worker)
    installation.worker(
        "notifications", "--concurrency", 4, "--chain", "--then", "completions", "--max-attempts", 9
    )
    wait_for(
        lambda: (
            installation.rows("select count(*) from task_history where status = 'completed'")
            == [(150,)]
        ),
        60,
    )
    everybody = sorted(map(str, range(150)))
    assert (
        sorted(envelope["data"]["of"] for envelope in envelopes(installation, "approvals"))
        == everybody
    )
    assert (
        sorted(envelope["source"]["task_id"] for envelope in envelopes(installation, "completions"))
        == everybody
    )


def test_then_hold_makes_results_that_wait_for_a_person(installation, queue):
    say(installation, "t", '{"plan": 1}')
    queue.enqueue_task("notifications", "t", {}, "parent")
    installation.worker("notifications", "--then", "approvals", "--then-hold")
    installation.finished("parent")
    assert installation.rows("select status, due_at from approvals") == [(3, None)]
    assert installation.sqlite3("select status from task_queue where queue = 'approvals'") == "held"
    conn = queue.connect()
    assert queue.claim_ready(conn, "approvals") == []
    from taskqueue import approval

    with queue.transaction(conn):
        assert approval.approve(conn, "approvals", 1) and not approval.approve(conn, "approvals", 1)
    assert [task.data for task in queue.claim_ready(conn, "approvals")] == [{"plan": 1}]


def test_what_a_person_rejects_ends_as_cancelled(installation, queue):
    from taskqueue import approval

    conn = queue.connect()
    queue.enqueue_task("approvals", "t", {}, "one", hold=True)
    queue.enqueue_task("approvals", "t", {}, "ready")
    with queue.transaction(conn):
        assert approval.reject(conn, "approvals", 1, "not today")
        assert not approval.reject(conn, "approvals", 2) and not approval.reject(
            conn, "approvals", 3
        )
    assert installation.history("one") | {"log": None, "result": None} == {
        "status": "cancelled", "attempts": 0, "exit_code": None, "result": None, "log": None, "error": "rejected: not today"}  # fmt: skip


def test_a_result_that_cannot_become_a_task_buries_its_task(installation, queue):
    """Its queue cannot be made: there are as many as there may be."""
    conn = queue.connect()
    queue.MAX_QUEUES, most = 3, queue.MAX_QUEUES
    try:
        settled = settle(queue, "words", then_queue="one_too_many")
    finally:
        queue.MAX_QUEUES = most
    assert settled.status == "failed" and "would be number 4" in settled.error
    assert conn.execute("select count(*) from notifications").fetchone() == (0,)
