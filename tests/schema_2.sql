-- A database of schema version 2, as its scripts and a shell left it, with something of everything in it.
CREATE TABLE "approvals" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  released_at   real,                            -- when it was put back for later: it keeps its group's turn
  max_attempts  integer,                         -- these five: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  then_hold     integer not null default 0,
  chain         integer not null default 0,
  cancel_requested integer not null default 0,   -- the owner ends the run
  rerun_data    text check (rerun_data is null or json_valid(rerun_data)),  -- enqueued when the run ends
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                stored unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'approvals' end) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (typeof(coalesce(due_at, 0.0)) = 'real' and coalesce(due_at, 0) between 0 and 32503680000
           and typeof(coalesce(expires_at, 0.0)) = 'real' and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
INSERT INTO "approvals" VALUES(1,'{"task_id": "runs", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.084", "data": {"n": 1}}',1.7960942970840051174e+09,2,3,NULL,'g',NULL,1,'1-dead',1700000000.0,NULL,4,1.0,NULL,0,0,0,'{"task_id": "runs", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.155", "data": {"n": 7}}',NULL);
INSERT INTO "approvals" VALUES(2,'{"task_id": "blocked", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.092", "data": {"n": 2}}',1.79609429709201145171e+09,4,0,NULL,'g',NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(3,'{"task_id": "held", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.098", "data": {"n": 3}}',1.79609429709800624852e+09,3,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(4,'{"task_id": "later", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.119", "data": {"n": 4}}',1.7960942971180021763e+09,3,0,4000000000.0,'h',2.29609429711877441413e+09,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(5,'{"task_id": "retries", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.119", "data": {"n": 5}}',1700000000.0,3,0,4000000060.0,NULL,NULL,1,NULL,NULL,4000000000.0,4,1.0,NULL,0,0,0,NULL,'no');
INSERT INTO "approvals" VALUES(6,'{"task_id": "away", "task_type": "t", "enqueued_at": "2026-12-01 03:04:57.126", "data": {"n": 6}}',1.79609429712500286106e+09,5,0,NULL,NULL,NULL,0,'hub-1',NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(20,'{}',1.79609429716700601579e+09,'held',0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(21,'{}',1.79609429716700601579e+09,99,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(22,'{}',1.79609429716700601579e+09,4,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(23,'{}','2026-12-01',-1,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(24,'{}',1.79609429716801190374e+09,1,0,NULL,NULL,NULL,'many',NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(25,'{}',1.79609429716801190374e+09,2,0,NULL,NULL,NULL,0,NULL,'yesterday',NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(26,'{}',1.79609429716801190374e+09,3,0,4000000000.0,NULL,NULL,0,NULL,NULL,'soon',NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(27,'{}',1.79609429716801190374e+09,1,0,NULL,NULL,NULL,0,NULL,NULL,NULL,-1,NULL,NULL,0,0,0,NULL,NULL);
CREATE TABLE bare (id integer primary key autoincrement, data text not null);
INSERT INTO "bare" VALUES(1,'{}');
CREATE TABLE "completions" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  released_at   real,                            -- when it was put back for later: it keeps its group's turn
  max_attempts  integer,                         -- these five: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  then_hold     integer not null default 0,
  chain         integer not null default 0,
  cancel_requested integer not null default 0,   -- the owner ends the run
  rerun_data    text check (rerun_data is null or json_valid(rerun_data)),  -- enqueued when the run ends
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                stored unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'completions' end) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (typeof(coalesce(due_at, 0.0)) = 'real' and coalesce(due_at, 0) between 0 and 32503680000
           and typeof(coalesce(expires_at, 0.0)) = 'real' and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
CREATE TABLE "notifications" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  released_at   real,                            -- when it was put back for later: it keeps its group's turn
  max_attempts  integer,                         -- these five: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  then_hold     integer not null default 0,
  chain         integer not null default 0,
  cancel_requested integer not null default 0,   -- the owner ends the run
  rerun_data    text check (rerun_data is null or json_valid(rerun_data)),  -- enqueued when the run ends
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                stored unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'notifications' end) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (typeof(coalesce(due_at, 0.0)) = 'real' and coalesce(due_at, 0) between 0 and 32503680000
           and typeof(coalesce(expires_at, 0.0)) = 'real' and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
CREATE TABLE task_controls (       -- what holds a queue back; no row: nothing
  queue         text primary key,
  paused_at     real,                            -- Unix seconds; null: not paused
  paused_until  real,                            -- null: until a person resumes it
  pause_reason  text,
  paused_by     text,                            -- 'person' or 'handler'
  slots         integer check (slots is null or typeof(slots) = 'integer' and slots > 0)  -- that run at a time
);
INSERT INTO "task_controls" VALUES('completions',1.79609429716746139523e+09,NULL,'lunch','person',NULL);
INSERT INTO "task_controls" VALUES('approvals',NULL,NULL,NULL,NULL,2);
INSERT INTO "task_controls" VALUES('notifications',1.0,'tomorrow',NULL,NULL,NULL);
CREATE TABLE task_history (
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
  enqueued_at   text not null,                   -- times are UTC: YYYY-MM-DD HH:MM:SS.SSS
  started_at    text,                            -- of the last attempt
  completed_at  text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  exit_code     integer,                         -- of the handler; 128 + n for signal n
  result        text,                            -- the end of its stdout
  log           text,                            -- the end of its stderr
  error         text                             -- why it failed, in one line
);
INSERT INTO "task_history" VALUES(1,'approvals',9,'old','t','expired','{}',0,NULL,0,NULL,'2026-01-01 00:00:00.000',NULL,'2026-01-01 00:00:01.000',NULL,NULL,NULL,NULL);
CREATE TABLE task_marks (          -- the last row of the history that was reported
  workspace     text primary key,
  history_id    integer not null
);
INSERT INTO "task_marks" VALUES('/w',1);
CREATE TABLE task_spooled (
  file          text primary key                 -- taken in, and perhaps not yet removed
);
CREATE INDEX "task_history.completed_at" on task_history (completed_at, queue, task_type, status);
CREATE INDEX "task_history.type" on task_history (queue, task_type, status, completed_at, started_at, enqueued_at);
CREATE INDEX "task_history.task_id" on task_history (task_id);
CREATE INDEX "task_history.failed" on task_history (queue, completed_at) where status = 'failed';
CREATE INDEX "notifications.ready" on "notifications" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "notifications.claimed" on "notifications" (owner) where status = 2;
CREATE INDEX "notifications.scheduled" on "notifications" (due_at) where status = 3;
CREATE INDEX "notifications.handed_over" on "notifications" (claimed_at) where status = 5;
CREATE INDEX "notifications.retrying" on "notifications" (released_at) where status = 3 and released_at is not null;
CREATE INDEX "notifications.expiring" on "notifications" (expires_at) where expires_at is not null;
CREATE INDEX "notifications.group" on "notifications" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "notifications.waits at insert" after insert on "notifications"
  when new.status < 2 and (new.due_at is not null or new.group_id is not null)
  begin update "notifications" set status = iif(due_at is null, 4, 3)
    where id = new.id and (due_at is not null or (
    exists (select 1 from "notifications" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "notifications" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))); end;
CREATE TRIGGER "notifications.blocked at update" after update of status on "notifications"
  when new.group_id is not null and new.status < 2 and old.status > 2 and (
    exists (select 1 from "notifications" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "notifications" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))
  begin update "notifications" set status = 4 where id = new.id; end;
CREATE TRIGGER "notifications.next at update" after update of status on "notifications"
  when old.group_id is not null and old.status < 3 and new.status > 2 and new.released_at is null
  begin update "notifications" set status = 1 where id = (
      select b.id from "notifications" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE TRIGGER "notifications.next at delete" after delete on "notifications"
  when old.group_id is not null and (old.status < 3 or old.released_at is not null)
  begin update "notifications" set status = 1 where id = (
      select b.id from "notifications" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE INDEX "approvals.ready" on "approvals" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "approvals.claimed" on "approvals" (owner) where status = 2;
CREATE INDEX "approvals.scheduled" on "approvals" (due_at) where status = 3;
CREATE INDEX "approvals.handed_over" on "approvals" (claimed_at) where status = 5;
CREATE INDEX "approvals.retrying" on "approvals" (released_at) where status = 3 and released_at is not null;
CREATE INDEX "approvals.expiring" on "approvals" (expires_at) where expires_at is not null;
CREATE INDEX "approvals.group" on "approvals" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "approvals.waits at insert" after insert on "approvals"
  when new.status < 2 and (new.due_at is not null or new.group_id is not null)
  begin update "approvals" set status = iif(due_at is null, 4, 3)
    where id = new.id and (due_at is not null or (
    exists (select 1 from "approvals" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "approvals" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))); end;
CREATE TRIGGER "approvals.blocked at update" after update of status on "approvals"
  when new.group_id is not null and new.status < 2 and old.status > 2 and (
    exists (select 1 from "approvals" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "approvals" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))
  begin update "approvals" set status = 4 where id = new.id; end;
CREATE TRIGGER "approvals.next at update" after update of status on "approvals"
  when old.group_id is not null and old.status < 3 and new.status > 2 and new.released_at is null
  begin update "approvals" set status = 1 where id = (
      select b.id from "approvals" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE TRIGGER "approvals.next at delete" after delete on "approvals"
  when old.group_id is not null and (old.status < 3 or old.released_at is not null)
  begin update "approvals" set status = 1 where id = (
      select b.id from "approvals" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE INDEX "completions.ready" on "completions" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "completions.claimed" on "completions" (owner) where status = 2;
CREATE INDEX "completions.scheduled" on "completions" (due_at) where status = 3;
CREATE INDEX "completions.handed_over" on "completions" (claimed_at) where status = 5;
CREATE INDEX "completions.retrying" on "completions" (released_at) where status = 3 and released_at is not null;
CREATE INDEX "completions.expiring" on "completions" (expires_at) where expires_at is not null;
CREATE INDEX "completions.group" on "completions" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "completions.waits at insert" after insert on "completions"
  when new.status < 2 and (new.due_at is not null or new.group_id is not null)
  begin update "completions" set status = iif(due_at is null, 4, 3)
    where id = new.id and (due_at is not null or (
    exists (select 1 from "completions" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "completions" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))); end;
CREATE TRIGGER "completions.blocked at update" after update of status on "completions"
  when new.group_id is not null and new.status < 2 and old.status > 2 and (
    exists (select 1 from "completions" where group_id = new.group_id and status < 3 and id <> new.id)
    or exists (select 1 from "completions" where group_id = new.group_id and status = 3 and released_at > 0 and id <> new.id))
  begin update "completions" set status = 4 where id = new.id; end;
CREATE TRIGGER "completions.next at update" after update of status on "completions"
  when old.group_id is not null and old.status < 3 and new.status > 2 and new.released_at is null
  begin update "completions" set status = 1 where id = (
      select b.id from "completions" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "completions" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "completions" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE TRIGGER "completions.next at delete" after delete on "completions"
  when old.group_id is not null and (old.status < 3 or old.released_at is not null)
  begin update "completions" set status = 1 where id = (
      select b.id from "completions" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null
      order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "completions" where group_id = old.group_id and status < 3)
    and not exists (select 1 from "completions" where group_id = old.group_id and status = 3 and released_at > 0); end;
CREATE VIEW task_queue as
select 'approvals' as queue, coalesce(task_id, 'approvals-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "approvals" union all
select 'completions' as queue, coalesce(task_id, 'completions-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "completions" union all
select 'notifications' as queue, coalesce(task_id, 'notifications-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "notifications" union all
select queue, task_id, task_type, status, data, enqueued_at, started_at, completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from task_history;
UPDATE sqlite_sequence SET seq = 27 WHERE name = 'approvals';
UPDATE sqlite_sequence SET seq = 1 WHERE name = 'bare';
