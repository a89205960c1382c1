"""The dashboard is read easily: on a phone, in the dark, with one hour of data, by its colours."""

from __future__ import annotations

import colorsys
import json
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from pages import (
    HISTORY,
    NAUGHTY,
    address,
    chromium,
    complaints,
    fill,
    get,
    loaded,
    start,
    text,
    tile,
    uv,
)

SCHEMES = ("light", "dark")
LONG = "w" * 300


@pytest.fixture
def browser(tmp_path):
    with chromium(tmp_path) as driver:
        yield driver


@pytest.fixture
def site(installation):
    """(the installation, its front page's address), over tasks of every status."""
    fill(installation)
    payload = json.dumps({"workspace_path": f"/home/user/{LONG}", "text": LONG})
    installation.enqueue("notifications", LONG[:200], payload, "--task-id", LONG)
    installation.sqlite3(
        'insert into notifications (data, status) values (\'{"hook_event_name": "asks_first"}\', 3);'
        "insert into approvals (data, status, group_id) values ('{\"hook_event_name\": \"comes_after\"}', 4, 'g');"
        "insert into approvals (data, status, claimed_at, owner) values "
        "('{\"hook_event_name\": \"runs\"}', 2, (julianday('now') - 2440587.5) * 86400.0 - 90, 'somebody');"
        # A status that this version does not know is one that the next one has.
        "pragma ignore_check_constraints = 1;"
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error, result, log) "
        "select 'approvals', 5000 + key, value, 'review', value, '{}', datetime('now'), "
        f"'{LONG}', '{LONG}', '{LONG}' from json_each('[\"expired\", \"cancelled\", \"put_off\", \"failed\"]')"
    )
    yield installation, address(start(installation))


def pages_of(base: str) -> list[str]:
    """A page of each kind, the last of a failed, a running, and a waiting task, in long words."""
    lists = [
        f"tasks?status={status}"
        for status in ("pending", "scheduled", "held", "failed", "completed", "put_off", "none")
    ]
    found = [
        re.search(rf'href="({kind}/[^"]+)"', get(f"{base}tasks?status={status}"))
        for kind, status in (("finished", "failed"), ("task", "in_progress"))
    ]
    (long,) = re.findall(rf'href="(task/[^"]+)" title="{LONG}"', get(f"{base}tasks?status=pending"))
    return [base + page for page in ("", *lists, *(match[1] for match in found), long)]


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


@pytest.mark.parametrize("width", (375, 700, 720, 1000, 1180))
def test_nothing_is_wider_than_the_screen(site, browser, width):
    look(browser, width)
    for page in pages_of(site[1]):
        loaded(browser, page)
        wide, screen, found = browser.execute_script(OVERFLOW)
        assert screen == width and wide <= width and found == [], (page, found)
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
    for page in pages_of(site[1]):
        loaded(browser, page)
        background, contrast, where = browser.execute_script(CONTRAST)
        assert background > 0.8 if scheme == "light" else background < 0.05
        assert contrast >= 4.5, (page, where)


