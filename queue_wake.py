"""Waking sleepers: a commit, a spooled task or an owner's death is noticed within milliseconds."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from weakref import WeakSet

try:
    from watchdog.events import FileSystemEventHandler
except ImportError:  # without watchdog, Watch polls
    FileSystemEventHandler = object

import queue_helpers as q

ORPHAN_TICK_SECONDS = 0.25  # the same while a handler outlives its worker
POLL_SECONDS = 0.05  # the same where the platform has no events to give
SLOW_COMMIT_SECONDS = 5.0  # how long a commit may take from its write to its being visible
OWNER_CLOSED_SECONDS = 0.3  # how long a closed lock file is news; longer than all the looks after an event
LOOK_AGAIN_SECONDS = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # after an event; 127 ms in all
AFTER_A_CHANGE = 3  # which of these follows a change


def look_again(heard: threading.Event, look, pauses=LOOK_AGAIN_SECONDS) -> None:
    """Call look() at growing intervals until they have all passed without an event and without a change.

    Where one change follows the other, AFTER_A_CHANGE is where the intervals start: each look costs a reader's locks.

    watchdog reports the write to the write-ahead log, but that comes before the commit can be seen (write, fsync,
    then the shared index): whoever looks once per event misses one task in ten until the next event. An event that no
    change has followed is waited for longer: the disk may be slow.
    """
    step, owed_until = 0, 0.0
    while step < len(pauses) or time.monotonic() < owed_until:
        if heard.wait(pauses[min(step, len(pauses) - 1)]):
            heard.clear()
            step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS
        else:
            step += 1
        if look():
            step, owed_until = AFTER_A_CHANGE, 0.0


def data_version(conn: q.Connection) -> tuple:
    """A value that changes whenever another connection's commit becomes visible."""
    return conn.file, conn.execute("pragma data_version").fetchone()[0]


def is_wake(path: str) -> bool:
    """Whether a write at this path may mean a commit."""
    return os.path.basename(path) in ("tasks.db-wal", "wake")


