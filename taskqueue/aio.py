"""Consume a queue from asyncio: an async iterator that claims, acks, nacks and wakes by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import queue_helpers as q

# How long to wait before the next attempt where the database is busy or cannot be used.
RETRY_SECONDS = 0.5

# How long a consumer that leaves may block its event loop for the write lock. After that, a thread
# goes on.
LEAVE_TIMEOUT_MS = 200

LEFT = "its consumer left the loop"


class Delivery:
    """A claimed task, as consume() yields it.

    Asking for the next task acks this one. `async with task:` decides earlier: the end of the block
    acks; an exception in it nacks and is logged, and the loop goes on; a cancellation puts the task
    back, and the attempt does not count.

    Its attributes are those of `task`, a queue_helpers.Task; docs/reference.md says what each is.
    Raises ValueError from data, envelope and depth where the stored JSON cannot be read.
    """

    def __init__(self, task: q.Task, state: Path, threads: ThreadPoolExecutor) -> None:
        self.task, self._state, self._threads = task, state, threads
        self._settled, self._pid = False, os.getpid()

    def __repr__(self) -> str:
        state = "settled" if self._settled else "claimed"
        return f"<Delivery {repr(self.task).removeprefix('<Task ').removesuffix('>')}, {state}>"

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def __del__(self) -> None:
        # A closed event loop ends no generator: nobody else would settle the task.
        if not self._settled and self._pid == os.getpid():
            try:
                _start(self._threads, self.settle, q.nack, error=LEFT)
            except RuntimeError:
                # The interpreter ends. The task is then recovered, as a dead owner's.
                pass

    async def __aenter__(self) -> Delivery:
        return self

    async def __aexit__(self, kind, error, traceback) -> bool:
        if error is None:
            settling = _start(self._threads, self.settle, q.ack)
        elif isinstance(error, Exception):
            _logger().error("queue %r: task %s failed", self.queue, self.task_id, exc_info=error)
            why = f"{type(error).__name__}: {error}"
            settling = _start(self._threads, self.settle, q.nack, error=why)
        else:
            self.settle_now(q.release)
            return False
        await _result(settling)
        return error is not None

    def settle_now(self, verb: Callable, **told) -> None:
        """Settle in this thread if the lock comes within LEAVE_TIMEOUT_MS, else in another one."""
        if self._settled:
            return
        try:
            self._settle_once(verb, LEAVE_TIMEOUT_MS, told)
        except (q.QueueBusy, q.QueueUnavailable):
            _start(self._threads, self.settle, verb, **told)

    def settle(self, verb: Callable, **told) -> None:
        """Ack, nack or release the task, unless that is done.

        Tries for as long as the process lives, since nobody else may settle it meanwhile, and logs
        once why it has to.
        """
        said = False
        while not self._settled:
            try:
                self._settle_once(verb, None, told)
            except (q.QueueBusy, q.QueueUnavailable) as error:
                if not said:
                    _say(self.queue, f"task {self.task_id} could not be settled", error)
                said = True
                # The interpreter would wait for this thread, and nobody may recover the task until
                # the process has ended.
                if _interpreter_ends():
                    return
                time.sleep(RETRY_SECONDS)

    def _settle_once(self, verb: Callable, busy_timeout_ms: int | None, told: dict) -> None:
        conn = q.connect(self._state, busy_timeout_ms=busy_timeout_ms)
        q.ensure_queue(conn, self.queue)
        done = False
        # A forked child has a copy of this, but the task is its parent's.
        if self.task.owner == q.owner_name(self._state):
            with q.transaction(conn):
                done = verb(conn, self.task, **told)
        self._settled = True
        if not done:
            q.not_held(conn, self.task)
        q.wake(self._state)


async def consume(
    queue_name: str, *, max_attempts: int = q.MAX_ATTEMPTS, backoff: float = q.BACKOFF_SECONDS
) -> AsyncIterator[Delivery]:
    """Yield the queue's tasks as they come, for ever.

        async for task in consume("approvals"):
            await review(task.data)

    Asking for the next task acks the one before. Leaving the loop by break, an exception or a
    cancellation nacks it: it is tried again after `backoff` seconds, which double each time, until
    `max_attempts` are spent. Any number of coroutines and processes may consume one queue: each
    task goes to one. A database that is locked, full or out of reach is logged once and tried again.

    Raises InvalidTask, at the first step, where queue_name cannot be a queue's name.
    """
    claims = _Claims(q.check_queue_name(queue_name), max_attempts, backoff)
    heard = _LoopEvent(asyncio.get_running_loop())
    q.Watch.of(claims.state).listeners.add(heard)
    delivery, said = None, False
    try:
        while True:
            heard.clear()
            try:
                delivery, pause = await claims.next(delivery)
                said = False
            except (q.QueueBusy, q.QueueUnavailable) as error:
                delivery, pause = None, RETRY_SECONDS
                if not said:
                    _say(queue_name, "no task could be claimed", error)
                said = True
            if delivery is None:
                await heard.wait(pause)
                continue
            try:
                yield delivery
            except BaseException:
                delivery.settle_now(q.nack, error=LEFT)
                raise
    finally:
        claims.threads.shutdown(wait=False)


class _Claims:
    """The claims of one consumer, made in a thread of its own.

    So it needs one connection, and other calls in the loop's threads do not hold it up.
    """

    def __init__(self, queue: str, max_attempts: int, backoff: float) -> None:
        self.state, self._queue = q.STATE_DIR, queue
        self._terms = {"max_attempts": max_attempts, "backoff": backoff}
        self.threads = ThreadPoolExecutor(1, thread_name_prefix=f"consume {queue}")
        self._left = threading.Event()

    async def next(self, before: Delivery | None) -> tuple[Delivery | None, float]:
        """Ack the task before and claim the next one, or say how many seconds to wait for it."""
        claiming = _start(self.threads, self._ack_and_claim, before)
        try:
            return await _result(claiming)
        except asyncio.CancelledError:
            # A claim that still waits for the lock takes nothing.
            self._left.set()
            claiming.add_done_callback(self._put_back)
            raise

    def _ack_and_claim(self, before: Delivery | None) -> tuple[Delivery | None, float]:
        if before is not None:
            before.settle(q.ack)
        conn = q.connect(self.state)
        q.ensure_queue(conn, self._queue)
        found, overdue = q.look(conn, self._queue)
        if found:
            owner = q.owner_name(self.state)
            with q.transaction(conn, durable=False):
                if not self._left.is_set():
                    for task in q.claim(conn, self._queue, owner, overdue=overdue, **self._terms):
                        return Delivery(task, self.state, self.threads), 0.0
        return None, q.sleep_seconds(conn, [self._queue])

    def _put_back(self, claimed: Future) -> None:
        """Release a task that was claimed while its consumer was cancelled."""
        if not claimed.cancelled() and not claimed.exception() and claimed.result()[0]:
            _start(self.threads, claimed.result()[0].settle, q.release)


class _LoopEvent:
    """An asyncio event that any thread may set and a coroutine awaits for a limited time.

    asyncio.wait_for() forgets a cancellation that comes together with its result (Python 3.11).
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
        """Return when the event is set, or after `seconds`."""
        timer = self._loop.call_later(seconds, self._event.set)
        try:
            await self._event.wait()
        finally:
            timer.cancel()


def _start(threads: ThreadPoolExecutor, function: Callable, *args, **options) -> Future:
    """Call function in one of the threads, or in a new thread if they are shut down.

    Raises RuntimeError while the interpreter ends.
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
    """Return or raise what a thread's call does. A cancellation ends the wait, not the call."""
    return await asyncio.shield(asyncio.wrap_future(future))


def _interpreter_ends() -> bool:
    """Return whether the interpreter is waiting for its threads: it then starts no new ones."""
    try:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(int)
    except RuntimeError:
        return True
    return False


def _say(queue: str, what: str, error: Exception) -> None:
    _logger().warning("queue %r: %s, and is tried again: %s", queue, what, error)


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
