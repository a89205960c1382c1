"""No web page reads the queue, nor another user; and no request costs much time or memory."""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import threading
import urllib.error
from urllib.parse import quote, urlsplit

import pytest
from conftest import wait_for
from pages import address, chromium, fill, get, start, start_with

SECRET = "a-word-that-nobody-guesses"

# A line for each request: its method, what the browser says of it, its path, the answer's status.
LOG = """
def log_request(self, code, size=None):
    said = [self.headers.get(f"Sec-Fetch-{name}") for name in ("Site", "Dest")]
    words = [self.command, *said, self.path, int(code)]
    # In one piece: several requests are answered at a time.
    sys.stderr.write(" ".join(map(str, words)) + "\\n")
dashboard.Request.log_request = log_request
"""


@pytest.fixture
def site(installation):
    """(the installation, its dashboard, the front page's address), over a secret."""
    fill(installation)
    installation.enqueue("notifications", SECRET, json.dumps({"key": SECRET}))
    process = start_with(installation, LOG)
    yield installation, process, address(process)


def raw(base: str, *lines: str) -> str:
    """What is answered to these lines, as they stand."""
    with socket.create_connection(("127.0.0.1", urlsplit(base).port), timeout=20) as conn:
        conn.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        answer = b""
        while block := conn.recv(65_536):
            answer += block
    return answer.decode()


def test_a_request_needs_the_right_host_the_key_and_no_foreign_origin(site):
    _, _, base = site
    host, path = urlsplit(base).netloc, urlsplit(base).path
    good = (f"GET {path} HTTP/1.1", f"Host: {host}")
    own = (
        "Sec-Fetch-Site: none",
        "Sec-Fetch-Site: same-origin",
        f"Origin: http://{host}",
        "Sec-Fetch-Dest: document",
    )
    for accepted in (
        good,
        *((*good, line) for line in own),
        (good[0], f"Host: {host.replace('127.0.0.1', 'localhost')}"),
    ):
        answer = raw(base, *accepted)
        assert answer.startswith("HTTP/1.0 200") and SECRET in answer, accepted
    port = urlsplit(base).port
    refused = [
        (good[0],),
        (f"GET {path}",),
        (*good, "Host: elsewhere.example"),
        *((good[0], f"Host: {name}") for name in ("", "elsewhere.example", f"elsewhere.example:{port}", "127.0.0.1",
                                                  "localhost:1", f"127.0.0.1:{port}.example", f"[::1]:{port}")),
        *((*good, f"Origin: {origin}") for origin in ("null", "", "http://127.0.0.1:1", f"https://{host}", "http://elsewhere.example",
                                                      f"http://{host}.example")),
        *((*good, f"Sec-Fetch-Site: {site}") for site in ("cross-site", "same-site", "", "what comes next")),
        *((*good, f"Sec-Fetch-Dest: {dest}") for dest in ("iframe", "script", "image", "empty", "embed", "object")),
        *((f"GET {other} HTTP/1.1", good[1]) for other in ("/", "//", "/tasks", f"{path[:-2]}/", f"{path[:-1]}x/", f"/x{path}",
                                                           path.lower(), path.swapcase(), f"http://{host}{path}", "*")),
    ]  # fmt: skip
    for lines in refused:
        answer = raw(base, *lines)
        assert " 403 " in answer.split("\n")[0] or answer.startswith("refused"), lines
        assert SECRET not in answer and path not in answer, lines


def test_what_is_no_page_is_refused_in_a_line(site):
    _, _, base = site
    pages = ("tasks.json", "tasks?status=x'--", "tasks?status=pending&queue=sqlite_master", "tasks?queue=a%22b", "task/notifications/x",
             "task/task_history/1", "task/nowhere/1", "task/notifications/99999999999999999999", "finished/-1", "finished/999999",
             "finished/%31", "../", "notifications", "-/", "tasks?" + "&".join(f"a{n}=1" for n in range(30)))  # fmt: skip
    for page in pages:
        with pytest.raises(urllib.error.HTTPError) as error:
            get(base + page)
        said = error.value.read().decode()
        assert error.value.code in (400, 404) and said.count("\n") == 1, page


def test_there_is_no_method_but_get_and_nothing_for_other_origins(site):
    _, _, base = site
    host, path = urlsplit(base).netloc, urlsplit(base).path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"):
        answer = raw(
            base,
            f"{method} {path} HTTP/1.1",
            f"Host: {host}",
            "Access-Control-Request-Method: GET",
            "Content-Length: 0",
        )
        assert (
            " 501 " in answer.split("\n")[0]
            and "access-control" not in answer.lower()
            and SECRET not in answer
        ), method
    head = raw(base, f"HEAD {path} HTTP/1.1", f"Host: {host}")
    assert " 200 " in head.split("\n")[0] and SECRET not in head
    assert "access-control" not in head.lower() and "set-cookie" not in head.lower()
    for line in (
        "cache-control: no-store",
        "cross-origin-resource-policy: same-origin",
        "x-frame-options: deny",
        "referrer-policy: no-referrer",
        "x-content-type-options: nosniff",
        "content-security-policy: default-src 'none'",
    ):
        assert line in head.lower(), line


