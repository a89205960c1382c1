"""What the tests of handlers/link_validation share: the script itself, run as a worker runs it,
with a task on stdin.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handlers" / "link_validation"


def uv_binary():
    """The real uv, not a shim of a version manager."""
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        return os.environ.get("UV") or shutil.which("uv")


UV = uv_binary()
assert UV, "uv is missing: python3 -m pip install uv"
UV_CACHE = subprocess.run(
    [UV, "cache", "dir"], capture_output=True, text=True, check=True
).stdout.strip()


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def check(tmp_path, workspace):
    """check(data, …) runs the handler with a task that has this payload, and returns the finished
    process.
    """
    home = tmp_path / "home"
    home.mkdir()

    def run(data=None, *, task=None, path=(), env=None, handler=HANDLER, **options):
        payload = {"workspace_path": str(workspace)} if data is None else data
        if task is None:
            task = json.dumps(
                {"task_id": "t1", "task_type": "link_validation", "data": payload}
            ).encode()
        places = os.pathsep.join(
            [*map(str, path), os.path.dirname(UV), "/usr/local/bin", "/usr/bin", "/bin"]
        )
        environment = {
            "PATH": places,
            "HOME": str(home),
            "UV_CACHE_DIR": UV_CACHE,
            "TASK_QUEUE_STATE": str(tmp_path / "state"),
        }
        done = subprocess.run(
            [handler],
            input=task,
            env=environment | (env or {}),
            cwd=workspace,
            capture_output=True,
            timeout=60,
            check=False,
            **options,
        )
        done.summary = json.loads(done.stdout) if done.returncode == 0 else None
        done.words = done.stderr.decode()
        assert "Traceback" not in done.words
        return done

    return run


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(workspace, *words):
    subprocess.run(
        ["git", *words],
        cwd=workspace,
        check=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": str(workspace.parent)},
    )


def report(done):
    """The whole report that a summary names."""
    return json.loads(Path(done.summary["results_file"]).read_text())


def broken(done):
    return [(link["file"], os.path.basename(link["url"])) for link in done.summary["broken"]]
