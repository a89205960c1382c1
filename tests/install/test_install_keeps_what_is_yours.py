"""install and uninstall replace and remove only what install put there; the state is never removed."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from homes import PREFIX, files, install, run

pytest_plugins = ["homes"]


@pytest.fixture
def source(tmp_path):
    """A checkout that a test may change."""
    source = tmp_path / "checkout"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "bench", "docs")
    )
    return source


def test_it_lays_out_what_the_reference_has(source, home):
    install(home, source=source)
    prefix = home / PREFIX
    for name in ("enqueue.py", "worker.py", "cleanup.py", "tasks.py", "queue_helpers.py"):
        assert (prefix / "runtime/lib" / name).read_bytes() == (source / name).read_bytes()
    assert os.access(prefix / "runtime/lib/enqueue.py", os.X_OK) and os.access(
        prefix / "handlers/link_validation", os.X_OK
    )
    assert prefix.stat().st_mode & 0o777 == 0o700
    tables = {
        name
        for (name,) in sqlite3.connect(prefix / "state/tasks.db").execute(
            "select name from sqlite_master"
        )
    }
    assert {"notifications", "approvals", "completions", "task_history", "task_queue"} <= tables
    assert (prefix / "state").stat().st_mode & 0o777 == 0o700 and (
        prefix / "state/tasks.db"
    ).stat().st_mode & 0o777 == 0o600
    # A shell may move a task there.
    assert (prefix / "state/spool/notifications").is_dir()


def test_an_environment_of_another_home_gets_this_homes_paths(home, tmp_path):
    """README's move to another machine: the file comes before the install."""
    other, file = tmp_path / "other", home / PREFIX / "environment"
    (home / ".local/bin").mkdir(parents=True)
    file.parent.mkdir(parents=True)
    file.write_text(
        f"HOME={other}\nPATH={other}/.local/bin:/gone:/usr/bin\nHTTPS_PROXY=http://{other}/x\n"
    )
    file.chmod(0o600)
    install(home)
    lines = file.read_text().splitlines()
    assert lines[:2] == [f"HOME={home}", f"PATH={home}/.local/bin:/usr/bin"]
    assert f"HTTPS_PROXY=http://{other}/x" in lines


def test_a_handler_that_you_changed_stays_yours_and_an_unchanged_one_is_upgraded(source, home):
    (source / "handlers/other").write_text("#!/bin/sh\n")
    (source / "handlers/other").chmod(0o755)
    install(home, source=source)
    handlers = home / PREFIX / "handlers"
    (handlers / "link_validation").write_text("#!/bin/sh\nmine\n")
    (handlers / "own").write_text("#!/bin/sh\nown\n")
    (source / "handlers/other").write_text("#!/bin/sh\nnewer\n")
    output = install(home, source=source)
    assert "keep yours handlers/link_validation" in output and ": update 1, unchanged " in output
    assert (handlers / "link_validation").read_text() == "#!/bin/sh\nmine\n"
    assert (handlers / "other").read_text() == "#!/bin/sh\nnewer\n"

    ran = run(home, "uninstall", source=source)
    assert ran.returncode == 0 and "keep yours handlers/link_validation" in ran.stdout
    assert files(handlers) == {"link_validation", "own"}


def test_a_handler_that_was_there_before_is_not_taken_over(source, home):
    handlers = home / PREFIX / "handlers"
    handlers.mkdir(parents=True)
    (handlers / "link_validation").symlink_to("/bin/true")
    assert "keep yours" in install(home, source=source)
    assert run(home, "uninstall", source=source).returncode == 0
    assert (handlers / "link_validation").readlink() == Path("/bin/true")


def test_scripts_are_replaced_and_a_new_version_of_ours_can_be_taken_out(source, home):
    install(home, source=source)
    lib = home / PREFIX / "runtime/lib"
    (source / "enqueue.py").write_text((source / "enqueue.py").read_text() + "# newer\n")
    (lib / "worker.py").write_text("# half of it")
    output = install(home, source=source)
    assert ": update 2, unchanged " in output
    assert (lib / "worker.py").read_bytes() == (source / "worker.py").read_bytes()
    assert run(home, "uninstall", source=source).returncode == 0
    assert not lib.exists()


def test_uninstall_leaves_the_state_as_it_is_and_nothing_else(source, home):
    install(home, source=source)
    prefix = home / PREFIX
    lib, state = prefix / "runtime/lib", prefix / "state"
    put = subprocess.run(
        [sys.executable, lib / "enqueue.py", "approvals", "t", "--task-id", "keep-me"],
        env={"HOME": str(home)},
        capture_output=True,
    )
    assert (
        put.returncode == 0 and (lib / "__pycache__").exists()
        # What Python made of our files goes with them.
    )
    before = files(state)
    ran = run(home, "uninstall", source=source)
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in prefix.iterdir()] == ["state"] and files(state) == before
    assert sqlite3.connect(state / "tasks.db").execute(
        "select task_id from approvals"
    ).fetchall() == [("keep-me",)]
    install(home, source=source)
    assert sqlite3.connect(state / "tasks.db").execute(
        "select task_id from approvals"
    ).fetchall() == [("keep-me",)]


