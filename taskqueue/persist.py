"""persist-queue's two classes on the queue's own tables.

Of persist-queue's private names, these are relied on, and tests/test_the_house_is_in_order.py
compares the list with the code:

    overridden  _KEY_COLUMN _SQL_INSERT _conn _count _getter _init _pop _putter _table_name
    called      _check_id _find_item_id _serializer _unack_cache
"""

# persist-queue declares narrower results than ours: put() is None for a duplicate, get() may be a
# Task.
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

# A forked child holds nothing of its parent's.
os.register_at_fork(after_in_child=_claims.clear)


class JsonObjects:
    """persist-queue's serializer: JSON text in, the same text out."""

    @staticmethod
    def dumps(item, sort_keys: bool = False) -> str:
        if isinstance(item, (bytes, bytearray)):
            item = item.decode()
        # The database checks a text.
        if isinstance(item, str):
            return item
        if isinstance(item, dict):
            return q.to_json(item)
        wanted = "put() takes a dict, or JSON text of an object"
        raise q.InvalidTask(f"a {type(item).__name__} was refused: {wanted}")

    @staticmethod
    def loads(text: str) -> str:
        return text


def _as_row(row_id: object) -> int | None:
    """The number of a row, None for what SQLite can give to none."""
    return row_id if isinstance(row_id, int) and 0 < row_id < 2**63 else None


# For pyright, whatever persist-queue's classes have.
_Base: Any = object


class SharedTable(_Base):
    """What both classes do differently from persist-queue: the table is shared, and the database is
    asked.

    Counts are the database's; a claim is one transaction; connections belong to threads.
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
        """Options are persist-queue's; timeout is in seconds, for the write lock.

        multithreading, auto_commit, serializer and db_file_name are as the shared table needs them,
        whatever is given.
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

    # persist-queue keeps two connections and a count; here a connection is the thread's, and a
    # count the database's.
    _conn = _getter = _putter = property(
        lambda self: q.connect(self.state, busy_timeout_ms=int(self.timeout * 1000)),
        lambda self, value: None,
    )
    total = property(lambda self: self._count(), lambda self, value: None)

    @property
    def _table_name(self) -> str:
        return f'"{q.check_queue_name(self.name)}"'

    def _count(self) -> int:
        conn = self._conn
        q.take_in(conn, self.name)
        return q.execute(conn, COUNT_READY, self.name, now=time.time()).fetchone()[0]

    def empty(self) -> bool:
        return not q.has_ready(self._conn, self.name)

    def put(self, item, block: bool = True) -> int | None:
        """Store a dict or JSON text of an object; the row's id, None when its task_id is waiting or
        running.
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

    def get_task(self, block: bool = True, timeout: float | None = None) -> q.Task:
        """get(), as a Task."""
        self._as_task.wanted = True
        try:
            return self.get(block=block, timeout=timeout)
        finally:
            self._as_task.wanted = False

    _as_task = threading.local()

    def _hand_over(self, task: q.Task | None, raw: bool):
        if task is None or getattr(self._as_task, "wanted", False):
            return task
        if raw:
            return {"pqid": task.id, "data": task.text, "timestamp": task.enqueued_at}
        return self._plain(task)

    def close(self) -> None:
        """Nothing to close: connections are the threads', shared by their queues."""

    def __del__(self) -> None:
        pass


class SQLiteQueue(SharedTable, persistqueue.SQLiteQueue):
    """persist-queue's SQLiteQueue on the shared table: get() hands the JSON text over and finishes
    the task.
    """

    def _plain(self, task: q.Task) -> str:
        return task.text

    def _pop(self, rowid: int | None = None, raw: bool = False):
        conn = self._conn
        while True:
            found, overdue = q.look(conn, self.name)
            if not found:
                return None
            with q.transaction(conn):
                while tasks := q.claim(conn, self.name, "get", row_id=rowid, overdue=overdue):
                    wanted = getattr(self._as_task, "wanted", False)
                    error = tasks[0].unreadable() if wanted else None
                    if error is None:
                        q.ack(conn, tasks[0])
                        return self._hand_over(tasks[0], raw)
                    q.bury(conn, tasks[0], error=error)
            if not overdue:
                return None


