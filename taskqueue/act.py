"""The commands that act: on tasks (approve, reject, retry, cancel, move, purge) and on queues.

Each is a function; what it takes on the command line is declared above it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import queue_helpers as q
from taskqueue import after, approval, change, cli, costs, database, service, serving, spool
from taskqueue.cli import (
    EX_FAILED,
    IDS,
    MAYBE_IDS,
    QUEUES,
    TYPE,
    WHOSE,
    Refused,
    flag,
    option,
    say_all,
    some_text,
    span_option,
    takes,
)
from taskqueue.control import (
    Control,
    controls_of,
    limit_slots,
    pause_queue,
    resume_queue,
)
from taskqueue.database import LIVE, STATUS_TERMS
from taskqueue.find import Found, find, live_id
from taskqueue.remedies import command, lets_go_on
from taskqueue.text import pause_in_words, plural, short

CANCEL_SECONDS = 30.0
COUNT = 'select count(*) from "{queue}"'
RECURRING = "select name from task_every where queue = ?"
# If the queue comes back, its rows go on from the last number: the history knows them by it.
DROP = (
    "create temp table last_row as select seq from sqlite_sequence where name = '{queue}'",
    'drop table "{queue}"',
    "insert into sqlite_sequence (name, seq) select '{queue}', seq from last_row",
    "drop table last_row",
    "delete from task_controls where queue = '{queue}'",
    "delete from task_after where after_queue = '{queue}'",
)
# The value of an option of limit that was not given: None takes a limit away.
AS_IS: Any = ...


# ----------------------------------------------------------------------------------- changing tasks


def change_each(
    done: str, conn: q.Connection, tasks: Iterable[Found], change_one: Callable
) -> list[dict]:
    """Call change_one(found) for each task; return what became of each.

    change_one returns None, or why it left the task as it is. `done` is the word for a change.
    """
    outcomes = []

    def outcome_of(found: Found) -> dict:
        why = change_one(found)
        said = {} if why is None else {"why": why}
        return {"queue": found.queue, "task_id": found.task_id, done: why is None, **said}

    try:
        outcomes.extend(database.in_steps(conn, tasks, outcome_of))
    finally:
        q.wake(conn.state)
    return outcomes


def tell(done: str, outcomes: list[dict], as_json: bool, total: str | None = None) -> int:
    """Print what was changed, and name each task that was not; return the exit code.

    `total` makes one line with the number of tasks, and ends it; else each task has a line.
    """
    number = sum(each[done] for each in outcomes)
    lines = [f"{done} {each['task_id']}" for each in outcomes if each[done]]
    lines = lines if total is None else [f"{done} {plural(number, 'task')}{total}"]
    if as_json or lines:
        value = outcomes if done == "cancelled" else {done: number, "tasks": outcomes}
        cli.report(as_json, value, "\n".join(lines))
    who = f"tasks.py {VERBS[done]}"
    for each in outcomes:
        if not each[done]:
            error = f"task {each['task_id']} of {each['queue']} was not {done}"
            cli.complain(EX_FAILED, who, f"{error}: {each['why']}")
    return 0 if number == len(outcomes) else EX_FAILED


VERBS = {
    "approved": "approve",
    "rejected": "reject",
    "retried": "retry",
    "cancelled": "cancel",
    "moved": "move",
}


def have_run(conn: q.Connection, queues: Iterable[str], as_json: bool) -> None:
    """Start a worker for tasks that became ready, or say how to start one."""
    sys.stdout.flush()
    lines = service.have_run(conn, queues)
    say_all([] if as_json else lines)


@takes(
    IDS,
    WHOSE,
    option("--with", dest="fields", metavar="JSON", type=cli.json_object,
           help="fields of the payload to replace, instead of those that the task asks for; null takes one away"),
)  # fmt: skip
def approve(ids: list[str], queue: str | None, fields: dict | None, as_json: bool) -> int:
    """Let held tasks run. Where a task's handler asks for something, show says what changes."""
    conn = database.open_queue()

    def let_run(found: Found) -> str | None:
        try:
            if found.row_id and approval.approve(conn, found.queue, found.row_id, fields):
                return None
        except q.InvalidTask as refused:
            return str(refused)
        return change.why_not_held(conn, found)

    wanted = [find(conn, ident, queue) for ident in ids]
    outcomes = change_each("approved", conn, wanted, let_run)
    code = tell("approved", outcomes, as_json)
    have_run(conn, [task["queue"] for task in outcomes if task["approved"]], as_json)
    return code


