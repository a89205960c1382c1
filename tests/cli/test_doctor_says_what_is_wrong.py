"""`tasks.py doctor` finds what is wrong, says what mends it, and changes nothing."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import queue_helpers as q
import tasks
from taskqueue import doctor as checks
from taskqueue import environment, remedies

NOT_IN_CACHE = checks.not_in_cache
PREFIX = ".claude/automation/lychee"


class Home:
    """An installed HOME that a test may spoil."""

    def __init__(self, path: Path, capsys) -> None:
        self.path, self.capsys = path, capsys
        self.prefix = path / PREFIX
        self.state, self.spool = self.prefix / "state", self.prefix / "state/spool/notifications"
        self.settings = path / ".claude/settings.json"

    def doctor(self, *args: str) -> list[dict]:
        """The findings that `doctor --json` prints."""
        self.capsys.readouterr()
        code = tasks.main(["doctor", "--json", *args])
        said = self.capsys.readouterr()
        answer = json.loads(said.out)
        problems = [f for f in answer["findings"] if f["level"] == "problem"]
        assert said.err == "" and code == bool(problems) and answer["ok"] is not bool(problems)
        assert all(bool(f["remedy"]) == (f["level"] != "ok") for f in answer["findings"])
        return answer["findings"]

    def of(self, level: str, check: str = "", args: tuple = ()) -> list[str]:
        found = self.doctor(*args)
        return [f["message"] for f in found if f["level"] == level and check in ("", f["check"])]

    def the_problem(self, *args: str) -> str:
        (found,) = self.of("problem", args=args)
        return found

    def remedy(self, words: str) -> str:
        """The remedy of the one finding whose message has these words."""
        (found,) = [f["remedy"] for f in self.doctor() if words in f["message"]]
        return found

    def mend(self, words: str) -> None:
        """Do what doctor says, as a shell reads it."""
        subprocess.run(["bash", "-c", self.remedy(words)], check=True)

    def sql(self, statement: str, *values) -> None:
        conn = sqlite3.connect(self.state / "tasks.db", isolation_level=None)
        conn.execute(statement, values)
        conn.close()

    def put(self, queue: str = "notifications", ago: float = 0.0, **columns) -> None:
        """Insert a row, as a shell does."""
        data = {"task_id": "t", "task_type": "link_validation", "data": {}}
        data |= columns.pop("task", {})
        columns = {"data": json.dumps(data), "timestamp": time.time() - ago, **columns}
        places = ", ".join("?" * len(columns))
        self.sql(f"insert into {queue} ({', '.join(columns)}) values ({places})", *columns.values())

    def change_settings(self, **values) -> None:
        self.settings.write_text(json.dumps(json.loads(self.settings.read_text()) | values))

    def change_record(self, **values) -> None:
        record = self.prefix / "installed.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | values))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    path = tmp_path_factory.mktemp("home") / "J\u00fcrgen's home"
    path.mkdir()
    install = [sys.executable, ROOT / "install.py", "install", "--no-warm", "--hook", "yes"]
    env = {"HOME": str(path), "PATH": os.environ["PATH"]}
    ran = subprocess.run(install, stdin=subprocess.DEVNULL, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept = path.parent / "kept"
    shutil.copytree(path, kept)
    return path, kept


@pytest.fixture
def home(installed, monkeypatch, capsys):
    path, kept = installed
    shutil.rmtree(path)
    shutil.copytree(kept, path)
    made = Home(path, capsys)
    for name in ("TASK_QUEUE_STATE", *environment.decisive(os.environ)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setattr(q, "STATE_DIR", made.state)
    # uv takes a second for it, and one test asks.
    monkeypatch.setattr(checks, "not_in_cache", lambda place, env: [])
    remedies.installed_command.cache_clear()
    yield made
    remedies.installed_command.cache_clear()


# ------------------------------------------------------------------------------------- all is well


def test_a_fresh_installation_is_well(home):
    assert {f["check"] for f in home.doctor() if f["level"] == "ok"} == {*checks.CHECKS}


def test_a_person_reads_a_line_for_each_finding_and_its_remedy_below(home):
    home.put(ago=86_400 * 31)
    home.capsys.readouterr()
    assert tasks.main(["doctor"]) == 1
    lines = home.capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("problem  tasks: "))
    assert "1 waiting" in lines[at] and "(31d)" in lines[at]
    assert lines[at + 1].startswith("         -> start one: ./worker.py notifications")
    assert lines[-1] == f"1 problem, no notes ({home.state})" and "ok       database" in lines


def snapshot(root: Path) -> dict:
    return {
        path: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (root, *root.rglob("*"))
        # Readers mark there how far they have read.
        if not path.name.endswith("-shm")
    }


@pytest.mark.parametrize("case", ["well", "no state", "no database", "bare", "in use", "crashed"])
def test_it_changes_nothing(home, case):
    held = sqlite3.connect(home.state / "tasks.db", isolation_level=None)
    if case in ("in use", "crashed"):
        held.execute("insert into notifications (data) values ('{}')")
    if case == "crashed":
        shutil.copytree(home.state, home.path / "copy", ignore=shutil.ignore_patterns("*-shm"))
    if case != "in use":
        held.close()
    if case in ("no state", "crashed"):
        shutil.rmtree(home.state)
    if case == "crashed":
        (home.path / "copy").rename(home.state)
    if case in ("no database", "bare"):
        (home.state / "tasks.db").unlink()
    if case == "bare":
        home.sql("create table notifications (id integer primary key, data text not null)")
    (home.spool / "1.json").write_text("{}") if home.spool.is_dir() else None
    # A child reads the files: closing them here would drop the locks of this process's connection.
    before = snapshot(home.path) if case != "in use" else sorted(home.path.rglob("*"))
    home.doctor()
    assert before == (snapshot(home.path) if case != "in use" else sorted(home.path.rglob("*")))
    held.close()


def test_one_check_that_fails_stops_no_other(home):
    (home.state / "tasks.db").unlink()
    (home.state / "tasks.db").mkdir()
    assert {f["check"] for f in home.doctor()} == {*checks.CHECKS}
    (told,) = home.of("problem", "database")
    assert told.startswith("could not be checked: ")
    assert home.of("problem", "tasks") == [told]


# -------------------------------------------------------------------------------- the installation


def test_an_installation_that_lost_a_file_or_was_changed(home):
    (home.prefix / "runtime/lib/report.py").write_text("# mine\n")
    assert home.of("note", "installation") == [
        "changed since they were installed: runtime/lib/report.py"
    ]
    (home.prefix / "runtime/lib/worker.py").unlink()
    assert "incomplete: runtime/lib/worker.py" in home.the_problem()


def test_an_installation_whose_programs_have_gone(home):
    home.change_record(python="/nowhere/python3")
    assert home.of("problem") == [] and "python gone" in home.of("note", "installation")[0]
    home.change_record(uv=None)
    assert "python and uv gone" in home.the_problem()


def test_nothing_is_installed(home, monkeypatch):
    monkeypatch.setattr(q, "STATE_DIR", home.path / "state")
    shutil.copytree(home.state, home.path / "state")
    shutil.rmtree(home.path / ".claude")
    assert home.of("problem") == [] and "nothing is installed" in home.of("note")[0]
    assert "no hook of the queue" in home.of("note", "hook")[0]


def test_settings_that_claude_code_cannot_read(home):
    home.settings.write_text("{")
    assert "is not valid JSON" in home.the_problem()


def test_no_hook_is_a_note_for_a_person_who_said_no(home):
    home.settings.write_text('{"hooks": {"Stop": [{"hooks": [{"command": "say done"}]}]}}')
    assert home.of("problem") == [] and "no hook of the queue" in home.of("note", "hook")[0]


def test_hooks_that_are_switched_off(home):
    home.change_settings(disableAllHooks=True)
    assert "disableAllHooks" in home.the_problem()


def test_a_state_that_is_not_the_hooks(home, monkeypatch):
    other = home.path / "other state"
    shutil.copytree(home.state, other)
    monkeypatch.setattr(q, "STATE_DIR", other)
    assert home.of("problem") == []
    assert home.of("note", "hook") == [
        f"the hooks' tasks go to {home.state}; this looks at {other}"
    ]


@pytest.mark.parametrize("takes_files", [True, False])
def test_a_sync_that_takes_no_files(home, tmp_path, monkeypatch, takes_files):
    """As macOS's, which syncs all and looks at no argument."""
    what = 'cat "$1"' if takes_files else "exit 0"
    (tmp_path / "sync").write_text(f"#!/bin/sh\n{what}\n")
    (tmp_path / "sync").chmod(0o755)
    monkeypatch.setattr(checks, "HOOK_PATH", f"{tmp_path}:/usr/bin:/bin")
    (told,) = home.of("ok", "sync")
    assert told == "" if takes_files else "a power cut may lose" in told


