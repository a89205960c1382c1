"""A worker runs without uv, and goes on when `uv cache clean` has removed its packages."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

from taskqueue import environment


@pytest.fixture
def packages(tmp_path):
    """An environment as uv makes one for worker.py."""
    made = tmp_path / "environment"
    venv.create(made, symlinks=True)
    [site] = made.glob("lib/python3*/site-packages")
    for name in ("watchdog", "cronsim"):
        found = Path(pytest.importorskip(name).__file__).parent
        shutil.copytree(found, site / name)
    return made


def open_files(pid: int) -> list[str]:
    return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]


def test_the_packages_of_a_running_worker_are_removed(installation, packages, monkeypatch):
    installation.handler("fine", "#!/bin/sh\n")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(packages / "bin/python"))
        worker = installation.worker("notifications")
    wait_for(lambda: "anon_inode:inotify" in open_files(worker.pid))
    shutil.rmtree(packages)
    assert installation.ends_well("notifications", "fine")
    every = ("every", "hourly", "0 * * * *", "notifications", "fine")
    assert installation.run("tasks.py", *every).returncode == 0
    installation.sqlite3("update task_every set next_at = 1, set_at = 0")
    wait_for(lambda: installation.rows("select 1 from task_history where task_id = 'hourly'"))
    [supervisor] = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    os.kill(int(supervisor), signal.SIGKILL)
    wait_for(lambda: "starting afresh" in worker.log.read_text())
    assert installation.ends_well("notifications", "fine")
    assert worker.poll() is None and "Traceback" not in worker.log.read_text()


def test_tq_work_leaves_no_uv_behind(installation):
    uv = environment.find_uv(os.environ)
    if not uv:
        pytest.skip("uv is not on PATH")
    bin = installation.directory / ".local/bin"
    bin.mkdir(parents=True)
    (bin / "uv").symlink_to(uv)
    env = {
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR") or f"{Path.home()}/.cache/uv",
    }
    log = installation.directory / "log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            ["/bin/sh", ROOT / "bin/tq.sh", "work", "notifications"],
            env=installation.env | env, stderr=file)  # fmt: skip
    installation.processes.append(worker)
    wait_for(lambda: "serves" in log.read_text() or worker.poll() is not None)
    assert worker.poll() is None, log.read_text()
    ran = Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0")
    assert b"python" in ran[0] and ran[3].endswith(b"/worker.py"), (ran, log.read_text())
    assert "no file events" not in log.read_text()
