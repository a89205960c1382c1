"""Signal masks, dispositions, descriptors, environment, being process 1: a worker makes up for what
it was started with.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for

from worker import parse

REPORT = """#!/usr/bin/env python3
import os, signal
ignored = [s.name for s in signal.valid_signals() if s not in (signal.SIGPIPE, signal.SIGXFSZ) and signal.getsignal(s) is signal.SIG_IGN
           if isinstance(s, signal.Signals)]
status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Sig")) if os.path.exists("/proc/self/status") else {}
print(sorted(ignored), [s.name for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])], int(status.get("SigIgn", "0"), 16) & 1 << 12)
"""
ALL = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


def serves(installation, worker) -> None:
    """Tasks run and are recorded, timeouts hold, and it leaves when it is told to."""
    installation.handler("fine", "#!/bin/sh\ncat\n")
    installation.handler("slow", "#!/bin/sh\nexec sleep 100\n")
    for _ in range(2):
        done = installation.finished(installation.enqueue("notifications", "fine"))
        assert done["status"] == "completed" and json.loads(done["result"])["task_type"] == "fine"
    assert installation.finished(installation.enqueue("notifications", "slow"))["error"].startswith(
        "timed out"
    )
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0


def worker_with(installation, preexec_fn):
    worker = installation.worker(
        "notifications", "--timeout", 1, "--max-attempts", 1, ready=False, preexec_fn=preexec_fn
    )
    wait_for(
        lambda: installation.rows("select 1 from sqlite_master where name = 'notifications'"),
        what="the table",
    )
    return worker


@pytest.mark.parametrize(
    "blocked", [{signal.SIGCHLD}, {signal.SIGTERM}, ALL], ids=["SIGCHLD", "SIGTERM", "all"]
)
def test_a_mask(installation, blocked):
    serves(
        installation,
        worker_with(installation, lambda: signal.pthread_sigmask(signal.SIG_SETMASK, blocked)),
    )


def ignore(numbers) -> None:
    for number in numbers:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass


@pytest.mark.parametrize(
    "ignored",
    [{signal.SIGCHLD}, {signal.SIGTERM, signal.SIGINT}, {signal.SIGPIPE}, ALL],
    ids=["SIGCHLD", "SIGTERM", "SIGPIPE", "all"],
)
def test_dispositions(installation, ignored):
    serves(installation, worker_with(installation, lambda: ignore(ignored)))


def test_a_handler_gets_neither_mask_nor_dispositions(installation):
    installation.handler("report", REPORT)

    def worst():
        ignore(ALL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ALL)

    task = installation.enqueue("notifications", "report")
    installation.worker("notifications", ready=False, preexec_fn=worst)
    assert installation.finished(task)["result"].startswith("[] []")


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_closed_descriptors(installation, closed):
    serves(installation, worker_with(installation, lambda: [os.close(fd) for fd in closed]))


def test_a_log_that_cannot_be_written(installation):
    with open("/dev/full", "w") as full:
        installation.handler("fine", "#!/bin/sh\n")
        worker = subprocess.Popen(
            [
                sys.executable,
                ROOT / "worker.py",
                "notifications",
                "--handlers",
                installation.handlers,
            ],
            env=installation.env,
            stderr=full,
        )
    installation.processes.append(worker)
    assert installation.ends_well("notifications", "fine")
    worker.terminate()
    assert worker.wait(10) == 0


@pytest.mark.parametrize("option", ["--timeout", "--grace", "--kill-after", "--backoff", "--crash-backoff", "--idle-exit", "--concurrency",
                                    "--max-attempts"])  # fmt: skip
@pytest.mark.parametrize(
    "number", ["nan", "inf", "-inf", "1e400", "-1", "", "1e9", "9" * 5000, "0x10", "١e"]
)
def test_numbers_that_are_none_are_refused(option, number, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["notifications", f"{option}={number}"])
    said = capsys.readouterr().err
    assert ended.value.code == 64 and said.count("\n") == 1 and option in said, said


def test_a_worker_with_a_wrong_option_ends_before_it_makes_anything(installation):
    done = installation.run("worker.py", "notifications", "--timeout=nan")
    assert done.returncode == 64 and done.stderr.count("\n") == 1 and "--timeout" in done.stderr
    assert not installation.state.exists()


def test_as_process_1_it_leaves_no_zombies(installation):
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*unshare, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root and unshare")
    installation.handler("parent", "#!/bin/sh\n(sleep 0.05; exit 3) &\n")
    count = "#!/bin/sh\ngrep -ls '^State:.Z' /proc/[0-9]*/status | wc -l\n"
    installation.handler("count", count)
    for _ in range(30):
        installation.enqueue("notifications", "parent")
    log = installation.directory / "container.log"
    with open(log, "wb") as file:
        container = subprocess.Popen([*unshare, sys.executable, ROOT / "worker.py", "notifications", "--concurrency", "4",
                                      "--handlers", installation.handlers], env=installation.env, stderr=file)  # fmt: skip
    container.log = log
    installation.processes.append(container)
    wait_for(
        lambda: (
            installation.rows("select count(*) from task_history where task_type = 'parent'")
            == [(30,)]
        )
    )

    def zombies() -> int:
        return int(installation.finished(installation.enqueue("notifications", "count"))["result"])

    wait_for(lambda: zombies() == 0, what="the reaping of what was left to process 1")
    # unshare passes no signals on, and its child is the worker.
    (pid,) = (
        int(word)
        for word in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(container.pid)], capture_output=True
        ).stdout.split()
    )
    os.kill(pid, signal.SIGTERM)
    assert container.wait(10) == 0
    assert "Traceback" not in log.read_text()


STRANGE = {"TASK_DEPTH": "many", "TASK_ID": "x", "PYTHONWARNINGS": "error", "LC_ALL": "C", "LANG": "xx_YY.foo", "TZ": "Nowhere/At all",
           "COLUMNS": "nan", "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1", "PATH": ""}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_an_odd_environment(installation, name):
    installation.handler("fine", "#!/bin/sh\necho well\n")
    worker = installation.worker("notifications", env={name: STRANGE[name]})
    assert (
        installation.finished(installation.enqueue("notifications", "fine"))["result"] == "well\n"
    )
    assert worker.poll() is None


HOSTILE = "\x1b]52;c;ZWNobw==\x07 \x1b]0;title\x07 \x1b[2J \x9b31m \x85 \x00 \u202e \u2028 \x7f \r over \ttab"


def test_no_text_of_a_handler_steers_the_terminal(installation):
    write = f"import sys\nsys.stderr.buffer.write({HOSTILE.encode()!r})\nsys.exit(1)\n"
    installation.handler("hostile", f"#!/usr/bin/env python3\n{write}")
    installation.worker("notifications", "--max-attempts", 1)
    (worker,) = installation.processes
    task = installation.enqueue("notifications", "hostile")
    installation.finished(task)
    wait_for(lambda: task in worker.log.read_text())
    plain(worker.log.read_bytes())


def test_no_text_of_a_task_steers_the_terminal(installation):
    installation.handler("known", "#!/bin/sh\nexit 1\n")
    installation.enqueue("notifications", "known", "--delay", 3600)
    for envelope in (
        {"task_id": HOSTILE, "task_type": "known", "data": {}},
        {"hook_event_name": HOSTILE},
        {"task_id": "w", "task_type": "known", "data": {"workspace_path": HOSTILE}},
    ):
        text = json.dumps(envelope).replace("'", "''")
        installation.sqlite3(f"insert into notifications (data) values ('{text}')")
    worker = installation.worker("notifications", "--max-attempts", 1)
    wait_for(
        lambda: (
            len(installation.rows("select 1 from task_history")) >= 2
            and worker.log.read_text().count("attempt 1") >= 3
        )
    )
    plain(worker.log.read_bytes())


def plain(log: bytes) -> None:
    """Nothing but printable text and newlines."""
    assert [char for char in log.decode() if char != "\n" and not char.isprintable()] == []


def test_one_line_a_message_whatever_is_in_it(installation):
    installation.handler("known", "#!/bin/sh\nprintf 'a\\nb\\rc' >&2\nexit 1\n")
    worker = installation.worker("notifications", "--max-attempts", 1)
    installation.finished(installation.enqueue("notifications", "known", "--task-id", "it"))
    wait_for(lambda: " it " in worker.log.read_text())
    assert all(line[:2] == "20" for line in worker.log.read_text().splitlines())
