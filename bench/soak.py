#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Workers, enqueuers in Python and in bash, and a killer; then the proof that no task was lost and
none ran twice at once.

    bench/soak.py [SECONDS] [--seed N] [--workers N] [--keep]     default 60 seconds, 3 workers

The killer sends SIGKILL to workers and now and then to handlers and their supervisors, and stops
workers for a while; whoever dies is replaced. The proof is taken from what the handlers themselves
wrote: a line when they begin and one when they end, each one write, with the machine's monotonic
time. A run without an end lasted until it was last seen alive.

exit codes: 0 clean; 1 something was lost, ran twice at once, or was done twice; --keep leaves the
directory to look at
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
QUEUES = ("soak", "shell")
MAX_ATTEMPTS = 6
# A handler may have a supervisor to lose so long before its first words and after its last ones.
BLIND_NS = 200_000_000

# At times it fails, says "not now" or "never", or hangs until the worker's timeout ends it.
HANDLER = """#!/bin/sh
exec {python} -IS {script}
"""
SCRIPT = """
import json, os, random, sys, time
def note(*words):
    os.write(log, (" ".join(map(str, words)) + "\\n").encode())
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
task, attempt = os.environ["TASK_ID"], os.environ["TASK_ATTEMPT"]
started = open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19]
note("begin", task, attempt, os.getpid(), time.monotonic_ns(), started)
n = json.load(sys.stdin)["data"]["n"]
time.sleep(random.choice((0, 0, 0.01, 0.05, 0.2)))
code = 65 if n % 37 == 0 else random.choice((0, 0, 0, 0, 0, 0, 1, 75))
if random.random() < 0.01:
    time.sleep(8)  # longer than its timeout
print(json.dumps({{"n": n, "retry_after": 0.01}}), flush=True)
note("end", task, attempt, os.getpid(), time.monotonic_ns(), code)
os._exit(code)
"""

TABLES = """
import sys
sys.path.insert(0, sys.argv[1])
import queue_helpers as q
for queue in sys.argv[2:]:
    q.ensure_queue(q.connect(), queue)
"""

ENQUEUER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import queue_helpers as q
me, n = sys.argv[2], 0
while True:
    n += 1
    try:
        task = q.enqueue_task("soak", "work", {"n": n}, f"{me}-{n}")
    except q.QueueBusy:
        continue
    os.write(1, f"{task}\\n".encode())
    time.sleep(0.08)
"""

SHELL_ENQUEUER = """
n=0
while :; do
    n=$((n + 1))
    id=$1-$n
    task="{\\"task_id\\": \\"$id\\", \\"task_type\\": \\"work\\", \\"data\\": {\\"n\\": $n}}"
    sqlite3 -cmd '.timeout 10000' "$2" "insert into shell (data) values ('$task')" &&
        echo "$id"
    sleep 0.15
