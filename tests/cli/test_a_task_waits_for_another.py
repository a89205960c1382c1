"""tq add --after ID: a task waits until that very one has completed, and ends if it cannot."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT, wait_for

import queue_helpers as q


def add(installation, words: str, *more: str, code: int = 0) -> str:
    """Return what `tq add` says."""
    done = installation.run("enqueue.py", *words.split(), *more)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def tasks(installation, *args, code: int = 0) -> object:
    done = installation.run("tasks.py", *args, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if done.stdout else done.stderr


def statuses(installation) -> dict[str, str]:
    return dict(installation.rows("select task_id, status from task_queue"))


def why(installation, task_id: str) -> str:
    [(error,)] = installation.rows("select error from task_history where task_id = ?", task_id)
    return error


def links(installation) -> list[tuple]:
    return installation.rows(
        "select after_queue, after_id, after_task, queue, row_id, whatever, ended from task_after"
    )


@pytest.fixture
def work(installation):
    """Run what is ready, with handlers that end well or not; return the order of their starts."""
    installation.handler("good", "#!/bin/sh\n")
    installation.handler("bad", '#!/bin/sh\necho "it rains" >&2\nexit 65\n')

    def drain(*queues: str) -> list[str]:
        how = ("--handlers", installation.handlers, "--drain")
        done = installation.run("worker.py", *(queues or ("approvals", "notifications")), *how)
        assert done.returncode == 0, done.stderr
        return [line.split()[4] for line in done.stderr.splitlines() if " started " in line]

    return drain


def test_a_chain_of_three_runs_in_its_order(installation, work):
    """A higher priority does not overtake the task that it waits for, and queues may differ."""
    add(installation, "approvals good --task-id build")
    add(installation, "notifications good --task-id test --after build --priority 9")
    add(installation, "approvals good --task-id deploy --after test --priority 99")
    assert statuses(installation) == {"build": "pending", "test": "blocked", "deploy": "blocked"}
    assert work() == ["build", "test", "deploy"]
    assert set(statuses(installation).values()) == {"completed"} and links(installation) == []


def test_what_waits_for_a_task_that_fails_ends_with_the_reason(installation, work):
    add(installation, "approvals bad --task-id build")
    add(installation, "approvals good --task-id test --after build")
    add(installation, "approvals good --task-id deploy --after test")
    add(installation, "approvals good --task-id tell --after-any deploy")
    add(installation, "approvals good --task-id clean --after-any build")
    assert sorted(work()) == ["build", "clean", "tell"]
    assert statuses(installation) == {
        "build": "failed", "test": "cancelled", "deploy": "cancelled", "tell": "completed", "clean": "completed"
    }  # fmt: skip
    because = "task build of approvals failed: refused by its handler (exit 65): it rains"
    assert why(installation, "test") == f"not run: {because}"
    assert (
        why(installation, "deploy")
        == f"not run: task test of approvals cancelled: not run: {because}"
    )
    # A person may want it all the same.
    assert tasks(installation, "retry", "deploy")["retried"] == 1
    assert work() == ["deploy"]


def test_an_import_holds_a_task_that_waited_for_another(installation, tmp_path):
    """A row's number means another task there, and it must not run before."""
    add(installation, "approvals good --task-id build --hold")
    add(installation, "approvals good --task-id deploy --after build --delay 1h --group g")
    file = tmp_path / "tasks.jsonl"
    tasks(installation, "export", file)
    there = {"TASK_QUEUE_STATE": str(tmp_path / "state")}
    assert installation.run("tasks.py", "import", file, env=there).returncode == 0
    done = installation.run("tasks.py", "list", "--json", env=there)
    [deploy] = [task for task in json.loads(done.stdout) if task["task_id"] == "deploy"]
    why = "before its import it waited for build"
    assert (deploy["status"], deploy["error"], deploy["group_id"]) == ("held", why, "g")


def test_it_waits_for_all_that_are_named(installation, work):
    for name in ("a", "b", "c"):
        add(installation, "approvals", "bad" if name == "b" else "good", "--task-id", name)
    add(installation, "approvals good --task-id end --after a --after-any b --after c")
    assert len(links(installation)) == 3
    assert work()[-1] == "end"


@pytest.mark.parametrize("option", ["--after", "--after-any"])
def test_an_id_that_no_task_has_is_refused(installation, option):
    said = add(installation, f"approvals good {option} nope", code=64)
    assert "after nope: no task has this id" in said and len(said.splitlines()) == 1
    assert statuses(installation) == {}


