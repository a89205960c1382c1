"""`tq page` in a real Chromium shows the numbers of `tq stats`, and is read easily: on a phone, in
the dark, with one hour of data, by its colours.
"""

from __future__ import annotations

import colorsys
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line, wait_for
from pages import (  # noqa: F401
    HISTORY,
    NAUGHTY,
    browser,
    chromium_of_all,
    complaints,
    fill,
    hosts_asked,
    loaded,
    look,
    open_page,
    text,
    tile,
    write_page,
)

import tasks

# ruff: noqa: F811 -- fixtures are imported, and named again where they are used
LONG = "w" * 300


@pytest.fixture
def filled(installation):
    fill(installation)
    return installation


@pytest.fixture
def site(installation):
    """The address of a page over tasks of every status, some of them in long words."""
    fill(installation)
    payload = json.dumps({"workspace_path": f"/home/user/{LONG}", "prompt": LONG})
    installation.enqueue("notifications", LONG[:200], payload, "--task-id", LONG)
    installation.sqlite3(
        'insert into notifications (data, status) values (\'{"hook_event_name": "asks_first"}\', 3);'
        "insert into approvals (data, group_id) values ('{}', 'g');"
        "insert into approvals (data, group_id) values ('{\"hook_event_name\": \"comes_after\"}', 'g');"
        "insert into approvals (data, status, claimed_at, owner) values "
        "('{\"hook_event_name\": \"runs\"}', 2, (julianday('now') - 2440587.5) * 86400.0 - 90, 'somebody');"
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error, result, log) "
        "select 'approvals', 5000 + key, value, 'review', value, '{}', datetime('now'), "
        f"'{LONG}', '{LONG}', '{LONG}' from json_each('[\"expired\", \"cancelled\", \"failed\"]')"
    )
    return write_page(installation)


UNFOLD = "for (const d of document.querySelectorAll('details')) d.open = true"


OVERFLOW = """
const found = [];
for (const element of document.querySelectorAll('body *')) {
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (style.display === 'none' || element.closest('svg')) continue;
  if (box.right > innerWidth + 0.5 || box.left < -0.5) found.push(element.outerHTML.slice(0, 80));
  if (style.overflowX !== 'visible' && element.scrollWidth > element.clientWidth) found.push('scrolls: ' + element.tagName);
}
return [document.documentElement.scrollWidth, innerWidth, found.slice(0, 5)]"""


def test_nothing_is_wider_than_the_screen(site, browser):
    for width in (375, 700, 720, 768, 1000, 1280):
        look(browser, width)
        loaded(browser, site)
        for unfold in ("", UNFOLD):
            browser.execute_script(unfold)
            wide, screen, found = browser.execute_script(OVERFLOW)
            assert screen == width and wide <= width and found == [], (width, found)
    assert complaints(browser) == []


# The colours of each text and of what is behind it, and the smallest contrast of all (WCAG's
# definition).
CONTRAST = """
const channels = colour => colour.match(/[0-9.]+/g).map(Number);
const light = colour => { const [r, g, b] = channels(colour).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
const behind = element => { for (let e = element; e; e = e.parentElement) {
  const colour = getComputedStyle(e).backgroundColor; if ((channels(colour)[3] ?? 1) > 0) return colour } return 'rgb(255, 255, 255)' };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) { const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || element.closest('title')) continue;
  const [a, b] = [getComputedStyle(element).color, behind(element)].map(light);
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)]) }
return [light(getComputedStyle(document.body).backgroundColor), ...found.sort((x, y) => x[0] - y[0])[0]]"""


COLOURS = """
const colour = (css, what) => { const e = document.querySelector(css); return e && getComputedStyle(e)[what] };
const all = ['failed', 'in_progress', 'pending', 'scheduled', 'held', 'blocked', 'completed', 'cancelled', 'expired'];
return all.map(status => [status, colour('#total-' + status, 'borderTopColor'),
  colour('#chart-finished rect.' + status, 'fill'), colour('#chart-finished .key .' + status, 'color'),
  colour('#total-' + status + '.some b', 'color')])"""