class SQLiteAckQueue(SharedTable, persistqueue.SQLiteAckQueue):
    """persist-queue's SQLiteAckQueue on the shared table: get() -> (id, json_text), then ack, nack
    or ack_failed.

    The row is this process's until then; if it dies, the task goes to another. nack() backs off,
    and a task whose attempts are spent goes to the history as failed.
    """

    def __init__(self, path=None, auto_resume: bool = True, **options) -> None:
        super().__init__(path, auto_resume=auto_resume, **options)

    def _plain(self, task: q.Task) -> tuple[int, str]:
        return task.id, task.text

    def resume_unack_tasks(self) -> None:
        """Take back the tasks of dead processes; those of living ones are theirs."""
        q.recover(self.state)

    def _pop(self, rowid: int | None = None, next_in_order: bool = False, raw: bool = False):
        conn = self._conn
        if next_in_order:
            row = q.execute(conn, NEXT_AFTER, self.name, id=rowid).fetchone()
            rowid = row[0] if row else None
        tasks = q.claim_ready(
            conn, self.name, row_id=rowid, max_attempts=self.max_attempts, backoff=self.backoff
        )
        for task in tasks:
            _claims[self.state, self.name, task.id], self._unack_cache[task.id] = task, task.text
        return self._hand_over(tasks[0] if tasks else None, raw)

    def _leave(self, verb, item, id, **told) -> int | bool:
        """The row's id; False when this process no longer holds it, or never did. Nothing changes
        then.
        """
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
        # Not before the transaction has ended: when it was busy, the caller tries the same again.
        _claims.pop(claim, None)
        self._unack_cache.pop(row_id, None)
        if not done:
            q.not_held(conn, task)
            return False
        q.wake(self.state)
        return row_id

    def ack(self, item=None, id: int | None = None) -> int | bool:
        return self._leave(q.ack, item, id)

    def nack(self, item=None, id: int | None = None, error: str = "nack") -> int | bool:
        return self._leave(q.nack, item, id, error=error)

    def ack_failed(self, item=None, id: int | None = None, error: str = "ack_failed") -> int | bool:
        return self._leave(q.bury, item, id, error=error)

    def unack_count(self) -> int:
        return q.execute(self._conn, q.COUNT_CLAIMED, self.name).fetchone()[0]

    def ready_count(self) -> int:
        return self._count()

    def acked_count(self) -> int:
        return self._conn.execute(
            COUNT_FINISHED, {"queue": self.name, "status": "completed"}
        ).fetchone()[0]

    def ack_failed_count(self) -> int:
        return self._conn.execute(
            COUNT_FINISHED, {"queue": self.name, "status": "failed"}
        ).fetchone()[0]

    def clear_acked_data(
        self, max_delete: int = 1000, keep_latest: int = 1000, clear_ack_failed: bool = False
    ) -> int:
        """Delete finished tasks of this queue from the history, all but the latest; how many."""
        values = {
            "queue": self.name,
            "failed": clear_ack_failed,
            "limit": max_delete or -1,
            "keep": keep_latest or 0,
        }
        with q.transaction(self._conn):
            return self._conn.execute(CLEAR_FINISHED, values).rowcount


def get_queue(queue_name: str, **options):
    """A persistqueue.SQLiteQueue whose get() hands a task over and finishes it: at most once.

    Options are persist-queue's; those that would break the shared table are ignored.
    """
    return SQLiteQueue(str(q.STATE_DIR), q.check_queue_name(queue_name), **options)


def get_ack_queue(queue_name: str, **options):
    """A persistqueue.SQLiteAckQueue: get() -> (id, json_text), then ack(id), nack(id) or
    ack_failed(id).

    Options: max_attempts (default 4), backoff (seconds, default 1), and persist-queue's.
    """
    return SQLiteAckQueue(str(q.STATE_DIR), name=q.check_queue_name(queue_name), **options)


def dequeue_task(queue_name: str, timeout: float | None = None) -> dict | None:
    """Take the next task and finish it: its envelope, or None when there is none.

    Waits up to timeout seconds for one; without a timeout it does not wait.
    """
    queue = get_queue(queue_name)
    try:
        task = queue.get_task(block=timeout is not None, timeout=timeout)
    except Empty:
        return None
    return task.envelope
