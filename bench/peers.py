#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["persist-queue>=1.1,<2", "watchdog>=4,<8", "huey>=3,<4", "litequeue>=0.9,<1"]
# ///
"""Measure what a call and a wake cost: ours, raw SQLite, persist-queue, huey and litequeue, in one run.

    bench/peers.py [--rounds 7] [--quick] [--json]

put: one task with a hook's payload of some 350 bytes, in a loop. Ours is enqueue_task. Raw is
Python's sqlite3 with an autocommit INSERT of the same text, encoded beforehand, into (id integer
primary key autoincrement, data text not null): nothing but SQLite. The peers use their own call
(persist-queue: SQLiteAckQueue with JSON; huey: a task of SqliteHuey; litequeue: put of JSON text).

get+ack: one task taken and finished, from a queue of some hundreds. Ours is get and ack of
get_ack_queue. Raw is UPDATE … RETURNING, then an INSERT into a history and a DELETE in one
transaction. huey deletes a task as it hands it out, so it does less: there is no ack, and a task is
lost with its process. Peers' finished tasks are removed between the rounds.

All databases are in WAL with synchronous=FULL, forced upon whoever has it otherwise. Ours syncs a
put and an ack, but not a claim: after a power cut the task is merely ready again. The line "raw,
claim unsynced" shows what that alone is worth.

wake: a sleeping consumer process, and a producer process with 20 tasks a second. The time is from
the return of the producer's call (enqueue_task; for the bare watchdog a pwrite to the one file that
it watches) to the first line of the consumer's code. The processor time is all that the consumer's
process uses for a task: in ours that includes get and ack. The line "bare, raw get+ack" shows what
watchdog and raw SQLite's get and ack need for that alone.

The processor's microseconds of a call are shown beside its whole time, which is mostly the disk's.
Contestants take turns within a round. The table shows medians over the rounds, and the median of
the ratios within them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PAYLOAD = {
    "session_id": "3f0c1d52-8a44-4b0e-9a3e-5d1f0a7c2b19",
    "transcript_path": "/home/user/.claude/projects/docs/3f0c1d52.jsonl",
    "cwd": "/home/user/projects/docs",
    "hook_event_name": "PostToolUse",
    "tool_name": "Write",
    "tool_input": {
        "file_path": "/home/user/projects/docs/guide/installation.md",
        "content": "See the guide.",
    },
}
# So many of a waking consumer's tasks come before those that count.
WARM_UP = 5
# A process that says nothing for so long has gone wrong, and is ended.
ANSWER_SECONDS = 300

# ----------------------------------------------------------------------------- calls: put, get, ack


class Contestant:
    """A queue that does the steps of a row; those without a call for many tasks put one by one."""

    def put(self, number: int) -> None:
        raise NotImplementedError

    def take(self, number: int) -> None:
        raise NotImplementedError

    def batch(self, number: int) -> None:
        self.put(number)

    def grow(self, rows: int) -> None:
        """Have a queue of one task hold so many, by SQL on its file."""
        raise NotImplementedError

    def fill(self, number: int) -> None:
        """Put tasks where take() finds them; put() has done so for most."""

    def tidy(self) -> None:
        """Remove what was taken."""


def double(conn: sqlite3.Connection, copy: str, rows: int) -> None:
    """Copy a table's rows, which the statement does, until there are so many."""
    many = 1
    conn.execute("pragma busy_timeout = 60000")
    while many < rows:
        conn.execute(f"{copy} limit ?", (min(many, rows - many),))
        conn.commit()
        many = min(rows, 2 * many)


class Ours(Contestant):
    """enqueue_task, and get_ack_queue."""

    def __init__(self, directory: str) -> None:
        self.q = ours(directory)
        self.queue = self.q.get_ack_queue("bench")

    def put(self, number: int) -> None:
        for _ in range(number):
            self.q.enqueue_task("bench", "link_validation", PAYLOAD)

    def take(self, number: int) -> None:
        for _ in range(number):
            row_id, _ = self.queue.get(block=False)
            self.queue.ack(id=row_id)

    def batch(self, number: int) -> None:
        rows = [{"task_type": "link_validation", "data": PAYLOAD} for _ in range(number)]
        self.q.enqueue_tasks("bench", rows)

    def grow(self, rows: int) -> None:
        self.put(1)
        with self.q.transaction(self.q.connect()) as conn:
            conn.execute(
                f"""with recursive n (i) as (select 2 union all select i + 1 from n where i < {rows})
                    insert into bench (data)
                    select json_set(data, '$.task_id', 't' || i) from bench, n where id = 1"""
            )


