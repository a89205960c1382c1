"""What the tests of handlers/link_validation share: the script itself, run as a worker runs it,
with a task on stdin.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import chdir, contextmanager
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handlers" / "link_validation"


def uv_binary():
    """The real uv, not a shim of a version manager."""
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        return os.environ.get("UV") or shutil.which("uv")


UV = uv_binary()
assert UV, "uv is missing: python3 -m pip install uv"
UV_CACHE = subprocess.run(
    [UV, "cache", "dir"], capture_output=True, text=True, check=True
).stdout.strip()


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@cache
def handler_module():
    """Return handlers/link_validation as a module, without its bound on this process's memory."""
    loader = SourceFileLoader("link_validation_handler", str(HANDLER))
    module = module_from_spec(spec_from_loader("link_validation_handler", loader))
    loader.exec_module(module)
    module.limit_memory = lambda: None
    return module


def call(task: bytes, environment: dict, cwd: Path) -> subprocess.CompletedProcess:
    """Call the handler's main() in this process, with streams and an environment of its own."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    streams = {"stdin": io.TextIOWrapper(io.BytesIO(task)), "stdout": out, "stderr": errors}
    # The handler sets the alarm that pytest's own timeout uses.
    alarm, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    patched = mock.patch.dict(os.environ, environment, clear=True)
    with mock.patch.multiple(sys, **streams), patched, chdir(cwd):
        try:
            code = handler_module().main([])
        finally:
            signal.signal(signal.SIGALRM, alarm)
            signal.setitimer(signal.ITIMER_REAL, *timer)
    for stream in (out, errors):
        stream.flush()
    said = (stream.buffer.getvalue() for stream in (out, errors))
    return subprocess.CompletedProcess((), code, *said)


@pytest.fixture
def check(tmp_path, workspace):
    """check(data, …) runs the handler with a task that has this payload, and returns its end.

    The handler runs in this process, unless an option asks for one of its own.
    """
    home = tmp_path / "home"
    home.mkdir()

    def run(data=None, *, task=None, path=(), env=None, handler=None, **options):
        payload = {"workspace_path": str(workspace)} if data is None else data
        if task is None:
            task = json.dumps({"task_id": "t1", "data": payload}).encode()
        places = [*map(str, path), os.path.dirname(UV), "/usr/local/bin", "/usr/bin", "/bin"]
        environment = {
            "PATH": os.pathsep.join(places),
            "HOME": str(home),
            "UV_CACHE_DIR": UV_CACHE,
            "TASK_QUEUE_STATE": str(tmp_path / "state"),
            **(env or {}),
        }
        if handler or options:
            # The tests' Python has what the handler needs, and starts sooner than uv.
            command = [handler] if handler else [sys.executable, HANDLER]
            options |= {"env": environment, "cwd": workspace, "capture_output": True}
            done = subprocess.run(command, input=task, timeout=60, **options)
        else:
            done = call(task, environment, workspace)
        done.summary = json.loads(done.stdout) if done.returncode == 0 else None
        done.words = done.stderr.decode()
        assert "Traceback" not in done.words
        return done

    return run


@pytest.fixture
def refused(check):
    """refused(data) is the reason for which the handler refuses a task for good; None if it does not."""

    def refuse(data=None, *, task=None):
        done = check(data, task=task)
        is_one_line = done.words.startswith("link_validation: ") and done.words.count("\n") == 1
        is_refusal = done.returncode == 65 and is_one_line and not done.stdout
        return done.words if is_refusal else None

    return refuse


@pytest.fixture
def with_limits(tmp_path):
    """with_limits(WALK_SECONDS=1, …) is a copy of the handler with other values of its constants."""

    def copy(**limits):
        source = HANDLER.read_text().replace(
            "WALK_SECONDS, CHECK_SECONDS = 60, 120", "WALK_SECONDS = 60\nCHECK_SECONDS = 120"
        )
        for name, value in limits.items():
            source, found = re.subn(
                rf"^{name} = .*", f"{name} = {value}", source, flags=re.MULTILINE
            )
            assert found == 1, name
        path = tmp_path / "handlers" / "link_validation"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source.replace(source.splitlines()[0], f"#!{sys.executable}", 1))
        path.chmod(0o755)
        shutil.copytree(ROOT / "taskqueue", tmp_path / "taskqueue", dirs_exist_ok=True)
        return path

    return copy


@contextmanager
def waiting_lychee(workspace, tmp_path, data=None, env=None):
    """A check whose lychee waits for a server: (the process, finish() -> its output and log)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        write(workspace, waits=f"[x](http://127.0.0.1:{server.getsockname()[1]}/) [y](missing.md)")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LYCHEE_ONLINE": "1",
                       "TASK_QUEUE_STATE": str(tmp_path / "state"), **(env or {})}  # fmt: skip
        handler = subprocess.Popen(
            [sys.executable, HANDLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=workspace,
            start_new_session=True,
            env=environment,
        )
        try:
            task = {"data": {"workspace_path": str(workspace), **(data or {})}}
            handler.stdin.write(json.dumps(task).encode())
            handler.stdin.close()
            handler.stdin = None
            # From here on, lychee is at work.
            connection, _ = server.accept()

            def finish():
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                return handler.communicate(timeout=30)

            with connection:
                yield handler, finish, connection
        finally:
            try:
                os.killpg(handler.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            handler.wait()
            for pipe in (handler.stdout, handler.stderr):
                pipe.close()


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(workspace, *words):
    subprocess.run(
        ["git", *words],
        cwd=workspace,
        check=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": str(workspace.parent)},
    )


def report(done):
    """The whole report that a summary names."""
    return json.loads(Path(done.summary["results_file"]).read_text())


def skipped(done):
    return {skipped["file"]: skipped["reason"] for skipped in done.summary["skipped"]}


def not_obeyed(done):
    return {setting["setting"]: setting["reason"] for setting in done.summary["not_obeyed"]}


def broken(done):
    return [(link["file"], os.path.basename(link["url"])) for link in done.summary["broken"]]
