"""The hook that wakes sessions is added where a person asks for it and Claude Code is known to take its
exit status as a wake-up; another client would be blocked by it.
"""

import json
import os
import subprocess

import pytest
from homes import hooks_of, run, settings_of, terminal

pytest_plugins = ["homes"]


def has_claude(home, version: str) -> dict:
    """Put a client of this version on PATH; "" for one that prints nothing."""
    program = home / "bin/claude"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def wakes(home) -> list[dict]:
    if not settings_of(home).exists():
        return []
    return [hook for hook in hooks_of(home) if "--wake" in hook["command"]]


def doctor(home, env: dict) -> str:
    tq = home / ".claude/automation/lychee/runtime/tq"
    ran = subprocess.run(
        [tq, "doctor"], env={"HOME": str(home), **env}, capture_output=True, text=True
    )
    return ran.stdout


def test_it_comes_once_goes_and_is_checked_after_updates(home):
    env = has_claude(home, "2.1.332 (Claude Code)")
    ran = run(home, "install", "--hook", "yes", "--report", "yes", "--wake", "yes", env=env)
    assert ran.returncode == 0, ran.stderr
    [hook] = wakes(home)
    assert hook["asyncRewake"] is True and hook["timeout"] > 3600
    assert "exit 1" not in hook["command"] and hooks_of(home, "SessionEnd")
    before = settings_of(home).read_text()
    for words in (["--wake", "yes"], ["--yes", "--no-command"], []):
        assert run(home, "install", *words, env=env).returncode == 0
        assert settings_of(home).read_text() == before
    assert "ok       wake" in doctor(home, env)
    # An update to a client that nobody has seen: doctor says so, and its remedy works.
    unknown = has_claude(home, "3.0.0 (Claude Code)")
    said = doctor(home, unknown)
    assert "problem  wake: claude is 3.0.0" in said and "install --wake no takes" in said
    assert run(home, "install", "--wake", "no", env=unknown).returncode == 0
    assert wakes(home) == [] and hooks_of(home, "SessionEnd") == []
    assert len(hooks_of(home)) == 1, "the link check stays"
    assert "ok       wake" in doctor(home, unknown)


def test_uninstall_takes_it_out(home):
    env = has_claude(home, "2.2.0 (Claude Code)")
    assert run(home, "install", "--wake", "yes", env=env).returncode == 0
    assert len(wakes(home)) == 1
    assert run(home, "uninstall", env=env).returncode == 0
    assert not settings_of(home).exists()


@pytest.mark.parametrize("version", ["2.1.331 (Claude Code)", "", "3.0.0", "1.9.999", "nightly"])
def test_a_client_that_nobody_saw_wake_up_gets_none(home, version):
    env = has_claude(home, version)
    ran = run(home, "install", "--hook", "yes", "--report", "no", "--wake", "yes", env=env)
    assert ran.returncode == 1 and "2.1.332 or newer" in ran.stderr
    assert wakes(home) == [] and len(hooks_of(home)) == 1
    # Nobody is asked, either.
    with terminal("y\ny\ny\ny\n") as typed:
        ran = run(home, "install", "--no-command", stdin=typed, env=env)
    assert wakes(home) == [] and "woken" not in ran.stdout


def test_it_is_asked_for_and_an_enter_or_a_yes_to_all_is_no(home):
    env = has_claude(home, "2.1.332 (Claude Code)")
    assert run(home, "install", "--yes", "--no-command", env=env).returncode == 0
    assert wakes(home) == []
    for typed, count in (("c\n\n", 0), ("c\ny\n", 1)):
        with terminal(typed) as stdin:
            words = ("--no-command", "--environment", "no")
            ran = run(home, "install", *words, stdin=stdin, env=env)
        assert "costs money" in ran.stdout and ran.stdout.count("[y/N]") == 1
        assert len(wakes(home)) == count


def test_one_that_a_person_wrote_is_recognised(home):
    env = has_claude(home, "2.1.332 (Claude Code)")
    hook = {"type": "command", "asyncRewake": True, "timeout": 60}
    hook["command"] = 'exec sh "$HOME/.claude/automation/lychee/runtime/hook" --wake'
    groups = [{"hooks": [hook]}]
    settings_of(home).write_text(json.dumps({"hooks": {"Stop": groups, "SessionEnd": groups}}))
    ran = run(home, "install", "--wake", "yes", env=env)
    assert ran.returncode == 0 and "which is there, and yours" in ran.stdout
    assert wakes(home) == [hook]
    ran = run(home, "install", "--wake", "no", env=env)
    assert ran.returncode == 1 and "take it out by hand" in ran.stderr
    assert wakes(home) == [hook]
