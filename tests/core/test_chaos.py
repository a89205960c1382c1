import os
import subprocess
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import soak
import soak_proof


def test_nothing_is_lost_and_nothing_runs_twice_at_once(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("bench/soak.py looks into /proc")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "soak.py", "8", "--seed", "42"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("clean\n") and "SIGKILL: " in done.stdout


# ---------------------------------------------------------------- the proof sees what it is there for

MS = 1_000_000


def run(name, begin, end, code=0, queue="work"):
    return soak.Run(name, queue, 1, begin, "1", 99, begin * MS, end * MS, code)


def ended(name, status="completed", row=1, queue="work", attempts=1, second=1):
    at = f"2026-01-01 00:00:0{second}.000"
    return soak.Ended(name, row, queue, row, status, attempts, "", at, at)


def a_world(runs=(), history=(), accepted=(), **more):
    """A world in which these things happened; tasks that ran or ended were tried."""
    names = {each.name for each in (*runs, *history)} | set(accepted)
    known = {
        "history": {number: row for number, row in enumerate(history)},
        "runs": list(runs), "unended": list, "counts": Counter(), "facts": defaultdict(dict),
        "accepted": dict.fromkeys(accepted, 0), "tried": dict.fromkeys(names, 0), "refused": set(),
        "batches": [], "killed": set(), "blind": {}, "orphaned": set(), "full": [],
    }  # fmt: skip
    world = SimpleNamespace(**known | more)
    world.facts.update({"tick": {"beat": 0.0}} | more.get("facts", {}))
    return world


BREACHES = {
    "lost": a_world(accepted=["plain-1"]),
    "doubled": a_world([run("a", 1, 2), run("a", 3, 4)], [ended("a")]),
    "two runs at once": a_world([run("a", 1, 5), run("a", 3, 4)]),
    "invented": a_world(history=[ended("a")], tried={}),
    "batches torn": a_world(history=[ended("a")], batches=[["a", "b"]]),
    "dead before its attempts were spent": a_world(history=[ended("a", "failed")]),
    "groups out of order": a_world([run("lane:x:2", 1, 2), run("lane:x:1", 3, 4)]),
    "slots exceeded": a_world([run(str(n), 1 + n, 9, queue="narrow") for n in range(3)]),
    "latest version lost": a_world(history=[ended("latest:r:1")], accepted=["latest:r:2"]),
    "ttl": a_world([run("a", 1, 2)], [ended("a", "expired")], facts={"a": {"ttl": 1}}),
    "delay": a_world([run("a", 1, 2)], facts={"a": {"delay": 1}}),
    "hold": a_world([run("hold-1", 1, 2)], [ended("hold-1")]),
    "after": a_world(
        history=[ended("b"), ended("a", "failed", 2)], facts={"b": {"after": "a"}}
    ),
    "then and chain": a_world(history=[ended("a")]),
    "pause": a_world([run("a", 2, 3)], facts={"pauses": {"all": [(MS, 9 * MS, set())]}}),
    "every": a_world(history=[ended("tick", row=n, queue="ticks") for n in (1, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("rule", soak_proof.RULES)
def test_the_proof_names_each_breach(rule):
    assert any(soak_proof.RULES[rule](soak_proof.Facts(BREACHES[rule])))


def test_a_run_may_be_done_again_only_if_its_end_could_not_be_known():
    world = a_world([run("a", 1, 2), run("a", 3, 4)], [ended("a")], blind={99: 3 * MS})
    assert not any(soak_proof.doubled(soak_proof.Facts(world)))
    world.blind = {98: 3 * MS}
    assert any(soak_proof.doubled(soak_proof.Facts(world)))
