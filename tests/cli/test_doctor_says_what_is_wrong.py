"""tasks.py doctor finds each thing that is wrong, says it in plain words with its remedy, and
changes nothing.
"""

import fcntl
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_scripts

MAIN = Path(__file__).resolve().parents[2]
PREFIX = ".claude/automation/lychee"


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    home = tmp_path_factory.mktemp("home") / "J\u00fcrgen's home"
    home.mkdir()
    ran = subprocess.run(
        [sys.executable, MAIN / "install.py", "install", "--no-warm", "--hook", "yes"],
        stdin=subprocess.DEVNULL,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return home


@pytest.fixture
def home(master, tmp_path):
    """A healthy installation that a test may spoil; hook and record name it where it is now."""
    home = tmp_path / master.name
    shutil.copytree(master, home)
    hook = home / PREFIX / "runtime/hook"
    hook.write_text(hook.read_text().replace(quoted(master), quoted(home)))
    settings(
        home,
        lambda value: value["hooks"]["Stop"][0]["hooks"][0].update(
            command=value["hooks"]["Stop"][0]["hooks"][0]["command"].replace(
                quoted(master), quoted(home)
            )
        ),
    )
    record = json.loads((home / PREFIX / "installed.json").read_text())
    record["state"] = record["state"].replace(str(master), str(home))
    from hashlib import sha256

    record["files"]["runtime/hook"] = [sha256(hook.read_bytes()).hexdigest()]
    (home / PREFIX / "installed.json").write_text(json.dumps(record))
    return home


def quoted(path):
    return str(path).replace("'", "'\"'\"'")


def doctor(home, *args, prefix=(), env=(), **options):
    command = [
        *prefix,
        sys.executable,
        "-B",
        home / PREFIX / "runtime/lib/tasks.py",
        "doctor",
        "--json",
        *args,
    ]
    ran = subprocess.run(
        command,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **dict(env)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    assert ran.stderr == "", ran.stderr
    answer = json.loads(ran.stdout)
    problems = [finding for finding in answer["findings"] if finding["level"] == "problem"]
    assert ran.returncode == (1 if problems else 0) and answer["ok"] is not bool(problems)
    assert all(finding["remedy"] for finding in problems)
    return answer["findings"]


def of_level(findings, level, check=None):
    return [f["message"] for f in findings if f["level"] == level and check in (None, f["check"])]


def the_problem(home, *args, **options):
    (problem,) = of_level(doctor(home, *args, **options), "problem")
    return problem


def snapshot(root):
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in (root, *root.rglob("*"))
    }


def database(home):
    return sqlite3.connect(home / PREFIX / "state/tasks.db", isolation_level=None)


PROBE = '{"task_id": "t", "task_type": "probe", "data": {}}'


def put(home, queue="notifications", seconds_ago=0.0, **columns):
    columns = {
        "data": '{"task_id": "t", "task_type": "link_validation", "data": {}}',
        "timestamp": time.time() - seconds_ago,
        **columns,
    }
    conn = database(home)
    conn.execute(
        f"insert into {queue} ({', '.join(columns)}) values ({', '.join('?' * len(columns))})",
        tuple(columns.values()),
    )
    conn.close()


# ------------------------------------------------------------------------------------------------------------ all is well


def test_a_fresh_installation_is_well(home):
    findings = doctor(home)
    assert of_level(findings, "problem") == []
    assert {f["check"] for f in findings} == {"versions", "installation", "state", "file system", "disk", "database", "tasks", "spool",
                                              "handlers", "hook", "file events"}  # fmt: skip


def test_people_get_a_line_for_each_with_its_remedy_below(home):
    put(home, seconds_ago=86_400 * 31)
    ran = subprocess.run(
        [sys.executable, home / PREFIX / "runtime/lib/tasks.py", "doctor"],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and ran.stderr == ""
    line = next(line for line in ran.stdout.splitlines() if line.startswith("problem"))
    assert "1 waiting" in line and "31d" in line.replace(" d)", "d)")
    assert (
        "-> start one: worker.py notifications" in ran.stdout
        and "1 problem," in ran.stdout.splitlines()[-1]
    )


@pytest.mark.parametrize(
    "case", ["healthy", "no state", "no database", "bare", "in use", "left by a crash"]
)
def test_it_changes_nothing(home, case):
    state = home / PREFIX / "state"
    held = None
    if case == "no state":
        shutil.rmtree(state)
    elif case in ("no database", "bare"):
        (state / "tasks.db").unlink()
    if case == "bare":
        database(home).execute(
            "create table notifications (id integer primary key autoincrement, data text not null)"
        ).connection.close()
    elif case in ("in use", "left by a crash"):
        held = database(home)
        held.execute("insert into notifications (data) values ('{}')")
    if case == "left by a crash":
        shutil.copytree(state, home / "copy")
        held.close()
        shutil.rmtree(state)
        (home / "copy").rename(state)
        (state / "tasks.db-shm").unlink()
    before = snapshot(home)
    doctor(home)
    after = snapshot(home)
    if case == "in use":
        for each in (before, after):
            # Readers mark there how far they have read.
            each.pop(f"{PREFIX}/state/tasks.db-shm")
    assert {
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    } == set()


# ------------------------------------------------------------------------------------------------------- state, database


def test_a_missing_state(home):
    shutil.rmtree(home / PREFIX / "state")
    assert "state is not there" in of_level(doctor(home), "problem", "state")[0]


@pytest.mark.parametrize(("name", "mode"), [("", 0o755), ("tasks.db", 0o644)])
def test_permissions_that_let_others_read(home, name, mode):
    (home / PREFIX / "state" / name).chmod(mode)
    problem = the_problem(home)
    assert "other users" in problem and (name or "state") in problem


def test_a_database_that_is_none(home):
    (home / PREFIX / "state/tasks.db").write_bytes(b"certainly not " * 500)
    assert "is not a database" in of_level(doctor(home), "problem", "database")[0]


def test_a_damaged_database(home):
    conn = database(home)
    conn.execute("begin")
    conn.executemany(
        "insert into notifications (data) values (?)",
        [(json.dumps({"n": n, "x": "y" * 200}),) for n in range(2000)],
    )
    conn.execute("commit")
    conn.close()
    with open(home / PREFIX / "state/tasks.db", "r+b") as file:
        file.seek(40 * 4096)
        file.write(b"\xa5" * 4096 * 8)
    assert "damaged" in of_level(doctor(home), "problem", "database")[0]


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("pragma user_version = 999", "schema version 999"),
        ("drop table task_history", "belongs to another program"),
    ],
)
def test_a_database_of_another_version_or_program(home, statement, says):
    conn = database(home)
    conn.execute(statement)
    conn.close()
    assert says in of_level(doctor(home), "problem", "database")[0]


