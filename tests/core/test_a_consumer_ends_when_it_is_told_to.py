"""consume() ends when it is cancelled or left, at whatever moment, and at nothing else."""

import asyncio
import json
import logging
import random
import sqlite3
import threading

import pytest
from conftest import wait_for

pytestmark = pytest.mark.core

TRIES = 150


def run(coroutine, seconds: float = 90):
    """The coroutine's result; what it leaves behind for longer is a failure."""

    async def limited():
        async with asyncio.timeout(seconds):
            return await coroutine

    return asyncio.run(limited())


def count(installation, where: str) -> int:
    return installation.rows(f"select count(*) from notifications where {where}")[0][0]


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("hold", ["the loop", "async with"])
def test_a_cancellation_that_comes_with_a_task_is_never_forgotten(installation, queue, hold):
    queue.connect()
    left_running, delivered = [], []

    async def consume():
        async for task in queue.consume("notifications", max_attempts=10 * TRIES, backoff=0):
            delivered.append(task.task_id)
            if hold == "async with":
                async with task:
                    await asyncio.sleep(0)

    async def main():
        loop = asyncio.get_running_loop()
        for n in range(TRIES):
            consumer = asyncio.create_task(consume())
            await asyncio.sleep(random.uniform(0, 0.01))
            putting = loop.run_in_executor(
                None, queue.enqueue_task, "notifications", "t", {"n": n}, str(n)
            )
            await asyncio.sleep(random.uniform(0, 0.006))
            consumer.cancel()
            done, _ = await asyncio.wait([consumer], timeout=5)
            if not done:
                left_running.append(n)
                consumer.cancel()
            await putting
        await until(lambda: count(installation, "status = 2") == 0)

    run(main())
    assert left_running == []
    waiting = {task_id for (task_id,) in installation.rows("select task_id from notifications")}
    finished = {
        task_id
        for (task_id,) in installation.rows(
            "select task_id from task_history where status = 'completed'"
        )
    }
    assert waiting.isdisjoint(finished) and waiting | finished == {str(n) for n in range(TRIES)}
    # What was never in hand cannot have been acknowledged.
    assert finished <= set(delivered)


def test_a_lock_that_is_held_while_it_claims_does_not_end_it(
    installation, queue, monkeypatch, caplog
):
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 50)
    queue.enqueue_task("notifications", "t", {"n": 1})
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")

    async def main():
        consumer = queue.consume("notifications")
        first = asyncio.create_task(anext(consumer))
        # Long enough for some attempts.
        await until(lambda: "no task could be claimed" in caplog.text)
        await asyncio.sleep(1.5)
        assert not first.done()
        lock.execute("rollback")
        assert (await first).data == {"n": 1}
        await consumer.aclose()

    with caplog.at_level(logging.WARNING):
        run(main())
    lock.close()
    assert caplog.text.count("no task could be claimed") == 1


def test_a_lock_that_is_held_while_it_acks_does_not_end_it(
    installation, queue, monkeypatch, caplog
):
    monkeypatch.setattr(queue, "BUSY_TIMEOUT_MS", 50)
    queue.enqueue_tasks("notifications", [{"task_type": "t", "data": {"n": n}} for n in (1, 2)])
    lock = sqlite3.connect(installation.db, isolation_level=None)

    async def main():
        consumer = queue.consume("notifications")
        assert (await anext(consumer)).data == {"n": 1}
        lock.execute("begin immediate")
        second = asyncio.create_task(anext(consumer))
        await until(lambda: "could not be settled" in caplog.text)
        await asyncio.sleep(1.5)
        assert not second.done() and count(installation, "status = 2") == 1
        lock.execute("rollback")
        assert (await second).data == {"n": 2}
        await consumer.aclose()

    with caplog.at_level(logging.WARNING):
        run(main())
    lock.close()
    assert caplog.text.count("could not be settled") == 1
    assert installation.rows("select status, attempts from task_history") == [("completed", 1)]


