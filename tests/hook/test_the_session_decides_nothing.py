"""The environment and the directory of the session that fires a hook choose no program, no module
and no other state.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from homes import install, run

STOP = b'{"session_id": "s1", "cwd": "/", "hook_event_name": "Stop"}'
MODULES = (
    "socket",
    "json",
    "queue_helpers",
    "sqlite3",
    "getopt",
    "sitecustomize",
    "usercustomize",
    "watchdog",
    "enqueue",
)
PROGRAMS = ("uv", "python3", "python", "sh", "env", "cat", "date", "mkdir", "mktemp", "mv", "sleep")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("homes") / "home"
    home.mkdir()
    install(home, "--hook", "yes")
    yield home
    for pid in workers(home):
        os.kill(pid, 9)


def workers(home):
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                f"{home}/.claude/automation/lychee/runtime/lib/worker.py".encode()
                in cmdline.read_bytes()
            ):
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def workspace(tmp_path):
    """A cloned repository that brings modules and programs of its own, each of which says when it
    is used.
    """
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    for name in MODULES:
        (workspace / f"{name}.py").write_text(
            f"open({str(tmp_path / 'hijacked')!r}, 'a').write({name!r})\n"
        )
    for name in PROGRAMS:
        (workspace / name).write_text(f"#!/bin/sh\necho {name} >>'{tmp_path / 'hijacked'}'\n")
        (workspace / name).chmod(0o755)
    (workspace / "env").write_text("#!/bin/sh\nexit 1\n")
    # uv runs the Python of a .venv in its working directory.
    (workspace / ".venv/bin").mkdir(parents=True)
    (workspace / ".venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    for name in ("python", "python3"):
        (workspace / ".venv/bin" / name).write_text((workspace / "python3").read_text())
        (workspace / ".venv/bin" / name).chmod(0o755)
    (workspace / "uv.toml").write_text("nonsense = [")
    (workspace / ".python-version").write_text("2.7\n")
    (workspace / ".env").write_text("PYTHONPATH=.\n")
    return workspace


def hostile(workspace):
    """What a session's environment may hold after it was started in such a workspace."""
    return {
        "PATH": ".::relative:/usr/bin:/bin",
        "PYTHONPATH": ".",
        "PYTHONHOME": str(workspace),
        "PYTHONSAFEPATH": "1",
        "PYTHONSTARTUP": "json.py",
        "PYTHONWARNINGS": "error",
        "PYTHONPYCACHEPREFIX": "cache",
        "VIRTUAL_ENV": str(workspace),
        "UV": "/gone",
        "UV_PYTHON": "2.7",
        "UV_PROJECT": ".",
        "UV_ENV_FILE": ".env",
        "UV_CONFIG_FILE": "uv.toml",
        "UV_WORKING_DIRECTORY": "/nowhere",
        "UV_PROJECT_ENVIRONMENT": ".",
        "UV_INDEX_URL": "http://127.0.0.1:9/simple",
        "TASK_QUEUE_STATE": "state",
        "TWO_LINES": "a\nUV_CACHE_DIR=/nowhere\nPYTHONPATH=.\n; exit 7",
    }


