"""Each kind of wrong use of tasks.py and cleanup.py, and each database that they cannot use: one
line that says what is wrong, and what is right.
"""

from __future__ import annotations

import shlex
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, one_line

READING = (
    "stats",
    "stats --watch",
    "list",
    "show x",
    "logs x",
    "logs -f x",
    "export",
    "backup copy",
)
CHANGING = ("retry x", "retry --failed", "cancel x", "resume approvals", "move x approvals",
            "purge approvals --yes")  # fmt: skip
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
    "stats --interval -1": "",
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
    "cancel": "the following arguments are required: ID",
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
    **{f"{command} ''": "" for command in ("show", "logs", "wait", "approve", "reject", "retry", "cancel")},
    "move '' approvals": "",
    "cleanup.py --keep all": IS_A_DURATION,
    "cleanup.py --keep \"24 o'clock\"": IS_A_DURATION,
    "cleanup.py --keep -1h": "",
    "cleanup.py --keep ''": "",
    "cleanup.py --keep 1y": IS_A_DURATION,
    "cleanup.py --keep 9999999w": "is longer than",
    "cleanup.py --keep-failed nan": IS_A_DURATION,
    "cleanup.py --every 0.5": "is less than a second",
    "cleanup.py --every 0s": "is less than a second",
    "cleanup.py --every": "expected one argument",
    "cleanup.py --everything": "unrecognized arguments: --everything",
    "cleanup.py approvals": "unrecognized arguments: approvals",
    "tasks.py doctor --max-wait soon": IS_A_DURATION,
    "tasks.py doctor more": "unrecognized arguments: more",
    "tasks.py service --kind upstart": "invalid choice: 'upstart'",
    "install.py": "the following arguments are required: COMMAND",
    "install.py install --event WorktreeCreate": "could make no worktree any more",
}  # fmt: skip


def run(installation, command: str, **options) -> subprocess.CompletedProcess:
    """Run a command of tasks.py, or a script that is named."""
    words = shlex.split(command)
    script = [] if words and words[0].endswith(".py") else ["tasks.py"]
    return installation.run(*script, *words, **options)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_line(installation, command):
    said = one_line(run(installation, command), 64, WRONG[command], "--help")
    assert said.endswith("--help\n") or command.startswith("install.py"), said
    assert not installation.state.exists()


REFUSED = {
    "move ready approvals": "queue 'approvals' is where it is already",
    "move ended completions": "task ended has ended: retry it first, then move it",
    "approve ready": "task ready of approvals was not approved: it is pending, not held",
    "reject ended": "task ended of approvals was not rejected: it has ended already",
    "retry ready": "task ready of approvals was not retried: a task of this id is waiting or running already (pending)",
    "cancel ended": "task ended of approvals was not cancelled: it has ended already (cancelled)",
    "logs ready": "task ready has not run yet (pending); -f waits for it",
    "purge approvals": "this would delete 1 pending of approvals for good; add --yes, there is nobody to ask",
    **{f"{command} /no/such/place/file": "there is no directory /no/such/place; make it: mkdir -p /no/such/place"
       for command in ("backup", "export")},
    **{f"{command} /": "/ is a directory: give a file's name" for command in ("backup", "export")},
    "backup ''": "", "export ''": "",
    "restore /no/such/backup": "/no/such/backup: No such file or directory",
}  # fmt: skip


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_done(installation, command):
    for name in ("ready", "ended"):
        installation.add(f"approvals review --task-id {name}")
    installation.tq("cancel ended")
    one_line(run(installation, command), 1, REFUSED[command])
    assert installation.statuses() == {"ready": "pending", "ended": "cancelled"}


# ------------------------------------------------------------------------------- the database


@pytest.mark.parametrize("command", [*READING, *CHANGING, "cleanup.py"])
def test_a_missing_database_is_said_and_not_made(installation, command):
    one_line(run(installation, command), 1, "tasks.db", "No such file")
    assert not installation.state.exists()


