"""handlers/command is what a person copies: as it stands, it does what its comments say."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq")


@pytest.mark.parametrize(
    "name", ["README.md", "--help", "a $(touch owned) `touch owned` 'b' \"c\"\n.md", "größe.md"]
)
def test_it_prints_the_checksum_of_any_file(installation, name):
    workspace = installation.directory / "workspace"
    workspace.mkdir()
    (workspace / name).write_text("harbour")
    shutil.copy(ROOT / "handlers/command", installation.handlers / "command")
    task = installation.enqueue(
        "notifications", "command", json.dumps({"workspace_path": str(workspace), "file": name})
    )
    installation.worker("notifications", "--drain", ready=False).wait(30)
    done = installation.finished(task)
    assert done["status"] == "completed", done
    assert hashlib.sha256(b"harbour").hexdigest() in done["result"] and done["log"].startswith(
        "attempt 1: "
    )
    assert not (workspace / "owned").exists()


@pytest.mark.parametrize("data", [{}, {"file": 5}, {"file": None}, {"file": ["x"]}])
def test_a_task_without_a_file_is_a_dead_letter_at_once(installation, data):
    shutil.copy(ROOT / "handlers/command", installation.handlers / "command")
    task = installation.enqueue("notifications", "command", json.dumps(data))
    installation.worker("notifications", "--drain", ready=False).wait(30)
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["exit_code"]) == ("failed", 1, 65)


def test_a_file_that_is_not_there_is_a_failed_attempt(installation):
    shutil.copy(ROOT / "handlers/command", installation.handlers / "command")
    task = installation.enqueue("notifications", "command", json.dumps({"file": "/nowhere"}))
    installation.worker("notifications", "--drain", "--max-attempts", "1", ready=False).wait(30)
    assert installation.finished(task)["exit_code"] == 1
