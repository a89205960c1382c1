"""Consuming a queue from asyncio: an async iterator that acks, nacks and wakes on its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from pathlib import Path

import queue_helpers as q


async def _to_its_end(function, *args, **options):
    """(what a thread makes of a call, whether we were cancelled meanwhile): the call is never left half done."""
    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **options))
    cancelled = False
    while True:
        try:
            return await asyncio.shield(running), cancelled
        except asyncio.CancelledError:
            if running.cancelled():
                raise
            cancelled = True


class Delivery:
    """A task that consume() hands out, with the fields of Task.

    Asking for the next one acks it. `async with` decides earlier: the block's end acks, an exception in it nacks and
    is logged, and the loop goes on.
    """

    def __init__(self, task: q.Task, conn_state: Path) -> None:
        self.task, self._state, self._settled = task, conn_state, False

    def __getattr__(self, name):
        return getattr(self.task, name)

    async def __aenter__(self) -> Delivery:
        return self

    async def __aexit__(self, kind, error, traceback) -> bool:
        if kind is not None and not issubclass(kind, Exception):  # cancelled: not this task's fault
            self.settle_now(q.release)
            return False
        if error is not None:
            logging.getLogger(__name__).error("queue %r: task %s failed", self.queue, self.task_id, exc_info=error)
            _, cancelled = await _to_its_end(self.settle, q.nack, error=f"{kind.__name__}: {error}")
        else:
            _, cancelled = await _to_its_end(self.settle, q.ack)
        if cancelled:
            raise asyncio.CancelledError
        return error is not None

    def settle_now(self, verb, **told) -> None:
        """settle(), without holding up the caller for longer than one wait for the lock; a thread tries again."""
        try:
            self.settle(verb, patient=False, **told)
        except q.QueueBusy:
            threading.Thread(target=self.settle, args=(verb,), kwargs=told, daemon=True).start()

    def settle(self, verb, patient: bool = True, **told) -> None:
        """Ack, nack or release, once; for as long as it takes, since nobody else may while this process lives."""
        while not self._settled:
            conn = q.connect(self._state)
            try:
                if self.task.owner != q.owner_name(self._state):
                    done = False  # a forked child's copy
                else:
                    with q.transaction(conn):
                        done = verb(conn, self.task, **told)
            except q.QueueBusy:
                if not patient:
                    raise
                continue
            self._settled = True
            if not done:
                q.not_held(conn, self.task)
            q.wake(self._state)


async def consume(queue_name: str, *, max_attempts: int = q.MAX_ATTEMPTS, backoff: float = q.BACKOFF_SECONDS):
    """Yield the queue's tasks for ever, as they come: `async for task in consume("approvals")`.

    Asking for the next task acks the one before; leaving the loop (an exception, break, cancellation) nacks it.
    Usable from many coroutines at once: each task goes to one.
    """
    q.check_queue_name(queue_name)
    state, loop = q.STATE_DIR, asyncio.get_running_loop()
    heard = _LoopEvent(loop)
    q.Watch.of(state).listeners.add(heard)

    def next_task() -> tuple[q.Task | None, float]:
        conn = q.connect(state)
        q.ensure_queue(conn, queue_name)
        tasks = q.claim_ready(conn, queue_name, limit=1, max_attempts=max_attempts, backoff=backoff)
        return (tasks[0], 0.0) if tasks else (None, q.sleep_seconds(conn, [queue_name]))

    while True:
        heard.event.clear()
        (task, pause), cancelled = await _to_its_end(next_task)
        if cancelled:
            if task:
                Delivery(task, state).settle_now(q.release)
            raise asyncio.CancelledError
        if task is None:
            try:
                await asyncio.wait_for(heard.event.wait(), pause)
            except TimeoutError:
                pass
            continue
        delivery = Delivery(task, state)
        try:
            yield delivery
        except BaseException:
            delivery.settle_now(q.nack, error="its consumer left the loop")
            raise
        _, cancelled = await _to_its_end(delivery.settle, q.ack)
        if cancelled:
            raise asyncio.CancelledError


class _LoopEvent:
    """An asyncio.Event that the watch's thread may set."""

    def __init__(self, loop) -> None:
            self.event, self._loop = asyncio.Event(), loop

    def set(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.event.set)
        except RuntimeError:
            pass  # the loop is closed