class Watch(threading.Thread):
    """Tells its listeners when another connection has changed the database; one per process and state directory.

    Listeners are objects with a set() method, held weakly. It also takes back the tasks of dead owners, the moment
    their lock files are closed, and notices a deleted or replaced state directory. Without file events it polls.
    """

    instances: dict[Path, Watch] = {}
    lock = threading.Lock()

    @classmethod
    def of(cls, state: Path | None = None) -> Watch:
        """The running watch of this process on state."""
        state = state or q.STATE_DIR
        with cls.lock:
            if state not in cls.instances:
                cls.instances[state] = cls(state)
                cls.instances[state].start()
            return cls.instances[state]

    def __init__(self, state: Path) -> None:
        super().__init__(name=f"watch {state}", daemon=True)
        self.state = state
        self.listeners: WeakSet = WeakSet()
        self.crash_backoff = 0.0  # seconds, for q.recover()
        self.on_recovered = lambda task, outcome, error: None
        self.on_deaf = lambda message: None  # file events cannot be had; called once
        self._heard = threading.Event()
        self._owner_closed_at = time.monotonic()  # so that the first looks recover
        self._recovered_at = 0.0
        self._orphans = 0
        self._seen, self._written = None, None
        self._looking, self._conn = threading.RLock(), None  # so that a fork does not take our connection along
        self._observer, self._watching, self._ear, self._deaf = None, None, None, False

    def notify(self) -> None:
        """Have every listener look."""
        for listener in list(self.listeners):
            listener.set()

    def dispatch(self, event) -> None:
        """Hear of a write; this makes us a handler of watchdog's."""
        path = os.fsdecode(event.dest_path or event.src_path)
        directory = os.path.dirname(path)
        if os.path.basename(directory) == "workers":
            self._owner_closed_at = time.monotonic()
            self._heard.set()
        elif is_wake(path) or os.path.basename(os.path.dirname(directory)) == "spool":
            self._heard.set()

    def run(self) -> None:
        while True:
            tick = q.SAFETY_TICK_SECONDS
            try:
                # While there is work, looking is cheaper than having watchdog report each write; the ears open again
                # once all has been quiet, and then we look as long again for what was written before they did.
                self._listen(False)
                look_again(self._heard, self._look, LOOK_AGAIN_SECONDS[:6])
                self._listen(True)
                quiet = self._seen
                look_again(self._heard, self._look)
                if self._observer is None:
                    continue
                while self._seen == quiet and not self._heard.wait(ORPHAN_TICK_SECONDS if self._orphans else tick):
                    self._refresh()
                    self.notify()
                    self._look()
            except Exception as error:
                if not isinstance(error, (q.QueueError, sqlite3.Error, OSError)):
                    self._report(error)
                self._stop_observing()  # the state directory is gone or in trouble: its users find out when they look
                self._seen = None
                self.notify()
                time.sleep(POLL_SECONDS)

    def _report(self, error: Exception) -> None:
        """Say what should not have happened: waking and recovery must outlive it."""
        import logging

        logging.getLogger(__name__).error("watching %s", self.state, exc_info=error)

    def _look(self) -> bool:
        """Pass on what can be seen now; whether there was anything."""
        with self._looking:
            self._conn = q.connect(self.state, create=False)
            version = data_version(self._conn)
        changed = version != self._seen
        if changed:
            self._seen = version
            self.notify()
        try:
            written = os.stat(f"{self.state}/tasks.db-wal").st_mtime_ns
        except OSError:
            written = None
        if written != self._written and not changed:
            self._heard.set()  # as if watchdog had said so: it is not listened to all the time
        self._written = written
        # The event of a dead owner's file comes a little before its lock is free; hence again for a while.
        now, tick = time.monotonic(), ORPHAN_TICK_SECONDS if self._orphans else q.SAFETY_TICK_SECONDS
        if now < self._owner_closed_at + OWNER_CLOSED_SECONDS or now > self._recovered_at + tick:
            recovered, self._orphans = q.recover(self.state, crash_backoff=self.crash_backoff)
            self._recovered_at = time.monotonic()
            for report in recovered:
                self.on_recovered(*report)
            if recovered:
                self.notify()
        return changed

    def _listen(self, wanted: bool) -> None:
        """Have the state directory watched, or not; workers and the spool always are. Without file events: wait."""
        self._refresh()
        if self._observer is None:
            time.sleep(POLL_SECONDS)
        elif wanted and self._ear is None:
            from watchdog.events import FileClosedEvent, FileModifiedEvent

            self._ear = self._observer.schedule(
                self, str(self.state), event_filter=[FileClosedEvent, FileModifiedEvent]
            )
        elif not wanted and self._ear is not None:
            self._observer.unschedule(self._ear)
            self._ear = None

    def _refresh(self) -> None:
        """Start to observe; anew when one of the directories was made, removed or replaced."""
        found = {}
        for directory in (self.state, q.make_private(self.state / "workers"), *q.spool_directories(self.state)):
            there = os.stat(directory)
            found[str(directory)] = (there.st_dev, there.st_ino)
        if found == self._watching:
            return
        self._stop_observing()
        self._watching = found
        try:
            from watchdog.events import FileClosedEvent, FileMovedEvent
            from watchdog.observers import Observer

            observer = Observer()
            for directory in found.keys() - {str(self.state)}:
                observer.schedule(self, directory, event_filter=[FileClosedEvent, FileMovedEvent])
            observer.daemon = True
            observer.start()
            self._observer = observer
        except (ImportError, OSError) as error:
            if not self._deaf:
                self.on_deaf(f"no file events ({error}): looking every {POLL_SECONDS * 1000:.0f} ms instead")
            self._deaf = True

    def _stop_observing(self) -> None:
        observer, self._observer, self._watching, self._ear = self._observer, None, None, None
        if observer is not None:
            observer.stop()


