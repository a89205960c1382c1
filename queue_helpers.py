"""The task queue: one SQLite database, one table per queue, no server.

    enqueue            claim                 ack
    ───────> ready ───────────> claimed ────────────> history: completed
      delay    ^                   │ nack, crash or timeout, attempts left (back-off)
      └> scheduled <───────────────┤
                                   └ attempts spent, or a permanent failure ──> history: failed
                                                                     (redrive puts it back)
    held: scheduled without a time, until a person approves it
    blocked: until its group's turn comes; tasks of one group run one at a time

A task is a row; its `data` is the envelope {"task_id", "task_type", "enqueued_at", "data"}, and any
other JSON object is taken as a bare payload (bash inserts those). A claimed row names its owner, and
an owner is a lock file in STATE_DIR/workers that the kernel frees the instant its process dies:
whoever gets that lock may recover the dead owner's tasks. Every change that leaves `claimed` names
the owner and the attempt it expects, so a late or foreign ack changes nothing.

This file is all that enqueuing, claiming and acknowledging need, with the standard library alone. It
reads from top to bottom: constants, the schema, the statements, tasks and errors, the turn,
connections and transactions, the verbs in a task's order, which owners run. The modules beside
it are loaded when one of their names is first asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import stat
import threading
import time
from collections import namedtuple
from contextlib import nullcontext, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from functools import lru_cache, partial
from pathlib import Path

# Type checkers take this for true. To import typing would cost each hook 2 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

VERSION = "0.2.0"


def _find_state() -> tuple[Path, str | None]:
    """Return the state directory, and why TASK_QUEUE_STATE is ignored (None: it is not)."""
    # A relative one would be another in every workspace: that of the account is meant.
    if not os.path.isabs(os.environ.get("HOME", "/")):
        del os.environ["HOME"]
        os.environ["HOME"] = os.path.expanduser("~")
    # Installed scripts lie in PREFIX/runtime/lib, and their state in PREFIX/state.
    prefix = Path(__file__).resolve().parents[2]
    if not (prefix / "installed.json").exists():
        prefix = Path("~/.claude/automation/lychee").expanduser()
    named = os.path.expanduser(os.environ.get("TASK_QUEUE_STATE") or prefix / "state")
    # Under LC_ALL=C the bytes of a name that is not ASCII are surrogates: the name is its bytes.
    if os.path.isabs(named) and not re.search(
        rb"[\0-\x1f\x7f]|\xc2[\x80-\x9f]", os.fsencode(named)
    ):
        return Path(named), None
    # A relative path would mean another directory for each process.
    complaint = f"TASK_QUEUE_STATE {named!r} is not an absolute path: give one, or unset it"
    return prefix / "state", complaint


STATE_DIR, state_complaint = _find_state()
QUEUE_DB = STATE_DIR / "tasks.db"
# The path for QueueWatcher and watchdog.
QUEUE_PATH = STATE_DIR

TASK_QUEUE_NOTIFICATION = "notifications"
TASK_QUEUE_APPROVAL = "approvals"
TASK_QUEUE_COMPLETION = "completions"
DEFAULT_QUEUES = (TASK_QUEUE_NOTIFICATION, TASK_QUEUE_APPROVAL, TASK_QUEUE_COMPLETION)

SCHEMA_VERSION = 4
# How long one wait for the write lock may take.
BUSY_TIMEOUT_MS = 5_000
# How often a waiting writer polls: those behind, and the first in line.
POLL_SECONDS = (0.003, 0.0002)
# After missing its turn, a writer skips the line for this long: its holder may be stopped.
NO_TURN_SECONDS = 1.0
# How often, and for how long, writers that wait for each other leave the lock to those who take no turn.
OTHERS_EVERY_SECONDS, OTHERS_SECONDS = 1.0, 0.05
MAX_ATTEMPTS = 4
# Before the second attempt; it doubles with each one after.
BACKOFF_SECONDS = 1.0
BACKOFF_CAP_SECONDS = 3_600
# Tasks that are enqueued by handlers of tasks that are enqueued by handlers …
MAX_DEPTH = 16
# The view is one compound SELECT, which SQLite limits to 500 terms.
MAX_QUEUES = 200
# A checkpoint cuts the write-ahead log to this size.
WAL_BYTES = 16 * 2**20
# A sleeping consumer looks this often whatever the events say.
SAFETY_TICK_SECONDS = 5.0
# Claims that find a task do without a look of their own for this long.
LOOK_SECONDS = 0.01
# How long to wait for a lock that others may hold while they look at it.
PROBE_SECONDS = 0.2
# How many tasks that expire or become due one transaction takes, so that nobody waits for long.
AT_ONCE = 200
# Times in the database lie between 1970 and the year 3000.
LAST_SECOND = 32_503_680_000
# The owner of a row that was marked as claimed by hand.
NOBODY = "nobody"

# persist-queue also writes 0 for ready, and selects `status < 2`. What relay.py handed over to
# another machine is nobody's here until it hears how that ended.
READY, CLAIMED, SCHEDULED, BLOCKED, HANDED_OVER, AFTER = 1, 2, 3, 4, 5, 6

# ------------------------------------------------------------------------ schema and statements

HISTORY_SCHEMA = """
create table if not exists task_history (
  id            integer primary key,
  queue         text not null,
  row_id        integer not null,                -- the id it had in its queue; never used again there
  task_id       text not null,
  task_type     text not null,
  status        text not null check (status in ('completed', 'failed', 'cancelled', 'expired')),
  data          text not null,
  priority      integer not null default 0,
  group_id      text,
  attempts      integer not null default 0,
  max_attempts  integer,
  approval      text check (approval in ('held', 'approved')),  -- null: it needed none
  enqueued_at   text not null,                   -- times are UTC: YYYY-MM-DD HH:MM:SS.SSS
  started_at    text,                            -- of the last attempt
  completed_at  text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  exit_code     integer,                         -- of the handler; 128 + n for signal n
  result        text,                            -- the end of its stdout
  log           text,                            -- the end of its stderr
  error         text,                            -- why it failed, in one line
  cost_usd      real,                            -- of all its attempts; null: nothing is known
  cost_at_least integer not null default 0 check (cost_at_least in (0, 1))  -- an attempt left no result
);
create index if not exists "task_history.completed_at" on task_history (completed_at, queue, task_type, status);
create index if not exists "task_history.type" on task_history (queue, task_type, status, completed_at, started_at, enqueued_at);
create index if not exists "task_history.task_id" on task_history (task_id);
create index if not exists "task_history.failed" on task_history (queue, completed_at) where status = 'failed';
create table if not exists task_controls (       -- what holds a queue back; no row: nothing
  queue         text primary key,
  paused_at     real check (paused_at between 0 and {last_second}),     -- Unix seconds; null: not paused
  paused_until  real check (paused_until between 0 and {last_second}),  -- null: until a person resumes it
  pause_reason  text,
  paused_by     text check (paused_by in ('person', 'handler')),
  slots         integer check (slots is null or typeof(slots) = 'integer' and slots > 0), -- that run at a time
  bound_usd     real check (bound_usd > 0),      -- its runs cost no more in any bound_seconds
  bound_seconds real check ((bound_usd is null) = (bound_seconds is null) and bound_seconds > 0)
);
create table if not exists task_costs (          -- of each attempt that cost something
  id            integer primary key,
  queue         text not null,
  row_id        integer not null,                -- of the task
  ended_at      real not null check (ended_at between 0 and {last_second}),  -- when the attempt did
  cost_usd      real not null check (cost_usd >= 0),  -- that counts: its own budget, if it left no result
  told_usd      real check (told_usd >= 0),      -- by its handler
  at_least      integer not null default 0 check (at_least in (0, 1))
);
create index if not exists "task_costs.ended_at" on task_costs (queue, ended_at, cost_usd);
create index if not exists "task_costs.task" on task_costs (queue, row_id, ended_at);
create table if not exists task_marks (          -- the last row of the history that was reported
  workspace     text primary key,
  history_id    integer not null
);
create table if not exists task_told (           -- the last result that was reported
  workspace     text not null,
  task_type     text not null,
  directory     text not null,
  told          text not null,
  primary key (workspace, task_type, directory)
);
create table if not exists task_after (          -- the tasks that wait for another's end
  after_queue   text not null,
  after_id      integer not null,
  after_task    text not null,                   -- the other's task_id, for people
  queue         text not null,                   -- the one that waits: its status is 6, or it is held
  row_id        integer not null,
  whatever      integer not null default 0 check (whatever in (0, 1)),  -- it runs however the other ended
  ended         text,                            -- how the other ended, until this one is told
  primary key (after_queue, after_id, queue, row_id)
) without rowid;
create index if not exists "task_after.waits" on task_after (queue, row_id);
create index if not exists "task_after.ended" on task_after (ended) where ended is not null;
create trigger if not exists "task_history.ends" after insert on task_history
  when exists (select 1 from task_after where after_queue = new.queue and after_id = new.row_id)
  begin update task_after set ended = new.status || coalesce(': ' || new.error, '')
    where after_queue = new.queue and after_id = new.row_id; end;
