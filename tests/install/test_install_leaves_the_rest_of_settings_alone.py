"""install adds one hook to settings.json and disturbs nothing else in it; uninstall takes that one
out again.
"""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from homes import PREFIX, run, settings_of, terminal

from taskqueue import settings
from taskqueue.installation import Trouble

pytest_plugins = ["homes"]
INSTALL = ROOT / "install.py"

OTHERS = {
    "two spaces": '{\n  "model": "opus",\n  "hooks": {\n    "Stop": [\n      {\n        "hooks": [\n          {"type": "command", "command": "say done"}\n'
                  '        ]\n      }\n    ],\n    "PreToolUse": [{"matcher": "Bash", "hooks": []}]\n  },\n  "unknown": [1.50, 1e5, null]\n}\n',
    "four spaces and Windows line ends": '{\r\n    "env": {"A": "1"},\r\n    "hooks": {\r\n        "SessionEnd": []\r\n    }\r\n}\r\n',
    "one line": '{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"x"}]}]},"a":1}',
    "escapes and odd keys": '{"\\u00e4": "\\ud83d\\ude00", "b": "caf\\u00e9 café", "hook s": {"Stop": 1}}\n',
    "empty": "{}",
    "a key twice": '{"hooks": {"Stop": 1}, "hooks": {"Stop": [{"hooks": []}]}}',
}  # fmt: skip


def our_hooks(text):
    groups = json.loads(text)["hooks"]["Stop"]
    return [
        hook for group in groups for hook in group["hooks"] if "runtime/hook" in hook["command"]
    ]


def snapshot(root):
    """Return the time and the content of each path."""
    seen = {}
    for path in root.rglob("*"):
        content = path.is_file() and path.read_bytes()
        seen[str(path.relative_to(root))] = path.lstat().st_mtime_ns, content
    return seen


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_the_hook_is_added_and_all_else_stays(home, text):
    """Written as Claude Code writes it, with two spaces and in the order that was there."""
    settings_of(home).write_bytes(text.encode())
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 0, ran.stderr
    new = settings_of(home).read_bytes().decode()
    before, after = json.loads(text), json.loads(new)
    assert new == json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    assert len(our_hooks(new)) == 1 and list(after)[: len(before)] == list(before)
    (backup,) = home.glob(".claude/settings.json.*.backup")
    assert backup.read_bytes() == text.encode()
    stop = after["hooks"].pop("Stop")[:-1]
    assert stop == before.get("hooks", {}).pop("Stop", [])
    assert after == {**before, "hooks": before.get("hooks", {})}

    assert run(home, "uninstall").returncode == 0
    left = json.loads(settings_of(home).read_text())
    assert {**left, "hooks": 0} == {**json.loads(text), "hooks": 0}
    assert without_empty(left.get("hooks", {})) == without_empty(json.loads(text).get("hooks", {}))


def without_empty(hooks):
    return {event: groups for event, groups in hooks.items() if groups}


def test_a_lone_surrogate_stays_and_a_number_that_json_has_not_is_refused(home):
    settings_of(home).write_text('{"a": "\\ud800"}')
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert json.loads(settings_of(home).read_text())["a"] == "\ud800"
    settings_of(home).write_text(text := '{"a": 1e999}')
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 1 and "number" in ran.stderr and settings_of(home).read_text() == text


def test_uninstall_finds_the_hooks_wherever_install_put_them(home):
    """Installed with one CLAUDE_CONFIG_DIR, then with another; uninstalled with none."""
    other = [home / "work", home / "café"]
    for directory in other:
        words = ["install", "--hook", "yes", "--report", "yes"]
        ran = run(home, *words, env={"CLAUDE_CONFIG_DIR": str(directory)})
        assert ran.returncode == 0 and our_hooks((directory / "settings.json").read_text())
    (other[0] / "settings.json").write_text(
        (other[0] / "settings.json").read_text().replace("{", '{"mine": 1,', 1)
    )
    assert run(home, "uninstall").returncode == 0
    assert json.loads((other[0] / "settings.json").read_text()) == {"mine": 1}
    assert not (other[1] / "settings.json").exists()


