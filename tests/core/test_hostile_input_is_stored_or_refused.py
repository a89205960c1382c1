"""Whatever comes in as a queue's name, a task's type or a payload is stored verbatim, or refused
clearly.
"""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, one_line

from queue_helpers import DEFAULT_QUEUES, HISTORY_SCHEMA

ENQUEUE = ROOT / "enqueue.py"

QUEUE_NAMES = [
    "", " ", "a b", "Notifications", "1st", "_x", "a-b", "a.b", "a/b", "../x", "x" * 64, "tasks;", "a'b", 'a"b', "a`b", "a\nb", "a\0b",
    "ä", "task_history", "task_queue", "task_x", "sqlite_master", "sqlite_x", "notifications\n", "{queue}", "notifications.ready",
    'x"; drop table notifications; --',
]  # fmt: skip
NO_NAMES = [None, 7, b"notifications", ["notifications"]]

TASK_TYPES_TAKEN = ["link validation", "a'b", 'a"b', "a`b`", "$(reboot)", "a;b", "ä–😀", "a..b", "{queue}", "a" * 200, "x\\y", "%s",
                    "null"]  # fmt: skip
TASK_TYPES_REFUSED = ["", "a\nb", "a\0b", "\x1b[31m", "../x", "a/b", "/bin/sh", ".hidden", "..", "-x", "a" * 201, "ä" * 101,
                      "\ud800", "a\x7f", "a\x85b"]  # fmt: skip

PAYLOADS_TAKEN = {
    "quotes": {"text": 'it\'s "quoted" `so` $(so) \\ ; -- /* */'},
    "newlines": {"text": "a\nb\r\nc\u2028d\x85e\td"},
    "NUL": {"te\0xt": "a\0b"},
    "control characters": {"text": "".join(map(chr, range(32))) + "\x7f"},
    "paths": {"path": "../../../etc/passwd", "workspace_path": "/no/such/../place"},
    "a megabyte": {"text": "ä" * 2**20},
    "lone surrogates": {"te\udfffxt": "\ud800 \udc00\ud800"},
    "emoji": {"text": "😀\U0010ffff\uffff\ufeff"},
    "keys of the envelope": {
        "task_id": "x",
        "task_type": "y",
        "data": {"data": {}},
        "enqueued_at": None,
    },
    "SQL": {"text": "'); drop table notifications; --", "{queue}": "{queue}", ":id": "?"},
    "numbers": {"n": [0, -1, 2**53 + 1, 10**300, -(10**4000), 1.5e-300, 0.1]},
    "deep": {"a": json.loads("[" * 400 + "]" * 400)},
    "wide": {str(n): n for n in range(20_000)},
    "empty": {"": {"": [{}, [], "", None, True, False]}},
}
PAYLOADS_REFUSED = {
    "NaN": {"n": math.nan},
    "infinity": {"n": [-math.inf]},
    "bytes": {"b": b"x"},
    "a set": {"s": {1}},
    "a tuple as key": {("a",): 1},
    "an array": [1],
    "text": '{"a": 1}',
    "nothing": None,
    "too deep": None,
    "a circle": None,
    "too long a number": {"n": 10**5000},
}
_deep = _circle = {}
for _ in range(100_000):
    _deep = {"a": _deep}
_circle = {}
_circle["a"] = _circle
PAYLOADS_REFUSED |= {"too deep": _deep, "a circle": _circle}


def nothing_stored(installation) -> bool:
    """Nothing in any queue, history or spool, and no table that is not ours."""
    tables = [
        name for (name,) in installation.rows("select name from sqlite_master where type = 'table'")
    ]
    ours = {
        *DEFAULT_QUEUES,
        "sqlite_sequence",
        *re.findall("table if not exists (\\w+)", HISTORY_SCHEMA),
    }
    return (
        set(tables) <= ours
        and not any(
            installation.rows(f"select 1 from {table}")
            for table in tables
            if table != "sqlite_sequence"
        )
        and not list(installation.state.glob("spool/*/*"))
    )


