"""The scripts are replaced, forwards and back, while hooks fire: no firing is lost, and none ends
with an error.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, wait_for

# A name that the newer version's script uses, and that only the newer version's module has.
NEWER_MODULE = "\n\ndef only_in_the_newer_version():\n    return 0\n"
NEWER_SCRIPT = (
    "def hook(args: Arguments) -> int:\n",
    "def hook(args: Arguments) -> int:\n    q.only_in_the_newer_version()\n",
)


@pytest.fixture
def versions(tmp_path):
    """Two checkouts: the newer one's enqueue.py needs the newer one's queue_helpers.py."""
    made = {}
    for name in ("older", "newer"):
        made[name] = tmp_path / name
        shutil.copytree(
            ROOT,
            made[name],
            ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "bench", "docs"),
        )
    module, script = made["newer"] / "queue_helpers.py", made["newer"] / "enqueue.py"
    # Above __getattr__, which every name passes that is not there.
    module.write_text(module.read_text().replace("\ndef wake(", f"{NEWER_MODULE}\n\ndef wake(", 1))
    text = script.read_text()
    assert text.count(NEWER_SCRIPT[0]) == 1 and "only_in_the_newer" in module.read_text()
    script.write_text(text.replace(*NEWER_SCRIPT))
    return made


def install(source, home):
    ran = subprocess.run(
        [sys.executable, source / "install.py", "install", "--no-warm", "--hook", "no"],
        stdin=subprocess.DEVNULL,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_newer_script_does_not_work_with_the_older_module(tmp_path, versions):
    """So the test after this one can fail."""
    shutil.copy(versions["newer"] / "enqueue.py", versions["older"] / "enqueue.py")
    ran = subprocess.run(
        [sys.executable, versions["older"] / "enqueue.py", "--hook", "notifications"],
        input=b"{}",
        capture_output=True,
        env={"TASK_QUEUE_STATE": str(tmp_path / "state")},
    )
    assert ran.returncode == 1 and b"only_in_the_newer_version" in ran.stderr


def test_no_firing_is_lost_while_versions_change(tmp_path, versions):
    home = tmp_path / "home"
    home.mkdir()
    install(versions["older"], home)
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
            install(versions[name], home)
            for script in ("enqueue.py", "queue_helpers.py"):
                assert (prefix / "runtime/lib" / script).read_bytes() == (
                    versions[name] / script
                ).read_bytes()
            # Some hooks run with this version alone.
            seen = len(fired)
            wait_for(lambda seen=seen: len(fired) > seen + 6 or failed, 30, "six firings more")
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failed == [] and len(fired) > 40
    conn = sqlite3.connect(prefix / "state/tasks.db")
    stored = [
        json.loads(data)["data"]["session_id"]
        for (data,) in conn.execute("select data from notifications")
    ]
    conn.close()
    spooled = [path for path in (prefix / "state/spool/notifications").iterdir() if path.is_file()]
    assert len(stored) + len(spooled) == len(fired) and set(stored) <= set(fired)