class Raw(Contestant):
    """The statements alone."""

    claims_are_synced = True

    def __init__(self, directory: str) -> None:
        conn = self.conn = sqlite3.connect(
            f"{directory}/raw.db", isolation_level=None, check_same_thread=False
        )
        conn.execute("pragma journal_mode = wal")
        conn.execute("pragma synchronous = full")
        conn.execute(
            "create table if not exists queued (id integer primary key autoincrement, data text not null)"
        )
        conn.execute("""create table if not exists claimable (id integer primary key autoincrement,
                        data text not null, status integer not null default 1, claimed_at real)""")
        conn.execute(
            """create table if not exists history (id integer primary key, row_id integer, data text,
                        completed_at real)"""
        )
        envelope = {"task_id": "0123456789abcdef", "task_type": "link_validation"}
        self.text = json.dumps(
            {**envelope, "enqueued_at": "2001-01-01 00:00:00.000", "data": PAYLOAD}
        )

    def put(self, number: int) -> None:
        execute, text = self.conn.execute, self.text
        for _ in range(number):
            execute("insert into queued (data) values (?)", (text,))

    def batch(self, number: int) -> None:
        self.conn.execute("begin")
        self.put(number)
        self.conn.execute("commit")

    def grow(self, rows: int) -> None:
        self.conn.execute("create index claimable_status on claimable (status, id)")
        self.fill(rows)

    def take(self, number: int) -> None:
        # Its tasks are put where a claim can mark them; that is not measured.
        for _ in range(number):
            self.ack(*self.get())

    def get(self) -> tuple | None:
        """(row id, text) of the next task; None when there is none."""
        conn = self.conn
        if not self.claims_are_synced:
            conn.execute("pragma synchronous = normal")
        rows = conn.execute(
            """update claimable set status = 2, claimed_at = ?
               where id = (select id from claimable where status = 1 order by id limit 1)
               returning id, data""",
            (time.time(),),
        ).fetchall()
        if not self.claims_are_synced:
            conn.execute("pragma synchronous = full")
        return rows[0] if rows else None

    def ack(self, row_id: int, text: str) -> None:
        conn = self.conn
        conn.execute("begin immediate")
        conn.execute(
            "insert into history (row_id, data, completed_at) values (?, ?, ?)",
            (row_id, text, time.time()),
        )
        conn.execute("delete from claimable where id = ?", (row_id,))
        conn.execute("commit")

    def fill(self, number: int, text: str | None = None) -> None:
        self.conn.execute("begin")
        self.conn.executemany(
            "insert into claimable (data) values (?)", [(text or self.text,)] * number
        )
        self.conn.execute("commit")

    def tidy(self) -> None:
        self.conn.execute("delete from queued")


class RawUnsynced(Raw):
    """The same with claims that a power cut may undo, as ours."""

    claims_are_synced = False


class PersistQueue(Contestant):
    """persist-queue's SQLiteAckQueue, with its JSON serializer."""

    def __init__(self, directory: str) -> None:
        import persistqueue
        from persistqueue.serializers import json as serializer

        self.queue = persistqueue.SQLiteAckQueue(
            f"{directory}/persist-queue", serializer=serializer
        )
        for conn in {self.queue._putter, self.queue._getter}:
            conn.execute("pragma synchronous = full")

    def put(self, number: int) -> None:
        for _ in range(number):
            self.queue.put(PAYLOAD)

    def take(self, number: int) -> None:
        for _ in range(number):
            self.queue.ack(self.queue.get(block=False))

    def grow(self, rows: int) -> None:
        self.put(1)
        copy = (
            "insert into ack_queue_default (data, timestamp, status) select data, timestamp, status"
        )
        double(self.queue._putter, f"{copy} from ack_queue_default", rows)
        self.queue.total = rows

    def tidy(self) -> None:
        self.queue.clear_acked_data(max_delete=0, keep_latest=0)


class Huey(Contestant):
    """SqliteHuey, which syncs with fsync=True; taking a task is all there is, it has no ack."""

    def __init__(self, directory: str) -> None:
        from huey import SqliteHuey

        self.huey = SqliteHuey(filename=f"{directory}/huey.db", fsync=True, results=False)
        self.task = self.huey.task()(lambda payload: None)

    def put(self, number: int) -> None:
        for _ in range(number):
            self.task(PAYLOAD)

    def take(self, number: int) -> None:
        for _ in range(number):
            if self.huey.dequeue() is None:
                raise LookupError("huey has no task")

    def grow(self, rows: int) -> None:
        self.put(1)
        copy = "insert into task (queue, data, priority) select queue, data, priority from task"
        double(self.huey.storage.conn, copy, rows)


