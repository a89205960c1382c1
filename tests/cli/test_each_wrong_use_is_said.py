"""Each kind of wrong use of tasks.py and cleanup.py: one line that says
what is wrong, and what is right.
"""

from __future__ import annotations

import pytest

IS_A_DURATION = "is not a duration like 30, 90m, 5min, 1.5h or 2d"
WRONG = {
    "": "the following arguments are required: COMMAND",
    "nope": "there is no command 'nope'",
    "stat": "there is no command 'stat' (did you mean stats?)",
    "list --nope": "unrecognized arguments: --nope",
    "list --statsu failed": "unrecognized arguments: --statsu failed (did you mean --status?)",
    "list --status odd": "'odd' is not a status: in_progress, pending, scheduled, held, blocked, ",
    "list --limit 0": "'0' is not a number of at least 1",
    "list --limit many": "'many' is not a number of at least 1",
    "list --since yesterday": f"'yesterday' {IS_A_DURATION}",
    "list --before -1h": "argument --before: expected one argument",
    "list --text=": "it is a text of 1 to 1000 characters",
    "list --sort size": "argument --sort: invalid choice: 'size'",
    "stats --interval soon": f"'soon' {IS_A_DURATION}",
    "show": "the following arguments are required: ID",
    "logs": "the following arguments are required: ID",
    "wait x --timeout 5x": f"'5x' {IS_A_DURATION}",
    "approve": "the following arguments are required: ID",
    "reject x --reason=": "it is a text of 1 to 1000 characters",
    "retry": "give the IDs to retry, or --failed, or --scheduled",
    "retry x --failed": "give the IDs to retry, or --failed, or --scheduled",
    "retry --failed --scheduled": "give the IDs to retry, or --failed, or --scheduled",
    "retry --scheduled --since 1h": "--since goes with --failed",
    "retry x --type t": "--type goes with --failed or --scheduled",
    "cancel x --wait long": f"'long' {IS_A_DURATION}",
    "pause": "the following arguments are required: QUEUE",
    "pause approvals --for 1year": f"'1year' {IS_A_DURATION}",
    "pause approvals --for 99999w": "is longer than 30 years",
    "limit approvals": "give --slots, --cost or both",
    "limit approvals --slots 0": "'0' is not a number of at least 1",
    "limit approvals --slots some": "'some' is not a number of at least 1",
    "move approvals": "give the IDs to move, or --from",
    "move x approvals --type t": "--type goes with --from and no ID",
    "purge approvals --status running": "a running task is not purged: ./tasks.py cancel ID",
    "import": "the following arguments are required: FILE",
    "import - --legacy d": "unrecognized arguments: --legacy d",
    "export a b": "unrecognized arguments: b",
    "backup": "the following arguments are required: FILE",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_line(installation, command):
    done = installation.run("tasks.py", *command.split())
    assert done.returncode == 64 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert WRONG[command] in line and line.endswith("--help"), line
    assert not installation.state.exists()


@pytest.mark.parametrize("script, command, words", [
    ("tasks.py doctor", "--max-wait soon", IS_A_DURATION), ("tasks.py doctor", "more", "unrecognized arguments: more"),
    ("cleanup.py", "--keep all", IS_A_DURATION), ("cleanup.py", "--every 0.5", "is less than a second"),
    ("tasks.py service", "--kind upstart", "invalid choice: 'upstart'"),
    ("install.py", "", "the following arguments are required: COMMAND"),
    ("install.py", "install --event WorktreeCreate", "could make no worktree any more")])  # fmt: skip
def test_a_wrong_command_line_of_the_others(installation, script, command, words):
    done = installation.run(*f"{script} {command}".split())
    assert done.returncode == 64 and done.stdout == "" and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert words in done.stderr and "--help" in done.stderr


REFUSED = {
    "move ready approvals": "queue 'approvals' is where it is already",
    "move ended completions": "task ended has ended: retry it first, then move it",
    "approve ready": "task ready of approvals was not approved: it is pending, not held",
    "reject ended": "task ended of approvals was not rejected: it has ended already",
    "retry ready": "task ready of approvals was not retried: a task of this id is waiting or running already (pending)",
    "cancel ended": "task ended of approvals was not cancelled: it has ended already (cancelled)",
    "logs ready": "task ready has not run yet (pending); -f waits for it",
    "purge approvals": "this would delete 1 pending of approvals for good; add --yes, there is nobody to ask",
    "backup /no/such/place/file": "there is no directory /no/such/place; make it: mkdir -p /no/such/place",
    "backup /": "/ is a directory: give a file's name",
    "restore /no/such/backup": "/no/such/backup: No such file or directory",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_done(installation, command):
    installation.enqueue("approvals", "review", "{}", "--task-id", "ready")
    installation.enqueue("approvals", "review", "{}", "--task-id", "ended")
    assert installation.run("tasks.py", "cancel", "ended").returncode == 0
    done = installation.run("tasks.py", *command.split())
    assert done.returncode == 1 and done.stdout == "", done.stdout
    (line,) = done.stderr.splitlines()
    assert REFUSED[command] in line, line
