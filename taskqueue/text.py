"""Write values as text for people: visible characters, shell words, sizes, spans and times.

A task's payload, a handler's output or a file's name may hold characters that steer a terminal,
reverse the text behind them, or cannot be seen and yet are read by Claude: `visible` escapes them.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import time
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from taskqueue.control import Control

SECONDS_OF_UNIT = {"d": 86_400, "h": 3_600, "m": 60}

# Unicode calls these printable although they have no shape: joiners, fillers, variation selectors
# and the empty Braille pattern. str.isprintable() knows all others, Unicode's tags among them.
SHAPELESS = frozenset(
    [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180F, 0x2800, 0x3164, 0xFFA0, 0x1D159]
    + [*range(0x180B, 0x180E), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]
)


class _Spelling(dict):
    """The text that stands for each character's code, made when it is first met."""

    def __init__(self, keep: str) -> None:
        super().__init__({ord(character): character for character in keep})

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_seen = character.isprintable() and code not in SHAPELESS
        self[code] = character if is_seen else ascii(character)[1:-1]
        return self[code]


_spelling = lru_cache(_Spelling)


def visible(text: str, keep: str = "") -> str:
    """Return the text with each unseen character but those in `keep` written as an escape."""
    return text.translate(_spelling(keep))


def visible_lines(text: str) -> str:
    """Return the text made visible, its lines kept; a tab becomes four spaces."""
    return visible(text.replace("\t", "    "), keep="\n")


def one_line(text: str, longest: int) -> str:
    """Return the text on one line, visible, with an ellipsis where it has more characters."""
    # Blanks may go away, so some more than `longest` are looked at.
    line = visible(" ".join(text[: 10 * longest].split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def short(text: str | None, longest: int = 200) -> str:
    """Return a text as one line of at most `longest` characters."""
    text = " ".join((text or "").split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def sh(word: object) -> str:
    """Quote a word for a shell, in printable characters that give the same bytes again."""
    text = str(word)
    if visible(text) == text:
        return shlex.quote(text)
    plain = (
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b"'\\" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{''.join(plain)}'"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return " (did you mean list or limit?)" with the names that are like a word, or ""."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(names), n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def plural(count: int, noun: str) -> str:
    """Return "1 task" or "1,234 tasks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Return a number of bytes with its unit: "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def dollars(usd: float, at_least: bool = False) -> str:
    """Return an amount as people read it: "$0.42", "at least $3", "$0.0004"."""
    amount = f"{usd:,.2f}"
    if 0 < usd < 0.0995:
        # Two digits that are not zeros.
        amount = f"{usd:.{1 - math.floor(math.log10(usd))}f}".rstrip("0")
    return f"{'at least ' if at_least else ''}${amount}"


def span(value: float | None) -> str:
    """Return seconds with their unit: "250ms", "90s", "3h"; "-" for None."""
    if value is None:
        return "-"
    for unit, seconds in SECONDS_OF_UNIT.items():
        if value >= 2 * seconds:
            return f"{value / seconds:.0f}{unit}"
    if value < 1:
        return f"{max(value, 0) * 1000:.0f}ms"
    return f"{value:.0f}s" if value >= 10 else f"{value:.1f}s"


def seconds_of(moment: object) -> float | None:
    """Return the Unix seconds of a time in the database, or None if it is no time.

    A number is Unix seconds; text is UTC unless it names a zone.
    """
    if isinstance(moment, int | float):
        return moment
    from datetime import UTC, datetime

    try:
        at = datetime.fromisoformat(str(moment))
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def seconds_since(moment: object) -> float | None:
    """Return how long ago a time in the database was, or None if it is no time."""
    at = seconds_of(moment)
    return None if at is None else time.time() - at


def clock(moment: float | str, whole: bool = False) -> str:
    """Return a time in the database as local time with its zone: "19:00 CET".

    The date is left out if it is today. `whole` always shows the date and the seconds.
    """
    local, now = time.localtime(seconds_of(moment) or 0.0), time.localtime()
    is_today = local[:3] == now[:3]
    form = "%Y-%m-%d %H:%M:%S %Z" if whole else "%H:%M %Z" if is_today else "%Y-%m-%d %H:%M %Z"
    return time.strftime(form, local)


def ago(moment: float | str) -> str:
    """Return how long ago a time was, or how soon it comes: "12 s ago", "in 42 s"."""
    seconds = seconds_since(moment) or 0.0
    away = re.sub(r"(?<=\d)(?=[a-z])", " ", span(abs(seconds)))
    return f"in {away}" if seconds < 0 else f"{away} ago"


def pause_in_words(control: Control) -> str:
    """Return how a queue is paused: "paused until 19:00 CET (in 2 h): usage limit"."""
    until = "until a person resumes it"
    if control.until is not None:
        until = f"until {clock(control.until)} ({ago(control.until)})"
    return f"paused {until}{f': {visible(control.reason)}' if control.reason else ''}"