def test_a_second_install_changes_nothing(home):
    settings_of(home).write_text('{"a": 1}')
    run(home, "install", "--yes")
    before = snapshot(home / ".claude")
    ran = run(home, "install", "--yes")
    assert ran.returncode == 0 and "which is there" in ran.stdout
    after = snapshot(home / ".claude")
    changed = {name for name in after if before.get(name) != after[name]}
    assert {name for name in changed if "installed.json" not in name and "/state" not in name} <= {
        "automation/lychee"
    }
    assert len(our_hooks(settings_of(home).read_text())) == 1


def test_without_a_settings_file_one_is_made_and_taken_away_again(installed):
    home = installed("--hook", "yes")
    assert len(our_hooks(settings_of(home).read_text())) == 1
    assert settings_of(home).stat().st_mode & 0o777 == 0o600
    assert run(home, "uninstall").returncode == 0
    assert not settings_of(home).exists()


def test_the_file_keeps_its_mode(home):
    settings_of(home).write_text("{}")
    settings_of(home).chmod(0o640)
    run(home, "install", "--hook", "yes")
    assert settings_of(home).stat().st_mode & 0o777 == 0o640


UNFIT = {
    "bad JSON": '{"a": 1,}',
    "comments": '{"a": 1} // mine',
    "empty file": "",
    "an array": "[]",
    "a number that is none": '{"a": NaN}',
    "hooks of another shape": '{"hooks": []}',
    "Stop of another shape": '{"hooks": {"Stop": {}}}',
    "not UTF-8": b'{"a": "\xff"}',
    "nested without end": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("content", UNFIT.values(), ids=UNFIT)
def test_a_settings_file_that_cannot_be_understood_is_refused(home, content):
    settings_of(home).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Trouble, match=re.escape(str(settings_of(home)))) as refused:
        settings.read(settings_of(home))
    assert "\n" not in str(refused.value)


def test_it_is_left_alone_then_and_the_rest_installed(home):
    settings_of(home).write_text('{"a": 1,}')
    ran = run(home, "install", "--hook", "yes")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert str(settings_of(home)) in ran.stderr and "add by hand" in ran.stderr
    assert settings_of(home).read_text() == '{"a": 1,}'
    assert (home / PREFIX / "runtime/lib/enqueue.py").is_file()
    assert (home / PREFIX / "state/tasks.db").is_file()
    assert not list(home.glob(".claude/settings.json.*"))


def test_a_symbolic_link_is_left_alone(home):
    (home / "dotfiles.json").write_text("{}")
    settings_of(home).symlink_to(home / "dotfiles.json")
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 1 and "symbolic link" in ran.stderr
    assert str(home / "dotfiles.json") in ran.stderr
    assert settings_of(home).is_symlink() and (home / "dotfiles.json").read_text() == "{}"


def test_a_read_only_file_is_left_alone(home):
    settings_of(home).write_text("{}")
    settings_of(home).chmod(0o444)
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 1 and "cannot be written" in ran.stderr
    assert settings_of(home).read_text() == "{}"


@pytest.mark.parametrize("extra", [[], ["--hook", "yes"]])
def test_a_dry_run_shows_the_change_and_writes_nothing(home, extra):
    settings_of(home).write_text('{\n  "a": 1\n}\n')
    before = snapshot(home)
    ran = run(home, "install", "--dry-run", *extra)
    assert ran.returncode == 0, ran.stderr
    assert '-  "a": 1\n+  "a": 1,\n+  "hooks": {\n' in ran.stdout
    assert "add        runtime/lib/enqueue.py" in ran.stdout
    assert snapshot(home) == before
    run(home, "install", "--hook", "yes")
    before = snapshot(home)
    ran = run(home, "uninstall", "--dry-run")
    assert "remove     runtime/lib/enqueue.py" in ran.stdout and "runtime/hook" in ran.stdout
    assert snapshot(home) == before


def test_without_a_terminal_and_without_an_option_no_hook_is_added(home):
    settings_of(home).write_text("{}")
    for stdin in (subprocess.DEVNULL, subprocess.PIPE):
        ran = run(home, "install", stdin=stdin)
        assert ran.returncode == 0 and "--hook yes" in ran.stdout
        assert settings_of(home).read_text() == "{}"


LINK_CHECK, REPORT = {"Stop"}, {"UserPromptSubmit", "SessionStart"}


