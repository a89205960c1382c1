#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Tasks per second of worker.py against `xargs -P N` spawning the same commands, in turn, in one
run.

    bench/throughput.py [TASKS] [CONCURRENCY] [HANDLER…]     default 3000 tasks, 4 and then 8 at a time, sh and python

The median of three rounds of each, by their ratio. xargs keeps nothing: no claim, no record, no
output, no timeout. The bar is half of its throughput for a shell that reads its task and prints,
and 0.85 of it for Python.

exit codes: 0 all ratios reach their bar; 1 one does not
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BAR = {"sh": 0.5, "python": 0.85}
HERE = Path(__file__).resolve().parent.parent
HANDLERS = {
    "true": "#!/bin/sh\n",
    "sh": "#!/bin/sh\ncat >/dev/null\necho '{}'\n",
    "bash": '#!/usr/bin/env bash\nread -r task\necho "{}"\n',
    "python": "#!/usr/bin/env python3\nimport sys\nprint(len(sys.stdin.read()))\n",
}


def one_round(
    env: dict, handler: Path, lines: str, number: int, concurrency: int
) -> tuple[float, float, float]:
    """(ratio, xargs, worker), the latter two in tasks per second."""
    subprocess.run(
        [sys.executable, HERE / "enqueue.py", "bench", handler.name, "--jsonl"],
        input=lines,
        text=True,
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    began = time.perf_counter()
    subprocess.run(["xargs", "-d", "\n", "-P", str(concurrency), "-n", "1", handler], input=lines, text=True,
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    xargs = number / (time.perf_counter() - began)
    began = time.perf_counter()
    subprocess.run([sys.executable, HERE / "worker.py", "bench", "--handlers", handler.parent, "--drain",
                    "--concurrency", str(concurrency)], env=env, check=True, stderr=subprocess.DEVNULL)  # fmt: skip
    worker = number / (time.perf_counter() - began)
    return worker / xargs, xargs, worker


def wait_for_the_disk(directory: str) -> None:
    """Until files are made quickly: ext4 without a journal is slow at that for minutes after many
    were removed.
    """
    deadline = time.monotonic() + 400
    said = False
    while time.monotonic() < deadline:
        began = time.perf_counter()
        for n in range(100):
            Path(directory, f"{time.monotonic_ns()}-{n}").touch()
        if time.perf_counter() - began < 0.005:
            return
        if not said:
            print("making a file takes more than 0.05 ms here; waiting for that to end", flush=True)
            said = True
        time.sleep(1)
    print("it did not: expect less of the worker", flush=True)


def main() -> int:
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    concurrencies = [int(sys.argv[2])] if len(sys.argv) > 2 else [4, 8]
    reached = True
    # One directory for all: ext4 without a journal is slow to make files after removals.
    with tempfile.TemporaryDirectory() as directory:
        handlers = Path(directory, "handlers")
        handlers.mkdir()
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        wait_for_the_disk(directory)
        print(f"{tasks} tasks; handler, tasks at a time; per second: xargs, worker; ratio")
        for concurrency in concurrencies:
            for name in sys.argv[3:] or BAR:
                (handlers / name).write_text(HANDLERS[name])
                (handlers / name).chmod(0o755)
                number = tasks if name != "python" else tasks // 10
                lines = "".join(f'{{"n": {n}}}\n' for n in range(number))
                rounds = [
                    one_round(env, handlers / name, lines, number, concurrency) for _ in range(3)
                ]
                ratio, xargs, worker = sorted(rounds)[1]
                reached = reached and ratio >= BAR.get(name, 0.0)
                print(
                    f"{name:10} {concurrency:3} {xargs:8.0f} {worker:8.0f} {ratio:6.2f}", flush=True
                )
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
