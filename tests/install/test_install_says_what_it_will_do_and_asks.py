"""install shows a plan of some ten lines and asks before it touches anything; a no leaves nothing."""

import pytest
from homes import PREFIX, hooks_of, run, settings_of, terminal

pytest_plugins = ["homes"]

TEXT = '{"model": "opus"}\n'


def everything(home) -> dict:
    """All files and directories below a home, with their content and when they changed."""
    return {
        path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (home, *home.rglob("*"))
    }


def plan_of(said: str) -> list[str]:
    """The plan's lines: those between the diff of the settings and the question."""
    lines = said.partition("Do all of this?")[0].splitlines()
    return lines[next(at for at, line in enumerate(lines) if line.startswith("files ")) :]


@pytest.mark.parametrize("typed", ["n\n", "no\n", "what?\n", "\x04"])
def test_a_no_leaves_nothing_behind(home, typed):
    settings_of(home).write_text(TEXT)
    before = everything(home)
    with terminal(typed) as stdin:
        ran = run(home, "install", stdin=stdin, env={"SHELL": "/bin/bash"})
    assert (ran.returncode, ran.stderr) == (1, "") and ran.stdout.endswith("nothing was changed\n")
    assert everything(home) == before
    # Nobody was asked twice, and files were not copied before.
    assert ran.stdout.count("[Y/n") == 1


@pytest.mark.parametrize("typed", ["\n", "y\n", "YES\n"])
def test_one_yes_does_all_that_the_plan_names_and_nothing_else(home, typed):
    settings_of(home).write_text(TEXT)
    env = {"SHELL": "/usr/bin/bash", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with terminal(typed) as stdin:
        ran = run(home, "install", stdin=stdin, env=env)
    assert ran.returncode == 0, ran.stderr
    plan = plan_of(ran.stdout)
    assert 8 <= len(plan) <= 12 and all(len(line) <= 110 for line in plan), plan
    named = "".join(plan).replace("~", str(home))
    for path in (
        PREFIX,
        PREFIX / "environment",
        PREFIX / "state",
        ".local/bin/tq",
        ".local/share/bash-completion/completions/tq",
        ".claude/settings.json",
        ".claude/skills/task-queue/SKILL.md",
    ):
        assert (home / path).exists() and f"{home / path}: " in named, path
    assert "HTTPS_PROXY=http://127.0.0.1:9" in (home / PREFIX / "environment").read_text()
    # One diff, one backup, which the end names.
    assert ran.stdout.count("--- ") == 1
    (backup,) = (home / ".claude").glob("settings.json.*.backup")
    assert backup.read_text() == TEXT and f"backup     {backup}" in ran.stdout
    outside = {
        path for path in home.rglob("*") if path.is_file() and home / PREFIX not in path.parents
    }
    assert len(outside) == 5, "what no line of the plan names"


def test_a_yes_beforehand_prints_the_same_plan_and_goes_on(home):
    env = {"SHELL": "/bin/fish"}
    with terminal("n\n") as stdin:
        asked = run(home, "install", stdin=stdin, env=env).stdout
    ran = run(home, "install", "--yes", env=env)
    assert ran.returncode == 0 and ran.stdout.startswith(asked.partition("Do all of this?")[0])
    assert "?" not in ran.stdout.replace("what?", "") and (home / ".local/bin/tq").is_file()


def test_an_update_says_in_one_line_what_becomes_of_files_and_keeps_one_backup(home):
    settings_of(home).write_text(TEXT)
    assert run(home, "install", "--yes").returncode == 0
    (home / PREFIX / "runtime/lib/report.py").write_text("# half")
    ran = run(home, "install", "--wake", "no", "--hook", "yes")
    assert ran.returncode == 0 and ran.stdout.count("files ") == 1
    assert ": update 1, unchanged " in ran.stdout and "--- " not in ran.stdout
    assert len(list((home / ".claude").glob("settings.json.*.backup"))) == 1
    assert len(hooks_of(home)) == 1


def test_what_is_refused_in_a_choice_takes_with_it_what_belongs_to_it(home):
    """Without the command, nobody is asked about its completion and its skill."""
    with terminal("c\nn\n\n\n") as stdin:
        ran = run(home, "install", stdin=stdin, env={"SHELL": "/bin/bash"})
    assert ran.returncode == 0 and ran.stdout.count("? [Y/n] ") == 3
    assert not (home / ".local").exists() and not (home / ".claude/skills").exists()
    assert len(hooks_of(home)) == 1
