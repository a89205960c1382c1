"""A claude task costs what it may, over all its attempts, and no more than its queue has left.

Claude Code sums what a session costs over all runs in it, and compares that with its budget.
"""

from __future__ import annotations

import json

import pytest
from claude_stub.client import words_of
from claude_stub.task import load_handler

GO_ON = load_handler().GO_ON
# An answer of so many tokens costs so much.
TOKENS, ANSWER_USD = 10_000, 0.04004
COST_STATE = '{"type": "cost-state", "totalCostUSD": %s}\n'


def session_that_cost(fake, usd: float) -> None:
    """Make a session of the task's own that has cost so much."""
    fake.task().call()
    [session] = [
        arg.partition("=")[2] for arg in fake.calls()[0][0] if arg.startswith("--session-id")
    ]
    directory = fake.home / ".claude/projects/x"
    directory.mkdir(parents=True)
    state = COST_STATE % 0.1 + COST_STATE % usd + COST_STATE[:20]
    (directory / f"{session}.jsonl").write_text('{"type": "user"}\n' + state)


@pytest.mark.parametrize(
    ("own", "variables", "given"),
    [
        (None, {}, None),
        (1, {}, 3.0),
        (1, {"TASK_SPENT_USD": "0.4"}, 2.6),
        (1, {"TASK_SPENT_USD": "0.4", "TASK_BUDGET_USD": "0.25"}, 2.25),
        (None, {"TASK_SPENT_USD": "0.4", "TASK_BUDGET_USD": "0.25"}, 2.25),
    ],
)
def test_the_budget_counts_from_what_the_session_has_cost(fake, own, variables, given):
    session_that_cost(fake, 2)
    done = fake.task(max_budget_usd=own).call(fake.env | variables)
    assert done.returncode == 0, done.stderr
    args = fake.calls()[1][0]
    budgets = [float(arg.partition("=")[2]) for arg in args if arg.startswith("--max-budget-usd")]
    assert budgets == ([] if given is None else [given])
    assert "--resume" in " ".join(args)


def test_an_attempt_with_nothing_left_does_not_start_claude(fake):
    done = fake.task(max_budget_usd=0.5).call(fake.env | {"TASK_SPENT_USD": "0.51"})
    assert (done.returncode, fake.calls()) == (65, [])
    assert "its attempts have cost $0.51 of $0.50; a retry by hand" in done.stderr


def test_no_option_of_the_task_lifts_the_bound(fake):
    task = fake.task(args=["--max-budget-usd", "99"])
    task.call(fake.env | {"TASK_BUDGET_USD": "0.25"})
    args = fake.calls()[0][0]
    assert args.index("--max-budget-usd=0.25") > args.index("--max-budget-usd")


@pytest.fixture
def work(installation, claude, claude_handler):
    """work(): run the tasks of the queue with the real client, until none is ready."""
    claude.answer("fine", tokens=TOKENS)

    def drain():
        words = ("work", "--handlers", installation.handlers, "--drain", "--backoff", 0)
        return installation.run("worker.py", *words, env=claude.env)

    return drain


def add(installation, claude, task_id: str, **data) -> None:
    payload = {"prompt": "Do it.", "workspace_path": str(claude.workspace), **data}
    payload["permission_mode"] = "bypassPermissions"
    installation.enqueue("work", "claude", json.dumps(payload), "--task-id", task_id)


def cost_of(installation, task_id: str) -> float:
    return installation.rows("select cost_usd from task_history where task_id = ?", task_id)[0][0]


def test_each_attempt_counts_its_own_part_of_the_session(installation, claude, work):
    claude.answer("nothing", tokens=TOKENS)
    add(installation, claude, "it")
    words = ("work", "--handlers", installation.handlers, "--drain", "--max-attempts", 2)
    installation.run("worker.py", *words, "--backoff", 0, env=claude.env)
    told = [cost for (cost,) in installation.rows("select cost_usd from task_costs order by id")]
    assert len(told) == 2 and cost_of(installation, "it") == pytest.approx(sum(told))
    claude.answer("fine", tokens=TOKENS)
    installation.run("tasks.py", "retry", "it")
    work()
    assert installation.history("it")["status"] == "completed"
    assert cost_of(installation, "it") == pytest.approx(ANSWER_USD)


def test_a_run_that_uses_up_the_queues_rest_goes_on_in_its_session_the_next_day(
    installation, claude, work
):
    installation.run("tasks.py", "limit", "work", "--cost", "0.05/day")
    add(installation, claude, "first")
    work()
    claude.answer("tool", commands=["echo red >>painted", "echo red >>painted"], tokens=TOKENS)
    add(installation, claude, "second")
    said = work().stderr
    assert "its share of the queue's bound is used up" in said and "work is paused until" in said
    assert installation.rows("select attempts from work") == [(0,)]
    installation.sqlite3("update task_costs set ended_at = ended_at - 86400")
    installation.run("tasks.py", "limit", "work", "--cost", "5/day")
    installation.run("tasks.py", "retry", "--scheduled")
    work()
    second = installation.history("second")
    assert (second["status"], second["attempts"]) == ("completed", 1), second
    assert len(claude.sessions()) == 2
    assert words_of(claude.requests()[-1]).count(GO_ON) == 1