def test_a_database_without_wal(home):
    conn = database(home)
    assert conn.execute("pragma journal_mode = delete").fetchone() == ("delete",)
    conn.close()
    assert "not in WAL mode" in the_problem(home)


def test_a_bare_table_that_a_hook_made_is_only_noted(home):
    (home / PREFIX / "state/tasks.db").unlink()
    conn = database(home)
    conn.execute(
        "create table notifications (id integer primary key autoincrement, data text not null)"
    )
    conn.close()
    (home / PREFIX / "state/tasks.db").chmod(0o600)
    findings = doctor(home)
    assert (
        of_level(findings, "problem") == []
        and "schema version 0" in of_level(findings, "note", "database")[0]
    )


def test_a_database_that_is_written_to_is_read_as_it_is_now(home):
    with sqlite3.connect(home / PREFIX / "state/tasks.db", isolation_level=None) as conn:
        # It is still in the write-ahead log.
        conn.execute(
            'insert into approvals (data, timestamp) values (\'{"task_type": "claude"}\', 1e9)'
        )
        assert 'queue "approvals": 1 waiting' in the_problem(home)
    conn.close()


def test_a_log_that_lost_its_index_is_read(home, tmp_path):
    """As a copy of the files has it that leaves tasks.db-shm out."""
    state, temporary = home / PREFIX / "state", tmp_path / "temporary"
    temporary.mkdir()
    # While somebody has read, the last to write does not write the log back.
    holder = database(home)
    holder.execute("select count(*) from notifications").fetchone()
    put(home, seconds_ago=1000)
    shutil.copytree(state, tmp_path / "copy", ignore=shutil.ignore_patterns("tasks.db-shm"))
    holder.close()
    shutil.rmtree(state)
    (tmp_path / "copy").rename(state)
    assert "1 waiting" in the_problem(home, env={"TMPDIR": str(temporary)})
    assert not (state / "tasks.db-shm").exists() and not list(temporary.iterdir())


