"""Waking sleepers: a commit, a spooled task or an owner's death is noticed within milliseconds."""

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
    # Without watchdog a Watch looks at intervals.
    _Handler = object

import queue_helpers as q

# How often dead owners are looked for while a handler outlives its worker.
ORPHAN_TICK_SECONDS = 0.25

# How often the database is looked at where the platform has no events to give.
POLL_SECONDS = 0.05

# More events than this within QUIET_SECONDS cost more than to look every BUSY_LOOK_SECONDS, until
# no commit has come for QUIET_SECONDS. A task that is put, claimed and acknowledged makes eight
# events.
BUSY_EVENTS = 100
BUSY_LOOK_SECONDS = 0.002
QUIET_SECONDS = 0.1

# How long a commit may take from its write to its being visible.
SLOW_COMMIT_SECONDS = 5.0

# After the event of a lock file, dead owners are looked for so long: the event comes a little
# before the lock is free.
OWNER_CLOSED_SECONDS = 0.3

# A process that ends waits so long for what its watch takes back at this moment.
LEAVE_SECONDS = 1.0

# The pauses between the looks that follow an event, half a second in all; only the first is not cut
# short by another event. The last ones are for a slow disk: a change that was found may be that of
# an earlier commit, while the one that was heard is still being synced.
LOOK_AGAIN_SECONDS = (0.001, 0.004, 0.016, 0.032, 0.032, 0.064, 0.128, 0.256)

# While a change is expected, pauses grow up to this one of them; after a change was found, they
# begin again with it.
OWED_STEP = 2


class Writes:
    """Tells one thread that there have been writes.

    It ends the thread's long pauses, and lets short ones pass. One commit makes several events. The
    short pause lets them come together: to end it for each would cost more than the look itself.
    """

    def __init__(self) -> None:
        self._told, self._may_end, self._ended = False, False, threading.Event()

    def set(self) -> None:
        """There was a write: callable from any thread."""
        self._told = True
        if self._may_end:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Pause for so many seconds; whether there was a write, before or meanwhile."""
        if seconds <= LOOK_AGAIN_SECONDS[0]:
            time.sleep(seconds)
        else:
            # set() writes _told and then reads _may_end. Here it is the other way round, so that
            # one sees the other.
            self._may_end = True
            if not self._told:
                self._ended.wait(seconds)
            self._may_end = False
            self._ended.clear()
        if not self._told:
            return False
        self._told = False
        return True


def look_again(heard: Writes, look, owed: bool = True) -> None:
    """Call look() at growing intervals until all have passed without an event and a change.

    The write to the write-ahead log that watchdog reports comes before the commit can be seen
    (write, fsync, then the shared index): whoever looks once per event misses one task in ten until
    the next event. An event that no change has followed is waited for longer, since the disk may be
    slow: then a change is owed. look() returns whether there was one, or None to end this.
    """
    step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS if owed else 0.0
    while step < len(LOOK_AGAIN_SECONDS):
        if heard.wait(LOOK_AGAIN_SECONDS[step]):
            step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS
        elif step != OWED_STEP or time.monotonic() >= owed_until:
            step += 1
        changed = look()
        if changed is None:
            return
        if changed:
            step, owed_until = OWED_STEP, 0.0


def data_version(conn: q.Connection) -> tuple:
    """A value that changes whenever another connection's commit becomes visible."""
    return conn.file, conn.execute("pragma data_version").fetchone()[0]


def is_wake(path: str) -> bool:
    """Whether a write at this path may mean a commit."""
    return path.endswith((".db-wal", "/wake"))


