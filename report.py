#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Tell Claude, or you, how a workspace's tasks have ended since the last report.

    report.py              the tasks of the directory you are in
    report.py --peek       the same, and the next report tells them again
    report.py --hook       as the command of a UserPromptSubmit or SessionStart hook of Claude Code

Reports tasks that a handler completed, that failed, or that expired: the latest 10, and the number
of the others. A result that equals the last one told for the same task type and directory is not
told again; a result without faults is told only after one with faults. The first report goes back a
week. No task is taken from a queue. Output of handlers is quoted, since it is data.

A task belongs to the project whose hook enqueued it, else to its directory and to the project around
that. A git worktree is a workspace of its own.

  --hook        read the hook's payload from stdin; the report goes into Claude's context, and a line
                of it to you. Inside a handler's own run of Claude, and when a session is resumed, it
                tells nothing. A session that nobody attends takes no report away from yours.
  --marker FILE  with --hook: link FILE to STATE/quiet until the next task ends
  --wake        as the command of a Stop hook with "asyncRewake": wait for the tasks that this stop
                enqueued, and wake the session if one has failed or found something broken: exit
                code 42, which the installed hook turns into 2. A session is woken three times at
                most between two prompts of yours.
  --peek        do not remember the report
  -h, --help    this text

exit codes: 0 told, or nothing to tell; 1 the database cannot be used; 64 usage; 75 the database
is locked, try again. Never 2, which would block Claude Code.
"""

import os
import sys


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if "-h" in args or "--help" in args:
        from taskqueue.remedies import remedies_as_typed

        print(remedies_as_typed(__doc__))
        return 0
    try:
        if args == ["--wake"]:
            from taskqueue import waiter

            return waiter.main()
        from taskqueue import report
    except ImportError as error:
        print(f"report.py: {error}: run just install again", file=sys.stderr)
        return 1
    return report.main(args)


if __name__ == "__main__":
    code = main()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        pass
    finally:
        # The report is out and marked: a hook need not wait for Python's own end.
        os._exit(code)
