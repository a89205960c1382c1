"""tasks.py export, import and backup: what goes out comes in, once, and no half file is ever left
behind.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, Installation, wait_for

QUEUES = ("approvals", "completions", "notifications")
LIVE = (
    "task_id, task_type, json(data), status, priority, due_at, group_id, attempts, error, timestamp"
)
FINISHED = (
    "queue, task_id, task_type, status, json(data), priority, group_id, attempts, max_attempts, enqueued_at, started_at, "
    "completed_at, exit_code, result, log, error"
)


@pytest.fixture
def other(tmp_path):
    """A second installation."""
    directory = tmp_path / "other"
    directory.mkdir()
    return Installation(directory)


def content(installation) -> list:
    """Every task there is; a running one counts as ready, since that is what it is anywhere else.
    Row ids are each database's own.
    """
    live = [
        row
        for queue in QUEUES
        for row in installation.rows(f"select '{queue}', {LIVE} from {queue} order by id")
    ]
    live = [
        tuple(1 if place == 4 and value == 2 else value for place, value in enumerate(row))
        for row in live
    ]
    return live + installation.rows(f"select {FINISHED} from task_history order by id")


def exported(installation, *args) -> str:
    done = installation.run("tasks.py", "export", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(installation, text: str, code: int = 0) -> dict:
    done = installation.run("tasks.py", "import", "-", "--json", input=text)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def filled(installation) -> None:
    """Tasks of every state, bare and awkward ones among them, and a history."""
    installation.handler("good", "#!/bin/sh\necho 'result \"ä\"'; echo log >&2\n")
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    for name, task_type in (("g-1", "good"), ("b-1", "bad"), ("redriven", "bad")):
        installation.enqueue("approvals", task_type, "{}", "--task-id", name)
    installation.sqlite3(
        'insert into approvals (data) values (\'{"hook_event_name": "good", "bare": true}\')'
    )
    assert (
        installation.run(
            "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    assert installation.run("tasks.py", "retry", "redriven").returncode == 0
    installation.enqueue(
        "approvals",
        "review",
        '{"text": "line\\nbreak \\" \\\\ \\u0000 \\u2028 ä 🙂"}',
        "--task-id",
        'x "quoted" id',
    )
    # This id was used before.
    installation.enqueue("approvals", "review", '{"n": 1}', "--task-id", "g-1", "--priority", "3")
    installation.enqueue("approvals", "review", "{}", "--task-id", "later", "--delay", "500.25")
    installation.enqueue("approvals", "review", "{}", "--task-id", "runs")
    installation.sqlite3(
        "update approvals set status = 2, owner = 'x', attempts = 2, error = 'once' where task_id = 'runs'"
    )
    pretty = json.dumps({"big": 2**70, "float": 1.10, "nested": [[{}]]}, indent=2).replace(
        "1.1", "1.10e400"
    )
    installation.sqlite3(f"insert into notifications (data) values ('{pretty}')")


def test_an_export_with_history_makes_the_same_queue_elsewhere(installation, other):
    filled(installation)
    text = exported(installation, "--history")
    assert imported(other, text) == {"imported": 9, "already_there": 0, "refused": []}
    here, there = content(installation), content(other)
    # A bare row gets an envelope, in which it keeps its name.
    assert [row for row in there if "notifications" not in row] == [
        row for row in here if "notifications" not in row
    ]
    [(name, data)] = other.rows("select task_id, data from notifications")
    assert name.startswith("notifications-1-")
    # A payload that readers of JSON cannot read is kept as text, whole.
    [(pretty,)] = installation.rows("select data from notifications")
    kept = json.loads(data)["data"]
    assert kept["unreadable_payload"] == pretty and "1.10e400 is" in kept["unreadable_because"]
    assert imported(installation, text) == {"imported": 0, "already_there": 9, "refused": []}


def test_without_history_only_waiting_and_running_tasks_are_exported(installation):
    filled(installation)
    statuses = sorted(json.loads(line)["status"] for line in exported(installation).splitlines())
    assert statuses == ["in_progress", "pending", "pending", "pending", "pending", "scheduled"]
    lines = exported(installation, "--queue", "notifications").splitlines()
    assert [json.loads(line)["queue"] for line in lines] == ["notifications"]


def test_importing_twice_changes_nothing_neither_here_nor_elsewhere(installation, other):
    filled(installation)
    text = exported(installation, "--history")
    imported(other, text)
    for place in (other, installation):
        before = content(place)
        assert imported(place, text) == {"imported": 0, "already_there": 9, "refused": []}
        assert content(place) == before


def test_a_task_that_was_done_since_the_export_does_not_come_back(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "g-1")
    installation.sqlite3(
        'insert into notifications (data) values (\'{ "hook_event_name":  "good" }\')'
    )
    text = exported(installation)
    installation.run(
        "worker.py", "approvals", "notifications", "--handlers", installation.handlers, "--drain"
    )
    before = content(installation)
    assert imported(installation, text) == {"imported": 0, "already_there": 2, "refused": []}
    assert content(installation) == before


def test_a_finished_task_is_known_whatever_its_time(installation, queue):
    """SQLite's strftime() and ours round one time in sixty otherwise, which must not matter."""
    conn = queue.connect()
    times = [1_700_000_000 + number * 0.000_837 for number in range(400)]
    with queue.transaction(conn):
        for number, timestamp in enumerate(times):
            data = f'{{"task_id": "t-{number}", "task_type": "good", "data": {{}}}}'
            conn.execute("insert into approvals (data, timestamp) values (?, ?)", (data, timestamp))
    text = exported(installation)
    for task in queue.claim_ready(conn, "approvals", limit=len(times)):
        with queue.transaction(conn):
            assert queue.ack(conn, task)
    assert imported(installation, text) == {
        "imported": 0,
        "already_there": len(times),
        "refused": [],
    }


