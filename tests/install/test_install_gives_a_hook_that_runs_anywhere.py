"""The installed hook stores its task in a bare environment, whatever is missing, and never exits 2
or prints on stdout.
"""

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from homes import install

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
    install(home, "--hook", "yes")
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
    """Return what is there once the spool was taken in."""
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
