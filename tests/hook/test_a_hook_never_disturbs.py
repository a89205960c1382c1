"""enqueue.py --hook: exit 0, nothing on stdout, one task, whatever it is fed; never 2; never long."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

import queue_helpers

pytestmark = pytest.mark.first

PAYLOADS = sorted((Path(__file__).parents[1] / "hook_payloads").glob("*.json"))
STOP = (Path(__file__).parents[1] / "hook_payloads/11_Stop_first.json").read_bytes()

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


def hook(installation, payload: bytes, *args, **options):
    return installation.run(
        "enqueue.py", "--hook", "notifications", *args, input=payload, **options
    )


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_every_event_is_one_task(installation, path):
    done = hook(installation, path.read_bytes())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [(data, task_type)] = installation.rows("select data, task_type from notifications")
    task = json.loads(data)["data"]
    if path.stat().st_size:
        payload = json.loads(path.read_text("utf-8-sig"))
        assert task == {**payload, "workspace_path": payload["cwd"]}
        assert task_type == payload["hook_event_name"]


@pytest.mark.parametrize("payload", WORSE.values(), ids=WORSE)
def test_what_no_hook_should_send_is_kept_as_one_task(installation, payload):
    done = hook(installation, payload, "link_validation")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [(data, task_type)] = installation.rows("select data, task_type from notifications")
    assert task_type == "link_validation" and isinstance(json.loads(data)["data"], dict)
    done = hook(installation, payload)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unreadable_input_is_kept_for_diagnosis(installation):
    hook(installation, b'{"cwd": "/tmp", tru')
    [(data,)] = installation.rows("select data from notifications")
    assert json.loads(data)["data"]["unreadable_payload"] == '{"cwd": "/tmp", tru'


def test_the_same_firing_twice_is_one_task_and_two_firings_are_two(installation):
    hook(installation, STOP)
    hook(installation, STOP)
    assert installation.rows("select count(*) from notifications") == [(1,)]
    hook(installation, STOP.replace(b"I fixed two links.", b"I fixed three."))
    assert installation.rows("select count(*) from notifications") == [(2,)]


def stop_here(installation) -> bytes:
    """A firing in a workspace that exists, so that its handler can run."""
    return json.dumps(json.loads(STOP) | {"cwd": str(installation.directory)}).encode()


def test_the_same_firing_is_one_task_even_when_a_fast_worker_has_finished_it(installation):
    installation.handler("Stop", "#!/bin/sh\n")
    hook(installation, stop_here(installation))
    installation.worker("notifications", "--drain", ready=False).wait(20)
    hook(installation, stop_here(installation))
    assert installation.rows("select count(*) from notifications") == [(0,)]
    assert installation.rows("select count(*) from task_history") == [(1,)]


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        (
            "session",
            {"prompt_id": "another", "last_assistant_message": "x"},
            {"session_id": "another"},
        ),
        ("workspace", {"session_id": "another", "prompt_id": "another"}, {"cwd": "/elsewhere"}),
        (
            "content",
            {"session_id": "another", "prompt_id": "x", "transcript_path": "y"},
            {"last_assistant_message": "x"},
        ),
        (
            "content",
            {"background_tasks": [1], "session_crons": [2], "effort": {"level": "low"}},
            {"last_assistant_message": "x"},
        ),
        (
            "content",
            {"permission_mode": "plan", "stop_hook_active": True, "comes_next_year": 1},
            {"cwd": "/elsewhere"},
        ),
    ],
)
def test_once_per_makes_coarser_keys(installation, key, same, other):
    payload = json.loads(STOP)
    for change in ({}, same, other):
        hook(installation, json.dumps(payload | change).encode(), "lint", "--once-per", key)
    assert installation.rows("select count(*) from notifications") == [(2,)]


def test_a_window_keeps_finished_firings_in_mind(installation):
    installation.handler("lint", "#!/bin/sh\n")
    for seconds, tasks in ((1800, 1), (1800, 1), (0, 2)):
        hook(
            installation,
            stop_here(installation),
            "lint",
            "--once-per",
            "content",
            "--window",
            seconds,
        )
        installation.worker("notifications", "--drain", ready=False).wait(20)
        assert installation.rows("select count(*) from task_history") == [(tasks,)]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["Not A Queue"],
        ["q", "t", "d"],
        ["q", "--jsonl"],
        ["q", "--no-such"],
        ["q", "--wait", "x"],
    ],
)
def test_a_misspelt_hook_never_exits_2(installation, args):
    done = installation.run("enqueue.py", "--hook", *args, input=STOP)
    assert done.returncode in (64, 65) and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_stdin_that_is_never_closed_is_not_waited_for(installation):
    read, write = os.pipe()
    os.write(write, STOP)
    done = subprocess.run(
        [sys.executable, ROOT / "enqueue.py", "--hook", "notifications"],
        stdin=read,
        env=installation.env,
        capture_output=True,
        timeout=20,
    )
    os.close(write)
    os.close(read)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert installation.rows("select task_type from notifications") == [("Stop",)]


def test_stdin_that_never_says_anything_is_given_up(installation):
    read, write = os.pipe()
    done = subprocess.run(
        [sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "--wait", "0.3"],
        stdin=read,
        env=installation.env,
        capture_output=True,
        timeout=20,
    )
    os.close(write)
    os.close(read)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_a_payload_that_comes_in_pieces_is_whole(installation):
    process = subprocess.Popen(
        [sys.executable, ROOT / "enqueue.py", "--hook", "notifications"],
        stdin=subprocess.PIPE,
        env=installation.env,
    )
    payload = json.dumps({"hook_event_name": "Stop", "cwd": "/tmp", "nested": {"a": {}}}).encode()
    for at in range(0, len(payload), 7):
        process.stdin.write(payload[at : at + 7])
        process.stdin.flush()
    process.stdin.close()
    assert process.wait(20) == 0
    [(data,)] = installation.rows("select data from notifications")
    assert json.loads(data)["data"]["nested"] == {"a": {}}


def test_closed_streams_disturb_nothing(installation):
    script = (
        f'exec "{sys.executable}" "{ROOT / "enqueue.py"}" --hook notifications Stop <&- >&- 2>&-'
    )
    assert (
        subprocess.run(["/bin/sh", "-c", script], env=installation.env, timeout=20).returncode == 0
    )
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_sixteen_hooks_at_once_are_sixteen_tasks_in_a_bare_environment(installation):
    env = {"HOME": installation.env["HOME"], "PATH": "/usr/bin:/bin"}
    hooks = []
    for number in range(16):
        payload = STOP.replace(b"I fixed two links.", b"%d" % number)
        process = subprocess.Popen(
            [sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "link_validation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
        )
        process.stdin.write(payload)
        process.stdin.close()
        hooks.append(process)
    for process in hooks:
        assert process.stdout.read() == b"" and process.wait(20) == 0
        process.stdout.close()
    db = Path(env["HOME"], ".claude/automation/lychee/state/tasks.db")
    # Who did not get its turn within its second is in the spool.
    queue_helpers.take_in_spool(db.parent)
    assert sqlite3.connect(db).execute(
        "select count(*), count(distinct task_id) from notifications"
    ).fetchone() == (16, 16)
    assert db.stat().st_mode & 0o777 == 0o600 and db.parent.stat().st_mode & 0o777 == 0o700


def test_a_locked_database_sends_the_task_to_the_spool_in_time(installation):
    installation.enqueue("notifications", "first")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    done = hook(installation, STOP, "--wait", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [spooled] = (installation.state / "spool/notifications").glob("*.hook")
    assert spooled.read_bytes().endswith(STOP) and spooled.stat().st_mode & 0o777 == 0o600
    lock.execute("rollback")
    lock.close()
    installation.handler("Stop", "#!/bin/sh\n")
    installation.handler("first", "#!/bin/sh\n")
    installation.worker("notifications")
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(2,)])
    assert not spooled.exists() and installation.rows("select * from task_spooled") == []


def test_when_neither_takes_it_the_hook_says_so(installation):
    installation.state.parent.joinpath("in the way").write_text("")
    done = hook(
        installation, STOP, env={"TASK_QUEUE_STATE": str(installation.state.parent / "in the way")}
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "lost" in done.stderr and "Traceback" not in done.stderr


def test_a_hook_killed_half_way_leaves_whole_tasks_or_none(installation):
    installation.enqueue("notifications", "first")
    for number in range(40):
        process = subprocess.Popen(
            [sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "t"],
            stdin=subprocess.PIPE,
            env=installation.env,
            stderr=subprocess.DEVNULL,
        )
        timer = threading.Timer(0.03 + number * 0.002, process.kill)
        timer.start()
        try:
            process.communicate(STOP.replace(b"two", b"%d" % number))
        except BrokenPipeError:
            process.wait()
        timer.cancel()
    for (data,) in installation.rows("select data from notifications"):
        json.loads(data)
    assert installation.rows("pragma quick_check") == [("ok",)]
    for path in (installation.state / "spool").rglob("*.hook"):
        assert path.read_bytes().endswith(b"}")


def test_odd_numbers_are_kept_as_text(installation):
    hook(
        installation,
        b'{"cwd": "/", "a": 1e400, "b": [NaN, -Infinity], "c": 1' + b"0" * 5000 + b', "d": 0.5}',
    )
    [(data,)] = installation.rows("select data from notifications")
    task = json.loads(data, parse_constant=lambda name: pytest.fail(name))["data"]
    assert (task["a"], task["b"], task["d"]) == ("1e400", ["NaN", "-Infinity"], 0.5) and len(
        task["c"]
    ) == 5001
    assert len(task["numbers_kept_as_text"]) == 4


def test_a_batch_of_tools_is_the_same_whatever_the_ids_of_its_calls(installation):
    payload = json.loads(
        next(path for path in PAYLOADS if "PostToolBatch" in path.name).read_text()
    )
    hook(installation, json.dumps(payload).encode(), "lint", "--once-per", "content")
    payload["tool_calls"][0]["tool_use_id"] = "another"
    hook(installation, json.dumps(payload).encode(), "lint", "--once-per", "content")
    assert installation.rows("select count(*) from notifications") == [(1,)]
    payload["tool_calls"][0]["tool_input"]["file_path"] = "/another"
    hook(installation, json.dumps(payload).encode(), "lint", "--once-per", "content")
    assert installation.rows("select count(*) from notifications") == [(2,)]


def test_of_an_event_that_is_not_known_everything_counts_that_is_not_known_to_change(installation):
    payload = {
        "hook_event_name": "ComesNextYear",
        "cwd": "/",
        "what": 1,
        "session_id": "s",
        "effort": 1,
    }
    for change in ({}, {"session_id": "t", "effort": 2}, {"what": 2}):
        hook(installation, json.dumps(payload | change).encode(), "--once-per", "content")
    assert installation.rows("select count(*) from notifications") == [(2,)]


def test_the_projects_directory_is_kept_while_cwd_follows_worktrees(installation):
    hook(installation, STOP, env={"CLAUDE_PROJECT_DIR": "/home/user/größe"})
    hook(installation, STOP, "other", env={"CLAUDE_PROJECT_DIR": ""})
    first, second = [
        json.loads(data)["data"]
        for (data,) in installation.rows("select data from notifications order by id")
    ]
    assert first["project_dir"] == "/home/user/größe" and first["workspace_path"] == first["cwd"]
    assert "project_dir" not in second


def test_ids_are_short_and_differ_early(installation):
    for number in range(3):
        hook(installation, STOP.replace(b"two", b"%d" % number), "link_validation")
    ids = [task_id for (task_id,) in installation.rows("select task_id from notifications")]
    assert len({task_id[:12] for task_id in ids}) == 3 and max(map(len, ids)) <= 25


def test_a_relative_state_is_ignored_with_one_line(installation, tmp_path):
    (tmp_path / "workspace").mkdir()
    env = {"TASK_QUEUE_STATE": "state", "HOME": str(installation.directory)}
    done = hook(installation, STOP, env=env, cwd=tmp_path / "workspace")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    state = installation.directory / ".claude/automation/lychee/state"
    assert (
        "TASK_QUEUE_STATE" in done.stderr
        and str(state) in done.stderr
        and list((tmp_path / "workspace").iterdir()) == []
    )
    assert sqlite3.connect(state / "tasks.db").execute(
        "select count(*) from notifications"
    ).fetchone() == (1,)


def test_a_relative_state_is_refused_elsewhere(installation, tmp_path):
    env = {"TASK_QUEUE_STATE": "state", "HOME": str(tmp_path)}
    for args in (["notifications", "t"], ["notifications", "t", "--jsonl"]):
        done = installation.run("enqueue.py", *args, env=env, cwd=tmp_path, input="")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (
            64,
            "",
            1,
        ) and "TASK_QUEUE_STATE" in done.stderr
    assert not (tmp_path / "state").exists() and not (tmp_path / ".claude").exists()


def test_a_hook_that_makes_worktree_creation_fail_says_so_and_stores_nothing(installation):
    payload = b'{"hook_event_name": "WorktreeCreate", "cwd": "/", "name": "x"}'
    for args in ([], ["link_validation"]):
        done = hook(installation, payload, *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (
            0,
            "",
            1,
        ) and "WorktreeCreate" in done.stderr
    assert (
        not installation.rows("select * from notifications")
        and not (installation.state / "spool").exists()
    )


@pytest.mark.parametrize("trouble", ["silent", "endless", "not whole"])
@pytest.mark.parametrize("queue_name", ["notifications", "a_new_one"])
def test_a_stdin_that_does_not_end_and_a_locked_database_end_in_the_spool(
    installation, trouble, queue_name
):
    installation.enqueue("notifications", "first")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    feeder = subprocess.Popen(
        {
            "silent": ["sleep", "60"],
            "endless": ["yes", '{"a": 1}'],
            "not whole": ["sh", "-c", "echo '{\"a\": {}'; exec sleep 60"],
        }[trouble],
        stdout=subprocess.PIPE,
    )
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "enqueue.py", "--hook", queue_name, "--wait", "0.2"],
            stdin=feeder.stdout,
            env=installation.env,
            capture_output=True,
            timeout=50,
        )
    finally:
        feeder.kill()
        feeder.wait()
        lock.close()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len(list((installation.state / "spool" / queue_name).glob("*.hook"))) == 1


def test_an_option_of_a_task_is_one_of_a_hook_too(installation):
    hook(
        installation,
        STOP,
        "--hold",
        "--group-by",
        "workspace",
        "--priority",
        "3",
        env={"CLAUDE_PROJECT_DIR": "/p"},
    )
    hook(
        installation,
        STOP,
        "later",
        "--delay",
        "10m",
        "--group-by",
        "project",
        env={"CLAUDE_PROJECT_DIR": "/p"},
    )
    hook(installation, STOP, "soon", "--ttl", "1h", "--group-by", "session")
    hook(installation, b"[]", "odd", "--group-by", "session", cwd="/usr")
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


def test_a_group_that_is_no_text_for_a_group_is_named_by_its_digest(installation):
    for path in ("/a\nb", "/" + "x" * 600, "/a\nb"):
        hook(
            installation,
            json.dumps({"cwd": path, "n": time.time_ns()}).encode(),
            "t",
            "--group-by",
            "workspace",
        )
    groups = [
        group for (group,) in installation.rows("select group_id from notifications order by id")
    ]
    assert groups[0] == groups[2] != groups[1] and all(
        group.startswith("workspace-") for group in groups
    )


def test_ten_edits_while_a_check_runs_are_one_more_run(installation, queue):
    args = ("check", "--once-per", "workspace", "--on-duplicate", "rerun")
    mine = queue.get_ack_queue("notifications")
    hook(installation, STOP.replace(b"two", b"0"), *args)
    first, _ = mine.get(timeout=5)
    for number in range(1, 11):
        assert hook(installation, STOP.replace(b"two", b"%d" % number), *args).stdout == ""
    assert installation.rows("select count(*) from notifications") == [(1,)]
    mine.ack(first)
    second, text = mine.get(timeout=5)
    assert "I fixed 10 links" in json.loads(text)["data"]["last_assistant_message"]
    mine.ack(second)
    assert mine.empty()
    # An edit just after the end of a check is checked; the same one told by a second hook is not
    # checked again.
    for _ in range(2):
        hook(installation, STOP.replace(b"two", b"11"), *args)
        if not mine.empty():
            mine.ack(mine.get(timeout=5)[0])
    assert installation.rows("select count(*) from task_history") == [(3,)]


def test_the_same_firing_told_twice_while_it_runs_makes_one_run(installation, queue):
    args = ("check", "--once-per", "workspace", "--on-duplicate", "rerun")
    mine = queue.get_ack_queue("notifications")
    hook(installation, STOP, *args)
    row_id, _ = mine.get(timeout=5)
    hook(installation, STOP, *args)
    mine.ack(row_id)
    assert mine.empty() and installation.rows("select count(*) from task_history") == [(1,)]
