#!/usr/bin/env -S sh -c 'export TASK_QUEUE_CWD="$PWD"; unset VIRTUAL_ENV CONDA_PREFIX PYTHONPATH PYTHONHOME; me=$(realpath "$0") && cd / && exec uv run --script "$me" "$@"'
# /// script
# requires-python = ">=3.11"
# dependencies = ["jinja2>=3.1,<4"]
# ///
"""Show the queue as a web page, which only reads: what failed lately and why, and what runs.

    dashboard.py                       prints the page's address; Ctrl-C ends it
    dashboard.py --port 9000
    dashboard.py --port 0              any free port

The page is served on 127.0.0.1 alone and needs no network. The address contains a key that is new
at each start: other users of this machine and other web pages cannot read the queue without it.
Whoever has the whole address sees payloads and results.

exit codes: 0 ended by a signal; 1 the database cannot be used, or the port is taken; 64 usage;
75 the database is locked, try again.
"""

# Why the standard library serves this: the page answers GET for four kinds of address and runs only
# the statements below. Datasette was used before. With arbitrary SQL, table pages, filters and its
# JSON interface switched off, little but its 34 packages was left of it. Jinja2 stays, because
# escaping what tasks say is not a thing to write by hand. There is no JavaScript: the charts are
# SVG, and the Content-Security-Policy lets no script run, whatever a payload contains.

if __name__ == "__main__":
    import os
    import sys

    # Modules come from beside this file and from Python itself, since PYTHONPATH may name a
    # workspace. os and sys are there already; even __future__ would be looked for.
    own = sys.path.index(os.path.dirname(os.__file__))
    sys.path[:] = [os.path.dirname(os.path.realpath(__file__)), *sys.path[own:]]

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import shlex
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import queue_helpers as q
from taskqueue import cli
from taskqueue import stats as queue_stats
from taskqueue.cli import LIVE
from taskqueue.text import visible

PORT = 8765
# How pages call the script that acts on tasks.
TASKS = cli.as_typed("tasks.py")
REFRESH_SECONDS = 30
# A reader keeps SQLite from emptying the write-ahead log, so no page may read for long.
PAGE_SECONDS = 5.0
# How long a browser may take to send its request, or to read the answer.
SOCKET_SECONDS = 10.0
CONNECTIONS = 32
# A row that is larger than this is not read: a page takes no more memory than a few of them.
ROW_BYTES = 64 * 2**20
BOX_CHARS = 65_536
LINE_CHARS = 300
ROWS = 200
ROWS_ON_FRONT = 6
DAY = 86_400
BARS = 24
# A bar stands for 5 minutes, 15 minutes or an hour: the first with which all of the day's tasks
# fit.
BAR_SECONDS = (300, 900, 3_600)

# --------------------------------------------------------------------------------------- statements

CLAIM_ORDER = {
    "in_progress": "claimed_at, id",
    "pending": "priority desc, id",
    "scheduled": "due_at, id",
    "held": "id",
    "blocked": "id",
    "handed_over": "claimed_at, id",
}

EACH_MINUTE = """
select substr(completed_at, 1, 16) as minute, status, count(*), count(started_at),
       total(max((julianday(started_at) - julianday(enqueued_at)) * 86400.0, 0))
from task_history where completed_at >= :day_ago group by 1, 2 order by 1"""

WORKSPACE = """
case when json_valid(data) then coalesce(json_extract(data, '$.data.workspace_path'),
  json_extract(data, '$.workspace_path')) end as workspace"""
LIVE_IDS = """
select id, {key} from "{queue}" where {condition} order by {order} limit :rows"""
FINISHED_IDS = """
select id from task_history where status = :status and (:queue is null or queue = :queue)
order by completed_at desc limit :rows"""
LIVE_LINE = f"""
select '{{queue}}' as queue, id, coalesce(task_id, '{{queue}}-' || id) as task_id,
       coalesce(task_type, '{{queue}}') as task_type, {q.STATUS_WORD} as status, attempts,
       timestamp as enqueued_at, claimed_at as started_at, due_at, null as completed_at,
       substr(error, 1, {LINE_CHARS}) as error, {WORKSPACE}
from "{{queue}}" where id = :id"""
FINISHED_LINE = f"""
select queue, id, task_id, task_type, status, attempts, enqueued_at, started_at, null as due_at,
       completed_at, substr(error, 1, {LINE_CHARS}) as error,
       substr(ltrim(result, char(9, 10, 13, 32)), 1, {LINE_CHARS}) as printed,
       {WORKSPACE}
from task_history where id = :id"""

LIVE_TASK = f"""
select *, {q.STATUS_WORD} as word, coalesce(task_id, '{{queue}}-' || id) as name
from "{{queue}}" where id = :id"""
FINISHED_TASK = """
select *, status as word, task_id as name from task_history where id = :id"""
LIVE_RUN = """
select id from "{queue}" where task_id = :name"""
FINISHED_RUNS = """
select id from task_history where task_id = :name and +queue = :queue order by id desc limit :rows"""
MOVED_ON = """
select max(id) from task_history where queue = :queue and row_id = :id"""

# ------------------------------------------------------------------------------------- command line


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535, 0 for any free one")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.make_parser("dashboard.py", __doc__)
    parser.add_argument(
        "--port", metavar="N", type=port, default=PORT, help=f"default {PORT}; 0: any free one"
    )
    args = parser.parse_args(argv)
    return cli.run("dashboard.py", lambda: serve(q.STATE_DIR, args.port))


