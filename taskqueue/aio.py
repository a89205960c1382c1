"""Consuming a queue from asyncio: an async iterator that wakes by itself, acks and nacks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import queue_helpers as q

# How long to wait before the next attempt where the database was busy or could not be used.
RETRY_SECONDS = 0.5

# How long a consumer that leaves may hold up its event loop for the write lock; after that a thread
# goes on.
LEAVE_TIMEOUT_MS = 200

LEFT = "its consumer left the loop"


class Delivery:
    """A task that consume() hands out, with the fields of Task.

    Asking for the next one acks it. `async with` decides earlier: the block's end acks; an
    exception in it nacks and is logged, and the loop goes on. A cancellation in the block puts the
    task back, and this attempt does not count.
    """

    def __init__(self, task: q.Task, state: Path, threads: ThreadPoolExecutor) -> None:
        self.task, self._state, self._threads = task, state, threads
        self._settled, self._pid = False, os.getpid()

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def __del__(self) -> None:
        # An event loop that was closed ends no generator: nobody would ever settle the task.
        if not self._settled and self._pid == os.getpid():
            try:
                _start(self._threads, self.settle, q.nack, error=LEFT)
            except RuntimeError:
                # The interpreter ends, and the task is taken back as a dead owner's.
                pass

    async def __aenter__(self) -> Delivery:
        return self

    async def __aexit__(self, kind, error, traceback) -> bool:
        if error is not None and not isinstance(error, Exception):
            self.settle_now(q.release)
            return False
        if error is None:
            settling = _start(self._threads, self.settle, q.ack)
        else:
            logging.getLogger(__name__).error(
                "queue %r: task %s failed", self.queue, self.task_id, exc_info=error
            )
            settling = _start(
                self._threads, self.settle, q.nack, error=f"{type(error).__name__}: {error}"
            )
        await _result(settling)
        return error is not None

    def settle_now(self, verb: Callable, **told) -> None:
        """settle() in this thread if the lock is had in LEAVE_TIMEOUT_MS, or else in another."""
        if self._settled:
            return
        try:
            self._settle_once(verb, LEAVE_TIMEOUT_MS, told)
        except (q.QueueBusy, q.QueueUnavailable):
            _start(self._threads, self.settle, verb, **told)

    def settle(self, verb: Callable, **told) -> None:
        """Ack, nack or release the task, unless that was done.

        It is tried again for as long as this process lives: nobody else may do it meanwhile. What
        is in the way is logged once.
        """
        said = False
        while not self._settled:
            try:
                self._settle_once(verb, None, told)
            except (q.QueueBusy, q.QueueUnavailable) as error:
                if not said:
                    said = True
                    _say(self.queue, f"task {self.task_id} could not be settled", error)
                # The interpreter would wait for this thread, and others may take the task when it
                # has ended.
                if _interpreter_ends():
                    return
                time.sleep(RETRY_SECONDS)

    def _settle_once(self, verb: Callable, busy_timeout_ms: int | None, told: dict) -> None:
        conn = q.connect(self._state, busy_timeout_ms=busy_timeout_ms)
        q.ensure_queue(conn, self.queue)
        # A forked child has a copy, but the task is its parent's.
        done = False
        if self.task.owner == q.owner_name(self._state):
            with q.transaction(conn):
                done = verb(conn, self.task, **told)
        self._settled = True
        if not done:
            q.not_held(conn, self.task)
        q.wake(self._state)


def _say(queue: str, what: str, error: Exception) -> None:
    logging.getLogger(__name__).warning("queue %r: %s, and is tried again: %s", queue, what, error)


def _interpreter_ends() -> bool:
    """Whether the interpreter waits for its threads to end: it starts no others then."""
    try:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(int)
    except RuntimeError:
        return True
    return False


def _start(threads: ThreadPoolExecutor, function: Callable, *args, **options) -> Future:
    """Call function in one of these threads, or in a thread of its own when they were shut down.

    Raises RuntimeError when the interpreter ends.
    """
    try:
        return threads.submit(function, *args, **options)
    except RuntimeError:
        alone = ThreadPoolExecutor(1)
        try:
            return alone.submit(function, *args, **options)
        finally:
            alone.shutdown(wait=False)


async def _result(future: Future):
    """What a thread's call returns or raises. A cancellation ends the wait, never the call."""
    return await asyncio.shield(asyncio.wrap_future(future))


