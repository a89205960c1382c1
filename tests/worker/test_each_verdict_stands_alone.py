"""However one run ended, the tasks beside it are recorded, and the worker goes on."""

import json

import pytest
from conftest import wait_for
from processes import lines, stays_true


@pytest.fixture
def beside(installation):
    """beside(handler): run a handler of that text together with others; the odd one's history or
    None, and the worker.
    """

    def run(handler: str, *options, setup=lambda: None):
        installation.handler("odd", handler)
        installation.handler("fine", "#!/bin/sh\n")
        kinds = ["fine", "odd", "fine", "fine"]
        tasks = "".join(
            json.dumps({"task_type": kind, "data": {}, "task_id": f"{kind}-{n}"}) + "\n"
            for n, kind in enumerate(kinds)
        )
        installation.enqueue("notifications", "--jsonl", input=tasks)
        setup()
        worker = installation.worker("notifications", "--concurrency", 4, *options)
        for name in ("fine-0", "fine-2", "fine-3"):
            assert installation.finished(name)["status"] == "completed"
        assert worker.poll() is None and "Traceback" not in worker.log.read_text(), (
            worker.log.read_text()
        )
        return worker

    return run


STRANGE = ["9" * 400, "-" + "9" * 400, "9" * 5000, "NaN", "Infinity", "-Infinity", "1e400", "-1", "true", "false", '"5"', "null", "[1]",
           "{}"]  # fmt: skip


def test_a_time_that_is_none_spins_nothing(installation):
    """Each of these numbers is the matter of its task, and those beside it are done."""
    installation.handler("fine", "#!/bin/sh\n")
    for index, number in enumerate(STRANGE):
        said = f"echo '{{\"retry_after\": {number}}}'"
        installation.handler(f"odd-{index}", f'#!/bin/sh\necho x >>"$HOME/runs"\n{said}\nexit 75\n')
        installation.add(f"notifications odd-{index} --task-id odd-{index}")
        installation.add("notifications fine")
    worker = installation.worker("notifications", "--concurrency", 8)
    unjudged = "select 1 from notifications where status <> 3"
    wait_for(lambda: not installation.rows(unjudged), what="a verdict on each")
    done = installation.rows("select count(*) from task_history where task_type = 'fine'")
    assert done == [(len(STRANGE),)]
    assert stays_true(lambda: len(installation.lines()) == len(STRANGE), 1), (
        "one ran again at once, uncounted"
    )
    rows = installation.rows("select attempts, due_at - unixepoch() from notifications")
    assert all(attempts == 0 and 50 < seconds <= 31 * 86_400 for attempts, seconds in rows), rows
    assert worker.poll() is None and "Traceback" not in worker.log.read_text()


@pytest.mark.parametrize("said", ['{"retry_after": 0}', '{"retry_after": 1e-300}', '{"pause": 0}'])
def test_not_now_is_not_as_fast_as_it_can(installation, beside, said):
    """What does not count would otherwise run hundreds of times a second, for ever."""
    beside(f"#!/bin/sh\ndate +%s.%N >>\"$HOME/runs\"\necho '{said}'\nexit 75\n")
    began = wait_for(
        lambda: (
            len(lines(installation.directory / "runs")) > 3
            and lines(installation.directory / "runs")
        )
    )
    assert float(began[3]) - float(began[0]) > 0.25


def test_not_now_without_a_time_waits_a_minute(installation, beside):
    beside("#!/bin/sh\nexit 75\n")
    wait_for(
        lambda: installation.rows("select 1 from notifications where status = 3"),
        what="the odd one's verdict",
    )
    assert 50 < installation.rows("select due_at - unixepoch() from notifications")[0][0] <= 61


def test_a_row_that_no_history_takes_holds_up_no_other(installation, beside):
    """A constraint that one row breaks is that row's matter; it is kept, out of everybody's way."""
    trigger = "create trigger no before insert on task_history when new.task_id = 'odd-1' begin select raise(abort, 'not this one'); end"
    worker = beside("#!/bin/sh\n", setup=lambda: installation.sqlite3(trigger))
    wait_for(
        lambda: installation.rows("select 1 from notifications where status = 3"),
        what="the odd one's verdict",
    )
    ((error, seconds),) = installation.rows("select error, due_at - unixepoch() from notifications")
    assert "not this one" in error and seconds > 3600
    wait_for(lambda: "not this one" in worker.log.read_text(), what="a word on it")


def claimed(installation, queue, count: int, owner: str | None = None) -> tuple:
    for number in range(count):
        installation.enqueue("notifications", "any", "--task-id", f"t-{number}")
    conn, owner = queue.connect(), owner or queue.owner_name()
    with queue.transaction(conn, durable=False):
        return conn, queue.claim(conn, "notifications", owner, limit=count)


def test_what_a_verdict_raises_buries_its_task_alone(installation, queue, monkeypatch):
    from taskqueue import outcome

    conn, tasks = claimed(installation, queue, 3)
    judge = outcome.judge

    def fails(conn, task, *args):
        if task.task_id == "t-1":
            assert queue.ack(conn, task)
            raise OverflowError("int too large to convert to float \ud800")
        return judge(conn, task, *args)

    monkeypatch.setattr(outcome, "judge", fails)
    with queue.transaction(conn):
        became = [outcome.record(conn, task, 0).status for task in tasks]
    assert became == ["completed", "failed", "completed"]
    assert [installation.history(f"t-{n}")["status"] for n in range(3)] == became
    assert "int too large" in installation.history("t-1")["error"]


@pytest.mark.parametrize("trouble", ["QueueBusy", "QueueUnavailable"])
def test_the_databases_own_trouble_is_tried_again(installation, queue, monkeypatch, trouble):
    from taskqueue import outcome

    conn, [task] = claimed(installation, queue, 1)

    def fails(*_):
        raise getattr(queue, trouble)("for now")

    monkeypatch.setattr(outcome, "judge", fails)
    with pytest.raises(queue.QueueError), queue.transaction(conn):
        outcome.record(conn, task, 0)
    assert installation.rows("select status from notifications") == [(2,)]
    assert installation.history("t-0") is None


def test_a_dead_workers_tasks_stand_alone_too(installation, queue, monkeypatch):
    from taskqueue import recovery

    claimed(installation, queue, 3, "1-dead")
    nack = queue.nack

    def fails(conn, task, **options):
        if task.task_id == "t-1":
            raise KeyError("odd")
        return nack(conn, task, **options)

    monkeypatch.setattr(queue, "nack", fails)
    became = {task.task_id: outcome.status for task, outcome in recovery.recover()[0]}
    assert became == {"t-0": "scheduled", "t-1": "failed", "t-2": "scheduled"}