def refused(installation, done, code=65) -> str:
    one_line(done, code)
    assert done.stderr.startswith("enqueue.py: ") and done.stderr.endswith("\n")
    assert nothing_stored(installation)
    return done.stderr


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", [*QUEUE_NAMES, *NO_NAMES], ids=repr)
def test_a_queue_name_is_refused_by_everything_that_takes_one(installation, queue, name):
    for refusing in (
        lambda: queue.enqueue_task(name, "t", {}),
        lambda: queue.enqueue_tasks(name, []),
        lambda: queue.get_queue(name),
        lambda: queue.get_ack_queue(name),
        lambda: queue.dequeue_task(name),
        lambda: queue.SQLiteQueue(str(installation.state), name),
        lambda: queue.SQLiteAckQueue(str(installation.state), name=name),
        lambda: queue.on_queue(queue.CLAIM, name),
        lambda: queue.spool(name, "{}"),
    ):
        with pytest.raises(
            (queue.InvalidTask, TypeError) if isinstance(name, list) else queue.InvalidTask
        ) as caught:
            refusing()
        assert "\n" not in str(caught.value)
    assert nothing_stored(installation)


def test_a_queue_name_is_refused_by_enqueue_py(installation):
    names = [name for name in QUEUE_NAMES if "\0" not in name]
    for name in [*names[::3], "../x", os.fsdecode(b"a\xff")]:
        message = refused(installation, installation.run("enqueue.py", name, "t"))
        assert "queue" in message


def test_a_queue_name_that_is_a_word_of_sql_works(installation, queue):
    for name in ("select", "order", "index", "null", "rowid", "a" * 63, "tasks", "taskx"):
        installation.enqueue(name, "t", '{"a": 1}')
        mine = queue.get_ack_queue(name)
        row_id, _ = mine.get(timeout=5)
        assert mine.ack(row_id) == row_id and mine.acked_count() == 1 and mine.empty()


@pytest.mark.parametrize("task_type", TASK_TYPES_TAKEN, ids=repr)
def test_a_task_type_is_stored_verbatim(installation, queue, task_type):
    queue.enqueue_task("notifications", task_type, {})
    assert installation.rows("select task_type from notifications") == [(task_type,)]
    assert queue.dequeue_task("notifications")["task_type"] == task_type
    assert installation.rows("select task_type from task_history") == [(task_type,)]


@pytest.mark.parametrize("task_type", [*TASK_TYPES_REFUSED, None, 7, b"t", {}], ids=repr)
def test_a_task_type_is_refused(installation, queue, task_type):
    with pytest.raises(queue.InvalidTask, match="^task_type .*refused") as caught:
        queue.enqueue_task("notifications", task_type, {})
    assert str(caught.value).isprintable()
    assert nothing_stored(installation)


@pytest.mark.parametrize(
    "task_id", ["", "a\nb", "a\0b", "\ud800", "x" * 501, 7, b"x", ["x"]], ids=repr
)
def test_a_task_id_is_refused(installation, queue, task_id):
    with pytest.raises(queue.InvalidTask, match="^task_id .*refused"):
        queue.enqueue_task("notifications", "t", {}, task_id)
    assert nothing_stored(installation)


@pytest.mark.parametrize(
    "task_id",
    ["a'b", 'a"b', "../x", "a/b", " ", "ä😀", "x" * 500, "-", "1 or 1=1", "{queue}"],
    ids=repr,
)
def test_a_task_id_is_stored_verbatim(installation, queue, task_id):
    assert queue.enqueue_task("notifications", "t", {}, task_id) == task_id
    assert queue.enqueue_tasks(
        "notifications", [{"task_type": "t", "data": {}, "task_id": task_id}]
    ) == [(task_id, False)]
    assert queue.dequeue_task("notifications")["task_id"] == task_id


@pytest.mark.parametrize(
    "options",
    [{"delay": -1}, {"delay": math.nan}, {"delay": math.inf}, {"delay": "1"}, {"delay": True}, {"window": -1}, {"window": math.nan},
     {"priority": 1.5}, {"priority": "1"}, {"priority": 2**63}, {"priority": True}, {"priority": None}],
    ids=str,
)  # fmt: skip
def test_an_option_out_of_its_range_is_refused(installation, queue, options):
    with pytest.raises(queue.InvalidTask, match="refused"):
        queue.enqueue_task("notifications", "t", {}, **options)
    assert nothing_stored(installation)


# ------------------------------------------------------------------------------------------------------------ payloads


@pytest.mark.parametrize("name", PAYLOADS_TAKEN)
def test_a_payload_comes_out_as_it_went_in(installation, queue, name):
    payload = PAYLOADS_TAKEN[name]
    queue.enqueue_task("notifications", "t", payload)
    text = json.dumps(payload)
    installation.enqueue("notifications", "t", "-", input=text)
    installation.enqueue("notifications", "t", "--jsonl", input=f"{text}\n{text}")
    expected = [payload] * 4
    # Lone surrogates are JSON only as escapes.
    if name != "lone surrogates":
        installation.enqueue(
            "notifications", "t", "-", input=json.dumps(payload, ensure_ascii=False)
        )
        expected += [payload]
    queue.get_queue("notifications").put(payload)
    # put() takes whole envelopes.
    expected += [payload["data"] if name == "keys of the envelope" else payload]
    seen = [queue.dequeue_task("notifications")["data"] for _ in expected]
    assert seen == expected and queue.dequeue_task("notifications") is None
    assert all(
        json.loads(stored) for (stored,) in installation.rows("select data from task_history")
    )