class Lite(Contestant):
    """litequeue, which sets synchronous=NORMAL by itself."""

    def __init__(self, directory: str) -> None:
        from litequeue import LiteQueue

        self.queue = LiteQueue(f"{directory}/litequeue.db")
        self.queue.conn.execute("pragma synchronous = full")

    def put(self, number: int) -> None:
        for _ in range(number):
            self.queue.put(json.dumps(PAYLOAD))

    def take(self, number: int) -> None:
        for _ in range(number):
            self.queue.done(self.queue.pop().message_id)

    def batch(self, number: int) -> None:
        with self.queue.transaction():
            self.put(number)

    def grow(self, rows: int) -> None:
        self.put(1)
        double(
            self.queue.conn,
            f"""insert into {self.queue.table} (data, message_id, status, in_time)
                select data, lower(hex(randomblob(16))), status, in_time from {self.queue.table}""",
            rows,
        )

    def tidy(self) -> None:
        self.queue.prune()


CONTESTANTS = {
    "raw": Raw,
    "raw, claim unsynced": RawUnsynced,
    "ours": Ours,
    "persist-queue": PersistQueue,
    "huey": Huey,
    "litequeue": Lite,
}
BASE, BARE, BARE_CLAIM = "raw", "bare watchdog", "bare, raw get+ack"
# These do less than what the row is about: they are shown, and no measure of the others.
UNSYNCED = "raw, claim unsynced"
NOT_COMPARED = {"put": (), "get+ack": (UNSYNCED, "huey")}
STEPS = {"put": "put", "get+ack": "take", "batch": "batch", "grow": "grow"}


def ours(directory: str):
    """queue_helpers on a state directory within this one."""
    os.environ["TASK_QUEUE_STATE"] = f"{directory}/state"
    sys.path.insert(0, str(HERE))
    import queue_helpers

    return queue_helpers


def contend(name: str, directory: str) -> None:
    """A contestant's process: does a step as often as told; prints the µs of one, and its cpu µs."""
    contestant = CONTESTANTS[name](directory)
    is_grown = False
    print("ready", flush=True)
    for line in sys.stdin:
        step, number = line.split()
        is_grown = is_grown or step == "grow"
        if step == "get+ack" and not is_grown:
            contestant.fill(int(number))
        began, used = time.perf_counter(), time.process_time()
        getattr(contestant, STEPS[step])(int(number))
        took = [time.perf_counter() - began, time.process_time() - used]
        print(json.dumps([seconds / int(number) * 1e6 for seconds in took]), flush=True)
        if step == "get+ack" and not is_grown:
            contestant.tidy()


def measure_calls(rounds: int, steps: dict[str, int], rows: int = 0) -> dict:
    """Return {"put": {contestant: [µs in each round]}, "put cpu": …}; all processes live, one works.

    `steps` says how many tasks each step of a round has. With `rows` each queue holds so many first.
    """
    times = {f"{step}{what}": {} for step in steps for what in ("", " cpu")}
    for row in times:
        takes = row.startswith("get+ack")
        times[row] = {name: [] for name in CONTESTANTS if takes or name != UNSYNCED}
    with tempfile.TemporaryDirectory() as directory:
        processes = {
            name: start("--contend", name, tempfile.mkdtemp(dir=directory)) for name in CONTESTANTS
        }
        try:
            for process in processes.values():
                answer(process)
                if rows:
                    tell(process, "grow", rows)
            # The first round warms up: it makes the files grow and fills the caches.
            for turn in range(rounds + 1):
                for row, number in steps.items():
                    for name in random.sample(sorted(times[row]), len(times[row])):
                        took, used = tell(processes[name], row, number)
                        times[row][name] += [took] if turn else []
                        times[f"{row} cpu"][name] += [used] if turn else []
        finally:
            stop(*processes.values())
    return times


def tell(process: subprocess.Popen, step: str, number: int) -> list[float]:
    """Have a contestant do a step so often: (µs of one, its processor µs)."""
    process.stdin.write(f"{step} {number}\n")
    process.stdin.flush()
    return json.loads(answer(process))


# -------------------------------------------------------------------------------------------- wakes