def new_observer(handler):
    """A watchdog observer that calls handler.dispatch(event) in the thread that reads the events.

    watchdog itself hands each event over to one more thread, which costs as much as reading it.
    dispatch() raises nothing. Where it returns False there are no more events of that directory.
    """
    from watchdog.observers import Observer
    from watchdog.observers.api import EventQueue

    platforms: Any = Observer

    class Straight(EventQueue):
        def put(self, item, block=True, timeout=None):
            if not isinstance(item, tuple):
                super().put(item, block, timeout)
            elif handler.dispatch(item[0]) is False:
                # Stopped from another thread while an event arrives, it would log an error.
                emitter: Any = threading.current_thread()
                emitter.stop()

    class StraightObserver(platforms):
        straight = None

        @property
        def event_queue(self):
            self.straight = self.straight or Straight()
            return self.straight

    logging.getLogger("watchdog.observers.inotify").addFilter(_is_no_false_alarm)
    return StraightObserver()


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Not what watchdog logs as an error when it is stopped while an event arrives."""
    return "called when the thread is inactive" not in str(record.msg)


class Watch(threading.Thread):
    """Tells its listeners when another connection has changed the database.

    There is one per process and state directory. Listeners are objects with a set() method, which
    is called from other threads; they are held weakly. A Watch also takes back the tasks of dead
    owners, the moment their lock files are closed, and notices a deleted or replaced state
    directory. Without file events it looks every POLL_SECONDS.
    """

    instances: dict[Path, Watch] = {}
    lock = threading.Lock()

    @classmethod
    def of(cls, state: Path | None = None) -> Watch:
        """The running watch of this process on state (default: STATE_DIR)."""
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
        # Seconds, for q.recover().
        self.crash_backoff = 0.0
        # Called with each task that was taken back from a dead owner.
        self.on_recovered: Callable = lambda task, outcome, error: None
        # Called once with a message, where file events cannot be had.
        self.on_deaf: Callable = lambda message: None
        # Whether commits are reported by events, and not looked for at short intervals.
        self.listening = False
        self._heard = Writes()
        # So that the first looks recover.
        self._owner_closed_at, self._recovered_at = time.monotonic(), 0.0
        self._orphans, self._deaf = 0, False
        # The data version at the last look, and when the log had been written before the last
        # change was seen.
        self._seen, self._written = None, None
        # The lock is held while this thread uses its connection: a fork closes that in another
        # thread.
        self._looking, self._conn = threading.RLock(), None
        self._observer: Any = None
        self._directories, self._commits = None, []
        # The write-ahead log, which lies beside the database itself where tasks.db is a symbolic
        # link.
        self._log = f"{state}/tasks.db-wal"
        self._counted_since, self._events = 0.0, 0

    def notify(self) -> None:
        """Have every listener look."""
        for listener in list(self.listeners):
            listener.set()

    def leave(self) -> None:
        """Have no more tasks taken back. A look that is under way reports first, if it does so soon.

        For the end of a process: its watch does not go on.
        """
        self._looking.acquire(timeout=LEAVE_SECONDS)

    def dispatch(self, event) -> bool:
        """Take one of watchdog's events, in one of its threads; False when there are too many."""
        try:
            path = os.fsdecode(event.dest_path or event.src_path)
            directory, name = os.path.split(path)
            if name == os.path.basename(self._log):
                self._heard.set()
                return self._few()
            if name == "wake":
                # It is written after the commit, which can be seen therefore.
                self.notify()
                return self._few()
            if os.path.basename(directory) == "workers":
                self._owner_closed_at = time.monotonic()
                self._heard.set()
            elif (
                not name.startswith(".") and os.path.basename(os.path.dirname(directory)) == "spool"
            ):
                self.notify()
        except Exception as error:
            self._report(error)
        return True

    def _few(self) -> bool:
        """Count an event; whether events are still few enough to be worth their cost."""
        now = time.monotonic()
        if now > self._counted_since + QUIET_SECONDS:
            self._counted_since, self._events = now, 0
        self._events += 1
        if self._events > BUSY_EVENTS:
            self.listening = False
            self._heard.set()
        return self.listening

    def run(self) -> None:
        refresh_at = 0.0
        while True:
            try:
                if self._observer is None or time.monotonic() >= refresh_at:
                    self._refresh()
                    refresh_at = time.monotonic() + q.SAFETY_TICK_SECONDS
                if self._observer is None:
                    self._look()
                    time.sleep(POLL_SECONDS)
                elif not self.listening:
                    self._look_until_quiet()
                    self._listen()
                    # A hook's file that came before is no commit, and nobody heard its wake byte.
                    self.notify()
                    owed = self._log_written() != self._written
                    look_again(self._heard, self._look_while_listening, owed)
                elif self._heard.wait(
                    ORPHAN_TICK_SECONDS if self._orphans else q.SAFETY_TICK_SECONDS
                ):
                    # At this moment the commit cannot be seen yet.
                    look_again(self._heard, self._look_while_listening)
                else:
                    self.notify()
                    self._look()
            except Exception as error:
                if not isinstance(error, (q.QueueError, sqlite3.Error, OSError)):
                    self._report(error)
                # The state directory is gone or in trouble: its users find out when they look.
                self._stop_observing()
                self._seen = None
                self.notify()
                time.sleep(POLL_SECONDS)

    def _report(self, error: Exception) -> None:
        """Say what should not have happened: waking and recovery must outlive it."""
        logging.getLogger(__name__).error("watching %s", self.state, exc_info=error)

    def _look_until_quiet(self) -> None:
        """Look at short intervals until no commit has come for QUIET_SECONDS."""
        until = time.monotonic() + QUIET_SECONDS
        refresh_at = time.monotonic() + q.SAFETY_TICK_SECONDS
        while time.monotonic() < min(until, refresh_at):
            time.sleep(BUSY_LOOK_SECONDS)
            if self._look():
                until = time.monotonic() + QUIET_SECONDS

    def _look_while_listening(self) -> bool | None:
        return self._look() if self.listening else None

    def _look(self) -> bool:
        """Tell the listeners of a commit that has become visible; whether one has.

        Dead owners' tasks are taken back, too.
        """
        written = self._log_written()
        with self._looking:
            self._conn = q.connect(self.state, create=False)
            version = data_version(self._conn)
            changed = version != self._seen
            if changed:
                self._seen, self._written = version, written
                self.notify()
            recovered = self._recover() if self._is_time_to_recover() else []
            # Within the lock: who leaves this watch has been told of all that it took back.
            for report in recovered:
                self.on_recovered(*report)
        if recovered:
            self.notify()
        return changed

    def _is_time_to_recover(self) -> bool:
        """Whether an owner may have died since dead owners were last looked for.

        The event of a dead owner's file comes a little before its lock is free; hence again for a
        while.
        """
        now = time.monotonic()
        tick = ORPHAN_TICK_SECONDS if self._orphans else q.SAFETY_TICK_SECONDS
        return now < self._owner_closed_at + OWNER_CLOSED_SECONDS or now > self._recovered_at + tick

    def _recover(self) -> list:
        recovered, self._orphans = q.recover(self.state, crash_backoff=self.crash_backoff)
        self._recovered_at = time.monotonic()
        return recovered

    def _log_written(self) -> int | None:
        """When the write-ahead log was written last, in nanoseconds; None where there is none."""
        try:
            return os.stat(self._log).st_mtime_ns
        except OSError:
            return None

    def _listen(self) -> None:
        """Have commits reported; the next look comes after this, for what was committed before."""
        from watchdog.events import FileModifiedEvent

        try:
            while self._commits:
                self._observer.unschedule(self._commits.pop())
        except KeyError:
            # An emitter of macOS that has stopped by itself no longer knows what it watched.
            self._stop_observing()
            return
        self._counted_since, self._events, self.listening = time.monotonic(), 0, True
        for directory in {str(self.state), os.path.dirname(self._log)}:
            self._commits.append(
                self._observer.schedule(self, directory, event_filter=[FileModifiedEvent])
            )

    def _refresh(self) -> None:
        """Start to observe; anew when one of the directories was made, removed or replaced."""
        directory, name = os.path.split(os.path.realpath(self.state / "tasks.db"))
        is_here = os.path.samefile(directory, self.state)
        self._log, found = f"{self.state if is_here else directory}/{name}-wal", {}
        for directory in (
            self.state,
            os.path.dirname(self._log),
            q.make_private(self.state / "workers"),
            *q.spool_directories(self.state),
        ):
            there = os.stat(directory)
            found[str(directory)] = (there.st_dev, there.st_ino)
        if found == self._directories:
            return
        self._stop_observing()
        self._directories = found
        try:
            from watchdog.events import FileClosedEvent, FileCreatedEvent, FileMovedEvent

            observer = new_observer(self)
            for directory in found.keys() - {str(self.state), os.path.dirname(self._log)}:
                observer.schedule(
                    self,
                    directory,
                    event_filter=[FileClosedEvent, FileCreatedEvent, FileMovedEvent],
                )
            observer.daemon = True
            observer.start()
            self._observer = observer
        except (ImportError, OSError) as error:
            if not self._deaf:
                self.on_deaf(
                    f"no file events ({error}): looking every {POLL_SECONDS * 1000:.0f} ms instead"
                )
            self._deaf = True

    def _stop_observing(self) -> None:
        observer, self._observer = self._observer, None
        self._directories, self._commits = None, []
        self.listening = False
        if observer is not None:
            observer.stop()


