"""README's blocks are pasted as printed into a HOME that README's first block has filled; its and
the reference's tables hold.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from homes import Home, blocks_of

from taskqueue import settings as queue_settings

README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()
PAYLOADS = Path(__file__).parents[1] / "hook_payloads"

BASH = [
    *blocks_of(README, "bash"),
    *blocks_of(REFERENCE.partition("## The state directory")[2], "bash"),
]
INSTALL, PASTED = BASH[0], BASH[1:]


def block_with(words: str) -> str:
    """The one bash block that has these words."""
    [found] = [block for block in BASH if words in block]
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A HOME in which README's first block ran, in a checkout."""
    home = Home(tmp_path_factory.mktemp("home"))
    assert "installed in" in home.paste(INSTALL, cwd=ROOT, timeout=600)
    return home


@pytest.fixture
def home(installed):
    """That HOME, without tasks, and with the notes that README's first task has made."""
    notes = installed.directory / "notes"
    notes.mkdir(exist_ok=True)
    (notes / "README.md").write_text("The [map](pier.md) was never drawn.\n")
    yield installed
    installed.forget()


def test_readme_is_short():
    assert len(README.splitlines()) <= 265


def test_at_least_once_is_said_once_and_nothing_says_more():
    assert len(re.findall("at least once", README, re.IGNORECASE)) == 1
    for text in (README, REFERENCE, (ROOT / "docs/how-it-works.md").read_text()):
        assert not re.search(
            r"exactly once|at most once|only once|later, once", text, re.IGNORECASE
        )


def test_install_makes_what_readme_says(home):
    [hook] = json.loads((home.directory / ".claude/settings.json").read_text())["hooks"]["Stop"]
    assert "link_validation" in hook["hooks"][0]["command"]
    assert os.access(home.directory / ".local/bin/tq", os.X_OK)


@pytest.mark.parametrize("text", PASTED)
def test_a_bash_block_runs_and_its_tasks_have_handlers(home, text):
    home.paste(text)
    types = {task_type for (task_type,) in home.rows("select distinct task_type from task_queue")}
    handlers = {path.name for path in (home.prefix / "handlers").iterdir()}
    assert types <= handlers, f"no handler serves {types - handlers}"
    assert home.rows("select task_id, error_message from task_queue where status = 'failed'") == []


def test_the_installed_command_shows_the_demo(home):
    assert "I wrote pier.md." in home.paste("tq demo")


def test_the_first_task_finds_the_broken_link(home):
    [said] = re.findall(r"The list says: `(.*?)`", README)
    listed = home.paste(block_with("tq list\n"))
    assert said in listed, listed


def test_the_insert_takes_any_payload_and_prints_nothing(home):
    text = block_with("od -An")
    payloads = [path for path in sorted(PAYLOADS.glob("[1-3]*.json")) if path.stat().st_size]
    as_hook = text[: text.index("payload=")] + text[text.index("| {") + 2 :]
    for path in payloads:
        # A pipe, as hooks are given.
        with open(path, "rb") as file:
            feed = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
            done = subprocess.run(
                ["sh", "-c", as_hook],
                stdin=feed.stdout,
                env=home.env,
                capture_output=True,
                timeout=20,
            )
            feed.wait()
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    stored = [
        json.loads(data) for (data,) in home.rows("select data from notifications order by id")
    ]
    assert stored == [json.loads(path.read_text()) for path in payloads]
    refused = subprocess.run(
        ["sh", "-c", as_hook], input=b'{"broken', env=home.env, capture_output=True, timeout=20
    )
    assert refused.returncode != 0 and b"JSON" in refused.stderr


@pytest.mark.parametrize("words", ["od -An", "SPOOL="])
def test_what_bash_puts_in_is_done(home, words):
    home.paste(block_with(words))
    home.paste("tq work notifications --drain")
    [(status, result)] = home.rows("select status, result from task_history")
    assert status == "completed" and json.loads(result)["failed"] == 1


def test_the_held_task_waits_until_it_is_approved(home):
    text = block_with("--hold")
    add, look, approve = re.split(r"\n(?=tq )", text.strip())
    home.paste(add)
    assert "log-1" in home.paste(look)
    assert home.rows("select status from task_queue") == [("held",)]
    home.paste(approve)
    assert home.rows("select status from task_queue") == [("pending",)]


def test_tonight_is_scheduled_in_a_queue_with_one_slot(home):
    home.paste(block_with("tq limit"))
    assert home.rows("select slots from task_controls where queue = 'approvals'") == [(1,)]
    [(data, due_at)] = home.rows("select data, due_at from approvals")
    assert json.loads(data)["data"]["workspace_path"] == str(home.directory / "notes") and due_at


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq, which this handler needs")
def test_the_copied_handler_does_its_work(home):
    home.paste(block_with("cp command"))
    [(task_type, data)] = home.rows("select task_type, data from completions")
    assert task_type == "checksum", data


