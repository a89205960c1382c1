"""Recover tasks whose owner has died."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import queue_helpers as q
from taskqueue import after, costs, running
from taskqueue import outcome as outcomes

OWNERS = """
select distinct owner from "{queue}" where status = 2"""
CANCEL_REQUESTED = """
select id from "{queue}" where status = 2 and owner = :owner and cancel_requested"""
WHO_HOLDS = """
select owner, claimed_at, attempts from "{queue}" where id = :id"""
# A row that no queue's table would take is left where it is: a failing statement would end the whole
# step.
REDRIVE = f"""
insert or ignore into "{{queue}}" (id, data, priority, group_id, status, approved)
select row_id, data, priority, group_id, iif(approval is 'held', 3, 1), approval is 'approved' from task_history where id = :history_id and {q.IS_OBJECT}
  and typeof(row_id) = 'integer'"""
FORGET = """
delete from task_history where id = :history_id"""


# ------------------------------------------------------------------------------------------- the tasks of dead owners

# One transaction recovers at most so many tasks: everybody else waits for it.
RECOVER_AT_ONCE = 50
# The supervisor ends an overdue handler itself, if it lives; recovery waits so much longer for
# that.
SUPERVISOR_SECONDS = 1.0
CLAIMED_NEXT = q.CLAIMED_BY + " and id > :after order by id limit :limit"


def recover(
    state=None, *, crash_backoff: float = 0.0
) -> tuple[list[tuple[q.Task, outcomes.Outcome]], int]:
    """Take back the tasks of dead owners: ([(task, outcome), …], how many handlers outlive them).

    An owner is dead when its lock is free. How its handlers ended is on record, and counts. One
    that still runs keeps its task, and is ended here when it is overdue or to be cancelled. A task
    without either is ready again after crash_backoff seconds, or buried when its attempts are
    spent. Raises QueueError when that works for no queue.
    """
    conn = q.connect(state, create=False)
    # The tasks that wait for a deleted one.
    after.sweep(conn)
    claims, trouble = _claims(conn)
    recovered, orphans, worked = [], 0, False
    for owner, queues in claims.items():
        with dead(conn.state, owner) as is_dead:
            if not is_dead:
                continue
            left, all_taken = 0, True
            for queue in queues:
                try:
                    left += _recover_queue(conn, queue, owner, crash_backoff, recovered)
                    worked = True
                # One queue's trouble is not the others'; whoever serves it says so.
                except q.QueueError as error:
                    trouble, all_taken = error, False
            orphans += left
            if all_taken and not left:
                _forget_owner(conn.state, owner)
    if recovered:
        q.wake(conn.state)
    if trouble and not worked:
        raise trouble
    return recovered, orphans


def _claims(conn: q.Connection) -> tuple[dict[str | None, list[str]], q.QueueError | None]:
    """Return the queues in which each other owner has tasks, and the last trouble with a queue."""
    claims: dict[str | None, list[str]] = {}
    trouble = None
    with errors_explained(conn):
        queues = [queue for (queue,) in conn.execute(q.QUEUES).fetchall()]
    for queue in queues:
        try:
            for (owner,) in q.execute(conn, OWNERS, queue).fetchall():
                claims.setdefault(owner, []).append(queue)
        except q.QueueError as error:
            trouble = error
    mine = q._process.owners.get(conn.state, (None, None))[0]
    if mine is not None:
        claims.pop(mine, None)
    return claims, trouble


@contextmanager
def dead(state: Path, owner: str | None):
    """Tell whether an owner is dead; hold its lock meanwhile, so that nobody else recovers its tasks."""
    try:
        fd = q.lock_file(state / "workers" / running.file_name(owner), probe=True)
    # Nobody can hold the lock of a file that is not there.
    except FileNotFoundError:
        yield True
        return
    # Another user's, perhaps: nothing is known about it.
    except OSError:
        yield False
        return
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def is_dead(state: Path, owner: str | None) -> bool:
    """Return whether an owner is dead, to those who recover nothing."""
    with dead(state, owner) as it_is:
        return it_is


def cancel_requested(conn: q.Connection, queue: str, owner: str | None) -> set[int]:
    """Return the rows of an owner's tasks that a person has cancelled."""
    rows = q.execute(conn, CANCEL_REQUESTED, queue, owner=owner).fetchall()
    return {row for (row,) in rows}


