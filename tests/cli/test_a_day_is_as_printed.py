"""docs/a-day.md is what its recipe prints today, but for times, ids, sizes and where a line breaks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.first

WRITTEN = (ROOT / "docs/a-day.md").read_text()
# Claude Code may be anywhere; a link check and two runs of it take their time on a busy machine.
SECONDS = 400


def has_claude() -> bool:
    places = [os.environ.get("CLAUDE_DIR"), ROOT / ".claude-code"]
    there = [Path(place, "node_modules/.bin/claude").exists() for place in places if place]
    return any(there) or shutil.which("claude") is not None


def parts(text: str) -> list[str]:
    """The paragraphs, and each command with its output, without what changes from run to run."""
    found = []
    for part in re.split(r"\n\n|^(?=\$ )|^```\w*$", text, flags=re.MULTILINE):
        if part.strip() and not part.startswith("Claude Code "):
            found.append(normal(part.strip("\n")))
    return found


def normal(part: str) -> str:
    head, rule, rows = re.sub("─{40,}", "─", part).partition("─")
    if rule:
        # How much of a cell is shown depends on the others, so a row's number and status are kept.
        kept = 1 if "tq stats" in head else 2
        head = head.split("\n")[0]
        rows = " ".join(word for row in rows.strip().split("\n") for word in row.split()[:kept])
        # The hook's worker leaves when it has been idle for a minute.
        rows = re.sub(r"(approvals|workers)$", "", rows)
    text = head + rule + rows
    text = re.sub(r"http://\S+", "ADDRESS", text)
    text = re.sub(r"no problems.*", "no problems", text)
    text = re.sub(r"(session \S+), \S+,", r"\1, MODEL,", text)
    # A step takes 980 ms today and 1.1 s tomorrow: the unit, too, changes from run to run.
    text = re.sub(r"(?<![\w-])\d[\d.,]* ?(ms|min|s|B|kB|MB)(?![\w-])", "N", text)
    # Lines are broken by the terminal, wherever column 80 is.
    text = re.sub(r"\s+", "", text)
    return re.sub(r"[0-9a-f]*\d[0-9a-f:.…-]*", "N", text)


def run(tmp_path, *options: str) -> str:
    file = tmp_path / "a-day.md"
    done = subprocess.run(
        [sys.executable, ROOT / "bench/a_day.py", file, *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return file.read_text()


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("options", [[], ["--fake"]], ids=["the real Claude Code", "a fake one"])
def test_the_recipe_prints_it(tmp_path, options):
    if not options and not has_claude():
        pytest.skip(
            "there is no Claude Code: npm install --prefix .claude-code @anthropic-ai/claude-code@2.1.332"
        )
    if options and has_claude():
        pytest.skip("the real Claude Code is here, and its day is compared")
    if shutil.which("jq") is None:
        pytest.skip("there is no jq, which the handler to copy needs")
    printed = run(tmp_path, *options)
    assert parts(printed) == parts(WRITTEN)


def test_the_whole_day_is_in_it():
    written = re.sub("\n", "", WRITTEN)
    for words in ("just install", "1 broken link: README.md:4 → pier.md", "tq approve mend-links",
                  "Claude's usage limit is reached", "tq retry --failed", "tq cleanup", "tq page",
                  "Claude Code is the real one"):  # fmt: skip
        assert words in written
    lines = WRITTEN.splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith("!")] == []


def test_a_slower_day_is_the_same_day():
    slower = re.sub(r"\d+ms  \d+ms", "980ms   1.2s", WRITTEN)
    assert slower != WRITTEN
    assert parts(slower) == parts(WRITTEN)


def test_what_is_normal_is_not_everything():
    """Two days that differ in what happened are told from each other."""
    other = WRITTEN.replace("1 broken link: README.md:4", "2 broken links: README.md:4")
    assert parts(WRITTEN) != parts(WRITTEN.replace("approved mend-links", "no such task"))
    assert parts(WRITTEN) != parts(WRITTEN.replace("completed attempt", "failed attempt", 1))
    assert parts(other) != parts(WRITTEN)
