"""What the scripts that people run say and do the same way: options, exit codes, complaints, sizes,
reading the queue.

enqueue.py does without it: a hook loads one module.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

import queue_helpers as q

VERSION = q.VERSION

# The exit codes of every script, beside 0. Those above 63 are named in sysexits.h.
EX_FAILED, EX_USAGE, EX_DATAERR, EX_TEMPFAIL, EX_INTERRUPTED = 1, 64, 65, 75, 130

SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

# Many changes hold the write lock for HOLD_SECONDS at a time, and leave it alone for PAUSE_SECONDS
# in between.
HOLD_SECONDS, PAUSE_SECONDS = 0.01, 0.01

# A waiting or running task's status, as conditions. They are literal, so that SQLite sees which
# partial index serves each.
LIVE = {
    "in_progress": "status = 2",
    "pending": "status < 2",
    "scheduled": "status = 3 and due_at is not null",
    "held": "status = 3 and due_at is null",
    "blocked": "status = 4 and group_id is not null",
}
FINISHED = ("completed", "failed", "cancelled", "expired")
STATUSES = (*LIVE, *FINISHED)


# What SQLite may put beside a database, after its name.
SIDECARS = ("-wal", "-shm", "-journal")


class Refused(q.QueueError):
    """What was asked for cannot be done; the message says why and what to do."""


# ---------------------------------------------------------- where things lie in the state directory


def database_file(state: Path) -> Path:
    """The database, through symbolic links: its sidecar files lie beside the file itself."""
    return Path(os.path.realpath(state / "tasks.db"))


def database_files(state: Path) -> list[Path]:
    """The database and its sidecar files, those that are there."""
    db = database_file(state)
    return [path for path in (db, *(Path(f"{db}{ending}") for ending in SIDECARS)) if path.exists()]


def owner_lock(state: Path, owner: str | None) -> Path:
    """The lock file of an owner; of nobody for a row that was marked as claimed without one."""
    return state / "workers" / (os.path.basename(owner or "") or q.NOBODY)


def serving_lock(state: Path, queue: str) -> Path:
    """The lock file that the workers of a queue share."""
    return state / "workers" / f"serving.{queue}"


def run_file(state: Path, run_name: str, ending: str) -> Path:
    """What a run's handler printed: ending is out or err."""
    return state / "logs" / f"{run_name}.{ending}"


def logs_directory(state: Path, queue: str = "") -> Path:
    return state / "logs" / queue


def spool_directory(state: Path) -> Path:
    return state / "spool"


