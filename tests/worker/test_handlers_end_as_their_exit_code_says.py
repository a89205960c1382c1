import json
import time

from conftest import wait_for


def test_exit_0_is_completed_with_what_was_printed(installation):
    installation.handler("greet", "#!/bin/sh\ncat\necho to stderr >&2\n")
    task = installation.enqueue("notifications", "greet", '{"umlaut": "ä"}')
    installation.worker("notifications", "--drain", ready=False).wait(20)
    done = installation.history(task)
    assert (done["status"], done["exit_code"], done["attempts"], done["log"]) == (
        "completed",
        0,
        1,
        "to stderr\n",
    )
    envelope = json.loads(done["result"])
    assert (
        envelope["data"] == {"umlaut": "ä"}
        and envelope["task_id"] == task
        and envelope["task_type"] == "greet"
    )


def test_exit_75_does_not_count_and_may_say_when(installation):
    installation.handler(
        "later",
        '#!/bin/sh\necho x >>"$HOME/runs"\nrm "$HOME/busy" && echo \'{"retry_after": 0.2}\' && exit 75\nexit 0\n',
    )
    (installation.directory / "busy").touch()
    task = installation.enqueue("notifications", "later")
    installation.worker("notifications", "--max-attempts", 1)
    done = installation.finished(task)
    assert (done["status"], done["attempts"]) == ("completed", 1)
    assert (installation.directory / "runs").read_text() == "x\nx\n"


def test_exit_65_is_a_dead_letter_at_once(installation):
    installation.handler("never", "#!/bin/sh\necho malformed >&2\nexit 65\n")
    task = installation.enqueue("notifications", "never")
    installation.worker("notifications")
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["exit_code"]) == ("failed", 1, 65)
    assert "65" in done["error"] and done["log"] == "malformed\n"


def test_any_other_code_is_tried_again_until_the_attempts_are_spent(installation):
    installation.handler("fail", '#!/bin/sh\necho "attempt $TASK_ATTEMPT" >&2\nexit 3\n')
    task = installation.enqueue("notifications", "fail")
    installation.worker("notifications", "--backoff", 0.05, "--max-attempts", 3)
    done = installation.finished(task)
    assert (done["status"], done["attempts"], done["exit_code"], done["log"]) == (
        "failed",
        3,
        3,
        "attempt 3\n",
    )


def test_a_failing_task_never_delays_the_next(installation):
    installation.handler("fail", "#!/bin/sh\nexit 1\n")
    installation.handler("fine", "#!/bin/sh\n")
    installation.enqueue("notifications", "fail")
    task = installation.enqueue("notifications", "fine")
    began = time.monotonic()
    installation.worker("notifications", "--backoff", 60)
    installation.finished(task)
    assert time.monotonic() - began < 10
    assert installation.rows("select status, attempts from notifications") == [(3, 1)]


def test_a_task_without_a_handler_waits_and_does_not_spin(installation):
    installation.enqueue("notifications", "unknown")
    worker = installation.worker("notifications")
    wait_for(lambda: installation.rows("select 1 from notifications where status = 3"))
    wait_for(lambda: worker.log.read_text().count("no handler 'unknown'") == 1)
    assert installation.rows("select attempts from notifications") == [(1,)]


def test_the_next_task_is_enqueued_with_the_ack(installation):
    installation.handler("sum", "#!/bin/sh\necho '{\"total\": 3}'\n")
    task = installation.enqueue("notifications", "sum")
    installation.worker("notifications", "--then", "completions")
    installation.finished(task)
    (data,) = installation.rows("select data from completions")[0]
    envelope = json.loads(data)
    assert envelope["data"] == {"total": 3} and envelope["task_type"] == "sum"
    assert (
        envelope["source"] == {"queue": "notifications", "task_id": task} and envelope["depth"] == 1
    )


def test_one_command_runs_every_type(installation):
    task = installation.enqueue("approvals", "anything at all")
    installation.start(
        "worker.py", "approvals", "--drain", "--", "sh", "-c", 'echo "$TASK_TYPE"'
    ).wait(20)
    assert installation.history(task)["result"] == "anything at all\n"


def test_a_handler_starts_clean_in_its_workspace(installation, tmp_path):
    workspace = tmp_path / 'It\'s a "test" – ü'
    workspace.mkdir()
    installation.handler(
        "where",
        '#!/bin/sh\npwd\necho "${CLAUDECODE-unset}" "$TASK_QUEUE" "$TASK_ATTEMPT" "$TASK_DEPTH"\n',
    )
    task = installation.enqueue(
        "notifications", "where", json.dumps({"workspace_path": str(workspace)})
    )
    installation.worker("notifications", env={"CLAUDECODE": "1"})
    assert installation.finished(task)["result"] == f"{workspace}\nunset notifications 1 1\n"
