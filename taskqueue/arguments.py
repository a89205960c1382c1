"""Parse the command line of enqueue.py, which is also that of hooks."""

from __future__ import annotations

import getopt
import os
import time

import queue_helpers as q
from taskqueue.text import did_you_mean
from taskqueue.times import parse_duration, parse_time

# Two hooks tell of the same firing within this time.
HOOK_WINDOW_SECONDS = 10.0


def parse_object(raw: bytes) -> tuple[dict, str]:
    """Return a JSON object and its text. Raises InvalidTask."""
    try:
        text = raw.decode().removeprefix("\ufeff").strip(" \t\r\n")
        value = q.parse_json(text)
    except UnicodeDecodeError as error:
        raise q.InvalidTask(f"not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise q.InvalidTask(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise q.InvalidTask(f"a JSON {type(value).__name__}, not an object like {{}}")
    return value, text


FLAGS = ("hook", "jsonl", "json", "hold", "new", "start-worker", "nested", "version", "help")
OPTIONS = {
    "task-id": str,
    "delay": parse_duration,
    "at": parse_time,
    "ttl": parse_duration,
    "timeout": parse_duration,
    "max-attempts": int,
    "priority": int,
    "group": str,
    "after": str,
    "after-any": str,
    "on-duplicate": str,
    "window": parse_duration,
    "wait": parse_duration,
    "data": lambda text: parse_object(text.encode("utf-8", "surrogateescape"))[0],
    "once-per": str,
    "group-by": str,
}
CHOICES = {
    "on-duplicate": ("skip", "replace", "rerun"),
    "once-per": ("session", "workspace", "content"),
    "group-by": ("workspace", "project", "session"),
}
# The keys of a task in a line of --jsonl, and those whose texts are read like the options.
LINE_KEYS = {
    *("task_type", "data", "task_id", "delay", "at", "hold", "ttl", "priority", "group"),
    *("on_duplicate", "window", "timeout", "max_attempts", "after", "after_any"),
}
LINE_TIMES = {name: parse_duration for name in ("delay", "ttl", "window", "timeout")}
LINE_TIMES |= {"at": parse_time}
# Options that may be given several times.
REPEATED = ("after", "after_any")


class Arguments:
    """A parsed command line. Raises ValueError for wrong use."""

    flags, options = FLAGS, OPTIONS

    task_type: str | None = None
    data: str | None = None
    task_id: str | None = None
    delay = 0.0
    at: float | None = None
    ttl: float | None = None
    timeout: float | None = None
    max_attempts: int | None = None
    after: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()
    priority = 0
    group: str | None = None
    on_duplicate = "skip"
    window: float | None = None
    wait: float | None = None
    once_per: str | None = None
    group_by: str | None = None
    granted: dict | None = None
    hook = jsonl = json = hold = new = start_worker = nested = version = help = False

    def __init__(self, argv: list[str]) -> None:
        try:
            names = [*self.flags, *(f"{name}=" for name in self.options)]
            found, words = getopt.gnu_getopt(argv, "hV", names)
        except getopt.GetoptError as error:
            names = [f"--{name}" for name in (*self.flags, *self.options)]
            near = did_you_mean(f"--{error.opt}", names) if "recognized" in error.msg else ""
            raise ValueError(f"{error}{near}") from None
        for option, text in found:
            name = {"-h": "help", "-V": "version"}.get(option, option[2:])
            attribute = "granted" if name == "data" else name.replace("-", "_")
            value = self.read_option(name, text)
            earlier = getattr(self, attribute) if attribute in REPEATED else None
            setattr(self, attribute, value if earlier is None else (*earlier, value))
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
        """Refuse options that contradict each other."""
        if (self.hook or self.jsonl) and (self.data is not None or self.task_id is not None):
            raise ValueError(
                "with --hook or --jsonl the tasks come on stdin: no DATA, no --task-id"
            )
        if (self.after or self.after_any) and self.hook:
            raise ValueError("--after and --after-any go without --hook")
        if self.hook and (self.jsonl or self.json):
            raise ValueError("--hook goes without --jsonl and --json")
        if (self.once_per or self.group_by or self.granted is not None) and not self.hook:
            raise ValueError("--once-per, --group-by and --data go with --hook")
        if self.group is not None and self.group_by:
            raise ValueError("--group and --group-by both name the group: give one of them")
        if bool(self.delay) + (self.at is not None) + self.hold > 1:
            raise ValueError("--delay, --at and --hold each say when: give one of them")
        # A hook's firing may be taken in after its time.
        if self.at is not None and self.at <= time.time() and not self.hook:
            when = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(self.at))
            raise ValueError(f"--at: {when} has passed; give a time to come, or leave out --at")

    def terms(self) -> dict:
        """Return new_row()'s options for each task."""
        names = ("delay", "at", "ttl", "timeout", "max_attempts", "priority", "group", "hold")
        names += ("on_duplicate", "after", "after_any")
        default = HOOK_WINDOW_SECONDS if self.hook else 0.0
        window = default if self.window is None else self.window
        return {**{name: getattr(self, name) for name in names}, "window": window}

    def read_option(self, name: str, text: str) -> object:
        """Return the value of an option. Raises ValueError."""
        if name not in self.options:
            return True
        if name in CHOICES and text not in CHOICES[name]:
            raise ValueError(f"--{name} takes {' or '.join(CHOICES[name])}, not {text!r}")
        try:
            return self.options[name](text)
        except ValueError as error:
            why = f"{text!r} is not a whole number" if self.options[name] is int else error
            raise ValueError(f"--{name}: {why}") from None


class RunArguments(Arguments):
    """The command line of `tq run`: options, --, and a command."""

    options = {**OPTIONS, "queue": str}
    queue = q.TASK_QUEUE_NOTIFICATION
    task_type = "run"

    def __init__(self, argv: list[str]) -> None:
        first = argv.index("--") if "--" in argv else len(argv)
        self.command = argv[first + 1 :]
        super().__init__(argv[:first])

    def take_words(self, words: list[str]) -> None:
        if words or not self.command:
            raise ValueError("the command goes behind --, like: tq run --at 23:30 -- make deploy")
        if self.hook or self.jsonl:
            raise ValueError("a command comes from the command line alone: no --hook, no --jsonl")

    def terms(self) -> dict:
        # A command that failed may have done half of its work.
        tries = self.max_attempts or (1 if self.command else None)
        return {**super().terms(), "max_attempts": tries}

    def payload(self) -> dict:
        """Return the task's data; people read the command in it, and handlers/run does not."""
        import shlex

        return {"command": shlex.join(self.command), "workspace_path": os.getcwd()}
