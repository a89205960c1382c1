#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Tasks per second of `enqueue.py --jsonl`, from its start to its end, the ids printed to a file.

bench/jsonl.py [TASKS]     default 200000; three rounds
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def main() -> int:
    number = int((sys.argv[1:] + ["200000"])[0])
    with tempfile.TemporaryDirectory() as directory:
        lines = Path(directory, "lines")
        lines.write_text("".join(f'{{"n": {n}}}\n' for n in range(number)))
        for n in range(3):
            env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state-{n}"}
            with open(lines) as tasks, open(f"{directory}/ids-{n}", "w") as ids:
                began = time.perf_counter()
                subprocess.run(
                    [sys.executable, HERE / "enqueue.py", "bench", "any", "--jsonl"],
                    stdin=tasks,
                    stdout=ids,
                    env=env,
                    check=True,
                )
                seconds = time.perf_counter() - began
            stored = sum(
                line.startswith("queued ") for line in Path(ids.name).read_text().splitlines()
            )
            print(
                f"{stored} tasks in {seconds:.2f} s: {stored / seconds:,.0f} per second", flush=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