# ----------------------------------------------------------------------------------------------------------------- tasks


def test_the_oldest_waiting_task_counts_whatever_else_is_green(home):
    put(home, seconds_ago=700)
    assert "no worker serves it" in the_problem(home)
    assert of_level(doctor(home, "--max-wait", "1h"), "problem") == []
    with open(home / PREFIX / "state/workers/serving.notifications", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert "although a worker serves it" in the_problem(home)


def test_an_overdue_scheduled_task_counts_and_one_that_is_not_due_does_not(home):
    put(home, status=3, due_at=time.time() + 60)
    assert of_level(doctor(home), "problem") == []
    put(home, "approvals", status=3, due_at=time.time() - 3600)
    assert 'queue "approvals": 1 waiting' in the_problem(home)


def test_a_paused_queue_is_a_note(home):
    put(home, seconds_ago=7000)
    conn = database(home)
    conn.execute("insert into task_controls (queue, paused_at) values ('notifications', 1)")
    conn.close()
    findings = doctor(home)
    assert (
        of_level(findings, "problem") == [] and "paused" in of_level(findings, "note", "tasks")[0]
    )


def test_a_task_of_a_dead_worker_that_nobody_takes_back(home):
    put(home, status=2, owner="1-dead", attempts=1, claimed_at=time.time())
    assert "1-dead, which has died" in the_problem(home)
    with open(home / PREFIX / "state/workers/1-dead", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert of_level(doctor(home), "problem") == []


def test_a_task_without_a_handler_and_failures_are_told(home):
    put(
        home,
        status=3,
        due_at=time.time() + 60,
        attempts=1,
        data=PROBE,
        error="no handler 'probe' in /x",
    )
    conn = database(home)
    conn.execute(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at) "
        "values ('notifications', 9, 'x', 'y', 'failed', '{}', '2020')"
    )
    conn.close()
    findings = doctor(home)
    assert of_level(findings, "problem") == [
        "queue \"notifications\": 1 of type 'probe' cannot run: no handler 'probe' in /x"
    ]
    assert "1 failed for good" in of_level(findings, "note", "tasks")[0]


def test_a_million_rows_are_looked_at_in_seconds(home):
    conn = database(home)
    conn.execute("begin")
    conn.execute("""with recursive n (i) as (select 1 union all select i + 1 from n where i < 200000)
                    insert into notifications (data) select '{"hook_event_name": "claude", "n": ' || i || '}' from n""")
    conn.execute("commit")
    conn.close()
    started = time.monotonic()
    assert of_level(doctor(home), "problem") == []
    assert time.monotonic() - started < 10


# ----------------------------------------------------------------------------------------------------------------- spool


def test_a_spool_that_does_not_drain(home):
    file = home / PREFIX / "state/spool/notifications/1.json"
    file.write_text("{}")
    # The task has only just come.
    assert of_level(doctor(home), "problem") == []
    os.utime(file, (time.time() - 300,) * 2)
    assert "is not draining: 1 tasks" in the_problem(home)


def test_malformed_files_and_foreign_directories_in_the_spool(home):
    spool = home / PREFIX / "state/spool"
    (spool / "notifications/malformed").mkdir()
    (spool / "notifications/malformed/1-x.json").write_text("{")
    assert "a task is a JSON object of at most 64 MiB" in the_problem(home)
    shutil.rmtree(spool / "notifications/malformed")
    (spool / "No Queue").mkdir()
    assert "No Queue" in the_problem(home)


# ----------------------------------------------------------------------------------------------------- handlers, the hook


@pytest.mark.parametrize(("text", "mode", "says"), [
    ("#!/bin/sh\n", 0o644, "not executable"),
    ("#!/nowhere/python9\n", 0o755, "/nowhere/python9"),
    ("#!/usr/bin/env -S nonesuch --x\n", 0o755, "needs nonesuch"),
    ("#!/bin/sh\r\necho\r\n", 0o755, "Windows line ends"),
    ("echo hello\n", 0o755, "probe names no interpreter in its first line"),
])  # fmt: skip
def test_a_handler_that_cannot_start(home, text, mode, says):
    handler = home / PREFIX / "handlers/probe"
    handler.write_bytes(text.encode())
    handler.chmod(mode)
    assert says in the_problem(home)


def test_data_beside_the_handlers_is_not_a_handler(home):
    (home / PREFIX / "handlers/words.txt").write_text("data")
    assert of_level(doctor(home), "problem") == []


def settings(home, change):
    path = home / ".claude/settings.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_no_hook_is_a_note_for_whoever_said_no(home):
    (home / ".claude/settings.json").unlink()
    findings = doctor(home)
    assert (
        of_level(findings, "problem") == []
        and "there is no hook" in of_level(findings, "note", "hook")[0]
    )
    (home / ".claude/settings.json").write_text(
        '{"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "say done"}]}]}}'
    )
    assert "no hook of the queue" in of_level(doctor(home), "note", "hook")[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ('{"hooks": [1]}', "not of the shape"), ("[]", "not of the shape")],
)
def test_settings_that_claude_code_cannot_read(home, text, says):
    (home / ".claude/settings.json").write_text(text)
    assert says in the_problem(home)


