"""The scripts of `tq completion` complete commands, options, queues, types and ids, in real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# The function of a shell that prints what it offers for a command line, one a line.
BASH = """source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _tq; printf '%s\\n' "${COMPREPLY[@]}" """
ZSH = """compdef() { :; }; _files() { :; }; compadd() { print -l -- $names }
source "$1"; shift; words=("$@"); CURRENT=$#; _tq"""
FISH = """source $argv[1]; complete -C (string join ' ' -- $argv[2..-1]) | string split -f1 \\t"""
SHELLS = {"bash": (BASH, "bash"), "zsh": (ZSH, "zsh"), "fish": (FISH,)}


@pytest.fixture(params=SHELLS)
def offers(request, installation):
    """A function that returns what a shell offers for words, the last of them unfinished."""
    shell = request.param
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    tq = installation.directory / "bin/tq"
    tq.parent.mkdir()
    text = (ROOT / "bin/tq.sh").read_text().replace("\nlib=\n", f"\nlib='{ROOT}'\n")
    tq.write_text(text.replace("\npython=\n", f"\npython='{sys.executable}'\n"))
    tq.chmod(0o755)
    script = installation.directory / "completion"
    env = installation.env | {"PATH": f"{tq.parent}:{installation.env['PATH']}"}
    done = subprocess.run([tq, "completion", shell], env=env, capture_output=True, check=True)
    script.write_bytes(done.stdout)

    def offered(*words: str) -> list[str]:
        code, *name = SHELLS[shell]
        command = [shell, "-c", code, *name, str(script), "tq", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return [line for line in done.stdout.split("\n") if line]

    return offered


def test_words_are_completed_from_help_and_the_database(installation, offers):
    for name, how in (("aa-1", ["--hold"]), ("aa-2", []), ("ab", ["--delay", "1h"])):
        installation.enqueue("approvals", "review", "{}", "--task-id", name, *how)
    installation.enqueue("reviews", "lint", "{}", "--task-id", "a $(touch x)")
    installation.sqlite3("insert into notifications (data) values ('{}')")
    assert {"list", "limit"} == set(offers("li"))
    assert {"add", "run", "work", "cleanup", "wait", "completion"} <= set(offers(""))
    assert offers("list", "--sta") == ["--status"] and offers("show", "--qu") == ["--queue"]
    assert set(offers("list", "--status", "c")) == {"completed", "cancelled"}
    assert offers("add", "x", "y", "--on-duplicate", "re") == ["replace", "rerun"]
    assert offers("help", "not") == ["notify"] and offers("relay", "pu") == ["pull", "push"]
    assert offers("pause", "r") == ["reviews"] == offers("list", "--queue", "r")
    assert offers("work", "approvals", "rev") == ["reviews"]
    assert set(offers("list", "--type", "")) >= {"review", "lint"}
    assert offers("add", "approvals", "li") == ["lint"]
    assert offers("show", "aa") == ["aa-1", "aa-2"] and offers("approve", "a") == ["aa-1"]
    assert offers("show", "notifications-") == ["notifications-1"]
    # No id that a shell would take for something else is offered.
    assert set(offers("cancel", "")) == {"aa-1", "aa-2", "ab", "notifications-1"}
    assert installation.run("tasks.py", "cancel", "ab").returncode == 0
    assert "ab" in offers("show", "a") and "ab" not in offers("cancel", "a")
    assert offers("retry", "a") == ["ab"] and offers("move", "a", "rev") == ["reviews"]


def test_without_a_database_nothing_is_offered_and_nothing_is_made(installation, offers):
    assert offers("pause", "x") == [] and not installation.state.exists()
