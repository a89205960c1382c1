"""Read durations and times as people write them."""

from __future__ import annotations

import re
import time

import queue_helpers as q


def parse_duration(text: str) -> float:
    """Return seconds: "30", "90m", "5min", "1.5h", "2d", "1h30m". ValueError for anything else."""
    part = r"([0-9]+(?:\.[0-9]+)?)\s*(sec|s|min|m|h|d|w|)"
    units = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
    if not re.fullmatch(rf"\s*(?:{part}\s*)+", text):
        raise ValueError(f"{text!r} is not a duration like 30, 90m, 5min, 1.5h or 2d")
    seconds = sum(float(number) * units[unit] for number, unit in re.findall(part, text))
    if seconds >= 1e9:
        raise ValueError(f"{text!r} is longer than 30 years")
    return seconds


def parse_time(text: str, now: float | None = None) -> float:
    """Return the Unix seconds of 2026-12-01T09:00, of the next 23:30, or of tomorrow 9:00.

    Local time unless the text names a zone. Raises ValueError for anything else.
    """
    # Heavy, and enqueue.py seldom needs it.
    from datetime import datetime, timedelta

    now = time.time() if now is None else now
    clock = re.fullmatch(r"(today|tomorrow|)[ T]*(\d?\d):(\d\d)(?::(\d\d))?", text.strip().lower())
    try:
        if clock:
            today = datetime.fromtimestamp(now).replace(microsecond=0)
            hour, minute, second = (int(part or 0) for part in clock.groups()[1:])
            at = today.replace(hour=hour, minute=minute, second=second, fold=0)
            if clock[1] == "tomorrow" or not clock[1] and at.timestamp() <= now:
                at += timedelta(days=1)
        else:
            at = datetime.fromisoformat(text.strip())
        seconds = at.timestamp()
    except (ValueError, OverflowError, OSError):
        seconds = -1
    if not 0 <= seconds <= q.LAST_SECOND:
        raise ValueError(f"{text!r} is not a time like 23:30, tomorrow 9:00 or 2026-12-01T09:00")
    return seconds
