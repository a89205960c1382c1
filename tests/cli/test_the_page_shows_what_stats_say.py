"""`tq page` in a real Chromium: its numbers are those of tasks.py stats, its console is silent."""

from __future__ import annotations

import json
import signal

import pytest
from conftest import wait_for
from pages import NAUGHTY, chromium, complaints, fill, hosts_asked, loaded, text, tile, write_page

import tasks


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path) as driver:
        yield driver


@pytest.fixture
def filled(installation):
    fill(installation)
    return installation


def stats(installation) -> dict:
    done = installation.run("tasks.py", "stats", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["queues"]


COUNTS = """
return [...document.querySelectorAll('#counts tbody tr')].map(row => [row.dataset.queue, row.dataset.type,
  Object.fromEntries([...row.querySelectorAll('[data-status]')].map(
    cell => [cell.dataset.status, Number(cell.textContent.replaceAll(',', ''))])),
  [...row.querySelectorAll('[data-seconds]')].map(cell => cell.dataset.seconds && Number(cell.dataset.seconds))])"""


def test_the_page_shows_the_numbers_of_stats_and_asks_no_host(filled, browser):
    loaded(browser, write_page(filled))
    said = stats(filled)
    for name in ("pending", "in_progress", "scheduled"):
        assert tile(browser, name) == sum(queue[name] for queue in said.values()), name
    for name in ("completed", "failed"):
        assert tile(browser, name) == sum(queue[f"{name}_day"] for queue in said.values()), name
    assert tile(browser, "pending") == 8 and tile(browser, "failed") == 40
    for name in ("finished", "waited"):
        bars = "return document.querySelectorAll(arguments[0] + ' rect:not(.ground)').length"
        assert browser.execute_script(bars, f"#chart-{name}") >= 20, name
    assert complaints(browser) == [] and hosts_asked(browser) == set()

    expected = {(queue, ""): numbers for queue, numbers in said.items()}
    expected |= {(name, kind): n for name in said for kind, n in said[name]["types"].items()}
    shown = browser.execute_script(COUNTS)
    assert {(queue, kind) for queue, kind, *_ in shown} == set(expected)
    for queue, kind, counts, (oldest, *seconds) in shown:
        numbers = expected[queue, kind]
        for name, number in counts.items():
            assert number == numbers.get(name, numbers.get(f"{name}_day")), (queue, kind, name)
        medians = [n and n["median"] for n in (numbers["wait_seconds"], numbers["run_seconds"])]
        assert [second or None for second in seconds] == [median or None for median in medians]
        assert bool(oldest) == bool(numbers["oldest_pending_seconds"])


def test_failures_with_their_reason_and_running_tasks_come_before_the_charts(filled, browser):
    filled.handler("link_validation", "#!/bin/sh\nexec sleep 60\n")
    filled.worker("notifications")
    running = "select count(*) from notifications where status = 2"
    wait_for(lambda: filled.rows(running) == [(1,)], what="a running task")
    loaded(browser, write_page(filled))
    assert "exit 1: <b>no</b>" in text(browser, "#failed summary")
    assert "link_validation" in text(browser, "#running summary")
    top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    places = [
        browser.execute_script(top, css)
        for css in ("#failed", "#running", "#chart-finished", "#counts")
    ]
    # The first two are on the first screen of a small laptop.
    assert places == sorted(places) and places[1] < 720


def test_each_recent_task_has_its_fields_and_output_folded_in(filled, browser):
    from selenium.webdriver.common.by import By

    filled.sqlite3(
        "update task_history set result = 'first' || char(10) || 'second', log = 'a warning', "
        "exit_code = 1, data = '{\"prompt\": \"Mend it\"}' where status = 'failed'"
    )
    loaded(browser, write_page(filled))
    assert "Mend it" in text(browser, "#failed summary .about")
    assert "second" not in text(browser, "#failed")
    browser.find_element(By.CSS_SELECTOR, "#failed summary").click()
    shown = text(browser, "#failed details[open]")
    task_id = browser.find_element(By.CSS_SELECTOR, "#failed details").get_attribute("data-task")
    assert "first\nsecond" in shown and "a warning" in shown and '"prompt": "Mend it"' in shown
    for field in ("exit_code\n1", f"task_id\n{task_id}", f"tasks.py retry {task_id}"):
        assert field in shown, field
    assert f"tasks.py show {task_id}" in shown


def test_text_of_tasks_stays_text(filled, browser):
    filled.enqueue("notifications", "review", json.dumps({"prompt": f"a\u202eb\u3164 {NAUGHTY}"}))
    loaded(browser, write_page(filled))
    body = browser.execute_script("return document.body.textContent")
    assert NAUGHTY in body and "a\\u202eb\\u3164" in body
    assert "\u202e" not in body and "\u3164" not in body
    assert browser.execute_script("return document.images.length + document.scripts.length") == 0
    assert complaints(browser) == []


def test_an_empty_queue_is_no_error(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3("delete from notifications")
    loaded(browser, write_page(installation))
    assert tile(browser, "pending") == 0
    shown = text(browser, "main")
    for sentence in (
        "Nothing has failed",
        "Nothing is running",
        "Nothing has finished",
        "Nothing is waiting",
    ):
        assert sentence in shown
    assert complaints(browser) == []


def test_watch_writes_it_after_each_change_and_the_browser_reads_it_again(filled, browser):
    process = filled.start("tasks.py", "page", "--watch", "--interval", "2")
    page = filled.state / "page.html"
    wait_for(page.exists, what="the page")
    loaded(browser, page.as_uri())
    filled.enqueue("a_new_queue", "review")
    wait_for(lambda: tile(browser, "pending") == 9, 30, "the new number")
    assert "a_new_queue" in text(browser, "#counts")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert 'http-equiv="refresh"' not in page.read_text()


def test_open_shows_it_in_the_browser_and_a_file_may_be_elsewhere(queue, installation, monkeypatch):
    installation.enqueue("notifications", "t")
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    page = installation.directory / "my page.html"
    assert tasks.main(["page", str(page), "--open"]) == 0
    assert opened == [page.as_uri()] and page.stat().st_mode & 0o777 == 0o600
    assert not (installation.state / "page.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (["page", "/nowhere/page.html"], "/nowhere/page.html was not written: No such file"),
        (["page", "--open"], "no browser could be started; open "),
    ),
)
def test_what_cannot_be_done_is_said_in_a_line(
    queue, installation, monkeypatch, capsys, words, said
):
    installation.enqueue("notifications", "t")
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert tasks.main(words) == 1
    assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_missing_database_is_not_made(installation):
    done = installation.run("tasks.py", "page")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert not installation.state.exists()
