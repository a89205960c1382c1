-- A database of schema version 1, as its scripts made it (sqlite3's .schema), with something of everything in it.
CREATE TABLE task_history (
  id            integer primary key,
  queue         text not null,
  row_id        integer not null,                -- the id it had in its queue; never used again there
  task_id       text not null,
  task_type     text not null,
  status        text not null check (status in ('completed', 'failed', 'cancelled')),
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
CREATE INDEX "task_history.completed_at" on task_history (completed_at, queue, task_type, status);
CREATE INDEX "task_history.type" on task_history (queue, task_type, status, completed_at, started_at, enqueued_at);
CREATE INDEX "task_history.task_id" on task_history (task_id);
CREATE INDEX "task_history.failed" on task_history (queue, completed_at) where status = 'failed';
CREATE TABLE task_paused (
  queue         text primary key,
  paused_at     text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);
CREATE TABLE task_spooled (
  file          text primary key                 -- taken in, and perhaps not yet removed
);
CREATE TABLE IF NOT EXISTS "approvals" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object
                check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0 and 1 ready, 2 claimed, 3 scheduled, 4 blocked
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then, Unix seconds
  group_id      text,                            -- tasks of one group run one at a time
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  max_attempts  integer,                         -- these three: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  cancel_requested integer not null default 0,   -- tasks.py cancel: the owner ends the run
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                virtual unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'approvals' end) virtual
);
CREATE INDEX "approvals.ready" on "approvals" (priority desc, id) where status < 2;
CREATE INDEX "approvals.type" on "approvals" (task_type, priority desc, id, timestamp) where status < 2;
CREATE INDEX "approvals.claimed" on "approvals" (owner) where status = 2;
CREATE INDEX "approvals.scheduled" on "approvals" (due_at) where status = 3;
CREATE INDEX "approvals.blocked" on "approvals" (group_id, id) where status = 4;
CREATE TABLE IF NOT EXISTS "completions" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object
                check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0 and 1 ready, 2 claimed, 3 scheduled, 4 blocked
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then, Unix seconds
  group_id      text,                            -- tasks of one group run one at a time
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  max_attempts  integer,                         -- these three: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  cancel_requested integer not null default 0,   -- tasks.py cancel: the owner ends the run
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                virtual unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'completions' end) virtual
);
CREATE INDEX "completions.ready" on "completions" (priority desc, id) where status < 2;
CREATE INDEX "completions.type" on "completions" (task_type, priority desc, id, timestamp) where status < 2;
CREATE INDEX "completions.claimed" on "completions" (owner) where status = 2;
CREATE INDEX "completions.scheduled" on "completions" (due_at) where status = 3;
CREATE INDEX "completions.blocked" on "completions" (group_id, id) where status = 4;
CREATE TABLE IF NOT EXISTS "notifications" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object
                check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0 and 1 ready, 2 claimed, 3 scheduled, 4 blocked
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then, Unix seconds
  group_id      text,                            -- tasks of one group run one at a time
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  max_attempts  integer,                         -- these three: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  cancel_requested integer not null default 0,   -- tasks.py cancel: the owner ends the run
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                virtual unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'notifications' end) virtual
);
CREATE INDEX "notifications.ready" on "notifications" (priority desc, id) where status < 2;
CREATE INDEX "notifications.type" on "notifications" (task_type, priority desc, id, timestamp) where status < 2;
CREATE INDEX "notifications.claimed" on "notifications" (owner) where status = 2;
CREATE INDEX "notifications.scheduled" on "notifications" (due_at) where status = 3;
CREATE INDEX "notifications.blocked" on "notifications" (group_id, id) where status = 4;
CREATE TABLE IF NOT EXISTS "nightly" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object
                check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0 and 1 ready, 2 claimed, 3 scheduled, 4 blocked
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then, Unix seconds
  group_id      text,                            -- tasks of one group run one at a time
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  max_attempts  integer,                         -- these three: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  cancel_requested integer not null default 0,   -- tasks.py cancel: the owner ends the run
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then nullif(json_extract(data, '$.task_id'), '') end)
                virtual unique on conflict ignore,
  task_type     text generated always as (case when json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text' then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else 'nightly' end) virtual
);
CREATE INDEX "nightly.ready" on "nightly" (priority desc, id) where status < 2;
CREATE INDEX "nightly.type" on "nightly" (task_type, priority desc, id, timestamp) where status < 2;
CREATE INDEX "nightly.claimed" on "nightly" (owner) where status = 2;
CREATE INDEX "nightly.scheduled" on "nightly" (due_at) where status = 3;
CREATE INDEX "nightly.blocked" on "nightly" (group_id, id) where status = 4;
CREATE VIEW task_queue as
select 'approvals' as queue, coalesce(task_id, 'approvals-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status, data,
  strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "approvals" union all
select 'completions' as queue, coalesce(task_id, 'completions-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status, data,
  strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "completions" union all
select 'nightly' as queue, coalesce(task_id, 'nightly-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status, data,
  strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "nightly" union all
select 'notifications' as queue, coalesce(task_id, 'notifications-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status, data,
  strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "notifications" union all
select queue, task_id, task_type, status, data, enqueued_at, started_at, completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from task_history
/* task_queue(queue,task_id,task_type,status,data,enqueued_at,started_at,completed_at,retry_count,max_retries,error_message) */;

-- What people, hooks and programs had put into it.
insert into notifications (id, data) values (1, '{"workspace": "/home/user/docs"}');
insert into notifications (id, data, status) values (2, '{"task_id": "zero", "task_type": "t", "data": {"n": 2}}', 0);
insert into notifications (id, data, priority, timestamp) values (3, '{"task_id": "önß", "task_type": "t", "data": {"n": 3}}', 7, 1700000000.5);
insert into notifications (id, data, status, attempts, owner, claimed_at, max_attempts, backoff, then_queue)
values (4, '{"task_id": "claimed", "task_type": "t", "data": {}}', 2, 3, '1-dead', 1700000000.25, 4, 2.5, 'completions');
insert into notifications (id, data, status, owner, cancel_requested, claimed_at, attempts)
values (5, '{"task_id": "cancelled", "task_type": "t", "data": {}}', 2, '1-dead', 1, 1700000000.25, 1);
insert into notifications (id, data, status, due_at, attempts, error)
values (6, '{"task_id": "retrying", "task_type": "t", "data": {}}', 3, 4000000000.5, 2, 'exit 1');
insert into notifications (id, data, status, due_at) values (7, '{"hook_event_name": "Stop"}', 3, 5);
insert into notifications (id, data, status, group_id) values (8, '{"n": 8}', 4, 'set aside');
insert into notifications (id, data) values (9, '{"gone": true}');
delete from notifications where id = 9;
-- Nonsense from bash: nothing of it was checked.
insert into notifications (id, data, priority) values (20, '{"n": 20}', 'high');
insert into notifications (id, data, priority) values (21, '{"n": 21}', 1e99);
insert into notifications (id, data, priority) values (22, '{"n": 22}', 2.5);
insert into notifications (id, data, status, due_at) values (23, '{"n": 23}', 3, 'tomorrow');
insert into notifications (id, data, status, due_at) values (24, '{"n": 24}', 3, 1764120000000);
insert into notifications (id, data, status, due_at) values (25, '{"n": 25}', 3, -5);
insert into notifications (id, data, group_id) values (26, '{"n": 26}', printf('%.*c', 1000000, 'x'));
insert into notifications (id, data, group_id) values (27, '{"n": 27}', '');
insert into notifications (id, data, group_id) values (28, '{"n": 28}', x'00ff');
insert into notifications (id, data, timestamp) values (29, '{"n": 29}', 'yesterday');
insert into notifications (id, data, attempts, max_attempts) values (30, '{"n": 30}', 'many', 'few');
-- One group: two wait, and the last one runs.
insert into approvals (id, data, group_id) values (1, '{"n": 1}', 'a'), (2, '{"n": 2}', 'a');
insert into approvals (id, data, group_id, status, owner, claimed_at, attempts) values (3, '{"n": 3}', 'a', 2, '1-dead', 1700000000, 1);
insert into nightly (id, data) values (9007199254740993, '{"n": 1}');
insert into task_history (id, queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
  enqueued_at, started_at, completed_at, exit_code, result, log, error)
values (1, 'notifications', 100, 'done', 't', 'completed', '{"n": 1}', 3, 'a', 1, 4, '2026-01-01 00:00:00.000',
  '2026-01-01 00:00:01.000', '2026-01-01 00:00:02.000', 0, 'result', 'log', null);
insert into task_history (id, queue, row_id, task_id, task_type, status, data, enqueued_at, error)
values (2, 'notifications', 101, 'dead', 't', 'failed', '{}', '2026-01-01 00:00:00.000', 'exit 1'),
  (7, 'gone', 1, 'gone-1', 't', 'cancelled', 'not even JSON', 'some day', 'cancelled');
insert into task_paused values ('approvals', '2026-01-01 12:00:00.500'), ('nightly', 'since Tuesday');
insert into task_spooled values ('notifications/1.json:1:1');
