"""After install and a yes, a hook in a bare environment without a network ends in a handler that
has run.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_scripts

MAIN = Path(__file__).resolve().parents[2]
CACHE = subprocess.run(
    ["uv", "cache", "dir"], capture_output=True, text=True, check=True
).stdout.strip()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a complete install: this is what may download, and nothing after it."""
    home = tmp_path_factory.mktemp("homes") / "J\u00fcrgen's home"
    home.mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CLAUDE_CONFIG_DIR", "TASK_QUEUE_STATE", "XDG_CONFIG_HOME")
    }
    ran = subprocess.run(
        [sys.executable, MAIN / "install.py", "install", "--yes"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**env, "HOME": str(home), "UV_CACHE_DIR": CACHE},
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    yield home
    for pid in workers(home):
        os.kill(pid, signal.SIGKILL)


def workers(home):
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                str(home / ".claude/automation/lychee/runtime/lib/worker.py").encode()
                in cmdline.read_bytes()
            ):
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return found


def bare(home):
    return {"HOME": str(home), "PATH": "/usr/bin:/bin", "UV_CACHE_DIR": CACHE, "UV_OFFLINE": "1"}


def test_install_says_why_a_script_does_not_run_yet_not_what_uv_hints_at(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, MAIN / "install.py", "install", tmp_path / "prefix", "--no-command"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**env, "UV_OFFLINE": "1"},
        timeout=120,
    )
    (line,) = [line for line in done.stderr.splitlines() if "worker.py does not run yet" in line]
    assert done.returncode == 1 and "was not found in the cache" in line and "hint:" not in line


@pytest.mark.parametrize("script", ["enqueue.py", "worker.py", "cleanup.py", "tasks.py"])
def test_every_script_runs_without_a_network(home, script):
    path = home / ".claude/automation/lychee/runtime/lib" / script
    uv = json.loads((home / ".claude/automation/lychee/installed.json").read_text())["uv"]
    ran = subprocess.run(
        [uv, "run", "--script", path, "--help"],
        env=bare(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0 and "exit codes" in ran.stdout, ran.stderr


def test_the_hook_ends_in_a_handler_that_has_run(home):
    prefix = home / ".claude/automation/lychee"
    workspace = home / "docs"
    workspace.mkdir()
    (workspace / "README.md").write_text("[gone](missing.md)\n")
    command = json.loads((home / ".claude/settings.json").read_text())["hooks"]["Stop"][0]["hooks"][
        0
    ]["command"]
    payload = json.dumps({"session_id": "s", "cwd": str(workspace), "hook_event_name": "Stop"})
    hook = subprocess.run(
        ["/bin/sh", "-c", command],
        input=payload,
        env=bare(home),
        cwd=workspace,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (hook.returncode, hook.stdout, hook.stderr) == (0, "", "")
    conn = sqlite3.connect(prefix / "state/tasks.db", isolation_level=None)
    ((status, result, log),) = wait_for(
        lambda: conn.execute("select status, result, log from task_history").fetchall()
    )
    assert status == "completed", log
    assert "missing.md" in Path(json.loads(result)["results_file"]).read_text()
    assert workers(home), "it stays for a while, in case there is more"
    programs = {Path(f"/proc/{pid}/exe").resolve().name for pid in workers(home)}
    assert programs and "uv" not in programs, "a worker costs no start of uv"


def test_upgrading_under_a_running_worker_loses_and_repeats_nothing(home):
    """Each task appends its number to a file, while the scripts are replaced again and again.

    A worker of an older version leaves, and the person starts another.
    """
    prefix = home / ".claude/automation/lychee"
    state, lib = prefix / "state", prefix / "runtime/lib"
    handler = prefix / "handlers/append"
    handler.write_text('#!/bin/sh\ncat >/dev/null\necho "$TASK_ID" >>"$HOME/appended"\n')
    handler.chmod(0o755)
    uv = json.loads((prefix / "installed.json").read_text())["uv"]
    for pid in workers(home):
        os.kill(pid, signal.SIGKILL)
    env = bare(home) | {"TASK_QUEUE_STATE": str(state)}
    words, log = [uv, "run", "--script", lib / "worker.py", "notifications"], home / "log"
    workers_ = []

    def has_worker():
        """Have a worker run; return whether all is done."""
        if not workers_ or workers_[-1].poll() is not None:
            assert not workers_ or workers_[-1].returncode == 0
            with open(log, "ab") as file:
                workers_.append(subprocess.Popen(words, env=env, stderr=file))
        appended = home / "appended"
        return appended.exists() and appended.read_text().count("\n") >= 40

    try:
        for number in range(40):
            has_worker()
            if number % 8 == 4:
                changed = (MAIN / "queue_helpers.py").read_text() + f"# {number}\n"
                source = home / "checkout"
                names = ("install.py", "enqueue.py", "worker.py", "bin/hook.sh", "bin/tq.sh")
                copy_scripts(source, *names)
                (source / "queue_helpers.py").write_text(changed)
                ran = subprocess.run(
                    [sys.executable, source / "install.py", "install", "--no-warm", "--hook", "no"],
                    stdin=subprocess.DEVNULL,
                    env={"HOME": str(home), "PATH": os.environ["PATH"]},
                    capture_output=True,
                    text=True,
                )
                assert ran.returncode == 0, ran.stderr
                assert (lib / "queue_helpers.py").read_text() == changed
            put = subprocess.run(
                [
                    sys.executable,
                    lib / "enqueue.py",
                    "notifications",
                    "append",
                    "--task-id",
                    f"n{number}",
                ],
                env=env,
                capture_output=True,
                text=True,
            )
            assert put.stdout.split()[1] == f"n{number}", put.stderr
        # However long the upgrades take, they are under this worker.
        wait_for(has_worker, 60)
        workers_[-1].terminate()
        assert workers_[-1].wait(60) == 0
    finally:
        workers_[-1].kill()
    log = log.read_text()
    assert "trouble" not in log and "Traceback" not in log
    assert 1 < len(workers_) == log.count("the scripts were updated: leaving") + 1
    assert sorted((home / "appended").read_text().split()) == sorted(
        f"n{number}" for number in range(40)
    ), log
