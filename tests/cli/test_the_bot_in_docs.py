"""docs/bot.md, as printed: it shows what comes to completions, and a person approves in the chat."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from conftest import ROOT, end
from link_check import UV, UV_CACHE

DOCUMENT = (ROOT / "docs/bot.md").read_text()
CODE = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[1]


@pytest.fixture
def bot(installation, tmp_path):
    """The bot, in a chat with us."""
    (tmp_path / "bot.py").write_text(CODE)
    env = {**installation.env, "PYTHONPATH": str(ROOT), "UV_CACHE_DIR": UV_CACHE, "UV_OFFLINE": "1"}
    process = subprocess.Popen(
        [UV, "run", "--script", tmp_path / "bot.py"],
        env=env,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.write = lambda text: (process.stdin.write(text + "\n"), process.stdin.flush())
    yield process
    end(process)


def test_it_needs_what_the_scripts_need_that_it_starts():
    """It runs tasks.py with its own Python."""
    (needed,) = re.findall("^# dependencies = .*", (ROOT / "tasks.py").read_text(), re.MULTILINE)
    assert needed in CODE and "uv run --script bot.py`" in DOCUMENT


def test_it_has_thirty_lines():
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 30


def test_it_shows_results_and_lets_run_what_a_person_approves(installation, bot):
    installation.handler("claude", '#!/bin/sh\necho \'{"summary": "The link is mended."}\'\n')
    one, other = (
        installation.enqueue("approvals", "claude", "--hold", json.dumps({"prompt": text}))
        for text in ("Mend the link.", "Sink the boat.")
    )
    installation.worker("approvals", "--then", "completions")
    bot.write("held")
    listed = "".join(bot.stdout.readline() for _ in range(3))
    assert one in listed and other in listed
    bot.write(f"reject {other}")
    assert "rejected" in bot.stdout.readline()
    bot.write(f"approve {one}")
    # The result may come before the answer: they are two programs.
    said = {bot.stdout.readline().strip() for _ in range(2)}
    assert "claude: The link is mended." in said and any("approved" in line for line in said)
    assert installation.finished(other)["status"] == "cancelled"
    bot.write("approve nothing that is there")
    assert bot.stdout.readline().strip() == "held, approve ID or reject ID"
    bot.stdin.close()
    assert bot.wait(30) == 0
    assert installation.rows("select status from completions") == []
