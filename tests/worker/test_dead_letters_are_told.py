"""worker.py says at its end what it did, and --on-dead is told of dead letters."""

import json
import signal
import subprocess
import sys

from conftest import ROOT, wait_for


def letters(installation) -> list[list[dict]]:
    path = installation.directory / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def teller(installation) -> str:
    """A program that appends its stdin, a line of JSON, to a file."""
    program = installation.directory / "tell it"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"fd = os.open({str(installation.directory / 'told')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "os.write(fd, sys.stdin.buffer.read() + b'\\n')\n"
    )
    program.chmod(0o755)
    return f"'{program}' dead"


def test_all_dead_letters_of_a_minute_are_told_at_once(installation):
    installation.handler("bad", "#!/bin/sh\necho broken >&2\nexit 65\n")
    for number in range(3):
        installation.enqueue("notifications", "bad", "{}", "--task-id", f"bad-{number}")
    installation.run(
        "worker.py",
        "notifications",
        "--handlers",
        installation.handlers,
        "--drain",
        "--on-dead",
        teller(installation),
    )
    told = wait_for(
        lambda: sum(letters(installation), []) if len(sum(letters(installation), [])) == 3 else None
    )
    assert {letter["task_id"] for letter in told} == {"bad-0", "bad-1", "bad-2"}
    assert all(
        "broken" in letter["error"] and letter["queue"] == "notifications" for letter in told
    )
    assert len(letters(installation)) <= 2


def test_so_is_one_that_a_worker_buries_for_a_dead_one_before_it_leaves(installation):
    """The database knows of it a little before the worker does."""
    installation.enqueue("notifications", "any", "{}", "--task-id", "lost")
    installation.sqlite3(
        "update notifications set status = 2, owner = '1-dead', claimed_at = 5.5, attempts = 4"
    )
    slowly = (
        "import sys, time, queue_helpers as q, worker; recover = q.recover\n"
        "def slow(*args, **how):\n"
        "    found = recover(*args, **how)\n"
        "    if found[0]:\n"
        "        q.Watch.of().listeners.set()\n"
        "        time.sleep(0.3)\n"
        "    return found\n"
        "q.recover = slow; sys.exit(worker.main(sys.argv[1:]))"
    )
    options = ("--handlers", installation.handlers, "--drain", "--on-dead", teller(installation))
    done = subprocess.run(
        [sys.executable, "-c", slowly, "notifications", *options],
        env=installation.env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "1 failed" in done.stderr, done.stderr
    told = wait_for(lambda: letters(installation), what="the dead letter")
    assert [letter["task_id"] for letter in sum(told, [])] == ["lost"]


def test_so_is_one_that_waits_for_its_minute_when_the_worker_starts_afresh(installation):
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    installation.handler("kills_its_parent", "#!/bin/sh\nkill -9 $PPID\n")
    installation.worker("notifications", "--max-attempts", 1, "--on-dead", teller(installation))
    installation.enqueue("notifications", "bad", "{}", "--task-id", "first")
    wait_for(lambda: letters(installation), what="the first letter")
    installation.enqueue("notifications", "bad", "{}", "--task-id", "second")
    installation.finished("second")
    installation.enqueue("notifications", "kills_its_parent")
    told = wait_for(lambda: letters(installation)[1:], what="the second letter")
    assert [letter["task_id"] for letter in told[0]] == ["second"]


def test_the_command_has_its_signals_as_a_shell_would_give_them(installation):
    """Python ignores SIGPIPE, and so does what it starts, unless that is undone."""
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    installation.enqueue("notifications", "bad")
    told = installation.directory / "signals"
    command = f"sh -c 'grep SigIgn /proc/self/status >{told}.new; mv {told}.new {told}'"
    how = ("--handlers", installation.handlers, "--drain", "--on-dead", command)
    installation.run("worker.py", "notifications", *how)
    wait_for(told.exists)
    assert int(told.read_text().split()[1], 16) & 1 << signal.SIGPIPE - 1 == 0


def test_a_task_that_ends_well_is_not_told(installation):
    installation.handler("good", "#!/bin/sh\nexit 0\n")
    installation.enqueue("notifications", "good")
    done = installation.run(
        "worker.py",
        "notifications",
        "--handlers",
        installation.handlers,
        "--drain",
        "--on-dead",
        teller(installation),
    )
    assert done.returncode == 0 and letters(installation) == []


def test_a_command_that_is_not_there_is_refused_at_the_start(installation):
    done = installation.run(
        "worker.py",
        "notifications",
        "--handlers",
        installation.handlers,
        "--on-dead",
        "nosuchcommand x",
    )
    assert done.returncode == 64 and "nosuchcommand: there is no such program" in done.stderr


def test_a_worker_says_what_it_did_and_what_a_drain_leaves(installation):
    installation.handler("good", "#!/bin/sh\nexit 0\n")
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    installation.handler("later", "#!/bin/sh\nexit 1\n")
    for task_type in ("good", "good", "bad", "later"):
        installation.enqueue("notifications", task_type)
    done = installation.run(
        "worker.py",
        "notifications",
        "--handlers",
        installation.handlers,
        "--drain",
        "--backoff",
        "600",
    )
    last = done.stderr.splitlines()[-1]
    assert "2 done, 1 failed, 1 to be tried again" in last
    assert "1 scheduled in notifications, the next in" in last


def test_an_idle_worker_says_that_no_task_was_run(installation):
    done = installation.run(
        "worker.py", "notifications", "--handlers", installation.handlers, "--drain"
    )
    assert "no task was run" in done.stderr.splitlines()[-1]
