"""Trouble with one entry, one queue or one directory is complained of once, and everything else
goes on.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import copy_scripts, wait_for
from processes import stays_true

QUICK = "#!/bin/sh\n"


def serves_well(installation, worker, queue="notifications") -> None:
    """Tasks run, and the worker lives."""
    for _ in range(2):
        task = installation.enqueue(queue, "quick")
        wait_for(
            lambda task=task: installation.history(task) or worker.poll() is not None,
            what=f"the end of a task of {queue}",
        )
        assert worker.poll() is None, worker.log.read_text()
        assert installation.history(task)["status"] == "completed"
    assert "Traceback" not in worker.log.read_text()


@pytest.fixture
def spool(installation):
    """The spool of a queue, in which there is one good task."""
    installation.handler("quick", QUICK)
    installation.enqueue("notifications", "quick")
    directory = installation.state / "spool" / "notifications"
    directory.mkdir(parents=True)
    (directory / "good.json").write_text('{"task_id": "good", "task_type": "quick", "data": {}}')
    return directory


def bytes_as_name(spool: Path) -> None:
    (Path(os.fsdecode(os.fsencode(spool) + b"/\xff\xfe.json"))).write_text("{}")


def a_directory_as_queue(spool: Path) -> None:
    (spool.parent / "Not A Queue").mkdir()
    (spool.parent / "Not A Queue" / "x.json").write_text("{}")


def a_fifo(spool: Path) -> None:
    os.mkfifo(spool / "fifo.json")


def a_link_to_nothing(spool: Path) -> None:
    (spool / "link.json").symlink_to("/nowhere")


def a_file_for_the_malformed(spool: Path) -> None:
    (spool / "malformed").write_text("in the way")
    (spool / "bad.json").write_text("no JSON")


def a_name_with_a_newline(spool: Path) -> None:
    (spool / "two\nlines\x1b]0;title\x07.json").write_text("no JSON")


@pytest.mark.parametrize(
    "odd",
    [
        bytes_as_name,
        a_directory_as_queue,
        a_fifo,
        a_link_to_nothing,
        a_file_for_the_malformed,
        a_name_with_a_newline,
    ],
)
def test_an_odd_entry_of_the_spool(installation, spool, odd):
    odd(spool)
    worker = installation.worker("notifications")
    serves_well(installation, worker)
    assert "\x1b" not in worker.log.read_text()


@pytest.mark.parametrize(
    "damage",
    [
        "drop table approvals; create table approvals (something integer)",
        "drop table approvals; create view approvals as select 1 as id",
        'drop index "approvals.ready"; drop index "approvals.claimed"; alter table approvals rename column status to state',
    ],
)
@pytest.mark.parametrize("when", ["before the start", "while it runs"])
def test_one_queue_is_broken_and_the_other_is_served(installation, damage, when):
    installation.handler("quick", QUICK)
    installation.enqueue("approvals", "quick", "--delay", 3600)
    installation.enqueue("notifications", "quick")
    if when == "before the start":
        installation.sqlite3(damage)
    worker = installation.worker("approvals", "notifications")
    if when == "while it runs":
        serves_well(installation, worker)
        installation.sqlite3(damage)
    serves_well(installation, worker)
    wait_for(lambda: "queue approvals" in worker.log.read_text(), what="a word on it")
    assert stays_true(lambda: worker.log.read_text().count("queue approvals") == 1, 1)
    worker.terminate()
    assert worker.wait(10) == 0


def test_a_broken_queue_that_nobody_serves_hinders_no_recovery(installation):
    installation.handler("long", '#!/bin/sh\necho $$ >>"$HOME/runs"\nexec sleep 100\n')
    installation.enqueue("approvals", "long", "--delay", 3600)
    installation.enqueue("notifications", "long")
    first = installation.worker("notifications")
    runs = installation.directory / "runs"
    wait_for(runs.exists)
    installation.sqlite3(
        'drop index "approvals.claimed"; alter table approvals rename column status to state'
    )
    first.kill()
    first.wait()
    os.killpg(int(wait_for(runs.read_text).split()[0]), signal.SIGKILL)
    second = installation.worker("notifications")
    wait_for(lambda: len(runs.read_text().split()) == 2, what="the task's next run")
    os.killpg(int(runs.read_text().split()[1]), signal.SIGKILL)
    assert second.poll() is None


# ------------------------------------------------------------------------------------------------ another user's files


@pytest.fixture
def as_user(installation):
    """as_user(*args): worker.py, run by a user who is not root, on a copy of the scripts that this
    user may read.
    """
    if (
        os.geteuid() != 0
        or subprocess.run(["setpriv", "--version"], capture_output=True).returncode
    ):
        pytest.skip("needs root, and setpriv to be somebody else")
    public = Path(
        subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
    )
    public.chmod(0o755)
    lib, home = public / "lib", public / "home"
    (lib / "handlers").mkdir(parents=True)
    copy_scripts(lib, "worker.py", "enqueue.py")
    (lib / "handlers" / "quick").write_text(QUICK)
    (lib / "handlers" / "quick").chmod(0o755)
    home.mkdir()
    shutil.chown(home, 65534, 65534)
    watchdog = Path(pytest.importorskip("watchdog").__file__).parent
    shutil.copytree(watchdog, lib / "watchdog")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "TASK_QUEUE_STATE": str(home / "state")}
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    again = (
        "import os, sys; sys.version_info < (3, 11) or os.execv(sys.executable, ['python', '-V'])"
    )
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        found = subprocess.run([*nobody, python, "-c", again], capture_output=True)
        if found.stdout:
            break
    else:
        shutil.rmtree(public)
        pytest.skip("needs a Python 3.11 that everybody may run")

    def run(*args, root=False):
        return subprocess.run(
            [*([] if root else nobody), python, "-B", lib / "worker.py", *args],
            env=env,
            capture_output=True,
            text=True,
            timeout=30,
        )

    run.state = home / "state"
    yield run
    shutil.rmtree(public)


def test_files_that_a_worker_of_root_left_are_named_with_what_mends_it(as_user):
    done = as_user("notifications", "--drain", root=True)
    assert done.returncode == 0, done.stderr
    done = as_user("notifications", "--drain")
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    ), done.stderr
    assert "belongs to root" in done.stderr and str(as_user.state) in done.stderr
    remedy = done.stderr.strip().rsplit(": ", 1)[1]
    assert remedy.startswith("sudo chown -R ")
    subprocess.run(["sh", "-c", remedy.removeprefix("sudo ")], check=True)
    done = as_user("notifications", "--drain")
    assert (done.returncode, done.stderr.count("belongs to")) == (0, 0), done.stderr


@pytest.mark.parametrize(
    "entry",
    [
        "tasks.db",
        "tasks.db-wal",
        "workers",
        "workers/serving.notifications",
        "logs",
        "logs/notifications",
        "runs",
        "spool",
        "spool/notifications",
    ],
)
def test_a_single_entry_of_roots_is_named(as_user, entry):
    assert as_user("notifications", "--drain").returncode == 0
    path = as_user.state / entry
    if not path.exists():
        path.touch() if "." in entry else path.mkdir(parents=True)
    shutil.chown(path, 0, 0)
    path.chmod(0o700 if path.is_dir() else 0o600)
    done = as_user("notifications", "--drain")
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert (
            str(path) in done.stderr and "chown" in done.stderr and done.stderr.count("\n") == 1
        ), done.stderr


def test_a_task_that_cannot_be_started_for_roots_directory_says_what_mends_it(as_user):
    assert as_user("notifications", "--drain").returncode == 0
    (as_user.state / "logs" / "notifications").mkdir(parents=True, mode=0o700)
    insert = """insert into notifications (data) values ('{"task_id": "it", "task_type": "quick", "data": {}}')"""
    subprocess.run(["sqlite3", as_user.state / "tasks.db", insert], check=True)
    for path in (as_user.state / "tasks.db-wal", as_user.state / "tasks.db-shm"):
        if path.exists():
            shutil.chown(path, 65534, 65534)
    done = as_user("notifications", "--drain")
    assert (
        done.returncode == 0
        and "could not be started" in done.stderr
        and "sudo chown -R" in done.stderr
    ), done.stderr
