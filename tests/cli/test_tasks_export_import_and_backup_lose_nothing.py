"""tasks.py export, import and backup: what goes out comes in, once, and no half file is ever left
behind.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading

from conftest import ROOT, Installation, one_line, wait_for

QUEUES = ("approvals", "completions", "notifications")
# A running task counts as ready, since that is what it is anywhere else.
LIVE = (
    "task_id, task_type, json(data), iif(status = 2, 1, status), priority, due_at, group_id,"
    " attempts, error, timestamp"
)
FINISHED = (
    "queue, task_id, task_type, status, json(data), priority, group_id, attempts, max_attempts,"
    " enqueued_at, started_at, completed_at, exit_code, result, log, error"
)


def content(installation) -> list:
    """Return every task there is, without its row id, which is each database's own."""
    live = [f"select '{queue}', {LIVE} from {queue} order by id" for queue in QUEUES]
    every = [*live, f"select {FINISHED} from task_history order by id"]
    return [row for statement in every for row in installation.rows(statement)]


def exported(installation, words: str = "") -> str:
    return installation.tq(f"export {words}").stdout


def imports(installation, text: str, new: int, known: int) -> None:
    told = installation.told("import -", input=text)
    assert told == {"imported": new, "already_there": known, "refused": []}


def filled(installation) -> None:
    """Make tasks of every state, bare and awkward ones among them, and a history."""
    installation.handler("good", "#!/bin/sh\necho 'result \"ä\"'; echo log >&2\n")
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    for name, task_type in (("g-1", "good"), ("b-1", "bad"), ("redriven", "bad")):
        installation.add(f"approvals {task_type} --task-id {name}")
    bare = '{"hook_event_name": "good", "bare": true}'
    installation.sqlite3(f"insert into approvals (data) values ('{bare}')")
    installation.drain("approvals")
    installation.tq("retry redriven")
    text = '{"text": "line\\nbreak \\" \\\\ \\u0000 \\u2028 ä 🙂"}'
    installation.add("approvals review --task-id", 'x "quoted" id', text)
    # This id was used before.
    installation.add("approvals review --task-id g-1 --priority 3", '{"n": 1}')
    installation.add("approvals review --task-id later --delay 500.25")
    installation.add("approvals review --task-id runs")
    runs = "status = 2, owner = 'x', attempts = 2, error = 'once'"
    installation.sqlite3(f"update approvals set {runs} where task_id = 'runs'")
    pretty = json.dumps({"big": 2**70, "float": 1.10, "nested": [[{}]]}, indent=2)
    pretty = pretty.replace("1.1", "1.10e400")
    installation.sqlite3(f"insert into notifications (data) values ('{pretty}')")


def test_an_export_with_history_makes_the_same_queue_elsewhere_once(installation, other):
    filled(installation)
    text = exported(installation, "--history")
    imports(other, text, 9, 0)
    here, there = ([row for row in content(place) if "notifications" not in row]
                   for place in (installation, other))  # fmt: skip
    assert here == there
    # A bare row gets an envelope, in which it keeps its name.
    [(name, data)] = other.rows("select task_id, data from notifications")
    assert name.startswith("notifications-1-")
    # A payload that readers of JSON cannot read is kept as text, whole.
    [(pretty,)] = installation.rows("select data from notifications")
    kept = json.loads(data)["data"]
    assert kept["unreadable_payload"] == pretty and "1.10e400 is" in kept["unreadable_because"]
    for place in (other, installation):
        before = content(place)
        imports(place, text, 0, 9)
        assert content(place) == before


def test_without_history_only_waiting_and_running_tasks_are_exported(installation):
    filled(installation)
    statuses = sorted(json.loads(line)["status"] for line in exported(installation).splitlines())
    assert statuses == ["in_progress", *["pending"] * 4, "scheduled"]
    [line] = exported(installation, "--queue notifications").splitlines()
    assert json.loads(line)["queue"] == "notifications"


def test_a_task_that_was_done_since_the_export_does_not_come_back(installation, queue):
    """SQLite's strftime() and ours round one time in sixty otherwise, which must not matter."""
    conn = queue.connect()
    with queue.transaction(conn):
        for number in range(400):
            data = f'{{"task_id": "t-{number}", "task_type": "good", "data": {{}}}}'
            row = (data, 1_700_000_000 + number * 0.000_837)
            conn.execute("insert into approvals (data, timestamp) values (?, ?)", row)
        conn.execute('insert into approvals (data) values (\'{ "hook_event_name":  "good" }\')')
    text = exported(installation)
    for task in queue.claim_ready(conn, "approvals", limit=500):
        with queue.transaction(conn):
            assert queue.ack(conn, task)
    before = content(installation)
    imports(installation, text, 0, 401)
    assert content(installation) == before


def test_a_queue_that_has_other_tasks_takes_all_of_them_in(installation, other):
    filled(installation)
    other.add("approvals mine --jsonl", input='{"mine": 1}\n' * 5)
    for n in range(2):
        other.sqlite3(f"insert into notifications (data) values ('{{\"mine\": {n}}}')")
    mine = content(other)
    text = exported(installation, "--history")
    imports(other, text, 9, 0)
    imports(other, text, 0, 9)
    after = content(other)
    assert [row for row in after if row in mine] == mine and len(after) == len(mine) + 9
    every = "select queue, row_id from task_history union all select 'approvals', id from approvals"
    ids = other.rows(every)
    assert len(ids) == len(set(ids)), "a row id was used twice"


