"""The reference's way into the spool, as printed: hooks that run at the same time overwrite nothing, and
nobody else reads it.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

SHELLS = [shell for shell in ("dash", "bash", "zsh") if shutil.which(shell)]


def snippet() -> str:
    """The block that moves a file into the spool."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/reference.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "/spool/" in block and "mv " in block]
    return found


@pytest.fixture
def script(installation):
    """The snippet, on this installation's state, and with a payload of each process's own in the
    place of the printed ones.
    """
    text = snippet()
    default = "~/.claude/automation/lychee/state/spool/notifications"
    payload = re.search(r"(?<=printf '%s\\n' )'.*}'", text)[0]
    assert text.count(default) == 1 and text.count(payload) == 1
    path = installation.directory / "snippet"
    path.write_text(
        text.replace(default, '"$STATE/spool/notifications"').replace(payload, '"{\\"n\\": $1}"')
    )
    return path


def start(installation, script, shell, number, **options):
    env = {"PATH": "/usr/bin:/bin", "STATE": str(installation.state)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [shutil.which(shell), script, str(number)]
    return subprocess.Popen(command, env=env, **streams, **options)


@pytest.mark.parametrize("shell", SHELLS)
def test_two_hundred_hooks_at_four_at_a_time_are_two_hundred_tasks(
    installation, queue, script, shell
):
    for at in range(0, 200, 4):
        running = [start(installation, script, shell, number) for number in range(at, at + 4)]
        for process in running:
            assert (process.communicate(timeout=20)[0], process.returncode) == (b"", 0)
    # This wakes sleeping workers.
    assert (installation.state / "wake").read_text() == "\n"
    assert queue.take_in_spool(installation.state) == (200, [])
    rows = installation.rows("select data from notifications")
    assert sorted(json.loads(data)["n"] for (data,) in rows) == list(range(200))


@pytest.mark.parametrize("shell", SHELLS)
def test_nobody_else_can_read_it(installation, script, shell):
    assert start(installation, script, shell, 1, umask=0).wait(20) == 0
    (file,) = (installation.state / "spool/notifications").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    for directory in (file.parent, file.parent.parent, installation.state):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_file_that_is_not_whole_is_not_taken_in(installation, queue, script):
    """A hook that is killed in between leaves a name with a dot, which workers pass over."""
    script.write_text(script.read_text().replace("mv ", "kill -KILL $$; mv ", 1))
    assert start(installation, script, "sh", 1).wait(20) == -9
    spool = installation.state / "spool/notifications"
    (name,) = os.listdir(spool)
    assert name.startswith(".") and queue.take_in_spool(installation.state) == (0, [])
    assert os.listdir(spool) == [name]
