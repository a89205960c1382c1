"""A hook of ours is found in settings.json however it is written, and WorktreeCreate is not
offered.
"""

import json
import subprocess

import pytest
from homes import hooks_of, run, settings_of

import install

pytest_plugins = ["homes"]


def with_hook(home, **hook):
    settings_of(home).write_text(
        json.dumps({"hooks": {"Stop": [{"hooks": [{"type": "command", **hook}]}]}}, indent=2)
    )


WRITTEN = {
    "exec form, the script": {
        "command": "python3",
        "args": ["{prefix}/runtime/lib/enqueue.py", "--hook", "notifications"],
    },
    "exec form, the hook": {
        "command": "/bin/sh",
        "args": ["{prefix}/runtime/hook", "notifications", "link_validation"],
    },
    "exec form, the program itself": {
        "command": "{prefix}/runtime/lib/enqueue.py",
        "args": ["--hook", "notifications"],
    },
    "a shell's words": {
        "command": "/usr/bin/python3 '{prefix}/runtime/lib/enqueue.py' --hook notifications || exit 1"
    },
    "below the home": {"command": "sh ~/.claude/automation/lychee/runtime/hook notifications"},
    "with $HOME": {"command": 'sh "$HOME/.claude/automation/lychee/runtime/hook" notifications'},
}


@pytest.mark.parametrize("hook", WRITTEN.values(), ids=WRITTEN)
def test_a_hook_that_somebody_wrote_is_ours_and_gets_no_second_one(home, monkeypatch, hook):
    monkeypatch.setenv("HOME", str(home))
    prefix = str(home / ".claude/automation/lychee")
    hook = json.loads(json.dumps(hook).replace("{prefix}", prefix))
    with_hook(home, **hook)
    before = settings_of(home).read_text()
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 0 and "which is there, and yours" in ran.stdout
    assert settings_of(home).read_text() == before

    ran = run(home, "uninstall")
    assert settings_of(home).read_text() == before
    if "enqueue.py" in json.dumps(hook):
        assert (
            ran.returncode == 1
            and "blocks Claude" in ran.stderr
            and json.dumps(hook["command"])[1:-1] in ran.stderr
        )
    else:
        assert ran.returncode == 0 and "keep yours" in ran.stdout


OTHERS = {
    "a name that only looks like it": {"command": "echo {prefix}/runtime/hooks"},
    "unbalanced quotes": {"command": "echo 'it"},
    "args of another shape": {"command": "echo", "args": {"a": 1}},
    "args that are no text": {"command": "echo", "args": [1, None]},
}


@pytest.mark.parametrize("hook", OTHERS.values(), ids=OTHERS)
def test_another_hook_is_not(home, hook):
    hook = json.loads(json.dumps(hook).replace("{prefix}", str(home / ".claude/automation/lychee")))
    with_hook(home, **hook)
    before = settings_of(home).read_text()
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert len(hooks_of(home)) == 2
    assert run(home, "uninstall").returncode == 0
    assert json.loads(settings_of(home).read_text()) == json.loads(before)


def test_behind_a_symbolic_link_it_is_the_same_hook(home, tmp_path):
    place = tmp_path / "dotfiles/automation/lychee"
    place.parent.mkdir(parents=True)
    (home / ".claude/automation").symlink_to(place.parent)
    assert run(home, "install", "--hook", "yes").returncode == 0
    # The other name of the same place.
    ran = run(home, "install", str(place), "--hook", "yes")
    assert ran.returncode == 0 and len(hooks_of(home)) == 1, ran.stdout
    # A firing through the link is stored.
    command = hooks_of(home)[0]["command"].replace(" --start-worker", "")
    ran = subprocess.run(["/bin/sh", "-c", command], input=b"{}", env={}, capture_output=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    assert len(list((place / "state/spool/notifications").glob("*.hook"))) == 1
    assert run(home, "uninstall", str(place)).returncode == 0
    assert not settings_of(home).exists()


@pytest.mark.parametrize("event", ["WorktreeCreate", "", "stop", "Stop Hook", "Stop\n", "../Stop"])
def test_an_event_that_no_hook_of_ours_may_have_is_refused(event, capsys):
    with pytest.raises(SystemExit) as ended:
        install.parser().parse_args(["install", "--event", event])
    said = capsys.readouterr().err
    assert ended.value.code == 64 and said.count("\n") == 1
    assert ("print the path of the worktree" in said) == (event == "WorktreeCreate")


def test_another_event_can_be_chosen_and_both_are_taken_out(home):
    text = '{"hooks": {"SessionEnd": [{"hooks": [{"type": "command", "command": "mine"}]}]}}\n'
    settings_of(home).write_text(text)
    assert run(home, "install", "--hook", "yes", "--event", "SessionEnd").returncode == 0
    theirs, ours = hooks_of(home, "SessionEnd")
    assert theirs["command"] == "mine" != ours["command"] and hooks_of(home) == []
    assert run(home, "install", "--hook", "yes").returncode == 0
    assert len(hooks_of(home)) == 1 and len(hooks_of(home, "SessionEnd")) == 2
    assert run(home, "uninstall").returncode == 0
    assert json.loads(settings_of(home).read_text()) == json.loads(text)


def test_an_upgrade_changes_a_hook_that_an_older_version_wrote(installed):
    home = installed("--hook", "yes")
    record = home / ".claude/automation/lychee/installed.json"
    old = "sh /old/hook notifications"
    ours = json.dumps(hooks_of(home)[0]["command"])
    settings_of(home).write_text(settings_of(home).read_text().replace(ours, json.dumps(old)))
    value = json.loads(record.read_text())
    del value["hooks"]
    value["hook"] = {"command": old, "created": [".", "hooks", "Stop"]}
    record.write_text(json.dumps(value))
    ran = run(home, "install", "--hook", "yes")
    assert ran.returncode == 0
    assert "update     ~/.claude/settings.json: the link check" in ran.stdout
    (hook,) = hooks_of(home)
    assert hook["command"] != old
    assert run(home, "uninstall").returncode == 0


def test_uninstall_never_takes_back_an_older_state_of_the_file(home):
    """Each change has a backup of its own, also when two are made within the same second."""
    for number in range(2):
        text = json.dumps({"number": number})
        settings_of(home).write_text(text)
        assert run(home, "install", "--hook", "yes").returncode == 0
        assert run(home, "uninstall").returncode == 0
        assert json.loads(settings_of(home).read_text()) == {"number": number}
