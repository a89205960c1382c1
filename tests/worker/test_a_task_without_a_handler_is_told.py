"""A task whose type has no handler ends as a dead letter that says which handler is missing; once
it is there, retry runs it.
"""

from __future__ import annotations

import json
import os

import pytest
from conftest import wait_for

# A bare INSERT or spool file bears no task type, so it has its queue's.
BARE = '{"prompt": "hello"}'


def drain(installation, *args):
    done = installation.run(
        "worker.py", "notifications", "--drain", "--handlers", installation.handlers, *args
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def insert(installation):
    installation.sqlite3(f"insert into notifications (data) values ('{BARE}')")


def spool(installation):
    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ".new").write_text(BARE)
    os.rename(directory / ".new", directory / "a.json")


@pytest.mark.parametrize("put", [insert, spool])
def test_what_bash_has_put_ends_as_a_dead_letter_and_is_retried(installation, put):
    drain(installation)
    put(installation)
    for attempt in (1, 2, 3):
        said = drain(installation)
        assert "1 to be tried again; 1 scheduled in notifications, the next in " in said
        assert installation.rows(
            "select status, attempts, round(due_at - released_at) from notifications"
        ) == [(3, attempt, 60)]
        installation.sqlite3("update notifications set due_at = due_at - 61")
    assert "1 failed" in drain(installation)
    [(ident,)] = installation.rows("select task_id from task_history")
    done = installation.history(ident)
    assert (done["status"], done["attempts"], done["exit_code"]) == ("failed", 4, None)
    assert done["error"] == (
        f"no handler 'notifications' in {installation.handlers}: put an executable of that name "
        "there, then retry the task (attempt 4 of 4)"
    )
    assert f"tasks.py retry {ident}" in installation.run("tasks.py", "show", ident).stdout

    installation.handler("notifications", "#!/bin/sh\necho done\n")
    assert installation.run("tasks.py", "retry", ident).returncode == 0
    drain(installation)
    done = installation.history(ident)
    assert (done["status"], done["attempts"], done["result"]) == ("completed", 1, "done\n")


def test_a_handler_that_comes_in_time_runs_it(installation):
    task = installation.enqueue("notifications", "late")
    drain(installation)
    installation.handler("late", "#!/bin/sh\n").chmod(0o644)
    assert installation.run("tasks.py", "retry", "--scheduled").stdout == "retried 1 task\n"
    drain(installation)
    [(error,)] = installation.rows("select error from notifications")
    assert error.startswith("no handler 'late' in ") and "chmod +x" in error
    installation.handler("late", "#!/bin/sh\n")
    installation.run("tasks.py", "retry", "--scheduled")
    drain(installation)
    assert installation.history(task)["status"] == "completed"


def test_no_worker_waits_for_it_for_ever(installation):
    task = installation.enqueue("notifications", "unknown")
    worker = installation.worker("notifications", "--max-attempts", 1, "--idle-exit", 0.2)
    assert installation.finished(task)["status"] == "failed"
    assert worker.wait(20) == 0


def test_the_next_task_is_not_held_up(installation):
    installation.handler("fine", "#!/bin/sh\n")
    installation.enqueue("notifications", "unknown")
    task = installation.enqueue("notifications", "fine")
    installation.worker("notifications")
    assert installation.finished(task)["status"] == "completed"
    assert installation.rows("select status, attempts from notifications") == [(3, 1)]


def test_on_dead_is_told(installation):
    told = installation.directory / "told"
    tell = installation.directory / "tell"
    tell.write_text('#!/bin/sh\ncat >"$HOME/.told" && mv "$HOME/.told" "$HOME/told"\n')
    tell.chmod(0o755)
    installation.enqueue("notifications", "unknown")
    installation.worker("notifications", "--max-attempts", 1, "--on-dead", tell)
    wait_for(told.exists, what="the command of --on-dead")
    assert json.loads(told.read_text())[0]["error"].startswith("no handler 'unknown' in ")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("#!/bin/sh\r\n", "has Windows line ends: its interpreter is not found; sed -i 's/\\r$//' {}"),
        ("#!/usr/bin/env sh\r\n", "has Windows line ends: its interpreter is not found; sed -i 's/\\r$//' {}"),
        ("echo hello\n", "names no interpreter in its first line; begin it with one, like #!/bin/sh"),
        ("", "names no interpreter in its first line; begin it with one, like #!/bin/sh"),
        ("#!/nowhere/python9\n", "needs /nowhere/python9, which is not there; install python9, or mend the first line"),
        ("#!/usr/bin/env nonesuch\n", "needs nonesuch, which is not there; install nonesuch, or mend the first line"),
    ],
)  # fmt: skip
def test_a_handler_that_cannot_start_is_a_failed_attempt_with_doctors_words(
    installation, text, error
):
    handler = installation.handler("broken", "")
    handler.write_bytes(text.encode())
    task = installation.enqueue("notifications", "broken")
    drain(installation, "--backoff", 3600)
    [(attempts, wait)] = installation.rows(
        "select attempts, due_at - released_at from notifications"
    )
    # What env did not find has run, and has its back-off.
    assert attempts == 1 and (1800 <= wait <= 3600 if "/env " in text else round(wait) == 60)
    installation.sqlite3("update notifications set due_at = due_at - 3601")
    drain(installation, "--max-attempts", 2)
    done = installation.history(task)
    assert (done["status"], done["attempts"]) == ("failed", 2)
    assert done["error"] == f"its handler {error.format(handler)} (attempt 2 of 2)"


def test_a_command_that_a_handler_does_not_find_is_its_own_failure(installation):
    installation.handler("calls", "#!/bin/sh\nnonesuch\n")
    task = installation.enqueue("notifications", "calls")
    drain(installation, "--max-attempts", 1)
    error = installation.history(task)["error"]
    assert error.startswith("exit 127: ") and "nonesuch" in error
