"""Each command that shows or makes waiting tasks says when nobody will run them, and what starts a worker."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, end, wait_for

import enqueue
import queue_helpers
import tasks
import worker
from taskqueue import look, remedies, service, serving, times

NOBODY = "no worker serves approvals; start one: ./worker.py approvals"


class House:
    """A HOME with an installation's record, state and handlers, and the scripts called in-process."""

    def __init__(self, home: Path, capsys) -> None:
        self.home, self.capsys = home, capsys
        self.prefix = home / ".claude/automation/lychee"
        self.state = self.prefix / "state"
        (self.prefix / "handlers").mkdir(parents=True)
        self.record()
        for name in ("claude", "link_validation"):
            self.handler(name, "#!/bin/sh\n")

    def record(self, **more) -> None:
        (self.prefix / "installed.json").write_text(json.dumps({"files": {}, **more}))

    def handler(self, name: str, text: str) -> None:
        path = self.prefix / "handlers" / name
        path.write_text(text)
        path.chmod(0o755)

    def settings(self, **value) -> None:
        (self.home / ".claude/settings.json").write_text(json.dumps(value))

    def hook(self, queue: str, *options: str) -> dict:
        command = f"/bin/sh {self.prefix}/runtime/hook {queue} link_validation {' '.join(options)}"
        return {"hooks": {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}}

    def call(self, main, *words: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr) of a script's main."""
        assert main([*map(str, words)]) == code, self.capsys.readouterr()
        return self.capsys.readouterr()

    def add(self, *words: str) -> str:
        return self.call(enqueue.main, *words)[0].rstrip("\n")

    def tell(self, *words: str, code: int = 0) -> list[str]:
        return self.call(tasks.main, *words, code=code)[1].splitlines()

    @contextmanager
    def served(self, queue: str, by: str = ""):
        """Hold the lock that a worker of the queue holds."""
        path = queue_helpers.make_private(self.state / "workers") / f"serving.{queue}"
        path.write_text(by)
        with open(path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield


@pytest.fixture
def house(tmp_path, monkeypatch, capsys):
    house = House(tmp_path, capsys)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    monkeypatch.delenv("TASK_QUEUE_STATE", raising=False)
    monkeypatch.setattr(queue_helpers, "STATE_DIR", house.state)
    monkeypatch.setattr(queue_helpers, "QUEUE_DB", house.state / "tasks.db")
    monkeypatch.setattr(queue_helpers, "QUEUE_PATH", house.state)
    remedies.installed_command.cache_clear()
    yield house
    remedies.installed_command.cache_clear()
    queue_helpers.resign(house.state)


# ------------------------------------------------------------------------------------ who will run it


def test_add_says_that_no_worker_serves_the_queue(house):
    assert house.add("approvals", "claude", "--task-id", "a") == f"queued a ({NOBODY})"
    assert house.add("approvals", "claude", "--task-id", "a") == f"duplicate a ({NOBODY})"
    assert NOBODY in house.add("approvals", "claude", "--task-id", "b", "--delay", "1h")
    # Its person comes first, and is told then.
    assert house.add("approvals", "claude", "--task-id", "h", "--hold") == "queued h"
    with house.served("approvals"):
        assert house.add("approvals", "claude", "--task-id", "c") == "queued c"
    assert NOBODY in house.add("approvals", "claude", "--task-id", "d")
    assert house.add("completions", "claude", "--task-id", "e") == "queued e"


def test_lines_are_told_once_for_all(house, monkeypatch):
    lines = "".join(f'{{"task_type": "claude", "task_id": "{n}"}}\n' for n in range(3))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert house.add("approvals", "--jsonl") == f"queued 0 ({NOBODY})\nqueued 1\nqueued 2"


def test_every_command_that_shows_a_waiting_task_says_it(house):
    house.add("approvals", "claude", "--task-id", "a")
    house.add("notifications", "claude", "--task-id", "h", "--hold")
    assert house.tell("list") == [NOBODY]
    assert NOBODY in house.tell("wait", "a", "--timeout", "0.01", code=75)
    assert NOBODY in house.call(tasks.main, "stats")[0].splitlines()
    (found,) = [f for f in findings(house) if f["level"] == "problem"]
    assert 'queue "approvals": 1 waiting' in found["message"] and "no worker" in found["message"]
    assert "worker.py approvals" in found["remedy"]
    with house.served("approvals"):
        assert house.tell("list") == [] and findings(house, "problem") == []
        assert NOBODY not in house.call(tasks.main, "stats")[0]
        assert len(house.tell("wait", "a", "--timeout", "0.01", code=75)) == 1


def findings(house, level: str = "") -> list[dict]:
    tasks.main(["doctor", "--json"])
    found = json.loads(house.capsys.readouterr().out)["findings"]
    return [f for f in found if f["check"] == "tasks" and level in f["level"]]


def test_wait_names_a_person_and_a_pause_once(house, monkeypatch):
    house.add("approvals", "claude", "--task-id", "h", "--hold")
    told = house.tell("wait", "h", "--timeout", "0.01", code=75)
    assert told[0] == "h is held: ./tasks.py approve h"
    house.tell("pause", "notifications")
    house.add("notifications", "claude", "--task-id", "p")
    told = house.tell("wait", "p", "--timeout", "0.01", code=75)
    assert told[0] == "notifications is paused until a person resumes it"
    # Its end comes nearer with each look.
    monkeypatch.setattr(look, "STARTING_SECONDS", 0.0)
    monkeypatch.setattr(queue_helpers, "SAFETY_TICK_SECONDS", 0.05)
    house.tell("pause", "notifications", "--for", "8s")
    told = house.tell("wait", "p", "--timeout", "0.6", code=75)
    assert sum("notifications is paused until" in line for line in told) == 1


def test_whoever_makes_work_ready_says_which_command_runs_it(house):
    house.add("approvals", "claude", "--task-id", "a", "--hold")
    house.add("approvals", "claude", "--task-id", "r", "--hold")
    assert house.tell("approve", "a") == [NOBODY]
    assert house.tell("reject", "r") == []
    house.tell("pause", "approvals")
    assert house.tell("resume", "approvals") == [NOBODY]
    house.add("notifications", "claude", "--task-id", "m")
    assert house.tell("move", "m", "approvals") == [NOBODY]
    house.tell("cancel", "m")
    assert house.tell("retry", "m") == [NOBODY]
    with house.served("approvals"):
        assert house.tell("move", "m", "notifications")[0].startswith(
            "no worker serves notifications"
        )
        assert house.tell("pause", "approvals") == house.tell("resume", "approvals") == []


def test_a_live_consumer_is_somebody(house):
    """A program of the person's own takes no serving lock, but its claims are a live owner's."""
    house.add("reviews", "claude", "--task-id", "a")
    house.add("reviews", "claude", "--task-id", "b")
    queue_helpers.get_ack_queue("reviews").get(timeout=5)
    assert house.tell("list", "--queue", "reviews") == []


def test_a_hook_that_starts_a_worker_is_named_and_started_by_approve(house, monkeypatch):
    ran = house.home / "ran"
    house.handler("link_validation", f"#!/bin/sh\ntouch '{ran}'\n")
    house.settings(**house.hook("notifications"))
    assert "; start one: " in house.add("notifications", "link_validation")
    house.settings(**house.hook("notifications", "--start-worker"))
    line = "no worker serves notifications until a hook starts one; start one now: ./worker.py notifications"
    assert house.add("notifications", "link_validation", "--task-id", "a") == f"queued a ({line})"
    assert findings(house, "problem") == []
    house.settings(**house.hook("notifications", "--start-worker"), disableAllHooks=True)
    assert "no worker" in findings(house, "problem")[0]["message"]
    house.settings(**house.hook("notifications", "--start-worker"))
    house.add("notifications", "link_validation", "--task-id", "h", "--hold")
    # The tests' Python has what a worker needs.
    monkeypatch.setattr(service, "interpreter", lambda lib: [sys.executable])
    try:
        assert house.tell("approve", "h") == []
        wait_for(ran.exists, what="the approved task's run")
    finally:
        for owner in (house.state / "workers").glob("[0-9]*-*"):
            pid = int(owner.name.partition("-")[0])
            os.kill(pid, signal.SIGKILL) if pid != os.getpid() else None


def test_a_hook_of_another_state_starts_nothing_here(house, monkeypatch):
    house.settings(**house.hook("approvals", "--start-worker"))
    monkeypatch.setattr(queue_helpers, "STATE_DIR", house.home / "other")
    assert NOBODY in house.add("approvals", "claude")


def test_the_plugins_hook_counts_while_it_is_enabled(house):
    record = house.home / ".claude/plugins/installed_plugins.json"
    record.parent.mkdir()
    copies = {"task-queue@task-queue": [{"installPath": str(ROOT)}]}
    record.write_text(json.dumps({"plugins": copies}))
    for enabled, is_told in ((True, "until a hook"), (False, "; start one: ")):
        house.settings(enabledPlugins={"task-queue@task-queue": enabled})
        said = house.add("notifications", "link_validation")
        assert is_told in said and "task-queue work notifications" in said


UNIT = (
    '[Service]\nExecStart="/usr/bin/python3" "{prefix}/worker.py" "approvals" "other" "--single"\n'
)


@pytest.mark.parametrize(("code", "is_told"), [(0, False), (3, True)])
def test_a_unit_counts_while_it_is_loaded(house, monkeypatch, code, is_told):
    bin = house.home / "bin"
    bin.mkdir()
    (bin / "systemctl").write_text(f"#!/bin/sh\nexit {code}\n")
    (bin / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    unit = house.home / "lychee-queue.service"
    unit.write_text(UNIT.format(prefix=house.prefix))
    house.record(units=[str(unit)])
    assert (NOBODY in house.add("approvals", "claude")) == is_told
    assert "no worker serves notifications" in house.add("notifications", "claude")
    assert bool(findings(house, "problem")[:-1]) == is_told


def test_a_launchd_job_names_its_queues(tmp_path):
    import plistlib

    job = {"ProgramArguments": ["/py", "/lib/service.py", "work", "/prefix", "a", "b", "--x"]}
    (tmp_path / "job.plist").write_bytes(plistlib.dumps(job))
    assert serving.queues_of_unit(tmp_path / "job.plist") == ["a", "b"]


# ------------------------------------------------------------------------------------- what handles it


def test_a_type_that_no_handler_serves_is_named_with_those_there_are(house):
    none = "no handler is called link_validaton; there are link_validation, claude"
    assert none in house.add("approvals", "link_validaton", "--hold")
    house.add("approvals", "link_validaton", "--task-id", "a")
    assert none in house.tell("list")
    assert none in house.tell("wait", "a", "--timeout", "0.01", code=75)
    assert none in house.call(tasks.main, "stats")[0]
    assert any(none in f["message"] for f in findings(house, "problem"))


def test_a_worker_says_which_handlers_it_has(house):
    own = house.home / "own"
    own.mkdir()
    queue_helpers.connect()
    (own / "special").write_text("#!/bin/sh\n")
    (own / "special").chmod(0o755)
    for options, types in (
        (["--handlers", own], {"special": True, "claude": False}),
        (["--", "cat"], {"special": True, "anything": True}),
    ):
        one = worker.Worker(worker.parse(["approvals", *map(str, options)]))
        try:
            assert one.serve()
            for name, is_known in types.items():
                assert ("no handler" not in house.add("approvals", name)) == is_known, (
                    options,
                    name,
                )
        finally:
            one.serving.release()
            one.handlers.leave()


# ---------------------------------------------------------------------------------------------- --at


@pytest.fixture
def evening(monkeypatch):
    """It is 23:45 on 1 December 2026, in a zone without a name of its own."""
    monkeypatch.setenv("TZ", "XXX-1")
    time.tzset()
    now = time.mktime((2026, 12, 1, 23, 45, 30, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: now)
    yield now
    monkeypatch.undo()
    time.tzset()


TIMES = {
    "23:30": "2026-12-02 23:30:00", "23:45": "2026-12-02 23:45:00", "23:46": "2026-12-01 23:46:00",
    "23:45:31": "2026-12-01 23:45:31", "9:00": "2026-12-02 09:00:00",
    "tomorrow 9:00": "2026-12-02 09:00:00", "Tomorrow 09:00": "2026-12-02 09:00:00",
    "today 23:50": "2026-12-01 23:50:00", "2026-12-03": "2026-12-03 00:00:00",
    "2026-12-01T22:50Z": "2026-12-01 23:50:00",
}  # fmt: skip
PASSED = ("2026-12-01T23:30", "2026-12-01T23:45:30", "today 9:00", "2026-12-01")
NO_TIMES = ("24:00", "9:60", "9", "tomorrow", "yesterday 9:00", "09:00 tomorrow x")


def test_a_time_is_the_next_one_and_one_that_has_passed_is_refused_and_named(house, evening):
    for text, when in TIMES.items():
        told = time.localtime(times.parse_time(text))
        assert time.strftime("%Y-%m-%d %H:%M:%S", told) == when, text
    for text in (*PASSED, *NO_TIMES):
        _, said = house.call(enqueue.main, "approvals", "claude", "--at", text, code=64)
        words = ("2026-12-01", "has passed") if text in PASSED else ("is not a time like 23:30",)
        assert all(word in said for word in words), said
    assert not (house.state / "tasks.db").exists()


def test_at_says_when_that_is(house):
    said = house.add("approvals", "claude", "--task-id", "a", "--at", "2050-01-01T09:00Z")
    assert said.startswith("queued a (starts at 2050-01-01 ") and "; no worker" in said


def test_python_and_lines_take_a_time_that_has_passed_as_now(house, monkeypatch):
    line = b'{"task_type": "claude", "task_id": "l", "at": "2020-01-01T09:00"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    house.add("approvals", "--jsonl")
    queue_helpers.enqueue_task("approvals", "claude", {}, "p", at=time.time() - 60)
    got = [queue_helpers.dequeue_task("approvals")["task_id"] for _ in range(2)]
    assert sorted(got) == ["l", "p"]


# -------------------------------------------------------------------------------------- what a worker says


def test_no_queue_of_a_worker_waits_behind_another(installation):
    gate = installation.directory / "gate"
    installation.handler("long", f"#!/bin/sh\nuntil [ -e '{gate}' ]; do sleep 0.02; done\n")
    installation.handler("short", "#!/bin/sh\n")
    running = "select count(*) from approvals where status = 2"
    for options, places in (([], 1), (["--concurrency", "3"], 2)):
        installation.add("approvals long --jsonl", input="{}\n" * 4)
        one = installation.worker("approvals", "notifications", *options)
        wait_for(lambda n=places: installation.rows(running) == [(n,)], what="the long ones")
        assert installation.ends_well("notifications", "short")
        assert installation.rows(running) == [(places,)]
        gate.touch()
        wait_for(lambda: installation.rows("select count(*) from approvals") == [(0,)])
        end(one)
        gate.unlink()


def test_a_start_is_said_and_the_last_line_counts_tasks_and_names_what_waits(installation):
    installation.handler("flaky", '#!/bin/sh\n[ "$TASK_ATTEMPT" = 3 ]\n')
    installation.add("notifications flaky --task-id x")
    options = ("--backoff", 0.01, "--handlers", installation.handlers, "--idle-exit", 0.3)
    log = installation.run("worker.py", "notifications", *options).stderr
    assert [f"x started attempt {n}" in log for n in (1, 2, 3)] == [True] * 3
    assert log.splitlines()[-1].endswith(" 1 done")

    for options in ("--group g", "--group g", "--group g", "--hold", "--delay 1h"):
        installation.add(f"approvals flaky {options}")
    installation.tq("pause approvals --for 2h --reason night")
    last = installation.drain("approvals").stderr.splitlines()[-1]
    left = (
        "no task was run; 1 pending, 1 scheduled, 1 held, 2 blocked in approvals, the next in 60 m"
    )
    assert left in last and "; approvals is paused until" in last and "night" in last


def test_a_row_reads_that_its_queue_is_paused_only_while_it_is(installation):
    installation.handler(
        "limited", '#!/bin/sh\necho \'{"pause": 3600, "reason": "a limit"}\'\nexit 75\n'
    )
    installation.add("notifications limited --task-id x")
    said = installation.drain("notifications").stderr
    assert "a limit; notifications is paused until" in said
    assert "paused until" in installation.tq("list").stdout
    installation.tq("resume notifications")
    for command in ("list", "show x"):
        said = installation.tq(command).stdout
        assert "not now (exit 75): a limit" in said and "paused" not in said, said


# ------------------------------------------------------------------------------- names on the reader's PATH


def test_commands_are_named_as_the_plugins_reader_types_them(installation):
    env = {"PATH": f"{ROOT / 'bin'}:{installation.env['PATH']}"}
    for name in ("a", "b"):
        installation.add(f"approvals claude --task-id {name} --hold")
    shown = installation.tq("show a", env=env).stdout
    assert "until task-queue approve or task-queue reject" in shown
    assert "start one: task-queue work approvals" in installation.tq("approve a", env=env).stderr
    command = [ROOT / "bin/task-queue", "--version"]
    ran = subprocess.run(command, env=installation.env, capture_output=True, text=True)
    assert ran.stdout == f"task-queue {queue_helpers.VERSION}\n", ran
    # Another program of that name is not ours.
    other = installation.directory / "other"
    other.mkdir()
    (other / "task-queue").symlink_to("/bin/true")
    env = {"PATH": f"{other}:{installation.env['PATH']}"}
    assert "until ./tasks.py approve" in installation.tq("show b", env=env).stdout