def consume(kind: str, directory: str, number: int) -> dict:
    """A consumer's process: when its code ran for which task, and the processor time of one."""
    heard: dict[int, int] = {}
    began = [0.0]

    def hear(task: int, now: int) -> bool:
        """Return whether that was the last one; one event may stand for two writes."""
        heard.setdefault(task, now)
        if task <= WARM_UP:
            began[0] = processor_seconds()
        return task == WARM_UP + number

    WAKES[kind](directory, hear)
    cpu_ms = (processor_seconds() - began[0]) / number * 1000
    return {"heard": sorted(heard.items()), "cpu_ms": cpu_ms}


def hear_get(directory: str, hear) -> None:
    queue = ours(directory).get_ack_queue("bench")
    print("ready", flush=True)
    last = False
    while not last:
        row_id, text = queue.get(block=True)
        now = time.monotonic_ns()
        last = hear(json.loads(text)["data"]["n"], now)
        queue.ack(id=row_id)


def hear_consume(directory: str, hear) -> None:
    import asyncio

    q = ours(directory)

    async def loop() -> None:
        print("ready", flush=True)
        async for task in q.consume("bench"):
            now = time.monotonic_ns()
            if hear(task.data["n"], now):
                return

    asyncio.run(loop())


def hear_bare(directory: str, hear) -> None:
    from watchdog.events import FileSystemEventHandler

    path, ended = f"{directory}/bare", threading.Event()
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    class Handler(FileSystemEventHandler):
        def on_modified(self, event) -> None:
            now = time.monotonic_ns()
            if hear(struct.unpack("q", os.pread(fd, 8, 0))[0], now):
                ended.set()

    watch_one_file(Handler(), path, ended)


def hear_bare_claim(directory: str, hear) -> None:
    """The least that a consumer of tasks does: raw SQLite's get, its code, raw SQLite's ack."""
    from watchdog.events import FileSystemEventHandler

    path, ended, raw = f"{directory}/bare", threading.Event(), RawUnsynced(directory)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))

    class Handler(FileSystemEventHandler):
        def on_modified(self, event) -> None:
            while task := raw.get():
                now = time.monotonic_ns()
                last = hear(json.loads(task[1])["n"], now)
                raw.ack(*task)
                if last:
                    ended.set()

    watch_one_file(Handler(), path, ended)


def watch_one_file(handler, path: str, ended: threading.Event) -> None:
    from watchdog.observers import Observer

    observer = Observer()
    observer.schedule(handler, path)
    observer.start()
    print("ready", flush=True)
    ended.wait()
    observer.stop()
    observer.join()


WAKES = {
    BARE: hear_bare,
    BARE_CLAIM: hear_bare_claim,
    "get": hear_get,
    "consume": hear_consume,
}


def processor_seconds() -> float:
    """Return what this process has used until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def produce(kind: str, directory: str, number: int, rate: float) -> list[int]:
    """A producer's process: when the call for each task had returned."""
    if kind == BARE:
        fd = os.open(f"{directory}/bare", os.O_WRONLY)

        def put(n: int) -> None:
            os.pwrite(fd, struct.pack("q", n), 0)
    elif kind == BARE_CLAIM:
        fd, raw = os.open(f"{directory}/bare", os.O_WRONLY), Raw(directory)

        def put(n: int) -> None:
            raw.fill(1, json.dumps({**PAYLOAD, "n": n}))
            os.pwrite(fd, b"\n", 0)
    else:
        q = ours(directory)
        q.ensure_queue(q.connect(), "bench")

        def put(n: int) -> None:
            q.enqueue_task("bench", "link_validation", {**PAYLOAD, "n": n})

    stamps = []
    for n in range(1, WARM_UP + number + 1):
        # Not quite even, so that nobody can fall into step.
        time.sleep(random.uniform(0.8, 1.2) / rate)
        put(n)
        stamps.append(time.monotonic_ns())
    return stamps


def measure_wakes(rounds: int, number: int, rate: float) -> dict:
    """{"p50 ms": {contestant: [one in each round]}, "p95 ms": …, "cpu ms": …}."""
    times = {row: {name: [] for name in WAKES} for row in ("p50 ms", "p95 ms", "cpu ms")}
    for _ in range(rounds):
        for kind in random.sample(sorted(WAKES), len(WAKES)):
            with tempfile.TemporaryDirectory() as directory:
                consumer = start("--consume", kind, directory, str(number))
                try:
                    answer(consumer)
                    # It goes to sleep first.
                    time.sleep(0.5)
                    producer = start("--produce", kind, directory, str(number), str(rate))
                    try:
                        stamps = json.loads(answer(producer))
                        report = json.loads(answer(consumer))
                    finally:
                        stop(producer)
                finally:
                    stop(consumer)
            late = sorted((now - stamps[n - 1]) / 1e6 for n, now in report["heard"] if n > WARM_UP)
            times["p50 ms"][kind].append(statistics.median(late))
            times["p95 ms"][kind].append(late[int(len(late) * 0.95)])
            times["cpu ms"][kind].append(report["cpu_ms"])
    return times


