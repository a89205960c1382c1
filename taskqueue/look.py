"""The commands that look at tasks: stats, page, list, show, logs and wait.

Each is a function; what it takes on the command line is declared above it.
"""

from __future__ import annotations

import heapq
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import queue_helpers as q
from taskqueue import cli, database, every, serving
from taskqueue import show as shown
from taskqueue.cli import (
    EACH_QUEUE,
    EX_FAILED,
    EX_TEMPFAIL,
    IDS,
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
from taskqueue.control import controls_of
from taskqueue.database import STATUS_TERMS, STATUSES
from taskqueue.find import (
    Found,
    Wanted,
    all_records,
    count_tasks,
    find,
    find_tasks,
    gather,
    newest_of,
    newest_record,
    remember,
    source_of,
)
from taskqueue.remedies import command
from taskqueue.text import pause_in_words, plural, seconds_of, span, visible, visible_lines

# How many rows list shows without a screen to fill, and how long it counts the others.
ROWS, COUNT_SECONDS = 50, 0.2
# A worker that was started a moment ago may still be starting: wait names what is missing then.
STARTING_SECONDS = 2.0


def newest_first(row: dict) -> float:
    return -oldest_first(row)


def oldest_first(row: dict) -> float:
    return seconds_of(row["completed_at"] or row["enqueued_at"]) or 0.0


SORTS: dict[str, Callable[[dict], Any]] = {
    "newest": newest_first,
    "oldest": oldest_first,
    "queue": lambda row: row["queue"],
    "type": lambda row: row["task_type"],
    "tries": lambda row: -row["attempts"],
}


# -------------------------------------------------------------------------------------------- stats


@takes(
    EACH_QUEUE,
    flag("--watch", help="redraw until Ctrl-C"),
    span_option("--interval", "of --watch (1 s)", default=1.0),
)
def stats(queues: list[str] | None, watch: bool, interval: float, as_json: bool) -> int:
    """Show how many tasks of each queue and type wait, run, and ended in the last hour and day, and
    how long they took."""
    conn = database.open_queue()
    database.check_known(conn, queues or ())
    if watch:
        return watch_stats(queues, interval, as_json)
    numbers = gather(conn, queues)
    if as_json:
        cli.put_json(numbers)
    else:
        shown.draw(shown.stats_drawing(numbers))
    return 0


def watch_stats(queues: list[str] | None, interval: float, as_json: bool) -> int:
    """Show the numbers again and again: in place on a terminal, below each other elsewhere."""

    def look() -> tuple[dict, float]:
        began = time.monotonic()
        numbers = gather(database.open_queue(), queues)
        # A big database is looked at less often: the look must not become the load that it shows.
        return numbers, max(interval, 4 * (time.monotonic() - began))

    try:
        if as_json or not sys.stdout.isatty():
            while True:
                numbers, pause = look()
                if as_json:
                    cli.put_json(numbers, indent=None)
                else:
                    shown.draw(shown.stats_drawing(numbers))
                sys.stdout.flush()
                time.sleep(pause)
        from rich.live import Live

        with Live(console=shown.console(), auto_refresh=False) as live:
            while True:
                numbers, pause = look()
                live.update(shown.stats_drawing(numbers), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return 0


@takes(
    option("file", metavar="FILE", nargs="?", help="(default: page.html in the state directory)"),
    flag("--open", dest="open_it", help="show it in the browser"),
    flag("--watch", help="write it again after each change, until Ctrl-C"),
    span_option(
        "--interval",
        "how often a browser reads it again with --watch (default 30 s)",
        default=30.0,
    ),
)
def page(file: str | None, open_it: bool, watch: bool, interval: float, as_json: bool) -> int:
    """Write all this as one HTML file, which a browser reads without a server, and print its
    path."""
    from taskqueue import page as pages

    refresh = max(round(interval), 1) if watch else None
    return pages.page(file, open_it, refresh, as_json)


@takes(
    span_option("--max-wait", "a task that waits longer is a problem (default 10m)", default=600.0)
)
def doctor(max_wait: float, as_json: bool) -> int:
    """Say what is wrong with the queue, and what mends it. It changes nothing, and exits 1 if
    something is wrong."""
    from taskqueue.doctor import examine

    return examine(max_wait, as_json)


# --------------------------------------------------------------------------------- list, show, logs


@takes(
    EACH_QUEUE,
    option("--status", **STATUS_TERMS, help="may be given several times"),
    TYPE,
    span_option("--since", "enqueued (finished tasks: finished) at most this long ago"),
    span_option("--before", "… at least this long ago"),
    option("--text", type=some_text, help="in the task, its error or its output"),
    option("--sort", choices=SORTS, help="(default: in the order of claims, then by the end)"),
    option(
        *("-n", "--limit"),
        metavar="N",
        type=cli.whole_number,
        help=f"show so many (default: a screen, or {ROWS}; with --json all)",
    ),
)
def list_(
    queues: list[str] | None,
    statuses: list[str] | None,
    task_type: str | None,
    since: float | None,
    before: float | None,
    text: str | None,
    sort: str | None,
    limit: int | None,
    as_json: bool,
) -> int:
    """List tasks: running ones, then waiting ones in the order of their claims, then finished ones,
    newest first."""
    conn, now = database.open_queue(), time.time()
    database.check_known(conn, queues or ())
    newest = math.inf if before is None else now - before
    oldest = -math.inf if since is None else now - since
    wanted = Wanted(queues, statuses or STATUSES, task_type, oldest, newest, text)
    key = SORTS.get(sort or "")
    if as_json:
        with database.snapshot(conn):
            some = put_rows(first(limit, find_tasks(conn, wanted), key))
        say_all([] if some else ["no matching tasks"])
        return 0
    on_screen = sys.stdout.isatty()
    limit = limit or (shown.rows_on_screen() if on_screen else ROWS)
    with database.snapshot(conn):
        # One row more than the list shows says whether there are more.
        rows = list(first(limit + 1, find_tasks(conn, wanted), key))
        total = count_tasks(conn, wanted, COUNT_SECONDS) if len(rows) > limit else None
        controls = controls_of(conn)
    more, rows = len(rows) > limit, rows[:limit]
    if rows:
        if on_screen and len(rows) > shown.rows_on_screen():
            # Running tasks would scroll away at the top.
            rows.sort(key=lambda row: row["status"] == "in_progress")
        shown.draw(*shown.list_drawing(rows, controls))
        if on_screen:
            remember(conn.state, rows)
    sys.stdout.flush()
    say_all(serving.remarks(conn, conn.state, every.types(conn) | waiting_types(rows)))
    if not rows:
        say_all(["no matching tasks"])
    if more:
        how = f"-n {100 if limit < 100 else total or 10 * limit}"
        is_all = wanted == Wanted(None, STATUSES, None, -math.inf, math.inf, None) and not sort
        how = command(f"list {how}") if is_all else f"{how} shows more"
        say_all([f"{limit:,} of {'many' if total is None else f'{total:,}'} ({how})"])
    return 0


def put_rows(rows: Iterable[dict]) -> bool:
    """Print tasks as a JSON list, one at a time: there may be millions. Return whether it has any."""
    before = "["
    for row in rows:
        print(f"{before}\n{json.dumps(row | {'data': shown.payload(row['data'])})}", end="")
        before = ","
    print("[]" if before == "[" else "\n]")
    return before != "["


def first(number: int | None, rows: Iterable[dict], key: Callable | None) -> Iterable[dict]:
    """Return the first rows, or all, in the order of the key if there is one."""
    if key:
        return sorted(rows, key=key) if number is None else heapq.nsmallest(number, rows, key=key)
    return islice(rows, number)


def waiting_types(rows: Iterable[dict]) -> dict[str, set[str]]:
    """Return {queue: task types} of those rows that wait for a worker."""
    waiting: dict[str, set[str]] = {}
    for row in rows:
        if row["status"] in serving.WAITING:
            waiting.setdefault(row["queue"], set()).add(row["task_type"])
    return waiting


@takes(IDS, WHOSE)
def show(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Show everything about a task: its fields, its data, its history and its output."""
    conn, tasks = database.open_queue(), []
    for ident in ids:
        with database.snapshot(conn):
            tasks.append(all_about(conn, find(conn, ident, queue)))
    if as_json:
        cli.put_json(tasks[0] if len(tasks) == 1 else tasks)
        return 0
    for number, task in enumerate(tasks):
        sys.stdout.write(f"{chr(10) if number else ''}{shown.task_text(task)}\n")
        if task["history"]:
            sys.stdout.write("\nbefore\n")
            shown.draw(shown.history_table(task["history"]))
        if task["runs"]:
            sys.stdout.write(f"\noutput files\n{shown.output_files(task['runs'])}")
    return 0


def all_about(conn: q.Connection, found: Found) -> dict:
    """Return a task as it is now, with its earlier records, its source and its runs."""
    records = [
        record
        | {"data": shown.payload(record["data"])}
        | ({"asks": shown.payload(record["asks"])} if "asks" in record else {})
        for record in all_records(conn, found)
    ]
    task = records[0]
    return task | {
        "came_from": source_of(conn, task["data"]),
        "history": records[1:],
        "runs": [run._asdict() for run in shown.runs_of(task)],
    }


@takes(
    option("id", metavar="ID", type=some_text),
    WHOSE,
    flag("-f", "--follow", help="go on until the task is finished"),
    option("--attempt", metavar="N", type=cli.whole_number, help="(default: the last)"),
)
def logs(id: str, queue: str | None, follow: bool, attempt: int | None, as_json: bool) -> int:
    """Print what the handler printed: its stdout on stdout, its stderr on stderr. Of the last
    attempt, or the running one, or with --attempt of an earlier one."""
    conn = database.open_queue()
    found = find(conn, id, queue)
    if follow and not as_json and attempt is None:
        return shown.follow_logs(conn, found)
    record = newest_record(conn, found)
    runs = shown.runs_of(record)
    if attempt is not None:
        runs = [run for run in runs if run.attempt == attempt]
    is_there = bool(runs) and (attempt is not None or runs[-1].attempt >= record["attempts"])
    if not is_there and not record["attempts"]:
        raise Refused(f"task {found.task_id} has not run yet ({record['status']}); -f waits for it")
    if not is_there and attempt not in (None, record["attempts"]):
        why = "it printed nothing, or cleanup has pruned it"
        raise Refused(f"no output of attempt {attempt} of task {found.task_id} is there: {why}")
    sources = {
        ending: shown.open_output(runs[-1].path if is_there else None, ending, record)
        for ending in shown.KEPT
    }
    if as_json:
        told = {"queue": found.queue, "task_id": found.task_id}
        told |= {"status": record["status"], "attempt": attempt or record["attempts"]}
        shown.print_as_json(told, sources)
    else:
        shown.print_outputs(sources)
    return 0


# --------------------------------------------------------------------------------------------- wait


@takes(IDS, WHOSE, span_option("--timeout", "give up after this time (default: never)"))
def wait(ids: list[str], queue: str | None, timeout: float | None, as_json: bool) -> int:
    """Wait until tasks have ended, and print their results. A task that is tried again has not
    ended."""
    conn = database.open_queue()
    tasks = [find(conn, ident, queue) for ident in ids]
    records = wait_for_end(conn.state, tasks, timeout, as_json)
    results = [result_of(record) for record in records]
    if as_json:
        cli.put_json(results[0] if len(results) == 1 else results)
    else:
        print_results(records)
    sys.stdout.flush()
    waiting = [record["task_id"] for record in records if record["completed_at"] is None]
    if waiting:
        total = plural(len(records), "task")
        names = f"{', '.join(waiting[:10])}{', …' if len(waiting) > 10 else ''}"
        error = f"{len(waiting)} of {total} had not ended after {span(timeout)}: {names}"
        return cli.complain(EX_TEMPFAIL, "tasks.py wait", error)
    return 0 if all(record["status"] == "completed" for record in records) else EX_FAILED


def wait_for_end(state: Path, tasks: list[Found], timeout: float | None, quiet: bool) -> list[dict]:
    """Return the tasks' records once all have ended, or the time is over.

    Meanwhile, unless `quiet`, name on stderr what they wait for beside their turn.
    """
    began, said = time.monotonic(), set()
    say_at = began + STARTING_SECONDS
    # The watch on the database sets it whenever there is reason to look.
    changed = threading.Event()
    q.Watch.of(state).listeners.add(changed)
    while True:
        changed.clear()
        conn = database.open_queue()
        with database.snapshot(conn):
            records = [newest_of(conn, found) for found in tasks]
        is_over = all(record["completed_at"] is not None for record in records)
        now = time.monotonic()
        left = math.inf if timeout is None else timeout - (now - began)
        if not is_over and not quiet and (now >= say_at or left <= 0):
            reasons = why_waiting(conn, records)
            say_all([line for key, line in reasons.items() if key not in said])
            said.update(reasons)
            say_at = now + q.SAFETY_TICK_SECONDS
        if is_over or left <= 0:
            return records
        next_look = math.inf if quiet else max(0.0, say_at - now)
        changed.wait(min(left, next_look, q.SAFETY_TICK_SECONDS, threading.TIMEOUT_MAX))


def why_waiting(conn: q.Connection, records: Sequence[dict]) -> dict[object, str]:
    """Name what tasks wait for beside their turn: a person, the end of a pause, a worker.

    A key stays the same while its line counts down.
    """
    lines: dict[object, str] = {}
    controls = controls_of(conn)
    for record in records:
        ident, queue = record["task_id"], record["queue"]
        if record["status"] == "held":
            why = f" ({record['error']})" if record["error"] else ""
            lines[ident] = f"{ident} is held{why}: {command('approve')} {ident}"
        if record.get("after"):
            lines[ident] = f"{ident} waits for {record['after']}"
        control = controls.get(queue)
        if record["status"] in serving.WAITING and control and control.paused:
            lines[queue, control.until, control.reason] = f"{queue} is {pause_in_words(control)}"
    remarks = serving.remarks(conn, conn.state, waiting_types(records))
    lines.update((line, line) for line in remarks)
    return lines


def result_of(record: dict) -> dict:
    """Return the fields of a task that wait --json prints."""
    names = ("queue", "task_id", "task_type", "status", "attempts", "exit_code", "error", "result")
    result = {name: record.get(name) for name in names}
    return result | {"summary": shown.summary(record.get("result"))}


def print_results(records: Iterable[dict]) -> None:
    """Print how each ended task ended, and its result."""
    for record in records:
        if record["completed_at"] is not None:
            why = f": {record['error']}" if record["error"] else ""
            print(visible(f"{record['task_id']} {record['status']}{why}"))
            print(visible_lines(record["result"] or ""), end="")
