#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""What a hook costs, whole processes in turn: enqueue.py --hook against a script that inserts one
row, and the sqlite3 command on our table against a bare INSERT into a plain table. Goals: at most
1.5 times each.

    bench/hook_start.py [ROUNDS] [CHECKOUT]      default 60; with CHECKOUT also against the enqueue.py there
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PLAIN = """# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
import json, sqlite3, sys
conn = sqlite3.connect("{db}")
conn.execute("insert into plain (data) values (?)", (json.dumps(json.load(sys.stdin)),))
conn.commit()
"""
PAYLOAD = '{"session_id": "%d", "cwd": "/home/user/code/harbor-docs", "hook_event_name": "Stop", "stop_hook_active": false}'


def main() -> int:
    rounds, other = int((sys.argv + ["60"])[1]), sys.argv[2] if len(sys.argv) > 2 else None
    uv = os.environ.get("UV") or shutil.which("uv")
    with tempfile.TemporaryDirectory() as directory:
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        plain_db, ours = f"{directory}/plain.db", f"{directory}/state/tasks.db"
        subprocess.run(
            [
                "sqlite3",
                plain_db,
                "pragma journal_mode=wal; create table plain (id integer primary key, data text)",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        Path(directory, "plain.py").write_text(PLAIN.format(db=plain_db))
        # What README gives for bash: stdin as hexadecimal digits, so that nothing needs quoting.
        insert = """{{ printf "insert into {table} (data) values (cast(x'"; od -An -v -tx1 | tr -d ' \\n'
            printf "' as text));"; }} | sqlite3 -cmd '.timeout 5000' '{db}'"""
        commands = {
            "uv run --script plain.py": [uv, "run", "--script", f"{directory}/plain.py"],
            "uv run --script enqueue.py --hook": [
                uv,
                "run",
                "--script",
                HERE / "enqueue.py",
                "--hook",
                "notifications",
            ],
            "python3 plain.py": [sys.executable, f"{directory}/plain.py"],
            "python3 enqueue.py --hook": [
                sys.executable,
                HERE / "enqueue.py",
                "--hook",
                "notifications",
            ],
            "sqlite3 INSERT INTO plain": [
                "/bin/sh",
                "-c",
                insert.format(table="plain", db=plain_db),
            ],
            "sqlite3 INSERT INTO notifications": [
                "/bin/sh",
                "-c",
                insert.format(table="notifications", db=ours),
            ],
        }
        if other:
            hook = [sys.executable, f"{other}/enqueue.py", "--hook", "notifications"]
            commands |= {
                "python3 CHECKOUT/enqueue.py --hook": [
                    "/usr/bin/env",
                    f"TASK_QUEUE_STATE={directory}/other",
                    *hook,
                ],
                "python3 enqueue.py --hook, again": [
                    "/usr/bin/env",
                    *commands["python3 enqueue.py --hook"],
                ],
            }
        times: dict[str, list[float]] = {name: [] for name in commands}
        # The first rounds warm the caches.
        for number in range(-3, rounds):
            for name, command in (
                list(commands.items())[:: 1 if number % 2 else -1]
                if number > -3
                else commands.items()
            ):
                began = time.perf_counter()
                subprocess.run(command, input=(PAYLOAD % number).encode(), env=env, check=True)
                if number >= 0:
                    times[name].append(time.perf_counter() - began)
        medians = {name: sorted(values)[len(values) // 2] * 1000 for name, values in times.items()}
        names = list(medians)
        for base, ours in zip(names[::2], names[1::2], strict=True):
            print(
                f"{base:34} {medians[base]:6.1f} ms\n{ours:34} {medians[ours]:6.1f} ms   {medians[ours] / medians[base]:.2f} times"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
