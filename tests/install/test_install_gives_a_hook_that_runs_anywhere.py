"""The installed hook stores its task in a bare environment, whatever is missing, and never exits 2
or prints on stdout.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import queue_helpers

MAIN = Path(__file__).resolve().parents[2]
STOP = b'{"session_id": "s1", "cwd": "/", "hook_event_name": "Stop", "stop_hook_active": false}'
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh") if shutil.which(shell)]


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A home with blanks, quotes and umlauts in its path, and an install in it; nothing but sh is
    ever on PATH.
    """
    home = tmp_path_factory.mktemp("homes") / 'J\u00fcrgen\'s "own" $HOME `x` \\ 100% caf\u00e9'
    home.mkdir()
    ran = subprocess.run(
        [sys.executable, MAIN / "install.py", "install", "--no-warm", "--hook", "yes"],
        stdin=subprocess.DEVNULL,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    settings = home / ".claude/settings.json"
    command = json.loads(settings.read_text())["hooks"]["Stop"][0]["hooks"][0]["command"]
    assert command.count("--start-worker") == 1
    # What starts workers is tested elsewhere; here they would outlive the test.
    return home, command.replace(" --start-worker", "")


@pytest.fixture
def place(master):
    home, command = master
    prefix = home / ".claude/automation/lychee"
    shutil.copytree(prefix / "runtime", home / "runtime.kept", dirs_exist_ok=True)
    sqlite3.connect(prefix / "state/tasks.db", isolation_level=None).execute(
        "delete from notifications"
    ).connection.close()
    yield home, prefix, command
    for file in spooled(prefix):
        file.unlink()
    shutil.rmtree(prefix / "runtime", ignore_errors=True)
    (home / "runtime.kept").rename(prefix / "runtime")


def fire(home, command, shell="sh", payload=STOP, env=None, cwd="/", **options):
    return subprocess.run(
        [shutil.which(shell), "-c", command],
        input=payload,
        cwd=cwd,
        capture_output=True,
        timeout=30,
        env={"HOME": str(home), "PATH": "/nowhere"} if env is None else env,
        **options,
    )


def rows(prefix):
    """What is there once the spool was taken in."""
    queue_helpers.take_in_spool(prefix / "state")
    conn = sqlite3.connect(prefix / "state/tasks.db")
    try:
        return conn.execute("select task_type, data from notifications order by id").fetchall()
    finally:
        conn.close()


def spooled(prefix):
    return sorted(
        path for path in (prefix / "state/spool/notifications").iterdir() if path.is_file()
    )


def assert_quiet(ran, code=0):
    assert (ran.returncode, ran.stdout) == (code, b""), ran.stderr
    assert code or ran.stderr == b""


@pytest.mark.parametrize("shell", SHELLS)
def test_with_nothing_on_path_the_task_is_stored(place, shell):
    home, prefix, command = place
    assert_quiet(fire(home, command, shell))
    ((task_type, data),) = rows(prefix)
    assert task_type == "link_validation" and json.loads(data)["data"]["workspace_path"] == "/"


def test_without_home_and_path_the_task_is_stored(place):
    home, prefix, command = place
    assert_quiet(fire(home, command, env={}))
    assert len(rows(prefix)) == 1


def change_hook(prefix, **values):
    hook = prefix / "runtime/hook"
    lines = hook.read_text().splitlines(True)
    for name, value in values.items():
        lines = [f"{name}={value}\n" if line.startswith(f"{name}=") else line for line in lines]
    hook.write_text("".join(lines))


def test_inside_a_handler_it_stores_nothing(place):
    home, prefix, command = place
    assert_quiet(fire(home, command, env={"HOME": str(home), "TASK_DEPTH": "1"}))
    assert rows(prefix) == [] and spooled(prefix) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_when_everything_was_removed_by_hand_it_ends_well_and_silently(place, shell):
    home, prefix, command = place
    shutil.rmtree(prefix / "runtime")
    assert_quiet(fire(home, command, shell))


def test_where_nothing_can_be_stored_it_exits_1_and_says_why(place):
    home, prefix, command = place
    change_hook(prefix, state="/proc/nowhere")
    ran = fire(home, command)
    assert (ran.returncode, ran.stdout) == (1, b"") and b"was not stored" in ran.stderr
    # A shell itself answers this with 2.
    (prefix / "runtime/hook").write_text("if then\n")
    ran = fire(home, command)
    assert (ran.returncode, ran.stdout) == (1, b"")


def test_a_refused_queue_name_is_not_2_either(place):
    home, _, command = place
    ran = fire(home, command.replace("notifications link_validation", "No-Queue"))
    assert (ran.returncode, ran.stdout) == (1, b"") and ran.stderr


def test_twenty_at_once_store_twenty_tasks(place):
    home, prefix, command = place
    started = [
        subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"HOME": str(home)},
        )
        for _ in range(20)
    ]
    for number, process in enumerate(started):
        # A workspace has one task at a time.
        process.stdin.write(STOP.replace(b'"/"', b'"/%d"' % number))
        process.stdin.close()
    assert [(process.wait(30), process.stdout.read()) for process in started] == [(0, b"")] * 20
    assert len(rows(prefix)) == 20


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"\xff\xfe\x00", b"[1]", b"\xef\xbb\xbf" + STOP, b'{"a": "' + b"x" * 2**20 + b'"}'],
)
def test_any_payload_ends_well(place, payload):
    home, prefix, command = place
    assert_quiet(fire(home, command, payload=payload))
    assert len(rows(prefix)) == 1


def test_a_stdin_that_is_never_closed_does_not_hold_it(place):
    home, prefix, command = place
    with subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"HOME": str(home)},
    ) as process:
        process.stdin.write(STOP)
        process.stdin.flush()
        assert process.wait(10) == 0
        assert process.stdout.read() == b"" and len(rows(prefix)) == 1


def test_a_closed_stdin_does_not_hold_it(place):
    home, prefix, command = place
    ran = subprocess.run(
        ["/bin/sh", "-c", f"{command} <&-"],
        env={"HOME": str(home)},
        capture_output=True,
        timeout=10,
    )
    assert_quiet(ran)
    assert len(rows(prefix)) == 1
