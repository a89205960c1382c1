"""tq edit and tq drop: a waiting task gets another payload or priority, and an empty queue goes."""

import json

import pytest
from conftest import one_line

import queue_helpers as q


@pytest.fixture
def editor(installation):
    """Set $EDITOR to a script; return what `tq edit` does with it."""

    def edit(script: str, *words: str) -> object:
        path = installation.handler("editor", f"#!/bin/sh\nset -e\n{script}\n")
        env = {"EDITOR": f"{path} --", "VISUAL": ""}
        return installation.run("tasks.py", "edit", *words, env=env)

    return edit


def task(installation, task_id: str) -> tuple:
    """Return a task's status and payload."""
    found = "select status, data from task_queue where task_id = ?"
    [(status, data)] = installation.rows(found, task_id)
    return status, json.loads(data)["data"]


@pytest.mark.parametrize(
    "terms, status",
    [
        ("", "pending"),
        ("--hold", "held"),
        ("--delay 1h", "scheduled"),
        ("--after other", "blocked"),
    ],
)
def test_the_payload_of_a_waiting_task_changes_and_nothing_else(
    installation, editor, terms, status
):
    installation.add("approvals t --task-id other --hold")
    installation.add(f"approvals t --task-id it {terms}", '{"a": 1, "b": "ü"}')
    done = editor("shift; sed -i s/1/2/ $1; grep -q ü $1", "it")
    assert (done.returncode, done.stdout) == (0, f"it: changed; it is {status}\n")
    assert task(installation, "it") == (status, {"a": 2, "b": "ü"})
    assert editor("true", "it").stdout == "it: nothing changed\n"


def test_what_was_approved_is_held_again(installation, editor):
    """Also where it waits for another task, which it then still does."""
    installation.add("approvals t --task-id other --hold")
    for name, terms, after in (("plain", "", "pending"), ("waits", "--after other", "blocked")):
        installation.add(f"approvals t --task-id {name} --hold {terms}")
        installation.tq(f"approve {name}")
        done = editor("shift; echo '{\"n\": 1}' >$1", name)
        assert f"changed; it is held again: ./tasks.py approve {name}" in done.stdout
        assert task(installation, name) == ("held", {"n": 1})
        installation.tq(f"approve {name}")
        assert task(installation, name)[0] == after


@pytest.mark.parametrize(
    "script, says",
    [
        ("exit 3", "ended with exit 3, so nothing was changed"),
        ("shift; echo '{' >$1", "what you wrote is not JSON"),
        ("shift; echo 7 >$1", "what you wrote is not a JSON object"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_kept(installation, editor, script, says):
    installation.add("approvals t --task-id it")
    said = one_line(editor(script, "it"), 1, says)
    if "wrote" in says:
        with open(said.rpartition("it is kept in ")[2].strip()) as kept:
            assert kept.read().strip() in ("{", "7")
    assert task(installation, "it") == ("pending", {})


def test_one_that_runs_has_ended_or_changed_meanwhile_is_left_alone(installation, editor, queue):
    installation.add("approvals t --task-id it")
    put = "update approvals set data = json_set(data, '\\$.data.n', 1)"
    change = f'sqlite3 "$TASK_QUEUE_STATE/tasks.db" "{put}"'
    done = editor(f"{change}; shift; echo '{{\"m\": 2}}' >$1", "it")
    assert done.returncode == 1 and "has changed meanwhile" in done.stderr
    assert task(installation, "it") == ("pending", {"n": 1})
    [claimed] = queue.claim_ready(queue.connect(), "approvals")
    assert "it is in_progress" in editor("true", "it").stderr.replace("task it is", "it is")
    with queue.transaction(queue.connect()):
        queue.ack(queue.connect(), claimed)
    assert "has ended" in editor("true", "it").stderr


def test_a_later_priority_counts(installation, queue):
    for name in ("a", "b"):
        installation.add(f"approvals t --task-id {name} --group g")
    assert installation.tq("edit b --priority 9").stdout == "b: priority 9\n"
    installation.add("approvals t --task-id c --priority 5")
    assert [queue.claim_ready(queue.connect(), "approvals")[0].task_id for _ in "ab"] == ["c", "a"]
    installation.tq("edit b --priority 1e9", code=64)


def test_an_empty_queue_goes_from_everywhere(installation, queue):
    installation.add("brief t --task-id it --new")
    assert "brief has 1 task: " in installation.tq("drop brief", code=1).stderr
    [claimed] = queue.claim_ready(queue.connect(), "brief")
    with queue.transaction(queue.connect()):
        queue.ack(queue.connect(), claimed)
    installation.tq("pause brief")
    worker = installation.worker("brief")
    assert "a worker serves brief" in installation.tq("drop brief", code=1).stderr
    worker.terminate()
    worker.wait(10)
    assert installation.tq("drop brief").stdout == "dropped brief\n"
    assert "no queue 'brief'" in installation.tq("purge brief", code=64).stderr
    assert installation.rows("select * from task_controls") == []
    assert installation.rows("select task_id, status from task_queue") == [("it", "completed")]
    # This process knew it. Its rows are not confused with those of before.
    q.enqueue_task("brief", "t", {}, "again")
    assert installation.rows("select id from brief") == [(2,)]


def test_a_process_goes_on_when_a_backup_without_its_queue_is_back(installation, queue):
    backup = installation.directory / "backup.db"
    queue.enqueue_task("approvals", "t", {})
    installation.tq("backup", backup)
    queue.enqueue_task("emails", "t", {})
    installation.sqlite3(f".restore '{backup}'")
    queue.enqueue_task("emails", "t", {}, "it")
    assert installation.rows("select task_id from emails") == [("it",)]
