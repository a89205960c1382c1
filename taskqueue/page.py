"""Write the queue as one HTML file: what failed lately and why, what runs, charts, numbers.

The file needs no server, no script and no network. Text from outside becomes visible and is
escaped in one place: the environment's `finalize` and `autoescape`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sqlite3
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import cli, database, show
from taskqueue.cli import Refused
from taskqueue.control import Control, controls_of
from taskqueue.database import FINISHED, LIVE
from taskqueue.find import CLAIM_ORDER, FINISHED_ROW, LIVE_ROW, gather
from taskqueue.remedies import command, lets_go_on
from taskqueue.template import STYLE, TEMPLATE
from taskqueue.text import ago, clock, dollars, pause_in_words, sh, short, span, visible_lines

# With --watch, the page is not written more often than this.
PAUSE_SECONDS = 1.0
# Ages on the page grow even where nothing changes.
REWRITE_SECONDS = 30.0
# The most tasks of a section, and the most characters of one text.
ROWS = 50
BOX_CHARS, LINE_CHARS = 8_000, 300
DAY = 86_400
BARS = 24
# The width of a bar: the first with which all that finished in the last day fits.
BAR_SECONDS = (300, 900, 3_600)
# The tiles, in the order in which a person needs them; those in ALWAYS stand there even when 0.
TILES = ("failed", "held", "in_progress", "pending", "blocked", "scheduled", "handed_over")
TILES += ("completed", "cancelled", "expired")
ALWAYS = {"failed", "in_progress", "pending", "scheduled", "completed"}
WAITING = ("held", "pending", "blocked", "scheduled", "handed_over")
# Where a payload says what its task is about.
ABOUT = ("prompt", "file", "file_path", "path", "command", "argv", "summary", "message", "text")

# --------------------------------------------------------------------------------------- statements

LIVE_IDS = """
select {key}, id from "{queue}" where {condition} order by 1, 2 limit :rows"""
FINISHED_IDS = """
select completed_at, id from task_history where status = :status
order by completed_at desc limit :rows"""
EACH_MINUTE = """
select substr(completed_at, 1, 16) as minute, status, count(*), count(started_at),
       total(max((julianday(started_at) - julianday(enqueued_at)) * 86400.0, 0))
from task_history where completed_at >= :day_ago group by 1, 2 order by 1"""

# ---------------------------------------------------------------------------------------- the files


def page(file: str | None, open_it: bool, refresh: int | None, as_json: bool) -> int:
    """Write the page. With `refresh` go on: a browser reads it again after so many seconds."""
    conn = database.open_queue()
    path = Path(file).absolute() if file else conn.state / "page.html"
    write(path, page_of(conn, refresh))
    cli.report(as_json, {"file": str(path)}, str(path))
    sys.stdout.flush()
    if open_it and not webbrowser.open(path.as_uri()):
        raise Refused(f"no browser could be started; open {path} yourself")
    if refresh:
        write_again(conn.state, path, refresh)
    return 0


def write_again(state: Path, path: Path, refresh: int) -> None:
    """Write the page after each change until a signal; then once more, without a refresh."""
    changed = threading.Event()
    q.Watch.of(state).listeners.add(changed)
    try:
        with cli.ending_by_signal():
            while True:
                changed.wait(REWRITE_SECONDS)
                changed.clear()
                write(path, page_of(database.open_queue(), refresh))
                time.sleep(PAUSE_SECONDS)
    except KeyboardInterrupt:
        write(path, page_of(database.open_queue(), None))


def write(path: Path, text: str) -> None:
    """Replace a file by a whole one that only its owner can read."""
    temporary = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=".page.", dir=path.parent)
        with open(fd, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise Refused(f"{path} was not written: {error.strerror}") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- the page


def page_of(conn: q.Connection, refresh: int | None) -> str:
    """Return the HTML of one state of the database."""
    now = time.time()
    with database.snapshot(conn):
        controls = controls_of(conn)
        numbers = gather(conn)
        bars = bars_of(conn, now)
        tasks = {status: tasks_of(conn, status, controls) for status in database.STATUSES}
    queues = numbers["queues"]
    totals = {status: sum(n[count_name(status)] for n in queues.values()) for status in TILES}
    section = {"failed": "failed", "in_progress": "running"}
    section |= {status: "waiting" for status in WAITING}
    ended = [task for status in FINISHED if status != "failed" for task in tasks[status]]
    ended.sort(key=lambda task: task["completed_at"], reverse=True)
    return template().render(
        refresh=refresh,
        now=time.strftime("%H:%M:%S"),
        zone=time.strftime("%Z (UTC%z)"),
        notes=[*unserved(numbers), *paused(queues)],
        tiles=[
            (status, totals[status], section.get(status, "ended"))
            for status in TILES
            if totals[status] or status in ALWAYS
        ],
        failed=part(tasks["failed"], 4, "list --status failed"),
        running=part(tasks["in_progress"], 6, "list --status in_progress"),
        waiting=part([task for status in WAITING for task in tasks[status]], 12, "list"),
        ended=part(ended, 12, "list"),
        bars=bars,
        finished=chart([bar.tasks for bar in bars], bars, str),
        waited=chart([{"pending": bar.waited or 0} for bar in bars], bars, span),
        costs=costs_of(queues),
        counts=[row for queue, n in queues.items() for row in count_rows(queue, n)],
    )


def part(tasks: list[dict], shown: int, see: str) -> dict:
    """Return the tasks to show, those to fold, and the command that lists more."""
    more = f"These are the first {ROWS}. More: {command(see)}" if len(tasks) > ROWS else ""
    return {"shown": tasks[:shown], "folded": tasks[shown:ROWS], "more": more}


def unserved(numbers: dict) -> Iterable[str]:
    """Yield why waiting tasks are not run, as the commands say it."""
    for line in numbers["remarks"]:
        yield f"{line[0].upper()}{line[1:]}."


def paused(queues: dict) -> Iterable[str]:
    for queue, n in queues.items():
        if n["paused"]:
            control = Control(True, n["paused_until"], n["pause_reason"], None, None)
            words = pause_in_words(control)
            yield f"{queue} is {words}. Go on now: {lets_go_on(queue, n['paused_by'])}"


def costs_of(queues: dict) -> dict[str, list[str]]:
    """Return a row of amounts for each day that had costs: all together, then each queue's."""
    table: dict[str, dict[str, tuple[float, bool]]] = {}
    costly = [queue for queue, n in queues.items() if n["costs"]]
    for queue in costly:
        for day in queues[queue]["costs"]:
            table.setdefault(day["day"], {})[queue] = (day["cost_usd"], day["at_least"])
    rows = {}
    for day, amounts in sorted(table.items(), reverse=True):
        total = sum(usd for usd, _ in amounts.values()), any(least for _, least in amounts.values())
        each = [amounts[queue] if queue in amounts else (0.0, False) for queue in costly]
        rows[day] = [dollars(*amount) for amount in (total, *each)]
    return {"": ["all", *costly], **rows} if rows else {}