class WakeEvent:
    """What persist-queue's blocking get() waits on: an event that other processes set, too.

    clear() does nothing: persist-queue clears after it has looked, and would lose what came in
    between. Instead each thread remembers how far it has heard, and wait() returns at once when
    there was more.
    """

    def __init__(self, queue: str, state: Path) -> None:
        self._queue, self._state = queue, state
        self._changed, self._count = threading.Condition(), 0
        self._heard = threading.local()

    def set(self) -> None:
        """Have every waiting thread look, and the others at their next wait()."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def clear(self) -> None:
        """Nothing, see above."""

    def wait(self, timeout: float | None = None) -> bool:
        """True when there is reason to look, False after timeout seconds.

        Or when a scheduled task becomes ready, or after SAFETY_TICK_SECONDS where there is no
        timeout. Raises QueueBusy, QueueUnavailable.
        """
        Watch.of(self._state).listeners.add(self)
        timeout = sleep_seconds(q.connect(self._state), [self._queue], timeout)
        with self._changed:
            woken = self._changed.wait_for(
                lambda: self._count != getattr(self._heard, "count", -1), timeout
            )
            self._heard.count = self._count
            return woken


def sleep_seconds(conn: q.Connection, queues: Iterable[str], longest: float | None = None) -> float:
    """How many seconds a consumer may sleep if no event wakes it: until the next scheduled task.

    `longest` is the most (default: SAFETY_TICK_SECONDS). Raises QueueBusy, QueueUnavailable.
    """
    now = time.time()
    due = [
        max(0.0, when - now)
        for when in (q.next_due(conn, queue) for queue in queues)
        if when is not None
    ]
    return min([q.SAFETY_TICK_SECONDS if longest is None else longest, *due])


class QueueWatcher(_Handler):
    """A watchdog handler that calls back when the queue has changed.

    QueueWatcher(QUEUE_PATH, callback): the callback takes nothing and drains the queue: several
    tasks may come with one call, and a call may find none. What it raises is logged. A coroutine
    function runs in the event loop in which this was made; made outside of one, in a loop of its
    own. Calls do not overlap. Where tasks.db is a symbolic link, bash's writes are seen only by an
    observer of the directory of the file itself: schedule this there, too. Raises QueueUnavailable
    when there can be no queue at QUEUE_PATH.
    """

    def __init__(self, queue_path: str | Path, callback: Callable) -> None:
        self.queue_path, self.callback = Path(queue_path).absolute(), callback
        # So that there is something to watch.
        q.connect(self.queue_path)
        self._heard, self._thread, self._seen, self._loop = Writes(), None, None, None
        if sys.modules.get("asyncio"):
            try:
                self._loop = sys.modules["asyncio"].get_running_loop()
            except RuntimeError:
                pass

    def on_modified(self, event) -> None:
        """Have the callback's thread look; watchdog calls this, from one thread."""
        if is_wake(os.fsdecode(event.src_path)):
            self._heard.set()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"QueueWatcher {self.queue_path}", daemon=True
                )
                self._thread.start()

    on_closed = on_modified

    def _run(self) -> None:
        while True:
            if self._heard.wait(threading.TIMEOUT_MAX):
                self._look()
                look_again(self._heard, self._look)

    def _look(self) -> bool:
        try:
            conn = q.connect(self.queue_path, create=False)
            directories = q.spool_directories(self.queue_path)
            # What this connection takes in does not change its own version of the data.
            came = [directory for directory in directories if q.take_in(conn, directory.name)]
            version = data_version(conn)
            changed = bool(came) or version != self._seen
            self._seen = version
            if changed:
                self._call()
            return changed
        except q.QueueUnavailable:
            # The database was removed; whoever makes the next one is noticed.
            return False
        except Exception:
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
    """Let no look be half done, and close the watches' connections.

    A child would take SQLite's locks for its own.
    """
    # Held until the fork is done: another watch must not begin meanwhile.
    Watch.lock.acquire()
    for watch in Watch.instances.values():
        watch._looking.acquire()
        q.close_before_fork(watch._conn)


def _after_fork_in_parent() -> None:
    for watch in Watch.instances.values():
        watch._looking.release()
    Watch.lock.release()


def _after_fork_in_child() -> None:
    """A child has no threads to wake it."""
    Watch.instances, Watch.lock = {}, threading.Lock()
    inotify: Any = sys.modules.get("watchdog.observers.inotify_c")
    # watchdog 7 has one reader thread per process, and the child has not.
    if hasattr(inotify, "InotifyFD"):
        inotify.InotifyFD._instance, inotify.InotifyFD._global_lock = None, threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
