"""tasks.py logs: the output of the last attempt, or, with -f, of the running one as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import ROOT, wait_for


def follow(installation, task_id: str) -> subprocess.Popen:
    """tasks.py logs -f, its stdout and stderr in files."""
    out, err = installation.directory / "follow.out", installation.directory / "follow.err"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tasks.py", "logs", "-f", task_id],
            env=installation.env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    process.out, process.err = out, err
    installation.processes.append(process)
    return process


def test_stdout_goes_to_stdout_and_stderr_to_stderr_byte_by_byte(installation):
    installation.handler("bytes", "#!/bin/sh\nprintf 'a\\000\\377\\033[31m\\n'; echo problem >&2\n")
    installation.enqueue("approvals", "bytes", "{}", "--task-id", "b-1")
    installation.run("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
    done = subprocess.run(
        [sys.executable, ROOT / "tasks.py", "logs", "b-1"],
        check=False,
        env=installation.env,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\0\xff\x1b[31m\n", b"problem\n")
    done = installation.run("tasks.py", "logs", "b-1", "--json")
    told = json.loads(done.stdout)
    assert (told["status"], told["attempt"], told["stderr"]) == (
        "completed",
        1,
        "problem\n",
    ) and told["stdout"].endswith("[31m\n")


def test_output_that_is_longer_than_the_history_keeps_is_whole(installation):
    installation.handler("long", "#!/bin/sh\nseq 1 100000\n")
    installation.enqueue("approvals", "long", "{}", "--task-id", "l-1")
    installation.run("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
    assert installation.run("tasks.py", "logs", "l-1").stdout == "".join(
        f"{n}\n" for n in range(1, 100001)
    )


def test_what_the_history_kept_is_shown_when_the_files_are_pruned(installation):
    installation.handler("short", "#!/bin/sh\necho kept; echo too >&2\n")
    installation.enqueue("approvals", "short", "{}", "--task-id", "s-1")
    installation.run("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
    for path in (installation.state / "logs" / "approvals").iterdir():
        path.unlink()
    done = installation.run("tasks.py", "logs", "s-1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "too\n")


def test_the_last_attempt_is_shown(installation):
    installation.handler(
        "again", "#!/bin/sh\necho attempt $TASK_ATTEMPT; exit $((TASK_ATTEMPT < 3))\n"
    )
    installation.enqueue("approvals", "again", "{}", "--task-id", "a-1")
    installation.worker("approvals", "--backoff", "0.01")
    installation.finished("a-1")
    assert installation.run("tasks.py", "logs", "a-1").stdout == "attempt 3\n"


def test_a_task_that_has_not_run_says_so(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "n-1")
    done = installation.run("tasks.py", "logs", "n-1")
    assert done.returncode == 1 and done.stdout == "" and "has not run yet (pending)" in done.stderr


def test_following_starts_before_the_task_does_and_ends_with_it(installation):
    gate = installation.directory / "gate"
    os.mkfifo(gate)
    installation.handler(
        "gated", f"#!/bin/sh\necho begun; echo warned >&2; read line < '{gate}'; echo $line\n"
    )
    installation.enqueue("approvals", "gated", "{}", "--task-id", "f-1")
    process = follow(installation, "f-1")
    wait_for(lambda: "has not run yet" in process.err.read_text())
    installation.worker("approvals")
    wait_for(lambda: process.out.read_text() == "begun\n" and "warned" in process.err.read_text())
    assert process.poll() is None
    gate.write_text("the last line\n")
    assert process.wait(10) == 0
    assert process.out.read_text() == "begun\nthe last line\n"


def test_following_goes_on_with_the_next_attempt_even_one_that_did_not_count(installation):
    gate = installation.directory / "gate"
    os.mkfifo(gate)
    later = "[ $code != 75 ] || echo '{\"retry_after\": 0.01}'"
    installation.handler(
        "gated",
        f"#!/bin/sh\necho begun; read code < '{gate}'; echo code $code of $TASK_ATTEMPT\n{later}; exit $code\n",
    )
    installation.enqueue("approvals", "gated", "{}", "--task-id", "f-1")
    installation.worker("approvals", "--backoff", "0.01")
    process = follow(installation, "f-1")
    shown = ""
    for code, attempt in ((75, 1), (1, 1), (75, 2), (0, 2)):
        shown += "begun\n"
        wait_for(lambda shown=shown: process.out.read_text() == shown, what=repr(shown))
        gate.write_text(f"{code}\n")
        shown += f"code {code} of {attempt}\n" + ('{"retry_after": 0.01}\n' if code == 75 else "")
    assert process.wait(10) == 0
    assert process.out.read_text() == shown


def test_a_reader_that_goes_away_ends_it_quietly(installation):
    installation.handler("long", "#!/bin/sh\nseq 1 200000\n")
    installation.enqueue("approvals", "long", "{}", "--task-id", "l-1")
    installation.run("worker.py", "approvals", "--handlers", installation.handlers, "--drain")
    done = subprocess.run(["bash", "-c", '"$@" | head -1; echo ${PIPESTATUS[0]}', "bash", sys.executable, ROOT / "tasks.py", "logs", "l-1"], check=False,
                          env=installation.env, capture_output=True, text=True)  # fmt: skip
    assert (done.stdout, done.stderr) == ("1\n0\n", "")


def test_an_earlier_attempt_is_shown(installation):
    installation.handler("t", "#!/bin/sh\necho try $TASK_ATTEMPT\n[ $TASK_ATTEMPT = 3 ]\n")
    installation.enqueue("approvals", "t", "{}", "--task-id", "a")
    installation.worker("approvals", "--backoff", "0.01")
    assert installation.finished("a")["status"] == "completed"
    for args, said in (([], "try 3\n"), (["--attempt", "1"], "try 1\n"), (["--attempt", "3"], "try 3\n")):  # fmt: skip
        assert installation.run("tasks.py", "logs", "a", *args).stdout == said
    told = json.loads(installation.run("tasks.py", "logs", "a", "--attempt", "2", "--json").stdout)
    assert (told["attempt"], told["stdout"]) == (2, "try 2\n")
    done = installation.run("tasks.py", "logs", "a", "--attempt", "4")
    assert done.returncode == 1 and "no output of attempt 4 of task a is there" in done.stderr