async def consume(
    queue_name: str, *, max_attempts: int = q.MAX_ATTEMPTS, backoff: float = q.BACKOFF_SECONDS
) -> AsyncIterator[Delivery]:
    """Yield the queue's tasks for ever, as they come: `async for task in consume("approvals")`.

    Asking for the next task acks the one before; leaving the loop (an exception, break,
    cancellation) nacks it, with a back-off of `backoff` seconds that doubles, until `max_attempts`
    are spent. Usable from many coroutines at once: each task goes to one. A database that is
    locked, full or out of reach is logged once and tried again.

    Raises InvalidTask for what is no queue name.
    """
    q.check_queue_name(queue_name)
    state, heard = q.STATE_DIR, _LoopEvent(asyncio.get_running_loop())
    q.Watch.of(state).listeners.add(heard)
    # A thread of its own: it has one connection, and calls of others in the loop's threads do not
    # hold it up.
    threads = ThreadPoolExecutor(1, thread_name_prefix=f"consume {queue_name}")

    # Set when the consumer is cancelled: a claim that still waits for the lock then takes nothing.
    left = threading.Event()

    def ack_and_claim(before: Delivery | None) -> tuple[q.Task | None, float]:
        if before is not None:
            before.settle(q.ack)
        conn = q.connect(state)
        q.ensure_queue(conn, queue_name)
        tasks, (found, overdue) = [], q.look(conn, queue_name)
        if found:
            owner, terms = q.owner_name(state), {"max_attempts": max_attempts, "backoff": backoff}
            with q.transaction(conn, durable=False):
                if not left.is_set():
                    tasks = q.claim(conn, queue_name, owner, overdue=overdue, **terms)
        return (tasks[0], 0.0) if tasks else (None, q.sleep_seconds(conn, [queue_name]))

    before, said = None, False
    try:
        while True:
            heard.clear()
            claiming = _start(threads, ack_and_claim, before)
            try:
                task, pause = await _result(claiming)
            except asyncio.CancelledError:
                left.set()
                claiming.add_done_callback(partial(_put_back, state, threads))
                raise
            except (q.QueueBusy, q.QueueUnavailable) as error:
                task, pause = None, RETRY_SECONDS
                if not said:
                    said = True
                    _say(queue_name, "no task could be claimed", error)
            else:
                said = False
            before = None
            if task is None:
                await heard.wait(pause)
                continue
            before = Delivery(task, state, threads)
            try:
                yield before
            except BaseException:
                before.settle_now(q.nack, error=LEFT)
                raise
    finally:
        threads.shutdown(wait=False)


def _put_back(state: Path, threads: ThreadPoolExecutor, claimed: Future) -> None:
    """Release what was claimed for a consumer that was cancelled meanwhile."""
    if not claimed.cancelled() and claimed.exception() is None and claimed.result()[0] is not None:
        _start(threads, Delivery(claimed.result()[0], state, threads).settle, q.release)


class _LoopEvent:
    """An asyncio event that any thread may set, and that can be waited for with a timeout.

    asyncio.wait_for forgets a cancellation that comes together with its result (Python 3.11).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._event, self._loop = asyncio.Event(), loop

    def set(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:
            # The loop is closed, and nobody waits any more.
            pass

    def clear(self) -> None:
        self._event.clear()

    async def wait(self, seconds: float) -> None:
        """Return when it is set, or after so many seconds."""
        timer = self._loop.call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            timer.cancel()
