"""Import, export, backup, cleanup and `add --jsonl` say how far they are: a bar on a terminal, lines in
a log.
"""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from terminal import on_terminal

LINES = '{"n": 1}\n' * 3000


@pytest.fixture
def at_once(monkeypatch):
    """Progress is shown at its first advance, not after seconds."""
    from taskqueue import progress

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)


def test_a_log_gets_lines(installation, at_once):
    def said(*args, **options) -> str:
        done = installation.run(*args, **options)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "read: 3,000 lines\n" in said("enqueue.py", "approvals", "t", "--jsonl", input=LINES)
    file = installation.directory / "out"
    assert "export: 3,000 tasks\n" in said("tasks.py", "export", file)
    backup = said("tasks.py", "backup", installation.directory / "backup").splitlines()
    assert backup[-1].startswith("backup: ") and backup[-1].split()[1] == backup[-1].split()[3]
    installation.sqlite3("insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at)"
                         " select 'approvals', id, task_id, 't', 'completed', data, datetime('now'), datetime('now') from approvals;"
                         "delete from approvals")  # fmt: skip
    assert "history: 3,000 of 3,000 tasks\n" in said("cleanup.py", "--keep", "0s")
    # How many bytes the ids take is a matter of chance.
    last = said("tasks.py", "import", file).splitlines()[-1]
    assert re.fullmatch(r"import: (1\.\d MB) of \1", last)


def test_what_is_over_soon_says_nothing(installation):
    done = installation.run("enqueue.py", "approvals", "t", "--jsonl", input=LINES)
    assert done.stderr == ""


def test_a_terminal_gets_a_bar(installation):
    program = installation.directory / "slow.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from taskqueue import progress\n"
        "progress.BAR_SECONDS = 0.0\n"
        "with progress.progress('import', 100, 'lines') as shown:\n"
        "    for _ in range(100): shown.advance()\n"
        "    shown.bar.refresh()\n"
    )
    shown = "\n".join(on_terminal(installation, program, ROOT))
    assert "import" in shown and "100 of 100 lines" in shown and "━" in shown