def python_blocks(home) -> list[Path]:
    """README's Python scripts, each a file that can be run."""
    paths = []
    for number, text in enumerate(blocks_of(README, "python")):
        paths.append(home.directory / f"script{number}.py")
        paths[-1].write_text(text)
    return paths


def test_the_python_blocks_run(home):
    first, consumer = python_blocks(home)
    printed = home.paste(f"uv run --quiet --script {first}")
    assert json.loads(printed)["task_type"] == "review"
    assert home.rows("select task_id, status from task_history") == [("review-1", "completed")]
    assert home.rows("select task_type from notifications") == [("link_validation",)]
    process = subprocess.Popen(
        ["uv", "run", "--quiet", "--script", consumer],
        cwd=home.directory,
        stdout=subprocess.PIPE,
        text=True,
        env=home.env | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        home.paste("""tq add completions done '{"n": 1}' --task-id one""")
        assert process.stdout.readline() == "one done {'n': 1}\n"
        wait_for(
            lambda: home.rows(
                "select 1 from task_history where task_id = 'one' and status = 'completed'"
            )
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_hook_is_valid_settings_and_its_worker_checks_the_links(home):
    [text] = blocks_of(README, "json")
    [hook] = json.loads(text)["hooks"]["Stop"][0]["hooks"]
    # By hand it is what install offers.
    assert f'runtime/hook" {queue_settings.LINK_CHECK.arguments} ||' in hook["command"]
    payload = json.loads((PAYLOADS / "11_Stop_first.json").read_bytes())
    payload["cwd"] = str(home.directory / "notes")
    done = subprocess.run(
        ["sh", "-c", hook["command"]],
        input=json.dumps(payload).encode(),
        env=home.env,
        cwd="/",
        capture_output=True,
        timeout=hook["timeout"],
    )
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        wait_for(lambda: home.rows("select 1 from task_history"), 60, "the end of the link check")
        assert home.rows("select task_type, status from task_history") == [
            ("link_validation", "completed")
        ]
    finally:
        home.end_worker()


def test_the_hook_of_readme_exits_1_when_the_queue_is_gone(home, tmp_path):
    [text] = blocks_of(README, "json")
    [hook] = json.loads(text)["hooks"]["Stop"][0]["hooks"]
    done = subprocess.run(
        ["sh", "-c", hook["command"]],
        env=home.env | {"HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_the_sql_block_runs(home):
    [text] = blocks_of(REFERENCE, "sql")
    home.paste("tq add notifications first")
    done = subprocess.run(
        ["sqlite3", "-cmd", ".timeout 10000", home.db, text],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0 and done.stdout.startswith("first|pending|1"), done.stderr


def test_every_command_of_tq_that_is_named_exists(home):
    texts = [README, REFERENCE, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    named = {name for text in texts for name in re.findall(r"\btq ([a-z]+(?:-[a-z]+)*)", text)}
    assert len(named) > 10
    for name in sorted(named):
        home.paste(f"tq {name} --help")


def test_the_schema_is_the_databases(home):
    tables = (
        "notifications",
        "task_history",
        "task_controls",
        "task_marks",
        "task_spooled",
        "task_queue",
    )
    for table in tables:
        assert table == "notifications" or f"`{table}`" in REFERENCE
        for (name,) in home.rows("select name from pragma_table_xinfo(?)", table):
            assert f"`{name}`" in REFERENCE, f"{table}.{name} is not in docs/reference.md"
    [(version,)] = home.rows("pragma user_version")
    assert f"`PRAGMA user_version` is {version}" in REFERENCE


def test_nothing_that_readme_says_of_python_is_wrong():
    sys.path.insert(0, str(ROOT))
    import queue_helpers

    calls = REFERENCE[REFERENCE.index("## Python") : REFERENCE.index("## The database")]
    names = re.findall(r"`([A-Za-z_]{4,})[(`]", calls)
    missing = [
        name
        for name in names
        if name in calls and name[0].isupper() and not hasattr(queue_helpers, name)
    ]
    assert missing == []
    for name in re.findall(r"^\| `(\w+)\(", calls, re.MULTILINE):
        assert callable(getattr(queue_helpers, name))
    options = re.search(r"Options: (.*?) \|", calls)[1]
    assert {name for name in re.findall(r"`(\w+)`", options)} <= set(
        inspect.signature(queue_helpers.new_row).parameters
    )
