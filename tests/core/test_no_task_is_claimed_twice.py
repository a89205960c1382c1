"""Eight consumers and tasks that come while they claim: each task is claimed once, none is lost."""

import json
import os
import subprocess
import time

import pytest

pytestmark = [pytest.mark.core, pytest.mark.first]

# 160,000 of them take minutes: CONTEST_TASKS=160000 just test -k eight_processes
TASKS, PRODUCERS, SINGLES = int(os.environ.get("CONTEST_TASKS", 6_000)), 4, 100

PRODUCE = """
import sys
import queue_helpers as q
me, tasks, singles = map(int, sys.argv[1:])
mine = range(me * tasks, (me + 1) * tasks)
for n in mine[:singles]:
    q.enqueue_task("notifications", "t", {"n": n})
for at in range(singles, tasks, 250):
    q.enqueue_tasks("notifications", [{"task_type": "t", "data": {"n": n}} for n in mine[at : at + 250]])
"""

# Each consumer ends when it has found nothing for so long that nothing can be left.
CONSUME = """
import json, os, sys
import queue_helpers as q
q.BUSY_TIMEOUT_MS = 60_000
kind, log = sys.argv[1], os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
end = sys.argv[3]

def claimed(text):
    os.write(log, b"%d\\n" % json.loads(text)["data"]["n"])

def over():
    return os.path.exists(end) and q.get_queue("notifications").empty()

queue = q.get_ack_queue("notifications") if kind == "ack" else q.get_queue("notifications")
while not over():
    try:
        if kind == "ack":
            row, text = queue.get(timeout=0.3)
            claimed(text)
            assert queue.ack(row) == row
        elif kind == "get":
            claimed(queue.get(timeout=0.3))
        elif kind == "many":
            with q.transaction(queue._conn) as conn:
                tasks = q.claim(conn, "notifications", q.owner_name(), limit=50)
                for task in tasks:
                    claimed(task.text)
                    assert q.ack(conn, task)
            if not tasks:
                queue.put_event.wait(0.3)
        else:
            task = q.dequeue_task("notifications", timeout=0.3)
            if task:
                claimed(json.dumps(task))
    except q.Empty:
        pass
print("done")
"""


@pytest.mark.once
@pytest.mark.timeout(0 if TASKS > 6_000 else 240)
def test_by_eight_processes_at_once(installation):
    installation.enqueue("notifications", "t", '{"n": -1}')
    end, each = installation.directory / "end", TASKS // PRODUCERS
    kinds = ["get", "ack", "dequeue", "many", "get", "ack", "dequeue", "many"]
    logs = [installation.directory / f"claims-{number}" for number in range(len(kinds))]

    def start(code, *args):
        return installation.start_python(code, *args, stderr=subprocess.PIPE)

    consumers = [start(CONSUME, kind, log, end) for kind, log in zip(kinds, logs, strict=True)]
    producers = [start(PRODUCE, number, each, SINGLES) for number in range(PRODUCERS)]
    for process in producers:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    end.touch()
    for process in consumers:
        said, errors = process.communicate(timeout=200)
        assert (process.returncode, said) == (0, "done\n"), errors

    claims = [sorted(map(int, log.read_text().split())) for log in logs]
    together = sorted(n for claim in claims for n in claim)
    assert len(together) - len(set(together)) == 0, "claimed twice"
    assert together == list(range(-1, TASKS))
    assert all(claims), "a consumer that got nothing proves nothing"
    assert installation.rows("select count(*) from notifications") == [(0,)]
    finished = "select status, attempts, count(*), count(distinct task_id), count(distinct row_id) from task_history group by 1, 2"
    assert installation.rows(finished) == [("completed", 1, TASKS + 1, TASKS + 1, TASKS + 1)]
    assert installation.rows("pragma integrity_check") == [("ok",)]


def test_by_threads_of_one_process_that_share_a_queue_with_another_process(installation, queue):
    from concurrent.futures import ThreadPoolExecutor

    queue.enqueue_tasks("approvals", [{"task_type": "t", "data": {"n": n}} for n in range(600)])
    log, end = installation.directory / "claims", installation.directory / "end"
    end.touch()
    other = CONSUME.replace('"notifications"', '"approvals"')
    process = installation.start_python(other, "ack", log, end)
    mine = queue.get_ack_queue("approvals")

    def drain(_):
        seen = []
        while True:
            try:
                row, text = mine.get_nowait()
            except queue.Empty:
                return seen
            assert mine.ack(row) == row
            seen.append(json.loads(text)["data"]["n"])

    with ThreadPoolExecutor(4) as pool:
        seen = [n for part in pool.map(drain, range(4)) for n in part]
    assert process.wait(30) == 0
    seen += map(int, log.read_text().split()) if log.exists() else []
    assert sorted(seen) == list(range(600))


@pytest.mark.parametrize("kind", ["get_queue", "get_ack_queue"])
def test_by_a_claim_while_another_connection_is_between_its_look_and_its_claim(
    installation, queue, monkeypatch, kind
):
    """Whoever looked and found one may still come second: then it has nothing, and raises nothing
    but Empty.
    """
    mine, look, overtakings = getattr(queue, kind)("notifications"), queue.look, []

    def overtaken(conn, name):
        found = look(conn, name)
        if found[0]:
            overtakings.append(installation.sqlite3("delete from notifications"))
        return found

    monkeypatch.setattr(queue, "look", overtaken)
    installation.enqueue("notifications", "t")
    with pytest.raises(queue.Empty):
        mine.get_nowait()
    installation.enqueue("notifications", "t")
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        mine.get(timeout=0.3)
    assert time.monotonic() - began >= 0.3 and len(overtakings) == 2
