"""Judge how a run of Claude Code ended, by all that it said.

`judge` is the one place that decides about a run. `cause_of` names why the work is not done, and
the tables below say what follows from each cause.
"""

from __future__ import annotations

import os
import re
import signal
import time
from typing import NamedTuple

from taskqueue.claude_stream import LIMIT, Said, subject_of
from taskqueue.text import one_line

EX_FAILED, EX_DATAERR, EX_TEMPFAIL, STOPPED = 1, 65, 75, 128 + signal.SIGTERM

# How long the queue pauses at a limit that does not say when it resets; and the shortest and the
# longest pause, since clocks differ.
LIMIT_SECONDS, LIMIT_AT_LEAST_SECONDS, PAUSE_AT_MOST_SECONDS = 1800.0, 5.0, 30 * 86_400.0
# The wait before the API is tried again. It doubles with each run that got no answer, up to the
# second number.
WAIT_SECONDS, WAIT_AT_MOST_SECONDS = 30.0, 1800.0

# Causes that only a person can mend. No other task of the queue fares better.
FOR_A_PERSON = {
    "authentication_failed": "Claude Code is not logged in: run claude, then /login",
    "oauth_org_not_allowed": "the organization does not allow this login: run claude, then /login",
    "account_on_hold": "the account is on hold",
    "verification_required": "the account must be verified: run claude",
    "billing_error": "there is no credit left: see the account's billing page",
    "cloud_credential_error": "the cloud provider refuses the credentials",
}
# Causes that pass. The second is also Claude Code's name for a broken network.
BUSY = ("overloaded", "server_error")
# Causes that no retry helps, and the error of the task. {words} is the text of the result.
HOPELESS = {
    "used_up": "its budget or its turns are used up ({subtype}); a retry by hand goes on with the session",
    "gone": "the session to resume is gone: {resume}",
    "refusal": "Claude refuses it: {words}",
    "model_not_found": "no such model: {words}",
    "too_long": "the prompt is too long: {words}",
}
# The API's status names the cause where Claude Code has no name for it, or a vague one.
VAGUE = (None, "unknown", "invalid_request")
BY_STATUS = {
    401: "authentication_failed",
    402: "billing_error",
    404: "model_not_found",
    413: "too_long",
    429: LIMIT,
}
TOO_LONG = ("prompt_too_long", "blocking_limit", "rapid_refill_breaker")
# The bounds that the task itself sets. To go on would be to go beyond them.
USED_UP = ("error_max_budget_usd", "error_max_turns")
GONE = "No conversation found"


class Verdict(NamedTuple):
    """How a run ended."""

    # The handler's exit code.
    code: int
    # The reason, for people.
    why: str = ""
    # With exit code 75, the worker's order: {"pause": …}, {"retry_after": …} or {"hold": …}.
    not_now: dict | None = None
    # Fields that the task's result has besides the usual ones.
    more: dict = {}


def judge(
    said: Said, data: dict, waits: int, stopped: bool, budget_is_lent: bool = False
) -> Verdict:
    """Return the verdict on a run.

    `data` is the task's, `waits` the number of runs before this one that got no answer, and
    `stopped` tells whether the handler was told to end. A budget that is lent is the queue's.
    """
    if said.success:
        denials = denials_of(said.result)
        if denials and "on_denied" not in data:
            return asking(denials, data)
        return Verdict(0, f"Claude was denied: {in_words(denials)}" if denials else "")
    if stopped:
        return Verdict(STOPPED, "stopped; the session goes on when the task runs again")
    cause = cause_of(said, "resume" in data)
    if cause == LIMIT:
        pause = limit_seconds(said, waits)
        order = {"pause": pause, "reason": "Claude's usage limit is reached"}
        why = f"a usage limit: the queue is paused for {pause:.0f} s"
        return Verdict(EX_TEMPFAIL, why, order)
    if cause in FOR_A_PERSON:
        reason = FOR_A_PERSON[cause]
        why = f"{reason} ({cause}); the queue is paused until a person resumes it"
        return Verdict(EX_TEMPFAIL, why, {"pause": None, "reason": reason})
    if cause in BUSY:
        wait = grown(WAIT_SECONDS, waits)
        why = f"the API is overloaded or cannot be reached: the task is tried again in {wait:.0f} s"
        return Verdict(EX_TEMPFAIL, why, {"retry_after": wait})
    result, words = said.result, words_of(said.result)
    if budget_is_lent and result.get("subtype") == "error_max_budget_usd":
        reason = "its share of the queue's bound is used up"
        return Verdict(EX_TEMPFAIL, reason, {"retry_after": WAIT_SECONDS, "reason": reason})
    if cause in HOPELESS:
        facts = {"words": words, "subtype": result.get("subtype"), "resume": data.get("resume")}
        return Verdict(EX_DATAERR, HOPELESS[cause].format(**facts))
    if said.silent_for:
        return Verdict(EX_FAILED, f"no sign of life for {in_minutes(said.silent_for)}")
    if result and not result.get("is_error"):
        reason = result.get("stop_reason")
        return Verdict(EX_FAILED, f"failed: Claude stopped in the middle ({reason})")
    return Verdict(EX_FAILED, f"failed: {words or said.last_words}")


