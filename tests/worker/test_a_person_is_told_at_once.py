"""worker.py --notify tells a person what failed, is held or is done, and which queues pause and go
on: once a minute at most, with everything that came, and nobody waits for the command.
"""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, wait_for
from processes import lives

PAUSES = """#!/bin/sh
echo '{"pause": %s, "reason": "the usage limit"}'
exit 75
"""
# A worker whose minute is short.
IMPATIENT = (
    "import sys, worker; worker.notify.TELL_SECONDS = 0.5; sys.exit(worker.main(sys.argv[1:]))"
)


def teller(installation, then: str = "") -> str:
    """A program that appends its stdin and TASK_QUEUE_TEXT, as a line of JSON, to a file."""
    program = installation.directory / "tell it"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        "line = json.dumps([json.load(sys.stdin), os.environ['TASK_QUEUE_TEXT'], os.getpid()])\n"
        f"fd = os.open({str(installation.directory / 'told')!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        f"os.write(fd, line.encode() + b'\\n')\n{then}\n"
    )
    program.chmod(0o755)
    return f"'{program}'"


def told(installation) -> list[tuple[list[dict], str, int]]:
    """(events, text, process id) of each run of the command."""
    path = installation.directory / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(installation) -> list[tuple]:
    return sorted(
        (event["event"], event["queue"], event.get("task_id"))
        for run, _, _ in told(installation)
        for event in run
    )


def drain(installation, *options, **how):
    words = ("--handlers", installation.handlers, "--drain", *options)
    return installation.run("worker.py", *words, **how)


def test_all_that_came_is_told_with_its_reason_in_two_runs_at_most(installation):
    installation.handler("bad", "#!/bin/sh\necho no such file >&2\nexit 65\n")
    installation.handler("good", "#!/bin/sh\necho fine\n")
    installation.handler("stuck", PAUSES % "null")
    for task_type in ("bad", "good", "other", "stuck"):
        installation.enqueue("notifications", task_type, "--task-id", task_type)
    installation.handler("other", "#!/bin/sh\necho fine\n")
    drain(installation, "notifications", "--notify", teller(installation), "--notify-done", "good")
    expected = [
        ("done", "notifications", "good"),
        ("failed", "notifications", "bad"),
        ("paused", "notifications", None),
    ]
    wait_for(lambda: events(installation) == expected, what=str(expected))
    texts = "\n".join(text for _, text, _ in told(installation))
    assert "notifications: bad bad failed: refused by its handler (exit 65): no such file" in texts
    assert "notifications: good good done" in texts
    assert "notifications: paused: paused until a person resumes it: the usage limit" in texts
    assert len(told(installation)) <= 2


def test_a_result_that_waits_for_its_person_is_told(installation):
    installation.handler("good", "#!/bin/sh\necho fine\n")
    installation.handler(
        "chains",
        """#!/bin/sh
    echo '{"enqueue": [{"queue": "notifications", "task_type": "other", "task_id": "c", "hold": true}]}'
    """,
    )
    installation.enqueue("notifications", "good", "--task-id", "it")
    options = ("--notify", teller(installation), "--notify-done", "good")
    drain(installation, "notifications", "--then", "results", "--then-hold", *options)
    [[held]] = [installation.rows("select task_id from results")]
    expected = [("done", "notifications", "it"), ("held", "results", held[0])]
    wait_for(lambda: events(installation) == expected, what=str(expected))
    text = told(installation)[0][1]
    assert "notifications: good it done: fine" in text
    assert f"results: good {held[0]} held: the result of it" in text
    installation.enqueue("notifications", "chains", "--task-id", "chains")
    drain(installation, "notifications", "--chain", *options)
    expected.append(("held", "notifications", "c"))
    wait_for(lambda: sorted(events(installation)) == sorted(expected), what=str(expected))


def test_a_queue_that_goes_on_is_told_before_the_worker_leaves(installation):
    installation.handler("stuck", PAUSES % "0.3")
    installation.enqueue("notifications", "stuck")
    options = ("--grace", 0, "--notify", teller(installation))
    worker = installation.worker("notifications", *options)
    runs = lambda: installation.rows("select count(*) from notifications where status = 2")  # noqa: E731
    wait_for(lambda: ("paused", "notifications", None) in events(installation), what="the pause")
    installation.handler("stuck", "#!/bin/sh\nexec sleep 60\n")
    wait_for(lambda: runs() == [(1,)], what="the next run")
    worker.terminate()
    worker.wait(20)
    wait_for(lambda: ("resumed", "notifications", None) in events(installation), what="the end")


def test_a_pause_that_was_there_before_the_worker_is_not_told(installation):
    installation.run("tasks.py", "pause", "notifications")
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    installation.enqueue("approvals", "bad", "--task-id", "bad")
    drain(installation, "notifications", "approvals", "--notify", teller(installation))
    wait_for(lambda: told(installation), what="the failure")
    assert events(installation) == [("failed", "approvals", "bad")]


