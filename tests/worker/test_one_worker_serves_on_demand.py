import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import copy_scripts, wait_for, wait_for_word
from processes import lives, stays_true

import worker as worker_script

# `uv run … --script`, but of this Python.
UV = f'''#!/bin/sh
echo "$@" >>"$HOME/uv.log"
until [ "$1" = --script ]; do shift; done
shift
exec "{sys.executable}" "$@"
'''
QUICK = "#!/bin/sh\n"
HIJACK = "#!/bin/sh\ntouch '{}/hijacked'\n"


@pytest.fixture
def installed(installation):
    """The scripts where install.py puts them; detached workers end with the test."""
    lib = installation.directory / "runtime" / "lib"
    copy_scripts(lib, "enqueue.py", "worker.py")
    installation.uv = installation.directory / ".local" / "bin" / "uv"
    installation.uv.parent.mkdir(parents=True)
    installation.uv.write_text(UV)
    installation.uv.chmod(0o755)
    installation.handler("quick", QUICK)
    installation.script = lib / "enqueue.py"
    installation.states = [installation.state]
    yield installation
    for pid in filter(lives, (pid for state in installation.states for pid in workers(state))):
        os.kill(pid, signal.SIGKILL)


def log(state: Path) -> str:
    path = state / "logs" / "worker.notifications.log"
    return path.read_text() if path.exists() else ""


def workers(state: Path) -> list[int]:
    """Return the pids of the state directory's detached workers that came to serve."""
    return [int(pid) for pid in re.findall(r"worker (\d+)-\w+ serves", log(state))]


def started_workers(installed) -> list[int]:
    """Return the pids of this installation's workers, those that uv is still starting among them."""
    script, found = f"{installed.script.parent}/worker.py".encode(), []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if script in process.read_bytes().split(b"\0"):
                found.append(int(process.parent.name))
    return found


def start_worker(installed, task_type: str = "quick", **options) -> str:
    """Enqueue with --start-worker; return the task's id."""
    words = ("notifications", task_type, "--start-worker")
    done = installed.run(str(installed.script), *words, **options)
    assert done.returncode == 0 and done.stdout.startswith("queued"), done.stderr
    installed.said = done.stderr
    return done.stdout.split()[1]


