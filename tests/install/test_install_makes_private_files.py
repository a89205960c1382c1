"""Under umask 000, too, what install makes is its owner's alone; what was there and is not ours
keeps its mode.
"""

import os
import sqlite3
import subprocess
import sys
from functools import partial

import homes
import pytest
from homes import PREFIX

pytest_plugins = ["homes"]
run = partial(homes.run, umask=0)


def test_nor_what_python_compiles_there(home):
    """Python makes a directory for it with the umask of whoever runs a script first."""
    assert run(home, "install").returncode == 0
    lib = home / PREFIX / "runtime/lib"
    for open_before in (False, True):
        if open_before:
            for directory in (lib.parent, lib, lib / "__pycache__"):
                directory.chmod(0o777)
            assert run(home, "install").returncode == 0
        env = {"HOME": str(home), "PATH": os.environ["PATH"]}
        command = [sys.executable, lib / "enqueue.py", "approvals", "t"]
        done = subprocess.run(command, env=env, umask=0, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert list((lib / "__pycache__").glob("queue_helpers.*.pyc"))
        assert [path for path in lib.parent.rglob("*") if mode(path) & 0o077] == []
        assert mode(lib.parent) == 0o700


def mode(path):
    return path.lstat().st_mode & 0o777


def test_nothing_that_it_makes_is_open_to_others(home):
    (home / ".claude").rmdir()
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert run(home, "service", "--kind", "systemd").returncode == 0
    made = {path: mode(path) for path in home.rglob("*")}
    assert [str(path) for path, found in made.items() if found & 0o077] == []
    prefix = home / PREFIX
    assert (
        made[prefix / "runtime/lib/enqueue.py"]
        == made[prefix / "runtime/hook"]
        == made[prefix / "handlers/link_validation"]
        == 0o700
    )
    assert (
        made[prefix / "runtime/lib/queue_helpers.py"]
        == made[prefix / "state/tasks.db"]
        == made[prefix / "installed.json"]
        == 0o600
    )


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_state_that_a_shell_made_first_becomes_private(home, umask):
    state = home / PREFIX / "state"
    command = f"umask {umask:o}; mkdir -p '{state}/spool/notifications' '{state}/logs' && sqlite3 '{state}/tasks.db' 'pragma journal_mode = wal; {TABLE}'"
    subprocess.run(["/bin/sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
    assert run(home, "install").returncode == 0
    for path in (state, *state.rglob("*")):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path
    assert sqlite3.connect(state / "tasks.db").execute(
        "select count(*) from notifications"
    ).fetchone() == (0,)


TABLE = "create table notifications (id integer primary key autoincrement, data text not null)"


def test_what_is_not_ours_keeps_its_mode(home):
    theirs = {home / ".claude": 0o755, home / ".claude/automation": 0o750, home / ".config": 0o755}
    for directory, wanted in theirs.items():
        directory.mkdir(exist_ok=True)
        directory.chmod(wanted)
    settings = home / ".claude/settings.json"
    settings.write_text("{}")
    settings.chmod(0o644)
    own = home / PREFIX / "handlers/own"
    own.parent.mkdir(parents=True)
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert run(home, "service", "--kind", "systemd").returncode == 0
    assert {path: mode(path) for path in theirs} == theirs
    assert (mode(settings), mode(own)) == (0o644, 0o755)
    (backup,) = settings.parent.glob("settings.json.*.backup")
    assert mode(backup) == 0o644


def test_what_an_older_version_installed_becomes_private(home):
    assert run(home, "install").returncode == 0
    prefix = home / PREFIX
    for path in (
        prefix / "runtime/lib/enqueue.py",
        prefix / "runtime/hook",
        prefix / "handlers/link_validation",
    ):
        path.chmod(0o755)
    assert run(home, "install").returncode == 0
    assert (
        mode(prefix / "runtime/lib/enqueue.py")
        == mode(prefix / "runtime/hook")
        == mode(prefix / "handlers/link_validation")
        == 0o700
    )
