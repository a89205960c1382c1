"""`tq service` writes units that systemd and launchd read, and what they run starts a worker only
for work.
"""

import hashlib
import json
import os
import plistlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT
from homes import run
from plugin import UV_CACHE

from taskqueue import serving

AWKWARD = 'J\u00fcrgen\'s 100% "own" $HOME \\ caf\u00e9 %h'


@pytest.fixture(scope="module")
def analyze():
    if sys.platform == "darwin":
        pytest.skip("systemd is not of this system")
    if not shutil.which("systemd-analyze"):
        for command in (
            ["apt-get", "update"],
            ["apt-get", "install", "-y", "--no-install-recommends", "systemd"],
        ):
            subprocess.run(
                command,
                capture_output=True,
                timeout=200,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
    assert shutil.which("systemd-analyze"), "apt-get install systemd"

    def verify(home, *units):
        with (
            tempfile.TemporaryDirectory() as runtime
            # Other units have sockets there, whose names have to be short.
        ):
            env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": runtime}
            return subprocess.run(
                ["systemd-analyze", "verify", "--user", *units],
                env=env,
                capture_output=True,
                text=True,
                timeout=60,
            )

    return verify


@pytest.fixture
def home(tmp_path, request):
    home = tmp_path / getattr(request, "param", "home")
    home.mkdir()
    ran = run(home, "install")
    assert ran.returncode == 0, ran.stderr
    return home


def units_of(home):
    return sorted((home / ".config/systemd/user").iterdir())


def plist_of(home):
    (path,) = (home / "Library/LaunchAgents").glob("*.plist")
    return plistlib.loads(path.read_bytes())


@pytest.mark.parametrize("home", ["home", AWKWARD], indirect=True, ids=["plain", "awkward"])
def test_systemd_finds_no_fault_in_the_units(home, analyze):
    ran = run(
        home, "service", "--kind", "systemd", "--queue", "notifications", "--queue", "approvals"
    )
    assert ran.returncode == 0, ran.stderr
    assert [unit.suffix for unit in units_of(home)] == [".path", ".service", ".timer"]
    verdict = analyze(home, *units_of(home))
    said = [
        line
        for line in (verdict.stdout + verdict.stderr).splitlines()
        if "lychee" in line or home.name in line
    ]
    assert (verdict.returncode, said) == (0, [])


def test_systemd_would_find_a_fault(home, analyze):
    run(home, "service", "--kind", "systemd")
    (service,) = [unit for unit in units_of(home) if unit.suffix == ".service"]
    service.write_text(service.read_text().replace('ExecStart="', 'ExecStart="/nowhere'))
    assert analyze(home, service).returncode != 0


@pytest.mark.parametrize("home", [AWKWARD], indirect=True, ids=["awkward"])
def test_systemd_reads_the_very_paths_that_were_meant(home):
    """Unescape the units by systemd's rules: what comes out are the paths that exist."""
    run(home, "service", "--kind", "systemd")
    text = "".join(unit.read_text() for unit in units_of(home))
    values = [
        line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")
    ]
    state = home / ".claude/automation/lychee/state"
    assert [value.replace("%%", "%") for key, value in values if key == "PathModified"] == [
        str(state / "wake"),
        str(state / "tasks.db-wal"),
        str(state / "spool/notifications"),
    ]
    (start,) = [value for key, value in values if key == "ExecStart"]
    words = [unquoted(word).replace("$$", "$") for word in start[1:-1].split('" "')]
    assert all(Path(word).exists() for word in words if word.startswith("/"))
    assert words[:2] == ["/usr/bin/env", "-i"] and "notifications" in words
    given = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    assert given["HOME"] == str(home) and given["TASK_QUEUE_STATE"] == str(state)
    assert words[words.index("--environment") + 1] == str(state.with_name("environment"))


def unquoted(word):
    return word.replace("%%", "%").replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("home", ["home", AWKWARD], indirect=True, ids=["plain", "awkward"])
def test_the_launchd_job_is_a_property_list_of_paths_that_exist(home):
    ran = run(home, "service", "--kind", "launchd")
    assert ran.returncode == 0, ran.stderr
    job = plist_of(home)
    assert all(os.path.exists(word) for word in job["ProgramArguments"] if word.startswith("/"))
    assert str(home / ".claude/automation/lychee/state/wake") in job["WatchPaths"]
    assert f"HOME={home}" in job["ProgramArguments"] and "EnvironmentVariables" not in job
    assert job["RunAtLoad"] is True and "KeepAlive" not in job


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_no_secret_of_the_environment_gets_into_the_files(home, kind):
    ran = run(
        home,
        "service",
        "--kind",
        kind,
        env={"ANTHROPIC_API_KEY": "sk-secret", "MY_TOKEN": "sk-secret"},
    )
    assert ran.returncode == 0, ran.stderr
    written = [path.read_text() for path in home.rglob("lychee-queue*")]
    assert written and not any("sk-secret" in text or "API_KEY" in text for text in written)
    for variable in ("PATH", "HOME"):
        assert any(variable in text for text in written)


def test_a_dry_run_shows_the_files_and_writes_none(home):
    ran = run(home, "service", "--dry-run", "--kind", "systemd")
    assert ran.returncode == 0 and "PathModified=" in ran.stdout and not (home / ".config").exists()


def test_a_unit_that_you_changed_is_not_overwritten_and_uninstall_leaves_it(home):
    run(home, "service", "--kind", "systemd")
    assert (
        run(home, "service", "--kind", "systemd", "--queue", "approvals").returncode == 0
        # Ours may be rewritten.
    )
    (timer,) = [unit for unit in units_of(home) if unit.suffix == ".timer"]
    timer.write_text(timer.read_text() + "# mine\n")
    ran = run(home, "service", "--kind", "systemd")
    assert ran.returncode == 1 and str(timer) in ran.stderr
    assert run(home, "uninstall").returncode == 0
    assert units_of(home) == [timer]


def test_two_prefixes_have_units_of_their_own(home, tmp_path):
    assert run(home, "install", str(tmp_path / "other")).returncode == 0
    assert run(home, "service", "--kind", "systemd").returncode == 0
    assert run(home, "service", str(tmp_path / "other"), "--kind", "systemd").returncode == 0
    assert len(units_of(home)) == 6
    assert run(home, "uninstall", str(tmp_path / "other")).returncode == 0
    assert [unit.name for unit in units_of(home)] == [
        "lychee-queue.path",
        "lychee-queue.service",
        "lychee-queue.timer",
    ]


# tq starts uv for what has dependencies: nothing is downloaded here.
OFFLINE = {"UV_CACHE_DIR": UV_CACHE, "UV_OFFLINE": "1"}
MANAGER = """\
#!/bin/sh
echo "$@" >>"$HOME/told"
case "$*" in *is-active*) exec test -e "$HOME/active" ;; esac
"""


@pytest.fixture
def manager(home):
    """A systemctl that writes down what it is told: there is no user manager where tests run."""
    fake = home / "bin/systemctl"
    fake.parent.mkdir()
    fake.write_text(MANAGER)
    fake.chmod(0o755)
    return {"PATH": f"{fake.parent}:{os.environ['PATH']}", **OFFLINE}


def told(home):
    return (home / "told").read_text().splitlines()


@pytest.mark.parametrize("enable", [[], ["--enable"]])
def test_without_a_user_bus_it_says_what_works(home, enable):
    """What is printed is typed as it stands: with tq on PATH by that name."""
    assert run(home, "install", "--command", "tq").returncode == 0
    (home / "none").mkdir()
    env = {"PATH": f"{home}/.local/bin:{home}/none"}
    ran = run(home, "service", "--kind", "systemd", "--queue", "approvals", *enable, env=env)
    said = ran.stderr if enable else ran.stdout.splitlines()[-1] + "\n"
    assert ran.returncode == (1 if enable else 0) and said.count("\n") == 1, ran.stderr
    assert "systemctl" in said and "tq service --enable" in said
    words = said.rsplit("running: ", 1)[1].split()
    assert words == ["tq", "work", "approvals"] and len(units_of(home)) == 3
    env = {"HOME": str(home), "PATH": f"{home}/.local/bin:/usr/bin:/bin", **OFFLINE}
    ran = subprocess.run([*words, "--drain"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_what_it_prints_loads_the_same_queues(home, manager):
    """README's night run lost its queue by it."""
    words = ("--kind", "systemd", "--queue", "notifications", "--queue", "approvals")
    ran = run(home, "service", *words, env=manager)
    assert ran.returncode == 0, ran.stderr
    command = ran.stdout.splitlines()[-1].removeprefix("to load the units: ")
    assert command.endswith("tq service --enable")
    env = {"HOME": str(home), **manager}
    ran = subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "notifications, approvals" in ran.stdout, ran.stderr
    (unit,) = [unit for unit in units_of(home) if unit.suffix == ".service"]
    assert '"notifications" "approvals"' in unit.read_text()
    assert "--user enable lychee-queue.path lychee-queue.timer" in told(home)


def test_queues_accumulate_and_one_is_taken_away_by_a_command_that_says_so(home, manager):
    def serves(*words):
        ran = run(home, "service", "--kind", "systemd", *words, env=manager)
        (line,) = [line for line in ran.stdout.splitlines() if line.startswith("serves")]
        return line.split(None, 1)[1]

    assert serves() == "notifications"
    assert serves("--queue", "approvals", "--queue", "approvals") == "notifications, approvals"
    assert serves("--queue", "jobs", "--remove", "notifications") == "approvals, jobs"
    assert serves() == "approvals, jobs"
    ran = run(home, "service", "--remove", "nope", env=manager)
    assert ran.returncode == 1 and "approvals, jobs" in ran.stderr
    ran = run(home, "service", "--remove", "jobs", "--remove", "approvals", env=manager)
    assert ran.returncode == 0 and "no queue is left" in ran.stdout and units_of(home) == []
    assert any(line.startswith("--user disable --now lychee-queue.path") for line in told(home))


def test_workers_options_stay_until_others_are_given(home, manager):
    def unit(*words):
        ran = run(home, "service", "--kind", "systemd", *words, env=manager)
        assert ran.returncode == 0, ran.stderr
        return next(path for path in units_of(home) if path.suffix == ".service").read_text()

    given = '"--then" "completions" "--timeout" "2h" "--when-work"'
    assert given in unit("--", "--then", "completions", "--timeout", "2h")
    assert given in unit("--queue", "approvals")
    ran = run(home, "service", "--kind", "systemd", "--", "--no-such", env=manager)
    assert ran.returncode == 1 and "--no-such" in ran.stderr and given in unit()
    assert "--then" not in unit("--")


def test_units_that_are_loaded_are_loaded_again_with_a_new_queue(home, manager):
    run(home, "service", "--kind", "systemd", env=manager)
    (home / "active").touch()
    ran = run(home, "service", "--kind", "systemd", "--queue", "jobs", env=manager)
    assert ran.returncode == 0 and "loaded" in ran.stdout
    assert told(home)[-1] == "--user restart lychee-queue.path lychee-queue.timer"


def test_enabling_loads_the_path_and_the_timer_but_starts_no_worker(home, manager):
    assert run(home, "service", "--enable", "--kind", "systemd", env=manager).returncode == 0
    lines = told(home)
    assert (
        "--user daemon-reload" in lines
        and "--user enable lychee-queue.path lychee-queue.timer" in lines
    )
    assert not any("lychee-queue.service" in line for line in lines)
    assert run(home, "uninstall", env=manager).returncode == 0
    assert told(home)[len(lines)].startswith("--user disable --now lychee-queue.path")


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_install_rewrites_units_that_call_a_script_that_is_gone(home, manager, kind):
    """Older ones run `service.py work PREFIX QUEUE …`, or `install.py work`."""
    run(home, "service", "--kind", kind, "--queue", "approvals", "--queue", "jobs", env=manager)
    record = home / ".claude/automation/lychee/installed.json"
    found = json.loads(record.read_text())
    old = home / ".claude/automation/lychee"
    words = ["/usr/bin/python3", "-E", "-s", f"{old}/runtime/lib/service.py", "work", str(old)]
    words += ["approvals", "jobs"]
    (unit,) = [Path(u) for u in found["units"] if u.endswith((".service", ".plist"))]
    if kind == "systemd":
        unit.write_text("[Service]\nExecStart=" + " ".join(f'"{word}"' for word in words) + "\n")
    else:
        unit.write_bytes(plistlib.dumps({"Label": "x", "ProgramArguments": words}))
    found["files"][str(unit)] = [hashlib.sha256(unit.read_bytes()).hexdigest()]
    record.write_text(json.dumps(found))
    ran = run(home, "install", env=manager)
    assert ran.returncode == 0 and str(unit) in ran.stdout, ran.stderr
    assert "service.py" not in unit.read_text() and "worker.py" in unit.read_text()
    assert serving.queues_of_unit(unit) == ["approvals", "jobs"]


@pytest.mark.parametrize(
    "args", [["--kind", "cron"], ["a", "b"], ["--nonsense"], ["--queue", "a b; rm"]]
)
def test_wrong_use_is_64_in_one_line(home, args):
    ran = subprocess.run(
        [sys.executable, ROOT / "tasks.py", "service", *args],
        env={"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (
        64,
        "",
        1,
    ) and "--help" in ran.stderr


def test_it_needs_an_install_first(tmp_path):
    ran = run(tmp_path, "service")
    assert (
        ran.returncode == 1 and "just install" in ran.stderr and not (tmp_path / ".config").exists()
    )


# ------------------------------------------------------------------------------- what the units run, without systemd


@pytest.fixture
def job(home):
    """The service's command and environment, and a handler that writes down its task."""
    assert run(home, "service", "--kind", "launchd").returncode == 0
    prefix = home / ".claude/automation/lychee"
    (prefix / "handlers/probe").write_text(
        '#!/bin/sh\ncat >/dev/null; echo "$TASK_ID" >>"$HOME/ran"\n'
    )
    (prefix / "handlers/probe").chmod(0o755)
    lib = prefix / "runtime/lib"
    plist = plist_of(home)

    def start():
        began = time.monotonic()
        ran = subprocess.run(
            # A worker that leaves at once, of this Python: no download, no half minute.
            [
                {"60": "0", plist["ProgramArguments"][5]: sys.executable}.get(word, word)
                for word in plist["ProgramArguments"]
            ],
            env={"ANTHROPIC_API_KEY": "of the manager"},
            cwd=plist["WorkingDirectory"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stderr, time.monotonic() - began

    def put(*args):
        ran = subprocess.run(
            [sys.executable, lib / "enqueue.py", "notifications", "probe", *args],
            env={"HOME": str(home)},
            capture_output=True,
        )
        assert ran.returncode == 0

    return home, prefix, start, put


def test_without_work_no_worker_is_started(job):
    _home, prefix, start, put = job
    log, _ = start()
    assert "serves" not in log and not (prefix / "state/workers/serving.notifications").exists()
    put("--delay", "3600")
    log, _ = start()
    assert "serves" not in log


def test_waiting_due_spooled_and_orphaned_tasks_are_work(job):
    home, prefix, start, put = job
    put("--task-id", "waiting")
    log, _ = start()
    assert "serves notifications" in log and (home / "ran").read_text() == "waiting\n"

    put("--task-id", "due", "--delay", "0.01")
    start()
    assert (home / "ran").read_text() == "waiting\ndue\n"

    spooled = prefix / "state/spool/notifications"
    (spooled / ".new").write_text('{"task_id": "spooled", "task_type": "probe", "data": {}}')
    (spooled / ".new").rename(spooled / "new.json")
    start()
    assert (home / "ran").read_text() == "waiting\ndue\nspooled\n"

    # claimed by a worker that died, as it would be after a power cut
    put("--task-id", "orphaned")
    subprocess.run(
        [
            "sqlite3",
            prefix / "state/tasks.db",
            "update notifications set status = 2, owner = '1-gone', attempts = 1, claimed_at = 1",
        ],
        check=True,
    )
    start()
    assert (home / "ran").read_text() == "waiting\ndue\nspooled\norphaned\n"


def test_a_paused_queue_is_no_work(job):
    _home, prefix, start, put = job
    put()
    subprocess.run(
        [
            "sqlite3",
            prefix / "state/tasks.db",
            "insert into task_controls (queue, paused_at) values ('notifications', 1)",
        ],
        check=True,
    )
    log, _ = start()
    assert "serves" not in log


def test_a_damaged_database_is_said_in_one_line_and_does_not_spin(job):
    _home, prefix, start, _put = job
    (prefix / "state/tasks.db").write_bytes(b"no database" * 1000)
    log, seconds = start()
    assert "Traceback" not in log and "damaged" in log and seconds >= 1.0


def test_a_task_that_is_seen_a_moment_late_is_not_missed(job):
    """What starts the service may have seen a write whose commit is visible only afterwards: it
    looks twice.
    """
    home, _prefix, start, put = job
    from threading import Timer

    late = Timer(0.4, put, ("--task-id", "late"))
    late.start()
    log, _ = start()
    late.join()
    assert "serves" in log and (home / "ran").read_text() == "late\n"
