#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Put a task into a queue. It is on disk when this prints its id and exits 0.

    enqueue.py notifications link_validation '{"workspace_path": "/home/user/docs"}'
    generate | enqueue.py approvals review --jsonl          one payload a line, all or none
    enqueue.py --hook notifications link_validation         as the command of a Claude Code hook

usage: enqueue.py QUEUE TASK_TYPE [DATA] [options]
       enqueue.py QUEUE [TASK_TYPE] --jsonl [options]
       enqueue.py --hook QUEUE [TASK_TYPE] [options]
       enqueue.py --run [--queue QUEUE] [options] -- COMMAND ...

DATA is a JSON object. `-` reads it from stdin, and without it the data is {}. TASK_TYPE names the
handler. This prints `queued ID`. Where a task with that id waits or runs already, it prints
`duplicate ID`, or with --on-duplicate `updated ID`. With --hook it prints nothing.

A DURATION is a number of seconds, or a number with a unit like 90m, 5min, 1.5h or 2d. A TIME is
like 23:30 (the next one), "tomorrow 9:00" or 2026-12-01T09:00: it is local time unless it names a
zone. A time that has passed is refused.

  --task-id ID          name the task; unique among the queue's waiting and running tasks
                        (default: random)
  --delay DURATION      start the task this long from now at the earliest
  --at TIME             start the task at this time at the earliest
  --hold                keep the task until a person approves it
  --ttl DURATION        let the task expire unless it starts this long after it is due
  --timeout DURATION    end an attempt that takes longer; a worker's shorter timeout counts
  --max-attempts N      try the task this often, whatever the worker's number is
  --after ID            start the task when that one has completed; if it ends otherwise, so does
                        this one, as cancelled (several: give the option several times)
  --after-any ID        start the task when that one has ended, however
  --priority N          start tasks with a higher number first (default 0)
  --group KEY           run the queue's tasks of one group one at a time, in order
  --on-duplicate DO     where a task with this id waits or runs, do one of these (default skip):
                        skip: store nothing; replace, rerun: a waiting task becomes this one, with
                        all its terms, and a running one is followed by it. A held or approved task
                        does not change: this one is then a duplicate, but a rerun over an approved
                        task that runs is held when that run ends. A rerun looks at --window only
                        where two hooks tell of the same firing.
  --window DURATION     a finished task with this id that was enqueued this recently makes this one
                        a duplicate, too (default 0, and 10 with --hook)
  --wait DURATION       wait this long for the database (default 5, and 1 with --hook; after that
                        the firing goes to the spool)
  --jsonl               take a task from each line of stdin: its payload, or without TASK_TYPE an
                        object with task_type and any of data, task_id, delay, at, hold, ttl,
                        timeout, max_attempts, after, after_any, priority, group, on_duplicate and
                        window
  --json                print a JSON object for each task: outcome, task_id, queue and notes
  --new                 do not remark that the queue is new
  --start-worker        start a detached worker if none serves the queue
  -V, --version         print the version
  -h, --help            print this text

  --run                 make a task of a shell's command: handlers/run runs it as it stands, in the
                        present directory, once unless --max-attempts says more. Queue:
                        notifications, or --queue.

  --hook                take a hook's payload from stdin as the task's data, with workspace_path
                        from its cwd and project_dir from CLAUDE_PROJECT_DIR. TASK_TYPE defaults to
                        the event's name.
  --data JSON           add these fields to the payload, over its own. A handler takes a hook task's
                        rights (like permission_mode) from here, never from the payload.
  --once-per KEY        make one task of firings with the same session, workspace or content
                        (default: the same payload)
  --group-by KEY        use the hook's workspace, project or session as the group
  --nested              enqueue inside a handler's own run, too

exit codes: 0 stored (or a duplicate); 1 the database cannot be used; 64 usage; 65 the task was
refused; 75 the database is locked, try again. Never 2, which would block Claude Code.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    # Python compiles a module once, and a script at each start.
    try:
        from taskqueue import enqueue
    except Exception as error:
        # A hook has one chance to say why.
        sys.exit(f"enqueue.py: taskqueue/ cannot be loaded ({error}): run just install again")
    return enqueue.main(argv, help_text=__doc__)


if __name__ == "__main__":
    from taskqueue.enqueue import leave

    leave(main())
