"""persist-queue's two queue classes on the queue's own tables.

Of persist-queue's private names, these are relied on; tests/core/test_the_house_is_in_order.py
compares the list with the code:

    overridden  _KEY_COLUMN _SQL_INSERT _conn _count _getter _init _pop _putter _table_name
    called      _check_id _find_item_id _serializer _unack_cache
"""

# persist-queue declares narrower results than ours: put() returns None for a duplicate.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import persistqueue
from persistqueue import Empty

import queue_helpers as q

COUNT_READY = f"""
select (select count(*) from "{{queue}}" where status < 2) + (select count(*) from ({q.DUE}))"""
NEXT_AFTER = """
select coalesce((select min(id) from "{queue}" where status < 2 and id > :id),
                (select min(id) from "{queue}" where status < 2))"""
COUNT_FINISHED = """
select count(*) from task_history where queue = :queue and status = :status"""
CLEAR_FINISHED = """
delete from task_history where id in (
  select id from task_history where queue = :queue and (status = 'completed' or status = 'failed' and :failed)
  order by completed_at desc limit :limit offset :keep)"""

# The claims of this process's ack queues, by state directory, queue and row.
_claims: dict[tuple[Path, str, int], q.Task] = {}

# A forked child holds none of its parent's claims.
os.register_at_fork(after_in_child=_claims.clear)


class JsonObjects:
    """persist-queue's serializer: JSON text of an object goes in, and the same text comes out."""

    @staticmethod
    def dumps(item, sort_keys: bool = False) -> str:
        """Return a dict as JSON text, and text as it is: the database checks that.

        Raises InvalidTask.
        """
        if isinstance(item, (bytes, bytearray)):
            item = item.decode()
        if isinstance(item, str):
            return item
        if isinstance(item, dict):
            return q.to_json(item)
        wanted = "put() takes a dict, or JSON text of an object"
        raise q.InvalidTask(f"a {type(item).__name__} was refused: {wanted}")

    @staticmethod
    def loads(text: str) -> str:
        return text


# Type checkers are not told which of persist-queue's classes this is mixed into.
_Base: Any = object


class SharedTable(_Base):
    """The ways in which both classes differ from persist-queue's.

    Others use the table at the same time, so each count is asked of the database, a claim is one
    transaction, and each thread has a connection of its own.
    """

    _KEY_COLUMN = "id"
    _SQL_INSERT = "insert into {table_name} (data, timestamp) values (?, ?)"

    def __init__(
        self,
        path: str | Path | None = None,
        name: str = "default",
        multithreading: bool = True,
        timeout: float | None = None,
        auto_commit: bool = True,
        serializer=None,
        db_file_name=None,
        **options,
    ) -> None:
        """Open or make a queue.

        path: the state directory (default: STATE_DIR)
        name: the queue
        timeout: seconds to wait for the write lock (default: 5)
        max_attempts: int, after which a nacked task has failed (default: 4)
        backoff: seconds before the second attempt, doubled before each later one (default: 1)

        The others are persist-queue's and have no effect: the shared table decides.

        Raises InvalidTask for a name that no queue can have, QueueBusy, QueueUnavailable.
        """
        self.state = Path(path or q.STATE_DIR).expanduser().absolute()
        q.check_queue_name(name)
        self.max_attempts = options.pop("max_attempts", q.MAX_ATTEMPTS)
        self.backoff = options.pop("backoff", q.BACKOFF_SECONDS)
        options |= {"multithreading": True, "serializer": JsonObjects, "db_file_name": "tasks.db"}
        options["timeout"] = q.BUSY_TIMEOUT_MS / 1000 if timeout is None else timeout
        super().__init__(path=str(self.state), name=name, **options)

    def _init(self) -> None:
        self.tran_lock, self.action_lock = threading.Lock(), threading.Lock()
        q.ensure_queue(self._conn, self.name)
        self.put_event = q.WakeEvent(self.name, self.state)

    # persist-queue assigns two connections and a count.
    _conn = _getter = _putter = property(
        lambda self: q.connect(self.state, busy_timeout_ms=int(self.timeout * 1000)),
        lambda self, value: None,
    )
    total = property(lambda self: self._count(), lambda self, value: None)

    @property
    def _table_name(self) -> str:
        return f'"{self.name}"'

    def _count(self) -> int:
        conn = self._conn
        q.take_in(conn, self.name)
        return q.execute(conn, COUNT_READY, self.name, now=time.time()).fetchone()[0]

    def empty(self) -> bool:
        """Return whether get() would find nothing now."""
        return not q.has_ready(self._conn, self.name)

    def put(self, item: dict | str | bytes, block: bool = True) -> int | None:
        """Store a dict, or JSON text of an object, and return the row's id (int).

        Returns None, and stores nothing, while the item's task_id waits or runs. Raises
        InvalidTask, QueueBusy, QueueUnavailable.
        """
        conn, text = self._conn, self._serializer.dumps(item)
        q.ensure_queue(conn, self.name)
        with q.transaction(conn):
            cursor = conn.execute(
                q.on_queue(q.INSERT, self.name),
                (text, q.READY, None, 0, None, None, time.time(), None),
            )
            row_id = cursor.lastrowid if cursor.rowcount == 1 else None
        q.wake(self.state)
        return row_id

    put_nowait = put

    def _item(self, task: q.Task, raw: bool):
        """Return the task as get() does."""
        if raw:
            return {"pqid": task.id, "data": task.text, "timestamp": task.enqueued_at}
        return self._plain(task)

    def close(self) -> None:
        """Do nothing: a thread's connection is shared by its queues."""

    def __del__(self) -> None:
        pass