def serve(state: Path, number: int) -> int:
    """Answer requests until SIGTERM or SIGINT."""
    open_read_only(state).close()
    try:
        server = Server(state, number)
    except OSError as error:
        raise q.QueueUnavailable(
            f"port {number}: {error.strerror}; choose another with --port, 0 for any free one"
        ) from None
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda *_: sys.exit(0))
    with server:
        print(server.address, flush=True)
        server.serve_forever()
    return 0


# ----------------------------------------------------------------------------- who may ask for what


class Server(ThreadingHTTPServer):
    """Serves the pages of a state directory, at an address that contains a new key."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, state: Path, number: int) -> None:
        self.state = state
        # Part of the path, because a cookie would be sent to every other port of 127.0.0.1, too.
        # New at each start, because an open page goes on asking after the end of this process, and
        # another user's process may listen there by then.
        self.key = secrets.token_urlsafe(24)
        # Read by one request at a time, so that neither time nor memory depends on how many there
        # are.
        self.reader = threading.Lock()
        self.places = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(("127.0.0.1", number), Request)
        number = self.server_address[1]
        self.address = f"http://127.0.0.1:{number}/{self.key}/"
        names = ("127.0.0.1", "localhost")
        self.hosts = {f"{name}:{number}" for name in names} | (
            set(names) if number == 80 else set()
        )

    def process_request(self, request, client_address) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request, client_address) -> None:
        """Print faults of ours, but not that a browser went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Request(BaseHTTPRequestHandler):
    """One GET or HEAD. The base class answers other methods with 501."""

    server: Server
    timeout = SOCKET_SECONDS

    def do_GET(self) -> None:
        self.server_version, self.sys_version = "task-queue", ""
        refused = self.refusal()
        if refused:
            self.answer(403, f"refused: {refused}\n")
            return
        try:
            asked = urlsplit(self.path)
            path, query = asked.path.removeprefix(f"/{self.server.key}/"), asked.query
            self.answer(*page(self.server, path, query))
        except NoPage:
            self.answer(404, "there is no such page\n")
        except (q.QueueBusy, q.QueueUnavailable) as error:
            self.answer(503, f"{cli.remedies_as_typed(str(error))}\n")
        except Exception:
            self.answer(500, "a fault of this page; where it was started, it says more\n")
            raise

    do_HEAD = do_GET

    def refusal(self) -> str | None:
        """Why this request is not answered, None when it is.

        Host is checked because a web page can make a name of its own mean 127.0.0.1.
        Sec-Fetch-Site is `none` for an address that a person typed or opened from a terminal. It is
        `same-site` for what another port of this machine serves: a stranger to us. Requests that
        carry none of these headers do not come from a web page in a browser of today. They need
        the key like all others.
        """
        host, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(host) != 1 or host[0] not in self.server.hosts:
            return "open this page as 127.0.0.1 or localhost"
        if origin is not None and origin not in {f"http://{name}" for name in self.server.hosts}:
            return "another web page asked"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return (
                "another web page asked; to open this page, paste its address into the address bar"
            )
        if self.headers.get("Sec-Fetch-Dest", "document") != "document":
            return "this is a page, not a part of one"
        key = self.path.split("/", 2)[1:2]
        if not secrets.compare_digest("".join(key).encode(), self.server.key.encode()):
            return f"open the whole address that {cli.command('dashboard')} printed when it was started last"
        return None

    def answer(self, code: int, text: str, to: str | None = None) -> None:
        """Send a page, or a line of plain text."""
        body = text.encode("utf-8", "replace")
        self.send_response(code)
        kind = "html" if text.startswith("<!doctype html>") else "plain"
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if to is not None:
            self.send_header("Location", f"/{self.server.key}/{to}")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Keep the terminal still: the address of a request contains the key."""


# ------------------------------------------------------------------------------------- the database


def open_read_only(state: Path) -> sqlite3.Connection:
    """A connection that only reads a queue's database. It makes and migrates nothing."""
    db = state / "tasks.db"
    try:
        os.stat(db)
        # as_uri() quotes what a URI would take for its own: ? and # and %.
        conn = sqlite3.connect(
            f"{db.as_uri()}?mode=ro",
            uri=True,
            timeout=1,
            isolation_level=None,
            factory=cli.Reader,
        )
        conn.state = state
        try:
            check_version(conn, db)
        except BaseException:
            conn.close()
            raise
        # bash may have cast any bytes to text.
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
        conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, ROW_BYTES)
        return conn
    except OSError as error:
        raise q.QueueUnavailable(f"{db}: {error.strerror}; the first enqueue makes it") from None
    except sqlite3.Error as error:
        raise q.explain(error, state) from error


def check_version(conn: sqlite3.Connection, db: Path) -> None:
    (version,) = conn.execute("pragma user_version").fetchone()
    if version > q.SCHEMA_VERSION:
        raise q.QueueUnavailable(
            f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}: update them"
        )
    if not conn.execute("select 1 from sqlite_master where name = 'task_history'").fetchone():
        raise q.QueueUnavailable(
            f"{db} has no task history: it is not a task queue's, or only bash has used it yet; "
            f"{cli.command('add')} and {cli.command('work')} make it ready"
        )
    if version < q.SCHEMA_VERSION:
        raise q.QueueUnavailable(
            f"{db} has schema version {version}; {cli.command('add')} and {cli.command('work')} "
            "migrate it"
        )


