#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["persist-queue>=1.1,<2", "watchdog>=4,<8", "rich>=13,<16"]
# ///
"""Use every feature at once, kill and stop everything, fill the disk; then prove that no task was
lost, doubled, or run out of its turn.

    bench/soak.py [SECONDS] [--seed N] [--workers N] [--no-disk] [--keep]     default 60 s, 3 workers

Tasks come from Python, bash, hooks, JSON lines and the command (soak_doors.py). SIGKILL and SIGSTOP
hit workers, supervisors, handlers, producers and every command, also cleanup and backup. The state
lies on a disk of 64 MB that is filled to its last byte and emptied, again and again; that takes root.
At the end the soak waits until all is done, for as long as anything goes on.

The proof (soak_proof.py) uses what producers were told, what handlers wrote down when they began and
ended, and the history, read with plain SQL.

exit codes: 0 clean; 1 a promise was broken: it is named; --keep leaves the directory to look at
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import soak_doors
import soak_proof
from soak_players import DISK_MB, MAX_ATTEMPTS, QUEUES, SLOTS, name_of

ROOT = Path(__file__).resolve().parent.parent
PLAYERS = Path(__file__).with_name("soak_players.py")
# Nothing has gone on for so long: the rest is stuck.
STUCK_SECONDS = 120.0
HISTORY = """
select id, queue, row_id, status, attempts, error, enqueued_at, started_at, data from task_history"""


class Run(NamedTuple):
    """A handler's run; without an end, `end` is when it was last seen alive, and `code` None."""

    name: str
    queue: str
    attempt: int
    pid: int
    started: str
    supervisor: int
    begin: int
    end: int
    code: int | None


class Ended(NamedTuple):
    """A row of the history."""

    name: str
    id: int
    queue: str
    row: int
    status: str
    attempts: int
    error: str
    enqueued_at: str
    started_at: str


