"""The outbox: push hands tasks over to the hub, and pull records how they ended."""

from __future__ import annotations

import time
from collections.abc import Iterator

import queue_helpers as q
from taskqueue import database, hub
from taskqueue import outcome as outcomes
from taskqueue import recovery as owners
from taskqueue.hub import HubRefused
from taskqueue.relay import STAYS, TICK_SECONDS, TIDY_SECONDS, Relay, address_of
from taskqueue.running import say
from taskqueue.text import plural

# One transaction carries at most so many tasks, and so many bytes of them.
BATCH, BATCH_BYTES = 200, 8 * 2**20
# How often pull looks for jobs that others ended.
SELDOM_SECONDS = 30.0

# The row's owner is the id of the handing over: whoever ends the task later must name it. claimed_at
# is the time when the hub had the task; until then push sends it again, and the hub ignores what it knows.
TAKE = f"""
update "{{queue}}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{{queue}}" where status < 2 and coalesce(task_id, '') not glob 'hub-*' and task_type <> '{STAYS}'
             order by priority desc, id limit :limit)"""
# A delayed task of a group waits here: on the hub it would hold up its group.
TAKE_SCHEDULED = f"""
update "{{queue}}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{{queue}}" where status = 3 and due_at is not null and group_id is null
             and coalesce(task_id, '') not glob 'hub-*' and task_type <> '{STAYS}' order by due_at limit :limit)"""
CAN_TAKE = f"""
select (exists (select 1 from "{{queue}}" where status < 2) or {q.IS_OVERDUE}
    or exists (select 1 from "{{queue}}" where status = 3 and due_at is not null and group_id is null))
  and not {q.IS_PAUSED}"""
UNSENT = """
select {task}, group_id, due_at, expires_at, own_attempts from "{queue}" where status = 5 and claimed_at is null
order by priority desc, id"""
IS_UNSENT = """
select exists (select 1 from "{queue}" where status = 5 and claimed_at is null)"""
# What another hub does not have, this hub gets under an id of its own: what was never sent, and what
# was sent to a hub that is no longer at its address.
TAKE_OVER = """
update "{queue}" set owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where status = 5 and owner glob 'hub-*-*' and owner not glob :prefix || '*'
  and (claimed_at is null or exists (select 1 from task_hubs where address = :address and owner glob 'hub-' || name || '-*'))"""
SENT = """
update "{queue}" set claimed_at = :now where id = :id and owner = :owner and status = 5"""
UNWANTED = """
select owner from "{queue}" where status = 5 and cancel_requested"""
HANDED_OVER = """
select owner, id, cancel_requested from "{queue}"
where status = 5 and claimed_at is not null and owner is not null"""
COME_HOME = """
update "{queue}" set attempts = attempts + :attempts, claimed_at = :started_at
where id = :id and owner = :owner and status = 5 returning {task}"""


