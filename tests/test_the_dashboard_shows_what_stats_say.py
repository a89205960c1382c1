"""The dashboard in a real Chromium: it loads, its numbers are those of tasks.py stats, and the console stays silent."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import ROOT, wait_for

PAGE = "/-/dashboards/queue"
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


def uv(installation) -> tuple[list, dict]:
    """The command that runs dashboard.py as people do, and an environment that keeps uv's cache and settings."""
    cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    return ["uv", "run", "--script", ROOT / "dashboard.py"], {**os.environ, **installation.env, "UV_CACHE_DIR": cache}


def fill(installation) -> None:
    lines = "".join(json.dumps({"workspace_path": f"/home/user/docs {n}"}) + "\n" for n in range(7))
    installation.enqueue("notifications", "link_validation", "--jsonl", input=lines)
    installation.enqueue("approvals", "review", "{}", "--delay", "3600", "--task-id", "later")
    naughty = json.dumps({"hook_event_name": NAUGHTY})
    installation.sqlite3(f"insert into notifications (data) values ('{naughty}')")
    installation.sqlite3(HISTORY)


@pytest.fixture
def site(installation):
    """(the installation, the dashboard's process, its address), over some realistic tasks."""
    fill(installation)
    process = start(installation)
    yield installation, process, address(process)


def start(installation) -> subprocess.Popen:
    with open(installation.directory / "dashboard.err", "wb") as err:
        command, env = uv(installation)
        process = subprocess.Popen([*command, "--port", "0"], env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=err, text=True)  # fmt: skip
    installation.processes.append(process)
    return process


def address(process: subprocess.Popen) -> str:
    page = process.stdout.readline().strip()
    assert page.startswith("http://127.0.0.1:") and page.endswith(PAGE), page
    return page.removesuffix(PAGE)


def get_json(url: str):
    with urllib.request.urlopen(url, timeout=20) as response:
        return json.load(response)


