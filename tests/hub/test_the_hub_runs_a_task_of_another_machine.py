import json
import os
import signal
from functools import partial

import pytest
from conftest import Installation, end, wait_for

import queue_helpers as q

pytestmark = pytest.mark.first

pytest_plugins = ["machines"]

# A handler that says what it was told.
ECHO = "#!/bin/sh\ncat\necho noted >&2\n"


def stop(process, seconds: float = 20.0) -> None:
    process.terminate()
    assert process.wait(seconds) == 0, process.log.read_text()


def test_a_task_goes_there_and_its_result_comes_back(machines):
    here, there = machines
    there.handler("greet", ECHO + 'env | grep -c "^TASK_QUEUE_HUB=" >&2\nexit 0\n')
    task = here.enqueue("notifications", "greet", '{"umlaut": "ä\\u0000"}')
    here.relay("push", "notifications", "--drain")
    # No worker of this machine takes it, and none takes it back.
    here.here.worker("notifications", "--drain", ready=False).wait(20)
    assert here.word(task) == "handed_over"
    done = there.run_all("--reply")
    assert "completed" in done.stderr
    assert here.word(task) == "handed_over"
    # It has ended there, and not here.
    assert here.here.run("tasks.py", "wait", task, "--timeout", 0.1).returncode == 75
    here.relay("pull", "--drain")
    assert here.here.run("tasks.py", "wait", task, "--timeout", 5).returncode == 0
    ended = here.history(task)
    # The hub's URL has a password, which is none of a handler's business.
    assert (ended["status"], ended["exit_code"], ended["attempts"], ended["log"]) == (
        "completed",
        0,
        1,
        "noted\n0\n",
    )
    [(text,)] = here.rows("select data from completions")
    envelope = json.loads(text)
    assert envelope["source"] == {"queue": "notifications", "task_id": task}
    assert envelope["data"]["data"] == {"umlaut": "ä\0"}
    assert envelope["data"]["source"] == {"queue": "notifications", "task_id": task}
    # There it was an ordinary task, whose id names the handing over and the fetch.
    [(status, there_id)] = there.rows("select status, task_id from task_history")
    assert status == "completed" and there_id == f"{here.hub.one('select id from relay_tasks')}-1"


def test_exit_codes_and_timeouts_mean_what_they_mean_to_a_worker(machines):
    here, there = machines
    there.handler(
        "later", '#!/bin/sh\nrm "$HOME/busy" && echo \'{"retry_after": 0.05}\' && exit 75\nexit 0\n'
    )
    (there.here.directory / "busy").touch()
    there.handler("never", "#!/bin/sh\necho malformed >&2\nexit 65\n")
    there.handler("flaky", "#!/bin/sh\nexit 3\n")
    there.handler("slow", "#!/bin/sh\nexec sleep 60\n")
    tasks = {
        name: here.enqueue("notifications", name) for name in ("later", "never", "flaky", "slow")
    }
    here.relay("push", "notifications", "--drain")
    there.serve("--at-most", 4, worker=("--timeout", 1, "--concurrency", 4))
    here.start("pull")
    ended = {name: here.finished(task, 30) for name, task in tasks.items()}
    assert (ended["later"]["status"], ended["later"]["attempts"]) == ("completed", 1)
    assert (ended["never"]["status"], ended["never"]["attempts"]) == ("failed", 1)
    assert ended["never"]["error"] == "refused by its handler (exit 65): malformed"
    assert (ended["flaky"]["status"], ended["flaky"]["attempts"]) == ("failed", 4)
    assert ended["flaky"]["error"] == "exit 3 (attempt 4 of 4)"
    assert ended["slow"]["error"] == "timed out after 1 s (attempt 4 of 4)"
    # Without --reply nothing is added.
    assert here.rows("select count(*) from completions") == [(0,)]


def test_a_task_without_a_handler_there_is_a_dead_letter_here(machines):
    here, there = machines
    task = here.enqueue("notifications", "nobodys")
    here.here.sqlite3("update notifications set own_attempts = 1")
    here.relay("push", "notifications", "--drain")
    there.run_all()
    here.relay("pull", "--drain")
    ended = here.history(task)
    assert (ended["status"], ended["attempts"]) == ("failed", 1)
    assert ended["error"].startswith(f"no handler 'nobodys' in {there.here.handlers}: put an ")


