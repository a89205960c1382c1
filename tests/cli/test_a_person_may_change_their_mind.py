"""tq edit and tq drop: a waiting task gets another payload or priority, and an empty queue goes."""

import json

import pytest

import queue_helpers as q


@pytest.fixture
def editor(installation):
    """Set $EDITOR to a script; return what `tq edit` does with it."""

    def edit(script: str, *words: str) -> object:
        path = installation.handler("editor", f"#!/bin/sh\nset -e\n{script}\n")
        return installation.run(
            "tasks.py", "edit", *words, env={"EDITOR": f"{path} --", "VISUAL": ""}
        )

    return edit


def task(installation, task_id: str) -> tuple:
    """Return a task's status and payload."""
    [(status, data)] = installation.rows(
        "select status, data from task_queue where task_id = ?", task_id
    )
    return status, json.loads(data)["data"]


@pytest.mark.parametrize(
    "terms, status",
    [
        ((), "pending"),
        (("--hold",), "held"),
        (("--delay", "1h"), "scheduled"),
        (("--after", "other"), "blocked"),
    ],
)
def test_the_payload_of_a_waiting_task_changes_and_nothing_else(
    installation, editor, terms, status
):
    installation.enqueue("approvals", "t", "--task-id", "other", "--hold")
    installation.enqueue("approvals", "t", '{"a": 1, "b": "ü"}', "--task-id", "it", *terms)
    done = editor("shift; sed -i s/1/2/ $1; grep -q ü $1", "it")
    assert (done.returncode, done.stdout) == (0, f"it: changed; it is {status}\n")
    assert task(installation, "it") == (status, {"a": 2, "b": "ü"})
    assert editor("true", "it").stdout == "it: nothing changed\n"


def test_what_was_approved_is_held_again(installation, editor):
    """Also where it waits for another task, which it then still does."""
    for name, terms in (("plain", ()), ("waits", ("--after", "other"))):
        installation.enqueue("approvals", "t", "--task-id", "other", "--hold")
        installation.enqueue("approvals", "t", "{}", "--task-id", name, "--hold", *terms)
        installation.run("tasks.py", "approve", name)
        done = editor("shift; echo '{\"n\": 1}' >$1", name)
        assert f"changed; it is held again: ./tasks.py approve {name}" in done.stdout
        assert task(installation, name) == ("held", {"n": 1})
        installation.run("tasks.py", "approve", name)
    assert (
        task(installation, "plain")[0] == "pending" and task(installation, "waits")[0] == "blocked"
    )


@pytest.mark.parametrize(
    "script, says",
    [
        ("exit 3", "ended with exit 3, so nothing was changed"),
        ("shift; echo '{' >$1", "what you wrote is not JSON"),
        ("shift; echo 7 >$1", "what you wrote is not a JSON object"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_kept(installation, editor, script, says):
    installation.enqueue("approvals", "t", "{}", "--task-id", "it")
    done = editor(script, "it")
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1
    if "wrote" in says:
        with open(done.stderr.rpartition("it is kept in ")[2].strip()) as kept:
            assert kept.read().strip() in ("{", "7")
    assert task(installation, "it") == ("pending", {})


def test_one_that_runs_has_ended_or_changed_meanwhile_is_left_alone(installation, editor, queue):
    installation.enqueue("approvals", "t", "{}", "--task-id", "it")
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
        installation.enqueue("approvals", "t", "--task-id", name, "--group", "g")
    done = installation.run("tasks.py", "edit", "b", "--priority", "9")
    assert done.stdout == "b: priority 9\n"
    installation.enqueue("approvals", "t", "--task-id", "c", "--priority", "5")
    assert [queue.claim_ready(queue.connect(), "approvals")[0].task_id for _ in "ab"] == ["c", "a"]
    assert installation.run("tasks.py", "edit", "b", "--priority", "1e9").returncode == 64


def test_an_empty_queue_goes_from_everywhere(installation, queue):
    installation.enqueue("brief", "t", "--task-id", "it", "--new")
    done = installation.run("tasks.py", "drop", "brief")
    assert done.returncode == 1 and "brief has 1 task: " in done.stderr
    [claimed] = queue.claim_ready(queue.connect(), "brief")
    with queue.transaction(queue.connect()):
        queue.ack(queue.connect(), claimed)
    installation.run("tasks.py", "pause", "brief")
    worker = installation.worker("brief")
    assert "a worker serves brief" in installation.run("tasks.py", "drop", "brief").stderr
    worker.terminate()
    worker.wait(10)
    assert installation.run("tasks.py", "drop", "brief").stdout == "dropped brief\n"
    assert "no queue 'brief'" in installation.run("tasks.py", "purge", "brief").stderr
    assert installation.rows("select * from task_controls") == []
    assert installation.rows("select task_id, status from task_queue") == [("it", "completed")]
    # This process knew it. Its rows are not confused with those of before.
    q.enqueue_task("brief", "t", {}, "again")
    assert installation.rows("select id from brief") == [(2,)]


def test_a_process_goes_on_when_a_backup_without_its_queue_is_back(installation, queue):
    backup = installation.directory / "backup.db"
    queue.enqueue_task("approvals", "t", {})
    assert installation.run("tasks.py", "backup", backup).returncode == 0
    queue.enqueue_task("emails", "t", {})
    installation.sqlite3(f".restore '{backup}'")
    queue.enqueue_task("emails", "t", {}, "it")
    assert installation.rows("select task_id from emails") == [("it",)]