def _recover_queue(
    conn: q.Connection, queue: str, owner: str | None, crash_backoff: float, recovered: list
) -> int:
    """Take back a dead owner's tasks of one queue: how many are left because their handlers run."""
    left, after = 0, 0
    while True:
        done = []
        with q.transaction(conn):
            cancelled = cancel_requested(conn, queue, owner)
            rows = q.execute(
                conn, CLAIMED_NEXT, queue, owner=owner, after=after, limit=RECOVER_AT_ONCE
            ).fetchall()
            for task in (q.Task.from_row(queue, row) for row in rows):
                found = _recover_task(conn, task, crash_backoff, task.id in cancelled)
                left += found is None
                done += [found] if found else []
        recovered += done
        for task, _ in done:
            running.tidy_run(conn.state, task)
        if len(rows) < RECOVER_AT_ONCE:
            return left
        after = rows[-1][0]


def _recover_task(
    conn: q.Connection, task: q.Task, crash_backoff: float, cancelled: bool
) -> tuple[q.Task, outcomes.Outcome] | None:
    """Record the end of a dead owner's task; return None while its handler runs."""
    run, goes_on = look_at_run(conn.state, task, cancelled)
    if goes_on:
        end_orphan(running.run_file(conn.state, task), run, cancelled)
        return None
    if cancelled and "code" not in run:
        run.setdefault("why", outcomes.CANCELLED)
    if "group" in run and not {"code", "why"} & run.keys():
        # outcome.record() takes it for one that did not run.
        costs.record(conn, task, **outcomes.output_of(conn.state, task), exited=False)
    return task, outcomes.record(conn, task, *_end_on_record(task, run, crash_backoff))


def _end_on_record(
    task: q.Task, run: dict, crash_backoff: float
) -> tuple[int | None, outcomes.Outcome | None]:
    """Return (exit code, why it ended) of a run of a dead owner, as outcome.record() takes them."""
    code, why = run.get("code"), run.get("why")
    if why is not None:
        # Nobody saw the end of one that has no code, but it was sent a signal.
        return 128 + signal.SIGKILL if code is None else code, outcomes.Outcome(*why)
    died = f"its worker died ({task.owner})"
    if code is None:
        return None, outcomes.Outcome("scheduled", died, crash_backoff)
    if code > 128:
        killer = outcomes.signal_name(code - 128)
        error = f"{died}, and its handler was killed by {killer}"
        return code, outcomes.Outcome("scheduled", error, crash_backoff)
    return code, None


def look_at_run(state: Path, task: q.Task, cancelled: bool = False) -> tuple[dict, bool]:
    """Return what is on record of a dead owner's run, and whether the run goes on.

    It goes on while its handler runs. It also does while somebody holds the output of a handler whose
    end nobody saw: we cannot end that one, but a person may give it up, by cancelling the task.
    """
    # In this order: a supervisor writes down the end, and then lets go of the output's lock.
    held = running.is_held(f"{state}/logs/{task.run_name}.out")
    run = running.read_run(running.run_file(state, task))
    if "code" in run:
        return run, False
    leader = _leader(run)
    # The supervisor is yet to write down the end of a zombie. Without a group, the order is on its
    # way to it.
    runs_on = leader not in (None, "Z") or (leader == "Z" or held) and _supervisor(run) is not None
    return run, runs_on or held and not ("group" in run and cancelled)


