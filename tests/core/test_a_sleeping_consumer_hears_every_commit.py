"""A consumer that sleeps in get() or consume() has a task within 100 ms of its commit, however it
was written.
"""

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time

import pytest
from conftest import wait_for
from processes import processor_seconds

pytestmark = [pytest.mark.core, pytest.mark.alone]

LATEST_SECONDS = 0.1
SAFETY_TICK_SECONDS = 5.0

# Long-lived writers with one connection. Each line on stdin is a pause in seconds; the answer is
# when its put was committed. The clock is the machine's, the same for all processes.
ENQUEUE_TASK = """
import sys, time
from queue_helpers import enqueue_task
for n, pause in enumerate(sys.stdin):
    time.sleep(float(pause))
    enqueue_task("notifications", "t", {"n": n})
    print(time.monotonic(), flush=True)
"""
PLAIN_INSERT = """
import sqlite3, sys, time
conn = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
conn.execute("pragma synchronous = full")
for n, pause in enumerate(sys.stdin):
    time.sleep(float(pause))
    conn.execute("insert into notifications (data) values (?)", ('{"n": %d}' % n,))
    print(time.monotonic(), flush=True)
"""

# On a loaded machine a process may get no processor for a while; that is not the queue's doing.
# This one sleeps 5 ms at a time and prints when it got up much later.
STALLS = """
import time
before = time.monotonic()
while True:
    time.sleep(0.005)
    now = time.monotonic()
    if now - before > 0.03:
        print(before + 0.005, now, flush=True)
    before = now
"""


class Writer:
    """A long-lived writer, and the log of the machine's own stalls."""

    def __init__(self, installation, code: str, env=None) -> None:
        self.stalls_log = installation.directory / "stalls"
        with open(self.stalls_log, "wb") as log:
            stalls = subprocess.Popen([sys.executable, "-c", STALLS], stdout=log)
        installation.processes.append(stalls)
        self.process = installation.start_python(code, installation.db, env=env)
        # Each is (when it was committed, when we had it).
        self.seen = []

    def put_after(self, pause: float) -> None:
        self.process.stdin.write(f"{pause}\n")
        self.process.stdin.flush()

    def had(self) -> None:
        now = time.monotonic()
        self.seen.append((float(self.process.stdout.readline()), now))

    def latencies(self) -> list[float]:
        """Seconds from commit to sight, less what the whole machine stood still in between; the
        longest last.
        """
        stalls = [
            tuple(map(float, line.split()))
            for line in self.stalls_log.read_text().splitlines()
            if line.count(".") == 2
        ]
        excused = [
            seen
            - committed
            - sum(max(0.0, min(seen, end) - max(committed, begin)) for begin, end in stalls)
            for committed, seen in self.seen
        ]
        return sorted(excused)


def pauses(count: int, long_ones: int) -> list[float]:
    """Mostly short ones, which find the consumer still looking around, and some that end at each
    moment in which it stops to look, starts to listen, or sleeps."""
    chosen = [0.3 * n / long_ones for n in range(long_ones)]
    chosen += [random.uniform(0, 0.004) for _ in range(count - long_ones)]
    random.shuffle(chosen)
    return chosen


def assert_none_was_late(writer: Writer, count: int) -> None:
    """A loaded machine gives some thread no processor for a while: one in fifty may be later than
    it ought to be.

    None waits for the look that comes now and then anyway: that is what a commit does that nobody
    has heard.
    """
    latencies = writer.latencies()
    assert len(latencies) == count
    late = [round(seconds, 4) for seconds in latencies if seconds >= LATEST_SECONDS]
    assert len(late) <= count // 50, late
    assert latencies[-1] < SAFETY_TICK_SECONDS / 4, late
    assert statistics.median(latencies) < LATEST_SECONDS / 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [ENQUEUE_TASK, PLAIN_INSERT], ids=["enqueue_task", "plain_insert"])
@pytest.mark.parametrize("kind", ["get_queue", "get_ack_queue"])
def test_puts_heard_by_get(installation, queue, code, kind):
    # So many with each pair of a writer and a reader.
    count = 120
    mine = getattr(queue, kind)("notifications")
    writer = Writer(installation, code)
    for n, pause in enumerate(pauses(count, 16)):
        writer.put_after(pause)
        task = mine.get(timeout=10)
        writer.had()
        if kind == "get_ack_queue":
            mine.ack(task[0])
            task = task[1]
        assert json.loads(task).get("data", json.loads(task))["n"] == n
    assert_none_was_late(writer, count)