@takes(IDS, WHOSE, option("--reason", type=some_text, help="why; the history keeps it"))
def reject(ids: list[str], queue: str | None, reason: str | None, as_json: bool) -> int:
    """End held tasks as cancelled. The history keeps the reason."""
    conn, why = database.open_queue(), short(reason, 500)

    def end(found: Found) -> str | None:
        if found.row_id and approval.reject(conn, found.queue, found.row_id, why):
            return None
        return change.why_not_held(conn, found)

    wanted = [find(conn, ident, queue) for ident in ids]
    return tell("rejected", change_each("rejected", conn, wanted, end), as_json)


@takes(
    MAYBE_IDS,
    flag("--failed", help="all dead letters, of --queue, --type and --since"),
    flag(
        "--scheduled",
        help="run now what failed and waits for its next attempt, of --queue and --type",
    ),
    option("--queue", type=cli.utf8),
    TYPE,
    span_option("--since", "failed at most this long ago"),
)
def retry(
    ids: list[str],
    failed: bool,
    scheduled: bool,
    queue: str | None,
    task_type: str | None,
    since: float | None,
    as_json: bool,
) -> int:
    """Put finished tasks back into their queue, attempts at zero; a scheduled one becomes ready
    now. Neither expires any more. One that ended while it was held is held again."""
    conn, letters = database.open_queue(), {}
    database.check_known(conn, [queue] if queue is not None else ())
    if failed:
        oldest = None if since is None else time.time() - since
        letters = change.dead_letters(conn, queue, task_type, oldest)
        wanted = list(letters)
    elif scheduled:
        wanted = change.waiting_for_retry(conn, queue, task_type)
    else:
        wanted = [find(conn, ident, queue) for ident in ids]

    def put_back(found: Found) -> str | None:
        return change.retry(conn, found, letters.get(found))

    outcomes = change_each("retried", conn, wanted, put_back)
    code = tell("retried", outcomes, as_json, None if ids else "")
    for found, task in zip(wanted, outcomes, strict=True):
        row_id = task["retried"] and live_id(conn, found.queue, found.task_id)
        if row_id and database.status_of(conn, found.queue, row_id) == "held":
            held = f"task {found.task_id} is held again, as it was"
            say_all([f"{held}: {command('approve')} {found.task_id}"])
    have_run(conn, [task["queue"] for task in outcomes if task["retried"]], as_json)
    return code


def fault_in_retry(args: argparse.Namespace) -> str:
    if bool(args.ids) + args.failed + args.scheduled != 1:
        return "give the IDs to retry, or --failed, or --scheduled"
    if args.since is not None and not args.failed:
        return "--since goes with --failed"
    return "--type goes with --failed or --scheduled" if args.ids and args.task_type else ""


@takes(
    IDS,
    WHOSE,
    span_option(
        "--wait",
        f"for a running task to end (default {CANCEL_SECONDS:g} s)",
        default=CANCEL_SECONDS,
    ),
)
def cancel(ids: list[str], queue: str | None, wait: float, as_json: bool) -> int:
    """Cancel tasks: a waiting one at once, a running one by ending its process group. The history
    keeps them as cancelled."""
    conn = database.open_queue()
    outcomes = []
    for task in [find(conn, ident, queue) for ident in ids]:
        why = change.cancel(conn, task, time.monotonic() + wait)
        told = {"queue": task.queue, "task_id": task.task_id}
        outcomes.append({**told, "cancelled": why is None, "why": why})
    return tell("cancelled", outcomes, as_json)


@takes(
    MAYBE_IDS,
    option("to", metavar="QUEUE", help="where to", type=cli.utf8),
    option(
        "--from",
        dest="source",
        metavar="QUEUE",
        type=cli.utf8,
        help="all that wait there, or where the IDs are",
    ),
    option(
        "--type",
        dest="task_type",
        metavar="TYPE",
        type=cli.utf8,
        help="of these, only the tasks of this type",
    ),
)
def move(ids: list[str], to: str, source: str | None, task_type: str | None, as_json: bool) -> int:
    """Move waiting tasks to another queue, each under its own id."""
    conn = database.open_queue()
    database.check_known(conn, [to, *([source] if source else [])])
    if source and not ids:
        wanted = change.waiting_in(conn, source, task_type)
    else:
        wanted = [find(conn, ident, source, option="--from") for ident in ids]
    for found in wanted:
        if found.row_id is None:
            raise Refused(f"task {found.task_id} has ended: retry it first, then move it")
        if found.queue == to:
            raise Refused(f"queue {to!r} is where it is already")
    outcomes = change_each("moved", conn, wanted, lambda found: change.move(conn, found, to))
    code = tell("moved", outcomes, as_json, f" to {to}")
    have_run(conn, [to] if any(task["moved"] for task in outcomes) else [], as_json)
    return code


