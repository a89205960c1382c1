"""The environment and the directory of the session that fires a hook choose no program, no module
and no other state.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, one_line
from homes import install, run

STOP = b'{"session_id": "s1", "cwd": "/", "hook_event_name": "Stop"}'
MODULES = (
    "socket json queue_helpers sqlite3 getopt sitecustomize usercustomize watchdog enqueue".split()
)
PROGRAMS = "uv python3 python sh env cat date mkdir mktemp mv sleep".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("homes") / "home"
    home.mkdir()
    install(home, "--hook", "yes")
    return home


def note(path: Path, workspace: Path) -> None:
    """Make a program that says when it is run."""
    path.write_text(f"#!/bin/sh\necho {path.name} >>'{workspace.parent / 'hijacked'}'\n")
    path.chmod(0o755)


@pytest.fixture
def workspace(tmp_path):
    """A cloned repository that brings modules and programs of its own, each of which says when it
    is used.
    """
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    hijacked = str(tmp_path / "hijacked")
    for name in MODULES:
        (workspace / f"{name}.py").write_text(f"open({hijacked!r}, 'a').write({name!r})\n")
    # uv runs the Python of a .venv in its working directory.
    (workspace / ".venv/bin").mkdir(parents=True)
    (workspace / ".venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    for name in (*PROGRAMS, ".venv/bin/python", ".venv/bin/python3"):
        note(workspace / name, workspace)
    (workspace / "env").write_text("#!/bin/sh\nexit 1\n")
    (workspace / "uv.toml").write_text("nonsense = [")
    (workspace / ".python-version").write_text("2.7\n")
    (workspace / ".env").write_text("PYTHONPATH=.\n")
    return workspace


def hostile(workspace):
    """Return what a session's environment may hold after it was started in such a workspace."""
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


def test_the_hook_stores_its_task_and_runs_nothing_of_the_workspace(home, workspace):
    prefix = home / ".claude/automation/lychee"
    ran = subprocess.run(
        ["/bin/sh", prefix / "runtime/hook", "notifications", "link_validation"],
        input=STOP,
        env={"HOME": str(home), "UV_OFFLINE": "1", **hostile(workspace)},
        cwd=workspace,
        capture_output=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (0, b"", 1)
    assert b"TASK_QUEUE_STATE is not absolute" in ran.stderr
    (file,) = prefix.glob("state/spool/notifications/*")
    file.unlink()
    assert not (workspace.parent / "hijacked").exists() and not (workspace / "state").exists()
    assert [path.name for path in workspace.iterdir() if path.is_dir()] == [".venv"]


@pytest.mark.parametrize("state", ["/tmp/a\nExecStart=/bin/false", "/tmp/a\r", "relative", "."])
def test_a_state_that_cannot_stand_in_a_unit_or_is_relative_is_refused(home, state):
    """Nothing is written then, not even where an installation is."""
    before = {path: path.lstat().st_mtime_ns for path in home.rglob("*")}
    for command in ("install", "uninstall", "service", "service --dry-run"):
        ran = run(home, *command.split(), env={"TASK_QUEUE_STATE": state}, cwd=home)
        assert ran.returncode == 64 and ran.stderr.count("\n") == 1, ran.stderr
        assert "TASK_QUEUE_STATE" in ran.stderr
    assert {path: path.lstat().st_mtime_ns for path in home.rglob("*")} == before


def test_install_finds_the_same_programs_whatever_the_session_says(home, tmp_path):
    names = ("UV_PYTHON", "PYTHONPATH", "UV", "VIRTUAL_ENV")
    install(tmp_path, env=dict.fromkeys(names, "/gone"), python=[sys.executable, "-E"])
    record = ".claude/automation/lychee/installed.json"
    mine, theirs = (json.loads((place / record).read_text()) for place in (home, tmp_path))
    assert [mine["uv"], mine["python"]] == [theirs["uv"], theirs["python"]]
    assert shutil.which("uv") is None or mine["uv"] not in (None, "/gone")


COMMANDS = [
    "enqueue.py approvals t", "worker.py approvals --drain", "cleanup.py", "tasks.py list", "tasks.py purge approvals --yes",
    "tasks.py restore {backup}", "tasks.py export", "tasks.py doctor", "tasks.py page", "report.py",
]  # fmt: skip


@pytest.mark.parametrize("state", ["state", "~nosuchuser/state", "/tmp/a\nb"])
def test_no_script_takes_the_usual_state_for_the_one_that_was_meant(installation, state):
    """A person who has two states and mistypes one must not have the other restored over, pruned or
    served.
    """
    usual = installation.directory / ".claude/automation/lychee/state"
    for env in ({"TASK_QUEUE_STATE": str(usual)}, {}):
        installation.enqueue("approvals", "t", "{}", "--task-id", "1", env=env)
    backup = installation.directory / "backup.db"
    installation.tq("backup", backup)
    before = sorted((path, path.stat().st_mtime_ns) for path in usual.rglob("*"))
    for command in COMMANDS:
        words = command.format(backup=backup).split()
        done = installation.run(*words, env={"TASK_QUEUE_STATE": state}, cwd=installation.directory)
        one_line(done, 64, "TASK_QUEUE_STATE")
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


@pytest.mark.parametrize("entries", ["", "relative:.:"])
def test_a_program_that_a_script_runs_is_none_of_the_workspaces(home, workspace, entries):
    for name in ("systemctl", "sqlite3", "launchctl"):
        note(workspace / name, workspace)
    for words in (
        "tasks.py service --kind systemd --enable",
        "tasks.py doctor",
        "install.py install --dry-run",
    ):
        script, *words = words.split()
        ran = subprocess.run(
            [sys.executable, ROOT / script, *words],
            env={"HOME": str(home), "PATH": entries},
            cwd=workspace,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in ran.stderr, ran.stderr
        assert not (workspace.parent / "hijacked").exists(), words
