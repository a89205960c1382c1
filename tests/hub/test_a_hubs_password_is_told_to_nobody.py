"""No handler, process list, log or message shows the hub's password, percent signs included."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import wait_for

import relay
from taskqueue import hub

pytest_plugins = ["machines"]
pytest.importorskip("psycopg")
AWAY = "127.0.0.1:1/none"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file with the hub's URL, in a HOME of the test's own."""
    made = tmp_path / ".claude/automation/lychee/hub"
    made.parent.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TASK_QUEUE_HUB", raising=False)
    made.touch(0o600)
    return made


@pytest.mark.parametrize("url", [
    "postgresql://me:s3%cret@" + AWAY, "postgresql://me:s3cret%@" + AWAY, "postgresql://me:s3%00cret@" + AWAY,
    "postgresql://me:s3/cret@" + AWAY, "postgresql://me:cret@s3cret@" + AWAY, "postgresql://me:s3?cret@" + AWAY,
    "postgresql://me:s3 cret@" + AWAY, "password='s3 cret", "postgresql://127.0.0.1:1/none?password=s3cret%zz",
])  # fmt: skip
def test_a_url_that_cannot_be_read_is_refused_unseen(file, url, queue, capsys):
    file.write_text(url + "\n")
    assert relay.main(["status"]) == 64
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "encode" in said.err
    assert "cret" not in said.err and "s3" not in said.err


@pytest.mark.parametrize("url", ["postgresql://me:s3cret@" + AWAY, "postgresql://:s3cret@h/x", "host=h password=s3cret",
                                 "postgresql://h/x?password=s3cret", "password = s3cret"])  # fmt: skip
def test_a_password_among_the_arguments_is_refused(file, url, capsys):
    """Until it ends, all users of the machine see a command's arguments."""
    with pytest.raises(SystemExit) as ended:
        relay.main(["status", "--url", url])
    said = capsys.readouterr().err
    assert ended.value.code == 64 and str(file) in said and "s3cret" not in said


@pytest.mark.parametrize("password", ["s3cret", "100%", "a b'c", "p%20q"])
def test_no_message_has_the_password(password):
    import psycopg

    made = hub.Hub(f"postgresql://me:{hub_quoted(password)}@{AWAY}")
    with pytest.raises(hub.HubTrouble) as error, made._trouble():
        raise psycopg.OperationalError(f"the server said: {password}")
    assert str(error.value) == "the hub cannot be used: the server said: ***"


def hub_quoted(password: str) -> str:
    from urllib.parse import quote

    return quote(password, safe="")


def test_the_file_is_its_owners_alone(file, capsys):
    file.write_text("postgresql://me@" + AWAY)
    file.chmod(0o640)
    with pytest.raises(SystemExit) as ended:
        relay.main(["status"])
    assert ended.value.code == 64 and f"{file} is not yours alone" in capsys.readouterr().err


def test_nothing_of_the_url_is_seen_while_a_fetched_task_runs(machines, tmp_path):
    """Not by the handler, in no process's arguments, and in no file of the state."""
    here, there = machines
    password = here.hub.server.password
    secrets = [password, hub_quoted(password), here.hub.url]
    for machine in (here, there):
        url_file = Path(machine.env["HOME"], ".claude/automation/lychee/hub")
        url_file.parent.mkdir(parents=True)
        url_file.touch(0o600)
        url_file.write_text(f"{machine.env.pop('TASK_QUEUE_HUB')}\n")
    env = tmp_path / "environment"
    env.touch(0o600)
    go, seen = tmp_path / "go", tmp_path / "seen"
    there.handler("it", f"#!/bin/sh\nenv; tr '\\0' '\\n' </proc/$PPID/environ\ntouch '{seen}'\n"
                        f"until [ -e '{go}' ]; do sleep 0.05; done\n")  # fmt: skip
    task = here.enqueue("builds", "it")
    here.relay("push", "builds", "--drain")
    fetch = there.here.start("relay.py", "fetch", "builds")
    worker = there.here.worker("builds", "--environment", env, ready=False)
    wait_for(seen.exists, what="a running handler")
    arguments = b""
    for path in readable("/proc/[0-9]*/cmdline"):
        # Other processes end meanwhile.
        with suppress(OSError):
            arguments += path.read_bytes()
    environ = Path(f"/proc/{worker.pid}/environ").read_bytes()
    go.touch()
    wait_for(lambda: there.rows("select 1 from task_history"), what="its end")
    wait_for(lambda: here.relay("pull", "--drain") and here.history(task), what="its end at home")
    files = [path for state in (here.state, there.state) for path in state.rglob("*")]
    kept = b"".join(path.read_bytes() for path in files if path.is_file())
    said = fetch.log.read_bytes() + worker.log.read_bytes()
    for secret in secrets:
        assert secret.encode() not in arguments + environ + kept + said


def readable(pattern: str) -> list[Path]:
    return [path for path in Path("/").glob(pattern[1:]) if os.access(path, os.R_OK)]
