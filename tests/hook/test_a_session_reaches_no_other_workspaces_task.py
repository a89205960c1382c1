"""A worker that a hook started in workspace A runs a task of workspace B: its handler sees nothing of A."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from homes import install
from plugin import UV_CACHE

from taskqueue.running import is_held

# It notes its environment, that of the process which started it, what is loaded into it, and where it runs.
HANDLER = """#!/bin/sh
{ env; tr '\\0' '\\n' </proc/$PPID/environ; cat /proc/self/maps; pwd; } >"$HOME/told.new"
mv "$HOME/told.new" "$HOME/told-$TASK_ID"
"""
# A shared object that notes the name of each program that loads it.
PRELOADED = """
#include <stdio.h>
__attribute__((constructor)) static void loaded(void) {
    char name[64] = "";
    FILE *comm = fopen("/proc/self/comm", "r"), *notes = fopen(NOTES, "a");
    if (comm && notes && fgets(name, sizeof name, comm)) fputs(name, notes);
    if (notes) fclose(notes);
}
"""
STOP = b'{"session_id": "s1", "hook_event_name": "Stop"}'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("homes") / "home"
    home.mkdir()
    install(home, "--hook", "yes", env={"UV_CACHE_DIR": UV_CACHE})
    file = home / ".claude/automation/lychee/environment"
    file.write_text(f"{file.read_text()}UV_OFFLINE=1\n")
    handler = home / ".claude/automation/lychee/handlers/told"
    handler.write_text(HANDLER)
    handler.chmod(0o755)
    return home


@pytest.fixture
def workspace(tmp_path):
    """Workspace A, with programs, modules and an interpreter that note that they were run."""
    made = tmp_path / "A"
    (made / "bin").mkdir(parents=True)
    (made / ".venv/bin").mkdir(parents=True)
    note = f"#!/bin/sh\ntouch '{tmp_path}/run'\n"
    for name in ("bin/sh", "bin/uv", "bin/env", "bin/python3", "bin/mv", ".venv/bin/python"):
        (made / name).write_text(note)
        (made / name).chmod(0o755)
    (made / "rc").write_text(f"touch '{tmp_path}/run'\n")
    (made / "preloaded.c").write_text(PRELOADED)
    if shutil.which("gcc"):
        words = ("gcc", "-shared", "-fPIC", f'-DNOTES="{tmp_path}/loaded"', "-o", made / "evil.so")
        subprocess.run([*words, made / "preloaded.c"], check=True)
    (made / "sitecustomize.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    return made


HOSTILE = {
    "PATH through /proc": {"PATH": "/proc/self/cwd/bin:/usr/bin:/bin"},
    "PATH through another /proc": {"PATH": "/proc/{pid}/root{A}/bin:/proc/thread-self/cwd/bin:/usr/bin:/bin"},
    "PATH of the workspace": {"PATH": "{A}/bin:/usr/bin:/bin"},
    "PATH through a link": {"PATH": "{link}/bin:/usr/bin:/bin"},
    "HOME through /proc": {"HOME": "/proc/self/cwd"},
    "HOME is a link into it": {"HOME": "{link}"},
    "variables": {"UV_CACHE_DIR": "{A}/c", "UV_PYTHON": "{A}/bin/python3", "UV": "{A}/bin/uv",
                  "UV_INDEX_URL": "http://127.0.0.1:9/{A}", "VIRTUAL_ENV": "{A}/.venv",
                  "AWS_CONFIG_FILE": "{A}/aws", "AWS_PROFILE": "of A", "SSH_AUTH_SOCK": "{A}/agent",
                  "ANTHROPIC_BASE_URL": "http://127.0.0.1:9/{A}", "ANTHROPIC_API_KEY": "of A",
                  "CLAUDE_CODE_SHELL_PREFIX": "./evil.sh of A", "CLAUDE_CONFIG_DIR": "{A}/.claude",
                  "CLAUDE_CODE_OAUTH_TOKEN": "of A",
                  "HTTPS_PROXY": "http://127.0.0.1:9/{A}", "http_proxy": "http://127.0.0.1:9/{A}",
                  "SSL_CERT_FILE": "{A}/ca", "NODE_EXTRA_CA_CERTS": "{A}/ca", "NODE_OPTIONS": "{A}",
                  "XDG_CONFIG_HOME": "{A}", "XDG_RUNTIME_DIR": "{A}", "TMPDIR": "{A}", "GIT_DIR": "{A}",
                  "DBUS_SESSION_BUS_ADDRESS": "unix:path={A}/bus", "TASK_QUEUE_STATE": "{A}/state"},
    "loaders": {"LD_LIBRARY_PATH": "{A}/bin", "BASH_ENV": "{A}/rc", "ENV": "{A}/rc",
                "PYTHONPATH": "{A}", "PYTHONHOME": "{A}", "PYTHONSTARTUP": "{A}/rc"},
    "a loaded object": {"LD_PRELOAD": "{A}/evil.so", "LD_AUDIT": "", "LD_LIBRARY_PATH": "{A}"},
}  # fmt: skip


@pytest.mark.parametrize("session", HOSTILE.values(), ids=HOSTILE)
def test_nothing_of_the_session_is_seen(home, workspace, tmp_path, session):
    (tmp_path / "link").symlink_to(workspace)
    (tmp_path / "B").mkdir()
    state = home / ".claude/automation/lychee/state"
    places = {"A": workspace, "link": tmp_path / "link", "pid": os.getpid()}
    told = [value.format(**places) for value in session.values()]
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", **dict(zip(session, told, strict=True))}
    hook = ["/bin/sh", home / ".claude/automation/lychee/runtime/hook"]
    words = ["notifications", "told", "--start-worker"]
    ran = subprocess.run(
        [*hook, *words], input=STOP, env=env, cwd=workspace, capture_output=True, text=False
    )
    assert (ran.returncode, ran.stdout) == (0, b""), ran.stderr
    data = json.dumps({"workspace_path": str(tmp_path / "B")})
    words = ("notifications", "told", data, "--task-id", tmp_path.name)
    subprocess.run(
        [sys.executable, ROOT / "enqueue.py", *words],
        env={"HOME": str(home), "TASK_QUEUE_STATE": str(state)},
        check=True,
        capture_output=True,
    )
    found = home / f"told-{tmp_path.name}"
    try:
        seen = wait_for(lambda: found.exists() and found.read_text(), 60, "the handler of B")
    finally:
        end_worker(state)
    assert not (tmp_path / "run").exists()
    # The session's own shell has loaded it before the hook's first line; no other program has.
    loaded = tmp_path / "loaded"
    if "LD_PRELOAD" in session and (workspace / "evil.so").exists():
        assert loaded.read_text() == "sh\n"
    assert str(workspace) not in seen and "of A" not in seen and "127.0.0.1:9" not in seen
    assert seen.splitlines()[-1] == str(tmp_path / "B") and f"HOME={home}" in seen


def end_worker(state: Path) -> None:
    """End the worker that the hook started: it outlives the test otherwise."""
    log = state / "logs/worker.notifications.log"
    for line in log.read_text().splitlines():
        if " serves " in line:
            pid = int(line.partition("worker ")[2].partition("-")[0])
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    # A process that waits for the disk dies a little later; until then the next hook finds it serving.
    lock = state / "workers/serving.notifications"
    wait_for(lambda: not is_held(lock), what="the end of the worker")


def doctor(home, **env):
    lib = home / ".claude/automation/lychee/runtime/lib"
    ran = subprocess.run(
        [sys.executable, lib / "tasks.py", "doctor", "--json"],
        env={"HOME": str(home), "PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
    )
    found = [f for f in json.loads(ran.stdout)["findings"] if f["check"] == "environment"]
    return [f for f in found if f["level"] != "ok"]


def test_doctor_says_where_a_workers_environment_will_not_do(home):
    file = home / ".claude/automation/lychee/environment"
    kept = file.read_text()
    try:
        assert doctor(home) == []
        [differing] = doctor(home, ANTHROPIC_API_KEY="sk-secret")
        assert differing["level"] == "note" and "ANTHROPIC_API_KEY" in differing["message"]
        assert "sk-secret" not in json.dumps(differing)
        file.write_text(kept.replace(UV_CACHE, str(home / "gone")))
        [gone] = doctor(home)
        assert gone["level"] == "problem" and "worker.py" in gone["message"]
        file.write_text("export A=b\n")
        [unfit] = doctor(home)
        assert unfit["level"] == "problem" and "line 1 is not NAME=value" in unfit["message"]
    finally:
        file.write_text(kept)
