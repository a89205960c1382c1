"""install.py service writes units that systemd and launchd read, and what they run starts a worker
only for work.
"""

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

MAIN = Path(__file__).resolve().parent.parent
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


def run(home, *args, source=MAIN, **env):
    return subprocess.run(
        [sys.executable, source / "install.py", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"], **env},
        timeout=60,
    )


@pytest.fixture
def home(tmp_path, request):
    home = tmp_path / getattr(request, "param", "home")
    home.mkdir()
    ran = run(home, "install", "--no-warm", "--hook", "no")
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
    assert words[-2:] == [str(home / ".claude/automation/lychee"), "notifications"]
    environment = dict(
        unquoted(value[1:-1]).split("=", 1) for key, value in values if key == "Environment"
    )
    assert environment["HOME"] == str(home) and environment["TASK_QUEUE_STATE"] == str(state)


def unquoted(word):
    return word.replace("%%", "%").replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("home", ["home", AWKWARD], indirect=True, ids=["plain", "awkward"])
def test_the_launchd_job_is_a_property_list_of_paths_that_exist(home):
    ran = run(home, "service", "--kind", "launchd")
    assert ran.returncode == 0, ran.stderr
    job = plist_of(home)
    assert all(os.path.exists(word) for word in job["ProgramArguments"] if word.startswith("/"))
    assert str(home / ".claude/automation/lychee/state/wake") in job["WatchPaths"]
    assert job["EnvironmentVariables"]["HOME"] == str(home) and job["EnvironmentVariables"]["USER"]
    assert job["RunAtLoad"] is True and "KeepAlive" not in job


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_no_secret_of_the_environment_gets_into_the_files(home, kind):
    ran = run(home, "service", "--kind", kind, ANTHROPIC_API_KEY="sk-secret", MY_TOKEN="sk-secret")
    assert ran.returncode == 0, ran.stderr
    written = [path.read_text() for path in home.rglob("lychee-queue*")]
    assert written and not any("sk-secret" in text or "API_KEY" in text for text in written)
    for variable in ("PATH", "HOME", "USER"):
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
    assert (
        run(home, "install", str(tmp_path / "other"), "--no-warm", "--hook", "no").returncode == 0
    )
    assert run(home, "service", "--kind", "systemd").returncode == 0
    assert run(home, "service", str(tmp_path / "other"), "--kind", "systemd").returncode == 0
    assert len(units_of(home)) == 6
    assert run(home, "uninstall", str(tmp_path / "other")).returncode == 0
    assert [unit.name for unit in units_of(home)] == [
        "lychee-queue.path",
        "lychee-queue.service",
        "lychee-queue.timer",
    ]


def test_where_it_cannot_be_loaded_it_says_so_and_how(home):
    (home / "bin").mkdir()
    ran = run(home, "service", "--enable", "--kind", "systemd", PATH=str(home / "bin"))
    assert (
        ran.returncode == 1
        and ran.stderr.count("\n") == 1
        and "systemctl --user daemon-reload" in ran.stderr
    )
    assert len(units_of(home)) == 3


def test_enabling_loads_the_path_and_the_timer_but_starts_no_worker(home):
    """A systemctl that writes down what it is told: there is no user manager where tests run."""
    fake = home / "bin/systemctl"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >>"$HOME/told"\n')
    fake.chmod(0o755)
    assert (
        run(
            home, "service", "--enable", "--kind", "systemd", PATH=f"{fake.parent}:/usr/bin:/bin"
        ).returncode
        == 0
    )
    told = (home / "told").read_text().splitlines()
    assert (
        told[0] == "--user daemon-reload"
        and told[1] == "--user enable lychee-queue.path lychee-queue.timer"
    )
    assert not any("lychee-queue.service" in line for line in told)
    assert run(home, "uninstall", PATH=f"{fake.parent}:/usr/bin:/bin").returncode == 0
    assert (
        (home / "told")
        .read_text()
        .splitlines()[len(told)]
        .startswith("--user disable --now lychee-queue.path")
    )


def test_service_py_and_install_py_service_are_the_same(home):
    shown = run(home, "service", "--dry-run", "--kind", "systemd")
    ran = subprocess.run(
        [sys.executable, MAIN / "service.py", "--dry-run", "--kind", "systemd"],
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        0,
        shown.stdout,
        "",
    ) and "ExecStart=" in ran.stdout


@pytest.mark.parametrize(
    "args", [["--kind", "cron"], ["work"], ["work", "/x"], ["a", "b"], ["--nonsense"]]
)
def test_wrong_use_is_64_in_one_line(home, args):
    ran = subprocess.run(
        [sys.executable, MAIN / "service.py", *args],
        env={"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (
        64,
        "",
        1,
    ) and "--help" in ran.stderr


def test_units_that_were_written_before_still_start_a_worker(job):
    """Those run `install.py work`; an upgrade of the scripts does not rewrite units."""
    home, prefix, _start, put = job
    put("--task-id", "waiting")
    ran = subprocess.run(
        [
            sys.executable,
            "-E",
            "-s",
            prefix / "runtime/lib/install.py",
            "work",
            prefix,
            "notifications",
        ],
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        timeout=60,
    )
    assert ran.returncode == 0 and (home / "ran").read_text() == "waiting\n", ran.stderr


def test_it_needs_an_install_first(tmp_path):
    ran = run(tmp_path, "service")
    assert (
        ran.returncode == 1 and "just install" in ran.stderr and not (tmp_path / ".config").exists()
    )


def test_a_hostile_queue_name_is_refused(home):
    ran = run(home, "service", "--queue", "a b; rm")
    assert (
        ran.returncode == 1 and "not a queue name" in ran.stderr and not (home / ".config").exists()
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
    # a worker that leaves at once, run by this Python: no download, no half minute
    record = json.loads((prefix / "installed.json").read_text())
    (prefix / "installed.json").write_text(json.dumps({**record, "uv": None}))
    lib = prefix / "runtime/lib"
    launch = (lib / "taskqueue/launch.py").read_text()
    (lib / "taskqueue/launch.py").write_text(
        launch.replace("IDLE_EXIT_SECONDS = 60", "IDLE_EXIT_SECONDS = 0")
    )
    plist = plist_of(home)

    def start():
        began = time.monotonic()
        ran = subprocess.run(
            plist["ProgramArguments"],
            env=plist["EnvironmentVariables"],
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
