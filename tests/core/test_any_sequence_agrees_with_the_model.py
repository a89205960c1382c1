"""Whatever is done to a queue in whatever order, it holds what a small model in plain Python holds.

The model knows no status numbers and no triggers: a task waits, runs, or is gone, and each group
has one turn and those in line for it. TASK_QUEUE_EXAMPLES=2000 looks deeper.
"""

import json
import os
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

import queue_helpers as q
from taskqueue import approval, control
from taskqueue import recovery as queue_owners
from taskqueue import wake as queue_wake

QUEUE = "notifications"
START = 1_800_000_000
MAX_ATTEMPTS = 3
EXAMPLES = int(os.environ.get("TASK_QUEUE_EXAMPLES", 0))
# Where waiting for the disk costs nothing: what is held here does not depend on it.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

groups = st.sampled_from([None, "a", "a", "b"])
priorities = st.integers(-1, 1)
delays = st.sampled_from([0, 0, 5, 20])
ttls = st.sampled_from([None, None, None, 8])
task_ids = st.sampled_from([None, None, "x", "y", "z"])
firings = st.sampled_from([None, "first", "second"])
owners = st.sampled_from(["one", "two"])
moments = st.integers(0, 1_000)


class Waiting(SimpleNamespace):
    """A task as the model knows it.

    state: ready, blocked (in its group's line), scheduled, held or running. `again`: it ran once
    and waits for its retry, with its group's turn.
    """