def fire(home, workspace, args="notifications link_validation", **changed):
    hook = home / ".claude/automation/lychee/runtime/hook"
    cache = subprocess.run(
        ["uv", "cache", "dir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {"HOME": str(home), "UV_CACHE_DIR": cache, "UV_OFFLINE": "1", **hostile(workspace)}
    ran = subprocess.run(
        ["/bin/sh", hook, *args.split()],
        input=STOP,
        env={**env, **changed},
        cwd=workspace,
        capture_output=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (0, b""), ran.stderr
    return ran.stderr.decode()


def rows(home, statement="select data from notifications"):
    conn = sqlite3.connect(home / ".claude/automation/lychee/state/tasks.db", isolation_level=None)
    try:
        return conn.execute(statement).fetchall()
    finally:
        conn.close()


def spooled(home):
    return [
        path
        for path in (home / ".claude/automation/lychee/state/spool").rglob("*")
        if path.is_file()
    ]


def test_the_hook_stores_its_task_and_runs_nothing_of_the_workspace(home, workspace):
    said = fire(home, workspace)
    assert said.count("\n") == 1 and "TASK_QUEUE_STATE is not absolute" in said
    (file,) = spooled(home)
    file.unlink()
    assert not (workspace.parent / "hijacked").exists() and not (workspace / "state").exists()
    assert [path.name for path in workspace.iterdir() if path.is_dir()] == [".venv"]


@pytest.mark.parametrize(
    "command",
    [
        ["install"],
        ["uninstall"],
        ["service"],
        ["service", "--dry-run"],
    ],
)
@pytest.mark.parametrize("state", ["/tmp/a\nExecStart=/bin/false", "/tmp/a\r", "relative", "."])
def test_a_state_that_cannot_stand_in_a_unit_or_is_relative_is_refused(tmp_path, command, state):
    """Nothing is written then, not even where an installation is."""
    install(tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    ran = run(tmp_path, *command, env={"TASK_QUEUE_STATE": state}, cwd=tmp_path)
    assert (
        ran.returncode == 64 and ran.stderr.count("\n") == 1 and "TASK_QUEUE_STATE" in ran.stderr
    ), ran.stderr
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["UV_PYTHON", "PYTHONPATH", "UV", "VIRTUAL_ENV"])
def test_install_finds_the_same_programs_whatever_the_session_says(tmp_path, name):
    records = []
    for number, more in enumerate(({}, {name: "/gone"})):
        home = tmp_path / str(number)
        home.mkdir()
        install(home, env=more, python=[sys.executable, "-E"])
        records.append(json.loads((home / ".claude/automation/lychee/installed.json").read_text()))
    assert (
        records[0]["uv"] == records[1]["uv"] != "/gone"
        and records[0]["python"] == records[1]["python"]
    )
    assert shutil.which("uv") is None or records[0]["uv"]


@pytest.mark.parametrize("state", ["state", "~nosuchuser/state", "/tmp/a\nb"])
@pytest.mark.parametrize("command", [
    "enqueue.py approvals t", "worker.py approvals --drain", "cleanup.py", "tasks.py list", "tasks.py purge approvals --yes",
    "tasks.py restore {backup}", "tasks.py export", "tasks.py doctor", "tasks.py page", "report.py",
])  # fmt: skip
def test_no_script_takes_the_usual_state_for_the_one_that_was_meant(installation, command, state):
    """Whoever has two states and mistypes one must not have the other restored over, pruned or
    served.
    """
    usual = installation.directory / ".claude/automation/lychee/state"
    for env in ({"TASK_QUEUE_STATE": str(usual)}, {}):
        installation.enqueue("approvals", "t", "{}", "--task-id", "1", env=env)
    backup = installation.directory / "backup.db"
    assert installation.run("tasks.py", "backup", backup).returncode == 0
    words = command.format(backup=backup).split()
    before = sorted((path, path.stat().st_mtime_ns) for path in usual.rglob("*"))
    done = installation.run(*words, env={"TASK_QUEUE_STATE": state}, cwd=installation.directory)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (64, "", 1), done.stderr
    assert "TASK_QUEUE_STATE" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in usual.rglob("*")) == before


@pytest.mark.parametrize("home", [".", "rel", "", "./a/.."])
def test_a_relative_home_is_the_accounts(workspace, tmp_path, home):
    """A state, handlers and an installation in the working directory would be the workspace's."""
    place = workspace / home / ".claude/automation/lychee"
    (place / "handlers").mkdir(parents=True)
    (place / "installed.json").write_text('{"files": {}}')
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import queue_helpers as q, pwd; from taskqueue import serving; "
        "there = pwd.getpwuid(os.getuid()).pw_dir; "
        "assert str(q.STATE_DIR).startswith(f'{there}/') and not q.state_complaint, q.STATE_DIR; "
        "assert os.environ['HOME'] == there and serving.default_handlers(q.__file__).is_absolute()"
    )
    env = {"HOME": home, "PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code, ROOT],
        cwd=workspace,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("entries", [".", "", ".:", "relative:."])
def test_a_program_that_a_script_runs_is_none_of_the_workspaces(home, workspace, entries):
    for name in ("systemctl", "sqlite3", "uv", "python3", "launchctl"):
        (workspace / name).write_text(
            f"#!/bin/sh\necho {name} >>'{workspace.parent / 'hijacked'}'\n"
        )
        (workspace / name).chmod(0o755)
    env = {"HOME": str(home), "PATH": entries}
    for words in (
        ["tasks.py", "service", "--kind", "systemd", "--enable"],
        ["tasks.py", "doctor"],
        ["install.py", "install", "--dry-run"],
    ):
        ran = subprocess.run(
            [sys.executable, ROOT / words[0], *words[1:]],
            env=env,
            cwd=workspace,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in ran.stderr, ran.stderr
        assert not (workspace.parent / "hijacked").exists(), words