@pytest.mark.parametrize("payload", PAYLOADS_REFUSED.values(), ids=PAYLOADS_REFUSED)
def test_a_payload_that_is_no_json_object_is_refused(installation, queue, payload):
    with pytest.raises(queue.InvalidTask, match="refused") as caught:
        queue.enqueue_task("notifications", "t", payload)
    assert len(str(caught.value)) < 500
    # put() takes JSON text.
    if not isinstance(payload, str):
        with pytest.raises(queue.InvalidTask):
            queue.get_queue("notifications").put(payload)
    queue.get_queue("notifications")
    assert nothing_stored(installation)


RAW_REFUSED = {
    "an array": b"[1]",
    "a number": b"7",
    "nothing": b"",
    "blanks": b"  \n",
    "broken": b'{"a": 1',
    "two": b'{"a": 1}{"a": 2}',
    "single quotes": b"{'a': 1}",
    "JSON5": b"{a: 1,}",
    "comments": b'{"a": 1} // x',
    "NaN": b'{"n": NaN}',
    "infinity": b'{"n": -Infinity}',
    "hexadecimal": b'{"n": 0x1f}',
    "a raw newline in a text": b'{"a": "x\ny"}',
    "a raw control character": b'{"a": "\x01"}',
    "invalid UTF-8": b'{"a": "\xff\xfe"}',
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL after it": b'{"a": 1}\0',
    "garbage after a NUL": b'{"a": 1}\0{"b": 2}',
    "NUL before it": b'\0{"a": 1}',
    "too deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unbalanced": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a bad escape": b'{"a": "\\x41"}',
}


@pytest.mark.parametrize("raw", RAW_REFUSED.values(), ids=RAW_REFUSED)
def test_what_is_no_json_object_is_refused_by_enqueue_py(installation, raw):
    if raw.strip() or b"\n" not in raw:
        refused(installation, installation.run("enqueue.py", "notifications", "t", "-", input=raw))
    if b"\0" not in raw and len(raw) < 100_000:
        refused(
            installation, installation.run("enqueue.py", "notifications", "t", os.fsdecode(raw))
        )


# SQLite does not look whether a text is UTF-8; it is read with replacement characters. It also
# takes any number.
TAKEN_AT_THE_INSERT = ("invalid UTF-8", "a surrogate in UTF-8", "a number of 5,000 digits")


def insert_as_a_hook(installation, raw: bytes, value: str) -> subprocess.CompletedProcess:
    file = installation.directory / "raw"
    file.write_bytes(raw)
    with open(file, "rb") as stdin:
        return subprocess.run(
            [
                "sqlite3",
                "-cmd",
                ".timeout 5000",
                installation.db,
                f"INSERT INTO notifications (data) VALUES ({value})",
            ],
            stdin=stdin,
            capture_output=True,
            text=True,
        )


@pytest.mark.parametrize("name", [name for name in RAW_REFUSED if name not in TAKEN_AT_THE_INSERT])
def test_what_is_no_json_object_is_refused_at_the_insert_of_a_hook(installation, queue, name):
    queue.connect()
    done = insert_as_a_hook(installation, RAW_REFUSED[name], "CAST(readfile('/dev/stdin') AS TEXT)")
    assert done.returncode != 0 and done.stderr
    assert nothing_stored(installation)


@pytest.mark.parametrize("name", TAKEN_AT_THE_INSERT)
def test_what_sqlite_takes_it_stores_verbatim(installation, queue, name):
    queue.connect()
    done = insert_as_a_hook(installation, RAW_REFUSED[name], "CAST(readfile('/dev/stdin') AS TEXT)")
    assert (done.returncode, done.stderr) == (0, "")
    assert installation.rows("select cast(data as blob) from notifications") == [
        (RAW_REFUSED[name],)
    ]