def end_orphan(path: str, run: dict, cancelled: bool) -> None:
    """End a dead worker's handler when it is time: TERM, then KILL. See to its supervisor, too."""
    now, leader, supervisor = time.monotonic(), _leader(run), _supervisor(run)
    if supervisor == "T":
        _send(os.kill, run["supervisor"][0], signal.SIGCONT)
    if "kill_at" in run:
        if leader is not None and now >= run["kill_at"]:
            _send(os.killpg, run["group"], signal.SIGKILL)
        # A supervisor that has not seen this end by now never will: let nobody wait for it.
        if (
            leader in (None, "Z")
            and supervisor is not None
            and now >= run["kill_at"] + 5 * SUPERVISOR_SECONDS
        ):
            _send(os.kill, run["supervisor"][0], signal.SIGKILL)
        return
    why = outcomes.CANCELLED if cancelled else None
    if (
        why is None
        and run.get("deadline") is not None
        and now > run["deadline"] + SUPERVISOR_SECONDS
    ):
        why = run["overdue"]
    if why is not None and leader is not None:
        running.add_to_run(path, why=why, kill_at=now + run["kill_after"])
        _send(os.killpg, run["group"], signal.SIGTERM)


def _leader(run: dict) -> str | None:
    """Return the state of the process that leads a run's group, None once it is gone."""
    return _state_of(run.get("group"), run.get("started"))


def _supervisor(run: dict) -> str | None:
    """Return the state of a run's supervisor, None when it has ended."""
    pid, started = run.get("supervisor") or (None, None)
    state = _state_of(pid, started)
    return None if state == "Z" else state


def _state_of(pid: int | None, started: str | None) -> str | None:
    found = running.process(pid) if pid else None
    return found[0] if found and found[1] == started else None


def _send(kill, pid: int, number: int) -> None:
    try:
        kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _forget_owner(state: os.PathLike | str, owner: str | None) -> None:
    """Remove what a dead owner leaves, once all its tasks are taken back."""
    import shutil

    shutil.rmtree(running.run_directory(state, owner), ignore_errors=True)
    try:
        os.unlink(f"{state}/workers/{running.file_name(owner)}")
    except OSError:
        pass


def redrive(conn: q.Connection, queue: str, history_id: int) -> bool:
    """Put a finished task back into its queue under its old id, attempts at zero.

    False when the same task_id is waiting or running already; the history is kept then.
    """
    if q.execute(conn, REDRIVE, queue, history_id=history_id).rowcount != 1:
        return False
    conn.execute(FORGET, {"history_id": history_id})
    return True


def not_held(conn: q.Connection, task: q.Task, verb: str = "acknowledged") -> None:
    """Log that a task was not ours to end."""
    row = q.execute(conn, WHO_HOLDS, task.queue, id=task.id).fetchone()
    if row is None:
        why = "it is finished or gone"
    elif row[0] is None:
        why = "it is waiting again"
    else:
        why = f"{row[0]} holds it since {q.utc(row[1] or 0)} UTC, attempt {row[2]}"
    logging.getLogger(__name__).warning(
        'queue "%s": task %s was not %s: %s (this process lost it when its lock file or the state '
        "was removed)",
        task.queue,
        task.id,
        verb,
        why,
    )


@contextmanager
def errors_explained(conn: q.Connection):
    """Have SQLite's errors raised as QueueErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise q.explain(error, conn.state) from error


def sidecar_is_lost(conn: q.Connection) -> None:
    """Say that the write-ahead log or its shared memory was removed, and have each thread open another connection."""
    from taskqueue.remedies import command

    try:
        lost = "-wal" if q._inodes(conn.real)[0] != conn.sidecars[0] else "-shm"
    except FileNotFoundError as error:
        lost = os.fspath(error.filename)[-4:]
    for each in q._process.of(conn.state):
        each.file = ()
        # Without the shared memory, this connection does not know all that is in the log: it must not
        # write a part of it back, and remove the rest. Python 3.11 cannot tell SQLite so.
        if lost == "-shm" and sys.version_info >= (3, 12):
            each.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
    logging.getLogger(__name__).error(
        "%s%s was removed while it was in use: what was committed since the log was last written back "
        "may be lost; see %s",
        conn.db,
        lost,
        command("doctor"),
    )
