"""How the end of a handler's run becomes an outcome: its exit code and its last words decide.

0    done. With --then, what it printed is the next task; with --chain, its last line may say
     {"enqueue": [{"queue", "task_type", "data", …}, …]}
75   not now, uncounted: after a minute, or as the last line of stdout says:
     {"retry_after": SECONDS}, or {"pause": SECONDS or null, "reason": "…"} for the whole queue,
     or {"hold": "reason", "data": {…}}: not before a person approves it; see approval.py
65   never: a dead letter
else a failed attempt
"""

from __future__ import annotations

import math
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import queue_helpers as q
from taskqueue import approval, control, costs
from taskqueue.payload import as_payload

# The exit codes of handlers that mean more than failure (sysexits.h): never again; not now.
EX_DATAERR, EX_TEMPFAIL = 65, 75
# Of a handler's stdout and stderr, each, kept in the history.
OUTPUT_BYTES = 65_536
# Of a handler's stdout that may become the next task.
RESULT_BYTES = 16 * 2**20
# The shortest and the longest that a handler may ask for, and what one gets that asks for nothing.
# An uncounted attempt must not repeat as fast as it can.
SHORTEST_SECONDS, LONGEST_SECONDS, NOT_NOW_SECONDS = 0.1, 30 * 86_400, 60.0
# Of a reason that a handler gives.
REASON_CHARACTERS = 200
# Tasks that one result may enqueue.
CHAIN_TASKS = 100
CHAIN_KEYS = {"queue", "task_type", "data", "task_id", "priority", "delay", "group", "hold"}

# How the error of a task begins that no handler serves.
NO_HANDLER = "no handler"
# The delay of a task whose end no table takes: a person has to look at it.
OUT_OF_THE_WAY_SECONDS = 86_400.0


class Outcome(NamedTuple):
    """What becomes of a task whose run has ended, or could not begin.

    status       "completed"; "failed": for good, a dead letter; "cancelled"
                 "scheduled": a failed attempt, tried again after `delay`, or failed if it was the last
                 "held": until a person approves it, and the attempt does not count
                 "put back": tried again after `delay`, and the attempt does not count
                 "lost": nothing was recorded, since its owner did not hold the task any more
    error        what went wrong, in one line
    delay        seconds until the next attempt; None: its back-off, or none if it is put back
    pause        (seconds, or None: until a person resumes it; reason), to hold back the whole queue
    exit_code, result, log    as the history keeps them
    asks         the fields that approval puts into the payload of a held task; {}: a person must say
    follow_ups   (queue, row) of each task that is enqueued with it
    """

    status: str
    error: str | None = None
    delay: float | None = None
    pause: tuple[float | None, str] | None = None
    exit_code: int | None = None
    result: str | None = None
    log: str | None = None
    asks: dict | None = None
    follow_ups: Sequence[tuple[str, q.Row]] = ()


# Why a worker ends a run.
STOPPED = Outcome("put back", "its worker was stopped")
CANCELLED = Outcome("cancelled", "cancelled while it ran")


def timed_out(seconds: float) -> Outcome:
    return Outcome("scheduled", f"timed out after {seconds:g} s")


def record(
    conn: q.Connection, task: q.Task, code: int | None, why: Outcome | None = None
) -> Outcome:
    """Record the end of a task's run, within a transaction, and return what became of the task.

    `code` is the handler's exit code, or None if it did not run. `why` says why it did not, or why
    it was made to end. Whatever goes wrong with this end makes the task a dead letter, and troubles
    no other; only the database's own trouble raises QueueBusy or QueueUnavailable.
    """
    told, error = {}, ""
    if code is not None:
        told = output_of(conn.state, task)
        # A stop that came too late to end the run, and an interpreter that was not found.
        exited = code in (0, 127) or code <= 128 and why is None
        costs.record(conn, task, **told, exited=exited)
    for last_resort in (None, "failed", "put back"):
        try:
            with _savepoint(conn):
                if last_resort is None:
                    return _write(conn, task, judge(conn, task, code, why, told))
                return _write(conn, task, Outcome(last_resort, error, OUT_OF_THE_WAY_SECONDS))
        except Exception as trouble:
            if _is_everybodys(conn, trouble):
                raise
            error = error or f"its end could not be recorded: {trouble}"
            error = error.encode(errors="backslashreplace").decode()
    return Outcome("lost", error)


