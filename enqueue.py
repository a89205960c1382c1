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

DATA is a JSON object. `-` reads it from stdin, and without it the data is {}. TASK_TYPE names the
handler. This prints `queued ID`. Where a task with that id waits or runs already, it prints
`duplicate ID`, or with --on-duplicate `updated ID`. With --hook it prints nothing.

A DURATION is a number of seconds, or a number with a unit like 90m, 5min, 1.5h or 2d. A TIME is
like 23:30 (the next one), "tomorrow 9:00" or 2026-12-01T09:00: it is local time unless it names a
zone. A time that has passed is refused.

  --task-id ID          The id is unique among the queue's waiting and running tasks. (default: random)
  --delay DURATION      The task is not started before this long from now.
  --at TIME             The task is not started before this time.
  --hold                The task waits until a person approves it.
  --ttl DURATION        A task that is not started this long after it is due ends as expired.
  --priority N          Tasks with a higher number are started first. (default 0)
  --group KEY           Tasks of one group of the queue run one at a time, in order.
  --on-duplicate WHAT   This says what becomes of a task whose id waits or runs already. With skip,
                        the default, nothing. With replace and rerun a waiting task becomes this one,
                        with all its terms, and a running one is followed by it. A held or approved
                        task does not change: this one is a duplicate, but a rerun over an approved
                        task that runs is held when the run ends.
                        rerun looks at --window only where the same firing of a hook is told twice.
  --window DURATION     A task with this id that was enqueued this recently and is finished makes
                        this one a duplicate, too. (default 0, and 10 with --hook)
  --wait DURATION       How long to wait for the database. (default 5, and 1 with --hook; then the
                        firing goes to the spool)
  --jsonl               Each line of stdin is a task: its payload, or without TASK_TYPE an object
                        with task_type and any of data, task_id, delay, at, hold, ttl, priority,
                        group, on_duplicate and window.
  --new                 A queue that is made for this task is not remarked on.
  --start-worker        A detached worker is started if none serves the queue.
  --version             The version is printed.
  -h, --help            This text is printed.

  --hook                Stdin is a hook's payload and becomes the task's data, with workspace_path
                        from its cwd and project_dir from CLAUDE_PROJECT_DIR. TASK_TYPE is the name
                        of the event unless it is given.
  --data JSON           These fields are added to the payload's, and win over them. Of a hook's task,
                        a handler takes rights (like permission_mode) from here, never from the
                        payload.
  --once-per KEY        KEY says what makes two firings of a hook one task: the same session,
                        workspace or content. (default: everything in the payload)
  --group-by KEY        The group is the hook's workspace, project or session.
  --nested              The hook enqueues even inside a handler's own run.

exit codes: 0 stored (or a duplicate); 1 the database cannot be used; 64 usage; 65 the task was
refused; 75 the database is locked, try again. Never 2, which would block Claude Code.
"""

import sys


def main(argv: list[str] | None = None) -> int:
    # The body is a module, which Python compiles once.
    try:
        from taskqueue import enqueue
    except Exception as error:
        # A hook has one chance to say why.
        sys.exit(f"enqueue.py: taskqueue/ cannot be loaded ({error}): run just install again")
    return enqueue.main(argv, help_text=__doc__)


if __name__ == "__main__":
    from taskqueue.enqueue import leave

    leave(main())
