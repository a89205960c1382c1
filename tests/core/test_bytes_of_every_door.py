"""Whatever bytes come through a door: no traceback, and no task is lost or made up.

`ATTACK_EXAMPLES=5000 just test -k bytes_of_every_door` tries harder.
"""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from conftest import Installation
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

import queue_helpers as q
from taskqueue import environment
from taskqueue import outcome as outcomes

pytestmark = pytest.mark.once
EXAMPLES = int(os.environ.get("ATTACK_EXAMPLES", "30"))
QUEUE = "notifications"
attack = settings(
    max_examples=EXAMPLES,
    deadline=None,
    # The suite takes the same examples each time; a deeper run takes others.
    derandomize="ATTACK_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

PIECES = [
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\r\n", b"\n", b"\r", b"\x1b[2J", b"\x85", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b'"', b"'", b"\\",
    b"\\ud800", b"\\u0000", b"{", b"}", b"[" * 3000, b'{"a":' * 2000, b":", b",", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400,
    b"9" * 5000, b"9223372036854775808", b"1e308", b"0.1", b"null", b"true", b"#", b"=", b"$(reboot)", b"%s", b"x" * 70000, b"../", b"/",
    b"\xf0\x9f\x98\x80", b" ", b"\t", b"'; drop table notifications; --",
]  # fmt: skip
raw = some.lists(some.sampled_from(PIECES) | some.binary(max_size=6), max_size=8).map(b"".join)
# A word of a command line: no program is given a NUL, and anything else may come.
words = raw.map(lambda piece: os.fsdecode(piece.replace(b"\0", b"")[:100_000]))
scalars = (
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats()
    | some.sampled_from([10**400, -(2**63), 2**63, 1e300, 5e-324, -1, 253402300800, "", "t", "2001-01-01 00:00:00.000"])
    | some.text(max_size=8)
    | raw.map(lambda piece: piece.decode("utf-8", "surrogateescape")[:300])
)  # fmt: skip
anything = some.recursive(
    scalars, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3), max_leaves=6
)  # fmt: skip


def objects(*names: str):
    """JSON objects with some of these fields, of any kind, as bytes."""
    made = some.fixed_dictionaries({}, optional=dict.fromkeys(names, anything) | {"else": anything})
    return made.map(as_bytes)


def as_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One installation for all: what a door lets in is counted before and after."""
    made = Installation(tmp_path_factory.mktemp("place"))
    made.call("enqueue.py", [QUEUE, "t", "{}"])
    return made


def in_order(done):
    """A person's or program's mistake ends with one of these, and says why."""
    assert done.returncode in (0, 1, 2, 64, 65, 66, 73, 74, 75), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert done.stderr.strip()
    return done


def number_of_tasks(place) -> int:
    with sqlite3.connect(place.db, timeout=10) as conn:
        tables = [name for (name,) in conn.execute(q.QUEUES)]
        return sum(conn.execute(f"select count(*) from {name}").fetchone()[0] for name in (*tables, "task_history"))  # fmt: skip


def aside(place) -> int:
    return len(list((place.state / "spool").rglob("set-aside/*")))


LINE = ("task_type", "data", "task_id", "priority", "delay", "at", "due_at", "group", "ttl", "hold", "queue")  # fmt: skip


@attack
@given(some.lists(raw | objects(*LINE), max_size=4).map(b"\n".join), some.booleans())
def test_json_lines_are_all_tasks_or_none(place, lines, has_type):
    before = number_of_tasks(place)
    words = [QUEUE, "t", "--jsonl"] if has_type else [QUEUE, "--jsonl"]
    done = in_order(place.call("enqueue.py", [*words, "--on-duplicate", "ignore"], lines))
    added = number_of_tasks(place) - before
    if done.returncode:
        assert added == 0
    else:
        assert added == sum(line.startswith("queued") for line in done.stdout.splitlines())


EXPORTED = ("queue", "status", "id", "task_id", "task_type", "data", "enqueued_at", "completed_at", "attempts", "priority", "due_at", "group_id", "row_id", "error")  # fmt: skip


@attack
@given(some.lists(raw | objects(*EXPORTED), max_size=4).map(b"\n".join))
def test_imported_lines_are_taken_or_named(place, lines):
    file, before = place.directory / "lines", number_of_tasks(place)
    file.write_bytes(lines)
    done = in_order(place.call("tasks.py", ["import", str(file), "--json"]))
    told = json.loads(done.stdout)
    assert number_of_tasks(place) - before == told["imported"]
    sent = sum(bool(line.strip()) for line in lines.split(b"\n"))
    assert told["imported"] + told["already_there"] + len(told["refused"]) == sent


@attack
@given(
    raw,
    some.lists(
        words
        | some.sampled_from(["t", "--priority", "7", "--once-per", "content", "--delay", "1s"]),
        max_size=4,
    ),
    objects("cwd", "session_id", "hook_event_name", "prompt", "tool_input"),
    some.booleans(),
)
def test_a_hooks_file_becomes_a_task_or_is_kept(place, bytes_, options, payload, is_whole):
    spool = place.state / "spool" / QUEUE
    spool.mkdir(parents=True, exist_ok=True)
    asked = [QUEUE, *options]
    head = ["hook-2", str(len(asked)), *asked, "/tmp", "", "", "0", ""]
    file = b"\0".join(map(os.fsencode, head)) + (payload if is_whole else bytes_)
    before = number_of_tasks(place) + aside(place)
    (spool / "firing.hook").write_bytes(file if is_whole or len(bytes_) % 2 else bytes_)
    in_order(place.call("tasks.py", ["take-in"]))
    kept = len(list(spool.glob("*.hook")))
    added = number_of_tasks(place) + aside(place) + kept - before
    # One that asks for no task, as a nested run does, leaves none behind.
    assert added in (0, 1), (added, file)
    for left in spool.glob("*.hook"):
        left.unlink()


COLUMNS = ["data", "timestamp", "status", "priority", "due_at", "group_id", "expires_at", "attempts", "owner", "claimed_at", "delayed_at",
           "released_at", "approved", "own_attempts", "timeout", "asks", "max_attempts", "backoff", "then_queue", "then_hold", "chain",
           "budget_usd", "cancel_requested", "rerun", "error"]  # fmt: skip


@attack
@given(some.dictionaries(some.sampled_from(COLUMNS), scalars | raw, min_size=1))
@example({"data": b"\xff\xfe"})
@example({"data": '{"task_id": "x", "task_type": 7, "data": [1]}', "status": 1})
def test_a_row_by_hand_is_refused_or_runs_or_is_shown(place, row):
    with sqlite3.connect(place.db, timeout=10) as conn:
        there = {name for (_, name, *_) in conn.execute(f"pragma table_info({QUEUE})")}
        row = {name: value for name, value in row.items() if name in there}
        names, marks = ", ".join(row) or "data", ", ".join("?" * len(row)) or "'{}'"
        try:
            conn.execute(f"insert into {QUEUE} ({names}) values ({marks})", list(row.values()))
        except (sqlite3.Error, OverflowError, UnicodeEncodeError):
            conn.rollback()
            return
    before = number_of_tasks(place)
    for words in (["list", "--json"], ["stats", "--json"], ["show", "--json", f"{QUEUE}-1"]):
        in_order(place.call("tasks.py", words))
    conn = q.connect(place.state)
    for task in q.claim_ready(conn, QUEUE, limit=5):
        with q.transaction(conn):
            assert task.task_type is not None and isinstance(task.data, dict)
            assert q.ack(conn, task)
    assert number_of_tasks(place) == before


@attack
@given(
    raw, raw | objects("hold", "data", "reason", "pause", "retry_after"),
    some.lists(some.fixed_dictionaries({"queue": some.just(QUEUE) | scalars, "task_type": scalars}, optional={
        "data": anything, "delay": scalars, "priority": scalars, "group": scalars, "hold": scalars}), max_size=2),
    some.sampled_from([0, 1, 65, 75, 137, 255]), some.booleans(),
)  # fmt: skip
def test_a_handlers_output_ends_its_run_once(place, first, last, entries, code, enqueues):
    place.call("enqueue.py", [QUEUE, "t", "{}", "--priority", "99"])
    conn = q.connect(place.state)
    [task] = q.claim_ready(conn, QUEUE, then_queue="completions", chain=True)
    output = place.state / "logs" / f"{task.run_name}.out"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(first + b"\n" + (as_bytes({"enqueue": entries}) if enqueues else last))
    before = number_of_tasks(place)
    with q.transaction(conn):
        outcome = outcomes.record(conn, task, code)
    assert outcome.status in ("completed", "failed", "scheduled", "held", "put back")
    assert number_of_tasks(place) - before == len(outcome.follow_ups)
    with q.transaction(conn):
        conn.execute("delete from task_controls")
        conn.execute(f"delete from {QUEUE} where task_id = ?", (task.task_id,))


@attack
@given(raw)
def test_an_environment_file_is_read_or_refused(place, text):
    file = place.directory / "environment"
    file.touch(0o600)
    file.write_bytes(text)
    try:
        found = environment.of_worker(file)
    except environment.Unfit as refused:
        assert "\n" not in str(refused)
    else:
        os.posix_spawnp("true", ["true"], found)


FIELDS = some.sampled_from("* 0 59 1-5 */0 */7 L 31 2 7#6 MON -1 1,,2 \u0663 \u00b2".split() + ["9" * 30]) | some.text("0123456789*/-,LW#?", max_size=5)  # fmt: skip


@attack
@given(some.lists(some.text("0123456789*/-,LW#? \n", max_size=6) | words, max_size=6).map(" ".join))
def test_a_schedule_comes_or_is_refused(place, schedule):
    done = in_order(place.call("tasks.py", ["every", "mine", schedule, QUEUE, "t", "--json"]))
    if done.returncode == 0:
        in_order(place.call("tasks.py", ["every", "mine", "--remove"]))


COMMANDS = ["show", "retry", "cancel", "approve", "reject", "logs", "wait", "edit", "move", "pause", "resume", "limit",
            "drop", "purge", "list", "export"]  # fmt: skip


@attack
@given(some.sampled_from(COMMANDS), some.lists(words, min_size=1, max_size=2))
def test_an_id_or_a_queues_name_is_known_or_refused(place, command, names):
    before = number_of_tasks(place)
    in_order(place.call("tasks.py", [command, "--json", "--", *names]))
    assert number_of_tasks(place) == before


@attack
@given(words, words, words)
def test_a_queue_a_type_and_a_payload_become_one_task_or_none(place, queue, task_type, data):
    before = number_of_tasks(place)
    done = in_order(place.call("enqueue.py", ["--", queue, task_type, data]))
    assert number_of_tasks(place) - before == done.stdout.startswith("queued")


@attack
@given(raw | objects("hooks", "env", "permissions"))
def test_settings_are_changed_or_left_alone(place, text):
    home = place.directory
    file = home / ".claude/settings.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text)
    words = ["install", "--no-warm", "--no-command", "--hook", "yes", "--report", "yes", "--skill", "no", "--completion", "no",
             "--environment", "no", str(home / "prefix")]  # fmt: skip
    in_order(place.call("install.py", words))
    after = file.read_bytes()
    if after != text:
        old, new = json.loads(text), json.loads(after)
        assert {name: new[name] for name in old if name != "hooks"} == {
            name: old[name] for name in old if name != "hooks"
        }
