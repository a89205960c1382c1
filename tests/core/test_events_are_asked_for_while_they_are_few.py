"""Commits are reported by events as long as those are few; while they are many, looking now and
then costs less.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, wait_for

FEW = 20


class Listener:
    """Counts how often it is told to look."""

    def __init__(self, watch) -> None:
        self.told = 0
        watch.listeners.add(self)

    def set(self) -> None:
        self.told += 1


@pytest.fixture
def watch(installation, queue, monkeypatch):
    """A watch that listens, and to which FEW events are few: a loaded machine has no more in so
    short a time.
    """
    from taskqueue import wake as queue_wake

    monkeypatch.setattr(queue_wake, "BUSY_EVENTS", FEW)
    queue.connect()
    watch = queue.Watch.of(installation.state)
    wait_for(lambda: watch.listening, what="a watch that listens")
    return watch


def insert_by_sqlite3(installation) -> None:
    installation.sqlite3("insert into notifications (data) values ('{}')")


def burst(queue, watch) -> None:
    """Put tasks until they are no longer listened to."""
    deadline = time.monotonic() + 30
    while watch.listening:
        assert time.monotonic() < deadline
        queue.enqueue_task("notifications", "t", {})


def test_in_a_burst_nothing_is_listened_to_and_after_it_the_next_commit_is_heard(
    installation, queue, watch, caplog
):
    listener = Listener(watch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            burst(queue, watch)
            before = listener.told
            queue.enqueue_task("notifications", "t", {})
            wait_for(lambda before=before: listener.told > before, 1, "the commit to be seen")
            wait_for(lambda: watch.listening, what="events asked for again")
            before = listener.told
            insert_by_sqlite3(installation)
            wait_for(lambda before=before: listener.told > before, 1, "the commit to be heard")
    assert caplog.records == []


def test_a_commit_in_the_moment_in_which_events_are_asked_for_again_is_seen(
    installation, queue, watch, monkeypatch
):
    """It was written before the watch, and is reported by nobody."""
    listener, listen, heard = Listener(watch), watch._listen, []

    def listen_late():
        insert_by_sqlite3(installation)
        before = listener.told
        listen()
        heard.append(before)

    monkeypatch.setattr(watch, "_listen", listen_late)
    burst(queue, watch)
    wait_for(lambda: heard, what="events asked for again")
    wait_for(lambda: listener.told > heard[0], 2, "the commit to be seen")


def test_watchdog_reports_no_error_when_directories_come_and_go_while_others_write(
    installation, queue, watch, caplog
):
    stop = threading.Event()
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); import queue_helpers as q\n"
            "while True:\n    q.enqueue_task('notifications', 't', {})",
            ROOT,
        ],
        env=installation.env,
    )
    installation.processes.append(writer)

    def touch():
        while not stop.is_set():
            for directory in ("workers", "spool/notifications"):
                try:
                    (installation.state / directory / "any").write_text("{}")
                except OSError:
                    pass

    touching = threading.Thread(target=touch)
    touching.start()
    try:
        with caplog.at_level(logging.ERROR):
            for n in range(30):
                queue.make_private(installation.state / "spool" / f"q{n}", parents=True)
                watch._heard.set()
                time.sleep(0.02)
                if n % 10 == 9:
                    installation.state.rename(installation.directory / f"moved away {n}")
                    queue.connect(installation.state)
                    wait_for(lambda: watch._directories, what="a watch that goes on")
    finally:
        stop.set()
        touching.join()
        writer.kill()
    assert [record for record in caplog.records if record.name.startswith("watchdog")] == []


@pytest.mark.parametrize("how", ["moved", "written"])
def test_a_file_that_comes_into_the_spool_is_heard(installation, queue, watch, how):
    spool = queue.make_private(installation.state / "spool" / "notifications", parents=True)
    watch._heard.set()
    wait_for(
        lambda: str(spool) in (watch._directories or {}), what="a spool directory that is watched"
    )
    wait_for(lambda: watch.listening, what="a watch that listens")
    listener = Listener(watch)
    if how == "moved":
        elsewhere = installation.directory / "task.json"
        elsewhere.write_text("{}")
        os.rename(elsewhere, spool / "task.json")
    else:
        (spool / "task.json").write_text("{}")
    wait_for(lambda: listener.told, 1, "the file to be heard")


def test_a_state_directory_that_was_deleted_is_watched_again(installation, queue, watch):
    shutil.rmtree(installation.state)
    wait_for(lambda: not watch.listening, what="a watch that has noticed")
    queue.connect(installation.state)
    wait_for(lambda: watch.listening, what="a watch that listens")
    listener = Listener(watch)
    insert_by_sqlite3(installation)
    wait_for(lambda: listener.told, 1, "the commit to be heard")


def test_watchdog_reports_no_error_when_an_event_comes_after_the_stop(installation, queue, caplog):
    """An emitter that is stopped between two events asks once more."""
    from taskqueue import wake as queue_wake

    queue.connect()
    observer = queue_wake.new_observer(queue.Watch(installation.state))
    observer.schedule(queue.Watch(installation.state), str(installation.state))
    observer.start()
    emitter = next(iter(observer.emitters))
    observer.stop()
    observer.join()
    with caplog.at_level(logging.ERROR):
        emitter.queue_events(1)
    assert caplog.records == []
