"""size, qsize, len, empty and the other counts are the database's, whoever changed it."""

import time

import pytest
from conftest import wait_for

pytestmark = pytest.mark.core

# A queue object that does what it is told on stdin, and says what it sees.
OTHER = """
import sys
import queue_helpers
queue = getattr(queue_helpers, sys.argv[1])("notifications")
for line in sys.stdin:
    print(eval(line), flush=True)
"""


def start_other(installation, kind: str):
    """Start a process with a queue object, and return it and say(), which evaluates there."""
    theirs = installation.start_python(OTHER, kind)

    def say(expression: str) -> str:
        theirs.stdin.write(expression + "\n")
        theirs.stdin.flush()
        return theirs.stdout.readline().strip()

    return theirs, say


@pytest.fixture(params=["get_queue", "get_ack_queue"])
def both(request, installation, queue):
    """(ours, theirs): a queue object here, and say() that evaluates an expression on one of another
    process.
    """
    theirs, say = start_other(installation, request.param)
    # The queue is open from here on.
    say("queue.name")
    with theirs:
        yield getattr(queue, request.param)("notifications"), say
        theirs.stdin.close()


def counts(queue) -> tuple:
    return queue.size, queue.qsize(), len(queue), queue.total, queue.empty()


COUNTS = "(queue.size, queue.qsize(), len(queue), queue.total, queue.empty())"


def agree(both, waiting: int) -> None:
    ours, say = both
    expected = (waiting, waiting, waiting, waiting, waiting == 0)
    assert counts(ours) == expected and say(COUNTS) == str(expected)


def test_after_puts_and_gets_of_either_side(both):
    ours, say = both
    agree(both, 0)
    say("queue.put({'n': 1})")
    agree(both, 1)
    ours.put({"n": 2})
    agree(both, 2)
    say("queue.get()")
    agree(both, 1)
    ours.get()
    agree(both, 0)
    with pytest.raises(Exception) as caught:
        ours.get_nowait()
    assert type(caught.value).__name__ == "Empty"
    assert say("type(queue).__name__") == type(ours).__name__


def test_after_enqueues_of_python_bash_and_enqueue_py(both, installation, queue):
    queue.enqueue_task("notifications", "t", {})
    installation.enqueue("notifications", "t")
    installation.sqlite3("""INSERT INTO notifications (data) VALUES ('{"a": 1}'), ('{"a": 2}')""")
    agree(both, 4)
    queue.enqueue_task("notifications", "t", {}, "same")
    queue.enqueue_task("notifications", "t", {}, "same")
    agree(both, 5)
    installation.sqlite3("DELETE FROM notifications WHERE id > 2")
    agree(both, 2)


def test_while_tasks_are_scheduled_and_when_they_become_due(both, queue):
    queue.enqueue_task("notifications", "t", {}, delay=3600)
    agree(both, 0)
    queue.enqueue_task("notifications", "t", {}, delay=0.3)
    wait_for(lambda: counts(both[0])[0] == 1, 5, "a due task")
    agree(both, 1)


def test_while_the_queue_is_paused_it_is_empty_to_those_who_would_take_from_it(both, installation):
    ours, say = both
    ours.put({})
    installation.sqlite3("insert into task_controls (queue, paused_at) values ('notifications', 1)")
    assert ours.empty() and say("queue.empty()") == "True"
    with pytest.raises(Exception, match="^$"):
        ours.get_nowait()
    installation.sqlite3("delete from task_controls")
    agree(both, 1)


def test_of_running_done_and_failed_tasks(installation, queue):
    ours = queue.get_ack_queue("notifications", max_attempts=1)
    theirs, say = start_other(installation, "get_ack_queue")

    def agree(*expected) -> None:
        ready, running, done, failed = expected
        here = ours.ready_count(), ours.unack_count(), ours.acked_count(), ours.ack_failed_count()
        assert here == expected
        assert say(
            "(queue.ready_count(), queue.unack_count(), queue.acked_count(), queue.ack_failed_count())"
        ) == str(expected)
        assert ours.qsize() == ready

    with theirs:
        for number in range(5):
            ours.put({"n": number})
        agree(5, 0, 0, 0)
        say("queue.get()[0]")
        mine = ours.get()[0]
        agree(3, 2, 0, 0)
        say("queue.ack(1)")
        agree(3, 1, 1, 0)
        # That was its only attempt.
        ours.nack(mine)
        agree(3, 0, 1, 1)
        say("queue.get()[0]")
        # There, it has four attempts and a back-off.
        say("queue.nack(3)")
        agree(2, 0, 1, 1)
        say("queue.get()[0]")
        say("queue.ack_failed(4)")
        agree(1, 0, 1, 2)
        theirs.stdin.close()
    began = time.monotonic()
    assert [ours.get(timeout=5)[0] for _ in range(2)] == [5, 3] and time.monotonic() - began < 3
