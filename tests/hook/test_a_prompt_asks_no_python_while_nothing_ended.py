"""bin/hook.sh --report starts Python only where a task has ended since this session was told."""

from __future__ import annotations

# ruff: noqa: F811 -- fixtures are imported, and named again where they are used
import json
import sys

import pytest
from test_a_hook_writes_one_file import hook, one_hook  # noqa: F401


class Prompts:
    """Prompts of sessions, and how often Python was started for them."""

    def __init__(self, installation, hook) -> None:
        self.installation, self.hook, self.workspace = installation, hook, hook.workspace
        self.starts = installation.directory / "starts"
        self.starts.touch()
        python = installation.directory / "python"
        python.write_text(f'#!/bin/sh\necho >>"{self.starts}"\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        text = hook.path.read_text()
        assert text.count("\npython=\n") == 1
        hook.path.write_text(text.replace("\npython=\n", f"\npython='{python}'\n"))
        installation.handler("check", '#!/bin/sh\necho "result of $TASK_ID"\n')

    def end_a_task(self, workspace) -> str:
        data = json.dumps({"workspace_path": str(workspace)})
        task = self.installation.enqueue("notifications", "check", data)
        self.installation.worker("notifications", "--drain", ready=False).wait(30)
        return task

    def prompt(self, workspace, project=None, **env) -> tuple[str, int]:
        """Return what Claude is told, and how often Python was started."""
        before = len(self.starts.read_text())
        payload = {"hook_event_name": "UserPromptSubmit", "cwd": str(workspace)}
        env |= {"CLAUDE_PROJECT_DIR": str(project or workspace)}
        code, out, err = self.hook.fire(
            "--report", payload=json.dumps(payload).encode(), cwd=workspace, env=env
        )
        assert (code, err) == (0, ""), err
        return out.decode(), len(self.starts.read_text()) - before


@pytest.fixture
def prompts(installation, one_hook):
    return Prompts(installation, one_hook)


def test_python_is_asked_once_after_each_end_in_every_shell(installation, hook):
    prompts = Prompts(installation, hook)
    for _ in range(2):
        task = prompts.end_a_task(prompts.workspace)
        told, starts = prompts.prompt(prompts.workspace)
        assert f"result of {task}" in told and starts == 1
        assert [prompts.prompt(prompts.workspace) for _ in range(3)] == 3 * [("", 0)]


def test_an_enqueued_task_is_no_end(prompts):
    prompts.end_a_task(prompts.workspace)
    prompts.prompt(prompts.workspace)
    prompts.installation.enqueue("notifications", "check", "{}")
    assert prompts.prompt(prompts.workspace) == ("", 0)


def test_one_session_asks_for_itself_alone(prompts, tmp_path):
    """Of another workspace, of another directory in the project, attended by nobody, or by its other name."""
    docs, other, link = prompts.workspace / "docs", tmp_path / "other", tmp_path / "link"
    docs.mkdir(), other.mkdir(), link.symlink_to(other)
    task = prompts.end_a_task(other)
    assert prompts.prompt(prompts.workspace) == ("", 1) and prompts.prompt(prompts.workspace) == (
        "",
        0,
    )
    assert prompts.prompt(docs, prompts.workspace) == ("", 1)
    told, starts = prompts.prompt(other, CLAUDE_CODE_SESSION_ATTENDED="0")
    assert task in told and starts == 1
    assert prompts.prompt(other, CLAUDE_CODE_SESSION_ATTENDED="0") == ("", 0)
    told, starts = prompts.prompt(link)
    assert task in told and starts == 1
    assert prompts.prompt(other) == ("", 1) and prompts.prompt(other) == ("", 0)


def test_a_session_s_names_lead_nowhere_else(prompts):
    prompts.end_a_task(prompts.workspace)
    outside = prompts.installation.directory / "outside"
    for project in (f"/../../{outside.name}", "relative", "/" + "x" * 300, "/a\nb"):
        for _ in range(2):
            prompts.prompt(prompts.workspace, project)
    assert not outside.exists()
    assert not (prompts.installation.state / "toldrelative").exists()


def test_cleanup_forgets_the_markers(prompts):
    prompts.end_a_task(prompts.workspace)
    prompts.prompt(prompts.workspace)
    assert prompts.installation.run("cleanup.py").returncode == 0
    assert not (prompts.installation.state / "told").exists()
    assert prompts.prompt(prompts.workspace) == ("", 1) and prompts.prompt(prompts.workspace) == (
        "",
        0,
    )
