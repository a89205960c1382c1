#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Tasks per second of worker.py against `xargs -P N` spawning the same commands, in turn, in one run.

    bench/throughput.py [TASKS] [CONCURRENCY]     default 3000 tasks, four for each processor at a time

The median of three rounds of each, by their ratio.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
HANDLERS = {
    "true": "#!/bin/sh\n",
    "sh": "#!/bin/sh\ncat >/dev/null\necho '{}'\n",
    "bash": "#!/usr/bin/env bash\nread -r task\necho \"{}\"\n",
    "python": "#!/usr/bin/env python3\nimport sys\nprint(len(sys.stdin.read()))\n",
}


def one_round(env: dict, handler: Path, lines: str, number: int, concurrency: int) -> tuple[float, float, float]:
    """(ratio, xargs, worker), the latter two in tasks per second."""
    subprocess.run([sys.executable, HERE / "enqueue.py", "bench", handler.name, "--jsonl"], input=lines, text=True,
                   env=env, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    began = time.perf_counter()
    subprocess.run(["xargs", "-d", "\n", "-P", str(concurrency), "-n", "1", handler], input=lines, text=True,
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    xargs = number / (time.perf_counter() - began)
    began = time.perf_counter()
    subprocess.run([sys.executable, HERE / "worker.py", "bench", "--handlers", handler.parent, "--drain",
                    "--concurrency", str(concurrency)], env=env, check=True, stderr=subprocess.DEVNULL)  # fmt: skip
    worker = number / (time.perf_counter() - began)
    return worker / xargs, xargs, worker


def main() -> int:
    defaults = ["3000", str(4 * (os.cpu_count() or 1))]
    tasks, concurrency = (int(text) for text in sys.argv[1:] + defaults[len(sys.argv) - 1 :])
    print(f"{tasks} tasks, {concurrency} at a time; per second: xargs, worker, ratio")
    with tempfile.TemporaryDirectory() as directory:  # one: ext4 without a journal is slow to make files after removals
        handlers = Path(directory, "handlers")
        handlers.mkdir()
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        for name, script in HANDLERS.items():
            (handlers / name).write_text(script)
            (handlers / name).chmod(0o755)
            number = tasks if name != "python" else tasks // 10
            lines = "".join(f'{{"n": {n}}}\n' for n in range(number))
            rounds = [one_round(env, handlers / name, lines, number, concurrency) for _ in range(3)]
            ratio, xargs, worker = sorted(rounds)[1]
            print(f"{name:10} {xargs:8.0f} {worker:8.0f} {ratio:6.2f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