@contextmanager
def reading(server: Server) -> Iterator[sqlite3.Connection]:
    """One state of the database as it is now, to be read within PAGE_SECONDS."""
    deadline = time.monotonic() + PAGE_SECONDS
    if not server.reader.acquire(timeout=PAGE_SECONDS):
        raise q.QueueBusy("other pages are being read; try again")
    try:
        conn = open_read_only(server.state)
        try:
            conn.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            conn.execute("begin")
            yield conn
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_INTERRUPT":
                raise q.QueueBusy(
                    f"this page was not read within {PAGE_SECONDS:g} seconds; see: {TASKS} list"
                ) from None
            raise q.explain(error, server.state) from error
        finally:
            conn.close()
    finally:
        server.reader.release()


def in_time(read: Callable, *args):
    """What read(*args) returns; None when it did not end in time, and is left out."""
    try:
        return read(*args)
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorname", "") != "SQLITE_INTERRUPT":
            raise
        return None


def rows_of(cursor: sqlite3.Cursor) -> Iterator[dict]:
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


def on_queue(statement: str, queue: str, **parts: str) -> str:
    return statement.format(queue=q.check_queue_name(queue), **parts)


class Counts(NamedTuple):
    """Of one queue and type: tasks by status (finished ones of the last 24 hours), seconds."""

    queue: str
    task_type: str | None
    tasks: dict[str, int]
    oldest_waiting: float | None
    waited: float | None
    ran: float | None


def counts_of(numbers: dict) -> list[Counts]:
    """For each queue a row for all types, then one for each: what tasks.py stats counts."""
    rows = []
    for queue, total in numbers["queues"].items():
        for task_type, n in ((None, total), *total["types"].items()):
            tasks = {name: n[name] for name in LIVE}
            tasks |= {
                name.removesuffix("_day"): count
                for name, count in n.items()
                if name.endswith("_day")
            }
            medians = [n[name] and n[name]["median"] for name in ("wait_seconds", "run_seconds")]
            rows.append(Counts(queue, task_type, tasks, n["oldest_pending_seconds"], *medians))
    return rows


class Bar(NamedTuple):
    """What finished between two moments: tasks by status, and the mean seconds that they waited."""

    since: float
    until: float
    tasks: dict[str, int]
    waited: float | None


