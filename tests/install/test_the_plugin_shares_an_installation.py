"""The plugin's hooks beside an installation and without one: one state, one worker, and nothing
lost when versions differ.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for
from plugin import Home, copy_of_the_plugin, give_uv, hook_command, is_alive

import queue_helpers as q

pytestmark = pytest.mark.first

SUMMARY = "1 broken link: README.md:1 → pier.md"


class Firing(Home):
    """A home with a copy of the plugin, and a workspace whose hooks are fired as Claude Code does."""

    def __init__(self, directory) -> None:
        super().__init__(directory / "home of O'Brien")
        self.home.mkdir()
        self.root = copy_of_the_plugin(directory / "plugins/0.2.0")
        self.workspace = directory / "workspace"
        self.workspace.mkdir()
        (self.workspace / "README.md").write_text("[the pier](pier.md)\n")
        self.env = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", **give_uv(self.home)}
        self.fired = 0

    def fire(self, event: str, command: list[str] | None = None, code: int = 0, **payload) -> str:
        """Run the hook for an event; what it prints."""
        self.fired += "session_id" not in payload
        payload = {
            "hook_event_name": event,
            "cwd": str(self.workspace),
            "session_id": f"s{self.fired}",
            **payload,
        }
        ran = subprocess.run(
            command or hook_command(event, self.root),
            env=self.env,
            cwd=self.workspace,
            input=json.dumps(payload),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == code, ran.stderr
        return ran.stdout + ran.stderr if code else ran.stdout

    def task_queue(self, *args: str) -> subprocess.CompletedProcess:
        """The command that Claude has on its PATH."""
        env = self.env | {"PATH": f"{self.root}/bin:{self.env['PATH']}"}
        return subprocess.run(
            ["task-queue", *args],
            env=env,
            cwd=self.workspace,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def cmdline(self) -> str:
        (worker,) = self.workers()
        with open(f"/proc/{worker}/cmdline") as file:
            return file.read()

    def no_worker(self) -> None:
        """Have nobody serve: what hooks hand over stays where it is."""
        file = self.home / ".claude/automation/lychee/environment"
        file.write_text(f"UV_CACHE_DIR={self.home / 'an empty cache'}\nUV_OFFLINE=1\n")


@pytest.fixture
def firing(tmp_path):
    made = Firing(tmp_path)
    yield made
    made.close()


def test_alone_it_uses_its_own_worker_which_leaves_when_its_directory_goes(firing):
    assert firing.fire("Stop") == ""
    ((status, result),) = firing.ended()
    assert status == "completed" and json.loads(result)["summary"] == SUMMARY
    assert f"{firing.root}/worker.py" in firing.cmdline()
    (worker,) = firing.workers()
    shutil.rmtree(firing.root)
    wait_for(lambda: not is_alive(worker), 30, "the end of its worker")
    assert "is gone: leaving" in firing.worker_log()


def test_a_removed_directory_is_said_and_never_blocks_claude(firing):
    commands = [hook_command(event, firing.root) for event in ("Stop", "UserPromptSubmit")]
    shutil.rmtree(firing.root)
    for command in commands:
        assert "start a new session" in firing.fire("Stop", command, code=1)


def test_it_uses_an_installations_worker_and_state_wherever_that_is(firing, tmp_path):
    firing.state = tmp_path / 'the "state"'
    firing.install(env={"TASK_QUEUE_STATE": str(firing.state), "PATH": firing.env["PATH"]})
    handler = firing.prefix / "handlers/link_validation"
    handler.write_text('#!/bin/sh\necho \'{"summary": "mine"}\'\n')
    firing.fire("Stop")
    assert firing.ended() == [("completed", '{"summary": "mine"}\n')]
    assert f"{firing.prefix}/runtime/lib/worker.py" in firing.cmdline()
    assert "mine" in firing.fire("UserPromptSubmit")
    assert not (firing.prefix / "state").exists()


def test_ten_edits_during_a_check_are_one_more_run_and_one_just_after_is_checked(firing):
    firing.install()
    (firing.prefix / "handlers/link_validation").write_text(
        "#!/bin/sh\necho >>runs\nuntil [ -e go ]; do sleep 0.01; done\n"
    )
    runs = firing.workspace / "runs"
    firing.fire("Stop")
    wait_for(runs.exists, 60, "the first check")
    for _ in range(10):
        firing.fire("Stop")
    (firing.workspace / "go").touch()
    firing.ended(2)
    firing.fire("Stop")
    firing.ended(3)
    assert runs.read_text().count("\n") == 3
    assert firing.rows("select count(*) from notifications") == [(0,)]


def test_the_settings_hook_and_the_plugins_make_one_task_of_a_firing_and_tell_once(firing):
    firing.install("--hook", "yes", "--report", "yes")
    hooks = json.loads((firing.home / ".claude/settings.json").read_text())["hooks"]

    def both(event: str) -> str:
        installed = ["/bin/sh", "-c", hooks[event][0]["hooks"][0]["command"]]
        told = firing.fire(event, installed, session_id="one")
        return told + firing.fire(event, session_id="one")

    both("Stop")
    firing.ended()
    both("Stop")
    assert firing.rows("select count(*) from notifications") == [(0,)]
    assert len(firing.ended()) == 1
    assert both("UserPromptSubmit").count("additionalContext") == 1 and both("SessionStart") == ""


@pytest.mark.parametrize("older", ["plugin", "installation"])
def test_with_different_schema_versions_hooks_spool_and_doctor_says_which_to_update(firing, older):
    firing.install()
    firing.no_worker()
    module = (
        firing.root if older == "installation" else firing.prefix / "runtime/lib"
    ) / "queue_helpers.py"
    newer = f"SCHEMA_VERSION = {q.SCHEMA_VERSION + 1}"
    module.write_text(module.read_text().replace(f"SCHEMA_VERSION = {q.SCHEMA_VERSION}", newer))
    if older == "plugin":
        with sqlite3.connect(firing.state / "tasks.db") as conn:
            conn.execute(f"pragma user_version = {q.SCHEMA_VERSION + 1}")
    plugins = firing.home / ".claude/plugins/installed_plugins.json"
    plugins.parent.mkdir(parents=True)
    record = [{"scope": "user", "installPath": str(firing.root), "version": "0.2.0"}]
    plugins.write_text(json.dumps({"version": 2, "plugins": {"task-queue@market": record}}))
    before = firing.rows("pragma user_version")

    firing.fire("Stop")
    assert len(firing.spooled()) == 1 and firing.rows("pragma user_version") == before
    env = {"HOME": str(firing.home), "PATH": os.environ["PATH"]}
    doctor = [sys.executable, firing.prefix / "runtime/lib/tasks.py", "doctor", "--json"]
    ran = subprocess.run(doctor, env=env, capture_output=True, text=True)
    (found,) = [one for one in json.loads(ran.stdout)["findings"] if one["check"] == "plugin"]
    assert found["level"] == "problem" and "spool" in found["message"]
    remedy = "claude plugin update task-queue@market" if older == "plugin" else "just install"
    assert found["remedy"] == remedy


def test_without_python_or_uv_the_firing_is_kept_and_said_so(firing):
    (firing.home / ".local/bin/uv").unlink()
    script = firing.root / "bin/hook.sh"
    text = script.read_text()
    script.write_text(
        text.replace("/usr/local/bin", "/nowhere").replace(" /usr/bin;", " /nowhere;")
    )
    assert script.read_text() != text
    firing.fire("Stop")
    assert len(firing.spooled()) == 1
    assert "no Python 3.11" in firing.fire("UserPromptSubmit", code=1)


@pytest.mark.parametrize(
    "home",
    ["/proc/self/cwd", "{workspace}", "{workspace}/.home", "{link}", "{open}", "rel", ".", ""],
)
@pytest.mark.parametrize("directory", ["workspace", "workspace/sub"])
def test_a_home_that_cannot_be_trusted_is_the_accounts(firing, tmp_path, home, directory):
    """Nothing of such a home is read, run or written."""
    account, open_to_all = tmp_path / "account", tmp_path / "open"
    places = [firing.workspace / "sub", firing.workspace / ".home", open_to_all, account]
    for place in places:
        place.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "link").symlink_to(firing.workspace)
    for place in (firing.workspace, firing.workspace / "sub", *places[1:3]):
        hook = place / ".claude/automation/lychee/runtime/hook"
        hook.parent.mkdir(parents=True)
        hook.write_text(f"touch '{tmp_path}/hijacked'\nstate=$(touch '{tmp_path}/hijacked')\n")
    script = firing.root / "bin/hook.sh"
    text = script.read_text()
    # The account's home is another one here.
    assert text.count('"home=~$user"') == 1
    script.write_text(text.replace('eval "home=~$user"', f"home='{account}'"))
    named = home.format(workspace=firing.workspace, link=tmp_path / "link", open=open_to_all)
    env = {"HOME": named, "CLAUDE_PROJECT_DIR": str(firing.workspace), "PATH": "/proc/self/cwd"}
    ran = subprocess.run(
        ["/bin/sh", script, "notifications", "t"],
        env=env,
        cwd=tmp_path / directory,
        input=b"{}",
        capture_output=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    spool = account / ".claude/automation/lychee/state/spool/notifications"
    assert len(list(spool.glob("*.hook"))) == 1 and not (tmp_path / "hijacked").exists()


def test_without_any_home_it_says_so_in_one_line(firing):
    script = firing.root / "bin/hook.sh"
    script.write_text(script.read_text().replace('eval "home=~$user"', "home="))
    ran = subprocess.run(
        ["/bin/sh", script, "notifications"], env={}, input=b"{}", capture_output=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count(b"\n")) == (1, b"", 1)


def test_the_skills_commands_work_as_printed(firing):
    skill = (ROOT / "skills/task-queue/SKILL.md").read_text()
    commands = [
        line
        for block in re.findall(r"```bash\n(.*?)```", skill, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 8
    (firing.root / "handlers/claude").write_text('#!/bin/sh\necho \'{"summary": "mended"}\'\n')
    task_id = None
    for line in commands:
        line = line.replace("/home/user/notes", str(firing.workspace))
        line = line.replace(" ID", f" {task_id}")
        command = ["sh", "-c", line]
        env = firing.env | {"PATH": f"{firing.root}/bin:{firing.env['PATH']}"}
        ran = subprocess.run(
            command, env=env, cwd=firing.workspace, capture_output=True, text=True, timeout=90
        )
        assert ran.returncode == 0, (line, ran.stdout, ran.stderr)
        task_id = task_id or re.fullmatch(r"queued (\S+)\n", ran.stdout)[1]
    assert firing.rows(f"select status from task_history where task_id = '{task_id}'") == [
        ("completed",)
    ]
    held = firing.task_queue(
        "add", "approvals", "claude", '{"prompt": "x"}', "--hold"
    ).stdout.split()[1]
    assert firing.task_queue("reject", held).returncode == 0
    assert "mended" in firing.task_queue("report", "--peek").stdout
    assert firing.task_queue("doctor").returncode in (0, 1)
    log = firing.state / "logs/worker.approvals.log"
    for pid in re.findall(r"worker (\d+)-\S+ serves", log.read_text()):
        os.kill(int(pid), 9)
