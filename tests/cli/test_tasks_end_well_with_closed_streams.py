"""Standard streams that are closed, or closed by their reader, and a locale that is not UTF-8: no
traceback, the work is done.
"""

from __future__ import annotations

import json
import locale
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.first

SCRIPTS = ("tasks.py", "cleanup.py")
COMMANDS = [
    ["tasks.py", "stats"], ["tasks.py", "stats", "--json"], ["tasks.py", "list"], ["tasks.py", "show", "a-1"],
    ["tasks.py", "logs", "a-1"], ["tasks.py", "pause", "approvals"], ["tasks.py", "retry", "nothing"], ["tasks.py", "purge", "completions"],
    ["tasks.py", "doctor"], ["tasks.py", "doctor", "--json"], ["tasks.py", "export", "copy.jsonl"], ["tasks.py", "backup", "copy.db"],
    ["cleanup.py"], ["cleanup.py", "--json"], ["tasks.py", "list", "--nonsense"], ["tasks.py"], ["tasks.py", "--help"], ["tasks.py", "doctor", "--nonsense"],
]  # fmt: skip


@pytest.fixture
def ended(installation):
    installation.handler("good", "#!/bin/sh\necho out; echo err >&2\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "a-1")
    assert (
        installation.run(
            "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    return installation


def with_streams(
    installation, redirections: str, command: list[str], input: str = ""
) -> tuple[int, str]:
    """(exit code, what went to the streams that are left)."""
    line = f'"$@" {redirections}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, ROOT / command[0], *command[1:]],
        env=installation.env,
        check=False,
        input=input.encode(),
        capture_output=True,
        cwd=installation.directory,
        timeout=60,
    )
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code_and_gives_no_traceback(ended, redirections):
    for command in COMMANDS:
        expected = ended.run(*command, cwd=ended.directory).returncode
        code, said = with_streams(ended, redirections, command)
        assert "Traceback" not in said and "Exception ignored" not in said, (command, said)
        assert code == expected, (command, said)


def test_nothing_that_is_said_gets_into_a_file_that_is_opened_meanwhile(ended):
    """The first file that is opened gets the number of a closed stream."""
    assert with_streams(ended, "<&- >&- 2>&-", ["tasks.py", "backup", "copy.db"])[0] == 0
    assert (ended.directory / "copy.db").read_bytes()[:15] == b"SQLite format 3"
    assert (
        with_streams(ended, "<&- >&- 2>&-", ["tasks.py", "export", "--history", "copy.jsonl"])[0]
        == 0
    )
    (line,) = (ended.directory / "copy.jsonl").read_text().splitlines()
    assert json.loads(line)["task_id"] == "a-1"
    assert with_streams(ended, "<&- >&- 2>&-", ["tasks.py", "cancel", "a-1"])[0] == 1


@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_readers_that_go_away_give_no_traceback(ended, reader):
    for command in COMMANDS:
        for pipe in (f"2>/dev/null | {reader} >/dev/null", f"2> >({reader} >/dev/null)"):
            _, said = with_streams(ended, pipe, command)
            assert "Traceback" not in said and "Exception ignored" not in said, (command, said)


def latin1() -> str | None:
    """The name of a Latin-1 locale of this machine."""
    for name in ("en_US.ISO-8859-1", "en_US.iso88591", "de_DE.ISO-8859-1", "de_DE.iso88591"):
        try:
            locale.setlocale(locale.LC_CTYPE, name)
            return name
        except locale.Error:
            continue
        finally:
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    return None


@pytest.mark.parametrize("language", ["C", "latin-1"])
def test_an_id_on_the_command_line_is_utf8_whatever_the_locale(ended, language):
    name = latin1() if language == "latin-1" else "C"
    if name is None:
        pytest.skip("no Latin-1 locale is installed")
    strange = {"LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended.enqueue("approvals", "größe", '{"größe": 1}', "--task-id", "Zwölf-🙂")
    for command in (
        ["show", "Zwölf-🙂"],
        ["show", "Zwöl"],
        ["list", "--type", "größe"],
        ["list", "--text", "größe"],
        ["cancel", "Zwölf-🙂"],
    ):
        done = subprocess.run(
            [sys.executable, ROOT / "tasks.py", *(os.fsencode(word) for word in command), "--json"],
            env=ended.env | strange,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert b"Zw\\u00f6lf" in done.stdout, (command, done.stdout)
    target = ended.directory / "Größe.db"
    done = subprocess.run(
        [sys.executable, ROOT / "tasks.py", "backup", os.fsencode(target)],
        env=ended.env | strange,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and target.exists(), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_its_version(installation, script):
    from taskqueue import cli as queue_cli

    done = installation.run(script, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{script} {queue_cli.VERSION}\n", "")


def test_output_that_is_larger_than_the_memory_is_passed_on(ended):
    """1 GB of output, and 400 MB of address space."""
    output = next((ended.state / "logs" / "approvals").glob("*.out"))
    with open(output, "r+b") as file:
        file.truncate(2**30)

    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20, 400 * 2**20))

    for command in (["logs", "a-1"], ["logs", "-f", "a-1"]):
        process = subprocess.Popen(
            [sys.executable, ROOT / "tasks.py", *command],
            env=ended.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=little_memory,
        )
        length = 0
        while piece := process.stdout.read(2**20):
            length += len(piece)
        said = process.stderr.read()
        assert process.wait() == 0 and length == 2**30 and said == b"err\n", said
    os.truncate(output, 200 * 2**20)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", "logs", "a-1", "--json"],
        env=ended.env,
        stdout=subprocess.PIPE,
        preexec_fn=little_memory,
    )
    length = 0
    while piece := process.stdout.read(2**20):
        length += len(piece)
    assert process.wait() == 0 and length > 6 * 200 * 2**20 - 100


@pytest.mark.parametrize(
    "redirections, why", [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
def test_a_report_that_cannot_be_printed_is_one_line(ended, redirections, why):
    said = with_streams(ended, redirections, ["report.py"])
    assert said == (1, f"report.py: standard output: {why}\n")
