"""Fifty processes that enqueue at once, and write down what they were told.

They are forks of a process of its own that has no threads, so that they start within milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 50


class Crowd:
    """Fifty processes; each enqueues the task with an id, for so many rounds.

    Each writes a line `new N` or `old N` to `log`, where N is its task's data["n"] and tells who
    wrote it in which round. The file's order is that of the commits. With `task_id="x{}"` each
    round has an id of its own.
    """

    def __init__(self, installation, how: str, rounds: int, task_id: str = "one") -> None:
        self.log = installation.directory / "log"
        command = [sys.executable, __file__, installation.state, self.log, how, rounds, task_id]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([*map(str, command)], env=installation.env, **pipes)
        installation.processes.append(self.process)
        assert self.process.stdout.read(PROCESSES) == b"r" * PROCESSES

    def start(self, rounds: int = 1) -> None:
        """Have each enqueue so many times, beginning at the same moment."""
        self.process.stdin.write(b"g" * rounds)
        self.process.stdin.flush()

    def wait(self, rounds: int = 1) -> None:
        """Wait until each has enqueued so many times."""
        assert self.process.stdout.read(PROCESSES * rounds) == b"d" * PROCESSES * rounds

    def told(self) -> list[list[str]]:
        """[["new" or "old", N], …], in the order of the commits."""
        return [line.split() for line in self.log.read_text().splitlines()]


def enqueue(q, go: int, state: str, log: str, how: str, rounds: str, task_id: str) -> None:
    """Do what each of them does."""
    conn = q.connect(Path(state), busy_timeout_ms=120_000)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(1, b"r")
    for number in range(int(rounds)):
        n = f"{number}-{os.getpid()}"
        row = q.new_row("t", {"n": n}, task_id.format(number), on_duplicate=how)
        assert os.read(go, 1)
        with q.transaction(conn, durable=False):
            is_new = q.insert(conn, "notifications", row)
            os.write(fd, f"{'new' if is_new else 'old'} {n}\n".encode())
        os.write(1, b"d")


def main(*args: str) -> None:
    """Start them, and pass on each byte of stdin to all."""
    sys.path.insert(0, str(ROOT))
    import queue_helpers as q

    ways = []
    for _ in range(PROCESSES):
        go, tell = os.pipe()
        if not os.fork():
            os.close(0)
            os.close(tell)
            enqueue(q, go, *args)
            os._exit(0)
        os.close(go)
        ways.append(tell)
    while byte := os.read(0, 1):
        for tell in ways:
            os.write(tell, byte)


if __name__ == "__main__":
    main(*sys.argv[1:])
