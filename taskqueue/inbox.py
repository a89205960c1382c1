"""The inbox: fetch takes the hub's jobs into this machine's own queue, and returns how they ended."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import queue_helpers as q
from taskqueue import hub, show
from taskqueue import outcome as outcomes
from taskqueue.control import controls_of
from taskqueue.hub import HubRefused
from taskqueue.relay import STAYS, TICK_SECONDS, TIDY_SECONDS, Relay
from taskqueue.running import say
from taskqueue.text import plural

# One transaction takes at most so many jobs.
BATCH = 200

FETCHED = """
select task_id, id, status, attempts from "{queue}" where task_id glob 'hub-*'"""
FETCHED_END = """
select row_id, status, attempts, exit_code, result, log, error from task_history
where queue = :queue and task_id = :task_id order by id desc limit 1"""
SET_ATTEMPTS = """
update "{queue}" set own_attempts = :most where task_id = :task_id"""
CANCEL_RUNNING = """
update "{queue}" set cancel_requested = 1 where id = :id and status = 2"""
CANCEL_WAITING = """
select {task} from "{queue}" where id = :id and status not in (2, 5)"""


class Expired(Exception):
    """The task's time is over."""


@dataclass
class Held:
    """A job of the hub that this machine has."""

    id: str
    fetches: int
    job_id: int
    queue: str
    aborted: bool = False
    is_local: bool = False

    @property
    def task_id(self) -> str:
        """The id of its task in the local queue."""
        return f"{self.id}-{self.fetches}"


