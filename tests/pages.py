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
        how = "apt-get install chromium chromium-driver"
        pytest.skip(f"there is no Chromium with its driver: {how}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    words = "headless=new no-sandbox window-size=1280,1180 disable-background-networking".split()
    for argument in (*words, f"user-data-dir={directory / 'profile'}", *arguments):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture(scope="module")
def chromium_of_all(tmp_path_factory):
    """One Chromium for all tests of a file: its start takes longer than what they do with it."""
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def browser(chromium_of_all):
    """The Chromium as it was at its start."""
    chromium_of_all.get("about:blank")
    for command in ("clearDeviceMetricsOverride", "setEmulatedMedia"):
        chromium_of_all.execute_cdp_cmd(f"Emulation.{command}", {})
    for log in ("browser", "performance"):
        chromium_of_all.get_log(log)
    return chromium_of_all


def look(browser, width: int = 1180, scheme: str = "light") -> None:
    """Have the browser show pages as wide as this, for somebody who prefers these colours."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def open_page(browser, installation, **env: str) -> None:
    """Write the page, and open it."""
    loaded(browser, write_page(installation, **env))


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
