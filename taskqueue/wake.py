"""Wake sleeping consumers within milliseconds of a commit, a hook's file or an owner's death."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

try:
    from watchdog.events import FileSystemEventHandler

    _Handler: Any = FileSystemEventHandler
except ImportError:
    # Without watchdog a Watch polls.
    _Handler = object

import queue_helpers as q
from taskqueue import costs

NEXT_TIMES = f"""
select (select min(due_at) from "{{queue}}" where status = 3),
  (select min(expires_at) from "{{queue}}" where expires_at is not null and status not in (2, 5)),
  exists (select 1 from "{{queue}}" where status < 2), {q.OPEN_SLOTS.replace(":limit", "1")} > 0,
  {q.IS_PAUSED}, (select paused_until from task_controls where queue = '{{queue}}'), {q.HAS_BOUND}"""

# How often to look where the platform reports no file events.
POLL_SECONDS = 0.05

# How often to look for dead owners while a handler outlives its worker.
ORPHAN_TICK_SECONDS = 0.25

# How long to look for dead owners after a lock file was closed: the event comes a little before the
# lock is free.
OWNER_CLOSED_SECONDS = 0.3

# How long a process that ends waits for its watch to finish a look.
LEAVE_SECONDS = 1.0

# The shortest pause between two looks. One commit raises several events, which come together in it.
SHORTEST_PAUSE_SECONDS = 0.001


class Heard:
    """The one event that watchdog's thread sets and a looking thread waits for.

    The write to the write-ahead log raises the event, and the commit becomes visible later: after
    the sync, and after the index in shared memory is written. A thread that looks once per event
    misses one task in ten. So it looks again and again, and each pause is a sixteenth of the time
    since the last event: a commit is seen soon on a fast disk and on a slow one.
    """

    def __init__(self) -> None:
        self._event, self._at = threading.Event(), time.monotonic()

    def set(self) -> None:
        """End the pause. Safe to call from any thread."""
        self._event.set()

    def pause(self, longest: float) -> None:
        """Wait until the next look is due: after an event, or `longest` seconds at most."""
        pause = max(SHORTEST_PAUSE_SECONDS, (time.monotonic() - self._at) / 16)
        if self._event.wait(min(pause, longest)):
            time.sleep(SHORTEST_PAUSE_SECONDS)
            self._event.clear()
            self._at = time.monotonic()


class Listeners:
    """Objects with a set() method, held weakly. Any thread may add one or set them all."""

    def __init__(self) -> None:
        self._lock, self._all = threading.Lock(), WeakSet()

    def add(self, listener) -> None:
        with self._lock:
            self._all.add(listener)

    def set(self) -> None:
        with self._lock:
            listeners = list(self._all)
        for listener in listeners:
            listener.set()


class Watch(threading.Thread):
    """Have its listeners look whenever another connection has changed the database.

    A process has one Watch per state directory. It also takes back the tasks of dead owners as soon
    as their lock files are closed, and notices a deleted or replaced state directory. Where it can
    have no file events, it says so once and looks every POLL_SECONDS.
    """

    instances: dict[Path, Watch] = {}
    lock = threading.Lock()

    @classmethod
    def of(cls, state: Path | None = None) -> Watch:
        """Return this process's running watch of a state directory (default: STATE_DIR)."""
        state = state or q.STATE_DIR
        with cls.lock:
            if state not in cls.instances:
                cls.instances[state] = cls(state)
                cls.instances[state].start()
            return cls.instances[state]

    def __init__(self, state: Path) -> None:
        super().__init__(name=f"watch {state}", daemon=True)
        self.state = state
        self.listeners = Listeners()
        # Seconds, for q.recover().
        self.crash_backoff = 0.0
        # Called with each task that was taken back from a dead owner, its outcome and the reason.
        self.on_recovered: Callable = lambda task, outcome: None
        # Called once, with a message, where file events cannot be had.
        self.on_deaf: Callable = lambda message: None
        self._heard = Heard()
        self._observer: Any = None
        self._observed, self._refresh_at, self._deaf = [], 0.0, False
        # The data version at the last look.
        self._seen: tuple | None = None
        # The first looks recover.
        self._owner_closed_at, self._recovered_at, self._orphans = time.monotonic(), 0.0, 0
        # Held while this thread uses its connection: a fork closes it from another thread.
        self._looking, self._conn = threading.RLock(), None

    @property
    def listening(self) -> bool:
        """Return whether file events are reported."""
        return self._observer is not None

    def leave(self) -> None:
        """Let no further task be taken back: the process ends.

        A look that is under way reports first, within LEAVE_SECONDS.
        """
        self._looking.acquire(timeout=LEAVE_SECONDS)

    def dispatch(self, event) -> None:
        """Take a file event; watchdog calls this in a thread of its own."""
        directory, name = os.path.split(event.src_path)
        if name == "wake":
            # Written after the commit or the hook's file, which can be seen already.
            self.listeners.set()
        elif name == "tasks.db-wal":
            self._heard.set()
        elif os.path.basename(directory) == "workers":
            self._owner_closed_at = time.monotonic()
            self._heard.set()

    def run(self) -> None:
        while True:
            try:
                if time.monotonic() >= self._refresh_at:
                    self._refresh()
                self._look()
            except (q.QueueError, sqlite3.Error, OSError):
                # The state directory is gone or in trouble: listeners find out when they look.
                self._stop_observing()
                self._seen, self._refresh_at = None, 0.0
                self.listeners.set()
            if self.listening:
                self._heard.pause(self._tick())
            else:
                time.sleep(POLL_SECONDS)

    def _tick(self) -> float:
        return ORPHAN_TICK_SECONDS if self._orphans else q.SAFETY_TICK_SECONDS

    def _refresh(self) -> None:
        """Observe the directories, anew where one was replaced, and have every listener look.

        An event may be lost, and none tells of a commit or a hook's file from before.
        """
        directories = (self.state, q.make_private(self.state / "workers"))
        found = [(there.st_dev, there.st_ino) for there in map(os.stat, directories)]
        if found != self._observed or not self.listening:
            self._stop_observing()
            self._observe(*map(str, directories))
            self._observed = found
        self._refresh_at = time.monotonic() + q.SAFETY_TICK_SECONDS
        self.listeners.set()

    def _observe(self, state: str, workers: str) -> None:
        try:
            self._observer = self._new_observer(state, workers)
            # A commit that was written before is reported by no event: look as if one had come.
            self._heard.set()
        except (ImportError, OSError) as error:
            if not self._deaf:
                every = f"{POLL_SECONDS * 1000:.0f} ms"
                self.on_deaf(f"no file events ({error}): looking every {every} instead")
            self._deaf = True

    def _new_observer(self, state: str, workers: str):
        from watchdog.events import FileClosedEvent, FileModifiedEvent
        from watchdog.observers import Observer

        logging.getLogger("watchdog.observers.inotify").addFilter(_is_no_false_alarm)
        # Of a handler, watchdog calls dispatch() alone.
        observer: Any = Observer()
        observer.schedule(self, state, event_filter=[FileModifiedEvent])
        observer.schedule(self, workers, event_filter=[FileClosedEvent])
        observer.daemon = True
        observer.start()
        return observer

    def _stop_observing(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()

    def _look(self) -> None:
        """Have the listeners look if a commit became visible; take back dead owners' tasks."""
        with self._looking:
            self._conn = q.connect(self.state, create=False)
            version = data_version(self._conn)
            if version != self._seen:
                self._seen = version
                self.listeners.set()
            recovered = self._recover() if self._is_time_to_recover() else []
            # Within the lock, so that leave() comes after all reports.
            for report in recovered:
                self.on_recovered(*report)
        if recovered:
            self.listeners.set()

    def _is_time_to_recover(self) -> bool:
        now = time.monotonic()
        may_have_died = now < self._owner_closed_at + OWNER_CLOSED_SECONDS
        return may_have_died or now > self._recovered_at + self._tick()

    def _recover(self) -> list:
        recovered, self._orphans = q.recover(self.state, crash_backoff=self.crash_backoff)
        self._recovered_at = time.monotonic()
        return recovered


def data_version(conn: q.Connection) -> tuple:
    """Return a value that changes whenever another connection's commit becomes visible."""
    return conn.file, conn.execute("pragma data_version").fetchone()[0]


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drop the error that watchdog logs when it is stopped while an event arrives."""
    return "called when the thread is inactive" not in str(record.msg)


class WakeEvent:
    """The event that persist-queue's blocking get() waits on; other processes set it, too.

    persist-queue clears its event after it has looked, and would lose a wake that came in between.
    So clear() does nothing, each thread remembers how many wakes it has heard, and wait() returns
    at once when there were more.
    """

    def __init__(self, queue: str, state: Path) -> None:
        self._queue, self._state = queue, state
        self._changed, self._count = threading.Condition(), 0
        self._heard = threading.local()

    def set(self) -> None:
        """Have every thread look: the waiting ones now, the others at their next wait()."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def clear(self) -> None:
        """Do nothing; see the class."""

    def wait(self, timeout: float | None = None) -> bool:
        """Return True when a look may find a task, False after `timeout` seconds.

        Also returns False when a scheduled task becomes ready, and without a timeout after
        SAFETY_TICK_SECONDS. Raises QueueBusy, QueueUnavailable.
        """
        Watch.of(self._state).listeners.add(self)
        timeout = sleep_seconds(q.connect(self._state), [self._queue], timeout)
        with self._changed:
            woken = self._changed.wait_for(
                lambda: self._count != getattr(self._heard, "count", -1), timeout
            )
            self._heard.count = self._count
            return woken


def next_due(conn: q.Connection, queue: str) -> float | None:
    """Return when there is something to do at the latest, in Unix seconds, or None.

    That is the time of a scheduled task, of an expiry, or when a pause ends or the queue's costs allow more.
    """
    now = time.time()
    row = q.execute(conn, NEXT_TIMES, queue, now=now).fetchone()
    due, expires, ready, is_open, paused, until, has_bound = row
    times = [when for when in (due, expires) if when is not None]
    if has_bound and not is_open and not paused:
        until = costs.goes_on(conn, queue)
        paused = until is not None
    if paused:
        times = [until] if until is not None and (ready or due is not None) else []
        # The first of what waits may become ready later than the pause ends.
        times = [max(*times, due)] if times and not ready else times
    elif not is_open:
        # All slots are taken: the end of a run is a commit, which wakes everybody.
        return None
    return min(times, default=None)


def sleep_seconds(conn: q.Connection, queues: Iterable[str], longest: float | None = None) -> float:
    """Return how many seconds a consumer may sleep unless an event wakes it.

    That is until the next scheduled task of the queues is due, and `longest` seconds at most
    (default: SAFETY_TICK_SECONDS). Raises QueueBusy, QueueUnavailable.
    """
    now = time.time()
    due = [
        max(0.0, when - now)
        for when in (next_due(conn, queue) for queue in queues)
        if when is not None
    ]
    return min([q.SAFETY_TICK_SECONDS if longest is None else longest, *due])


class QueueWatcher(_Handler):
    """A watchdog handler that calls back when the queue has changed.

        observer.schedule(QueueWatcher(QUEUE_PATH, callback), QUEUE_PATH)

    queue_path: the state directory, a str or Path.
    callback: a function or a coroutine function without arguments, which drains the queue. One call
        may stand for several tasks, or for none. A coroutine function runs in the event loop in
        which the QueueWatcher was made, else in a loop of its own. Calls do not overlap, and an
        exception that a call raises is logged.

    Raises QueueUnavailable, QueueBusy where there can be no queue at queue_path.
    """

    def __init__(self, queue_path: str | Path, callback: Callable) -> None:
        import asyncio

        self.queue_path, self.callback = Path(queue_path).absolute(), callback
        # Made here, so that the observer has something to watch.
        q.connect(self.queue_path)
        self._heard, self._thread, self._seen = Heard(), None, None
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    def on_modified(self, event) -> None:
        """Have the callback's thread look; watchdog calls this, always in the same thread."""
        if os.fsdecode(event.src_path).endswith((".db-wal", "/wake")):
            self._heard.set()
            if self._thread is None:
                name = f"QueueWatcher {self.queue_path}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._heard.pause(q.SAFETY_TICK_SECONDS)
            try:
                changed = self._has_changed()
            except (q.QueueError, sqlite3.Error, OSError):
                # The database was removed or is locked: a later look finds the next one.
                continue
            if changed:
                self._call()

    def _has_changed(self) -> bool:
        """Take in hooks' files; return whether the database has changed since the last look."""
        conn = q.connect(self.queue_path, create=False)
        # A connection's own commits do not change its data version.
        queues = [directory.name for directory in q.spool_directories(self.queue_path)]
        taken = [queue for queue in queues if q.take_in(conn, queue)]
        before, self._seen = self._seen, data_version(conn)
        return bool(taken) or self._seen != before

    def _call(self) -> None:
        import asyncio

        try:
            result = self.callback()
            if asyncio.iscoroutine(result):
                if self._loop is None or self._loop.is_closed():
                    asyncio.run(result)
                else:
                    asyncio.run_coroutine_threadsafe(result, self._loop).result()
        except Exception:
            logging.getLogger(__name__).exception("QueueWatcher(%s)", self.queue_path)


def _before_fork() -> None:
    """Finish every look, and close the watches' connections.

    A child that inherited one would take SQLite's locks for its own.
    """
    # Held until the fork is done, so that no other watch begins meanwhile.
    Watch.lock.acquire()
    for watch in Watch.instances.values():
        watch._looking.acquire()
        q.close_before_fork(watch._conn)


def _after_fork_in_parent() -> None:
    for watch in Watch.instances.values():
        watch._looking.release()
    Watch.lock.release()


def _after_fork_in_child() -> None:
    """Begin without watches: a child has none of its parent's threads."""
    Watch.instances, Watch.lock = {}, threading.Lock()
    inotify: Any = sys.modules.get("watchdog.observers.inotify_c")
    # watchdog 7 has one reader thread per process, which the child lacks.
    if hasattr(inotify, "InotifyFD"):
        inotify.InotifyFD._instance, inotify.InotifyFD._global_lock = None, threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
