import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import wait_for
from processes import children, lines, lives, stays_true

pytestmark = pytest.mark.core

WAIT = """#!/bin/sh
echo "$$" >>"$HOME/runs"
until [ -e "$HOME/go" ]; do sleep 0.02; done
echo '{"total": 3}'
echo log >&2
exit $(cat "$HOME/go")
"""


@pytest.fixture
def orphan(installation):
    """A handler that runs, and whose worker has been killed; its task's id and its pid."""

    def make(*options, handler=WAIT):
        installation.handler("wait", handler)
        task = installation.enqueue("notifications", "wait")
        worker = installation.worker("notifications", *options)
        (pid,) = wait_for(lambda: lines(installation.directory / "runs"))
        worker.kill()
        worker.wait()
        return task, int(pid)

    yield make
    installation.directory.joinpath("go").write_text("0\n")
    wait_for(
        lambda: not any(map(lives, map(int, lines(installation.directory / "runs")))),
        what="the handler's end",
    )


def let_it_end(installation, exit_code: int) -> None:
    (installation.directory / "go.new").write_text(f"{exit_code}\n")
    (installation.directory / "go.new").rename(installation.directory / "go")


def records(installation) -> list[Path]:
    """What is on record about runs."""
    return list((installation.state / "runs").glob("*/*"))


def test_a_task_is_left_alone_while_its_orphan_runs_and_recorded_as_done_when_that_was_well(
    installation, orphan
):
    task, pid = orphan("--then", "completions")
    # What to do next is kept with the task: this worker knows of no --then.
    survivor = installation.worker("notifications")
    claimed = [(2, 1)]
    assert stays_true(
        lambda: (
            installation.rows("select status, attempts from notifications") == claimed
            and lives(pid)
        ),
        1.5,
    )
    let_it_end(installation, 0)
    done = installation.finished(task)
    assert done == {
        "status": "completed",
        "attempts": 1,
        "exit_code": 0,
        "result": '{"total": 3}\n',
        "log": "log\n",
        "error": None,
    }
    ((data,),) = installation.rows("select data from completions")
    envelope = json.loads(data)
    assert envelope["data"] == {"total": 3} and envelope["source"]["task_id"] == task
    assert len(lines(installation.directory / "runs")) == 1
    wait_for(lambda: not records(installation), 2, "the end of the record")
    wait_for(lambda: "its handler ended without its worker" in survivor.log.read_text(), 2)


@pytest.mark.parametrize(
    "exit_code, attempts, error, delay",
    [
        (3, 1, "exit 3: log", (1000, 3600)),
        (75, 0, "not now (exit 75)", (50, 61)),
    ],
)
def test_an_orphan_that_ends_otherwise_is_treated_as_any_handler(
    installation, orphan, exit_code, attempts, error, delay
):
    orphan("--backoff", 3600)
    installation.worker("notifications")
    let_it_end(installation, exit_code)
    wait_for(
        lambda: installation.rows("select 1 from notifications where status <> 2"),
        what="the orphan's record",
    )
    assert installation.rows("select status, attempts, error, owner from notifications") == [
        (3, attempts, error, None)
    ]
    ((seconds,),) = installation.rows("select due_at - unixepoch() from notifications")
    assert delay[0] < seconds <= delay[1]
    wait_for(lambda: not records(installation), 2, "the end of the record")


@pytest.mark.parametrize(
    "exit_code, error",
    [(65, "refused by its handler (exit 65): log"), (3, "exit 3: log (attempt 1 of 1)")],
)
def test_an_orphan_may_be_its_tasks_last_attempt(installation, orphan, exit_code, error):
    task, _ = orphan("--max-attempts", 1)
    installation.worker("notifications")
    let_it_end(installation, exit_code)
    done = installation.finished(task)
    assert (done["status"], done["exit_code"], done["error"]) == ("failed", exit_code, error)
    assert len(lines(installation.directory / "runs")) == 1


def test_an_orphan_that_is_killed_is_a_failed_attempt(installation, orphan):
    task, pid = orphan("--max-attempts", 1)
    installation.worker("notifications")
    os.kill(pid, signal.SIGKILL)
    done = installation.finished(task)
    assert (done["status"], done["exit_code"]) == (
        "failed",
        137,
    ) and "its handler was killed by SIGKILL" in done["error"]


