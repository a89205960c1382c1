"""Hooks and the command of another installation are known by what they are, also where it is gone: a
firing is never two tasks.
"""

import json
import os
import shutil
import subprocess

import pytest
from homes import PREFIX, hooks_of, run, settings_of

pytest_plugins = ["homes"]

EVENTS = ("Stop", "UserPromptSubmit", "SessionStart")
MINE = {"type": "command", "command": "say done"}
CASES = ["there", "gone", "uninstalled without the settings"]


def commands_of(home) -> list[str]:
    return [hook["command"] for event in EVENTS for hook in hooks_of(home, event)]


def doctor(home) -> str:
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [home / PREFIX / "runtime/tq", "doctor"], env=env, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("case", CASES)
def test_hooks_and_the_command_are_replaced_and_each_firing_is_one_task(home, tmp_path, case):
    first, second = tmp_path / "the first's", tmp_path / "second"
    settings_of(home).write_text(json.dumps({"hooks": {"Stop": [{"hooks": [MINE]}]}}))
    assert run(home, "install", first, "--yes").returncode == 0
    if case == "gone":
        shutil.rmtree(first)
    elif case != "there":
        shutil.rmtree(first / "runtime")
    ran = run(home, "install", second, "--yes")
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stdout.splitlines() if f"instead of that of {first}" in line]
    assert len(said) == 3 and all(line.startswith("replace ") for line in said), ran.stdout
    assert str(first) not in settings_of(home).read_text()
    assert f"{second}/runtime" in (home / ".local/bin/tq").read_text()
    assert [len(hooks_of(home, event)) for event in EVENTS] == [2, 1, 1]
    for command in commands_of(home):
        if "--start-worker" in command:
            command = command.replace("--start-worker", "")
            subprocess.run(["/bin/sh", "-c", command], input=b"{}", env={}, check=True)
    assert len(list(second.glob("state/spool/*/*.hook"))) == 1
    assert not list(first.glob("state/spool/*/*.hook"))
    # A third time nothing is left to do, and uninstall leaves what was there before.
    before = settings_of(home).read_text()
    assert "instead of" not in run(home, "install", second, "--yes").stdout
    assert settings_of(home).read_text() == before
    assert run(home, "uninstall", second).returncode == 0
    assert json.loads(settings_of(home).read_text()) == {"hooks": {"Stop": [{"hooks": [MINE]}]}}
    assert not (home / ".local/bin/tq").exists()


def test_the_first_one_goes_without_what_is_the_seconds(home, tmp_path):
    env = {"SHELL": "/bin/bash"}
    assert run(home, "install", "--yes", env=env).returncode == 0
    assert run(home, "install", tmp_path / "second", "--yes", env=env).returncode == 0
    ours = [
        home / ".local/bin/tq",
        home / ".local/share/bash-completion/completions/tq",
        home / ".claude/skills/task-queue/SKILL.md",
        settings_of(home),
    ]
    before = [path.read_bytes() for path in ours]
    ran = run(home, "uninstall")
    assert ran.returncode == 0 and "keep yours" not in ran.stdout
    assert [path.read_bytes() for path in ours] == before
    assert run(home, "uninstall", tmp_path / "second").returncode == 0
    assert not any(path.exists() for path in ours[:3]) and hooks_left(home) == []


def test_an_installed_copy_is_about_its_own_installation(home, tmp_path):
    second = tmp_path / "second"
    assert run(home, "install", second, "--yes").returncode == 0
    assert run(home, "install", "--yes", source=second / "runtime/lib").returncode == 0
    assert not (home / PREFIX).exists()
    assert run(home, "uninstall", source=second / "runtime/lib").returncode == 0
    assert [path.name for path in second.iterdir()] == ["state"]


def hooks_left(home) -> list:
    return list(json.loads(settings_of(home).read_text()).get("hooks", []))


GONE = "/gone/automation"
WRITTEN = {
    "a shell's words": {
        "command": f"sh {GONE}/runtime/hook notifications link_validation || exit 1"
    },
    "exec form": {"command": "/bin/sh", "args": [f"{GONE}/runtime/hook", "notifications"]},
    "an older version's": {
        "command": f"python3 {GONE}/runtime/lib/enqueue.py --hook notifications"
    },
    "below the home": {"command": "sh ~/old/runtime/hook notifications --once-per workspace"},
}


@pytest.mark.parametrize("hook", WRITTEN.values(), ids=WRITTEN)
def test_doctor_names_a_hook_that_leads_nowhere_and_its_remedy_replaces_it(installed, hook):
    home = installed("--hook", "yes")
    settings = json.loads(settings_of(home).read_text())
    settings["hooks"]["SessionEnd"] = [{"hooks": [{"type": "command", **hook}, MINE]}]
    settings_of(home).write_text(json.dumps(settings))
    said = doctor(home)
    assert "problem  hook: the SessionEnd hook in " in said and ", which is gone" in said
    assert "install --hook yes replaces it" in said
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert hooks_of(home, "SessionEnd") == [MINE] and len(hooks_of(home)) == 1
    assert "which is gone" not in doctor(home)


def test_doctor_names_a_hook_of_another_installation(installed, tmp_path):
    home = installed("--hook", "yes")
    assert run(home, "install", tmp_path / "other", "--hook", "yes").returncode == 0
    said = doctor(home)
    assert f"runs {tmp_path / 'other'}, not {home / PREFIX}" in said
    assert f"see its tasks: {tmp_path / 'other'}/runtime/tq list" in said


@pytest.mark.parametrize(
    "command",
    [
        # Another queue, or another type: another hook.
        f"sh {GONE}/runtime/hook approvals review",
        f"sh {GONE}/runtime/hook notifications my_check",
        f"python3 {GONE}/runtime/lib/enqueue.py --hook --start-worker approvals",
        # Another program.
        f"cat {GONE}/runtime/hook",
        f"{GONE}/runtime/hooks notifications",
        "/bin/sh {other}/runtime/hook notifications",
    ],
)
def test_another_hook_stays(home, tmp_path, command):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/hook").write_text("#!/bin/sh\n")
    hook = {"type": "command", "command": command.replace("{other}", str(tmp_path))}
    settings_of(home).write_text(json.dumps({"hooks": {"Stop": [{"hooks": [hook]}]}}))
    assert run(home, "install", "--yes").returncode == 0
    assert hooks_of(home)[0] == hook and len(hooks_of(home)) == 2


@pytest.mark.parametrize(("before", "after"), [("\nlib=", "\n# mine\nlib="), ("\nlib=", "\nlib='")])
def test_a_command_that_the_person_changed_is_another_program(installed, tmp_path, before, after):
    home = installed("--command", "tq", "--hook", "no")
    tq = home / ".local/bin/tq"
    changed = tq.read_text().replace(before, after, 1)
    tq.write_text(changed)
    ran = run(home, "install", tmp_path / "other", "--command", "tq", "--hook", "no")
    assert ran.returncode == 1 and f"{tq} is another program called tq" in ran.stderr
    assert tq.read_text() == changed