def test_a_workers_environment_that_is_not_the_terminals(home, monkeypatch):
    file = home.prefix / "environment"
    file.write_text(file.read_text() + "ANTHROPIC_API_KEY=of-the-file\nAWS_PROFILE=work\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_PROFILE", "private")
    monkeypatch.setenv("PAGER", "less")
    lacking, different = home.of("note", "environment")
    assert lacking.endswith("lack what is set here: HTTPS_PROXY")
    assert different.endswith("have another AWS_PROFILE than this terminal")
    assert home.of("problem") == []
    # The first remedy is one command; a key that workers alone have is their person's wish.
    words = f"{home.remedy('lack').partition(' puts')[0]} --no-warm"
    subprocess.run(["bash", "-c", words], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert home.of("note", "environment") == [different]


def test_it_says_which_python_runs_what_and_why(home):
    (told,) = home.of("ok", "python")
    python = json.loads((home.prefix / "installed.json").read_text())["python"]
    assert told.startswith(f"{python} (3.") and "from 3.11 on" in told


@pytest.mark.parametrize(
    ("line", "mode", "says"), [("export A=1", 0o600, "line 1"), ("A=1", 0o644, "yours alone")]
)
def test_an_environment_that_no_worker_can_use(home, line, mode, says):
    file = home.prefix / "environment"
    file.write_text(f"{line}\n")
    file.chmod(mode)
    assert says in home.the_problem()
    assert "no hook and no service starts a worker" in home.remedy(says)


def test_a_cache_of_uv_that_is_gone(home, monkeypatch, tmp_path):
    """A handler with a wheel of its own beside it needs no cache; all others do."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    with zipfile.ZipFile(tmp_path / "wharf-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("wharf.py", "")
        info = {"METADATA": "Metadata-Version: 2.1\nName: wharf\nVersion: 1.0\n", "RECORD": ""}
        info["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in info.items():
            wheel.writestr(f"wharf-1.0.dist-info/{name}", text)
    handler = home.prefix / "handlers/moor"
    handler.write_text(
        "#!/usr/bin/env -S uv run --script\n# /// script\n# dependencies = ['wharf']\n# [tool.uv]\n"
        f"# no-index = true\n# find-links = ['{tmp_path}']\n# ///\n"
    )
    handler.chmod(0o755)
    monkeypatch.setattr(checks, "not_in_cache", NOT_IN_CACHE)
    file = home.prefix / "environment"
    lines = [n for n in file.read_text().splitlines() if not n.startswith(("UV=", "UV_CACHE_DIR="))]
    file.write_text("\n".join([*lines, f"UV={uv}", f"UV_CACHE_DIR={tmp_path / 'cache'}", ""]))
    assert home.the_problem().endswith("lacks what they need: worker.py, tasks.py, link_validation")


# ----------------------------------------------------------------------------------- the handlers


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("#!/bin/sh\n", 0o644, "not executable"),
        ("#!/nowhere/python9\n", 0o755, "/nowhere/python9"),
        ("#!/usr/bin/env -S nonesuch --x\n", 0o755, "needs nonesuch"),
        ("#!/bin/sh\r\necho\r\n", 0o755, "Windows line ends"),
        ("echo hello\n", 0o755, "probe names no interpreter in its first line"),
        ("data\n", 0o644, None),
    ],
)
def test_a_handler_that_cannot_start(home, text, mode, says):
    handler = home.prefix / "handlers/probe"
    handler.write_bytes(text.encode())
    handler.chmod(mode)
    assert home.of("problem") == [] if says is None else says in home.the_problem()


# ------------------------------------------------------------------------------ state and database


def test_a_missing_state(home):
    shutil.rmtree(home.state)
    assert "state is not there" in home.of("problem", "state")[0]


@pytest.mark.parametrize(
    ("name", "mode", "level", "says"),
    [
        ("", 0o755, "problem", "other users may read or write state"),
        ("tasks.db", 0o644, "problem", "other users may read or write tasks.db"),
        ("spool", 0o755, "note", "other users may read or write spool"),
        ("spool/notifications", 0, "problem", "cannot be read and written"),
        ("workers", 0o500, "problem", "cannot be read and written"),
    ],
)
def test_modes_of_the_state_are_told_and_the_remedy_mends_them(home, name, mode, level, says):
    (home.state / name).chmod(mode)
    assert says in home.of(level, "state")[0]
    home.mend(says)
    assert [f["level"] for f in home.doctor() if f["check"] == "state"] == ["ok"]


def test_root_is_told_to_be_the_states_owner_and_its_owner_what_root_made(home, monkeypatch):
    """As after one `sudo tq work`: all but one directory is the user's."""
    if os.geteuid():
        pytest.skip("needs root, to make files of another user")
    for path in (home.state, *home.state.rglob("*")):
        os.chown(path, 65534, -1)
    assert "you are root" in home.the_problem()
    monkeypatch.setattr(os, "getuid", lambda: 65534)
    os.chown(home.state / "workers", 0, 0)
    (told,) = home.of("problem", "state")
    assert "1 file in" in told and "a worker of that user made them" in told
    assert home.remedy("belong to another user").startswith("sudo chown -R 65534:")


def test_a_full_disk(home):
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs to be root, to mount")
    mount = 'mount -t tmpfs -o size=4m,mode=700 none "$0" && shift 0 && exec "$@"'
    doctor = [sys.executable, "-B", ROOT / "tasks.py", "doctor"]
    command = ["unshare", "-m", "sh", "-c", mount, home.state, *doctor]
    env = {"HOME": str(home.path), "PATH": os.environ["PATH"]}
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ran.returncode == 1 and "the disk is full, or nearly: " in ran.stdout, ran.stderr


def test_a_database_that_is_none(home):
    (home.state / "tasks.db").unlink()
    assert "tasks.db is not there" in home.of("problem", "database")[0]
    (home.state / "tasks.db").write_bytes(b"certainly not " * 500)
    assert "file is not a database" in home.of("problem", "database")[0]


def test_a_damaged_database(home):
    home.sql("""with recursive n (i) as (select 1 union all select i + 1 from n where i < 2000)
                insert into notifications (data) select json_object('n', i, 'x', hex(zeroblob(100))) from n""")
    with open(home.state / "tasks.db", "r+b") as file:
        file.seek(40 * 4096)
        file.write(b"\xa5" * 4096 * 8)
    assert "damaged" in home.of("problem", "database")[0]


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("pragma user_version = 999", "has schema version 999"),
        ("drop table task_history", "belongs to another program"),
    ],
)
def test_a_database_of_another_version_or_program(home, statement, says):
    home.sql(statement)
    assert says in home.of("problem", "database")[0]


