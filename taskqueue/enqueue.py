"""Put tasks into a queue: the body of enqueue.py. Its options are in taskqueue/arguments.py."""

from __future__ import annotations

import io
import json
import os
import sys
import time

import queue_helpers as q
from taskqueue import hook as hooks
from taskqueue.arguments import LINE_KEYS, LINE_TIMES, Arguments, RunArguments, parse_object
from taskqueue.text import visible

if q.TYPE_CHECKING:
    from typing import BinaryIO, NoReturn

EX_USAGE = 64
EXIT_CODES = {q.InvalidTask: 65, q.QueueBusy: 75, q.QueueUnavailable: 1}
# How long a hook waits for the database, and for its payload.
HOOK_WAIT_SECONDS, STDIN_SECONDS = 1.0, 0.75
# How much of a payload a hook reads.
MOST_BYTES = 64 * 2**20


def main(argv: list[str] | None = None, help_text: str | None = None) -> int:
    argv = command_line() if argv is None else argv
    try:
        args = RunArguments(argv[1:]) if argv[:1] == ["--run"] else Arguments(argv)
    except ValueError as error:
        return fail(EX_USAGE, f"{error}; see enqueue.py --help")
    if args.help or args.version:
        say(help_as_typed(help_text) if args.help else f"enqueue.py {q.VERSION}\n")
        return 0
    if q.state_complaint and not args.hook:
        return fail(EX_USAGE, q.state_complaint)
    try:
        words = [word for word in argv if word != "--hook"]
        code = hook(args, words) if args.hook else enqueue(args)
        if args.start_worker and code == 0:
            start_worker(args.queue)
        return code
    except q.QueueError as error:
        code = getattr(error, "exit_code", None) or EXIT_CODES[type(error)]
        return fail(code, error, hook=args.hook)


def help_as_typed(text: str | None) -> str:
    from taskqueue.remedies import remedies_as_typed

    return remedies_as_typed(str(text))


def command_line() -> list[str]:
    """Return the arguments as UTF-8, whatever the locale's encoding."""
    return [hooks.from_bytes(os.fsencode(word)) for word in sys.argv[1:]]


def fail(code: int, message: object, *, hook: bool = False) -> int:
    """Say what is wrong in one line and return the code. A person reads commands as people type them."""
    # Without a stderr, print() would write to stdout.
    if sys.stderr is not None:
        who, text = "enqueue.py", str(message)
        if not hook:
            from taskqueue.remedies import as_typed, remedies_as_typed

            who, text = as_typed(who), remedies_as_typed(text)
        line = f"{who}: {' '.join(text.split())}"
        try:
            print(visible(line), file=sys.stderr)
        except OSError:
            pass
    return code


def say(text: str) -> None:
    """Write to stdout, unless it is closed, and escape characters that its encoding lacks."""
    if sys.stdout is None:
        return
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        # The reader is gone, and the tasks are stored.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def start_worker(queue: str) -> None:
    """Start a worker for the stored task. A failure to do so is only a remark."""
    try:
        from taskqueue import service

        service.start_worker(queue)
    except (ImportError, OSError, ValueError, q.QueueError) as error:
        fail(0, f"the task is stored, but no worker could be started: {error}", hook=True)


# ---------------------------------------------------------------------------------- the command line


def enqueue(args: Arguments) -> int:
    """Store the tasks of the command line or of stdin, all or none, and print a line for each."""
    q.check_queue_name(args.queue)
    rows = tasks_of_lines(args) if args.jsonl else [task_of_command_line(args)]
    wait = None if args.wait is None else milliseconds(args.wait)
    made, stored = store(args.queue, rows, wait)
    notes = [f"a new queue: {args.queue}"] if made and not args.new else []
    notes += notes_on(args, rows) if stored else []
    said = [
        ("queued" if task.is_new else "updated" if task.is_updated else "duplicate", task.task_id)
        for task in stored
    ]
    if args.json:
        told = {"queue": args.queue, "notes": notes}
        lines = [json.dumps({"outcome": did, "task_id": ident, **told}) for did, ident in said]
    else:
        lines = [f"{did} {visible(ident)}" for did, ident in said]
        if notes:
            lines[0] += f" ({'; '.join(notes)})"
    say("".join(f"{line}\n" for line in lines))
    return 0


def notes_on(args: Arguments, rows: list[q.Row]) -> list[str]:
    """Return remarks: when the tasks start, and that no worker or no handler serves them."""
    from taskqueue import serving

    notes, conn = [], q.connect()
    if args.at is not None:
        from taskqueue.text import ago, clock

        notes.append(f"starts at {clock(args.at)}, {ago(args.at)}")
    runner = serving.runner_of(conn, conn.state, args.queue)
    is_held = all(row.status == q.SCHEDULED and row.due_at is None for row in rows)
    if not (args.start_worker or is_held):
        notes.append(serving.remark(args.queue, runner.kind))
    types = {args.task_type} if args.task_type else {type_in(row.data) for row in rows}
    notes += serving.unhandled_types(types, runner)
    return [visible(note) for note in notes if note]


