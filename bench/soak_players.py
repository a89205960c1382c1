#!/usr/bin/env python3
"""The processes of the soak that are Python: its handler, a producer, and a consumer of results.

    soak_players.py ROLE LEDGER NAME ROOT     ROLE is handle, produce or consume

Each appends what it does to the ledger, a JSON line at a time, with the machine's monotonic time.
"""

import json
import os
import random
import sys
import time

QUEUES = ("work", "lanes", "narrow", "latest", "held", "ticks")
# Attempts of a task, slots of the queue that has them, and the size of the small disk.
MAX_ATTEMPTS, SLOTS, DISK_MB = 6, 2, 64
PAD = "x" * 3000


def open_ledger(path):
    """Return the function that appends a line to the ledger."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def say(what, name, *facts):
        os.write(fd, (json.dumps([what, time.monotonic_ns(), name, *facts]) + "\n").encode())

    return say


# ----------------------------------------------------------------------------------- the handler


def handle(say, *_):
    """Run one task: at times it fails, says "not now" or "never", asks its person, or hangs."""
    data = json.load(sys.stdin)["data"]
    with open("/proc/self/stat") as file:
        started = file.read().rsplit(")", 1)[1].split()[19]
    me = data["name"], os.environ["TASK_QUEUE"], int(os.environ["TASK_ATTEMPT"])
    say("begin", *me, os.getpid(), started, os.getppid())
    time.sleep(random.choice((0, 0, 0.01, 0.05, 0.2)))
    if random.random() < 0.005:
        time.sleep(8)  # longer than its timeout
    code, lines = verdict(data)
    try:
        os.write(1, "".join(json.dumps(line) + "\n" for line in lines).encode())
    except OSError:  # the disk is full
        code = 1
    say("end", *me, os.getpid(), started, os.getppid(), code)
    os._exit(code)


def verdict(data):
    """Return the exit code of a run, and what it prints."""
    if data.get("kind") == "poison":
        return 65, []
    if data.get("kind") == "ask" and not data.get("answered"):
        return 75, [{"hold": "may I?", "data": {"answered": True}}]
    code = random.choice((0, 0, 0, 0, 0, 0, 1, 75))
    if code == 75:
        return code, [{"retry_after": 0.1}]
    lines = [{"name": data["name"] + ">"}]
    if data.get("left"):
        lines.append({"enqueue": [chained(data["name"], data["left"] - 1)]})
    return code, lines


def chained(name, left):
    """Return the task that follows another one in its chain."""
    name = f"{name.rsplit(':', 1)[0]}:{left}"
    data = {"name": name, "left": left}
    return {"queue": "work", "task_type": "work", "task_id": name, "data": data}


# ------------------------------------------------------------------------------ Python's own doors


def produce(say, me, root):
    """Enqueue with enqueue_task and enqueue_tasks, as fast as is fair on a small machine."""
    sys.path.insert(0, root)
    import queue_helpers as q

    for n in range(1, 10**9):
        queue, name, group = random.choice(
            [("work", f"plain-{me}-{n}", None), ("narrow", f"narrow-{me}-{n}", None)]
            + [("lanes", f"lane:{me}.{lane}:{n}", f"{me}.{lane}") for lane in "ab"]
        )
        names = [name] if random.random() < 0.8 else [f"{name}:one", f"{name}:two"]
        if group:
            names = [name]
        say("try", names)
        try:
            q.enqueue_tasks(queue, [task_of(each, group) for each in names])
        except q.QueueError as error:
            say("no", names, str(error))
            time.sleep(0.2)
        else:
            say("ok", names)
        time.sleep(random.uniform(0, 0.5))


def task_of(name, group=None):
    data = {"name": name, "pad": PAD[: random.randrange(len(PAD))]}
    return {"task_type": "work", "data": data, "task_id": name, "group": group}


def consume(say, me, root):
    """Take results, as a bot would."""
    sys.path.insert(0, root)
    import asyncio

    import queue_helpers as q

    async def take():
        async for task in q.consume("results", max_attempts=50, backoff=0.05):
            async with task:
                say("took", task.data["name"])

    asyncio.run(take())


def name_of(text):
    """Return the name that the soak gave a task, in an envelope or a bare payload."""
    said = json.loads(text)
    return (said["data"] if "task_type" in said else said).get("name", "?")


if __name__ == "__main__":
    ROLES = {"handle": handle, "produce": produce, "consume": consume}
    ROLES[sys.argv[1]](open_ledger(sys.argv[2]), *sys.argv[3:])
