"""tasks.py stats, list and show say what the database says."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, copy_scripts, wait_for

WORDS = ("pending", "scheduled", "blocked", "in_progress")


def tasks(installation, *args, **options) -> object:
    """What tasks.py prints with --json; it must succeed."""
    done = installation.run("tasks.py", *args, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def finished(
    installation,
    queue: str,
    task_type: str,
    status: str,
    ended_ago: float,
    waited: float,
    ran: float,
) -> None:
    """Put a finished task into the history, with times of our choice."""
    moments = [
        f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{ended_ago + more:.3f} seconds')"
        for more in (waited + ran, ran, 0)
    ]
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at) "
        f"select '{queue}', coalesce(max(id), 0) + 1000, 'h' || (coalesce(max(id), 0) + 1), '{task_type}', '{status}', '{{}}', "
        f"{', '.join(moments)} from task_history"
    )


def filled(installation) -> None:
    """Two ready tasks, a scheduled, a running one; a completed, a failed and a cancelled one."""
    installation.enqueue("approvals", "review", '{"pr": 1}', "--task-id", "review-1")
    installation.enqueue(
        "approvals", "review", '{"pr": 2}', "--task-id", "review-2", "--priority", "5"
    )
    installation.enqueue(
        "approvals", "deploy", '{"to": "prod"}', "--task-id", "deploy-1", "--delay", "600"
    )
    installation.enqueue(
        "notifications", "note", '{"text": "a needle in it"}', "--task-id", "note-1"
    )
    installation.sqlite3(
        "update notifications set status = 2, owner = 'x', claimed_at = timestamp, attempts = 1"
    )
    finished(installation, "approvals", "review", "completed", 10, 1, 2)
    finished(installation, "approvals", "review", "failed", 7200, 3, 4)
    finished(installation, "completions", "review", "cancelled", 20, 1, 1)


def test_stats_count_each_state_per_queue_and_type(installation):
    filled(installation)
    queues = tasks(installation, "stats")["queues"]
    review = queues["approvals"]["types"]["review"]
    assert [review[word] for word in WORDS] == [2, 0, 0, 0]
    assert [queues["approvals"]["types"]["deploy"][word] for word in WORDS] == [0, 1, 0, 0]
    assert [queues["notifications"][word] for word in WORDS] == [0, 0, 0, 1]
    assert (review["completed_hour"], review["completed_day"]) == (1, 1)
    assert (review["failed_hour"], review["failed_day"]) == (0, 1)
    assert queues["completions"]["cancelled_hour"] == 1
    assert [queues["approvals"][word] for word in WORDS] == [2, 1, 0, 0]
    assert 0 <= review["oldest_pending_seconds"] < 60
    assert queues["completions"]["oldest_pending_seconds"] is None


def test_stats_give_the_median_and_the_95th_percentile_of_waiting_and_running(installation):
    installation.enqueue("approvals", "review")
    for n in range(1, 22):
        finished(installation, "approvals", "review", "completed", 5, waited=n, ran=10 * n)
    n = tasks(installation, "stats")["queues"]["approvals"]["types"]["review"]
    assert n["wait_seconds"] == {"median": 11.0, "p95": 20.0}
    assert n["run_seconds"] == {"median": 110.0, "p95": 200.0}


def test_list_is_in_the_order_of_claims_then_newest_finished_first(installation):
    filled(installation)
    listed = [task["task_id"] for task in tasks(installation, "list")]
    assert listed == ["note-1", "review-2", "review-1", "deploy-1", "h1", "h3", "h2"]


def test_list_filters_by_queue_status_type_age_and_text(installation):
    filled(installation)

    def listed(*filters: str) -> set[str]:
        return {task["task_id"] for task in tasks(installation, "list", *filters)}

    assert listed("--queue", "completions", "--queue", "notifications") == {"note-1", "h3"}
    assert listed("--status", "failed", "--status", "pending") == {"review-1", "review-2", "h2"}
    assert listed("--status", "running") == {"note-1"}
    assert listed("--type", "deploy") == {"deploy-1"}
    assert listed("--type", "review", "--since", "1h") == {"review-1", "review-2", "h1", "h3"}
    assert listed("--before", "1h") == {"h2"}
    assert listed("--text", "A NEEDLE") == {"note-1"}
    assert listed("--text", "needle%") == set() == listed("--text", "n_te")
    assert listed("--text", "eview-") == {"review-1", "review-2"}
    assert listed("--type", "nobody's") == set()


def test_a_bare_payload_is_called_after_its_queue_and_row(installation):
    installation.enqueue("approvals", "review")
    installation.sqlite3('insert into notifications (data) values (\'{"workspace": "/x"}\')')
    (listed,) = tasks(installation, "list", "--queue", "notifications")
    assert (listed["task_id"], listed["task_type"], listed["data"]) == (
        "notifications-1",
        "notifications",
        {"workspace": "/x"},
    )
    assert tasks(installation, "show", "notifications-1")["data"] == {"workspace": "/x"}
    assert tasks(installation, "show", "notif")["task_id"] == "notifications-1"


def test_show_gives_everything_with_history_and_output(installation):
    installation.handler(
        "sum", "#!/bin/sh\necho the result; echo the log >&2; exit $((TASK_ATTEMPT == 1))\n"
    )
    task_id = installation.enqueue("approvals", "sum", '{"a": 1}', "--task-id", "sum-1")
    installation.worker("approvals", "--backoff", "0.01")
    installation.finished(task_id)
    task = tasks(installation, "show", "sum-1")
    assert (task["status"], task["attempts"], task["result"], task["log"]) == (
        "completed",
        2,
        "the result\n",
        "the log\n",
    )
    assert task["data"]["data"] == {"a": 1} and task["history"] == []
    assert [run["attempt"] for run in task["runs"]] == [1, 2]
    assert installation.run("tasks.py", "pause", "approvals").returncode == 0
    installation.enqueue("approvals", "sum", '{"a": 2}', "--task-id", "sum-1")
    task = tasks(installation, "show", "sum-1")
    assert (task["status"], [life["status"] for life in task["history"]]) == (
        "pending",
        ["completed"],
    )
    text = installation.run("tasks.py", "show", "sum-1").stdout
    assert "sum-1" in text and '"a": 2' in text and "completed" in text


def test_a_terminal_gets_no_control_sequence_of_a_task(installation):
    installation.enqueue("approvals", "review")
    installation.sqlite3(
        "insert into notifications (data) values (json_object('hook_event_name', char(27) || '[31mred', 'a', char(155)))"
    )
    for command in (["list"], ["stats"], ["show", "notifications-1"]):
        done = installation.run("tasks.py", *command)
        assert done.returncode == 0 and "\x1b" not in done.stdout and "\x9b" not in done.stdout
        assert "\\x1b[31mred" in done.stdout or "\\u001b[31mred" in done.stdout


def test_a_pipe_gets_a_line_per_task_with_nothing_cut_off(installation):
    installation.enqueue(
        "approvals",
        "a_type_with_a_very_long_name_" + "x" * 150,
        json.dumps({"k": "v" * 100}),
        "--task-id",
        "i" * 200,
    )
    lines = installation.run("tasks.py", "list").stdout.splitlines()
    assert (
        len(lines) == 2
        and "i" * 200 in lines[1]
        and "x" * 150 in lines[1]
        and "v" * 100 in lines[1]
    )


def read_until(descriptor: int, wanted: str, seen: str = "") -> str:
    """What a terminal shows, until it has shown this."""
    deadline = time.monotonic() + 20
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    while wanted not in seen:
        assert time.monotonic() < deadline, f"{wanted!r} was not shown: {seen[-2000:]}"
        # select() takes no descriptor over 1023.
        if ready.poll(100):
            seen += os.read(descriptor, 65536).decode("utf-8", "replace")
    return seen


def test_stats_watch_redraws_on_a_terminal_until_ctrl_c(installation):
    filled(installation)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", "stats", "--watch", "--interval", "0.1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=installation.env | {"TERM": "xterm", "COLUMNS": "140"},
    )
    installation.processes.append(process)
    os.close(theirs)
    read_until(ours, "approvals")
    installation.enqueue("completions", "a_new_type")
    read_until(ours, "a_new_type")
    process.send_signal(signal.SIGINT)
    ready = select.poll()
    ready.register(ours, select.POLLIN)
    wait_for(
        lambda: process.poll() is not None or (ready.poll(0) and os.read(ours, 65536) and False)
    )
    assert process.returncode == 0
    os.close(ours)


def test_stats_watch_gives_a_line_of_json_each_time(installation):
    filled(installation)
    process = installation.start("tasks.py", "stats", "--watch", "--json", "--interval", "0.05")
    wait_for(lambda: process.log.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert all(
        json.loads(line)["queues"]["approvals"]["pending"] == 2
        for line in process.log.read_text().splitlines()
    )


def test_scripts_get_their_json_without_the_table_library(installation):
    filled(installation)
    # A copy of the scripts has it beside them, since PYTHONPATH decides nothing.
    lib = installation.directory / "lib"
    copy_scripts(lib, *(script.name for script in ROOT.glob("*.py")))
    (lib / "rich.py").write_text("raise ImportError('rich was imported')")

    def run(*args):
        return subprocess.run(
            [sys.executable, lib / "tasks.py", *args],
            env=installation.env,
            capture_output=True,
            text=True,
        )

    for command in (
        ["stats"],
        ["list"],
        ["show", "note-1"],
        ["pause", "approvals"],
        ["resume", "approvals"],
        ["cancel", "deploy-1"],
    ):
        done = run(*command, "--json")
        assert done.returncode == 0 and json.loads(done.stdout) is not None, done.stderr
    assert "rich was imported" in run("list").stderr


@pytest.mark.parametrize(
    "moment", ["2001-01-31T12:00:00Z", "2001-01-31 12:00:00+00:00", "2001-01-31", "soon", "", "980942400"]
)  # fmt: skip
def test_a_finished_task_whose_times_a_shell_has_written_hides_no_other(installation, moment):
    # It makes the database.
    installation.enqueue("notifications", "note")
    for name in ("review", "by_hand"):
        finished(installation, "approvals", name, "completed", 10, 1, 1)
    ((by_hand, good),) = installation.rows("select max(task_id), min(task_id) from task_history")
    # What came of a task is looked for among all rows, waiting ones, too.
    installation.sqlite3(
        f"update task_history set enqueued_at = '{moment}', started_at = '{moment}', completed_at = '{moment}' "
        "where task_type = 'by_hand';"
        "insert into approvals (data) values ('{}')"
    )
    for args in ([], ["--sort", "newest"], ["--sort", "oldest"]):
        listed = installation.run("tasks.py", "list", *args)
        assert listed.returncode == 0 and by_hand in listed.stdout, listed.stderr
    for args in (["show", by_hand], ["show", good], ["list", "--since", "1h"], ["stats"], ["export", "--history"]):  # fmt: skip
        done = installation.run("tasks.py", *args)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert tasks(installation, "show", by_hand)["completed_at"] == moment
    assert (
        tasks(installation, "purge", "approvals", "--status", "completed", "--yes")["deleted"] == 2
    )


def test_an_empty_list_says_so_and_stays_an_empty_list(installation):
    installation.enqueue("approvals", "review")
    done = installation.run("tasks.py", "list", "--status", "failed", "--json")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (
        0,
        [],
        "no matching tasks\n",
    )


def test_stats_of_one_queue_and_unused_queues_in_a_line(installation):
    filled(installation)
    named = tasks(installation, "stats", "--queue", "approvals")
    assert [*named["queues"]] == ["approvals"]
    whole = tasks(installation, "stats")["queues"]["approvals"]
    assert named["queues"]["approvals"].keys() == whole.keys() and whole["pending"] == 2
    installation.enqueue("ended", "t", "{}", "--task-id", "e")
    installation.run("tasks.py", "cancel", "e")
    before = installation.run("tasks.py", "stats").stdout
    assert re.search("^ended ", before, re.M) and "no tasks in 30 days" not in before
    installation.sqlite3(
        "update task_history set enqueued_at = '2020-01-01 00:00:00.000', started_at = null,"
        " completed_at = '2020-01-02 00:00:00.000' where task_id = 'e'"
    )
    after = installation.run("tasks.py", "stats").stdout
    assert "no tasks in 30 days: ended\n" in after
    assert not re.search("^ended ", after, re.M)
