"""Show tasks to people: tables of counts and of tasks, all about one task, and handlers' output.

rich is loaded when something is drawn: with --json nobody needs it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import BinaryIO, NamedTuple, TextIO

import queue_helpers as q
from taskqueue import approval
from taskqueue.control import Control
from taskqueue.costs import Bound
from taskqueue.database import LIVE
from taskqueue.find import Found, newest_record
from taskqueue.remedies import command, lets_go_on
from taskqueue.text import (
    ago,
    clock,
    dollars,
    pause_in_words,
    plural,
    seconds_of,
    seconds_since,
    sh,
    short,
    span,
    visible,
    visible_lines,
)

COLOURS = {
    "failed": "red",
    "in_progress": "cyan",
    "completed": "green",
    "cancelled": "yellow",
    "expired": "yellow",
    "scheduled": "blue",
    "held": "magenta",
}
# Lines of a screen beside the rows of a list: the head, the remarks below, and the prompt.
OTHER_LINES = 8
# What a list leaves of each at least, before its queues and types are shortened further. A row's
# number names its task as well, so ids are shortened first.
LEAST_NOTE, LEAST_ID, LEAST_NAME = 30, 8, 6
# Names of so many cells stand in stats before the 95th percentiles are left out ("
# link_validation"), and of so many before a column is.
STATS_NAME, LEAST_STATS_NAME = 17, 14
# How often the file that a handler writes is looked at.
LOOK_SECONDS = 0.1
# The history keeps the output in these columns.
KEPT = {"err": "log", "out": "result"}
# Output is copied in such pieces: it may be larger than the memory.
PIECE_BYTES = 65_536
TIMES = ("enqueued_at", "due_at", "expires_at", "started_at", "completed_at")

# A cell is a text, or a text and its style.
Cell = str | tuple[str, str]


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], bold: Iterable[int] = ()):
    """Return a rich table. A column that begins with > is right-aligned.

    In a terminal the last column is cut to the room that is left, and one that begins with * is
    folded if even that is not enough.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    cells = [[_styled(cell) for cell in row] for row in rows]
    widths = widths_of(columns, [[text for text, _ in row] for row in cells])
    drawn = Table(
        box=box.SIMPLE_HEAD if on_terminal else None,
        show_edge=False,
        pad_edge=False,
        padding=0 if on_terminal else (0, 2, 0, 0),
    )
    left = console().width
    for number, name in enumerate(columns):
        drawn.add_column(
            name.lstrip(">*"),
            justify="right" if name.startswith(">") else "left",
            no_wrap=not name.startswith("*"),
            overflow="fold" if name.startswith("*") else "ellipsis",
            max_width=max(8, left) if on_terminal and number == len(columns) - 1 else None,
            min_width=min(widths[number], 12) if name.startswith("*") else None,
        )
        left -= widths[number] + 1
    for number, row in enumerate(cells):
        drawn.add_row(
            *(Text(text, style=style) for text, style in row),
            style="bold" if number in bold else "",
        )
    return drawn


def _styled(cell: Cell) -> tuple[str, str]:
    text, style = (cell, COLOURS.get(cell, "")) if isinstance(cell, str) else cell
    return visible(text), style


