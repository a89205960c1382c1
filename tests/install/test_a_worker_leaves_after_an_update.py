"""Once an install has replaced the scripts, a worker of the old version finishes what it runs and leaves."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for
from homes import PREFIX, install, run

pytest_plugins = ["homes"]

# It tells that it runs, and ends when it may.
HANDLER = '#!/bin/sh\necho "$TASK_ID" >>"$HOME/began"\nuntil [ -e "$HOME/may-end" ]; do sleep 0.02; done\n'


@pytest.fixture
def source(tmp_path):
    """A checkout that a test may change."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "bench", "docs")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=left_out)
    return tmp_path / "checkout"


@pytest.fixture
def installed(home, source):
    """An installation with a handler that runs as long as the test likes; its workers end with it."""
    install(home, source=source)
    # As after an install that has filled uv's cache: this Python has what a worker needs.
    record = home / PREFIX / "installed.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"packages": sys.executable}))
    install(home, source=source)
    handler = home / PREFIX / "handlers/hold"
    handler.write_text(HANDLER)
    handler.chmod(0o755)
    yield home
    (home / "may-end").touch()
    for pid in served(home):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def newer(source) -> None:
    path = source / "taskqueue/show.py"
    path.write_text(f"{path.read_text()}# newer\n")


def log(home) -> str:
    file = home / PREFIX / "state/logs/worker.notifications.log"
    return file.read_text() if file.exists() else ""


def served(home) -> list[int]:
    """The pids of the workers that hooks have started."""
    return [int(pid) for pid in re.findall(r"worker (\d+)-\w+ serves", log(home))]


def env_of(home) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.environ["PATH"]}


def put(home, task_id: str) -> None:
    words = [sys.executable, home / PREFIX / "runtime/lib/enqueue.py", "notifications", "hold"]
    subprocess.run([*words, "--task-id", task_id], env=env_of(home), check=True)


def history(home) -> dict[str, str]:
    conn = sqlite3.connect(home / PREFIX / "state/tasks.db")
    try:
        return dict(conn.execute("select task_id, status from task_history"))
    finally:
        conn.close()


def began(home) -> list[str]:
    return (home / "began").read_text().split() if (home / "began").exists() else []


OF_A_UNIT = ["--environment", "{prefix}/environment", "--single", "--when-work"]


@pytest.mark.parametrize(
    ("options", "how"),
    [([], "; start it again for the new version\n"), (OF_A_UNIT, "\n")],
    ids=["of a terminal", "of a unit"],
)
def test_it_finishes_what_it_runs_says_why_and_ends_well(installed, source, options, how):
    """systemd starts the next one of a unit, a person the next one of a terminal."""
    home = installed
    words = [sys.executable, home / PREFIX / "runtime/lib/worker.py", "notifications"]
    words += [word.replace("{prefix}", str(home / PREFIX)) for word in options]
    put(home, "first")
    worker = subprocess.Popen(words, env=env_of(home), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: began(home) == ["first"], what="the first run")
        newer(source)
        install(home, source=source)
        put(home, "second")
        said = ""
        while "updated" not in said:
            said = worker.stderr.readline()
        assert said.endswith(f"the scripts were updated: leaving when nothing runs{how}")
        assert worker.poll() is None and history(home) == {}
        (home / "may-end").touch()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
    assert history(home) == {"first": "completed"} and began(home) == ["first"]
    assert served(home) == []


def test_a_hooks_worker_leaves_what_waits_to_one_of_the_new_version(installed, source):
    home = installed
    payload = json.dumps({"session_id": "s", "cwd": str(home), "hook_event_name": "Stop"})
    hook = ["/bin/sh", home / PREFIX / "runtime/hook", "notifications", "hold"]
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    subprocess.run([*hook, "--start-worker"], input=payload.encode(), env=env, check=True)
    wait_for(lambda: len(began(home)) == 1, what="the first run")
    newer(source)
    install(home, source=source)
    put(home, "second")
    wait_for(lambda: "the scripts were updated" in log(home), what="the worker's notice")
    (home / "may-end").touch()
    wait_for(lambda: len(history(home)) == 2, what="both runs")
    assert [*history(home).values()] == ["completed"] * 2 and began(home)[1:] == ["second"]
    old, new = served(home)
    assert old != new and log(home).count("updated") == 1


def test_an_install_of_the_same_scripts_moves_no_worker(installed, source):
    home = installed
    words = [sys.executable, home / PREFIX / "runtime/lib/worker.py", "notifications"]
    (home / "may-end").touch()
    worker = subprocess.Popen(words, env=env_of(home), stderr=subprocess.PIPE, text=True)
    try:
        (source / "handlers/other").write_text("#!/bin/sh\n")
        install(home, source=source)
        assert run(home, "service", "--kind", "systemd", source=source).returncode == 0
        # It has looked at the record before it claims.
        put(home, "first")
        wait_for(lambda: history(home) == {"first": "completed"}, what="the run")
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
    assert "updated" not in worker.stderr.read()
