-- A database of schema version 3, as its scripts left it, with something of everything in it.
CREATE TABLE "approvals" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0)  -- enqueued, Unix seconds
                check (timestamp between 0 and 32503680000),
  status        integer not null default 1       -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
                check (typeof(status) = 'integer' and status between 0 and 5 and (status <> 4 or group_id is not null and released_at is null)),
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0       -- counted at the claim
                check (typeof(attempts) = 'integer' and attempts between 0 and 1000000000),
  owner         text check (owner is null or typeof(owner) = 'text'),  -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real check (claimed_at between 0 and 32503680000),
  delayed_at    real check (delayed_at between 0 and 32503680000),   -- due_at is a delay from then; null: a moment
  released_at   real check (released_at between 0 and 32503680000),  -- put back for later: it keeps its group's turn
  approved      integer not null default 0 check (approved in (0, 1)), -- by a person: it takes no new data
  own_attempts  integer                          -- the task's own maximum, instead of the claimer's
                check (own_attempts is null or typeof(own_attempts) = 'integer' and own_attempts > 0),
  max_attempts  integer                          -- these five: what the claimer wants done when the run ends,
                check (max_attempts is null or typeof(max_attempts) = 'integer' and max_attempts > 0),
  backoff       real check (backoff between 0 and 32503680000),      -- whoever records that
  then_queue    text,
  then_hold     integer not null default 0 check (then_hold in (0, 1)),
  chain         integer not null default 0 check (chain in (0, 1)),
  cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),  -- the owner ends the run
  rerun         text                             -- a later firing, for when the run ends: INSERT's values
                check (json_array_length(rerun) = 8 and json_type(json_extract(rerun, '$[0]')) = 'object'),
  error         text,                            -- of the last failed attempt
  is_envelope   integer generated always as (json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text') virtual,
  task_id       text generated always as (iif(is_envelope, nullif(json_extract(data, '$.task_id'), ''), null))
                stored unique on conflict ignore,
  task_type     text generated always as (coalesce(nullif(case when is_envelope then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name') end, ''),
                'approvals')) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (coalesce(due_at, 0) between 0 and 32503680000 and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
INSERT INTO "approvals" VALUES(1,'{"task_id": "runs", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.640", "data": {"n": 1}}',1.79610445264006948467e+09,2,3,NULL,'g',NULL,1,'1-dead',1.79610445264108681672e+09,NULL,NULL,0,NULL,4,1.0,NULL,0,0,0,'["{\"task_id\": \"runs\", \"task_type\": \"t\", \"enqueued_at\": \"2026-12-01 05:54:12.642\", \"data\": {\"n\": 7}}",1,null,5,"g",null,1796104452.64236,null]',NULL);
INSERT INTO "approvals" VALUES(3,'{"task_id": "blocked", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.643", "data": {}}',1.79610445264311552045e+09,4,0,NULL,'g',NULL,0,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(4,'{"task_id": "held", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.644", "data": {}}',1.79610445264360976212e+09,3,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(5,'{"task_id": "approved", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.644", "data": {}}',1.79610445264383172987e+09,1,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,1,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(6,'{"task_id": "later", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.644", "data": {}}',1.79610445264445137982e+09,3,0,1.79610805264445137982e+09,'h',NULL,0,NULL,NULL,1.79610445264445137982e+09,NULL,0,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
INSERT INTO "approvals" VALUES(7,'{"task_id": "away", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.645", "data": {}}',1.79610445264468812946e+09,5,0,NULL,NULL,NULL,0,'hub-1',1.0,NULL,NULL,0,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
CREATE TABLE "completions" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0)  -- enqueued, Unix seconds
                check (timestamp between 0 and 32503680000),
  status        integer not null default 1       -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
                check (typeof(status) = 'integer' and status between 0 and 5 and (status <> 4 or group_id is not null and released_at is null)),
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0       -- counted at the claim
                check (typeof(attempts) = 'integer' and attempts between 0 and 1000000000),
  owner         text check (owner is null or typeof(owner) = 'text'),  -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real check (claimed_at between 0 and 32503680000),
  delayed_at    real check (delayed_at between 0 and 32503680000),   -- due_at is a delay from then; null: a moment
  released_at   real check (released_at between 0 and 32503680000),  -- put back for later: it keeps its group's turn
  approved      integer not null default 0 check (approved in (0, 1)), -- by a person: it takes no new data
  own_attempts  integer                          -- the task's own maximum, instead of the claimer's
                check (own_attempts is null or typeof(own_attempts) = 'integer' and own_attempts > 0),
  max_attempts  integer                          -- these five: what the claimer wants done when the run ends,
                check (max_attempts is null or typeof(max_attempts) = 'integer' and max_attempts > 0),
  backoff       real check (backoff between 0 and 32503680000),      -- whoever records that
  then_queue    text,
  then_hold     integer not null default 0 check (then_hold in (0, 1)),
  chain         integer not null default 0 check (chain in (0, 1)),
  cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),  -- the owner ends the run
  rerun         text                             -- a later firing, for when the run ends: INSERT's values
                check (json_array_length(rerun) = 8 and json_type(json_extract(rerun, '$[0]')) = 'object'),
  error         text,                            -- of the last failed attempt
  is_envelope   integer generated always as (json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text') virtual,
  task_id       text generated always as (iif(is_envelope, nullif(json_extract(data, '$.task_id'), ''), null))
                stored unique on conflict ignore,
  task_type     text generated always as (coalesce(nullif(case when is_envelope then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name') end, ''),
                'completions')) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (coalesce(due_at, 0) between 0 and 32503680000 and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
CREATE TABLE "nightly" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0)  -- enqueued, Unix seconds
                check (timestamp between 0 and 32503680000),
  status        integer not null default 1       -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
                check (typeof(status) = 'integer' and status between 0 and 5 and (status <> 4 or group_id is not null and released_at is null)),
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0       -- counted at the claim
                check (typeof(attempts) = 'integer' and attempts between 0 and 1000000000),
  owner         text check (owner is null or typeof(owner) = 'text'),  -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real check (claimed_at between 0 and 32503680000),
  delayed_at    real check (delayed_at between 0 and 32503680000),   -- due_at is a delay from then; null: a moment
  released_at   real check (released_at between 0 and 32503680000),  -- put back for later: it keeps its group's turn
  approved      integer not null default 0 check (approved in (0, 1)), -- by a person: it takes no new data
  own_attempts  integer                          -- the task's own maximum, instead of the claimer's
                check (own_attempts is null or typeof(own_attempts) = 'integer' and own_attempts > 0),
  max_attempts  integer                          -- these five: what the claimer wants done when the run ends,
                check (max_attempts is null or typeof(max_attempts) = 'integer' and max_attempts > 0),
  backoff       real check (backoff between 0 and 32503680000),      -- whoever records that
  then_queue    text,
  then_hold     integer not null default 0 check (then_hold in (0, 1)),
  chain         integer not null default 0 check (chain in (0, 1)),
  cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),  -- the owner ends the run
  rerun         text                             -- a later firing, for when the run ends: INSERT's values
                check (json_array_length(rerun) = 8 and json_type(json_extract(rerun, '$[0]')) = 'object'),
  error         text,                            -- of the last failed attempt
  is_envelope   integer generated always as (json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text') virtual,
  task_id       text generated always as (iif(is_envelope, nullif(json_extract(data, '$.task_id'), ''), null))
                stored unique on conflict ignore,
  task_type     text generated always as (coalesce(nullif(case when is_envelope then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name') end, ''),
                'nightly')) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (coalesce(due_at, 0) between 0 and 32503680000 and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
INSERT INTO "nightly" VALUES(1,'{"task_id": "one", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.652", "data": {"x": "ü"}}',1.79610445265171074871e+09,1,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,0,0,NULL,NULL);
CREATE TABLE "notifications" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object check (typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0)  -- enqueued, Unix seconds
                check (timestamp between 0 and 32503680000),
  status        integer not null default 1       -- 0, 1 ready, 2 claimed, 3 scheduled or held, 4 blocked, 5 handed over
                check (typeof(status) = 'integer' and status between 0 and 5 and (status <> 4 or group_id is not null and released_at is null)),
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then; null: it is held
  group_id      text,                            -- tasks of one group run one at a time
  expires_at    real,                            -- not claimed by then, it ends as expired; Unix seconds
  attempts      integer not null default 0       -- counted at the claim
                check (typeof(attempts) = 'integer' and attempts between 0 and 1000000000),
  owner         text check (owner is null or typeof(owner) = 'text'),  -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real check (claimed_at between 0 and 32503680000),
  delayed_at    real check (delayed_at between 0 and 32503680000),   -- due_at is a delay from then; null: a moment
  released_at   real check (released_at between 0 and 32503680000),  -- put back for later: it keeps its group's turn
  approved      integer not null default 0 check (approved in (0, 1)), -- by a person: it takes no new data
  own_attempts  integer                          -- the task's own maximum, instead of the claimer's
                check (own_attempts is null or typeof(own_attempts) = 'integer' and own_attempts > 0),
  max_attempts  integer                          -- these five: what the claimer wants done when the run ends,
                check (max_attempts is null or typeof(max_attempts) = 'integer' and max_attempts > 0),
  backoff       real check (backoff between 0 and 32503680000),      -- whoever records that
  then_queue    text,
  then_hold     integer not null default 0 check (then_hold in (0, 1)),
  chain         integer not null default 0 check (chain in (0, 1)),
  cancel_requested integer not null default 0 check (cancel_requested in (0, 1)),  -- the owner ends the run
  rerun         text                             -- a later firing, for when the run ends: INSERT's values
                check (json_array_length(rerun) = 8 and json_type(json_extract(rerun, '$[0]')) = 'object'),
  error         text,                            -- of the last failed attempt
  is_envelope   integer generated always as (json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text' and json_type(data, '$.task_id') = 'text') virtual,
  task_id       text generated always as (iif(is_envelope, nullif(json_extract(data, '$.task_id'), ''), null))
                stored unique on conflict ignore,
  task_type     text generated always as (coalesce(nullif(case when is_envelope then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name') end, ''),
                'notifications')) stored,
  constraint priority_must_be_a_whole_number_within_a_million
    check (typeof(priority) = 'integer' and abs(priority) <= 1000000),
  constraint due_at_and_expires_at_must_be_unix_seconds
    check (coalesce(due_at, 0) between 0 and 32503680000 and coalesce(expires_at, 0) between 0 and 32503680000),
  constraint group_id_must_be_a_text_of_500_characters_at_most
    check (group_id is null or typeof(group_id) = 'text' and length(group_id) between 1 and 500)
);
INSERT INTO "notifications" VALUES(3,'{"task_id": "waits", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.649", "data": {}}',1.7961044526493005753e+09,1,0,NULL,NULL,NULL,0,NULL,NULL,NULL,NULL,0,9,NULL,NULL,NULL,0,0,0,NULL,NULL);
CREATE TABLE task_controls (       -- what holds a queue back; no row: nothing
  queue         text primary key,
  paused_at     real check (paused_at between 0 and 32503680000),     -- Unix seconds; null: not paused
  paused_until  real check (paused_until between 0 and 32503680000),  -- null: until a person resumes it
  pause_reason  text,
  paused_by     text check (paused_by in ('person', 'handler')),
  slots         integer check (slots is null or typeof(slots) = 'integer' and slots > 0)  -- that run at a time
);
INSERT INTO "task_controls" VALUES('nightly',1.79610445265463161473e+09,NULL,'by hand','person',NULL);
INSERT INTO "task_controls" VALUES('approvals',NULL,NULL,NULL,NULL,2);
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
  approval      text check (approval in ('held', 'approved')),  -- null: it needed none
  enqueued_at   text not null,                   -- times are UTC: YYYY-MM-DD HH:MM:SS.SSS
  started_at    text,                            -- of the last attempt
  completed_at  text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  exit_code     integer,                         -- of the handler; 128 + n for signal n
  result        text,                            -- the end of its stdout
  log           text,                            -- the end of its stderr
  error         text                             -- why it failed, in one line
);
INSERT INTO "task_history" VALUES(1,'notifications',1,'done','t','completed','{"task_id": "done", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.645", "data": {}}',0,NULL,1,4,NULL,'2026-12-01 05:54:12.645','2026-12-01 05:54:12.647','2026-12-01 05:54:12.648',NULL,'r',NULL,NULL);
INSERT INTO "task_history" VALUES(2,'notifications',2,'failed','t','failed','{"task_id": "failed", "task_type": "t", "enqueued_at": "2026-12-01 05:54:12.646", "data": {}}',0,NULL,1,4,NULL,'2026-12-01 05:54:12.646','2026-12-01 05:54:12.649','2026-12-01 05:54:12.649',NULL,NULL,NULL,'broken');
CREATE TABLE task_marks (          -- the last row of the history that was reported
  workspace     text primary key,
  history_id    integer not null
);
INSERT INTO "task_marks" VALUES('/w',2);
CREATE TABLE task_spooled (
  file          text primary key                 -- taken in, and perhaps not yet removed
);
CREATE TABLE task_told (           -- the last result that was reported
  workspace     text not null,
  task_type     text not null,
  directory     text not null,
  told          text not null,
  primary key (workspace, task_type, directory)
);
INSERT INTO "task_told" VALUES('/w','t','d','x');
CREATE INDEX "task_history.completed_at" on task_history (completed_at, queue, task_type, status);
CREATE INDEX "task_history.type" on task_history (queue, task_type, status, completed_at, started_at, enqueued_at);
CREATE INDEX "task_history.task_id" on task_history (task_id);
CREATE INDEX "task_history.failed" on task_history (queue, completed_at) where status = 'failed';
CREATE INDEX "notifications.ready" on "notifications" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "notifications.claimed" on "notifications" (owner) where status = 2;
CREATE INDEX "notifications.scheduled" on "notifications" (due_at) where status = 3;
CREATE INDEX "notifications.delayed" on "notifications" (2 * delayed_at - due_at) where status = 3 and delayed_at is not null;
CREATE INDEX "notifications.handed_over" on "notifications" (claimed_at) where status = 5;
CREATE INDEX "notifications.expiring" on "notifications" (expires_at) where expires_at is not null;
CREATE INDEX "notifications.group" on "notifications" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "notifications.waits at insert" after insert on "notifications"
  when (new.status < 2 or new.status = 4) and (new.due_at is not null or new.group_id is not null)
  begin update "notifications" set status = iif(due_at is not null, 3, iif((
    exists (select 1 from "notifications" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "notifications" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1))
    where id = new.id and (due_at is not null or status = 4 or (
    exists (select 1 from "notifications" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "notifications" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id))); end;
CREATE TRIGGER "notifications.waits at update" after update of status, group_id on "notifications"
  when new.status < 2 and old.status > 2 and (new.group_id is not null or old.due_at is null)
    or new.group_id is not old.group_id and (new.status < 2 or new.status = 4)
  begin update "notifications" set status = iif(new.group_id is not null and (
    exists (select 1 from "notifications" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "notifications" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1),
    approved = approved or old.status = 3 and old.due_at is null where id = new.id; end;
CREATE TRIGGER "notifications.next at update" after update of status, group_id on "notifications"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null) and not ((new.status < 3 or new.status = 5 or new.status = 3 and new.released_at is not null) and new.group_id is old.group_id)
  begin update "notifications" set status = 1 where id = (
      select b.id from "notifications" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "notifications" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE TRIGGER "notifications.next at delete" after delete on "notifications"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null)
  begin update "notifications" set status = 1 where id = (
      select b.id from "notifications" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "notifications" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "notifications" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE INDEX "approvals.ready" on "approvals" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "approvals.claimed" on "approvals" (owner) where status = 2;
CREATE INDEX "approvals.scheduled" on "approvals" (due_at) where status = 3;
CREATE INDEX "approvals.delayed" on "approvals" (2 * delayed_at - due_at) where status = 3 and delayed_at is not null;
CREATE INDEX "approvals.handed_over" on "approvals" (claimed_at) where status = 5;
CREATE INDEX "approvals.expiring" on "approvals" (expires_at) where expires_at is not null;
CREATE INDEX "approvals.group" on "approvals" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "approvals.waits at insert" after insert on "approvals"
  when (new.status < 2 or new.status = 4) and (new.due_at is not null or new.group_id is not null)
  begin update "approvals" set status = iif(due_at is not null, 3, iif((
    exists (select 1 from "approvals" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "approvals" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1))
    where id = new.id and (due_at is not null or status = 4 or (
    exists (select 1 from "approvals" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "approvals" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id))); end;
CREATE TRIGGER "approvals.waits at update" after update of status, group_id on "approvals"
  when new.status < 2 and old.status > 2 and (new.group_id is not null or old.due_at is null)
    or new.group_id is not old.group_id and (new.status < 2 or new.status = 4)
  begin update "approvals" set status = iif(new.group_id is not null and (
    exists (select 1 from "approvals" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "approvals" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1),
    approved = approved or old.status = 3 and old.due_at is null where id = new.id; end;
CREATE TRIGGER "approvals.next at update" after update of status, group_id on "approvals"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null) and not ((new.status < 3 or new.status = 5 or new.status = 3 and new.released_at is not null) and new.group_id is old.group_id)
  begin update "approvals" set status = 1 where id = (
      select b.id from "approvals" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "approvals" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE TRIGGER "approvals.next at delete" after delete on "approvals"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null)
  begin update "approvals" set status = 1 where id = (
      select b.id from "approvals" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "approvals" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "approvals" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE INDEX "completions.ready" on "completions" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "completions.claimed" on "completions" (owner) where status = 2;
CREATE INDEX "completions.scheduled" on "completions" (due_at) where status = 3;
CREATE INDEX "completions.delayed" on "completions" (2 * delayed_at - due_at) where status = 3 and delayed_at is not null;
CREATE INDEX "completions.handed_over" on "completions" (claimed_at) where status = 5;
CREATE INDEX "completions.expiring" on "completions" (expires_at) where expires_at is not null;
CREATE INDEX "completions.group" on "completions" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "completions.waits at insert" after insert on "completions"
  when (new.status < 2 or new.status = 4) and (new.due_at is not null or new.group_id is not null)
  begin update "completions" set status = iif(due_at is not null, 3, iif((
    exists (select 1 from "completions" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "completions" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1))
    where id = new.id and (due_at is not null or status = 4 or (
    exists (select 1 from "completions" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "completions" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id))); end;
CREATE TRIGGER "completions.waits at update" after update of status, group_id on "completions"
  when new.status < 2 and old.status > 2 and (new.group_id is not null or old.due_at is null)
    or new.group_id is not old.group_id and (new.status < 2 or new.status = 4)
  begin update "completions" set status = iif(new.group_id is not null and (
    exists (select 1 from "completions" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "completions" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1),
    approved = approved or old.status = 3 and old.due_at is null where id = new.id; end;
CREATE TRIGGER "completions.next at update" after update of status, group_id on "completions"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null) and not ((new.status < 3 or new.status = 5 or new.status = 3 and new.released_at is not null) and new.group_id is old.group_id)
  begin update "completions" set status = 1 where id = (
      select b.id from "completions" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "completions" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "completions" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE TRIGGER "completions.next at delete" after delete on "completions"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null)
  begin update "completions" set status = 1 where id = (
      select b.id from "completions" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "completions" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "completions" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE INDEX "nightly.ready" on "nightly" (priority desc, id, task_type, timestamp) where status < 2;
CREATE INDEX "nightly.claimed" on "nightly" (owner) where status = 2;
CREATE INDEX "nightly.scheduled" on "nightly" (due_at) where status = 3;
CREATE INDEX "nightly.delayed" on "nightly" (2 * delayed_at - due_at) where status = 3 and delayed_at is not null;
CREATE INDEX "nightly.handed_over" on "nightly" (claimed_at) where status = 5;
CREATE INDEX "nightly.expiring" on "nightly" (expires_at) where expires_at is not null;
CREATE INDEX "nightly.group" on "nightly" (group_id, status, released_at, priority desc, id) where group_id is not null;
CREATE TRIGGER "nightly.waits at insert" after insert on "nightly"
  when (new.status < 2 or new.status = 4) and (new.due_at is not null or new.group_id is not null)
  begin update "nightly" set status = iif(due_at is not null, 3, iif((
    exists (select 1 from "nightly" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "nightly" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1))
    where id = new.id and (due_at is not null or status = 4 or (
    exists (select 1 from "nightly" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "nightly" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id))); end;
CREATE TRIGGER "nightly.waits at update" after update of status, group_id on "nightly"
  when new.status < 2 and old.status > 2 and (new.group_id is not null or old.due_at is null)
    or new.group_id is not old.group_id and (new.status < 2 or new.status = 4)
  begin update "nightly" set status = iif(new.group_id is not null and (
    exists (select 1 from "nightly" where group_id = new.group_id and status in (0, 1, 2, 5) and id <> new.id)
    or exists (select 1 from "nightly" where group_id = new.group_id and status = 3 and released_at >= 0 and id <> new.id)), 4, 1),
    approved = approved or old.status = 3 and old.due_at is null where id = new.id; end;
CREATE TRIGGER "nightly.next at update" after update of status, group_id on "nightly"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null) and not ((new.status < 3 or new.status = 5 or new.status = 3 and new.released_at is not null) and new.group_id is old.group_id)
  begin update "nightly" set status = 1 where id = (
      select b.id from "nightly" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "nightly" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "nightly" where group_id = old.group_id and status = 3 and released_at >= 0); end;
CREATE TRIGGER "nightly.next at delete" after delete on "nightly"
  when old.group_id is not null and (old.status < 3 or old.status = 5 or old.status = 3 and old.released_at is not null)
  begin update "nightly" set status = 1 where id = (
      select b.id from "nightly" b where b.group_id = old.group_id and b.status = 4 and b.released_at is null order by b.priority desc, b.id limit 1)
    and not exists (select 1 from "nightly" where group_id = old.group_id and status in (0, 1, 2, 5))
    and not exists (select 1 from "nightly" where group_id = old.group_id and status = 3 and released_at >= 0); end;
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
select 'nightly' as queue, coalesce(task_id, 'nightly-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "nightly" union all
select 'notifications' as queue, coalesce(task_id, 'notifications-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 4 then 'blocked' when 5 then 'handed_over'
  when 3 then iif(due_at is null, 'held', 'scheduled') else 'pending' end as status, data, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from "notifications" union all
select queue, task_id, task_type, status, data, enqueued_at, started_at, completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, 4) - 1 as max_retries, error as error_message
from task_history;
INSERT INTO "sqlite_sequence" VALUES('approvals',7);
INSERT INTO "sqlite_sequence" VALUES('notifications',3);
INSERT INTO "sqlite_sequence" VALUES('nightly',1);

