"""The scripts are replaced, forwards and back, while hooks fire: no firing is lost, and none ends
with an error.
"""

import json
import shutil
import sqlite3
import subprocess
import threading

import pytest
from conftest import ROOT, wait_for
from homes import install

import queue_helpers


@pytest.fixture
def versions(tmp_path):
    """Two checkouts, whose hooks differ."""
    made = {}
    for name in ("older", "newer"):
        made[name] = tmp_path / name
        shutil.copytree(
            ROOT,
            made[name],
            ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "bench", "docs"),
        )
    for file in ("bin/hook.sh", "queue_helpers.py"):
        path = made["newer"] / file
        path.write_text(f"{path.read_text()}# {'a newer version ' * 500}\n")
    return made


def test_no_firing_is_lost_while_versions_change(tmp_path, versions):
    home = tmp_path / "home"
    home.mkdir()
    install(home, source=versions["older"])
    prefix = home / ".claude/automation/lychee"
    over, failed, fired = threading.Event(), [], []

    def fire(number):
        count = 0
        while not over.is_set():
            count += 1
            payload = json.dumps(
                {"cwd": "/", "hook_event_name": "Stop", "session_id": f"{number}-{count}"}
            ).encode()
            ran = subprocess.run(
                ["/bin/sh", prefix / "runtime/hook", "notifications", "t"],
                input=payload,
                env={"HOME": str(home)},
                capture_output=True,
                timeout=30,
            )
            fired.append(f"{number}-{count}")
            if (ran.returncode, ran.stdout, ran.stderr) != (0, b"", b""):
                failed.append(ran)

    threads = [threading.Thread(target=fire, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for name in ("newer", "older") * 3:
            install(home, source=versions[name])
            for file in ("bin/hook.sh", "queue_helpers.py"):
                installed = (prefix / "runtime/lib" / file).read_bytes()
                assert installed == (versions[name] / file).read_bytes()
            # Some hooks run with this version alone.
            seen = len(fired)
            wait_for(lambda seen=seen: len(fired) > seen + 6 or failed, 30, "six firings more")
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failed == [] and len(fired) > 40
    queue_helpers.take_in_spool(prefix / "state")
    conn = sqlite3.connect(prefix / "state/tasks.db")
    rows = conn.execute("select json_extract(data, '$.data.session_id') from notifications")
    assert sorted(row for (row,) in rows) == sorted(fired)
    conn.close()