USES = ("list", "stats", "export", "pause approvals", "cleanup.py")
FOREIGN = "create table places (url text, visits integer); pragma user_version = "
UNUSABLE = {
    "somebody else's": (lambda place: place.sqlite3(f"{FOREIGN} 0"), "is not a task queue's database"),
    "with a version": (lambda place: place.sqlite3(f"{FOREIGN} 1"), "not a task queue"),
    "no database": (lambda place: place.db.write_bytes(b"this is none" * 500), "not a database"),
    "newer": (lambda place: (place.add("approvals t"), place.sqlite3("pragma user_version = 999")), "999"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_database_that_is_not_ours_is_left_as_it_is(installation, kind):
    make, why = UNUSABLE[kind]
    installation.state.mkdir()
    # An open connection has seen the version that was there.
    installation.is_inside = kind != "newer"
    make(installation)
    before = installation.db.read_bytes()
    for command in USES if installation.is_inside else USES[2:]:
        one_line(run(installation, command), 1, why)
    assert installation.db.read_bytes() == before


def test_a_damaged_database_is_said(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 5000)
    installation.sqlite3("pragma wal_checkpoint(truncate)")
    size = installation.db.stat().st_size
    with open(installation.db, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 2))
    copy = installation.directory / "copy"
    one_line(installation.run("tasks.py", "backup", copy), 1, "damaged")
    assert not copy.exists()
    done = installation.tq("list --text nowhere", code=1)
    assert "damaged" in done.stderr and "Traceback" not in done.stderr


def test_a_locked_database_is_said_after_a_bounded_wait(installation):
    for name in ("a-1", "over"):
        installation.add(f"approvals review --task-id {name}")
    # It gives the clean-up something to do.
    installation.sqlite3("update approvals set expires_at = 1 where task_id = 'over'")
    conn = sqlite3.connect(installation.db, isolation_level=None)
    conn.execute("begin immediate")
    try:
        installation.tq("list")
        commands = ("tasks.py pause approvals", "tasks.py cancel a-1", "cleanup.py")
        processes = [installation.start(*command.split()) for command in commands]
        assert [process.wait(20) for process in processes] == [75] * 3
    finally:
        conn.close()
    said = [process.log.read_text() for process in processes]
    assert all("is locked by another process" in text and text.count("\n") == 1 for text in said)


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("command", [
    "list --queue nope", "show x --queue nope", "wait x --queue nope", "resume approvals nope", "move --from nope approvals",
    "move --from approvals nope", "purge nope --yes", "export --queue nope", "retry --failed --queue nope",
    "resume 'x\"; drop table approvals; --'", "list --queue ../x"])  # fmt: skip
def test_an_unknown_queue_is_named_with_those_that_there_are(installation, command):
    installation.add("approvals review")
    there = "approvals, completions, notifications"
    one_line(run(installation, command), 64, "there is no queue", there)


def test_an_unknown_id_is_said(installation):
    installation.add("approvals review --task-id a-1")
    for command in ("show b", "wait b", "logs b", "retry b", "cancel b", "move b completions", "show a_1", "show 'a-1 '",
                    "show a-%", "show approvals-1", f"show approvals-{'9' * 40}"):  # fmt: skip
        one_line(run(installation, command), 64, "no task has the id")


def test_an_ambiguous_id_lists_what_it_fits_and_an_exact_one_wins(installation):
    for name in ("job-1", "job-11", "job-12"):
        installation.add(f"approvals review --task-id {name}")
    installation.add("completions review --task-id job-11")
    fits = [f"{name} (approvals)" for name in ("job-1", "job-11", "job-12")]
    for command in ("cancel job", "wait job"):
        one_line(run(installation, command), 64, *fits, "job-11 (completions)")
    one_line(run(installation, "show job-11"), 64, "--queue")
    installation.tq("show job-11 --queue completions")
    assert installation.tq("cancel job-1").stdout == "cancelled job-1\n"
    installation.sqlite3(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 30) insert into approvals (data) "
        "select json_object('task_id', 'many-' || i, 'task_type', 't', 'data', json('{}')) from n"
    )
    assert one_line(run(installation, "show many"), 64, "…").count("(approvals)") == 10


# ----------------------------------------------------------------------------------- streams


def process(installation, *words, **options) -> subprocess.CompletedProcess:
    options = {"env": installation.env, "stderr": -1, "stdout": -1, "text": True} | options
    return subprocess.run([sys.executable, ROOT / "tasks.py", *words], **options)


def test_an_argument_that_is_not_utf_8_is_refused(installation):
    installation.add("approvals review --task-id a-1")
    for words in (["show"], ["list", "--text"], ["retry", "--failed", "--type"]):
        one_line(process(installation, *words, b"\xff"), 64, "not valid UTF-8")


def test_a_reader_that_closes_the_pipe_is_no_error(installation):
    installation.add("approvals review --jsonl", input="{}\n" * 3000)
    for command in ("list --limit 3000", "list --limit 3000 --json", "stats"):
        line = f'set -o pipefail; "$@" {command} | head -1 >/dev/null; echo $?'
        done = subprocess.run(["bash", "-c", line, "bash", sys.executable, ROOT / "tasks.py"],
                              env=installation.env, capture_output=True, text=True)  # fmt: skip
        said = done.stderr.replace("only the first 3000; --limit N shows more\n", "")
        assert (done.stdout, said) == ("0\n", ""), command


def test_a_full_standard_output_is_an_error_of_one_line(installation):
    installation.add("approvals review")
    for words in (["list"], ["stats", "--json"]):
        with open("/dev/full", "wb") as full:
            done = process(installation, *words, stdout=full)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "No space left" in done.stderr


def test_a_terminal_of_another_encoding_gets_something_readable(installation):
    installation.state.mkdir()
    installation.sqlite3(
        "create table notifications (id integer primary key autoincrement, data text not null);"
        'insert into notifications (data) values (\'{"hook_event_name": "ä🙂"}\')'
    )
    for encoding in ("ascii", "latin-1"):
        env = installation.env | {"PYTHONIOENCODING": encoding}
        for words in (["list"], ["list", "--json"], ["stats"], ["show", "notifications-1"]):
            done = process(installation, *words, env=env, text=False)
            assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr
