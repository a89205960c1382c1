"""enqueue.py's options, its lines of JSON, and bash's columns: each means the same, and nonsense is
refused in one line.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from crowd import PROCESSES, Crowd

COLUMNS = "status, due_at, priority, group_id, expires_at"


def row(installation, columns: str = COLUMNS):
    return installation.rows(f"select {columns} from notifications order by id desc limit 1")[0]


def put(installation, *args, **options) -> str:
    done = installation.run("enqueue.py", "notifications", *args, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return without_remarks(done.stdout)


def without_remarks(said: str) -> str:
    """What enqueue.py printed, but for the worker and the handler that are not there."""
    return re.sub(
        r"( \(|; )no (worker|handler) .*\)$", lambda m: ")" * (m[1] == "; "), said, flags=re.M
    )


# --------------------------------------------------------------------------------- one option at a time


@pytest.mark.parametrize("by", ["option", "line"])
@pytest.mark.parametrize(
    ("name", "text", "seconds"),
    [
        ("delay", "30", 30),
        ("delay", "10m", 600),
        ("delay", "1h30m", 5400),
        ("ttl", "1h", 3600),
        ("ttl", "2d", 172_800),
    ],
)
def test_a_duration(installation, by, name, text, seconds):
    began = time.time()
    if by == "option":
        put(installation, "t", f"--{name}", text)
    else:
        put(installation, "--jsonl", input=json.dumps({"task_type": "t", name: text}))
    status, due_at, _, _, expires_at = row(installation)
    when = due_at if name == "delay" else expires_at
    assert began + seconds <= when <= time.time() + seconds
    assert (status, due_at is None) == ((3, False) if name == "delay" else (1, True))


@pytest.mark.parametrize("zone", ["", "Z", "+02:00"])
def test_a_time_is_local_unless_it_has_a_zone(installation, zone):
    local = {"TZ": "XXX+5"}
    put(installation, "t", "--at", f"2050-12-01T09:00{zone}", env=local)
    put(
        installation,
        "--jsonl",
        input=json.dumps({"task_type": "t", "at": f"2050-12-01T09:00{zone}"}),
        env=local,
    )
    hour = {"": 14, "Z": 9, "+02:00": 7}[zone]
    times = installation.rows("select datetime(due_at, 'unixepoch') from notifications")
    assert times == [(f"2050-12-01 {hour:02d}:00:00",)] * 2


@pytest.mark.parametrize("by", ["option", "line"])
def test_held_grouped_and_before_others(installation, by):
    if by == "option":
        put(installation, "t", "--hold", "--group", "a group", "--priority", "-5")
    else:
        put(
            installation,
            "--jsonl",
            input='{"task_type": "t", "hold": true, "group": "a group", "priority": -5}',
        )
    assert row(installation) == (3, None, -5, "a group", None)
    assert installation.rows("select status from task_queue") == [("held",)]


def test_options_are_what_a_line_does_not_say(installation):
    lines = '{"task_type": "t", "group": "own"}\n{"task_type": "t"}\n'
    put(installation, "--jsonl", "--group", "all", "--priority", "2", input=lines)
    assert installation.rows("select group_id, priority from notifications order by id") == [
        ("own", 2),
        ("all", 2),
    ]


def test_a_window(installation, queue):
    assert put(installation, "t", "--task-id", "x", "--window", "10m") == "queued x\n"
    assert queue.dequeue_task("notifications")
    assert put(installation, "t", "--task-id", "x", "--window", "10m") == "duplicate x\n"
    assert put(installation, "t", "--task-id", "x") == "queued x\n"


def test_a_new_queue_is_remarked_on_unless_that_is_known(installation):
    assert put(installation, "t", "--task-id", "a") == "queued a\n"
    for args, text in (
        (["notification", "t", "--task-id", "a"], "queued a (a new queue: notification)\n"),
        (["notification", "t", "--task-id", "b"], "queued b\n"),
        (["other", "t", "--task-id", "a", "--new"], "queued a\n"),
        (["--hook", "third", "t"], ""),
    ):
        done = installation.run("enqueue.py", *args, input="{}" if "--hook" in args else None)
        assert (done.returncode, without_remarks(done.stdout), done.stderr) == (0, text, "")


def test_the_version(installation):
    done = installation.run("enqueue.py", "--version")
    assert done.returncode == 0 and done.stdout.startswith("enqueue.py 0.")


def test_json_in_utf_8_is_stored_right_whatever_the_locale(installation, tmp_path):
    """With a locale of Latin-1, Python takes each byte of an argument for a character."""
    localedef = shutil.which("localedef")
    made = (
        localedef
        and subprocess.run(
            [localedef, "-i", "en_US", "-f", "ISO-8859-1", tmp_path / "en_US.ISO-8859-1"],
            capture_output=True,
        ).returncode
    )
    if made != 0:
        pytest.skip("this system cannot make a Latin-1 locale")
    env = {
        "LOCPATH": str(tmp_path),
        "LC_ALL": "en_US.ISO-8859-1",
        "PYTHONUTF8": "0",
        "CLAUDE_PROJECT_DIR": "/größe",
    }
    installation.db = tmp_path / "state/tasks.db"
    env["TASK_QUEUE_STATE"] = str(tmp_path / "state")
    probe = subprocess.run(
        [sys.executable, "-c", "import sys; print(ascii(sys.argv[1]))", "ü"],
        env=installation.env | env,
        capture_output=True,
        text=True,
    )
    assert probe.stdout == "'\\xc3\\xbc'\n", "so this test can fail"
    words = ["notifications", "prüfen", '{"wörter": "漁港"}', "--task-id", "id", "--group", "ß"]
    done = subprocess.run(
        [sys.executable, ROOT / "enqueue.py", *words],
        env=installation.env | env,
        capture_output=True,
    )
    # What it prints is Latin-1, too.
    assert (done.returncode, done.stdout[:9], done.stderr) == (0, b"queued id", b"")
    [(task_type, task_id, group, data)] = installation.rows(
        "select task_type, task_id, group_id, data from notifications"
    )
    assert (task_type, task_id, group, json.loads(data)["data"]) == (
        "prüfen",
        "id",
        "ß",
        {"wörter": "漁港"},
    )
    directory = tmp_path / "größe"
    directory.mkdir()
    done = installation.run(
        "enqueue.py", "--hook", "notifications", "t", env=env, input="{}", cwd=directory
    )
    told = json.loads(row(installation, "data")[0])["data"]
    assert told == {"workspace_path": str(directory), "project_dir": "/größe"}


# ------------------------------------------------------------------------------------------- duplicates


def stored(installation) -> list[tuple]:
    return installation.rows("select json_extract(data, '$.data.n'), status from notifications")


@pytest.mark.parametrize("what", ["skip", "replace", "rerun"])
def test_of_a_task_that_waits_only_skip_keeps_the_old_data(installation, what):
    put(installation, "t", '{"n": 1}', "--task-id", "x")
    said = put(installation, "t", '{"n": 2}', "--task-id", "x", "--on-duplicate", what)
    assert said == ("duplicate x\n" if what == "skip" else "updated x\n")
    assert stored(installation) == [(1 if what == "skip" else 2, 1)]
    lines = '{"task_type": "t", "task_id": "x", "on_duplicate": "replace", "data": {"n": 3}}\n{"task_type": "t", "task_id": "x"}'
    assert put(installation, "--jsonl", input=lines) == "updated x\nduplicate x\n"
    assert stored(installation) == [(3, 1)]


@pytest.mark.parametrize("what", ["replace", "rerun"])
def test_of_a_task_that_runs_the_latest_data_runs_once_more(installation, queue, what):
    put(installation, "t", '{"n": 1}', "--task-id", "x")
    mine = queue.get_ack_queue("notifications")
    row_id, _ = mine.get(timeout=5)
    for number in (2, 3):
        assert (
            put(installation, "t", f'{{"n": {number}}}', "--task-id", "x", "--on-duplicate", what)
            == "updated x\n"
        )
    assert stored(installation) == [(1, 2)]
    mine.ack(row_id)
    assert stored(installation) == [(3, 1)] and row(installation, "attempts") == (0,)


def test_a_debounce_waits_from_the_last_call(installation):
    for _ in range(2):
        began = time.time()
        put(installation, "t", "--task-id", "x", "--on-duplicate", "replace", "--delay", "1h")
    assert (
        installation.rows("select count(*) from notifications") == [(1,)]
        and row(installation, "due_at")[0] >= began + 3600
    )


@pytest.mark.parametrize("what", ["skip", "replace", "rerun"])
def test_fifty_at_once_make_one_waiting_task(installation, queue, what):
    queue.connect()
    crowd = Crowd(installation, what, 8, task_id="x{}")
    crowd.start(8)
    crowd.wait(8)
    told = crowd.told()
    winners = [n for word, n in told if word == "new"]
    assert len(told) == 8 * PROCESSES and len(winners) == 8
    found = dict(
        installation.rows("select task_id, json_extract(data, '$.data.n') from notifications")
    )
    assert len(found) == 8 and installation.rows("select count(*) from notifications") == [(8,)]
    if what == "skip":
        assert found == {f"x{n.split('-')[0]}": n for n in winners}


@pytest.mark.parametrize("what", ["skip", "replace", "rerun"])
def test_fifty_at_once_while_it_runs_make_one_more_run_or_none(installation, queue, what):
    mine = queue.get_ack_queue("notifications")
    for number in range(6):
        queue.enqueue_task("notifications", "t", {}, f"x{number}")
    claimed = [mine.get(timeout=5)[0] for _ in range(6)]
    crowd = Crowd(installation, what, 6, task_id="x{}")
    crowd.start(6)
    crowd.wait(6)
    assert [word for word, _ in crowd.told()] == ["old"] * 6 * PROCESSES
    for row_id in claimed:
        mine.ack(row_id)
    again = installation.rows(
        "select task_id, attempts, json_extract(data, '$.data.n') is null from notifications order by task_id"
    )
    assert again == ([] if what == "skip" else [(f"x{number}", 0, 0) for number in range(6)])


def test_no_change_is_missed_while_runs_end(installation, queue):
    """The last of many calls is seen by a run that began after it, whenever runs end; and they do
    not pile up.
    """
    queue.connect()
    runs, over = [], threading.Event()

    def work():
        mine = queue.get_ack_queue("notifications")
        while True:
            is_over = over.is_set()
            try:
                row_id, text = mine.get(timeout=0.05)
            except queue.Empty:
                if is_over:
                    return
                continue
            runs.append(json.loads(text)["data"]["n"])
            mine.ack(row_id)

    worker = threading.Thread(target=work)
    worker.start()
    for number in range(300):
        queue.enqueue_task("notifications", "t", {"n": number}, "x", on_duplicate="rerun")
    over.set()
    worker.join(60)
    assert not worker.is_alive() and runs[-1] == 299 and runs == sorted(set(runs))


# -------------------------------------------------------------------------------------------- bad input


WRONG_USE = [
    ["--delay", "soon"], ["--delay", "-1"], ["--delay", "nan"], ["--delay", "1e3"], ["--delay", "40y"], ["--delay", "9" * 20],
    ["--at", "tomorrow"], ["--at", "2026-13-01"], ["--at", "40000-01-01"], ["--at", "1000-01-01"], ["--at", ""],
    ["--ttl", "inf"], ["--ttl", ""], ["--window", "nan"], ["--wait", "nan"], ["--wait", "-1"], ["--priority", "1.5"],
    ["--priority", "9" * 5000], ["--on-duplicate", "maybe"], ["--on-duplicate", ""], ["--group-by", "workspace"],
    ["--hold", "--delay", "1"], ["--hold", "--at", "2050-01-01"], ["--at", "2050-01-01", "--delay", "1"], ["--hold=1"],
    ["--\x1b]0;title\x07"],
]  # fmt: skip
REFUSED = [
    ["--priority", "1000001"],
    ["--group", ""],
    ["--group", "x" * 501],
    ["--group", "a\nb"],
    ["--task-id", ""],
]


@pytest.mark.parametrize(
    ("args", "code"),
    [*((args, 64) for args in WRONG_USE), *((args, 65) for args in REFUSED)],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(installation, args, code):
    done = installation.run("enqueue.py", "notifications", "t", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    assert "Traceback" not in done.stderr and done.stderr[:-1].isprintable()
    assert not installation.rows("select * from notifications")


@pytest.mark.parametrize(
    "args", [["--group-by", "planet"], ["--group", "a", "--group-by", "session"], ["--wait", "nan"]]
)
def test_nonsense_told_to_a_hook_is_refused_in_one_line(installation, args):
    done = installation.run("enqueue.py", "--hook", "notifications", *args, input="{}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1), done.stderr


LINES = [
    {"delay": "soon"}, {"delay": -1}, {"at": "tomorrow"}, {"at": 4e20}, {"ttl": []}, {"ttl": -1},
    {"hold": 1}, {"hold": "yes"}, {"hold": True, "delay": 1}, {"group": 7}, {"group": ""}, {"group": "x" * 2**20}, {"priority": "1"},
    {"on_duplicate": "maybe"}, {"on_duplicate": []}, {"window": "x"}, {"firing": "x"}, {"depth": 1}, {"source": {}}, {"text": "x"},
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: str(line)[:40])
def test_nonsense_in_a_line_is_refused_with_its_number(installation, line):
    lines = [{"task_type": "t"}, {"task_type": "t", **line}]
    done = installation.run(
        "enqueue.py", "notifications", "--jsonl", input="\n".join(map(json.dumps, lines))
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (65, "", 1), done.stderr
    assert "line 2" in done.stderr and "Traceback" not in done.stderr and len(done.stderr) < 500
    assert not installation.rows("select * from notifications")


@pytest.mark.parametrize(
    "number",
    ["1e400", "-1e999", "NaN", "9" * 5000, "1" + "0" * 400 + ".5", "9" * 250 + "e99", "[Infinity]"],
)
@pytest.mark.parametrize("way", ["word", "stdin", "line"])
def test_a_number_that_no_reader_reads_is_refused_by_name(installation, number, way):
    raw = f'{{"text": "NaN 1e400", "n": {number}}}'
    args = {"word": ["t", raw], "stdin": ["t", "-"], "line": ["t", "--jsonl"]}[way]
    done = installation.run(
        "enqueue.py", "notifications", *args, input=None if way == "word" else raw
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (65, "", 1)
    assert number.strip("[]")[:40] in done.stderr
    put(
        installation,
        "t",
        "-",
        input='{"text": "NaN 1e400 Infinity", "n": [1e3, 0.0001, 1e-400, %s]}' % ("9" * 300),
    )
    assert installation.rows("select count(*) from notifications") == [(1,)]


COLUMNS_OF_BASH = {
    "priority": ["'high'", "1.5", "null", "1000001", "x'00'"],
    "due_at": ["'tomorrow'", "1200105417600", "-1", "9e999", "x'00'"],
    "expires_at": ["'1h'", "1200105417600", "-0.5"],
    "group_id": [
        "''",
        "replace(hex(zeroblob(524288)), '00', 'x')",
        "x'00'",
        "replace(hex(zeroblob(500)), '00', 'xy')",
    ],
}


@pytest.mark.parametrize(
    ("column", "value"), [(c, v) for c, values in COLUMNS_OF_BASH.items() for v in values]
)
def test_nonsense_in_a_column_is_refused_at_the_insert_of_bash(installation, queue, column, value):
    queue.connect()
    statement = f"insert into notifications (data, {column}) values ('{{}}', {value})"
    done = subprocess.run(["sqlite3", installation.db, statement], capture_output=True, text=True)
    assert done.returncode != 0 and "constraint failed" in done.stderr, done.stderr
    assert not installation.rows("select * from notifications")


def test_what_bash_says_in_columns_means_the_same_as_options(installation, queue):
    queue.connect()
    installation.sqlite3(
        "insert into notifications (data, priority, group_id, due_at, expires_at) "
        "values ('{}', 5, 'g', unixepoch('2050-01-01'), unixepoch('2051-01-01'))"
    )
    of_bash = row(installation)
    put(
        installation,
        "t",
        "--priority",
        "5",
        "--group",
        "g",
        "--at",
        "2050-01-01T00:00Z",
        "--ttl",
        "1d",
    )
    assert of_bash[:4] == row(installation)[:4] == (3, 2524608000.0, 5, "g") and os.path.exists(
        installation.db
    )


def test_json_is_told_on_request_for_each_task(installation):
    done = installation.run("enqueue.py", "fresh", "t", "{}", "--task-id", "j-1", "--json")
    told = json.loads(done.stdout)
    notes = told.pop("notes")
    assert told == {"outcome": "queued", "task_id": "j-1", "queue": "fresh"}
    assert notes[0] == "a new queue: fresh" and len(notes) > 1
    lines = '{"task_type": "t", "task_id": "j-1"}\n{"task_type": "t", "task_id": "j-2"}\n'
    done = installation.run("enqueue.py", "fresh", "--jsonl", "--json", input=lines)
    outcomes = [json.loads(line)["outcome"] for line in done.stdout.splitlines()]
    assert outcomes == ["duplicate", "queued"]
    done = installation.run("enqueue.py", "fresh", "t", "--prioritty", "1")
    assert done.returncode == 64
    assert "--prioritty not recognized (did you mean --priority?); see" in done.stderr