class Push(Relay):
    """Hand the tasks of local queues over.

    A task first becomes the hub's in the local database, then it is sent, then marked as sent. Killed
    anywhere, the next push sends again what is not marked, and the hub ignores what it knows. A task
    of a group keeps the group's turn, so only the heads of groups are sent.
    """

    is_new_hub = True

    def begin(self, conn: q.Connection) -> None:
        for queue in self.args.queues:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            # Two of them would mix up the order within a group.
            self.lock("push", queue)
        say(f"push hands over {', '.join(self.args.queues)} as machine {self.machine}")

    def connected(self) -> None:
        self.is_new_hub = True

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            for complaint in q.take_in_spool(self.state)[1]:
                self.complain(complaint)
        if self.is_new_hub:
            self.take_over(conn)
        busy = True
        while busy and not self.stops:
            busy = any([self.push(conn, queue) for queue in self.args.queues])
        self.is_idle = True

    def take_over(self, conn: q.Connection) -> None:
        """Give this hub what no other hub has. One that was made anew has lost what it had."""
        self.heard()
        address = address_of(self.args.url)
        with q.transaction(conn):
            for queue in self.args.queues:
                told = {"prefix": self.hub.prefix, "address": address}
                q.execute(conn, TAKE_OVER, queue, **told)
            conn.execute("delete from task_hubs where address = ?", (address,))
            conn.execute(
                "insert or replace into task_hubs (name, address) values (?, ?)",
                (self.hub.name, address),
            )
        self.is_new_hub = False

    def push(self, conn: q.Connection, queue: str) -> int:
        """Take what is ready and send what is taken; return how many tasks that concerned."""
        if not q.execute(conn, IS_UNSENT, queue).fetchone()[0]:
            if not q.execute(conn, CAN_TAKE, queue, now=time.time()).fetchone()[0]:
                return 0
            self.take(conn, queue)
        tasks = list(self.unsent(conn, queue))
        if not tasks:
            return 0
        try:
            self.send(queue, tasks)
            sent = tasks
        except HubRefused:
            sent = self.send_one_by_one(conn, queue, tasks)
        now = time.time()
        with q.transaction(conn, durable=False):
            rows = [{"id": task.id, "owner": task.owner, "now": now} for task, *_ in sent]
            conn.executemany(q.on_queue(SENT, queue), rows)
        say(f"{queue}: {plural(len(sent), 'task')} handed over")
        return len(tasks)

    def take(self, conn: q.Connection, queue: str) -> None:
        """Make tasks the hub's: durably, since what was sent must never run here as well."""
        now = time.time()
        with q.transaction(conn):
            q.expire(conn, queue, now)
            q.promote(conn, queue, now)
            told = {"prefix": self.hub.prefix}
            q.execute(conn, TAKE_SCHEDULED, queue, **told, limit=BATCH // 2)
            q.execute(conn, TAKE, queue, **told, limit=BATCH)

    def unsent(self, conn: q.Connection, queue: str) -> Iterator[tuple]:
        """Yield (task, group, due_at, expires_at, own_attempts) of the tasks to send next."""
        room = BATCH_BYTES
        with owners.errors_explained(conn):
            for row in conn.execute(q.on_queue(UNSENT, queue)).fetchmany(BATCH):
                room -= len(row[3])
                if room < 0 and room + len(row[3]) < BATCH_BYTES:
                    return
                yield q.Task.from_row(queue, row[:-4]), *row[-4:]

    def send(self, queue: str, tasks: list[tuple]) -> None:
        """Defer the jobs of these tasks and note their ids, in one transaction.

        Times are sent as seconds from now, since clocks differ.
        """
        with self.hub.transaction() as pg:
            ids = [task.owner for task, *_ in tasks]
            known = {id for (id,) in pg.execute(hub.KNOWN, (ids,))}
            new = [told for told in tasks if told[0].owner not in known]
            if not new:
                return
            (now,) = pg.execute("select clock_timestamp()").fetchone()
            here = time.time()
            locks = [hub.clean(f"{queue}/{group}") if group else None for _, group, *_ in new]
            # Machines that share a group must not overtake each other in it.
            priorities = dict(pg.execute(hub.LOCK_PRIORITIES, ([*filter(None, locks)],)).fetchall())
            jobs = [
                hub.make_job(
                    queue,
                    task,
                    priority=priorities.setdefault(lock, task.priority) if lock else task.priority,
                    group=lock,
                    delay=0.0 if due_at is None else due_at - here,
                    now=now,
                )
                for (task, _, due_at, *_), lock in zip(new, locks, strict=True)
            ]
            jobs = self.hub.jobs.batch_defer_jobs(jobs, connection=pg)
            rows = [
                (task.owner, self.machine, queue, task.id, hub.clean(task.text), job.id,
                 max(1, (most or q.MAX_ATTEMPTS) - task.attempts),
                 None if expires is None else expires - here)
                for (task, _, _, expires, most), job in zip(new, jobs, strict=True)
            ]  # fmt: skip
            with pg.cursor() as cursor:
                cursor.executemany(hub.ARRIVE, rows)

    def send_one_by_one(self, conn: q.Connection, queue: str, tasks: list[tuple]) -> list[tuple]:
        """Send tasks alone and bury those that the hub cannot store; return the others."""
        sent = []
        for told in tasks:
            try:
                self.send(queue, [told])
                sent.append(told)
            except HubRefused as error:
                with q.transaction(conn):
                    q.bury(conn, told[0], error=str(error))
                say(f"{queue} {told[0].task_type} {told[0].task_id} failed: {error}")
        return sent

    def due_at(self, now: float) -> float:
        return now + q.sleep_seconds(q.connect(self.state), self.args.queues, TICK_SECONDS)


class Pull(Relay):
    """Record here how this machine's tasks ended on others."""

    seldom_at = lost_at = 0.0

    def begin(self, conn: q.Connection) -> None:
        self.hub.listens = (f"relay_{self.machine}",)
        q.ensure_queue(conn, q.TASK_QUEUE_COMPLETION)
        say(f"pull brings home the results of machine {self.machine}")

    def connected(self) -> None:
        self.lost_at = 0.0

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            self.cancel(conn)
        if time.monotonic() >= self.seldom_at:
            self.heard()
            with self.hub.transaction() as pg:
                pg.execute(hub.ENDED_OTHERWISE, (self.machine,))
            self.seldom_at = time.monotonic() + SELDOM_SECONDS
        if time.monotonic() >= self.lost_at:
            self.end_lost(conn)
            self.lost_at = time.monotonic() + TIDY_SECONDS
        while not self.stops and self.pull(conn):
            pass
        self.is_idle = True

    def cancel(self, conn: q.Connection) -> None:
        """Have the hub end the jobs of tasks that somebody cancelled here."""
        ids = []
        for queue in database.queues_of(conn):
            ids += [owner for (owner,) in q.execute(conn, UNWANTED, queue)]
        if ids:
            with self.hub.transaction() as pg:
                for (job_id,) in pg.execute(hub.UNWANTED_JOBS, (ids,)).fetchall():
                    self.hub.jobs.cancel_job_by_id(job_id, abort=True, connection=pg)
            self.seldom_at = 0.0

    def pull(self, conn: q.Connection) -> int:
        """Record a batch of ends here, then tell the hub; return how many."""
        with self.hub.transaction() as pg:
            ids, room = [], BATCH_BYTES
            for id, size in pg.execute(hub.ENDED, (self.machine,)).fetchall():
                room -= size
                if room < 0 and ids:
                    break
                ids.append(id)
            endings = pg.execute(hub.ENDINGS, (ids,)).fetchall() if ids else []
        if endings:
            self.bring_home(conn, endings)
            with self.hub.transaction() as pg:
                pg.execute(hub.HOME, (ids,))
        return len(endings)

    def end_lost(self, conn: q.Connection) -> None:
        """End the tasks that the hub has lost, or whose end it has told before.

        A backup brings back tasks whose ends came home; a hub's backup may lack tasks. What another hub
        may have is left alone.
        """
        here = {}
        for queue in database.queues_of(conn):
            rows = q.execute(conn, HANDED_OVER, queue).fetchall()
            here |= {id: (queue, row_id, unwanted) for id, row_id, unwanted in rows}
        if not here:
            return
        with self.hub.transaction() as pg:
            known = dict(pg.execute(hub.KNOWN_AND_HOME, (list(here),)).fetchall())
            knows_us = pg.execute(hub.IS_KNOWN_HERE, (self.machine,)).fetchone()[0]
            home = [id for id, is_home in known.items() if is_home]
            endings = pg.execute(hub.ENDINGS, (home,)).fetchall() if home else []
        lost = here.keys() - known.keys()
        lost_here = {id for id in lost if knows_us and id.startswith(self.hub.prefix)}
        if lost - lost_here:
            queues = ", ".join(sorted({here[id][0] for id in lost - lost_here}))
            self.complain(
                f"this hub does not know tasks of {queues} that are handed over: another hub may"
                " have them. Check TASK_QUEUE_HUB; push sends them again to a hub that was made"
                " anew; or give them up with tasks.py purge QUEUE --status handed_over"
            )
        why = "the hub does not know it any more"
        for id in lost_here:
            queue, row_id, unwanted = here[id]
            outcome = "cancelled" if unwanted else "failed"
            endings.append((id, queue, row_id, outcome, 0, None, None, None, None, why, None, None))
        for at in range(0, len(endings), BATCH):
            self.bring_home(conn, endings[at : at + BATCH])

    def bring_home(self, conn: q.Connection, endings: list[tuple]) -> None:
        """End these tasks here, durably; nothing happens to those that ended before."""
        queues, lines = set(database.queues_of(conn)), []
        with q.transaction(conn):
            for ending in endings:
                if ending[1] in queues:
                    lines += self.end_one(conn, *ending)
        q.wake(self.state)
        for line in lines:
            say(line)

    def end_one(
        self, conn, id, queue, row_id, outcome, attempts, age, code, result, log, error, reply, size
    ) -> list[str]:
        started_at = None if age is None else time.time() - age
        told = {"id": row_id, "owner": id, "attempts": attempts, "started_at": started_at}
        row = q.execute(conn, COME_HOME, queue, **told).fetchone()
        if row is None:
            return []
        task = q.Task.from_row(queue, row)

        def follow_ups() -> list[tuple[str, q.Row]]:
            return [(q.TASK_QUEUE_COMPLETION, outcomes.next_row(task, reply, size))]

        why = outcomes.Outcome(outcome, error)
        if reply is not None and outcome == "completed":
            why = outcomes.completed(conn, follow_ups)
        told = why._replace(exit_code=code, result=result, log=log)
        outcome, error, *_ = outcomes.record(conn, task, None, told)
        line = f"{queue} {task.task_type} {task.task_id} {outcome} attempt {task.attempts}"
        return [f"{line}: {error}" if error else line]
