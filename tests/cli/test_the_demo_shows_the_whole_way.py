"""demo.py: each step happens, as README prints it, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from claude_stub.client import ClaudeCode
from conftest import ROOT, wait_for
from link_check import UV, UV_CACHE

import demo


@pytest.fixture
def surroundings(tmp_path):
    """A person's environment, with much that must not reach the demo."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    return {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PATH": f"{os.path.dirname(UV)}:/usr/bin:/bin:/usr/sbin:/sbin",
        "UV_CACHE_DIR": UV_CACHE,
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "TASK_DEPTH": "3",
        "TASK_QUEUE_STATE": str(tmp_path / "not-this-one"),
    }


def run(env: dict, *args: str, within=(), answer: str = "") -> subprocess.CompletedProcess:
    command = [*within, sys.executable, ROOT / "demo.py", *args]
    options = {"capture_output": True, "text": True, "timeout": 180}
    return subprocess.run(command, env=env, input=answer, **options)


def assert_nothing_is_left(env: dict) -> None:
    # uv has locks of its own there.
    left = [name for name in os.listdir(env["TMPDIR"]) if not name.endswith(".lock")]
    assert left == [] and not os.path.exists(f"{env['HOME']}/.claude/automation")
    assert not os.path.exists(env["TASK_QUEUE_STATE"])


def test_readme_prints_what_the_demo_prints(surroundings):
    done = run(surroundings)
    assert done.returncode == 0, done.stdout + done.stderr
    [printed] = re.findall(r"^```console\n\$ just demo\n(.*?)^```$", README, re.M | re.S)
    assert done.stderr == "" and as_pattern(done.stdout) == as_pattern(printed)
    assert_nothing_is_left(surroundings)


README = (ROOT / "README.md").read_text()


def as_pattern(text: str) -> str:
    """The text, with the times taken out."""
    return re.sub(r"\d+ ms|\d+\.\d+ s|(?<=\"seconds\": )[\d.]+", "…", text)


def test_with_an_empty_cache_and_no_network_the_steps_are_the_same(surroundings, tmp_path):
    done = run(surroundings | {"UV_CACHE_DIR": str(tmp_path / "empty")})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "with grep (lychee is not downloaded yet)" in done.stdout
    assert "1 broken link: README.md:4 → pier.md" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_stopped_leaves_nothing_behind(surroundings, tmp_path, number):
    command = [sys.executable, ROOT / "demo.py"]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        while "tq work" not in process.stdout.readline():
            pass
        locks = "tmp/*/home/.claude/automation/lychee/state/workers/*-*"
        [lock, *_] = wait_for(lambda: list(tmp_path.glob(locks)), what="a worker")
        process.send_signal(number)
        process.stdout.read()
    assert process.returncode == 1
    assert_nothing_is_left(surroundings)
    with pytest.raises(ProcessLookupError):
        os.kill(int(lock.name.split("-")[0]), 0)


REFUSED = '"is_error": true, "api_error_status": 401'


@pytest.mark.parametrize(
    ("constant", "text", "says"),
    [
        ("ADD", "false", "demo: exit 1 of: false\n"),
        ("LONG_SECONDS", 0.001, "timed out"),
        ("LINK_CHECK", "#!/bin/sh\necho '{}'\n", "was not told of the broken link"),
        ("CLAUDE", demo.CLAUDE.replace(">pier.md;", ";"), "Claude did not write pier.md"),
        ("CLAUDE", demo.CLAUDE.replace('"is_error": false', REFUSED), "run claude, then /login"),
    ],
)
def test_a_step_that_does_not_happen_is_said(monkeypatch, tmp_path, capfd, constant, text, says):
    # No lychee is found there, so the link check is the script above.
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(demo, constant, text)
    monkeypatch.setattr(demo, "STEP_SECONDS", 20)
    assert demo.main([]) == 1
    assert says in capfd.readouterr().err


# ------------------------------------------------------------------------------------ the real Claude


def put_claude(env: dict, text: str) -> None:
    """Put a script in the place of Claude Code on PATH."""
    demo.write_program(program := Path(env["HOME"], "claude"), text)
    env["PATH"] = f"{program.parent}:{env['PATH']}"


def test_without_claude_code_or_a_login_it_says_so(surroundings):
    login = "claude auth status says: Not logged in\n"
    for says in ("there is no claude on PATH: install", login):
        done = run(surroundings, "--claude", answer="y\n")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"demo: {says}")
        put_claude(surroundings, "#!/bin/sh\necho 'Not logged in'\nexit 1\n")


def test_nothing_runs_before_a_yes(surroundings):
    put_claude(surroundings, "#!/bin/sh\necho 'Email: me@example.com'\n[ $1 = auth ]\n")
    for answer in ("n\n", "\n", ""):
        done = run(surroundings, "--claude", answer=answer)
        assert done.returncode == 1 and "tq work" not in done.stdout
        assert "Email: me@example.com" in done.stdout and "$0.50" in done.stdout
        assert "you did not agree, and nothing was run" in done.stderr


def test_the_real_claude_code_does_the_task_in_its_own_home(surroundings, tmp_path):
    (tmp_path / "claude").mkdir()
    claude = ClaudeCode(tmp_path / "claude")
    try:
        copy = "cp tides.md pier.md"
        claude.answer("tool", commands=[copy], text="I may not.")
        env = claude.env | {"PATH": f"{claude.home}/bin:{surroundings['PATH']}"}
        env = surroundings | env | {"NO_PROXY": "127.0.0.1"}
        with ThreadPoolExecutor() as pool:
            running = pool.submit(run, env, "--claude", within=claude.within, answer="y\n")
            # The first run has had its last answer; the next one begins when it was approved.
            wait_for(lambda: len(claude.requests()) == 2 or running.done(), 120, "the question")
            claude.answer("tool", commands=[None, copy], text="I wrote pier.md.")
            done = running.result()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "API key: ANTHROPIC_API_KEY" in done.stdout
        assert "Claude was told: claude held: wants: Bash(cp tides.md pier.md)" in done.stdout
        assert "You allow just that" in done.stdout
        assert '"result": "I wrote pier.md."' in done.stdout
        assert len(claude.sessions()) == 1
        # Claude Code itself leaves directories there.
        assert list(tmp_path.glob("tmp/task-queue-*")) == []
    finally:
        claude.close()


# ------------------------------------------------------------------------------------------- the hub


def test_a_task_goes_to_another_machine_and_its_result_comes_back(surroundings):
    scripts = ("bench/postgres.py", "relay.py", "worker.py")
    for script in scripts:
        asked = [UV, "run", "--quiet", "--offline", "--script", ROOT / script, "--help"]
        if subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True).returncode != 0:
            pytest.skip(f"uv has not downloaded what {script} needs")
    # As root, PostgreSQL runs as another user, who cannot enter pytest's directories.
    done = run(surroundings | {"UV_OFFLINE": "1", "TMPDIR": "/tmp"}, "--hub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith('hello completed\n{"text": "greetings from the server"}\n')


def test_without_a_checkout_the_hub_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "HERE", tmp_path)
    monkeypatch.delenv("TASK_QUEUE_HUB", raising=False)
    assert demo.main(["--hub"]) == 1
    assert "demo: --hub needs a whole checkout" in capsys.readouterr().err