def test_a_queue_that_has_other_tasks_takes_all_of_them_in(installation, other):
    filled(installation)
    other.enqueue("approvals", "mine", "--jsonl", input='{"mine": 1}\n' * 5)
    for n in range(2):
        other.sqlite3(f"insert into notifications (data) values ('{{\"mine\": {n}}}')")
    mine = content(other)
    text = exported(installation, "--history")
    assert imported(other, text)["imported"] == 9
    assert imported(other, text) == {"imported": 0, "already_there": 9, "refused": []}
    after = content(other)
    assert [row for row in after if row in mine] == mine
    assert len(after) == len(mine) + 9
    ids = other.rows(
        "select queue, row_id from task_history union all select 'approvals', id from approvals"
    )
    assert len(ids) == len(set(ids)), "a row id was used twice"
    (bare,) = other.rows(
        "select task_id, json_type(data, '$.data.unreadable_payload') from notifications where task_id is not null"
    )
    assert bare[0].startswith("notifications-1-") and bare[1] == "text"


def test_bad_lines_are_named_and_the_others_come_in(installation):
    good = {"queue": "approvals", "id": 1, "task_id": "ok", "task_type": "t", "status": "pending", "enqueued_at": 1.5,
            "data": {"task_id": "ok", "task_type": "t", "data": {}}}  # fmt: skip
    bad = [b"{", b"[]", b"\xff\xfe", json.dumps(good | {"queue": "x; drop table approvals"}), json.dumps(good | {"data": []}),
           json.dumps(good | {"id": "one"}), json.dumps(good | {"status": "odd"}), json.dumps({"queue": "approvals"}),
           json.dumps(good | {"status": "completed"}), json.dumps(good | {"id": 2**80}), "[" * 5000,
           json.dumps(good | {"enqueued_at": None}), json.dumps(good | {"status": "scheduled"})]  # fmt: skip
    lines = [
        line if isinstance(line, bytes) else line.encode() for line in [*bad, json.dumps(good), b""]
    ]
    done = installation.run("tasks.py", "import", "-", input=b"\n".join(lines))
    assert done.returncode == 65, done.stderr
    named = [int(line.split("line ")[1].split()[0]) for line in done.stderr.splitlines()]
    assert sorted(named) == list(range(1, len(bad) + 1)), done.stderr
    assert "Traceback" not in done.stderr
    assert installation.rows("select queue, task_id from task_queue") == [("approvals", "ok")]


