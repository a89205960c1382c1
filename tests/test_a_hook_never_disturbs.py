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

PAYLOADS = sorted((Path(__file__).parent / "hook_payloads").glob("*.json"))
STOP = (Path(__file__).parent / "hook_payloads/11_Stop_first.json").read_bytes()

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
    "a megabyte": json.dumps({"cwd": "/tmp", "hook_event_name": "PostToolUse", "tool_response": "ä" * 2**20}).encode(),
    "two objects": STOP + STOP,
    "UTF-16": STOP.decode().encode("utf-16"),
    "a huge number": b'{"cwd": "/tmp", "n": 1' + b"0" * 5000 + b"}",
}


def hook(installation, payload: bytes, *args, **options):
    return installation.run("enqueue.py", "--hook", "notifications", *args, input=payload, **options)


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
        ("session", {"prompt_id": "another", "last_assistant_message": "x"}, {"session_id": "another"}),
        ("workspace", {"session_id": "another", "prompt_id": "another"}, {"cwd": "/elsewhere"}),
        ("content", {"session_id": "another", "prompt_id": "x", "transcript_path": "y"}, {"last_assistant_message": "x"}),
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
        hook(installation, stop_here(installation), "lint", "--once-per", "content", "--window", seconds)
        installation.worker("notifications", "--drain", ready=False).wait(20)
        assert installation.rows("select count(*) from task_history") == [(tasks,)]


@pytest.mark.parametrize("args", [[], ["Not A Queue"], ["q", "t", "d"], ["q", "--jsonl"], ["q", "--no-such"], ["q", "--wait", "x"]])
def test_a_misspelt_hook_never_exits_2(installation, args):
    done = installation.run("enqueue.py", "--hook", *args, input=STOP)
    assert done.returncode in (64, 65) and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_stdin_that_is_never_closed_is_not_waited_for(installation):
    read, write = os.pipe()
    os.write(write, STOP)
    began = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "enqueue.py", "--hook", "notifications"], stdin=read, env=installation.env,
                          capture_output=True, timeout=20)  # fmt: skip
    took = time.monotonic() - began
    os.close(write)
    os.close(read)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert installation.rows("select task_type from notifications") == [("Stop",)]
    assert took < 0.9  # the payload was whole long before --wait was over


def test_stdin_that_never_says_anything_is_given_up(installation):
    read, write = os.pipe()
    done = subprocess.run([sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "--wait", "0.3"], stdin=read,
                          env=installation.env, capture_output=True, timeout=20)  # fmt: skip
    os.close(write)
    os.close(read)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_a_payload_that_comes_in_pieces_is_whole(installation):
    process = subprocess.Popen([sys.executable, ROOT / "enqueue.py", "--hook", "notifications"], stdin=subprocess.PIPE,
                               env=installation.env)  # fmt: skip
    payload = json.dumps({"hook_event_name": "Stop", "cwd": "/tmp", "nested": {"a": {}}}).encode()
    for at in range(0, len(payload), 7):
        process.stdin.write(payload[at : at + 7])
        process.stdin.flush()
    process.stdin.close()
    assert process.wait(20) == 0
    [(data,)] = installation.rows("select data from notifications")
    assert json.loads(data)["data"]["nested"] == {"a": {}}


def test_closed_streams_disturb_nothing(installation):
    script = f'exec "{sys.executable}" "{ROOT / "enqueue.py"}" --hook notifications Stop <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script], env=installation.env, timeout=20).returncode == 0
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_sixteen_hooks_at_once_are_sixteen_tasks_in_a_bare_environment(installation):
    env = {"HOME": installation.env["HOME"], "PATH": "/usr/bin:/bin"}
    hooks = []
    for number in range(16):
        payload = STOP.replace(b"I fixed two links.", b"%d" % number)
        process = subprocess.Popen([sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "link_validation"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)  # fmt: skip
        process.stdin.write(payload)
        process.stdin.close()
        hooks.append(process)
    for process in hooks:
        assert process.stdout.read() == b"" and process.wait(20) == 0
        process.stdout.close()
    db = Path(env["HOME"], ".claude/automation/lychee/state/tasks.db")
    assert sqlite3.connect(db).execute("select count(*), count(distinct task_id) from notifications").fetchone() == (16, 16)
    assert db.stat().st_mode & 0o777 == 0o600 and db.parent.stat().st_mode & 0o777 == 0o700


def test_a_locked_database_sends_the_task_to_the_spool_in_time(installation):
    installation.enqueue("notifications", "first")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    began = time.monotonic()
    done = hook(installation, STOP, "--wait", "0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began < 1.5
    [spooled] = (installation.state / "spool/notifications").glob("*.json")
    assert json.loads(spooled.read_text())["data"]["session_id"] and spooled.stat().st_mode & 0o777 == 0o600
    lock.execute("rollback")
    lock.close()
    installation.handler("Stop", "#!/bin/sh\n")
    installation.handler("first", "#!/bin/sh\n")
    installation.worker("notifications")
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(2,)])
    assert not spooled.exists() and installation.rows("select * from task_spooled") == []


def test_when_neither_takes_it_the_hook_says_so(installation):
    installation.state.parent.joinpath("in the way").write_text("")
    done = hook(installation, STOP, env={"TASK_QUEUE_STATE": str(installation.state.parent / "in the way")})
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "lost" in done.stderr and "Traceback" not in done.stderr


def test_a_hook_killed_half_way_leaves_whole_tasks_or_none(installation):
    installation.enqueue("notifications", "first")
    for number in range(40):
        process = subprocess.Popen([sys.executable, ROOT / "enqueue.py", "--hook", "notifications", "t"], stdin=subprocess.PIPE,
                                   env=installation.env, stderr=subprocess.DEVNULL)  # fmt: skip
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
    for path in (installation.state / "spool").rglob("*.json"):
        json.loads(path.read_text())