def bars_of(conn: sqlite3.Connection, now: float, day_ago: str) -> list[Bar]:
    """The last hours in BARS parts, none when nothing has finished in the last day."""
    minutes = [row for row in conn.execute(EACH_MINUTE, {"day_ago": day_ago}) if seconds_of(row[0])]
    if not minutes:
        return []
    # Bars begin at full hours of the local clock, which are not those of UTC everywhere.
    offset = datetime.fromtimestamp(now).astimezone().utcoffset().total_seconds()
    for width in BAR_SECONDS:
        end = ((now + offset) // width + 1) * width - offset
        begin = end - BARS * width
        if seconds_of(minutes[0][0]) >= begin:
            break
    tasks: list[dict[str, int]] = [{} for _ in range(BARS)]
    waits, started = [0.0] * BARS, [0] * BARS
    for minute, status, count, with_start, waited in minutes:
        # What is older than the first bar is not drawn: a day's 24 bars end with the next full
        # hour.
        number = int((seconds_of(minute) - begin) // width)
        if 0 <= number < BARS:
            tasks[number][status] = tasks[number].get(status, 0) + count
            waits[number] += waited
            started[number] += with_start
    return [
        Bar(
            begin + number * width,
            begin + (number + 1) * width,
            tasks[number],
            waits[number] / started[number] if started[number] else None,
        )
        for number in range(BARS)
    ]


def lines_of(conn: sqlite3.Connection, status: str, queue: str | None, rows: int) -> list[dict]:
    """Tasks of one status: waiting ones in the order of claims, finished ones newest first.

    Each task is read on its own, so that one that is too large hides no other.
    """
    which = {"status": status, "queue": queue, "rows": rows}
    if status not in LIVE:
        found = conn.execute(FINISHED_IDS, which).fetchall()
        return [line(conn, FINISHED_LINE, id, queue, status) for (id,) in found]
    order = CLAIM_ORDER[status]
    key = "-priority" if status == "pending" else order.split(",")[0]
    parts = {"condition": LIVE[status], "key": key, "order": order}
    found = []
    for name in [queue] if queue else cli.queues_of(conn):
        for id, value in conn.execute(on_queue(LIVE_IDS, name, **parts), which):
            found.append((value if isinstance(value, float | int) else 0, id, name))
    found = sorted(found)[:rows]
    return [line(conn, on_queue(LIVE_LINE, name), id, name, status) for _, id, name in found]


def line(conn: sqlite3.Connection, statement: str, id: int, queue: str | None, status: str) -> dict:
    try:
        (row,) = rows_of(conn.execute(statement, {"id": id}))
    except sqlite3.DataError:
        row = {
            "queue": queue or "",
            "id": id,
            "task_id": f"row {id}",
            "task_type": "?",
            "status": status,
        }
        row["error"] = f"larger than {ROW_BYTES >> 20} MiB, too large for a page"
    finished = status not in LIVE
    row["link"] = f"finished/{row['id']}" if finished else f"task/{row['queue']}/{row['id']}"
    workspace = cut(row.get("workspace"), LINE_CHARS)
    row["workspace"], row["project"] = workspace, workspace.rstrip("/").rpartition("/")[2]
    row["says"] = cut(row.get("error") or row.get("printed")).split("\n")[0]
    return row


# ---------------------------------------------------------------------------------------- the pages


class NoPage(Exception):
    """Nothing has this address."""


def page(server: Server, path: str, query: str) -> tuple:
    """What Request.answer takes: a status, a page, and where it is when it is elsewhere."""
    with reading(server) as conn:
        if path == "":
            return 200, front(conn)
        if path == "tasks":
            return 200, task_list(conn, query)
        if match := re.fullmatch(r"finished/(\d{1,18})", path):
            return 200, task(conn, FINISHED_TASK, "finished", int(match[1]))
        if match := re.fullmatch(r"task/([a-z][a-z0-9_]{0,62})/(\d{1,18})", path):
            queue, id = match[1], int(match[2])
            if queue not in cli.queues_of(conn):
                raise NoPage
            if conn.execute(f'select 1 from "{queue}" where id = ?', [id]).fetchone():
                return 200, task(conn, on_queue(LIVE_TASK, queue), queue, id)
            (found,) = conn.execute(MOVED_ON, {"queue": queue, "id": id}).fetchone()
            if found is not None:
                return 302, "it has finished\n", f"finished/{found}"
            return 404, "this task is no longer here: it was removed, or moved to another queue\n"
    raise NoPage


def front(conn: sqlite3.Connection) -> str:
    """The first page. What a person must see comes first, and is read first."""
    now = time.time()
    day_ago = q.utc(now - DAY)
    failed, running = (lines_of(conn, s, None, ROWS_ON_FRONT) for s in ("failed", "in_progress"))
    controls = {name: control for name, control in q.controls(conn).items() if control.paused}
    numbers = in_time(queue_stats.gather, conn)
    counts = None if numbers is None else counts_of(numbers)
    bars = in_time(bars_of, conn, now, day_ago)
    totals: dict[str, int] = {}
    for row in counts or ():
        if row.task_type is None:
            for status, tasks in row.tasks.items():
                totals[status] = totals.get(status, 0) + tasks
    tiles = [status for status in TILES if status in ALWAYS or totals.get(status)]
    tiles += sorted(status for status in totals.keys() - set(TILES) if totals[status])
    columns = [status for status in STATUS_WORDS if status in ALWAYS or totals.get(status)]
    columns += sorted(totals.keys() - STATUS_WORDS.keys())
    return render(
        "front",
        up="",
        failed=failed,
        running=running,
        paused=controls,
        counts=counts,
        bars=bars,
        totals=totals,
        tiles=tiles,
        columns=columns,
        refresh=True,
    )


def task_list(conn: sqlite3.Connection, query: str) -> str:
    """Tasks of one status, of all queues or one."""
    try:
        asked = dict(parse_qsl(query, max_num_fields=9))
    except ValueError:
        raise NoPage from None
    status, queue = asked.get("status", "pending"), asked.get("queue")
    if not re.fullmatch(r"[a-z_]{1,40}", status) or queue not in (None, *cli.queues_of(conn)):
        raise NoPage
    rows = lines_of(conn, status, queue, ROWS + 1)
    more, rows = len(rows) > ROWS, rows[:ROWS]
    return render(
        "list",
        up="",
        status=status,
        queue=queue,
        queues=cli.queues_of(conn),
        rows=rows,
        more=more,
        refresh=True,
    )


def task(conn: sqlite3.Connection, statement: str, place: str, id: int) -> str:
    """Everything about one task."""
    try:
        row = next(rows_of(conn.execute(statement, {"id": id})), None)
    except sqlite3.DataError:
        raise q.QueueUnavailable(
            f"this task is larger than {ROW_BYTES >> 20} MiB; see: {TASKS} show"
        ) from None
    if row is None:
        raise NoPage
    queue, finished = row.get("queue", place), place == "finished"
    which = {"name": row["name"], "queue": queue, "rows": ROWS_ON_FRONT + 1}
    runs = []
    if finished and queue in cli.queues_of(conn):
        for (run,) in conn.execute(on_queue(LIVE_RUN, queue), which).fetchall():
            runs.append(line(conn, on_queue(LIVE_LINE, queue), run, queue, "pending"))
    for (run,) in conn.execute(FINISHED_RUNS, which).fetchall():
        if not (finished and run == id):
            runs.append(line(conn, FINISHED_LINE, run, queue, "failed"))
    return render(
        "task",
        up="../" if finished else "../../",
        name=cut(row["name"], LINE_CHARS),
        status=row["word"],
        task_type=cut(row["task_type"] or queue, LINE_CHARS),
        fields=fields_of(row, queue, finished),
        error=cut(row["error"], 10 * LINE_CHARS),
        boxes=[
            ("What it printed", cut(row.get("result"))),
            ("Its messages and errors (stderr)", cut(row.get("log"))),
            ("What it was given", cut(payload(row["data"]))),
            ("What it runs again with", cut(payload(row.get("rerun_data") or ""))),
        ],
        runs=runs,
        command=COMMANDS.get(row["word"], "show {id}").format(
            id=shlex.quote(str(row["name"])[:LINE_CHARS])
        ),
        refresh=not finished,
    )


# Shown elsewhere on a task's page, or not at all.
UNSAID = set("id row_id queue task_id task_type status word name data error result log".split())
UNSAID |= {"max_attempts", "backoff", "chain", "rerun_data"}
LABELS = {
    "released_at": "Put back",
    "then_hold": "Result is held for approval",
    "timestamp": "Enqueued",
    "enqueued_at": "Enqueued",
    "due_at": "Starts at",
    "expires_at": "Expires at",
    "claimed_at": "Started",
    "started_at": "Started",
    "completed_at": "Finished",
    "exit_code": "Exit code",
    "group_id": "Group",
    "then_queue": "Result goes to queue",
    "owner": "Worker",
    "cancel_requested": "To be cancelled",
}
FIRST = ("enqueued_at", "timestamp", "due_at", "started_at", "claimed_at", "completed_at")


def fields_of(row: dict, queue: str, finished: bool) -> list[tuple[str, object]]:
    """(label, value) of a task. A column that is not known here is shown under its own name."""
    of_row = {name: row[name] for name in (*(name for name in FIRST if name in row), *row)}
    fields: list[tuple[str, object]] = [("Queue", queue)]
    for name, value in of_row.items():
        if name in UNSAID or value is None or value == "" or (value == 0 and name != "exit_code"):
            continue
        label = LABELS.get(name, name.replace("_", " ").capitalize())
        if name == "attempts":
            most = row.get("max_attempts")
            value = f"{value} of {most}" if most else value
        elif name.endswith("_at") or name == "timestamp":
            value = Moment(value)
        elif isinstance(value, str):
            value = cut(value, LINE_CHARS)
        fields.append((label, value))
    started = seconds_of(row.get("started_at") or row.get("claimed_at"))
    if started is not None and (finished or row["word"] == "in_progress"):
        until = seconds_of(row["completed_at"]) if finished else time.time()
        fields.append(
            ("Ran for" if finished else "Running for", span((until or started) - started))
        )
    return fields


def payload(text: str) -> str:
    """What the sender sent, without the envelope, indented; as it is when long or no JSON."""
    if len(text) > BOX_CHARS:
        return text
    try:
        stored, _ = q.read_task(text)
        envelope = isinstance(stored, dict) and {"task_id", "task_type"} <= stored.keys()
        inner = stored["data"] if envelope and isinstance(stored.get("data"), dict) else stored
        return json.dumps(inner, ensure_ascii=False, indent=2)
    # TypeError: what another program has stored need not be text.
    except (ValueError, TypeError, RecursionError):
        return text


def cut(value: object, most: int = BOX_CHARS) -> str:
    text = "" if value is None else str(value)
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]} … ({more:,} more characters)"