def _write(conn: q.Connection, task: q.Task, outcome: Outcome) -> Outcome:
    """Write an outcome into the database, with what follows from it."""
    told = {name: getattr(outcome, name) for name in ("error", "exit_code", "result", "log")}
    if outcome.status == "scheduled":
        status = q.nack(conn, task, delay=outcome.delay, **told)
    elif outcome.status == "put back":
        held = q.release(conn, task, delay=outcome.delay or 0.0, error=outcome.error)
        status = outcome.status if held else None
    elif outcome.status == "held":
        held = approval.ask(conn, task, outcome.error, outcome.asks)
        status = outcome.status if held else None
    else:
        held = q.finish(conn, task, outcome.status, **told)
        status = outcome.status if held else None
    if status is None:
        return Outcome(
            "lost", "its owner did not hold it any more: its lock file or the state was removed"
        )
    for queue, row in outcome.follow_ups:
        q.insert(conn, queue, row)
    if outcome.pause:
        seconds, reason = outcome.pause
        until = None if seconds is None else time.time() + seconds
        control.pause_queue(conn, task.queue, until, reason, by="handler")
    return outcome._replace(status=status)


@contextmanager
def _savepoint(conn: q.Connection):
    """Undo a part of a transaction if the block raises."""
    conn.execute("savepoint part")
    try:
        yield
    except BaseException:
        # SQLite may have rolled back all of it already.
        if conn.in_transaction:
            conn.execute("rollback to part")
            conn.execute("release part")
        raise
    conn.execute("release part")


def _is_everybodys(conn: q.Connection, trouble: Exception) -> bool:
    """Return whether the database cannot be used; else it refuses this one task."""
    cause = trouble if isinstance(trouble, sqlite3.Error) else trouble.__cause__
    if isinstance(cause, sqlite3.IntegrityError):
        return False
    if isinstance(cause, sqlite3.Error):
        trouble = q.explain(cause, conn.state)
    return isinstance(trouble, (q.QueueBusy, q.QueueUnavailable))


def judge(
    conn: q.Connection, task: q.Task, code: int | None, why: Outcome | None, told: dict[str, str]
) -> Outcome:
    """Return the outcome of a run; record() explains the arguments, and `told` is its output."""
    if code is None:
        return why or Outcome("lost")
    # A handler that finished its work before its worker's stop could end it is done.
    if why and not (why.status == "put back" and code == 0):
        outcome = why
    elif code == 0:
        outcome = completed(conn, lambda: _follow_ups(conn, task))
    elif code == EX_TEMPFAIL:
        outcome = _not_now(told)
    elif code == EX_DATAERR:
        outcome = Outcome("failed", f"refused by its handler (exit 65){last_words(told)}")
    else:
        how = f"killed by {signal_name(code - 128)}" if code > 128 else f"exit {code}"
        outcome = Outcome("scheduled", how + last_words(told))
    return outcome._replace(exit_code=code, **told)


def completed(conn: q.Connection, follow_ups: Callable[[], list[tuple[str, q.Row]]]) -> Outcome:
    """Return the outcome of a run that did its work: failed if what should follow is refused."""
    try:
        rows = follow_ups()
        for queue in dict.fromkeys(queue for queue, _ in rows):
            q.ensure_queue(conn, queue)
    except q.InvalidTask as refused:
        return Outcome("failed", f"done, but what should follow was refused: {refused}")
    return Outcome("completed", follow_ups=rows)


def _follow_ups(conn: q.Connection, task: q.Task) -> list[tuple[str, q.Row]]:
    """Return the (queue, row) of each task that a result becomes or enqueues. Raises InvalidTask."""
    if not task.then_queue and not task.chain:
        return []
    stdout, size = read_output(f"{conn.state}/logs/{task.run_name}.out", RESULT_BYTES)
    rows = []
    if task.chain:
        stdout, entries = _take_chain(stdout)
        rows = [_chained(conn, task, entry, number) for number, entry in enumerate(entries, 1)]
    if task.then_queue:
        rows.append((task.then_queue, next_row(task, stdout, size)))
    return rows


def _take_chain(stdout: str) -> tuple[str, list]:
    """Return stdout without a last line that enqueues tasks, and that line's tasks.

    Such a line begins with {"enqueue":. Raises InvalidTask if it is wrong.
    """
    body, _, last = stdout.rstrip().rpartition("\n")
    if not re.match(r'\{\s*"enqueue"\s*:', last.lstrip()):
        return stdout, []
    # From here on it means to enqueue, so a fault is reported.
    said = as_payload(last.encode("utf-8", "surrogatepass"))
    if "enqueue" not in said:
        raise q.InvalidTask(f"its last line is {said['unreadable_because']}")
    entries = said["enqueue"]
    if not isinstance(entries, list) or len(entries) > CHAIN_TASKS:
        raise q.InvalidTask(f'"enqueue" must be a list of at most {CHAIN_TASKS} tasks')
    return f"{body}\n" if body else "", entries


def _chained(conn: q.Connection, task: q.Task, entry: object, number: int) -> tuple[str, q.Row]:
    """Return the queue and row of a task that a result enqueues. Raises InvalidTask."""
    try:
        if not isinstance(entry, dict) or not {"queue", "task_type"} <= entry.keys() <= CHAIN_KEYS:
            raise q.InvalidTask(
                f"it has queue and task_type, and of {', '.join(sorted(CHAIN_KEYS))}"
            )
        options = {"data": {}, **entry}
        queue = q.check_queue_name(options.pop("queue"))
        if queue not in {name for (name,) in conn.execute(q.QUEUES)}:
            raise q.InvalidTask(f"there is no queue {queue!r}")
        if type(options.get("hold", False)) is not bool:
            raise q.InvalidTask("hold is true or false")
        return queue, q.new_row(**options, **_descent(task))
    except q.InvalidTask as error:
        raise q.InvalidTask(f'entry {number} of "enqueue": {error}') from None


