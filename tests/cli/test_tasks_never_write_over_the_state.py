"""No export and no backup goes over a file of the queue's state, by whatever name it is given."""

from __future__ import annotations

import os

import pytest
from conftest import wait_for


@pytest.fixture
def full(installation):
    """A state with a file of every kind, its database in use."""
    # An output file that stays empty is removed a little after the task's end.
    installation.handler("good", "#!/bin/sh\necho out\necho err >&2\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "a-1")
    installation.worker("approvals")
    installation.finished("a-1")
    wait_for(lambda: not [*installation.state.glob("runs/*/*")], what="a recorded run")
    (installation.state / "spool" / "approvals").mkdir(parents=True, exist_ok=True)
    return installation


def content(installation) -> dict:
    return {
        path: path.read_bytes()
        for path in installation.state.rglob("*")
        if path.is_file() and not path.name.startswith("tasks.db-") and path.suffix != ".exits"
    }


def refused(installation, command: str, target, **options) -> None:
    done = installation.run("tasks.py", command, target, **options)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, (target, done.stderr)
    assert "belongs to the queue's state" in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["export", "backup"])
def test_every_file_of_the_state_is_refused_through_links_and_relative_names(full, command):
    before = content(full)
    files = [path for path in full.state.rglob("*") if path.is_file()]
    assert {"tasks.db", "tasks.db-wal", "tasks.db-shm", "wake"} <= {path.name for path in files}
    for number, path in enumerate(files):
        link, hard = full.directory / f"link-{number}", full.directory / f"hard-{number}"
        link.symlink_to(path)
        os.link(path, hard)
        for target in (path, link, hard):
            refused(full, command, target)
        refused(full, command, os.path.relpath(path, full.directory), cwd=full.directory)
        hard.unlink()
    assert content(full) == before


@pytest.mark.parametrize("command", ["export", "backup"])
def test_new_names_in_the_state_are_refused_too(full, command):
    (full.directory / "there").symlink_to(full.state)
    for target in (
        full.state / "tasks.db-journal",
        full.state / "new",
        full.state / "spool" / "approvals" / "t.json",
        full.directory / "there" / "new",
        full.state / "logs" / ".." / "new",
    ):
        refused(full, command, target)
        assert not target.exists()


@pytest.mark.parametrize("command", ["export", "backup"])
def test_a_database_that_is_a_link_is_protected_where_it_lies(installation, command):
    elsewhere = installation.directory / "elsewhere"
    elsewhere.mkdir()
    installation.enqueue("approvals", "good")
    installation.db.rename(elsewhere / "real.db")
    installation.db.symlink_to(elsewhere / "real.db")
    for name in ("real.db", "real.db-wal", "real.db-journal"):
        refused(installation, command, elsewhere / name)
    assert installation.run("tasks.py", command, elsewhere / "copy").returncode == 0


@pytest.mark.parametrize("command", ["export", "backup"])
def test_a_missing_directory_is_named(installation, command):
    installation.enqueue("approvals", "good")
    done = installation.run("tasks.py", command, installation.directory / "none" / "file")
    assert (
        done.returncode == 1
        and "there is no directory" in done.stderr
        and "mkdir -p" in done.stderr
    )
    assert "df" not in done.stderr.split()
