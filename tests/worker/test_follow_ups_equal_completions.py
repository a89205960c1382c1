"""--then: for each task that is recorded as done, there is one next task."""

import json

import pytest
from conftest import wait_for


def next_ones(installation) -> list[dict]:
    return [
        json.loads(data)
        for (data,) in installation.rows("select data from completions order by id")
    ]


def completions(installation) -> int:
    return installation.rows("select count(*) from task_history where status = 'completed'")[0][0]


def test_of_one_task_id_in_two_queues(installation):
    installation.handler("it", '#!/bin/sh\necho "{\\"queue\\": \\"$TASK_QUEUE\\"}"\n')
    for queue in ("notifications", "approvals"):
        installation.enqueue(queue, "it", "--task-id", "same")
    assert (
        installation.worker(
            "notifications", "approvals", "--drain", "--then", "completions", ready=False
        ).wait(20)
        == 0
    )
    assert completions(installation) == 2
    assert sorted(one["data"]["queue"] for one in next_ones(installation)) == [
        "approvals",
        "notifications",
    ]
    assert len({one["task_id"] for one in next_ones(installation)}) == 2


@pytest.mark.parametrize(
    "again",
    [["tasks.py", "retry", "same"], ["enqueue.py", "notifications", "it", "--task-id", "same"]],
)
def test_of_a_task_that_ran_again_while_its_first_result_waits(installation, again):
    installation.handler("it", "#!/bin/sh\necho '{}'\n")
    installation.enqueue("notifications", "it", "--task-id", "same")
    for number in (1, 2, 3):
        assert (
            installation.worker(
                "notifications", "--drain", "--then", "completions", ready=False
            ).wait(20)
            == 0
        )
        assert len(next_ones(installation)) == number
        if number < 3:
            done = installation.run(*again)
            assert done.returncode == 0, done.stderr
    assert len({one["task_id"] for one in next_ones(installation)}) == 3


def test_of_a_queue_that_feeds_itself(installation):
    installation.handler("it", '#!/bin/sh\necho "{}"\n[ $TASK_DEPTH -lt 5 ] || exit 65\n')
    installation.enqueue("notifications", "it", "--task-id", "same")
    assert (
        installation.worker(
            "notifications", "--drain", "--then", "notifications", ready=False
        ).wait(20)
        == 0
    )
    assert completions(installation) == 4


def test_a_result_that_is_longer_than_a_task_may_be_is_kept_as_text_and_said_so(installation):
    handler = "import sys\nsys.stdout.write('{\"text\": \"' + 'x' * (17 * 2**20) + 'end\"}')\n"
    installation.handler("it", "#!/usr/bin/env python3\n" + handler)
    task = installation.enqueue("notifications", "it")
    installation.worker("notifications", "--then", "completions")
    assert installation.finished(task, 60)["status"] == "completed"
    (one,) = next_ones(installation)
    assert one["data"]["result"].endswith('end"}') and "text" not in one["data"]
    assert one["data"]["result_is_cut"] is True and one["data"]["result_bytes"] > 17 * 2**20


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000], ids=lambda text: text[:9]
)
def test_a_number_that_no_reader_of_json_reads_makes_the_result_text(installation, number):
    installation.handler("it", f"#!/bin/sh\nprintf '%s' '{{\"n\": {number}}}'\n")
    task = installation.enqueue("notifications", "it")
    installation.worker("notifications", "--then", "completions")
    assert installation.finished(task)["status"] == "completed"
    (one,) = next_ones(installation)
    assert one["data"] == {"result": f'{{"n": {number}}}'}


def test_plain_text_is_text_and_nothing_more_needs_to_be_said(installation):
    installation.handler("it", "#!/bin/sh\necho well\n")
    task = installation.enqueue("notifications", "it")
    installation.worker("notifications", "--then", "completions")
    installation.finished(task)
    wait_for(lambda: next_ones(installation))
    assert next_ones(installation)[0]["data"] == {"result": "well\n"}
