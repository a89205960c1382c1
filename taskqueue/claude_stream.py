"""Read the lines that one run of `claude -p --output-format stream-json` prints.

`Said` shows each step as a line on stderr, and keeps the facts that decide how the run ended. The
verdict needs all of them: the last line alone may be about the run's last trouble.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from taskqueue.text import one_line

# A line on stderr and the summary have at most this many characters.
LINE_CHARACTERS = 200
LIMIT = "rate_limit"
# A compaction that fails has no name for the cause, only words. (pattern, name)
COMPACTION_CAUSES = (
    (r"\(429\)|hit your .*limit", LIMIT),
    (r"Not logged in|API key|/login", "authentication_failed"),
    (r"[Cc]redit balance", "billing_error"),
    (r"selected model", "model_not_found"),
    (r"API Error: 5\d\d|Connection|Overloaded|timed out", "overloaded"),
    # The compaction ran, and the conversation is still too long.
    (r"^(exhausted)?$", "invalid_request"),
)
# The fields of a tool's input that say best what it is used on, the best first.
SUBJECTS = (
    *("file_path", "notebook_path", "path", "command", "pattern", "url", "query", "skill"),
    *("description", "prompt"),
)


def say(text: str, indent: str = "") -> None:
    """Print one line on stderr, for people.

    The words of Claude and its tools are data, and must not steer a terminal.
    """
    # On a full disk the line is lost: Claude's work matters more.
    with suppress(OSError):
        print(indent + one_line(text, LINE_CHARACTERS), file=sys.stderr, flush=True)


class Said:
    """The facts that a run's lines told, from the first line on.

    `on_prompt` is called once, when the session's file is known to have the prompt.
    """

    def __init__(self, on_prompt: Callable[[], None]) -> None:
        self.on_prompt: Callable[[], None] | None = on_prompt
        # Whether the session was started or resumed, and whether the model answered.
        self.began = self.answered = False
        # The seconds without a line after which the run was ended.
        self.silent_for: float | None = None
        # Claude Code's name for the trouble since the model's last answer, and for the cause of a
        # failed compaction.
        self.error: str | None = None
        self.compaction: str | None = None
        # The usage limits that refused the run since that answer: when each resets (Unix seconds).
        self.limits: dict[str, float | None] = {}
        # How long Claude Code itself would wait at a limit, in seconds.
        self.retry_delay: float | None = None
        self.results: list[dict] = []
        # The last line of Claude Code's stderr.
        self.last_words = ""

    @property
    def success(self) -> dict | None:
        """The last result that is a success, whatever Claude Code says after it."""
        return next(filter(is_success, reversed(self.results)), None)

    @property
    def result(self) -> dict:
        """The result that counts; {} if the run printed none."""
        return self.success or (self.results or [{}])[-1]

    def hear_stderr(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        if text.strip():
            self.last_words = one_line(text, LINE_CHARACTERS)
            say(text)

    def hear(self, line: bytes) -> None:
        """Take in one line of stdout; a line that is not one of Claude Code's is only shown."""
        try:
            told = json.loads(line)
            kind = told["type"], told.get("subtype")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return say(line.decode("utf-8", "replace"))
        if kind == ("system", "init"):
            self.began = True
            session, model, cwd = (told.get(name) for name in ("session_id", "model", "cwd"))
            return say(f"session {session}, {model}, in {cwd}")
        # Claude Code writes the prompt to the session's file before the second line.
        if self.began and self.on_prompt:
            self.on_prompt()
            self.on_prompt = None
        if kind[0] == "result":
            self.results.append(told)
        elif kind[0] == "rate_limit_event":
            self.hear_limit(told.get("rate_limit_info"))
        elif kind == ("system", "api_retry"):
            self.hear_retry(told)
        elif kind == ("system", "status") and told.get("compact_result") == "failed":
            self.hear_compaction(str(told.get("compact_error") or ""))
        elif kind[0] in ("assistant", "user"):
            self.hear_message(told)

    def hear_limit(self, info: object) -> None:
        if not isinstance(info, dict):
            return
        window = str(info.get("rateLimitType"))
        if info.get("status") != "rejected" or info.get("isUsingOverage"):
            self.limits.pop(window, None)
            return
        known = number(info.get("resetsAt")), self.limits.get(window)
        self.limits[window] = resets_at = max(filter(None, known), default=None)
        when = "an unknown time"
        if resets_at:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(resets_at))
        say(f"the usage limit is reached; it resets at {when}")

    def hear_retry(self, told: dict) -> None:
        self.error, delay = error_of(told), number(told.get("retry_delay_ms"))
        if self.error == LIMIT and delay is not None:
            self.retry_delay = delay / 1000
        say(
            f"no answer from the API ({self.error}, status {told.get('error_status')});"
            f" Claude tries again, {told.get('attempt')} of {told.get('max_retries')}"
        )

    def hear_compaction(self, why: str) -> None:
        names = (name for pattern, name in COMPACTION_CAUSES if re.search(pattern, why))
        self.compaction = next(names, "unknown")
        say(f"Claude could not make the conversation shorter: {why}")

    def hear_message(self, told: dict) -> None:
        """Show a step, and take note of an error or an answer.

        A subagent's troubles are its session's own business.
        """
        is_subagents = bool(told.get("parent_tool_use_id"))
        error, message = error_of(told), told.get("message")
        if told["type"] == "assistant" and not is_subagents:
            self.error = error and (self.compaction or error)
            if error is None and not told.get("is_api_error_message"):
                self.answered, self.compaction = True, None
                self.limits.clear()
        content = message.get("content") if isinstance(message, dict) else None
        for block in content if isinstance(content, list) else []:
            step = step_of(block) if isinstance(block, dict) else None
            if step:
                say(step, "  " if is_subagents else "")


def step_of(block: dict) -> str | None:
    """Return a line about a message's block, or None for one that people need not see."""
    if block.get("type") == "tool_use":
        return f"{block.get('name')}: {subject_of(block.get('input'))}"
    if block.get("type") == "text" and str(block.get("text")).strip():
        return f"> {block['text']}"
    if block.get("type") == "tool_result" and block.get("is_error"):
        content = block.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        return f"failed: {text}"
    return None


def subject_of(given: object) -> str:
    """Return the file, command or the like that a tool is used on, from its input."""
    given = given if isinstance(given, dict) else {}
    named = (given[name] for name in SUBJECTS if isinstance(given.get(name), str))
    return next(named, "") or json.dumps(given, ensure_ascii=False)


def number(value: Any) -> float | None:
    """Return a number of seconds or milliseconds, or None if it cannot be one."""
    return float(value) if type(value) in (int, float) and 0 <= value < 1e12 else None


def error_of(told: dict) -> str | None:
    """Return Claude Code's name for a line's error."""
    return told["error"] if isinstance(told.get("error"), str) else None


def is_success(result: dict) -> bool:
    """Return whether a result says that the work is done.

    Claude Code also says success where an answer was cut short or broke off at a tool.
    """
    if result.get("is_error") or str(result.get("terminal_reason")).startswith("aborted"):
        return False
    reason = result.get("stop_reason")
    said = str(result.get("result") or "").strip()
    return reason != "refusal" and (reason != "tool_use" or bool(said))
