"""enqueue.py --hook: exit 0, nothing on stdout, one task, whatever it is fed; never 2; never long."""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import queue_helpers

PAYLOADS = sorted((Path(__file__).parents[1] / "hook_payloads").glob("*.json"))
STOP = (Path(__file__).parents[1] / "hook_payloads/11_Stop_first.json").read_bytes()
QUIET = (0, "", "")

WORSE = {
    "truncated": STOP[:100],
    "invalid UTF-8": b'{"cwd": "/tmp/\xff\xfe", "hook_event_name": "Stop"}',
    "bad escape": b'{"cwd": "\\ud8", "hook_event_name": "Stop"}',
    "lone surrogates": b'{"cwd": "/tmp", "hook_event_name": "Stop", "prompt": "\\ud800 \\udfff"}',
    "surrogates in the event's name": b'{"cwd": "/tmp", "hook_event_name": "\\ud800"}',
    "a slash in the event's name": b'{"cwd": "/tmp", "hook_event_name": "../../x"}',
    "no text in the event's name": b'{"cwd": 7, "session_id": [], "hook_event_name": {"a": 1}}',
    "NUL": b'{"cwd": "/tmp"\0}',
    "an escaped NUL": b'{"cwd": "/tmp/\\u0000", "hook_event_name": "Stop", "session_id": "\\u0000"}',
    "an array": b"[1, 2]",
    "null": b"null",
    "NaN": b'{"cwd": "/tmp", "n": NaN, "m": -Infinity}',
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deep but whole": b'{"a":' * 600 + b"1" + b"}" * 600,
    "a megabyte": json.dumps(
        {"cwd": "/tmp", "hook_event_name": "PostToolUse", "tool_response": "ä" * 2**20}
    ).encode(),
    "two objects": STOP + STOP,
    "UTF-16": STOP.decode().encode("utf-16"),
    "a huge number": b'{"cwd": "/tmp", "n": 1' + b"0" * 5000 + b"}",
    "a number without end": b'{"cwd": "/tmp", "n": 1e400}',
}
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
)
FIELDS = some.sampled_from(["cwd", "hook_event_name", "session_id", "workspace_path", "data", "x"])
ANY_PAYLOAD = (
    some.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | some.dictionaries(FIELDS, JSON).map(lambda value: json.dumps(value).encode())
)


@pytest.fixture
def hook(installation, queue, monkeypatch, capfd):
    """Run `enqueue.py --hook QUEUE …` in this process: (exit code, stdout, stderr).

    Its stdin is the payload, or a descriptor.
    """
    from taskqueue import enqueue

    for name in ("TASK_DEPTH", "CLAUDE_PROJECT_DIR", "CLAUDE_CODE_SESSION_ATTENDED"):
        monkeypatch.delenv(name, raising=False)

    def fire(stdin: bytes | int, *args, queue_name="notifications") -> tuple[int, str, str]:
        with tempfile.TemporaryFile() as file:
            if isinstance(stdin, bytes):
                file.write(stdin)
                file.seek(0)
            before = os.dup(0)
            os.dup2(file.fileno() if isinstance(stdin, bytes) else stdin, 0)
            try:
                code = enqueue.main(["--hook", queue_name, *map(str, args)])
            finally:
                os.dup2(before, 0)
                os.close(before)
        return code, *capfd.readouterr()

    return fire


@pytest.fixture
def locked(installation, queue):
    """A database whose write lock somebody else holds until rollback()."""
    queue.connect()
    conn = sqlite3.connect(installation.db, isolation_level=None)
    conn.execute("begin immediate")
    yield conn
    conn.close()


def stored(installation) -> list[tuple[str, dict]]:
    """(task_type, payload) of each waiting task."""
    rows = installation.rows("select task_type, data from notifications order by id")
    return [(kind, json.loads(data, parse_constant=pytest.fail)["data"]) for kind, data in rows]


def count(installation) -> int:
    return sum(n for (n,) in installation.rows("select count(*) from notifications"))


def stop(**fields) -> bytes:
    """A Stop event's payload with other fields."""
    return json.dumps(json.loads(STOP) | fields).encode()


# ------------------------------------------------------------------------------------------- payloads


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_every_event_is_one_task(installation, hook, path):
    assert hook(path.read_bytes()) == QUIET
    [(task_type, task)] = stored(installation)
    if path.stat().st_size:
        payload = json.loads(path.read_text("utf-8-sig"))
        assert task == {**payload, "workspace_path": payload["cwd"]}
        assert task_type == payload["hook_event_name"]


