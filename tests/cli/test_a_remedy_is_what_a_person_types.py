"""Where install.py has put tq on PATH, messages and help say `tq list`; elsewhere they name the
script as a shell there takes it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, copy_scripts

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "\n# /// script\n" in path.read_text())


@pytest.fixture
def installed(installation):
    """The scripts as install.py puts them, with tq on PATH; a function that runs one."""
    lib = installation.directory / "prefix/runtime/lib"
    lib.mkdir(parents=True)
    copy_scripts(lib, *(path.name for path in ROOT.glob("*.py")), "bin/tq.sh")
    tq = installation.directory / "bin/tq"
    tq.parent.mkdir()
    tq.write_text(
        (ROOT / "bin/tq.sh")
        .read_text()
        .replace("\nlib=\n", f"\nlib='{lib}'\n")
        .replace("\npython=\n", f"\npython='{sys.executable}'\n")
    )
    tq.chmod(0o755)
    record = {"files": {}, "state": str(installation.state), "command": str(tq)}
    (installation.directory / "prefix/installed.json").write_text(json.dumps(record))

    def run(
        script: str, *args, on_path: bool = True, env: dict | None = None
    ) -> subprocess.CompletedProcess:
        path = f"{tq.parent}:{installation.env['PATH']}" if on_path else installation.env["PATH"]
        env = installation.env | {"PATH": path} | (env or {})
        return subprocess.run(
            [sys.executable, lib / script, *args],
            env=env,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    run.tq = tq
    return run


def test_remedies_are_typed_as_tq(installation, installed):
    # No connection of this process may keep the database's log open when its file is spoiled below.
    installation.is_inside = False
    installation.enqueue("approvals", "nobodys", "{}", "--task-id", "h-1", "--hold")
    for args, words in ((["show", "x"], "see: tq list"), (["list", "--status", "odd"], "see tq list --help"), (["retry", "h-1"], "tq approve h-1"),
                        (["import"], "see tq import --help"), (["list", "--nope"], "see tq list --help")):  # fmt: skip
        done = installed("tasks.py", *args)
        assert words in done.stderr and not re.search(r"(see:?|:) \w+\.py", done.stderr), (
            done.stderr
        )
    installed("tasks.py", "pause", "approvals")
    assert "tq resume approvals" in installed("tasks.py", "stats").stdout
    said = installed("tasks.py", "doctor", "--max-wait", "0").stdout
    assert "tq approve ID" in said and not re.search(r"-> .*\b(tasks|worker|cleanup)\.py", said), (
        said
    )
    assert "see tq cleanup --help" in installed("cleanup.py", "--nope").stderr
    installation.db.write_bytes(b"no database " * 500)
    for args, who in (
        (["tasks.py", "list"], "tq list"),
        (["worker.py", "approvals", "--", "true"], "tq work"),
        (["enqueue.py", "approvals", "t"], "tq add"),
        (["report.py"], "tq report"),
        (["cleanup.py"], "tq cleanup"),
        (["tasks.py", "page"], "tq page"),
        (["tasks.py", "export"], "tq export"),
        (["relay.py", "status"], "tq relay"),
    ):
        done = installed(*args, env={"TASK_QUEUE_HUB": "postgresql://nobody@127.0.0.1:1/none"})
        assert f"{who}: " in done.stderr and ".py" not in done.stderr, done.stderr
        assert "put a backup in its place with: tq restore BACKUP" in done.stderr


def test_wrong_use_is_told_as_it_was_typed(installed):
    for args, words in (
        (["enqueue.py"], "tq add: QUEUE and TASK_TYPE are required; see tq add --help\n"),
        (["worker.py"], "tq work: the following arguments are required: QUEUE; see tq work --help\n"),
        (["report.py", "--x"], "tq report: '--x' is not known; see tq report --help\n"),
        (["tasks.py", "dashboard"], "tq dashboard: tq page --open replaced it\n"),
        (["tasks.py", "doctor", "--x"], "tq doctor: unrecognized arguments: --x; see tq doctor --help\n"),
        (["tasks.py", "import"], "tq import: the following arguments are required: FILE; see tq import --help\n"),
        (["install.py", "install", "--x"], "tq install: unrecognized arguments: --x; see tq install --help\n"),
        (["install.py", "uninstall", "--x"], "tq uninstall: unrecognized arguments: --x; see tq uninstall --help\n"),
        (["tasks.py", "service", "--x"], "tq service: unrecognized arguments: --x; see tq service --help\n"),
        (["relay.py", "fetch"], "tq relay fetch: the following arguments are required: QUEUE; see tq relay fetch --help\n"),
    ):  # fmt: skip
        done = installed(*args)
        assert (done.returncode, done.stderr) == (64, words)


def test_elsewhere_remedies_name_the_script_where_it_lies(installation, installed, tmp_path):
    installation.enqueue("approvals", "review")
    assert "see: ./tasks.py list" in installation.run("tasks.py", "show", "x", cwd=ROOT).stderr
    said = installation.run("tasks.py", "list", "--status", "odd", cwd=ROOT).stderr
    assert "see ./tasks.py list --help" in said
    said = installation.run("tasks.py", "show", "x", cwd=tmp_path).stderr
    assert f"see: {ROOT}/tasks.py list" in said
    # It is installed, but what a person types finds another program or none.
    lib = installation.directory / "prefix/runtime/lib"
    said = installed("tasks.py", "show", "x", on_path=False).stderr
    assert f"see: {lib}/tasks.py list" in said
    assert "worker.py approvals" in installation.run("tasks.py", "doctor", "--max-wait", "0").stdout


def test_help_speaks_of_tq_alone(installation, installed):
    import tasks
    from taskqueue import cli

    words = [["tasks.py", cli.name_of(run), "--help"] for run in tasks.COMMANDS[::6]]
    words += [[f"{script}.py", "--help"] for script in SCRIPTS if script not in ("demo", "install")]
    words += [["install.py", "install", "--help"], ["tasks.py", "service", "--help"]]
    for args in words:
        said = installed(*args).stdout
        assert "tq" in said and not re.search(r"\b(tasks|worker|enqueue)\.py", said), (args, said)
    assert (
        "\n    tq add notifications link_validation '{" in installed("enqueue.py", "--help").stdout
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_its_version(installation, script):
    import queue_helpers

    done = installation.run(f"{script}.py", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{script}.py {queue_helpers.VERSION}\n",
        "",
    )


def test_tq_says_its_version(installation, installed):
    import queue_helpers

    done = subprocess.run(
        [installed.tq, "--version"], env=installation.env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"tq {queue_helpers.VERSION}\n")


def test_there_is_a_licence():
    assert (
        (ROOT / "LICENSE")
        .read_text()
        .startswith("MIT License\n\nCopyright (c) 2026 the authors of the task queue\n")
    )
