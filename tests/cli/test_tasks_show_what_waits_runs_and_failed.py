"""tasks.py stats, list and show say what the database says; show says where a task came from, and
its times on a clock with its zone.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, copy_scripts, wait_for

WORDS = ("pending", "scheduled", "blocked", "in_progress")


def finished(
    installation, queue: str, task_type: str, status: str, ended: float, waited: float, ran: float
) -> None:
    """Put a finished task into the history, with times of our choice."""
    moments = [
        f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{ended + more:.3f} seconds')"
        for more in (waited + ran, ran, 0)
    ]
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at) "
        f"select '{queue}', coalesce(max(id), 0) + 1000, 'h' || (coalesce(max(id), 0) + 1), '{task_type}', '{status}', '{{}}', "
        f"{', '.join(moments)} from task_history"
    )


@pytest.fixture
def filled(installation):
    """Two ready tasks, a scheduled, a running one; a completed, a failed and a cancelled one."""
    installation.add("approvals review --task-id review-1")
    installation.add("approvals review --task-id review-2 --priority 5")
    installation.add("approvals deploy --task-id deploy-1 --delay 600")
    installation.add("notifications note --task-id note-1", '{"text": "a needle in it"}')
    runs = "status = 2, owner = 'x', claimed_at = timestamp, attempts = 1"
    installation.sqlite3(f"update notifications set {runs}")
    finished(installation, "approvals", "review", "completed", 10, 1, 2)
    finished(installation, "approvals", "review", "failed", 7200, 3, 4)
    finished(installation, "completions", "review", "cancelled", 20, 1, 1)
    return installation


# -------------------------------------------------------------------------------------- stats


def test_stats_count_each_state_per_queue_and_type(filled):
    queues = filled.told("stats")["queues"]
    review = queues["approvals"]["types"]["review"]
    for numbers, counts in (
        (review, [2, 0, 0, 0]),
        (queues["approvals"]["types"]["deploy"], [0, 1, 0, 0]),
        (queues["notifications"], [0, 0, 0, 1]),
        (queues["approvals"], [2, 1, 0, 0]),
    ):
        assert [numbers[word] for word in WORDS] == counts
    assert (review["completed_hour"], review["completed_day"]) == (1, 1)
    assert (review["failed_hour"], review["failed_day"]) == (0, 1)
    assert queues["completions"]["cancelled_hour"] == 1
    assert 0 <= review["oldest_pending_seconds"] < 60
    assert queues["completions"]["oldest_pending_seconds"] is None
    assert filled.told("stats --queue approvals")["queues"].keys() == {"approvals"}


def test_stats_give_the_median_and_the_95th_percentile_of_waiting_and_running(installation):
    installation.add("approvals review")
    for n in range(1, 22):
        finished(installation, "approvals", "review", "completed", 5, waited=n, ran=10 * n)
    n = installation.told("stats")["queues"]["approvals"]["types"]["review"]
    assert n["wait_seconds"] == {"median": 11.0, "p95": 20.0}
    assert n["run_seconds"] == {"median": 110.0, "p95": 200.0}


def test_stats_name_unused_queues_in_a_line(filled):
    filled.add("ended t --task-id e")
    filled.tq("cancel e")
    before = filled.tq("stats").stdout
    assert re.search("^ended ", before, re.M) and "no tasks in 30 days" not in before
    long_ago = "enqueued_at = '2020-01-01 00:00:00.000', completed_at = '2020-01-02 00:00:00.000'"
    filled.sqlite3(f"update task_history set {long_ago}, started_at = null where task_id = 'e'")
    after = filled.tq("stats").stdout
    assert "no tasks in 30 days: ended\n" in after and not re.search("^ended ", after, re.M)


def test_stats_watch_redraws_on_a_terminal_until_ctrl_c(filled):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "tasks.py", "stats", "--watch", "--interval", "0.1"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=filled.env | {"TERM": "xterm", "COLUMNS": "140"},
    )
    filled.processes.append(process)
    os.close(theirs)
    # select() takes no descriptor over 1023.
    ready = select.poll()
    ready.register(ours, select.POLLIN)
    shown = b""

    def has_shown(word: bytes) -> bool:
        nonlocal shown
        while ready.poll(0):
            try:
                shown += os.read(ours, 65536)
            except OSError:
                # The other end is closed.
                break
        return word in shown

    wait_for(lambda: has_shown(b"approvals"), 20)
    filled.add("completions a_new_type")
    wait_for(lambda: has_shown(b"a_new_type"), 20)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: has_shown(b"") and process.poll() is not None)
    assert process.returncode == 0
    os.close(ours)


def test_stats_watch_gives_a_line_of_json_each_time(filled):
    process = filled.start("tasks.py", "stats", "--watch", "--json", "--interval", "0.05")
    wait_for(lambda: process.log.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    lines = map(json.loads, process.log.read_text().splitlines())
    assert {line["queues"]["approvals"]["pending"] for line in lines} == {2}


# --------------------------------------------------------------------------------------- list


def test_list_is_in_the_order_of_claims_then_newest_finished_first(filled):
    listed = [task["task_id"] for task in filled.told("list")]
    assert listed == ["note-1", "review-2", "review-1", "deploy-1", "h1", "h3", "h2"]


FILTERS = {
    "--queue completions --queue notifications": {"note-1", "h3"},
    "--status failed --status pending": {"review-1", "review-2", "h2"},
    "--status running": {"note-1"},
    "--type deploy": {"deploy-1"},
    "--type review --since 1h": {"review-1", "review-2", "h1", "h3"},
    "--before 1h": {"h2"},
    "--text 'A NEEDLE'": {"note-1"},
    "--text needle%": set(),
    "--text n_te": set(),
    "--text eview-": {"review-1", "review-2"},
    "--type nobodys": set(),
}


def test_list_filters_by_queue_status_type_age_and_text(filled):
    for filters, listed in FILTERS.items():
        assert {task["task_id"] for task in filled.told(f"list {filters}")} == listed, filters
    done = filled.tq("list --type nobodys --json")
    assert (json.loads(done.stdout), done.stderr) == ([], "no matching tasks\n")


def test_a_bare_payload_is_called_after_its_queue_and_row(installation):
    installation.add("approvals review")
    installation.sqlite3('insert into notifications (data) values (\'{"workspace": "/x"}\')')
    for task in (
        installation.told("list --queue notifications")[0],
        installation.told("show notif"),
    ):
        named = (task["task_id"], task["task_type"], task["data"])
        assert named == ("notifications-1", "notifications", {"workspace": "/x"})


def test_a_pipe_gets_a_line_per_task_with_nothing_cut_off(installation):
    words = {"type": "x" * 150, "data": json.dumps({"k": "v" * 100}), "id": "i" * 200}
    installation.add(f"approvals {words['type']} --task-id {words['id']}", words["data"])
    head, line = installation.tq("list").stdout.splitlines()
    assert all(word in line for word in words.values())


def test_scripts_get_their_json_without_the_table_library(filled):
    # A copy of the scripts has it beside them, since PYTHONPATH decides nothing.
    lib = filled.directory / "lib"
    copy_scripts(lib, *(script.name for script in ROOT.glob("*.py")))
    (lib / "rich.py").write_text("raise ImportError('rich was imported')")

    def run(*words):
        command = [sys.executable, lib / "tasks.py", *words]
        return subprocess.run(command, env=filled.env, capture_output=True, text=True)

    for words in ("stats", "list", "show note-1", "pause approvals", "cancel deploy-1"):
        done = run(*words.split(), "--json")
        assert done.returncode == 0 and json.loads(done.stdout) is not None, done.stderr
    assert "rich was imported" in run("list").stderr


@pytest.mark.parametrize(
    "moment", ["2001-01-31T12:00:00Z", "2001-01-31 12:00:00+00:00", "2001-01-31", "soon", "", "980942400"]
)  # fmt: skip
def test_a_finished_task_whose_times_a_shell_has_written_hides_no_other(installation, moment):
    # It makes the database.
    installation.add("notifications note")
    for name in ("review", "by_hand"):
        finished(installation, "approvals", name, "completed", 10, 1, 1)
    [(by_hand, good)] = installation.rows("select max(task_id), min(task_id) from task_history")
    times = f"enqueued_at = '{moment}', started_at = '{moment}', completed_at = '{moment}'"
    # What came of a task is looked for among all rows, waiting ones, too.
    waits = "insert into approvals (data) values ('{}')"
    installation.sqlite3(f"update task_history set {times} where task_type = 'by_hand';{waits}")
    for words in ("list", "list --sort newest", "list --sort oldest"):
        assert by_hand in installation.tq(words).stdout
    for words in (
        f"show {by_hand}",
        f"show {good}",
        "list --since 1h",
        "stats",
        "export --history",
    ):
        assert "Traceback" not in installation.tq(words).stderr
    assert installation.told(f"show {by_hand}")["completed_at"] == moment
    assert installation.told("purge approvals --status completed --yes")["deleted"] == 2


# --------------------------------------------------------------------------------------- show


def test_show_gives_everything_with_history_and_output(installation):
    script = "echo the result; echo the log >&2; exit $((TASK_ATTEMPT == 1))"
    installation.handler("sum", f"#!/bin/sh\n{script}\n")
    task_id = installation.add("approvals sum --task-id sum-1", '{"a": 1}')
    installation.worker("approvals", "--backoff", "0.01")
    installation.finished(task_id)
    task = installation.told("show sum-1")
    told = [task[name] for name in ("status", "attempts", "result", "log", "history")]
    assert told == ["completed", 2, "the result\n", "the log\n", []]
    assert task["data"]["data"] == {"a": 1} and [run["attempt"] for run in task["runs"]] == [1, 2]
    installation.tq("pause approvals")
    installation.add("approvals sum --task-id sum-1", '{"a": 2}')
    task = installation.told("show sum-1")
    lives = [task["status"], *(life["status"] for life in task["history"])]
    assert lives == ["pending", "completed"]
    text = installation.tq("show sum-1").stdout
    assert "sum-1" in text and '"a": 2' in text and "completed" in text


def test_a_result_names_its_source(installation):
    installation.handler("review", '#!/bin/sh\necho \'{"summary": "fine"}\'\n')
    installation.add("approvals review --task-id first")
    installation.drain("approvals --then completions")
    assert installation.told("show first")["came_from"] == []
    [(result,)] = installation.rows("select task_id from completions")
    source = {"queue": "approvals", "task_id": "first", "status": "completed"}
    assert installation.told("show", result)["came_from"] == [source]
    text = installation.tq("show", result).stdout
    assert re.search(r"^came from +approvals first \(completed\)$", text, re.MULTILINE)
    installation.sqlite3("delete from task_history where task_id = 'first'")
    assert installation.told("show", result)["came_from"] == [source | {"status": "gone"}]


def test_times_have_their_zone_and_their_distance(installation):
    installation.add("approvals review --task-id later --delay 1h")
    # A process takes its zone from TZ at its start.
    installation.env["TZ"] = "Asia/Tokyo"
    installation.is_inside = False
    text = installation.tq("show later").stdout
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(rf"^enqueued_at +{moment} JST, .* ago$", text, re.MULTILINE)
    assert re.search(rf"^due_at +{moment} JST, in (59|60) m$", text, re.MULTILINE)
    # Scripts get UTC text, as the database has it.
    due_at = installation.told("show later")["due_at"]
    assert re.fullmatch(rf"{moment}\.\d{{3}}", due_at)


def test_json_is_indented_and_durations_are_given(installation):
    installation.add("approvals review --task-id ended", '{"deep": {"er": 1}}')
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at, result)"
        " select 'approvals', id, task_id, task_type, 'completed', data, '2026-01-01 00:00:00.000', '2026-01-01 00:00:05.000',"
        ' \'2026-01-01 00:02:05.000\', \'{"summary": "s", "n": 1}\' from approvals; delete from approvals'
    )
    text = installation.tq("show ended").stdout
    assert '"deep": {\n      "er": 1\n    }' in text
    assert '\nstdout\n{\n  "summary": "s",\n  "n": 1\n}\n' in text
    assert re.search(r"^waited +5\.0s$", text, re.M) and re.search(r"^ran +2m$", text, re.M)


def test_a_held_task_says_what_it_waits_for(installation):
    installation.add("approvals review --task-id h --hold")
    text = installation.tq("show h").stdout
    assert "held" in text and "until ./tasks.py approve or ./tasks.py reject" in text
