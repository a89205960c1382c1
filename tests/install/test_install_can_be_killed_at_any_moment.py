"""An install that is killed leaves whole files, old or new, and hooks that work; running it again
mends the rest.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import queue_helpers

MAIN = Path(__file__).resolve().parents[2]
ROUNDS = 16
STOP = b'{"session_id": "s", "cwd": "/", "hook_event_name": "Stop"}'


def checkout(directory, mark):
    """A copy of the project in which each file says which version it is."""
    (directory / "handlers").mkdir(parents=True)
    (directory / "taskqueue").mkdir()
    (directory / "bin").mkdir()
    scripts = [
        MAIN / name
        for name in ("install.py", "enqueue.py", "cleanup.py", "bin/hook.sh", "bin/tq.sh")
    ]
    for source in [
        *scripts,
        MAIN / "queue_helpers.py",
        *MAIN.glob("taskqueue/*.py"),
        *MAIN.glob("handlers/*"),
    ]:
        if source.is_file():
            target = directory / source.relative_to(MAIN)
            target.write_text(source.read_text() + f"\n# {mark}\n")
            target.chmod(source.stat().st_mode)
    return directory


def environment(home):
    return {"HOME": str(home), "PATH": os.environ["PATH"]}


def install(source, home, *args):
    return [
        sys.executable,
        source / "install.py",
        *(args or ("install", "--no-warm", "--hook", "yes")),
    ], environment(home)


def finish(source, home, *args):
    command, env = install(source, home, *args)
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def contents(source):
    return {
        name: (source / name).read_bytes()
        for name in (
            "queue_helpers.py",
            "enqueue.py",
            "cleanup.py",
            "install.py",
            "handlers/link_validation",
        )
    }


def inode(path):
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.fixture
def sources(tmp_path):
    return checkout(tmp_path / "old", "old"), checkout(tmp_path / "new", "new")


def test_killed_while_it_upgrades_it_leaves_whole_files_and_a_hook_that_works(tmp_path, sources):
    old, new = sources
    home = tmp_path / "home"
    home.mkdir()
    prefix, settings = home / ".claude/automation/lychee", home / ".claude/settings.json"
    assert finish(old, home).returncode == 0
    wanted = {"old": contents(old), "new": contents(new)}
    where = {
        name: prefix / name if "/" in name else prefix / "runtime/lib" / name
        for name in wanted["old"]
    }
    landmarks = [prefix / "installed.json", *where.values(), settings]
    killed, seen = 0, set()
    for round_ in range(ROUNDS):
        source, name = (old, "old") if round_ % 2 == 0 else (new, "new")
        settings.unlink(missing_ok=True)
        landmark = landmarks[round_ % len(landmarks)]
        before = inode(landmark)
        command, env = install(source, home)
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        while inode(landmark) == before and process.poll() is None:
            time.sleep(0.0002)
        time.sleep(
            random.uniform(0, 0.005)
            # The moment is what varies; it is not a condition to wait for.
        )
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for file, path in where.items():
            versions = [version for version in wanted if path.read_bytes() == wanted[version][file]]
            assert versions, f"{path} is neither old nor new"
            seen.update(versions)
        if settings.exists():
            assert len(json.loads(settings.read_text())["hooks"]["Stop"]) == 1
        hook = subprocess.run(
            ["/bin/sh", prefix / "runtime/hook", "notifications", "link_validation"],
            input=STOP,
            env={"HOME": str(home)},
        )
        assert hook.returncode == 0
        if round_ % 5 == 4:
            ran = finish(source, home)
            assert ran.returncode == 0, ran.stderr
            assert {file: path.read_bytes() for file, path in where.items()} == wanted[name]
            assert len(json.loads(settings.read_text())["hooks"]["Stop"]) == 1
            assert not list(prefix.rglob(".*.new"))
    assert killed > ROUNDS / 3 and seen == {"old", "new"}
    queue_helpers.take_in_spool(prefix / "state")
    rows = (
        sqlite3.connect(prefix / "state/tasks.db")
        .execute("select count(*) from notifications")
        .fetchone()
    )
    # It is the same firing all the time.
    assert rows == (1,)


def test_uninstall_knows_all_that_a_killed_first_install_left(tmp_path, sources):
    old, _ = sources
    for round_ in range(8):
        home = tmp_path / f"home{round_}"
        home.mkdir()
        command, env = install(old, home)
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        prefix = home / ".claude/automation/lychee"
        landmark = [
            prefix / "installed.json",
            prefix / "runtime/lib/enqueue.py",
            prefix / "state/tasks.db",
            home / ".claude/settings.json",
        ][round_ % 4]
        while not landmark.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.wait()
        ran = finish(old, home, "uninstall")
        assert ran.returncode == 0, ran.stderr
        left = [
            path
            for path in prefix.rglob("*")
            if path.is_file() and prefix / "state" not in path.parents
        ]
        assert left == [] and list(home.glob(".claude/*settings*")) == []


def test_killed_while_it_uninstalls_it_can_be_run_again(tmp_path, sources):
    old, _ = sources
    home = tmp_path / "home"
    home.mkdir()
    prefix = home / ".claude/automation/lychee"
    for _ in range(6):
        assert finish(old, home).returncode == 0
        shutil.copytree(prefix / "state", tmp_path / "state", dirs_exist_ok=True)
        command, env = install(old, home, "uninstall")
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(random.uniform(0.03, 0.2))
        process.kill()
        process.wait()
        if (prefix / "installed.json").exists():
            assert finish(old, home, "uninstall").returncode == 0
        assert sorted(path.name for path in prefix.iterdir()) == ["state"]
        assert not (home / ".claude/settings.json").exists()
        assert (prefix / "state/tasks.db").is_file()
