"""install puts the command tq into ~/.local/bin when asked, never over another program, and
uninstall takes it out.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import homes
import pytest
from conftest import ROOT
from homes import terminal

import install


@pytest.fixture
def home(tmp_path):
    home = tmp_path / 'J\u00fcrgen\'s "home" $x'
    home.mkdir()
    return home


def run(home, *args, command="install", path="/usr/bin:/bin", env=None, **options):
    more = ["--hook", "no", "--report", "no"] if command == "install" else []
    more += (
        ["--skill", "no"]
        if command == "install" and "--skill" not in args and "--yes" not in args
        else []
    )
    path = f"{os.path.dirname(shutil.which('uv'))}:{path}" if shutil.which("uv") else path
    return homes.run(home, command, *args, *more, env={"PATH": path} | (env or {}), **options)


def bin_of(home):
    return home / ".local/bin"


def tq(home, *args, name="tq", env=None, **options):
    return subprocess.run(
        [bin_of(home) / name, *args],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


@pytest.mark.parametrize("args", [["--command", "tq"], ["--yes"]])
def test_it_is_put_there_when_wanted_and_taken_out_again(home, args):
    ran = run(home, *args)
    assert ran.returncode == 0, ran.stderr
    assert (
        os.listdir(bin_of(home)) == ["tq"] and (bin_of(home) / "tq").stat().st_mode & 0o777 == 0o700
    )
    assert 'export PATH="$HOME/.local/bin:$PATH"' in ran.stdout
    assert run(home, command="uninstall").returncode == 0 and os.listdir(bin_of(home)) == []


def test_a_dry_run_names_it(home):
    for args, is_named in ((["--yes"], True), (["--no-command"], False)):
        told = run(home, *args, "--dry-run").stdout
        assert ("add        ~/.local/bin/tq: the command" in told.splitlines()) == is_named


@pytest.mark.parametrize(
    "args", [[], ["--no-command"], ["--yes", "--no-command"], ["--command", "tq", "--dry-run"]]
)
def test_it_is_not_put_there_unasked(home, args):
    ran = run(home, *args)
    assert ran.returncode == 0 and not bin_of(home).exists()


@pytest.mark.parametrize(("typed", "there"), [("c\ny\n", ["tq"]), ("c\nn\n", []), ("c\n\x04", [])])
def test_on_a_terminal_it_asks(home, typed, there):
    with terminal(typed) as stdin:
        ran = run(home, stdin=stdin)
    assert ran.returncode == 0 and "Put the command tq into ~/.local/bin? [Y/n]" in ran.stdout
    assert (os.listdir(bin_of(home)) if bin_of(home).exists() else []) == there


def test_claude_is_told_how_to_use_the_command(home):
    skill = home / ".claude/skills/task-queue/SKILL.md"
    assert run(home, "--command", "queue", "--skill", "no").returncode == 0 and not skill.exists()
    assert run(home, "--command", "queue", "--skill", "yes").returncode == 0
    text = skill.read_text()
    assert "\nqueue add approvals claude" in text and "task-queue " not in text
    skill.write_text(text + "Mine.\n")
    assert "keep yours" in run(home, "--yes").stdout and skill.read_text().endswith("Mine.\n")
    skill.write_text(text)
    assert run(home, "--yes", command="uninstall").returncode == 0
    assert not skill.parent.parent.exists()


def other_program(directory, name="tq"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("#!/bin/sh\necho another\n")
    (directory / name).chmod(0o755)
    return directory / name


@pytest.mark.parametrize("where", ["elsewhere on PATH", "in its place"])
def test_another_program_of_that_name_is_left_and_another_name_asked_for(home, tmp_path, where):
    directory = bin_of(home) if where == "in its place" else tmp_path / "other"
    other = other_program(directory)
    ran = run(home, "--yes", path=f"{directory}:/usr/bin:/bin")
    assert ran.returncode == 1 and str(other) in ran.stderr and "--command NAME" in ran.stderr
    assert other.read_text() == "#!/bin/sh\necho another\n"
    assert (home / ".claude/automation/lychee/runtime/lib/enqueue.py").is_file()

    assert run(home, "--command", "queue", path=f"{directory}:/usr/bin:/bin").returncode == 0
    assert (
        "stored" not in tq(home, "--help", name="queue").stdout
        and (bin_of(home) / "queue").is_file()
    )
    assert run(home, command="uninstall").returncode == 0
    assert other.exists() and not (bin_of(home) / "queue").exists()


def test_on_a_terminal_it_asks_for_another_name(home, tmp_path):
    other_program(tmp_path / "other")
    other_program(tmp_path / "other", "qq")
    with terminal("qq\nmine\ny\n") as stdin:
        ran = run(home, stdin=stdin, path=f"{tmp_path / 'other'}:/usr/bin:/bin")
    assert (
        ran.returncode == 0
        and ran.stdout.count("Another name") == 2
        and os.listdir(bin_of(home)) == ["mine"]
    )


def test_an_upgrade_keeps_it_without_asking_and_another_name_replaces_it(home):
    run(home, "--command", "one")
    (bin_of(home) / "one").chmod(0o600)
    ran = run(home)
    assert ran.returncode == 0 and (bin_of(home) / "one").stat().st_mode & 0o777 == 0o700
    run(home, "--command", "two")
    assert os.listdir(bin_of(home)) == ["two"]
    (bin_of(home) / "two").write_text("mine")
    ran = run(home)
    assert ran.returncode == 1 and (bin_of(home) / "two").read_text() == "mine"
    assert run(home, command="uninstall").returncode == 0 and os.listdir(bin_of(home)) == ["two"]


def test_with_its_directory_on_path_nothing_is_said_about_path(home):
    ran = run(home, "--command", "tq", path=f"{bin_of(home)}:/usr/bin:/bin")
    assert ran.returncode == 0 and "export PATH" not in ran.stdout


@pytest.mark.parametrize("name", ["", "a b", "../x", "TQ", "-x", "q;rm", "x" * 40])
def test_what_cannot_name_a_command_is_refused(name, capsys):
    with pytest.raises(SystemExit) as ended:
        install.parser().parse_args(["install", f"--command={name}"])
    assert ended.value.code == 64 and capsys.readouterr().err.count("\n") == 1


def test_it_hands_over_to_the_scripts(home):
    assert run(home, "--command", "tq").returncode == 0
    ran = tq(home, "add", "approvals", "review", '{"of": "a \\" b"}', "--task-id", "one task")
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("queued one task ")
    # rich and watchdog are not in this home's cache: Python alone does.
    launcher = bin_of(home) / "tq"
    lines = launcher.read_text().splitlines(True)
    launcher.write_text("".join("uv=\n" if line.startswith("uv=") else line for line in lines))
    ran = tq(home, "list", "--json")
    assert ran.returncode == 0 and [task["task_id"] for task in json.loads(ran.stdout)] == [
        "one task"
    ], ran.stderr
    assert tq(home, "work", "approvals", "--drain", "--", "cat").returncode == 0
    ran = tq(home, "show", "one task", "--json")
    assert ran.returncode == 0 and "completed" in ran.stdout
    assert tq(home, "cancel", "nothing").returncode == 64
    for word, near in (("zzz", ""), (".", ""), ("lst", " (did you mean list?)"), ("wrok", " (did you mean work?)")):  # fmt: skip
        ran = tq(home, word)
        assert ran.returncode == 64 and f": there is no command {word!r}{near}; see " in ran.stderr
    for words in (["-V"], ["version"], ["--version"]):
        assert tq(home, *words).stdout.startswith("tq ")
    assert tq(home, "help", "wait").stdout == tq(home, "wait", "--help").stdout
    assert tq(home, "help", "add").stdout.startswith("Put a task into a queue.")
    ran = tq(home, "dashboard", "--port", "0")
    assert ran.returncode == 64 and "page --open replaced it" in ran.stderr
    assert tq(home, "service", "--dry-run", "--kind", "systemd").stdout.startswith("# ")
    usage = tq(home).stdout
    assert "usage" in usage and tq(home, "--help").stdout == usage
    lines = usage.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert all(len(line) <= 80 for line in lines)
    # All commands are in it, and each is one.
    named = {word for line in lines for word in line[:32].lower().replace(",", "").split()}
    named -= {"queue", "task_type", "[data]", "...", "--", "command"}
    told = subprocess.run(
        [sys.executable, ROOT / "tasks.py", "--help"], capture_output=True, text=True
    ).stdout
    listed = re.findall(r"^    ([a-z-]+)(?:\s|$)", told.partition("  COMMAND\n")[2], re.MULTILINE)
    scripts = "add run work cleanup report relay install uninstall".split()
    assert len(listed) > 10 and named == {*listed, *scripts}


def test_it_uses_the_state_of_its_installation_and_yours_when_set(home, tmp_path):
    assert (
        run(
            home, "--command", "tq", env={"TASK_QUEUE_STATE": str(tmp_path / "its state")}
        ).returncode
        == 0
    )
    assert tq(home, "add", "notifications", "t").returncode == 0
    assert (
        tq(
            home, "add", "notifications", "t", env={"TASK_QUEUE_STATE": str(tmp_path / "mine")}
        ).returncode
        == 0
    )
    sys.path.insert(0, str(ROOT))
    import queue_helpers as q

    for state in ("its state", "mine"):
        assert q.connect(tmp_path / state).execute(
            "select count(*) from notifications"
        ).fetchone() == (1,)


def test_after_everything_was_removed_by_hand_it_says_so(home):
    assert run(home, "--command", "tq").returncode == 0
    shutil.rmtree(home / ".claude")
    ran = tq(home, "list")
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "is gone" in ran.stderr


def test_the_launcher_is_a_shell_script_without_fault():
    ran = subprocess.run(
        ["shellcheck", "--shell=sh", ROOT / "bin/tq.sh"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")