def count_name(status: str) -> str:
    return status if status in LIVE else f"{status}_day"


def count_rows(queue: str, total: dict) -> Iterable[tuple]:
    """Yield (queue, type, numbers by status, seconds) of a queue, then of each type."""
    for task_type, n in (("", total), *total["types"].items()):
        counts = {status: n[count_name(status)] for status in TILES}
        medians = [n[name] and n[name]["median"] for name in ("wait_seconds", "run_seconds")]
        labels = ("oldest pending", "waited (median)", "ran (median)")
        seconds = zip(labels, (n["oldest_pending_seconds"], *medians), strict=True)
        yield queue, task_type, counts, list(seconds)


# ---------------------------------------------------------------------------------------- the tasks


def tasks_of(conn: q.Connection, status: str, controls: dict) -> list[dict]:
    """Return the first tasks of a status, in the order of claims or newest end first."""
    if status in FINISHED:
        ids = conn.execute(FINISHED_IDS, {"status": status, "rows": ROWS + 1}).fetchall()
        rows = [database.as_dict(conn.execute(FINISHED_ROW, {"id": id})) for _, id in ids]
    else:
        found = []
        for queue in database.queues_of(conn):
            statement = LIVE_IDS.format(
                queue=queue, key=CLAIM_ORDER[status], condition=LIVE[status]
            )
            found += [(*row, queue) for row in conn.execute(statement, {"rows": ROWS + 1})]
        rows = [
            database.as_dict(q.execute(conn, LIVE_ROW, queue, id=id))
            for _, id, queue in sorted(found)[: ROWS + 1]
        ]
    return [task_of(row, controls) for row in rows]


def task_of(row: dict, controls: dict) -> dict:
    """Return a task as the template shows it."""
    moment = row["completed_at"] or row["due_at"] or row["started_at"] or row["enqueued_at"]
    stored = show.payload_text(row["data"])
    # The column before the note says what the task is about.
    note = show.note_of(row, controls).removesuffix(show.gist(row["data"])).rstrip(": ")
    about = about_of(stored)
    texts = (("stdout", row.get("result")), ("stderr", row.get("log")), ("data", indented(stored)))
    fields = show.fields_of(row | {"came_from": ()})
    return {
        "status": row["status"],
        "task_id": row["task_id"],
        "task_type": row["task_type"],
        "completed_at": row["completed_at"] or "",
        "about": about,
        "moment": clock(moment, whole=True),
        "when": ago(moment),
        "note": short(note, LINE_CHARS),
        "fields": [(name, cut(value)) for name, value in fields if name != "status"],
        "boxes": [(name, cut(text)) for name, text in texts if (text or "").strip()],
        "command": f"{command('show')} {sh(row['task_id'])}",
    }