def test_an_interrupted_export_leaves_the_old_file_and_no_half_one(installation):
    installation.enqueue("approvals", "review", "--jsonl", input='{"a": "' + "x" * 300 + '"}\n' * 1)
    installation.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000) insert into approvals (data) "
        "select json_object('n', i, 'more', 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx') from n"
    )
    target = installation.directory / "export" / "tasks.jsonl"
    target.parent.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        target.write_text("the old one")
        process = installation.start("tasks.py", "export", target)
        wait_for(lambda: len(list(target.parent.iterdir())) == 2)
        process.send_signal(number)
        assert process.wait(10) == 130
        assert [path.name for path in target.parent.iterdir()] == [
            "tasks.jsonl"
        ] and target.read_text() == "the old one"
    process = installation.start("tasks.py", "export", target)
    wait_for(lambda: len(list(target.parent.iterdir())) == 2)
    process.kill()
    process.wait()
    assert target.read_text() == "the old one"
    assert installation.run("tasks.py", "export", target).returncode == 0
    assert target.read_bytes().count(b"\n") == 60_001 and target.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_said_and_leaves_nothing(installation):
    installation.enqueue(
        "approvals",
        "review",
        "--jsonl",
        input=json.dumps({"a": "x" * 1000}) + "\n" + "{}\n" * 30_000,
    )
    target = installation.directory / "out" / "file"
    target.parent.mkdir()
    target.write_text("the old one")

    def little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    for command in ("export", "backup"):
        done = installation.run("tasks.py", command, target, preexec_fn=little_space)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{target} was not written" in done.stderr and "Traceback" not in done.stderr
        assert [path.name for path in target.parent.iterdir()] == [
            "file"
        ] and target.read_text() == "the old one"
    for target in ("/dev/full", "-"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, ROOT / "tasks.py", "export", target],
                check=False,
                env=installation.env,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert (
            done.returncode == 1
            and "No space left on device" in done.stderr
            and len(done.stderr.splitlines()) == 1
        )


def test_a_small_file_system_that_fills_up_is_said_and_left_clean(installation):
    script = 'mount -t tmpfs -o size=500k none "$1" && { shift; "$@"; echo "code $?"; ls -A "$HOME/small"; }'
    small = installation.directory / "small"
    small.mkdir()
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", small, "true"],
        check=False,
        env=installation.env,
        capture_output=True,
    ).returncode:
        pytest.skip("no private mounts here")
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 10_000)
    for command in ("export", "backup"):
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", small, sys.executable, ROOT / "tasks.py", command, small / "f"], check=False,
                              env=installation.env, capture_output=True, text=True)  # fmt: skip
        assert done.stdout == "code 1\n", done
        assert (
            f"{small / 'f'} was not written" in done.stderr and len(done.stderr.splitlines()) == 1
        )


