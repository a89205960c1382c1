"""Parse command lines, report and complain: the part that is the same in every script.

A script's `main` parses with `make_parser`, then returns `run(name, work)`: an exit code.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import queue_helpers as q
from taskqueue.installation import Trouble, WrongUse
from taskqueue.remedies import as_typed, remedies_as_typed
from taskqueue.text import did_you_mean, visible, visible_lines
from taskqueue.times import parse_duration

VERSION = q.VERSION

# The exit codes of every script, beside 0. Those above 63 are named in sysexits.h.
EX_FAILED, EX_USAGE, EX_DATAERR, EX_TEMPFAIL, EX_INTERRUPTED = 1, 64, 65, 75, 130


class Refused(q.QueueError):
    """A request that cannot be met; the message says why and what to do."""

    exit_code = EX_FAILED


class Unknown(Refused):
    """A name that no task or queue has, or several tasks have."""

    exit_code = EX_USAGE


# ------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors are one line, and exit status 64."""

    def parse_known_args(self, *args, **named):
        """Report an argument that a command does not know as that command's error."""
        namespace, unknown = super().parse_known_args(*args, **named)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return namespace, unknown

    def _check_value(self, action, value):
        """Report an unknown command with its nearest neighbours, not with all that there are."""
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"there is no command {value!r}{did_you_mean(value, action.choices)}")
        super()._check_value(action, value)

    def error(self, message: str):
        help_ = remedies_as_typed(f"{self.prog} --help")
        self.exit(EX_USAGE, f"{as_typed(self.prog)}: {visible(message)}; see {help_}\n")


def make_parser(script: str, description: str | None) -> Parser:
    """Return the parser of a script, whose docstring is its help."""
    keep_absolute_path()
    parser = Parser(
        prog=as_typed(script),
        description=remedies_as_typed(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"{script} {VERSION}"
    parser.add_argument("-V", "--version", action="version", version=version)
    return parser


def keep_absolute_path() -> None:
    """Take relative entries out of PATH, so that no program of the working directory is run."""
    places = filter(os.path.isabs, os.environ.get("PATH", "").split(os.pathsep))
    os.environ["PATH"] = os.pathsep.join(places) or os.defpath


class Command(Protocol):
    """The function that runs a command, with the arguments that `takes` declared."""

    __name__: str
    options: tuple

    def __call__(self, **arguments) -> int: ...


def add_command(commands, run: Command) -> Parser:
    """Add a command with the name of the function, its docstring as help, and its `options`."""
    says = " ".join((run.__doc__ or "").split())
    entry = commands.add_parser(
        name_of(run), help=says.split(". ")[0].rstrip("."), description=says
    )
    entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
    for names, settings in run.options:
        entry.add_argument(*names, **settings)
    entry.set_defaults(run=run)
    return entry


def name_of(run: Command) -> str:
    """Return the name of a function's command."""
    return run.__name__.rstrip("_").replace("_", "-")


def utf8(argument: str) -> str:
    """Return an argument as UTF-8, whatever the locale took it for. Not for names of files."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def duration(text: str) -> float:
    """Return the seconds of a duration like 30, 90m, 5min, 1.5h or 2d."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


# -------------------------------------------------------------------------- arguments of commands


def some_text(text: str) -> str:
    """Return a text of 1 to 1000 characters."""
    text = utf8(text)
    if not 0 < len(text) <= 1000:
        raise argparse.ArgumentTypeError("it is a text of 1 to 1000 characters")
    return text


def option(*names: str, **settings) -> tuple:
    """Describe an argument of a command, as argparse's add_argument takes it."""
    return names, settings


def span_option(name: str, help: str, **settings) -> tuple:
    """Describe an option that takes a duration."""
    return option(name, metavar="DURATION", type=duration, help=help, **settings)


def flag(*names: str, **settings) -> tuple:
    """Describe an option without a value."""
    return option(*names, action="store_true", **settings)


def takes(*options: tuple) -> Callable:
    """Declare the arguments of a command beside the function that runs it."""

    def declare(run: Command) -> Command:
        run.options = options
        return run

    return declare


def json_object(text: str) -> dict:
    """Return the object of a JSON text. Raises ArgumentTypeError."""
    try:
        value = q.parse_json(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value


IDS = option("ids", metavar="ID", nargs="+", type=some_text)
MAYBE_IDS = option("ids", metavar="ID", nargs="*", type=some_text)
QUEUES = option("queues", metavar="QUEUE", nargs="+", type=some_text)
WHOSE = option("--queue", metavar="QUEUE", type=utf8, help="where several queues have that id")
EACH_QUEUE = option(
    "--queue",
    dest="queues",
    metavar="QUEUE",
    type=utf8,
    action="append",
    help="may be given several times",
)
TYPE = option("--type", dest="task_type", metavar="TYPE", type=utf8)


# ---------------------------------------------------------------------------- exit codes, complaints


def say_all(lines: Iterable[str]) -> None:
    """Print remarks on stderr."""
    for line in lines:
        print(visible(line), file=sys.stderr, flush=True)


def run(who: str, work: Callable[[], int]) -> int:
    """Return work()'s exit code; an error that is no fault of ours becomes one line and a code."""
    open_standard_streams()
    # A state that cannot be used must not be replaced by the usual one.
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


def answer_for(script: str, work: Callable[[], int]) -> int:
    """Return work()'s exit code, for install.py and its like; an error becomes one line."""
    try:
        return work()
    except WrongUse as error:
        return complain(EX_USAGE, script, error)
    except Trouble as trouble:
        return complain(EX_FAILED, script, trouble)
    except OSError as error:
        where = error.filename or "the installation"
        return complain(
            EX_FAILED,
            script,
            f"{where}: {error.strerror}; mend that, then run the same command again",
        )
    except KeyboardInterrupt:
        return complain(
            EX_FAILED, script, "interrupted; run the same command again to finish what was begun"
        )


def code_of(error: Exception) -> int:
    """Return the exit code of a QueueError."""
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


def open_standard_streams() -> None:
    """Open /dev/null for each standard stream that was closed, so that no file takes its number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def complain(code: int, who: str, error: object) -> int:
    """Print one line on stderr, and return `code`."""
    try:
        line = f"{as_typed(who)}: {' '.join(str(error).split())}"
        print(visible(line), file=sys.stderr, flush=True)
    except OSError:
        mute(2)
    return code


def mute(fd: int) -> None:
    """Send a stream that nobody reads to /dev/null, so that no buffered rest fails at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), fd)


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""

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


def put_json(value: object, indent: int | None = 2) -> None:
    """Print JSON in ASCII, which escapes control characters and suits any terminal's encoding."""
    print(json.dumps(value, indent=indent))


def report(as_json: bool, value: object, text: str) -> None:
    """Print a value as JSON for scripts, or a text for people."""
    if as_json:
        put_json(value)
    else:
        print(visible_lines(text))