def test_priority_delay_group_and_expiry_mean_the_same(machines):
    here, there = machines
    there.handler("note", '#!/bin/sh\njq -r .source.task_id >>"$HOME/order"\n')
    new = partial(q.new_row, "note", {})
    here.put(
        new("gone", ttl=100),
        new("low", priority=-5),
        new("high", priority=5),
        new("late", delay=3600),
    )
    here.put(
        *(new(task, group="g") for task in ("first", "second")),
        new("late in g", group="g", delay=3600),
    )
    here.relay("push", "notifications", "--drain")
    # On the hub it would hold its group up. Only the head of a group is sent.
    assert here.word("late in g") == "scheduled"
    assert (
        50
        < here.hub.one("select extract(epoch from max(expires_at) - now())::float from relay_tasks")
        <= 100
    )
    here.hub.rows(
        "update relay_tasks set expires_at = now() - interval '1 second' where expires_at is not null"
    )
    [(delay,)] = here.hub.rows(
        "select extract(epoch from scheduled_at - now())::float from procrastinate_jobs"
        " where scheduled_at is not null"
    )
    assert 3000 < delay < 3600
    of_group = "select count(*) from procrastinate_jobs where lock = 'notifications/g'"
    assert here.hub.one(of_group) == 1 and here.word("second") == "blocked"
    there.run_all()
    here.relay("pull", "--drain")
    here.relay("push", "notifications", "--drain")
    there.run_all()
    here.relay("pull", "--drain")
    order = (there.here.directory / "order").read_text().split()
    assert order == ["high", "first", "low", "second"]
    assert (here.history("gone")["status"], here.history("gone")["attempts"]) == ("expired", 0)
    assert here.word("late") == "handed_over"


def test_what_is_cancelled_on_the_hub_ends_as_cancelled(machines):
    here, there = machines
    there.handler("slow", '#!/bin/sh\ntouch "$HOME/begun"\nexec sleep 60\n')
    running, waiting = here.enqueue("notifications", "slow"), here.enqueue("notifications", "slow")
    here.relay("push", "notifications", "--drain")
    serving = there.serve(worker=("--kill-after", 1))
    wait_for(lambda: (there.here.directory / "begun").exists(), what="a running handler")
    here.hub.rows(
        "select procrastinate_cancel_job_v1(id, true, false) from procrastinate_jobs order by id"
    )
    here.start("pull")
    for task in (running, waiting):
        assert here.finished(task, 30)["status"] == "cancelled"
    assert here.history(running)["error"] == "cancelled while it ran"
    assert here.history(waiting)["error"] == "on the hub, its job is cancelled"
    for process in serving:
        stop(process)


def test_what_is_cancelled_here_is_ended_there(machines):
    here, there = machines
    there.handler("slow", '#!/bin/sh\ntouch "$HOME/begun"\nexec sleep 60\n')
    here.put(q.new_row("slow", {}, "running"), q.new_row("slow", {}, "waiting"))
    here.relay("push", "notifications", "--drain")
    there.serve(worker=("--kill-after", 1))
    wait_for(lambda: (there.here.directory / "begun").exists(), what="a running handler")
    done = here.here.run("tasks.py", "cancel", "running", "waiting")
    assert "another machine has it" in done.stderr + done.stdout
    # Neither is anything else done with them here.
    here.here.run("tasks.py", "move", "--from", "notifications", "--to", "approvals")
    here.here.run("tasks.py", "purge", "notifications", "--yes")
    assert (here.word("running"), here.word("waiting")) == ("handed_over", "handed_over")
    here.start("pull")
    for task in ("running", "waiting"):
        assert here.finished(task, 30)["status"] == "cancelled"


def test_a_job_that_others_deferred_runs_too(machines):
    here, there = machines
    there.handler("greet", '#!/bin/sh\ncat >"$HOME/told"\n')
    here.hub.rows("""select procrastinate_defer_jobs_v1(array[row('notifications', 'greet', 0, null, null,
                     '{"name": "Ada"}', null)::procrastinate_job_to_defer_v1])""")
    there.run_all("--reply")
    told = json.loads((there.here.directory / "told").read_text())
    assert (told["task_type"], told["data"]) == ("greet", {"name": "Ada"})
    assert here.hub.one("select status::text from procrastinate_jobs") == "succeeded"