# ------------------------------------------------------------------------------- words and drawings

# Words that people use, in the order in which columns stand. A status that is not here is shown as
# it is called.
STATUS_WORDS = {
    "pending": "Waiting",
    "in_progress": "Running",
    "scheduled": "Scheduled",
    "held": "Held for approval",
    "blocked": "Waiting for its turn",
    "handed_over": "On another machine",
    "completed": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
    "expired": "Expired",
}
# The front page's numbers: first what needs a person. Some are there even when they are 0.
TILES = ("failed", "held", "in_progress", "pending", "blocked", "scheduled", "completed")
ALWAYS = {"failed", "in_progress", "pending", "scheduled", "completed"}
COMMANDS = {
    "failed": "retry {id}",
    "in_progress": "logs {id} --follow",
    "scheduled": "retry {id}",
    "held": "approve {id}",
}
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def word(status: str) -> str:
    return STATUS_WORDS.get(status, status.replace("_", " ").capitalize())


def known(status: str) -> str:
    """The CSS class of a status: one colour a meaning, and one for statuses that have none."""
    return status if status in STATUS_WORDS else "other"


def span(seconds: float | None, units: int = 2) -> str:
    """A duration in at most so many units; a dash for none, and for what cannot be one."""
    if seconds is None or not seconds < 1e11:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{max(seconds, 0) * 1000:.0f} ms"
    rest, parts = int(seconds), []
    for size, unit in UNITS:
        if rest >= size:
            parts.append(f"{rest // size} {unit}")
        elif parts:
            break
        rest %= size
    return " ".join(parts[:units])


def seconds_of(moment: object) -> float | None:
    """Unix seconds of what a table holds: a number, or UTC text. None for what is neither."""
    if isinstance(moment, int | float):
        return float(moment)
    try:
        return datetime.fromisoformat(str(moment)).replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None


class Moment:
    """A moment as the database has it, shown in local time; what is no moment is shown as it is."""

    def __init__(self, value: object) -> None:
        self.full = self.short = cut(value, 40)
        self.ago = ""
        try:
            local = datetime.fromtimestamp(seconds_of(value)).astimezone()
            now = datetime.now().astimezone()
        except (TypeError, ValueError, OverflowError, OSError):
            return
        self.long = f"{local:%Y-%m-%d %H:%M:%S}"
        self.full = f"{self.long} {zone(local)}"
        if local.date() == now.date():
            self.short = f"{local:%H:%M}"
        elif local.year == now.year:
            self.short = f"{local:%d %b, %H:%M}"
        else:
            self.short = f"{local:%Y-%m-%d}"
        away = (now - local).total_seconds()
        self.ago = f"{span(away, 1)} ago" if away >= 0 else f"in {span(-away, 1)}"

    def __str__(self) -> str:
        return f"{self.long} ({self.ago})" if self.ago else self.full


def zone(local: datetime) -> str:
    if local.tzname() == "UTC":
        return "UTC"
    offset = f"{local:%z}"
    return f"{local.tzname()} (UTC{offset[:3]}:{offset[3:5]})"


class Block(NamedTuple):
    """A rectangle of a chart, in hundredths of its height."""

    x: int
    y: float
    height: float
    css: str


