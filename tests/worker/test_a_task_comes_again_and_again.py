"""tq every: what is due is enqueued once, whatever the clock, sleep and kills do."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from conftest import ROOT, wait_for

from taskqueue import every, recurring

DAY = 86_400


def at(zone: str, text: str, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def tq_every(installation, *words, code: int = 0):
    done = installation.run("tasks.py", "every", *words)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.fixture
def clock(monkeypatch):
    """A clock for the firing code: it says what the test sets."""

    class Clock:
        now = 1_790_000_000.0

        @staticmethod
        def time() -> float:
            return Clock.now

    monkeypatch.setattr(every, "time", Clock)
    monkeypatch.setattr(recurring, "time", Clock)
    return Clock


def add(conn, queue, clock, name: str, schedule: str, **terms) -> None:
    told = {"name": name, "queue": "approvals", "task_type": "t", "data": "{}", "now": clock.now}
    told |= {"schedule": schedule, "terms": json.dumps(terms)}
    with queue.transaction(conn):
        conn.execute(recurring.PUT, {**told, "next": every.next_time(schedule, clock.now)})


def fired(conn, queue) -> int:
    """Finish what has been enqueued; return how many tasks that were."""
    tasks = queue.claim_ready(conn, "approvals", limit=9)
    with queue.transaction(conn):
        for task in tasks:
            queue.ack(conn, task)
    return len(tasks)


@pytest.mark.parametrize("zone, schedule, begin, expected", [
    # In spring, 2:30 does not exist, and comes at once when the hour is skipped, as Debian's cron has it.
    ("Europe/Berlin", "30 2 * * *", "2026-03-28 12:00", ["2026-03-29 03:00", "2026-03-30 02:30"]),
    ("America/New_York", "30 2 * * *", "2026-03-07 12:00", ["2026-03-08 03:00", "2026-03-09 02:30"]),
    # In autumn, 1:30 and 2:30 exist twice, and come once.
    ("Europe/Berlin", "30 2 * * *", "2026-10-24 12:00", ["2026-10-25 02:30", "2026-10-26 02:30"]),
    ("America/New_York", "30 1 * * *", "2026-10-31 12:00", ["2026-11-01 01:30", "2026-11-02 01:30"]),
    ("Europe/Berlin", "0 9 * * 1-5", "2026-12-04 10:00", ["2026-12-07 09:00", "2026-12-08 09:00"]),
])  # fmt: skip
def test_local_times_hold_over_both_changes_of_the_clocks(
    monkeypatch, zone, schedule, begin, expected
):
    monkeypatch.setenv("TZ", zone)
    times, now = [], at(zone, begin)
    for _ in expected:
        now = every.next_time(schedule, now)
        times.append(now)
    assert times == [at(zone, text) for text in expected]


# The machine sleeps for so many minutes first: until the time has come twice, or is about to.
@pytest.mark.parametrize("asleep", [0, 130, 165])
@pytest.mark.parametrize(
    "zone, day, hour",
    [("Europe/Berlin", "2026-10-25", "02"), ("America/New_York", "2026-11-01", "01")],
)
def test_a_look_within_the_hour_that_comes_twice_fires_once(
    monkeypatch, queue, clock, zone, day, hour, asleep
):
    monkeypatch.setenv("TZ", zone)
    conn = queue.connect()
    clock.now = at(zone, f"{day} 00:30")
    add(conn, queue, clock, "it", f"30 {int(hour)} * * *")
    count = 0
    for minute in range(asleep, 5 * 60, 7):
        clock.now = at(zone, f"{day} 00:30") + minute * 60
        every.fire(conn, ["approvals"])
        count += fired(conn, queue)
    assert count == 1


def test_a_zone_that_is_none_is_said(monkeypatch):
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    with pytest.raises(ValueError, match="names no time zone"):
        every.next_time("0 9 * * *", 0.0)
    assert every.next_time("6h", 0.0) == 6 * 3600


def test_an_hourly_one_comes_in_both_hours(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    times = [at("Europe/Berlin", "2026-10-25 01:30")]
    for _ in range(3):
        times.append(every.next_time("0 * * * *", times[-1]))
    assert [times[2] - times[1], times[3] - times[2]] == [3600, 3600]


@pytest.mark.parametrize("schedule", ["6h", "0 */6 * * *"])
def test_three_days_asleep_are_one_firing(queue, clock, schedule):
    conn = queue.connect()
    add(conn, queue, clock, "it", schedule)
    first = every.fire(conn, ["approvals"])
    assert clock.now < first <= clock.now + DAY / 4 and fired(conn, queue) == 0
    clock.now = first + 3 * DAY + 60
    following = every.fire(conn, ["approvals"])
    assert fired(conn, queue) == 1 and clock.now < following <= clock.now + DAY / 4
    # It keeps its beat.
    assert (following - first) % (DAY / 4) == 0


def test_random_steps_of_the_clock_never_fire_twice_for_a_time(queue, clock):
    """Within a day of steps; a clock that is set back by more is believed."""
    conn, chance = queue.connect(), random.Random(7)
    add(conn, queue, clock, "it", "6h")
    begin, furthest, count = clock.now, clock.now, 0
    for _ in range(200):
        clock.now += chance.choice((600, 3600, 5 * 3600, 5 * 3600, -3600, -6 * 3600))
        clock.now = max(clock.now, furthest - DAY + 1)
        furthest = max(furthest, clock.now)
        every.fire(conn, ["approvals"])
        count += fired(conn, queue)
    assert 5 < count <= (furthest - begin) / (DAY / 4)
    clock.now = furthest - 400 * DAY
    assert every.fire(conn, ["approvals"]) <= clock.now + DAY / 4 and fired(conn, queue) == 0


@pytest.mark.parametrize("on_duplicate, data", [("skip", 1), ("replace", 2)])
def test_a_firing_while_the_one_before_waits_does_what_it_is_told(queue, clock, on_duplicate, data):
    conn = queue.connect()
    terms = {} if on_duplicate == "skip" else {"on_duplicate": on_duplicate}
    for n in (1, 2):
        add(conn, queue, clock, "it", "1h", **terms)
        conn.execute("update task_every set data = ?", (json.dumps({"n": n}),))
        clock.now += 3600
        every.fire(conn, ["approvals"])
    [task] = queue.claim_ready(conn, "approvals", limit=9)
    assert task.task_id == "it" and task.data == {"n": data}


@pytest.mark.parametrize("broken, says", [
    ("schedule = 'at noon'", "every ill: .at noon."),
    ("terms = '{\"colour\": 1}'", "every ill: .*colour"),
])  # fmt: skip
def test_a_row_that_bash_broke_keeps_no_other_from_firing(queue, clock, broken, says):
    conn = queue.connect()
    for name in ("good", "ill", "well"):
        add(conn, queue, clock, name, "1h")
    conn.execute(f"update task_every set {broken} where name = 'ill'")
    clock.now += 3600
    with pytest.raises(ValueError, match=says):
        every.fire(conn, ["approvals"])
    claimed = queue.claim_ready(conn, "approvals", limit=9)
    assert sorted(task.task_id for task in claimed) == ["good", "well"]


def test_a_time_that_another_worker_has_taken_meanwhile_fires_nothing(queue, clock, monkeypatch):
    conn = queue.connect()
    add(conn, queue, clock, "it", "1h")
    clock.now += 3600
    next_time = every.next_time

    def after_the_others(*words):
        monkeypatch.setattr(every, "next_time", next_time)
        every.fire(conn, ["approvals"])
        assert fired(conn, queue) == 1
        return next_time(*words)

    monkeypatch.setattr(every, "next_time", after_the_others)
    every.fire(conn, ["approvals"])
    assert fired(conn, queue) == 0


def test_two_workers_and_kill_at_any_moment_make_one_task_for_each_time(installation, queue):
    """The ids of the firings are their times, each once, while two workers are killed again and again."""
    installation.handler("tick", "#!/bin/sh\n")
    tq_every(installation, "it", "--every", "1s", "approvals", "tick")
    conn, chance = queue.connect(), random.Random(3)
    conn.execute("create table fired (at real)")
    conn.execute("create trigger count_them after update of last_at on task_every when new.last_at is not old.last_at "
                 "begin insert into fired values (old.next_at); end")  # fmt: skip
    fired = "select at from fired order by at"
    while len(conn.execute(fired).fetchall()) < 3:
        workers = [installation.worker("approvals", "--idle-exit", "9") for _ in range(2)]
        time.sleep(chance.uniform(0.2, 1.2))
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
    times = conn.execute(fired).fetchall()
    assert len(times) == len(set(times))
    installation.worker("approvals")
    tq_every(installation, "it", "--off")
    wait_for(lambda: not conn.execute("select * from approvals").fetchall(), what="the last end")
    [(ended,)] = installation.rows("select count(*) from task_history where status = 'completed'")
    # A firing while the one before ran is a duplicate.
    assert 1 <= ended <= len(times) + 1


def test_a_worker_sleeps_until_its_time_and_the_command_shows_what_came_of_it(installation):
    installation.handler("tick", "#!/bin/sh\necho all is well\n")
    words = ("* * * * *", "approvals", "tick", '{"n": 1}', "--priority", "7")
    assert tq_every(installation, "it", *words).startswith("it: next at ")
    worker = installation.worker("approvals")
    installation.sqlite3(f"update task_every set next_at = {time.time() + 0.4}, schedule = '1h'")
    installation.finished("it")
    [row] = json.loads(tq_every(installation, "--json"))
    assert (row["data"], row["terms"]) == ({"n": 1}, {"priority": 7})
    assert row["last"]["result"] == "all is well\n" and row["next_at"] > time.time() + 3000
    assert "completed: all is well" in " ".join(tq_every(installation).split())
    assert installation.tq("every").stderr == ""
    worker.terminate()
    worker.wait(10)
    assert "approvals" in installation.tq("every").stderr
    assert "approvals" in installation.tq("list").stderr
    doctor = installation.run("tasks.py", "doctor").stdout
    assert "tasks recur in it, and no worker or unit enqueues them" in doctor


def test_it_is_switched_fired_and_removed_by_hand(installation):
    words = ("it", "--every", "6h", "approvals", "t", "-", "--window", "5m")
    installation.tq("every", *words, input='{"n": 3}')
    [(data, terms)] = installation.rows("select data, terms from task_every")
    assert (json.loads(data), json.loads(terms)) == ({"n": 3}, {"window": 300})
    [listed] = installation.told("every")
    assert installation.told("every it --on") | {"next_at": 0} == listed | {"next_at": 0}
    assert tq_every(installation, "it", "--off") == "it: off\n"
    assert tq_every(installation, "it", "--now") == "queued it\n"
    installation.tq("cancel it")
    dropped = installation.run("tasks.py", "drop", "approvals")
    assert "tasks recur in approvals, it" in dropped.stderr
    assert tq_every(installation, "it", "--remove") == "it comes no more\n"
    assert tq_every(installation, "--json") == "[]\n"
    assert tq_every(installation, "it", "--on", code=1).endswith("nothing comes by the name 'it'\n")
    said = tq_every(installation, "n" * 201, "--every", "6h", "approvals", "t", code=65)
    assert "1 to 200 bytes" in said


def test_a_command_may_recur(installation):
    shutil.copy(ROOT / "handlers/run", installation.handlers)
    tq_every(installation, "it", "0 4 * * *", "--", "sh", "-c", 'echo "$1"', "sh", "a  b")
    tq_every(installation, "it", "--now")
    installation.drain("notifications")
    assert installation.history("it")["result"] == "a  b\n"
    assert installation.rows("select max_attempts from task_history") == [(1,)]


def test_a_unit_starts_a_worker_when_a_time_has_come(installation):
    tq_every(installation, "it", "--every", "1h", "approvals", "tick")
    installation.handler("tick", "#!/bin/sh\n")
    assert installation.drain("approvals --when-work").stderr == ""
    installation.sqlite3("update task_every set next_at = 1")
    assert "1 done" in installation.drain("approvals --when-work").stderr


@pytest.mark.parametrize("words, says", [
    ("it '0 9 * *' approvals t", "five fields"),
    ("it '0 25 * * *' approvals t", "0 25 * * *"),
    ("it '0 0 30 2 *' approvals t", "0 0 30 2 *"),
    ("it --every 0s approvals t", "less than a second"),
    ("it '0 9 * * *' approvals", "QUEUE and TASK_TYPE are required"),
    ("it '0 9 * * *' approvals t --at 23:30", "--at"),
    ("it '0 9 * * *' approvals t --task-id x", "--task-id"),
    ("it --on --off", "one of --on, --off"),
    ("it", "say when it comes"),
    ("--off", "give a NAME"),
])  # fmt: skip
def test_wrong_use_is_one_line(installation, words, says):
    said = installation.tq(f"every {words}", code=64).stderr
    assert says in said and said.count("\n") == 1


KILLED_AT = """
import os, signal, sys
import queue_helpers as q
from taskqueue import every

conn, left = q.connect(), [int(sys.argv[1])]
execute = q.Connection.execute

def counted(self, *words):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(self, *words)

q.Connection.execute = counted
every.fire(conn, ["approvals"])
"""


def test_a_worker_that_is_killed_at_any_statement_fires_once(installation, queue):
    tq_every(installation, "it", "--every", "1h", "approvals", "t")
    for statement in range(1, 100):
        installation.sqlite3("delete from approvals; update task_every set next_at = 1")
        words = [sys.executable, "-c", KILLED_AT, str(statement)]
        done = subprocess.run(words, cwd=ROOT, env=installation.env)
        [(next_at,)] = installation.rows("select next_at from task_every")
        tasks = installation.rows("select task_id from approvals")
        assert tasks == ([] if next_at == 1 else [("it",)]), statement
        every.fire(queue.connect(), ["approvals"])
        assert installation.rows("select task_id from approvals") == [("it",)]
        if done.returncode == 0:
            break
    assert done.returncode == 0 and statement > 5