def test_any_process_may_recover(installation, queue, orphan):
    task, pid = orphan()
    assert queue.recover() == ([], 1) and lives(pid)
    let_it_end(installation, 0)
    ((found, outcome),) = wait_for(lambda: queue.recover()[0])
    assert (found.task_id, outcome.status, outcome.error) == (task, "completed", None)
    assert installation.history(task)["status"] == "completed" and not records(installation)
    assert queue.recover() == ([], 0)


def test_a_daemon_that_redirects_its_output_holds_nothing(installation, orphan):
    task, _ = orphan(
        handler=WAIT.replace(
            "until", 'sleep 60 >/dev/null 2>&1 </dev/null &\necho $! >"$HOME/daemon"\nuntil', 1
        )
    )
    installation.worker("notifications")
    daemon = int((installation.directory / "daemon").read_text())
    let_it_end(installation, 0)
    assert installation.finished(task)["status"] == "completed" and lives(daemon)
    os.kill(daemon, signal.SIGKILL)


def test_a_daemon_that_holds_the_output_does_not_hold_the_task_of_a_handler_that_has_ended(
    installation, orphan
):
    """What the supervisor wrote down about the handler's end is the truth, whoever has its stdout."""
    task, pid = orphan(
        handler=WAIT.replace("until", 'sleep 60 &\necho $! >"$HOME/daemon"\nuntil', 1)
    )
    installation.worker("notifications")
    daemon = int((installation.directory / "daemon").read_text())
    let_it_end(installation, 0)
    assert installation.finished(task)["status"] == "completed" and lives(daemon)
    assert len(lines(installation.directory / "runs")) == 1
    os.kill(daemon, signal.SIGKILL)


def test_a_handler_that_closes_its_output_still_holds_its_task(installation, orphan):
    task, pid = orphan(
        handler=WAIT.replace("until", "exec >&- 2>&-\nuntil", 1).replace(
            "echo '{", "exec >/dev/null 2>&1\necho '{"
        )
    )
    installation.worker("notifications")
    assert stays_true(
        lambda: installation.rows("select status from notifications") == [(2,)] and lives(pid), 1
    )
    let_it_end(installation, 0)
    assert installation.finished(task)["status"] == "completed"
    assert len(lines(installation.directory / "runs")) == 1


def test_a_handler_does_not_die_of_its_workers_death(installation, orphan):
    chatty = WAIT.replace("sleep 0.02", "echo x; echo y >&2; sleep 0.02")
    _, pid = orphan(handler=chatty)
    assert stays_true(lambda: lives(pid), 0.5)
    (out,) = (installation.state / "logs" / "notifications").glob("*.out")
    size = out.stat().st_size
    wait_for(lambda: out.stat().st_size > size, what="more output")


def test_a_worker_does_not_leave_while_an_orphan_runs(installation, orphan):
    task, pid = orphan()
    worker = installation.worker("notifications", "--idle-exit", 0.5)
    assert stays_true(lambda: worker.poll() is None and lives(pid), 2), (
        "it left, and nobody will record how the handler ends"
    )
    let_it_end(installation, 0)
    assert worker.wait(10) == 0
    assert installation.history(task)["status"] == "completed"


def test_draining_waits_for_an_orphan(installation, orphan):
    task, pid = orphan()
    worker = installation.worker("notifications", "--drain")
    assert stays_true(lambda: worker.poll() is None and lives(pid), 1)
    let_it_end(installation, 0)
    assert worker.wait(10) == 0
    assert installation.history(task)["status"] == "completed"


def test_an_exit_status_outlives_a_failed_attempt_to_record_it(installation, queue, monkeypatch):
    """Two orphans of one worker; recording the second fails at first, as on a full disk: all of it
    is rolled back.
    """
    from taskqueue import outcome as queue_outcome

    installation.handler("wait", WAIT)
    tasks = [installation.enqueue("notifications", "wait") for _ in range(2)]
    worker = installation.worker("notifications", "--concurrency", 2)
    pids = wait_for(lambda: len(found := lines(installation.directory / "runs")) == 2 and found)
    worker.kill()
    worker.wait()
    let_it_end(installation, 0)
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
    assert [(installation.history(task) or {}).get("status") for task in tasks] == [
        "completed",
        "completed",
    ]