class Model:
    """What a queue is, in plain Python."""

    def __init__(self) -> None:
        self.now, self.tasks, self.turns, self.history = START, {}, {}, {}
        # None: not paused; else (until, by).
        self.pause, self.slots = None, None

    def find(self, task_id):
        return next((t for t in self.tasks.values() if task_id and t.task_id == task_id), None)

    def add(
        self,
        row_id,
        task_id,
        n,
        *,
        priority=0,
        group=None,
        due=None,
        hold=False,
        expires=None,
        firing=None,
        delayed=None,
    ):
        task = Waiting(
            id=row_id,
            task_id=task_id,
            n=n,
            priority=priority,
            group=group,
            due=due,
            expires=expires,
            firing=firing,
            rerun=None,
            again=False,
            approved=False,
            delayed=delayed,
            attempts=0,
            owner=None,
            state="held",
        )
        self.tasks[row_id] = task
        self.arrive(task, due, hold)
        return task

    def arrive(self, task, due, hold) -> None:
        task.due, task.state = due, "held" if hold else "scheduled"
        if not hold and due is None:
            self.come(task)

    def come(self, task) -> None:
        """It may run as soon as its group's turn is its own."""
        mine = task.group is None or self.turns.setdefault(task.group, task.id) == task.id
        task.state, task.due, task.again = "ready" if mine else "blocked", None, False
        task.delayed = None

    def pass_on(self, task) -> None:
        """If it had its group's turn, the next in line has it now: the highest priority, then the
        lowest id.
        """
        if task.group is not None and self.turns.get(task.group) == task.id:
            del self.turns[task.group]
            self.call_next(task.group)

    def call_next(self, group) -> None:
        line = [t for t in self.tasks.values() if t.group == group and t.state == "blocked"]
        if line and group not in self.turns:
            self.come(min(line, key=lambda t: (-t.priority, t.id)))

    def on_duplicate(self, task, how, n, due, firing, **terms) -> str:
        """A waiting task becomes the later one; a running one keeps it for when its run ends. What a
        person decides on does not change. The word that is told.
        """
        told_before = firing in {task.firing, task.rerun and task.rerun["firing"]} - {None}
        if how == "skip" or told_before or task.state == "held":
            return "duplicate"
        later = {"n": n, "due": due, "firing": firing, **terms}
        if task.state == "running":
            kept_is_held = task.rerun is not None and task.rerun["hold"]
            if kept_is_held or task.approved and how == "replace":
                return "duplicate"
            held = {"hold": True, "due": None, "delayed": None} if task.approved else {}
            task.rerun = later | held
            return "updated"
        if task.approved:
            return "duplicate"
        self.become(task, **later)
        return "updated"

    def become(self, task, n, due, firing, hold, priority, group, expires, delayed) -> None:
        """It keeps its row, and its group's turn where it can run at once."""
        task.n, task.firing, task.attempts, task.again, task.rerun = n, firing, 0, False, None
        task.priority, task.expires, task.delayed, was_in = priority, expires, delayed, task.group
        if was_in == group and task.state == "ready" and not hold and due is None:
            return
        had_turn = was_in is not None and self.turns.get(was_in) == task.id
        task.group, task.state, task.due = group, "held" if hold else "scheduled", due
        if not hold and due is None and had_turn and was_in == group:
            self.come(task)
            return
        if had_turn:
            del self.turns[was_in]
        if not hold and due is None:
            self.come(task)
        if had_turn:
            self.call_next(was_in)

    def end(self, task, outcome, new_id) -> None:
        approval = "held" if task.state == "held" else "approved" if task.approved else None
        told = (task.task_id, outcome, task.n, task.priority, task.group, approval)
        self.history[task.id] = told
        self.remove(task)
        if task.rerun:
            self.add(new_id(task.task_id), task.task_id, **task.rerun)

    def remove(self, task) -> None:
        del self.tasks[task.id]
        self.pass_on(task)

    def put_back(self, task, delay, counted) -> None:
        """It keeps its group's turn; where a later firing waits, it becomes that one."""
        task.state, task.owner, task.again = ("scheduled" if delay else "ready"), None, bool(delay)
        task.due, task.delayed = (self.now + delay, self.now) if delay else (None, None)
        task.attempts -= not counted
        if task.rerun and not task.approved:
            self.become(task, **task.rerun)

    def ask(self, task) -> None:
        """It is held with its group's turn, and keeps a later firing for its end."""
        task.state, task.owner, task.due, task.delayed = "held", None, None, None
        task.attempts, task.again = task.attempts - 1, True

    def is_due(self, task) -> bool:
        """Also where the clock was set back, and it would wait more than twice as long as it was told."""
        return task.state == "scheduled" and (
            task.due <= self.now
            or task.delayed is not None
            and 2 * task.delayed - task.due > self.now + 1
        )

    def overdue(self) -> list:
        return [
            t
            for t in self.tasks.values()
            if self.is_due(t) or t.expires is not None and t.expires <= self.now
        ]

    def catch_up(self) -> None:
        """End what has expired, and let run what is due, as each claim does."""
        for task in [
            t for t in self.tasks.values() if t.expires is not None and t.expires <= self.now
        ]:
            self.end(task, "expired", None)
        due = [t for t in self.tasks.values() if self.is_due(t)]
        for task in due:
            if task.group is None or task.again:
                self.come(task)
            else:
                task.state, task.due, task.delayed = "blocked", None, None
        for group in {t.group for t in due} - {None}:
            self.call_next(group)

    def paused(self) -> bool:
        if self.pause is None or self.pause[0] is None:
            return self.pause is not None
        until, _, at = self.pause
        return until > self.now and 2 * at - until <= self.now + 1

    def running(self) -> list:
        return [t for t in self.tasks.values() if t.state == "running"]

    def open_slots(self, limit) -> int:
        if self.paused():
            return 0
        return limit if self.slots is None else max(0, min(limit, self.slots - len(self.running())))

    def claim(self, owner, limit) -> list:
        self.catch_up()
        ready = sorted(
            (t for t in self.tasks.values() if t.state == "ready"),
            key=lambda t: (-t.priority, t.id),
        )
        taken = ready[: self.open_slots(limit)]
        for task in taken:
            task.state, task.owner, task.expires = "running", owner, None
            task.attempts += 1
        return taken


