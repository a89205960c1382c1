"""Starting a worker that nobody waits for: what `enqueue.py --start-worker` and the service's units
do.

The session that fires a hook, and the manager that starts a unit, have an environment and a working
directory of their own, which may be those of a workspace. Neither decides what is run here.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import queue_helpers as q

IDLE_EXIT_SECONDS = 60

# uv looks for a .venv in its working directory and above, and runs the Python in there.
WORKING_DIRECTORY = "/"

# What a worker is told of the environment that it is started from: a person's account, desktop and
# network, and the families of names that set up `claude` and its providers. All else may come from
# a session's workspace, and decide what Python or uv run. Of the CLAUDE_ names, the worker itself
# keeps from handlers those that name a session.
TOLD = re.compile(
    "HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_[A-Z]+|TZ|TMPDIR|XDG_[A-Z_]+|DISPLAY|WAYLAND_DISPLAY"
    "|SSH_AUTH_SOCK|DBUS_SESSION_BUS_ADDRESS|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy"
    "|SSL_CERT_(FILE|DIR)|NODE_EXTRA_CA_CERTS|UV_(CACHE_DIR|OFFLINE)|LYCHEE_[A-Z]+"
    "|(ANTHROPIC|CLAUDE|AWS|GOOGLE|GCLOUD|VERTEX|CLOUD_ML|DISABLE|MAX|MCP|OTEL)_[A-Z0-9_]+"
)
# A relative one of these would mean the workspace.
PATHS = re.compile(
    "HOME|SHELL|TMPDIR|XDG_[A-Z_]+_(HOME|DIR)|SSL_CERT_(FILE|DIR)|NODE_EXTRA_CA_CERTS|UV_CACHE_DIR"
    "|CLAUDE_CONFIG_DIR|CLAUDE_CODE_(TMPDIR|SHELL)"
)


def start_worker(queue: str, directory: str | None = None) -> None:
    """Start a detached worker unless one serves the queue. Raises OSError, ValueError.

    It is that of the scripts in the directory, by default of those beside this one.

    Of ten that are started at once, those that do not get the queue's lock leave.
    """
    # Not before it is wanted: a hook that finds a worker need not load it.
    import subprocess

    try:
        fd = q.lock_file(q.STATE_DIR / "workers" / f"serving.{queue}", probe=True)
        if fd is None:
            return
        os.close(fd)
    except OSError:
        # Nobody ever served it.
        pass
    lib = Path(directory) if directory else Path(__file__).resolve().parent.parent
    command = worker_command(lib, [queue])
    environment = worker_environment(os.environ, q.STATE_DIR)
    log = q.make_private(q.STATE_DIR / "logs") / f"worker.{queue}.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            env=environment,
            cwd=WORKING_DIRECTORY,
        )
    finally:
        os.close(fd)


def become_worker(lib: Path, queues: Sequence[str], state: Path) -> None:
    """Turn this process into a worker."""
    command, environment = worker_command(lib, queues), worker_environment(os.environ, state)
    os.chdir(WORKING_DIRECTORY)
    os.execve(command[0], command, environment)


def worker_command(lib: Path, queues: Sequence[str]) -> list[str]:
    """How the worker beside the scripts in lib is started, one that leaves when it is idle."""
    uv = find_uv(lib)
    start = [uv, "run", "--no-config", "--script"] if uv else [sys.executable, "-E", "-s"]
    how = ["--single", "--idle-exit", str(IDLE_EXIT_SECONDS)]
    return [*start, str(lib / "worker.py"), *queues, *how]


def find_uv(lib: Path) -> str | None:
    """The uv that install.py recorded, or in a checkout one in an absolute place; None without one."""
    record = lib.parent.parent / "installed.json"
    if record.is_file():
        places = [str(json.loads(record.read_bytes()).get("uv") or "")]
    else:
        home, path = os.path.expanduser("~"), os.environ.get("PATH", "").split(os.pathsep)
        usual = [f"{home}/.local/bin", f"{home}/.cargo/bin", "/opt/homebrew/bin", "/usr/local/bin"]
        places = [f"{place}/uv" for place in (*usual, *path)]
    return next((uv for uv in places if os.path.isabs(uv) and os.access(uv, os.X_OK)), None)


def worker_environment(environ: Mapping[str, str], state: Path) -> dict[str, str]:
    """The clean, named set of variables that a worker is started with; no relative paths."""
    told = {
        name: value
        for name, value in environ.items()
        if TOLD.fullmatch(name) and (os.path.isabs(value) or not PATHS.fullmatch(name))
    }
    path = [entry for entry in environ.get("PATH", "").split(os.pathsep) if os.path.isabs(entry)]
    return {
        **told,
        "PATH": os.pathsep.join(path or ["/usr/bin", "/bin"]),
        "TASK_QUEUE_STATE": str(state),
    }