def test_a_task_that_has_ended_already_decides_at_once(installation, work):
    add(installation, "approvals good --task-id well")
    add(installation, "approvals bad --task-id ill")
    work()
    add(installation, "approvals good --task-id 1st --after well")
    add(installation, "approvals good --task-id 2nd --after-any ill")
    said = add(installation, "approvals good --task-id 3rd --after ill", code=64)
    assert "that task has ended as failed" in said and "--after-any" in said
    assert statuses(installation)["1st"] == statuses(installation)["2nd"] == "pending"
    assert "3rd" not in statuses(installation)
    # Where two queues have the id, the queue says which is meant.
    add(installation, "notifications good --task-id well")
    add(installation, "approvals good --task-id 4th --after well", code=64)
    add(installation, "approvals good --task-id 4th --after notifications/well")
    assert statuses(installation)["4th"] == "blocked"


def test_a_held_a_retried_and_a_moved_task_count(installation, work):
    installation.handler("once", '#!/bin/sh\n[ "$TASK_ATTEMPT" = 2 ]\n')
    add(installation, "approvals good --task-id held --hold")
    add(installation, "approvals once --task-id retried")
    add(installation, "approvals good --task-id moved --delay 1h")
    for name in ("held", "retried", "moved"):
        add(installation, f"approvals good --task-id after-{name} --after {name}")
    tasks(installation, "move", "moved", "notifications")
    tasks(installation, "move", "after-moved", "completions")
    assert work() == ["retried"]
    tasks(installation, "approve", "held")
    tasks(installation, "retry", "retried", "moved")
    # An id that has ended and one that moved are the same for the task that waits.
    assert {*work("approvals", "notifications", "completions")} == {
        "held", "retried", "moved", "after-held", "after-retried", "after-moved"
    }  # fmt: skip
    assert links(installation) == []


def test_a_later_firing_is_the_same_row(installation, work):
    """Where a waiting task is replaced, the task after it waits for the new one; a rerun is another."""
    add(installation, "approvals bad --task-id x")
    add(installation, "approvals good --task-id y --after x")
    add(installation, "approvals good --task-id x --on-duplicate replace")
    assert work() == ["x", "y"]
    said = add(installation, "approvals good --after x --on-duplicate rerun", code=65)
    assert "on_duplicate" in said


def test_a_waiting_task_that_is_replaced_waits_no_longer(installation, work):
    add(installation, "approvals bad --task-id x --hold")
    add(installation, "approvals bad --task-id y --after x")
    add(installation, "approvals good --task-id y --on-duplicate replace --group g")
    assert links(installation) == []
    assert work() == ["y"]


def test_hold_delay_and_group_hold_after_the_wait(installation, work):
    add(installation, "approvals good --task-id first --hold")
    add(installation, "approvals good --task-id holder --group g --hold")
    add(installation, "approvals good --task-id held --after first --hold")
    add(installation, "approvals good --task-id later --after first --delay 1h")
    add(installation, "approvals good --task-id grouped --after first --group g")
    add(installation, "approvals good --task-id free --group g")
    # What waits for another does not hold up its group.
    assert work() == ["free"]
    # Approved before its time, it waits on.
    tasks(installation, "approve", "held")
    assert statuses(installation)["held"] == "blocked"
    tasks(installation, "approve", "first")
    assert work("approvals")[0] == "first"
    assert statuses(installation) == {
        "first": "completed", "free": "completed", "held": "completed", "grouped": "completed",
        "later": "scheduled", "holder": "held"
    }  # fmt: skip


def test_released_tasks_of_one_group_take_turns(installation, queue):
    """Two that wait for one task, and are of one group, do not become ready together."""
    queue.enqueue_task("approvals", "t", {}, "first")
    for name in ("a", "b"):
        queue.enqueue_task("approvals", "t", {}, name, after="first", group="g")
    conn = queue.connect()
    with queue.transaction(conn):
        [task] = queue.claim(conn, "approvals", "me", limit=9)
        queue.ack(conn, task)
    assert statuses(installation) == {"first": "completed", "a": "pending", "b": "blocked"}


def test_a_task_that_is_deleted_ends_those_that_wait_for_it(installation):
    for name in ("purged", "byhand"):
        queue = "approvals" if name == "purged" else "notifications"
        add(installation, f"{queue} good --task-id {name}")
        add(installation, f"completions good --task-id after-{name} --after {name}")
        add(installation, f"completions good --task-id any-{name} --after-any {name}")
    assert tasks(installation, "purge", "approvals", "--yes")["deleted"] == 1
    installation.sqlite3("delete from notifications")
    q_recover(installation)
    assert statuses(installation) == {
        "after-purged": "cancelled", "any-purged": "pending",
        "after-byhand": "cancelled", "any-byhand": "pending",
    }  # fmt: skip
    assert why(installation, "after-byhand") == "not run: task byhand of notifications deleted"


def q_recover(installation) -> None:
    """Do what each consumer does every few seconds."""
    q.recover(installation.state)


def test_a_task_that_waits_may_be_cancelled_purged_and_deleted(installation, work):
    add(installation, "approvals good --task-id x")
    for name in ("cancelled", "purged", "deleted"):
        add(installation, f"notifications good --task-id {name} --after x")
    add(installation, "notifications good --task-id rejected --after x --hold")
    tasks(installation, "cancel", "cancelled")
    tasks(installation, "reject", "rejected")
    installation.sqlite3("delete from notifications where task_id = 'deleted'")
    tasks(installation, "purge", "notifications", "--status", "blocked", "--yes")
    assert links(installation) == [] and work() == ["x"]