@pytest.mark.parametrize(("options", "granted"), [([], {}), (["--trust"], None)])
def test_the_hub_grants_no_rights_unless_it_is_trusted(machines, options, granted):
    here, there = machines
    there.handler("greet", "#!/bin/sh\nexec cat\n")
    here.enqueue("notifications", "greet", '{"prompt": "p", "permission_mode": "acceptEdits"}')
    here.relay("push", "notifications", "--drain")
    there.run_all(*options)
    here.relay("pull", "--drain")
    [(printed,)] = here.rows("select result from task_history")
    told = json.loads(printed)
    # handlers/claude takes rights from "granted" alone, where there is one.
    assert told.get("granted") == granted and told["data"]["permission_mode"] == "acceptEdits"


def test_a_task_that_runs_a_shell_command_is_neither_pushed_nor_fetched(machines):
    here, there = machines
    there.handler("run", '#!/bin/sh\ntouch "$HOME/ran"\n')
    here.put(q.new_row("run", {}, "stays"), q.new_row("greet", {}, "goes"))
    here.relay("push", "notifications", "--drain")
    assert (here.word("stays"), here.word("goes")) == ("pending", "handed_over")
    # Somebody else put one on the hub.
    here.hub.rows("update procrastinate_jobs set task_name = 'run'")
    there.run_all()
    here.relay("pull", "--drain")
    assert here.history("goes")["error"] == 'a task of type "run" runs on its own machine alone'
    assert not (there.here.directory / "ran").exists()


def test_push_never_sends_a_fetched_task_on(machines):
    here, there = machines
    here.put(q.new_row("greet", {}, "x"))
    here.relay("push", "notifications", "--drain")
    fetch = there.start("fetch", "notifications")
    wait_for(lambda: there.rows("select 1 from notifications"), what="the fetched task")
    stop(fetch)
    there.relay("push", "notifications", "--drain")
    assert there.rows("select status from notifications") == [(1,)]


def test_a_pause_holds_back_the_machine_that_has_it(machines):
    here, there = machines
    there.handler(
        "limited",
        '#!/bin/sh\nrm "$HOME/limit" && echo \'{"pause": null, "reason": "limit"}\' && exit 75\nexit 0\n',
    )
    (there.here.directory / "limit").touch()
    task = here.enqueue("notifications", "limited")
    here.relay("push", "notifications", "--drain")
    there.serve("--at-most", 2)
    here.start("pull")
    paused = "select paused_by, pause_reason from task_controls where queue = 'notifications' and paused_at is not null"
    assert wait_for(lambda: there.rows(paused), what="the pause") == [("handler", "limit")]
    # Nothing more is fetched while the queue is paused there.
    other = here.enqueue("notifications", "limited")
    here.relay("push", "notifications", "--drain")
    assert here.hub.rows("select status::text from procrastinate_jobs order by id") == [
        ("doing",),
        ("todo",),
    ]
    assert there.here.run("tasks.py", "resume", "notifications").returncode == 0
    assert (here.finished(task, 30)["status"], here.history(task)["attempts"]) == ("completed", 1)
    assert here.finished(other, 30)["status"] == "completed"


def test_a_task_that_is_handed_over_is_neither_doubled_nor_changed(machines):
    here, there = machines
    there.handler("greet", ECHO)
    here.put(q.new_row("greet", {"n": 1}, "x"))
    here.relay("push", "notifications", "--drain")
    later = q.new_row("greet", {"n": 3}, "x", on_duplicate="rerun", firing="later")
    assert here.put(q.new_row("greet", {"n": 2}, "x"), later) == [False, False]
    assert here.word("x") == "handed_over"
    there.run_all()
    here.relay("pull", "--drain")
    assert '"n": 1' in here.history("x")["result"]
    # What came while it ran elsewhere is a task of its own once that has ended.
    [(data, word)] = here.rows(
        "select json_extract(data, '$.data'), status from task_queue where completed_at is null"
    )
    assert (json.loads(data), word) == ({"n": 3}, "pending")


