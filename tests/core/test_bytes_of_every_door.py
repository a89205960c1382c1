"""Whatever bytes come in at a door, nobody sees a traceback, and no task is lost or invented.

`ATTACK_EXAMPLES=5000` tries that many of each kind.
"""

import json
import os
import sqlite3
from contextlib import closing

from conftest import settle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from taskqueue import environment
from taskqueue import settings as settings_file

attack = settings(
    max_examples=int(os.environ.get("ATTACK_EXAMPLES", 15)),
    deadline=None,
    # The suite takes the same examples each time; a deeper run takes others.
    derandomize="ATTACK_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

NASTY = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b'"', b"'", b"{", b"[" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"a\\u0000": 1}',
    b'{"task_id": "1", "task_id": 2}', b'{"a": "' + b"x" * 100_000 + b'"}', b'{"a": 1}\r', b"\x1b[2J", b'{"a": "\x01"}', b"null", b"[]",
    b'{"task_id": "\\ud800", "task_type": "t", "data": {}}', b'{"enqueued_at": "99999-99-99"}', "\u2028\x85".encode(),
]  # fmt: skip
SCALARS = some.one_of(
    some.none(), some.booleans(), some.integers(), some.floats(), some.text(max_size=20),
    some.sampled_from([10**400, -(10**20), 2**63, 1e308, "\ud800", "a\0b", "\x1b[31m", "'", '"', "../x", "x" * 300, "9999-12-31T23:59:59", ""]),
)  # fmt: skip
VALUES = some.recursive(
    SCALARS,
    lambda inner: (
        some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    "task_id", "task_type", "task_queue", "queue", "data", "status", "enqueued_at", "due_at", "priority", "group", "group_id", "attempts", "delay", "at",
    "ttl", "hold", "timeout", "expires_at", "window", "on_duplicate", "after", "asks", "spooled_row", "workspace_path", "cwd", "session_id",
    "hook_event_name", "type", "enqueue", "retry_after", "pause", "reason", "hooks", "max_attempts", "completed_at", "result", "cost_usd",
]  # fmt: skip
OBJECTS = some.dictionaries(some.sampled_from(NAMES), VALUES, max_size=6)
TASKS = some.builds(
    lambda good, bad: good | bad, some.just({"task_type": "t", "data": {}}), OBJECTS
)
EXPORTED = some.builds(
    lambda status, bad: {"queue": "notifications", "status": status, "data": {}} | bad,
    some.sampled_from(["pending", "scheduled", "held", "completed", "failed", "blocked"]),
    OBJECTS,
)


def encoded(value) -> bytes:
    return json.dumps(value).encode()


ANY_BYTES = some.one_of(
    some.sampled_from(NASTY),
    some.binary(max_size=40),
    some.one_of(OBJECTS, TASKS, EXPORTED, VALUES).map(encoded),
)
LINES = some.lists(ANY_BYTES.filter(lambda line: b"\n" not in line), min_size=1, max_size=4)
# Words of a command line: any bytes but NUL.
WORDS = some.one_of(
    some.sampled_from([b"", b"-", b"--", b"-x", b"\xff", b"'", b'"', b"a\nb", b"\x1b[31m", b"9" * 400, b"../x", b"%", b"1e999", b"task_x"]),
    some.binary(max_size=12),
).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))  # fmt: skip


def tq(installation, script: str, *words, stdin: bytes = b""):
    """Call a command, which ends with a code and words of its own, whatever it was given."""
    done = installation.call(script, [str(word) for word in words], stdin)
    assert isinstance(done.returncode, int) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or done.stderr, (words, done)
    return done


def count(installation) -> int:
    return installation.rows("select count(*) from task_queue")[0][0]


def listed(installation) -> int:
    """Return how many tasks `tq list` knows; it can show them all."""
    tq(installation, "tasks.py", "stats")
    return len(json.loads(tq(installation, "tasks.py", "list", "--json").stdout))


@attack
@given(files=some.lists(some.tuples(some.sampled_from(["hook", "json"]), ANY_BYTES), max_size=4))
def test_each_file_of_the_spool_is_a_task_or_stays_with_a_reason(installation, queue, files):
    queue.connect()
    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True, exist_ok=True)
    for number, (ending, raw) in enumerate(files):
        if ending == "hook":
            raw = b"task-queue-hook 1\n" + raw
        (directory / f"{number}.{ending}").write_bytes(raw)
    before = count(installation)
    done = tq(installation, "tasks.py", "take-in")
    left = [path for path in directory.rglob("*") if path.is_file()]
    new = count(installation) - before
    assert new + len(left) <= len(files)
    assert bool(left) <= bool(done.stderr), (left, done)
    for path in left:
        path.unlink()


@attack
@given(lines=LINES)
def test_each_line_of_an_import_is_stored_known_or_refused(installation, queue, lines):
    queue.connect()
    file = installation.directory / "lines"
    file.write_bytes(b"\n".join(lines))
    before = count(installation)
    done = tq(installation, "tasks.py", "import", file, "--json")
    told = json.loads(done.stdout)
    assert count(installation) == before + told["imported"]
    sent = sum(bool(line.strip()) for line in lines)
    assert told["imported"] + told["already_there"] + len(told["refused"]) == sent


