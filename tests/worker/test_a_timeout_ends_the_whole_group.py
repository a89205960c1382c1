import json
import os
import signal
import time

import pytest
from conftest import wait_for
from processes import group_lives, lines, lives

import worker
from taskqueue import environment


def run(installation, handler: str, *options, data: str = "{}", seconds: float = 15) -> dict:
    """The history of a task that one worker ran, with one attempt."""
    installation.handler("it", "#!/bin/sh\n" + handler)
    task = installation.enqueue("notifications", "it", "-", input=data)
    installation.worker("notifications", "--max-attempts", 1, *options)
    return installation.finished(task, seconds)


def test_grandchildren_included(installation):
    done = run(
        installation,
        """
        echo $$ >>"$HOME/pids"
        sh -c 'sleep 100 & echo $! >>"$HOME/pids"; sleep 100 & echo $! >>"$HOME/pids"; wait' &
        echo $! >>"$HOME/pids"
        wait
        """,
        "--timeout",
        0.5,
    )
    assert done["status"] == "failed" and done["error"] == "timed out after 0.5 s (attempt 1 of 1)"
    pids = [int(pid) for pid in lines(installation.directory / "pids")]
    assert len(pids) == 4
    wait_for(
        lambda: not any(map(lives, pids)) and not group_lives(pids[0]), 2, "the end of the group"
    )


def test_with_kill_when_term_is_ignored(installation):
    began = time.monotonic()
    ignores_term = 'trap "" TERM\necho $$ >"$HOME/pids"\nwhile :; do sleep 0.05; done'
    done = run(installation, ignores_term, "--timeout", 0.3, "--kill-after", 0.3)
    assert time.monotonic() - began < 5
    assert done["error"].startswith("timed out after 0.3 s") and done["exit_code"] == 137
    (group,) = map(int, lines(installation.directory / "pids"))
    wait_for(lambda: not group_lives(group), 2, "the end of the group")


def test_a_child_that_ignores_term_does_not_outlive_a_handler_that_does_not(installation):
    run(
        installation,
        'sh -c \'trap "" TERM; echo $$ >"$HOME/pids"; while :; do sleep 0.05; done\' &\nwait',
        "--timeout",
        0.3,
    )
    (child,) = map(int, lines(installation.directory / "pids"))
    wait_for(lambda: not lives(child), 2, "the child's end")


def test_a_timed_out_task_is_tried_again(installation):
    installation.handler("slow", '#!/bin/sh\n[ "$TASK_ATTEMPT" = 2 ] || sleep 100\n')
    task = installation.enqueue("notifications", "slow")
    installation.worker("notifications", "--timeout", 0.4, "--backoff", 0.01)
    assert (installation.finished(task)["status"], installation.finished(task)["attempts"]) == (
        "completed",
        2,
    )


def test_others_go_on_while_one_is_ended(installation):
    installation.handler("ignores_term", "#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.05; done\n")
    installation.handler("fine", "#!/bin/sh\n")
    ignores_term = installation.enqueue("notifications", "ignores_term")
    installation.worker(
        "notifications",
        "--timeout",
        0.2,
        "--kill-after",
        2,
        "--concurrency",
        2,
        "--max-attempts",
        1,
    )
    wait_for(lambda: installation.rows("select 1 from notifications where status = 2"))
    fine = installation.enqueue("notifications", "fine")
    assert installation.finished(fine, 1.5)["status"] == "completed"
    assert installation.history(ignores_term) is None
    assert installation.finished(ignores_term)["exit_code"] == 137


def test_five_megabytes_on_each_stream_are_no_obstacle(installation):
    done = run(installation, "seq 1 700000\nseq 1 700000 >&2\n")
    assert done["status"] == "completed"
    for text in (done["result"], done["log"]):
        assert text.endswith("\n699999\n700000\n") and len(text) == 65536
    (out,) = (installation.state / "logs" / "notifications").glob("*.out")
    # The file is whole, for whoever wants to look.
    assert out.stat().st_size > 4_700_000


