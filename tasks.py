#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["cronsim>=2.6,<3", "jinja2>=3.1,<4", "rich>=13,<16", "watchdog>=4,<8"]
# ///
"""See what waits, runs, failed and why, and act on it.

    tasks.py stats --watch                      counts, waiting and run times, as they change
    tasks.py list --status failed --since 1h    the dead letters of the last hour, newest first
    tasks.py retry --failed --queue approvals   put them all back
    tasks.py approve ID                         let a held task run; reject ID ends it
    tasks.py ask                                go through the held tasks, and answer for each
    tasks.py pause approvals --for 2h           hold a queue back for so long
    tasks.py wait ID --timeout 10m              until it has ended; prints its result
    tasks.py doctor                             what is wrong, and what mends it

ID is a task's id, its beginning if only one task's id begins so, or a row's number in the list that
this terminal has shown last. DURATION is like 30, 90m, 5min, 1.5h or 2d. Every command has --help,
and --json for scripts. A status is pending, scheduled, held, blocked, in_progress, handed_over,
completed, failed, cancelled or expired. Only import, pause and limit make a database if there is none.

exit codes: 0 fine; 1 not possible, or the database cannot be used; 64 usage, or an id or a queue
that is not known, or an id of several tasks; 65 import refused lines (it names them, the others are
in); 75 the database is locked, try again; 130 interrupted. Of wait: 0 all completed; 1 one ended
otherwise; 75 the time-out. Of doctor: 1 something is wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from taskqueue import (
    act,
    ask,
    backup,
    cli,
    edit,
    jsonlines,
    look,
    notify,
    recurring,
    service,
    spool,
)
from taskqueue.cli import EX_USAGE
from taskqueue.remedies import SCRIPTS, command
from taskqueue.text import did_you_mean

# In the order in which --help names them.
COMMANDS = (
    look.stats,
    look.list_,
    look.show,
    look.logs,
    look.wait,
    ask.ask,
    act.approve,
    act.reject,
    act.retry,
    act.cancel,
    act.pause,
    act.resume,
    act.limit,
    edit.edit,
    notify.notify,
    act.move,
    act.purge,
    act.drop,
    act.take_in,
    look.page,
    look.doctor,
    jsonlines.export,
    jsonlines.import_,
    backup.backup,
    backup.restore,
)
# Wrong combinations of arguments, each of which is right.
FAULTS = {act.retry: act.fault_in_retry, act.move: act.fault_in_move, act.purge: act.fault_in_purge}
FAULTS |= {act.limit: act.fault_in_limit}
# Commands with a parser of their own.
OTHERS = {
    "completion": "Print a completion script for bash, zsh or fish",
    "every": "List recurring tasks, or add, switch and remove one",
    "service": "Have a worker started whenever there is work, by systemd or launchd",
}
NAMES = (*map(cli.name_of, COMMANDS), *OTHERS)


def make_parser() -> tuple[cli.Parser, dict[str, cli.Parser]]:
    """Return the parser, and those of the commands by their names."""
    parser = cli.make_parser("tasks.py", __doc__)
    commands = parser.add_subparsers(
        parser_class=cli.Parser, metavar="COMMAND", required=True, dest="command"
    )
    for run in COMMANDS:
        cli.add_command(commands, run)
    for name, says in OTHERS.items():
        commands.add_parser(name, help=says, add_help=False)
    return parser, commands.choices


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `run` is the command's function."""
    args = make_parser()[0].parse_args(argv)
    fault = FAULTS[args.run](args) if args.run in FAULTS else ""
    if fault:
        cli.Parser(prog=f"tasks.py {args.command}").error(fault)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    elif argv[:1] == ["version"]:
        argv = ["--version"]
    if argv[:1] == ["service"]:
        return service.main(argv[1:])
    if argv[:1] == ["every"]:
        return recurring.main(argv[1:])
    if argv[:1] == ["completion"]:
        from taskqueue import completion

        return completion.main(argv[1:], make_parser()[1], OTHERS)
    if argv[:1] == ["dashboard"]:
        why = f"{command('page --open')} replaced it"
        return cli.complain(EX_USAGE, "tasks.py dashboard", why)
    if argv and not argv[0].startswith("-") and argv[0] not in NAMES:
        near = did_you_mean(argv[0], [*NAMES, *SCRIPTS])
        why = f"there is no command {argv[0]!r}{near}; see {command('--help')}"
        return cli.complain(EX_USAGE, "tasks.py", why)
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")

    def work() -> int:
        # A restore lets what hooks left go into the database that it puts in place.
        if run not in (act.take_in, backup.restore, look.doctor):
            spool.take_in_first()
        return run(**args)

    return cli.run(f"tasks.py {name}", work)


if __name__ == "__main__":
    raise SystemExit(main())