@pytest.mark.parametrize("payload", WORSE.values(), ids=WORSE)
def test_what_no_hook_should_send_is_kept_as_one_task(installation, hook, payload):
    assert hook(payload, "link_validation") == QUIET
    [(task_type, task)] = stored(installation)
    assert task_type == "link_validation" and isinstance(task, dict)
    assert hook(payload) == QUIET


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=ANY_PAYLOAD)
def test_any_payload_is_one_task(installation, hook, payload):
    args, before = ("t", "--once-per", "content", "--group-by", "session"), count(installation)
    assert hook(payload, *args) == QUIET
    # None is added where an earlier example had the same content.
    added = count(installation) - before
    assert added in (0, 1) and hook(payload, *args) == QUIET
    assert count(installation) == before + added


def test_unreadable_input_is_kept_for_diagnosis(installation, hook):
    hook(b'{"cwd": "/tmp", tru')
    assert stored(installation)[0][1]["unreadable_payload"] == '{"cwd": "/tmp", tru'


@pytest.mark.parametrize("number", [b"1e400", b"NaN", b"-Infinity", b"1" + b"0" * 5000])
def test_a_payload_that_json_readers_cannot_read_is_kept_whole(installation, hook, number):
    payload = b'{"cwd": "/", "n": [' + number + b'], "d": 0.5}'
    hook(payload)
    [(_, task)] = stored(installation)
    assert task["unreadable_payload"] == payload.decode()
    assert task["unreadable_because"].startswith(f"not JSON: {number[:40].decode()} is a number")


def test_the_projects_directory_is_kept_while_cwd_follows_worktrees(
    installation, hook, monkeypatch
):
    for project in ("/home/user/größe", ""):
        monkeypatch.setenv("CLAUDE_PROJECT_DIR", project)
        hook(STOP, "with" if project else "without")
    (_, first), (_, second) = stored(installation)
    assert first["project_dir"] == "/home/user/größe" and first["workspace_path"] == first["cwd"]
    assert "project_dir" not in second


def test_a_hook_that_makes_worktree_creation_fail_says_so_and_stores_nothing(installation, hook):
    payload = b'{"hook_event_name": "WorktreeCreate", "cwd": "/", "name": "x"}'
    for args in ([], ["link_validation"]):
        code, out, error = hook(payload, *args)
        assert (code, out, error.count("\n")) == (0, "", 1) and "WorktreeCreate" in error
    assert not installation.rows("select * from notifications")
    assert not (installation.state / "spool").exists()


# ------------------------------------------------------------------------------- what makes one task


def test_the_same_firing_twice_is_one_task_and_two_firings_are_two(installation, hook):
    for payload, tasks in ((STOP, 1), (STOP, 1), (stop(last_assistant_message="x"), 2)):
        hook(payload)
        assert count(installation) == tasks


def test_the_same_firing_is_one_task_even_when_a_fast_worker_has_finished_it(
    installation, queue, hook
):
    for _ in range(2):
        hook(STOP)
        queue.dequeue_task("notifications")
    assert count(installation) == 0
    assert installation.rows("select count(*) from task_history") == [(1,)]


