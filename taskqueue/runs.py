"""What is on record about a handler's run: which processes it is, when it must end, and how it
ended.

The worker begins these records, the supervisor goes on with them, and recovery reads them. A record
is a file of JSON lines, STATE_DIR/runs/OWNER/RUN; what a later line says replaces what an earlier
one said:

    {"supervisor": [pid, started]}    it was told to start the handler: by the worker, before all others
    {"group", "started", "deadline", "overdue", "kill_after"}    the handler was started
    {"why", "kill_at"}    its group was sent TERM, and is sent KILL at `kill_at`
    {"code", "why"}       it has ended; `why` only where it was made to

Moments are of time.monotonic(), which counts the same in all processes of one boot. The files lie
apart from STATE_DIR/logs: whoever empties one of the two directories does not make a running
handler invisible.
"""

from __future__ import annotations

import fcntl
import json
import os
from functools import lru_cache

import queue_helpers as q


def run_file(state: os.PathLike | str, task: q.Task) -> str:
    """Where the record of a claimed task's run lies."""
    return f"{run_directory(state, task.owner)}/{task.run_name.replace('/', '.', 1)}"


def run_directory(state: os.PathLike | str, owner: str | None) -> str:
    """Where the records of an owner's runs lie."""
    return f"{state}/runs/{file_name(owner)}"


def file_name(owner: str | None) -> str:
    """The name of an owner's lock file, whatever somebody wrote into the row."""
    name = os.path.basename(owner) if isinstance(owner, str) else ""
    return q.NOBODY if name in ("", ".", "..") or "\0" in name else name


def read_run(path: str) -> dict:
    """What is on record; {} where there is none. A line that was not written whole is left out."""
    run = {}
    try:
        with open(path, "rb") as file:
            lines = file.read(65_536).splitlines()
    except (OSError, ValueError):
        return run
    for line in lines:
        try:
            run.update(json.loads(line))
        except (ValueError, TypeError):
            continue
    return run


def add_to_run(path: str, **what) -> None:
    """Add to the record of a run. That it cannot be had costs nothing while the worker lives, so it
    is no error.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, json.dumps(what).encode() + b"\n")
    except OSError:
        pass
    finally:
        os.close(fd)


def is_held(path: os.PathLike[str] | str) -> bool:
    """Whether somebody has a lock on a file."""
    try:
        fd = q.lock_file(os.fspath(path), probe=True)
    # The latter for a name with a NUL.
    except (OSError, ValueError):
        return False
    if fd is not None:
        os.close(fd)
    return fd is None


def process(pid: int) -> tuple[str, str] | None:
    """(the letter of its state, when it started) of a process, None when there is none with this
    id.

    A process id is used again; together with the moment of its start it means one process and no
    other.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), f"{fields[19].decode()} {_boot()}"
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    import subprocess

    listed = subprocess.run(
        ["ps", "-o", "state=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, "LC_ALL": "C"},
    ).stdout.split(maxsplit=1)
    return (listed[0][0], listed[1].strip()) if len(listed) == 2 else None


@lru_cache(1)
def _boot() -> str:
    """Which boot this is: Linux counts the start of a process from it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def tidy_run(state: os.PathLike | str, task: q.Task) -> None:
    """Remove the record of a run that is recorded in the database, and its output files where
    nothing was printed.

    A file that somebody holds stays: what a daemon prints later must be found.
    """
    try:
        os.unlink(run_file(state, task))
    except (OSError, ValueError):
        pass
    for ending in (".out", ".err"):
        path = f"{state}/logs/{task.run_name}{ending}"
        try:
            if os.stat(path).st_size:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError):
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_size == 0:
                os.unlink(path)
        except OSError:
            pass
        finally:
            os.close(fd)