def fault_in_move(args: argparse.Namespace) -> str:
    if not args.ids and not args.source:
        return "give the IDs to move, or --from"
    return "--type goes with --from and no ID" if args.ids and args.task_type else ""


@takes(
    option("queue", metavar="QUEUE", type=cli.utf8),
    option("--status", **STATUS_TERMS, help="(default: all that wait); may be given several times"),
    TYPE,
    span_option("--before", "enqueued, or finished, at least this long ago"),
    flag("--yes", help="do not ask"),
)
def purge(
    queue: str,
    statuses: list[str] | None,
    task_type: str | None,
    before: float | None,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete waiting tasks of a queue, or with --status finished or handed over ones, for good.
    Asks first; never a running one."""
    conn = database.open_queue()
    database.check_known(conn, [queue])
    statuses = list(
        dict.fromkeys(statuses or [name for name in LIVE if name not in change.NOT_HERE])
    )
    newest = None if before is None else time.time() - before
    doomed = change.to_purge(conn, queue, statuses, task_type, newest)
    confirm_purge(queue, doomed, yes, as_json)
    conditions = change.deletable(statuses)

    def delete(each: change.Doomed) -> int:
        return change.delete(conn, queue, each, conditions)

    deleted = sum(database.in_steps(conn, doomed, delete))
    after.sweep(conn)
    says = f"deleted {plural(deleted, 'task')} of {queue}"
    cli.report(as_json, {"queue": queue, "deleted": deleted}, says)
    return 0


def confirm_purge(queue: str, doomed: list, yes: bool, as_json: bool) -> None:
    """Ask whether to delete these tasks. Raise Refused unless the answer is yes."""
    kinds = Counter(each.status for each in doomed)
    if "handed_over" in kinds:
        say_all(["another machine may still run what is handed over"])
    if yes or not doomed:
        return
    these = ", ".join(f"{number:,} {name}" for name, number in kinds.items())
    if as_json or not sys.stdin.isatty():
        raise Refused(
            f"this would delete {these} of {queue} for good; add --yes, there is nobody to ask"
        )
    print(f"Delete {these} of {queue} for good? [y/N] ", end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was deleted")


def fault_in_purge(args: argparse.Namespace) -> str:
    if "in_progress" in (args.statuses or ()):
        return f"a running task is not purged: {command('cancel ID')}"
    return ""


# ---------------------------------------------------------------------------------- changing queues


def slots(text: str) -> int | None:
    """Return the number of slots, None for any number."""
    return None if text == "none" else cli.whole_number(text)


def bound(text: str) -> tuple[float, float] | None:
    """Return the dollars and seconds of a bound on costs, None for any amount."""
    try:
        return costs.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


@takes(
    QUEUES,
    span_option("--for", "it goes on by itself then (default: until resume)", dest="seconds"),
    option("--reason", type=some_text, help="shown wherever the pause is"),
)
def pause(queues: list[str], seconds: float | None, reason: str | None, as_json: bool) -> int:
    """Hold back claims of a queue, until resume or for a time. Running tasks go on, enqueuing
    works; a restart changes nothing."""
    until = None if seconds is None else time.time() + seconds
    why = None if reason is None else short(reason, 500)
    conn, changed = change_queues(
        queues, lambda conn, queue: pause_queue(conn, queue, until, why, by="person")
    )
    controls, told, lines = controls_of(conn), [], []
    for queue in queues:
        control = controls.get(queue)
        until, why = (control.until, control.reason) if control else (None, None)
        terms = {"until": until and q.utc(until), "reason": why}
        terms = {name: value for name, value in terms.items() if value}
        told.append({"queue": queue, "paused": True, "changed": changed[queue], **terms})
        words = pause_in_words(control) if control else "paused"
        if changed[queue]:
            lines.append(f"{queue} is {words}")
            continue
        line = f"{queue} was paused already, {words.removeprefix('paused ')}"
        shorter = f"; to shorten that: {command('resume')} {queue}, then pause it again"
        lines.append(line + (shorter if seconds is not None else ""))
    cli.report(as_json, told, "\n".join(lines))
    return 0


@takes(QUEUES)
def resume(queues: list[str], as_json: bool) -> int:
    """Let a paused queue's tasks be claimed again."""
    conn, changed = change_queues(queues, resume_queue, create=False)
    told = [{"queue": name, "paused": False, "changed": changed[name]} for name in queues]
    lines = [f"resumed {name}" if changed[name] else f"{name} was not paused" for name in queues]
    for name in queues:
        control = controls_of(conn).get(name)
        if control and control.paused:
            go_on = lets_go_on(name, control.by)
            lines.append(f"{name} is {pause_in_words(control)}; to let it go on: {go_on}")
    cli.report(as_json, told, "\n".join(lines))
    have_run(conn, queues, as_json)
    return 0


@takes(
    QUEUES,
    option("--slots", metavar="N", type=slots, help="a number, or none for any", default=AS_IS),
    option("--cost", metavar="USD/PERIOD", type=bound, default=AS_IS,
           help="what its runs may cost, like 20/day, 1/hour or 50/week; or none for any"),
)  # fmt: skip
def limit(queues: list[str], slots: int | None, cost: tuple | None, as_json: bool) -> int:
    """Let at most N tasks of a queue run at a time, or its runs cost so much, whichever workers and
    consumers serve it. What costs too much starts later."""
    told, lines = {}, []

    def change_one(conn: q.Connection, queue: str) -> None:
        if slots is not AS_IS:
            limit_slots(conn, queue, slots)
        if cost is not AS_IS:
            costs.limit(conn, queue, cost)

    conn, _ = change_queues(queues, change_one)
    if slots is not AS_IS:
        told["slots"] = slots
        number = "any number" if slots is None else f"at most {slots}"
        lines += [f"{queue}: {number} of its tasks at a time" for queue in queues]
    if cost is not AS_IS:
        told |= dict(zip(("cost_usd", "seconds"), cost or (None, None), strict=True))
        lines += [cost_line(queue, controls_of(conn).get(queue)) for queue in queues]
    cli.report(as_json, [{"queue": queue, **told} for queue in queues], "\n".join(lines))
    return 0


def cost_line(queue: str, control: Control | None) -> str:
    if control is None or control.bound is None:
        return f"{queue}: its runs may cost any amount"
    paused = f"; it is {pause_in_words(control)}" if control.by == "costs" else ""
    return f"{queue}: {control.bound}{paused}"


def fault_in_limit(args: argparse.Namespace) -> str:
    return "give --slots, --cost or both" if args.slots is AS_IS and args.cost is AS_IS else ""


def change_queues(
    queues: list[str], change_one: Callable, create: bool = True
) -> tuple[q.Connection, dict[str, bool]]:
    """Call change_one(conn, queue) for each queue in one transaction; return {queue: its answer}.

    A queue that does not exist is made, so that its first task finds what holds it back; without
    `create` it is refused.
    """
    conn = q.connect(create=create)
    if not create:
        database.check_known(conn, queues)
    with q.transaction(conn):
        for queue in queues:
            q.ensure_queue(conn, queue)
        changed = {queue: change_one(conn, queue) for queue in queues}
    q.wake(conn.state)
    return conn, changed


@takes(option("queue", metavar="QUEUE", type=some_text))
def drop(queue: str, as_json: bool) -> int:
    """Remove an empty queue, with its pause and limits. The history keeps what ran there."""
    conn = database.open_queue()
    database.check_known(conn, [queue])
    if serving.is_served(conn.state, queue):
        raise Refused(f"a worker serves {queue}: end it first")
    with q.transaction(conn):
        number = q.execute(conn, COUNT, queue).fetchone()[0]
        if number:
            purge_it = f"{command('purge')} {queue}, or {command('move')} --from {queue} --to ..."
            raise Refused(f"{queue} has {plural(number, 'task')}: {purge_it}")
        names = [name for (name,) in conn.execute(RECURRING, (queue,))]
        if names:
            forget = f"{command('every')} NAME --remove"
            raise Refused(f"tasks recur in {queue}, {', '.join(names)}: {forget}")
        for statement in DROP:
            q.execute(conn, statement, queue)
        conn.queues.discard(queue)
        q.create_view(conn)
    for name in (f"spool/{queue}", f"logs/{queue}"):
        with suppress(OSError):
            os.rmdir(conn.state / name)
    q.wake(conn.state)
    cli.report(as_json, {"queue": queue, "dropped": True}, f"dropped {queue}")
    return 0


@takes()
def take_in(as_json: bool) -> int:
    """Take in what hooks have left. A shell that reads the tables itself runs this first."""
    taken, complaints = spool.take_in_spool()
    text = f"{plural(taken, 'task')} taken in"
    cli.report(as_json, {"taken_in": taken, "complaints": complaints}, text)
    for complaint in () if as_json else complaints:
        cli.complain(EX_FAILED, "tasks.py take-in", complaint)
    return EX_FAILED if complaints else 0
