"""A Stop hook waits for the tasks of its session, and wakes it where one of them needs Claude: once
for each finding, and never for long after the session.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from homes import PREFIX

pytest_plugins = ["homes"]

CHECK = "notifications link_validation --on-duplicate rerun --once-per workspace"


def result(*broken: str) -> str:
    """The result of a link check."""
    found = [{"file": "README.md", "url": url} for url in broken]
    said = f"{len(broken)} broken: {', '.join(broken)}" if broken else "all links are fine"
    return json.dumps({"summary": said, "failed": len(broken), "broken": found, "skipped": []})


class Session:
    """A session of Claude Code, by what its hooks are given, and a worker for its tasks."""

    def __init__(self, installation, home: Path, workspace: Path) -> None:
        self.installation, self.workspace, self.waiters = installation, workspace, []
        self.hook = home / PREFIX / "runtime/hook"
        # The Python of the tests has watchdog, as that of an installed worker.
        text = self.hook.read_text().replace("\npackages=''\n", f"\npackages={sys.executable}\n")
        assert sys.executable in text
        self.hook.write_text(text)
        self.env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "TASK_QUEUE_STATE": str(installation.state),
            "CLAUDE_PROJECT_DIR": str(workspace),
            "CLAUDE_CODE_SESSION_ATTENDED": "1",
        }
        self.prompts = 0
        workspace.mkdir(exist_ok=True)

    def payload(self, event: str, session: str, **more) -> bytes:
        told = {
            "session_id": session,
            "prompt_id": f"{session}-{self.prompts}",
            "cwd": str(self.workspace),
            "hook_event_name": event,
            **more,
        }
        return json.dumps(told).encode()

    def fire(self, words: str, payload: bytes, **env) -> subprocess.CompletedProcess:
        ran = subprocess.run(
            ["/bin/sh", self.hook, *words.split()],
            input=payload,
            env=self.env | env,
            cwd=self.workspace,
            capture_output=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        return ran

    def wait(self, payload: bytes, within: tuple = (), **env) -> subprocess.Popen:
        """Start the hook that waits."""
        process = subprocess.Popen(
            [*within, "/bin/sh", self.hook, "--wake"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env | env,
            cwd=self.workspace,
        )
        # A hook that waits for nothing does not read it.
        with suppress(BrokenPipeError):
            process.stdin.write(payload)
            process.stdin.close()
        process.stdin = None
        self.waiters.append(process)
        return process

    def stop(self, session: str = "s-1", **more) -> subprocess.Popen:
        """Both Stop hooks fire at once; return the one that waits, once it does."""
        self.prompts += 1
        payload = self.payload("Stop", session, **{"stop_hook_active": False, **more})
        process = self.wait(payload)
        self.fire(CHECK, payload)
        wait_for(lambda: process.poll() is not None or self.waits(session), what="the waiter")
        return process

    def waits(self, session: str = "s-1") -> str:
        """The name of the waiter that waits for a session."""
        file = self.installation.state / "waits" / session
        return file.read_text().partition(" ")[2] if file.exists() else ""

    def prompt(self, text: str = "Go on.", session: str = "s-1") -> str:
        """The report with a prompt."""
        payload = self.payload("UserPromptSubmit", session, prompt=text)
        return self.fire("--report", payload).stdout.decode()

    def finds(self, said: str) -> None:
        """The link check's next results."""
        (self.workspace / "result").write_text(said)

    def work(self) -> None:
        self.installation.worker("notifications", "--drain", ready=False).wait(60)


@pytest.fixture
def session(installation, installed, tmp_path):
    check = "#!/bin/sh\n[ ! -e before ] || . ./before\ncat result\n"
    installation.handler("link_validation", check)
    made = Session(installation, installed("--no-command"), tmp_path / "workspace")
    made.finds(result("pier.md"))
    yield made
    for waiter in made.waiters:
        waiter.kill()
        waiter.wait()


def ended(waiter: subprocess.Popen) -> tuple[int, str]:
    """(exit code, stderr) of a waiter."""
    out, err = waiter.communicate(timeout=20)
    assert out == b""
    return waiter.returncode, err.decode()


def test_a_broken_link_wakes_it_once_and_is_not_told_again(session):
    waiter = session.stop()
    session.work()
    code, said = ended(waiter)
    assert code == 2 and said.count("1 broken: pier.md") == 1 and "no instruction" in said
    assert session.prompt() == ""
    # The same finding does not wake it again, another one does.
    waiter = session.stop()
    session.work()
    assert ended(waiter) == (0, "")
    session.finds(result("pier.md", "quay.md"))
    waiter = session.stop()
    session.work()
    code, said = ended(waiter)
    assert code == 2 and "2 broken: pier.md, quay.md" in said


def test_a_failed_task_wakes_it_and_good_news_do_not(session):
    session.finds(result())
    waiter = session.stop()
    session.work()
    assert ended(waiter) == (0, "")
    session.installation.handler("link_validation", "#!/bin/sh\necho no lychee >&2\nexit 65\n")
    waiter = session.stop()
    session.work()
    code, said = ended(waiter)
    assert code == 2 and "link_validation failed" in said and "no lychee" in said


def test_a_task_that_this_stop_did_not_enqueue_wakes_nobody(session):
    session.finds(result())
    where = json.dumps({"workspace_path": str(session.workspace)})
    session.installation.handler("other", "#!/bin/sh\nexit 65\n")
    session.installation.enqueue("notifications", "other", where)
    waiter = session.stop()
    session.work()
    assert ended(waiter) == (0, "")
    assert "other failed" in session.prompt()


