import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_scripts, wait_for
from processes import lines, lives, stays_true

# `uv run … --script`, but of this Python.
UV = f'''#!/bin/sh
echo "$@" >>"$HOME/uv.log"
until [ "$1" = --script ]; do shift; done
shift
exec "{sys.executable}" "$@"
'''


@pytest.fixture
def installed(installation):
    """The scripts where install.py puts them, beside this installation's handlers; detached workers
    end with the test.
    """
    lib = installation.directory / "runtime" / "lib"
    copy_scripts(lib, "enqueue.py", "worker.py")
    uv = installation.directory / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(UV)
    uv.chmod(0o755)
    installation.lib, installation.uv = lib, uv
    states = [installation.state]
    installation.states = states
    yield installation
    for state in states:
        for pid in workers(state):
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def log(state: Path) -> str:
    path = state / "logs" / "worker.notifications.log"
    return path.read_text() if path.exists() else ""


def workers(state: Path) -> list[int]:
    """Of the detached workers of a state directory, those that came to serve: their pids."""
    return [int(pid) for pid in re.findall(r"worker (\d+)-\w+ serves", log(state))]


def start_worker(installed, *args, **options) -> subprocess.CompletedProcess:
    return installed.run(
        str(installed.lib / "enqueue.py"), "notifications", *args, "--start-worker", **options
    )


def test_the_second_leaves_and_says_so(installation):
    first = installation.worker("notifications", "--single")
    second = installation.worker("notifications", "--single", ready=False)
    assert second.wait(10) == 0 and "another worker serves notifications" in second.log.read_text()
    # A worker of another queue does not matter.
    installation.worker("completions", "--single")
    assert first.poll() is None


def test_the_kernel_decides_among_many(installation):
    started = [installation.worker("notifications", "--single", ready=False) for _ in range(6)]
    wait_for(lambda: sum(worker.poll() == 0 for worker in started) == 5)
    (winner,) = [worker for worker in started if worker.poll() is None]
    assert stays_true(lambda: winner.poll() is None, 0.3)
    winner.kill()
    winner.wait()
    # The kernel has dropped the lock of the process that was killed.
    successor = installation.worker("notifications", "--single")
    assert "serves" in successor.log.read_text() and successor.poll() is None


def test_one_for_several_queues_leaves_those_that_another_serves_to_that_one(installation):
    """A hook's worker stays while anything is scheduled: the others' tasks cannot wait for that."""
    installation.handler("quick", "#!/bin/sh\n")
    another = installation.worker("completions", "--single")
    one = installation.worker("completions", "notifications", "--single")
    assert "serves notifications\n" in one.log.read_text()
    assert installation.ends_well("notifications", "quick")
    another.send_signal(signal.SIGSTOP)
    task = installation.enqueue("completions", "quick")
    waits = [(task, 1)]
    ready = "select task_id, status from completions"
    assert stays_true(lambda: installation.rows(ready) == waits, 0.3)
    another.kill()
    assert installation.finished(task)["status"] == "completed" and one.poll() is None


def test_one_without_a_free_place_takes_no_other_queue(installation, queue):
    """A hook that finds no worker starts one, and its task need not wait."""
    import worker

    another = installation.worker("completions", "--single")
    one = worker.Worker(
        worker.parse(["notifications", "completions", "--single", "--concurrency", "1"])
    )
    try:
        assert one.serve() and one.own() == ["notifications"]
        another.kill()
        another.wait()
        one.runs["its only place"] = None
        assert one.serve() and one.own() == ["notifications"]
        one.runs.clear()
        assert one.serve() and one.own() == ["notifications", "completions"]
    finally:
        one.serving.release()


def test_single_leaves_where_an_ordinary_worker_serves(installation):
    installation.worker("notifications")
    assert installation.worker("notifications", "--single", ready=False).wait(10) == 0


def test_an_idle_one_leaves(installation):
    began = time.monotonic()
    worker = installation.worker("notifications", "--single", "--idle-exit", 0.5)
    assert worker.wait(10) == 0 and 0.5 < time.monotonic() - began < 4
    assert "leaving" in worker.log.read_text()


def test_one_that_has_something_to_wait_for_does_not_leave(installation):
    installation.handler("quick", "#!/bin/sh\n")
    later = installation.enqueue("notifications", "quick", "--delay", 1.5)
    worker = installation.worker("notifications", "--idle-exit", 0.3)
    assert installation.finished(later)["status"] == "completed" and worker.wait(10) == 0


def test_one_that_works_does_not_leave(installation):
    installation.handler("long", "#!/bin/sh\nsleep 1.5\n")
    task = installation.enqueue("notifications", "long")
    worker = installation.worker("notifications", "--idle-exit", 0.3)
    assert worker.wait(10) == 0 and installation.history(task)["status"] == "completed"


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_what_comes_in_while_it_lets_go_keeps_it(installation, queue, delay):
    """Whoever enqueues then finds the lock held, and starts no other."""
    import worker

    one = worker.Worker(worker.parse(["notifications", "--single", "--idle-exit", "0.01"]))
    queue.ensure_queue(queue.connect(), "notifications")
    assert one.serve()
    one.idle_since -= 1
    release = one.serving.release

    def late():
        queue.enqueue_task("notifications", "any", {}, delay=delay)
        assert (
            queue.lock_file(installation.state / "workers" / "serving.notifications", probe=True)
            is None
        )
        release()

    one.serving.release = late
    try:
        assert one.may_leave() is False
    finally:
        release()