def test_hooks_that_are_switched_off(home):
    settings(home, lambda value: value.update(disableAllHooks=True))
    assert "disableAllHooks" in the_problem(home)


def spoil_record(home, **values):
    """What install.py wrote down is what it wrote into the hook."""
    path = home / PREFIX / "installed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_hook_whose_file_or_interpreters_have_gone(home):
    hook = home / PREFIX / "runtime/hook"
    spoil_record(home, python="/nowhere/python3")
    findings = doctor(home)
    assert of_level(findings, "problem") == [] and "can do without python" in " ".join(
        of_level(findings, "note", "hook")
    )
    spoil_record(home, uv="/nowhere/uv")
    assert "neither Python 3.11 nor uv" in the_problem(home)
    hook.unlink()
    problems = of_level(doctor(home), "problem")
    assert any("installation is incomplete: runtime/hook" in problem for problem in problems)
    assert any(f"the Stop hook needs {hook}" in problem for problem in problems)


def test_a_hook_that_counts_on_a_path_it_will_not_have(home):
    def mine(value):
        value["hooks"]["Stop"][0]["hooks"].append(
            {"type": "command", "command": "uv run --script ~/x/enqueue.py --hook notifications"}
        )

    settings(home, mine)
    (home / "x").mkdir()
    (home / "x/enqueue.py").touch()
    if shutil.which("uv", path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"):
        pytest.skip("uv is where every program finds it")
    assert "calls uv, which is not on the PATH" in the_problem(home)


def test_an_installation_that_was_interrupted_or_lost_a_file(home):
    (home / PREFIX / "runtime/lib/worker.py").unlink()
    assert "incomplete: runtime/lib/worker.py" in the_problem(home)
    (home / PREFIX / "installed.json").write_text("{")
    assert "installed.json is damaged" in the_problem(home)


# ------------------------------------------------------------------------------------------------ the machine, versions


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(MAIN)
    import doctor

    return doctor


@pytest.mark.parametrize(("version", "has_it"), [((3, 6, 23), False), ((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False), ((3, 45, 0), True),
                                                ((3, 50, 6), True), ((3, 50, 7), False), ((3, 51, 2), True), ((3, 51, 3), False), ((3, 52, 0), False)])  # fmt: skip
def test_the_wal_reset_bug_is_known_by_version(tasks, version, has_it):
    assert tasks.has_wal_reset_bug(version) is has_it


@pytest.mark.parametrize(("kind", "path", "level"), [("nfs4", "/srv/share/state", "problem"), ("9p", "/mnt/c/Users/x", "problem"), ("drvfs", "/mnt/c/Users/x", "problem"),
                                                    ("fuse.sshfs", "/home/me/far", "problem"), ("cifs", "/x", "problem"), ("ext4", "/mnt/c/x", "ok"), ("apfs", "/Users/me", "ok")])  # fmt: skip
def test_file_systems_that_are_shared_with_other_machines(tasks, monkeypatch, kind, path, level):
    table = [
        ("/", "ext4", ["rw"]),
        (str(Path(path).parent), kind, ["rw"]),
        ("/other", "nfs", ["rw"]),
    ]
    monkeypatch.setattr(tasks, "mount_table", lambda: table)
    (finding,) = tasks.check_file_system(Path(path))
    assert finding.level == level and (kind in finding.what)


def test_the_real_mount_table_is_read(tasks):
    kind, point, options = tasks.file_system_of("/proc/self", tasks.mount_table())
    assert (kind, point) == ("proc", "/proc") and "rw" in options


def mounted(home, script):
    """Run doctor in a mount namespace of its own, where script has mounted something."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs to be root, to mount")
    state = home / PREFIX / "state"
    setup = f'cp -a "$STATE" /tmp/kept.$$ && {script} && shift 0 && exec "$@"'
    return doctor(
        home,
        prefix=["unshare", "-m", "sh", "-c", setup.replace("/tmp/kept.$$", '"$STATE.kept"'), "sh"],
        env={"STATE": str(state)},
    )


def test_a_full_disk_and_a_state_in_memory(home):
    findings = mounted(
        home, 'mount -t tmpfs -o size=4m,mode=700 tmpfs "$STATE" && cp -a "$STATE.kept/." "$STATE"'
    )
    assert "the disk is full, or nearly" in of_level(findings, "problem", "disk")[0]
    assert "gone after a restart" in of_level(findings, "note", "file system")[0]


def test_a_read_only_disk(home):
    findings = mounted(home, 'mount --bind "$STATE" "$STATE" && mount -o remount,bind,ro "$STATE"')
    assert "mounted read-only" in of_level(findings, "problem", "file system")[0]


def test_no_inotify_instances_left(home, tmp_path):
    """As another user, so that nobody else is left without."""
    python = "/usr/bin/python3"
    fit = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if os.geteuid() or not os.access(python, os.X_OK) or subprocess.run(fit).returncode:
        pytest.skip("needs to be root, and a Python that everybody may run")
    public = Path(
        subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
    )
    try:
        copy_scripts(public, *(name.name for name in MAIN.glob("*.py")))
        for path in (public, *public.rglob("*")):
            shutil.chown(path, 65534, 65534)
        script = (
            "import ctypes, subprocess, sys\nlibc = ctypes.CDLL(None)\nwhile libc.inotify_init1(0) >= 0: pass\n"
            "sys.exit(subprocess.run([sys.executable, '-B', sys.argv[1], 'doctor'], close_fds=True).returncode)"
        )
        ran = subprocess.run(
            [python, "-c", script, public / "tasks.py"],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            env={"HOME": str(public), "PATH": "/usr/bin:/bin"},
            cwd="/",
            timeout=60,
        )
    finally:
        shutil.rmtree(public)
    assert (
        ran.returncode == 1
        and "Too many open files: workers cannot be woken by file events" in ran.stdout
    ), ran.stdout + ran.stderr


@pytest.mark.parametrize("args", [["--nonsense"], ["--max-wait", "soon"]])
def test_a_usage_error_is_64(home, args):
    ran = subprocess.run(
        [sys.executable, home / PREFIX / "runtime/lib/tasks.py", "doctor", *args],
        env={"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 64 and "Traceback" not in ran.stderr


def test_a_state_that_is_not_the_hooks_is_told(home, tmp_path):
    other = tmp_path / "other state"
    shutil.copytree(home / PREFIX / "state", other)
    findings = doctor(home, env={"TASK_QUEUE_STATE": str(other)})
    assert of_level(findings, "problem") == []
    assert any(
        f"tasks go to {home / PREFIX / 'state'}; this looks at {other}" in note
        for note in of_level(findings, "note", "hook")
    )


# -------------------------------------------------------------------------------------- by whatever way the queue is found


def hooks(home, *commands, event="Stop"):
    def change(value):
        value["hooks"] = {
            event: [{"hooks": [{"type": "command", **command} for command in commands]}]
        }

    settings(home, change)


@pytest.mark.parametrize(
    "words",
    [
        {"command": "python3", "args": ["{lib}/enqueue.py", "--hook", "notifications"]},
        {"command": "/bin/sh", "args": ["{hook}", "notifications"]},
        {"command": "{hook}", "args": []},
        {"command": "sh ~/.claude/automation/lychee/runtime/hook notifications"},
        {"command": 'sh "$HOME/.claude/automation/lychee/runtime/hook" notifications'},
    ],
    ids=lambda words: words["command"],
)
def test_a_hook_is_seen_however_it_is_written(home, words):
    prefix = home / PREFIX
    hooks(
        home,
        json.loads(
            json.dumps(words)
            .replace("{lib}", str(prefix / "runtime/lib"))
            .replace("{hook}", str(prefix / "runtime/hook"))
        ),
    )
    findings = [f for f in doctor(home) if f["check"] == "hook"]
    assert [f["level"] for f in findings] == ["ok"] and findings[0]["message"].endswith(": Stop"), (
        findings
    )


def test_a_hook_is_seen_behind_a_prefix_that_is_a_link(home, tmp_path):
    (home / PREFIX).rename(tmp_path / "really here")
    (home / PREFIX).symlink_to(tmp_path / "really here")
    assert of_level(doctor(home), "problem") == []
    assert [f["level"] for f in doctor(home) if f["check"] == "hook"] == ["ok"]


def test_a_worktree_hook_of_the_queue_is_a_fault(home):
    hook = json.loads((home / ".claude/settings.json").read_text())["hooks"]["Stop"][0]["hooks"][0]
    hooks(home, hook, event="WorktreeCreate")
    assert "WorktreeCreate" in the_problem(home)


def test_a_database_that_is_a_link_is_read_whole(home, tmp_path):
    state = home / PREFIX / "state"
    (state / "tasks.db").rename(tmp_path / "real.db")
    (state / "tasks.db").symlink_to(tmp_path / "real.db")
    conn = database(home)
    conn.execute("pragma wal_autocheckpoint = 0")
    put(home, seconds_ago=3600)
    for _ in range(3):
        conn.execute(
            'insert into notifications (data, timestamp) values (\'{"task_type": "claude"}\', 1e9)'
        )
    assert (tmp_path / "real.db-wal").stat().st_size > 0
    assert 'queue "notifications": 4 waiting' in the_problem(home)
    conn.close()


def test_rows_of_persist_queues_own_making_are_told(home):
    put(home, status=2)
    assert "claimed by nobody" in the_problem(home)


def test_a_time_that_is_no_time_is_told_and_not_a_traceback(home):
    put(home, timestamp=-1e300)
    assert "1 waiting" in the_problem(home)


@pytest.mark.parametrize("status", [1, 3])
def test_a_time_that_is_a_blob_stops_no_check(home, status):
    put(home, timestamp=b"2001", status=status)
    assert of_level(doctor(home, "--max-wait", "0"), "problem") == []


def test_a_time_that_is_a_text_is_counted_by_everybody(home):
    """As a shell writes it that fills the column itself: datetime('now')."""
    put(home, timestamp="2001-01-01 12:00:00")
    put(
        home,
        timestamp="2001-01-01 12:00:00",
        data='{"task_id": "h", "task_type": "claude", "data": {}}',
        status=3,
        queue="approvals",
    )
    assert all(f["level"] != "problem" for f in doctor(home, "--max-wait", "0"))
    put(home, seconds_ago=1000, data='{"task_id": "n", "task_type": "claude", "data": {}}')
    assert "2 waiting" in the_problem(home)
    lib = home / PREFIX / "runtime/lib"
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def tasks(*args):
        ran = subprocess.run(
            [sys.executable, "-B", lib / "tasks.py", *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0 and "Traceback" not in ran.stderr, (args, ran.stderr)
        return ran.stdout

    listed = json.loads(tasks("list", "--json"))
    assert {task["task_id"] for task in listed} == {"t", "h", "n"}
    for args in (["show", "t"], ["stats"], ["list", "--since", "1h"]):
        tasks(*args)
    ran = subprocess.run(
        [sys.executable, lib / "tasks.py", "export"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    times = {task["id"]: task["enqueued_at"] for task in map(json.loads, ran.stdout.splitlines())}
    assert times[1] == pytest.approx(978_350_400, abs=0.001), times
    assert "moved 1" in tasks("move", "--from", "approvals", "completions")
    assert "moved 2" in tasks("move", "--from", "notifications", "completions")
    assert "deleted 3" in tasks("purge", "completions", "--yes")


# ------------------------------------------------------------------------------ who may read what, and remedies that work


def remedy_of(home, check):
    (remedy,) = [f["remedy"] for f in doctor(home) if f["level"] != "ok" and f["check"] == check]
    return remedy


def test_a_spool_file_whose_name_is_not_utf8_is_named_with_a_remedy_that_works(home):
    spool = home / PREFIX / "state/spool/notifications"
    for name in (b"\xff'\\ \x1b].json", b"\xfe.json"):
        (Path(os.fsdecode(os.fsencode(spool) + b"/" + name))).write_text("{}")
    remedies = [f["remedy"] for f in doctor(home) if f["level"] == "problem"]
    assert len(remedies) == 2 and all(
        remedy.isascii() or "J\u00fcrgen" in remedy for remedy in remedies
    )
    for remedy in remedies:
        subprocess.run(["bash", "-c", remedy], check=True)
    assert of_level(doctor(home), "problem") == []
    assert len(list(spool.glob("*.json"))) == 2


def test_modes_of_the_state_are_told_and_the_remedy_mends_them(home):
    state = home / PREFIX / "state"
    (state / "spool").chmod(0o755)
    assert "other users may read or write spool" in of_level(doctor(home), "note", "state")[0]
    state.chmod(0o755)
    (remedy,) = [f["remedy"] for f in doctor(home) if f["level"] == "problem"]
    subprocess.run(["bash", "-c", remedy.split(";")[0]], check=True)
    assert of_level(doctor(home), "problem") == [] and of_level(doctor(home), "note", "state") == []


def test_files_that_their_owner_cannot_read_are_told(home):
    directory = home / PREFIX / "state/spool/notifications"
    directory.chmod(0)
    findings = doctor(home)
    assert "cannot be read and written" in of_level(findings, "problem", "state")[0]
    subprocess.run(
        ["bash", "-c", next(f["remedy"] for f in findings if f["level"] == "problem")], check=True
    )
    assert of_level(doctor(home), "problem") == []


def test_files_of_another_user_are_told_with_the_command_that_mends_it(tasks, home, monkeypatch):
    """As the user finds it after one `sudo worker.py`: here everything but one directory is this
    user's.
    """
    state = home / PREFIX / "state"
    mine = os.getuid() or 4242
    monkeypatch.setattr(os, "getuid", lambda: mine)
    if os.geteuid() == 0:
        for path in (state, *state.rglob("*")):
            os.chown(path, mine, -1)
        os.chown(state / "workers", 0, 0)
    else:
        pytest.skip("needs root, to make files of another user")
    (finding,) = [f for f in tasks.check_state(state) if f.level == "problem"]
    assert "1 file in" in finding.what and "workers of root" in finding.what
    assert (
        finding.remedy.startswith(f"sudo chown -R {mine}:")
        and str(state).split("'")[0] in finding.remedy
    )


def test_root_is_told_to_be_the_states_owner(tasks, home, monkeypatch):
    state = home / PREFIX / "state"
    if os.geteuid():
        pytest.skip("needs root")
    os.chown(state, 65534, -1)
    (finding,) = tasks.check_state(state)
    assert (
        finding.level == "problem"
        and "you are root" in finding.what
        and "sudo -u" in finding.remedy
    )


def test_doctor_names_a_cause_before_it_offers_a_purge(home):
    put(
        home,
        status=3,
        due_at=time.time() + 60,
        attempts=1,
        data=PROBE,
        error="no handler 'probe' in /x",
    )
    (remedy,) = [f["remedy"] for f in doctor(home) if f["level"] == "problem"]
    assert remedy.index("put an executable of that name into") < remedy.index("purge")
    handler = home / PREFIX / "handlers/probe"
    handler.write_text("#!/bin/sh\n")
    handler.chmod(0o755)
    assert of_level(doctor(home), "problem") == []


def test_dead_letters_without_a_handler_are_told_while_there_is_none(home):
    conn = database(home)
    dead = (
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error, completed_at)"
        " values ('notifications', ?, ?, 'probe', 'failed', '{}', '2020', ?, datetime('now', ?))"
    )
    error = "no handler 'probe' in /x: put it there (attempt 4 of 4)"
    conn.execute(dead, (1, "new", error, "-1 hour"))
    conn.execute(dead, (2, "old", error, "-2 days"))
    conn.execute(dead, (3, "other", "exit 1: no handler", "-1 hour"))
    conn.close()
    (found,) = [f for f in doctor(home) if f["level"] == "problem"]
    assert found["message"] == (
        "queue \"notifications\": 1 of type 'probe' cannot run, 1 of them failed for good in the "
        "last day: no handler 'probe' in /x"
    )
    assert found["remedy"].endswith("retry --failed --queue notifications --type probe")
    assert "purge" not in found["remedy"]
    handler = home / PREFIX / "handlers/probe"
    handler.write_text("#!/bin/sh\n")
    handler.chmod(0o755)
    assert of_level(doctor(home), "problem") == []


def test_one_check_that_fails_does_not_stop_the_others(home):
    (home / PREFIX / "state/tasks.db").unlink()
    (home / PREFIX / "state/tasks.db").mkdir()
    findings = doctor(home)
    assert {f["check"] for f in findings} >= {
        "versions",
        "state",
        "database",
        "tasks",
        "spool",
        "handlers",
        "hook",
        "file events",
    }


def test_what_holds_a_queue_back_is_said_until_when_and_why(home):
    put(home, "approvals")
    tasks = [sys.executable, home / PREFIX / "runtime/lib/tasks.py"]
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    subprocess.run(
        [*tasks, "pause", "approvals", "--for", "90m", "--reason", "usage limit"],
        env=env,
        check=True,
        capture_output=True,
    )
    (found,) = [f for f in doctor(home) if "is paused" in f["message"]]
    assert found["level"] == "note" and re.search(
        r"paused until .*\(in 90 m\): usage limit", found["message"]
    )
    assert found["remedy"].endswith("resume approvals")


def test_tasks_that_wait_for_a_person_are_named_after_a_while(home):
    put(home, "approvals", seconds_ago=60, status=3)
    assert not [f for f in doctor(home) if "held for a person" in f["message"]]
    (found,) = [f for f in doctor(home, "--max-wait", "0s") if "held for a person" in f["message"]]
    assert (
        found["level"] == "note"
        and "approve ID" in found["remedy"]
        and "reject ID" in found["remedy"]
    )


def test_tasks_that_another_machine_has_had_for_long_are_named(home):
    away = {"status": 5, "owner": "hub-1"}
    put(home, claimed_at=time.time() - 80_000, **away)
    assert not [f for f in doctor(home) if "handed over" in f["message"]]
    put(
        home,
        seconds_ago=90_000,
        data='{"task_id": "unsent", "task_type": "claude", "data": {}}',
        **away,
    )
    (found,) = [f for f in doctor(home) if "handed over" in f["message"]]
    assert found["level"] == "note" and found["remedy"].endswith("relay.py status")
    assert "1 handed over to another machine for more than a day" in found["message"]


def test_a_task_that_is_handed_over_is_late_only_after_its_time(home):
    sent = {"status": 5, "owner": "hub-1", "claimed_at": time.time() - 90_000}
    put(home, due_at=time.time() + 3_600, **sent)
    assert not [f for f in doctor(home) if "handed over" in f["message"]]
    text = {
        "data": '{"task_id": "text", "task_type": "claude", "data": {}}',
        "claimed_at": "yesterday",
    }
    put(home, seconds_ago=90_000, **{**sent, **text})
    (found,) = [f for f in doctor(home) if "handed over" in f["message"]]
    assert found["message"].startswith('queue "notifications": 1 handed over')