def about_of(stored: str) -> str:
    """Return a payload's prompt, file or summary, else the name of its workspace."""
    payload = show.payload(stored)
    if not isinstance(payload, dict):
        return ""
    # A tool's hook names its file in there.
    tool = payload.get("tool_input")
    given = {**(tool if isinstance(tool, dict) else {}), **payload}
    texts = [text_of(given.get(name)) for name in ABOUT]
    place = payload.get("workspace_path")
    project = os.path.basename(place.rstrip("/")) if isinstance(place, str) else ""
    return short(next(filter(str.strip, texts), project), 80)


def text_of(value: object) -> str:
    """Return a text, or the words of a command."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(map(sh, value))
    return value if isinstance(value, str) else ""


def indented(stored: str) -> str:
    value = show.payload(stored) if len(stored) <= BOX_CHARS else stored
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def cut(text: str | None) -> str:
    text = text or ""
    more = len(text) - BOX_CHARS
    return text if more <= 0 else f"{text[:BOX_CHARS]} … ({more:,} more characters)"


# --------------------------------------------------------------------------------------- the charts


class Bar(NamedTuple):
    """Finished tasks between two moments, by status, and their mean seconds of waiting."""

    since: float
    until: float
    tasks: dict[str, int]
    waited: float | None


def bars_of(conn: sqlite3.Connection, now: float) -> list[Bar]:
    """Return the last hours in BARS parts, none if no task finished in the last day."""
    found = conn.execute(EACH_MINUTE, {"day_ago": q.utc(now - DAY)}).fetchall()
    minutes = [(minute, *row[1:]) for row in found if (minute := minute_of(row[0]))]
    if not minutes:
        return []
    begins = {width: first_bar(now, width) for width in BAR_SECONDS}
    fitting = (width for width in BAR_SECONDS if minutes[0][0] >= begins[width])
    width = next(fitting, BAR_SECONDS[-1])
    begin = begins[width]
    tasks: list[dict[str, int]] = [{} for _ in range(BARS)]
    waits, started = [0.0] * BARS, [0] * BARS
    for minute, status, count, with_start, waited in minutes:
        # A day's bars end with the next full hour, so the day's first minutes may have none.
        number = int((minute - begin) // width)
        if 0 <= number < BARS:
            tasks[number][status] = tasks[number].get(status, 0) + count
            waits[number] += waited
            started[number] += with_start
    means = [wait / number if number else None for wait, number in zip(waits, started, strict=True)]
    starts = [begin + number * width for number in range(BARS)]
    return [
        Bar(at, at + width, counts, mean)
        for at, counts, mean in zip(starts, tasks, means, strict=True)
    ]


def first_bar(now: float, width: int) -> float:
    """Return when the first of BARS bars of this width begins, so that the last one has `now`."""
    # Bars begin at full hours of the local clock, which are not those of UTC everywhere.
    offset = time.localtime(now).tm_gmtoff
    return ((now + offset) // width + 1) * width - offset - BARS * width


def minute_of(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


class Chart(NamedTuple):
    """The highest column, and each column's text and blocks."""

    most: float
    columns: list[tuple[str, list[dict]]]


def chart(values: Sequence[Mapping[str, float]], bars: list[Bar], words) -> Chart:
    """Stack each column's values by status, in hundredths of the highest column."""
    most = max((sum(column.values()) for column in values), default=0)
    columns = []
    for column, bar in zip(values, bars, strict=True):
        top, blocks = 100.0, []
        for status in sorted(column, key=lambda status: (status == "failed", status)):
            height = 100 * column[status] / (most or 1)
            top -= height
            blocks.append({"status": status, "y": round(top, 2), "height": round(height, 2)})
        says = ", ".join(f"{words(value)} {word(status)}" for status, value in column.items())
        columns.append(
            (
                f"{hour_and_minute(bar.since)} to {hour_and_minute(bar.until)}: {says or 'nothing'}",
                blocks,
            )
        )
    return Chart(most, columns)


# -------------------------------------------------------------------------------------- the template


def word(status: str) -> str:
    return status.replace("_", " ")


def hour_and_minute(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(seconds))


@lru_cache(1)
def template():
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def visible(value: object) -> object:
        """Make text from outside visible."""
        return value if isinstance(value, Markup) else visible_lines(str(value))

    made = Environment(
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def breakable(value: object) -> Markup:
        """Let a browser break long names and paths behind their punctuation, not within a word."""
        text = str(escape(visible_lines(str(value))))
        return Markup(re.sub(r"(?<=\w)([/_.:=,?-]+)(?=[^\W_])", r"\1<wbr>", text))

    made.filters |= {"breakable": breakable, "word": word, "span": span, "clock": hour_and_minute}
    style_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    made.globals |= {"style": Markup(STYLE), "style_hash": style_hash, "live": LIVE}
    return made.from_string(TEMPLATE)