def test_one_that_let_go_leaves_the_queue_to_whoever_was_started_meanwhile(installation, queue):
    import worker

    one = worker.Worker(worker.parse(["notifications", "--single", "--idle-exit", "0.01"]))
    queue.ensure_queue(queue.connect(), "notifications")
    assert one.serve()
    one.idle_since -= 1
    release = one.serving.release

    def late():
        release()
        queue.enqueue_task("notifications", "any", {})
        assert installation.worker("notifications", "--single").poll() is None

    one.serving.release = late
    assert one.may_leave() is True, "two work, and one of them holds no lock"


def test_no_task_is_stranded_at_the_moment_of_leaving(installation, queue):
    installation.handler("quick", "#!/bin/sh\n")
    dice, lock = random.Random(7), installation.state / "workers" / "serving.notifications"
    options = ("notifications", "--single", "--idle-exit", 0.1)
    kept, pause = 0, 0.07
    for _ in range(20):
        worker = installation.worker(*options)
        # The moment itself is what is tried here, not a condition.
        time.sleep(max(0.0, pause + dice.uniform(-0.01, 0.01)))
        task = queue.enqueue_task("notifications", "quick", {})
        # This is what enqueue.py does next.
        fd = queue.lock_file(lock, probe=True)
        if fd is None:
            # The next try is nearer to the moment.
            kept, pause = kept + 1, pause + 0.01
        else:
            os.close(fd)
            pause -= 0.01
            installation.worker(*options, ready=False)
        installation.finished(task, 10)
        worker.wait(10)
    assert 0 < kept < 20, "the tasks did not come at the moment of leaving"


def test_ten_hooks_at_once_start_one(installed):
    installed.handler("quick", "#!/bin/sh\n")
    command = [
        sys.executable,
        installed.lib / "enqueue.py",
        "notifications",
        "quick",
        "--start-worker",
    ]
    hooks = [
        subprocess.Popen(
            command, env=installed.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        for _ in range(10)
    ]
    assert all(hook.communicate(timeout=30) and hook.returncode == 0 for hook in hooks)
    wait_for(
        lambda: (
            installed.rows("select count(*) from task_history where status = 'completed'")
            == [(10,)]
        )
    )
    started = len((installed.directory / "uv.log").read_text().splitlines())
    wait_for(
        lambda: log(installed.state).count("another worker serves") == started - 1,
        what="the losers' leave",
    )
    assert len(workers(installed.state)) == 1


def test_a_hook_returns_at_once_and_its_streams_are_free(installed):
    installed.handler("long", '#!/bin/sh\necho $$ >>"$HOME/runs"\nsleep 100\n')
    began = time.monotonic()
    # This waits for the end of its stdout and stderr.
    done = start_worker(installed, "long", timeout=10)
    assert done.returncode == 0 and done.stdout.startswith("queued") and done.stderr == ""
    assert time.monotonic() - began < 3
    (group,) = wait_for(lambda: lines(installed.directory / "runs"))
    (pid,) = workers(installed.state)
    assert lives(pid) and os.getsid(pid) == pid
    if os.path.exists("/proc/self/fd"):
        streams = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        assert (
            streams
            == ["/dev/null"] + [str(installed.state / "logs" / "worker.notifications.log")] * 2
        )
    os.killpg(int(group), signal.SIGKILL)


def test_a_second_hook_finds_it_and_starts_none(installed):
    installed.handler("quick", "#!/bin/sh\n")
    start_worker(installed, "quick")
    wait_for(lambda: workers(installed.state), what="a worker")
    done = start_worker(installed, "quick")
    installed.finished(done.stdout.split()[1])
    assert len(lines(installed.directory / "uv.log")) == 1 and len(workers(installed.state)) == 1


def test_a_new_one_is_started_after_the_last_was_killed(installed):
    installed.handler("quick", "#!/bin/sh\n")
    start_worker(installed, "quick")
    (pid,) = wait_for(lambda: workers(installed.state), what="a worker")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not lives(pid))
    installed.finished(start_worker(installed, "quick").stdout.split()[1])


