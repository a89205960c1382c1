"""uv starts a handler in a workspace, and runs no interpreter, configuration or index that lies there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from taskqueue import environment
from taskqueue.installation import find_uv

SCRIPT = """\
#!/usr/bin/env -S uv run --script
# /// script
# requires-python = "{requires}"
# dependencies = []
# ///
import json, os, sys
print(json.dumps([sys.executable, sys.version_info[:2], os.environ["UV_PYTHON"], os.getcwd()]))
"""


@pytest.fixture
def workspace(tmp_path):
    """A directory with all that uv looks for around a script; what runs or is made notes it."""
    made = tmp_path / "workspace"
    (made / ".venv/bin").mkdir(parents=True)
    (made / "below").mkdir()
    for name in ("python", "python3"):
        path = made / ".venv/bin" / name
        path.write_text(f'#!/bin/sh\ntouch "{tmp_path}/run"\nexec "{sys.executable}" "$@"\n')
        path.chmod(0o755)
    (made / ".venv/pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11\n")
    settings = f'cache-dir = "{tmp_path}/run"\nindex-url = "http://127.0.0.1:9/simple"\n'
    (made / "uv.toml").write_text(settings)
    (made / ".python-version").write_text("2.7\n")
    project = '[project]\nname = "x"\nversion = "1"\n[tool.uv]\n'
    (made / "pyproject.toml").write_text(project + settings)
    (made / ".env").write_text("PYTHONPATH=.\n")
    return made


@pytest.fixture
def worker(installation):
    """Runs one task of a handler in a workspace: its row in the history."""
    uv = find_uv()
    if uv is None:
        pytest.skip("there is no uv")
    file = installation.directory / "environment"
    file.touch(0o600)
    lines = {"UV": uv, "PATH": f"{os.path.dirname(uv)}:/usr/bin:/bin"}
    lines |= {name: os.environ[name] for name in ("UV_CACHE_DIR",) if name in os.environ}
    file.write_text(environment.lines_of(lines))

    def run(handler: Path, workspace: Path) -> dict:
        data = json.dumps({"workspace_path": str(workspace)})
        task = installation.enqueue("notifications", handler.name, data)
        words = ("worker.py", "notifications", "--drain", "--max-attempts", 1)
        words += ("--handlers", handler.parent, "--environment", file)
        done = installation.run(*words, timeout=120)
        assert done.returncode == 0, done.stderr
        return installation.history(task)

    return run


@pytest.mark.parametrize("where", [".", "below"])
def test_nothing_around_the_workspace_counts(installation, worker, workspace, where):
    # uv chooses a Python for a script that it sees for the first time.
    handler = installation.handler("it", SCRIPT.format(requires=">=3.11"))
    ended = worker(handler, workspace / where)
    assert ended["status"] == "completed", ended
    executable, _, python, directory = json.loads(ended["result"])
    assert not (workspace.parent / "run").exists()
    assert directory == str(workspace / where) and not executable.startswith(str(workspace))
    assert os.path.isabs(python) and os.access(python, os.X_OK)


@pytest.mark.parametrize("name", ["claude", "link_validation"])
def test_nor_for_the_handlers_that_come_with_it(worker, workspace, name):
    ended = worker(ROOT / "handlers" / name, workspace)
    assert ended["status"] in ("failed", "completed") and not (workspace.parent / "run").exists()


@pytest.mark.parametrize("requires", [">=3.11, <4", "~=3.11", ">3.10,!=3.12.*"])
def test_the_python_fits_what_the_handler_requires(installation, worker, workspace, requires):
    ended = worker(installation.handler("it", SCRIPT.format(requires=requires)), workspace)
    assert ended["status"] == "completed" and "warning" not in ended["log"], ended
    assert json.loads(ended["result"])[1] >= [3, 11]
    assert not (workspace.parent / "run").exists()


def test_where_no_python_fits_the_task_fails_and_says_so(installation, worker, workspace):
    handler = installation.handler("it", SCRIPT.format(requires=">=3.99"))
    ended = worker(handler, workspace)
    assert ended["status"] == "failed"
    assert f"{handler} requires Python >=3.99, and none is here" in ended["error"]


def test_a_terminals_choice_of_a_python_is_made_absolute(installation, workspace):
    """UV_PYTHON=3.11 would let uv run the workspace's."""
    handler = installation.handler("told", '#!/bin/sh\necho "$UV_PYTHON $UV_NO_CONFIG"\n')
    task = installation.enqueue(
        "notifications", handler.name, json.dumps({"workspace_path": str(workspace)})
    )
    env = {"UV_PYTHON": "3.11", "UV_NO_CONFIG": ""}
    installation.run(
        *("worker.py", "notifications", "--drain", "--handlers", installation.handlers), env=env
    )
    python, no_config = installation.finished(task)["result"].split()
    assert os.path.isabs(python) and no_config == "1"


def test_every_script_has_the_first_line_that_is_usual():
    scripts = [p for p in [*ROOT.glob("*.py"), *ROOT.glob("handlers/*")] if p.is_file()]
    first = {p.read_text().partition("\n")[0] for p in scripts if "# /// script\n" in p.read_text()}
    assert first == {"#!/usr/bin/env -S uv run --script"}
