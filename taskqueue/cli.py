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
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import queue_helpers as q
from taskqueue import serving
from taskqueue.text import visible

if TYPE_CHECKING:
    from taskqueue.outcome import Control

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
    "handed_over": "status = 5",
}
FINISHED = ("completed", "failed", "cancelled", "expired")
STATUSES = (*LIVE, *FINISHED)


# What SQLite may put beside a database, after its name.
SIDECARS = ("-wal", "-shm", "-journal")


class Refused(q.QueueError):
    """What was asked for cannot be done; the message says why and what to do."""

    exit_code = EX_FAILED


# ---------------------------------------------------------- where things lie in the state directory


def database_file(state: Path) -> Path:
    """The database, through symbolic links: its sidecar files lie beside the file itself."""
    return Path(os.path.realpath(state / "tasks.db"))


def database_files(state: Path) -> list[Path]:
    """The database and its sidecar files, those that are there."""
    db = database_file(state)
    return [path for path in (db, *(Path(f"{db}{ending}") for ending in SIDECARS)) if path.exists()]


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

    def parse_known_args(self, *args, **named):
        """The arguments. What is unknown to a command is that command's error."""
        namespace, unknown = super().parse_known_args(*args, **named)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str):
        me = as_typed(self.prog)
        self.exit(EX_USAGE, f"{me}: {visible(message)}; see {me} --help\n")


