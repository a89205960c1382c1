"""The soak's proof: rules over what producers were told, what handlers wrote, and the history.

A rule is a function that yields one item for each thing that it looked at: "" if the promise was
kept, else the words that name the breach.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from soak_players import DISK_MB, MAX_ATTEMPTS, SLOTS

if TYPE_CHECKING:
    from soak import Ended, Run, Soak

# A supervisor that is killed cannot write down how the handlers ended that it had not reaped.
BLIND_NS = 2_000_000_000
FULL_NS = 100_000_000


class Facts:
    """What is known at the end."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.ended: dict[str, list[Ended]] = defaultdict(list)
        self.results: Counter[str] = Counter()
        self.ticks: list[Ended] = []
        # Runs that were done again, by why nobody could know how the one before had ended.
        self.again: Counter[str] = Counter()
        for row in sorted(soak.history.values(), key=lambda row: row.row):
            if row.queue == "results":
                self.results[row.name.removesuffix(">")] += 1
            elif row.queue == "ticks" and row.name == "tick":
                self.ticks.append(row)
            else:
                self.ended[row.name].append(row)
        self.runs: dict[str, list[Run]] = defaultdict(list)
        for run in sorted([*soak.runs, *soak.unended()], key=lambda run: run.begin):
            self.runs[run.name].append(run)
        self.replaced = {name for name in soak.tried if name.startswith("latest:")}

    def status(self, name: str) -> str:
        return self.ended[name][-1].status if self.ended[name] else "none"

    def completed(self, name: str) -> int:
        rows = self.ticks if name == "tick" else self.ended[name]
        return sum(row.status == "completed" for row in rows)

    def all_ended(self) -> list[Ended]:
        return [row for rows in self.ended.values() for row in rows] + self.ticks

    def lanes(self) -> dict[str, list[tuple[int, Run]]]:
        """Return the runs of each group, in the order of their begins, with their task's number."""
        lanes = defaultdict(list)
        for name, runs in self.runs.items():
            if name.startswith("lane:"):
                _, lane, number = name.split(":")
                lanes[lane] += [(int(number), run) for run in runs]
        return {lane: sorted(runs, key=lambda each: each[1].begin) for lane, runs in lanes.items()}

    def excuse(self, run: Run) -> str:
        """Say why nobody could know how a run ended; "" if its end had to be known."""
        supervisor_died = self.soak.blind.get(run.supervisor, run.end + 2 * BLIND_NS)
        if (run.pid, run.started) in self.soak.killed:
            return "the handler was killed at its end"
        if run.supervisor == 1 or supervisor_died < run.end + BLIND_NS:
            return "its supervisor was killed"
        full = any(begin - FULL_NS < run.end < end + FULL_NS for begin, end in self.soak.full)
        if full and run.supervisor in self.soak.orphaned:
            return "its worker was killed, and the disk was full"
        return ""


# ------------------------------------------------------------------------------------------ rules


def lost(facts: Facts) -> Iterator[str]:
    for name in facts.soak.accepted:
        if name not in facts.replaced and name != "first-results>":
            yield "" if facts.ended[name] else f"{name} was accepted, and has not ended"


def doubled(facts: Facts) -> Iterator[str]:
    """A task ends once, and is done once; again only where nobody could know how a run ended."""
    for name, rows in list(facts.ended.items()):
        yield f"{name} ended {len(rows)} times" if len(rows) > 1 else ""
    for name, runs in facts.runs.items():
        well = [run for run in runs if run.code == 0]
        excuses, done = [facts.excuse(run) for run in well], facts.completed(name)
        sure = [words for words in excuses if not words]
        if len(well) > done:
            facts.again.update(sorted(excuses)[done:])
        yield f"{name} was done {len(sure)} times, {done} recorded" if len(sure) > done else ""
        yield f"{name} is recorded as done, and was not" if len(well) < done else ""


def at_once(facts: Facts) -> Iterator[str]:
    for name, runs in facts.runs.items():
        for one, two in zip(runs, runs[1:], strict=False):
            late = (one.end - two.begin) / 1e6
            yield f"{name} ran twice at once for {late:.1f} ms" if late > 0 else ""


def invented(facts: Facts) -> Iterator[str]:
    """Each task that ended was tried, or follows one that completed; none was refused."""
    for name in list(facts.ended):
        base, _, left = name.rpartition(":")
        if name.startswith("chain-") and left in ("0", "1"):
            before = facts.status(f"{base}:{int(left) + 1}")
            yield "" if before == "completed" else f"{name} follows one that is {before}"
        elif name not in facts.soak.tried:
            yield f"{name} came from nowhere"
        else:
            stored = name in facts.soak.refused and name not in facts.soak.accepted
            yield f"{name} was refused, and stored" if stored else ""


