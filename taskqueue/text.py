"""Make text from outside visible: for the terminal, the page, the report and handlers' messages.

A task's payload, a handler's output or a file's name may hold characters that steer a terminal,
reverse what follows, or cannot be seen at all and yet are read by Claude.
"""

from __future__ import annotations

from functools import lru_cache

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