def many(installation) -> None:
    """Make an export that takes a while."""
    installation.add("approvals review")
    installation.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)"
        " insert into approvals (data) select json_object('n', i, 'more', hex(zeroblob(20))) from n"
    )


def test_an_interrupted_export_leaves_the_old_file_and_no_half_one(installation):
    many(installation)
    target = installation.directory / "export" / "tasks.jsonl"
    target.parent.mkdir()
    target.write_text("the old one")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = installation.start("tasks.py", "export", target)
        wait_for(lambda: len(list(target.parent.iterdir())) == 2)
        process.send_signal(number)
        assert process.wait(10) == (-9 if number == signal.SIGKILL else 130)
        assert number == signal.SIGKILL or [*target.parent.iterdir()] == [target]
        assert target.read_text() == "the old one"
    installation.tq("export", target)
    assert target.read_bytes().count(b"\n") == 60_001 and target.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_said_and_leaves_nothing(installation):
    many(installation)
    target = installation.directory / "out" / "file"
    target.parent.mkdir()
    target.write_text("the old one")

    def little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    for command in ("export", "backup"):
        done = installation.run("tasks.py", command, target, preexec_fn=little_space)
        one_line(done, 1, f"{target} was not written")
        assert [*target.parent.iterdir()] == [target] and target.read_text() == "the old one"
    for name in ("/dev/full", "-"):
        with open("/dev/full", "wb") as full:
            export = [sys.executable, ROOT / "tasks.py", "export", name]
            done = subprocess.run(export, env=installation.env, stdout=full, stderr=-1, text=True)
        assert done.returncode == 1 and "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_an_export_whose_reader_goes_away_is_not_called_whole(installation):
    many(installation)
    line = '"$@" | head -1 | wc -l; echo ${PIPESTATUS[0]}'
    command = ["bash", "-c", line, "bash", sys.executable, ROOT / "tasks.py", "export"]
    done = subprocess.run(command, env=installation.env, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"]
    assert "not whole" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_backup_made_while_tasks_come_and_go_is_whole_and_can_be_used(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.add("approvals good --jsonl", input="{}\n" * 3_000)
    installation.worker("approvals", "--concurrency", "2")
    stop = threading.Event()

    def insert() -> None:
        conn = sqlite3.connect(installation.db, timeout=10, isolation_level=None)
        while not stop.is_set():
            # Both are stored, or none.
            conn.execute("begin immediate")
            for queue in ("notifications", "completions"):
                conn.execute(f"insert into {queue} (data) values ('{{}}')")
            conn.execute("commit")
        conn.close()

    thread = threading.Thread(target=insert)
    thread.start()
    target = installation.directory / "restored" / "tasks.db"
    target.parent.mkdir()
    tasks = "select (select count(*) from approvals) + (select count(*) from task_history)"
    pairs = "select (select count(*) from notifications) = (select count(*) from completions)"
    try:
        for _ in range(3):
            installation.tq("backup", target)
            assert [*target.parent.iterdir()] == [target]
            with sqlite3.connect(f"file:{target}?mode=ro", uri=True) as copy:
                for question, answer in (
                    (tasks, 3_000),
                    (pairs, 1),
                    ("pragma integrity_check", "ok"),
                ):
                    assert copy.execute(question).fetchall() == [(answer,)], question
            copy.close()
    finally:
        stop.set()
        thread.join()
    told = installation.told("stats", env={"TASK_QUEUE_STATE": str(target.parent)})
    assert sum(queue["pending"] for queue in told["queues"].values()) > 0


def test_random_exports_of_two_queues_meet_in_a_third_without_loss(installation, other, tmp_path):
    rng = random.Random(5)
    (tmp_path / "third").mkdir()
    third = Installation(tmp_path / "third")
    third.is_inside = other.is_inside = True
    for place in (installation, other):
        for _ in range(6):
            task_id, n = f"t-{rng.randrange(4)}", rng.randrange(4)
            place.add(f"approvals review --task-id {task_id}", json.dumps({"n": rng.random()}))
            place.sqlite3(f"insert into notifications (data) values (json_object('n', {n}))")
            if rng.random() < 0.4:
                place.run("tasks.py", "cancel", task_id)
    texts = [exported(place, "--history") for place in (installation, other)]
    for text in texts + texts:
        assert third.told("import -", input=text)["refused"] == []

    def found(statement: str) -> set:
        return {row for place in (installation, other) for row in place.rows(statement)}

    ended = "select task_id, enqueued_at from task_history"
    assert found(ended) <= set(third.rows(ended))
    assert found("select task_id from approvals") <= set(
        third.rows("select task_id from task_queue")
    )
    number = "coalesce(json_extract(data, '$.data.n'), json_extract(data, '$.n'))"
    for n in range(4):
        same = f"select count(*) from notifications where {number} = {n}"
        both = [place.rows(same)[0][0] for place in (installation, other)]
        assert max(both) <= third.rows(same)[0][0] <= sum(both)
