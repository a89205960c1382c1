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

DATA is a JSON object, `-` reads it from stdin, nothing means {}. TASK_TYPE names the handler. Prints `queued ID`, or
`duplicate ID` when a task with that id is waiting or running already; with --hook nothing.

  --task-id ID          unique among the queue's waiting and running tasks (default: random)
  --delay SECONDS       not before this long from now
  --priority N          higher is claimed first (default 0)
  --window SECONDS      a task enqueued this recently and finished is a duplicate, too (default 0; with --hook 10)
  --jsonl               a task per line of stdin: its payload, or without TASK_TYPE {"task_type", "data", "task_id"}
  --start-worker        start a detached worker if none serves the queue
  --hook                stdin is a hook's payload: it becomes the task's data, with workspace_path from its cwd;
                        TASK_TYPE is the event's name unless given
  --once-per KEY        session, workspace or content: what makes two firings of a hook one task (default: everything)
  --wait SECONDS        for the database, before a hook's task goes to the spool (default 1)
  --nested              let a hook enqueue even inside a handler's own run
  -h, --help            this text

exit codes: 0 stored (or a duplicate); 1 the database cannot be used; 64 usage; 65 the task was refused;
75 the database is locked, try again. Never 2, which would block Claude Code.
"""

from __future__ import annotations

import getopt  # argparse would cost a hook 12 ms
import io
import json
import os
import sys
import time

STARTED = time.monotonic()

EX_FAILED, EX_USAGE, EX_DATAERR, EX_TEMPFAIL = 1, 64, 65, 75
HOOK_WINDOW_SECONDS = 10.0  # the same firing, reported twice, comes within this time
QUIET_SECONDS = 0.02  # a hook's payload is taken as whole when it parses and nothing follows for this long

# What differs from one firing to the next although nothing that matters does: left out of --once-per content.
PER_FIRING = (
    "session_id",
    "prompt_id",
    "transcript_path",
    "tool_use_id",
    "duration_ms",
    "agent_id",
    "agent_transcript_path",
)

FLAGS = ("hook", "jsonl", "start-worker", "nested", "help")
OPTIONS = {"task-id": str, "delay": float, "priority": int, "window": float, "once-per": str, "wait": float}


class Arguments:
    """The command line. Raises ValueError for a usage error."""

    task_id = once_per = window = task_type = data = None
    delay, priority, wait = 0.0, 0, 1.0
    hook = jsonl = start_worker = nested = help = False

    def __init__(self, argv: list[str]) -> None:
        found, words = getopt.gnu_getopt(argv, "h", [*FLAGS, *(f"{name}=" for name in OPTIONS)])
        for option, text in found:
            name = {"-h": "help"}.get(option, option[2:])
            try:
                setattr(self, name.replace("-", "_"), OPTIONS[name](text) if name in OPTIONS else True)
            except ValueError:
                raise ValueError(f"--{name} takes a number, not {text!r}") from None
        if self.help:
            return
        if not words or len(words) > 3 or len(words) < 2 and not (self.hook or self.jsonl):
            raise ValueError(
                "QUEUE and TASK_TYPE are wanted" if len(words) < 2 else f"{words[3]!r} is one word too many"
            )
        self.queue, self.task_type, self.data = (*words, None, None)[:3]
        if (self.hook or self.jsonl) and (self.data is not None or self.task_id):
            raise ValueError("with --hook or --jsonl the tasks come on stdin: no DATA and no --task-id")
        if self.hook and self.jsonl or self.once_per and not self.hook:
            raise ValueError("--hook goes without --jsonl, and --once-per with --hook")
        if self.once_per not in (None, "session", "workspace", "content"):
            raise ValueError("--once-per takes session, workspace or content")


def main(argv: list[str] | None = None) -> int:
    try:
        args = Arguments(sys.argv[1:] if argv is None else argv)
    except (ValueError, getopt.GetoptError) as error:
        return fail(EX_USAGE, f"{error}; see enqueue.py --help")
    if args.help:
        print(__doc__)
        return 0
    try:
        import queue_helpers as q
    except Exception as error:  # a hook's one chance to say why
        return fail(EX_FAILED, f"queue_helpers.py cannot be loaded ({error}): run just install again")
    try:
        if args.hook:
            code = hook(q, args)
        else:
            code = report(q.enqueue_tasks(args.queue, tasks_from(q, args)))
        if args.start_worker and code == 0:
            try:
                start_worker(q, args.queue)
            except (OSError, q.QueueError) as error:
                fail(0, f"the task is stored, but no worker could be started: {error}")
        return code
    except q.InvalidTask as error:
        return fail(EX_DATAERR, error)
    except q.QueueBusy as error:
        return fail(EX_TEMPFAIL, error)
    except q.QueueError as error:
        return fail(EX_FAILED, error)


def fail(code: int, message: object) -> int:
    if sys.stderr is not None:  # print() would take stdout instead
        try:
            print("enqueue.py: " + " ".join(str(message).split()), file=sys.stderr)
        except OSError:
            pass
    return code


def report(results: list[tuple[str, bool]]) -> int:
    if sys.stdout is None:
        return 0
    try:
        sys.stdout.reconfigure(errors="backslashreplace")  # an id that the terminal's encoding lacks
        sys.stdout.write("".join(f"{'queued' if is_new else 'duplicate'} {task_id}\n" for task_id, is_new in results))
        sys.stdout.flush()
    except OSError:  # the reader has gone; the tasks are stored
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def tasks_from(q, args: Arguments) -> list:
    """The tasks that the command line and stdin describe."""
    options = {"delay": args.delay, "priority": args.priority, "window": args.window or 0.0, "depth": q.task_depth()}
    if not args.jsonl:
        text = stdin().read() if args.data == "-" else ("{}" if args.data is None else args.data)
        data, text = parse_object(q, text)
        return [q.new_row(args.task_type, data, args.task_id, text=text, **options)]
    rows = []
    for number, line in enumerate(stdin(), 1):
        try:
            if line.isspace():
                continue
            task, text = parse_object(q, line)
            if args.task_type is not None:
                rows.append(q.new_row(args.task_type, task, text=text, **options))
            elif "task_type" in task and task.keys() <= {"task_type", "data", "task_id", "delay", "priority"}:
                rows.append(q.new_row(**{**options, "data": {}, **task}))
            else:
                raise q.InvalidTask('without TASK_TYPE a line is {"task_type": …, "data": {…}, "task_id": …}')
        except q.InvalidTask as error:
            raise q.InvalidTask(f"line {number}: {error}; nothing was stored") from None
    return rows


def stdin() -> io.BufferedIOBase:
    """Stdin, in bytes; an empty one where it is closed."""
    return io.BytesIO() if sys.stdin is None else sys.stdin.buffer


def parse_object(q, raw: bytes | str) -> tuple[dict, str]:
    """A JSON object and its text. SQLite has the last word on the text, so what it would refuse is refused here."""
    try:
        raw = raw.encode() if isinstance(raw, str) else raw
        text = raw.decode().removeprefix("\ufeff").strip(" \t\r\n")
        value, end = DECODER.raw_decode(text)  # what decode() does, in half the time
        if end != len(text):
            raise ValueError(f"extra data after character {end}")
    except (ValueError, RecursionError) as error:
        raise q.InvalidTask(f"not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise q.InvalidTask(f"a JSON {type(value).__name__}, not an object like {{}}")
    return value, text


def not_a_number(name: str):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=not_a_number)


# ---------------------------------------------------------------------------------------------------------------- hook


def hook(q, args: Arguments) -> int:
    """Store one task for one firing: in the database, else in the spool; raises when it is in neither."""
    if q.task_depth() and not args.nested:
        return 0  # fired by a handler's own run: work must not start itself again
    q.check_queue_name(args.queue)
    deadline = STARTED + max(args.wait, 0.1)
    row = hook_row(q, args, read_stdin(deadline))
    q.BUSY_TIMEOUT_MS = max(100, int((deadline - time.monotonic()) * 1000))
    try:
        q.enqueue_tasks(args.queue, [row])
    except q.InvalidTask:
        raise
    except q.QueueError as error:
        try:
            q.spool(args.queue, row.data)
        except OSError as spool_error:
            raise q.QueueUnavailable(f"{error}; and the spool: {spool_error.strerror}; the task is lost") from None
    return 0


def hook_row(q, args: Arguments, raw: bytes, directory: str | None = None, depth: int | None = None):
    """The row of a firing, from its payload. A spooled one says in which directory and how deep it was fired."""
    data = payload(raw, directory)
    task_type = args.task_type or data.get("hook_event_name") or args.queue
    try:
        task_type = q.new_row(task_type, {}) and task_type
    except q.InvalidTask:
        if args.task_type:
            raise
        # It is an event's name that cannot name a handler.
        task_type = args.queue
    window = HOOK_WINDOW_SECONDS if args.window is None else args.window
    task_id = firing_id(data, task_type, args.once_per)
    return q.new_row(task_type, data, task_id, delay=args.delay, priority=args.priority, window=window, depth=depth)


def read_stdin(deadline: float) -> bytes:
    """What comes on stdin until its end, or until the payload is whole, or until the deadline: it may never close."""
    import select

    chunks = []
    try:
        if os.isatty(0):
            return b""
        while True:
            left = deadline - time.monotonic()
            whole = bool(chunks) and chunks[-1].rstrip()[-1:] == b"}"
            wait = min(QUIET_SECONDS, max(0.0, left)) if whole else max(0.0, left)
            if not select.select([0], [], [], wait)[0]:
                if left <= 0 or whole and is_whole(b"".join(chunks)):
                    break
                if whole and not select.select([0], [], [], max(0.0, left - wait))[0]:
                    break
                continue
            chunk = os.read(0, 2**20)
            if not chunk:
                break
            chunks.append(chunk)
    except (OSError, ValueError):
        pass  # closed, or not readable
    return b"".join(chunks)


def is_whole(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8-sig", "replace"))
        return True
    except (ValueError, RecursionError):
        return False


def payload(raw: bytes, directory: str | None = None) -> dict:
    """The task's data: the hook's payload and its cwd, else the directory it was fired in, as workspace_path. What cannot be read is kept as it came."""
    text = raw.decode("utf-8-sig", "replace")
    try:
        data, why = json.loads(text, parse_constant=lambda name: name), "not a JSON object"
    except (ValueError, RecursionError) as error:
        data, why = None, f"not JSON: {error}" if raw.strip() else "empty"
    if not isinstance(data, dict) or depth_of(data) > 200:
        data = {"unreadable_payload": text, "unreadable_because": why}
    cwd = data.get("cwd")
    if not isinstance(data.get("workspace_path"), str):
        try:
            data["workspace_path"] = cwd if isinstance(cwd, str) and cwd else directory or os.getcwd()
        except OSError:
            pass  # the directory is gone
    return data


def depth_of(value: object) -> int:
    """How deep a parsed JSON value is nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    return depth