def finished_chart(bars: list[Bar]) -> tuple[int, list[tuple[list[Block], str]]]:
    """The highest number of tasks, and for each bar its blocks, stacked, with what they say."""
    most = max(sum(bar.tasks.values()) for bar in bars)
    drawn = []
    for number, bar in enumerate(bars):
        top, blocks = 100.0, []
        for status in sorted(bar.tasks, key=lambda status: (status == "failed", status)):
            height = 100 * bar.tasks[status] / (most or 1)
            top -= height
            blocks.append(Block(number, round(top, 2), round(height, 2), known(status)))
        says = ", ".join(
            f"{tasks} {word(status).lower()}" for status, tasks in sorted(bar.tasks.items())
        )
        drawn.append((blocks, f"{between(bar)}: {says or 'nothing'}"))
    return most, drawn


def waiting_chart(bars: list[Bar]) -> tuple[float, list[tuple[list[Block], str]]]:
    """The longest mean wait, and for each bar its block with what it says."""
    most = max((bar.waited or 0) for bar in bars)
    drawn = []
    for number, bar in enumerate(bars):
        height = 100 * (bar.waited or 0) / (most or 1)
        block = Block(number, round(100 - height, 2), round(height, 2), "pending")
        drawn.append(([block], f"{between(bar)}: {span(bar.waited)}"))
    return most, drawn


def between(bar: Bar) -> str:
    return f"{clock(bar.since)} to {clock(bar.until)}"


def clock(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(seconds))


def seen(value: object) -> object:
    """Make each text that a template prints visible."""
    return visible(value, keep="\n\t") if isinstance(value, str) else value


@lru_cache(1)
def templates():
    from jinja2 import DictLoader, Environment, StrictUndefined

    made = Environment(
        loader=DictLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=seen,
    )
    made.filters |= {"word": word, "css": known, "span": span, "moment": Moment, "clock": clock}
    made.globals |= {"finished_chart": finished_chart, "waiting_chart": waiting_chart}
    made.globals |= {"style": STYLE, "words": STATUS_WORDS, "live": LIVE, "script": TASKS}
    made.globals |= {"refresh_seconds": REFRESH_SECONDS, "page_seconds": PAGE_SECONDS}
    return made


def render(template: str, /, **values) -> str:
    local = datetime.now().astimezone()
    return templates().get_template(template).render(now=local, zone=zone(local), **values)


# ---------------------------------------------------------------------------------------- the looks

# Each status has one colour, wherever it appears; every one is read easily on the page's
# background.
STYLE = """
:root {
  color-scheme: light dark;
  --back: #f5f6f8; --card: #ffffff; --text: #1a1f26; --quiet: #56606c; --line: #d9dde3; --link: #0b57a4;
  --pending: #56606c; --in_progress: #0b62b8; --scheduled: #6a3fb5; --held: #8f5200; --blocked: #6b6000;
  --completed: #2a7230; --failed: #c02020; --handed_over: #00687a; --cancelled: #6b5b57; --expired: #7d4a63; --other: #56606c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --card: #1e2328; --text: #e6e9ed; --quiet: #a4aeb9; --line: #39414a; --link: #86bdf5;
    --pending: #a4aeb9; --in_progress: #6cb2f7; --scheduled: #b79bf0; --held: #eaa64d; --blocked: #cfc14e;
    --completed: #74c47b; --failed: #ff8a80; --handed_over: #5fc4d6; --cancelled: #b8a7a2; --expired: #d79bb8; --other: #a4aeb9;
  }
}
.pending { --status: var(--pending) } .in_progress { --status: var(--in_progress) }
.scheduled { --status: var(--scheduled) } .held { --status: var(--held) }
.blocked { --status: var(--blocked) } .completed { --status: var(--completed) }
.failed { --status: var(--failed) } .cancelled { --status: var(--cancelled) }
.expired { --status: var(--expired) } .handed_over { --status: var(--handed_over) } .other { --status: var(--other) }
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
a { color: var(--link) }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.1rem; margin: 0 0 .5rem }
h1 a { color: inherit; text-decoration: none }
header p, footer, .quiet { color: var(--quiet); margin: 0; font-size: .875rem }
section, .note { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  margin: 1rem 0 }
.note { border-left: .375rem solid var(--status, var(--held)) }
.note p { margin: 0 } .note p + p { margin-top: .5rem }
table + p.quiet { margin-top: .75rem }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin-top: .75rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.tiles a { background: var(--card); border: 1px solid var(--line); border-top: .25rem solid var(--status);
  border-radius: .5rem; padding: .5rem .75rem; text-decoration: none; color: inherit }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.tiles .some b { color: var(--status) }
.status { color: var(--status); font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: .9375rem }
th, td { text-align: left; vertical-align: top; padding: .375rem .75rem .375rem 0; border-top: 1px solid var(--line) }
thead th { border-top: 0; color: var(--quiet); font-weight: 600; font-size: .8125rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
th { overflow-wrap: break-word } td.number, td.time { white-space: nowrap } td.zero { color: var(--quiet) }
td.name, td.queue { min-width: 8rem }
tr.total td { font-weight: 600 } tr.total ~ tr:not(.total) td:first-child { padding-left: 1rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
.charts section { margin: 0 }
svg { display: block; width: 100%; height: 9rem; border-bottom: 1px solid var(--line) }
svg rect { fill: var(--status) } svg .ground { fill: transparent }
.axis { display: flex; justify-content: space-between; color: var(--quiet); font-size: .8125rem }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .8125rem }
.key span::before { content: "■ "; color: var(--status) }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; margin: 0 }
dt { color: var(--quiet) } dd { margin: 0 }
pre { margin: 0; padding: .75rem; max-height: 30rem; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: .375rem; background: var(--back); font-size: .875rem }
code { font-size: .9em }
"""
# On a narrow screen each row of a table is a card: a line for each cell, with its column's name. A
# table of many columns is shown so on a wider screen already.
CARDS = """
@media (max-width: WIDTH) {
  TABLE thead { display: none }
  TABLE tr { display: block; border-top: 1px solid var(--line); padding: .5rem 0 }
  TABLE td, TABLE td.number { display: grid; grid-template-columns: 6.5rem 1fr; gap: .5rem; border: 0; padding: 0;
    text-align: left; white-space: normal }
  TABLE tr.total ~ tr:not(.total) td:first-child { padding-left: 0 }
  TABLE td::before { content: attr(data-label); color: var(--quiet); font-weight: 400 }
  TABLE td.zero, TABLE td.queue { display: none }
}
"""
for table, width in (("table", "44rem"), ("table.many", "68rem")):
    STYLE += CARDS.replace("TABLE", table).replace("WIDTH", width)
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()

