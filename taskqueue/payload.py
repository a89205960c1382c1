"""Read what comes from outside as a task's payload: a hook's input, and what a handler printed."""

from __future__ import annotations

import queue_helpers as q

# Readers of JSON that recurse get no deeper.
DEEPEST = 200


def as_payload(raw: bytes) -> dict:
    """Return bytes from outside as a task's data: a JSON object as it is, anything else as text."""
    text = raw.decode("utf-8-sig", "replace")
    try:
        value = q.parse_json(text)
        if isinstance(value, dict) and _nesting(value) <= DEEPEST:
            return value
        why = f"nested more than {DEEPEST} deep" if isinstance(value, dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        why = f"not JSON: {error}" if text.strip() else "empty"
    return {"unreadable_payload": text, "unreadable_because": why}


def _nesting(value: dict) -> int:
    """Return how deep lists and objects lie in each other."""
    depth: int = 0
    level: list[dict | list] = [value]
    while level:
        depth += 1
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [child for each in inner for child in each if isinstance(child, (dict, list))]
    return depth