@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_it_is_legible_and_one_colour_has_one_meaning(site, browser, scheme):
    look(browser, scheme=scheme)
    loaded(browser, site)
    browser.execute_script(UNFOLD)
    background, contrast, where = browser.execute_script(CONTRAST)
    assert background > 0.8 if scheme == "light" else background < 0.05
    assert contrast >= 4.5, where
    colours = {}
    for status, edge, bar, _, number in browser.execute_script(COLOURS):
        assert edge, status
        assert number in (None, edge) and bar in (None, edge), status
        colours[status] = edge
    assert len(set(colours.values())) == len(colours)

    def is_red(colour: str) -> bool:
        hue, _, saturation = colorsys.rgb_to_hls(
            *(int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        )
        return saturation > 0.3 and min(hue, 1 - hue) < 0.05

    assert [status for status, colour in colours.items() if is_red(colour)] == ["failed"]


def test_every_status_has_its_number_and_its_tasks_in_the_words_of_the_commands(site, browser):
    loaded(browser, site)
    browser.execute_script(UNFOLD)
    for status in ("held", "blocked", "scheduled", "in_progress", "expired", "cancelled"):
        assert status.replace("_", " ") in text(browser, f"#total-{status}")
        assert tile(browser, status) == 1
    waiting, ended = text(browser, "#waiting"), text(browser, "#ended")
    for kind, status in (("asks_first", "held"), ("comes_after", "blocked")):
        assert kind in waiting and status in waiting
    assert "expired" in ended and "cancelled" in ended and "failed" not in ended
    assert "runs" in text(browser, "#running")


def test_a_paused_queue_is_named_with_its_reason_and_its_end(installation, browser):
    for queue in ("for_a_while", "for_good", "no_more"):
        installation.enqueue(queue, "t")
    until = time.time() + 1800
    installation.sqlite3(
        "insert into task_controls (queue, paused_at, paused_until, pause_reason) values "
        f"('for_a_while', {until - 3600}, {until}, 'usage limit {NAUGHTY}'), "
        f"('for_good', {until - 3600}, null, null), ('no_more', {until - 3600}, {until - 1900}, 'x')"
    )
    open_page(browser, installation, TZ="Asia/Kolkata")
    said = "return [...document.querySelectorAll('.note')].map(e => e.innerText)"
    notes = browser.execute_script(said)
    at = time.strftime("%H:%M", time.gmtime(until + 19_800))
    assert "No worker serves no_more; start one: ./worker.py no_more." in notes
    assert any(note.startswith("No handler is called t; there are ") for note in notes)
    for_a_while, for_good = [note for note in notes if " is paused " in note]
    assert re.search(rf"for_a_while is paused until ([\d-]+ )?{at} IST", for_a_while), for_a_while
    assert NAUGHTY in for_a_while and "tasks.py resume for_a_while" in for_a_while
    assert for_good.startswith("for_good is paused until a person resumes it.")
    assert complaints(browser) == []


def test_a_served_queue_needs_no_note(installation, browser):
    installation.handler("t", "#!/bin/sh\nexec sleep 60\n")
    for _ in range(2):
        installation.enqueue("notifications", "t")
    installation.worker("notifications")
    open_page(browser, installation)
    assert browser.execute_script("return document.querySelectorAll('.note').length") == 0


def test_times_are_local_and_their_zone_is_named(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at) "
        "values ('notifications', 9, 'x', 't', 'failed', '{}', '2026-01-02 20:00:00.000', '2026-01-02 20:00:01.000', "
        "'2026-01-02 20:00:03.500')"
    )
    open_page(browser, installation, TZ="Asia/Kolkata")
    browser.execute_script(UNFOLD)
    assert "All times are IST (UTC+0530)" in text(browser, "header")
    fields = text(browser, "#failed dl")
    assert "2026-01-03 01:30:00 IST" in fields and "ran\n2.5s" in fields


LINES = """
return [...document.querySelectorAll('summary .name, summary .when')].map(e => {
  const range = document.createRange(); range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map(box => box.top)).size })"""


def test_names_are_not_broken_for_a_long_reason(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)"
        " values ('notifications', 9, 'x', 'link_validation', 'failed', '{}', datetime('now'),"
        f" '{'a/long/path/' * 20} is not there')"
    )
    page = write_page(installation)
    for width in (720, 1180):
        look(browser, width)
        loaded(browser, page)
        assert set(browser.execute_script(LINES)) == {1}


# Words that stand on two lines. A word is of letters and digits; one of more than 24 may have to.
BROKEN = r"""
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) { const node = walker.currentNode;
  if (!node.parentElement.offsetParent) continue;
  for (const word of node.textContent.matchAll(/[\p{L}\p{N}]{1,24}(?![\p{L}\p{N}])/gu)) {
    const range = document.createRange(); range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    if (new Set([...range.getClientRects()].filter(box => box.width).map(box => box.top)).size > 1)
      found.push(word[0]) } }
return found"""
ABOUT = {
    "prompt": "Review the dependencies of the website, and say which have known vulnerabilities",
    "file": "docs/operations/handbook/installation-and-configuration.md",
    "summary": "2 links are broken: docs/installation-and-configuration.md:117",
    "tool_input": {"file_path": "/home/user/internationalization/README.md"},
}


def test_no_word_is_broken_and_each_task_says_what_it_is_about(installation, browser):
    for name, value in ABOUT.items():
        task_type = f"nightly_{name}_review"
        installation.enqueue("documentation_maintenance", task_type, json.dumps({name: value}))
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)"
        " values ('notifications', 9, 'x', 'nightly_dependency_review', 'failed', '{}', datetime('now'),"
        "'no handler in /home/somebody/.claude/automation/lychee/handlers: put one there, then retry')"
    )
    page = write_page(installation)
    for width in (375, 768, 1280):
        look(browser, width)
        loaded(browser, page)
        said = text(browser, "#waiting")
        for value in ABOUT.values():
            assert (value if isinstance(value, str) else value["file_path"])[:79] in said
        for unfold in ("", UNFOLD):
            browser.execute_script(unfold)
            assert browser.execute_script(BROKEN) == []


