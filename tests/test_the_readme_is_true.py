"""README's code blocks are run as they stand, in a HOME that has the reference layout; its tables are held to the code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Installation, end, wait_for

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SCRIPTS = ("enqueue.py", "worker.py", "tasks.py", "cleanup.py")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def home(tmp_path):
    """An Installation in the reference layout below a HOME of its own."""
    made = Installation(tmp_path)
    base = tmp_path / ".claude/automation/lychee"
    (base / "runtime/lib").mkdir(parents=True)
    for script in (*SCRIPTS, *(path.name for path in ROOT.glob("queue_*.py"))):
        shutil.copy(ROOT / script, base / "runtime/lib")
    shutil.copytree(ROOT / "handlers", base / "handlers")
    made.state, made.db = base / "state", base / "state/tasks.db"
    uv_cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    made.env = {name: value for name, value in os.environ.items() if not name.startswith("TASK_")}  # uv may need proxies
    made.env |= {"UV_CACHE_DIR": uv_cache, "PYTHONPATH": str(base / "runtime/lib"), "HOME": str(tmp_path)}
    made.run("enqueue.py", "notifications", "first")  # any Python makes the tables
    made.sqlite3("delete from notifications")
    yield made
    for process in made.processes:
        end(process)


def run(home, command: list, text: str):
    done = subprocess.run([*command, text], env=home.env, cwd=home.directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("text", blocks("bash"))
def test_a_bash_block_runs(home, text):
    run(home, ["bash", "-euo", "pipefail", "-c"], text)


def test_the_insert_takes_any_payload_and_prints_nothing(home):
    [text] = [text for text in blocks("bash") if "od -An" in text]
    payloads = sorted((Path(__file__).parent / "hook_payloads").glob("[1-3]*.json"))
    payloads = [path for path in payloads if path.stat().st_size]
    as_hook = text[: text.index("payload=")] + text[text.index("{") if "printf %s" not in text else text.index("| {") + 2 :]
    for path in payloads:
        with open(path, "rb") as file:
            feed = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)  # a pipe, as hooks are given
            done = subprocess.run(["sh", "-c", as_hook], stdin=feed.stdout, env=home.env, capture_output=True, timeout=20)
            feed.wait()
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    stored = [json.loads(data) for (data,) in home.rows("select data from notifications order by id")]
    assert stored == [json.loads(path.read_text()) for path in payloads]
    refused = subprocess.run(["sh", "-c", as_hook], input=b'{"broken', env=home.env, capture_output=True, timeout=20)
    assert refused.returncode != 0 and b"JSON" in refused.stderr


def test_the_spooled_task_is_taken_in(home):
    [text] = [text for text in blocks("bash") if "SPOOL=" in text]
    run(home, ["bash", "-euo", "pipefail", "-c"], text)
    home.start("worker.py", "notifications", "--handlers", home.handlers)
    wait_for(lambda: home.rows("select data from notifications") == [('{"workspace_path": "/home/user/docs"}\n',)])


def test_the_python_blocks_run(home):
    first, consumer = blocks("python")
    printed = run(home, [sys.executable, "-c"], first)
    assert json.loads(printed)["task_type"] == "review"
    assert home.rows("select status from task_history") == [("completed",)]
    process = subprocess.Popen([sys.executable, "-uc", consumer], env=home.env, stdout=subprocess.PIPE, text=True)
    home.processes.append(process)
    home.run("enqueue.py", "completions", "done", '{"n": 1}', "--task-id", "one")
    assert process.stdout.readline() == "one done {'n': 1}\n"
    wait_for(lambda: home.history("one") and home.history("one")["status"] == "completed")


def test_the_sql_block_runs(home):
    [text] = blocks("sql")
    home.run("enqueue.py", "notifications", "first")
    assert home.sqlite3(text).startswith("first|pending|1")


def test_the_hook_is_valid_settings(home, tmp_path):
    [text] = blocks("json")
    [hook] = json.loads(text)["hooks"]["Stop"][0]["hooks"]
    assert "enqueue.py --hook notifications link_validation" in hook["command"]
    command = hook["command"].replace("/usr/bin/python3", shlex.quote(sys.executable)).replace("/home/user", str(home.directory))
    command = command.replace(" --start-worker", "")
    payload = (Path(__file__).parent / "hook_payloads/11_Stop_first.json").read_bytes()
    done = subprocess.run(["sh", "-c", command], input=payload, env=home.env, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (0, b"")
    assert home.rows("select task_type from notifications") == [("link_validation",)]


def test_the_schema_is_the_databases(home):
    for table in ("notifications", "task_history"):
        for (name,) in home.rows("select name from pragma_table_xinfo(?)", table):
            assert f"`{name}`" in README, f"{table}.{name} is not in README"
    [(version,)] = home.rows("pragma user_version")
    assert f"`PRAGMA user_version` is {version}" in README


def test_every_recipe_script_and_option_is_named():
    recipes = re.findall(r"^([a-z]+)[^:=\n]*:(?!=)", (ROOT / "justfile").read_text(), re.MULTILINE)
    text = README + (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in recipes if name != "default" and f"just {name}" not in text] == []
    for script in SCRIPTS:
        assert f"`{script}`" in README
    options = re.findall(r'add\("(--[a-z-]+)"', (ROOT / "worker.py").read_text())
    assert options and [option for option in options if option not in README] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_the_same_exit_codes(home, script):
    done = home.run(script, "--help")
    assert done.returncode == 0 and "exit codes" in done.stdout
    said = set(re.findall(r"\b(0|1|64|65|75)\b", done.stdout.split("exit codes")[1]))
    row = next(line for line in README.splitlines() if line.startswith(f"| `{script}` |"))
    table = {code for code, cell in zip(("0", "1", "64", "65", "75"), row.split("|")[2:-1], strict=True) if cell.strip()}
    assert said == table
