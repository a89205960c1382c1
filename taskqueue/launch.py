"""Start a worker that nobody waits for: `enqueue.py --start-worker`, and the service's units.

The session that fires a hook, and the manager that starts a unit, have an environment and a working
directory of their own, which may be those of a workspace. The worker takes neither: it is started
from nothing, and reads the file that taskqueue.environment describes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import queue_helpers as q
from taskqueue import environment, serving
from taskqueue.installation import default_prefix

IDLE_EXIT_SECONDS = 60


def start_worker(queue: str) -> None:
    """Start a detached worker unless one serves the queue. Raises OSError, ValueError.

    Of ten that are started at once, those that do not get the queue's lock leave.
    """
    # Not before it is wanted: a hook that finds a worker need not load it.
    import subprocess

    try:
        fd = q.lock_file(serving.lock_file(q.STATE_DIR, queue), probe=True)
        if fd is None:
            return
        os.close(fd)
    except OSError:
        # Nobody ever served it.
        pass
    lib = Path(__file__).resolve().parent.parent
    command = worker_command(lib, [queue])
    log = q.make_private(q.STATE_DIR / "logs") / f"worker.{queue}.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            env=bare_environment(q.STATE_DIR),
            cwd="/",
        )
    finally:
        os.close(fd)


def become_worker(lib: Path, queues: Sequence[str], state: Path) -> None:
    """Turn this process into a worker."""
    command = worker_command(lib, queues)
    os.chdir("/")
    os.execve(command[0], command, bare_environment(state))


def worker_command(lib: Path, queues: Sequence[str]) -> list[str]:
    """How the worker beside the scripts in lib is started, one that leaves when it is idle."""
    file = environment_file(lib)
    how = ["--environment", str(file), "--single", "--idle-exit", str(IDLE_EXIT_SECONDS)]
    return [*interpreter(lib), str(lib / "worker.py"), *queues, *how]


def interpreter(lib: Path) -> list[str]:
    """What runs a script in lib: the Python that install.py recorded, else its uv, else this one."""
    record = lib.parent.parent / "installed.json"
    recorded = json.loads(record.read_bytes()) if record.is_file() else {}
    python, uv = recorded.get("python") or "", recorded.get("uv") or ""
    if not os.access(python, os.X_OK) and os.access(uv, os.X_OK):
        return [uv, "run", "-qq", "--no-config", "--script"]
    return [python if os.access(python, os.X_OK) else environment.own_python(), "-E", "-s"]


def environment_file(lib: Path) -> Path:
    """The environment file for the scripts in lib: their installation's, else the usual place's."""
    prefix = lib.parent.parent
    return (prefix if (prefix / "installed.json").is_file() else default_prefix()) / "environment"


def bare_environment(state: Path) -> dict[str, str]:
    """All that a worker needs to find its state and its environment file."""
    home = os.environ.get("HOME") or environment.account().pw_dir
    return {"HOME": home, "PATH": os.defpath, "TASK_QUEUE_STATE": str(state)}