def test_a_record_goes_when_the_end_is_in_the_database(installation):
    installation.handler("fine", "#!/bin/sh\n")
    task = installation.enqueue("notifications", "fine")
    worker = installation.worker("notifications")
    installation.finished(task)
    wait_for(lambda: not records(installation), 2, "the end of the record")
    worker.terminate()
    assert worker.wait(10) == 0 and list((installation.state / "runs").iterdir()) == []


def test_what_is_held_is_found_within_a_second_of_its_release(installation, orphan):
    task, _ = orphan()
    installation.worker("notifications")
    let_it_end(installation, 0)
    began = time.monotonic()
    installation.finished(task)
    assert time.monotonic() - began < 1


NOT_NOW_FIRST = """#!/bin/sh
echo "$$" >>"$HOME/runs"
[ $(wc -l <"$HOME/runs") = 1 ] && echo '{"retry_after": 0.05}' && exit 75
"""


def test_of_two_runs_that_are_one_attempt_the_last_one_counts(installation):
    """Exit 75 does not count, so the same worker runs the same attempt again."""
    installation.handler("wait", NOT_NOW_FIRST + 'until [ -e "$HOME/go" ]; do sleep 0.02; done\n')
    task = installation.enqueue("notifications", "wait")
    worker = installation.worker("notifications")
    pids = wait_for(lambda: len(found := lines(installation.directory / "runs")) == 2 and found)
    worker.kill()
    worker.wait()
    let_it_end(installation, 0)
    wait_for(lambda: not lives(int(pids[1])), what="the handler's end")
    installation.worker("notifications")
    done = installation.finished(task)
    assert (done["status"], done["exit_code"], len(lines(installation.directory / "runs"))) == (
        "completed",
        0,
        2,
    )


def test_a_run_that_left_no_status_does_not_get_an_earlier_ones(installation):
    installation.handler("wait", NOT_NOW_FIRST + "kill -9 $(ps -o ppid= -p $PPID) $PPID\n")
    task = installation.enqueue("notifications", "wait")
    assert installation.worker("notifications", "--max-attempts", 1).wait(10) == -signal.SIGKILL
    assert len(lines(installation.directory / "runs")) == 2
    installation.worker("notifications", "--max-attempts", 1)
    done = installation.finished(task, 5)
    assert done["status"] == "failed" and "its worker died" in done["error"]


@pytest.mark.parametrize("after", ["the timeout", "a stop", "a cancellation"])
def test_what_was_to_be_ended_is_ended_without_its_worker(installation, after):
    """The supervisor keeps a worker's word when that has died."""
    ignores_term = '#!/bin/sh\ntrap \'echo >>"$HOME/terms"\' TERM\necho $$ >>"$HOME/runs"\nwhile :; do sleep 0.02; done\n'
    installation.handler("ignores_term", ignores_term)
    task = installation.enqueue("notifications", "ignores_term")
    timeout = 1 if after == "the timeout" else 100
    worker = installation.worker(
        "notifications", "--timeout", timeout, "--kill-after", 1, "--grace", 0, "--max-attempts", 1
    )
    (pid,) = wait_for(lambda: lines(installation.directory / "runs"))
    if after == "a stop":
        worker.terminate()
    elif after == "a cancellation":
        installation.sqlite3("update notifications set cancel_requested = 1")
    if after != "the timeout":
        wait_for(lambda: lines(installation.directory / "terms"))
    worker.kill()
    worker.wait()
    wait_for(lambda: not lives(int(pid)), 5, "the handler's end")
    # It takes back what a dead worker had, and runs nothing.
    installation.run("cleanup.py")
    done = installation.history(task)
    if after == "a stop":
        assert done is None and installation.rows("select attempts from notifications") == [(0,)]
    else:
        status, error = (
            ("failed", "timed out after 1 s")
            if after == "the timeout"
            else ("cancelled", "cancelled while it ran")
        )
        assert (
            done["status"] == status
            and done["exit_code"] == 137
            and done["error"].startswith(error)
        )


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
