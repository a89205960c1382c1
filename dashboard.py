#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["datasette>=0.65,<1", "datasette-dashboards>=0.8,<0.9"]
# ///
"""Show the queue as a web page: numbers, charts, and every task, on the live database, which is only read.

    dashboard.py                       prints the page's address; Ctrl-C ends it
    dashboard.py --port 9000
    dashboard.py --port 0              any free port

The server is Datasette. It listens on 127.0.0.1 alone, refuses requests that were addressed to another host name, needs
no network, and shows payloads and results to whoever may open the page on this machine.

exit codes: 0 ended by a signal; 1 the database cannot be used, or the port is taken; 64 usage; 75 the database is
locked, try again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import queue_helpers as q

EX_FAILED, EX_USAGE, EX_TEMPFAIL = 1, 64, 75
PORT = 8765
SQL_TIME_LIMIT_MS = 5_000  # a reader keeps the write-ahead log from being emptied, so no query may last
REFRESH_MINUTES = 0.5
TITLE = "Task queue"

# ---------------------------------------------------------------------------------------------------------- statements

# Literal conditions, so that SQLite sees that the partial index of each status serves them.
LIVE = {"pending": "status < 2", "in_progress": "status = 2", "scheduled": "status = 3", "blocked": "status = 4"}
LIVE_ARM = """
select '{queue}' as queue, coalesce(task_type, '{queue}') as task_type, '{status}' as status, count(*) as tasks,
       min(timestamp) as oldest
from "{queue}" where {condition} group by task_type"""
HOUR_AGO = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 hour')"
DAY_AGO = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 day')"
OVERVIEW = f"""
select queue, task_type, sum(tasks * (status = 'pending')) as pending, sum(tasks * (status = 'in_progress')) as in_progress,
       sum(tasks * (status = 'scheduled')) as scheduled, sum(tasks * (status = 'blocked')) as blocked,
       round(max((julianday('now') - 2440587.5) * 86400.0 - min(case status when 'pending' then oldest end), 0), 1)
         as oldest_pending_seconds,
       sum(hour * (status = 'completed')) as completed_hour, sum(day * (status = 'completed')) as completed_day,
       sum(hour * (status = 'failed')) as failed_hour, sum(day * (status = 'failed')) as failed_day,
       sum(hour * (status = 'cancelled')) as cancelled_hour, sum(day * (status = 'cancelled')) as cancelled_day
from (
  select queue, task_type, status, tasks, oldest, 0 as hour, 0 as day from ({{live}})
  union all
  select queue, task_type, status, 0, null, sum(completed_at >= {HOUR_AGO}), count(*) from task_history
  where completed_at >= {DAY_AGO} group by queue, task_type, status)
group by queue, task_type order by queue, task_type"""
TOTALS = """
select coalesce(sum(pending), 0) as pending, coalesce(sum(in_progress), 0) as in_progress,
       coalesce(sum(scheduled + blocked), 0) as later,
       coalesce(sum(completed_day), 0) as completed_day, coalesce(sum(failed_day), 0) as failed_day
from ({overview})"""
NOW = """
select queue, status, sum(tasks) as tasks from ({live}) group by queue, status"""
THROUGHPUT = f"""
select replace(substr(completed_at, 1, 13), ' ', 'T') || ':00:00Z' as at, task_type as type, count(*) as tasks
from task_history where completed_at >= {DAY_AGO} group by 1, 2 order by 1"""
WAITING_TIME = f"""
select replace(substr(completed_at, 1, 13), ' ', 'T') || ':00:00Z' as at, task_type as type,
       round(avg((julianday(started_at) - julianday(enqueued_at)) * 86400.0), 3) as seconds
from task_history where completed_at >= {DAY_AGO} and started_at is not null group by 1, 2 order by 1"""
FAILURES = f"""
select task_type as type, count(*) as failed
from task_history where completed_at >= {DAY_AGO} and status = 'failed' group by 1 order by 2 desc"""
SLOWEST = f"""
select queue, task_type, count(*) as tasks, round(avg(seconds), 3) as mean_seconds, round(max(seconds), 3) as longest_seconds,
       round(avg(waited), 3) as mean_wait_seconds
