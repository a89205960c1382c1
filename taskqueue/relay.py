"""The loop of push, pull and fetch: events wake it, and trouble with the hub is said and waited out."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sqlite3
import time
from functools import partial

import queue_helpers as q
from taskqueue import cli, hub
from taskqueue import recovery as owners
from taskqueue.hub import Hub, Stopped
from taskqueue.remedies import as_typed, remedies_as_typed
from taskqueue.running import say
from taskqueue.supervisor import wakeup_pipe

# Seconds before the hub is tried again, doubling from the first to the last.
RETRY_SECONDS = (1.0, 60.0)
# Seconds between two lines about trouble that goes on.
TROUBLE_EVERY_SECONDS = 60.0
# Seconds between two looks, whatever the events say.
TICK_SECONDS = 5.0
# How many seconds pass between two tidyings.
TIDY_SECONDS = 3_600.0
# A task that runs a shell command stays on its machine.
STAYS = "run"

# This machine's name on the hub is random: the hub need not know host names. task_hubs remembers
# which hub was last at each address.
LOCAL_SCHEMA = """
create table if not exists task_machine (id text not null);
create table if not exists task_hubs (name text primary key, address text not null)"""


def machine_id(conn: q.Connection) -> str:
    """Return this machine's name on the hub, made when it is first wanted."""
    with owners.errors_explained(conn):
        if "task_hubs" not in q.table_names(conn):
            with q.transaction(conn):
                q.run_statements(conn, LOCAL_SCHEMA)
                if not conn.execute("select 1 from task_machine").fetchone():
                    conn.execute("insert into task_machine (id) values (?)", (os.urandom(8).hex(),))
        return conn.execute("select id from task_machine").fetchone()[0]


def address_of(url: str) -> str:
    """Return a digest of where a hub is: its host, port and database, without user and password."""
    import hashlib

    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(url)
    where = [str(parts.get(name) or "") for name in ("host", "hostaddr", "port", "dbname")]
    return hashlib.sha256("\0".join(where).encode()).hexdigest()[:16]


class Relay:
    """The loop of push, pull and fetch: events wake it, and trouble is said and waited out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.state, self.hub = args, q.STATE_DIR, Hub(args.url)
        self.wakeup, self.waker = wakeup_pipe()
        self.stops, self.is_idle = 0, False
        # Whether the local database may have changed since the last look.
        self.changed = True
        self.trouble, self.failures, self.retry_at, self.say_at = "", 0, 0.0, 0.0
        self.said: set[str] = set()
        self.locks: list[int] = []

    def set(self) -> None:
        """Wake the loop: the watch calls this after commits to the local database."""
        try:
            os.write(self.waker, b"\0")
        except BlockingIOError:
            # The pipe is full: the loop will wake.
            pass

    def run(self) -> int:
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signals = [signal.SIGTERM, signal.SIGINT]
        # nohup has SIGHUP ignored, and so it stays.
        signals += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        for number in signals:
            signal.signal(number, partial(self.stop, signals))
        try:
            conn = q.connect(self.state)
            self.machine = machine_id(conn)
            watch = q.Watch.of(self.state)
            watch.on_deaf = say
            watch.listeners.add(self)
            self.begin(conn)
            while not self.stops and not (self.args.drain and self.is_idle):
                self.attempt()
                if self.trouble and self.args.drain:
                    return 1
                self.sleep()
        except Stopped:
            pass
        finally:
            self.end()
        return 0

    def stop(self, signals: list[signal.Signals], *_) -> None:
        """Leave at the next chance; a second signal ends the process at once."""
        self.stops += 1
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        self.hub.stop()

    def attempt(self) -> None:
        """Do what is to be done now; after trouble, only when it is time to try again."""
        if time.monotonic() < self.retry_at:
            return
        try:
            if self.hub.connect():
                self.connected()
            self.step(q.connect(self.state))
            if self.trouble:
                say("going on: what was in the way is mended")
            self.trouble, self.failures, self.retry_at = "", 0, 0.0
        except (q.QueueError, OSError, sqlite3.Error) as error:
            now = time.monotonic()
            if not self.trouble or now >= self.say_at:
                why = remedies_as_typed(str(error))
                say(f"{why}; tasks wait where they are until a later try succeeds")
                self.say_at = now + TROUBLE_EVERY_SECONDS
            self.trouble, self.is_idle = str(error), False
            first, last = RETRY_SECONDS
            self.retry_at = now + min(last, first * 2.0**self.failures)
            self.failures = min(self.failures + 1, 10)

    def sleep(self) -> None:
        """Wait for an event, or for the next thing that is due."""
        now = time.monotonic()
        until = self.retry_at if self.trouble else self.due_at(now)
        if self.args.drain and self.is_idle or self.stops:
            return
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        if self.hub.conn is not None and not self.trouble:
            poll.register(self.hub.conn.fileno(), select.POLLIN)
        ready = dict(poll.poll(max(0.0, until - now) * 1000))
        if self.wakeup in ready:
            os.read(self.wakeup, 65536)
            self.changed = True

    def complain(self, about: str) -> None:
        """Say, once, what is in the way of one thing that others need not wait for."""
        if about not in self.said:
            self.said.add(about)
            say(remedies_as_typed(about))

    def lock(self, verb: str, queue: str) -> None:
        """Refuse a second process of the same kind for a queue. Raises Refused."""
        path = q.make_private(self.state / "workers") / f"relay.{verb}.{queue}"
        fd = q.lock_file(path, patience=q.PROBE_SECONDS)
        if fd is None:
            name = as_typed(f"relay.py {verb}")
            raise cli.Refused(f"another {name} serves {queue}: one is enough")
        self.locks.append(fd)

    def heard(self) -> None:
        """Tell the hub that this machine lives."""
        process = f"{os.getpid()}-{self.locks_name}"
        with self.hub.transaction() as pg:
            pg.execute(hub.HEARD, (self.machine, process))

    locks_name = os.urandom(4).hex()

    def begin(self, conn: q.Connection) -> None:
        """Prepare, before the first step, whether the hub can be used or not."""

    def connected(self) -> None:
        """Forget what a former connection knew."""

    def step(self, conn: q.Connection) -> None:
        """Do all that can be done now, and set is_idle."""
        raise NotImplementedError

    def due_at(self, now: float) -> float:
        """Return when to step again if nothing wakes the loop, on the monotonic clock."""
        return now + TICK_SECONDS

    def end(self) -> None:
        """Clean up before the process ends."""
        self.hub.close()