def test_a_session_that_goes_on_hears_with_its_next_prompt_once(session):
    waiter = session.stop()
    assert session.prompt() == ""
    assert ended(waiter) == (0, "")
    session.work()
    assert "1 broken: pier.md" in session.prompt()
    assert session.prompt() == ""


def test_it_is_woken_three_times_at_most_between_two_prompts_of_its_person(session):
    for number in range(3):
        session.finds(result(f"{number}.md"))
        waiter = session.stop()
        session.work()
        assert ended(waiter)[0] == 2
        # The wake-up is a prompt that no person wrote.
        assert session.prompt("<task-notification>\n<summary>Stop hook feedback</summary>") == ""
    session.finds(result("more.md"))
    assert ended(session.stop()) == (0, "")
    session.work()
    assert "more.md" in session.prompt("And now?")
    session.finds(result("last.md"))
    waiter = session.stop()
    session.work()
    assert ended(waiter)[0] == 2


def test_nobody_waits_where_nobody_is_to_be_woken(session):
    payload = session.payload("Stop", "s-1", stop_hook_active=False)
    session.fire(CHECK, payload)
    for env in ({"CLAUDE_CODE_SESSION_ATTENDED": "0"}, {"TASK_DEPTH": "1"}):
        assert ended(session.wait(payload, **env)) == (0, "")
    active = session.payload("Stop", "s-1", stop_hook_active=True)
    assert ended(session.wait(active)) == (0, "")
    assert not (session.installation.state / "waits").exists()
    session.work()
    assert "pier.md" in session.prompt()


def test_a_later_stops_waiter_replaces_it(session):
    first = session.stop()
    name = session.waits()
    # What a killed session left goes after a week.
    left = session.installation.state / "waits/killed"
    left.write_text("2 ")
    os.utime(left, (time.time() - 8 * 86_400,) * 2)
    second = session.stop()
    assert ended(first) == (0, "")
    assert wait_for(session.waits) != name and not left.exists()
    session.work()
    assert ended(second)[0] == 2


def test_a_firing_that_merged_into_a_later_one_is_waited_for(session):
    """A check runs, another session's stop asks for a rerun: each session waits for its own."""
    gate = session.workspace / "before"
    gate.write_text("touch begun; until [ -e go ]; do sleep 0.01; done\n")
    worker = session.installation.worker("notifications")
    first = session.stop("s-1")
    wait_for((session.workspace / "begun").exists, what="the first check")
    second = session.stop("s-2")
    rerun = "select count(*) from notifications where rerun is not null"
    wait_for(lambda: session.installation.rows(rerun) == [(1,)], what="the rerun")
    (session.workspace / "go").touch()
    codes = sorted(ended(waiter)[0] for waiter in (first, second))
    assert codes == [0, 2], "one finding is told once"
    worker.terminate()


@pytest.mark.parametrize(
    ("option", "agent", "waits"),
    [
        ("true", "claude-code_2-1-332_harness", True),
        ("true", "claude-code_2-10-0_harness", True),
        ("false", "claude-code_2-1-332_harness", False),
        ("true", "claude-code_2-1-331_harness", False),
        ("true", "claude-code_3-0-0_harness", False),
        ("true", "", False),
    ],
)
def test_the_plugins_option_counts_in_a_client_that_was_seen_to_wake_up(
    session, option, agent, waits
):
    env = {"CLAUDE_PLUGIN_OPTION_WAKE": option, "AI_AGENT": agent}
    session.hook = ROOT / "bin/hook.sh"
    payload = session.payload("Stop", "s-1", stop_hook_active=False)
    waiter = session.wait(payload, **env)
    if waits:
        wait_for(session.waits, what="the waiter")
        ended(session.wait(session.payload("SessionEnd", "s-1"), **env))
    assert ended(waiter) == (0, "")


def test_it_ends_with_its_session(session):
    """The session is killed, or ends: no process stays behind."""
    pids = session.workspace / "pids"
    command = (
        f"echo $$ >>{shlex.quote(str(pids))}; exec /bin/sh {shlex.quote(str(session.hook))} --wake"
    )
    claude = [sys.executable, "-c", (
        "import subprocess, sys, time\n"
        "hook = subprocess.Popen(['/bin/sh', '-c', sys.argv[1]], stdin=0, stderr=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    ), command]  # fmt: skip
    payload = session.payload("Stop", "s-1", stop_hook_active=False)
    session.fire(CHECK, payload)
    process = subprocess.Popen(
        claude, stdin=subprocess.PIPE, env=session.env, cwd=session.workspace
    )
    process.stdin.write(payload)
    process.stdin.close()
    wait_for(session.waits, what="the waiter")
    waiter = int(session.waits().partition("-")[0])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not Path(f"/proc/{waiter}").exists(), what="the waiter's end")
    hook = Path("/proc", pids.read_text().strip())
    wait_for(lambda: not hook.exists(), what="the hook's end")
    assert session.waits() == ""

    waiter = session.stop()
    end = session.payload("SessionEnd", "s-1", reason="clear")
    assert ended(session.wait(end)) == (0, "")
    assert ended(waiter) == (0, "")
    assert not (session.installation.state / "waits").exists()