def next_row(task: q.Task, stdout: str, size: int) -> q.Row:
    """Return the task that a result becomes; its data is what the handler printed, if that is JSON.

    A part of its id is random: each result is a task of its own.
    """
    data = None if size > RESULT_BYTES else _as_object(stdout)
    if data is None:
        data = {"result": stdout}
        if size > RESULT_BYTES:
            data |= {"result_is_cut": True, "result_bytes": size}
    head = task.task_id.encode()[:470].decode("utf-8", "ignore")
    task_id = f"{head}.{os.urandom(5).hex()}"
    # A payload that a handler passes on may not do more than the payload itself.
    granted = task.envelope.get("granted")
    return q.new_row(
        task.task_type, data, task_id, hold=bool(task.then_hold), granted=granted, **_descent(task)
    )


def _descent(task: q.Task) -> dict:
    """Return the fields by which a follow-up names this task as its source."""
    envelope = task.envelope
    # The first task of a chain says whose workspace it is; no handler's output does.
    first = envelope["source"] if isinstance(envelope.get("source"), dict) else envelope["data"]
    source = {"queue": task.queue, "task_id": task.task_id}
    for name, value in (
        ("workspace_path", first.get("workspace_path") or first.get("cwd")),
        ("project_dir", first.get("project_dir")),
    ):
        source |= {name: value} if isinstance(value, str) else {}
    return {"depth": task.depth + 1, "source": source}


def _as_object(text: str) -> dict | None:
    """Return the JSON object in a text; None if it holds anything else, or cannot be stored."""
    data = as_payload(text.encode("utf-8", "surrogatepass"))
    return None if "unreadable_because" in data else data


def _not_now(told: dict) -> Outcome:
    """Return the outcome of exit 75: what the last line of stdout asks for, else again in a minute."""
    said = _as_object(told["result"].rstrip().rpartition("\n")[2]) or {}
    if isinstance(said.get("hold"), str):
        asks = said.get("data", {})
        # An empty object changes nothing, and anything else leaves it to the person.
        asks = (asks or None) if isinstance(asks, dict) else {}
        return Outcome("held", " ".join(said["hold"].split())[:REASON_CHARACTERS], asks=asks)
    reason = said.get("reason")
    reason = (
        f": {' '.join(reason.split())[:REASON_CHARACTERS]}"
        if isinstance(reason, str) and reason
        else ""
    )
    if "pause" in said and (said["pause"] is None or seconds_in(said["pause"]) is not None):
        # The error does not mention the pause: the row may outlive it.
        error = f"not now (exit 75){reason}"
        return Outcome("put back", error, pause=(seconds_in(said["pause"]), reason[2:]))
    seconds = seconds_in(said.get("retry_after"))
    delay = NOT_NOW_SECONDS if seconds is None else seconds
    error = f"not now (exit 75){reason or ('' if said else last_words(told))}"
    return Outcome("put back", error, delay)


def seconds_in(value: Any) -> float | None:
    """Return a handler's number of seconds, within bounds; None if it is no such number."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        return None
    return float(max(SHORTEST_SECONDS, min(value, LONGEST_SECONDS)))


def last_words(told: dict) -> str:
    """Return ": " and the last line of stderr, or of stdout if stderr is empty; "" if both are."""
    for text in (told["log"], told["result"]):
        line = text.strip().rpartition("\n")[2].strip()
        if line:
            return f": {line[:200]}"
    return ""


def output_of(state: Path, task: q.Task) -> dict[str, str]:
    """Return the ends of a run's stdout and stderr, as the history keeps them."""
    run = f"{state}/logs/{task.run_name}"
    return {"result": tail(f"{run}.out", OUTPUT_BYTES), "log": tail(f"{run}.err", OUTPUT_BYTES)}


def tail(path: str, size: int) -> str:
    """Return the last `size` bytes of a file as text, "" if there is no file."""
    return read_output(path, size)[0]


def read_output(path: str, size: int) -> tuple[str, int]:
    """Return the last `size` bytes of a file as text, and its whole size; ("", 0) without a file."""
    try:
        length = os.stat(path).st_size
        if length == 0:
            return "", 0
        with open(path, "rb", buffering=0) as file:
            file.seek(max(0, length - size))
            raw = file.read(size)
            return raw.decode("utf-8", "replace").replace("\0", "\ufffd"), length
    except OSError:
        return "", 0


def signal_name(number: int) -> str:
    """Return a signal's name: SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
