"""What a task's handler has printed: the files of its runs, and following them as they grow."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from codecs import getincrementaldecoder
from typing import BinaryIO, NamedTuple

import queue_helpers as q
from taskqueue import cli
from taskqueue.find import Found, newest_record
from taskqueue.text import visible

# How often a file that a handler writes is looked at.
LOOK_SECONDS = 0.1
# The history keeps the output under these names.
KEPT = {"err": "log", "out": "result"}


class Run(NamedTuple):
    """One attempt's output: path with .out and .err added."""

    attempt: int
    path: str
    changed: float


def runs_of(record: dict) -> list[Run]:
    """What its attempts left in the logs, oldest first."""
    pattern, runs = re.compile(rf"({record['id']}-(\d+)-.+)\.(?:out|err)", re.DOTALL), {}
    try:
        with os.scandir(cli.logs_directory(q.STATE_DIR, record["queue"])) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match:
                    path = entry.path[: -len(".out")]
                    # Not the time of the last write: a file that served another run before keeps
                    # that one's while nothing is written.
                    changed = max(entry.stat().st_ctime, runs[path].changed if path in runs else 0)
                    runs[path] = Run(int(match[2]), path, changed)
    except OSError:
        pass
    return sorted(runs.values(), key=lambda run: (run.changed, run.attempt))


def print_outputs(sources: dict[str, BinaryIO]) -> None:
    """A run's stderr on stderr, its stdout on stdout."""
    printers = cli.make_printers()
    for ending, source in sources.items():
        cli.copy(source, printers[ending])


def print_as_json(told: dict, sources: dict[str, BinaryIO]) -> None:
    """One JSON object, written a piece at a time: outputs may be larger than the memory."""
    sys.stdout.write(json.dumps(told, indent=2)[:-2])
    for ending, name in (("out", "stdout"), ("err", "stderr")):
        sys.stdout.write(f',\n  "{name}": "')
        decode = getincrementaldecoder("utf-8")("replace").decode
        while piece := sources[ending].read(cli.PIECE_BYTES):
            sys.stdout.write(json.dumps(decode(piece))[1:-1])
        sys.stdout.write(json.dumps(decode(b"", True))[1:-1] + '"')
    sys.stdout.write("\n}\n")


def open_output(path: str | None, ending: str, record: dict) -> BinaryIO:
    """A run's stderr or stdout, or what the history kept of it."""
    try:
        if path is not None and os.path.getsize(f"{path}.{ending}"):
            return open(f"{path}.{ending}", "rb")
    except OSError:
        pass
    return io.BytesIO((record.get(KEPT[ending]) or "").encode())


def follow_logs(conn: q.Connection, found: Found) -> int:
    """Print what is there, then what comes, attempt after attempt, until the task is finished."""
    files: dict[str, BinaryIO] = {}
    printers, waited = cli.make_printers(), False
    while True:
        # Looked at before the files are: what is written until then is read.
        record = newest_record(conn, found)
        runs = runs_of(record)
        for ending in KEPT if runs else ():
            follow_file(files, ending, f"{runs[-1].path}.{ending}", printers[ending])
        if record["completed_at"] is not None:
            for ending in () if files else KEPT:
                cli.copy(open_output(None, ending, record), printers[ending])
            return 0
        if not runs and not waited:
            waited = True
            task_id = visible(found.task_id)
            print(
                f"task {task_id} has not run yet ({record['status']}); waiting for it",
                file=sys.stderr,
            )
        time.sleep(LOOK_SECONDS)


def follow_file(files: dict[str, BinaryIO], ending: str, path: str, printer: cli.Printer) -> None:
    """Print what is new in the file that is open, then go on to the next attempt's file."""
    if ending in files:
        cli.copy(files[ending], printer)
    try:
        there = os.stat(path)
        if ending not in files or os.fstat(files[ending].fileno()).st_ino != there.st_ino:
            files[ending] = open(path, "rb")  # noqa: SIM115
            cli.copy(files[ending], printer)
    except FileNotFoundError:
        # It was empty when the run ended, and was removed.
        pass