def in_minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def cause_of(said: Said, resumes: bool) -> str | None:
    """Return the name of the cause for which the work is not done, or None if it is unknown.

    `resumes` tells whether the task names the session to resume.
    """
    result, name = said.result, said.error
    status = result.get("api_error_status")
    if name in VAGUE and type(status) is int:
        name = BY_STATUS.get(status, "overloaded" if status >= 500 else name)
    if said.limits:
        return LIMIT
    if name in (LIMIT, *FOR_A_PERSON, *BUSY):
        return name
    if result.get("subtype") in USED_UP:
        return "used_up"
    if resumes and GONE in words_of(result) + said.last_words:
        return "gone"
    if result.get("stop_reason") == "refusal":
        return "refusal"
    if result.get("terminal_reason") in TOO_LONG and name in (None, "invalid_request"):
        return "too_long"
    return name


def words_of(result: dict) -> str:
    """Return the text of a result, or its errors."""
    found = result.get("errors")
    errors = found if isinstance(found, list) else []
    return str(result.get("result") or " ".join(map(str, errors)))


def limit_seconds(said: Said, waits: int) -> float:
    """Return how long the queue pauses: until the last limit resets, if that is known.

    A limit that goes on after its reset makes the pauses grow.
    """
    known = [resets_at for resets_at in said.limits.values() if resets_at is not None]
    if known:
        seconds = max(known) - time.time()
    else:
        seconds = LIMIT_SECONDS if said.retry_delay is None else said.retry_delay
    least = grown(LIMIT_AT_LEAST_SECONDS if seconds > 0 else WAIT_SECONDS, waits)
    return round(min(max(seconds, least), PAUSE_AT_MOST_SECONDS), 1)


def grown(seconds: float, waits: int) -> float:
    """Return a wait after so many runs without an answer, in seconds."""
    # The exponent is bounded: weeks of waiting would go beyond a float.
    return min(seconds * 2 ** min(waits, 20), WAIT_AT_MOST_SECONDS)


# ---------------------------------------------------------------------------------- denied tools


class Denial(NamedTuple):
    """A use of a tool that Claude was denied."""

    tool: str
    given: dict

    def __str__(self) -> str:
        subject = subject_of(self.given)
        if self.tool == "Bash":
            return f"Bash({subject})"
        return f"{self.tool} {subject.removeprefix(f'{os.getcwd()}/')}"

    @property
    def rule(self) -> str | None:
        """The permission rule for exactly this use, None where there is none.

        Claude Code takes * in a command for anything, \\ for an escape, and may stop reading at a
        bracket; to send output to a file needs more than a rule. A file's name is a pattern like
        those of .gitignore, in which Claude Code ignores the case.
        """
        if self.tool == "Bash":
            command = self.given.get("command")
            command = HARMLESS_END.sub("", command.strip()) if isinstance(command, str) else ""
            return f"Bash({command})" if command and is_plain(command, "()*<>\\") else None
        kind = FILE_RULES.get(self.tool)
        path = self.given.get("file_path") or self.given.get("notebook_path")
        if kind is None or not isinstance(path, str) or not path:
            return None
        path = os.path.normpath(os.path.join(os.getcwd(), path))
        return f"{kind}(/{path})" if is_plain(path, "()*?[]\\") and path == path.strip() else None


# The kinds of rules that hold for tools that have one file.
FILE_RULES = dict.fromkeys(("Edit", "MultiEdit", "Write", "NotebookEdit"), "Edit") | {
    "Read": "Read"
}
# Claude Code compares a command with its rule without this.
HARMLESS_END = re.compile(r"\s+2>\s*(&1|/dev/null)$")


def is_plain(text: str, special: str) -> bool:
    """Return whether a text has no control characters and none of the special ones."""
    return not set(text) & set(special) and text.isprintable()


def asking(denials: list[Denial], data: dict) -> Verdict:
    """Return the verdict on a run that was denied a tool: a person is asked to allow just that.

    A rule that was there before did not help. Where a use has no exact rule, the person must say
    which fields of data to change.
    """
    allowed = data.get("allowed_tools", [])
    allowed = allowed if isinstance(allowed, list) else [allowed]
    rules = list(dict.fromkeys(denial.rule for denial in denials))
    wants = f"wants: {in_words(denials)}"
    change = None
    if set(rules) & {None, *allowed}:
        wants = f"{wants}; no exact rule allows that"
    else:
        change = {"allowed_tools": [*allowed, *rules]}
    return Verdict(EX_TEMPFAIL, wants, {"hold": wants, "data": change})


def denials_of(result: dict) -> list[Denial]:
    found = result.get("permission_denials")
    denials = []
    for denial in found if isinstance(found, list) else []:
        if isinstance(denial, dict):
            given = denial.get("tool_input")
            given = given if isinstance(given, dict) else {}
            denials.append(Denial(str(denial.get("tool_name")), given))
    return denials


def in_words(denials: list[Denial]) -> str:
    """Name the denied uses; of more than three, the first two and the number of the others."""
    named = list(dict.fromkeys(one_line(str(denial), 50) for denial in denials))
    if len(named) > 3:
        named = [*named[:2], f"{len(named) - 2} more"]
    return ", ".join(named)
