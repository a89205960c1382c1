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
from threading import Timer

import pytest
from conftest import one_line
from homes import install, run
from plugin import UV_CACHE

from taskqueue import serving

pytest_plugins = ["homes"]
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
def home(installed, request):
    return installed(name=getattr(request, "param", "home"))


def service(home, *words, kind="systemd", **options) -> str:
    """Write units with `tq service`, which must succeed; return what it prints."""
    ran = run(home, "service", "--kind", kind, *words, **options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def units_of(home):
    return sorted((home / ".config/systemd/user").iterdir())


def plist_of(home):
    (path,) = (home / "Library/LaunchAgents").glob("*.plist")
    return plistlib.loads(path.read_bytes())


@pytest.mark.parametrize("home", ["home", AWKWARD], indirect=True, ids=["plain", "awkward"])
def test_systemd_finds_no_fault_in_the_units(home, analyze):
    service(home, "--queue", "notifications", "--queue", "approvals")
    assert [unit.suffix for unit in units_of(home)] == [".path", ".service", ".timer"]
    verdict = analyze(home, *units_of(home))
    said = (verdict.stdout + verdict.stderr).splitlines()
    ours = [line for line in said if "lychee" in line or home.name in line]
    assert (verdict.returncode, ours) == (0, [])


def test_systemd_would_find_a_fault(home, analyze):
    service(home)
    (unit,) = [unit for unit in units_of(home) if unit.suffix == ".service"]
    unit.write_text(unit.read_text().replace('ExecStart="', 'ExecStart="/nowhere'))
    assert analyze(home, unit).returncode != 0


@pytest.mark.parametrize("home", [AWKWARD], indirect=True, ids=["awkward"])
def test_systemd_reads_the_very_paths_that_were_meant(home):
    """Unescaped by systemd's rules, the units' paths are those that exist."""
    service(home)
    lines = "".join(unit.read_text() for unit in units_of(home)).splitlines()
    values = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
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
    service(home, kind="launchd")
    job = plist_of(home)
    assert all(os.path.exists(word) for word in job["ProgramArguments"] if word.startswith("/"))
    assert str(home / ".claude/automation/lychee/state/wake") in job["WatchPaths"]
    assert f"HOME={home}" in job["ProgramArguments"] and "EnvironmentVariables" not in job
    assert job["RunAtLoad"] is True and "KeepAlive" not in job


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_no_secret_of_the_environment_gets_into_the_files(home, kind):
    secrets = {"ANTHROPIC_API_KEY": "sk-secret", "MY_TOKEN": "sk-secret"}
    service(home, kind=kind, env=secrets)
    written = [path.read_text() for path in home.rglob("lychee-queue*")]
    assert written and not any("sk-secret" in text or "API_KEY" in text for text in written)
    for variable in ("PATH", "HOME"):
        assert any(variable in text for text in written)


def test_a_dry_run_shows_the_files_and_writes_none(home):
    assert "PathModified=" in service(home, "--dry-run")
    assert not (home / ".config").exists()


def test_a_unit_that_you_changed_is_not_overwritten_and_uninstall_leaves_it(home):
    service(home)
    # Ours may be rewritten.
    service(home, "--queue", "approvals")
    (timer,) = [unit for unit in units_of(home) if unit.suffix == ".timer"]
    timer.write_text(timer.read_text() + "# mine\n")
    ran = run(home, "service", "--kind", "systemd")
    assert ran.returncode == 1 and str(timer) in ran.stderr
    assert run(home, "uninstall").returncode == 0
    assert units_of(home) == [timer]


def test_two_prefixes_have_units_of_their_own(home, tmp_path):
    other = str(tmp_path / "other")
    install(home, other)
    service(home)
    service(home, other)
    assert len(units_of(home)) == 6
    assert run(home, "uninstall", other).returncode == 0
    names = [unit.name for unit in units_of(home)]
    assert names == [f"lychee-queue.{kind}" for kind in ("path", "service", "timer")]


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
    install(home, "--command", "tq")
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
    said = service(home, "--queue", "notifications", "--queue", "approvals", env=manager)
    command = said.splitlines()[-1].removeprefix("to load the units: ")
    assert command.endswith("tq service --enable")
    env = {"HOME": str(home), **manager}
    ran = subprocess.run(["/bin/sh", "-c", command], env=env, capture_output=True, text=True)
    assert ran.returncode == 0 and "notifications, approvals" in ran.stdout, ran.stderr
    (unit,) = [unit for unit in units_of(home) if unit.suffix == ".service"]
    assert '"notifications" "approvals"' in unit.read_text()
    assert "--user enable lychee-queue.path lychee-queue.timer" in told(home)


def test_queues_accumulate_and_one_is_taken_away_by_a_command_that_says_so(home, manager):
    def serves(*words):
        lines = service(home, *words, env=manager).splitlines()
        (line,) = [line for line in lines if line.startswith("serves")]
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
        service(home, *words, env=manager)
        return next(path for path in units_of(home) if path.suffix == ".service").read_text()

    given = '"--then" "completions" "--timeout" "2h" "--when-work"'
    assert given in unit("--", "--then", "completions", "--timeout", "2h")
    assert given in unit("--queue", "approvals")
    ran = run(home, "service", "--kind", "systemd", "--", "--no-such", env=manager)
    assert ran.returncode == 1 and "--no-such" in ran.stderr and given in unit()
    assert "--then" not in unit("--")


def test_units_that_are_loaded_are_loaded_again_with_a_new_queue(home, manager):
    service(home, env=manager)
    (home / "active").touch()
    assert "loaded" in service(home, "--queue", "jobs", env=manager)
    assert told(home)[-1] == "--user restart lychee-queue.path lychee-queue.timer"


def test_enabling_loads_the_path_and_the_timer_but_starts_no_worker(home, manager):
    service(home, "--enable", env=manager)
    lines = told(home)
    assert "--user daemon-reload" in lines
    assert "--user enable lychee-queue.path lychee-queue.timer" in lines
    assert not any("lychee-queue.service" in line for line in lines)
    assert run(home, "uninstall", env=manager).returncode == 0
    assert told(home)[len(lines)].startswith("--user disable --now lychee-queue.path")


@pytest.mark.parametrize("kind", ["systemd", "launchd"])
def test_install_rewrites_units_that_call_a_script_that_is_gone(home, manager, kind):
    """Older ones run `service.py work PREFIX QUEUE …`, or `install.py work`."""
    service(home, "--queue", "approvals", "--queue", "jobs", kind=kind, env=manager)
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
    one_line(run(home, "service", *args), 64, "--help")


def test_it_needs_an_install_first(tmp_path):
    one_line(run(tmp_path, "service"), 1, "just install")
    assert not (tmp_path / ".config").exists()


# ------------------------------------------------------------------------------- what the units run, without systemd


class Job:
    """The service's command, and a handler that writes down its task."""

    def __init__(self, home) -> None:
        service(home, kind="launchd")
        self.home, self.prefix = home, home / ".claude/automation/lychee"
        probe = self.prefix / "handlers/probe"
        probe.write_text('#!/bin/sh\ncat >/dev/null; echo "$TASK_ID" >>"$HOME/ran"\n')
        probe.chmod(0o755)

    def start(self) -> str:
        """Run what the service runs; return its log."""
        plist = plist_of(self.home)
        words = plist["ProgramArguments"]
        # A worker that leaves at once, of this Python: no download, no half minute.
        changed = {"60": "0", words[5]: sys.executable}
        ran = subprocess.run(
            [changed.get(word, word) for word in words],
            env={"ANTHROPIC_API_KEY": "of the manager"},
            cwd=plist["WorkingDirectory"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stderr

    def put(self, *args) -> None:
        enqueue = self.prefix / "runtime/lib/enqueue.py"
        command = [sys.executable, enqueue, "notifications", "probe", *args]
        subprocess.run(command, env={"HOME": str(self.home)}, capture_output=True, check=True)

    def sql(self, statement: str) -> None:
        subprocess.run(["sqlite3", self.prefix / "state/tasks.db", statement], check=True)

    def ran(self) -> list[str]:
        return (self.home / "ran").read_text().split()


@pytest.fixture
def job(home):
    return Job(home)


def test_without_work_no_worker_is_started(job):
    assert "serves" not in job.start()
    assert not (job.prefix / "state/workers/serving.notifications").exists()
    job.put("--delay", "3600")
    assert "serves" not in job.start()


def test_waiting_due_spooled_and_orphaned_tasks_are_work(job):
    job.put("--task-id", "waiting")
    assert "serves notifications" in job.start() and job.ran() == ["waiting"]
    job.put("--task-id", "due", "--delay", "0.01")
    job.start()
    assert job.ran() == ["waiting", "due"]
    spooled = job.prefix / "state/spool/notifications"
    (spooled / ".new").write_text('{"task_id": "spooled", "task_type": "probe", "data": {}}')
    (spooled / ".new").rename(spooled / "new.json")
    job.start()
    assert job.ran() == ["waiting", "due", "spooled"]
    # A worker that died claimed it, as it would be after a power cut.
    job.put("--task-id", "orphaned")
    claimed = "status = 2, owner = '1-gone', attempts = 1, claimed_at = 1"
    job.sql(f"update notifications set {claimed}")
    job.start()
    assert job.ran() == ["waiting", "due", "spooled", "orphaned"]


def test_a_paused_queue_is_no_work(job):
    job.put()
    job.sql("insert into task_controls (queue, paused_at) values ('notifications', 1)")
    assert "serves" not in job.start()


def test_a_damaged_database_is_said_in_one_line_and_does_not_spin(job):
    (job.prefix / "state/tasks.db").write_bytes(b"no database" * 1000)
    began = time.monotonic()
    log = job.start()
    assert "Traceback" not in log and "damaged" in log and time.monotonic() - began >= 1.0


def test_a_task_that_is_seen_a_moment_late_is_not_missed(job):
    """The write that starts the service may be seen before its commit: the service looks twice."""
    late = Timer(0.4, job.put, ("--task-id", "late"))
    late.start()
    log = job.start()
    late.join()
    assert "serves" in log and job.ran() == ["late"]