from (select queue, task_type, (julianday(completed_at) - julianday(started_at)) * 86400.0 as seconds,
             (julianday(started_at) - julianday(enqueued_at)) * 86400.0 as waited
      from task_history where completed_at >= {DAY_AGO} and started_at is not null)
group by queue, task_type order by mean_seconds desc"""

NEVER_EMPTY = """
with drawn as ({sql})
select * from drawn union all select {nothing} where not exists (select 1 from drawn)"""  # Vega draws nothing wrongly
A_MOMENT = "strftime('%Y-%m-%dT%H:00:00Z', 'now'), 'none yet', 0"

LIVE_COLUMNS = """'/tasks/{queue}/' || id as details, '{queue}' as queue, coalesce(task_id, '{queue}-' || id) as task_id,
       coalesce(task_type, '{queue}') as task_type"""
WAITING_ARM = f"""
select * from (select {LIVE_COLUMNS}, '{{status}}' as status, priority, attempts,
                      strftime('%Y-%m-%d %H:%M:%S', timestamp, 'unixepoch') as enqueued_at,
                      strftime('%Y-%m-%d %H:%M:%S', due_at, 'unixepoch') as due_at, error
               from "{{queue}}" where {{condition}} order by {{order}} limit 500)"""
RUNNING_ARM = f"""
select {LIVE_COLUMNS}, attempts, strftime('%Y-%m-%d %H:%M:%S', claimed_at, 'unixepoch') as started_at,
       round((julianday('now') - 2440587.5) * 86400.0 - claimed_at, 1) as running_seconds, owner
from "{{queue}}" where status = 2"""
DEAD_LETTERS = """
select '/tasks/task_history/' || id as details, queue, task_id, task_type, completed_at, attempts, exit_code, error
from task_history where status = 'failed' and (:queue = '' or queue = :queue) order by completed_at desc limit 1000"""
TASK_ARM = f"""
select {LIVE_COLUMNS}, case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end
         as status, attempts, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
       strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at, error
from "{{queue}}" where task_id = :task_id
  or task_id is null and :task_id = '{{queue}}-' || id and id = cast(substr(:task_id, length('{{queue}}') + 2) as integer)"""
TASK_IN_HISTORY = """
select '/tasks/task_history/' || id as details, queue, task_id, task_type, status, attempts, enqueued_at, started_at,
       completed_at, error
from task_history where task_id = :task_id"""

# -------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535, 0 for any free one")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="dashboard.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", metavar="N", type=port, default=PORT, help=f"on 127.0.0.1 (default {PORT}; 0: any free)")
    args = parser.parse_args(argv)
    try:
        database = open_read_only(q.STATE_DIR)
        serve(database, listen(args.port))
        return 0
    except q.QueueBusy as error:
        return fail(EX_TEMPFAIL, error)
    except q.QueueError as error:
        return fail(EX_FAILED, error)


def fail(code: int, message: object) -> int:
    print("dashboard.py: " + " ".join(str(message).split()), file=sys.stderr)
    return code


def open_read_only(state: Path) -> sqlite3.Connection:
    """A connection that can only read a queue's database of this version; it makes and migrates nothing."""
    db = state / "tasks.db"
    try:
        os.stat(db)
        conn = sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True, timeout=q.BUSY_TIMEOUT_MS / 1000, check_same_thread=False)
        (version,) = conn.execute("pragma user_version").fetchone()
        if version > q.SCHEMA_VERSION:
            raise q.QueueUnavailable(f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}: update them")
        if not conn.execute("select 1 from sqlite_master where name = 'task_history'").fetchone():
            raise q.QueueUnavailable(f"{db} has no task history: it is not a task queue's, or only bash has used it yet; "
                                     "an enqueue.py or worker.py makes it ready")  # fmt: skip
        if version < q.SCHEMA_VERSION:
            raise q.QueueUnavailable(f"{db} has schema version {version}; any enqueue.py or worker.py migrates it")
        return conn
    except OSError as error:
        raise q.QueueUnavailable(f"{db}: {error.strerror}; the first enqueue makes it") from None
    except sqlite3.Error as error:
        raise q.explain(error, state) from error


