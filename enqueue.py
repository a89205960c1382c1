#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Put a task into a queue. It is on disk when this prints its id and exits 0.

    enqueue.py notifications link_validation '{"workspace_path": "/home/user/docs"}'
    generate | enqueue.py approvals review --jsonl          one payload a line, all or none
    enqueue.py --hook notifications link_validation         as the command of a Claude Code hook

usage: enqueue.py QUEUE TASK_TYPE [DATA] [options]
       enqueue.py QUEUE [TASK_TYPE] --jsonl [options]
       enqueue.py --hook QUEUE [TASK_TYPE] [options]

DATA is a JSON object. `-` reads it from stdin, and without it the data is {}. TASK_TYPE names the
handler. This prints `queued ID`. Where a task with that id waits or runs already, it prints
`duplicate ID`, or with --on-duplicate `updated ID`. With --hook it prints nothing.

A DURATION is a number of seconds, or a number with a unit like 90m, 5min, 1.5h or 2d. A TIME is
like 23:30 (the next one), "tomorrow 9:00" or 2026-12-01T09:00: it is local time unless it names a
zone. A time that has passed is refused.

  --task-id ID          The id is unique among the queue's waiting and running tasks. (default: random)
  --delay DURATION      The task is not started before this long from now.
  --at TIME             The task is not started before this time.
  --hold                The task waits until a person approves it.
  --ttl DURATION        A task that is not started by then ends as expired.
  --priority N          Tasks with a higher number are started first. (default 0)
  --group KEY           Tasks of one group of the queue run one at a time, in order.
  --on-duplicate WHAT   This says what becomes of a task whose id waits or runs already. With skip,
                        the default, nothing. With replace and rerun the waiting task takes the new
                        data, and with --delay the new time; a running one runs once more with it.
                        rerun looks at --window only where the same firing of a hook is told twice.
  --window DURATION     A task with this id that was enqueued this recently and is finished makes
                        this one a duplicate, too. (default 0, and 10 with --hook)
  --wait DURATION       This long is waited for the database. (default 5; a hook waits for 1 second,
                        in which it also reads stdin, and then its task goes to the spool)
  --jsonl               Each line of stdin is a task: its payload, or without TASK_TYPE an object
                        with task_type and any of data, task_id, delay, at, hold, ttl, priority,
                        group, on_duplicate and window.
  --new                 A queue that is made for this task is not remarked on.
  --start-worker        A detached worker is started if none serves the queue.
  --worker-from DIR     The worker is that of the scripts in DIR. (default: beside this one)
  --version             The version is printed.
  -h, --help            This text is printed.

  --hook                Stdin is a hook's payload and becomes the task's data, with workspace_path
                        from its cwd and project_dir from CLAUDE_PROJECT_DIR. TASK_TYPE is the name
                        of the event unless it is given.
  --data JSON           These fields are added to the payload's, and win over them. Of a hook's task,
                        a handler takes rights (like permission_mode) from here, never from the
                        payload.
  --once-per KEY        KEY says what makes two firings of a hook one task: the same session,
                        workspace or content. (default: everything in the payload)
  --group-by KEY        The group is the hook's workspace, project or session.
  --nested              The hook enqueues even inside a handler's own run.

