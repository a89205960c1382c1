"""No text of a task, a handler or a file's name reaches a terminal or a log but as printable
characters.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from conftest import ROOT

from taskqueue.text import visible

# Read by Claude, and seen by nobody: zero width, a soft hyphen, fillers, variation selectors, tags.
UNSEEN = "\u200b\u2060\u00ad\u034f\u3164\uffa0\ufe0f\U000e0041\U000e0101\u2800\ufeff"
# A clipboard (OSC 52), a title, clear-screen, an eight-bit CSI, DEL, a carriage return, reversed
# text, and what is unseen.
HOSTILE = (
    "\x1b]52;c;ZXZpbA==\x07\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\rfake\nline\u202egnp\u2066\u200f\u2028"
    + UNSEEN
)
RAW = [chr(code) for code in (*range(0x00, 0x0A), *range(0x0B, 0x20), *range(0x7F, 0xA0))] + list(
    "\u202e\u2066\u200f\u2028\u061c\u200e" + UNSEEN
)
# SQL's words for it: the hook's type, the payload and the error are as a bash hook may have written
# them.
IN_SQL = " || ".join(f"char({ord(character)})" for character in HOSTILE)


def is_clean(text: str) -> bool:
    return not any(character in text for character in RAW)


@pytest.fixture
def hostile(installation):
    """Hostile types, ids, payloads, errors, results, logs, owners and file names in every state
    that a task can have.
    """
    installation.enqueue("approvals", "review", "{}", "--task-id", "plain")
    envelope = f"json_object('task_id', 'id' || {IN_SQL}, 'task_type', 'type' || {IN_SQL}, 'data', json_object('k', {IN_SQL}))"
    installation.sqlite3(
        f"insert into approvals (data, error, group_id) values ({envelope}, 'error' || {IN_SQL}, 'g' || {IN_SQL})"
    )
    installation.sqlite3(
        f"insert into notifications (data) values (json_object('hook_event_name', 'type' || {IN_SQL}, 'k', {IN_SQL}))"
    )
    raw = HOSTILE.translate({code: None for code in range(0x20)})
    installation.sqlite3(
        f'insert into notifications (data) values (\'{{"hook_event_name": "raw{raw}", "k": "{raw}"}}\')'
    )
    installation.sqlite3(
        "insert into notifications (data, status, due_at, error) values ("
        f"json_object('hook_event_name', 'missing' || {IN_SQL}), 3, 9e9, 'no handler ' || {IN_SQL})"
    )
    installation.sqlite3(
        f"insert into completions (data, status, owner, claimed_at, attempts) values ({envelope}, 2, '1-' || {IN_SQL}, 5, 1)"
    )
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, result, log, error)"
        f" values ('approvals', 77, 'ended' || {IN_SQL}, 'type' || {IN_SQL}, 'failed', {envelope}, '2030-01-01 00:00:00.000',"
        f" '2030-01-01 00:00:00.000', 'result' || {IN_SQL}, 'log' || {IN_SQL}, 'error' || {IN_SQL})"
    )
    installation.sqlite3(
        "insert into task_controls (queue, paused_at, pause_reason, paused_by) values "
        f"('completions', 1.0, 'why' || {IN_SQL}, 'handler')"
    )
    name = HOSTILE.replace("/", "").replace("\x00", "")
    for directory in ("spool/approvals", f"spool/{name}", "logs/approvals"):
        (installation.state / directory).mkdir(parents=True, exist_ok=True)
    (installation.state / "spool/approvals" / f"{name}.json").write_text("no json")
    os.utime(installation.state / "spool/approvals" / f"{name}.json", (0, 0))
    with open(os.fsencode(installation.state) + b"/spool/approvals/\xff\x9b.json", "wb") as file:
        file.write(b"{}")
    for ending in ("out", "err"):
        (installation.state / "logs/approvals" / f"77-1-{name}.{ending}").write_text(
            f"printed{HOSTILE}"
        )
    return installation


# `doctor` alone needs a process of its own.
COMMANDS = [
    ["stats"], ["list"], ["list", "--status", "failed"], ["show", "id"], ["show", "ended"], ["show", "plain", "notifications-2"],
    ["show", "notifications-"], ["logs", "nothing\x1b[2J\x9b"], ["cancel", "nothing\x1b[2J\x9b"], ["show", "\x9b" + HOSTILE.replace("\n", "")],
    ["list", "--status", "\x1b[2J"], ["list", "--queue", "\x1b[2J\x9b"], ["pause", "\x1b[2J\x9b"], ["purge", "\x1b[2J\x9b", "--yes"],
    ["move", "plain", "\x1b[2J\x9b"], ["--\x1b[2J"], ["export", "\x1b[2J\x9b/none"], ["import", "\x1b[2J\x9b-none"],
    ["restore", "\x1b[2J\x9b-none"], ["doctor"], ["cleanup.py", "--dry-run"],
    # These change what the others show.
    ["pause", "completions"], ["resume", "completions"], ["cancel", "id", "--wait", "0.1"], ["retry", "ended"], ["retry", "--failed"],
    ["move", "id", "notifications"], ["cancel", "notifications-2"], ["move", "--from", "approvals", "notifications"], ["cleanup.py"],
]  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_no_command_prints_any(hostile, monkeypatch, as_json):
    monkeypatch.chdir(hostile.directory)
    for command in [*COMMANDS, ["backup", "\x1b[2J\x9b"]]:
        script = [] if command[0].endswith(".py") else ["tasks.py"]
        done = hostile.run(*script, *command, *(["--json"] if as_json else []))
        assert is_clean(done.stdout), ascii(done.stdout)
        assert is_clean(done.stderr) and "Traceback" not in done.stderr, ascii(done.stderr)
        if as_json and done.stdout:
            assert done.stdout.isascii()
            json.loads(done.stdout)


def test_a_line_of_an_import_is_refused_in_printable_characters(hostile):
    bad = json.dumps(
        {"queue": HOSTILE, "id": 1, "task_id": HOSTILE, "task_type": HOSTILE, "status": HOSTILE},
        ensure_ascii=False,
    )
    for text in (bad, bad.replace(json.dumps(HOSTILE, ensure_ascii=False), '"pending"'), HOSTILE):
        done = hostile.run("tasks.py", "import", "-", input=text)
        assert done.returncode == 65 and is_clean(done.stdout) and is_clean(done.stderr), ascii(
            done.stderr
        )


def test_enqueue_names_what_it_stored_in_printable_characters(installation):
    """An id may be of any characters but control characters; a line of stdin says it."""
    odd = "a\u202eb\u2028\u200f"
    line = json.dumps({"task_type": "t", "task_id": odd})
    for word in ("queued", "duplicate"):
        done = installation.run("enqueue.py", "approvals", "--jsonl", input=f"{line}\n")
        assert done.stdout.startswith(f"{word} a\\u202eb\\u2028\\u200f ("), done.stderr
    assert installation.rows("select task_id from approvals") == [(odd,)]


def on_terminal(installation, *command: str) -> str:
    """Return what a script writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", *command],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=installation.env | {"TERM": "dumb", "COLUMNS": "200"},
    )
    installation.processes.append(process)
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait(20) == 0
    return seen.decode().replace("\r\n", "\n")