def test_status_shows_both_ends(machines):
    here, there = machines
    here.put(*(q.new_row("greet", {}) for _ in range(3)))
    here.relay("push", "notifications", "--drain")
    here.put(q.new_row("greet", {}, delay=3600, group="g"))
    told = json.loads(here.relay("status", "--json").stdout)
    assert told["queues"]["notifications"] == {
        "here": {"handed_over": 3, "scheduled": 1},
        "hub": {"waiting": 3, "from_here": 3, "results": 0},
    }
    assert told["trouble"] is None and len(told["machine"]) == 16
    # Of the other machine's point of view, none of them is its own.
    assert "3 waiting" in there.relay("status").stdout
    assert json.loads(there.relay("status", "--json").stdout)["machine"] != told["machine"]


SLOW_ONCE = (
    '#!/bin/sh\necho $$ >>"$HOME/runs"\nif mkdir "$HOME/once"; then exec sleep 60; fi\necho done\n'
)


def test_a_machine_whose_job_was_given_away_ends_its_run(machines, tmp_path):
    here, there = machines
    there.handler("slow", SLOW_ONCE)
    task = here.enqueue("notifications", "slow")
    here.relay("push", "notifications", "--drain")
    first, _ = there.serve("--stalled-after", 1)
    runs = there.here.directory / "runs"
    wait_for(lambda: runs.exists() and runs.read_text(), what="the first run")
    os.kill(first.pid, signal.SIGSTOP)
    # Another machine, with the same handlers.
    (tmp_path / "third").mkdir()
    third = Installation(tmp_path / "third")
    third.env |= {"TASK_QUEUE_HUB": here.hub.url, "HOME": str(there.here.directory)}
    other = third.start("relay.py", "fetch", "notifications", "--stalled-after", 1)
    third.start("worker.py", "notifications", "--handlers", there.here.handlers)
    try:
        here.start("pull")
        ended = here.finished(task, 30)
        assert (ended["status"], ended["attempts"]) == ("completed", 2)
        assert "was silent for too long" in other.log.read_text()
        os.kill(first.pid, signal.SIGCONT)
        pid = int(runs.read_text().split()[0])
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"), what="the end of the first run")
        wait_for(
            lambda: there.rows("select status from task_history") == [("cancelled",)],
            what="the end of the local copy",
        )
        assert here.history(task) == ended
    finally:
        for process in third.processes:
            end(process)


def test_a_fetch_that_was_killed_anywhere_runs_nothing_twice(machines):
    """Before it stored the task, while the task ran, and before it told the hub."""
    here, there = machines
    there.handler("greet", '#!/bin/sh\necho run >>"$HOME/runs"\n')
    tasks = [here.enqueue("notifications", "greet") for _ in range(3)]
    here.relay("push", "notifications", "--drain")
    there.run_all()
    ids = [id for (id,) in here.hub.rows("select id from relay_tasks order by pushed_at, id")]
    # As if killed before it told the hub of the first, and before it stored the second.
    here.hub.rows("update relay_tasks set ended_at = null, outcome = null, home_at = null")
    here.hub.rows("update procrastinate_jobs set status = 'doing'")
    there.here.sqlite3(f"delete from task_history where task_id = '{ids[1]}-1'")
    runs = (there.here.directory / "runs").read_text().count("run")
    there.run_all()
    here.relay("pull", "--drain")
    assert [here.history(task)["status"] for task in tasks] == ["completed"] * 3
    assert (there.here.directory / "runs").read_text().count("run") == runs + 1


def test_what_has_ended_at_home_does_not_run_again_from_the_hub(machines):
    here, there = machines
    there.handler("flaky", '#!/bin/sh\necho run >>"$HOME/runs"\nexit 65\n')
    task = here.enqueue("notifications", "flaky")
    here.relay("push", "notifications", "--drain")
    there.run_all()
    here.relay("pull", "--drain")
    # The payload has left the hub.
    assert here.hub.rows("select task, result, log from relay_tasks") == [(None, None, None)]
    here.hub.rows(
        "select procrastinate_retry_job_v2(id, now(), null, null, null) from procrastinate_jobs"
    )
    done = there.run_all()
    assert (
        "retry it there" in done.stderr
        and here.hub.one("select status::text from procrastinate_jobs") == "failed"
    )
    assert (there.here.directory / "runs").read_text() == "run\n"
    assert here.history(task)["status"] == "failed"