def all_or_none(facts: Facts) -> Iterator[str]:
    for names in facts.soak.batches:
        if len(names) > 1:
            there = sum(bool(facts.ended[name]) for name in names)
            yield "" if there in (0, len(names)) else f"{there} of {len(names)} of {names[0]} …"


def attempts(facts: Facts) -> Iterator[str]:
    for row in facts.all_ended():
        if row.status == "failed" and "exit 65" not in row.error:
            early = row.attempts != MAX_ATTEMPTS
            yield f"{row.name} died after {row.attempts} attempts: {row.error}" if early else ""


def groups(facts: Facts) -> Iterator[str]:
    for lane in facts.lanes().values():
        yield ""
        for (n, one), (m, two) in zip(lane, lane[1:], strict=False):
            if m < n:
                yield f"{two.name} began after {one.name}"
            elif one.end > two.begin:
                yield f"{one.name} and {two.name} ran at once"
            else:
                yield ""


def slots(facts: Facts) -> Iterator[str]:
    moments = []
    for runs in facts.runs.values():
        for run in runs:
            if run.queue == "narrow":
                moments += [(run.begin, 1, run.name), (run.end, -1, run.name)]
    now = 0
    for _, change, name in sorted(moments):
        now += change
        if change > 0:
            facts.soak.counts["most at once"] = max(now, facts.soak.counts["most at once"])
            yield f"{name} was number {now}" if now > SLOTS else ""


def latest(facts: Facts) -> Iterator[str]:
    """The last accepted version ends, and none ends after a later one."""
    ended = defaultdict(list)
    for name in facts.replaced:
        for row in facts.ended[name]:
            ended[name.split(":")[1]].append((row.row, row.id, int(name.split(":")[2])))
    accepted = defaultdict(int)
    for name in facts.replaced & facts.soak.accepted.keys():
        _, which, version = name.split(":")
        accepted[which] = max(accepted[which], int(version))
    for which, last in accepted.items():
        versions = [version for *_, version in sorted(ended[which])]
        yield "" if max(versions, default=0) >= last else f"version {last} of {which} is lost"
        for one, two in zip(versions, versions[1:], strict=False):
            yield "" if one < two else f"version {two} of {which} ended after {one}"


def ttl(facts: Facts) -> Iterator[str]:
    for name, said in list(facts.soak.facts.items()):
        for row in facts.ended[name] if "ttl" in said else ():
            if row.status == "expired":
                yield f"{name} expired, and ran" if facts.runs[name] else ""
            elif row.attempts == 1:
                late = unix(row.started_at) - unix(row.enqueued_at) - said["ttl"]
                yield f"{name} began {late:.3f} s too late" if late > 0.01 else ""


def delays(facts: Facts) -> Iterator[str]:
    for name, said in list(facts.soak.facts.items()):
        for run in facts.runs[name][:1] if "delay" in said else ():
            early = said["delay"] - (run.begin - facts.soak.tried[name]) / 1e9
            yield f"{name} began {early:.3f} s too early" if early > 0 else ""


def holds(facts: Facts) -> Iterator[str]:
    """A held task runs only after an approval was tried, and a rejected one never."""
    for name in list(facts.ended):
        if not name.startswith(("hold-", "ask-")):
            continue
        decided = facts.soak.facts[name].get("decided", [])
        verbs = {verb: code for verb, _, code in decided}
        approved = min((when for verb, when, _ in decided if verb == "approve"), default=None)
        runs, status = facts.runs[name], facts.status(name)
        if name.startswith("hold-") and runs and (approved is None or runs[0].begin < approved):
            yield f"{name} ran before it was approved"
        elif verbs.get("reject") == 0 and status != "cancelled":
            yield f"{name} was rejected, and is {status}"
        elif "reject" not in verbs and status == "cancelled":
            yield f"{name} was cancelled by nobody"
        elif name.startswith("ask-") and status == "completed" and approved is None:
            yield f"{name} asked, and completed without an answer"
        else:
            yield ""


def afters(facts: Facts) -> Iterator[str]:
    for name, said in list(facts.soak.facts.items()):
        if "after" not in said or not facts.ended[name]:
            continue
        before, status, runs = facts.status(said["after"]), facts.status(name), facts.runs[name]
        any_end = name.startswith("after-any:")
        first = [run.end for run in facts.runs[said["after"]] if run.code in (0, 65)]
        if status == "cancelled":
            yield f"{name} is cancelled: {before}" if any_end or before == "completed" else ""
        elif not any_end and before != "completed":
            yield f"{name} is {status}, and the one before {before}"
        else:
            early = runs and first and runs[0].begin < min(first)
            yield f"{name} began before {said['after']} had ended" if early else ""


