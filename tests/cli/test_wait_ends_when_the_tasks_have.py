"""tasks.py wait: it sleeps until something changes, prints the results, and its exit code says how
it ended.
"""

from __future__ import annotations

import json
import threading

from conftest import wait_for

import tasks
from taskqueue import look

SUM = """#!/bin/sh
echo '{"summary": "all is well", "n": 3}'
"""
BAD = "#!/bin/sh\necho 'no such page' >&2\n[ -e \"$HOME/mended\" ] || exit 65\n"


def waiting(installation, *ids: str):
    """Start a wait for tasks."""
    return installation.start("tasks.py", "wait", *ids, "--json")


def test_it_ends_with_the_tasks_and_prints_their_results(installation):
    installation.handler("sum", SUM)
    installation.handler("bad", BAD)
    installation.add("approvals sum --task-id s-1")
    installation.add("approvals bad --task-id bad-1")
    installation.add("completions sum --task-id no-more")
    well, ill, gone = (waiting(installation, *ids) for ids in (["s-1"], ["s-1", "bad-1"], ["no-more"]))  # fmt: skip
    installation.drain("approvals")
    installation.tq("cancel no-more")
    assert [process.wait(20) for process in (well, ill, gone)] == [0, 1, 1]
    told, bad = json.loads(ill.log.read_text())
    assert told == json.loads(well.log.read_text())
    assert (told["task_id"], told["status"], told["summary"]) == ("s-1", "completed", "all is well")
    assert json.loads(told["result"])["n"] == 3
    assert bad["status"] == "failed" and "no such page" in bad["error"]
    text = installation.tq("wait s-1").stdout
    assert text.splitlines()[0] == "s-1 completed" and "all is well" in text
    text = installation.tq("wait bad-1", code=1).stdout
    assert text.startswith("bad-1 failed: ") and "no such page" in text


def test_a_time_out_is_75_and_names_what_has_not_ended(installation):
    installation.add("approvals review --task-id slow")
    done = installation.tq("wait slow --timeout 0.2", code=75)
    last = "tasks.py wait: 1 of 1 task had not ended after 200ms: slow\n"
    assert done.stdout == "" and done.stderr.endswith(last)


def test_a_task_that_is_retried_has_not_ended(installation):
    installation.handler("bad", BAD)
    installation.handler("sum", SUM)
    installation.add("approvals bad --task-id f-1")
    installation.add("completions sum --task-id l-1")
    process = waiting(installation, "f-1", "l-1")
    installation.drain("approvals")
    assert installation.history("f-1")["status"] == "failed"
    # It has ended, but the other has not; meanwhile it is put back.
    installation.tq("retry f-1")
    installation.drain("completions")
    assert process.poll() is None
    (installation.directory / "mended").touch()
    installation.drain("approvals")
    assert process.wait(20) == 0
    statuses = [one["status"] for one in json.loads(process.log.read_text())]
    assert statuses == ["completed", "completed"]


def test_a_task_that_goes_without_an_end_is_said(queue, installation, monkeypatch, capsys):
    # Its output is captured in a thread.
    installation.is_inside = False
    queue.enqueue_task("approvals", "review", {}, "gone-1")
    looks, codes, real = [], [], look.newest_of
    monkeypatch.setattr(look, "newest_of", lambda *args: looks.append(1) or real(*args))
    thread = threading.Thread(target=lambda: codes.append(tasks.main(["wait", "gone-1"])))
    thread.start()
    wait_for(lambda: looks, what="the first look")
    installation.tq("purge approvals --yes")
    thread.join(20)
    assert codes == [1] and "it was purged, pruned or moved" in capsys.readouterr().err


def test_it_looks_only_when_it_is_told_to(queue, installation, monkeypatch, capsys):
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