class WakeEvent:
    """What persist-queue's blocking get() waits on: a threading.Event that other processes set, too.

    clear() does nothing: persist-queue clears after it has looked, and would lose what came in between. Instead each
    thread remembers how far it has heard, and wait() returns at once when there was more.
    """

    def __init__(self, queue: str, state: Path) -> None:
        self._queue, self._state = queue, state
        self._changed, self._count = threading.Condition(), 0
        self._heard = threading.local()

    def set(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def clear(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        """True when there is reason to look, False after timeout seconds."""
        Watch.of(self._state).listeners.add(self)
        timeout = sleep_seconds(q.connect(self._state), [self._queue], timeout)
        with self._changed:
            woken = self._changed.wait_for(lambda: self._count != getattr(self._heard, "count", -1), timeout)
            self._heard.count = self._count
            return woken


def sleep_seconds(conn: q.Connection, queues, longest: float | None = None) -> float:
    """How long a consumer may sleep if no event wakes it: until the next scheduled task, SAFETY_TICK_SECONDS at most."""
    now = time.time()
    due = [max(0.0, when - now) for when in (q.next_due(conn, queue) for queue in queues) if when is not None]
    return min([q.SAFETY_TICK_SECONDS if longest is None else longest, *due])


class QueueWatcher(FileSystemEventHandler):
    """A watchdog handler that calls back when the queue has changed: QueueWatcher(QUEUE_PATH, callback).

    The callback takes nothing and drains the queue: several tasks may come with one call, and a call may find
    none. A coroutine function runs in the event loop in which this was made; made outside of one, in a loop of
    its own. Calls do not overlap.
    """

    def __init__(self, queue_path, callback) -> None:
        self.queue_path, self.callback = Path(queue_path).absolute(), callback
        q.connect(self.queue_path)  # so that there is something to watch
        self._heard, self._thread, self._seen, self._loop = threading.Event(), None, None, None
        if sys.modules.get("asyncio"):
            try:
                self._loop = sys.modules["asyncio"].get_running_loop()
            except RuntimeError:
                pass

    def on_modified(self, event) -> None:
        if is_wake(os.fsdecode(event.src_path)):
            self._heard.set()
            if self._thread is None:  # watchdog calls from one thread
                self._thread = threading.Thread(
                    target=self._run, name=f"QueueWatcher {self.queue_path}", daemon=True
                )
                self._thread.start()

    on_closed = on_modified

    def _run(self) -> None:
        while self._heard.wait():
            look_again(self._heard, self._look)

    def _look(self) -> bool:
        try:
            version = data_version(q.connect(self.queue_path, create=False))
            changed = version != self._seen
            self._seen = version
            if changed:
                self._call()
            return changed
        except q.QueueUnavailable:
            return False  # the database was removed; whoever makes the next one is heard
        except Exception:
            import logging

            logging.getLogger(__name__).exception("QueueWatcher(%s)", self.queue_path)
            return False

    def _call(self) -> None:
        result = self.callback()
        if hasattr(result, "__await__"):
            import asyncio

            async def whole():
                return await result

            if self._loop is None or self._loop.is_closed():
                asyncio.run(whole())
            else:
                asyncio.run_coroutine_threadsafe(whole(), self._loop).result()

def _before_fork() -> None:
    """Let no look be half done, and close the watches' connections: a child would take SQLite's locks for its own."""
    for watch in list(Watch.instances.values()):
        watch._looking.acquire()
        q.close_before_fork(watch._conn)


def _after_fork_in_parent() -> None:
    for watch in list(Watch.instances.values()):
        watch._looking.release()


def _after_fork_in_child() -> None:
    """A child has no threads to wake it."""
    Watch.instances, Watch.lock = {}, threading.Lock()
    inotify = sys.modules.get("watchdog.observers.inotify_c")
    # watchdog 7 has one reader thread per process, and the child has not.
    if hasattr(inotify, "InotifyFD"):
        inotify.InotifyFD._instance, inotify.InotifyFD._global_lock = None, threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