class Soak:
    """The state, its processes, and what they said."""

    def __init__(self, root: Path, seed: int, seconds: float, disk: bool) -> None:
        self.root, self.seed, self.seconds, self.has_disk = root, seed, seconds, disk
        self.disk, self.state = root / "disk", root / "disk" / "state"
        self.db, self.ledger, self.workspace = (
            self.state / "tasks.db",
            root / "ledger",
            root / "home" / "workspace",
        )
        self.workers = 3
        self.mark = f"SOAK={root}"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(root / "home"),
            "SOAK": str(root),
            "TASK_QUEUE_STATE": str(self.state),
        }
        # Set at the end of the storm, and when all is done.
        self.calm, self.over = threading.Event(), threading.Event()
        self.counts: Counter[str] = Counter()
        self.named: Counter[str] = Counter()
        # What is wrong, found on the way: (rule, words). How often a rule was looked at.
        self.broken: list[tuple[str, str]] = []
        self.checked: Counter[str] = Counter()
        # By name: when it was tried, when accepted; by name: what its proof needs.
        self.tried: dict[str, int] = {}
        self.accepted: dict[str, int] = {}
        self.refused: set[str] = set()
        self.facts: dict[str, dict] = defaultdict(dict)
        self.batches: list[list[str]] = []
        self.open: dict[tuple, list] = {}
        self.runs: list[Run] = []
        self.alive: dict[tuple[int, str], int] = {}
        self.took: set[str] = set()
        # Killed handlers (pid, start), killed supervisors, those of killed workers, and when the disk was full.
        self.killed: set[tuple[int, str]] = set()
        self.blind: dict[int, int] = {}
        self.orphaned: set[int] = set()
        self.full: list[tuple[int, int]] = []
        self.history: dict[tuple, Ended] = {}
        self.reading, self.rest = threading.Lock(), ""
        self.ledger.touch()
        self.unread = open(self.ledger)

    # ------------------------------------------------------------------------- tools for all parts

    def run(self, command: list, text: str = "", **options) -> subprocess.CompletedProcess:
        """Run a command in the soak's world; it may be killed or stopped."""
        return subprocess.run(
            [str(word) for word in command],
            input=text,
            text=True,
            errors="replace",
            capture_output=True,
            **{"env": self.env, "cwd": self.root} | options,
        )

    def script(self, *words, **options) -> subprocess.CompletedProcess:
        """Run one of the product's scripts."""
        return self.run([sys.executable, ROOT / words[0], *words[1:]], **options)

    def rows(self, statement: str, *values, db: Path | None = None) -> list[tuple]:
        """Ask the database, with nothing of the product. A full disk may refuse for a while."""
        patience = time.monotonic() + 60
        while True:
            try:
                conn = sqlite3.connect(f"file:{db or self.db}?mode=ro", uri=True, timeout=30)
                try:
                    return conn.execute(statement, values).fetchall()
                finally:
                    conn.close()
            except sqlite3.OperationalError:
                if time.monotonic() > patience:
                    raise
                time.sleep(0.1)

    def collect(self) -> None:
        """Copy what the history has, before cleanup prunes it."""
        for number, queue, row, status, attempts, error, enqueued, started, data in self.rows(
            HISTORY
        ):
            ended = Ended(
                name_of(data), number, queue, row, status, attempts, error or "", enqueued, started
            )
            self.history[number, queue, row] = ended

    def break_rule(self, rule: str, words: str) -> None:
        self.broken.append((rule, words))

    def read_ledger(self) -> None:
        """Take in what handlers, producers and the consumer wrote since the last look."""
        with self.reading:
            # A write may be seen in two parts.
            *lines, self.rest = (self.rest + self.unread.read()).split("\n")
            for what, when, name, *facts in map(json.loads, lines):
                if what == "begin":
                    self.open[name, facts[2], facts[3]] = [when, facts]
                elif what == "end":
                    begin, facts = self.open.pop((name, facts[2], facts[3]))[0], facts
                    self.runs.append(Run(name, *facts[:-1], begin, when, facts[-1]))
                elif what == "took":
                    self.took.add(name)
                elif what == "try":
                    self.tried |= dict.fromkeys(name, when)
                    self.batches.append(name)
                elif what == "ok":
                    self.accepted |= dict.fromkeys(name, when)
                else:
                    self.refused |= set(name)

    def watch(self) -> None:
        """Note until when runs without an end were alive."""
        while not self.over.wait(0.05):
            self.read_ledger()
            for _, facts in list(self.open.values()):
                key, now = (facts[2], facts[3]), time.monotonic_ns()
                if is_alive(*key):
                    self.alive[key] = now

    def unended(self) -> list[Run]:
        return [
            Run(name, *facts, begin, self.alive.get((facts[2], facts[3]), begin), None)
            for (name, *_), (begin, facts) in self.open.items()
        ]

    # -------------------------------------------------------------------------------- the players

    def commands(self) -> dict[str, list]:
        """Return the processes that are always there, by name."""
        python = [sys.executable, PLAYERS]
        worker = [sys.executable, ROOT / "worker.py", *QUEUES, "--handlers", self.root / "handlers"]
        options = f"--then results --chain --max-attempts {MAX_ATTEMPTS} --backoff 0.05 --timeout 3"
        worker += [*options.split(), "--kill-after", "1", "--grace", "1", "--concurrency"]
        return (
            {f"worker {n}": [*worker, str(2 + 2 * n)] for n in range(self.workers)}
            | {f"producer {n}": [*python, "produce", self.ledger, f"py{n}", ROOT] for n in range(2)}
            | {"consumer": [*python, "consume", self.ledger, "consumer", ROOT]}
        )

    def keep_up(self, players: dict[str, subprocess.Popen]) -> None:
        """Start the players that are not there, and note those that ended by themselves."""
        for name, command in self.commands().items():
            player = players.get(name)
            if player and player.poll() is None or self.calm.is_set() and "producer" in name:
                continue
            if player and player.returncode > 0:
                self.counts[f"{name.split()[0]}s that ended with {player.returncode}"] += 1
            self.counts[name.split()[0] + " starts"] += 1
            if "producer" in name:  # each life has names of its own
                command[4] += f".{self.counts['producer starts']}"
            with open(self.root / f"{name.replace(' ', '-')}.log", "ab") as log:
                players[name] = subprocess.Popen(
                    command, env=self.env, cwd=self.root, stdin=subprocess.DEVNULL, stderr=log
                )

    # --------------------------------------------------------------------------------- the killer

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes of this soak but this one."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                    found[int(pid)] = line.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                pass
        return found

    def send(self, pid: int, number: int) -> bool:
        """Signal a process, if the number still is this soak's."""
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if self.mark.encode() not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return False
            signal.pidfd_send_signal(handle, number)
            return True
        except OSError:
            return False
        finally:
            os.close(handle)

    def hit(self, dice: random.Random) -> None:
        """Kill or stop one process, of a kind by chance."""
        by_kind = defaultdict(list)
        for pid, line in self.processes().items():
            by_kind[kind_of(line)].append(pid)
        kinds = [kind for kind in WEIGHTS if by_kind[kind]]
        if not kinds:
            return
        kind = dice.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        pid, roll = dice.choice(by_kind[kind]), dice.random()
        if kind == "workers" and roll < 0.15:
            self.counts["SIGTERM of workers"] += self.send(pid, signal.SIGTERM)
        elif roll < 0.4:
            if self.send(pid, signal.SIGSTOP):
                self.counts[f"SIGSTOP of {kind}"] += 1
                time.sleep(dice.uniform(0, 1))
                if dice.random() < 0.3:
                    self.kill(kind, pid)
                self.send(pid, signal.SIGCONT)
        else:
            self.kill(kind, pid)

    def kill(self, kind: str, pid: int) -> None:
        if kind == "supervisors":
            self.blind[pid] = time.monotonic_ns()
        if kind == "handlers":
            self.killed |= {(pid, started) for started in stat_of(pid)[19:20]}
        if kind == "workers":
            self.orphaned |= {one for one in self.processes() if stat_of(one)[1:2] == [str(pid)]}
        self.counts[f"SIGKILL of {kind}"] += self.send(pid, signal.SIGKILL)

    def fill_disk(self, dice: random.Random) -> None:
        """Fill the disk to its last byte, and empty it after a while."""
        begin, filler = time.monotonic_ns(), self.disk / "filler"
        until = time.monotonic() + dice.uniform(0.3, 2)
        with open(filler, "wb", buffering=0) as file:
            while time.monotonic() < until:
                for size in (2**20, 4096, 1):
                    try:
                        while file.write(b"x" * size) == size:
                            pass
                    except OSError:
                        pass
                time.sleep(0.05)
        filler.unlink()
        self.full.append((begin, time.monotonic_ns()))

    # --------------------------------------------------------------------------------- the course

    def prepare(self) -> None:
        for directory in (self.root / "handlers", self.workspace, self.disk):
            directory.mkdir(parents=True)
        if self.has_disk:
            size = f"size={DISK_MB}m,mode=700"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "soak", self.disk], check=True)
        self.state.mkdir(mode=0o700)
        handler = self.root / "handlers" / "work"
        handler.write_text(
            f"#!/bin/sh\nexec '{sys.executable}' -IS '{PLAYERS}' handle '{self.ledger}'\n"
        )
        handler.chmod(0o755)
        for queue in (*QUEUES, "results"):
            name = f"first-{queue}{'>' if queue == 'results' else ''}"
            assert soak_doors.add(self, name, queue)
        every = ["tick", "--every", "1s", "ticks", "work", '{"name": "tick"}']
        for words in (["limit", "narrow", "--slots", SLOTS], ["every", *every]):
            self.script("tasks.py", *words).check_returncode()
        [(next_at,)] = self.rows("select next_at from task_every")
        self.facts["tick"]["beat"] = next_at

    def go(self) -> bool:
        self.prepare()
        players: dict[str, subprocess.Popen] = {}
        threads = [threading.Thread(target=self.watch)]
        storm = [(self.hit, 0.25), *soak_doors.PRODUCERS, *[(self.fill_disk, 4)] * self.has_disk]
        for part, pause in storm:
            threads.append(self.repeat(part, pause, self.calm))
        for part, pause in soak_doors.KEEPERS:
            threads.append(self.repeat(part, pause, self.over))
        for thread in threads:
            thread.start()
        try:
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                self.keep_up(players)
                time.sleep(0.1)
            self.calm.set()
            self.script("tasks.py", "every", "tick", "--remove").check_returncode()
            for name, player in players.items():
                if "producer" in name:
                    player.kill()
            done = self.drain(players)
        finally:
            self.calm.set()
            self.over.set()
            for thread in threads:
                thread.join()
            self.end(players)
        self.read_ledger()
        self.collect()
        soak_doors.final_checks(self)
        return soak_proof.report(self) and done

    def repeat(self, part: Callable, pause: float, stop: threading.Event) -> threading.Thread:
        """Return a thread that does a part again and again."""
        name = getattr(part, "__name__", "part")
        dice = random.Random(f"{self.seed} {name}")

        def loop() -> None:
            while not stop.wait(dice.uniform(0.5, 1.5) * pause):
                try:
                    part(dice) if hasattr(part, "__self__") else part(self, dice)
                except Exception as error:
                    self.break_rule("the soak itself", f"{name}: {error!r}")
                    raise

        return threading.Thread(target=loop, name=name)

    def left(self) -> list[tuple]:
        """Return the rows that have not ended, and the files of the spool."""
        columns = "task_id, status, attempts, due_at, owner, error"
        return [
            (queue, *row)
            for queue in (*QUEUES, "results")
            for row in self.rows(f"select {columns} from {queue}")
        ] + [("spool", str(file)) for file in self.state.glob("spool/*/[!.]*") if file.is_file()]

    def drain(self, players: dict[str, subprocess.Popen]) -> bool:
        """Wait until all is done, for as long as anything goes on."""
        seen, patience = None, 0.0
        while left := self.left():
            self.keep_up(players)
            self.read_ledger()
            now = (sorted(map(str, left)), len(self.runs), len(self.took))
            if now != seen:
                seen, patience = now, time.monotonic() + STUCK_SECONDS
            elif time.monotonic() > patience:
                for row in left[:20]:
                    self.break_rule("all is done at the end", str(row))
                return False
            time.sleep(0.3)
        return True

    def end(self, players: dict[str, subprocess.Popen]) -> None:
        for player in players.values():
            player.send_signal(signal.SIGTERM)
        for name, player in players.items():
            code = player.wait()
            if "worker" in name and code:
                self.break_rule("a worker stops with 0", f"{name}: {code}")
        for log in self.root.glob("worker-*.log"):
            if "Traceback" in log.read_text(errors="replace"):
                self.break_rule("no worker has a traceback", str(log))


