"""What the tests of the page share: a real Chromium, and realistic tasks."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import wait_for

NAUGHTY = "<img src=x onerror=alert(1)>"

HISTORY = """
with recursive n (n) as (select 1 union all select n + 1 from n where n < 400)
insert into task_history (queue, row_id, task_id, task_type, status, data, attempts, enqueued_at, started_at, completed_at, error)
select case when n % 3 then 'notifications' else 'approvals' end, n + 1000, 'task-' || n,
  case n % 4 when 0 then 'review' when 1 then 'summary' else 'link_validation' end,
  case when n % 10 then 'completed' else 'failed' end, '{}', 1,
  strftime('%Y-%m-%d %H:%M:%f', 'now', (-200 * n - 30 - n % 7) || ' seconds'),
  strftime('%Y-%m-%d %H:%M:%f', 'now', (-200 * n - 30) || ' seconds'),
  strftime('%Y-%m-%d %H:%M:%f', 'now', (-200 * n - 30 + n % 23) || ' seconds'),
  case when n % 10 then null else 'exit 1: <b>no</b>' end
from n"""


def fill(installation) -> None:
    places = [installation.directory / f"docs {n}" for n in range(7)]
    for place in places:
        place.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"workspace_path": str(place)}) + "\n" for place in places)
    installation.enqueue("notifications", "link_validation", "--jsonl", input=lines)
    installation.enqueue("approvals", "review", "{}", "--delay", "3600", "--task-id", "later")
    naughty = json.dumps({"hook_event_name": NAUGHTY, "workspace_path": f"/{NAUGHTY}"})
    installation.sqlite3(f"insert into notifications (data) values ('{naughty}')")
    installation.sqlite3(HISTORY)


def write_page(installation, **env: str) -> str:
    """The address of the page, which `tasks.py page` has written."""
    done = installation.run("tasks.py", "page", env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    page = Path(done.stdout.removesuffix("\n"))
    assert page == installation.state / "page.html" and page.stat().st_mode & 0o777 == 0o600
    return page.as_uri()


@contextmanager
def chromium(directory: Path, *arguments: str):
    """A real Chromium, driven by selenium; the test is skipped where there is none."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip(
            "there is no Chromium with its driver: apt-get install chromium chromium-driver"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--window-size=1280,1180",
        "--disable-background-networking",
        f"--user-data-dir={directory / 'profile'}",
        *arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def loaded(browser, url: str) -> None:
    browser.get(url)
    wait_for(
        lambda: browser.execute_script("return document.readyState === 'complete'"),
        30,
        "a loaded page",
    )


def text(browser, css: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", css)


def tile(browser, status: str) -> int:
    return int(text(browser, f"#total-{status} b").replace(",", ""))


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def hosts_asked(browser) -> set[str]:
    """The hosts from which the page wanted something."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    return {urlsplit(url).hostname for url in urls if url.startswith("http")}