def test_the_installed_copy_can_uninstall_without_the_checkout(source, home):
    install(home, source=source)
    prefix = home / PREFIX
    shutil.rmtree(source)
    assert run(home, "uninstall", source=prefix / "runtime/lib").returncode == 0
    assert [path.name for path in prefix.iterdir()] == ["state"]


def test_an_upgrade_removes_what_the_new_version_has_no_more(source, home):
    lib = home / PREFIX / "runtime/lib"
    for name in ("queue_extra.py", "extra.py", "changed.py"):
        (source / name).write_text("# /// script\n# ///\n")
    install(home, source=source)
    assert {"queue_extra.py", "extra.py", "changed.py"} <= files(lib)
    for name in ("queue_extra.py", "extra.py", "changed.py"):
        (source / name).unlink()
    (lib / "changed.py").write_text("mine")
    (lib / "own.py").write_text("# /// script\n# ///\n")
    output = install(home, source=source)
    assert ": remove 2, unchanged " in output
    assert not {"queue_extra.py", "extra.py"} & files(lib) and {"changed.py", "own.py"} <= files(
        lib
    )
    assert run(home, "uninstall", source=source).returncode == 0 and files(lib) == {
        "changed.py",
        "own.py",
    }


def test_what_is_no_script_is_not_installed(source, home):
    (source / "conftest.py").write_text("import os\n")
    (source / "notes.txt").write_text("")
    install(home, source=source)
    installed = files(home / PREFIX / "runtime/lib")
    assert not {"conftest.py", "notes.txt"} & installed
    assert {str(path.relative_to(source)) for path in source.glob("taskqueue/*.py")} | {
        "queue_helpers.py",
        "bin/hook.sh",
        "worker.py",
    } <= installed


def test_installing_again_from_the_installed_copy_takes_over_no_handler_of_yours(source, home):
    install(home, source=source)
    prefix = home / PREFIX
    (prefix / "handlers/own").write_text("#!/bin/sh\n")
    (prefix / "handlers/own").chmod(0o755)
    shutil.rmtree(source)
    install(home, source=prefix / "runtime/lib")
    assert (prefix / "handlers/own").stat().st_mode & 0o777 == 0o755 and (
        prefix / "runtime/hook"
    ).is_file()
    assert run(home, "uninstall", source=prefix / "runtime/lib").returncode == 0
    assert files(prefix / "handlers") == {"own"}


def test_one_answers_whether_it_is_installed_and_where(source, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    from taskqueue.installation import installed

    assert installed() is None and installed(source / "tasks.py") is None
    install(home, source=source)
    place = installed()
    assert (
        place is not None
        and place.prefix == home / PREFIX
        and place.state == place.prefix / "state"
    )
    assert installed(source / "tasks.py") is None
    inside = installed(place.lib / "tasks.py")
    assert inside is not None and inside.prefix == place.prefix


def test_another_prefix_and_state_are_kept_apart(source, home, tmp_path):
    prefix, state = tmp_path / "an other\u00e4 place", tmp_path / "its state"
    install(home, str(prefix), source=source, env={"TASK_QUEUE_STATE": str(state)})
    assert (prefix / "runtime/lib/enqueue.py").is_file() and (state / "tasks.db").is_file()
    assert not (home / ".claude/automation").exists() and not (prefix / "state").exists()
    # An upgrade need not be told again where the state is.
    install(home, str(prefix), source=source)
    assert not (prefix / "state").exists()
    hook = subprocess.run(
        ["/bin/sh", prefix / "runtime/hook", "notifications", "t"],
        input=b"{}",
        env={"HOME": str(home)},
    )
    assert hook.returncode == 0
    assert len(list((state / "spool/notifications").glob("*.hook"))) == 1
    assert run(home, "uninstall", str(prefix), source=source).returncode == 0
    assert not prefix.exists() and (state / "tasks.db").is_file()


def test_a_state_that_cannot_be_used_is_said_and_the_rest_installed(source, home):
    state = home / PREFIX / "state"
    state.mkdir(parents=True)
    sqlite3.connect(state / "tasks.db").execute("pragma user_version = 999").connection.close()
    ran = run(home, "install", source=source)
    assert ran.returncode == 1 and "999" in ran.stderr and ran.stderr.count("\n") == 1
    assert (state.parent / "runtime/lib/enqueue.py").is_file()


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_prefix_that_cannot_be_used_is_one_line_and_1(source, home, command):
    (home / "file").write_text("")
    for prefix in (home / "file", home / "file/below", Path("/proc/nowhere")):
        ran = run(home, command, str(prefix), source=source)
        assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and str(prefix) in ran.stderr, (
            ran.stderr
        )
    assert (home / "file").read_text() == ""


def test_uninstalling_what_is_not_there_says_so(source, home):
    ran = run(home, "uninstall", source=source)
    assert ran.returncode == 1 and "nothing is installed" in ran.stderr