done
"""


class Soak:
    def __init__(self, root: Path, seed: int, workers: int) -> None:
        self.root, self.dice, self.wanted = root, random.Random(seed), workers
        self.env = os.environ | {"TASK_QUEUE_STATE": str(root / "state"), "HOME": str(root)}
        self.env.pop("TASK_DEPTH", None)
        self.db, self.log, self.accepted = (
            root / "state" / "tasks.db",
            root / "runs",
            root / "accepted",
        )
        (root / "handlers").mkdir()
        (root / "work.py").write_text(SCRIPT.format(log=str(self.log)))
        python, script = (shlex.quote(str(path)) for path in (sys.executable, root / "work.py"))
        (root / "handlers" / "work").write_text(HANDLER.format(python=python, script=script))
        (root / "handlers" / "work").chmod(0o755)
        self.log.touch()
        self.workers: list[subprocess.Popen] = []
        self.counts: Counter = Counter()
        # Of (pid, when it started): the runs whose handler or group we killed.
        self.killed: dict[tuple[str, int], bool] = {}
        # When a supervisor was killed. How its runs end is not known, and they are run again.
        self.blind: list[int] = []
        # Of (pid, when it started): when it was last seen running.
        self.alive: dict[tuple[str, str], int] = {}
        self.unread, self.rest, self.begun, self.reading = open(self.log), "", {}, threading.Lock()
        self.over = threading.Event()

    # ---------------------------------------------------------------------------------------------------- the players

    def start_worker(self) -> None:
        number = self.counts["workers started"]
        with open(self.root / f"worker-{number}.log", "wb") as log:
            self.workers.append(subprocess.Popen(
                [sys.executable, HERE / "worker.py", *QUEUES, "--handlers", self.root / "handlers", "--then", "results",
                 "--concurrency", str(self.dice.choice((1, 2, 4))), "--max-attempts", str(MAX_ATTEMPTS), "--backoff", "0.05",
                 "--timeout", "3", "--kill-after", "1", "--grace", "1"],
                env=self.env, stdin=subprocess.DEVNULL, stderr=log))  # fmt: skip
        self.counts["workers started"] += 1

    def start_enqueuers(self) -> list[subprocess.Popen]:
        accepted = os.open(
            self.accepted, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        python = [[sys.executable, "-c", ENQUEUER, HERE, f"python{n}"] for n in range(2)]
        shell = [["bash", "-c", SHELL_ENQUEUER, "bash", f"bash{n}", self.db] for n in range(2)]
        try:
            return [
                subprocess.Popen(command, env=self.env, stdout=accepted)
                for command in python + shell
            ]
        finally:
            os.close(accepted)

    def kill_something(self) -> None:
        roll, worker = self.dice.random(), self.dice.choice(self.workers)
        if roll < 0.55:
            worker.kill()
            worker.wait()
            self.workers.remove(worker)
            self.counts["workers killed"] += 1
        elif roll < 0.65:
            worker.send_signal(signal.SIGTERM)
            self.counts["workers stopped by SIGTERM"] += 1
        elif roll < 0.8:
            worker.send_signal(signal.SIGSTOP)
            time.sleep(self.dice.uniform(0, 0.5))
            # It is killed while it is stopped.
            if self.dice.random() < 0.3:
                worker.kill()
                worker.wait()
                self.workers.remove(worker)
                self.counts["workers killed"] += 1
            else:
                worker.send_signal(signal.SIGCONT)
            self.counts["workers stopped by SIGSTOP"] += 1
        else:
            self.kill_handler()
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < self.wanted:
            self.start_worker()

    def kill_handler(self) -> None:
        running = [run for run in self.open_runs() if state_of(*run)]
        if running:
            pid, started = self.dice.choice(running)
            try:
                if self.dice.random() < 0.3:
                    parent = stat_of(pid)[1]
                    if (
                        state_of(pid, started)
                        and "worker.py" in Path(f"/proc/{parent}/cmdline").read_text()
                    ):
                        self.blind.append(time.monotonic_ns())
                        os.kill(int(parent), signal.SIGKILL)
                        self.counts["supervisors killed"] += 1
                    return
                self.killed[pid, started] = True
                if self.dice.random() < 0.5:
                    os.kill(int(pid), signal.SIGKILL)
                else:
                    # Its children are killed with it.
                    os.killpg(os.getpgid(int(pid)), signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError):
                return
            self.counts["handlers killed"] += 1

    def open_runs(self) -> list[tuple[str, str]]:
        """(pid, when it started) of the runs that have written no end."""
        with self.reading:
            # A write may be seen in two parts.
            *lines, self.rest = (self.rest + self.unread.read()).split("\n")
            for line in lines:
                what, task, attempt, pid, _, last = line.split()
                if what == "begin":
                    self.begun[pid, task, attempt] = (pid, last)
                else:
                    self.begun.pop((pid, task, attempt))
            return list(self.begun.values())

    def watch(self) -> None:
        """Note until when the runs without an end were alive."""
        while not self.over.wait(0.05):
            for run in self.open_runs():
                now = time.monotonic_ns()
                if state_of(*run):
                    self.alive[run] = now

    # ------------------------------------------------------------------------------------------------------ the course

    def run(self, seconds: float) -> bool:
        subprocess.run(
            [sys.executable, "-c", TABLES, HERE, *QUEUES, "results"], env=self.env, check=True
        )
        watcher = threading.Thread(target=self.watch)
        watcher.start()
        enqueuers = self.start_enqueuers()
        try:
            for _ in range(self.wanted):
                self.start_worker()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(self.dice.uniform(0.02, 0.4))
                self.kill_something()
        finally:
            for process in enqueuers:
                process.terminate()
                process.wait()
        try:
            drained = self.drain()
        finally:
            for process in self.workers:
                process.kill()
                process.wait()
            self.over.set()
            watcher.join()
        return self.report() and drained

    def drain(self) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not sum(len(self.rows(f"select 1 from {queue}")) for queue in QUEUES):
                for worker in self.workers:
                    worker.send_signal(signal.SIGTERM)
                return all(worker.wait(10) == 0 for worker in self.workers)
            time.sleep(0.1)
        for queue in QUEUES:
            for row in self.rows(
                f"select id, task_id, status, attempts, owner, due_at, error from {queue}"
            ):
                print(f"LEFT in {queue}:", *row)
        return False

    def rows(self, statement: str) -> list[tuple]:
        conn = sqlite3.connect(self.db, timeout=10)
        try:
            return conn.execute(statement).fetchall()
        finally:
            conn.close()

    # ------------------------------------------------------------------------------------------------------- the proof

    def report(self) -> bool:
        runs, overlaps, twice = self.runs(), [], []
        for task, spans in runs.items():
            spans.sort()
            for (_, end, _, _), (begin, _, _, _) in zip(spans, spans[1:], strict=False):
                if begin < end:
                    overlaps.append((task, (end - begin) / 1e6))
            well = [killed for _, _, code, killed in spans if code == 0]
            # None of them was killed on its last few steps.
            if len(well) > 1 and not any(well[:-1]):
                twice.append(task)
        accepted = self.accepted.read_text().split()
        history = self.rows(
            f"select task_id, status, attempts, error from task_history where queue in {QUEUES}"
        )
        finished = Counter(task for task, *_ in history)
        done = {task for task, status, *_ in history if status == "completed"}
        dead = [
            (task, attempts, error)
            for task, status, attempts, error in history
            if status == "failed"
        ]
        next_ones = Counter(
            task.rsplit(".", 1)[0] for (task,) in self.rows("select task_id from results")
        )
        violations = {
            "accepted, but neither done nor dead": [task for task in accepted if not finished[task]],
            "finished more than once": [task for task, times in finished.items() if times > 1],
            "two runs at once (ms)": overlaps,
            "done, and run again": twice,
            "recorded as done without a run that ended well": [task for task in done if not any(r[2] == 0 for r in runs[task])],
            "dead before its attempts were spent": [
                dead_one for dead_one in dead if dead_one[1] < MAX_ATTEMPTS and "exit 65" not in (dead_one[2] or "")],
            "done, without its next task, or with two": [task for task in done if next_ones[task] != 1] + [
                task for task in next_ones if task not in done],
            "tracebacks of workers": [
                log.name for log in self.root.glob("worker-*.log") if "Traceback" in log.read_text(errors="replace")],
            "damage in the database": [row for row in self.rows("pragma integrity_check") if row != ("ok",)],
        }  # fmt: skip
        died = Counter(
            "of dead workers" if "its worker died" in (error or "") else "of their own"
            for _, _, error in dead
        )
        attempts = sum(attempts for _, _, attempts, _ in history)
        print(f"tasks in {len(accepted)}, done {len(done)}, dead {len(dead)} ({dict(died)})")
        print(f"runs {sum(map(len, runs.values()))}, counted attempts {attempts}")
        print(", ".join(f"{name} {count}" for name, count in self.counts.items()))
        orphans = sum(
            log.read_text(errors="replace").count("ended without its worker")
            for log in self.root.glob("worker-*.log")
        )
        print(f"orphans that ended well and were recorded so: {orphans}")
        for what, found in violations.items():
            print(f"{what}: {len(found)}" + (f" {found[:5]}" if found else ""))
        return not any(violations.values())

    def runs(self) -> dict[str, list[tuple]]:
        """{task: [(begin, end, exit code or None, whether its handler was killed), …]}"""
        found, begun = defaultdict(list), {}
        for line in self.log.read_text().split("\n")[:-1]:
            what, task, attempt, pid, when, last = line.split()
            if what == "begin":
                begun[pid, task, attempt] = (int(when), last)
            else:
                begin, started = begun.pop((pid, task, attempt))
                blind = any(
                    begin - BLIND_NS < moment < int(when) + BLIND_NS for moment in self.blind
                )
                found[task].append(
                    (begin, int(when), int(last), blind or (pid, started) in self.killed)
                )
        for (pid, task, _), (begin, started) in begun.items():
            found[task].append((begin, self.alive.get((pid, started), begin), None, True))
        return found


def stat_of(pid: str) -> list[str]:
    """What /proc says of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def state_of(pid: str, started: str) -> str | None:
    """The process's state letter, None when it is gone, dead, or another one that got its pid."""
    try:
        fields = stat_of(pid)
    except OSError:
        return None
    return fields[0] if fields[19] == started and fields[0] not in "ZX" else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", metavar="SECONDS", nargs="?", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{args.seconds:g} s, seed {args.seed}, {args.workers} workers, in {root}", flush=True)
    clean = Soak(root, args.seed, args.workers).run(args.seconds)
    print("clean" if clean else "NOT CLEAN")
    if not args.keep:
        shutil.rmtree(root)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
