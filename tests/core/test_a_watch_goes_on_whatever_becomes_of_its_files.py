"""A watch hears commits again after its directories were replaced, and polls where it cannot listen."""

import errno
import logging
import shutil
import subprocess
import threading

import pytest
from conftest import ROOT, wait_for

pytestmark = pytest.mark.core

WRITER = """
import sys
import queue_helpers as q
while True:
    q.enqueue_task("notifications", "t", {})
"""


@pytest.fixture
def watch(installation, queue):
    """A watch of the installation that has no listeners yet."""
    queue.connect()
    return queue.Watch(installation.state)


def assert_hears_bash(installation, watch) -> None:
    heard = threading.Event()
    watch.listeners.add(heard)
    heard.clear()
    installation.sqlite3("insert into notifications (data) values ('{}')")
    assert heard.wait(2)


def test_a_state_directory_that_was_deleted_is_watched_again(installation, queue, watch):
    watch.start()
    wait_for(lambda: watch.listening, what="a watch that listens")
    shutil.rmtree(installation.state)
    wait_for(lambda: not watch.listening, what="a watch that has noticed")
    queue.connect()
    wait_for(lambda: watch.listening, what="a watch that listens again")
    assert_hears_bash(installation, watch)


def test_watchdog_logs_no_error_while_directories_are_replaced_under_load(
    installation, queue, watch, caplog, monkeypatch
):
    monkeypatch.setattr(queue, "SAFETY_TICK_SECONDS", 0.05)
    watch.start()
    writer = installation.start_python(WRITER)
    with caplog.at_level(logging.ERROR):
        for n in range(12):
            before = watch._observer
            installation.state.rename(installation.directory / f"moved away {n}")
            queue.connect()
            wait_for(lambda before=before: watch._observer not in (None, before))
    writer.kill()
    assert caplog.records == []
    assert_hears_bash(installation, watch)


def test_where_no_events_can_be_had_it_says_so_once_and_polls(
    installation, queue, watch, monkeypatch
):
    from watchdog.observers import Observer

    def no_instance(observer):
        tries.append(observer)
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    said, tries = [], []
    monkeypatch.setattr(queue, "SAFETY_TICK_SECONDS", 0.1)
    watch.on_deaf = said.append
    with monkeypatch.context() as instances:
        instances.setattr(Observer, "start", no_instance)
        watch.start()
        assert_hears_bash(installation, watch)
        wait_for(lambda: len(tries) > 2, what="another try")
    assert len(said) == 1 and "inotify instance limit reached" in said[0]
    wait_for(lambda: watch.listening, what="a watch that listens once another program lets go")


def test_a_hooks_file_from_before_the_watch_listens_is_heard(
    installation, queue, watch, monkeypatch
):
    """Nobody heard its wake byte, and it is no commit that a look would find."""
    observe, hook = watch._observe, ["/bin/sh", ROOT / "bin/hook.sh", "notifications", "t"]
    heard = threading.Event()

    def fire_and_observe(*directories):
        subprocess.run(hook, input=b"{}", env=installation.env, check=True)
        heard.clear()
        observe(*directories)

    monkeypatch.setattr(watch, "_observe", fire_and_observe)
    monkeypatch.setattr(queue, "SAFETY_TICK_SECONDS", 3_600.0)
    monkeypatch.setattr(watch, "_look", lambda: None)
    watch.listeners.add(heard)
    watch.start()
    assert heard.wait(10)