@pytest.mark.parametrize(
    ("typed", "added"),
    [
        ("c\n\n\n", LINK_CHECK | REPORT),
        ("c\ny\nYES\n", LINK_CHECK | REPORT),
        ("C\nn\n\n", REPORT),
        ("choose\n\nno\n", LINK_CHECK),
        ("c\nwhat?\nn\n", set()),
        ("c\n\x04\x04", set()),
    ],
)
def test_on_a_terminal_it_offers_both_and_enter_means_yes(home, typed, added):
    with terminal(typed) as stdin:
        ran = run(home, "install", "--no-command", stdin=stdin)
    assert ran.returncode == 0 and ran.stdout.count("? [Y/n] ") == 2
    assert "checks the links" in ran.stdout and "Claude is told" in ran.stdout
    settings = settings_of(home)
    assert set(json.loads(settings.read_text())["hooks"] if settings.exists() else ()) == added
    assert run(home, "uninstall").returncode == 0 and not settings.exists()


def test_both_hooks_are_taken_out_however_they_came(home):
    text = '{\n\t"model": "opus",\n\t"hooks": {"SessionStart": [{"hooks": []}]}\n}'
    settings_of(home).write_text(text)
    for args in (["--report", "yes"], ["--hook", "yes", "--report", "yes"], ["--yes"]):
        assert run(home, "install", *args, "--no-command").returncode == 0
    both = settings_of(home).read_text()
    assert both.count("runtime/hook' notifications") + both.count("runtime/hook notifications") == 1
    assert both.count("runtime/hook --report") == 2
    assert run(home, "install", "--no-command", "--yes").returncode == 0
    assert settings_of(home).read_text() == both
    assert run(home, "uninstall").returncode == 0
    assert json.loads(settings_of(home).read_text()) == json.loads(text)


def test_a_change_in_between_stays_and_both_hooks_go(installed):
    home = installed("--hook", "yes")
    settings = json.loads(settings_of(home).read_text())
    settings_of(home).write_text(json.dumps(settings | {"mine": 2.5}))
    run(home, "install", "--report", "yes")
    assert run(home, "uninstall").returncode == 0
    assert json.loads(settings_of(home).read_text()) == {"mine": 2.5}


def test_a_hook_that_the_user_changed_is_not_doubled_and_not_removed(installed):
    home = installed("--hook", "yes")
    ours = settings_of(home).read_text()
    text = ours.replace("--once-per workspace --start-worker", "--once-per session")
    assert text != ours
    settings_of(home).write_text(text)
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert settings_of(home).read_text() == text
    ran = run(home, "uninstall")
    assert ran.returncode == 0 and "keep yours" in ran.stdout
    assert settings_of(home).read_text() == text


def test_uninstall_keeps_hooks_that_were_put_beside_ours(installed):
    home = installed("--hook", "yes")
    settings = json.loads(settings_of(home).read_text())
    settings["hooks"]["Stop"][0]["hooks"].append({"type": "command", "command": "mine"})
    settings["hooks"]["SessionEnd"] = [{"hooks": [{"type": "command", "command": "mine, too"}]}]
    settings_of(home).write_text(json.dumps(settings, indent=4))
    assert run(home, "uninstall").returncode == 0
    del settings["hooks"]["Stop"][0]["hooks"][0]
    assert json.loads(settings_of(home).read_text()) == settings


def test_uninstall_with_unreadable_settings_can_be_finished_later(installed):
    home = installed("--hook", "yes")
    good = settings_of(home).read_text()
    settings_of(home).write_text(good + "}")
    ran = run(home, "uninstall")
    assert ran.returncode == 1 and "Remove by hand" in ran.stderr
    settings_of(home).write_text(good)
    assert run(home, "uninstall").returncode == 0
    assert not settings_of(home).exists()


def test_two_installs_at_once_add_one_hook(home):
    settings_of(home).write_text('{"a": 1}')
    env = {"HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, INSTALL, "install", "--no-warm", "--yes"]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    runs = [subprocess.Popen(command, env=env, **streams) for _ in range(4)]
    deadline = time.monotonic() + 60
    assert [run.wait(deadline - time.monotonic()) for run in runs] == [0] * 4
    assert len(our_hooks(settings_of(home).read_text())) == 1


@pytest.mark.parametrize(
    "args",
    [["install", "--hook", "maybe"], ["nonsense"], [], ["work"], ["service", "--kind", "cron"]],
)
def test_a_usage_error_is_64_and_never_2(home, args):
    ran = subprocess.run(
        [sys.executable, INSTALL, *args],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 64 and "Traceback" not in ran.stderr