@pytest.mark.parametrize(
    "value",
    ["readfile('/dev/stdin')", "readfile('/no/such')", "CAST(readfile('/no/such') AS TEXT)", "NULL", "7", "''"],
)  # fmt: skip
def test_a_hook_that_forgets_the_cast_or_the_file_gets_the_error_then_and_there(
    installation, queue, value
):
    queue.connect()
    done = insert_as_a_hook(installation, b'{"a": 1}', value)
    assert done.returncode != 0 and done.stderr
    assert nothing_stored(installation)


def test_a_hooks_payload_that_is_not_utf_8_is_delivered_and_finished_like_any_other(
    installation, queue
):
    queue.connect()
    conn = sqlite3.connect(installation.db)
    conn.executemany(
        "insert into notifications (data) values (cast(? as text))", [(b'{"a": "\xff"}',)] * 3
    )
    conn.commit()
    conn.close()
    assert queue.dequeue_task("notifications")["data"] == {"a": "\ufffd"}
    mine = queue.get_ack_queue("notifications")
    assert len(mine.queue()) == 2
    row_id, text = mine.get(timeout=5)
    assert json.loads(text) == {"a": "\ufffd"} and mine.ack(row_id) == row_id
    assert queue.get_queue("notifications").get(timeout=5)
    assert installation.rows(
        "select count(*) from task_history where cast(data as blob) = cast(x'7b2261223a2022ff227d' as blob)"
    ) == [(3,)]


def test_what_sqlite_reads_and_python_cannot_does_not_stop_those_who_take_text(installation, queue):
    queue.connect()
    conn = sqlite3.connect(installation.db)
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    for raw in (
        b'{"a": ' + b"9" * 5000 + b"}",
        deep,
        b'{"task_id": "\\u0000", "task_type": "\\ud800", "data": {}}',
    ):
        conn.execute("insert into notifications (data) values (cast(? as text))", (raw,))
    conn.commit()
    conn.close()
    mine = queue.get_ack_queue("notifications")
    for _ in range(3):
        assert mine.ack(mine.get(timeout=5)[0])
    assert mine.acked_count() == 3


@pytest.mark.parametrize("number", ["1e400", "-1e999", "9" * 5000], ids=lambda n: n[:9])
def test_what_python_cannot_read_is_buried_and_leaves_as_json_that_any_reader_reads(
    installation, queue, number
):
    """SQLite takes such a number for JSON."""
    queue.connect()
    installation.sqlite3(f"""insert into notifications (data) values ('{{"n": {number}}}')""")

    def read(text: str) -> object:
        value = json.loads(text, parse_constant=pytest.fail)
        # Python reads 1e400 as Infinity.
        json.dumps(value, allow_nan=False)
        return value

    why = f"{number[:40]} is a number that JSON readers cannot read"
    kept = {"unreadable_payload": f'{{"n": {number}}}', "unreadable_because": f"not JSON: {why}"}
    assert read(installation.run("tasks.py", "export").stdout)["data"] == kept
    assert read(installation.run("tasks.py", "list", "--json").stdout)
    installation.handler("notifications", "#!/bin/sh\nexec cat\n")
    done = installation.run(
        "worker.py", "notifications", "--drain", "--handlers", installation.handlers
    )
    assert done.returncode == 0
    buried = installation.history("notifications-1")
    assert buried["status"] == "failed" and why in buried["error"]
    assert read(installation.run("tasks.py", "show", "notifications-1", "--json").stdout)
    assert read(installation.run("tasks.py", "export", "--history").stdout)["data"] == kept


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"a": NaN}', '"text"', b'{"a": "\xff"}', '{"a": 1}{"a": 2}'], ids=repr
)
def test_a_bad_line_in_the_middle_stores_none_of_them(installation, bad):
    lines = [b'{"n": %d}' % n for n in range(2000)]
    lines[1200] = bad if isinstance(bad, bytes) else bad.encode()
    message = refused(
        installation,
        installation.run("enqueue.py", "notifications", "t", "--jsonl", input=b"\n".join(lines)),
    )
    assert "line 1201" in message and "nothing was stored" in message


@pytest.mark.parametrize(
    "line",
    ['{"data": {}}', '{"task_type": 7}', '{"task_type": "t", "data": []}', '{"task_type": "t", "task_id": ""}', '{"task_type": "../t"}',
     '{"task_type": "t", "dat": {}}', '{"task_type": "t", "delay": "soon"}', '{"task_type": "t", "priority": null}'],
)  # fmt: skip
def test_a_bad_line_of_whole_tasks_stores_none_of_them(installation, line):
    good = '{"task_type": "t", "data": {"a": 1}, "task_id": "x", "delay": 1, "priority": 2}'
    message = refused(
        installation,
        installation.run(
            "enqueue.py", "notifications", "--jsonl", input=f"{good}\n{line}\n{good}\n"
        ),
    )
    assert "line 2" in message