def test_a_bare_environment_is_enough(installed):
    """What a hook may get: HOME, and a PATH that has no uv."""
    home = installed.directory
    installed.states.append(state := home / ".claude" / "automation" / "lychee" / "state")
    installed.handler("quick", '#!/bin/sh\ntouch "$HOME/ran"\n')
    hook = [
        sys.executable,
        installed.lib / "enqueue.py",
        "--hook",
        "notifications",
        "quick",
        "--start-worker",
    ]
    payload = json.dumps({"hook_event_name": "Stop", "cwd": str(home)}).encode()
    done = subprocess.run(
        ["/usr/bin/env", "-i", f"HOME={home}", "PATH=/usr/bin:/bin", *hook],
        input=payload,
        capture_output=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    wait_for((home / "ran").exists, what="the task's run")
    assert "worker.py notifications --environment" in (home / "uv.log").read_text()
    assert len(workers(state)) == 1


def test_without_uv_the_same_python_runs_the_worker(installed):
    if any(
        os.path.exists(f"{place}/uv")
        for place in ("/usr/bin", "/bin", "/usr/local/bin", "/opt/homebrew/bin")
    ):
        pytest.skip("uv is in a directory that enqueue.py looks into on any machine")
    installed.uv.unlink()
    home = installed.directory
    installed.states.append(home / ".claude" / "automation" / "lychee" / "state")
    installed.handler("quick", '#!/bin/sh\ntouch "$HOME/ran"\n')
    subprocess.run(["/usr/bin/env", "-i", f"HOME={home}", "PATH=/usr/bin:/bin", sys.executable, installed.lib / "enqueue.py",
                    "notifications", "quick", "--start-worker"], check=True, capture_output=True, timeout=20)  # fmt: skip
    wait_for((home / "ran").exists, what="the task's run")


def test_a_worker_that_cannot_be_started_costs_no_task(installed):
    # An executable of a format that the kernel does not know.
    installed.uv.write_bytes(b"\x7fELF")
    (installed.directory / "installed.json").write_text(json.dumps({"python": str(installed.uv)}))
    done = start_worker(installed, "quick")
    assert done.returncode == 0 and done.stdout.startswith("queued")
    assert done.stderr.count("\n") == 1 and "no worker could be started" in done.stderr
    assert installed.rows("select task_type from notifications") == [("quick",)]


def test_the_session_does_not_choose_uv(installed, tmp_path):
    """Not by UV, not by a relative entry of PATH, not by what lies in its directory."""
    installed.handler("quick", "#!/bin/sh\nenv\n")
    workspace = tmp_path / "workspace"
    (workspace / ".venv/bin").mkdir(parents=True)
    for place in ("uv", "python3", ".venv/bin/python", ".venv/bin/python3"):
        (workspace / place).write_text(f"#!/bin/sh\ntouch '{tmp_path}/hijacked'\n")
        (workspace / place).chmod(0o755)
    (workspace / ".venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    env = {
        "UV": str(workspace / "uv"),
        "PATH": f".:{installed.env['PATH']}",
        "VIRTUAL_ENV": str(workspace / ".venv"),
    }
    done = start_worker(installed, "quick", env=env, cwd=workspace)
    installed.finished(done.stdout.split()[1])
    assert not (tmp_path / "hijacked").exists()
    told = installed.finished(done.stdout.split()[1])["result"].splitlines()
    named = dict(variable.split("=", 1) for variable in told)
    assert named["UV"] == str(installed.uv) and str(workspace) not in "".join(told)
    assert all(map(os.path.isabs, named["PATH"].split(":")))
    assert named["TASK_QUEUE_STATE"] == str(installed.state)


def test_the_environments_uv_is_taken_and_no_other(installed):
    installed.handler("quick", "#!/bin/sh\n")
    mine = installed.directory / "my uv"
    mine.write_text(UV.replace("uv.log", "my.log"))
    mine.chmod(0o755)
    file = installed.directory / "environment"
    file.write_text(f"UV={mine}\n")
    file.chmod(0o600)
    (installed.directory / "installed.json").write_text("{}")
    start_worker(installed, "quick")
    wait_for(lambda: workers(installed.state), what="a worker")
    assert (installed.directory / "my.log").exists()
    assert not (installed.directory / "uv.log").exists()


def test_a_uv_that_cannot_be_started_is_one_line_in_the_workers_log(installed):
    installed.uv.write_bytes(b"\x7fELF")
    start_worker(installed, "quick")
    wait_for(lambda: log(installed.state), what="a line")
    assert log(installed.state).count("\n") == 1 and f"{installed.uv} cannot" in log(
        installed.state
    )


def test_one_started_by_a_handler_outlives_it(installed):
    """Its own session: a timeout that ends the handler's group does not end it."""
    enqueue = (
        f'"{sys.executable}" "{installed.lib}/enqueue.py" notifications quick --start-worker\n'
    )
    installed.handler("starts", f'#!/bin/sh\n{enqueue}touch "$HOME/started"\nsleep 100\n')
    installed.handler("quick", '#!/bin/sh\necho "$TASK_DEPTH" >"$HOME/depth"\n')
    task = installed.enqueue("approvals", "starts")
    installed.worker("approvals", "--timeout", 2, "--max-attempts", 1)
    assert "timed out" in installed.finished(task)["error"]
    wait_for(
        (installed.directory / "depth").exists, what="the run of the task that the handler enqueued"
    )
    (pid,) = workers(installed.state)
    assert lives(pid)
    # It is the task's own depth, without the starter's.
    assert (installed.directory / "depth").read_text() == "2\n"