@pytest.mark.parametrize("moment", ["claim", "ack"])
def test_a_cancellation_is_not_kept_waiting_by_a_lock(installation, queue, moment):
    """The lock is held for as long as the test lasts: nothing but the cancellation can end the
    consumer.
    """
    queue.enqueue_tasks("notifications", [{"task_type": "t", "data": {}}] * 2)
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("create table claims (id)")

    async def main():
        consumer = queue.consume("notifications", backoff=0)
        if moment == "ack":
            await anext(consumer)
        lock.execute("""create trigger a_claim after update of attempts on notifications
                        when new.status = 2 begin insert into claims values (new.id); end""")
        lock.execute("begin immediate")
        going_on = asyncio.create_task(anext(consumer))
        await asyncio.sleep(0.2)
        going_on.cancel()
        # Shorter than one wait for the lock.
        await asyncio.wait([going_on], timeout=queue.BUSY_TIMEOUT_MS / 2000)
        assert going_on.cancelled()
        lock.execute("rollback")
        await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("consume ")])

    run(main())
    assert count(installation, "status = 2") == 0
    # The claim that waited for the lock took nothing, not even for a moment.
    assert lock.execute("select * from claims").fetchall() == []
    lock.close()
    assert len(installation.rows("select 1 from task_history")) == (moment == "ack")
    assert count(installation, "attempts = 0") == (2 if moment == "claim" else 1)


FULL_DISK = """
import asyncio, logging, os, resource, sys
import queue_helpers as q
logging.basicConfig(format="%(levelname)s %(message)s")
q.connect()

async def main():
    async for task in q.consume("notifications"):
        print(task.data["n"], flush=True)
        if task.data["n"] == 1:
            # From now on no file can grow.
            no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, no_limit[1]))
            asyncio.get_running_loop().call_later(2, resource.setrlimit, resource.RLIMIT_FSIZE, no_limit)
        if task.data["n"] == 2:
            return
asyncio.run(main())
"""


def test_a_full_disk_while_it_acks_does_not_end_it(installation, queue):
    queue.enqueue_tasks("notifications", [{"task_type": "t", "data": {"n": n}} for n in (1, 2)])
    consumer = installation.python(FULL_DISK)
    assert consumer.stdout == "1\n2\n" and consumer.returncode == 0, consumer.stderr
    assert consumer.stderr.count("could not be settled") == 1 and "Traceback" not in consumer.stderr
    assert installation.rows("select json_extract(data, '$.data.n'), status from task_history") == [
        (1, "completed")
    ]
    assert installation.rows("select status from notifications") == [(3,)]


def test_an_event_loop_that_is_closed_without_a_word_leaves_no_task_claimed(installation, queue):
    """Neither aclose() nor a cancellation comes then."""
    queue.enqueue_task("notifications", "t", {})
    loop = asyncio.new_event_loop()
    consumer = queue.consume("notifications", backoff=600)
    loop.run_until_complete(anext(consumer))
    loop.close()
    del consumer
    wait_for(lambda: count(installation, "status = 3"), what="the task that goes back")


def test_the_end_of_the_loops_own_threads_does_not_end_it(installation, queue):
    queue.enqueue_tasks("notifications", [{"task_type": "t", "data": {"n": n}} for n in (1, 2)])

    async def main():
        consumer = queue.consume("notifications")
        await anext(consumer)
        await asyncio.get_running_loop().shutdown_default_executor()
        assert (await anext(consumer)).data == {"n": 2}
        await consumer.aclose()

    run(main())
    assert len(installation.rows("select 1 from task_history")) == 1


LEAVES = """
import asyncio, sys
import queue_helpers as q

async def main():
    async for task in q.consume("notifications"):
        q.STATE_DIR.rename(f"{q.STATE_DIR}.away")
        q.STATE_DIR.touch()
        break

asyncio.run(main())
"""


def test_a_process_ends_although_its_last_task_cannot_be_put_back(installation):
    """It tried again for ever. The task is taken back as a dead owner's."""
    installation.enqueue("notifications", "t", "{}")
    done = installation.python(LEAVES)
    assert done.returncode == 0 and "could not be settled" in done.stderr, done.stderr


def test_a_database_that_is_moved_away_does_not_end_it(installation, queue):
    """The task in hand is gone with it, which is said; the next one comes from the new database."""
    queue.enqueue_task("mine", "t", {"n": 1})

    async def main():
        consumer = queue.consume("mine")
        await anext(consumer)
        await asyncio.to_thread(installation.state.rename, installation.directory / "moved away")
        second = asyncio.create_task(anext(consumer))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(installation.enqueue, "mine", "t", json.dumps({"n": 2}))
        assert (await second).data == {"n": 2}
        await consumer.aclose()

    run(main())
