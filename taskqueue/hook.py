"""Make a task of a hook's firing, and read and write the file that keeps one in the spool.

bin/hook.sh writes that file, and so does `enqueue.py --hook` where it cannot have the database:
fields that each end with a NUL (the format's name, the number of arguments, the arguments, the
directory, CLAUDE_PROJECT_DIR, CLAUDE_CODE_SESSION_ATTENDED, TASK_DEPTH), then the payload as it
came. The file's time is the firing's.
"""

from __future__ import annotations

import json
import os
import time
from collections import namedtuple

import queue_helpers as q
from taskqueue.arguments import Arguments
from taskqueue.payload import as_payload

FORMAT = "hook-2"
# One firing: the hook's arguments without --hook, and the directory, environment and time of then.
Firing = namedtuple("Firing", "words payload directory project attended depth at")


class NoTask(ValueError):
    """A firing that deliberately becomes no task; the message says why."""


# --once-per content: the fields of an event that are the same when the same happens again. Claude
# Code adds fields to its events, so for these events only the fields named here count.
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
# For any other event, every field but these counts: better one task too many than one too few.
PER_FIRING = {
    *("session_id", "prompt_id", "transcript_path", "tool_use_id", "duration_ms", "agent_id"),
    *("agent_transcript_path", "background_tasks", "session_crons", "effort", "permission_mode"),
    *("stop_hook_active", "model", "session_title", "timestamp"),
    "session_attended",
}


def firing_here(words: list[str], payload: bytes) -> Firing:
    """Return the firing of this process, now."""
    try:
        directory = from_bytes(os.getcwdb())
    except OSError:
        # The directory was removed.
        directory = ""
    project, attended = (
        from_bytes(os.environb.get(name, b""))
        for name in (b"CLAUDE_PROJECT_DIR", b"CLAUDE_CODE_SESSION_ATTENDED")
    )
    return Firing(words, payload, directory, project, attended, q.task_depth(), time.time())


def write(firing: Firing) -> bytes:
    """Return the content of a firing's file."""
    told = (firing.directory, firing.project, firing.attended, str(firing.depth))
    fields = [FORMAT, str(len(firing.words)), *firing.words, *told]
    return b"".join(f"{field}\0".encode("utf-8", "surrogateescape") for field in fields) + (
        firing.payload
    )


def read(raw: bytes, at: float) -> Firing:
    """Return the firing that a hook's file holds. Raises ValueError."""
    head, count, rest = raw.split(b"\0", 2)
    if head != FORMAT.encode() or not count.isdigit():
        raise ValueError("not as a hook writes it")
    *fields, payload = rest.split(b"\0", int(count) + 4)
    if len(fields) != int(count) + 4:
        raise ValueError("not as a hook writes it: it is cut short")
    *words, directory, project, attended, depth = map(from_bytes, fields)
    depth = int(depth) if depth.isdecimal() else 0
    return Firing(words, payload, directory, project, attended, depth, at)


def from_bytes(raw: bytes) -> str:
    """Return a path or an argument as os.fsdecode() does in a UTF-8 locale."""
    return raw.decode("utf-8", "surrogateescape")


def row_of(firing: Firing, args: Arguments | None = None) -> q.Row:
    """Return the row of a firing; `args` are its arguments if they are parsed already.

    Raises ValueError, NoTask, InvalidTask.
    """
    args = args or Arguments(["--hook", *firing.words])
    data = payload(firing)
    if data.get("hook_event_name") == "WorktreeCreate":
        raise NoTask(
            "a WorktreeCreate hook makes the creation of worktrees fail, since Claude Code waits for "
            "the new path on its stdout: take it out of the settings; no task was stored"
        )
    task_type = args.task_type or type_of_event(data, args.queue)
    granted = args.granted or {}
    data |= granted
    terms = {**args.terms(), "granted": granted, "depth": firing.depth, "now": firing.at}
    if args.group_by:
        terms["group"] = group_of(data, args.group_by)
    if args.on_duplicate != "skip":
        terms["firing"] = digest(data)
    return q.new_row(task_type, data, id_of(data, task_type, args.once_per), **terms)


def payload(firing: Firing) -> dict:
    """Return a task's data: the hook's payload, and where it was fired.

    workspace_path is the payload's cwd, else the directory in which the hook ran. project_dir is the
    main checkout, while cwd follows worktrees. session_attended says whether a person attends the
    session.
    """
    data = as_payload(firing.payload)
    cwd = data.get("cwd")
    if not isinstance(data.get("workspace_path"), str):
        workspace = cwd if isinstance(cwd, str) and cwd else firing.directory
        data |= {"workspace_path": workspace} if workspace else {}
    if firing.project and "project_dir" not in data:
        data["project_dir"] = firing.project
    if firing.attended in ("0", "1"):
        data["session_attended"] = firing.attended == "1"
    return data


def type_of_event(data: dict, otherwise: str) -> str:
    """Return the event's name, or `otherwise` where it cannot name a handler."""
    event = data.get("hook_event_name")
    try:
        q.new_row(event, {}, depth=0)  # type: ignore[arg-type]
        return str(event)
    except q.InvalidTask:
        return otherwise


# The fields that name the group: the first that the payload has.
GROUPS = {
    "workspace": ("workspace_path",),
    "project": ("project_dir", "workspace_path"),
    "session": ("session_id", "workspace_path"),
}


def group_of(data: dict, what: str) -> str | None:
    """Return the group of a firing, None where no field names it."""
    for name in GROUPS[what]:
        value = data.get(name)
        if isinstance(value, str) and value:
            try:
                return q.check_text("group", value, 500)
            except q.InvalidTask:
                return f"{what}-{digest(value)}"
    return None


def id_of(data: dict, task_type: str, once_per: str | None) -> str:
    """Return a firing's task id: the same for each time it is told, another for another firing.

    An id ends with 64 bits of a digest: beside a million waiting tasks, a new one collides once in
    18 trillion firings.
    """
    return f"{task_type[:8]}-{digest([task_type, what_counts(data, once_per)])}"


def what_counts(data: dict, once_per: str | None) -> object:
    """Return the value that is equal for two firings that make one task."""
    workspace = data.get("workspace_path")
    if once_per == "session":
        return [workspace, data.get("session_id")]
    if once_per == "workspace":
        return [workspace]
    if once_per == "content":
        return [workspace, content_of(data)]
    return data


def content_of(data: dict) -> dict:
    """Return the fields that are the same when the same happens again."""
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
    """Return 16 hexadecimal digits that name a JSON value."""
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
