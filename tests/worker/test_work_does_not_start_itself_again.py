import json
import sys

import pytest
from conftest import ROOT, wait_for
from processes import lines

ENQUEUE = f'"{sys.executable}" "{ROOT}/enqueue.py"'
STOP = json.dumps({"hook_event_name": "Stop", "session_id": "s", "cwd": "/"})


def depths(installation, queue="notifications") -> list:
    return [
        json.loads(data).get("depth", 0)
        for (data,) in installation.rows(f'select data from "{queue}" order by id')
    ]


def inside(installation, command: str) -> tuple[int, dict]:
    """Run a command inside a handler; its exit status, and the handler's history."""
    installation.handler("it", f'#!/bin/sh\n{command} </dev/null; echo $? >"$HOME/status"\n')
    task = installation.enqueue("approvals", "it")
    installation.worker("approvals")
    done = installation.finished(task)
    return int((installation.directory / "status").read_text()), done


def test_a_hook_inside_a_handler_enqueues_nothing_and_succeeds(installation):
    status, done = inside(
        installation, f"echo '{STOP}' | {ENQUEUE} --hook notifications link_validation 2>&1"
    )
    assert (status, done["result"]) == (0, "") and installation.rows(
        "select * from notifications"
    ) == []
    assert not (installation.state / "spool" / "notifications").exists()


def test_a_hook_that_is_told_to_does(installation):
    command = f"(echo '{STOP}' | {ENQUEUE} --hook --nested notifications link_validation)"
    assert inside(installation, command)[0] == 0
    assert depths(installation) == [1]


def test_a_plain_enqueue_inside_a_handler_carries_the_depth(installation):
    assert inside(installation, f"{ENQUEUE} notifications next")[0] == 0
    assert depths(installation) == [1]


def test_python_inside_a_handler_carries_the_depth(installation):
    code = "import queue_helpers as q; q.enqueue_task('notifications', 'next', {})"
    assert inside(installation, f'PYTHONPATH="{ROOT}" "{sys.executable}" -c "{code}"')[0] == 0
    assert depths(installation) == [1]


def test_a_chain_of_handlers_ends_at_depth_16(installation):
    record = 'echo "$TASK_DEPTH $code" >>"$HOME/runs"'
    installation.handler(
        "again", f"#!/bin/sh\n{ENQUEUE} notifications again; code=$?\n{record}\nexit $code\n"
    )
    installation.enqueue("notifications", "again")
    installation.worker("notifications")
    wait_for(
        lambda: installation.rows("select 1 from task_history where status = 'failed'"),
        20,
        "the end of the chain",
    )
    assert lines(installation.directory / "runs") == [
        f"{depth} {65 if depth > 16 else 0}" for depth in range(1, 18)
    ]
    ((error, log),) = installation.rows(
        "select error, log from task_history where status = 'failed'"
    )
    assert "exit 65" in error and "16 deep" in log
    assert installation.rows("select * from notifications") == []


def test_a_chain_of_results_ends_at_depth_16(installation):
    installation.handler("again", '#!/bin/sh\necho "$TASK_DEPTH" >>"$HOME/runs"\necho "{}"\n')
    task = installation.enqueue("notifications", "again")
    worker = installation.worker("notifications", "--then", "notifications")
    wait_for(
        lambda: installation.rows("select 1 from task_history where status = 'failed'"),
        20,
        "the end of the chain",
    )
    assert lines(installation.directory / "runs") == [str(depth) for depth in range(1, 18)]
    ((error,),) = installation.rows("select error from task_history where status = 'failed'")
    assert "16 deep" in error and installation.history(task)["status"] == "completed"
    assert installation.rows("select * from notifications") == [] and worker.poll() is None


@pytest.mark.parametrize("how", [[], ["--hook", "--nested"]])
def test_deeper_is_refused_with_65(installation, how):
    done = installation.run(
        "enqueue.py",
        *how,
        "notifications",
        "any",
        input=STOP if how else None,
        env={"TASK_DEPTH": "17"},
    )
    assert (
        (done.returncode, done.stdout) == (65, "")
        and "16 deep" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert (
        installation.run("enqueue.py", "notifications", "any", env={"TASK_DEPTH": "16"}).returncode
        == 0
    )


@pytest.mark.parametrize("depth", ['"3"', "-5", "1.5", "true", "null", "[1]", "9" * 3000, "1e999"])
def test_a_depth_that_is_none_does_no_harm(installation, depth):
    installation.handler("it", '#!/bin/sh\necho "$TASK_DEPTH"\n')
    # This makes the table.
    installation.enqueue("notifications", "it")
    installation.sqlite3(
        "insert into notifications (data) values "
        f"""('{{"task_id": "odd", "task_type": "it", "depth": {depth}, "data": {{}}}}')"""
    )
    worker = installation.worker("notifications", "--then", "completions")
    done = installation.finished("odd")
    assert worker.poll() is None, worker.log.read_text()
    # JSON readers cannot read a number that is so long or so large.
    if len(depth) < 100 and depth != "1e999":
        assert done["status"] == "completed" and int(done["result"]) >= 1, (
            "a hook inside would take itself for one outside"
        )
