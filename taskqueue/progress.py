"""Show how far long work is: a bar on a terminal, a line each ten seconds elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from taskqueue.text import size

# How often a log gets a line, and a terminal a bar in place of none.
LINE_SECONDS, BAR_SECONDS = 10.0, 1.0


def amount(done: int, total: int | None, unit: str) -> str:
    """Return "1,234 of 5,000 lines", or in bytes "1.2 of 3.4 MB"."""
    show = size if unit == "bytes" else "{:,}".format
    text = show(done) if total is None else f"{show(min(done, total))} of {show(total)}"
    return text if unit == "bytes" else f"{text} {unit}"


class Progress:
    """The state of a long work; `advance` says that so much more is done."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self.bar, self.task = 0, None, None
        self.on_terminal = sys.stderr.isatty()
        self.next = time.monotonic() + (BAR_SECONDS if self.on_terminal else LINE_SECONDS)

    def advance(self, number: int = 1) -> None:
        self.reach(self.done + number)

    def reach(self, done: int) -> None:
        """Say that so much of all is done."""
        self.done = done
        if self.bar is not None and self.task is not None:
            says = amount(done, self.total, self.unit)
            self.bar.update(self.task, completed=done, says=says)
        elif time.monotonic() >= self.next:
            self.show()

    def show(self) -> None:
        if self.on_terminal:
            with suppress(ImportError):
                self.begin_bar()
                return
        self.next = time.monotonic() + LINE_SECONDS
        print(
            f"{self.what}: {amount(self.done, self.total, self.unit)}", file=sys.stderr, flush=True
        )

    def begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[says]}"))
        console = Console(stderr=True)
        self.bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
        says = amount(self.done, self.total, self.unit)
        self.task = self.bar.add_task(self.what, total=self.total, completed=self.done, says=says)
        self.bar.start()

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Yield the progress of a work of `total` units, None if nobody knows how many."""
    shown = Progress(what, total, unit)
    try:
        yield shown
    finally:
        shown.end()