@pytest.mark.parametrize(
    "args",
    [[], ["notifications"], ["a", "b", "{}", "{}"], ["notifications", "t", "--no-such"], ["notifications", "t", "--delay", "soon"],
     ["notifications", "t", "--delay"], ["notifications", "t", "--priority", "1e3"], ["notifications", "t", "{}", "--jsonl"],
     ["notifications", "t", "--once-per", "session"], ["--hook", "q", "--once-per", "year"], ["--hook=1", "q"], ["--", "--hook"],
     ["notifications", "--jsonl", "--task-id", "x"], [os.fsdecode(b"--\xff")]],
    ids=str,
)  # fmt: skip
def test_a_usage_error_is_64_and_one_line(installation, args):
    message = refused(installation, installation.run("enqueue.py", *args), 64)
    assert "--help" in message


# -------------------------------------------------------------------------------------- streams, places, other accidents


def in_shell(installation, script: str, env=None) -> subprocess.CompletedProcess:
    script = script.replace("ENQUEUE", f'"{sys.executable}" "{ENQUEUE}"')
    return subprocess.run(
        ["/bin/sh", "-c", script],
        env=installation.env | (env or {}),
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    "command", ["notifications t -", "notifications t --jsonl", "notifications --jsonl"]
)
def test_a_closed_stdin_is_an_empty_one(installation, command):
    done = in_shell(installation, f"exec ENQUEUE {command} <&-")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    assert done.returncode == (0 if "jsonl" in command else 65)
    assert nothing_stored(installation)


@pytest.mark.parametrize("stdout", [">&-", ">/dev/full"])
def test_a_stdout_that_takes_nothing_does_not_make_a_stored_task_look_like_a_failure(
    installation, stdout
):
    done = in_shell(installation, f"exec ENQUEUE notifications t {stdout}")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 and installation.rows("select count(*) from notifications") == [
        (1,)
    ]


def test_nor_does_one_that_cannot_say_the_id(installation):
    done = in_shell(
        installation, "exec ENQUEUE notifications t --task-id ü–😀", {"PYTHONIOENCODING": "ascii"}
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 and installation.rows("select task_id from notifications") == [
        ("ü–😀",)
    ]


def test_a_closed_stderr_sends_no_message_to_stdout(installation):
    for command in ("--hook 'Not a queue' <&-", "Bad t"):
        done = in_shell(installation, f"exec ENQUEUE {command} 2>&-")
        assert (done.returncode, done.stdout) == (65, "")


def test_a_place_that_cannot_be_a_state_directory_is_one_line_and_1(installation):
    (installation.directory / "file").write_text("not a directory")
    (installation.directory / "db").mkdir()
    (installation.directory / "db/tasks.db").write_text(
        "not a database, but longer than the header of one. " * 50
    )
    for place in ("file", "file/below", "db", "/proc/no/such"):
        env = {"TASK_QUEUE_STATE": str(installation.directory / place)}
        one_line(installation.run("enqueue.py", "notifications", "t", env=env), 1)


def test_a_locked_database_is_75_and_one_line(installation, queue, monkeypatch):
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 300)
    installation.enqueue("notifications", "t")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    done = installation.call("enqueue.py", ["notifications", "t"])
    lock.close()
    one_line(done, 75, "locked")
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_a_worker_that_cannot_be_started_does_not_make_a_stored_task_look_like_a_failure(
    installation,
):
    installation.enqueue("notifications", "t")
    (installation.state / "logs").write_text("in the way")
    done = installation.run("enqueue.py", "notifications", "t", "--start-worker")
    assert done.returncode == 0 and done.stdout.startswith("queued ")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_an_enqueue_killed_at_any_moment_stores_all_lines_or_none(installation):
    installation.enqueue("notifications", "t")
    lines = b"".join(b'{"n": %d}\n' % n for n in range(3000))
    for moment in range(12):
        process = subprocess.Popen(
            [sys.executable, ENQUEUE, "notifications", "t", "--jsonl"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=installation.env,
        )
        try:
            process.stdin.write(lines)
            process.stdin.close()
            process.wait(0.02 + 0.008 * moment)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass
        process.kill()
        process.wait()
    [(count,)] = installation.rows("select count(*) from notifications")
    assert count % 3000 == 1
    assert installation.rows("pragma integrity_check") == [("ok",)]
