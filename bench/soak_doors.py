"""The doors by which the soak's tasks come in, and the people and chores around them.

Each function is repeated in a thread of its own. What it starts may be killed or stopped: a task is
accepted if its door said so, and in doubt if the door was killed.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from soak_players import PAD, QUEUES, name_of, task_of

if TYPE_CHECKING:
    from soak import Soak

ROOT = Path(__file__).resolve().parent.parent
BUSY_MS = 10_000


def next_name(soak: Soak, kind: str) -> str:
    soak.named[kind] += 1
    return f"{kind}-{soak.named[kind]}"


def trying(soak: Soak, names: list[str]) -> None:
    for name in names:
        soak.tried.setdefault(name, time.monotonic_ns())


def told(soak: Soak, names: list[str], code: int) -> bool:
    """Note what a door said of tasks; return whether it accepted them."""
    if code == 0:
        soak.accepted |= dict.fromkeys(names, time.monotonic_ns())
    elif code > 0:
        soak.refused |= set(names)
    return code == 0


def add(soak: Soak, name: str, queue: str, *options: str, task_id: str = "", **data) -> bool:
    """Enqueue with the command."""
    trying(soak, [name])
    payload = json.dumps({"name": name, **data})
    words = [queue, "work", payload, "--new", "--task-id", task_id or name, *options]
    return told(soak, [name], soak.script("enqueue.py", *words).returncode)


# ---------------------------------------------------------------------------------- the producers


def from_bash(soak: Soak, dice: random.Random) -> None:
    """An envelope or a bare payload, by sqlite3 alone."""
    name = next_name(soak, "bash")
    trying(soak, [name])
    task = task_of(name)
    data = json.dumps(task["data"] if dice.random() < 0.3 else task)
    words = ["-cmd", f".timeout {BUSY_MS}", soak.db, f"insert into work (data) values ('{data}')"]
    told(soak, [name], soak.run(["sqlite3", *words]).returncode)


def from_hook(soak: Soak, dice: random.Random) -> None:
    """A firing of Claude Code: one file in the spool."""
    name = next_name(soak, "hook")
    trying(soak, [name])
    payload = json.dumps({"hook_event_name": "Stop", "session_id": "soak", "name": name})
    command = ["sh", ROOT / "bin" / "hook.sh", "work", "work"]
    code = soak.run(command, payload, cwd=soak.workspace).returncode
    # A child of the hook may have been killed after the file was there: it refuses to be safe.
    told(soak, [name], code if code == 0 else -1)


def from_json_lines(soak: Soak, dice: random.Random) -> None:
    """Five tasks, all or none."""
    base = next_name(soak, "lines")
    names = [f"{base}:{n}" for n in range(5)]
    trying(soak, names)
    soak.batches.append(names)
    text = "".join(json.dumps(task_of(name)) + "\n" for name in names)
    told(soak, names, soak.script("enqueue.py", "work", "--jsonl", "--new", text=text).returncode)


def from_command(soak: Soak, dice: random.Random) -> None:
    """One task with an option by chance."""
    kind = dice.choice(("ttl", "late", "hold", "ask", "chain", "poison", "lane", "narrow"))
    name = next_name(soak, kind)
    if kind == "ttl":
        soak.facts[name]["ttl"] = ttl = dice.choice((0.2, 1.0, 5.0))
        add(soak, name, "work", "--ttl", str(ttl))
    elif kind == "late":
        soak.facts[name]["delay"] = delay = dice.choice((0.3, 1.0, 3.0))
        add(soak, name, "work", "--delay", str(delay))
    elif kind == "hold":
        add(soak, name, "held", "--hold")
    elif kind == "ask":
        add(soak, name, "held", kind="ask")
    elif kind == "chain":
        add(soak, name + ":2", "work", left=2)
    elif kind == "poison":
        add(soak, name, "work", kind="poison", pad=PAD)
    elif kind == "lane":
        add(soak, f"lane:cli:{name.split('-')[1]}", "lanes", "--group", "cli")
    else:
        add(soak, name, "narrow", "--priority", str(dice.randrange(3)))


def one_after_another(soak: Soak, dice: random.Random) -> None:
    """A task that completes or fails, one that runs --after it, and one that runs --after-any."""
    name = next_name(soak, "before")
    if add(soak, name, "work", kind=dice.choice(("plain", "poison"))):
        for kind in ("after", "after-any"):
            soak.facts[f"{kind}:{name}"]["after"] = name
            add(soak, f"{kind}:{name}", "work", f"--{kind}", f"work/{name}")


def latest(soak: Soak, dice: random.Random) -> None:
    """The next version of a task that replaces the one that waits, and follows the one that runs."""
    duplicate = dice.choice(("replace", "rerun"))
    which = f"{duplicate}{dice.randrange(2)}"
    version = next_name(soak, f"latest of {which}").rsplit("-", 1)[1]
    name, options = f"latest:{which}:{version}", ("--on-duplicate", duplicate)
    add(soak, name, "latest", *options, task_id=which)


# -------------------------------------------------------------------------- people and their chores


def decide(soak: Soak, dice: random.Random) -> None:
    """Approve what is held, and reject some of it."""
    statement = "select task_id, data from held where status = 3 and due_at is null"
    for task_id, data in soak.rows(statement):
        name = json.loads(data)["data"]["name"]
        verb = "reject" if name.startswith("hold") and dice.random() < 0.3 else "approve"
        decided = soak.facts[name].setdefault("decided", [])
        now = time.monotonic_ns()
        decided.append([verb, now, None])
        decided[-1][2] = soak.script("tasks.py", verb, task_id, "--queue", "held").returncode


def pause(soak: Soak, dice: random.Random) -> None:
    """Pause a queue for a moment: nothing may begin but what was claimed before."""
    if soak.script("tasks.py", "pause", "work").returncode == 0:
        statement = "select data from work where status = 2"
        claimed = {name_of(data) for (data,) in soak.rows(statement)}
        begin = time.monotonic_ns()
        time.sleep(dice.uniform(0.3, 1))
        soak.facts["pauses"].setdefault("all", []).append((begin, time.monotonic_ns(), claimed))
        soak.counts["pauses"] += 1
    while soak.script("tasks.py", "resume", "work").returncode:
        time.sleep(0.1)


def cleanup(soak: Soak, dice: random.Random) -> None:
    """Prune what was collected: cleanup computes its bound within half the time that is kept."""
    keep = max(10, min(60, int(soak.seconds / 4)))
    soak.collect()
    words = ["cleanup.py", "--keep", f"{keep}s", "--keep-failed", f"{keep}s"]
    try:
        done = soak.script(*words, timeout=keep / 2)
    except subprocess.TimeoutExpired:
        return
    soak.counts["cleanups"] += done.returncode == 0


def known(soak: Soak) -> set[str]:
    """Return the names that were accepted by now, but for those that later versions replace."""
    soak.read_ledger()
    return {name for name in list(soak.accepted) if not name.startswith("latest:")}


def names_in(soak: Soak, db: Path) -> set[str]:
    tables = soak.rows("select name from sqlite_master where type = 'table'", db=db)
    queues = [queue for queue in (*QUEUES, "results") if (queue,) in tables]
    selects = [f"select data from {table}" for table in (*queues, "task_history")]
    texts = soak.rows(" union all ".join(selects), db=db)
    return {name_of(text) for (text,) in texts}


def backup(soak: Soak, dice: random.Random) -> None:
    """Back the database up: what was accepted before is in the copy, or had ended before."""
    expected, target = known(soak), soak.root / "backup.db"
    if soak.script("tasks.py", "backup", target).returncode == 0:
        soak.collect()
        check_copy(soak, "a backup is whole", expected, target)
        if soak.rows("pragma integrity_check", db=target) != [("ok",)]:
            soak.break_rule("a backup is whole", "integrity_check")
    target.unlink(missing_ok=True)


def export(soak: Soak, dice: random.Random) -> None:
    """Export to a second database: each task that had not ended is there."""
    expected, file, second = known(soak), soak.root / "export.jsonl", soak.root / "second"
    env = soak.env | {"TASK_QUEUE_STATE": str(second)}
    if soak.script("tasks.py", "export", file).returncode == 0:
        soak.collect()
        if soak.script("tasks.py", "import", file, env=env).returncode == 0:
            check_copy(soak, "an export is whole", expected, second / "tasks.db")
    shutil.rmtree(second, ignore_errors=True)


def check_copy(soak: Soak, rule: str, expected: set[str], db: Path) -> None:
    ended = {each.name for each in list(soak.history.values())}
    there = names_in(soak, db)
    soak.checked[rule] += 1
    for name in expected - there - ended:
        soak.break_rule(rule, f"{name} is missing")


def final_checks(soak: Soak) -> None:
    """The database is whole, and a second one that imports all of it has the same history."""
    soak.checked["the database is whole"] += 1
    if soak.rows("pragma integrity_check") != [("ok",)]:
        soak.break_rule("the database is whole", "integrity_check")
    file, second = soak.root / "all.jsonl", soak.root / "moved"
    env = soak.env | {"TASK_QUEUE_STATE": str(second)}
    soak.script("tasks.py", "export", file, "--history").check_returncode()
    soak.script("tasks.py", "import", file, env=env).check_returncode()
    statement = (
        "select queue, task_id, status, attempts, data from task_history order by 1, 2, 3, 4, 5"
    )
    there = set(soak.rows(statement, db=second / "tasks.db"))
    soak.checked["an import equals its export"] += 1
    for row in set(soak.rows(statement)) ^ there:
        soak.break_rule("an import equals its export", str(row[:4]))


PRODUCERS = (
    [(from_bash, 0.5), (from_hook, 0.5), (from_json_lines, 2), (from_command, 0.2)]
    + [(one_after_another, 2), (latest, 0.5)]
)  # fmt: skip
KEEPERS = [(decide, 0.5), (pause, 6), (cleanup, 4), (backup, 4), (export, 4)]