def bare(installed, *options: str) -> None:
    """Fire as a hook does whose environment is HOME and a PATH without uv."""
    home = installed.directory
    installed.states.append(home / ".claude" / "automation" / "lychee" / "state")
    installed.handler("quick", '#!/bin/sh\ntouch "$HOME/ran"\n')
    words = [sys.executable, installed.script, *options]
    words += ["notifications", "quick", "--start-worker"]
    done = subprocess.run(
        ["/usr/bin/env", "-i", f"HOME={home}", "PATH=/usr/bin:/bin", *words],
        input=json.dumps({"hook_event_name": "Stop", "cwd": str(home)}).encode(),
        capture_output=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    wait_for((home / "ran").exists, what="the task's run")


@pytest.fixture
def single(queue):
    """A worker with --single in this process; it serves, and has been idle for long enough."""
    words = ["notifications", "completions", "--single", "--idle-exit", "0.01"]
    made = worker_script.Worker(worker_script.parse([*words, "--concurrency", "1"]))
    queue.ensure_queue(queue.connect(), "notifications")
    made.idle_since -= 1
    yield made
    made.serving.release()


def test_the_second_leaves_and_says_so(installation):
    first = installation.worker("notifications", "--single")
    second = installation.worker("notifications", "--single", ready=False)
    assert second.wait(10) == 0 and "another worker serves notifications" in second.log.read_text()
    first.terminate()
    assert first.wait(10) == 0
    # It leaves to an ordinary worker, too, and a worker of another queue does not matter.
    installation.worker("notifications")
    assert installation.worker("notifications", "--single", ready=False).wait(10) == 0
    assert installation.worker("completions", "--single").poll() is None


def test_the_kernel_decides_among_many(installation):
    started = [installation.worker("notifications", "--single", ready=False) for _ in range(6)]
    wait_for(lambda: sum(worker.poll() == 0 for worker in started) == 5)
    (winner,) = [worker for worker in started if worker.poll() is None]
    wait_for_word(winner, "serves")
    winner.kill()
    winner.wait()
    # The kernel has dropped the lock of the process that was killed.
    assert installation.worker("notifications", "--single").poll() is None


def test_one_for_several_queues_leaves_those_that_another_serves_to_that_one(installation):
    """A hook's worker stays while anything is scheduled: the others' tasks cannot wait for that."""
    installation.handler("quick", QUICK)
    another = installation.worker("completions", "--single")
    one = installation.worker("completions", "notifications", "--single")
    assert "serves notifications\n" in one.log.read_text()
    assert installation.ends_well("notifications", "quick")
    another.send_signal(signal.SIGSTOP)
    task = installation.enqueue("completions", "quick")
    ready = "select task_id, status from completions"
    assert stays_true(lambda: installation.rows(ready) == [(task, 1)], 0.3)
    another.kill()
    assert installation.finished(task)["status"] == "completed" and one.poll() is None


def test_one_without_a_free_place_takes_no_other_queue(installation, single):
    """A hook that finds no worker starts one, and its task need not wait."""
    another = installation.worker("completions", "--single")
    assert single.serve() and single.own() == ["notifications"]
    another.kill()
    another.wait()
    single.runs["its only place"] = None
    assert single.serve() and single.own() == ["notifications"]
    single.runs.clear()
    assert single.serve() and single.own() == ["notifications", "completions"]


def test_it_leaves_when_nothing_waits_runs_or_is_scheduled(installation):
    installation.handler("long", "#!/bin/sh\nsleep 0.8\n")
    long = installation.enqueue("notifications", "long")
    later = installation.enqueue("notifications", "long", "--delay", 1.5)
    worker = installation.worker("notifications", "--single", "--idle-exit", 0.3)
    assert worker.wait(10) == 0 and "leaving" in worker.log.read_text()
    assert [installation.history(task)["status"] for task in (long, later)] == ["completed"] * 2


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_what_comes_in_while_it_lets_go_keeps_it(installation, queue, single, delay):
    """Whoever enqueues then finds the lock held, and starts no other."""
    assert single.serve()
    release, lock = single.serving.release, installation.state / "workers/serving.notifications"

    def late():
        queue.enqueue_task("notifications", "any", {}, delay=delay)
        assert queue.lock_file(lock, probe=True) is None
        release()

    single.serving.release = late
    assert single.may_leave() is False
    single.serving.release = release


def test_one_that_let_go_leaves_the_queue_to_whoever_was_started_meanwhile(
    installation, queue, single
):
    assert single.serve()
    release = single.serving.release

    def late():
        release()
        queue.enqueue_task("notifications", "any", {})
        assert installation.worker("notifications", "completions", "--single").poll() is None

    single.serving.release = late
    assert single.may_leave() is True, "two work, and one of them holds no lock"
    single.serving.release = release


def test_no_task_is_stranded_at_the_moment_of_leaving(installation, queue):
    installation.handler("quick", QUICK)
    dice, lock = random.Random(7), installation.state / "workers" / "serving.notifications"
    options = ("notifications", "--single", "--idle-exit", 0.1)
    tried = kept = 0
    pause = 0.07
    # At least once, the task comes before that moment, and once after it.
    while tried < 6 or not 0 < kept < tried:
        assert tried < 20, "the tasks did not come at the moment of leaving"
        worker = installation.worker(*options)
        # The moment itself is what is tried here, not a condition.
        time.sleep(max(0.0, pause + dice.uniform(-0.01, 0.01)))
        task = queue.enqueue_task("notifications", "quick", {})
        # This is what enqueue.py does next.
        fd = queue.lock_file(lock, probe=True)
        # The next try is nearer to the moment.
        tried, kept, pause = tried + 1, kept + (fd is None), pause + (0.01 if fd is None else -0.01)
        if fd is not None:
            os.close(fd)
            installation.worker(*options, ready=False)
        installation.finished(task, 10)
        worker.wait(10)


def test_ten_hooks_at_once_start_one_and_a_killed_one_is_replaced(installed):
    command = [sys.executable, installed.script, "notifications", "quick", "--start-worker"]
    how = {"env": installed.env, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    hooks = [subprocess.Popen(command, **how) for _ in range(10)]
    assert all(hook.communicate(timeout=30) and hook.returncode == 0 for hook in hooks)
    installed.ended(10)
    (pid,) = workers(installed.state)
    wait_for(lambda: started_workers(installed) == [pid], what="the losers' leave")
    started = len(installed.lines("uv.log"))
    assert log(installed.state).count("another worker serves") == started - 1
    # A later one finds it, and starts none.
    installed.finished(start_worker(installed))
    assert len(installed.lines("uv.log")) == started and workers(installed.state) == [pid]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not lives(pid))
    installed.finished(start_worker(installed))


def test_a_hook_returns_at_once_and_its_streams_are_free(installed):
    installed.handler("long", '#!/bin/sh\necho $$ >>"$HOME/runs"\nsleep 100\n')
    began = time.monotonic()
    # This waits for the end of its stdout and stderr.
    start_worker(installed, "long", timeout=10)
    assert time.monotonic() - began < 3 and installed.said == ""
    (group,) = wait_for(installed.lines)
    (pid,) = workers(installed.state)
    assert lives(pid) and os.getsid(pid) == pid
    if os.path.exists("/proc/self/fd"):
        streams = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        assert streams == [
            "/dev/null",
            *[str(installed.state / "logs/worker.notifications.log")] * 2,
        ]
    os.killpg(int(group), signal.SIGKILL)


def test_a_bare_environment_is_enough(installed):
    bare(installed, "--hook")
    assert "worker.py notifications --environment" in (installed.directory / "uv.log").read_text()
    assert len(workers(installed.states[1])) == 1


def test_without_uv_the_same_python_runs_the_worker(installed):
    places = ("/usr/bin", "/bin", "/usr/local/bin", "/opt/homebrew/bin")
    if any(os.path.exists(f"{place}/uv") for place in places):
        pytest.skip("uv is in a directory that enqueue.py looks into on any machine")
    installed.uv.unlink()
    bare(installed)


def test_a_worker_that_cannot_be_started_costs_no_task(installed):
    # An executable of a format that the kernel does not know.
    installed.uv.write_bytes(b"\x7fELF")
    start_worker(installed)
    wait_for(lambda: log(installed.state), what="a line in the worker's log")
    assert log(installed.state).count("\n") == 1
    assert f"{installed.uv} cannot" in log(installed.state)
    (installed.directory / "installed.json").write_text(json.dumps({"python": str(installed.uv)}))
    start_worker(installed)
    assert installed.said.count("\n") == 1 and "no worker could be started" in installed.said
    assert installed.rows("select task_type from notifications") == [("quick",)] * 2


def test_the_session_does_not_choose_uv(installed, tmp_path):
    """Not by UV, not by a relative entry of PATH, not by what lies in its directory."""
    installed.handler("quick", "#!/bin/sh\nenv\n")
    workspace = tmp_path / "workspace"
    (workspace / ".venv/bin").mkdir(parents=True)
    for place in ("uv", "python3", ".venv/bin/python", ".venv/bin/python3"):
        (workspace / place).write_text(HIJACK.format(tmp_path))
        (workspace / place).chmod(0o755)
    (workspace / ".venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    env = {"UV": f"{workspace}/uv", "VIRTUAL_ENV": f"{workspace}/.venv"}
    env["PATH"] = f".:{installed.env['PATH']}"
    task = start_worker(installed, env=env, cwd=workspace)
    told = installed.finished(task)["result"].splitlines()
    assert not (tmp_path / "hijacked").exists() and str(workspace) not in "".join(told)
    named = dict(variable.split("=", 1) for variable in told)
    assert named["UV"] == str(installed.uv)
    assert all(map(os.path.isabs, named["PATH"].split(":")))
    assert named["TASK_QUEUE_STATE"] == str(installed.state)


def test_the_environments_uv_is_taken_and_no_other(installed):
    mine = installed.directory / "my uv"
    mine.write_text(UV.replace("uv.log", "my.log"))
    mine.chmod(0o755)
    file = installed.directory / "environment"
    file.write_text(f"UV={mine}\n")
    file.chmod(0o600)
    (installed.directory / "installed.json").write_text("{}")
    start_worker(installed)
    wait_for(lambda: workers(installed.state), what="a worker")
    assert installed.lines("my.log") and not installed.lines("uv.log")


def test_one_started_by_a_handler_outlives_it(installed):
    """It has its own session: a timeout that ends the handler's group does not end it."""
    enqueue = f'"{sys.executable}" "{installed.script}" notifications quick --start-worker\n'
    installed.handler("starts", f"#!/bin/sh\n{enqueue}sleep 100\n")
    installed.handler("quick", '#!/bin/sh\necho "$TASK_DEPTH" >"$HOME/depth"\n')
    task = installed.enqueue("approvals", "starts")
    installed.worker("approvals", "--timeout", 2, "--max-attempts", 1)
    assert "timed out" in installed.finished(task)["error"]
    # It is the task's own depth, without the starter's.
    wait_for(lambda: installed.lines("depth") == ["2"], what="the run of the handler's task")
    (pid,) = workers(installed.state)
    assert lives(pid)