BARS = """
return [...document.querySelectorAll('#chart-finished g')].map(g => [g.querySelector('title').textContent,
  g.querySelectorAll('rect:not(.ground)').length])"""


def test_the_charts_suit_one_hour_of_data_and_a_day_of_it(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3("""
        with recursive n (n) as (select 1 union all select n + 1 from n where n < 50)
        insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at)
        select 'notifications', n + 100, 'id-' || n, 't', 'completed', '{}', m, m, m
        from (select n, strftime('%Y-%m-%d %H:%M:%f', 'now', (-60 * n) || ' seconds') as m from n)""")
    open_page(browser, installation)
    assert "Each bar is 5m" in text(browser, "#chart-finished")
    bars = browser.execute_script(BARS)
    assert len(bars) == 24 and sum(drawn for _, drawn in bars) >= 10
    assert sum(int(n) for says, _ in bars for n in re.findall(r"(\d+) completed", says)) == 50
    installation.sqlite3(HISTORY)
    open_page(browser, installation)
    assert "Each bar is 60m" in text(browser, "#chart-finished")
    bars = browser.execute_script(BARS)
    assert len(bars) == 24 and all(drawn for _, drawn in bars[1:-1])
    assert any("failed" in says and "completed" in says for says, _ in bars)


def test_the_pictures_in_docs_are_drawn_by_a_recipe(installation, browser):
    recipe = [sys.executable, ROOT / "bench" / "page_pictures.py", installation.directory]
    done = subprocess.run(recipe, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = {file.name: file for file in installation.directory.glob("page-*.png")}
    assert set(drawn) == {file.name for file in (ROOT / "docs").glob("page-*.png")}
    for file in drawn.values():
        # A PNG as wide as a page, with more on it than one colour.
        head = file.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20]) >= 1000
        assert file.stat().st_size > 20_000


# --------------------------------------------------------------------------------- its content

COUNTS = """
return [...document.querySelectorAll('#counts tbody tr')].map(row => [row.dataset.queue, row.dataset.type,
  Object.fromEntries([...row.querySelectorAll('[data-status]')].map(
    cell => [cell.dataset.status, Number(cell.textContent.replaceAll(',', ''))])),
  [...row.querySelectorAll('[data-seconds]')].map(cell => cell.dataset.seconds && Number(cell.dataset.seconds))])"""


def test_the_page_shows_the_numbers_of_stats_and_asks_no_host(filled, browser):
    open_page(browser, filled)
    said = filled.told("stats")["queues"]
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
    open_page(browser, filled)
    assert "exit 1: <b>no</b>" in text(browser, "#failed summary")
    assert "link_validation" in text(browser, "#running summary")
    top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    parts = ("#failed", "#running", "#chart-finished", "#counts")
    places = [browser.execute_script(top, css) for css in parts]
    # The first two are on the first screen of a small laptop.
    assert places == sorted(places) and places[1] < 720


def test_each_recent_task_has_its_fields_and_output_folded_in(filled, browser):
    from selenium.webdriver.common.by import By

    filled.sqlite3(
        "update task_history set result = 'first' || char(10) || 'second', log = 'a warning', "
        "exit_code = 1, data = '{\"prompt\": \"Mend it\"}' where status = 'failed'"
    )
    open_page(browser, filled)
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
    open_page(browser, filled)
    body = browser.execute_script("return document.body.textContent")
    assert NAUGHTY in body and "a\\u202eb\\u3164" in body
    assert "\u202e" not in body and "\u3164" not in body
    assert browser.execute_script("return document.images.length + document.scripts.length") == 0
    assert complaints(browser) == []


def test_an_empty_queue_is_no_error(installation, browser):
    installation.add("notifications t")
    installation.sqlite3("delete from notifications")
    open_page(browser, installation)
    assert tile(browser, "pending") == 0
    shown = text(browser, "main")
    for what in ("has failed", "is running", "has finished", "is waiting"):
        assert f"Nothing {what}" in shown
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


def test_what_cannot_be_done_is_said_in_a_line(installation, monkeypatch):
    one_line(installation.run("tasks.py", "page"), 1)
    assert not installation.state.exists()
    installation.add("notifications t")
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    nowhere = installation.run("tasks.py", "page", "/nowhere/page.html")
    one_line(nowhere, 1, "/nowhere/page.html was not written: No such file")
    unopened = installation.tq("page --open", code=1).stderr
    assert "no browser could be started; open " in unopened and unopened.count("\n") == 1
