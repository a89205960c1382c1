import json
import os
import signal
from pathlib import Path

import pytest
from conftest import wait_for, wait_for_word
from processes import WAIT, children, lives, stays_true

pytestmark = pytest.mark.core

# What each handler does before it waits; its exit code; options of its task; how the task stands
# when its orphan has ended: status, attempts, exit code, a part of its error.
ORPHANS = {
    "fine": ("", 0, "", ("completed", 1, 0, None)),
    "fails": ("", 3, "", ("scheduled", 1, None, "exit 3: log")),
    "not_now": ("", 75, "", ("scheduled", 0, None, "not now (exit 75)")),
    "refuses": ("", 65, "", ("failed", 1, 65, "refused by its handler (exit 65): log")),
    "fails_last": ("", 3, "--max-attempts 1", ("failed", 1, 3, "exit 3: log (attempt 1 of 1)")),
    "is_killed": ("", 0, "--max-attempts 1", ("failed", 1, 137, "its handler was killed by SIGKILL")),
    "leaves_a_daemon": ("sleep 60 >/dev/null 2>&1 </dev/null &", 0, "", ("completed", 1, 0, None)),
    # What the supervisor wrote down about the handler's end is the truth, whoever has its stdout.
    "its_daemon_holds_the_output": ("sleep 60 &", 0, "", ("completed", 1, 0, None)),
    "closes_its_output": ("exec >&- 2>&-", 0, "", ("completed", 1, 0, None)),
}  # fmt: skip
HANDLER = """#!/bin/sh
{first}
echo "$TASK_TYPE $$ $!" >>"$HOME/runs"
until [ -e "$HOME/go" ]; do sleep 0.02; echo x >&2; done
echo '{{"total": 3}}'
echo log >&2
exit {code}
"""


@pytest.fixture
def orphan(installation):
    """Leave a handler that runs, and whose worker was killed; return its task's id and its pid."""

    def make(*options):
        installation.handler("wait", WAIT)
        task = installation.enqueue("notifications", "wait")
        worker = installation.worker("notifications", *options)
        (pid,) = wait_for(installation.lines)
        worker.kill()
        worker.wait()
        return task, int(pid)

    yield make
    installation.let_go()
    wait_for(lambda: not any(map(lives, map(int, installation.lines()))), what="the handler's end")


def records(installation) -> list[Path]:
    """Return the files about runs."""
    return list((installation.state / "runs").glob("*/*"))


def test_an_orphan_keeps_its_task_and_is_then_treated_as_any_handler(installation):
    for name, (first, code, options, _) in ORPHANS.items():
        installation.handler(name, HANDLER.format(first=first, code=code))
        installation.add(f"notifications {name} --task-id {name} {options}")
    most = len(ORPHANS)
    options = ("--concurrency", most, "--then", "completions", "--backoff", 3600)
    worker = installation.worker("notifications", *options)
    runs = wait_for(lambda: len(found := installation.lines()) == most and found)
    worker.kill()
    worker.wait()
    pids = {line.split()[0]: int(line.split()[1]) for line in runs}
    daemons = [int(line.split()[2]) for line in runs if len(line.split()) == 3]
    # The terms of the run, like --then, are kept with the task: this worker knows of none.
    survivor = installation.worker("notifications")
    claimed = [(2, 1)] * most
    assert stays_true(
        lambda: (
            installation.rows("select status, attempts from notifications") == claimed
            and all(map(lives, pids.values()))
        ),
        1.5,
    )
    os.kill(pids["is_killed"], signal.SIGKILL)
    installation.let_go()
    running = "select 1 from notifications where status = 2"
    wait_for(lambda: not installation.rows(running), what="the record of all ends")
    statuses = installation.statuses()
    rows = "select task_id, attempts, exit_code, error from task_history"
    rows += " union select task_id, attempts, null, error from notifications"
    stand = {row[0]: (statuses[row[0]], *row[1:]) for row in installation.rows(rows)}
    for name, (*_, expected) in ORPHANS.items():
        assert stand[name][:3] == expected[:3], (name, stand[name])
        assert (expected[3] or "") in (stand[name][3] or ""), (name, stand[name])
        assert (stand[name][3] is None) == (expected[3] is None), (name, stand[name])
    delays = dict(installation.rows("select task_id, due_at - unixepoch() from notifications"))
    assert 1000 < delays["fails"] <= 3600 and 50 < delays["not_now"] <= 61
    done = installation.history("fine")
    assert done["result"] == '{"total": 3}\n' and done["log"].startswith("x\n")
    results = [json.loads(data) for (data,) in installation.rows("select data from completions")]
    [of_fine] = [each for each in results if each["source"]["task_id"] == "fine"]
    assert of_fine["data"] == {"total": 3} and len(results) == 4
    assert len(installation.lines()) == most and all(map(lives, daemons)) and len(daemons) == 2
    wait_for(lambda: not records(installation), 2, "the end of the records")
    wait_for_word(survivor, "its handler ended without its worker")
    for daemon in daemons:
        os.kill(daemon, signal.SIGKILL)


def test_any_process_may_recover(installation, queue, orphan):
    task, pid = orphan()
    assert queue.recover() == ([], 1) and lives(pid)
    installation.let_go()
    ((found, outcome),) = wait_for(lambda: queue.recover()[0])
    assert (found.task_id, outcome.status, outcome.error) == (task, "completed", None)
    assert installation.history(task)["status"] == "completed" and not records(installation)
    assert queue.recover() == ([], 0)