def test_nobody_s_sql_is_run(site):
    _, _, base = site
    before = len(get(base))
    for name in ("sql", "_where", "_search", "status", "queue", "data__startswith", "_extra"):
        for page in ("", "tasks", "finished/10", "task/notifications/1"):
            try:
                answer = get(f"{base}{page}?{name}={quote('select hex(7153) union select 1')}")
            except urllib.error.HTTPError as error:
                answer = error.read().decode()
            # What SQLite would have made of it.
            assert "37313533" not in answer
    assert abs(len(get(base)) - before) < 200


def test_the_key_is_new_at_each_start_and_written_nowhere(site):
    installation, _, base = site
    key = urlsplit(base).path.strip("/")
    assert len(key) >= 22
    assert urlsplit(address(start(installation))).path.strip("/") != key
    get(base)
    for file in installation.state.rglob("*"):
        assert (
            not file.is_file()
            or file.name.startswith("tasks.db")
            or key not in file.read_text(errors="replace")
        ), file
    listed = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True).stdout
    assert "dashboard" in listed and key not in listed


ATTACK = """
const wait = (element, where) => new Promise(done => {
  element.onload = () => done('loaded'); element.onerror = () => done('error');
  (where || document.body).append(element); setTimeout(() => done('no answer'), 4000) });
const made = (tag, values) => Object.assign(document.createElement(tag), values);
const target = TARGET, seen = {}, settled = promise => promise.then(x => x, error => 'refused: ' + error.name);
seen.fetch = await settled(fetch(target).then(r => r.text()));
seen.credentials = await settled(fetch(target, {credentials: 'include', cache: 'force-cache'}).then(r => r.text()));
seen.no_cors = await settled(fetch(target, {mode: 'no-cors'}).then(r => r.text()));
seen.head = await settled(fetch(target, {mode: 'no-cors', method: 'HEAD'}).then(r => r.text()));
seen.post = await settled(fetch(target, {mode: 'no-cors', method: 'POST', body: 'a=1'}).then(r => r.text()));
seen.script = await wait(made('script', {src: target}));
seen.style = await wait(made('link', {rel: 'stylesheet', href: target}));
seen.image = await wait(made('img', {src: target}));
seen.video = await Promise.race([wait(made('video', {src: target}))]);
const frame = made('iframe', {src: target});
await wait(frame);
try { seen.frame = frame.contentDocument ? frame.contentDocument.body.innerText : 'closed' } catch (e) { seen.frame = 'refused' }
seen.object = await wait(made('object', {data: target, type: 'text/html'}));
seen.embed = await wait(made('embed', {src: target}));
const inner = made('iframe', {name: 'inner'}), form = made('form', {action: target, target: 'inner', method: 'get'});
document.body.append(inner, form); form.submit(); await wait(made('link', {rel: 'prefetch', href: target}));
const post = made('form', {action: target, target: 'inner', method: 'post'}); document.body.append(post); post.submit();
seen.worker = await new Promise(done => { try {
  const w = new Worker(URL.createObjectURL(new Blob([`fetch('${target}', {mode: 'no-cors'}).then(r => r.text()).then(postMessage, e => postMessage('refused'))`])));
  w.onmessage = e => done(e.data); w.onerror = () => done('error') } catch (e) { done('refused') } });
seen.events = await new Promise(done => { const s = new EventSource(target); s.onerror = () => done('error'); s.onmessage = e => done(e.data) });
seen.socket = await new Promise(done => { const s = new WebSocket(target.replace('http', 'ws')); s.onerror = () => done('error'); s.onopen = () => done('open') });
document.title = JSON.stringify(seen);
"""


