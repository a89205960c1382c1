"""What a claim costs does not depend on how much waits, is scheduled, runs elsewhere, or is
finished.
"""

import json

import pytest

NOW = 1e10  # later than any real due time in these tests

TERMS = {"max_attempts": 4, "backoff": 1.0, "then_queue": None, "then_hold": 0, "chain": 0}
FENCE = {"id": 7, "owner": "o", "attempts": 1, "claimed_at": NOW}
TIMES = {"enqueued_at": "2000", "started_at": "2000", "completed_at": "2000"}
ENDING = {"status": "completed", "exit_code": 0, "result": "", "log": "", "error": None}
LATER = {
    **dict.fromkeys(
        ("due_at", "group_id", "expires_at", "delayed_at", "firing", "own_attempts", "timeout")
    ),
    **{"data": "{}", "status": 1, "priority": 0, "timestamp": 1.0, "task_id": "7"},
}
STATEMENTS = {
    "CLAIM": {"owner": "o", "now": NOW, "limit": 1, **TERMS},
    "CLAIM_ROW": {"owner": "o", "now": NOW, "id": 7, "limit": 1, **TERMS},
    "LOOK": {"now": 0.0},
    "NEXT_TIMES": {"now": 0.0},
    "PROMOTE": {"now": 0.0},
    "UNBLOCK": {"group_id": "g"},
    "EXPIRED": {"now": 0.0},
    "ARCHIVE": {**FENCE, **TIMES, **ENDING},
    "REMOVE": {"id": 7},
    "RELEASE": {**FENCE, "now": 0.0, "delay": 1.0, "error": None, "uncounted": 1},
    "REPLACE": LATER,
    "RERUN": LATER | {"on_duplicate": "rerun"},
    "OWNERS": {},
    "CLAIMED_BY": {"owner": "o"},
    "CANCEL_REQUESTED": {"owner": "o"},
    "WHO_HOLDS": {"id": 7},
    "FINISHED_SINCE": {
        "queue": "notifications",
        "task_id": "history 7",
        "since": "2000",
        "until": "2001",
        "firing": None,
    },
}

WAITING = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < :count)
insert into notifications (data, priority) select json_object('task_id', :mark || i, 'task_type', 't' || (i % 7),
  'data', json_object('i', i)), i % 3 from n"""
SCHEDULED = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < :count)
insert into notifications (data, status, due_at) select json_object('task_id', :mark || 's' || i, 'task_type', 't',
  'data', json_object('i', i)), 3, 4e9 + i from n"""
FINISHED = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < :count)
insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
select 'notifications', i, :mark || 'history ' || i, 't', 'completed', '{}', '2001-01-01 00:00:00.000' from n"""


def fill(queue, count: int, mark: str, *kinds: str) -> None:
    conn = queue.connect()
    with queue.transaction(conn, durable=False):
        for statement in kinds:
            conn.execute(statement, {"count": count, "mark": mark})


def steps(conn, action) -> int:
    """Return how many instructions SQLite's machine takes for what action does."""
    counted = [0]

    def count() -> None:
        counted[0] += 1

    conn.set_progress_handler(count, 1)
    try:
        action()
    finally:
        conn.set_progress_handler(None, 0)
    return counted[0]


def costs(queue) -> dict[str, int]:
    """Of everything that is done for each task, in instructions."""
    conn = queue.connect()
    taken, found = [], {}

    def claim():
        with queue.transaction(conn):
            taken[:] = queue.claim(conn, "notifications", "somebody")

    def in_transaction(verb, **told):
        with queue.transaction(conn):
            assert verb(conn, taken[0], **told)

    claim()  # once unmeasured
    in_transaction(queue.ack)
    found["claim"] = steps(conn, claim)
    found["ack"] = steps(conn, lambda: in_transaction(queue.ack))
    claim()
    found["nack"] = steps(conn, lambda: in_transaction(queue.nack, error="no", delay=9e8))
    claim()
    found["bury"] = steps(conn, lambda: in_transaction(queue.bury, error="no"))
    found["look"] = steps(conn, lambda: queue.has_ready(conn, "notifications"))
    found["next due"] = steps(conn, lambda: queue.next_due(conn, "notifications"))
    found["enqueue"] = steps(conn, lambda: queue.enqueue_task("notifications", "t", {}))
    found["enqueue with a window"] = steps(
        conn, lambda: queue.enqueue_task("notifications", "t", {}, window=60)
    )
    found["recover"] = steps(conn, queue.recover)
    return found


def plan(conn, statement: str, values: dict) -> list[str]:
    return [row[3] for row in conn.execute(f"explain query plan {statement}", values)]


@pytest.mark.parametrize("name", STATEMENTS)
def test_each_statement_searches_an_index_and_sorts_nothing(queue, name):
    conn = queue.connect()
    from taskqueue import recovery as queue_owners

    statement = getattr(queue, name, None) or getattr(queue_owners, name)
    statement = queue.on_queue(statement, "notifications") if "{queue}" in statement else statement
    for analyzed in (False, True):
        if analyzed:  # what the planner then knows must not lead it astray
            fill(queue, 2000, "x", WAITING, SCHEDULED, FINISHED)
            conn.execute("analyze")
            queue.close(conn)
            conn = queue.connect()
        steps_of_plan = plan(conn, statement, STATEMENTS[name])
        assert steps_of_plan
        for step in steps_of_plan:
            assert "TEMP B-TREE" not in step, steps_of_plan
            # A search that names no index is SQLite's for the greatest row number.
            if step == "SEARCH task_history":
                continue
            if "notifications" in step or "task_history" in step:
                assert "INDEX" in step or "INTEGER PRIMARY KEY" in step, steps_of_plan
                assert "AUTOMATIC" not in step