def widths_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return how many cells of a screen each column takes."""
    from rich.cells import cell_len

    heads = [max(map(cell_len, name.lstrip(">*").split("\n"))) for name in columns]
    return [
        max([head, *(cell_len(row[number]) for row in rows)]) for number, head in enumerate(heads)
    ]


def middle(text: str, longest: int) -> str:
    """Cut a text in its middle, where ids that begin alike differ least."""
    from rich.cells import cell_len

    text = visible(text)
    if cell_len(text) <= longest:
        return text
    # Three characters say what kind of an id it is.
    head = max((longest - 1) // 3, min((longest - 1) // 2, 3))
    tail = longest - 1 - head
    while True:
        short = f"{text[:head]}…{text[len(text) - tail :]}"
        if cell_len(short) <= longest or not tail:
            return short
        head, tail = (head - 1, tail) if head else (head, tail - 1)


def console():
    from rich.console import Console

    # Into a pipe nothing is cut off or wrapped.
    return Console(
        markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000
    )


def draw(*drawings: object) -> None:
    """Print drawings. rich only makes the text: it handles a closed pipe in its own way."""
    screen = console()
    with screen.capture() as captured:
        for drawing in drawings:
            screen.print(drawing)
    text = captured.get()
    if not sys.stdout.isatty():
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def amount(number: int) -> str:
    return (
        f"{number:,}"
        if number < 10_000
        else f"{number / 1000:,.0f}k"
        if number < 9_999_500
        else f"{number / 1e6:,.0f}M"
    )


# -------------------------------------------------------------------------------------------- stats


def stats_drawing(numbers: dict):
    """Draw a line per queue, below it one per type, then pauses, slots and workers.

    It has as many columns as fit: no number is cut.
    """
    from rich.console import Group
    from rich.text import Text

    used = {name: n for name, n in numbers["queues"].items() if not n["unused"]}
    rows = [(name, total, True) for name, total in _named(used)]
    for at in range(len(rows) - 1, -1, -1):
        types = rows[at][1]["types"]
        rows[at + 1 : at + 1] = [(f"  {name}", of_type, False) for name, of_type in types.items()]
    bold = {at for at, row in enumerate(rows) if row[2]}
    room = console().width
    heads, cells, spare = [], [], 0
    least = STATS_NAME
    for columns in _stats_columns(numbers):
        heads = ["queue\n  type", *(head for head, _ in columns)]
        cells = [[name, *(cell(n) for _, cell in columns)] for name, n, _ in rows]
        widths = widths_of(heads, [[_styled(cell)[0] for cell in row] for row in cells])
        spare = room - sum(widths[1:]) - len(columns)
        if spare >= min(widths[0], least):
            break
        least = LEAST_STATS_NAME
    cells = [[middle(str(row[0]), max(spare, LEAST_NAME)), *row[1:]] for row in cells]
    lines = Text("\n".join(_stats_lines(numbers)))
    return Group(table(heads, cells, bold), lines) if rows else lines


def _named(queues: dict) -> list[tuple[str, dict]]:
    return [(f"{name} (paused)" if n["paused"] else name, n) for name, n in queues.items()]


def _stats_columns(numbers: dict) -> Iterable[list[tuple[str, Callable[[dict], Cell]]]]:
    """Yield the table's columns, (head, cell function), fewer each time."""
    queues = numbers["queues"].values()

    def live(name: str) -> tuple[str, Callable[[dict], Cell]]:
        return f">{name.replace('_', chr(10))}", lambda n: amount(n[name])

    def ended(name: str) -> tuple[str, Callable[[dict], Cell]]:
        def cell(n: dict) -> Cell:
            text = f"{amount(n[f'{name}_hour'])}/{amount(n[f'{name}_day'])}"
            return text, COLOURS["failed"] if name == "failed" and n["failed_day"] else ""

        return f">{name}\n1h/24h", cell

    def took(name: str, label: str, whole: bool) -> tuple[str, Callable[[dict], Cell]]:
        def cell(n: dict) -> Cell:
            if not n[name]:
                return "-"
            median = span(n[name]["median"])
            return f"{median}/{span(n[name]['p95'])}" if whole else median

        return f">{label}\n{'p50/p95' if whole else 'median'}", cell

    first = [live(name) for name in ("pending", "in_progress")]
    more = [
        live(name)
        for name in LIVE
        if name not in ("pending", "in_progress") and any(n[name] for n in queues)
    ]
    oldest = (">oldest\npending", lambda n: span(n["oldest_pending_seconds"]))
    finished = [ended("completed"), ended("failed")]
    finished += [ended("expired")] if any(n["expired_day"] for n in queues) else []
    for whole in (True, False):
        times = [took("wait_seconds", "waited", whole), took("run_seconds", "ran", whole)]
        yield [*first, *more, oldest, *finished, *times]
    yield [*first, *more, *finished, *times]
    others = [name for name in LIVE if name not in ("pending", "in_progress")]
    other = (">wait\notherwise", lambda n: amount(sum(n[name] for name in others)))
    more = [other] if more else []
    yield [*first, *more, *finished[:2], *times]
    yield [*first, *finished[:2], *times]
    yield [*first, *finished[:2]]


