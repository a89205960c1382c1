"""async for task in consume(queue): acks, nacks and wakes by itself; nothing that happens to a
consumer loses a task.
"""

import asyncio
import gc
import logging
import sqlite3
import threading
import time

import pytest

pytestmark = pytest.mark.core


def run(coroutine, seconds: float = 30):
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def enqueue(queue, *values, name="notifications", **options) -> None:
    queue.enqueue_tasks(name, [{"task_type": "t", "data": {"n": n}, **options} for n in values])


def states(installation) -> dict:
    """{n: what became of it}"""
    waiting = "select json_extract(data, '$.data.n'), status, attempts from notifications"
    names = {1: "ready", 2: "claimed", 3: "scheduled"}
    found = {n: (names[status], attempts) for n, status, attempts in installation.rows(waiting)}
    finished = "select json_extract(data, '$.data.n'), status, attempts from task_history"
    return found | {n: (status, attempts) for n, status, attempts in installation.rows(finished)}


async def until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_asking_for_the_next_task_acks_the_one_before(installation, queue):
    enqueue(queue, 1, 2, 3)
    seen = []

    async def main():
        async for task in queue.consume("notifications"):
            told = task.queue, task.task_type, task.attempts, task.depth
            assert told == ("notifications", "t", 1, 0)
            assert states(installation)[task.data["n"]] == ("claimed", 1)
            assert all(states(installation)[n] == ("completed", 1) for n in seen)
            seen.append(task.data["n"])
            if len(seen) == 3:
                asyncio.get_running_loop().call_later(0.3, enqueue, queue, 4)
            if len(seen) == 4:
                break
        await until(lambda: states(installation)[4] == ("scheduled", 1))

    run(main())
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("how", ["exception", "break", "return"])
def test_leaving_the_loop_nacks_the_task_in_hand_at_once(installation, queue, how):
    enqueue(queue, 1, 2)

    async def leave():
        async for task in queue.consume("notifications", backoff=600):
            if task.data["n"] == 2:
                if how == "exception":
                    raise LookupError("no")
                if how == "return":
                    return
                break

    async def main():
        kept = None
        try:
            await leave()
        except LookupError as error:
            # The error is kept with its traceback, and so with the frames.
            kept = error
        await until(lambda: states(installation)[2] == ("scheduled", 1), 2)
        del kept

    run(main())
    assert states(installation) == {1: ("completed", 1), 2: ("scheduled", 1)}
    [(error,)] = installation.rows("select error from notifications")
    assert "left" in error


def test_a_task_that_is_nacked_too_often_is_buried(installation, queue):
    enqueue(queue, 1)

    async def main():
        for _ in range(3):
            consumer = queue.consume("notifications", max_attempts=3, backoff=0)
            await anext(consumer)
            await consumer.aclose()

    run(main())
    assert states(installation) == {1: ("failed", 3)}


def test_async_with_decides_for_each_task_and_the_loop_goes_on(installation, queue, caplog):
    enqueue(queue, 1, 2, 3)

    async def main():
        async for task in queue.consume("notifications", backoff=600):
            async with task:
                if task.data["n"] == 2:
                    raise ValueError("two is bad")
            word = "scheduled" if task.data["n"] == 2 else "completed"
            assert states(installation)[task.data["n"]] == (word, 1)
            if task.data["n"] == 3:
                return

    with caplog.at_level(logging.ERROR):
        run(main())
    assert states(installation) == {1: ("completed", 1), 2: ("scheduled", 1), 3: ("completed", 1)}
    assert installation.rows("select error from notifications") == [("ValueError: two is bad",)]
    assert "two is bad" in caplog.text and caplog.text.count("Traceback") == 1


def test_cancelled_while_it_waits_it_loses_nothing_and_claims_nothing_more(installation, queue):
    queue.connect()

    async def main():
        async def consume():
            async for _ in queue.consume("notifications"):
                raise AssertionError

        consumer = asyncio.create_task(consume())
        await asyncio.sleep(0.4)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        enqueue(queue, 1)
        await asyncio.sleep(0.3)

    run(main())
    assert states(installation) == {1: ("ready", 0)}


def test_cancelled_while_a_task_is_in_hand_it_gives_it_back(installation, queue):
    enqueue(queue, 1, 2)

    async def main():
        in_hand = asyncio.Event()

        async def consume(hold_by_with: bool):
            async for task in queue.consume("notifications", backoff=0):
                in_hand.set()
                if hold_by_with:
                    async with task:
                        await asyncio.sleep(60)
                await asyncio.sleep(60)

        for hold_by_with in (True, False):
            consumer = asyncio.create_task(consume(hold_by_with))
            await in_hand.wait()
            in_hand.clear()
            consumer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await consumer
            await until(
                lambda: {state for state, _ in states(installation).values()} == {"ready"}, 2
            )

    run(main())
    queue.enqueue_task("notifications", "t", {"n": 3})
    assert sorted(queue.dequeue_task("notifications")["data"]["n"] for _ in range(3)) == [1, 2, 3]


def test_cancelled_at_any_moment_it_leaves_no_task_claimed(installation, queue):
    """Also twice in a row, and in the middle of the claim."""
    enqueue(queue, *range(40), priority=1)

    async def main():
        async def consume():
            async for _ in queue.consume("notifications", max_attempts=100, backoff=0):
                await asyncio.sleep(0.001)

        for n in range(60):
            consumer = asyncio.create_task(consume())
            await asyncio.sleep(n * 0.0002)
            consumer.cancel()
            for _ in range(n % 3):
                await asyncio.sleep(0)
            if n % 3:
                consumer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await consumer
        gc.collect()
        await until(
            lambda: "claimed" not in {state for state, _ in states(installation).values()}, 5
        )

    run(main())
    assert sorted(states(installation)) == list(range(40))