def follow_ups(facts: Facts) -> Iterator[str]:
    """With --then and --chain, each completed task has its result and its next task, once."""
    done = Counter(row.name for row in facts.all_ended() if row.status == "completed")
    for name in done.keys() | (facts.results.keys() - {"first-results"}):
        same = facts.results[name] == done[name]
        yield "" if same else f"{name}: {done[name]} completed, {facts.results[name]} results"
        base, _, left = name.rpartition(":")
        if name.startswith("chain-") and left != "0":
            follows = len(facts.ended[f"{base}:{int(left) - 1}"])
            yield "" if follows == 1 else f"{name} is followed by {follows}"


def pauses(facts: Facts) -> Iterator[str]:
    runs = [run for runs in facts.runs.values() for run in runs if run.queue == "work"]
    for begin, end, claimed in facts.soak.facts["pauses"].get("all", ()):
        yield ""
        for run in runs:
            if begin < run.begin < end and run.name not in claimed:
                yield f"{run.name} began {(run.begin - begin) / 1e6:.0f} ms into a pause"


def beats(facts: Facts) -> Iterator[str]:
    beat, seen = facts.soak.facts["tick"]["beat"], set()
    for row in facts.ticks:
        which = int(unix(row.enqueued_at) - beat + 0.002)
        yield f"beat {which} fired twice" if which in seen else ""
        seen.add(which)
    yield "" if seen else "nothing recurred"


def unix(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC).timestamp()


RULES: dict[str, Callable[[Facts], Iterator[str]]] = {
    "lost": lost,
    "doubled": doubled,
    "two runs at once": at_once,
    "invented": invented,
    "batches torn": all_or_none,
    "dead before its attempts were spent": attempts,
    "groups out of order": groups,
    "slots exceeded": slots,
    "latest version lost": latest,
    "ttl": ttl,
    "delay": delays,
    "hold": holds,
    "after": afters,
    "then and chain": follow_ups,
    "pause": pauses,
    "every": beats,
}


# ---------------------------------------------------------------------------------------- summary


def report(soak: Soak) -> bool:
    """Print each breach, then the summary; return whether there was none."""
    facts = Facts(soak)
    breaches: Counter[str] = Counter()
    for rule, check in RULES.items():
        for words in check(facts):
            soak.checked[rule] += 1
            if words:
                soak.break_rule(rule, words)
    for rule, words in soak.broken:
        breaches[rule] += 1
        if breaches[rule] <= 10:
            print(f"BROKEN: {rule}: {words}")
    print("\n".join(summary(facts, breaches)))
    return not soak.broken


def summary(facts: Facts, breaches: Counter[str]) -> list[str]:
    soak, counts = facts.soak, facts.soak.counts
    status = Counter(row.status for row in facts.all_ended())
    runs = sum(map(len, facts.runs.values()))
    doubt = len(soak.tried.keys() - soak.accepted.keys() - soak.refused)
    disk = f"a disk of {DISK_MB} MB filled {len(soak.full)} times"
    return [
        f"soak of {soak.seconds:.0f} s on {time.strftime('%Y-%m-%d')}: seed {soak.seed}, Python "
        f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} processors",
        f"tasks: {len(soak.accepted):,} accepted, {len(soak.refused):,} refused, {doubt:,} in doubt as "
        f"their producer was killed; {listed(status)}; {runs:,} runs",
        "SIGKILL: " + listed(after("SIGKILL of ", counts)),
        "SIGSTOP: " + listed(after("SIGSTOP of ", counts))
        + f"; SIGTERM of workers {counts['SIGTERM of workers']:,}",
        (disk if soak.has_disk else "the small disk is left out: it takes root")
        + f"; {counts['cleanups']:,} cleanups, {counts['pauses']:,} pauses",
        "ended by themselves: " + (listed(after("", counts, " that ended with")) or "none"),
        *rule_lines(soak, breaches),
        f"most at once with {SLOTS} slots: {counts['most at once']}; done again, as nobody could know "
        f"that it had been done: {listed(facts.again) or 'none'}",
        "clean" if not soak.broken else f"NOT CLEAN: {listed(breaches)}",
    ]  # fmt: skip


def rule_lines(soak: Soak, breaches: Counter[str]) -> Iterator[str]:
    """Yield "rule: breaches of looks", three to a line."""
    names = [*soak.checked, *(breaches.keys() - soak.checked.keys())]
    words = [f"{name}: {breaches[name]:,} of {soak.checked[name]:,}" for name in names]
    for first in range(0, len(words), 5):
        yield "; ".join(words[first : first + 5])


def after(head: str, counts: Counter[str], part: str = "") -> dict[str, int]:
    return {
        name.removeprefix(head): count
        for name, count in counts.items()
        if name.startswith(head) and part in name
    }


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