def test_a_command_that_hangs_is_ended_and_keeps_no_task_waiting(installation):
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    command = teller(installation, then="time.sleep(600)")
    log = installation.directory / "worker.log"
    words = ("notifications", "--handlers", str(installation.handlers), "--notify", command)
    with open(log, "wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-c", IMPATIENT, *words],
            env=installation.env | {"PYTHONPATH": str(ROOT)},
            stderr=file,
        )
    worker.log = log
    installation.processes.append(worker)
    installation.finished(installation.enqueue("notifications", "bad"))
    wait_for(lambda: told(installation), what="the first run of the command")
    installation.finished(installation.enqueue("notifications", "bad"))
    wait_for(lambda: told(installation)[1:], what="the second run")
    first, second = (pid for _, _, pid in told(installation))
    wait_for(lambda: not lives(first), what="the end of the first")
    worker.terminate()
    assert worker.wait(10) == 0
    assert "--notify still runs after 0.5 s: it is ended" in log.read_text()
    assert lives(second)
    os.kill(second, 9)


def test_the_environment_file_names_the_command_for_workers_of_hooks(installation):
    installation.handler("bad", "#!/bin/sh\nexit 65\n")
    installation.handler("good", "#!/bin/sh\n")
    file = installation.directory / "environment"
    file.write_text(
        f"TASK_QUEUE_NOTIFY={teller(installation)} now\nTASK_QUEUE_NOTIFY_DONE=good, other\n"
    )
    file.chmod(0o600)
    for task_type in ("bad", "good"):
        installation.enqueue("notifications", task_type, "--task-id", task_type)
    drain(installation, "notifications", "--environment", file)
    expected = [("done", "notifications", "good"), ("failed", "notifications", "bad")]
    wait_for(lambda: events(installation) == expected, what=str(expected))


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_command_that_is_not_there_is_said(installation, how):
    """One that a person gives now is refused; that of the environment keeps no task waiting."""
    installation.handler("good", "#!/bin/sh\n")
    task = installation.enqueue("notifications", "good")
    if how == "option":
        done = drain(installation, "notifications", "--notify", "/nowhere/tell")
        assert (done.returncode, done.stderr.count("\n")) == (64, 1)
    else:
        env = {"TASK_QUEUE_NOTIFY": "/nowhere/tell"}
        done = drain(installation, "notifications", env=env)
        assert installation.history(task)["status"] == "completed"
    assert "/nowhere/tell: there is no such program" in done.stderr


# ------------------------------------------------------------------------------- handlers/notify.sh


@pytest.fixture
def ntfy():
    """A server that takes messages as ntfy does: (its URL, [(path, headers, body)])."""
    messages = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            messages.append((self.path, self.headers, body))
            self.send_response(200 if self.path == "/topic" else 403)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", messages
    server.shutdown()
    server.server_close()


def test_notify_sh_tells_a_desktop_and_a_phone(installation, ntfy, tmp_path):
    """The text is data: no character of it is an option, a file name or a command."""
    url, messages = ntfy
    shown = tmp_path / "shown"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/notify-send"
    program.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >"{shown}"\n')
    program.chmod(0o755)
    installation.handler("bad", "#!/bin/sh\necho '@/etc/passwd $(id) -t' >&2\nexit 65\n")
    installation.enqueue("notifications", "bad", "--task-id", "x")
    path = {"PATH": f"{tmp_path / 'bin'}:{installation.env['PATH']}"}
    drain(
        installation,
        *("notifications", "--notify", str(ROOT / "handlers/notify.sh")),
        env=path | {"NTFY_TOPIC": "topic", "NTFY_SERVER": url},
    )
    text = "notifications: bad x failed: refused by its handler (exit 65): @/etc/passwd $(id) -t"
    [(_, headers, body)] = wait_for(lambda: messages, what="the message")
    assert (body, headers["title"]) == (text, "Task queue")
    wait_for(lambda: shown.exists() and shown.read_text(), what="the notification")
    assert shown.read_text() == f"--|Task queue|{text}|"


@pytest.mark.parametrize(("topic", "code"), [("topic", 0), ("other", 1)])
def test_tq_notify_tests_the_command(installation, ntfy, tmp_path, topic, code):
    url, messages = ntfy
    env = {
        "NTFY_TOPIC": topic,
        "NTFY_SERVER": url,
        "TASK_QUEUE_NOTIFY": str(ROOT / "handlers/notify.sh"),
    }
    done = installation.run("tasks.py", "notify", "--test", env=env)
    assert done.returncode == code, done.stderr
    assert f"notify.sh: exit {code}, after" in done.stdout
    assert messages[0][2] == "notifications: example example failed: this is a test"
    assert installation.run("tasks.py", "notify", env=env).stdout == f"{env['TASK_QUEUE_NOTIFY']}\n"


def test_without_a_command_tq_notify_says_where_to_set_one(installation):
    done = installation.run("tasks.py", "notify", "--test")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "write TASK_QUEUE_NOTIFY=COMMAND into" in done.stderr
