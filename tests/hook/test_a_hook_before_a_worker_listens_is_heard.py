"""A hook's file that comes while a worker's watch looks, and does not listen yet, wakes it too."""

from __future__ import annotations

import subprocess
import threading

from conftest import ROOT, wait_for


def test_a_firing_before_the_watch_listens_wakes_it_before_the_safety_tick(
    installation, queue, monkeypatch
):
    from taskqueue import wake

    monkeypatch.setattr(queue, "SAFETY_TICK_SECONDS", 3_600.0)
    # It looks, and does not listen, until the hook has written its file.
    monkeypatch.setattr(wake, "QUIET_SECONDS", 2.0)
    queue.connect()
    heard, watch = threading.Event(), wake.Watch(installation.state)
    watch.listeners.add(heard)
    watch.start()
    wait_for(lambda: watch._seen is not None, what="the first look")
    heard.clear()
    hook = ["/bin/sh", ROOT / "bin/hook.sh", "notifications", "t"]
    done = subprocess.run(hook, input=b"{}", env=installation.env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not watch.listening and list(installation.state.glob("spool/notifications/*"))
    assert heard.wait(30)