def firing_id(data: dict, task_type: str, once_per: str | None) -> str:
    """The same firing gives the same id, wherever and however often it is reported; another firing another."""
    workspace = digest(data.get("workspace_path"))
    if once_per == "session":
        session = data.get("session_id")
        return f"{task_type}_{workspace}_{session if isinstance(session, str) and session.isprintable() else '-'}"[:200]
    if once_per == "workspace":
        return f"{task_type}_{workspace}"
    if once_per == "content":
        data = {key: value for key, value in data.items() if key not in PER_FIRING}
    return f"{task_type}_{workspace}_{digest(data)}"


def digest(value: object) -> str:
    try:
        from _sha2 import sha256  # hashlib loads OpenSSL, 3 ms
    except ImportError:
        try:
            from _sha256 import sha256  # until 3.11
        except ImportError:
            from hashlib import sha256
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ worker on demand


def start_worker(q, queue: str) -> None:
    """Start a detached worker unless one serves the queue. Ten at once start one: the loser of the lock leaves."""
    import shutil
    import subprocess

    try:
        fd = q.lock_file(q.STATE_DIR / "workers" / f"serving.{queue}", probe=True)
        if fd is None:
            return
        os.close(fd)
    except OSError:
        pass  # nobody ever served it
    here = os.path.dirname(os.path.abspath(__file__))
    home = os.path.expanduser("~")
    places = [*os.environ.get("PATH", "").split(os.pathsep), f"{home}/.local/bin", f"{home}/.cargo/bin", "/opt/homebrew/bin",
              "/usr/local/bin"]  # fmt: skip
    places = [place for place in places if os.path.isabs(place)]  # others would mean the workspace
    uv = os.environ.get("UV") or shutil.which("uv", path=os.pathsep.join(places))
    run = [uv, "run", "--no-config", "--script"] if uv else [sys.executable]
    worker = [*run, os.path.join(here, "worker.py"), queue, "--single", "--idle-exit", "60"]
    q.make_private(q.STATE_DIR / "logs")
    log = os.open(
        q.STATE_DIR / "logs" / f"worker.{queue}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    try:
        subprocess.Popen(worker, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                         env={k: v for k, v in os.environ.items() if k != "TASK_DEPTH"}, cwd=home)  # fmt: skip
    finally:
        os.close(log)


if __name__ == "__main__":
    code = main()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        pass
    finally:
        os._exit(code)  # all is on disk: neither Python's own end nor SQLite's clean-up is worth a hook's time
