"""A worker that a hook or the service starts takes every variable from one file, and none from its caller."""

import json
import os

import pytest

from taskqueue import environment

DERIVED = {"USER", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"}
DEFAULTS = {"HOME", "LANG", "PATH", "UV", "UV_PYTHON"}
TOLD = {"TASK_ID", "TASK_TYPE", "TASK_QUEUE", "TASK_ATTEMPT", "TASK_DEPTH", "TASK_QUEUE_STATE"}
# What another session may have: accounts, proxies, loaders, places.
SESSION = {
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:9",
    "AWS_CONFIG_FILE": "/workspace/aws",
    "CLAUDE_CONFIG_DIR": "/workspace/.claude",
    "CLAUDE_CODE_SHELL_PREFIX": "./evil.sh",
    "SSH_AUTH_SOCK": "/workspace/agent",
    "https_proxy": "http://127.0.0.1:9",
    "UV_INDEX_URL": "http://127.0.0.1:9",
    "PYTHONPATH": "/workspace",
    "BASH_ENV": "/workspace/env",
    "ENV": "/workspace/env",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/workspace/bus",
}


@pytest.fixture
def file(installation):
    made = installation.directory / "environment"
    made.touch(0o600)
    return made


def told(installation, file, **session):
    """Return what a task's handler finds in its environment."""
    installation.handler(
        "it", "#!/usr/bin/env python3\nimport json, os\nprint(json.dumps(dict(os.environ)))\n"
    )
    task = installation.enqueue("notifications", "it")
    ran = installation.run(
        *("worker.py", "notifications", "--drain", "--environment", file),
        *("--handlers", installation.handlers),
        env=session,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(installation.finished(task)["result"])


def test_the_handler_sees_the_file_and_nothing_of_the_caller(installation, file):
    lines = {"ANTHROPIC_API_KEY": "sk-$HOME 100% 'x", "CLAUDE_CONFIG_DIR": "/mine", "EMPTY": ""}
    file.write_text("# mine\n\n" + "".join(f"{name}={value}\n" for name, value in lines.items()))
    found = told(installation, file, **SESSION)
    assert found.items() >= lines.items()
    assert found.keys() - lines.keys() - DERIVED - {"LC_CTYPE", "UV_NO_CONFIG"} == DEFAULTS | TOLD
    assert not {*SESSION.values()} & {*found.values()}
    assert found["TASK_QUEUE_STATE"] == str(installation.state)


def test_without_the_file_the_defaults_hold(installation, file):
    file.unlink()
    found = told(installation, file, **SESSION)
    assert found["HOME"] == str(installation.directory)
    assert not {*SESSION} & found.keys() - DERIVED and not file.exists()


def test_a_task_without_a_workspace_runs_at_home(installation, file):
    installation.handler("where", "#!/bin/sh\npwd -P\n")
    task = installation.enqueue("notifications", "where")
    words = ("notifications", "--drain", "--environment", file, "--handlers", installation.handlers)
    installation.run("worker.py", *words, cwd="/usr")
    assert installation.finished(task)["result"].strip() == str(installation.directory)


@pytest.mark.parametrize(
    "text, said",
    [
        ("export A=b\n", "line 1 is not NAME=value"),
        ("\nA\n", "line 2 is not NAME=value"),
        (" A=b\n", "line 1 is not NAME=value"),
        ("A=b\r\n", "line 1 has a control character"),
        ('A="b"\n', "line 1: the quotes would be a part of A"),
    ],
)
def test_a_line_that_may_be_meant_otherwise_starts_no_worker(installation, file, text, said):
    """A worker under the wrong account is worse than none."""
    file.write_text(text)
    ran = installation.run("worker.py", "notifications", "--drain", "--environment", file)
    assert (ran.returncode, ran.stderr.count("\n")) == (64, 1) and said in ran.stderr


def test_a_file_that_others_may_read_starts_no_worker(installation, file):
    file.chmod(0o644)
    ran = installation.run("worker.py", "notifications", "--drain", "--environment", file)
    assert ran.returncode == 64 and f"{file} is not yours alone" in ran.stderr


def test_the_search_path_has_directories_of_ours_and_no_relative_ones(tmp_path):
    (tmp_path / "bin").mkdir()
    entries = ["", ".", "bin", str(tmp_path / "bin"), str(tmp_path / "gone"), "/proc/1/root/nope"]
    path = environment.search_path(entries, str(tmp_path), "/opt/uv's/uv").split(":")
    # Install may make the last of these later, for its command.
    later = f"{tmp_path}/.local/bin"
    assert str(tmp_path / "bin") in path and later in path
    assert all(os.path.isdir(entry) for entry in path if entry != later)
    assert all(map(os.path.isabs, path))