class Queue(RuleBasedStateMachine):
    """The same done to both."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.model, self.real_time, self.n, self.fds = Model(), q.time, 0, {}
        self.state = Path(tempfile.mkdtemp(dir=MEMORY)) / "state"
        clock = SimpleNamespace(
            **{name: getattr(time, name) for name in dir(time) if name[0] != "_"}
        )
        clock.time = lambda: float(self.model.now)
        q.time = control.time = queue_wake.time = clock
        self.conn = q.connect(self.state)
        # As bash opens one.
        self.bash = sqlite3.connect(self.state / "tasks.db", isolation_level=None)

    def teardown(self) -> None:
        q.time = control.time = queue_wake.time = self.real_time
        for fd in self.fds.values():
            os.close(fd)
        self.bash.close()
        q.close(self.conn)
        shutil.rmtree(self.state.parent)

    def write(self, verb, *args, **told):
        with q.transaction(self.conn, durable=False):
            return verb(self.conn, *args, **told)

    def new_id(self, task_id=None) -> int:
        """The row that a task was given; the newest where it has no id of its own."""
        where = "where task_id = ?" if task_id else "where ? is null"
        return self.bash.execute(f"select max(id) from {QUEUE} {where}", (task_id,)).fetchone()[0]

    # ------------------------------------------------------------------------------- it comes

    @rule(
        task_id=task_ids,
        group=groups,
        priority=priorities,
        delay=delays,
        hold=st.sampled_from([False, False, True]),
        ttl=ttls,
        how=st.sampled_from(["skip", "replace", "rerun"]),
        firing=firings,
    )
    def enqueue(self, task_id, group, priority, delay, hold, ttl, how, firing) -> None:
        self.n += 1
        options = {
            "group": group,
            "priority": priority,
            "hold": hold,
            "ttl": ttl,
            "on_duplicate": how,
            "firing": firing,
        }
        row = q.new_row("t", {"n": self.n}, task_id, delay=float(delay), **options)
        there = self.model.find(task_id)
        due = self.model.now + delay if delay and not hold else None
        terms = {
            "group": group,
            "priority": priority,
            "due": due,
            "hold": hold,
            "expires": None if ttl is None else (due or self.model.now) + ttl,
            "firing": firing,
            "delayed": None if due is None else self.model.now,
        }
        stored = self.write(q.store, QUEUE, row)
        said = "queued" if stored.is_new else "updated" if stored.is_updated else "duplicate"
        if there is not None:
            assert said == self.model.on_duplicate(there, how, self.n, **terms)
        else:
            assert said == "queued"
            self.model.add(self.new_id(row.task_id), row.task_id, self.n, **terms)

    @rule(
        group=groups,
        priority=priorities,
        delay=st.sampled_from([None, None, 5, 0, -5]),
        ttl=ttls,
        task_id=task_ids,
    )
    def bash_inserts(self, group, priority, delay, ttl, task_id) -> None:
        self.n += 1
        data = {"n": self.n}
        if task_id:
            data = {"task_id": task_id, "task_type": "t", "data": data}
        due, expires = (None if wait is None else self.model.now + wait for wait in (delay, ttl))
        stored = self.bash.execute(
            f"insert into {QUEUE} (data, priority, group_id, due_at, expires_at) values (?, ?, ?, ?, ?)",
            (json.dumps(data), priority, group, due, expires),
        ).rowcount
        assert stored == (self.model.find(task_id) is None)
        if stored:
            self.model.add(
                self.new_id(task_id),
                task_id,
                self.n,
                priority=priority,
                group=group,
                due=due,
                expires=expires,
            )

    # -------------------------------------------------------------------------------- it runs

    @rule(target=claims, owner=owners, limit=st.integers(1, 3))
    def claim(self, owner, limit):
        if owner not in self.fds:
            q.make_private(self.state / "workers")
            self.fds[owner] = q.lock_file(self.state / "workers" / owner)
        # So that no two claims are the same. A kept firing's times are JSON, with 15 digits from older SQLites.
        self.model.now += 1 / 32
        found, _ = q.look(self.conn, QUEUE)
        tasks = self.write(q.claim, QUEUE, owner, limit=limit, max_attempts=MAX_ATTEMPTS)
        expected = self.model.claim(owner, limit)
        assert [t.id for t in tasks] == [t.id for t in expected]
        assert [t.data["n"] for t in tasks] == [t.n for t in expected]
        assert found or not tasks
        for there, task in zip(expected, tasks, strict=True):
            there.claim = task
        return tasks

    def held(self, task):
        """The model's task while that claim holds it."""
        there = self.model.tasks.get(task.id)
        return there if there and there.state == "running" and there.claim == task else None

    @rule(
        tasks=claims,
        ending=st.sampled_from(["ack", "nack", "bury", "release", "ask"]),
        delay=delays,
        which=moments,
    )
    def end(self, tasks, ending, delay, which) -> None:
        """Also by one that has lost the task since: then nothing changes."""
        if tasks:
            self.end_task(tasks[which % len(tasks)], ending, delay)

    @rule(
        ending=st.sampled_from(["ack", "nack", "nack", "bury", "release", "ask"]),
        delay=delays,
        which=moments,
    )
    def end_one_that_runs(self, ending, delay, which) -> None:
        running = self.model.running()
        if running:
            self.end_task(running[which % len(running)].claim, ending, delay)

    def end_task(self, task, ending, delay) -> None:
        there = self.held(task)
        if ending == "ack":
            assert self.write(q.ack, task) == (there is not None)
            there and self.model.end(there, "completed", self.new_id)
        elif ending == "bury":
            assert self.write(q.bury, task, error="no") == (there is not None)
            there and self.model.end(there, "failed", self.new_id)
        elif ending == "ask":
            assert self.write(approval.ask, task, "why", None) == (there is not None)
            there and self.model.ask(there)
        elif ending == "release":
            assert self.write(q.release, task, delay=float(delay)) == (there is not None)
            there and self.put_back(there, delay, counted=False)
        else:
            said = self.write(q.nack, task, error="no", delay=float(delay))
            assert said == (None if there is None else self.failed(there, delay))

    def failed(self, there, delay) -> str:
        if there.attempts >= MAX_ATTEMPTS:
            self.model.end(there, "failed", self.new_id)
            return "failed"
        self.put_back(there, delay, counted=True)
        return "scheduled"

    def put_back(self, there, delay, counted) -> None:
        self.model.put_back(there, delay, counted)
        there.released = self.model.now

    @rule(owner=owners, delay=delays)
    def die(self, owner, delay) -> None:
        """Take back what it held, as whoever looks does; the other one is alive."""
        if owner not in self.fds:
            return
        os.close(self.fds.pop(owner))
        recovered, orphans = queue_owners.recover(self.state, crash_backoff=float(delay))
        mine = sorted((t for t in self.model.running() if t.owner == owner), key=lambda t: t.id)
        assert orphans == 0 and sorted(task.id for task, *_ in recovered) == [t.id for t in mine]
        for task in mine:
            self.failed(task, delay)

    # ------------------------------------------------------------------------- people meddle

    @rule(which=moments, how=st.sampled_from(["cancel", "purge", "approve", "reject"]))
    def meddle(self, which, how) -> None:
        waiting = [t for t in self.model.tasks.values() if t.state != "running"]
        if not waiting:
            return
        # Rather those that have a turn and do not run.
        waiting.sort(key=lambda task: not task.again)
        task = waiting[which % len(waiting)] if which % 2 else waiting[0]
        if how == "purge":
            self.bash.execute(f"delete from {QUEUE} where id = ?", (task.id,))
            self.model.remove(task)
        elif how == "cancel":
            row = self.bash.execute(
                q.on_queue(f"select {{task}} from {QUEUE} where id = ?", QUEUE), (task.id,)
            ).fetchone()
            assert self.write(q.finish, q.Task.from_row(QUEUE, row), "cancelled")
            self.model.end(task, "cancelled", self.new_id)
        elif how == "approve":
            assert self.write(approval.approve, QUEUE, task.id) == (task.state == "held")
            if task.state == "held":
                task.approved = True
                self.model.come(task)
        else:
            assert self.write(approval.reject, QUEUE, task.id, "too late") == (task.state == "held")
            task.state == "held" and self.model.end(task, "cancelled", self.new_id)

    @rule(which=moments)
    def redrive(self, which) -> None:
        if not self.model.history:
            return
        row_id = sorted(self.model.history)[which % len(self.model.history)]
        task_id, _, n, priority, group, approval = self.model.history[row_id]
        [(history_id,)] = self.bash.execute(
            "select id from task_history where row_id = ?", (row_id,)
        ).fetchall()
        there = self.model.find(task_id)
        assert self.write(queue_owners.redrive, QUEUE, history_id) == (there is None)
        if there is None:
            del self.model.history[row_id]
            firing = self.bash.execute(
                f"select data ->> '$.firing' from {QUEUE} where id = ?", (row_id,)
            ).fetchone()[0]
            told = {"priority": priority, "group": group, "firing": firing}
            task = self.model.add(row_id, task_id, n, hold=approval == "held", **told)
            task.approved = approval == "approved"

    @rule(seconds=st.sampled_from([None, 0, 5, 20]), by=st.sampled_from(["person", "handler"]))
    def pause(self, seconds, by) -> None:
        """The later end wins, and none is later than any."""
        until = None if seconds is None else self.model.now + seconds
        ends = [
            float("inf") if end is None else end for end in ((self.model.pause or (0,))[0], until)
        ]
        wins = not self.model.paused() or ends[1] > ends[0]
        assert self.write(control.pause_queue, QUEUE, until, "why", by=by) == wins
        if wins:
            self.model.pause = (until, by, self.model.now)

    @rule()
    def resume(self) -> None:
        assert self.write(control.resume_queue, QUEUE) == (self.model.pause is not None)
        self.model.pause = None

    @rule(slots=st.sampled_from([None, None, 1, 2]))
    def limit(self, slots) -> None:
        self.write(control.limit_slots, QUEUE, slots)
        self.model.slots = slots

    @rule(seconds=st.sampled_from([1, 5, 10, 30, -3, -30]))
    def time_passes(self, seconds) -> None:
        """Or the clock is set back."""
        self.model.now += seconds

    # ------------------------------------------------------------------------- what must hold

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        word = q.STATUS_WORD.replace("'pending'", "'ready'").replace("'in_progress'", "'running'")
        rows = self.bash.execute(f"""select id, {word}, task_id, coalesce(data ->> '$.data.n', data ->> '$.n'), priority,
          group_id, due_at, expires_at, attempts, owner, rerun ->> '$[0]' ->> '$.data.n', approved, released_at is not null
          from {QUEUE}""").fetchall()
        assert sorted(rows) == sorted(
            (t.id, t.state, t.task_id, t.n, t.priority, t.group, t.due, t.expires, t.attempts, t.owner,
             t.rerun and t.rerun["n"], t.approved, t.again) for t in self.model.tasks.values())  # fmt: skip
        finished = self.bash.execute("select row_id, status from task_history").fetchall()
        assert sorted(finished) == sorted(
            (row_id, told[1]) for row_id, told in self.model.history.items()
        )

    @invariant()
    def each_group_has_one_turn_and_nobody_waits_for_nothing(self) -> None:
        """Read from the database alone."""
        counted = self.bash.execute(f"""
          select group_id, sum(status = 2), sum(status < 3 or status = 3 and released_at is not null), sum(status = 4) from {QUEUE}
          where group_id is not null group by group_id""").fetchall()
        for group, running, turns, blocked in counted:
            assert running <= 1 and turns <= 1, group
            assert turns or not blocked, f"{group} is stuck"
        assert self.bash.execute(
            f"select count(*) from {QUEUE} where status = 4 and group_id is null"
        ).fetchone() == (0,)

    @invariant()
    def who_sleeps_is_woken_and_does_not_spin(self) -> None:
        """Where a claim finds nothing, nothing is due in the past; where it would, a look says so."""
        model = self.model
        found, overdue = q.look(self.conn, QUEUE)
        anything = any(t.state == "ready" for t in model.tasks.values()) or model.overdue()
        assert overdue == bool(model.overdue())
        assert found == bool(anything and model.open_slots(1))
        when = q.next_due(self.conn, QUEUE)
        if not found:
            assert when is None or when > model.now
        if when is None and model.open_slots(1):
            assert not any(t.state == "scheduled" for t in model.tasks.values())

    @invariant()
    def controls_say_what_holds_it_back(self) -> None:
        held = control.controls_of(self.conn).get(QUEUE)
        model = self.model
        assert (held is not None and held.paused) == model.paused()
        if model.paused():
            assert (held.until, held.by) == model.pause[:2]
        assert (held and held.slots) == model.slots


# Hypothesis makes a failure small, which may take five minutes.
@pytest.mark.timeout(0 if EXAMPLES else 400)
def test_any_sequence_agrees_with_the_model():
    run_state_machine_as_test(
        Queue,
        settings=settings(
            max_examples=EXAMPLES or 100,
            stateful_step_count=50,
            deadline=None,
            derandomize=not EXAMPLES,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