@attack
@given(lines=LINES)
def test_all_lines_of_add_are_stored_or_none_is(installation, queue, lines):
    queue.connect()
    before = count(installation)
    raw = b"\n".join(lines)
    done = tq(installation, "enqueue.py", "notifications", "--jsonl", stdin=raw)
    added = count(installation) - before
    sent = sum(bool(line.strip()) for line in lines)
    assert 0 <= added <= sent if done.returncode == 0 else added == 0


CELLS = SCALARS.map(lambda value: None if isinstance(value, bool) else value) | some.binary(
    max_size=9
)
ROW = ["data", "timestamp", "status", "priority", "due_at", "group_id", "expires_at", "attempts", "owner", "claimed_at", "delayed_at",
       "released_at", "approved", "own_attempts", "timeout", "asks", "max_attempts", "backoff", "then_queue", "then_hold", "chain",
       "budget_usd", "cancel_requested", "rerun", "error"]  # fmt: skip


@attack
@given(cells=some.dictionaries(some.sampled_from(ROW), CELLS, max_size=3))
def test_each_row_by_hand_is_refused_or_shown(installation, queue, cells):
    queue.connect()
    cells = {"data": '{"a": 1}'} | cells
    before = count(installation)
    marks = ", ".join("?" * len(cells))
    conn = sqlite3.connect(installation.db, isolation_level=None)
    try:
        sql = f"insert into notifications ({', '.join(cells)}) values ({marks})"
        stored = conn.execute(sql, list(cells.values())).rowcount
    except (sqlite3.Error, OverflowError, UnicodeEncodeError):
        stored = 0
    try:
        known = conn.execute("select count(*) from task_queue").fetchone()[0]
        assert known == before + max(0, stored)
        listed(installation)
        tq(installation, "tasks.py", "export", installation.directory / "exported")
    finally:
        conn.execute("delete from notifications")
        conn.execute("delete from task_history")
        conn.close()


@attack
@given(
    said=some.lists(ANY_BYTES | OBJECTS.map(lambda one: b'{"enqueue": ' + encoded([one]) + b"}"), max_size=2),
    code=some.sampled_from([0, 1, 65, 75, 137]),
)  # fmt: skip
def test_whatever_a_handler_says_its_task_has_one_end(installation, queue, said, code):
    text = b"\n".join(said).decode("utf-8", "replace")
    try:
        settle(queue, text, code, chain=True, then_queue="completions")
        ((is_live, is_over),) = installation.rows(
            "select (select count(*) from notifications where task_id = 'parent'),"
            " (select count(*) from task_history where task_id = 'parent')"
        )
        assert is_live + is_over == 1
        listed(installation)
    finally:
        # The next example claims its own task, of a queue that is not paused.
        with closing(sqlite3.connect(installation.db, isolation_level=None)) as conn:
            for table in ("notifications", "completions", "task_history", "task_controls"):
                conn.execute(f"delete from {table}")


@attack
@given(raw=ANY_BYTES | some.builds(lambda hooks: encoded({"hooks": hooks}), VALUES | OBJECTS))
def test_settings_are_read_or_refused(tmp_path, raw):
    path = tmp_path / "settings.json"
    path.write_bytes(raw)
    try:
        text = settings_file.read(path)
        list(settings_file.our_hooks(json.loads(text)))
        settings_file.dumped(json.loads(text))
    except settings_file.Trouble as error:
        assert str(error)


@attack
@given(
    lines=some.lists(ANY_BYTES | some.binary(max_size=9).map(lambda raw: b"A=" + raw), max_size=3)
)
def test_an_environment_is_read_or_refused(tmp_path, lines):
    file = tmp_path / "environment"
    file.write_bytes(b"\n".join(lines))
    file.chmod(0o600)
    try:
        found = environment.read(file)
    except environment.Unfit as error:
        assert str(error)
    else:
        assert all("\0" not in name + value for name, value in found.items())


FIELDS = some.sampled_from(
    [
        "*",
        "0",
        "59",
        "1-5",
        "*/0",
        "*/7",
        "L",
        "31",
        "2",
        "7#6",
        "MON",
        "9" * 30,
        "-1",
        "1,,2",
        "٣",
        "²",
    ]
)


@attack
@given(schedule=some.lists(FIELDS, min_size=5, max_size=5).map(" ".join) | WORDS)
def test_a_schedule_recurs_or_is_refused(installation, queue, schedule):
    done = tq(installation, "tasks.py", "every", "it", schedule, "notifications", "t")
    recurring = json.loads(tq(installation, "tasks.py", "every", "--json").stdout or "[]")
    if done.returncode:
        assert recurring == []
    elif recurring:
        tq(installation, "tasks.py", "every", "it", "--remove")


@attack
@given(
    word=WORDS,
    verb=some.sampled_from(
        ["show", "cancel", "retry", "approve", "hold", "pause", "purge", "drop", "list --queue"]
    ),
)
def test_an_id_or_a_queue_that_is_none_is_said(installation, queue, word, verb):
    queue.connect()
    queue.enqueue_task("notifications", "t", {}, "mine")
    tq(installation, "tasks.py", *verb.split(), word)
    assert installation.rows("select task_id from notifications") == [("mine",)]


@attack
@given(name=WORDS, task_id=WORDS)
def test_a_queue_and_an_id_are_taken_or_refused(installation, queue, name, task_id):
    queue.connect()
    for queue_name in (name, "notifications"):
        before = count(installation)
        done = tq(installation, "enqueue.py", queue_name, "t", f"--task-id={task_id}")
        added = count(installation) - before
        assert added in (0, 1) and (done.returncode == 0 or added == 0)