def test_a_claim_reads_the_index_of_what_is_ready_in_its_order(queue):
    conn = queue.connect()
    steps_of_plan = plan(conn, queue.on_queue(queue.CLAIM, "notifications"), STATEMENTS["CLAIM"])
    assert any("INDEX notifications.ready" in step for step in steps_of_plan), steps_of_plan
    assert any(
        "INDEX notifications.scheduled" in step
        for step in plan(conn, queue.on_queue(queue.PROMOTE, "notifications"), {"now": 0})
    )


def test_persist_queues_own_condition_is_served_by_the_same_index(queue):
    conn = queue.connect()
    steps_of_plan = plan(
        conn, "select id from notifications where status < 2 order by priority desc, id limit 1", {}
    )
    assert len(steps_of_plan) == 1 and "INDEX notifications.ready" in steps_of_plan[0]


@pytest.mark.timeout(120)
def test_it_takes_as_many_steps_at_90_000_rows_as_at_300(queue):
    queue.connect()
    fill(queue, 100, "few ", WAITING, SCHEDULED, FINISHED)
    few = costs(queue)
    fill(queue, 30_000, "many ", WAITING, SCHEDULED, FINISHED)
    many = costs(queue)
    assert min(few.values()) > 3
    assert {name: many[name] for name in few if many[name] > 1.2 * few[name]} == {}, few


def test_nor_do_the_claims_of_others_cost_anything(queue):
    conn = queue.connect()
    fill(queue, 5100, "x", WAITING)
    few = costs(queue)
    with queue.transaction(conn):
        assert len(queue.claim(conn, "notifications", queue.owner_name(), limit=5000)) == 5000
    many = costs(queue)
    assert many["claim"] <= 1.2 * few["claim"] and many["look"] <= 1.2 * few["look"]


def test_a_claim_takes_them_in_the_order_of_priority_then_age(queue):
    conn = queue.connect()
    for n, priority in enumerate([0, 5, -1, 5, 0]):
        queue.enqueue_task("notifications", "t", {"n": n}, priority=priority)
    with queue.transaction(conn):
        some = queue.claim(conn, "notifications", "o", limit=2)
        rest = queue.claim(conn, "notifications", "o", limit=9)
    assert [json.loads(task.text)["data"]["n"] for task in some + rest] == [1, 3, 0, 4, 2]


GROUPED = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < :count)
insert into notifications (data, group_id, priority) select json_object('task_id', :mark || 'g' || i, 'task_type', 't',
  'data', json_object('i', i)), iif(i % 3 = 0, 'other ' || (i / 300), 'big'), i % 3 from n"""
GROUPED_LATER = """
with recursive n (i) as (select 1 union all select i + 1 from n where i < :count)
insert into notifications (data, group_id, due_at, expires_at) select json_object('task_id', :mark || 'gs' || i, 'task_type', 't',
  'data', json_object('i', i)), 'big', 4e9 + i, 5e9 + i from n"""


def costs_in_a_group(queue) -> dict[str, int]:
    """Of everything that is done for a task of the big group, whose turn comes first."""
    conn = queue.connect()
    taken, found = [], {}

    def claim():
        with queue.transaction(conn):
            taken[:] = queue.claim(conn, "notifications", "somebody")

    def in_transaction(verb, **told):
        with queue.transaction(conn):
            assert verb(conn, taken[0], **told)

    def insert(**options):
        with queue.transaction(conn):
            queue.insert(conn, "notifications", queue.new_row("t", {}, group="big", **options))

    conn.execute("update notifications set priority = 9 where group_id = 'big' and status < 2")
    for name in ("unmeasured", "measured"):
        conn.execute("update notifications set priority = 8 where group_id = 'big' and status < 2")
        found[f"{name} claim"] = steps(conn, claim)
        assert len(taken) == 1 and "g" in taken[0].task_id
        found[f"{name} ack, which makes the next one ready"] = steps(
            conn, lambda: in_transaction(queue.ack)
        )
        conn.execute("update notifications set priority = 8 where group_id = 'big' and status < 2")
        claim()
        found[f"{name} retry, which keeps the turn"] = steps(
            conn, lambda: in_transaction(queue.nack, error="no", delay=9e8)
        )
        found[f"{name} enqueue"] = steps(conn, insert)
        found[f"{name} enqueue for later"] = steps(conn, lambda: insert(delay=9e8))
        conn.execute(
            "update notifications set due_at = 1 where status = 3 and released_at is not null"
        )
        found[f"{name} claim of the retry"] = steps(conn, claim)
        assert "g" in taken[0].task_id and taken[0].attempts == 2
        found[f"{name} bury"] = steps(conn, lambda: in_transaction(queue.bury, error="no"))
        insert(ttl=0.0)
        found[f"{name} claim, where one has expired"] = steps(conn, claim)
        in_transaction(queue.ack)
        found[f"{name} cancel of one that waits"] = steps(
            conn,
            lambda: conn.execute(
                "delete from notifications where id = (select max(id) from notifications where status = 4)"
            ),
        )
    return {name: count for name, count in found.items() if name.startswith("measured")}


@pytest.mark.timeout(180)
def test_nor_do_groups_of_whatever_size(queue):
    """Half of what waits is scheduled, and one group has a third of all."""
    queue.connect()
    fill(queue, 60, "few ", GROUPED, GROUPED_LATER, WAITING, SCHEDULED)
    few = costs_in_a_group(queue)
    fill(queue, 10_000, "many ", GROUPED, GROUPED_LATER, WAITING, SCHEDULED)
    many = costs_in_a_group(queue)
    assert min(few.values()) > 3
    assert {name: (many[name], few[name]) for name in few if many[name] > 1.2 * few[name]} == {}