class Fetch(Relay):
    """Take the hub's jobs into this machine's own queue, and return how they ended.

    The hub's ledger names the machine that has a job, and counts how often it was fetched: that fences
    the job's end. A killed fetch loses nothing: the next one asks the hub what this machine holds,
    and the local queue and history what became of it.
    """

    def begin(self, conn: q.Connection) -> None:
        for queue in self.args.queues:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            self.lock("fetch", queue)
        channels = [f"procrastinate_queue_v1#{queue}" for queue in self.args.queues]
        self.hub.listens = tuple(channels)
        self.held: dict[str, Held] = {}
        self.looked, self.next_due = False, 0.0
        self.beat_at = self.sweep_at = self.tidy_at = 0.0
        say(f"fetch takes {', '.join(self.args.queues)} for machine {self.machine}")

    def connected(self) -> None:
        """Beat before sweeping: machines that lost the hub together get the time to show that they live."""
        self.worker_id: int | None = None
        self.beat_at, self.looked = 0.0, False
        self.sweep_at = time.monotonic() + self.args.stalled_after

    def step(self, conn: q.Connection) -> None:
        for told in self.hub.told():
            self.looked = False
            if "abort_job_requested" in told:
                self.beat_at = 0.0
        now = time.monotonic()
        if now >= self.beat_at:
            self.beat(conn)
        if self.changed:
            self.changed = False
            self.return_ends(conn)
        if now >= self.sweep_at:
            self.sweep()
        if now >= self.next_due:
            self.looked = False
        while not self.stops and not self.looked:
            self.fetch(conn)
        self.is_idle = not self.held

    def due_at(self, now: float) -> float:
        return min(now + TICK_SECONDS, self.beat_at, self.sweep_at, self.next_due)

    # ------------------------------------------------------------------------------- signs of life

    def beat(self, conn: q.Connection) -> None:
        """Show that this machine lives, and make the local queue agree with what the hub says it holds."""
        self.heard()
        self.beat_at = time.monotonic() + min(10.0, self.args.stalled_after / 4)
        with self.hub.transaction() as pg:
            if self.worker_id is None:
                self.worker_id = hub.at_once(self.hub.jobs.register_worker())
            hub.at_once(self.hub.jobs.update_heartbeat(self.worker_id))
            rows = pg.execute(hub.HELD, (self.machine, self.args.queues)).fetchall()
        self.held = {held.task_id: held for held in (Held(*row) for row in rows)}
        self.agree(conn)

    def agree(self, conn: q.Connection) -> None:
        """Cancel local copies of jobs that are not ours any more or not wanted; store what is missing."""
        tries = []
        for queue in self.args.queues:
            for task_id, row_id, status, attempts in q.execute(conn, FETCHED, queue).fetchall():
                held = self.held.get(task_id)
                if held is None:
                    why = "its job was given to another machine"
                    self.cancel_local(conn, queue, row_id, status, why)
                    continue
                held.is_local = True
                if held.aborted:
                    self.cancel_local(conn, queue, row_id, status, "cancelled where it came from")
                if attempts:
                    tries.append((attempts, held.id, self.machine, held.fetches, attempts))
        self.return_ends(conn)
        for held in [each for each in self.held.values() if not each.is_local]:
            # A fetch was killed before it stored this one.
            with self.hub.transaction() as pg:
                content = pg.execute(hub.CONTENT, (held.id,)).fetchone()
            self.store(conn, [(held, *content)])
        if tries:
            with self.hub.transaction() as pg, pg.cursor() as cursor:
                cursor.executemany(hub.TRYING, tries)

    def cancel_local(
        self, conn: q.Connection, queue: str, row_id: int, status: int, why: str
    ) -> None:
        """End a local copy: a running one by its worker."""
        with q.transaction(conn):
            if q.execute(conn, CANCEL_RUNNING, queue, id=row_id).rowcount:
                return
            row = q.execute(conn, CANCEL_WAITING, queue, id=row_id).fetchone()
            if row is not None:
                q.finish(conn, q.Task.from_row(queue, row), "cancelled", error=why)
        q.wake(self.state)

    # ------------------------------------------------------------------------------------- fetching

    def free(self, conn: q.Connection) -> dict[str, int]:
        """Return the free places of each queue that has some."""
        controls, places = controls_of(conn), {}
        for queue in self.args.queues:
            control = controls.get(queue)
            most = self.args.at_most
            if control is not None:
                most = 0 if control.paused else min(most, control.slots or most)
            places[queue] = most - sum(held.queue == queue for held in self.held.values())
        return {queue: count for queue, count in places.items() if count > 0}

    def fetch(self, conn: q.Connection) -> None:
        """Take jobs for the free places in one transaction of the hub, then store them here."""
        taken, free = [], self.free(conn)
        with self.hub.transaction() as pg:
            while free and len(taken) < BATCH:
                call = self.hub.jobs.fetch_job(list(free), self.worker_id)
                job = hub.at_once(call)
                if job is None:
                    break
                held, *content = self.take(pg, job)
                free[job.queue] -= 1
                free = {queue: count for queue, count in free.items() if count > 0}
                taken.append((held, *content))
            self.looked = not taken
            if not taken:
                (due,) = pg.execute(hub.NEXT_DUE, (self.args.queues,)).fetchone()
                wait = TICK_SECONDS if due is None else max(due, 0.0)
                self.next_due = time.monotonic() + min(TICK_SECONDS, wait)
        self.held |= {held.task_id: held for held, *_ in taken}
        self.store(conn, taken)

    def take(self, pg: Any, job: Any) -> tuple:
        """Note in the ledger that this machine has a job; return it as Held, and its content."""
        row = pg.execute(hub.TAKEN, (self.machine, job.id)).fetchone()
        if row is None:
            # Another program deferred it; or its end is known, and somebody had the hub try it again.
            pg.execute(hub.STRAY, (f"{self.hub.prefix}job-{job.id}", job.queue, job.id))
            row = pg.execute(hub.TAKEN, (self.machine, job.id)).fetchone()
        id, fetches, text, tried, most, ttl = row
        held = Held(id, fetches, job.id, job.queue)
        return held, job.task_name, job.task_kwargs, job.priority, text, tried, most, ttl

    def store(self, conn: q.Connection, taken: list[tuple]) -> None:
        """Store fetched jobs in the local queue; end on the hub those that cannot be stored."""
        refused, rows = [], []
        for held, *content in taken:
            try:
                rows.append((held, *self.row_of(held, *content)))
            except (q.InvalidTask, ValueError, RecursionError) as error:
                refused.append((held, "failed", str(error)))
            except Expired:
                refused.append((held, "expired", "it was not started before its time was over"))
        if rows:
            with q.transaction(conn):
                for held, row, most in rows:
                    q.insert(conn, held.queue, row)
                    q.execute(conn, SET_ATTEMPTS, held.queue, most=most, task_id=held.task_id)
                    held.is_local = True
            q.wake(self.state)
            for queue, number in Counter(held.queue for held, *_ in rows).items():
                say(f"{queue}: {plural(number, 'task')} fetched")
        for held, outcome, error in refused:
            self.end_job(held, outcome, error=error)

    def row_of(self, held, task_name, args, priority, text, tried, most, ttl) -> tuple[q.Row, int]:
        """Return the local row of a job, and how many attempts it has left. Raises InvalidTask, Expired."""
        if ttl is not None and ttl <= 0:
            raise Expired
        relay = args.get("relay") if isinstance(args, dict) else None
        task_id, task_type = f"{held.queue}-{held.job_id}", task_name
        if isinstance(relay, dict):
            if text is None:
                raise q.InvalidTask("its end is known where it came from: retry it there")
            task_id = str(relay.get("task_id"))
        else:
            # Another program deferred it: its arguments are the payload.
            text = q.to_json(args)
        blank = dict.fromkeys(q.Task._fields)
        told = {
            "queue": held.queue,
            "id": 0,
            "task_id": task_id,
            "task_type": task_type,
            "text": text,
        }
        task = q.Task(**{**blank, **told, "enqueued_at": time.time()})
        if task_type == STAYS:
            raise q.InvalidTask(f'a task of type "{STAYS}" runs on its own machine alone')
        source = {"queue": held.queue, "task_id": task_id}
        # The hub grants no rights, unless this machine trusts it.
        granted = task.envelope.get("granted") if self.args.trust else {}
        how = {
            "priority": priority,
            "depth": task.depth,
            "source": source,
            "granted": granted,
            "ttl": ttl,
        }
        row = q.new_row(task_type, task.data, held.task_id, **how)
        return row, max(1, (most or q.MAX_ATTEMPTS) - tried)

    # ------------------------------------------------------------------------------------ returning

    def return_ends(self, conn: q.Connection) -> None:
        """Tell the hub how local copies ended: the history keeps it until the hub knows."""
        for held in list(self.held.values()):
            told = {"queue": held.queue, "task_id": held.task_id}
            row = conn.execute(FETCHED_END, told).fetchone()
            if row is None:
                continue
            row_id, outcome, attempts, code, result, log, error = row
            how = dict(attempts=attempts, exit_code=code, result=result, log=log, error=error)
            if self.args.reply and outcome == "completed":
                how["reply"], how["reply_bytes"] = self.output_of(held.queue, row_id, result)
            self.end_job(held, outcome, **how)

    def output_of(self, queue: str, row_id: int, kept: str | None) -> tuple[str, int]:
        """Return what a handler printed, from its log where that is still there, and its whole size."""
        runs = show.runs_of({"queue": queue, "id": row_id})
        if runs:
            text, size = outcomes.read_output(f"{runs[-1].path}.out", outcomes.RESULT_BYTES)
            if size:
                return text, size
        return kept or "", len((kept or "").encode())

    def end_job(self, held: Held, outcome: str, **how: Any) -> None:
        """End a job on the hub, if this machine still has it."""
        try:
            is_ours = self.end_on_hub(held, outcome, how)
        except HubRefused as error:
            why = f"its end could not be recorded: {error}"
            is_ours, outcome = self.end_on_hub(held, "failed", {"error": why}), "failed"
        self.held.pop(held.task_id, None)
        self.looked = False
        became = outcome if is_ours else "was given to another machine"
        error = f": {how['error']}" if how.get("error") else ""
        say(f"{held.queue} {held.task_id} {became}{error}")

    def end_on_hub(self, held: Held, outcome: str, how: dict) -> bool:
        with self.hub.transaction() as pg:
            fence = (held.id, self.machine, held.fetches)
            if pg.execute(hub.HOLD_JOB, fence).fetchone() is None:
                return False
            self.hub.end_job(held.job_id, held.id, outcome, **how)
            return True

    def end(self) -> None:
        if self.hub.conn is not None and self.worker_id is not None and not self.stops:
            try:
                with self.hub.transaction():
                    hub.at_once(self.hub.jobs.unregister_worker(self.worker_id))
            except q.QueueError:
                pass
        super().end()

    def sweep(self) -> None:
        """Give up the jobs of machines that the hub has not heard for --stalled-after."""
        self.sweep_at = time.monotonic() + self.args.stalled_after / 2
        silent = (q.MAX_ATTEMPTS, self.args.queues, self.args.stalled_after)
        with self.hub.transaction() as pg:
            for job_id, id, runner, tried, most, aborted, now in pg.execute(
                hub.ABANDONED, silent
            ).fetchall():
                error = f"its machine {runner} was silent for too long"
                if aborted or tried >= most:
                    outcome = "cancelled" if aborted else "failed"
                    self.hub.end_job(
                        job_id, id, outcome, error=f"{error} (attempt {tried} of {most})"
                    )
                else:
                    self.hub.give_up_job(job_id, id, tried, now)
                say(f"job {id}: {error}; it is given to another")
                self.looked = False
        if time.monotonic() >= self.tidy_at:
            self.tidy_at = time.monotonic() + TIDY_SECONDS
            with self.hub.transaction() as pg:
                for statement in hub.TIDY:
                    pg.execute(statement)
                hub.at_once(self.hub.jobs.prune_stalled_workers(3_600.0))