def listen(number: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", number))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise q.QueueUnavailable(f"port {number}: {error.strerror}; choose another with --port, 0 for any free one") from None
    return listener


def serve(database: sqlite3.Connection, listener: socket.socket) -> None:
    """Run Datasette on the listener until SIGTERM or SIGINT."""
    import uvicorn
    from datasette.app import Datasette
    from datasette.plugins import pm

    host = f"127.0.0.1:{listener.getsockname()[1]}"
    pm.register(plugin(database, {host, host.replace("127.0.0.1", "localhost")}))
    settings = {"sql_time_limit_ms": SQL_TIME_LIMIT_MS, "max_returned_rows": 5_000, "suggest_facets": False,
                "allow_download": False, "default_page_size": 50, "truncate_cells_html": 160}  # fmt: skip
    app = Datasette([str(q.STATE_DIR / "tasks.db")], settings=settings).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn ends, and then raises the signal again
    print(f"http://{host}/-/dashboards/queue", flush=True)
    server.run(sockets=[listener])


# ------------------------------------------------------------------------------------------------------- what it shows


def plugin(database: sqlite3.Connection, hosts: set[str]) -> ModuleType:
    """What Datasette asks: the pages, the links in cells, and who may talk to it."""
    from urllib.parse import quote

    from datasette import hookimpl
    from markupsafe import Markup

    @hookimpl
    def get_metadata():
        return json.loads(pages(tuple(queue for (queue,) in database.execute(q.QUEUES))))  # those that there are now

    @hookimpl
    def render_cell(value, column):
        if isinstance(value, str) and column == "details" and value.startswith("/tasks/"):
            return Markup('<a href="{}">details</a>').format(value)
        if isinstance(value, str) and column == "task_id":
            return Markup('<a href="/tasks/task?task_id={}">{}</a>').format(quote(value, safe=""), value)
        return None

    @hookimpl
    def asgi_wrapper():
        """Refuse other host names: a web page elsewhere could make one of its own mean this address."""

        def wrap(app):
            async def guarded(scope, receive, send):
                addressed = dict(scope.get("headers") or ()).get(b"host", b"").decode("latin-1")
                if scope["type"] == "http" and addressed not in hosts:
                    await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
                    await send({"type": "http.response.body", "body": b"open this page as 127.0.0.1 or localhost\n"})
                else:
                    await app(scope, receive, send)

            return guarded

        return wrap

    module = ModuleType("task_queue_pages")
    module.get_metadata, module.render_cell, module.asgi_wrapper = get_metadata, render_cell, asgi_wrapper
    return module


def arms(statement: str, queues: Sequence[str], **values: str) -> str:
    """One statement for all queues."""
    return "\nunion all".join(statement.format(queue=q.check_queue_name(queue), **values) for queue in queues)


@lru_cache(maxsize=4)
def pages(queues: tuple[str, ...]) -> str:
    """Datasette's metadata, as JSON: the dashboard's charts and the canned queries."""
    live = "\nunion all ".join(f"select * from ({arms(LIVE_ARM, queues, status=status, condition=condition)})"
                               for status, condition in LIVE.items())  # fmt: skip
    overview = OVERVIEW.format(live=live)
    order = {"pending": "priority desc, id", "scheduled": "due_at", "blocked": "id"}
    waiting = "\nunion all ".join(
        f"select * from ({arms(WAITING_ARM, queues, status=status, condition=LIVE[status], order=order[status])})"
        for status in order
    )
    queries = {
        "overview": ("Tasks by queue and type", overview),
        "waiting": ("Waiting, in the order in which they will be claimed", waiting),
        "running": ("Running, longest first",
                    f"select * from ({arms(RUNNING_ARM, queues)}) order by running_seconds desc"),
        "dead_letters": ("Dead letters, newest first; tasks.py retry ID puts one back", DEAD_LETTERS),
        "slowest_types": ("Types by how long they ran in the last 24 hours", SLOWEST),
        "task": ("One task, by its id", f"{arms(TASK_ARM, queues)}\nunion all{TASK_IN_HISTORY}"),
    }  # fmt: skip
    links = " · ".join(f'<a href="/tasks/{name}">{name.replace("_", " ")}</a>' for name in queries if name != "task")
    at = {"field": "at", "type": "temporal", "title": None, "axis": {"format": "%H:%M"}}
    kind = {"field": "type", "type": "nominal", "title": None, "legend": {"orient": "bottom", "columns": 3}}
    charts = {
        "links": {"library": "markdown", "display": links},
        "pending": metric("Waiting", "pending", overview),
        "in_progress": metric("Running", "in_progress", overview),
        "later": metric("Scheduled or blocked", "later", overview),
        "completed_day": metric("Completed, 24 h", "completed_day", overview),
        "failed_day": metric("Failed, 24 h", "failed_day", overview),
        "throughput": chart("Finished tasks per hour, by type", THROUGHPUT, A_MOMENT, {
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {"x": {**at, "timeUnit": "yearmonthdatehours"},
                         "y": {"field": "tasks", "type": "quantitative", "stack": True, "title": "tasks"}, "color": kind}}),
        "waiting_time": chart("Seconds from enqueue to start, mean of each hour, by type", WAITING_TIME, A_MOMENT, {
            "mark": {"type": "line", "tooltip": True, "point": True},
            "encoding": {"x": at, "y": {"field": "seconds", "type": "quantitative", "title": "seconds"}, "color": kind}}),
        "failures": chart("Failed for good in 24 h, by type", FAILURES, "'none', 0", {
            "mark": {"type": "bar", "tooltip": True, "color": "#c0392b"},
            "encoding": {"y": {"field": "type", "type": "nominal", "sort": "-x", "title": None},
                         "x": {"field": "failed", "type": "quantitative", "title": "tasks", "axis": {"tickMinStep": 1}}}}),
        "now": chart("Waiting and running now, by queue", NOW.format(live=live), "'none', 'pending', 0", {
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {"y": {"field": "queue", "type": "nominal", "title": None},
                         "x": {"field": "tasks", "type": "quantitative", "axis": {"tickMinStep": 1}},
                         "color": {"field": "status", "type": "nominal", "title": None, "scale": {"domain": list(LIVE)},
                                   "legend": {"orient": "bottom"}}}}),
    }  # fmt: skip
    layout = [["links"] * 10, [name for name in ("pending", "in_progress", "later", "completed_day", "failed_day")
                               for _ in range(2)],
              ["throughput"] * 5 + ["waiting_time"] * 5, ["failures"] * 5 + ["now"] * 5]  # fmt: skip
    dashboard = {"title": TITLE, "description": f"Of this machine, live; redrawn every {REFRESH_MINUTES * 60:.0f} seconds.",
                 "layout": layout, "charts": charts, "settings": {"autorefresh": REFRESH_MINUTES}}  # fmt: skip
    return json.dumps({
        "title": TITLE,
        "description_html": f'<p><a href="/-/dashboards/queue">Dashboard</a> · {links}</p>',
        "databases": {"tasks": {"queries": {name: {"title": title, "sql": sql.strip()} for name, (title, sql) in queries.items()},
                                "tables": {"task_history": {"sort_desc": "id"}}}},
        "plugins": {"datasette-dashboards": {"queue": dashboard}},
    })  # fmt: skip


def metric(title: str, column: str, overview: str) -> dict:
    sql = f"select {column} from ({TOTALS.format(overview=overview)})"
    return {"title": title, "db": "tasks", "query": sql, "library": "metric", "display": {"field": column}}


def chart(title: str, sql: str, nothing: str, display: dict) -> dict:
    sql = NEVER_EMPTY.format(sql=sql, nothing=nothing).strip()
    return {"title": title, "db": "tasks", "query": sql, "library": "vega-lite", "display": {"height": 180, **display}}


if __name__ == "__main__":
    raise SystemExit(main())
