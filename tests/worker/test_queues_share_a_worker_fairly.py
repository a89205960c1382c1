import json
import time

from conftest import wait_for
from processes import lines, stays_true

RECORD = '#!/bin/sh\necho "$TASK_QUEUE" >>"$HOME/runs"\n'
# Each says when it begins and ends, in one order for all: appends of a line are whole.
SPAN = '#!/bin/sh\necho "begin" >>"$HOME/runs"\nsleep 0.15\necho "end" >>"$HOME/runs"\n'


def fill(installation, queue: str, count: int, task_type: str = "it", *options) -> None:
    installation.enqueue(
        queue,
        task_type,
        "--jsonl",
        *options,
        input="".join(f'{{"n": {n}}}\n' for n in range(count)),
    )


def drain(installation, *options) -> None:
    worker = installation.worker(*options, "--drain", ready=False)
    assert worker.wait(30) == 0


def at_once(runs: list[str]) -> list[int]:
    """Return how many ran after each line."""
    running, counts = 0, []
    for line in runs:
        running += 1 if line == "begin" else -1
        counts.append(running)
    return counts


def test_one_of_each_in_turn(installation):
    """Where there are fewer places than queues."""
    installation.handler("it", RECORD)
    for queue, count in (("approvals", 30), ("completions", 10), ("notifications", 5)):
        fill(installation, queue, count)
    drain(installation, "approvals", "completions", "notifications", "--concurrency", 1)
    runs = lines(installation.directory / "runs")
    assert len(runs) == 45
    assert all(len(set(runs[start : start + 3])) == 3 for start in range(0, 15, 3)), runs
    assert all(len(set(runs[start : start + 2])) == 2 for start in range(15, 25, 2)), runs


def test_with_many_at_a_time_too(installation):
    installation.handler("it", RECORD.replace("\necho", "\nsleep 0.05\necho"))
    fill(installation, "approvals", 40)
    fill(installation, "notifications", 8)
    drain(installation, "approvals", "notifications", "--concurrency", 4)
    runs = lines(installation.directory / "runs")
    assert len(runs) == 48 and runs[:20].count("notifications") == 8, runs


def test_a_flood_of_important_tasks_in_one_does_not_starve_another(installation):
    installation.handler("it", RECORD)
    fill(installation, "approvals", 30, "it", "--priority", 1000)
    fill(installation, "notifications", 1)
    drain(installation, "approvals", "notifications")
    assert "notifications" in lines(installation.directory / "runs")[:2]


def test_a_queue_that_only_fails_delays_no_other(installation):
    installation.handler("it", RECORD)
    installation.handler("bad", "#!/bin/sh\nexit 1\n")
    fill(installation, "approvals", 20, "bad")
    fill(installation, "notifications", 20)
    began = time.monotonic()
    installation.worker("approvals", "notifications", "--backoff", 3600)
    wait_for(lambda: len(lines(installation.directory / "runs")) == 20)
    assert time.monotonic() - began < 10


def test_n_run_really_at_once_and_never_more(installation):
    installation.handler("it", SPAN)
    fill(installation, "notifications", 20)
    fill(installation, "approvals", 4)
    drain(installation, "notifications", "approvals", "--concurrency", 4)
    runs = lines(installation.directory / "runs")
    assert len(runs) == 48 and max(at_once(runs)) == 4


def test_one_at_a_time_unless_told(installation):
    installation.handler("it", SPAN)
    fill(installation, "notifications", 4)
    drain(installation, "notifications")
    assert at_once(lines(installation.directory / "runs")) == [1, 0] * 4


def test_a_worker_takes_no_more_than_it_can_run(installation):
    installation.handler(
        "it", '#!/bin/sh\necho x >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.02; done\n'
    )
    fill(installation, "notifications", 10)
    installation.worker("notifications", "--concurrency", 3)
    wait_for(lambda: len(lines(installation.directory / "runs")) == 3)
    claimed = "select count(*) from notifications where status = 2"
    assert stays_true(lambda: installation.rows(claimed) == [(3,)], 0.5)
    # What the first worker left is for this one.
    other = installation.worker("notifications", "--concurrency", 2)
    wait_for(lambda: len(lines(installation.directory / "runs")) == 5)
    assert installation.rows(claimed) == [(5,)] and other.poll() is None
    (installation.directory / "go").touch()
    wait_for(lambda: installation.rows("select count(*) from task_history") == [(10,)])


def test_many_workers_run_each_task_once(installation):
    installation.handler("it", '#!/bin/sh\necho "$TASK_ID" >>"$HOME/runs"\n')
    lines_in = "".join(
        json.dumps({"task_type": "it", "data": {}, "task_id": f"t{n}"}) + "\n" for n in range(120)
    )
    installation.enqueue("notifications", "--jsonl", input=lines_in)
    workers = [
        installation.worker("notifications", "--concurrency", 2, "--drain", ready=False)
        for _ in range(3)
    ]
    assert [worker.wait(30) for worker in workers] == [0, 0, 0]
    assert sorted(lines(installation.directory / "runs")) == sorted(f"t{n}" for n in range(120))
    assert installation.rows(
        "select count(*), max(attempts) from task_history where status = 'completed'"
    ) == [(120, 1)]
