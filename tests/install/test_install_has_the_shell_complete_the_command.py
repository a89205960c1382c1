"""install puts `tq completion` where the person's shell looks for it; uninstall takes it out."""

import os
import subprocess

import pytest
from homes import run

pytest_plugins = ["homes"]

BASH, FISH = ".local/share/bash-completion/completions/tq", ".config/fish/completions/tq.fish"


@pytest.mark.parametrize(("shell", "where"), [("bash", BASH), ("fish", FISH)])
def test_the_shell_finds_it_an_update_renews_it_and_uninstall_removes_it(home, shell, where):
    env, file = {"SHELL": f"/usr/bin/{shell}"}, home / where
    assert run(home, "install", "--yes", env=env).returncode == 0
    text = file.read_text()
    assert "cancel" in text and file.stat().st_mode & 0o777 == 0o600
    file.write_text(text.replace("cancel", "cansel"))
    # Without an answer an update keeps what is there up to date.
    assert run(home, "install", env=env).returncode == 0
    assert file.read_text() == text
    assert run(home, "uninstall").returncode == 0 and not file.exists()


def test_bash_completes_with_it(home):
    env = {"SHELL": "/bin/bash"}
    assert run(home, "install", "--yes", "--command", "queue", env=env).returncode == 0
    file = home / ".local/share/bash-completion/completions/queue"
    script = (
        f'source "{file}"; COMP_WORDS=(queue canc) COMP_CWORD=1; _queue; echo "${{COMPREPLY[@]}}"'
    )
    path = f"{home}/.local/bin:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script],
        env={"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "cancel", ran.stderr


def test_another_name_for_the_command_takes_its_completion_along(home):
    env = {"SHELL": "/bin/fish"}
    assert run(home, "install", "--yes", "--command", "one", env=env).returncode == 0
    assert run(home, "install", "--yes", "--command", "two", env=env).returncode == 0
    assert os.listdir(home / ".config/fish/completions") == ["two.fish"]
    assert os.listdir(home / ".local/bin") == ["two"]


def test_the_directories_that_the_person_named_are_used(home, tmp_path):
    env = {"SHELL": "/bin/bash", "XDG_DATA_HOME": str(tmp_path / "data")}
    assert run(home, "install", "--yes", env=env).returncode == 0
    assert (tmp_path / "data/bash-completion/completions/tq").is_file()
    env |= {"BASH_COMPLETION_USER_DIR": str(tmp_path / "mine")}
    assert run(home, "install", "--yes", env=env).returncode == 0
    assert (tmp_path / "mine/completions/tq").is_file()
    assert run(home, "uninstall").returncode == 0
    assert not list(tmp_path.glob("*/**/tq"))


def test_a_file_of_the_persons_own_stays(home):
    file = home / BASH
    file.parent.mkdir(parents=True)
    file.write_text("complete -W mine tq\n")
    ran = run(home, "install", "--yes", env={"SHELL": "/bin/bash"})
    assert ran.returncode == 0 and f"keep yours ~/{BASH}" in ran.stdout
    assert run(home, "uninstall").returncode == 0
    assert file.read_text() == "complete -W mine tq\n"


@pytest.mark.parametrize("more", [["--completion", "no"], ["--no-command"]])
def test_it_is_not_put_there_unwanted(home, more):
    assert run(home, "install", "--yes", *more, env={"SHELL": "/bin/bash"}).returncode == 0
    assert not (home / ".local/share").exists()


def test_zsh_gets_a_line_for_its_start_file_which_is_the_persons(home):
    env = {"SHELL": "/bin/zsh"}
    said = run(home, "install", "--yes", env=env).stdout
    assert "source <(tq completion zsh)" in said and not list(home.glob(".z*"))
    (home / ".zshrc").write_text("source <(tq completion zsh)\n")
    assert "source <(" not in run(home, "install", "--yes", env=env).stdout
