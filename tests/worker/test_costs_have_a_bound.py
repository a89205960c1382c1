"""A queue's runs cost no more than its bound, whatever fails, is retried, killed or runs at the same
time; the history and the page know what they cost.
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from conftest import wait_for

DAY = 86_400
# It says what it may cost and what earlier attempts did, and costs what the task says.
SPENDER = """#!/bin/sh
echo "$TASK_ID may cost ${TASK_BUDGET_USD-any amount} after ${TASK_SPENT_USD-nothing}" >>"$HOME/runs"
cost=$(sed 's/.*"cost": *\\([0-9.]*\\).*/\\1/')
echo "{\\"summary\\": \\"done\\", \\"cost_usd\\": $cost}"
"""


@pytest.fixture
def spender(installation):
    """spender(rest of the handler): a handler that costs what its task says."""

    def make(rest: str = "") -> None:
        installation.handler("spend", SPENDER + rest)

    make()
    return make


def spend(installation, task_id: str, cost: float, *options, **data) -> None:
    payload = json.dumps({**data, "cost": cost})
    installation.enqueue("work", "spend", payload, "--task-id", task_id, *options)


def limit(installation, cost: str, *options) -> str:
    done = installation.run("tasks.py", "limit", "work", "--cost", cost, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def drain(installation, *options):
    words = ("work", "--handlers", installation.handlers, "--drain", *options)
    return installation.run("worker.py", *words)


def runs(installation) -> list[str]:
    path = installation.directory / "runs"
    return path.read_text().splitlines() if path.exists() else []


def costs(installation) -> dict[str, tuple]:
    rows = installation.rows("select task_id, round(cost_usd, 6), cost_at_least from task_history")
    return {task_id: tuple(rest) for task_id, *rest in rows}


def a_day_passes(installation) -> None:
    installation.sqlite3(f"update task_costs set ended_at = ended_at - {DAY}")


def test_a_bound_that_is_reached_holds_the_queue_until_a_day_has_passed(installation, spender):
    limit(installation, "0.01/day")
    for number in range(1, 5):
        spend(installation, f"t{number}", 0.005)
    said = drain(installation).stderr
    assert [line.split()[0] for line in runs(installation)] == ["t1", "t2"]
    assert runs(installation)[1] == "t2 may cost 0.005 after nothing"
    assert "2 pending in work; work is paused until" in said
    assert "$0.01 of $0.01 a day are spent" in said
    for command in (("list",), ("stats",)):
        shown = installation.run("tasks.py", *command).stdout
        assert "paused until" in shown and "$0.01 of $0.01 a day are spent" in shown, shown
    a_day_passes(installation)
    drain(installation)
    assert [line.split()[0] for line in runs(installation)] == ["t1", "t2", "t3", "t4"]


def test_a_sleeping_worker_goes_on_by_itself_when_the_bound_lets_it(installation, spender):
    limit(installation, "0.01/hour")
    spend(installation, "first", 0.02)
    installation.worker("work")
    installation.finished("first")
    # Its cost counts for half a second more.
    installation.sqlite3("update task_costs set ended_at = ended_at - 3600 + 2")
    spend(installation, "second", 0.001)
    assert installation.history("second") is None
    installation.finished("second", seconds=4.5)


def test_none_takes_the_bound_away_and_tells_workers(installation, spender):
    assert "its runs may cost any amount" in limit(installation, "none")
    assert limit(installation, "$1/week") == "work: $0.00 of $1.00 a week are spent\n"
    spend(installation, "first", 1)
    installation.worker("work")
    installation.finished("first")
    spend(installation, "second", 1)
    [told] = json.loads(
        installation.run("tasks.py", "list", "--status", "pending", "--json").stdout
    )
    assert told["task_id"] == "second"
    limit(installation, "none")
    installation.finished("second")
    assert runs(installation)[1] == "second may cost any amount after nothing"


def test_failed_attempts_count_when_they_end_and_the_history_has_all(installation, spender):
    spender('[ "$TASK_ATTEMPT" = 3 ]')
    limit(installation, "10/day")
    spend(installation, "it", 0.25)
    drain(installation, "--backoff", 0)
    assert costs(installation) == {"it": (0.75, 0)}
    assert [line.partition("after ")[2] for line in runs(installation)] == [
        "nothing",
        "0.25",
        "0.5",
    ]
    assert "cost" in installation.run("tasks.py", "show", "it").stdout
    # The first two attempts were a day ago, and the third still counts.
    installation.sqlite3(f"update task_costs set ended_at = ended_at - {DAY} where id < 3")
    assert "$0.25 of $10.00 a day are spent" in limit(installation, "10/day")


def test_a_retry_by_hand_has_all_of_its_budget_and_the_day_has_spent_both(installation, spender):
    spender("exit 65")
    spend(installation, "it", 0.5, max_budget_usd=2)
    drain(installation)
    installation.run("tasks.py", "retry", "it")
    drain(installation)
    assert costs(installation) == {"it": (0.5, 0)}
    assert runs(installation) == ["it may cost any amount after nothing"] * 2
    assert "$1.00 of $3.00 a day" in limit(installation, "3/day")


def test_runs_at_the_same_time_share_what_is_left(installation, spender):
    spender('while [ ! -e "$HOME/go" ]; do sleep 0.02; done')
    limit(installation, "1/day")
    for task_id, budget in (("a", 0.1), ("b", None), ("c", None)):
        spend(installation, task_id, 0.1, max_budget_usd=budget)
    installation.worker("work", "--concurrency", 2)
    wait_for(lambda: len(runs(installation)) == 2, what="two runs")
    assert sorted(runs(installation)) == [
        "a may cost 0.1 after nothing",
        "b may cost 0.5 after nothing",
    ]
    # A second worker finds what these two have left, and no more.
    installation.worker("work")
    wait_for(lambda: len(runs(installation)) == 3, what="the third run")
    assert runs(installation)[2] == "c may cost 0.4 after nothing"
    spend(installation, "d", 0.1)
    assert not json.loads(installation.run("tasks.py", "stats", "--json").stdout)["queues"]["work"][
        "paused"
    ]
    (installation.directory / "go").touch()
    installation.finished("d")
    assert runs(installation)[3].startswith("d may cost 0.")


@pytest.mark.parametrize(
    ("data", "printed", "expected"),
    [
        ({"max_budget_usd": 3}, "", (3.0, 0)),
        ({"max_budget_usd": 3}, '{"cost_usd": 0.5}', (3.0, 0)),
        ({}, '{"cost_usd": 0.5}', (0.5, 1)),
        ({}, "", (None, 0)),
        ({"max_budget_usd": 3}, '{"cost_usd": 0.5, "stopped": true}', (0.5, 0)),
    ],
)
def test_a_run_that_left_no_result_counts_its_budget_or_what_it_showed(
    installation, data, printed, expected
):
    installation.handler("spend", f"#!/bin/sh\necho '{printed}'\nkill -9 $$\n")
    installation.enqueue("work", "spend", json.dumps(data), "--task-id", "it")
    drain(installation, "--max-attempts", 1)
    assert costs(installation) == {"it": expected}
    shown = installation.run("tasks.py", "show", "it").stdout
    assert ("at least $0.50" in shown) == (expected[1] == 1)


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ('{"cost_usd": 0.5}', 0.5),
        ('working\n{"summary": "x", "cost_usd": 1}\n\n', 1.0),
        ('{\n "result": [1],\n "cost_usd": 0.25\n}', 0.25),
        ('{"cost_usd": 0}', 0.0),
        *(
            (f'{{"cost_usd": {odd}}}', None)
            for odd in ("-1", "NaN", "1e400", '"5"', "true", "[1]", "1e9")
        ),
        ('[{"cost_usd": 1}]', None),
        ('{"cost_usd": 1', None),
        ("[" * 5000 + '"cost_usd"', None),
    ],
)
def test_a_cost_is_a_number_in_a_line_of_json(installation, printed, expected):
    installation.handler("spend", f"#!/bin/sh\ncat <<'E'\n{printed}\nE\n")
    installation.enqueue("work", "spend", "--task-id", "it")
    drain(installation)
    assert costs(installation) == {"it": (expected, 0)}


def test_a_put_back_run_counts_without_an_attempt(installation, spender):
    spender("""echo '{"retry_after": 3600, "cost_usd": 0.75}'; exit 75""")
    limit(installation, "0.5/day")
    spend(installation, "it", 0.1)
    drain(installation)
    assert installation.rows("select attempts from work") == [(0,)]
    assert "$0.75 of $0.50 a day are spent" in limit(installation, "0.5/day")
    installation.run("tasks.py", "cancel", "it")
    assert costs(installation) == {"it": (0.75, 0)}


def test_the_cost_of_an_orphan_counts_once(installation, spender):
    spender('while [ ! -e "$HOME/go" ]; do sleep 0.02; done')
    limit(installation, "5/day")
    spend(installation, "it", 2)
    first = installation.worker("work")
    wait_for(lambda: runs(installation), what="the run")
    os.kill(first.pid, signal.SIGKILL)
    (installation.directory / "go").touch()
    installation.worker("work")
    installation.finished("it")
    assert installation.rows("select queue, cost_usd, told_usd from task_costs") == [("work", 2, 2)]


def test_json_that_python_cannot_read_holds_up_no_bound(installation, spender):
    limit(installation, "1/day")
    deep = f'{{"max_budget_usd": 1, "deep": {"[" * 900}{"]" * 900}, "number": {"9" * 5000}}}'
    installation.sqlite3(f"insert into work (data) values ('{deep}')")
    spend(installation, "it", 0.5)
    drain(installation)
    assert installation.history("it")["status"] == "completed"


def test_a_run_that_nobody_saw_end_counts_its_budget(installation, spender):
    """Its worker, its supervisor and its handler were killed."""
    spender('[ "$TASK_ATTEMPT" = 2 ] || { echo "$PPID $$" >"$HOME/who"; exec sleep 100; }')
    limit(installation, "5/day")
    spend(installation, "it", 0.5, max_budget_usd=2)
    first = installation.worker("work")
    who = installation.directory / "who"
    wait_for(lambda: who.exists() and who.read_text(), what="the run")
    supervisor, handler = map(int, who.read_text().split())
    for pid in (first.pid, supervisor):
        os.kill(pid, signal.SIGKILL)
    os.killpg(handler, signal.SIGKILL)
    installation.worker("work")
    installation.finished("it")
    # The handler had shown 0.5; of its own budget that is spent.
    assert runs(installation)[1] == "it may cost 1.5 after 0.5"
    assert costs(installation) == {"it": (2.5, 0)}


def test_a_worker_with_nothing_to_do_does_not_wait_for_the_bound(installation, spender):
    limit(installation, "0.5/day")
    spend(installation, "it", 0.5)
    words = ("work", "--handlers", installation.handlers, "--idle-exit", 0.2)
    said = installation.run("worker.py", *words).stderr
    assert "1 done" in said and "leaving" in said


def test_a_worker_within_a_run_passes_that_runs_bound_on_to_nobody(installation, spender):
    spend(installation, "it", 0)
    env = {"TASK_BUDGET_USD": "0.1", "TASK_SPENT_USD": "7"}
    words = ("work", "--handlers", installation.handlers, "--drain")
    installation.run("worker.py", *words, env=env)
    assert runs(installation) == ["it may cost any amount after nothing"]


def test_costs_per_day_are_in_stats_and_on_the_page(installation, spender):
    for task_id, cost in (("a", 1.25), ("b", 0.5)):
        spend(installation, task_id, cost)
    drain(installation)
    installation.sqlite3(f"update task_costs set ended_at = ended_at - {DAY} where cost_usd = 0.5")
    today, yesterday = (
        time.strftime("%Y-%m-%d", time.localtime(time.time() - ago)) for ago in (0, DAY)
    )
    shown = installation.run("tasks.py", "stats").stdout
    assert f"work cost $1.25 on {today}, $0.50 on {yesterday}" in shown
    told = json.loads(installation.run("tasks.py", "stats", "--json").stdout)["queues"]["work"]
    assert told["costs"][0] == {"day": today, "cost_usd": 1.25, "at_least": False}
    installation.run("tasks.py", "page")
    html = (installation.state / "page.html").read_text()
    assert "Cost per day" in html and "$1.25" in html and "$0.50" in html


def test_cleanup_keeps_the_costs_that_count(installation, spender):
    spend(installation, "it", 1)
    drain(installation)
    installation.sqlite3(
        "insert into task_costs (queue, row_id, ended_at, cost_usd) values ('work', 9, 5, 1)"
    )
    assert installation.run("cleanup.py", "--keep", 0).returncode == 0
    assert installation.rows("select row_id from task_costs") == [(1,)]
    assert "$1.00 of $2.00 an hour" in limit(installation, "2/hour")


@pytest.mark.parametrize(
    "cost", ["20", "0/day", "-1/day", "1/month", "nan/day", "1e9/day", "", "1/day/day"]
)
def test_a_bound_that_makes_no_sense_is_refused(installation, cost):
    done = installation.run("tasks.py", "limit", "work", f"--cost={cost}")
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    assert "is not a bound like 20/day" in done.stderr


def test_doctor_names_what_lets_the_queue_go_on(installation, spender):
    limit(installation, "0.5/day")
    for task_id in ("a", "b"):
        spend(installation, task_id, 1)
    drain(installation)
    said = installation.run("tasks.py", "resume", "work").stdout
    assert "work was not paused" in said and "limit work --cost N/day" in said
    said = installation.run("tasks.py", "doctor").stdout
    assert "$1.00 of $0.50 a day are spent" in said and "limit work --cost N/day" in said