class SQLiteQueue(SharedTable, persistqueue.SQLiteQueue):
    """persist-queue's SQLiteQueue: get() returns a task's JSON text (str) and finishes the task.

    So a task is handed over at most once. get(block=True, timeout=None) waits for a task, `timeout`
    seconds (float) at most, and raises Empty after that, ValueError for a negative timeout. Every
    method may raise QueueBusy, QueueUnavailable.
    """

    def _plain(self, task: q.Task):
        return task.text

    def _refusal(self, task: q.Task) -> str | None:
        """Return why a task becomes a dead letter instead of being handed over, or None."""
        return None

    def _pop(self, rowid: int | None = None, raw: bool = False):
        conn = self._conn
        while True:
            found, overdue = q.look(conn, self.name)
            if not found:
                return None
            with q.transaction(conn):
                while tasks := q.claim(conn, self.name, "get", row_id=rowid, overdue=overdue):
                    error = self._refusal(tasks[0])
                    if error is None:
                        q.ack(conn, tasks[0])
                        return self._item(tasks[0], raw)
                    q.bury(conn, tasks[0], error=error)
            if not overdue:
                return None


class _TaskQueue(SQLiteQueue):
    """A SQLiteQueue whose get() returns a Task, and buries one whose JSON cannot be read."""

    def _plain(self, task: q.Task) -> q.Task:
        return task

    def _refusal(self, task: q.Task) -> str | None:
        return task.unreadable()


