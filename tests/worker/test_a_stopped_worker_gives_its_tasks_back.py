import signal
import time

import pytest
from conftest import wait_for
from processes import group_lives, lines, lives, processor_seconds, stays_true

pytestmark = pytest.mark.alone

WAIT = (
    '#!/bin/sh\necho $$ >>"$HOME/runs"\nuntil [ -e "$HOME/go" ]; do sleep 0.02; done\necho done\n'
)
DEAF = "#!/bin/sh\ntrap '' TERM\n" + WAIT.removeprefix("#!/bin/sh\n")


@pytest.fixture
def busy(installation):
    """busy(options…): a worker that runs one task and has another waiting; (worker, handler's pid,
    its group: the same).
    """

    def make(*options, handler=WAIT):
        installation.handler("wait", handler)
        for name in ("first", "second"):
            installation.enqueue("notifications", "wait", "--task-id", name)
        worker = installation.worker("notifications", *options)
        (run,) = wait_for(lambda: lines(installation.directory / "runs"))
        return worker, int(run), int(run)

    yield make
    (installation.directory / "go").touch()
    groups = [int(line) for line in lines(installation.directory / "runs")]
    wait_for(lambda: not any(map(group_lives, groups)), what="the end of the handlers")


def waiting(installation) -> list:
    return installation.rows(
        "select task_id, status, attempts, owner from notifications order by id"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_one_leaves_within_a_second(installation, number):
    worker = installation.worker("notifications")
    began = time.monotonic()
    worker.send_signal(number)
    assert worker.wait(5) == 0 and time.monotonic() - began < 1
    assert list((installation.state / "workers").glob("[0-9]*-*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_may_finish_and_nothing_new_is_claimed(installation, busy, number):
    worker, pid, _ = busy()
    worker.send_signal(number)
    assert stays_true(lambda: lives(pid) and worker.poll() is None, 0.5)
    (installation.directory / "go").touch()
    assert worker.wait(10) == 0
    done = installation.history("first")
    assert (done["status"], done["attempts"], done["result"]) == ("completed", 1, "done\n")
    assert waiting(installation) == [("second", 1, 0, None)]
    assert len(lines(installation.directory / "runs")) == 1


def test_after_the_grace_the_handler_is_ended_and_its_task_is_back_uncounted(installation, busy):
    family = WAIT.replace("until", "sleep 100 &\nsh -c 'sleep 100; :' &\nuntil", 1)
    worker, _, group = busy("--grace", 0.3, handler=family)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0 and 0.3 < time.monotonic() - began < 3
    assert waiting(installation) == [("first", 1, 0, None), ("second", 1, 0, None)]
    wait_for(lambda: not group_lives(group), 1, "the end of the handler and its children")
    errors = installation.rows("select error from notifications order by id")
    assert errors == [("its worker was stopped",), (None,)]
    installation.handler("wait", WAIT)
    (installation.directory / "go").touch()
    installation.worker("notifications", "--max-attempts", 1)
    assert installation.finished("first")["attempts"] == 1


def test_a_deaf_handler_is_killed_and_waiting_for_that_costs_nothing(installation, busy):
    worker, _, group = busy("--grace", 0.1, "--kill-after", 2.5, handler=DEAF)
    worker.send_signal(signal.SIGTERM)
    assert stays_true(lambda: worker.poll() is None, 0.5)
    used = processor_seconds(worker.pid)
    assert stays_true(lambda: worker.poll() is None, 1.5)
    assert processor_seconds(worker.pid) - used < 0.3
    assert worker.wait(10) == 0 and not group_lives(group)
    assert waiting(installation)[0] == ("first", 1, 0, None)


@pytest.mark.parametrize("grace", [60, 0.1], ids=["before TERM was sent", "after it was"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_at_once(installation, busy, grace, second):
    worker, pid, group = busy("--grace", grace, "--kill-after", 60, handler=DEAF)
    worker.send_signal(signal.SIGTERM)
    assert stays_true(lambda: worker.poll() is None and lives(pid), 0.5)
    began = time.monotonic()
    worker.send_signal(second)
    assert worker.wait(5) == 0 and time.monotonic() - began < 1
    assert not group_lives(group)
    assert waiting(installation) == [("first", 1, 0, None), ("second", 1, 0, None)]


def test_a_handler_that_ends_well_during_the_grace_after_term_is_done(installation, busy):
    polite = WAIT.replace("until", "trap 'echo hurried; exit 0' TERM\nuntil", 1)
    worker, *_ = busy("--grace", 0.2, handler=polite)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert (installation.history("first")["status"], installation.history("first")["result"]) == (
        "completed",
        "hurried\n",
    )


def test_a_failure_of_its_own_during_the_grace_counts(installation, busy):
    worker, *_ = busy("--grace", 30, "--backoff", 3600, handler=WAIT + "exit 3\n")
    worker.send_signal(signal.SIGTERM)
    (installation.directory / "go").touch()
    assert worker.wait(10) == 0
    assert waiting(installation) == [("first", 3, 1, None), ("second", 1, 0, None)]


def test_another_worker_takes_over_at_once(installation, busy):
    worker, *_ = busy("--grace", 0.1)
    other = installation.worker("notifications", "--concurrency", 2)
    wait_for(lambda: len(lines(installation.directory / "runs")) == 2)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    wait_for(
        lambda: len(lines(installation.directory / "runs")) == 3,
        2,
        "the run of what the stopped one gave back",
    )
    (installation.directory / "go").touch()
    assert (
        installation.finished("first")["attempts"]
        == installation.finished("second")["attempts"]
        == 1
    )
    assert other.poll() is None


def test_being_stopped_again_and_again_never_spends_the_attempts(installation, busy):
    worker, *_ = busy("--grace", 0, "--max-attempts", 1)
    runs = installation.directory / "runs"
    for _ in range(3):
        before = len(lines(runs))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        worker = installation.worker("notifications", "--grace", 0, "--max-attempts", 1)
        wait_for(lambda before=before: len(lines(runs)) > before)
    (installation.directory / "go").touch()
    assert (
        installation.finished("first")["status"],
        installation.finished("first")["attempts"],
    ) == ("completed", 1)