# ----------------------------------------------------------------------------- processes, the table


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def answer(process: subprocess.Popen) -> str:
    """A process's next line."""
    late = threading.Timer(ANSWER_SECONDS, process.kill)
    late.start()
    line = process.stdout.readline()
    late.cancel()
    if not line:
        raise SystemExit(f"{' '.join(process.args[1:])} ended with {process.wait()}")
    return line


def stop(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.kill()
        process.wait()


def summarize(times: dict, base: str) -> dict:
    """{row: {contestant: {"median", "times_base", "of_base"}}}: medians, also of the ratios."""
    table = {}
    for row, measured in times.items():
        table[row] = {
            name: {
                "median": statistics.median(values),
                "times_base": statistics.median(
                    one / of for one, of in zip(values, measured[base], strict=True)
                ),
                "of_base": statistics.median(
                    of / one for one, of in zip(values, measured[base], strict=True)
                ),
            }
            for name, values in measured.items()
        }
    return table


def best_peer(row: str, contestants: dict) -> str:
    """The fastest contestant that is neither ours nor raw and does all that the row is about."""
    peers = contestants.keys() - {BASE, "ours", *NOT_COMPARED[row]}
    return max(peers, key=lambda name: contestants[name]["of_base"])


def as_text(calls: dict, wakes: dict) -> str:
    """The tables."""
    lines = [f"{'':22}" + "".join(f"{row + ' µs':>16}{'of raw':>8}" for row in calls)]
    for name in CONTESTANTS:
        cells = ""
        for contestants in calls.values():
            one = contestants.get(name)
            cells += f"{one['median']:16.1f}{one['of_base']:8.2f}" if one else f"{'':24}"
        lines.append(f"{name:22}{cells}{'   (no ack)' if name == 'huey' else ''}".rstrip())
    for row in NOT_COMPARED:
        contestants = calls[row]
        best = best_peer(row, contestants)
        times = contestants["ours"]["of_base"] / contestants[best]["of_base"]
        lines.append(f"{row}: ours is {times:.2f} times as fast as the best peer, {best}")
    lines.append("")
    lines.append(f"{'a wake':22}" + "".join(f"{row:>10}{'x bare':>8}" for row in wakes))
    for name in WAKES:
        cells = "".join(
            f"{rows[name]['median']:10.2f}{rows[name]['times_base']:8.2f}"
            for rows in wakes.values()
        )
        lines.append(f"{name:22}{cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="how often each contestant has its turn (default 7)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two rounds with few tasks: to see that it works"
    )
    parser.add_argument(
        "--rate", type=float, default=20.0, help="tasks a second of the wakes (default 20)"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same as one JSON object, with each round's figures"
    )
    for role in ("--contend", "--consume", "--produce"):
        parser.add_argument(role, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contend:
        contend(*args.contend)
    elif args.consume:
        kind, directory, number = args.consume
        print(json.dumps(consume(kind, directory, int(number))), flush=True)
    elif args.produce:
        kind, directory, number, rate = args.produce
        print(json.dumps(produce(kind, directory, int(number), float(rate))), flush=True)
    else:
        needed = ("persistqueue", "watchdog", "huey", "litequeue")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            how = "uv brings them along: uv run --script bench/peers.py"
            parser.error(f"not installed: {', '.join(missing)}; {how}")
        rounds, calls, wakes = (2, 50, 15) if args.quick else (args.rounds, 500, 80)
        call_times, wake_times = (
            measure_calls(rounds, {"put": calls, "get+ack": calls}),
            measure_wakes(rounds, wakes, args.rate),
        )
        call_table, wake_table = summarize(call_times, BASE), summarize(wake_times, BARE)
        if args.json:
            whole = {
                "calls": call_table,
                "wakes": wake_table,
                "rounds": {**call_times, **wake_times},
            }
            print(json.dumps(whole, indent=1))
        else:
            print(as_text(call_table, wake_table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