COLOURS = """
const colour = (css, what) => { const e = document.querySelector(css); return e && getComputedStyle(e)[what] };
const all = ['failed', 'in_progress', 'pending', 'scheduled', 'held', 'blocked', 'completed', 'cancelled', 'expired'];
return all.map(status => [status, colour('#total-' + status, 'borderTopColor'),
  colour('#chart-finished rect.' + status, 'fill'), colour('#chart-finished .key .' + status, 'color'),
  colour('#total-' + status + '.some b', 'color')])"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_colour_has_one_meaning(site, browser, scheme):
    look(browser, scheme=scheme)
    loaded(browser, site[1])
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


def test_every_status_has_its_words_its_number_and_its_list(site, browser):
    installation, base = site
    loaded(browser, base)
    words = {
        "held": "Held for approval",
        "blocked": "Waiting for its turn",
        "expired": "Expired",
        "put_off": "Put off",
        "scheduled": "Scheduled",
    }
    for status, said in words.items():
        assert said in text(browser, f"#total-{status}") and tile(browser, status) == 1
        assert text(browser, f"#counts tr.total [data-status={status}]") in "01"
    assert "asks_first" in get(f"{base}tasks?status=held") and "asks_first" not in get(
        f"{base}tasks?status=scheduled"
    )
    assert "comes_after" in get(f"{base}tasks?status=blocked")
    assert "put_off" in get(f"{base}tasks?status=put_off")
    # Nobody is shown a word with an underscore that is no name of a task's.
    for word in ("in_progress", "put_off"):
        assert word not in text(browser, ".tiles") and word not in text(browser, "footer")


def test_every_status_of_the_view_has_a_word_here(installation, browser):
    """A status that the view gets without one having been found for it fails here."""
    installation.enqueue("notifications", "t")
    ((view,),) = installation.rows("select sql from sqlite_master where name = 'task_queue'")
    ((history,),) = installation.rows("select sql from sqlite_master where name = 'task_history'")
    live = set(re.findall(r"(?:then|else) '(\w+)'", view))
    finished = set(re.findall(r"'(\w+)'", re.search(r"status in \(([^)]*)\)", history)[1]))
    assert {"pending", "in_progress"} <= live and {"completed", "failed"} <= finished
    loaded(browser, address(start(installation)))
    links = browser.execute_script(
        "return [...document.querySelectorAll('footer a')].map(a => a.href.split('status=')[1])"
    )
    assert live | finished <= set(links)


def test_a_paused_queue_is_named_with_its_reason_and_its_end(installation, browser):
    for queue in ("for_a_while", "for_good", "no_more"):
        installation.enqueue(queue, "t")
    until = time.time() + 1800
    installation.sqlite3(
        "insert into task_controls (queue, paused_at, paused_until, pause_reason) values "
        f"('for_a_while', {until - 3600}, {until}, 'usage limit {NAUGHTY}'), "
        f"('for_good', {until - 3600}, null, null), ('no_more', {until - 3600}, {until - 1900}, 'x')"
    )
    installation.sqlite3("insert into task_controls (queue, slots) values ('approvals', 3)")
    loaded(browser, address(start(installation, TZ="Asia/Kolkata")))
    said = text(browser, "#paused-for_a_while")
    at = time.strftime("%H:%M", time.gmtime(until + 19_800))
    assert re.search(rf"is paused until (\d\d \w+, )?{at}: usage limit", said), said
    assert NAUGHTY in said and "tasks.py resume for_a_while" in said
    assert "for_good is paused." in text(browser, "#paused-for_good")
    assert browser.execute_script("return document.querySelectorAll('.paused').length") == 2
    counts = text(browser, "#counts")
    assert "for_good (paused)" in counts and "no_more (paused)" not in counts
    assert complaints(browser) == []


def test_times_are_local_and_their_zone_is_named(installation, browser):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, completed_at) "
        "values ('notifications', 9, 'x', 't', 'failed', '{}', '2026-01-02 20:00:00.000', '2026-01-02 20:00:01.000', "
        "'2026-01-02 20:00:03.500')"
    )
    base = address(start(installation, TZ="Asia/Kolkata"))
    for page in (base, f"{base}tasks?status=failed", f"{base}finished/1"):
        loaded(browser, page)
        assert "All times are IST (UTC+05:30)" in text(browser, "header")
    fields = text(browser, "#fields")
    assert "2026-01-03 01:30:00" in fields and "2.5 s" in fields


LINES = """
return [...document.querySelectorAll('td.name a, td.queue')].map(e => {
  const range = document.createRange(); range.selectNodeContents(e); return range.getClientRects().length })"""


@pytest.mark.parametrize("width", (720, 1180))
def test_names_are_not_broken_for_a_long_reason(installation, browser, width):
    installation.enqueue("notifications", "t")
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)"
        " values ('notifications', 9, 'x', 'link_validation', 'failed', '{}', datetime('now'),"
        f" '{'a/long/path/' * 20} is not there')"
    )
    look(browser, width)
    loaded(browser, address(start(installation)))
    assert browser.execute_script(LINES) == [1, 1]


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
    base = address(start(installation))
    loaded(browser, base)
    assert "Each bar is 5 min" in text(browser, "#chart-finished")
    bars = browser.execute_script(BARS)
    assert len(bars) == 24 and sum(drawn for _, drawn in bars) >= 10
    assert sum(int(number) for says, _ in bars for number in re.findall(r"(\d+) done", says)) == 50
    installation.sqlite3(HISTORY)
    loaded(browser, base)
    assert "Each bar is 1 h" in text(browser, "#chart-finished")
    bars = browser.execute_script(BARS)
    assert len(bars) == 24 and all(drawn for _, drawn in bars[1:-1])
    assert any("failed" in says and "done" in says for says, _ in bars)


def test_the_pictures_in_docs_are_drawn_by_a_recipe(installation, browser):
    environment = uv(installation)[1]
    recipe = [sys.executable, ROOT / "bench" / "dashboard_pictures.py", installation.directory]
    done = subprocess.run(recipe, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn = {file.name: file for file in installation.directory.glob("dashboard-*.png")}
    assert set(drawn) == {file.name for file in (ROOT / "docs").glob("dashboard-*.png")}
    for file in drawn.values():
        # A PNG as wide as a page, with more on it than one colour.
        head = file.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(head[16:20]) >= 1000
        assert file.stat().st_size > 20_000