# ------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line, and exit status 64."""

    def error(self, message: str):
        self.exit(EX_USAGE, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def make_parser(script: str, description: str | None) -> Parser:
    """The parser of a script: its docstring is its help."""
    parser = Parser(
        prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{script} {VERSION}")
    return parser


def utf8(argument: str) -> str:
    """An argument as the UTF-8 that it is, whatever the locale took it for. Not for the names of
    files.
    """
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def duration(text: str) -> float:
    """Seconds, of 30, 90m, 5min, 1.5h or 2d."""
    try:
        return q.parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def run(who: str, work: Callable[[], int]) -> int:
    """work()'s exit code; an error that a person, a disk or another process may cause becomes one
    line and a code.
    """
    try:
        return _told(work)
    except q.QueueBusy as error:
        return complain(EX_TEMPFAIL, who, error)
    except q.InvalidTask as error:
        return complain(EX_DATAERR, who, error)
    except q.QueueError as error:
        return complain(EX_FAILED, who, error)
    except sqlite3.Error as error:
        explained = q.explain(error, q.STATE_DIR)
        return complain(
            EX_TEMPFAIL if isinstance(explained, q.QueueBusy) else EX_FAILED, who, explained
        )
    except UnicodeEncodeError:
        # A lone surrogate stands for a byte that is not UTF-8.
        return complain(
            EX_USAGE, who, "an argument is not valid UTF-8, and so no id or text of a task's"
        )
    except ImportError as error:
        return complain(EX_FAILED, who, f"{error}; run it with: uv run --script, or with --json")
    except BrokenPipeError:
        # head and less have what they wanted.
        mute(1)
        return 0
    except KeyboardInterrupt:
        mute(1)
        return complain(EX_INTERRUPTED, who, "interrupted")
    except OSError as error:
        mute(1)
        return complain(EX_FAILED, who, f"{error.filename or 'standard output'}: {error.strerror}")


def _told(work: Callable[[], int]) -> int:
    open_standard_streams()
    # A test may have put something else in its place.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code = work()
    sys.stdout.flush()
    return code


# The standard streams that were closed when this process began.
closed_streams: set[int] = set()


def open_standard_streams() -> None:
    """Open /dev/null in the place of standard streams that were closed.

    The next file that a program opens would otherwise get such a number, and what is printed would
    be written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd > 2:
                os.close(fd)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
            closed_streams.add(number)


def complain(code: int, who: str, error: object) -> int:
    """Say one line on stderr, and return code."""
    try:
        print(f"{who}: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    except OSError:
        mute(2)
    return code


def mute(fd: int) -> None:
    """Nobody reads it any more: what is still buffered must not fail again at the end of the
    process.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), fd)


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work in an orderly manner, as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_uv() -> str | None:
    """The absolute path of a uv that runs in an empty environment, None when there is none.

    A version manager puts a stand-in on PATH that needs its environment; it is asked for the uv
    behind it.
    """
    home = Path.home()
    places = (
        os.environ.get("UV"),
        shutil.which("uv"),
        home / ".local/bin/uv",
        home / ".cargo/bin/uv",
        "/opt/homebrew/bin/uv",
        "/usr/local/bin/uv",
    )
    found = [
        str(place)
        for place in places
        if place and os.path.isabs(place) and os.access(place, os.X_OK)
    ]
    for uv in found:
        if works_alone([uv, "--version"]):
            return uv
    for stand_in in found:
        ask = [
            stand_in,
            "run",
            "--no-project",
            "--no-config",
            "--offline",
            "python",
            "-c",
            "import os; print(os.environ['UV'])",
        ]
        try:
            ran = subprocess.run(
                ask,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        uv = ran.stdout.strip()
        if uv and works_alone([uv, "--version"]):
            return uv
    return None


def works_alone(command: Sequence[str]) -> bool:
    """Whether a command succeeds with next to no environment, as under a hook or a service."""
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": "/usr/bin:/bin"}
    try:
        return (
            subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=10,
                env=environment,
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


# ---------------------------------------------------------------------------------- text for people

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text that a terminal or a log only shows, on one line.

    A task's type or payload, a handler's output or a file's name may hold control sequences, which
    set the title or the clipboard of a terminal, or marks that reverse what follows. Each such
    character is written as an escape.
    """
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """The same, its lines kept; a tab becomes four spaces."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


# What may be larger than the memory is copied in such pieces.
PIECE_BYTES = 65_536


class Printer:
    """Passes a handler's output on: each byte into a file or pipe, and what a terminal only shows
    to a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.on_terminal = stream, stream.isatty()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, piece: bytes) -> None:
        if self.on_terminal:
            self.stream.write(printable_lines(self.decoder.decode(piece)))
        else:
            self.stream.flush()
            self.stream.buffer.write(piece)
        self.stream.flush()


def make_printers() -> dict[str, Printer]:
    return {"err": Printer(sys.stderr), "out": Printer(sys.stdout)}


def copy(source: BinaryIO, printer: Printer) -> None:
    """Print what has come since, a piece at a time: it may be larger than the memory."""
    while piece := source.read(PIECE_BYTES):
        printer.write(piece)


def put_json(value: object, indent: int | None = 2) -> None:
    """Print JSON in ASCII: control characters, C1 among them, are escaped, and any terminal's
    encoding will do.
    """
    print(json.dumps(value, indent=indent))


def report(as_json: bool, value: object, text: str) -> None:
    """Print what was done: value for scripts, text for people."""
    if as_json:
        put_json(value)
    else:
        print(printable_lines(text))


def short(text: str | None, longest: int = 200) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def sh(word: object) -> str:
    """A word as a shell reads it, for remedies that people paste: printable, and the same bytes
    again.
    """
    text = str(word)
    if printable(text) == text:
        return shlex.quote(text)
    plain = (
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{''.join(plain)}'"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def span(value: float | None) -> str:
    """Seconds for people."""
    if value is None:
        return "-"
    for unit in ("d", "h", "m"):
        if value >= 2 * SECONDS_OF_UNIT[unit]:
            return f"{value / SECONDS_OF_UNIT[unit]:.0f}{unit}"
    return (
        f"{value:.0f}s"
        if value >= 10
        else f"{value:.1f}s"
        if value >= 1
        else f"{max(value, 0) * 1000:.0f}ms"
    )


# -------------------------------------------------------------------------------- tables for people

COLOURS = {
    "failed": "red",
    "in_progress": "cyan",
    "completed": "green",
    "cancelled": "yellow",
    "scheduled": "blue",
}
SPARKS = "▁▂▃▄▅▆▇█"


def payload(text: str | None) -> object:
    """A task's data for --json: the object, or the text where that says more than JSON can."""
    if text is None:
        return None
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    except (TypeError, ValueError, RecursionError):
        return text


def seconds_since(moment: str | None) -> float | None:
    """… a time of the database's."""
    if not moment:
        return None
    from calendar import timegm

    return (
        time.time()
        - timegm(time.strptime(moment[:19], "%Y-%m-%d %H:%M:%S"))
        - float(f"0{moment[19:]}")
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], bold: Iterable[int] = ()):
    """A rich table. Columns that begin with > are right-aligned; in a terminal the last is cut to
    what space there is, and one that begins with * is folded where even that is not enough.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    on_terminal, rows = sys.stdout.isatty(), [[printable(cell) for cell in row] for row in rows]
    drawn = Table(
        box=box.SIMPLE_HEAD if on_terminal else None,
        show_edge=False,
        pad_edge=False,
        padding=0 if on_terminal else (0, 2, 0, 0),
    )
    left = console().width
    for number, name in enumerate(columns):
        head = name.lstrip(">*")
        widest = max(cell_len(cell) for cell in (*head.split("\n"), *(row[number] for row in rows)))
        room = max(8, left) if on_terminal and number == len(columns) - 1 else None
        drawn.add_column(
            head,
            justify="right" if name.startswith(">") else "left",
            no_wrap=not name.startswith("*"),
            overflow="fold" if name.startswith("*") else "ellipsis",
            max_width=room,
            min_width=min(widest, 12) if name.startswith("*") else None,
        )
        left -= widest + 1
    for number, row in enumerate(rows):
        drawn.add_row(
            *(Text(cell, style=COLOURS.get(cell, "")) for cell in row),
            style="bold" if number in bold else "",
        )
    return drawn


def console():
    from rich.console import Console

    # Into a pipe nothing is cut off or wrapped.
    return Console(
        markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000
    )


def draw(*drawings: object) -> None:
    """Print; the text is made first and written by us, since rich has its own ideas of a closed
    pipe.
    """
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


def sparkline(values: Sequence[int]) -> str:
    top = max(max(values, default=0), 1)
    # Rounded up, so that one is not shown as none.
    return "".join(SPARKS[-(-value * (len(SPARKS) - 1) // top)] for value in values)


# -------------------------------------------------------------------------------- reading the queue


def open_queue() -> q.Connection:
    """The database as it is: a missing one is not made, and one of somebody else's not touched."""
    return q.connect(create=False)


def open_to_read(db: Path) -> sqlite3.Connection:
    """A connection that changes nothing: not even the sidecar files are made, as they are by an
    ordinary reader.
    """
    from urllib.parse import quote

    real = os.path.realpath(db)
    # The name is quoted as the bytes that it is on disk, whatever the locale.
    uri = (
        f"file:{quote(os.fsencode(real))}?mode=ro{'' if is_in_use(Path(real)) else '&immutable=1'}"
    )
    conn = sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None)
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return conn