def make_parser(script: str, description: str | None) -> Parser:
    """The parser of a script: its docstring is its help."""
    # An empty or a relative entry means the working directory: none of its programs is run.
    places = filter(os.path.isabs, os.environ.get("PATH", "").split(os.pathsep))
    os.environ["PATH"] = os.pathsep.join(places) or os.defpath
    parser = Parser(
        prog=script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{script} {VERSION}")
    return parser


def add_command(commands, run: Callable[..., int]) -> Parser:
    """A command of a script: it is called like the function that runs it, whose docstring is its
    help.
    """
    says = " ".join((run.__doc__ or "").split())
    name = run.__name__.rstrip("_").replace("_", "-")
    entry = commands.add_parser(name, help=says.split(". ")[0].rstrip("."), description=says)
    entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
    entry.set_defaults(run=run)
    return entry


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


PLUGIN_COMMAND = "task-queue"
# What a command is called whose script is not called like it; all others are tasks.py's.
SCRIPTS = {"add": "enqueue.py", "work": "worker.py", "cleanup": "cleanup.py"}
SCRIPTS |= {"relay": "relay.py"}


def command(words: str) -> str:
    """How a person types a command here: "tq list" where install.py has put tq on PATH, else
    "tasks.py list". Every remedy in a message comes from here.
    """
    name, space, rest = words.partition(" ")
    tq = installed_command()
    if tq:
        return f"{tq} {words}"
    return f"{SCRIPTS[name]}{space}{rest}" if name in SCRIPTS else f"tasks.py {words}"


def as_typed(script: str) -> str:
    """The same for a message that names a script: "tq list" for "tasks.py list"."""
    name, _, rest = script.partition(".py")
    if not installed_command():
        return script
    if name == "tasks" or name == "install" and rest:
        return command(rest.strip()) if rest else str(installed_command())
    name = next((short for short, whole in SCRIPTS.items() if whole == f"{name}.py"), name)
    return command(f"{name}{rest}")


def remedies_as_typed(text: str) -> str:
    """A message of a module that does without this one, with its remedies as people type them."""
    if not installed_command():
        return text
    scripts = "tasks|worker|cleanup|enqueue|report|relay"
    return re.sub(rf"(?<![\w/.-])({scripts})\.py(?: [a-z]+)?", _typed, text)


def _typed(found: re.Match) -> str:
    return as_typed(found[0])


@lru_cache(1)
def installed_command() -> str | None:
    """The name of our command on the reader's PATH: what install.py put there, or the plugin's.

    None in a checkout, where the scripts are called by their names.
    """
    from taskqueue import installation as queue_installation

    here = Path(q.__file__).resolve().parent
    try:
        place = queue_installation.installed(q.__file__)
    except (OSError, queue_installation.WrongUse):
        return None
    path = str(place.record.get("command") or "") if place else ""
    if path and _is_on_path(os.path.basename(path), [Path(path)]):
        return os.path.basename(path)
    # Claude Code puts a plugin's bin on the PATH of its shell, though not of its hooks.
    plugins = [plugin.resolve() for plugin in queue_installation.plugins().values()]
    commands = [plugin / "bin/task-queue" for plugin in (here, *plugins)]
    return PLUGIN_COMMAND if here in plugins or _is_on_path(PLUGIN_COMMAND, commands) else None


def _is_on_path(name: str, files: Iterable[Path]) -> bool:
    """Whether a person who types the name runs one of these files."""
    found = shutil.which(name)
    return found is not None and os.path.realpath(found) in map(os.path.realpath, files)


def run(who: str, work: Callable[[], int]) -> int:
    """work()'s exit code; an error that a person, a disk or another process may cause becomes one
    line and a code.
    """
    open_standard_streams()
    # Whoever names another state must not be given the usual one.
    if q.state_complaint:
        return complain(EX_USAGE, who, q.state_complaint)
    try:
        return _told(work)
    except Refused as error:
        return complain(error.exit_code, who, error)
    except (q.QueueError, sqlite3.Error) as error:
        told = q.explain(error, q.STATE_DIR) if isinstance(error, sqlite3.Error) else error
        return complain(code_of(told), who, remedies_as_typed(str(told)))
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


def code_of(error: Exception) -> int:
    """The exit code for an error of the queue's."""
    if isinstance(error, q.QueueBusy):
        return EX_TEMPFAIL
    return EX_DATAERR if isinstance(error, q.InvalidTask) else EX_FAILED


def _told(work: Callable[[], int]) -> int:
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
        line = f"{as_typed(who)}: {' '.join(str(error).split())}"
        print(visible(line), file=sys.stderr, flush=True)
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
                cwd="/",
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
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=30,
                env=environment,
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


# ---------------------------------------------------------------------------------- text for people


def visible_lines(text: str) -> str:
    """Return the text made visible, its lines kept; a tab becomes four spaces."""
    return visible(text.replace("\t", "    "), keep="\n")


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
            self.stream.write(visible_lines(self.decoder.decode(piece)))
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
        print(visible_lines(text))


def short(text: str | None, longest: int = 200) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def sh(word: object) -> str:
    """A word as a shell reads it, for remedies that people paste: printable, and the same bytes
    again.
    """
    text = str(word)
    if visible(text) == text:
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


def seconds_of(moment: object) -> float | None:
    """Unix seconds of a time of the database's: a number, or text, which is UTC where it names no
    zone. None for what is neither: a shell may have written anything.
    """
    if isinstance(moment, int | float):
        return moment
    from datetime import UTC, datetime

    try:
        at = datetime.fromisoformat(str(moment))
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def seconds_since(moment: object) -> float | None:
    at = seconds_of(moment)
    return None if at is None else time.time() - at


def clock(moment: float | str, whole: bool = False) -> str:
    """A time of the database's as a person's clock shows it, with its zone: 19:00 CET.

    A day that is not today is named; whole names it always, and the seconds.
    """
    seconds = min(max(seconds_of(moment) or 0.0, 0.0), float(q.LAST_SECOND))
    local, now = time.localtime(seconds), time.localtime()
    is_today = local[:3] == now[:3]
    form = "%Y-%m-%d %H:%M:%S %Z" if whole else "%H:%M %Z" if is_today else "%Y-%m-%d %H:%M %Z"
    return time.strftime(form, local)


def ago(moment: float | str) -> str:
    """How long ago a time was, or how soon it comes: "12 s ago", "in 42 s"."""
    seconds = seconds_since(moment) or 0.0
    away = re.sub(r"(?<=\d)(?=[a-z])", " ", span(abs(seconds)))
    return f"in {away}" if seconds < 0 else f"{away} ago"


def summary(printed: str | None) -> str:
    """What a handler printed in one line: the `summary` of its JSON, else its first line."""
    text = (printed or "").strip()
    value = payload(text) if text.startswith("{") else None
    said = value.get("summary") if isinstance(value, dict) else None
    return said.strip() if isinstance(said, str) and said.strip() else text.partition("\n")[0]


def payload_text(text: str) -> str:
    """What the sender sent, without our envelope."""
    stored = payload(text)
    if not isinstance(stored, dict):
        return text
    inner = stored.get("data") if {"task_id", "task_type"} <= stored.keys() else None
    return json.dumps(inner if isinstance(inner, dict) else stored, ensure_ascii=False)


def pause_in_words(control: Control) -> str:
    """Until when a queue is paused, and why: "paused until 19:00 CET (in 2 h): usage limit"."""
    until = "until a person resumes it"
    if control.until is not None:
        until = f"until {clock(control.until)} ({ago(control.until)})"
    return f"paused {until}{f': {visible(control.reason)}' if control.reason else ''}"


# -------------------------------------------------------------------------------- reading the queue


def open_queue() -> q.Connection:
    """The database as it is: a missing one is not made, and one of somebody else's not touched."""
    return q.connect(create=False)


class Reader(sqlite3.Connection):
    """A connection that only reads, and knows its state directory."""

    state: Path


def open_to_read(db: Path, directory: Path | None = None) -> Reader:
    """A connection that changes nothing: not even the sidecar files are made, as they are by an
    ordinary reader.

    Where the write-ahead log has lost its index, which SQLite would make anew, a copy is read. It
    takes room in the directory (default: the system's for temporary files) until it is closed.
    """
    real, conn = Path(os.path.realpath(db)), None
    # Its last user may be closing it at this moment, and then the log goes.
    with suppress(FileNotFoundError):
        if not is_in_use(real) and os.path.getsize(f"{real}-wal"):
            conn = _open_copy(real, directory)
    if conn is None:
        conn = _open_unchanged(real, "" if is_in_use(real) else "&immutable=1")
    conn.state = db.parent
    conn.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return conn


def _open_unchanged(real: Path, how: str = "") -> Reader:
    from urllib.parse import quote

    # The name is quoted as the bytes that it is on disk, whatever the locale.
    uri = f"file:{quote(os.fsencode(real))}?mode=ro{how}"
    return sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None, factory=Reader)


def _open_copy(real: Path, directory: Path | None) -> Reader:
    """A copy of a database and its log, which has no name any more when this returns."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(dir=directory) as made:
        copy = Path(made, "copy.db")
        for ending in ("", "-wal"):
            shutil.copyfile(f"{real}{ending}", f"{copy}{ending}")
        conn = _open_unchanged(copy)
        # The log is opened by the first read. What is wrong is the reader's to hear.
        with suppress(sqlite3.Error):
            conn.execute("select 1 from sqlite_master").fetchone()
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
        # An error of the disk has ended it.
        if conn.in_transaction:
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


def in_steps(
    conn: q.Connection, items: Iterable, change: Callable, hold: float = HOLD_SECONDS
) -> Iterator:
    """change(item) for each, in transactions so short that nobody waits for long; yields what they
    return.
    """
    items, more = iter(items), True
    while more:
        results, began = [], time.monotonic()
        with q.transaction(conn):
            for item in items:
                results.append(change(item))
                if time.monotonic() - began > hold:
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


def served(state: Path, queues: Iterable[str]) -> list[str]:
    """Those queues that a worker serves now."""
    return [queue for queue in queues if serving.is_served(state, queue)]
