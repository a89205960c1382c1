"""A handler or a script of ours is started in a workspace, and a Python that lies there is not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from taskqueue.cli import find_uv

HANDLERS = sorted(
    path for path in (ROOT / "handlers").iterdir() if b"uv run" in path.read_bytes()[:4096]
)


SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.read_bytes().startswith(b"#!"))


def environment() -> dict[str, str]:
    """That of a worker, with uv itself on PATH: some stand-ins for it choose a Python on their own."""
    uv = find_uv()
    if uv is None:
        pytest.skip("there is no uv")
    wanted = re.compile("PATH|HOME|SSL_CERT_.*|UV_CACHE_DIR|(https?|no)_proxy", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
    return env | {"PATH": f"{os.path.dirname(uv)}:{env['PATH']}"}


@pytest.fixture
def workspace(tmp_path):
    """A directory with an interpreter of its own, which notes that it was run."""
    made = tmp_path / "workspace"
    (made / ".venv/bin").mkdir(parents=True)
    for name in ("python", "python3"):
        path = made / ".venv/bin" / name
        path.write_text(
            f'#!/bin/sh\ntouch "{tmp_path}/run"\nexec "{os.path.realpath(sys.executable)}" "$@"\n'
        )
        path.chmod(0o755)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = os.path.dirname(os.path.realpath(sys.executable))
    (made / ".venv/pyvenv.cfg").write_text(f"home = {home}\nversion = {version}\n")
    return made


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda path: path.name)
def test_it_runs_none_of_it(installation, workspace, handler):
    env = environment()
    env["TASK_QUEUE_STATE"] = str(installation.state)
    # uv chooses a Python for a script that it sees for the first time.
    new = shutil.copy(handler, installation.handlers)
    done = subprocess.run(
        [new], cwd=workspace, env=env, input=b'{"data": {}}', capture_output=True, timeout=120
    )
    assert done.returncode == 65, done.stderr
    assert not (workspace.parent / "run").exists()


@pytest.mark.parametrize("how", ["./way to/{}", "{directory}/way to/{}", "./linked"])
@pytest.mark.parametrize("script", ["enqueue.py", "worker.py", "tasks.py"])
def test_a_script_runs_none_of_it(workspace, tmp_path, script, how):
    env = environment()
    env |= {"TASK_QUEUE_STATE": str(tmp_path / "state")}
    env |= {name: str(workspace / ".venv") for name in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    # uv chooses a Python for a script that it sees for the first time.
    (workspace / "way to").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, workspace / "way to")
    (workspace / "linked").symlink_to(f"way to/{script}")
    command = [how.format(script, directory=workspace), "--version"]
    done = subprocess.run(command, cwd=workspace, env=env, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout.split()[:1]) == (0, [script.encode()]), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_script_works_where_it_was_started(workspace, tmp_path):
    """uv is started in /; a relative name means what it means to whoever typed it."""
    env = environment() | {"TASK_QUEUE_STATE": str(tmp_path / "state")}
    for command in (
        ["enqueue.py", "notifications", "t", '{"a b": "$c"}'],
        ["tasks.py", "export", "out.jsonl"],
        ["tasks.py", "backup", "backup.db"],
    ):
        done = subprocess.run(
            [ROOT / command[0], *command[1:]], cwd=workspace, env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert '"a b": "$c"' in (workspace / "out.jsonl").read_text()
    assert (workspace / "backup.db").exists()


def test_these_are_held():
    assert {path.name for path in HANDLERS} >= {"claude", "link_validation"}
    first_lines = {path.read_bytes().splitlines()[0] for path in [*HANDLERS, *SCRIPTS]}
    assert len(SCRIPTS) >= 14 and len(first_lines) == 1


def test_a_claude_task_without_a_workspace_works_where_the_worker_is(installation, tmp_path):
    """uv is started in /; Claude is not."""
    fake = tmp_path / "bin/claude"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncat >/dev/null\necho \'{"type": "system", "subtype": "init"}\'\n'
        'printf \'{"type": "result", "is_error": false, "result": "%s"}\\n\' "$(pwd) ${TASK_QUEUE_CWD-unset}"\n'
    )
    fake.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    env = environment()
    env |= {"PATH": f"{fake.parent}:{env['PATH']}", "TASK_QUEUE_STATE": str(installation.state)}
    envelope = (
        b'{"task_id": "1", "task_type": "claude", "enqueued_at": "x", "data": {"prompt": "p"}}'
    )
    done = subprocess.run(
        [ROOT / "handlers/claude"],
        cwd=here,
        env=env,
        input=envelope,
        capture_output=True,
        timeout=120,
    )
    assert f"{here} unset".encode() in done.stdout, (done.stdout, done.stderr)
