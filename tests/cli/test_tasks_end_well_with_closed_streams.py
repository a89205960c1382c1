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
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

pytestmark = pytest.mark.first

COMMANDS = """stats --json | list | show a-1 | logs a-1 | pause approvals | retry nothing | purge completions
| doctor --json | export copy.jsonl | backup copy.db | cleanup.py | list --nonsense | --help""".split(
    " | "
)
CLOSED = (">&-", "2>&-", "<&-", "<&- >&- 2>&-")
READ = ("2>/dev/null | {} >/dev/null", "2> >({} >/dev/null)")


@pytest.fixture
def ended(installation):
    installation.handler("good", "#!/bin/sh\necho out; echo err >&2\n")
    installation.add("approvals good --task-id a-1")
    installation.drain("approvals")
    return installation


def words_of(command: str) -> list[str]:
    words = command.split()
    return words if words[0].endswith(".py") else ["tasks.py", *words]


def with_streams(installation, redirections: str, command: str) -> tuple[int, str]:
    """Return a command's exit code, and what went to the streams that are left."""
    script, *words = words_of(command)
    line = ["bash", "-c", f'"$@" {redirections}', "bash", sys.executable, ROOT / script, *words]
    done = subprocess.run(line, env=installation.env, input=b"", capture_output=True,
                          cwd=installation.directory, timeout=60)  # fmt: skip
    said = (done.stdout + done.stderr).decode()
    assert "Traceback" not in said and "Exception ignored" not in said, (command, said)
    return done.returncode, said


def test_a_closed_stream_changes_no_exit_code_and_gives_no_traceback(ended):
    def is_same(command: str) -> None:
        codes = [with_streams(ended, streams, command)[0] for streams in ("", *CLOSED)]
        assert len({*codes}) == 1, (command, codes)

    with ThreadPoolExecutor(2) as pool:
        [*pool.map(is_same, COMMANDS)]


def test_nothing_that_is_said_gets_into_a_file_that_is_opened_meanwhile(ended):
    """The first file that is opened gets the number of a closed stream."""
    assert with_streams(ended, "<&- >&- 2>&-", "backup copy.db")[0] == 0
    assert (ended.directory / "copy.db").read_bytes()[:15] == b"SQLite format 3"
    assert with_streams(ended, "<&- >&- 2>&-", "export --history copy.jsonl")[0] == 0
    (line,) = (ended.directory / "copy.jsonl").read_text().splitlines()
    assert json.loads(line)["task_id"] == "a-1"
    assert with_streams(ended, "<&- >&- 2>&-", "cancel a-1")[0] == 1


@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_readers_that_go_away_give_no_traceback(ended, reader):
    ways = [(command, pipe.format(reader)) for command in COMMANDS for pipe in READ]
    with ThreadPoolExecutor(2) as pool:
        [*pool.map(lambda way: with_streams(ended, way[1], way[0]), ways)]


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
    env = ended.env | {"LC_ALL": name, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def run(*words) -> bytes:
        command = [sys.executable, ROOT / "tasks.py", *map(os.fsencode, words)]
        return subprocess.run(command, env=env, capture_output=True, check=True).stdout

    ended.enqueue("approvals", "größe", '{"größe": 1}', "--task-id", "Zwölf-🙂")
    for words in ("show Zwölf-🙂", "show Zwöl", "list --type größe", "list --text größe",
                  "cancel Zwölf-🙂"):  # fmt: skip
        assert b"Zw\\u00f6lf" in run(*words.split(), "--json"), words
    target = ended.directory / "Größe.db"
    run("backup", target)
    assert target.exists()


def test_output_that_is_larger_than_the_memory_is_passed_on(ended):
    """400 MB of output, and 200 MB of address space."""
    output = next((ended.state / "logs" / "approvals").glob("*.out"))
    size, memory = 400 * 2**20, 200 * 2**20

    def length_of(command: str) -> int:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tasks.py", *command.split()],
            env=ended.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        )
        length = 0
        while piece := process.stdout.read(2**20):
            length += len(piece)
        said = process.stderr.read()
        assert process.wait() == 0 and said in (b"err\n", b""), said
        return length

    os.truncate(output, size)
    assert length_of("logs a-1") == length_of("logs -f a-1") == size
    os.truncate(output, size // 4)
    assert length_of("logs a-1 --json") > 6 * size // 4 - 100


@pytest.mark.parametrize(
    "streams, why", [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")]
)
def test_a_report_that_cannot_be_printed_is_one_line(ended, streams, why):
    said = with_streams(ended, streams, "report.py")
    assert said == (1, f"report.py: standard output: {why}\n")