def test_a_handler_that_forks_and_exits_is_done(installation):
    began = time.monotonic()
    done = run(installation, 'sleep 100 &\necho $! >"$HOME/pids"\necho done', "--timeout", 60)
    assert (done["status"], done["result"]) == (
        "completed",
        "done\n",
    ) and time.monotonic() - began < 10
    (child,) = map(int, lines(installation.directory / "pids"))
    # What a handler leaves behind on purpose is left alone.
    assert lives(child)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "own, workers, env",
    [("0.3", "60", {}), ("60", "0.3", {}), ("0.3", None, {}), (None, None, {"TASK_QUEUE_TIMEOUT": "0.3"})],
)  # fmt: skip
def test_the_shorter_timeout_counts_and_a_task_has_its_own_attempts(
    installation, own, workers, env
):
    installation.handler("sleeps", "#!/bin/sh\nexec sleep 60\n")
    terms = ["--timeout", own] if own else []
    installation.enqueue("notifications", "sleeps", "--task-id", "t", "--max-attempts", 2, *terms)
    options = ["--timeout", workers] if workers else []
    options += ["--backoff", 0.01, "--max-attempts", 1]
    installation.worker("notifications", *options, env=env)
    found = installation.finished("t")
    assert (found["error"], found["attempts"]) == ("timed out after 0.3 s (attempt 2 of 2)", 2)


def test_workers_of_hooks_end_an_attempt_after_six_hours(installation, monkeypatch, capfd):
    file = installation.directory / "environment"
    assert environment.of_worker(file)["TASK_QUEUE_TIMEOUT"] == "6h"
    file.write_text("TASK_QUEUE_TIMEOUT=90m\n")
    file.chmod(0o600)
    monkeypatch.setattr(os, "environ", environment.of_worker(file))
    assert worker.default_timeout() == 90 * 60
    monkeypatch.setattr(os, "environ", {"TASK_QUEUE_TIMEOUT": "soon"})
    assert worker.default_timeout() == 6 * 3600 and "soon" in capfd.readouterr().err


MEBIBYTE = json.dumps({"text": "ä" * 2**19})


@pytest.mark.parametrize(
    "handler, options, data, expected",
    [
        # It was not done in time, whatever it says.
        ("trap 'echo tidied up; exit 0' TERM\nwhile :; do sleep 0.05; done", ["--timeout", 0.3], "{}",
         {"status": "failed", "result": "tidied up\n", "error": "timed out after 0.3 s (attempt 1 of 1)"}),
        ("kill -STOP $$", ["--timeout", 0.3, "--kill-after", 0.2], "{}",
         {"exit_code": 137, "error": "timed out after 0.3 s (attempt 1 of 1)"}),
        # A month has more milliseconds than a C int holds.
        ("sleep 0.3", ["--timeout", "30d"], "{}", {"status": "completed", "attempts": 1}),
        ("exit 0", [], MEBIBYTE, {"status": "completed"}),
        ("[ $(wc -c) -gt 524288 ]", [], MEBIBYTE, {"status": "completed"}),
        ("exec <&- >&- 2>&-\nsleep 0.3\nexit 3", [], "{}",
         {"status": "failed", "exit_code": 3, "result": "", "log": ""}),
        (r"printf '\377ok\000\n'; printf '\303' >&2", [], "{}",
         {"status": "completed", "result": "\ufffdok\ufffd\n", "log": "\ufffd"}),
    ],
    ids=["time to tidy up", "stopped", "a month", "payload unread", "payload read", "closed streams", "no text"],
)  # fmt: skip
def test_its_end_is_recorded(installation, handler, options, data, expected):
    assert run(installation, handler, *options, data=data).items() >= expected.items()


def test_output_that_is_not_text_may_become_a_task(installation):
    run(installation, r"printf '\377ok\n'", "--then", "completions")
    ((data,),) = installation.rows("select data from completions")
    assert json.loads(data)["data"] == {"result": "\ufffdok\n"}


def test_a_result_nested_too_deep_for_the_database_does_not_stop_the_worker(installation):
    handler = (
        "printf '%s' '{\"a\": '; i=0; while [ $i -lt 1500 ]; do printf '['; i=$((i+1)); done\n"
    )
    handler += "printf 1; i=0; while [ $i -lt 1500 ]; do printf ']'; i=$((i+1)); done; echo '}'"
    run(installation, handler, "--then", "completions")
    installation.handler("next", "#!/bin/sh\n")
    assert installation.ends_well("notifications", "next")


