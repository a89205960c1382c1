"""Whatever PYTHONPATH and PYTHONSAFEPATH say, a script finds its modules beside itself, and none in
a workspace.
"""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\n# /// script\n" in path.read_text())
# What other programs than ours bring, and what ours are called.
OTHERS = {"watchdog", "persistqueue", "rich", "psycopg", "procrastinate", "typing_extensions"}
OTHERS |= {path.stem for path in ROOT.glob("*.py")}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A repository with a module of every name, each of which notes that it was imported."""
    made = tmp_path_factory.mktemp("somebody's") / "workspace"
    (made / "lib").mkdir(parents=True)
    # These are there before a script's first line.
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    for name in (sys.stdlib_module_names | OTHERS) - {name.partition(".")[0] for name in loaded}:
        if name not in ("sitecustomize", "usercustomize"):
            for directory in (made, made / "lib"):
                note = f"open({str(made.parent / 'hijacked')!r}, 'a').write({name!r} + ' ')\n"
                (directory / f"{name}.py").write_text(note)
    return made


@pytest.fixture
def hijacked(workspace):
    """Which modules of the workspace were imported."""
    note = workspace.parent / "hijacked"
    note.unlink(missing_ok=True)
    return lambda: note.read_text() if note.exists() else ""


PATHS = {
    "a dot": ".",
    "empty entries": "::",
    "a relative directory": "lib",
    "more dots": "../workspace:./lib/..",
    "its absolute path": "{workspace}",
    "a link to it": "{link}",
    "after a good one": "/usr/lib:.",
}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request, workspace, tmp_path):
    """A PYTHONPATH that names the workspace."""
    (tmp_path / "link").symlink_to(workspace)
    return request.param.format(workspace=workspace, link=tmp_path / "link")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(workspace, hijacked, tmp_path, script):
    env = {"HOME": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTHONPATH": f".:{workspace}/lib"}
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        cwd=workspace,
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, hijacked()) == (0, ""), done.stderr


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_way_of_a_task(installation, workspace, hijacked, path, safe):
    env = {"PYTHONSAFEPATH": safe, "PYTHONPATH": path}
    installation.handler("it", '#!/bin/sh\necho \'{"summary": "well"}\'\n')
    here = {"cwd": workspace, "env": env}
    task = installation.enqueue("notifications", "it", "{}", **here)
    hook = ("enqueue.py", "--hook", "notifications", "it", "--start-worker")
    fired = installation.run(*hook, input='{"cwd": "/", "hook_event_name": "Stop"}', **here)
    assert (fired.returncode, fired.stdout, fired.stderr) == (0, "", "")
    for words in (
        ("worker.py", "notifications", "--drain", "--handlers", installation.handlers),
        ("tasks.py", "list"),
        ("tasks.py", "doctor", "--json"),
        ("tasks.py", "export", "--history"),
        ("cleanup.py",),
        ("report.py",),
    ):
        done = installation.run(*words, **here)
        assert "Traceback" not in done.stderr and hijacked() == "", (words, done.stderr)
    assert installation.finished(task)["status"] == "completed"


@pytest.mark.parametrize("way", ["a link", "a relative path", "isolated"])
def test_its_own_directory_is_found(installation, workspace, hijacked, tmp_path, way):
    env = {"PYTHONSAFEPATH": "1", "PYTHONPATH": "."}
    (workspace / "tool").unlink(missing_ok=True)
    (workspace / "tool").symlink_to(ROOT / "enqueue.py")
    relative = os.path.relpath(ROOT / "enqueue.py", workspace)
    command = {"a link": ["tool"], "a relative path": [relative], "isolated": ["-I", relative]}[way]
    done = subprocess.run(
        [sys.executable, *command, "approvals", "t"],
        cwd=workspace,
        env=installation.env | env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, hijacked()) == (0, ""), done.stderr
    assert re.fullmatch("queued [0-9a-f]{16}\n", done.stdout)


def test_a_module_that_is_imported_leaves_the_path_of_its_program_alone(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); was = sys.path[:]; import enqueue; assert sys.path == was"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


def test_the_workspace_would_be_taken_otherwise(workspace, hijacked):
    """The tests before can fail: this is what Python does for a script that does not see to it."""
    script = workspace.parent / "script.py"
    script.write_text("from __future__ import annotations\n")
    command = [sys.executable, script]
    subprocess.run(command, cwd=workspace, env={"PYTHONPATH": "."}, capture_output=True)
    assert hijacked() == "__future__ "