@pytest.mark.parametrize("code", [ENQUEUE_TASK, PLAIN_INSERT], ids=["enqueue_task", "plain_insert"])
def test_puts_heard_by_the_async_iterator(installation, queue, code):
    queue.connect()
    writer = Writer(installation, code)
    waits = pauses(150, 15)

    async def main():
        writer.put_after(waits[0])
        n = 0
        async for task in queue.consume("notifications"):
            writer.had()
            assert task.data["n"] == n
            n += 1
            if n == len(waits):
                return
            writer.put_after(waits[n])

    asyncio.run(asyncio.wait_for(main(), 60))
    assert_none_was_late(writer, len(waits))


def test_puts_heard_by_eight_consumers_that_all_sleep(installation, queue):
    """Whoever is first has it; the others sleep on, and hear the next."""
    mine, writer, had = (
        queue.get_queue("notifications"),
        Writer(installation, ENQUEUE_TASK),
        threading.Semaphore(0),
    )

    def consume():
        while json.loads(mine.get())["data"]["n"] < 60:
            had.release()
        mine.put({"task_id": "end", "task_type": "t", "data": {"n": 99}})

    threads = [threading.Thread(target=consume, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for pause in pauses(60, 10):
        writer.put_after(pause)
        assert had.acquire(timeout=10)
        writer.had()
    assert_none_was_late(writer, 60)
    writer.put_after(0)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_task_that_becomes_due(installation, queue):
    mine = queue.get_queue("notifications")
    for delay in (0.05, 0.2, 0.5):
        queue.enqueue_task("notifications", "t", {}, delay=delay)
        due = time.monotonic() + delay
        mine.get(timeout=10)
        assert -0.02 < time.monotonic() - due < LATEST_SECONDS


def test_a_commit_that_takes_its_time_on_the_disk(installation, queue, tmp_path):
    """The event comes with the write; the task can be seen only after the fsync that follows."""
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs a C compiler, and LD_PRELOAD")
    source = tmp_path / "slow.c"
    source.write_text("""
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <unistd.h>
        int fsync(int fd) { usleep(300000); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
        int fdatasync(int fd) { usleep(300000); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
    """)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "slow.so", source, "-ldl"], check=True
    )
    mine = queue.get_queue("notifications")
    writer = Writer(installation, PLAIN_INSERT, {"LD_PRELOAD": str(tmp_path / "slow.so")})
    for pause in (0.0, 0.3, 0.5, 0.7):
        writer.put_after(pause)
        mine.get(timeout=20)
        writer.had()
    assert_none_was_late(writer, 4)


SLEEPERS = {
    "get": "q.get_queue('notifications').get()",
    "get of an ack queue with a timeout": "q.get_ack_queue('notifications').get(timeout=60)",
    "dequeue_task": "q.dequeue_task('notifications', timeout=60)",
    "consume": "asyncio.run(first())",
    "get while a task is far away": "(q.enqueue_task('approvals', 't', {}, delay=3600), q.get_queue('approvals').get())",
}
SLEEP = """
import asyncio, sys
import queue_helpers as q
async def first():
    async for task in q.consume("notifications"):
        return task
print("sleeps", flush=True)
eval(sys.argv[1])
"""


@pytest.mark.once
def test_an_idle_consumer_uses_no_processor(installation, queue):
    queue.connect()
    sleepers = [installation.start_python(SLEEP, code) for code in SLEEPERS.values()]
    for sleeper in sleepers:
        sleeper.stdout.readline()
    # It is asleep once it has used nothing for a while.
    used = {}

    def asleep() -> bool:
        time.sleep(0.5)
        before = dict(used)
        used.update({sleeper.pid: processor_seconds(sleeper.pid) for sleeper in sleepers})
        return before == used

    wait_for(asleep, 20, "sleeping consumers")
    before = {sleeper.pid: processor_seconds(sleeper.pid) for sleeper in sleepers}
    began = time.monotonic()
    # This is long enough for a safety tick.
    time.sleep(5.5)
    took = time.monotonic() - began
    shares = [(processor_seconds(sleeper.pid) - before[sleeper.pid]) / took for sleeper in sleepers]
    assert all(share < 0.02 for share in shares), dict(zip(SLEEPERS, shares, strict=True))
    assert all(sleeper.poll() is None for sleeper in sleepers)