def test_an_export_whose_reader_goes_away_is_not_called_whole(installation):
    installation.enqueue("approvals", "review", "--jsonl", input="{}\n" * 20_000)
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$@" | head -1 | wc -l; echo ${PIPESTATUS[0]}',
            "bash",
            sys.executable,
            ROOT / "tasks.py",
            "export",
        ],
        check=False,
        env=installation.env,
        capture_output=True,
        text=True,
    )
    assert (
        done.stdout.split() == ["1", "1"]
        and "not whole" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_a_backup_made_while_tasks_come_and_go_is_whole_and_can_be_restored(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.enqueue("approvals", "good", "--jsonl", input="{}\n" * 3_000)
    installation.worker("approvals", "--concurrency", "2")
    stop = threading.Event()

    def insert() -> None:
        conn = sqlite3.connect(installation.db, timeout=10, isolation_level=None)
        while not stop.is_set():
            with conn:
                conn.execute("begin immediate")
                # Both are moved, or none.
                for queue in ("notifications", "completions"):
                    conn.execute(f"insert into {queue} (data) values ('{{}}')")
        conn.close()

    thread = threading.Thread(target=insert)
    thread.start()
    target = installation.directory / "back up's"
    try:
        for _ in range(3):
            done = installation.run("tasks.py", "backup", target)
            assert done.returncode == 0, done.stderr
            assert [path.name for path in target.parent.glob("*back up*")] == ["back up's"]
            with sqlite3.connect(f"file:{target}?mode=ro", uri=True) as copy:
                assert copy.execute("pragma integrity_check").fetchall() == [("ok",)]
                (tasks,) = copy.execute(
                    "select (select count(*) from approvals) + (select count(*) from task_history)"
                ).fetchone()
                assert tasks == 3_000, "a task was lost or doubled between two tables"
                assert (
                    len(
                        {
                            copy.execute(f"select count(*) from {name}").fetchone()
                            for name in ("notifications", "completions")
                        }
                    )
                    == 1
                )
    finally:
        stop.set()
        thread.join()
    restored = Path(installation.directory / "restored")
    restored.mkdir()
    (restored / "tasks.db").write_bytes(target.read_bytes())
    done = installation.run("tasks.py", "stats", "--json", env={"TASK_QUEUE_STATE": str(restored)})
    assert (
        done.returncode == 0
        and sum(queue["pending"] for queue in json.loads(done.stdout)["queues"].values()) > 0
    )


def test_a_backup_never_goes_over_the_database_itself(installation):
    installation.enqueue("approvals", "review")
    link = installation.directory / "link"
    os.symlink(installation.db, link)
    for target in (
        installation.db,
        link,
        installation.directory,
        installation.directory / "missing" / "file",
        "/",
        "",
    ):
        done = installation.run("tasks.py", "backup", target)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    for target in (installation.directory, installation.directory / "missing" / "file", "/", ""):
        done = installation.run("tasks.py", "export", target)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert installation.rows("select count(*) from approvals") == [(1,)]


def test_random_exports_of_two_queues_meet_in_a_third_without_loss(installation, other, tmp_path):
    rng = random.Random(5)
    (tmp_path / "third").mkdir()
    third = Installation(tmp_path / "third")
    for place in (installation, other):
        for _ in range(6):
            task_id = f"t-{rng.randrange(4)}"
            place.enqueue(
                "approvals", "review", json.dumps({"n": rng.random()}), "--task-id", task_id
            )
            place.sqlite3(
                f"insert into notifications (data) values (json_object('n', {rng.randrange(4)}))"
            )
            if rng.random() < 0.4:
                place.run("tasks.py", "cancel", task_id)
    texts = [exported(place, "--history") for place in (installation, other)]
    for text in texts + texts:
        assert imported(third, text)["refused"] == []
    wanted = {
        row
        for place in (installation, other)
        for row in place.rows("select task_id, enqueued_at from task_history")
    }
    assert wanted <= set(third.rows("select task_id, enqueued_at from task_history"))
    live = {
        row
        for place in (installation, other)
        for row in place.rows("select task_id from approvals")
    }
    assert live <= set(third.rows("select task_id from task_queue"))
    for n in range(4):
        count = f"select count(*) from notifications where coalesce(json_extract(data, '$.data.n'), json_extract(data, '$.n')) = {n}"
        both = [place.rows(count)[0][0] for place in (installation, other)]
        assert max(both) <= third.rows(count)[0][0] <= sum(both)
