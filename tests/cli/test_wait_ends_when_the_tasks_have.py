"""tasks.py wait: it sleeps until something changes, prints the results, and its exit code says how
it ended.
"""

from __future__ import annotations

import json
import threading

from conftest import wait_for


def waiting(installation, *args):
    """A wait that has begun to wait: it has looked, and sleeps."""
    process = installation.start("tasks.py", "wait", *args)
    return process


def drain(installation, *queues: str) -> None:
    done = installation.run("worker.py", *queues, "--handlers", installation.handlers, "--drain")
    assert done.returncode == 0, done.stderr


def test_it_ends_with_the_task_and_prints_its_result(installation):
    installation.handler("sum", '#!/bin/sh\necho \'{"summary": "all is well", "n": 3}\'\n')
    installation.enqueue("approvals", "sum", "{}", "--task-id", "s-1")
    process = waiting(installation, "s-1", "--json")
    drain(installation, "approvals")
    assert process.wait(20) == 0
    told = json.loads(process.log.read_text())
    assert (told["task_id"], told["status"], told["summary"]) == ("s-1", "completed", "all is well")
    assert json.loads(told["result"])["n"] == 3
    text = installation.run("tasks.py", "wait", "s-1").stdout
    assert text.splitlines()[0] == "s-1 completed" and "all is well" in text


def test_any_other_end_is_1_and_says_why(installation):
    installation.handler("good", "#!/bin/sh\n")
    installation.handler("bad", "#!/bin/sh\necho 'no such page' >&2\nexit 65\n")
    installation.enqueue("approvals", "good", "{}", "--task-id", "good-1")
    installation.enqueue("approvals", "bad", "{}", "--task-id", "bad-1")
    process = waiting(installation, "good-1", "bad-1", "--json")
    drain(installation, "approvals")
    assert process.wait(20) == 1
    good, bad = json.loads(process.log.read_text())
    assert (
        good["status"] == "completed"
        and bad["status"] == "failed"
        and "no such page" in bad["error"]
    )
    assert installation.run("tasks.py", "wait", "good-1").returncode == 0
    text = installation.run("tasks.py", "wait", "bad-1")
    assert (
        text.returncode == 1
        and text.stdout.startswith("bad-1 failed: ")
        and "no such page" in text.stdout
    )
    installation.enqueue("approvals", "good", "{}", "--task-id", "no-more")
    process = waiting(installation, "no-more")
    assert installation.run("tasks.py", "cancel", "no-more").returncode == 0
    assert process.wait(20) == 1


def test_a_time_out_is_75_and_names_what_has_not_ended(installation):
    installation.enqueue("approvals", "review", "{}", "--task-id", "slow")
    done = installation.run("tasks.py", "wait", "slow", "--timeout", "0.2")
    assert done.returncode == 75 and done.stdout == ""
    assert done.stderr.endswith("tasks.py wait: 1 of 1 task had not ended after 200ms: slow\n")


def test_an_id_that_is_unknown_or_of_several_tasks_is_64(installation):
    for name in ("job-1", "job-2"):
        installation.enqueue("approvals", "review", "{}", "--task-id", name)
    for ident, words in (
        ("nobody", "no task has the id"),
        ("job", "fits several tasks: job-1 (approvals), job-2"),
    ):
        done = installation.run("tasks.py", "wait", ident)
        assert done.returncode == 64 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_task_that_is_retried_has_not_ended(installation):
    flag = installation.directory / "mended"
    installation.handler("flaky", f"#!/bin/sh\n[ -e '{flag}' ] && exit 0\nexit 1\n")
    installation.handler("last", "#!/bin/sh\n")
    installation.enqueue("approvals", "flaky", "{}", "--task-id", "f-1")
    installation.enqueue("completions", "last", "{}", "--task-id", "l-1")
    process = waiting(installation, "f-1", "l-1", "--json")
    worker = installation.worker("approvals", "--max-attempts", "2", "--backoff", "0.01")
    assert installation.finished("f-1")["status"] == "failed"
    # It has ended, but the other has not; meanwhile it is put back.
    worker.terminate()
    worker.wait(20)
    assert installation.run("tasks.py", "retry", "f-1").returncode == 0
    drain(installation, "completions")
    installation.finished("l-1")
    assert process.poll() is None
    flag.touch()
    drain(installation, "approvals")
    assert process.wait(20) == 0
    assert [one["status"] for one in json.loads(process.log.read_text())] == [
        "completed",
        "completed",
    ]


def test_a_task_that_goes_without_an_end_is_said(queue, installation, monkeypatch, capsys):
    import tasks
    from taskqueue import look

    # Its output is captured in a thread.
    installation.is_inside = False
    queue.enqueue_task("approvals", "review", {}, "gone-1")
    looks, codes, real = [], [], look.newest_of
    monkeypatch.setattr(look, "newest_of", lambda *args: looks.append(1) or real(*args))
    thread = threading.Thread(target=lambda: codes.append(tasks.main(["wait", "gone-1"])))
    thread.start()
    wait_for(lambda: looks, what="the first look")
    assert installation.run("tasks.py", "purge", "approvals", "--yes").returncode == 0
    thread.join(20)
    assert codes == [1] and "it was purged, pruned or moved" in capsys.readouterr().err


def test_it_looks_only_when_it_is_told_to(queue, installation, monkeypatch, capsys):
    import tasks
    from taskqueue import look

    queue.enqueue_task("approvals", "review", {}, "w-1")
    looks, told = [], threading.Event()

    class Watch:
        listeners: set = set()

        @classmethod
        def of(cls, state):
            told.set()
            return cls

    real = look.newest_of
    monkeypatch.setattr(queue, "Watch", Watch, raising=False)
    monkeypatch.setattr(look, "newest_of", lambda *args: looks.append(1) or real(*args))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(tasks.main(["wait", "w-1"])))
    thread.start()
    assert told.wait(20)
    wait_for(lambda: looks, what="the first look")
    conn = queue.connect()
    with queue.transaction(conn):
        (task,) = queue.claim(conn, "approvals", queue.owner_name(), limit=1)
        queue.ack(conn, task, result="done")
    # It has ended, and nobody has said so: no look, however long one waits.
    thread.join(0.5)
    assert len(looks) == 1 and thread.is_alive()
    (listener,) = Watch.listeners
    listener.set()
    thread.join(20)
    assert codes == [0] and len(looks) == 2
    assert capsys.readouterr().out == "w-1 completed\ndone"