exit codes: 0 stored (or a duplicate); 1 the database cannot be used; 64 usage; 65 the task was
refused; 75 the database is locked, try again. Never 2, which would block Claude Code.
"""

import io
import json
import os
import sys
import time

STARTED = time.monotonic()

# argparse would cost a hook 12 ms.
import getopt  # noqa: E402

try:
    import queue_helpers as q
except Exception as _error:
    # A hook has one chance to say why.
    sys.exit(f"enqueue.py: queue_helpers.py cannot be loaded ({_error}): run just install again")

EX_FAILED, EX_USAGE, EX_DATAERR, EX_TEMPFAIL = 1, 64, 65, 75
# The same firing, told by two hooks, comes within this time.
HOOK_WINDOW_SECONDS = 10.0
HOOK_WAIT_SECONDS = 1.0
# The part of its time that a hook may spend on reading stdin.
STDIN_SHARE = 0.75
# A hook's payload is taken as whole when it parses and nothing follows for this long.
QUIET_SECONDS = 0.02
# No more of a payload is read.
MOST_BYTES = 64 * 2**20

FLAGS = ("hook", "jsonl", "hold", "new", "start-worker", "nested", "version", "help")
OPTIONS = {
    "task-id": str,
    "delay": q.parse_duration,
    "at": q.parse_time,
    "ttl": q.parse_duration,
    "priority": int,
    "group": str,
    "on-duplicate": str,
    "window": q.parse_duration,
    "wait": q.parse_duration,
    "data": lambda text: parse_object(text.encode("utf-8", "surrogateescape"))[0],
    "once-per": str,
    "group-by": str,
    "worker-from": str,
}
CHOICES = {
    "on-duplicate": ("skip", "replace", "rerun"),
    "once-per": ("session", "workspace", "content"),
    "group-by": ("workspace", "project", "session"),
}
# What a line of --jsonl may say of its task; these three are read like the options.
LINE_KEYS = {
    *("task_type", "data", "task_id", "delay", "at", "hold", "ttl", "priority", "group"),
    *("on_duplicate", "window"),
}
LINE_TIMES = {"delay": q.parse_duration, "ttl": q.parse_duration, "window": q.parse_duration}
LINE_TIMES["at"] = q.parse_time

# Of --once-per content: what an event says that is the same when the same happens again. Claude
# Code adds fields to its events, so for these only what is named here counts.
CONTENT = {
    "SessionStart": "source",
    "SessionEnd": "reason",
    "UserPromptSubmit": "prompt",
    "PreToolUse": "tool_name tool_input",
    "PermissionRequest": "tool_name tool_input",
    "PostToolUse": "tool_name tool_input tool_response",
    "PostToolUseFailure": "tool_name tool_input error",
    "PostToolBatch": "tool_calls",
    "Notification": "notification_type title message",
    "Stop": "last_assistant_message",
    "SubagentStop": "agent_type last_assistant_message",
    "StopFailure": "error error_details last_assistant_message",
    "PreCompact": "trigger custom_instructions",
    "FileChanged": "file_path event",
    "TaskCompleted": "task_subject task_description",
}
# Of any other event all counts but these: better one task too many than one too few.
PER_FIRING = {
    *("session_id", "prompt_id", "transcript_path", "tool_use_id", "duration_ms", "agent_id"),
    *("agent_transcript_path", "background_tasks", "session_crons", "effort", "permission_mode"),
    *("stop_hook_active", "model", "session_title", "timestamp", "numbers_kept_as_text"),
}


class Arguments:
    """The command line. Raises ValueError for wrong use."""

    task_type: str | None = None
    data: str | None = None
    task_id: str | None = None
    delay = 0.0
    at: float | None = None
    ttl: float | None = None
    priority = 0
    group: str | None = None
    on_duplicate = "skip"
    window: float | None = None
    wait: float | None = None
    once_per: str | None = None
    group_by: str | None = None
    worker_from: str | None = None
    hook = jsonl = hold = new = start_worker = nested = version = help = False

    granted: dict | None = None

    def __init__(self, argv: list[str]) -> None:
        try:
            found, words = getopt.gnu_getopt(argv, "h", [*FLAGS, *(f"{name}=" for name in OPTIONS)])
        except getopt.GetoptError as error:
            raise ValueError(error) from None
        for option, text in found:
            name = {"-h": "help"}.get(option, option[2:])
            attribute = "granted" if name == "data" else name.replace("-", "_")
            setattr(self, attribute, read_option(name, text))
        if not (self.help or self.version):
            self.take_words(words)
            self.check()

    def take_words(self, words: list[str]) -> None:
        if len(words) < (1 if self.hook or self.jsonl else 2):
            raise ValueError("QUEUE and TASK_TYPE are required")
        if len(words) > 3:
            raise ValueError(f"{words[3]!r} is one word too many")
        self.queue = words[0]
        self.task_type = words[1] if len(words) > 1 else None
        self.data = words[2] if len(words) > 2 else None

    def check(self) -> None:
        """Refuse what cannot be meant together."""
        if (self.hook or self.jsonl) and (self.data is not None or self.task_id is not None):
            raise ValueError(
                "with --hook or --jsonl the tasks come on stdin: no DATA, no --task-id"
            )
        if self.hook and self.jsonl:
            raise ValueError("--hook goes without --jsonl")
        if (self.once_per or self.group_by or self.granted is not None) and not self.hook:
            raise ValueError("--once-per, --group-by and --data go with --hook")
        if self.group is not None and self.group_by:
            raise ValueError("--group and --group-by both name the group: give one of them")
        if bool(self.delay) + (self.at is not None) + self.hold > 1:
            raise ValueError("--delay, --at and --hold each say when: give one of them")
        # A hook's firing may be taken in later than it was meant to run.
        if self.at is not None and self.at <= time.time() and not self.hook:
            when = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(self.at))
            raise ValueError(f"--at: {when} has passed; give a time to come, or leave out --at")

    def terms(self) -> dict:
        """What new_row() is told of each task."""
        names = ("delay", "at", "ttl", "priority", "group", "hold", "on_duplicate")
        default = HOOK_WINDOW_SECONDS if self.hook else 0.0
        window = default if self.window is None else self.window
        return {**{name: getattr(self, name) for name in names}, "window": window}


def read_option(name: str, text: str) -> object:
    """The value of an option. Raises ValueError."""
    if name not in OPTIONS:
        return True
    if name in CHOICES and text not in CHOICES[name]:
        raise ValueError(f"--{name} takes {' or '.join(CHOICES[name])}, not {text!r}")
    try:
        return OPTIONS[name](text)
    except ValueError as error:
        why = f"{text!r} is not a whole number" if OPTIONS[name] is int else error
        raise ValueError(f"--{name}: {why}") from None


def main(argv: list[str] | None = None) -> int:
    q.go_back()
    try:
        args = Arguments(command_line() if argv is None else argv)
    except ValueError as error:
        return fail(EX_USAGE, f"{error}; see enqueue.py --help")
    if args.help or args.version:
        say(str(__doc__) if args.help else f"enqueue.py {q.VERSION}\n")
        return 0
    if q.state_complaint and not args.hook:
        return fail(EX_USAGE, q.state_complaint)
    try:
        code = hook(args) if args.hook else enqueue(args)
        if args.start_worker and code == 0:
            start_worker(args.queue, args.worker_from)
        return code
    except q.InvalidTask as error:
        return fail(EX_DATAERR, error, hook=args.hook)
    except q.QueueBusy as error:
        return fail(EX_TEMPFAIL, error, hook=args.hook)
    except q.QueueError as error:
        return fail(EX_FAILED, error, hook=args.hook)


def command_line() -> list[str]:
    """The arguments as UTF-8, whatever encoding the locale has."""
    return [from_bytes(os.fsencode(word)) for word in sys.argv[1:]]


def from_bytes(raw: bytes) -> str:
    """A path or an argument, as os.fsdecode() has it in a UTF-8 locale."""
    return raw.decode("utf-8", "surrogateescape")


def fail(code: int, message: object, *, hook: bool = False) -> int:
    """Say what is wrong in one line; the code. A person is told commands as people type them."""
    # print() would take stdout where there is no stderr.
    if sys.stderr is not None:
        from taskqueue.text import visible

        line = " ".join(f"enqueue.py: {message}".split())
        if not hook:
            from taskqueue import cli as queue_cli

            line = queue_cli.remedies_as_typed(line)
        try:
            print(visible(line), file=sys.stderr)
        except OSError:
            pass
    return code


def say(text: str) -> None:
    """Write to stdout, if it is there; what its encoding lacks is escaped."""
    if sys.stdout is None:
        return
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        # The reader has gone; the tasks are stored.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def start_worker(queue: str, directory: str | None) -> None:
    """Start a worker for the stored task; that none can be started is no failure."""
    try:
        from taskqueue import launch as queue_launch

        queue_launch.start_worker(queue, directory)
    except (ImportError, OSError, ValueError, q.QueueError) as error:
        fail(0, f"the task is stored, but no worker could be started: {error}", hook=True)


# ---------------------------------------------------------------------------------- the command line


def enqueue(args: Arguments) -> int:
    """Store the tasks of the command line or of stdin, all or none, and say what became of each."""
    from taskqueue.text import visible

    q.check_queue_name(args.queue)
    rows = tasks_of_lines(args) if args.jsonl else [task_of_command_line(args)]
    wait = None if args.wait is None else milliseconds(args.wait)
    conn = q.connect(busy_timeout_ms=wait)
    made = q.ensure_queue(conn, args.queue)
    stored = q.enqueue_tasks(args.queue, rows, busy_timeout_ms=wait)
    lines = [
        f"{'queued' if is_new else 'duplicate' if row.on_duplicate == 'skip' else 'updated'} {visible(task_id)}"
        for row, (task_id, is_new) in zip(rows, stored, strict=True)
    ]
    if lines:
        notes = [f"a new queue: {args.queue}"] if made and not args.new else []
        notes += notes_on(args, conn, rows)
        lines[0] += f" ({'; '.join(notes)})" if notes else ""
    say("".join(f"{line}\n" for line in lines))
    return 0


def notes_on(args: Arguments, conn: q.Connection, rows: list[q.Row]) -> list[str]:
    """Say when the tasks start, and what keeps them from it: no worker, or no handler."""
    from taskqueue import serving
    from taskqueue.text import visible

    notes = []
    if args.at is not None:
        from taskqueue.cli import ago, clock

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
    """A time to wait, within what SQLite takes."""
    return max(20, min(int(seconds * 1000), 3_600_000))


def task_of_command_line(args: Arguments) -> q.Row:
    if args.data == "-":
        raw = stdin().read()
    else:
        raw = b"{}" if args.data is None else args.data.encode("utf-8", "surrogateescape")
    data, text = parse_object(raw)
    return q.new_row(args.task_type or "", data, args.task_id, text=text, **args.terms())


def tasks_of_lines(args: Arguments) -> list[q.Row]:
    rows, terms = [], {**args.terms(), "depth": q.task_depth()}
    for number, line in enumerate(stdin(), 1):
        if line.isspace():
            continue
        try:
            task, text = parse_object(line)
            if args.task_type is None:
                rows.append(q.new_row(**{**terms, "data": {}, **terms_of_line(task)}))
            else:
                rows.append(q.new_row(args.task_type, task, text=text, **terms))
        except q.InvalidTask as error:
            raise q.InvalidTask(f"line {number}: {error}; nothing was stored") from None
    return rows


def terms_of_line(task: dict) -> dict:
    """What a whole task in a line says, its times read like the options."""
    if "task_type" not in task or not task.keys() <= LINE_KEYS:
        odd = sorted(task.keys() - LINE_KEYS)
        why = f"{odd[0]!r} is not known" if odd else "task_type is missing"
        raise q.InvalidTask(f"{why}: without TASK_TYPE a line is an object; see enqueue.py --help")
    if type(task.get("hold", False)) is not bool:
        raise q.InvalidTask(f"hold {task['hold']!r} was refused: it is true or false")
    if task.get("hold") and (task.get("delay") or task.get("at") is not None):
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


def stdin() -> io.BufferedIOBase:
    """Stdin, in bytes; an empty one where it is closed."""
    return io.BytesIO() if sys.stdin is None else sys.stdin.buffer


def parse_object(raw: bytes) -> tuple[dict, str]:
    """A JSON object and its text."""
    try:
        text = raw.decode().removeprefix("\ufeff").strip(" \t\r\n")
        value = q.parse_json(text)[0]
    except UnicodeDecodeError as error:
        raise q.InvalidTask(f"not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise q.InvalidTask(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise q.InvalidTask(f"a JSON {type(value).__name__}, not an object like {{}}")
    return value, text


# ---------------------------------------------------------------------------------------------- hook


def hook(args: Arguments) -> int:
    """Store one task for one firing: in the database, else in the spool; raises when it is in
    neither.
    """
    if q.task_depth() and not args.nested:
        # It was fired by a handler's own run: work must not start itself again.
        return 0
    q.check_queue_name(args.queue)
    if q.state_complaint:
        fail(0, f"{q.state_complaint}; until then the task goes to {q.STATE_DIR}", hook=True)
        q.state_complaint = None
    seconds = max(HOOK_WAIT_SECONDS if args.wait is None else args.wait, 0.1)
    deadline = STARTED + seconds
    project = from_bytes(os.environb.get(b"CLAUDE_PROJECT_DIR", b""))
    raw = read_stdin(STARTED + seconds * STDIN_SHARE)
    row = row_of_firing(args, raw, project=project)
    if isinstance(row, str):
        return fail(0, row, hook=True)
    try:
        store(args.queue, row, deadline)
    except q.InvalidTask:
        raise
    except q.QueueError as error:
        try:
            q.spool(args.queue, for_the_spool(row))
        except OSError as spool_error:
            raise q.QueueUnavailable(
                f"{error}; and the spool: {spool_error.strerror}; the task is lost"
            ) from None
    return 0


def store(queue: str, row: q.Row, deadline: float) -> None:
    """Store a hook's task in what is left of its time. An older database is left to a worker."""

    def connect() -> q.Connection:
        left = milliseconds(deadline - time.monotonic())
        return q.connect(busy_timeout_ms=left, migrate=False)

    q.ensure_queue(connect(), queue)
    left = milliseconds(deadline - time.monotonic())
    q.enqueue_tasks(queue, [row], busy_timeout_ms=left, migrate=False)


