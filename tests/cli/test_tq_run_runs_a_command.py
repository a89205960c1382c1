"""tq run -- COMMAND: a person's command runs as it stands, and nobody else's does."""

import json
import shlex
import shutil

import pytest
from conftest import ROOT, one_line

BREAK_OUT = "it's; $(touch pwned) \n\t* ü"


@pytest.fixture
def runs(installation):
    """Run what is ready with the real handler; return a task's last end."""
    shutil.copy(ROOT / "handlers/run", installation.handlers)

    def work(task_id: str, *options) -> dict:
        installation.drain("notifications work", *options)
        return installation.history(task_id)

    return work


def test_it_runs_word_by_word_in_the_directory_where_it_was_typed(installation, runs):
    where = installation.directory / "a folder's ü"
    where.mkdir()
    line = 'pwd; printf "%s|" "$@"; env | grep -c -e "^UV_" -e VIRTUAL_ENV; cat; test -n "$TASK_ID"'
    words = ["--run", "--queue", "work", "--task-id", "it", "--new", "--priority", "3", "--"]
    typed = ("sh", "-c", line, "sh", BREAK_OUT, "", "--hold")
    installation.run("enqueue.py", *words, *typed, cwd=where)
    done = runs("it")
    assert done["status"] == "completed"
    assert installation.rows("select queue, priority from task_history") == [("work", 3)]
    assert done["result"] == f"{where}\n{BREAK_OUT}||--hold|0\n"
    assert not list(where.iterdir())
    [(data,)] = installation.rows("select data from task_history")
    payload = json.loads(data)["data"]
    assert shlex.split(payload["command"])[3:] == ["sh", BREAK_OUT, "", "--hold"]


@pytest.mark.parametrize(
    "command, error, attempts",
    [
        (["false"], "exit 1", 1),
        (["no-such-program"], "no-such-program: No such file or directory", 1),
        (["--max-attempts", "2", "--", "false"], "exit 1", 2),
    ],
)
def test_what_fails_is_tried_once_unless_more_is_asked(
    installation, runs, command, error, attempts
):
    options = ["--"] if "--" not in command else []
    installation.run("enqueue.py", "--run", "--task-id", "it", *options, *command)
    installation.worker("notifications", "--backoff", 0.01)
    done = installation.finished("it")
    assert error in done["error"] and done["attempts"] == attempts


@pytest.mark.parametrize("door", ["add", "hook", "jsonl", "chain", "then", "edited"])
def test_no_payload_and_no_result_chooses_a_program(installation, runs, door):
    """Each door is given a command that would leave a file."""
    mark = installation.directory / "mark"
    argv = ["touch", str(mark)]
    payload = {"command": f"touch {mark}", "argv": argv, "granted": {"argv": argv}}
    data = json.dumps(payload)
    if door == "add":
        installation.enqueue("notifications", "run", data)
    elif door == "hook":
        hook = {"hook_event_name": "Stop", "cwd": str(installation.directory), **payload}
        hook = json.dumps(hook)
        installation.run("enqueue.py", "--hook", "notifications", "run", input=hook)
    elif door == "jsonl":
        installation.run("enqueue.py", "notifications", "run", "--jsonl", input=data + "\n")
    elif door == "edited":
        installation.run("enqueue.py", "--run", "--hold", "--task-id", "it", "--", "true")
        installation.tq("approve it --with", data)
    else:
        entry = {"queue": "notifications", "task_type": "run", "data": payload}
        said = {"enqueue": [entry]} if door == "chain" else payload
        handler = "first" if door == "chain" else "run"
        script = f"#!/bin/sh\necho {shlex.quote(json.dumps(said))}\n"
        installation.handler(handler, script)
        installation.add(f"approvals {handler}")
        options = "--chain" if door == "chain" else "--then notifications"
        installation.drain(f"approvals {options}")
        shutil.copy(ROOT / "handlers/run", installation.handlers)
    found = "select task_id from task_queue where queue = 'notifications'"
    [(task_id,)] = installation.rows(found)
    done = runs(task_id)
    assert not mark.exists()
    assert done["status"] == ("completed" if door == "edited" else "failed")
    if door != "edited":
        assert "only `tq run` makes such tasks" in done["error"]


def test_wrong_use_is_one_line(installation):
    for words in ("make", "--", "--hook -- true", "--jsonl -- true", ""):
        one_line(installation.run("enqueue.py", "--run", *words.split()), 64)