def _stats_lines(numbers: dict) -> Iterable[str]:
    if unused := [name for name, n in numbers["queues"].items() if n["unused"]]:
        yield f"no tasks in 30 days: {', '.join(unused)}"
    for name, n in numbers["queues"].items():
        if n["paused"]:
            told = Control(True, n["paused_until"], n["pause_reason"], n["paused_by"], n["slots"])
            yield f"{name} is {pause_in_words(told)}; see: {lets_go_on(name, n['paused_by'])}"
        elif n["bound"]:
            yield f"{name}: {Bound(**n['bound'])}"
        if n["slots"]:
            yield f"{name} runs at most {plural(n['slots'], 'task')} at a time"
        if n["costs"]:
            days = (
                f"{dollars(day['cost_usd'], day['at_least'])} on {day['day']}" for day in n["costs"]
            )
            yield f"{name} cost {', '.join(days)}"
    serving = numbers["serving"]
    yield f"workers serve: {', '.join(serving)}" if serving else "no worker runs now"
    yield from map(visible, numbers["remarks"])
    if not any(n[name] for n in numbers["queues"].values() for name in LIVE):
        yield "no task waits or runs"


# --------------------------------------------------------------------------------------------- list


def rows_on_screen() -> int:
    """Return how many rows of a list fit on the screen."""
    return max(shutil.get_terminal_size().lines - OTHER_LINES, 5)


def list_drawing(rows: list[dict], controls: dict[str, Control]) -> list[object]:
    """Draw a line per task. A terminal gets row numbers; queue and type below the table where all
    tasks share them; and ids as short as they are unique if they do not fit whole."""
    notes = [short(note_of(row, controls)) for row in rows]
    ages = [span(seconds_since(row["completed_at"] or row["enqueued_at"])) for row in rows]
    if not sys.stdout.isatty():
        heads = ["status", "queue", "*id", "type", ">age", ">tries"]
        names = ("status", "queue", "task_id", "task_type")
        cells = [
            (*(row[name] for name in names), age, str(row["attempts"]), note)
            for row, age, note in zip(rows, ages, notes, strict=True)
        ]
        return [table([*heads, "what came of it, or the payload"], cells)]
    notes = [
        # How many attempts a dead letter had is in its error, after the reason.
        f"try {row['attempts']}: {note}"
        if row["attempts"] > 1 and row["status"] != "failed"
        else note
        for row, note in zip(rows, notes, strict=True)
    ]
    columns = {
        "#": [str(number) for number in range(1, len(rows) + 1)],
        "status": [row["status"] for row in rows],
        "queue": [row["queue"] for row in rows],
        "id": [row["task_id"] for row in rows],
        "type": [row["task_type"] for row in rows],
        "age": ages,
        "what came of it": notes,
    }
    shared = [name for name in ("queue", "type") if len(set(columns[name])) == 1]
    said = [f"each {name} is {visible(columns.pop(name)[0])}" for name in shared]
    widths = column_widths(columns)
    if sum(widths.values()) + len(widths) - 1 > console().width:
        columns["id"] = unique_heads(columns["id"])
        widths = column_widths(columns)
    for name, width in fitting(widths, console().width).items():
        columns[name] = [middle(text, width) for text in columns[name]]
    heads = [f">{name}" if name in ("#", "age") else name for name in columns]
    return [table(heads, zip(*columns.values(), strict=True)), *([", ".join(said)] if said else [])]


