"""enqueue.py's options and its lines of JSON mean the same, and nonsense is refused in one line."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line

COLUMNS = "status, due_at, priority, group_id, expires_at"


def row(installation, columns: str = COLUMNS):
    return installation.rows(f"select {columns} from notifications order by id desc limit 1")[0]


def put(installation, words: str, *more, **options) -> str:
    """Return what enqueue.py prints, but for the worker and the handler that are not there."""
    done = installation.run("enqueue.py", "notifications", *words.split(), *more, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return without_remarks(done.stdout)


def without_remarks(said: str) -> str:
    return re.sub(
        r"( \(|; )no (worker|handler) .*\)$", lambda m: ")" * (m[1] == "; "), said, flags=re.M
    )


def by_line(installation, **task) -> str:
    return put(installation, "--jsonl", input=json.dumps({"task_type": "t", **task}))


@pytest.mark.parametrize(
    ("name", "text", "seconds"),
    [("delay", "30", 30), ("delay", "10m", 600), ("delay", "1h30m", 5400), ("ttl", "2d", 172_800)],
)
def test_a_duration(installation, name, text, seconds):
    for way in (
        lambda: put(installation, f"t --{name} {text}"),
        lambda: by_line(installation, **{name: text}),
    ):
        began = time.time()
        way()
        status, due_at, _, _, expires_at = row(installation)
        when = due_at if name == "delay" else expires_at
        assert began + seconds <= when <= time.time() + seconds
        assert (status, due_at is None) == ((3, False) if name == "delay" else (1, True))


@pytest.mark.parametrize("zone, hour", [("", 14), ("Z", 9), ("+02:00", 7)])
def test_a_time_is_local_unless_it_has_a_zone(installation, zone, hour):
    moment, local = f"2050-12-01T09:00{zone}", {"TZ": "XXX+5"}
    put(installation, f"t --at {moment}", env=local)
    put(installation, "--jsonl", input=f'{{"task_type": "t", "at": "{moment}"}}', env=local)
    times = installation.rows("select datetime(due_at, 'unixepoch') from notifications")
    assert times == [(f"2050-12-01 {hour:02d}:00:00",)] * 2


def test_held_grouped_and_before_others(installation):
    put(installation, "t --hold --priority -5 --group", "a group")
    by_line(installation, hold=True, group="a group", priority=-5)
    assert (
        installation.rows(f"select {COLUMNS} from notifications")
        == [(3, None, -5, "a group", None)] * 2
    )
    # Options are for what a line does not say.
    lines = '{"task_type": "t", "group": "own"}\n{"task_type": "t"}\n'
    put(installation, "--jsonl --group all --priority 2", input=lines)
    terms = installation.rows("select group_id, priority from notifications where id > 2")
    assert terms == [("own", 2), ("all", 2)]


def test_a_window(installation, queue):
    assert put(installation, "t --task-id x --window 10m") == "queued x\n"
    assert queue.dequeue_task("notifications")
    assert put(installation, "t --task-id x --window 10m") == "duplicate x\n"
    assert put(installation, "t --task-id x") == "queued x\n"


def test_a_new_queue_is_remarked_on_unless_that_is_known(installation):
    for words, text in (
        ("notifications t --task-id a", "queued a\n"),
        ("notification t --task-id a", "queued a (a new queue: notification)\n"),
        ("notification t --task-id b", "queued b\n"),
        ("other t --task-id a --new", "queued a\n"),
        ("--hook third t", ""),
    ):
        stdin = "{}" if "--hook" in words else None
        done = installation.run("enqueue.py", *words.split(), input=stdin)
        assert (done.returncode, without_remarks(done.stdout), done.stderr) == (0, text, "")


def test_json_is_told_on_request_for_each_task(installation):
    done = installation.run("enqueue.py", *"fresh t {} --task-id j-1 --json".split())
    told = json.loads(done.stdout)
    notes = told.pop("notes")
    assert told == {"outcome": "queued", "task_id": "j-1", "queue": "fresh"}
    assert notes[0] == "a new queue: fresh" and len(notes) > 1
    lines = '{"task_type": "t", "task_id": "j-1"}\n{"task_type": "t", "task_id": "j-2"}\n'
    done = installation.run("enqueue.py", "fresh", "--jsonl", "--json", input=lines)
    outcomes = [json.loads(line)["outcome"] for line in done.stdout.splitlines()]
    assert outcomes == ["duplicate", "queued"]


def stored(installation) -> list[tuple]:
    return installation.rows("select json_extract(data, '$.data.n'), status from notifications")


@pytest.mark.parametrize("what", ["skip", "replace", "rerun"])
def test_on_duplicate_decides_what_becomes_of_a_task_that_waits_or_runs(installation, queue, what):
    put(installation, 't {"n":1} --task-id x')
    again = f"--task-id x --on-duplicate {what}"
    said = "duplicate x\n" if what == "skip" else "updated x\n"
    assert put(installation, f't {{"n":2}} {again}') == said
    assert stored(installation) == [(1 if what == "skip" else 2, 1)]
    assert by_line(installation, task_id="x", on_duplicate=what, data={"n": 3}) == said
    mine = queue.get_ack_queue("notifications")
    row_id, _ = mine.get(timeout=5)
    assert put(installation, f't {{"n":4}} {again}') == said
    assert stored(installation) == [(1 if what == "skip" else 3, 2)]
    mine.ack(row_id)
    assert stored(installation) == ([] if what == "skip" else [(4, 1)])


def test_json_in_utf_8_is_stored_right_whatever_the_locale(installation, tmp_path):
    """With a locale of Latin-1, Python takes each byte of an argument for a character."""
    place = tmp_path / "en_US.ISO-8859-1"
    define = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", place]
    if not shutil.which("localedef") or subprocess.run(define, capture_output=True).returncode:
        pytest.skip("this system cannot make a Latin-1 locale")
    installation.db = tmp_path / "state/tasks.db"
    env = installation.env | {
        "LOCPATH": str(tmp_path),
        "LC_ALL": place.name,
        "PYTHONUTF8": "0",
        "CLAUDE_PROJECT_DIR": "/größe",
        "TASK_QUEUE_STATE": str(tmp_path / "state"),
    }
    probe = [sys.executable, "-c", "import sys; print(ascii(sys.argv[1]))", "ü"]
    shown = subprocess.run(probe, env=env, capture_output=True, text=True).stdout
    assert shown == "'\\xc3\\xbc'\n", "so this test can fail"
    words = ["notifications", "prüfen", '{"wörter": "漁港"}', "--task-id", "id", "--group", "ß"]
    enqueue = [sys.executable, ROOT / "enqueue.py", *words]
    done = subprocess.run(enqueue, env=env, capture_output=True)
    # What it prints is Latin-1, too.
    assert (done.returncode, done.stdout[:9], done.stderr) == (0, b"queued id", b"")
    task_type, task_id, group, data = row(installation, "task_type, task_id, group_id, data")
    assert (task_type, task_id, group) == ("prüfen", "id", "ß")
    assert json.loads(data)["data"] == {"wörter": "漁港"}
    directory = tmp_path / "größe"
    directory.mkdir()
    hook = ("enqueue.py", "--hook", "notifications", "t")
    installation.run(*hook, env=env, input="{}", cwd=directory)
    told = json.loads(row(installation, "data")[0])["data"]
    assert told == {"workspace_path": str(directory), "project_dir": "/größe"}


# -------------------------------------------------------------------------------------------- bad input

WRONG_USE = [
    ["--delay", "soon"], ["--delay", "-1"], ["--delay", "nan"], ["--delay", "1e3"], ["--delay", "40y"], ["--delay", "9" * 20],
    ["--at", "tomorrow"], ["--at", "2026-13-01"], ["--at", "40000-01-01"], ["--at", "1000-01-01"], ["--at", ""],
    ["--ttl", "inf"], ["--ttl", ""], ["--window", "nan"], ["--wait", "nan"], ["--wait", "-1"], ["--priority", "1.5"],
    ["--priority", "9" * 5000], ["--on-duplicate", "maybe"], ["--on-duplicate", ""], ["--group-by", "workspace"],
    ["--hold", "--delay", "1"], ["--hold", "--at", "2050-01-01"], ["--at", "2050-01-01", "--delay", "1"], ["--hold=1"],
    ["--\x1b]0;title\x07"], ["--prioritty", "1"],
]  # fmt: skip
REFUSED = [["--priority", "1000001"], ["--group", ""], ["--group", "x" * 501], ["--group", "a\nb"], ["--task-id", ""]]  # fmt: skip
OF_A_HOOK = [["--group-by", "planet"], ["--group", "a", "--group-by", "session"], ["--wait", "nan"]]


def test_nonsense_is_refused_in_one_line(installation):
    def refused(code: int, *words) -> str:
        said = one_line(installation.run("enqueue.py", *words, input="{}"), code)
        assert said[:-1].isprintable()
        return said

    for args in WRONG_USE:
        said = refused(64, "notifications", "t", *args)
        assert args[0] != "--prioritty" or "(did you mean --priority?); see" in said
    for args in REFUSED:
        refused(65, "notifications", "t", *args)
    for args in OF_A_HOOK:
        refused(64, "--hook", "notifications", *args)
    assert not installation.rows("select * from notifications")


LINES = [
    {"delay": "soon"}, {"delay": -1}, {"at": "tomorrow"}, {"at": 4e20}, {"ttl": []}, {"ttl": -1},
    {"hold": 1}, {"hold": "yes"}, {"hold": True, "delay": 1}, {"group": 7}, {"group": ""}, {"group": "x" * 2**20}, {"priority": "1"},
    {"on_duplicate": "maybe"}, {"on_duplicate": []}, {"window": "x"}, {"firing": "x"}, {"depth": 1}, {"source": {}}, {"text": "x"},
]  # fmt: skip


def test_nonsense_in_a_line_is_refused_with_its_number(installation):
    for line in LINES:
        text = "\n".join(map(json.dumps, ({"task_type": "t"}, {"task_type": "t", **line})))
        done = installation.run("enqueue.py", "notifications", "--jsonl", input=text)
        assert len(one_line(done, 65, "line 2")) < 500
    assert not installation.rows("select * from notifications")


@pytest.mark.parametrize("way", ["word", "-", "--jsonl"])
def test_a_number_that_no_reader_reads_is_refused_by_name(installation, way):
    for number in ("1e400", "-1e999", "NaN", "9" * 5000, "1" + "0" * 400 + ".5", "9" * 250 + "e99", "[Infinity]"):  # fmt: skip
        raw = f'{{"text": "NaN 1e400", "n": {number}}}'
        words, stdin = ((raw,), None) if way == "word" else ((way,), raw)
        done = installation.run("enqueue.py", "notifications", "t", *words, input=stdin)
        one_line(done, 65, number.strip("[]")[:40])
    fine = '{"text": "NaN 1e400 Infinity", "n": [1e3, 0.0001, 1e-400, %s]}' % ("9" * 300)
    put(installation, "t -", input=fine)
    assert installation.rows("select count(*) from notifications") == [(1,)]
