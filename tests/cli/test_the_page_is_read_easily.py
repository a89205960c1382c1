"""The page is read easily: on a phone, in the dark, with one hour of data, by its colours."""

from __future__ import annotations

import colorsys
import json
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from pages import HISTORY, NAUGHTY, chromium, complaints, fill, loaded, text, tile, write_page

SCHEMES = ("light", "dark")
LONG = "w" * 300


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path) as driver:
        yield driver


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


def look(browser, width: int = 1180, scheme: str = "light") -> None:
    """Have the browser show pages as wide as this, for somebody who prefers these colours."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


OVERFLOW = """
const found = [];
for (const element of document.querySelectorAll('body *')) {
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (style.display === 'none' || element.closest('svg')) continue;
  if (box.right > innerWidth + 0.5 || box.left < -0.5) found.push(element.outerHTML.slice(0, 80));
  if (style.overflowX !== 'visible' && element.scrollWidth > element.clientWidth) found.push('scrolls: ' + element.tagName);
}
return [document.documentElement.scrollWidth, innerWidth, found.slice(0, 5)]"""


@pytest.mark.parametrize("width", (375, 700, 720, 768, 1000, 1280))
def test_nothing_is_wider_than_the_screen(site, browser, width):
    look(browser, width)
    loaded(browser, site)
    for unfold in ("", UNFOLD):
        browser.execute_script(unfold)
        wide, screen, found = browser.execute_script(OVERFLOW)
        assert screen == width and wide <= width and found == [], found
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_legible_in_light_and_dark(site, browser, scheme):
    look(browser, scheme=scheme)
    loaded(browser, site)
    browser.execute_script(UNFOLD)
    background, contrast, where = browser.execute_script(CONTRAST)
    assert background > 0.8 if scheme == "light" else background < 0.05
    assert contrast >= 4.5, where


COLOURS = """
const colour = (css, what) => { const e = document.querySelector(css); return e && getComputedStyle(e)[what] };
const all = ['failed', 'in_progress', 'pending', 'scheduled', 'held', 'blocked', 'completed', 'cancelled', 'expired'];
return all.map(status => [status, colour('#total-' + status, 'borderTopColor'),
  colour('#chart-finished rect.' + status, 'fill'), colour('#chart-finished .key .' + status, 'color'),
  colour('#total-' + status + '.some b', 'color')])"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_colour_has_one_meaning(site, browser, scheme):
    look(browser, scheme=scheme)
    loaded(browser, site)
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
    loaded(browser, write_page(installation, TZ="Asia/Kolkata"))
    notes = browser.execute_script(
        "return [...document.querySelectorAll('.note')].map(e => e.innerText)"
    )
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
    loaded(browser, write_page(installation))
    assert browser.execute_script("return document.querySelectorAll('.note').length") == 0


def test_times_are_local_and_their_zone_is_named(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at) "
        "values ('notifications', 9, 'x', 't', 'failed', '{}', '2026-01-02 20:00:00.000', '2026-01-02 20:00:01.000', "
        "'2026-01-02 20:00:03.500')"
    )
    loaded(browser, write_page(installation, TZ="Asia/Kolkata"))
    browser.execute_script(UNFOLD)
    assert "All times are IST (UTC+0530)" in text(browser, "header")
    fields = text(browser, "#failed dl")
    assert "2026-01-03 01:30:00 IST" in fields and "ran\n2.5s" in fields


LINES = """
return [...document.querySelectorAll('summary .name, summary .when')].map(e => {
  const range = document.createRange(); range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map(box => box.top)).size })"""


@pytest.mark.parametrize("width", (720, 1180))
def test_names_are_not_broken_for_a_long_reason(installation, browser, width):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)"
        " values ('notifications', 9, 'x', 'link_validation', 'failed', '{}', datetime('now'),"
        f" '{'a/long/path/' * 20} is not there')"
    )
    look(browser, width)
    loaded(browser, write_page(installation))
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


@pytest.mark.parametrize("width", (375, 768, 1280))
def test_no_word_is_broken_and_each_task_says_what_it_is_about(installation, browser, width):
    for name, value in ABOUT.items():
        task_type = f"nightly_{name}_review"
        installation.enqueue("documentation_maintenance", task_type, json.dumps({name: value}))
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)"
        " values ('notifications', 9, 'x', 'nightly_dependency_review', 'failed', '{}', datetime('now'),"
        "'no handler in /home/somebody/.claude/automation/lychee/handlers: put one there, then retry')"
    )
    look(browser, width)
    loaded(browser, write_page(installation))
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
    loaded(browser, write_page(installation))
    assert "Each bar is 5m" in text(browser, "#chart-finished")
    bars = browser.execute_script(BARS)
    assert len(bars) == 24 and sum(drawn for _, drawn in bars) >= 10
    assert (
        sum(int(number) for says, _ in bars for number in re.findall(r"(\d+) completed", says))
        == 50
    )
    installation.sqlite3(HISTORY)
    loaded(browser, write_page(installation))
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