def column_widths(columns: dict[str, list[str]]) -> dict[str, int]:
    rows = [*zip(*columns.values(), strict=True)]
    return dict(zip(columns, widths_of([*columns], rows), strict=True))


def unique_heads(ids: list[str]) -> list[str]:
    """Return the beginnings of ids that tell them apart, of LEAST_ID characters at least."""
    ordered = sorted(set(ids))
    shared = [len(os.path.commonprefix(pair)) for pair in pairwise(ordered)]
    least = {
        ident: max(LEAST_ID, 1 + max(both))
        for ident, *both in zip(ordered, [0, *shared], [*shared, 0], strict=True)
    }
    return [
        ident if len(ident) <= least[ident] + 1 else f"{ident[: least[ident]]}…" for ident in ids
    ]


def fitting(widths: dict[str, int], room: int) -> dict[str, int]:
    """Return the widths of queues, ids and types in a room that they share with the other columns."""
    note = widths["what came of it"]
    names = {name: widths[name] for name in ("queue", "id", "type") if name in widths}
    left = room - sum(widths.values()) - len(widths) + 1 + sum(names.values()) + note
    others = sum(names.values()) - names["id"]
    for_names = left - min(max(LEAST_NOTE, left // 2), note)
    names["id"] = min(names["id"], max(LEAST_ID, for_names - others))
    for_names = left - min(LEAST_NOTE, note) - names["id"]
    while others > for_names:
        longest = max((name for name in names if name != "id"), key=names.__getitem__)
        if names[longest] <= LEAST_NAME:
            break
        names[longest] -= 1
        others -= 1
    return names


def note_of(row: dict, controls: dict[str, Control]) -> str:
    """Return the result, reason or payload of a task in a line."""
    status, payload = row["status"], gist(row["data"])
    if status == "completed":
        return summary(row["result"]) or payload
    if status == "scheduled":
        why = f", after: {row['error']}" if row["error"] else f": {payload}"
        was = "" if (seconds_of(row["due_at"]) or 0.0) > time.time() else "due "
        return f"{was}{ago(row['due_at'])}{why}"
    if status == "blocked" and row["after"]:
        return f"after {row['after']}: {payload}"
    control = controls.get(row["queue"])
    if status == "pending" and control and control.paused:
        return pause_in_words(control)
    return row["error"] or payload


# --------------------------------------------------------------------------------------------- show


def payload(text: str | None) -> object:
    """Return a task's data as an object for --json, or its text if that is no plain JSON."""
    if text is None:
        return None
    try:
        return q.parse_json(text)
    except (ValueError, RecursionError):
        return text


def payload_text(text: str) -> str:
    """Return the payload that was enqueued, without its envelope."""
    inner = payload_in(payload(text))
    return json.dumps(inner, ensure_ascii=False) if isinstance(inner, dict) else text


def gist(text: str) -> str:
    """Return the summary in a task's payload, as a completion has one, else the payload."""
    inner = payload_in(payload(text))
    if not isinstance(inner, dict):
        return text
    said, printed = inner.get("summary"), inner.get("result")
    said = said if isinstance(said, str) else summary(printed) if isinstance(printed, str) else ""
    return said.strip() or json.dumps(inner, ensure_ascii=False)


def payload_in(stored: object) -> object:
    """Return the payload of a task's data."""
    if not isinstance(stored, dict):
        return stored
    inner = stored.get("data") if {"task_id", "task_type"} <= stored.keys() else None
    return inner if isinstance(inner, dict) else stored


def summary(printed: str | None) -> str:
    """Return the `summary` of a handler's JSON result, else the first line that it printed."""
    text = (printed or "").strip()
    value = payload(text) if text.startswith("{") else None
    said = value.get("summary") if isinstance(value, dict) else None
    return said.strip() if isinstance(said, str) and said.strip() else text.partition("\n")[0]


def task_text(task: dict) -> str:
    """Return all that `show` prints about a task."""
    lines = [field(name, visible(value)) for name, value in fields_of(task)]
    data = task["data"]
    lines += ["", "data", visible_lines(data if isinstance(data, str) else indented(data))]
    for name, column in (("stdout", "result"), ("stderr", "log")):
        text = (task.get(column) or "").rstrip("\n")
        if text:
            value = payload(text) if text.lstrip().startswith(("{", "[")) else text
            shown = text if isinstance(value, str) else indented(value)
            lines += ["", name, visible_lines(shown)]
    return "\n".join(lines)


def field(name: str, value: str) -> str:
    """Return a field as a line. In a terminal its value stays in its column, paths unbroken."""
    line = f"{name:<17} {value}"
    if not sys.stdout.isatty():
        return line
    from textwrap import fill

    columns = max(console().width, 40)
    return fill(
        line, columns, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False
    )


def indented(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


# Fields that `show` prints elsewhere or not at all.
NOT_FIELDS = {"data", "result", "log", "history", "runs", "came_from", "cancel_requested"}
NOT_FIELDS |= {"cost_usd", "cost_at_least", "asks"}


def fields_of(task: dict) -> Iterable[tuple[str, str]]:
    """Yield (name, value) of a task, its times as local time, and how long it took."""
    for name, value in task.items():
        if name in NOT_FIELDS or value is None:
            continue
        if name in TIMES and seconds_of(value) is not None:
            value = f"{clock(value, whole=True)}, {ago(value)}"
        yield name, str(value)
        if name == "status" and value == "held":
            yield "", f"until {command('approve')} or {command('reject')}"
        if name == "status" and value == "failed":
            yield "", f"runs again after {command('retry')} {sh(task['task_id'])}"
    for number, line in enumerate(changes_of(task)):
        yield "" if number else "approval changes", line
    is_over = task["completed_at"] is not None
    if task["started_at"] is not None:
        until = task["completed_at"] if is_over else time.time()
        yield "waited", span(between(task["enqueued_at"], task["started_at"]))
        yield "ran" if is_over else "has run", span(between(task["started_at"], until))
    if task["cost_usd"] is not None:
        yield "cost", dollars(task["cost_usd"], task["cost_at_least"])
    for other in task["came_from"]:
        yield "came from", f"{other['queue']} {other['task_id']} ({other['status']})"


def changes_of(task: dict) -> list[str]:
    """Return what approval changes in the payload of a task that asks, a line for each field."""
    asks, data = (payload(text) if isinstance(text, str) else text
                  for text in (task.get("asks"), task["data"]))  # fmt: skip
    if not isinstance(asks, dict):
        return []
    before = payload_in(data)
    lines = approval.lines_of(before if isinstance(before, dict) else {}, asks)
    return lines or [
        f"the fields that you name: {command('approve')} {sh(task['task_id'])} --with '{{…}}'"
    ]


def between(begin: object, end: object) -> float | None:
    """Return the seconds between two times in the database, or None if one is no time."""
    first, last = seconds_of(begin), seconds_of(end)
    return None if first is None or last is None else last - first


def history_table(history: list[dict]):
    return table(
        ["status", "started", "completed", ">attempts", ">exit", "error"],
        [
            (
                record["status"],
                clock(record["started_at"], whole=True) if record["started_at"] else "-",
                clock(record["completed_at"], whole=True),
                str(record["attempts"]),
                "-" if record["exit_code"] is None else str(record["exit_code"]),
                short(record["error"]),
            )
            for record in history
        ],
    )


def output_files(runs: list[dict]) -> str:
    files = (f"{run['path']}{ending}" for run in runs for ending in (".out", ".err"))
    return "".join(f"{visible(file)}\n" for file in files if os.path.exists(file))


# --------------------------------------------------------------------------------------------- logs


class Printer:
    """Pass a handler's output on: its bytes to a file or pipe, visible text to a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.on_terminal = stream, stream.isatty()
        self.decoder = getincrementaldecoder("utf-8")("replace")

    def write(self, piece: bytes) -> None:
        if self.on_terminal:
            self.stream.write(visible_lines(self.decoder.decode(piece)))
        else:
            self.stream.flush()
            self.stream.buffer.write(piece)
        self.stream.flush()


def make_printers() -> dict[str, Printer]:
    return {"err": Printer(sys.stderr), "out": Printer(sys.stdout)}


def copy(source: BinaryIO, printer: Printer) -> None:
    """Print what was written since the last call."""
    while piece := source.read(PIECE_BYTES):
        printer.write(piece)


class Run(NamedTuple):
    """The output of an attempt: `path` with .out and .err added."""

    attempt: int
    path: str
    changed: float


def runs_of(record: dict) -> list[Run]:
    """Return the runs of a task whose output is in the logs, oldest first."""
    pattern, runs = re.compile(rf"({record['id']}-(\d+)-.+)\.(?:out|err)", re.DOTALL), {}
    try:
        with os.scandir(q.STATE_DIR / "logs" / record["queue"]) as entries:
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
    """Print a run's stderr on stderr, and its stdout on stdout."""
    printers = make_printers()
    for ending, source in sources.items():
        copy(source, printers[ending])


def print_as_json(told: dict, sources: dict[str, BinaryIO]) -> None:
    """Print one JSON object, a piece at a time: output may be larger than the memory."""
    sys.stdout.write(json.dumps(told, indent=2)[:-2])
    for ending, name in (("out", "stdout"), ("err", "stderr")):
        sys.stdout.write(f',\n  "{name}": "')
        decode = getincrementaldecoder("utf-8")("replace").decode
        while piece := sources[ending].read(PIECE_BYTES):
            sys.stdout.write(json.dumps(decode(piece))[1:-1])
        sys.stdout.write(json.dumps(decode(b"", True))[1:-1] + '"')
    sys.stdout.write("\n}\n")


def open_output(path: str | None, ending: str, record: dict) -> BinaryIO:
    """Open a run's stderr or stdout, or the part that the history has kept."""
    try:
        if path is not None and os.path.getsize(f"{path}.{ending}"):
            return open(f"{path}.{ending}", "rb")
    except OSError:
        pass
    return io.BytesIO((record.get(KEPT[ending]) or "").encode())


def follow_logs(conn: q.Connection, found: Found) -> int:
    """Print the output as it grows, attempt after attempt, until the task is finished."""
    files: dict[str, BinaryIO] = {}
    printers, waited = make_printers(), False
    while True:
        # The record is read before the files, so that no output of a finished task is missed.
        record = newest_record(conn, found)
        runs = runs_of(record)
        for ending in KEPT if runs else ():
            follow_file(files, ending, f"{runs[-1].path}.{ending}", printers[ending])
        if record["completed_at"] is not None:
            for ending in () if files else KEPT:
                copy(open_output(None, ending, record), printers[ending])
            return 0
        if not runs and not waited:
            waited = True
            task_id = visible(found.task_id)
            print(
                f"task {task_id} has not run yet ({record['status']}); waiting for it",
                file=sys.stderr,
            )
        time.sleep(LOOK_SECONDS)


def follow_file(files: dict[str, BinaryIO], ending: str, path: str, printer: Printer) -> None:
    """Print the rest of the open file, then go on to the next attempt's file."""
    if ending in files:
        copy(files[ending], printer)
    try:
        there = os.stat(path)
        if ending not in files or os.fstat(files[ending].fileno()).st_ino != there.st_ino:
            files[ending] = open(path, "rb")  # noqa: SIM115
            copy(files[ending], printer)
    except FileNotFoundError:
        # It was empty when the run ended, and was removed.
        pass