@pytest.mark.parametrize("option", ["--idle-exit=0.5", "--drain"])
def test_a_worker_does_not_leave_while_an_orphan_runs(installation, orphan, option):
    task, pid = orphan()
    worker = installation.worker("notifications", option)
    assert stays_true(lambda: worker.poll() is None and lives(pid), 1.5), (
        "it left, and nobody will record how the handler ends"
    )
    installation.let_go()
    # Its end is found within a second.
    assert installation.finished(task, 1)["status"] == "completed"
    assert worker.wait(10) == 0


def test_an_exit_status_outlives_a_failed_attempt_to_record_it(installation, queue, monkeypatch):
    """Recording the second of two orphans fails at first, as on a full disk: all is rolled back."""
    from taskqueue import outcome as queue_outcome

    installation.handler("wait", WAIT)
    tasks = [installation.enqueue("notifications", "wait") for _ in range(2)]
    worker = installation.worker("notifications", "--concurrency", 2)
    pids = wait_for(lambda: len(found := installation.lines()) == 2 and found)
    worker.kill()
    worker.wait()
    installation.let_go()
    wait_for(lambda: not any(lives(int(pid)) for pid in pids))
    record = queue_outcome.record

    def disk_is_full(conn, task, *args, **options):
        if task.task_id == tasks[1]:
            raise queue.QueueUnavailable("the disk is full")
        return record(conn, task, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(queue_outcome, "record", disk_is_full)
        with pytest.raises(queue.QueueUnavailable, match="the disk is full"):
            queue.recover()
    assert [installation.history(task) for task in tasks] == [None, None]
    queue.recover()
    assert [installation.finished(task)["status"] for task in tasks] == ["completed"] * 2


NOT_NOW_FIRST = """#!/bin/sh
echo "$$" >>"$HOME/runs"
[ $(wc -l <"$HOME/runs") = 1 ] && echo '{"retry_after": 0.05}' && exit 75
"""


def test_of_two_runs_that_are_one_attempt_the_last_one_counts(installation):
    """Exit 75 does not count, so the same worker runs the same attempt again."""
    installation.handler("wait", NOT_NOW_FIRST + 'until [ -e "$HOME/go" ]; do sleep 0.02; done\n')
    task = installation.enqueue("notifications", "wait")
    worker = installation.worker("notifications")
    pids = wait_for(lambda: len(found := installation.lines()) == 2 and found)
    worker.kill()
    worker.wait()
    installation.let_go()
    wait_for(lambda: not lives(int(pids[1])), what="the handler's end")
    installation.worker("notifications")
    done = installation.finished(task)
    assert (done["status"], done["exit_code"], len(installation.lines())) == ("completed", 0, 2)


def test_a_run_that_left_no_status_does_not_get_an_earlier_ones(installation):
    installation.handler("wait", NOT_NOW_FIRST + "kill -9 $(ps -o ppid= -p $PPID) $PPID\n")
    task = installation.enqueue("notifications", "wait")
    assert installation.worker("notifications", "--max-attempts", 1).wait(10) == -signal.SIGKILL
    assert len(installation.lines()) == 2
    installation.worker("notifications", "--max-attempts", 1)
    done = installation.finished(task, 5)
    assert done["status"] == "failed" and "its worker died" in done["error"]


@pytest.mark.parametrize("after, status, error", [
    ("the timeout", "failed", "timed out after 1 s"),
    ("a stop", "pending", None),
    ("a cancellation", "cancelled", "cancelled while it ran"),
])  # fmt: skip
def test_a_supervisor_keeps_the_word_of_a_worker_that_has_died(installation, after, status, error):
    deaf = (
        """trap 'echo >>"$HOME/terms"' TERM\necho $$ >>"$HOME/runs"\nwhile :; do sleep 0.02; done"""
    )
    installation.handler("deaf", f"#!/bin/sh\n{deaf}\n")
    task = installation.enqueue("notifications", "deaf")
    options = ("--timeout", 1 if after == "the timeout" else 100, "--kill-after", 0.5)
    worker = installation.worker("notifications", *options, "--grace", 0, "--max-attempts", 1)
    (pid,) = wait_for(installation.lines)
    if after == "a stop":
        worker.terminate()
    elif after == "a cancellation":
        installation.sqlite3("update notifications set cancel_requested = 1")
    if after != "the timeout":
        wait_for(lambda: installation.lines("terms"))
    worker.kill()
    worker.wait()
    wait_for(lambda: not lives(int(pid)), 5, "the handler's end")
    # It takes back what a dead worker had, and runs nothing.
    installation.run("cleanup.py")
    assert installation.statuses() == {task: status}
    if error:
        done = installation.history(task)
        assert done["exit_code"] == 137 and done["error"].startswith(error)
    else:
        assert installation.rows("select attempts from notifications") == [(0,)]


def test_a_handler_holds_no_descriptors_but_its_own(installation):
    installation.handler("look", "#!/bin/sh\nls /proc/self/fd /proc/$$/fd\n")
    task = installation.enqueue("notifications", "look")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    installation.worker("notifications", pass_fds=(write,))
    os.close(write)
    # Descriptor 3 is the one of ls, or of sh's script.
    assert set(installation.finished(task)["result"].split()) & set("0123456789") <= set("0123")
    os.close(read)


def test_a_supervisor_leaves_with_its_worker(installation):
    worker = installation.worker("notifications", "--concurrency", 4)
    of_it = children(worker.pid)
    assert of_it and all(map(lives, of_it))
    worker.kill()
    wait_for(lambda: not any(map(lives, of_it)), 5, "the supervisors' end")
