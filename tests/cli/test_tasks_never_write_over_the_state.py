"""No export and no backup goes over a file of the queue's state, by whatever name it is given."""

from __future__ import annotations

import os

import pytest
from conftest import one_line, wait_for

pytestmark = pytest.mark.parametrize("command", ["export", "backup"])


@pytest.fixture
def full(installation):
    """A state with a file of every kind, its database in use."""
    # An output file that stays empty is removed a little after the task's end.
    installation.handler("good", "#!/bin/sh\necho out\necho err >&2\n")
    installation.worker("approvals")
    assert installation.ends_well("approvals", "good")
    wait_for(lambda: not [*installation.state.glob("runs/*/*")], what="a recorded run")
    (installation.state / "spool" / "approvals").mkdir(parents=True, exist_ok=True)
    return installation


def content(installation) -> dict:
    return {
        path: path.read_bytes()
        for path in installation.state.rglob("*")
        if path.is_file() and not path.name.startswith("tasks.db-") and path.suffix != ".exits"
    }


def refused(installation, command: str, target) -> None:
    one_line(installation.run("tasks.py", command, target), 1, "belongs to the queue's state")


def test_every_file_of_the_state_is_refused_through_links_and_relative_names(
    full, command, monkeypatch
):
    monkeypatch.chdir(full.directory)
    before = content(full)
    files = [path for path in full.state.rglob("*") if path.is_file()]
    assert {"tasks.db", "tasks.db-wal", "tasks.db-shm", "wake"} <= {path.name for path in files}
    for number, path in enumerate(files):
        link, hard = full.directory / f"link-{number}", full.directory / f"hard-{number}"
        link.symlink_to(path)
        os.link(path, hard)
        for target in (path, link, hard, os.path.relpath(path)):
            refused(full, command, target)
        hard.unlink()
    (full.directory / "there").symlink_to(full.state)
    news = ("tasks.db-journal", "new", "spool/approvals/t.json", "logs/../new", "../there/new")
    for name in news:
        refused(full, command, full.state / name)
        assert not (full.state / name).exists()
    assert content(full) == before


def test_a_database_that_is_a_link_is_protected_where_it_lies(installation, command):
    elsewhere = installation.directory / "elsewhere"
    elsewhere.mkdir()
    installation.add("approvals good")
    installation.db.rename(elsewhere / "real.db")
    installation.db.symlink_to(elsewhere / "real.db")
    for name in ("real.db", "real.db-wal", "real.db-journal"):
        refused(installation, command, elsewhere / name)
    installation.tq(command, elsewhere / "copy")
