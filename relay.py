#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8"]
# ///
"""Have tasks run on another machine: push them to a hub, fetch them there, pull the results home.

    relay.py init                      prepare the hub, once
    relay.py push builds               here: hand this queue's tasks over
    relay.py pull                      here: record how they ended; results go into completions
    relay.py fetch builds --reply      there: take tasks into that machine's own queue, for its worker
    relay.py status                    show both ends side by side
    relay.py machines                  list the machines, when each was last heard, what waits for it

The hub is a PostgreSQL database with Procrastinate's schema. Its URL comes from --url, from
TASK_QUEUE_HUB, or from the one line of ~/.claude/automation/lychee/hub, a file that only you may
read (chmod 600). All users of a machine can see arguments, so --url takes no password.

Hooks write to the local database, so nobody waits for a network. A pushed task is handed_over until
pull has recorded its end, and keeps its group's turn meanwhile. A fetched task is an ordinary task of
the machine that fetched it: worker.py runs it, and list, logs, cancel and pause work on it. While the
hub cannot be used, tasks wait where they are. push, pull and fetch run until SIGTERM or Ctrl-C; with
--drain, they end when there is nothing left to do.

machines forget NAME ends and deletes what a lost machine pushed, and gives its jobs to others.
adopt NAME takes over what a machine pushed, so that pull brings its results here.

exit codes: 0 done or stopped; 1 the hub or the database cannot be used; 64 usage; 75 the database
is locked.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import queue_helpers as q
from taskqueue import cli, database, hub
from taskqueue.environment import Unfit, private_text
from taskqueue.hub import Hub
from taskqueue.inbox import Fetch
from taskqueue.outbox import Pull, Push
from taskqueue.relay import machine_id
from taskqueue.remedies import remedies_as_typed
from taskqueue.running import say, start_clean
from taskqueue.service import environment_file
from taskqueue.text import plural, span

# Seconds without a heartbeat after which another machine's jobs count as abandoned.
STALLED_SECONDS = 60.0

ADOPTED = """
insert into "{queue}" (data, status, owner, claimed_at) values (:data, 5, :owner, :now) returning id"""
IS_ADOPTED = """
select id from "{queue}" where status = 5 and owner = :owner"""
LOCAL_COUNTS = f"""
select {q.STATUS_WORD} as word, count(*) from "{{queue}}" group by 1"""


def init(args: argparse.Namespace) -> int:
    """Prepare the hub; safe to call twice."""
    there = Hub(args.url)
    made = there.prepare()
    there.close()
    cli.report(args.json, {"ready": True, "made": made}, "the hub is ready")
    return 0


def machines(args: argparse.Namespace) -> int:
    """List the machines, or forget one."""
    conn, there = q.connect(), Hub(args.url)
    me = machine_id(conn)
    if args.forget:
        return forget(there, args.forget, me, args.json)
    with there.transaction() as pg:
        rows = pg.execute(hub.MACHINES).fetchall()
    names = ("machine", "heard_seconds_ago", "waiting", "results", "running")
    told = [dict(zip(names, row, strict=True)) | {"is_this": row[0] == me} for row in rows]
    lines = [
        f"{each['machine']}  heard {span(each['heard_seconds_ago'])} ago"
        f"  pushed: {each['waiting']} waiting, {each['results']} results to pull"
        f"  runs {plural(each['running'], 'job')}{'  (this machine)' if each['is_this'] else ''}"
        for each in told
    ]
    cli.report(args.json, told, "\n".join(lines) or "the hub knows no machine yet")
    return 0


def forget(there: Hub, name: str, me: str, as_json: bool) -> int:
    """End and delete what a machine pushed, and give the jobs that it has to others."""
    if name == me:
        raise cli.Refused(f"{name} is this machine: its tasks end with tasks.py cancel")
    with there.transaction() as pg:
        jobs = [job_id for (job_id,) in pg.execute(hub.OPEN_JOBS_OF, (name,)).fetchall()]
        for job_id in jobs:
            there.jobs.cancel_job_by_id(job_id, abort=True, connection=pg)
        given_up = pg.execute(hub.RUN_BY, (name,)).fetchall()
        for job_id, id, tried in given_up:
            there.give_up_job(job_id, id, tried)
        gone = sum(pg.execute(statement, (name,)).rowcount for statement in hub.FORGET)
    if not gone:
        raise cli.Refused(f"the hub knows no machine {name}; see: relay.py machines")
    told = {"machine": name, "ended": len(jobs), "given_up": len(given_up)}
    text = f"{name} is forgotten: {plural(len(jobs), 'task')} ended, {plural(len(given_up), 'job')} given to others"
    cli.report(as_json, told, text)
    return 0


def adopt(args: argparse.Namespace) -> int:
    """Take over what a machine pushed: its tasks are handed over from here, and pull ends them here."""
    conn, there = q.connect(), Hub(args.url)
    me = machine_id(conn)
    if args.name == me:
        raise cli.Refused(f"{args.name} is this machine")
    with there.transaction() as pg:
        rows = pg.execute(hub.TO_ADOPT, (args.name,)).fetchall()
    if not rows:
        raise cli.Refused(f"machine {args.name} has nothing on this hub; see: relay.py machines")
    for queue in {queue for _, queue, *_ in rows}:
        q.ensure_queue(conn, queue)
    for id, queue, text, _ in rows:
        # Killed in between, the next adopt finds the row again.
        with q.transaction(conn):
            row = q.execute(conn, IS_ADOPTED, queue, owner=id).fetchone()
            told = {"data": text, "owner": id, "now": time.time()}
            row = row or q.execute(conn, ADOPTED, queue, **told).fetchone()
        if row is None:
            say(f"{queue}: a task with the id of {id} is here already; its result stays on the hub")
            continue
        with there.transaction() as pg:
            pg.execute(hub.ADOPT, (me, row[0], id, args.name))
    text = f"{plural(len(rows), 'task')} of {args.name} adopted: relay.py pull brings the results"
    cli.report(args.json, {"machine": args.name, "adopted": len(rows)}, remedies_as_typed(text))
    return 0


def status(args: argparse.Namespace) -> int:
    """Show both ends side by side."""
    conn, there, trouble = q.connect(), Hub(args.url), None
    machine = machine_id(conn)
    here = {}
    for queue in database.queues_of(conn):
        here[queue] = dict(q.execute(conn, LOCAL_COUNTS, queue).fetchall())
    away: dict[str, dict] = {}
    try:
        with there.transaction() as pg:
            for queue, word, count in pg.execute(hub.COUNTS):
                away.setdefault(queue, {})[HUB_WORDS[word]] = count
            for queue, open_tasks, results in pg.execute(hub.OF_MACHINE, (machine,)):
                away.setdefault(queue, {}).update(from_here=open_tasks, results=results)
    except q.QueueError as error:
        trouble = str(error)
    queues = {
        name: {"here": here.get(name, {}), "hub": away.get(name, {})}
        for name in sorted(here.keys() | away.keys())
        if here.get(name) or away.get(name)
    }
    told = {"machine": machine, "trouble": trouble, "queues": queues}
    cli.report(args.json, told, "\n".join(in_words(told)))
    return 1 if trouble else 0


HUB_WORDS = {"todo": "waiting", "doing": "running", "failed": "failed"}


def in_words(told: dict) -> Iterator[str]:
    """Yield the lines of status for a person."""
    yield f"machine {told['machine']}"
    rows = [("queue", "here", "hub")]
    for name, ends in told["queues"].items():
        counts = [
            ", ".join(f"{count} {word}" for word, count in ends[end].items() if count) or "-"
            for end in ("here", "hub")
        ]
        rows.append((name, counts[0], "?" if told["trouble"] else counts[1]))
    wide = [max(len(row[at]) for row in rows) for at in (0, 1)]
    for name, here, away in rows:
        yield f"{name:{wide[0]}}  {here:{wide[1]}}  {away}".rstrip()
    if told["trouble"]:
        yield told["trouble"]


# fmt: off
def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("relay.py", __doc__)
    common = cli.Parser(add_help=False)
    common.add_argument("--url",
        help="of the hub: postgresql://USER@HOST/DATABASE (default: $TASK_QUEUE_HUB, else the hub file)")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=what, description=what)

    push = add("push", "hand the tasks of local queues over")
    pull = add("pull", "bring results home")
    fetch = add("fetch", "take tasks into this machine's own queue")
    for one in (push, fetch):
        one.add_argument("queues", metavar="QUEUE", nargs="+")
    for one in (push, pull, fetch):
        one.add_argument("--drain", action="store_true", help="end when there is nothing left to do")
    fetch.add_argument("--at-most", type=cli.whole_number, default=1, metavar="N",
        help="tasks of each queue at a time on this machine (default 1); slots and pauses count, too")
    fetch.add_argument("--reply", action="store_true",
        help="send what handlers print home, where it becomes tasks in completions")
    fetch.add_argument("--trust", action="store_true",
        help="keep the fields that grant rights, like permission_mode, of tasks from the hub")
    fetch.add_argument("--stalled-after", type=cli.duration, default=STALLED_SECONDS, metavar="DURATION",
        help="give up the jobs of a machine that was silent for so long (default %(default)g)")
    init, status = add("init", "prepare the hub, once"), add("status", "show both ends side by side")
    machines = add("machines", "list the machines; machines forget NAME ends what a lost one left")
    machines.add_argument("forget", nargs="*", metavar="forget NAME")
    adopt = add("adopt", "take over what a machine pushed: pull brings its results here")
    adopt.add_argument("name", metavar="NAME")
    for one in (init, status, machines, adopt):
        one.add_argument("--json", action="store_true", help="for scripts")
    return parser
# fmt: on


def hub_file() -> Path:
    """Return the file that holds the hub's URL, beside the environment file of workers."""
    return environment_file(Path(q.__file__).resolve().parent).with_name("hub")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    file = hub_file()
    if args.url and re.search("//.*:.*@|password *=", args.url):
        parser.error(
            "--url has a password, and all users of this machine can see arguments: write the URL"
            f" into {file} (chmod 600), or the password into ~/.pgpass"
        )
    try:
        args.url = args.url or os.environ.get("TASK_QUEUE_HUB") or private_text(file).strip()
    except Unfit as error:
        parser.error(str(error))
    if not args.url:
        parser.error(
            "which hub? Give --url postgresql://USER@HOST/DATABASE, set TASK_QUEUE_HUB, or write the"
            f" URL into {file}"
        )
    # The message does not repeat it: a password may be in it.
    if not re.match(r"postgres(ql)?://|\w+ *=", args.url):
        parser.error("the hub's URL is not of the form postgresql://USER@HOST/DATABASE")
    if args.verb == "machines":
        words = args.forget
        if words and (len(words) != 2 or words[0] != "forget"):
            parser.error("give machines alone, or machines forget NAME")
        args.forget = words[1] if words else None
    try:
        args.queues = list(dict.fromkeys(map(q.check_queue_name, getattr(args, "queues", ()))))
        for queue in args.queues:
            if len(queue) > hub.LONGEST_QUEUE:
                most = hub.LONGEST_QUEUE
                raise ValueError(
                    f"queue {queue!r}: on the hub, a name has at most {most} characters"
                )
        if args.verb == "fetch" and args.stalled_after < 1:
            raise ValueError("--stalled-after is at least 1 second")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    start_clean()
    args = parse(argv)
    verbs = {"init": init, "status": status, "machines": machines, "adopt": adopt}
    loops = {"push": Push, "pull": Pull, "fetch": Fetch}
    if args.verb in verbs:
        return cli.run("relay.py", lambda: verbs[args.verb](args))
    return cli.run("relay.py", lambda: loops[args.verb](args).run())


if __name__ == "__main__":
    raise SystemExit(main())
