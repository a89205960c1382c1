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

# How often dead owners are looked for while a handler outlives its worker.
ORPHAN_TICK_SECONDS = 0.25

# How often the database is looked at where the platform has no events to give.
POLL_SECONDS = 0.05

# How often it is looked at while so many commits come that events would cost more, and how long it must be quiet
# before events are asked for again.
BUSY_LOOK_SECONDS = 0.002
QUIET_SECONDS = 0.1

# So many events within QUIET_SECONDS are that many: a task that is put, claimed and acknowledged makes about five.
BUSY_EVENTS = 100

# How long a commit may take from its write to its being visible.
SLOW_COMMIT_SECONDS = 5.0

# How long the end of an owner is news: its lock file's event comes a little before the lock is free.
OWNER_CLOSED_SECONDS = 0.3

# The pauses between the looks that follow an event, 85 ms in all; only the first is not cut short by another event.
LOOK_AGAIN_SECONDS = (0.001, 0.004, 0.016, 0.064)

# Which of these pauses is the longest as long as a change is owed, and the first once one was found.
OWED_STEP = 2


class Writes:
    """Tells one thread that there have been writes. It ends the thread's long pauses, and lets short ones pass.

    One commit makes several events. The short pause lets them come together: to end it for each would cost more than
    the look itself.
    """

    def __init__(self) -> None:
        self._told, self._may_end, self._ended = False, False, threading.Event()

    def set(self) -> None:
        self._told = True
        if self._may_end:
            self._ended.set()

    def wait(self, pause: float) -> bool:
        """Pause for so many seconds; whether there was a write, before or meanwhile."""
        if pause <= LOOK_AGAIN_SECONDS[0]:
            time.sleep(pause)
        else:
            # Said before _told is read, as set() does the contrary: one of both sees the other's.
            self._may_end = True
            if not self._told:
                self._ended.wait(pause)
            self._may_end = False
            self._ended.clear()
        if not self._told:
            return False
        self._told = False
        return True


def look_again(heard: Writes, look) -> None:
    """Call look() at growing intervals until all of them have passed without an event and without a change.

    The write to the write-ahead log that watchdog reports comes before the commit can be seen (write, fsync, then the
    shared index): whoever looks once per event misses one task in ten until the next event. An event that no change
    has followed is waited for longer, since the disk may be slow.
    """
    step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS
    while step < len(LOOK_AGAIN_SECONDS):
        if heard.wait(LOOK_AGAIN_SECONDS[step]):
            step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS
        elif step != OWED_STEP or time.monotonic() >= owed_until:
            step += 1
        if look():
            step, owed_until = OWED_STEP, 0.0


def data_version(conn: q.Connection) -> tuple:
    """A value that changes whenever another connection's commit becomes visible."""
    return conn.file, conn.execute("pragma data_version").fetchone()[0]


def is_wake(path: str) -> bool:
    """Whether a write at this path may mean a commit."""
    return path.endswith(("/tasks.db-wal", "/wake"))


def new_observer(handler):
    """A watchdog observer that calls handler.dispatch() in the thread that has read the event.

    watchdog would hand the event over to one more thread first. dispatch() must raise nothing, and may unschedule.
    """
    from watchdog.observers import Observer
    from watchdog.observers.api import EventQueue

    class Straight(EventQueue):
        def put(self, item, block=True, timeout=None):
            if isinstance(item, tuple):
                handler.dispatch(item[0])
            else:
                super().put(item, block, timeout)

    class StraightObserver(Observer):
        straight = Straight()
        event_queue = property(lambda self: self.straight)

    return StraightObserver()


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
        self._heard = Writes()
        self._owner_closed_at = time.monotonic()  # so that the first looks recover
        self._recovered_at = 0.0
        self._orphans = 0
        self._seen, self._written = None, None
        self._looking, self._conn = threading.RLock(), None  # so that a fork does not take our connection along
        self._observer, self._directories, self._commits, self._deaf = None, None, None, False
        self._counted_since, self._events = 0.0, 0

    def notify(self) -> None:
        """Have every listener look."""
        for listener in list(self.listeners):
            listener.set()

    def dispatch(self, event) -> None:
        """Take one of watchdog's events, in a thread of its own."""
        try:
            path = os.fsdecode(event.dest_path or event.src_path)
            if path.endswith("/tasks.db-wal"):
                self._count()
                self._heard.set()
                return
            if path.endswith("/wake"):
                # This comes after the commit: there is something to be seen.
                self._count()
                self.notify()
                return
            directory, name = os.path.split(path)
            if os.path.basename(directory) == "workers":
                self._owner_closed_at = time.monotonic()
                self._heard.set()
            elif not name.startswith(".") and os.path.basename(os.path.dirname(directory)) == "spool":
                self.notify()
        except Exception as error:
            self._report(error)

    def _count(self) -> None:
        now = time.monotonic()
        if now > self._counted_since + QUIET_SECONDS:
            self._counted_since, self._events = now, 0
        self._events += 1
        if self._events > BUSY_EVENTS and self._commits is not None:
            commits, self._commits = self._commits, None
            self._observer.unschedule(commits)

    def _see(self) -> bool:
        """Notify when a commit has become visible since the last time; whether one has."""
        with self._looking:
            if self._conn is None or self._conn.file is None:
                return False
            version = data_version(self._conn)
            changed, self._seen = version != self._seen, version
        if changed:
            self.notify()
        return changed

    def run(self) -> None:
        while True:
            try:
                self._refresh()
                if self._observer is None:
                    self._look()
                    time.sleep(POLL_SECONDS)
                elif self._commits is None:
                    until = time.monotonic() + QUIET_SECONDS
                    while time.monotonic() < until:
                        time.sleep(BUSY_LOOK_SECONDS)
                        if self._look():
                            until = time.monotonic() + QUIET_SECONDS
                    self._events = 0
                    from watchdog.events import FileModifiedEvent
                    self._commits = self._observer.schedule(self, str(self.state), event_filter=[FileModifiedEvent])
                    look_again(self._heard, self._look)
                elif self._heard.wait(ORPHAN_TICK_SECONDS if self._orphans else q.SAFETY_TICK_SECONDS):
                    self._look()
                    look_again(self._heard, self._look)
                else:
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
            changed = self._see()
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

    def _refresh(self) -> None:
        """Start to observe; anew when one of the directories was made, removed or replaced."""
        found = {}
        for directory in (self.state, q.make_private(self.state / "workers"), *q.spool_directories(self.state)):
            there = os.stat(directory)
            found[str(directory)] = (there.st_dev, there.st_ino)
        if found == self._directories:
            return
        self._stop_observing()
        self._directories = found
        try:
            from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent

            observer = new_observer(self)
            for directory in found.keys() - {str(self.state)}:
                observer.schedule(self, directory, event_filter=[FileClosedEvent, FileCreatedEvent, FileMovedEvent])
            observer.daemon = True
            observer.start()
            self._observer = observer
        except (ImportError, OSError) as error:
            if not self._deaf:
                self.on_deaf(f"no file events ({error}): looking every {POLL_SECONDS * 1000:.0f} ms instead")
            self._deaf = True

    def _stop_observing(self) -> None:
        observer, self._observer, self._directories, self._commits = self._observer, None, None, None
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
        self._heard, self._thread, self._seen, self._loop = Writes(), None, None, None
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
        while True:
            if self._heard.wait(3600):
                self._look()
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