@pytest.fixture
def attacker():
    """Serves any page that a test puts into .page, on a port of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = server.page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.page = ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser(tmp_path):
    """A Chromium in which a web site's name means this machine, as an attacker's can."""
    with chromium(tmp_path, "--host-resolver-rules=MAP *.example 127.0.0.1") as driver:
        driver.set_script_timeout(60)
        yield driver


def requests(installation) -> list[list[str]]:
    """[method, Sec-Fetch-Site, Sec-Fetch-Dest, path, status] of each request so far."""
    return [
        line.split(" ")
        for line in (installation.directory / "dashboard.err").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    "origin", ("http://127.0.0.1:{}/", "http://localhost:{}/", "http://elsewhere.example:{}/")
)
def test_a_page_of_another_origin_gets_nothing_even_if_it_knows_the_address(
    site, attacker, browser, origin
):
    installation, _, base = site
    attacker.page = f"<!doctype html><body><script type=module>{ATTACK.replace('TARGET', json.dumps(base))}</script>"
    browser.get(origin.format(attacker.server_port))
    seen = json.loads(
        wait_for(
            lambda: browser.title.startswith("{") and browser.title, 60, "the end of the attack"
        )
    )
    for how, what in seen.items():
        assert SECRET not in what, how
    for how in ("fetch", "credentials", "no_cors", "script", "style", "image", "events", "socket"):
        assert "refused" in seen[how] or seen[how] in ("error", ""), (how, seen[how])
    asked = requests(installation)
    assert {"empty", "script", "style", "image", "iframe"} <= {dest for _, _, dest, *_ in asked}
    assert len(asked) >= 12
    for method, place, _, _, status in asked:
        assert status == ("403" if method in ("GET", "HEAD") else "501") and place in (
            "same-site",
            "cross-site",
            "None",
        ), asked
    # The address is right: whoever opens it himself sees the secret.
    browser.get(base)
    assert SECRET in browser.page_source and requests(installation)[-1][-1] == "200"


@pytest.mark.parametrize("name", ("127.0.0.1", "elsewhere.example"))
def test_a_link_or_a_window_of_another_page_opens_nothing(site, attacker, browser, name):
    installation, _, base = site
    attacker.page = f"<!doctype html><body><a href={base}>x</a><button onclick=\"w = window.open('{base}')\">y</button>"
    here = f"http://{name}:{attacker.server_port}/"
    browser.get(here)
    browser.find_element("css selector", "a").click()
    wait_for(lambda: "another web page asked" in browser.page_source, what="the refusal")
    browser.get(here)
    first = browser.current_window_handle
    browser.find_element("css selector", "button").click()
    wait_for(lambda: len(browser.window_handles) == 2, what="the other window")
    wait_for(lambda: len(requests(installation)) >= 2, what="its request")
    browser.switch_to.window(browser.window_handles[-1])
    wait_for(
        lambda: "another web page asked" in browser.page_source,
        what="the refusal in the other window",
    )
    browser.switch_to.window(first)
    assert (
        browser.execute_script(
            "try { return w.document.body.innerText } catch (e) { return e.name }"
        )
        == "SecurityError"
    )
    assert {row[-1] for row in requests(installation)} == {"403"}
    # Pasting the address there opens it.
    browser.get(base)
    assert SECRET in browser.page_source


def test_a_name_that_means_this_machine_is_not_this_machine(site, browser):
    """DNS rebinding: to the browser it is all one origin, so only Host tells."""
    installation, _, base = site
    browser.get(base.replace("127.0.0.1", "elsewhere.example"))
    assert SECRET not in browser.page_source and "127.0.0.1 or localhost" in browser.page_source
    seen = browser.execute_async_script(
        "fetch(location.href).then(r => r.text()).then(arguments[0], arguments[0])"
    )
    assert SECRET not in seen
    assert {row[-1] for row in requests(installation)} == {"403"}


def test_a_page_of_its_own_leads_to_the_others(site, browser):
    """What is refused to others is not refused to the page itself: links and reloads."""
    installation, _, base = site
    browser.get(base)
    browser.find_element("css selector", "#total-failed").click()
    wait_for(lambda: "status=failed" in browser.current_url, what="the list")
    browser.find_element("css selector", "tbody a").click()
    wait_for(lambda: "/finished/" in browser.current_url, what="the task")
    browser.refresh()
    browser.back()
    wait_for(lambda: "status=failed" in browser.current_url, what="the list")
    assert {row[-1] for row in requests(installation)} == {"200"}


# -------------------------------------------------------------------------- what a request may cost


def test_what_takes_too_long_is_left_out_and_said(installation):
    installation.enqueue("notifications", "t")
    installation.sqlite3("""
        with recursive n (n) as (select 1 union all select n + 1 from n where n < 30000)
        insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, started_at, error)
        select 'notifications', n + 100, 'id-' || n, 't', 'failed', '{}', datetime('now'), datetime('now'), 'a reason' from n""")
    # No time at all: whatever takes SQLite more than some thousand steps is ended.
    base = address(start_with(installation, "dashboard.PAGE_SECONDS = 0"))
    shown = get(base)
    assert "This took longer than" in shown and "tasks.py stats" in shown
    # What a person needs most is there.
    assert "a reason" in shown
    assert "This took longer than" not in get(address(start(installation)))


def test_a_list_that_takes_too_long_is_an_error_in_a_line(installation):
    installation.enqueue("notifications", "t")
    installation.sqlite3("""
        with recursive n (n) as (select 1 union all select n + 1 from n where n < 30000)
        insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at)
        select 'notifications', n + 100, 'id-' || n, 't', 'completed', '{}', datetime('now') from n""")
    base = address(start_with(installation, "dashboard.PAGE_SECONDS = 0"))
    with pytest.raises(urllib.error.HTTPError) as error:
        get(f"{base}tasks?status=cancelled")
    assert error.value.code == 503 and b"was not read within 0 seconds" in error.value.read()


def test_rows_and_answers_are_bounded(installation):
    lines = "".join(json.dumps({"n": n}) + "\n" for n in range(500))
    installation.enqueue("notifications", "t", "--jsonl", input=lines)
    installation.sqlite3(
        "insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, result, log, error) "
        "select 'notifications', 9999, 'long', 't', 'failed', json_object('a', hex(zeroblob(4000000))), datetime('now'), "
        "hex(zeroblob(4000000)), hex(zeroblob(4000000)), hex(zeroblob(4000000))"
    )
    base = address(start(installation))
    listed = get(f"{base}tasks?status=pending")
    assert listed.count("<tr>") == 1 + 200 and "These are the first 200" in listed
    for page in ("", "tasks?status=failed", "finished/1"):
        assert len(get(base + page)) < 1_000_000, page
    assert "more characters" in get(f"{base}finished/1")


def test_a_task_that_is_too_large_for_memory_hides_no_other(installation):
    huge = "json_object('hook_event_name', 'huge', 'a', hex(zeroblob(40000000)))"
    installation.enqueue("notifications", "small", "{}", "--task-id", "before")
    installation.sqlite3(f"insert into notifications (data) values ({huge})")
    installation.sqlite3(
        f"insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at) values "
        f"('approvals', 9, 'x', 'huge', 'failed', {huge}, datetime('now'))"
    )
    installation.enqueue("notifications", "small", "{}", "--task-id", "after")
    process = start(installation)
    base = address(process)
    listed = get(f"{base}tasks?status=pending")
    assert listed.count(">small<") == 2 and "too large for a page" in listed
    assert get(base).count("huge") >= 1
    for page in ("finished/1", "task/notifications/2"):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(base + page)
        assert error.value.code == 503 and b"tasks.py show" in error.value.read()


def test_silent_connections_take_no_more_than_their_share(installation):
    installation.enqueue("notifications", "t")
    process = start_with(installation, "dashboard.Request.timeout = 1")
    base = address(process)
    held = [
        socket.create_connection(("127.0.0.1", urlsplit(base).port), timeout=20) for _ in range(100)
    ]
    # More than there are places for are closed at once, and the others when they have said nothing
    # for a while.
    for conn in held:
        assert conn.recv(1) == b""
        conn.close()
    assert "notifications" in get(base)


def test_the_printed_address_is_one_line_that_a_terminal_makes_a_link_of(installation):
    installation.enqueue("notifications", "t")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[A-Za-z0-9_-]+/", address(start(installation)))


def test_what_no_script_of_ours_would_store_stops_no_page(installation):
    """Any program may write to the tables; one odd row does not hide the others."""
    installation.enqueue("notifications", "sound", "{}", "--task-id", "sound")
    odd = ("9e999", "-9e999", "1e300", "'next week'", "x'ff00'", "''", "-1")
    for value in odd:
        for status in range(-1, 6):
            installation.sqlite3(
                "pragma ignore_check_constraints = 1; insert into notifications "
                "(data, status, timestamp, due_at, claimed_at, priority, attempts, error, owner) values "
                f"('{{\"n\": 1}}', {status}, {value}, {value}, {value}, {value}, {value}, {value}, {value})"
            )
        for status in ("completed", "failed"):
            installation.sqlite3(
                "insert into task_history (queue, row_id, task_id, task_type, status, data, attempts, "
                "enqueued_at, started_at, completed_at, exit_code, result, log, error) select "
                f"v, 1, v, v, '{status}', v, v, v, v, w, v, v, v, v from (select {value} as v), "
                f"(select {value} as w union all select strftime('%Y-%m-%d %H:%M:%f', 'now'))"
            )
    base = address(start(installation))
    pages = [
        "",
        *(f"tasks?status={status}" for status in ("in_progress", "pending", "scheduled", "held")),
    ]
    pages += ["tasks?status=blocked", "tasks?status=failed", "tasks?status=completed"]
    links = {
        link
        for page in pages
        for link in re.findall(r'href="((?:task|finished)/[^"]+)"', get(base + page))
    }
    assert len(links) > 50
    for page in links:
        get(base + page)
    assert "sound" in get(base) and "sound" in get(f"{base}tasks?status=pending")
    assert (installation.directory / "dashboard.err").read_text() == ""