create table if not exists task_every (          -- what comes again and again: see taskqueue/every.py
  name          text primary key check (length(name) between 1 and 200),  -- each firing's task_id
  queue         text not null,
  task_type     text not null,
  data          text not null check (json_type(data) = 'object'),
  schedule      text not null,                   -- '0 9 * * 1-5' or '6h'
  terms         text not null default '{{}}' check (json_type(terms) = 'object'),  -- the options of tq add
  is_on         integer not null default 1 check (is_on in (0, 1)),
  next_at       real not null check (next_at between 0 and {last_second}),  -- it fires then, Unix seconds
  set_at        real not null check (set_at between 0 and {last_second}),   -- when next_at was set
  last_at       real check (last_at between 0 and {last_second})            -- when it fired last
);
create table if not exists task_spooled (
  file          text primary key                 -- taken in, and perhaps not yet removed
);
"""

# Every column that steers has a CHECK; for SQLite any text is greater than any number. task_id and
# task_type are read out of data by SQLite itself, so that no writer can forget or fake them. A bare
# payload has no task_id of its own (null, and nulls never collide): it is called <queue>-<id>.
QUEUE_SCHEMA = """
create table "{queue}" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check ({is_object}),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0)  -- enqueued, Unix seconds
                check (timestamp between 0 and {last_second}),
  status        integer not null default 1       -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over, 6 after another
                check (typeof(status) = 'integer' and status between 0 and 6 and (status <> 4 or group_id is not null and released_at is null)),
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0       -- counted at the claim
                check (typeof(attempts) = 'integer' and attempts between 0 and 1000000000),
  owner         text check (owner is null or typeof(owner) = 'text'),  -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real check (claimed_at between 0 and {last_second}),
  delayed_at    real check (delayed_at between 0 and {last_second}),   -- due_at is a delay from then; null: a moment
  released_at   real check (released_at between 0 and {last_second}),  -- put back for later: it keeps its group's turn
  approved      integer not null default 0 check (approved in (0, 1)), -- by a person: it takes no new data
  own_attempts  integer                          -- the task's own maximum, instead of the claimer's
                check (own_attempts is null or typeof(own_attempts) = 'integer' and own_attempts > 0),
  timeout       real check (timeout > 0 and timeout <= {last_second}),  -- the task's own, in seconds
  asks          text check (json_type(asks) = 'object'),               -- a held task's: approval puts these into its payload
  max_attempts  integer                          -- these five: what the claimer wants done when the run ends,
                check (max_attempts is null or typeof(max_attempts) = 'integer' and max_attempts > 0),
  backoff       real check (backoff between 0 and {last_second}),      -- whoever records that
  then_queue    text,
  then_hold     integer not null default 0 check (then_hold in (0, 1)),
  chain         integer not null default 0 check (chain in (0, 1)),
  budget_usd    real check (budget_usd >= 0),    -- while it runs: reserved of the queue's bound
  cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),  -- the owner ends the run
  rerun         text                             -- a later firing, for when the run ends: INSERT's values
                check (json_array_length(rerun) in (8, 10) and json_type(json_extract(rerun, '$[0]')) = 'object'),
  error         text,                            -- of the last failed attempt
  is_envelope   integer generated always as ({is_envelope}) virtual,
  task_id       text generated always as (iif(is_envelope, nullif(json_extract(data, '$.task_id'), ''), null))
                stored unique on conflict ignore,
  task_type     text generated always as (coalesce(nullif(case when is_envelope then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name') end, ''),
                '{queue}')) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (coalesce(due_at, 0) between 0 and {last_second} and coalesce(expires_at, 0) between 0 and {last_second}),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
create index "{queue}.ready" on "{queue}" (priority desc, id, task_type, timestamp) where status < 2;
create index "{queue}.claimed" on "{queue}" (owner) where status = 2;
create index "{queue}.scheduled" on "{queue}" (due_at) where status = 3;
create index "{queue}.delayed" on "{queue}" (2 * delayed_at - due_at) where status = 3 and delayed_at is not null;
create index "{queue}.handed_over" on "{queue}" (claimed_at) where status = 5;
create index "{queue}.expiring" on "{queue}" (expires_at) where expires_at is not null;
create index "{queue}.blocked" on "{queue}" (id) where status in (4, 6);
create index "{queue}.group" on "{queue}" (group_id, status, released_at, priority desc, id) where group_id is not null;
create trigger "{queue}.waits at insert" after insert on "{queue}"
  when (new.status < 2 or new.status = 4) and (new.due_at is not null or new.group_id is not null)
    or new.status = 6 and not {waits_for_another}
  begin update "{queue}" set status = iif(due_at is not null, 3, iif({group_is_busy}, 4, 1))
    where id = new.id and (due_at is not null or status in (4, 6) or {group_is_busy}); end;
create trigger "{queue}.waits at update" after update of status, group_id on "{queue}"
  when new.status < 2 and old.status > 2 and (new.group_id is not null or old.due_at is null)
    or new.group_id is not old.group_id and (new.status < 2 or new.status = 4)
  begin update "{queue}" set status = iif(old.status = 3 and {waits_for_another}, 6, iif(new.group_id is not null and {group_is_busy}, 4, 1)),
    approved = approved or old.status = 3 and old.due_at is null where id = new.id; end;
create trigger "{queue}.free at update" after update of status on "{queue}" 
  when old.status = 6 and new.status <> 6 and not (new.status = 3 and new.due_at is null)
  begin {forget_waiting}; end;
create trigger "{queue}.free at delete" after delete on "{queue}" when old.status in (3, 6)
  begin {forget_waiting}; end;
create trigger "{queue}.next at update" after update of status, group_id on "{queue}"
  when old.group_id is not null and {old_has_turn} and not ({new_has_turn} and new.group_id is old.group_id)
  begin {next_of_group}; end;
create trigger "{queue}.next at delete" after delete on "{queue}"
  when old.group_id is not null and {old_has_turn}
  begin {next_of_group}; end
"""
IS_OBJECT = "typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'"
IS_ENVELOPE = (
    "json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text'"
    " and json_type(data, '$.task_id') = 'text'"
)
# A group's turn belongs to its ready or claimed task, to one that another machine has, or to one that waits
# for its retry.
HAS_TURN = (
    "({row}.status < 3 or {row}.status = 5 or {row}.status = 3 and {row}.released_at is not null)"
)
GROUP_IS_BUSY = """(
    exists (select 1 from "{queue}" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "{queue}" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id))"""
NEXT_OF_GROUP = """update "{queue}" set status = 1 where id = (
      select b.id from "{queue}" b where b.group_id = {group} and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "{queue}" where group_id = {group} and status in (0, 1, 2, 5))
    and not exists (select 1 from "{queue}" where group_id = {group} and status = 3 and released_at >= 0)"""

WAITS_FOR_ANOTHER = "exists (select 1 from task_after where queue = '{queue}' and row_id = new.id)"
FORGET_WAITING = "delete from task_after where queue = '{queue}' and row_id = old.id"

# A row's status, in words.
STATUS_WORD = """case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over' when 6 then 'blocked'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end"""
VIEW_SCHEMA = """
create view task_queue as
{arms}select queue, task_id, task_type, status, data, enqueued_at, started_at, completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, {max_attempts}) - 1 as max_retries, error as error_message
from task_history
"""
VIEW_ARM = """select '{queue}' as queue, coalesce(task_id, '{queue}-' || id) as task_id, task_type,
  {status_word} as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, {max_attempts}) - 1 as max_retries, error as error_message
from "{queue}" union all
"""

QUEUES = """
select i.tbl_name from sqlite_master i where i.type = 'index' and i.name = i.tbl_name || '.ready' order by i.tbl_name"""
INSERT = """
insert into "{queue}" (data, status, due_at, priority, group_id, expires_at, timestamp, delayed_at) values (?, ?, ?, ?, ?, ?, ?, ?)"""
# Not the same firing, told once more.
IS_NEWS = """(:firing is null or coalesce(json_extract(data, '$.firing'), '') <> :firing
  and coalesce(json_extract(json_extract(rerun, '$[0]'), '$.firing'), '') <> :firing)"""
# A waiting task becomes the later firing, with all its terms. One that is held, or was approved, does not change.
REPLACE = f"""
update "{{queue}}"
set data = :data, status = :status, due_at = :due_at, priority = :priority, group_id = :group_id, expires_at = :expires_at,
    timestamp = :timestamp, delayed_at = :delayed_at, own_attempts = :own_attempts, timeout = :timeout,
    released_at = null, attempts = 0, error = null, rerun = null
where task_id = :task_id and not approved and (status in (0, 1, 4, 6) or status = 3 and due_at is not null) and {IS_NEWS}"""
# One that runs, here or elsewhere, keeps it for when its run ends; an approved one's rerun is held then. A kept
# firing that will be held does not change either.
RERUN = f"""
update "{{queue}}"
set rerun = json_array(:data, iif(approved, 3, :status), iif(approved, null, :due_at), :priority, :group_id, :expires_at,
                       :timestamp, iif(approved, null, :delayed_at), :own_attempts, :timeout)
where task_id = :task_id and status in (2, 5) and (not approved or :on_duplicate = 'rerun') and {IS_NEWS}
  and (rerun is null or rerun ->> 1 <> 3 or rerun ->> 2 is not null)"""
SET_OWN = """
update "{queue}" set own_attempts = :own_attempts, timeout = :timeout where id = :id"""
FINISHED_SINCE = """
select exists (select 1 from task_history where task_id = :task_id and queue = :queue
  and enqueued_at > :since and enqueued_at < :until and (:firing is null or json_extract(data, '$.firing') = :firing))"""

# A delay or a pause that has more than twice as long to go as it was asked for is over: the clock was set back.
IS_PAUSED = """exists (select 1 from task_controls where queue = '{queue}' and paused_at is not null
  and (paused_until is null or paused_until > :now and 2 * paused_at - paused_until <= :now + 1))"""
# Of the queue's bound: what runs have cost lately, and what running ones may still cost.
COUNTED = """round((select total(cost_usd) from task_costs where queue = '{queue}'
      and ended_at > :now - bound_seconds and ended_at < :now + bound_seconds)
    + (select total(budget_usd) from "{queue}" where status = 2), 6)"""
# How many of :limit tasks may be claimed now.
OPEN_SLOTS = f"""coalesce((select case when {IS_PAUSED} then 0
    when bound_usd is not null and bound_usd <= {COUNTED} then 0 when slots is null then :limit
    else max(0, min(:limit, slots - (select count(*) from "{{queue}}" where status = 2))) end
  from task_controls where queue = '{{queue}}'), :limit)"""
HAS_BOUND = (
    """exists (select 1 from task_controls where queue = '{queue}' and bound_usd is not null)"""
)
DUE = """select id from "{queue}" where status = 3 and due_at <= :now
  union all select id from "{queue}" where status = 3 and delayed_at is not null and 2 * delayed_at - due_at > :now + 1"""
IS_OVERDUE = f"""(exists ({DUE}) or exists (select 1 from "{{queue}}" where expires_at <= :now and status not in (2, 5)))"""
LOOK = f"""
select exists (select 1 from "{{queue}}" where status < 2), {IS_OVERDUE}, {OPEN_SLOTS.replace(":limit", "1")} > 0"""
COUNT_CLAIMED = """
select count(*) from "{queue}" where status = 2"""
PROMOTE = f"""
update "{{queue}}"
set status = iif(group_id is null or released_at is not null, 1, 4), due_at = null, delayed_at = null, released_at = null
where id in ({DUE} limit {AT_ONCE}) returning group_id"""
UNBLOCK = NEXT_OF_GROUP.replace("{group}", ":group_id")
EXPIRED = f"""
select {{task}} from "{{queue}}" where expires_at <= :now and status not in (2, 5) limit {AT_ONCE}"""
CLAIM = f"""
update "{{queue}}"
set status = 2, owner = :owner, claimed_at = :now, attempts = attempts + 1, expires_at = null, max_attempts = coalesce(own_attempts, :max_attempts),
    backoff = :backoff, then_queue = :then_queue, then_hold = :then_hold, chain = :chain
where id in (select id from "{{queue}}" where status < 2 order by priority desc, id limit {OPEN_SLOTS})
returning {{task}}, {HAS_BOUND}"""
CLAIM_ROW = CLAIM.replace("order by priority desc, id limit", "and id = :id limit")
CLAIMED_BY = """select {task} from "{queue}" where status = 2 and owner is :owner"""

# owner and claimed_at are null unless claimed, so this is the fence: this row, this owner, this claim.
FENCE = "where id = :id and owner is :owner and attempts = :attempts and claimed_at is :claimed_at"
# A retry by hand has a new timestamp, and begins with nothing spent.
OF_TASK = (
    "from task_costs where queue = '{queue}' and row_id = task.id and ended_at >= task.timestamp"
)
# A row's id is greater than every mark: rows go, and an id that came again would be one told already.
ARCHIVE = f"""
insert into task_history (id, queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
                          approval, enqueued_at, started_at, completed_at, exit_code, result, log, error, cost_usd, cost_at_least)
select (select max(coalesce(max(id), 0), (select coalesce(max(history_id), 0) from task_marks)) + 1 from task_history),
       '{{queue}}', id, coalesce(task_id, '{{queue}}-' || id), task_type, :status, data, priority,
       group_id, attempts, max_attempts, case when status = 3 and due_at is null then 'held' when approved then 'approved' end,
       :enqueued_at, :started_at, :completed_at, :exit_code, :result, :log, :error,
       (select sum(cost_usd) {OF_TASK}), (select coalesce(max(at_least), 0) {OF_TASK})
from "{{queue}}" as task {FENCE}"""
REMOVE = """delete from "{queue}" where id = :id returning rerun"""
RELEASE = f"""
update "{{queue}}"
set status = iif(:delay > 0, 3, 1), due_at = iif(:delay > 0, :now + :delay, null), delayed_at = iif(:delay > 0, :now, null),
    released_at = iif(:delay > 0, :now, null), owner = null, claimed_at = null, cancel_requested = 0,
    attempts = max(attempts - :uncounted, 0), error = coalesce(:error, error)
{FENCE} returning task_id, rerun"""

TASK_COLUMNS = """id, task_id, task_type, data, timestamp, priority, attempts, max_attempts, backoff, then_queue,
  then_hold, chain, owner, claimed_at, timeout"""


def check_queue_name(name: str) -> str:
    """Return a queue's name that is safe within SQL. Raises InvalidTask."""
    if isinstance(name, str) and re.fullmatch(r"(?!task_|sqlite_)[a-z][a-z0-9_]{0,62}", name):
        return name
    reserved = isinstance(name, str) and name.startswith(("task_", "sqlite_"))
    why = "is reserved" if reserved else "is not a queue name"
    wanted = "use a lower-case letter, then up to 62 of a-z, 0-9 and _"
    raise InvalidTask(f"queue {name!r} {why}: {wanted}")


@lru_cache(4096)
def on_queue(statement: str, queue: str) -> str:
    """Return one of the statements above for this queue's table. Raises InvalidTask."""
    return statement.format(queue=check_queue_name(queue), task=TASK_COLUMNS)


def execute(conn: sqlite3.Connection, statement: str, queue: str, **values) -> sqlite3.Cursor:
    """Run one of the statements above on a queue's table. Raises a QueueError."""
    try:
        return conn.execute(on_queue(statement, queue), values)
    except sqlite3.Error as error:
        raise explain(error, getattr(conn, "state", STATE_DIR)) from error
    except OverflowError as error:
        raise InvalidTask(f"a number was refused: {error}") from None


# ----------------------------------------------------------------------------- tasks and errors


class QueueError(Exception):
    """The queue could not do what was asked; the message says what, why and what to do."""


class InvalidTask(QueueError, ValueError):
    """The task, or the queue's name, was refused. Nothing was stored."""


class QueueBusy(QueueError):
    """The write lock was not had within the busy time. Trying again may help."""


class QueueUnavailable(QueueError):
    """The database cannot be used: missing, unreadable, full, damaged, or of a newer version."""


# The meaning of SQLite's errors, by the beginnings of their names.
_MEANINGS = (
    ("SQLITE_BUSY SQLITE_LOCKED", QueueBusy,
     "{db} is locked by another process: {text}; find who holds it with: fuser -v '{db}'"),
    ("SQLITE_CONSTRAINT_CHECK JSON", InvalidTask,
     "the task was refused: {text}; data is a JSON object, nested 1000 deep at most"),
    ("SQLITE_TOOBIG", InvalidTask,
     "the task was refused: it is larger than SQLite can store (1 GB)"),
    ("SQLITE_FULL", QueueUnavailable,
     "{db}: the disk is full; free some space: df -h '{state}'"),
    ("SQLITE_NOTADB SQLITE_CORRUPT", QueueUnavailable,
     "{db} is damaged or not a database ({text}); put a backup in its place with: tasks.py restore BACKUP"),
    ("SQLITE_READONLY SQLITE_CANTOPEN SQLITE_PERM SQLITE_IOERR", QueueUnavailable,
     "{db} cannot be used ({text}); check that it exists and is yours: ls -la '{state}'"),
    ("", QueueUnavailable, "{db}: {text}"),
)  # fmt: skip


def explain(error: sqlite3.Error, state: Path) -> QueueError:
    """Return the QueueError that explains an error of SQLite."""
    name, text = getattr(error, "sqlite_errorname", "") or "", str(error)
    if "JSON" in text and not name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        # "malformed JSON" comes from the generated columns.
        name = "JSON"
    elif isinstance(error, sqlite3.DataError):
        name = "SQLITE_TOOBIG"
    elif name == "SQLITE_IOERR_SHORT_READ":
        # So it is after a write-ahead log was removed: SQLite remembers the old one until the last is closed.
        for conn in _process.of(state):
            conn.file, conn.seen = None, None
    elif text.startswith("no such table"):
        for conn in _process.of(state):
            conn.queues.clear()
    for names, kind, message in _MEANINGS:
        if name.startswith(tuple(names.split()) or ""):
            return kind(message.format(db=state / "tasks.db", state=state, text=text))
    raise AssertionError("the last meaning is any error's")


# A named tuple, since importing dataclasses would cost a hook 8 ms.
_Task = namedtuple(
    "_Task",
    "queue id task_id task_type text enqueued_at priority attempts max_attempts backoff then_queue "
    "then_hold chain owner claimed_at timeout",
    defaults=(None,),
)


class Task(_Task):
    """A claimed task. `id` is its row, `text` what was stored (JSON), times are Unix seconds.

    docs/reference.md says what each attribute is.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        attempt = f"attempt {self.attempts} of {self.max_attempts or MAX_ATTEMPTS}"
        return f"<Task {self.task_id!r} of {self.queue}: {self.task_type}, {attempt}>"

    @classmethod
    def from_row(cls, queue: str, row: tuple) -> Task:
        """Return the task of a row of TASK_COLUMNS."""
        return cls(queue, row[0], row[1] or f"{queue}-{row[0]}", *row[2:])

    @property
    def envelope(self) -> dict:
        """{"task_id", "task_type", "enqueued_at", "data", …}, also for a bare payload.

        Raises ValueError or RecursionError where Python cannot read the stored JSON.
        """
        stored = parse_json(self.text)
        names = {"task_id": self.task_id, "task_type": self.task_type}
        is_envelope = isinstance(stored.get("data"), dict) and names.keys() <= stored.keys()
        # A hook's payload may look like an envelope: it must not grant itself anything.
        is_envelope = is_envelope and "hook_event_name" not in stored
        shell = stored if is_envelope and stored["task_id"] == self.task_id else {"data": stored}
        granted = {"granted": {}} if "hook_event_name" in shell["data"] else {}
        return {**names, "enqueued_at": utc(self.enqueued_at), **granted, **shell, **names}

    @property
    def data(self) -> dict:
        """The payload."""
        return self.envelope["data"]

    @property
    def depth(self) -> int:
        """Return how many handlers stand before this task in its chain; 0 for most."""
        depth = self.envelope.get("depth")
        return depth if type(depth) is int and depth > 0 else 0

    @property
    def run_name(self) -> str:
        """The name of this run's files in STATE_DIR/logs, without their endings."""
        at = int((self.claimed_at or 0) * 1e6)
        return f"{self.queue}/{self.id}-{self.attempts}-{self.owner}-{at}"

    def unreadable(self) -> str | None:
        """Return why the stored JSON cannot be read, or None: SQLite takes some that Python does not."""
        try:
            dict(self.envelope)
            return None
        except (ValueError, RecursionError) as error:
            return f"data cannot be read: {error}"


def utc(seconds: float) -> str:
    """Return Unix seconds as UTC, the way the database has times: YYYY-MM-DD HH:MM:SS.SSS.

    A time before 1970 or after 3000 becomes the nearest of the two.
    """
    whole, milliseconds = divmod(round(min(max(seconds, 0), LAST_SECOND) * 1000), 1000)
    return f"{_whole_seconds(whole)}.{milliseconds:03d}"


@lru_cache(8)
def _whole_seconds(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


# One rule for JSON: what is stored is JSON that any reader reads.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_quote = json.encoder.encode_basestring


def to_json(value: object) -> str:
    """Return a value as JSON text for the database. Raises InvalidTask for what JSON cannot say."""
    try:
        text = _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidTask(f"the task was refused: {error}; data must be a JSON object") from None
    # A lone surrogate is legal in JSON as an escape, but not in UTF-8.
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(value)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises RecursionError, and ValueError for what is not JSON, or holds a number that other readers
    could not read: NaN, Infinity, 1e400, a whole number of thousands of digits.
    """
    return _decode(text)


def _refuse_number(number: str) -> Any:
    raise ValueError(f"{number[:40]} is a number that JSON readers cannot read")


def _float(text: str) -> float:
    return number if abs(number := float(text)) < math.inf else _refuse_number(text)


def _int(text: str) -> int:
    return int(text) if len(text) < 4300 else _refuse_number(text)


_decode = json.JSONDecoder(parse_float=_float, parse_int=_int, parse_constant=_refuse_number).decode


# --------------------------------------------------------------------------------- the turn


class _Turn:
    """A connection's place in the line of writers: two files in STATE_DIR/turn, and locks on them.

    SQLite's busy handler starves writers: it sleeps up to 100 ms between two tries, and a writer that
    never pauses takes the lock again in that time. So a writer locks `next`, locks `turn`, unlocks
    `next`, and unlocks `turn` after its commit. It then waits at `next`, behind the one that waits at
    `turn`. The turn only orders: SQLite's lock decides.
    """

    def __init__(self, state: Path) -> None:
        self.directory, self.fds = f"{state}/turn", []
        self.none_until, self.check_at = 0.0, 0.0

    def take(self, seconds: float) -> float:
        """Wait for the turn, for `seconds` at most; return the seconds that it took.

        A writer that has not got its turn by then goes on without it.
        """
        began = time.monotonic()
        if began < self.none_until:
            return 0.0
        try:
            if began > self.check_at:
                self._open()
                self.check_at = began + 1.0
            had = self._lock(0, began + seconds) and self._lock(1, began + seconds)
            flock(self.fds[0], LOCK_UN)
            waited = time.monotonic() - began
            if had and waited > POLL_SECONDS[0]:
                self._leave_room()
        except OSError:
            # The directory cannot be made or written: everybody writes without a turn.
            had, waited = False, time.monotonic() - began
        if not had:
            self.none_until = began + waited + NO_TURN_SECONDS
        return waited

    def _lock(self, which: int, deadline: float) -> bool:
        """Wait for one of the locks; return whether it was had by the deadline."""
        while True:
            try:
                flock(self.fds[which], LOCK_EX | LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(POLL_SECONDS[which])

    def _leave_room(self) -> None:
        """Leave SQLite's lock to writers that take no turn, like bash, now and then.

        Their busy handler tries every 100 ms at the longest.
        """
        if time.time() - os.fstat(self.fds[1]).st_mtime > OTHERS_EVERY_SECONDS:
            os.utime(self.fds[1])
            time.sleep(OTHERS_SECONDS)

    def release(self) -> None:
        """Let the next writer in. Safe to call where nothing is held.

        It unlocks, since to close the file is not enough while a forked child has a copy.
        """
        for fd in self.fds:
            flock(fd, LOCK_UN)

    def _open(self) -> None:
        """Open the files, anew if somebody has removed `turn`: others would take another turn."""
        if len(self.fds) == 2 and os.fstat(self.fds[1]).st_nlink:
            return
        self.close()
        if not os.path.isdir(self.directory):
            os.mkdir(self.directory, 0o700)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        for name in ("next", "turn"):
            self.fds.append(os.open(f"{self.directory}/{name}", flags, 0o600))

    def close(self) -> None:
        """Close the files, without letting anybody in: a forked child does that, too."""
        fds, self.fds, self.check_at = self.fds, [], 0.0
        for fd in fds:
            os.close(fd)


# ----------------------------------------------------------------- connections and transactions


class Connection(sqlite3.Connection):
    """A connection that knows its state directory, its files, and the queues it has seen."""

    state: Path
    # STATE_DIR/tasks.db, and, where that is a symbolic link, the file that SQLite has opened.
    db: str
    real: str
    directory: str
    # The database's device and inode as it was opened. None: it has to be opened again, and perhaps a
    # file was removed; empty: one was, and that has been said.
    file: tuple | None
    # The inodes of its write-ahead log and shared memory.
    sidecars: tuple[int, int]
    # The inode and last change of the directory in which these files were seen, and until when that holds.
    seen: tuple[int, int] | None
    check_at: float
    queues: set[str]
    # When the spool of a queue last changed, where it was empty then.
    spools: dict[str, int]
    # When a look at a queue last found a task, Unix seconds.
    found: dict[str, float]
    durable: bool | None
    turn: _Turn
    busy_timeout_ms: int
    # Held while the connection is in use: to close it meanwhile would crash the process.
    lock: threading.RLock
    # All that are open in this process, this one included.
    opened: set[Connection]

    def execute(self, *args) -> sqlite3.Cursor:
        with self.lock:
            try:
                return super().execute(*args)
            except UnicodeDecodeError:
                # SQLite's message quotes the bytes of a damaged schema.
                error = sqlite3.DatabaseError("malformed database schema")
                error.sqlite_errorname = "SQLITE_CORRUPT"
                raise error from None

    def set_busy_timeout(self, milliseconds: int) -> None:
        """Set how long SQLite waits for a lock."""
        self.execute(f"pragma busy_timeout = {milliseconds}")
        self.busy_timeout_ms = milliseconds

    def close(self) -> None:
        self.opened.discard(self)
        self.turn.close()
        super().close()

    def close_for_its_thread(self) -> None:
        """Close it from another thread, once its own thread does not use it; give up after its busy time.

        Its own thread closes the turn, and gets another connection from connect().
        """
        if self.lock.acquire(timeout=self.busy_timeout_ms / 1000):
            try:
                super().close()
            finally:
                self.lock.release()


class _Connections(dict):
    """A thread's {state: Connection}. They are closed as soon as the thread ends."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def __del__(self) -> None:
        # A forked child closes none of them: see _after_fork().
        for conn in self.values() if self.pid == os.getpid() else ():
            conn.close()


class _Thread(threading.local):
    """The state of one thread."""

    def __init__(self) -> None:
        self.connections = _Connections()


class _Process:
    """The state of this process; a forked child begins with a new one.

    owners: by state directory, the name of this process as an owner, and the descriptor and inode
    of its lock file.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.connections: set[Connection] = set()
        self.owners: dict[Path, tuple[str, int, int]] = {}
        self.owners_lock = threading.Lock()

    def of(self, state: Path) -> list[Connection]:
        """Return the open connections of all threads to one state."""
        return [conn for conn in list(self.connections) if conn.state == state]


_process = _Process()


def connect(
    state: Path | None = None, create: bool = True, busy_timeout_ms: int | None = None
) -> Connection:
    """Return this thread's connection to state/tasks.db (default: STATE_DIR), open it if necessary.

    It makes the schema, or rebuilds an older one. It opens the database anew if its files were
    removed or replaced. `busy_timeout_ms` bounds each wait for the write lock. Raises QueueBusy,
    and QueueUnavailable, also with create=False where there is no database.
    """
    if state is None:
        if state_complaint:
            raise QueueUnavailable(state_complaint)
        state = STATE_DIR
    if busy_timeout_ms is None:
        busy_timeout_ms = BUSY_TIMEOUT_MS
    conn = _process.thread.connections.get(state)
    db = conn.db if conn else f"{state}/tasks.db"
    try:
        if conn and _has_its_files(conn):
            if conn.busy_timeout_ms != busy_timeout_ms:
                conn.set_busy_timeout(busy_timeout_ms)
            return conn
        if not create:
            os.stat(db)
    except OSError as error:
        if not create:
            mend = "the next enqueue makes a new one"
            raise QueueUnavailable(f"{db}: {error.strerror}; {mend}") from None
    if conn:
        close(conn)
    try:
        conn = _open(state, db, busy_timeout_ms, create)
    except sqlite3.Error as error:
        raise explain(error, state) from error
    except OSError as error:
        why = f"cannot be made or read: {error.strerror}; check TASK_QUEUE_STATE"
        raise QueueUnavailable(f"{state} {why}") from error
    _process.thread.connections[state] = conn
    _process.connections.add(conn)
    return conn


def _inodes(real: str) -> tuple[int, int]:
    """Return the inodes of the write-ahead log and its shared memory."""
    return os.stat(f"{real}-wal").st_ino, os.stat(f"{real}-shm").st_ino


def _has_its_files(conn: Connection) -> bool:
    """Return whether database, log and shared memory are still the files that were opened.

    To remove or replace a file changes its directory: it looks after such a change, and once a
    second. Raises OSError.
    """
    now, directory = time.monotonic(), os.stat(conn.directory)
    seen = directory.st_ino, directory.st_mtime_ns
    if seen == conn.seen and now < conn.check_at and conn.file:
        return True
    has_sidecars = False
    with suppress(OSError):
        has_sidecars = _inodes(conn.real) == conn.sidecars
    # After them, as the whole directory may be moved away at any moment.
    database = os.stat(conn.db)
    if conn.file not in (None, (database.st_dev, database.st_ino)):
        return False
    if has_sidecars:
        # A second change within the kernel's tick would not be told from the first.
        is_settled = time.time() - directory.st_mtime > 0.1
        conn.seen, conn.check_at = seen if is_settled else None, now + 1.0
        return conn.file is not None
    _module("taskqueue.recovery").sidecar_is_lost(conn)
    return False


def close(conn: Connection) -> None:
    """Close a connection that connect() returned. The next connect() opens another."""
    _process.thread.connections.pop(conn.state, None)
    conn.close()


def make_private(directory: Path, parents: bool = False) -> Path:
    """Make a directory for its owner alone, and return it. One that others may enter is closed to them.

    `parents` are made only if wanted: a state that was moved away is not to come back empty.
    """
    for parent in reversed(directory.parents) if parents else ():
        parent.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    found = os.stat(directory)
    if stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == os.geteuid():
        os.chmod(directory, 0o700)
    return directory


def _open(state: Path, db: str, busy_timeout_ms: int, create: bool) -> Connection:
    """Open the database, and make or check its schema."""
    try:
        return _open_once(state, db, busy_timeout_ms, create)
    except FileNotFoundError:
        if not create:
            raise
        # Its directory was moved away meanwhile, or another one put in its place.
        return _open_once(state, db, busy_timeout_ms, create)


def _open_once(state: Path, db: str, busy_timeout_ms: int, create: bool) -> Connection:
    if create:
        make_private(state, parents=True)
    for other in _process.of(state):
        # SQLite keeps what belongs to a lost log until a process's last connection is closed.
        if not other.file:
            other.close_for_its_thread()
    # Without "create", a state that is being removed or moved away must not come back empty.
    uri = os.path.abspath(db).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    uri = f"file://{uri}?mode={'rwc' if create else 'rw'}"
    how: Any = {"isolation_level": None, "check_same_thread": False, "uri": True}
    conn = sqlite3.connect(uri, busy_timeout_ms / 1000, factory=Connection, **how)
    try:
        conn.state, conn.db, conn.queues, conn.turn = state, db, set(), _Turn(state)
        conn.spools, conn.found = {}, {}
        conn.lock, conn.opened = threading.RLock(), _process.connections
        conn.durable, conn.busy_timeout_ms = None, busy_timeout_ms
        # bash may have cast any bytes to text.
        conn.text_factory = partial(str, encoding="utf-8", errors="replace")
        conn.execute(f"pragma journal_size_limit = {WAL_BYTES}")
        # In KiB: many tasks of one transaction stay in memory until its end.
        conn.execute("pragma cache_size = -16000")
        # One snapshot: another first open may be at work.
        conn.execute("begin")
        (version,) = conn.execute("pragma user_version").fetchone()
        tables = table_names(conn)
        if version != SCHEMA_VERSION and (version or tables):
            _module("taskqueue.migrate").check(conn, version)
        elif version and "task_history" not in tables:
            raise QueueUnavailable(f"{db} is not a task queue's database; check TASK_QUEUE_STATE")
        conn.execute("commit")
        if version == 0:
            # Before the first table: cleanup.py can give space back only then.
            conn.execute("pragma auto_vacuum = incremental")
        # chmod, not open: closing a descriptor of the database would drop SQLite's locks.
        for sidecar in ("", "-wal", "-shm") if stat.S_IMODE(os.stat(db).st_mode) & 0o077 else ():
            if os.path.exists(f"{db}{sidecar}"):
                os.chmod(f"{db}{sidecar}", 0o600)
        _switch_to_wal(conn)
        if version < SCHEMA_VERSION:
            _make_schema(conn)
        # A read opens the write-ahead log where WAL was already on.
        table_names(conn)
        found = os.stat(db)
        conn.file, conn.real = (found.st_dev, found.st_ino), os.path.realpath(db)
        conn.directory, conn.sidecars = os.path.dirname(conn.real), _inodes(conn.real)
        conn.seen, conn.check_at = None, 0.0
        return conn
    except BaseException:
        conn.close()
        raise


def _switch_to_wal(conn: Connection) -> None:
    """Turn WAL on, once for each database. This switch ignores SQLite's busy handler."""
    deadline = time.monotonic() + conn.busy_timeout_ms / 1000
    while True:
        try:
            if conn.execute("pragma journal_mode = wal").fetchone()[0] == "wal":
                return
            raise QueueUnavailable(
                f"{conn.state} is on a file system where SQLite cannot use WAL: use a local disk"
            )
        except sqlite3.OperationalError as error:
            if explain(error, conn.state).__class__ is not QueueBusy or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def table_names(conn: Connection) -> list[str]:
    """Return the names of the tables, without SQLite's own."""
    rows = conn.execute("select name from sqlite_master where type = 'table'").fetchall()
    return [name for (name,) in rows if not name.startswith("sqlite_")]


def _make_schema(conn: Connection) -> None:
    """Make the schema in an empty database, or have taskqueue/migrate.py rebuild an older one."""
    with transaction(conn):
        (version,) = conn.execute("pragma user_version").fetchone()
        if version == SCHEMA_VERSION:
            # It was made while we waited for the lock.
            return
        if table_names(conn):
            _module("taskqueue.migrate").rebuild(conn)
        else:
            create_all(conn, DEFAULT_QUEUES)
        conn.execute(f"pragma user_version = {SCHEMA_VERSION}")


def create_all(conn: Connection, queues: Iterable[str]) -> None:
    """Make the history, the queues' tables and the view, within a transaction."""
    run_statements(conn, HISTORY_SCHEMA.format(last_second=LAST_SECOND))
    for queue in queues:
        create_queue(conn, queue)
    create_view(conn)


def create_queue(conn: Connection, queue: str) -> None:
    """Make a queue's table, indexes and triggers, within a transaction; create_view() has to follow."""
    parts = {"is_object": IS_OBJECT, "is_envelope": IS_ENVELOPE, "last_second": LAST_SECOND}
    parts["group_is_busy"] = on_queue(GROUP_IS_BUSY, queue)
    parts["waits_for_another"] = WAITS_FOR_ANOTHER.format(queue=queue)
    parts["forget_waiting"] = FORGET_WAITING.format(queue=queue)
    parts["next_of_group"] = NEXT_OF_GROUP.format(queue=queue, group="old.group_id")
    parts |= {f"{row}_has_turn": HAS_TURN.format(row=row) for row in ("old", "new")}
    run_statements(conn, QUEUE_SCHEMA.format(queue=queue, **parts))


def create_view(conn: Connection) -> None:
    """Make the view task_queue anew, over all queues, within a transaction."""
    told = {"max_attempts": MAX_ATTEMPTS, "status_word": STATUS_WORD}
    arms = [VIEW_ARM.format(queue=queue, **told) for (queue,) in conn.execute(QUEUES).fetchall()]
    conn.execute("drop view if exists task_queue")
    conn.execute(VIEW_SCHEMA.format(arms="".join(arms), **told))


def run_statements(conn: Connection, text: str) -> None:
    """Run statements that are separated by semicolons; executescript() would commit first."""
    statement = ""
    for line in f"{text};".splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            conn.execute(statement)
            statement = ""


def ensure_queue(conn: Connection, queue: str) -> bool:
    """Make a queue if it is missing, or adopt the bare table that bash has made; return whether it did.

    Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    if queue in conn.queues:
        return False
    queues = {name for (name,) in execute(conn, QUEUES, check_queue_name(queue))}
    if not conn.in_transaction:
        # One that this transaction makes is known once it is committed.
        conn.queues = queues
    if queue in queues:
        return False
    with nullcontext() if conn.in_transaction else transaction(conn):
        if queue in {name for (name,) in conn.execute(QUEUES)}:
            return False
        if len(queues) >= MAX_QUEUES:
            wanted = "use an existing one"
            raise InvalidTask(f"queue {queue!r} would be number {MAX_QUEUES + 1}: {wanted}")
        if queue in table_names(conn):
            _module("taskqueue.migrate").adopt(conn, queue)
        else:
            create_queue(conn, queue)
        create_view(conn)
    return True


class transaction:
    """Hold the write lock for a block: `with transaction(conn):`.

    It commits at the end of the block, and rolls back if the block raises. What a `durable` one has
    committed survives a power cut (synchronous=FULL). Raises QueueBusy, QueueUnavailable, InvalidTask.
    It is a class, since contextlib.contextmanager costs more than most statements.
    """

    __slots__ = ("conn", "durable", "is_open")

    def __init__(self, conn: Connection, durable: bool = True) -> None:
        self.conn, self.durable, self.is_open = conn, durable, False

    def __enter__(self) -> Connection:
        conn = self.conn
        if conn.in_transaction:
            raise RuntimeError("a transaction is under way on this connection")
        conn.lock.acquire()
        self.is_open = True
        try:
            if conn.durable is not self.durable:
                conn.execute(f"pragma synchronous = {'full' if self.durable else 'normal'}")
                conn.durable = self.durable
            # Half of the busy time at most for the turn; SQLite is asked with the rest.
            waited_ms = conn.turn.take(conn.busy_timeout_ms / 2000) * 1000
            if waited_ms > 50:
                conn.set_busy_timeout(max(conn.busy_timeout_ms - int(waited_ms), 1))
            conn.execute("begin immediate")
            return conn
        except BaseException as error:
            self.__exit__(None, error, None)
            raise

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None:
                self.conn.execute("commit")
        except sqlite3.Error as failed:
            error = failed
        finally:
            try:
                self._end()
            except BaseException:
                # An exception from a signal's handler may have cut it short.
                self._end()
                raise
        if isinstance(error, sqlite3.Error):
            raise explain(error, self.conn.state) from error

    def _end(self) -> None:
        """Let the next writer in, and roll back what is not committed. Safe to call twice."""
        if not self.is_open:
            return
        try:
            self.conn.turn.release()
            if self.conn.in_transaction:
                self.conn.execute("rollback")
        except sqlite3.ProgrammingError:
            # Another thread has closed it, just before this transaction began.
            pass
        self.is_open = False
        self.conn.lock.release()

    def __del__(self) -> None:
        # An exception out of a signal's handler can keep __exit__ from its first line, and __init__, too.
        if getattr(self, "is_open", False):
            self._end()


# ----------------------------------------------------------------- the verbs, in a task's order

# A checked task, as new_row() returns it. Its first eight fields are INSERT's, the next two SET_OWN's.
Row = namedtuple(
    "Row",
    "data status due_at priority group_id expires_at timestamp delayed_at own_attempts timeout"
    " task_id window on_duplicate firing after after_any",
)


class Stored(namedtuple("Stored", "task_id is_new")):
    """What became of a stored row: it is new, or has updated a task, or else is a duplicate."""

    __slots__ = ()
    is_updated = False


class Updated(Stored):
    """The Stored of a row that has updated a task with the same id."""

    __slots__ = ()
    is_updated = True


def enqueue_task(
    queue_name: str, task_type: str, data: dict, task_id: str | None = None, **options
) -> str:
    """Store a task and return its id. It is on disk when this returns.

    If a task with this task_id waits or runs in the queue, nothing is added, unless `on_duplicate`
    says otherwise. `options` are those of new_row(). Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    row = new_row(task_type, data, task_id, **options)
    _store(connect(), queue_name, [row])
    return row.task_id


def enqueue_tasks(queue_name: str, tasks: Iterable[dict | Row], **how) -> list[Stored]:
    """Store many tasks in one transaction, all or none; return what became of each, in their order.

    A task is a dict of enqueue_task's arguments: {"task_type": …, "data": …, "task_id": …}, or a
    new_row(). `how` goes to connect(). Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    rows = [task if isinstance(task, Row) else new_row(**task) for task in tasks]
    return _store(connect(**how), queue_name, rows)


def _store(conn: Connection, queue: str, rows: list[Row]) -> list[Stored]:
    """Store rows in a transaction; make the queue first if it is missing."""
    while True:
        ensure_queue(conn, queue)
        try:
            with transaction(conn):
                stored = [store(conn, queue, row) for row in rows]
            wake(conn.state)
            return stored
        except QueueUnavailable:
            # explain() forgets the queues where one of them has gone: it was dropped, or a backup is back.
            if conn.queues:
                raise


def new_row(
    task_type: str,
    data: dict,
    task_id: str | None = None,
    *,
    # Seconds until it becomes ready; or that time, in Unix seconds.
    delay: float = 0.0,
    at: float | None = None,
    # From -1,000,000 to 1,000,000; the highest is claimed first.
    priority: int = 0,
    # Tasks of one group run one at a time, in order.
    group: str | None = None,
    # Whether it waits until a person approves it.
    hold: bool = False,
    # Seconds from when it is due; not claimed by then, it ends as expired.
    ttl: float | None = None,
    # Seconds for one attempt, and how often it is tried; the claimer's terms where these say nothing.
    timeout: float | None = None,
    max_attempts: int | None = None,
    # The tasks that must have completed before, by their ids, and those that must have ended in any way.
    after: str | Iterable[str] = (),
    after_any: str | Iterable[str] = (),
    # Where a task with this id waits or runs, "skip" adds nothing. With "replace" and "rerun" a waiting
    # task becomes this one, and a running one is followed by it. A held or approved task does not change:
    # this one is a duplicate then, except for a rerun over a running one, which is held when the run ends.
    on_duplicate: str = "skip",
    # Tells two firings of a hook apart where they mean the same task.
    firing: str | None = None,
    # Seconds; a finished task with this id that was enqueued this recently makes this one a duplicate, too.
    window: float = 0.0,
    # How many handlers stand before it (default: TASK_DEPTH), and which task it comes from.
    depth: int | None = None,
    source: dict | None = None,
    # Where data is a hook's payload: the fields of it that the hook's command line set. Handlers take
    # rights from these alone.
    granted: dict | None = None,
    # The command of a task that `tq run` makes, word by word: handlers/run takes none from data.
    argv: list[str] | None = None,
    # When a hook fired, in Unix seconds: the times above count from then.
    now: float | None = None,
    # The JSON text that data was read from, if any.
    text: str | None = None,
) -> Row:
    """Check a task and write its envelope. Raises InvalidTask."""
    task_id = os.urandom(8).hex() if task_id is None else check_text("task_id", task_id, 500)
    check_task_type(task_type)
    if not isinstance(data, dict):
        what = f"data is a {type(data).__name__}"
        raise InvalidTask(f"the task was refused: {what}; it must be a JSON object")
    if group is not None:
        check_text("group", group, 500)
    _check_terms(priority, on_duplicate, delay, window, ttl, at, now)
    if timeout is not None or max_attempts is not None:
        _check_own(timeout, max_attempts)
    if after or after_any:
        after, after_any = _check_after(after, on_duplicate), _check_after(after_any, on_duplicate)
    depth = task_depth() if depth is None else depth
    if depth > MAX_DEPTH:
        what = f"its chain of handlers is more than {MAX_DEPTH} deep (TASK_DEPTH)"
        raise InvalidTask(f"the task was refused: {what}")

    now = time.time() if now is None else now
    delayed_at = now if delay and at is None and not hold else None
    due_at = None if hold else at if delayed_at is None else now + delay
    expires_at = None if ttl is None else max(now, due_at or 0) + ttl
    status = SCHEDULED if hold or due_at is not None else READY
    head = f'"task_id": {_quote(task_id)}, "task_type": {_quote(task_type)}, "enqueued_at": "{utc(now)}"'
    for name, value in ("depth", depth), ("source", source), ("firing", firing):
        if value:
            head += f', "{name}": {to_json(value)}'
    for name, value in ("granted", granted), ("argv", argv):
        if value is not None:
            head += f', "{name}": {to_json(value)}'
    body = to_json(data) if text is None else text
    terms = status, due_at, priority, group, expires_at, now, delayed_at, max_attempts, timeout
    told = task_id, window, on_duplicate, firing, after, after_any
    return Row(f'{{{head}, "data": {body}}}', *terms, *told)


def _check_terms(priority: object, on_duplicate: object, delay, window, ttl, at, now) -> None:
    """Raise InvalidTask for a term that no task can have. False, 0 and None say nothing."""
    if type(priority) is not int or abs(priority) > 1_000_000:
        wanted = "it is a whole number from -1000000 to 1000000"
        raise InvalidTask(f"priority {priority!r} was refused: {wanted}")
    if on_duplicate not in ("skip", "replace", "rerun"):
        raise InvalidTask(f"on_duplicate {on_duplicate!r} was refused: skip, replace or rerun")
    if not delay and not window and ttl is None and at is None and now is None:
        return
    for name, value, most in (
        ("delay", delay, 1e9),
        ("window", window, 1e9),
        ("ttl", ttl, 1e9),
        ("at", at, LAST_SECOND),
        ("now", now, LAST_SECOND),
    ):
        if value is not None and not (type(value) in (int, float) and 0 <= value < most):
            raise InvalidTask(f"{name} {value!r} was refused: it is a number of seconds")


def _check_own(timeout: Any, max_attempts: Any) -> None:
    """Raise InvalidTask for a time-out or a number of attempts that no task can have."""
    if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < 1e9):
        raise InvalidTask(f"timeout {timeout!r} was refused: it is a number of seconds above 0")
    if max_attempts is not None and not (
        type(max_attempts) is int and 0 < max_attempts <= 1_000_000
    ):
        raise InvalidTask(
            f"max_attempts {max_attempts!r} was refused: it is a whole number from 1 on"
        )


def _check_after(ids: str | Iterable[str], on_duplicate: str) -> tuple[str, ...]:
    """Return the ids of tasks to wait for. Raises InvalidTask."""
    ids = (ids,) if isinstance(ids, str) else tuple(ids)
    if ids and on_duplicate != "skip":
        raise InvalidTask(f"on_duplicate {on_duplicate!r} was refused: not with after or after_any")
    return tuple(check_text("after", ident, 1000) for ident in ids)


_has_control_characters = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]").search


def check_text(what: str, value: object, longest: int) -> str:
    """Return a task_id, task_type or group that fits into an environment variable and a log line.

    `longest` is in bytes. Raises InvalidTask.
    """
    is_text = isinstance(value, str)
    if not is_text or not 0 < len(value.encode("utf-8", "surrogatepass")) <= longest:
        wanted = f"it is a text of 1 to {longest} bytes"
        raise InvalidTask(f"{what} {str(value)[:40]!r} was refused: {wanted}")
    if _has_control_characters(value):
        raise InvalidTask(f"{what} {value!r} was refused: it has control characters or surrogates")
    return value


def check_task_type(task_type: str) -> None:
    """Raise InvalidTask unless it can name a handler: a text without / and without a leading . - or <."""
    if "/" in check_text("task_type", task_type, 200) or task_type[0] in ".-<":
        wanted = "it names a handler, so no / and no leading . - <"
        raise InvalidTask(f"task_type {task_type!r} was refused: {wanted}")


def task_depth() -> int:
    """Return TASK_DEPTH: how many handlers stand before what this process enqueues; 0 outside of them."""
    text = os.environ.get("TASK_DEPTH")
    return int(text) if text and text.isdecimal() else 0


def insert(conn: Connection, queue: str, row: Row) -> bool:
    """Store a row, within a transaction; return whether it is new."""
    return store(conn, queue, row).is_new


def store(conn: Connection, queue: str, row: Row) -> Stored:
    """Store a row, within a transaction, or update the task that has its id, or leave that alone."""
    if row.after or row.after_any:
        return _module("taskqueue.after").store(conn, queue, row)
    # Within the window a firing is only a duplicate of itself, and a rerun ignores it otherwise.
    if row.window and (row.firing or row.on_duplicate != "rerun"):
        told = {"queue": queue, "task_id": row.task_id, "firing": row.firing}
        told |= {
            "since": utc(row.timestamp - row.window),
            "until": utc(row.timestamp + row.window),
        }
        if conn.execute(FINISHED_SINCE, told).fetchone()[0]:
            return Stored(row.task_id, False)
    if _insert(conn, queue, row):
        return Stored(row.task_id, True)
    for statement in (REPLACE, RERUN) if row.on_duplicate != "skip" else ():
        if conn.execute(on_queue(statement, queue), row._asdict()).rowcount == 1:
            return Updated(row.task_id, False)
    return Stored(row.task_id, False)


def _insert(conn: Connection, queue: str, row: Sequence) -> int | None:
    """Insert a row with INSERT's and SET_OWN's values; return its id, or None for a duplicate."""
    inserted = conn.execute(on_queue(INSERT, queue), row[:8])
    if inserted.rowcount != 1:
        return None
    own_attempts, timeout = row[8:10] or (None, None)
    if own_attempts is not None or timeout is not None:
        own = {"own_attempts": own_attempts, "timeout": timeout, "id": inserted.lastrowid}
        conn.execute(on_queue(SET_OWN, queue), own)
    return inserted.lastrowid


def wake(state: Path) -> None:
    """Tell sleeping consumers to look, after a commit.

    Best effort: they also notice a write to the write-ahead log.
    """
    try:
        # Opened each time: one that threads share could be closed before the write, and another file,
        # even the database, have its number.
        fd = os.open(f"{state}/wake", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\n")
        finally:
            os.close(fd)
    except OSError:
        pass


def take_in(conn: Connection, queue: str) -> bool:
    """Take in the files that hooks have left for the queue; return whether there were any.

    An empty spool costs one stat.
    """
    directory = f"{conn.state}/spool/{queue}"
    try:
        if os.stat(directory).st_mtime_ns == conn.spools.get(queue) or conn.in_transaction:
            return False
        spool = _module("taskqueue.spool")
    except OSError:
        return False
    except ImportError as error:
        if any(not name.startswith(".") for name in os.listdir(directory)):
            _say_once(f"{directory} is left alone: {error}")
        return False
    with suppress(QueueBusy, OSError):
        return spool.take_in(conn, queue)
    return False


@lru_cache(8)
def _say_once(message: str) -> None:
    import logging

    logging.getLogger(__name__).warning(message)


def look(conn: Connection, queue: str) -> tuple[bool, bool]:
    """Return (whether a claim would find a task, whether tasks have become due or expired).

    It takes in first what hooks have left.
    """
    take_in(conn, queue)
    ready, overdue, is_open = execute(conn, LOOK, queue, now=time.time()).fetchone()
    return bool((ready or overdue) and is_open), bool(overdue)


def has_ready(conn: Connection, queue: str) -> bool:
    """Return whether a claim would find a task."""
    return look(conn, queue)[0]


def claim(
    conn: Connection,
    queue: str,
    owner: str,
    *,
    limit: int = 1,
    row_id: int | None = None,
    overdue: bool = True,
    # How many tasks there is room for, where that is more than the limit: they share the queue's bound.
    places: int = 1,
    # How often the task is tried, and the seconds before its second attempt.
    max_attempts: int = MAX_ATTEMPTS,
    backoff: float = BACKOFF_SECONDS,
    # The queue that its result goes to, and whether it is held there.
    then_queue: str | None = None,
    then_hold: bool = False,
    # Whether its result may enqueue tasks.
    chain: bool = False,
) -> list[Task]:
    """Claim up to `limit` ready tasks, or the given row, for an owner, within a transaction.

    Returns [] if no task is ready, the queue is paused, or no slot is free; also while more tasks have
    expired than one transaction takes: look() tells these apart. `overdue` is what look() says; true
    when in doubt. The row keeps the last five arguments, so that any process can record how it ends.
    Raises QueueBusy, QueueUnavailable.
    """
    now = time.time()
    if overdue:
        if expire(conn, queue, now) == AT_ONCE:
            return []
        promote(conn, queue, now)
    rows = execute(
        conn,
        CLAIM if row_id is None else CLAIM_ROW,
        queue,
        owner=owner,
        now=now,
        limit=limit,
        id=row_id,
        max_attempts=max_attempts,
        backoff=backoff,
        then_queue=then_queue,
        then_hold=then_hold,
        chain=chain,
    ).fetchall()
    tasks = [Task.from_row(queue, row[:-1]) for row in rows]
    if rows and rows[0][-1]:
        _module("taskqueue.costs").reserve(conn, queue, tasks, max(limit, places))
    # RETURNING gives them in any order.
    return sorted(tasks, key=lambda task: (-task.priority, task.id)) if len(tasks) > 1 else tasks


def promote(conn: Connection, queue: str, now: float) -> None:
    """Make scheduled tasks ready whose time has come, AT_ONCE at most; of a group only the first.

    Within a transaction.
    """
    groups = {group for (group,) in execute(conn, PROMOTE, queue, now=now).fetchall()}
    for group in groups - {None}:
        execute(conn, UNBLOCK, queue, group_id=group)


def expire(conn: Connection, queue: str, now: float) -> int:
    """Move tasks that have expired to the history, AT_ONCE at most, within a transaction; return how many."""
    rows = execute(conn, EXPIRED, queue, now=now).fetchall()
    error = "it was not started before its time was over"
    return sum(finish(conn, Task.from_row(queue, row), "expired", error=error) for row in rows)


def claim_ready(conn: Connection, queue: str, **how) -> list[Task]:
    """Claim tasks for this process, in a transaction of its own; `how` are claim()'s terms.

    It takes no lock where no task is ready, but after a look that found one: that serves the claims of
    the next moment, too, until one of them finds none. Raises QueueBusy, QueueUnavailable.
    """
    while True:
        now = time.time()
        has_looked = 0 <= now - conn.found.get(queue, 0.0) < LOOK_SECONDS
        found, overdue = (True, False) if has_looked else look(conn, queue)
        if not found:
            return []
        owner = owner_name(conn.state)
        with transaction(conn, durable=False):
            tasks = claim(conn, queue, owner, overdue=overdue, **how)
        if not tasks:
            conn.found.pop(queue, None)
        elif not (has_looked or overdue):
            conn.found[queue] = now
        if tasks or not (has_looked or overdue):
            return tasks


def finish(
    conn: Connection,
    task: Task,
    status: str,
    *,
    error: str | None = None,
    exit_code: int | None = None,
    result: str | None = None,
    log: str | None = None,
    settles: bool = True,
) -> bool:
    """Move the task to the history as `status`, within a transaction.

    `error` is one line, `exit_code` the handler's, `result` and `log` the ends of its stdout and stderr.
    A later firing that waits for the end of this run is enqueued, and tasks that wait for this one are
    settled; settle() itself does without. Returns False, and changes nothing, when the task's owner no
    longer holds it.
    """
    claimed_at = task.claimed_at
    changes = conn.total_changes
    archived = execute(
        conn,
        ARCHIVE,
        task.queue,
        id=task.id,
        owner=task.owner,
        attempts=task.attempts,
        claimed_at=claimed_at,
        status=status,
        enqueued_at=utc(task.enqueued_at),
        started_at=None if claimed_at is None else utc(claimed_at),
        completed_at=utc(time.time()),
        exit_code=exit_code,
        result=result,
        log=log,
        error=error,
    )
    if archived.rowcount != 1:
        return False
    # A trigger has told the tasks that wait for this one.
    is_awaited = conn.total_changes > changes + 1
    end_quiet(conn.state)
    [(rerun,)] = execute(conn, REMOVE, task.queue, id=task.id).fetchall()
    if rerun is not None:
        _insert(conn, task.queue, json.loads(rerun))
    if settles and is_awaited:
        # Without that module beside this file, the next worker that has it does this.
        with suppress(ImportError):
            _module("taskqueue.after").settle(conn)
    return True


def end_quiet(state: Path) -> None:
    """Tell report.py that a task ends, within the transaction that records it."""
    if os.access(f"{state}/quiet", os.F_OK):
        with suppress(OSError):
            os.unlink(f"{state}/quiet")


def ack(conn: Connection, task: Task, **told) -> bool:
    """Record a claimed task as completed, within a transaction. `told` is finish()'s.

    Returns False, and changes nothing, when the task's owner no longer holds it.
    """
    return finish(conn, task, "completed", **told)


def bury(conn: Connection, task: Task, *, error: str, **told) -> bool:
    """Record a claimed task as failed for good, within a transaction: a dead letter. Else like ack()."""
    return finish(conn, task, "failed", error=error, **told)


def nack(
    conn: Connection, task: Task, *, error: str, delay: float | None = None, **told
) -> str | None:
    """Record a failed attempt, within a transaction.

    Returns "scheduled", again after `delay` seconds (default: its back-off), or "failed" for good if
    this was its last attempt, or None, and changes nothing, when its owner no longer holds it.
    """
    most = task.max_attempts or MAX_ATTEMPTS
    if task.attempts >= most:
        error = f"{error} (attempt {task.attempts} of {most})"
        return "failed" if bury(conn, task, error=error, **told) else None
    delay = backoff_delay(task) if delay is None else delay
    return "scheduled" if release(conn, task, delay=delay, error=error, uncounted=0) else None


def release(
    conn: Connection, task: Task, *, delay: float = 0, error: str | None = None, uncounted: int = 1
) -> bool:
    """Put a claimed task back for `delay` seconds, within a transaction; its attempt does not count.

    If a later firing waits for the end of this run, the task becomes that one. Returns False, and
    changes nothing, when its owner no longer holds it.
    """
    rows = execute(
        conn,
        RELEASE,
        task.queue,
        id=task.id,
        owner=task.owner,
        attempts=task.attempts,
        claimed_at=task.claimed_at,
        delay=delay,
        error=error,
        uncounted=uncounted,
        now=time.time(),
    ).fetchall()
    for task_id, rerun in rows:
        if rerun is not None:
            blank = {"own_attempts": None, "timeout": None}
            later = blank | dict(zip(Row._fields, json.loads(rerun), strict=False))
            execute(conn, REPLACE, task.queue, **later, task_id=task_id, firing=None)
    return bool(rows)


def backoff_delay(task: Task) -> float:
    """Return the seconds until the next attempt: they double from the task's base, up to an hour.

    Up to half of that is left out at random, so that tasks that failed together do not come together.
    """
    import random

    base = BACKOFF_SECONDS if task.backoff is None else task.backoff
    doubled = base * 2.0 ** min(task.attempts - 1, 32)
    return min(BACKOFF_CAP_SECONDS, doubled) * random.uniform(0.5, 1.0)


# ---------------------------------------------------------------------------- which owners run


def lock_file(
    path: Path | str, *, shared: bool = False, probe: bool = False, patience: float = 0.0
) -> int | None:
    """Return a descriptor that holds the flock on path, or None if another holds it for `patience` seconds.

    A probe opens for reading and creates nothing: a watch takes the close of a descriptor that was
    open for writing for the end of an owner. Raises OSError; a probe FileNotFoundError.
    """
    flags = os.O_RDONLY if probe else os.O_RDWR | os.O_CREAT
    deadline = time.monotonic() + patience
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            flock(fd, (LOCK_SH if shared else LOCK_EX) | LOCK_NB)
            mine, there = os.fstat(fd), os.stat(path)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return fd
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                return None
            time.sleep(0.005)
        except FileNotFoundError:
            if probe:
                os.close(fd)
                raise
        # Somebody removed the file between open and flock: the lock is on nothing.
        os.close(fd)


def owner_name(state: Path | None = None) -> str:
    """Return the name of this process as an owner: its lock file in state/workers, which it holds.

    Raises QueueUnavailable.
    """
    state = state or STATE_DIR
    with _process.owners_lock:
        name, fd, inode = _process.owners.get(state, (None, None, None))
        if name is not None and fd is not None:
            try:
                if os.stat(f"{state}/workers/{name}").st_ino == inode:
                    return name
            except OSError:
                pass
            # It was removed by hand: what we hold is lost unless the file is back in time.
            os.close(fd)
        path = state / "workers" / (name or f"{os.getpid()}-{os.urandom(4).hex()}")
        try:
            make_private(path.parent)
            fd = lock_file(path, patience=PROBE_SECONDS)
        except OSError as error:
            why = f"cannot be made: {error.strerror}; check the permissions"
            raise QueueUnavailable(f"{path} {why}") from error
        if fd is None:
            why = "is locked by another process; it is this process's own: remove it"
            raise QueueUnavailable(f"{path} {why}")
        _process.owners[state] = (path.name, fd, os.fstat(fd).st_ino)
        return path.name


def resign(state: Path | None = None) -> None:
    """Remove this process's lock file: it holds no tasks any more."""
    state = state or STATE_DIR
    with _process.owners_lock:
        name, fd, _ = _process.owners.pop(state, (None, None, None))
        if fd is not None:
            try:
                os.unlink(f"{state}/workers/{name}")
            except OSError:
                pass
            os.close(fd)


def close_before_fork(conn: Connection | None) -> None:
    """Close a connection, unless a transaction is under way.

    SQLite in a forked child would believe that it holds its parent's locks on the database.
    """
    if conn is not None and conn in _process.connections and not conn.in_transaction:
        # So that connect() opens another.
        conn.file = ()
        conn.close()


# What a forked child has of its parent's: kept, so that nothing closes those connections.
_inherited: list = []


def _before_fork() -> None:
    """Close the forking thread's connections; they are opened again when wanted.

    Connections of other threads are left as they are: a program that uses the queue in threads
    should fork before that, or use subprocess.
    """
    for conn in list(_process.thread.connections.values()):
        close_before_fork(conn)


def _refuse(*_) -> Any:
    raise QueueUnavailable("this connection is the parent process's: call connect() in the child")


def _after_fork() -> None:
    """Begin anew in a forked child: it has no connection, no turn and no tasks of its parent's."""
    global _process
    _inherited.append(_process)
    for conn in _process.connections:
        conn.turn.close()
        # Where the fork was within a transaction, its end in the child must not end the parent's.
        conn.execute = _refuse
    for _, fd, _ in _process.owners.values():
        os.close(fd)
    _process = _Process()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


# ------------------------------------------------------------------------------------------------ the modules beside it

_LATER = {
    "taskqueue.spool": "spool spool_directories spooled_files take_in_spool",
    "taskqueue.recovery": "recover redrive not_held OWNERS CANCEL_REQUESTED",
    "taskqueue.wake": "Watch WakeEvent QueueWatcher sleep_seconds next_due NEXT_TIMES",
    "taskqueue.persist": "get_queue get_ack_queue dequeue_task SQLiteQueue SQLiteAckQueue Empty COUNT_READY",
    "taskqueue.aio": "consume Delivery",
}


def _module(name: str):
    """Import one of the modules of taskqueue. Raises ImportError where this file was taken alone."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, "taskqueue"):
            raise
        here, file = os.path.dirname(os.path.abspath(__file__)), name.replace(".", "/")
        raise ImportError(
            f"{file}.py is missing in {here}: put taskqueue/ beside queue_helpers.py", name=name
        ) from None


def __getattr__(name: str):
    """Load a module of taskqueue when one of its names is first asked for: their libraries are heavy."""
    for module, names in _LATER.items():
        if name in names.split():
            value = globals()[name] = getattr(_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