def is_in_use(real: Path) -> bool:
    """Whether a database's sidecar files are there: some process has it open, or died with it.

    They lie beside the file itself, not beside a symbolic link to it.
    """
    return all(os.path.exists(f"{real}{ending}") for ending in ("-wal", "-shm"))


@contextmanager
def snapshot(conn: sqlite3.Connection) -> Iterator[None]:
    """Several reads of one state of the database. Nobody waits for it."""
    conn.execute("begin")
    try:
        yield
    finally:
        conn.execute("rollback")


def queues_of(conn: sqlite3.Connection) -> list[str]:
    return [name for (name,) in conn.execute(q.QUEUES)]


def check_known(conn: sqlite3.Connection, queues: Iterable[str]) -> None:
    """Raise Refused unless all of these queues exist."""
    known = queues_of(conn)
    for queue in queues:
        if queue not in known:
            raise Refused(f"there is no queue {queue!r}; there are: {', '.join(known)}")


def as_dict(cursor: sqlite3.Cursor) -> dict:
    """The next row with its columns' names, {} when there is none."""
    row = cursor.fetchone()
    names = (column[0] for column in cursor.description)
    return {} if row is None else dict(zip(names, row, strict=True))


def in_steps(conn: q.Connection, items: Iterable, change: Callable) -> Iterator:
    """change(item) for each, in transactions so short that nobody waits for long; yields what they
    return.
    """
    items, more = iter(items), True
    while more:
        results, began = [], time.monotonic()
        with q.transaction(conn):
            for item in items:
                results.append(change(item))
                if time.monotonic() - began > HOLD_SECONDS:
                    break
            else:
                more = False
        yield from results
        if more:
            time.sleep(PAUSE_SECONDS)


def envelope_of(task_id: str, task_type: str, timestamp: float, text: str) -> str:
    """The envelope of a bare payload: text is its JSON."""
    head = {"task_id": task_id, "task_type": task_type, "enqueued_at": q.utc(timestamp)}
    return f'{q.to_json(head)[:-1]}, "data": {text}}}'


# ----------------------------------------------------------------------------------- who holds what

CLAIMS = """
select {task} from "{queue}" where status = 2"""


def claims(conn: sqlite3.Connection) -> Iterator[tuple[str, q.Task]]:
    """(queue, task) of every claimed row. The owner of one that was marked as claimed by hand is
    nobody.
    """
    for queue in queues_of(conn):
        for row in conn.execute(q.on_queue(CLAIMS, queue)).fetchall():
            yield queue, q.Task.from_row(queue, row)


def owner_is_alive(state: Path, owner: str | None) -> bool:
    """Whether an owner's process lives: it holds its lock file."""
    return is_locked(owner_lock(state, owner))


def run_is_alive(state: Path, task: q.Task) -> bool:
    """Whether a claimed task's handler runs: it holds its output file's lock."""
    return is_locked(run_file(state, task.run_name, "out"))


def is_locked(path: Path) -> bool:
    """Whether some process holds a file's lock; False when there is no such file, or it cannot be
    read.
    """
    try:
        fd = q.lock_file(path, probe=True)
    except OSError:
        return False
    if fd is not None:
        os.close(fd)
    return fd is None