def test_a_long_task_id_may_have_a_next_task(installation):
    installation.handler("it", "#!/bin/sh\necho '{}'\n")
    # These are 500 bytes, all that is allowed.
    task = installation.enqueue("notifications", "it", "--task-id", "é" * 250)
    installation.worker("notifications", "--then", "completions")
    done = installation.finished(task)
    assert (done["status"], done["error"]) == ("completed", None)


def test_whatever_name_a_shell_gave_its_task_the_worker_lives(installation):
    """A plain INSERT is checked for being an object, and for nothing else."""
    worker = installation.worker("notifications", "--max-attempts", 1)
    names = [
        "x" * 300,
        "x" * 5000,
        "a/b",
        "../up",
        ".",
        "..",
        "",
        " ",
        "-x",
        "nul\u0000nul",
        "line\nline",
        "\ud800",
        "ä" * 200,
    ]
    for name in names:
        installation.sqlite3(
            f"insert into notifications (data) values ('{json.dumps({'hook_event_name': name})}')"
        )
        envelope = {"task_id": name or "empty", "task_type": "known", "data": {}}
        installation.sqlite3(f"insert into notifications (data) values ('{json.dumps(envelope)}')")
    installation.handler("known", "#!/bin/sh\n")
    task = installation.enqueue("notifications", "known")
    wait_for(
        lambda: installation.history(task) or worker.poll() is not None,
        what="the end of the last task, or of the worker",
    )
    assert worker.poll() is None, worker.log.read_text()


def test_a_task_whose_id_no_process_can_be_given_ends_as_a_dead_letter(installation):
    # execve takes 128 KiB a string.
    envelope = json.dumps({"task_id": "x" * 200_000, "task_type": "known", "data": {}})
    installation.handler("known", "#!/bin/sh\n")
    # This makes the table.
    installation.enqueue("notifications", "known")
    (installation.directory / "payload").write_text(envelope)
    with open(installation.directory / "payload") as stdin:
        installation.sqlite3(
            "insert into notifications (data) values (cast(readfile('/dev/stdin') as text))",
            stdin=stdin,
        )
    installation.worker("notifications", "--max-attempts", 1)
    wait_for(
        lambda: installation.rows("select 1 from task_history where status = 'failed'"),
        what="a dead letter",
    )


NO_WORKSPACES = ["", "/nowhere", "nul\0", "\ud800", "x" * 5000, 3, False, ["/"], {}, "/etc/passwd"]


def test_a_workspace_that_is_none_is_a_failed_attempt_that_says_so(installation):
    installation.handler("it", '#!/bin/sh\npwd >>"$HOME/runs"\n')
    tasks = [
        installation.enqueue("notifications", "it", "-", input=json.dumps({"workspace_path": path}))
        for path in NO_WORKSPACES
    ]
    # Without one, the worker's directory is taken.
    for data in ("{}", '{"workspace_path": null}'):
        installation.enqueue("notifications", "it", data)
    installation.drain("notifications --max-attempts 1")
    for task in tasks:
        done = installation.history(task)
        assert (done["status"], done["attempts"]) == ("failed", 1), done
        assert "cannot run in " in done["error"], done
    assert installation.lines() == [os.getcwd()] * 2


def test_a_workspace_that_is_gone_is_tried_again(installation):
    workspace = installation.directory / "workspace"
    installation.handler("it", "#!/bin/sh\npwd\n")
    task = installation.enqueue(
        "notifications", "it", "-", input=json.dumps({"workspace_path": str(workspace)})
    )
    installation.worker("notifications", "--backoff", 0.05, "--max-attempts", 100)
    wait_for(lambda: installation.rows("select 1 from notifications where attempts > 1"))
    assert str(workspace) in installation.rows("select error from notifications")[0][0]
    workspace.mkdir()
    assert installation.finished(task)["result"] == f"{workspace}\n"