# Which kind is hit how often.
WEIGHTS = {"workers": 5, "supervisors": 1, "handlers": 3, "producers": 2, "commands": 5}


def kind_of(line: str) -> str:
    for kind, words in (
        ("supervisors", "taskqueue.supervisor"),
        ("workers", "/worker.py "),
        ("handlers", " handle "),
        ("producers", "soak_players.py"),
    ):
        if words in line:
            return kind
    return "handlers" if "handlers/work" in line else "commands"


def stat_of(pid: int) -> list[str]:
    """Return what /proc says of a process, from its state on; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def is_alive(pid: int, started: str) -> bool:
    fields = stat_of(pid)
    return bool(fields) and fields[19] == started and fields[0] not in "ZX"


def may_mount() -> bool:
    return os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seconds", metavar="SECONDS", nargs="?", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--no-disk", action="store_true", help="do not mount and fill a small disk")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    if not args.no_disk and "SOAK_MOUNTS" not in os.environ and may_mount():
        # The disk is mounted for this soak alone, and goes with it.
        command = ["unshare", "-m", sys.executable, *sys.argv, "--seed", str(args.seed)]
        os.execvpe("unshare", command, os.environ | {"SOAK_MOUNTS": "1"})
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(root, args.seed, args.seconds, "SOAK_MOUNTS" in os.environ)
    soak.workers = args.workers
    print(f"{args.seconds:g} s, seed {args.seed}, in {root}", flush=True)
    clean = soak.go()
    if soak.has_disk and not args.keep:
        subprocess.run(["umount", "-l", soak.disk], check=True)
    if not args.keep:
        shutil.rmtree(root)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