def for_the_spool(row: q.Row) -> str:
    """A row as the text of a spooled task: its envelope, and the columns that are not in there."""
    columns = {name: value for name, value in row._asdict().items() if name != "data"}
    return f'{row.data[:-1]}, "spooled_row": {q.to_json(columns)}}}'


def hook_row(words: list[str], raw: bytes, directory: str, project: str, depth: int) -> q.Row | str:
    """The row of a firing that hook.sh put into the spool, or a text that says why there is none.

    It is told the hook's arguments, its payload, where it was fired, CLAUDE_PROJECT_DIR, and how
    deep in handlers that was. Raises ValueError, InvalidTask.
    """
    return row_of_firing(Arguments(["--hook", *words]), raw, directory, project, depth)


def row_of_firing(
    args: Arguments, raw: bytes, directory: str = "", project: str = "", depth: int | None = None
) -> q.Row | str:
    """The row of a firing, from its payload; or a text that says why there is none."""
    data = payload(raw, directory, project)
    if data.get("hook_event_name") == "WorktreeCreate":
        return (
            "a WorktreeCreate hook makes the creation of worktrees fail, since Claude Code waits for "
            "the new path on its stdout: take it out of the settings; no task was stored"
        )
    task_type = args.task_type or type_of_event(data, args.queue)
    granted = args.granted or {}
    data |= granted
    terms = {**args.terms(), "granted": granted}
    if args.group_by:
        terms["group"] = group_of(data, args.group_by)
    if args.on_duplicate != "skip":
        terms["firing"] = digest(data)
    task_id = id_of(data, task_type, args.once_per)
    return q.new_row(task_type, data, task_id, depth=depth, **terms)


