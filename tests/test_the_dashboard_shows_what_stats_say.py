"""The dashboard in a real Chromium: its numbers are those of tasks.py stats, its console silent."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import urllib.error
import urllib.parse

import pytest
from conftest import wait_for
from pages import (
    NAUGHTY,
    address,
    chromium,
    complaints,
    fill,
    get,
    hosts_asked,
    loaded,
    start,
    start_with,
    text,
    tile,
    uv,
)


@pytest.fixture
def site(installation):
    """(the installation, the dashboard's process, its front page's address), over some realistic
    tasks.
    """
    fill(installation)
    process = start(installation)
    yield installation, process, address(process)


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path) as driver:
        yield driver


def stats(installation) -> dict:
    done = installation.run("tasks.py", "stats", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["queues"]


COUNTS = """
return [...document.querySelectorAll('#counts tbody tr')].map(row => [row.dataset.queue, row.dataset.type,
  Object.fromEntries([...row.querySelectorAll('[data-status]')].map(
    cell => [cell.dataset.status, Number(cell.textContent.replaceAll(',', ''))])),
  Object.fromEntries([...row.querySelectorAll('[data-seconds]')].map(
    cell => [cell.dataset.seconds, cell.title && Number(cell.title)]))])"""


def test_the_page_shows_the_numbers_of_stats_and_the_console_is_silent(site, browser):
    installation, _, base = site
    loaded(browser, base)
    queues = stats(installation).values()
    for name in ("pending", "in_progress", "scheduled"):
        assert tile(browser, name) == sum(queue[name] for queue in queues), name
    for name in ("completed", "failed"):
        assert tile(browser, name) == sum(queue[f"{name}_day"] for queue in queues), name
    assert tile(browser, "pending") == 8 and tile(browser, "failed") == 40
    assert tile(browser, "scheduled") == 1
    for name in ("finished", "waited"):
        bars = "return document.querySelectorAll(arguments[0] + ' rect:not(.ground)').length"
        assert browser.execute_script(bars, f"#chart-{name}") >= 20, name
    assert complaints(browser) == []
    assert hosts_asked(browser) == {"127.0.0.1"}


def test_each_queue_and_type_has_the_numbers_of_stats(site, browser):
    installation, _, base = site
    loaded(browser, base)
    shown = browser.execute_script(COUNTS)
    said = stats(installation)
    expected = {(queue, ""): numbers for queue, numbers in said.items()}
    expected |= {
        (queue, kind): numbers for queue in said for kind, numbers in said[queue]["types"].items()
    }
    assert {(queue, kind) for queue, kind, *_ in shown} == set(expected)
    for queue, kind, counts, seconds in shown:
        numbers = expected[queue, kind]
        for name, number in counts.items():
            assert number == numbers.get(name, numbers.get(f"{name}_day")), (queue, kind, name)
        for name, mine in (("wait_seconds", "waited"), ("run_seconds", "ran")):
            median = numbers[name] and numbers[name]["median"]
            assert (
                seconds[mine] == pytest.approx(median or 0, abs=0.002)
                if numbers[name]
                else not seconds[mine]
            )
        assert bool(seconds["oldest_waiting"]) == bool(numbers["oldest_pending_seconds"])


def test_the_page_follows_the_queue(site, browser):
    installation, _, base = site
    loaded(browser, base)
    before = tile(browser, "pending")
    installation.enqueue("a_new_queue", "review")
    # It reads again by itself.
    refresh = browser.execute_script(
        "return document.querySelector('meta[http-equiv=refresh]').content"
    )
    assert 10 <= int(refresh) <= 60
    loaded(browser, base)
    assert tile(browser, "pending") == before + 1
    assert "a_new_queue" in text(browser, "#counts")


def test_it_reads_again_by_itself(installation, browser):
    fill(installation)
    base = address(start_with(installation, "dashboard.REFRESH_SECONDS = 1"))
    loaded(browser, base)
    before = tile(browser, "pending")
    installation.enqueue("notifications", "review")
    wait_for(lambda: tile(browser, "pending") == before + 1, 30, "the new number")
    assert complaints(browser) == []


def test_an_empty_queue_is_no_error(installation, browser):
    installation.enqueue("notifications", "t", "{}", "--task-id", "x")
    installation.sqlite3("delete from notifications")
    loaded(browser, address(start(installation)))
    assert tile(browser, "pending") == 0
    assert "Nothing has failed" in text(browser, "#failed")
    assert "Nothing is running" in text(browser, "#running")
    assert "Nothing has finished" in text(browser, "main")
    assert complaints(browser) == []


def test_what_failed_with_its_reason_and_what_runs_come_before_the_charts(site, browser):
    installation, _, base = site
    installation.handler("link_validation", "#!/bin/sh\nexec sleep 60\n")
    installation.worker("notifications")
    running = "select count(*) from notifications where status = 2"
    wait_for(lambda: installation.rows(running) == [(1,)], what="a running task")
    loaded(browser, base)
    assert "exit 1: <b>no</b>" in text(browser, "#failed tbody tr")
    assert "link_validation" in text(browser, "#running tbody tr")
    places = [
        browser.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().top", css
        )
        for css in ("#failed", "#running", "#chart-finished", "#counts")
    ]
    assert places == sorted(places)
    # Both are on the first screen of a small laptop.
    assert places[1] < 720


def test_a_task_has_a_page_with_its_fields_and_its_output_in_boxes(site, browser):
    from selenium.webdriver.common.by import By

    installation, _, base = site
    installation.sqlite3(
        "update task_history set result = 'first' || char(10) || 'second', log = 'a warning', exit_code = 1 "
        "where status = 'failed'"
    )
    loaded(browser, f"{base}tasks?status=failed&queue=approvals")
    browser.find_element(By.CSS_SELECTOR, "tbody a").click()
    wait_for(lambda: "/finished/" in browser.current_url, what="the task's page")
    assert text(browser, "#error") == "It failed: exit 1: <b>no</b>"
    assert "first\nsecond" in text(browser, "main") and "a warning" in text(browser, "main")
    fields = dict(
        zip(
            text(browser, "#fields").split("\n")[::2],
            text(browser, "#fields").split("\n")[1::2],
            strict=True,
        )
    )
    assert (
        fields["Queue"] == "approvals"
        and fields["Exit code"] == "1"
        and fields["Id"].startswith("task-")
    )
    assert fields["In a terminal"] == f"tasks.py retry {fields['Id']}"
    assert browser.execute_script("return document.querySelectorAll('table').length") == 0
    tops = browser.execute_script(
        "return [...document.querySelectorAll('dt')].map(e => e.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == len(tops)
    browser.find_element(By.LINK_TEXT, "Overview").click()
    wait_for(lambda: browser.current_url == base, what="the front page")
    assert complaints(browser) == []


def test_what_tasks_say_is_text_and_nothing_else(site, browser):
    installation, _, base = site
    for page in (base, f"{base}tasks?status=pending", f"{base}task/notifications/8"):
        loaded(browser, page)
        assert NAUGHTY in text(browser, "body")
        assert (
            browser.execute_script("return document.images.length + document.scripts.length") == 0
        )
    assert complaints(browser) == []


def test_no_page_shows_sql(site):
    _, _, base = site
    for page in (
        "",
        "tasks?status=pending",
        "tasks?status=failed",
        "finished/10",
        "task/notifications/1",
    ):
        shown = get(base + page)
        assert "task_history" not in shown and not re.search(
            r"select .* from", shown, re.IGNORECASE | re.DOTALL
        )


def test_lists_show_what_waits_runs_failed_and_ended(site):
    installation, _, base = site
    installation.handler("link_validation", "#!/bin/sh\nexec sleep 60\n")
    installation.worker("notifications")
    wait_for(
        lambda: "link_validation" in get(f"{base}tasks?status=in_progress"), what="a running task"
    )
    assert get(f"{base}tasks?status=pending").count("<tr>") == 1 + 7
    assert "review" in get(f"{base}tasks?status=scheduled")
    assert get(f"{base}tasks?status=failed").count("exit 1: &lt;b&gt;") == 40
    assert get(f"{base}tasks?status=failed&queue=completions").count("exit 1:") == 0
    assert get(f"{base}tasks?status=completed").count("<tr>") == 1 + 200
    assert "There are none" in get(f"{base}tasks?status=cancelled")


def test_a_task_that_has_finished_meanwhile_is_still_found(installation):
    installation.handler("quick", "#!/bin/sh\necho all is well\n")
    task_id = installation.enqueue("notifications", "quick")
    base = address(start(installation))
    (row,) = re.findall(r'href="(task/notifications/\d+)"', get(f"{base}tasks?status=pending"))
    assert "Waiting" in get(base + row)
    installation.worker("notifications")
    installation.finished(task_id)
    shown = get(base + row)
    assert "Done" in shown and "all is well" in shown
    assert "all is well" in get(f"{base}tasks?status=completed")


def test_runs_of_one_id_lead_to_each_other(site):
    installation, _, base = site
    installation.enqueue("approvals", "review", "{}", "--task-id", "task-30")
    (row,) = re.findall(
        r'href="(task/approvals/\d+)" title="task-30"', get(f"{base}tasks?status=pending")
    )
    (before,) = re.findall(r'href="../../(finished/\d+)" title="task-30"', get(base + row))
    assert f'href="../{row}"' in get(base + before)


def test_it_can_not_write_and_listens_to_this_machine_alone(site):
    installation, _, base = site
    before = installation.rows("select count(*) from task_history")
    for sql in (
        "delete from task_history",
        "insert into notifications (data) values ('{}')",
        "pragma user_version = 9",
    ):
        for page in ("", "tasks", "finished/10"):
            get(f"{base}{page}?sql={urllib.parse.quote(sql)}")
        with pytest.raises(urllib.error.HTTPError):
            get(f"{base}tasks.json?sql={urllib.parse.quote(sql)}")
    assert installation.rows("select count(*) from task_history") == before
    port = urllib.parse.urlsplit(base).port
    listening = subprocess.run(
        ["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True
    ).stdout
    sockets = [line.split() for line in listening.splitlines()]
    where = {
        socket[1] for socket in sockets if socket[1].endswith(f":{port:04X}") and socket[3] == "0A"
    }
    # This is so on Linux.
    if where:
        assert where == {f"0100007F:{port:04X}"}


def test_an_open_dashboard_never_blocks_an_enqueue(site):
    installation, _, base = site
    get(base)
    done = installation.run("enqueue.py", "notifications", "t")
    assert done.returncode == 0, done.stderr
    assert installation.sqlite3("pragma wal_checkpoint(truncate)").startswith("0|")


def test_a_database_that_was_replaced_is_noticed(site):
    installation, _, base = site
    get(base)
    installation.sqlite3(
        "delete from notifications; delete from approvals; delete from task_history"
    )
    copy = installation.directory / "copy.db"
    installation.sqlite3(f"vacuum into '{copy}'")
    with sqlite3.connect(copy) as conn:
        conn.execute(
            'insert into completions (data) values (\'{"hook_event_name": "from_the_copy"}\')'
        )
    conn.close()
    for suffix in ("-wal", "-shm"):
        (installation.state / f"tasks.db{suffix}").unlink(missing_ok=True)
    copy.replace(installation.db)
    assert "from_the_copy" in get(base)
    installation.db.unlink()
    with pytest.raises(urllib.error.HTTPError) as error:
        get(base)
    assert error.value.code == 503 and b"No such file" in error.value.read()
    assert not installation.db.exists()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_it_with_0(site, number):
    installation, process, base = site
    get(base)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert (installation.directory / "dashboard.err").read_text() == ""


def refused(installation, *args) -> tuple[int, str]:
    command, env = uv(installation)
    done = subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, (
        done.stderr
    )
    return done.returncode, done.stderr


def test_a_missing_database_is_not_made(installation):
    code, said = refused(installation, "--port", "0")
    assert code == 1 and "No such file" in said
    assert not installation.state.exists()


def test_foreign_newer_and_damaged_databases_are_refused_and_left_as_they_are(installation):
    installation.state.mkdir()
    installation.sqlite3("create table invoices (a, b)")
    before = installation.db.read_bytes()
    assert "not a task queue" in refused(installation)[1] and installation.db.read_bytes() == before
    installation.db.unlink()
    installation.enqueue("notifications", "t")
    installation.sqlite3("pragma user_version = 99")
    assert "schema version 99" in refused(installation)[1]
    for suffix in ("", "-wal", "-shm"):
        (installation.state / f"tasks.db{suffix}").unlink(missing_ok=True)
    installation.db.write_bytes(b"this is no database" * 500)
    code, said = refused(installation)
    assert code == 1 and "damaged or not a database" in said


def test_a_bad_or_taken_port_is_said(site):
    installation, _, base = site
    assert refused(installation, "--port", "http")[0] == 64
    code, said = refused(installation, "--port", str(urllib.parse.urlsplit(base).port))
    assert code == 1 and "--port" in said


@pytest.mark.parametrize(
    "name", ("a#b", "a?mode=rwc", "%41 b", 'it\'s "quoted"', "Übung – 漁港", "a&b;c\\d")
)
def test_a_state_directory_may_have_any_name(installation, name):
    installation.state = installation.directory / name
    installation.db = installation.state / "tasks.db"
    installation.env["TASK_QUEUE_STATE"] = str(installation.state)
    installation.enqueue("notifications", "a_type_of_its_own")

    def files() -> set:
        sidecars = ("tasks.db-wal", "tasks.db-shm", "dashboard.err")
        return {
            str(file) for file in installation.directory.rglob("*") if file.name not in sidecars
        }

    before = files()
    assert "a_type_of_its_own" in get(address(start(installation)))
    assert files() == before