def stats(installation) -> dict:
    done = installation.run("tasks.py", "stats", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["queues"]


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no Chromium with its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1180",
                     "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def loaded(browser, url: str) -> None:
    """Open the dashboard, and wait until every card has its number or its chart."""
    browser.get(url)
    script = """return [...document.querySelectorAll('.dashboard-card-chart')]
                .every(card => card.textContent.trim() || card.querySelector('canvas, svg'))"""
    wait_for(lambda: browser.execute_script(script), 30, "a drawn dashboard")


def card(browser, name: str) -> int:
    return int(browser.execute_script(f"return document.querySelector('#chart-{name}').textContent"))


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def hosts_asked(browser) -> set[str]:
    """Whom the pages wanted something from."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {urllib.parse.urlsplit(url).hostname for url in urls if url.startswith("http")}


def test_the_page_shows_the_numbers_of_stats_and_the_console_is_silent(site, browser):
    installation, _, base = site
    loaded(browser, base + PAGE)
    queues = stats(installation).values()
    for name in ("pending", "in_progress", "completed_day", "failed_day"):
        assert card(browser, name) == sum(queue[name] for queue in queues), name
    assert card(browser, "later") == sum(queue["scheduled"] + queue["blocked"] for queue in queues) == 1
    assert card(browser, "pending") == 8 and card(browser, "failed_day") == 40
    for name in ("throughput", "waiting_time", "failures", "now"):
        assert browser.execute_script(f"return document.querySelector('#chart-{name} svg').clientWidth") > 100, name
    assert complaints(browser) == []
    assert hosts_asked(browser) == {"127.0.0.1"}


def test_the_page_follows_the_queue(site, browser):
    installation, _, base = site
    loaded(browser, base + PAGE)
    before = card(browser, "pending")
    installation.enqueue("a_new_queue", "review")
    loaded(browser, base + PAGE)
    assert card(browser, "pending") == before + 1
    assert "a_new_queue" in {row["queue"] for row in get_json(f"{base}/tasks/overview.json?_shape=array")}


def test_an_empty_queue_is_no_error(installation, browser):
    installation.enqueue("notifications", "t", "{}", "--task-id", "x")
    installation.sqlite3("delete from notifications")
    base = address(start(installation))
    loaded(browser, base + PAGE)
    assert card(browser, "pending") == 0
    assert complaints(browser) == []


def test_a_row_leads_to_its_details_in_the_browser(site, browser):
    _, _, base = site
    from selenium.webdriver.common.by import By

    browser.get(f"{base}/tasks/dead_letters?queue=approvals")
    browser.find_element(By.LINK_TEXT, "details").click()
    assert "/tasks/task_history/" in browser.current_url
    assert "<b>no</b>" in browser.page_source.replace("&lt;", "<").replace("&gt;", ">")
    browser.find_element(By.PARTIAL_LINK_TEXT, "task-").click()
    assert "/tasks/task?task_id=task-" in browser.current_url
    browser.get(f"{base}/tasks/waiting")
    assert NAUGHTY in browser.find_element(By.TAG_NAME, "body").text
    assert complaints(browser) == []


def test_overview_says_per_type_what_stats_say(site):
    installation, _, base = site
    said = {queue: numbers["types"] for queue, numbers in stats(installation).items()}
    shown = get_json(f"{base}/tasks/overview.json?_shape=array")
    assert {(row["queue"], row["task_type"]) for row in shown} == {(queue, kind) for queue in said for kind in said[queue]}
    for row in shown:
        numbers = said[row["queue"]][row["task_type"]]
        counts = {name: value for name, value in numbers.items() if isinstance(value, int)}
        assert {name: row[name] for name in counts} == counts, row


def test_canned_queries_show_what_waits_runs_failed_and_is_slow(site):
    installation, _, base = site

    def rows(name: str) -> list[dict]:
        return get_json(f"{base}/tasks/{name}.json?_shape=array&queue=&task_id=task-10")

    installation.handler("link_validation", "#!/bin/sh\nexec sleep 60\n")
    installation.worker("notifications")
    assert wait_for(lambda: rows("running"), what="a running task")[0]["task_type"] == "link_validation"
    assert {"later"} <= {row["task_id"] for row in rows("waiting")}
    assert len(rows("dead_letters")) == 40
    assert {row["task_type"] for row in rows("slowest_types")} == {"review", "summary", "link_validation"}
    assert [row["status"] for row in rows("task")] == ["failed"]


def test_it_can_not_write_and_listens_to_this_machine_alone(site):
    installation, process, base = site
    before = installation.rows("select count(*) from task_history")
    writes = ("delete from task_history", "insert into notifications (data) values ('{}')", "pragma user_version = 9")
    for sql in writes:
        with pytest.raises(urllib.error.HTTPError):
            get_json(f"{base}/tasks.json?sql={urllib.parse.quote(sql)}")
    assert installation.rows("select count(*) from task_history") == before
    port = urllib.parse.urlsplit(base).port
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    conn.request("GET", "/tasks.json", headers={"Host": "elsewhere.example"})
    assert conn.getresponse().status == 403
    listening = subprocess.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True).stdout
    sockets = [line.split() for line in listening.splitlines()]
    where = {socket[1] for socket in sockets if socket[1].endswith(f":{port:04X}") and socket[3] == "0A"}
    if where:  # Linux
        assert where == {f"0100007F:{port:04X}"}


def test_an_open_dashboard_never_blocks_an_enqueue(site):
    installation, _, base = site
    get_json(f"{base}/tasks/overview.json?_shape=array")
    done = installation.run("enqueue.py", "notifications", "t")
    assert done.returncode == 0, done.stderr
    assert installation.sqlite3("pragma wal_checkpoint(truncate)").startswith("0|")


def test_sigterm_ends_it_with_0(site):
    _, process, base = site
    get_json(f"{base}/tasks/overview.json?_shape=array")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def refused(installation, *args) -> tuple[int, str]:
    command, env = uv(installation)
    done = subprocess.run([*command, *args], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
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