def read_stdin(deadline: float) -> bytes:
    """What comes on stdin until its end, until the payload is whole, or until the deadline."""
    import select

    raw, tried = bytearray(), 0
    try:
        while not os.isatty(0) and len(raw) < MOST_BYTES:
            left = deadline - time.monotonic()
            # It may never be closed.
            quiet = len(raw) > tried and raw[-8:].rstrip().endswith(b"}")
            if select.select([0], [], [], max(0.0, min(left, QUIET_SECONDS) if quiet else left))[0]:
                chunk = os.read(0, 2**20)
                raw += chunk
                if not chunk or left <= 0:
                    break
            elif left <= 0 or quiet and "unreadable_payload" not in q.as_payload(bytes(raw)):
                break
            else:
                tried = len(raw)
    except (OSError, ValueError):
        # It is closed, or not readable.
        pass
    return bytes(raw)


def payload(raw: bytes, directory: str = "", project: str = "") -> dict:
    """A task's data: the hook's payload, with workspace_path and project_dir.

    workspace_path is its cwd, else the directory it was fired in. project_dir is the main checkout,
    while cwd follows worktrees.
    """
    data = q.as_payload(raw)
    cwd = data.get("cwd")
    if not isinstance(data.get("workspace_path"), str):
        try:
            fired_in = directory or from_bytes(os.getcwdb())
        except OSError:
            # The directory is gone.
            fired_in = ""
        workspace = cwd if isinstance(cwd, str) and cwd else fired_in
        data |= {"workspace_path": workspace} if workspace else {}
    if project and "project_dir" not in data:
        data["project_dir"] = project
    return data