BASE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh_seconds }}">{% endif %}

<link rel="icon" href="data:,">
<title>{% block title %}Task queue{% endblock %}</title>
<style>{{ style | safe }}</style>
<header>
<h1>{% block head %}<a href="{{ up or './' }}">Task queue</a>{% endblock %}</h1>
<p>As of {{ now.strftime('%H:%M:%S') }}{% if refresh %}, read again every {{ refresh_seconds }} seconds{% endif %}.
All times are {{ zone }}.</p>
</header>
<main>
{% block main %}{% endblock %}
</main>
<footer><nav><a href="{{ up or './' }}">Overview</a>
{% for status in words %}<a href="{{ up }}tasks?status={{ status }}">{{ status | word }}</a>
{% endfor %}</nav></footer>
</html>
"""

PARTS = """
{% macro late(command) %}<p class="quiet">This took longer than {{ '%g' % page_seconds }} seconds to count.
<code>{{ script }} {{ command }}</code> has the numbers.</p>{% endmacro %}

{% macro time(value) %}{% if value is none %}–{% else %}{% set at = value | moment -%}
<time title="{{ at.full }}">{{ at.short }}</time>{% if at.ago %} <span class="quiet">{{ at.ago }}</span>{% endif %}
{% endif %}{% endmacro %}

{% macro lines(rows, up, columns, says) %}
<table><thead><tr><th>Task</th><th>In</th>{% for column, label in columns %}<th>{{ label }}</th>{% endfor %}
{% if says %}<th>{{ says }}</th>{% endif %}<th>Queue</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td data-label="Task" class="name"><a href="{{ up }}{{ row.link }}" title="{{ row.task_id }}">{{ row.task_type }}</a></td>
<td data-label="In" class="{{ '' if row.project else 'zero' }}" title="{{ row.workspace }}">{{ row.project }}</td>
{% for column, label in columns %}
<td class="time" data-label="{{ label }}"><span>
{%- if column == "status" %}<b class="status {{ row.status | css }}">{{ row.status | word }}</b>
{%- else %}{{ time(row.get(column)) }}{% endif %}</span></td>
{% endfor %}
{% if says %}<td data-label="{{ says }}" class="says{{ '' if row.says else ' zero' }}">{{ row.says or "–" }}</td>{% endif %}

<td data-label="Queue" class="queue">{{ row.queue }}</td></tr>
{% endfor %}
</tbody></table>
{% endmacro %}

{% macro chart(drawn, bars, label) %}
<svg viewBox="0 0 {{ bars | length }} 100" preserveAspectRatio="none" role="img" aria-label="{{ label }}">
{% for blocks, says in drawn %}
<g><title>{{ says }}</title><rect class="ground" x="{{ loop.index0 }}" y="0" width="1" height="100"/>
{% for block in blocks %}<rect class="{{ block.css }}" x="{{ block.x + 0.08 }}" y="{{ block.y }}" width="0.84" height="{{ block.height }}"/>
{% endfor %}</g>
{% endfor %}
</svg>
<div class="axis"><span>{{ bars[0].since | clock }}</span><span>{{ bars[12].since | clock }}</span>
<span>{{ bars[-1].until | clock }}</span></div>
{% endmacro %}
"""

FRONT = """{% extends "base" %}{% from "parts" import late, lines, time, chart %}
{% block main %}
{% for queue, pause in paused.items() %}
<div class="note paused" id="paused-{{ queue }}"><p><b>{{ queue }}</b> is paused
{%- if pause.until is not none %} until {{ (pause.until | moment).short }}{% endif %}
{%- if pause.reason %}: {{ pause.reason }}{% endif %}.
<span class="quiet">Go on now: <code>{{ script }} resume {{ queue }}</code></span></p></div>
{% endfor %}

<div class="tiles">
{% for status in tiles %}{% set tasks = totals.get(status, 0) %}
<a href="tasks?status={{ status }}" id="total-{{ status }}" class="{{ status | css }}{{ ' some' if tasks }}">
<b>{{ "…" if counts is none else "{:,}".format(tasks) }}</b>{{ status | word }}
{%- if status not in live %} in 24 hours{% endif %}</a>
{% endfor %}
</div>

<section id="failed"><h2>Failed lately</h2>
{% if failed %}{{ lines(failed, "", [("completed_at", "When")], "Why") }}
<p class="quiet"><a href="tasks?status=failed">All that failed</a>. Put one back: <code>{{ script }} retry ID</code></p>
{% else %}<p class="quiet">Nothing has failed.</p>{% endif %}
</section>

<section id="running"><h2>Running now</h2>
{% if running %}{{ lines(running, "", [("started_at", "Since")], "") }}
{% if totals.get("in_progress", 0) > running | length %}<p class="quiet"><a href="tasks?status=in_progress">All that run</a></p>{% endif %}
{% else %}<p class="quiet">Nothing is running.</p>{% endif %}
</section>