def test_logs_and_export_are_passed_on_byte_by_byte_but_not_to_a_terminal(hostile):
    assert hostile.run("tasks.py", "logs", "ended").stdout == f"printed{HOSTILE}"
    for command in (("logs", "ended"), ("logs", "-f", "ended"), ("export", "--history")):
        shown = on_terminal(hostile, *command)
        assert is_clean(shown), ascii(shown)
        assert "printed" in shown or "ended" in shown
    line = next(line for line in on_terminal(hostile, "export").splitlines() if '"raw' in line)
    assert HOSTILE[-1] in json.loads(line)["data"]["k"]


def test_a_character_that_is_cut_in_two_between_reads_is_whole_on_a_terminal(installation):
    installation.handler(
        "long",
        "#!/bin/sh\nprintf a; i=0; while [ $i -lt 30000 ]; do printf 'äöü'; i=$((i+1)); done\n",
    )
    installation.enqueue("approvals", "long", "{}", "--task-id", "l-1")
    assert (
        installation.run(
            "worker.py", "approvals", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    assert on_terminal(installation, "logs", "l-1") == "a" + "äöü" * 30000
    assert (
        json.loads(installation.run("tasks.py", "logs", "l-1", "--json").stdout)["stdout"]
        == "a" + "äöü" * 30000
    )


def test_what_is_seen_stays_as_it_is():
    seen = "Grüße an den Hafen – 漢字, naïve “quotes”, e\u0301, 🚢 and a b"
    assert visible(seen) == seen
    assert visible(UNSEEN + "\udcff", keep="\u200b") == "\u200b" + "".join(
        ascii(character)[1:-1] for character in UNSEEN[1:] + "\udcff"
    )