OTHER_WORDS = {"last_assistant_message": "x"}
# What --once-per tells apart, and what it does not.
KEYS = [
    ("session", {"prompt_id": "b", **OTHER_WORDS}, {"session_id": "b"}),
    ("workspace", {"session_id": "b", "prompt_id": "b"}, {"cwd": "/elsewhere"}),
    ("content", {"session_id": "b", "prompt_id": "x", "transcript_path": "y"}, OTHER_WORDS),
    ("content", {"background_tasks": [1], "session_crons": [2], "effort": {"a": 1}}, OTHER_WORDS),
    ("content", {"permission_mode": "plan", "stop_hook_active": True, "comes_next_year": 1},
     {"cwd": "/elsewhere"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "same", "other"), KEYS)
def test_once_per_makes_coarser_keys(installation, hook, key, same, other):
    for change in ({}, same, other):
        hook(stop(**change), "lint", "--once-per", key)
    assert count(installation) == 2


def test_a_batch_of_tools_is_the_same_whatever_the_ids_of_its_calls(installation, hook):
    [path] = [path for path in PAYLOADS if "PostToolBatch" in path.name]
    payload = json.loads(path.read_text())
    call = payload["tool_calls"][0]
    for change in (lambda: None, lambda: call.update(tool_use_id="another")):
        change()
        hook(json.dumps(payload).encode(), "lint", "--once-per", "content")
        assert count(installation) == 1
    call["tool_input"]["file_path"] = "/another"
    hook(json.dumps(payload).encode(), "lint", "--once-per", "content")
    assert count(installation) == 2


def test_of_an_event_that_is_not_known_everything_counts_that_is_not_known_to_change(
    installation, hook
):
    payload = {"hook_event_name": "ComesNextYear", "cwd": "/", "what": 1, "effort": 1}
    for change in ({}, {"session_id": "t", "effort": 2}, {"what": 2}):
        hook(json.dumps(payload | change).encode(), "--once-per", "content")
    assert count(installation) == 2


def test_ids_are_short_and_differ_early(installation, hook):
    for number in range(3):
        hook(stop(n=number), "link_validation")
    ids = [task_id for (task_id,) in installation.rows("select task_id from notifications")]
    assert len({task_id[:12] for task_id in ids}) == 3 and max(map(len, ids)) <= 25


def test_a_window_keeps_finished_firings_in_mind(installation, queue, hook):
    for seconds, tasks in ((1800, 1), (1800, 1), (0, 2)):
        hook(STOP, "lint", "--once-per", "content", "--window", seconds)
        queue.dequeue_task("notifications")
        assert installation.rows("select count(*) from task_history") == [(tasks,)]


def test_ten_edits_while_a_check_runs_are_one_more_run(installation, queue, hook):
    args = ("check", "--once-per", "workspace", "--on-duplicate", "rerun")
    mine = queue.get_ack_queue("notifications")
    hook(stop(n=0), *args)
    first, _ = mine.get(timeout=5)
    for number in range(1, 11):
        assert hook(stop(n=number), *args) == QUIET
    assert count(installation) == 1
    mine.ack(first)
    second, text = mine.get(timeout=5)
    assert json.loads(text)["data"]["n"] == 10
    mine.ack(second)
    assert mine.empty()
    # An edit just after the end of a check is checked; the same one told by a second hook is not
    # checked again.
    for _ in range(2):
        hook(stop(n=11), *args)
        if not mine.empty():
            mine.ack(mine.get(timeout=5)[0])
    assert installation.rows("select count(*) from task_history") == [(3,)]


def test_the_same_firing_told_twice_while_it_runs_makes_one_run(installation, queue, hook):
    args = ("check", "--once-per", "workspace", "--on-duplicate", "rerun")
    mine = queue.get_ack_queue("notifications")
    hook(STOP, *args)
    row_id, _ = mine.get(timeout=5)
    hook(STOP, *args)
    mine.ack(row_id)
    assert mine.empty() and installation.rows("select count(*) from task_history") == [(1,)]


# -------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("args", [["t", "d"], ["--jsonl"], ["--no-such"], ["--wait", "x"]])
def test_a_misspelt_hook_never_exits_2(hook, args):
    code, out, error = hook(STOP, *args)
    assert (code, out, error.count("\n")) == (64, "", 1)


def test_nor_does_one_with_a_bad_queue_name(hook):
    code, out, error = hook(STOP, queue_name="Not A Queue")
    assert (code, out, error.count("\n")) == (65, "", 1)


def test_an_option_of_a_task_is_one_of_a_hook_too(installation, hook, monkeypatch):
    monkeypatch.setenv("CLAUDE_PROJECT_DIR", "/p")
    hook(STOP, "--hold", "--group-by", "workspace", "--priority", "3")
    hook(STOP, "later", "--delay", "10m", "--group-by", "project")
    hook(STOP, "soon", "--ttl", "1h", "--group-by", "session")
    monkeypatch.chdir("/usr")
    hook(b"[]", "odd", "--group-by", "session")
    rows = installation.rows(
        "select status, due_at is null, priority, group_id, expires_at is null from notifications order by id"
    )
    payload = json.loads(STOP)
    assert rows == [
        (3, 1, 3, payload["cwd"], 1),
        (3, 0, 0, "/p", 1),
        (1, 1, 0, payload["session_id"], 0),
        (1, 1, 0, "/usr", 1),
    ]


def test_a_group_that_is_no_text_for_a_group_is_named_by_its_digest(installation, hook):
    for number, path in enumerate(("/a\nb", "/" + "x" * 600, "/a\nb")):
        hook(stop(cwd=path, n=number), "t", "--group-by", "workspace")
    groups = [g for (g,) in installation.rows("select group_id from notifications order by id")]
    assert groups[0] == groups[2] != groups[1]
    assert all(group.startswith("workspace-") for group in groups)


# -------------------------------------------------------------------------------- stdin and the spool


@pytest.mark.parametrize("said", [STOP, b""], ids=["a payload", "nothing"])
def test_a_stdin_that_is_never_closed_is_not_waited_for(installation, hook, said):
    read, write = os.pipe()
    os.write(write, said)
    assert hook(read) == QUIET
    os.close(write)
    os.close(read)
    [(task_type, _)] = stored(installation)
    assert task_type == ("Stop" if said else "notifications")


def test_a_payload_that_comes_in_pieces_is_whole(installation, hook):
    payload = json.dumps({"hook_event_name": "Stop", "cwd": "/tmp", "nested": {"a": {}}}).encode()
    read, write = os.pipe()

    def write_slowly():
        for at in range(0, len(payload), 7):
            os.write(write, payload[at : at + 7])
        os.close(write)

    writer = threading.Thread(target=write_slowly)
    writer.start()
    assert hook(read) == QUIET
    writer.join()
    os.close(read)
    assert stored(installation)[0][1]["nested"] == {"a": {}}


def test_a_locked_database_sends_the_task_to_the_spool(installation, queue, hook, locked):
    assert hook(STOP, "--wait", "0.1") == QUIET
    [spooled] = (installation.state / "spool/notifications").glob("*.hook")
    assert spooled.read_bytes().endswith(STOP) and spooled.stat().st_mode & 0o777 == 0o600
    locked.rollback()
    assert queue.dequeue_task("notifications")["task_type"] == "Stop"
    assert not spooled.exists() and installation.rows("select * from task_spooled") == []


@pytest.mark.parametrize(
    ("command", "queue_name"),
    [
        ("exec sleep 60", "notifications"),
        ("yes '{\"a\": 1}'", "a_new_one"),
        ("echo '{'; exec sleep 60", "notifications"),
    ],
)
def test_a_stdin_that_does_not_end_and_a_locked_database_end_in_the_spool(
    installation, hook, locked, command, queue_name
):
    feeder = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE)
    installation.processes.append(feeder)
    assert hook(feeder.stdout.fileno(), "--wait", "0.1", queue_name=queue_name) == QUIET
    feeder.stdout.close()
    assert len(list((installation.state / "spool" / queue_name).glob("*.hook"))) == 1