{% if bars is none %}<section>{{ late("stats") }}</section>
{% elif bars %}
<div class="charts">
<section id="chart-finished"><h2>Finished tasks</h2>
{% set most, drawn = finished_chart(bars) %}
<p class="quiet">Each bar is {{ (bars[0].until - bars[0].since) | span }}, the highest is {{ "{:,}".format(most) }}</p>
{{ chart(drawn, bars, "Finished tasks over time") }}
<p class="key">{% for status in tiles if status not in live and totals.get(status) %}<span class="{{ status | css }}">{{ status | word }}</span>
{% endfor %}</p></section>
<section id="chart-waited"><h2>How long tasks waited to start</h2>
{% set most, drawn = waiting_chart(bars) %}
<p class="quiet">Mean of the tasks of each bar, the highest is {{ most | span }}</p>
{{ chart(drawn, bars, "Mean time from enqueue to start") }}</section>
</div>
{% else %}<section><p class="quiet">Nothing has finished in the last 24 hours.</p></section>
{% endif %}

<section id="counts"><h2>By queue and type of task</h2>
{% if counts is none %}{{ late("stats") }}{% else %}
<table{% if columns | length > 6 %} class="many"{% endif %}><thead><tr><th>Queue and type</th>
{% for status in columns %}<th class="number">{{ status | word }}{% if status not in live %}, 24 h{% endif %}</th>{% endfor %}
<th class="number">Waiting longest</th><th class="number">Usually waits</th><th class="number">Usually runs</th></tr></thead>
<tbody>
{% for row in counts %}
<tr class="{{ 'total' if row.task_type is none else 'type' }}" data-queue="{{ row.queue }}" data-type="{{ row.task_type or '' }}">
<td data-label="{{ 'Queue' if row.task_type is none else 'Type' }}"><span>{{ row.task_type or row.queue }}
{%- if row.task_type is none and row.queue in paused %} (paused){% endif %}</span></td>
{% for status in columns %}{% set tasks = row.tasks.get(status, 0) %}
<td class="number{{ ' zero' if not tasks }}{{ ' status failed' if status == 'failed' and tasks }}" data-status="{{ status }}" data-label="{{ status | word }}{% if status not in live %}, 24 h{% endif %}">{{ "{:,}".format(tasks) }}</td>
{% endfor %}
{% for name, label in [("oldest_waiting", "Waiting longest"), ("waited", "Usually waits"), ("ran", "Usually runs")] %}
<td class="number{{ ' zero' if row[loop.index0 + 3] is none }}" data-seconds="{{ name }}" data-label="{{ label }}"
 title="{{ row[loop.index0 + 3] if row[loop.index0 + 3] is not none }}">{{ row[loop.index0 + 3] | span }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endif %}
</section>
{% endblock %}
"""

LIST = """{% extends "base" %}{% from "parts" import lines %}
{% block title %}{{ status | word }} – Task queue{% endblock %}
{% block head %}{{ status | word }}{% if queue %} in {{ queue }}{% endif %}{% endblock %}
{% block main %}
<nav><a href="tasks?status={{ status }}">All queues</a>
{% for name in queues %}<a href="tasks?status={{ status }}&amp;queue={{ name }}">{{ name }}</a>
{% endfor %}</nav>
<section>
{% set columns = {"pending": [("enqueued_at", "Since")], "in_progress": [("started_at", "Since")],
  "scheduled": [("due_at", "Starts")], "held": [("enqueued_at", "Since")], "blocked": [("enqueued_at", "Since")]} %}
{% set says = {"failed": "Why", "completed": "What it printed", "in_progress": ""}.get(status, "Note") %}
{% if rows %}{{ lines(rows, up, columns.get(status, [("completed_at", "When")]), says) }}
{% if more %}<p class="quiet">These are the first {{ rows | length }}. <code>{{ script }} list --status {{ status }} --limit N</code> shows more.</p>{% endif %}
{% else %}<p class="quiet">There are none.</p>{% endif %}
</section>
{% endblock %}
"""

TASK = """{% extends "base" %}{% from "parts" import lines %}
{% block title %}{{ task_type }} – Task queue{% endblock %}
{% block head %}{{ task_type }} <span class="status {{ status | css }}">{{ status | word }}</span>{% endblock %}
{% block main %}
{% if error %}<div class="note {{ status | css }}" id="error"><p>
{%- if status == "failed" %}It failed: {% elif status not in ("cancelled", "expired") %}Its last attempt: {% endif -%}
{{ error }}</p></div>{% endif %}
<section><dl id="fields">
<dt>Id</dt><dd>{{ name }}</dd>
{% for label, value in fields %}<dt>{{ label }}</dt><dd>{{ value }}</dd>
{% endfor %}
<dt>In a terminal</dt><dd><code>{{ script }} {{ command }}</code></dd>
</dl></section>
{% for label, text in boxes if text.strip() %}
<section class="box"><h2>{{ label }}</h2><pre tabindex="0">{{ text }}</pre></section>
{% endfor %}
{% if runs %}<section id="runs"><h2>Other runs with this id</h2>
{{ lines(runs, up, [("status", "Status"), ("enqueued_at", "Enqueued")], "Note") }}</section>{% endif %}
{% endblock %}
"""

TEMPLATES = {"base": BASE, "parts": PARTS, "front": FRONT, "list": LIST, "task": TASK}

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


if __name__ == "__main__":
    raise SystemExit(main())
