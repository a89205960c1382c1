#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Tell what became of a workspace's tasks since this was last told: to Claude, or to you.

    report.py              what ended for the directory you are in
    report.py --peek       the same, and it is told again next time
    report.py --hook       as the command of a UserPromptSubmit or SessionStart hook of Claude Code

It tells of tasks that a handler completed, that failed, or that expired: the latest 10, and the
number of the others. A result that equals the last one told for the same task type and directory is
not told again; that all is well is told only after something was not. A first report goes back a
week. It takes nothing from any queue. It quotes what handlers printed, since that is data.

A task belongs to the project whose hook enqueued it, else to its directory and to the project around
it. A git worktree is a workspace of its own.

  --hook        stdin is the hook's payload; the report goes into Claude's context, and a line of it
                to you. Inside a handler's own run of Claude, and when a session is resumed, it tells
                nothing. A session that nobody attends hears it besides those that somebody does.
  --marker FILE  with --hook: link FILE to STATE/quiet until the next task ends
  --peek        do not remember what was told
  -h, --help    this text

exit codes: 0 told, or nothing to tell; 1 the database cannot be used; 64 usage; 75 the database
is locked, try again. Never 2, which would block Claude Code.
"""

import os
import sys


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if "-h" in args or "--help" in args:
        print(__doc__)
        return 0
    try:
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
        # All is told and marked: neither Python's own end nor SQLite's clean-up is worth
        # a hook's time.
        os._exit(code)
