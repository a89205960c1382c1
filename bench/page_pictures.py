#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["jinja2>=3.1,<4"]
# ///
"""Draw docs/page-*.png: the page of `tq page` on day one and on day thirty.

    uv run --script bench/page_pictures.py [DIRECTORY]

It needs Chromium (chromium or google-chrome on PATH). The tasks are made up, in a throw-away
state. Times are those of now.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import queue_helpers as q  # noqa: E402
from taskqueue.page import page_of  # noqa: E402

MINUTE, HOUR, DAY = 60, 3_600, 86_400
REASONS = {
    "link_validation": ["lychee ended with status 2: cannot read lychee.toml"],
    "fix_links": [
        "ended after the timeout of 1800 s",
        "exit status 1: usage limit reached, resets 7pm",
    ],
    "summary": ["exit status 127: claude: command not found"],
}
PRINTED = {
    "link_validation": "412 links in 31 files, none is broken",
    "fix_links": "3 links in docs/ were mended",
    "summary": "2 commits, 5 files",
    "report": "sent",
}
PROJECTS = ("handbook", "website", "tide-tables")
# Of each type: the queue, seconds that it runs, and finished tasks of a busy hour.
TYPES = {
    "link_validation": ("notifications", 1.4, 9),
    "report": ("completions", 0.3, 4),
    "summary": ("notifications", 22, 3),
    "fix_links": ("approvals", 340, 2),
}


def main() -> int:
    directory = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs"
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, fill, size in PICTURES:
            state = Path(scratch) / name
            conn = q.connect(state)
            fill(conn, random.Random(30))
            page = Path(scratch) / f"{name}.html"
            page.write_text(page_of(conn, None))
            draw(directory / f"page-{name}.png", page.as_uri(), size)
            if fill is day_thirty:
                draw(directory / "page-dark.png", page.as_uri(), size, dark=True)
    return 0


def day_one(conn: q.Connection, chance: random.Random) -> None:
    """Installed forty minutes ago: a few link checks, one that failed, one that runs."""
    now = time.time()
    for minutes in (38, 31, 30, 22, 17, 9, 8, 3):
        finish(conn, chance, "link_validation", now - minutes * MINUTE, failed=minutes == 22)
    wait(conn, "notifications", "link_validation", claimed=now - 2)


def day_thirty(conn: q.Connection, chance: random.Random) -> None:
    """A day with busy and quiet hours, failures of the weeks before, and all that can wait."""
    now = time.time()
    for hour in range(24):
        busy = 0.15 + 0.85 * abs((hour + 6) % 24 - 12) / 12
        for task_type, (_, _, tasks) in TYPES.items():
            for _ in range(round(tasks * busy * chance.uniform(0.6, 1.4))):
                ended = now - hour * HOUR - chance.uniform(0, HOUR)
                finish(
                    conn,
                    chance,
                    task_type,
                    ended,
                    failed=task_type != "report" and chance.random() < 0.03,
                )
    for days in range(2, 30):
        finish(conn, chance, "fix_links", now - days * DAY, failed=True)
    for _ in range(5):
        wait(conn, "notifications", "link_validation")
    wait(conn, "approvals", "fix_links", claimed=now - 412)
    wait(conn, "notifications", "summary", claimed=now - 9)
    wait(conn, "approvals", "fix_links", status=3, due_at=now + 14 * MINUTE)
    wait(conn, "approvals", "fix_links", status=3)


def finish(
    conn: q.Connection, chance: random.Random, task_type: str, ended: float, failed: bool
) -> None:
    queue, runs, _ = TYPES[task_type]
    began = ended - runs * chance.uniform(0.7, 1.6)
    enqueued = began - chance.expovariate(0.1 if queue == "approvals" else 2)
    row = conn.execute("select count(*) + 1000 from task_history").fetchone()[0]
    values = {
        "queue": queue,
        "row_id": row,
        "task_id": f"{task_type}-{row}",
        "task_type": task_type,
        "status": "failed" if failed else "completed",
        "data": json.dumps({"workspace_path": f"/home/user/{chance.choice(PROJECTS)}"}),
        "attempts": 4 if failed else 1,
        "enqueued_at": q.utc(enqueued),
        "started_at": q.utc(began),
        "completed_at": q.utc(ended),
        "exit_code": 1 if failed else 0,
        "result": None if failed else PRINTED[task_type],
        "error": chance.choice(REASONS[task_type]) if failed else None,
    }
    insert(conn, "task_history", values)


def wait(conn: q.Connection, queue: str, task_type: str, claimed: float | None = None, **values):
    """Store a task that waits, or runs since `claimed`; or has other values."""
    if claimed:
        values |= {"status": 2, "owner": "worker", "claimed_at": claimed, "attempts": 1}
    payload = {"workspace_path": "/home/user/handbook"}
    envelope = {"task_id": os.urandom(4).hex(), "task_type": task_type, "data": payload}
    values |= {"data": json.dumps(envelope), "timestamp": (claimed or time.time()) - 4}
    insert(conn, queue, values)


def insert(conn: q.Connection, table: str, values: dict) -> None:
    names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
    conn.execute(f'insert into "{table}" ({names}) values ({places})', values)


def draw(file: Path, address: str, size: str, dark: bool = False) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    command = [
        chromium,
        "--headless=new",
        "--hide-scrollbars",
        f"--window-size={size}",
        f"--screenshot={file}",
    ]
    # Chromium refuses its sandbox to root, as whom containers run.
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [*command, f"--user-data-dir={profile}", address], capture_output=True, text=True
        )
    if done.returncode or not file.exists():
        raise SystemExit(f"Chromium made no picture: {done.stderr[-500:]}")
    print(file)


PICTURES = (("day-one", day_one, "1180,1100"), ("day-thirty", day_thirty, "1180,1420"))

if __name__ == "__main__":
    raise SystemExit(main())