class SQLiteAckQueue(SharedTable, persistqueue.SQLiteAckQueue):
    """persist-queue's SQLiteAckQueue: get() returns (id: int, json_text: str) and keeps the task.

    Then ack(id) finishes it, nack(id) has it tried again after a back-off, and ack_failed(id)
    fails it for good. If the process dies first, another one gets the task. get(block=True,
    timeout=None) waits for a task, `timeout` seconds (float) at most, and raises Empty after that,
    ValueError for a negative timeout. Every method may raise QueueBusy, QueueUnavailable.
    """

    def __init__(self, path=None, auto_resume: bool = True, **options) -> None:
        super().__init__(path, auto_resume=auto_resume, **options)

    def _plain(self, task: q.Task) -> tuple[int, str]:
        return task.id, task.text

    def resume_unack_tasks(self) -> None:
        """Recover the tasks of dead processes, and leave those of living ones alone."""
        q.recover(self.state)

    def _pop(self, rowid: int | None = None, next_in_order: bool = False, raw: bool = False):
        conn = self._conn
        if next_in_order:
            row = q.execute(conn, NEXT_AFTER, self.name, id=rowid).fetchone()
            rowid = row[0] if row else None
        terms = {"max_attempts": self.max_attempts, "backoff": self.backoff}
        for task in q.claim_ready(conn, self.name, row_id=rowid, **terms):
            _claims[self.state, self.name, task.id], self._unack_cache[task.id] = task, task.text
            return self._item(task, raw)
        return None

    def ack(self, item=None, id: int | None = None) -> int | bool:
        """Record a task as completed and return its id.

        item: what get() returned, its id or its JSON text. Returns False, and changes nothing,
        where this process does not hold the task. Raises ValueError for both or none of the two.
        """
        return self._settle(q.ack, item, id)

    def nack(self, item=None, id: int | None = None, error: str = "nack") -> int | bool:
        """Record a failed attempt: try the task again, or fail it once its attempts are spent.

        Arguments and results are those of ack(); `error` is the reason to record.
        """
        return self._settle(q.nack, item, id, error=error)

    def ack_failed(self, item=None, id: int | None = None, error: str = "ack_failed") -> int | bool:
        """Record a task as failed for good. Arguments and results are those of nack()."""
        return self._settle(q.bury, item, id, error=error)

    def _settle(self, verb, item, id, **told) -> int | bool:
        item, search = self._check_id(item, id)
        if isinstance(item, tuple) and len(item) == 2:
            item = item[0]
        row_id: Any = item if isinstance(item, int) else self._find_item_id(item, search)
        claim = (self.state, self.name, row_id)
        conn, task = self._conn, _claims.get(claim)
        if task is None:
            q.not_held(conn, q.Task(self.name, _as_row(row_id), *[None] * 13))
            return False
        with q.transaction(conn):
            done = verb(conn, task, **told)
        # After the transaction: a caller whom it was too busy for tries again.
        _claims.pop(claim, None)
        self._unack_cache.pop(row_id, None)
        if not done:
            q.not_held(conn, task)
            return False
        q.wake(self.state)
        return row_id

    def unack_count(self) -> int:
        """Return how many of the queue's tasks are claimed, by any process."""
        return q.execute(self._conn, q.COUNT_CLAIMED, self.name).fetchone()[0]

    def ready_count(self) -> int:
        return self._count()

    def acked_count(self) -> int:
        return self._finished("completed")

    def ack_failed_count(self) -> int:
        return self._finished("failed")

    def _finished(self, status: str) -> int:
        values = {"queue": self.name, "status": status}
        return self._conn.execute(COUNT_FINISHED, values).fetchone()[0]

    def clear_acked_data(
        self, max_delete: int = 1000, keep_latest: int = 1000, clear_ack_failed: bool = False
    ) -> int:
        """Delete the queue's completed tasks from the history and return how many.

        At most `max_delete` go (0: no limit), and never the `keep_latest` latest. With
        clear_ack_failed, failed tasks go, too.
        """
        values = {
            "queue": self.name,
            "failed": clear_ack_failed,
            "limit": max_delete or -1,
            "keep": keep_latest or 0,
        }
        with q.transaction(self._conn):
            return self._conn.execute(CLEAR_FINISHED, values).rowcount


def _as_row(row_id: object) -> int | None:
    """Return a number that can be a row's, None for another: SQLite takes 64 bits."""
    return row_id if isinstance(row_id, int) and 0 < row_id < 2**63 else None


def get_queue(queue_name: str, **options) -> SQLiteQueue:
    """Return a SQLiteQueue: get() hands a task over and finishes it, so at most once.

    `options` are those of SharedTable. Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    return SQLiteQueue(str(q.STATE_DIR), queue_name, **options)


def get_ack_queue(queue_name: str, **options) -> SQLiteAckQueue:
    """Return a SQLiteAckQueue: get() is (id, json_text), then ack(id), nack(id) or ack_failed(id).

    `options` are those of SharedTable. Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    return SQLiteAckQueue(str(q.STATE_DIR), name=queue_name, **options)


def dequeue_task(queue_name: str, timeout: float | None = None) -> dict | None:
    """Take the next task, finish it, and return its envelope; None where no task is ready.

    Waits up to `timeout` seconds for one; without a timeout it does not wait. Raises InvalidTask,
    QueueBusy, QueueUnavailable, and ValueError for a negative timeout.
    """
    try:
        task: Any = _TaskQueue(str(q.STATE_DIR), queue_name).get(timeout is not None, timeout)
    except Empty:
        return None
    return task.envelope
