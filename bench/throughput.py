#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Tasks per second of worker.py against `xargs -P N` spawning the same commands, in turn, in one run.

    bench/throughput.py [TASKS] [CONCURRENCY]     default 1000 tasks, 2 at a time
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


def main() -> int:
    tasks, concurrency = (int(text) for text in (sys.argv[1:] + ["1000", "2"][len(sys.argv) - 1 :]))
    print(f"{tasks} tasks, {concurrency} at a time; per second: xargs, worker, ratio")
    for name, script in HANDLERS.items():
        number = tasks if name != "python" else tasks // 5
        with tempfile.TemporaryDirectory() as directory:
            handlers = Path(directory, "handlers")
            handlers.mkdir()
            (handlers / name).write_text(script)
            (handlers / name).chmod(0o755)
            env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
            lines = "".join('{"n": %d}\n' % n for n in range(number))
            ratios = []
            for _ in range(3):
                subprocess.run([sys.executable, HERE / "enqueue.py", "bench", name, "--jsonl"], input=lines, text=True,
                               env=env, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
                began = time.perf_counter()
                # sh gives each its stdin, as the worker does
                subprocess.run(["xargs", "-d", "\n", "-P", str(concurrency), "-n", "1", handlers / name], input=lines,
                               text=True, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
                xargs = number / (time.perf_counter() - began)
                began = time.perf_counter()
                subprocess.run([sys.executable, HERE / "worker.py", "bench", "--handlers", handlers, "--drain",
                                "--concurrency", str(concurrency)], env=env, check=True, stderr=subprocess.DEVNULL)  # fmt: skip
                worker = number / (time.perf_counter() - began)
                ratios.append((worker / xargs, xargs, worker))
            ratio, xargs, worker = sorted(ratios)[1]
            print(f"{name:8} {xargs:8.0f} {worker:8.0f} {ratio:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
