"""Whatever is the matter with the hub: a clear line, and no task is lost, counted or sent twice."""

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from conftest import ROOT, wait_for

import queue_helpers as q

pytest_plugins = ["machines"]


def complaint(here, url: str | None = None) -> str:
    """Return what push --drain says when it cannot reach the hub; the task waits as it was."""
    here.put(q.new_row("greet", {}, "x"))
    done = here.here.run(
        "relay.py", "push", "notifications", "--drain", env={"TASK_QUEUE_HUB": url or here.hub.url}
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and here.hub.server.password not in done.stderr
    assert here.rows("select status, attempts, owner from notifications") == [(1, 0, None)]
    [line] = [line for line in done.stderr.splitlines() if "push hands over" not in line]
    return line


def test_a_wrong_password_is_one_clear_line(machines):
    here, _ = machines
    url = here.hub.server.url(here.hub.name, "no secret")
    assert "password authentication failed" in complaint(
        here, url
    ) and "no%20secret" not in complaint(here, url)


def test_a_hub_that_is_not_prepared_names_the_command(machine, hub):
    here = machine
    assert "the hub has no schema yet: run ./relay.py init" in complaint(here)
    # Procrastinate alone may be there already.
    here.relay("init")
    hub.rows("drop table relay_tasks")
    assert "run ./relay.py init" in complaint(here)
    here.relay("init")
    assert json.loads(here.relay("init", "--json").stdout) == {"ready": True, "made": False}
    here.relay("push", "notifications", "--drain")
    assert here.word("x") == "handed_over"


def test_an_old_schema_is_named(machines):
    here, _ = machines
    here.hub.rows("comment on table relay_tasks is 'relay 0'")
    assert "use the same version on all machines" in complaint(here)
    here.relay("init")
    here.hub.rows("drop function procrastinate_fetch_job_v2")
    assert "Procrastinate schema is older" in complaint(
        here
    ) and "procrastinate_fetch_job_v2" in complaint(here)


def test_a_url_that_is_none_is_refused_unseen(installation):
    for args, env in ((["--url", "secret"], {}), ([], {"TASK_QUEUE_HUB": ""})):
        done = installation.run("relay.py", "push", "notifications", *args, env=env)
        assert (
            done.returncode == 64
            and "postgresql://USER@HOST/DATABASE" in done.stderr
            and "secret" not in done.stderr
        )


def test_a_queue_whose_name_is_too_long_for_the_hub_is_refused(installation):
    """PostgreSQL cannot name a channel after it, and would refuse each of its jobs."""
    done = installation.run(
        "relay.py", "push", "q" * 41, "--url", "postgresql://nobody@127.0.0.1:1/none"
    )
    assert done.returncode == 64 and "at most 40 characters" in done.stderr


def test_tasks_wait_while_the_server_is_away_and_go_on_by_themselves(machines):
    here, there = machines
    there.handler("greet", "#!/bin/sh\necho hello\n")
    processes = [
        here.start("push", "notifications"),
        here.start("pull"),
        *there.serve("--reply"),
    ]
    here.put(q.new_row("greet", {}, "before"))
    here.finished("before", 30)
    here.hub.server.kill()
    for process in processes[:3]:
        wait_for(
            lambda process=process: "the hub cannot be used" in process.log.read_text(),
            what="the complaint",
        )
    here.put(q.new_row("greet", {}, "meanwhile"))
    assert here.rows("select status, attempts, owner from notifications") == [(1, 0, None)]
    here.hub.server.start()
    assert here.finished("meanwhile", 60)["status"] == "completed"
    for process in processes[:3]:
        assert process.log.read_text().count("the hub cannot be used") == 1, process.log.read_text()
        process.terminate()
        assert process.wait(20) == 0
    assert here.rows("select count(*) from completions") == [(2,)]


def test_a_clock_that_is_an_hour_off_changes_no_delay(machines):
    here, _ = machines
    late = """
import sys, time
now = time.time
time.time = lambda: now() + {shift}
sys.path.insert(0, {root!r})
import queue_helpers as q, relay
q.enqueue_tasks("notifications", [q.new_row("greet", {{}}, "delayed", delay=600, ttl=900)])
raise SystemExit(relay.main(["push", "notifications", "--drain"]))
"""
    for shift in (3600, -3600):
        script = late.format(shift=shift, root=str(ROOT))
        done = subprocess.run(
            [sys.executable, "-c", script], env=here.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        [(delay, left)] = here.hub.rows(
            "select extract(epoch from scheduled_at - now())::float, extract(epoch from expires_at - now())::float"
            " from procrastinate_jobs j join relay_tasks r on r.job_id = j.id"
        )
        assert 500 < delay <= 600 and 1400 < left <= 1500
        here.hub.rows("delete from procrastinate_jobs")
        here.hub.rows("delete from relay_tasks")
        here.here.sqlite3("delete from notifications")


def test_a_megabyte_goes_there_and_back(machines):
    here, there = machines
    there.handler("echo", "#!/bin/sh\ncat\n")
    text = 'é\0\\u0000\U0001f600"' * 10**5
    here.put(q.new_row("echo", {"text": text}, "big"))
    here.relay("push", "notifications", "--drain")
    there.run_all("--reply")
    here.relay("pull", "--drain")
    [(data,)] = here.rows("select data from completions")
    assert json.loads(data)["data"]["data"] == {"text": text}


def test_one_task_that_the_hub_refuses_keeps_no_other_waiting(machines):
    here, _ = machines
    here.hub.rows(
        "alter table procrastinate_jobs add constraint no_greed check (task_name <> 'greedy')"
    )
    here.put(q.new_row("greet", {}, "a"), q.new_row("greedy", {}, "b"), q.new_row("greet", {}, "c"))
    here.relay("push", "notifications", "--drain")
    assert here.history("b")["status"] == "failed" and "no_greed" in here.history("b")["error"]
    assert (here.word("a"), here.word("c")) == ("handed_over", "handed_over")
    assert here.hub.one("select count(*) from procrastinate_jobs") == 2


def test_a_fetch_that_has_lost_its_hub_can_be_stopped_and_the_next_one_goes_on(machines):
    here, there = machines
    there.handler(
        "slow", '#!/bin/sh\necho run >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.05; done\n'
    )
    here.put(q.new_row("slow", {}, "x"))
    here.relay("push", "notifications", "--drain")
    fetch, _ = there.serve()
    runs = there.here.directory / "runs"
    wait_for(runs.exists, what="a run")
    here.hub.server.kill()
    wait_for(lambda: "the hub cannot be used" in fetch.log.read_text(), what="the complaint")
    fetch.terminate()
    assert fetch.wait(20) == 0
    (there.here.directory / "go").touch()
    here.hub.server.start()
    there.relay("fetch", "notifications", "--drain")
    here.relay("pull", "--drain")
    assert (here.history("x")["status"], here.history("x")["attempts"]) == ("completed", 1)
    assert runs.read_text() == "run\n"


@pytest.mark.parametrize("command", ["push notifications", "pull", "fetch notifications"])
def test_a_frozen_server_keeps_no_command_from_ending(machines, command):
    here, _ = machines
    process = here.start(*command.split())
    wait_for(lambda: here.hub.one("select count(*) from relay_machines"), what="a connection")
    here.put(q.new_row("greet", {}, "x"))
    here.hub.server.freeze()
    try:
        here.put(q.new_row("greet", {}, "y"))
        process.terminate()
        assert process.wait(5) == 0
        # One that is started while the server stands still, too.
        process = here.start(*command.split())
        wait_for(lambda: process.log.read_text(), what="its first line")
        process.terminate()
        assert process.wait(5) == 0
    finally:
        here.hub.server.thaw()
    here.relay("push", "notifications", "--drain")
    assert (here.word("x"), here.word("y")) == ("handed_over", "handed_over")


def test_a_second_signal_ends_a_command_at_once(machines):
    here, _ = machines
    process = here.start("pull")
    wait_for(lambda: here.hub.one("select count(*) from relay_machines"), what="a connection")
    with closing(sqlite3.connect(here.here.db, isolation_level=None)) as conn:
        # The local database keeps it busy, so that the first signal alone does not end it yet.
        conn.execute("begin exclusive")
        process.terminate()
        process.terminate()
        assert process.wait(5) in (0, -signal.SIGTERM)


def test_a_lock_on_the_hubs_tables_keeps_no_command_from_ending(machines):
    import psycopg

    here, _ = machines
    with psycopg.connect(here.hub.url) as conn:
        conn.execute("lock table relay_tasks, procrastinate_jobs in access exclusive mode")
        here.put(q.new_row("greet", {}, "x"))
        for command in ("push notifications", "pull", "fetch notifications"):
            process = here.start(*command.split())
            wait_for(lambda process=process: process.log.read_text(), what="its first line")
            process.terminate()
            assert process.wait(5) == 0
    here.relay("push", "notifications", "--drain")
    assert here.word("x") == "handed_over"


@pytest.mark.parametrize("command", ["push notifications", "pull", "status"])
def test_a_locked_database_is_a_code_of_its_own(machines, command):
    here, _ = machines
    here.put(q.new_row("greet", {}, "x"))
    with closing(sqlite3.connect(here.here.db, isolation_level=None)) as conn:
        conn.execute("begin exclusive")
        done = here.here.run("relay.py", *command.split())
    assert done.returncode == 75 and "is locked by another process" in done.stderr