def test_a_bare_table_that_a_hook_made_is_only_noted(home):
    (home.state / "tasks.db").unlink()
    home.sql(
        "create table notifications (id integer primary key autoincrement, data text not null)"
    )
    (home.state / "tasks.db").chmod(0o600)
    assert home.of("problem") == home.of("note") == []
    assert "schema version 0" in home.of("ok", "database")[0]


@pytest.mark.parametrize("case", ["log", "no index", "link"])
def test_what_is_still_in_the_write_ahead_log_is_read(home, tmp_path, case):
    """Also where tasks.db-shm was not copied, or tasks.db is a link to where the log lies."""
    if case == "link":
        (home.state / "tasks.db").rename(home.path / "real.db")
        (home.state / "tasks.db").symlink_to(home.path / "real.db")
    reader = sqlite3.connect(home.state / "tasks.db", isolation_level=None)
    # While somebody has it open, the last to write does not write the log back.
    reader.execute("select count(*) from notifications").fetchone()
    home.put(ago=1000)
    if case == "no index":
        shutil.copytree(home.state, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
        reader.close()
        shutil.rmtree(home.state)
        (tmp_path / "copy").rename(home.state)
    assert "1 waiting" in home.the_problem()
    reader.close()


def test_a_log_that_has_grown(home, monkeypatch):
    monkeypatch.setattr(checks, "LONG_WAL_BYTES", 2**20)
    reader = sqlite3.connect(home.state / "tasks.db", isolation_level=None)
    reader.execute("begin")
    reader.execute("select count(*) from notifications").fetchone()
    home.put("approvals", status=3, data=json.dumps({"x": "y" * 2**21}))
    assert "tasks.db-wal has grown to 2 MiB" in home.of("note", "database")[0]
    reader.close()


# --------------------------------------------------------------------------------------- the spool


def test_a_spool_that_does_not_drain(home):
    file = home.spool / "1.json"
    file.write_text("{}")
    assert home.of("problem") == []
    os.utime(file, (time.time() - 300,) * 2)
    assert "is not draining: 1 task, the oldest for 5m" in home.the_problem()


def test_files_in_the_spool_that_are_no_tasks(home):
    (home.spool / "malformed").mkdir()
    for number in range(7):
        (home.spool / f"malformed/{number}.json").write_text("{")
    told = home.of("problem", "spool")
    assert len(told) == checks.MALFORMED_SHOWN + 1 and "2 more in" in told[-1]
    assert all("is no task: Expecting property name" in one for one in told[:-1])
    shutil.rmtree(home.spool / "malformed")
    (home.spool.parent / "No Queue").mkdir()
    assert "No Queue" in home.the_problem()
    (home.spool.parent / "No Queue").rmdir()
    (home.spool / os.fsdecode(b"\xff'\x1b].json")).write_text("{}")
    assert "its name is not UTF-8" in home.the_problem()


# --------------------------------------------------------------------------------------- the tasks


def test_the_oldest_waiting_task_counts(home):
    home.put(ago=700)
    home.change_settings(hooks={})
    assert "no hook starts a worker for it" in home.the_problem()
    with open(home.state / "workers/serving.notifications", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert "1 waiting" in home.the_problem() and "although a worker" in home.the_problem()
        assert home.of("problem", args=("--max-wait", "1h")) == []
        home.sql("insert into task_controls (queue, slots) values ('notifications', 1)")
        assert home.the_problem().endswith("although a worker serves it: the queue has 1 slot")
        assert "limit notifications --slots N" in home.remedy("although a worker")


def test_a_queue_for_which_a_hook_may_start_a_worker_is_late_after_a_while(home):
    home.put(ago=60)
    assert home.of("problem") == []
    home.put(ago=700, task={"task_id": "u"})
    assert home.the_problem().endswith("and no worker serves it")


def test_an_overdue_scheduled_task_counts_and_one_that_is_not_due_does_not(home):
    home.put(status=3, due_at=time.time() + 60)
    assert home.of("problem") == []
    home.put("approvals", status=3, due_at=time.time() - 3600)
    assert 'queue "approvals": 1 waiting, the oldest since' in home.the_problem()


def test_a_paused_queue_is_a_note_that_says_until_when_and_why(home):
    home.put(ago=7000)
    tasks.main(["pause", "notifications", "--for", "90m", "--reason", "usage limit"])
    q.resign(home.state)
    (told,) = home.of("note", "tasks")
    assert "the queue is paused until" in told and told.endswith("(in 90 m): usage limit")
    assert home.remedy("paused").endswith("resume notifications") and home.of("problem") == []


def test_held_tasks_are_named_after_a_while(home):
    home.put("approvals", ago=60, status=3)
    assert home.of("note") == []
    (told,) = home.of("note", args=("--max-wait", "0s"))
    assert "1 held for a person" in told


def test_tasks_that_another_machine_has_had_for_a_day_are_named(home):
    away = {"status": 5, "owner": "hub-1"}
    home.put(claimed_at=time.time() - 80_000, **away)
    # It is not late before it is due.
    home.put(ago=90_000, due_at=time.time() + 3600, task={"task_id": "later"}, **away)
    assert home.of("note") == []
    home.put(ago=90_000, task={"task_id": "unsent"}, **away)
    (told,) = home.of("note")
    assert "1 handed over to another machine for more than a day" in told
    assert home.remedy("handed over").endswith("relay.py status")


def test_claims_of_dead_owners_that_nobody_takes_back(home):
    home.put(status=2, owner="1-dead", attempts=1, claimed_at=time.time())
    assert "1 claimed at" in home.the_problem() and "1-dead, which has died" in home.the_problem()
    with open(home.state / "workers/1-dead", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert home.of("problem") == []
    home.sql("update notifications set owner = null, claimed_at = null")
    assert "by nobody (by hand, or by another program)" in home.the_problem()


def dead(home, task_id: str, error: str, age: str) -> None:
    home.sql(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error, completed_at)"
        " values ('notifications', 9, ?, 'probe', 'failed', '{}', '2020', ?, datetime('now', ?))",
        task_id,
        error,
        age,
    )


def test_a_type_without_a_handler_is_told_while_there_is_none(home):
    error = "no handler 'probe' in /x: put it there (attempt 4 of 4)"
    dead(home, "new", error, "-1 hour")
    dead(home, "old", error, "-2 days")
    dead(home, "other", "exit 1: no handler", "-1 hour")
    there = "no handler is called probe; there are run, claude, command, link_validation"
    assert home.the_problem() == f'queue "notifications": 1 failed in the last day: {there}'
    remedy = home.remedy("no handler is called")
    assert remedy.endswith("retry --failed --queue notifications --type probe")
    home.put(task={"task_type": "probe"}, status=3, due_at=time.time() + 60)
    assert "1 waiting, 1 failed in the last day: " in home.the_problem()
    remedy = home.remedy("no handler is called")
    assert remedy.index("put an executable") < remedy.index("retry") < remedy.index("purge")
    (home.prefix / "handlers/probe").write_text("#!/bin/sh\n")
    (home.prefix / "handlers/probe").chmod(0o755)
    assert home.of("problem") == [] and "2 failed for good" in home.of("note")[0]