def test_when_neither_takes_it_the_hook_says_so(installation, queue, hook, monkeypatch):
    in_the_way = installation.directory / "in the way"
    in_the_way.write_text("")
    monkeypatch.setattr(queue, "STATE_DIR", in_the_way)
    code, out, error = hook(STOP)
    assert (code, out, error.count("\n")) == (1, "", 1) and "lost" in error


# ------------------------------------------------------------------------------- processes of their own


def start(env, *args, **options) -> subprocess.Popen:
    command = [sys.executable, ROOT / "enqueue.py", "--hook", "notifications", *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, **options)


def test_closed_streams_disturb_nothing(installation):
    command = f'"{sys.executable}" "{ROOT / "enqueue.py"}" --hook notifications Stop'
    script = ["/bin/sh", "-c", f"exec {command} <&- >&- 2>&-"]
    assert subprocess.run(script, env=installation.env, timeout=20).returncode == 0
    assert count(installation) == 1


def test_sixteen_hooks_at_once_are_sixteen_tasks_in_a_bare_environment(installation):
    env, hooks = {"HOME": installation.env["HOME"], "PATH": "/usr/bin:/bin"}, []
    for number in range(16):
        process = start(env, "t", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process.stdin.write(stop(n=number))
        process.stdin.close()
        hooks.append(process)
    for process in hooks:
        assert process.stdout.read() == b"" and process.wait(20) == 0
        process.stdout.close()
    db = Path(env["HOME"], ".claude/automation/lychee/state/tasks.db")
    # A hook that did not get its turn within its second left a file.
    queue_helpers.take_in_spool(db.parent)
    numbers = "select count(*), count(distinct task_id) from notifications"
    assert sqlite3.connect(db).execute(numbers).fetchone() == (16, 16)
    assert db.stat().st_mode & 0o777 == 0o600 and db.parent.stat().st_mode & 0o777 == 0o700


def test_a_hook_killed_half_way_leaves_whole_tasks_or_none(installation):
    installation.enqueue("notifications", "first")
    for number in range(40):
        process = start(installation.env, "t", stderr=subprocess.DEVNULL)
        timer = threading.Timer(0.03 + number * 0.002, process.kill)
        timer.start()
        try:
            process.communicate(stop(n=number))
        except BrokenPipeError:
            process.wait()
        timer.cancel()
    stored(installation)
    assert installation.rows("pragma quick_check") == [("ok",)]
    for path in (installation.state / "spool").rglob("*.hook"):
        assert path.read_bytes().endswith(b"}")


def test_a_relative_state_is_ignored_with_one_line(installation, tmp_path):
    (tmp_path / "workspace").mkdir()
    env = {"TASK_QUEUE_STATE": "state", "HOME": str(installation.directory)}
    done = installation.run(
        "enqueue.py", "--hook", "notifications", input=STOP, env=env, cwd=tmp_path / "workspace"
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    state = installation.directory / ".claude/automation/lychee/state"
    assert "TASK_QUEUE_STATE" in done.stderr and str(state) in done.stderr
    assert list((tmp_path / "workspace").iterdir()) == []
    conn = sqlite3.connect(state / "tasks.db")
    assert conn.execute("select count(*) from notifications").fetchone() == (1,)