def test_the_end_of_the_loop_gives_back_what_is_in_hand(installation, queue):
    """asyncio.run cancels what is left, and so does Ctrl-C."""
    enqueue(queue, 1)

    async def main():
        in_hand = asyncio.Event()

        async def consume():
            async for _ in queue.consume("notifications", backoff=0):
                in_hand.set()
                await asyncio.sleep(60)

        main.task = asyncio.create_task(consume())
        await in_hand.wait()

    run(main())
    assert states(installation)[1][0] == "ready"


def test_two_consumers_share_a_queue(installation, queue):
    seen = {"a": [], "b": []}

    async def main():
        async def consume(name):
            async for task in queue.consume("notifications"):
                seen[name].append(task.data["n"])
                await asyncio.sleep(0.002)

        consumers = [asyncio.create_task(consume(name)) for name in seen]
        await asyncio.sleep(0.2)
        for n in range(60):
            await asyncio.to_thread(enqueue, queue, n)
        await until(lambda: list(states(installation).values()) == [("completed", 1)] * 60)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)

    run(main())
    assert sorted(seen["a"] + seen["b"]) == list(range(60)) and all(seen.values())


OTHER = """
import asyncio, sys
import queue_helpers as q
async def main():
    async for task in q.consume("notifications"):
        print(task.data["n"], flush=True)
asyncio.run(main())
"""


def test_consumers_of_two_processes_share_a_queue_and_one_that_is_killed_loses_nothing(
    installation, queue
):
    queue.connect()
    log = installation.directory / "other"
    with open(log, "wb") as file:
        other = installation.start_python(OTHER, stdout=file)
    seen = []

    async def main():
        async def consume():
            async for task in queue.consume("notifications"):
                seen.append(task.data["n"])

        enqueue(queue, *range(10))
        await until(lambda: log.read_bytes())
        consumer = asyncio.create_task(consume())
        for n in range(10, 100):
            await asyncio.to_thread(enqueue, queue, n)
            if n == 60:
                other.kill()
        await until(
            lambda: (
                len([1 for state, _ in states(installation).values() if state == "completed"])
                == 100
            )
        )
        consumer.cancel()
        await asyncio.gather(consumer, return_exceptions=True)

    run(main())
    together = seen + [int(line) for line in log.read_text().splitlines()]
    assert set(together) == set(range(100)) and len(together) <= 101 and seen


@pytest.mark.alone
def test_it_wakes_promptly_and_the_loop_is_not_blocked_meanwhile(installation, queue):
    queue.connect()
    late, ticks = [], []

    async def main():
        async def tick():
            before = time.monotonic()
            while True:
                await asyncio.sleep(0.01)
                ticks.append(time.monotonic() - before)
                before = time.monotonic()

        ticking = asyncio.create_task(tick())
        asyncio.get_running_loop().call_later(0.6, lambda: threading.Thread(target=put).start())

        def put():
            enqueue(queue, time.monotonic())

        async for task in queue.consume("notifications"):
            late.append(time.monotonic() - task.data["n"])
            if len(late) == 10:
                break
            asyncio.get_running_loop().call_later(
                0.05 * len(late), lambda: threading.Thread(target=put).start()
            )
        ticking.cancel()

    run(main())
    assert sorted(late)[-2] < 0.1 and sorted(ticks)[-3] < 0.1


def test_a_scheduled_task_comes_when_it_is_due(installation, queue):
    queue.connect()
    enqueue(queue, 1, delay=0.4)
    began = time.monotonic()

    async def main():
        async for _ in queue.consume("notifications"):
            return time.monotonic() - began

    assert 0.35 < run(main()) < 0.8


def test_a_locked_database_while_it_acks_does_not_strand_the_task(installation, queue, monkeypatch):
    """The consumer hears of it; the task must not stay claimed by a process that no longer thinks
    of it.
    """
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 100)
    enqueue(queue, 1)
    lock = sqlite3.connect(installation.db, isolation_level=None, check_same_thread=False)

    async def consumer():
        try:
            async for _ in queue.consume("notifications", backoff=0):
                lock.execute("begin immediate")
                asyncio.get_running_loop().call_later(0.5, lock.execute, "rollback")
        except queue.QueueBusy:
            pass

    async def main():
        consuming = asyncio.create_task(consumer())
        await until(lambda: states(installation)[1][0] == "claimed", 5)
        await until(lambda: states(installation)[1][0] != "claimed", 5)
        # It went on to wait for the next task: then the ack must have come through.
        if not consuming.done():
            assert states(installation)[1] == ("completed", 1)
            consuming.cancel()

    run(main(), 15)
    lock.close()


def test_a_task_says_which_it_is(queue):
    """And not its payload, which may be a megabyte."""
    queue.enqueue_task("notifications", "review", {"secret": 1}, "r-1")

    async def main():
        async for task in queue.consume("notifications", max_attempts=7):
            said = [repr(task.task), repr(task), str(task)]
            async with task:
                pass
            return [*said, repr(task)]

    said, *delivered, settled = run(main())
    assert said == "<Task 'r-1' of notifications: review, attempt 1 of 7>"
    assert delivered == ["<Delivery 'r-1' of notifications: review, attempt 1 of 7, claimed>"] * 2
    assert settled == "<Delivery 'r-1' of notifications: review, attempt 1 of 7, settled>"


def test_a_queue_name_is_refused_at_the_first_step(queue):
    async def main():
        async for _ in queue.consume("Not a queue"):
            pass

    with pytest.raises(queue.InvalidTask):
        run(main())