def type_of_event(data: dict, otherwise: str) -> str:
    """The event's name, unless it cannot name a handler."""
    event = data.get("hook_event_name")
    try:
        q.new_row(event, {}, depth=0)  # type: ignore[arg-type]
        return str(event)
    except q.InvalidTask:
        return otherwise


# Where a payload does not say the first, its workspace is the group.
GROUPS = {
    "workspace": ("workspace_path",),
    "project": ("project_dir", "workspace_path"),
    "session": ("session_id", "workspace_path"),
}


def group_of(data: dict, what: str) -> str | None:
    """The group of a firing, None when it has neither a session, a project nor a workspace."""
    for name in GROUPS[what]:
        value = data.get(name)
        if isinstance(value, str) and value:
            try:
                return q.check_text("group", value, 500)
            except q.InvalidTask:
                return f"{what}-{digest(value)}"
    return None


def id_of(data: dict, task_type: str, once_per: str | None) -> str:
    """The same firing gives the same id, wherever and however often it is told; another gives
    another.

    An id ends with 64 bits of a digest: beside a million waiting tasks, a new one has somebody
    else's id once in 18 trillion firings.
    """
    return f"{task_type[:8]}-{digest([task_type, what_counts(data, once_per)])}"


def what_counts(data: dict, once_per: str | None) -> object:
    """What makes two firings one task."""
    workspace = data.get("workspace_path")
    if once_per == "session":
        return [workspace, data.get("session_id")]
    if once_per == "workspace":
        return [workspace]
    if once_per == "content":
        return [workspace, content_of(data)]
    return data


def content_of(data: dict) -> dict:
    """What of a firing is the same when the same happens again."""
    event = data.get("hook_event_name")
    named = CONTENT.get(event) if isinstance(event, str) else None
    if named is None:
        return without_per_firing(data)
    content = {key: data.get(key) for key in named.split()}
    calls = content.get("tool_calls")
    if isinstance(calls, list):
        content["tool_calls"] = [
            without_per_firing(call) if isinstance(call, dict) else call for call in calls
        ]
    return {"hook_event_name": event, **content}


def without_per_firing(data: dict) -> dict:
    return {key: value for key, value in data.items() if key not in PER_FIRING}


def digest(value: object) -> str:
    """16 hexadecimal digits that name a JSON value."""
    try:
        # hashlib loads OpenSSL, which takes 3 ms.
        from _sha2 import sha256  # type: ignore[import-not-found]
    except ImportError:
        try:
            # Its name until Python 3.11.
            from _sha256 import sha256  # type: ignore[import-not-found]
        except ImportError:
            from hashlib import sha256
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    code = main()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        pass
    finally:
        # All is on disk: neither Python's own end nor SQLite's clean-up is worth a hook's time.
        os._exit(code)