def test_bash_approves_a_held_task_that_waits(installation, work):
    add(installation, "approvals good --task-id x")
    add(installation, "approvals good --task-id y --after x --hold --priority 5")
    installation.sqlite3("update approvals set status = 1 where task_id = 'y'")
    assert work() == ["x", "y"]


def test_list_show_wait_and_page_name_the_task_it_waits_for(installation):
    add(installation, "approvals good --task-id build")
    add(installation, "approvals", "good", '{"n": 1}', "--task-id", "deploy", "--after", "build")
    assert tasks(installation, "show", "deploy")["after"] == "build"
    assert 'after build: {"n": 1}' in installation.run("tasks.py", "list").stdout
    assert "after             build" in installation.run("tasks.py", "show", "deploy").stdout
    assert tasks(installation, "stats")["queues"]["approvals"]["blocked"] == 1
    waited = installation.run("tasks.py", "wait", "deploy", "--timeout", "0")
    assert waited.returncode == 75 and "deploy waits for build" in waited.stderr
    page = installation.directory / "page.html"
    assert installation.run("tasks.py", "page", page).returncode == 0
    assert "after build" in page.read_text()


def test_one_end_releases_any_number_in_bounded_steps(installation, queue):
    """A thousand that wait for one: the transaction of its end takes the first 200, a sweep the rest."""
    queue.enqueue_task("approvals", "t", {}, "first")
    many = [{"task_type": "t", "data": {}, "after": "first"} for _ in range(1000)]
    queue.enqueue_tasks("notifications", many)
    conn = queue.connect()
    with queue.transaction(conn):
        [task] = queue.claim(conn, "approvals", "me")
        queue.bury(conn, task, error="it rains")
        assert conn.execute("select count(*) from notifications").fetchone() == (800,)
    queue.recover(installation.state)
    assert conn.execute("select count(*) from notifications").fetchone() == (0,)
    assert conn.execute(
        "select count(*) from task_history where error = 'not run: task first of approvals failed: it rains'"
    ).fetchone() == (1000,)


def test_a_chain_of_hundreds_ends_with_its_first(installation, queue):
    for number in range(700):
        queue.enqueue_task(
            "approvals", "t", {}, f"t{number}", after=f"t{number - 1}" if number else ()
        )
    conn = queue.connect()
    with queue.transaction(conn):
        [task] = queue.claim(conn, "approvals", "me")
        queue.bury(conn, task, error="it rains")
    queue.recover(installation.state)
    assert set(statuses(installation).values()) == {"failed", "cancelled"}


def test_a_line_of_json_and_python_say_the_same(installation, queue):
    add(installation, "approvals good --task-id x")
    lines = '{"task_type": "good", "task_id": "y", "after": "x"}\n{"task_type": "good", "task_id": "z", "after_any": ["x", "y"]}\n'
    done = installation.run("enqueue.py", "approvals", "--jsonl", input=lines)
    assert done.returncode == 0, done.stderr
    assert [(link[2], link[5]) for link in links(installation)] == [("x", 0), ("x", 1), ("y", 1)]
    with pytest.raises(queue.InvalidTask, match="after nope: no task has this id"):
        queue.enqueue_task("approvals", "good", {}, after="nope")
    assert (
        installation.run("enqueue.py", "approvals", "good", "--hook", "--after", "x").returncode
        == 64
    )


def test_a_waiting_worker_starts_what_is_released(installation):
    """Whoever records the end wakes the worker of another queue."""
    installation.handler("good", "#!/bin/sh\n")
    installation.start("worker.py", "approvals", "--handlers", installation.handlers)
    installation.start("worker.py", "notifications", "--handlers", installation.handlers)
    add(installation, "approvals good --task-id x --delay 0.2")
    add(installation, "notifications good --task-id y --after x")
    wait_for(lambda: statuses(installation).get("y") == "completed", 4.0)


def test_without_the_modules_the_next_worker_releases_it(installation, queue, monkeypatch):
    """queue_helpers.py may be vendored alone: it notes the end."""
    import subprocess
    import sys

    add(installation, "approvals good --task-id x")
    add(installation, "approvals good --task-id y --after x")
    alone = installation.directory / "alone"
    alone.mkdir()
    (alone / "queue_helpers.py").write_text((ROOT / "queue_helpers.py").read_text())
    code = (
        "import queue_helpers as q; conn = q.connect()\n"
        "with q.transaction(conn): [task] = q.claim(conn, 'approvals', 'me'); q.ack(conn, task)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=alone, env=installation.env, check=True)
    assert statuses(installation)["y"] == "blocked"
    q_recover(installation)
    assert statuses(installation)["y"] == "pending"