def type_in(envelope: str) -> str:
    return json.loads(envelope)["task_type"]


def milliseconds(seconds: float) -> int:
    """Return a waiting time that SQLite takes: 20 ms to an hour."""
    return max(20, min(int(seconds * 1000), 3_600_000))


def task_of_command_line(args: Arguments) -> q.Row:
    if isinstance(args, RunArguments):
        return q.new_row("run", args.payload(), args.task_id, argv=args.command, **args.terms())
    if args.data == "-":
        raw = stdin().read()
    else:
        raw = b"{}" if args.data is None else args.data.encode("utf-8", "surrogateescape")
    data, text = parse_object(raw)
    return q.new_row(args.task_type or "", data, args.task_id, text=text, **args.terms())


def tasks_of_lines(args: Arguments) -> list[q.Row]:
    from taskqueue.progress import progress

    rows, terms = [], {**args.terms(), "depth": q.task_depth()}
    with progress("read", None, "lines") as shown:
        for number, line in enumerate(stdin(), 1):
            shown.advance()
            if not line.isspace():
                rows.append(task_of_line(args, number, line, terms))
    return rows


def task_of_line(args: Arguments, number: int, line: bytes, terms: dict) -> q.Row:
    """Return the task of a line. Raises InvalidTask, which names the line."""
    try:
        task, text = parse_object(line)
        if args.task_type is None:
            return q.new_row(**{**terms, "data": {}, **terms_of_line(task)})
        return q.new_row(args.task_type, task, text=text, **terms)
    except q.InvalidTask as error:
        raise q.InvalidTask(f"line {number}: {error}; nothing was stored") from None


def terms_of_line(task: dict) -> dict:
    """Return new_row()'s arguments from a line that is a whole task, its times read like the options."""
    if "task_type" not in task or not task.keys() <= LINE_KEYS:
        odd = sorted(task.keys() - LINE_KEYS)
        why = f"{odd[0]!r} is not known" if odd else "task_type is missing"
        raise q.InvalidTask(f"{why}: without TASK_TYPE a line is an object; see enqueue.py --help")
    if type(task.get("hold", False)) is not bool:
        raise q.InvalidTask(f"hold {task['hold']!r} was refused: it is true or false")
    if bool(task.get("delay")) + (task.get("at") is not None) + bool(task.get("hold")) > 1:
        raise q.InvalidTask("delay, at and hold each say when: give one of them")
    try:
        times = {
            name: read(task[name])
            for name, read in LINE_TIMES.items()
            if isinstance(task.get(name), str)
        }
    except ValueError as error:
        raise q.InvalidTask(error) from None
    return {**task, **times}


def stdin() -> BinaryIO:
    """Return stdin as bytes, an empty one where it is closed."""
    return io.BytesIO() if sys.stdin is None else sys.stdin.buffer


# ---------------------------------------------------------------------------------------------- hook


def hook(args: Arguments, words: list[str]) -> int:
    """Store one task for one firing: in the database, else in the spool as bin/hook.sh does."""
    if q.task_depth() and not args.nested:
        # The run of a handler fired it: work must not start itself again.
        return 0
    q.check_queue_name(args.queue)
    if q.state_complaint:
        fail(0, f"{q.state_complaint}; until then the task goes to {q.STATE_DIR}", hook=True)
        q.state_complaint = None
    firing = hooks.firing_here(words, read_stdin())
    try:
        row = hooks.row_of(firing, args)
    except hooks.NoTask as why:
        return fail(0, why, hook=True)
    try:
        store(
            args.queue, [row], milliseconds(HOOK_WAIT_SECONDS if args.wait is None else args.wait)
        )
    except q.InvalidTask:
        raise
    except q.QueueError as error:
        try:
            q.spool(args.queue, hooks.write(firing), suffix=".hook")
        except OSError as spool_error:
            raise q.QueueUnavailable(
                f"{error}; and the spool: {spool_error.strerror}; the task is lost"
            ) from None
    return 0


def store(queue: str, rows: list[q.Row], wait: int | None) -> tuple[bool, list[q.Stored]]:
    """Store rows, behind the firings that hooks have left.

    Returns whether the queue is new, and what became of each row.
    """
    conn = q.connect(busy_timeout_ms=wait)
    made = q.ensure_queue(conn, queue)
    q.take_in(conn, queue)
    return made, q.enqueue_tasks(queue, rows, busy_timeout_ms=wait)


def read_stdin() -> bytes:
    """Return stdin's bytes until its end, for STDIN_SECONDS at most: it may never be closed."""
    import select

    raw, deadline = bytearray(), time.monotonic() + STDIN_SECONDS
    try:
        while not os.isatty(0) and len(raw) < MOST_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([0], [], [], left)[0]:
                break
            chunk = os.read(0, 2**20)
            raw += chunk
            if not chunk:
                break
    except (OSError, ValueError):
        # Stdin is closed, or not readable.
        pass
    return bytes(raw)


def leave(code: int) -> NoReturn:
    """End the process without the clean-up of Python and SQLite, which takes time and serves nobody."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        pass
    finally:
        os._exit(code)
