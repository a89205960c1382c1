"""What is run is decided where the worker was started: no workspace and no session has a say in it."""

import json
import os
from pathlib import Path

import pytest
from conftest import wait_for


@pytest.fixture
def workspace(installation):
    """A directory with programs and modules of its own, which a task names as its workspace."""
    made = installation.directory / "workspace"
    (made / "bin").mkdir(parents=True)
    for name in ("run.sh", "git", "bin/git", "python3", "sh"):
        (made / name).write_text("#!/bin/sh\necho of the workspace\n")
        (made / name).chmod(0o755)
    (made / "json.py").write_text("print('of the workspace')\n")
    return made


def run(installation, workspace: Path, *command, cwd=None, env=None) -> dict:
    """The history of a task of that workspace."""
    task = installation.enqueue(
        "notifications", "it", json.dumps({"workspace_path": str(workspace)})
    )
    done = installation.run(
        "worker.py",
        "notifications",
        "--drain",
        "--max-attempts",
        1,
        "--handlers",
        installation.handlers,
        *(["--", *command] if command else []),
        cwd=cwd,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return installation.history(task)


def test_a_relative_command_is_the_one_where_the_worker_was_started(installation, workspace):
    here = installation.directory / "here"
    here.mkdir()
    (here / "run.sh").write_text("#!/bin/sh\necho of the person\npwd\n")
    (here / "run.sh").chmod(0o755)
    done = run(installation, workspace, "./run.sh", cwd=here)
    assert done["result"] == f"of the person\n{workspace}\n"


@pytest.mark.parametrize(
    "entries",
    ["{path}:", ":{path}", "{path}::/bin", ".:{path}", "bin:{path}", "./bin:{path}", "", ":", "."],
)
def test_a_search_path_has_no_place_in_a_workspace(installation, workspace, entries):
    env = {"PATH": entries.format(path=os.environ["PATH"])}
    installation.handler(
        "it", '#!/bin/sh\necho "$PATH"\nsh -c "echo well"\ngit --version || true\n'
    )
    done = run(installation, workspace, env=env)
    assert (
        done["status"] == "completed"
        and "well" in done["result"]
        and "of the workspace" not in done["result"]
    )
    path = done["result"].split("\n", 1)[0].split(":")
    assert path and all(map(os.path.isabs, path))


def test_the_command_is_looked_for_in_absolute_places_only(installation, workspace):
    refused = installation.run(
        "worker.py",
        "notifications",
        "--",
        "run.sh",
        cwd=workspace,
        env={"PATH": f".::{workspace}/none"},
    )
    assert refused.returncode == 64 and "run.sh" in refused.stderr
    done = run(
        installation,
        workspace,
        "sh",
        "-c",
        "echo well",
        cwd=workspace,
        env={"PATH": f"::.:{os.environ['PATH']}"},
    )
    assert done["result"] == "well\n"


@pytest.mark.parametrize(
    "entries, kept",
    [(".", None), ("", None), (":", None), ("lib:/a/b:", "/a/b"), ("/a:/b", "/a:/b")],
)
def test_nor_has_a_search_path_for_modules(installation, workspace, entries, kept):
    installation.handler("it", '#!/bin/sh\nprintf "%s" "${PYTHONPATH-unset}"\n')
    assert run(installation, workspace, env={"PYTHONPATH": entries})["result"] == (kept or "unset")


@pytest.mark.parametrize("arguments, named", [
    (["--", "nosuchcmd"], "nosuchcmd"), (["--", "./nosuchcmd"], "nosuchcmd"), (["--", "/nosuchcmd"], "nosuchcmd"), (["--"], "--"),
    (["--", ""], "program"), (["--", "/etc/passwd"], "/etc/passwd"), (["--", "/"], "program"),
    (["--handlers", "/nope"], "/nope"), (["--handlers", "/etc/passwd"], "/etc/passwd"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_at_the_start(installation, arguments, named):
    done = installation.run("worker.py", "notifications", "--drain", *arguments)
    assert (
        (done.returncode, done.stdout) == (64, "")
        and named in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert not installation.state.exists()


@pytest.mark.parametrize("state", ["state", "./state", "../state", " "])
def test_a_relative_state_is_refused(installation, state):
    """A hook and its worker have different working directories, so they would use different states."""
    done = installation.run(
        "worker.py",
        "notifications",
        "--drain",
        env={"TASK_QUEUE_STATE": state},
        cwd=installation.directory,
    )
    assert (
        done.returncode == 64 and "TASK_QUEUE_STATE" in done.stderr and done.stderr.count("\n") == 1
    )
    assert sorted(path.name for path in installation.directory.iterdir()) == ["handlers"]


@pytest.mark.parametrize("state", ["~/of its own", ""])
def test_home_may_be_meant_and_empty_is_unset(installation, state):
    done = installation.run(
        "worker.py",
        "notifications",
        "--drain",
        "--handlers",
        installation.handlers,
        env={"TASK_QUEUE_STATE": state},
    )
    assert done.returncode == 0, done.stderr
    assert len(list(installation.directory.rglob("tasks.db"))) == 1


SESSION = (
    "CLAUDECODE", "CLAUDE_CODE_CHILD_SESSION", "CLAUDE_CODE_ENTRYPOINT", "CLAUDE_CODE_EXECPATH", "CLAUDE_CODE_SESSION_ID",
    "CLAUDE_CODE_SSE_PORT", "CLAUDE_EFFORT", "CLAUDE_ENV_FILE", "CLAUDE_PID", "CLAUDE_PLUGIN_DATA", "CLAUDE_PLUGIN_ROOT",
    "CLAUDE_PROJECT_DIR", "CLAUDE_CODE_REMOTE", "CLAUDE_CODE_WHATEVER_COMES_NEXT", "CLAUDE_NEXT", "VIRTUAL_ENV", "UV_RUN_RECURSION_DEPTH",
)  # fmt: skip
PERSON = (
    "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL", "CLAUDE_CONFIG_DIR", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_SKIP_BEDROCK_AUTH", "CLAUDE_CODE_API_KEY_HELPER_TTL_MS",
    "CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "CLAUDE_CODE_SUBAGENT_MODEL",
    "AWS_PROFILE", "LANG", "ANYTHING_ELSE",
)  # fmt: skip


def test_a_handler_is_part_of_no_session_and_keeps_what_a_person_set(installation, workspace):
    installation.handler(
        "it", "#!/usr/bin/env python3\nimport json, os\nprint(json.dumps(dict(os.environ)))\n"
    )
    values = {name: "C" if name == "LANG" else f"of {name}" for name in (*SESSION, *PERSON)}
    told = json.loads(run(installation, installation.directory, env=values)["result"])
    assert [name for name in SESSION if name in told] == []
    assert {name: told.get(name) for name in PERSON} == {name: values[name] for name in PERSON}
    assert told["TASK_TYPE"] == "it" and told["HOME"] == str(installation.directory)


def test_what_a_task_tells_its_handler_is_not_the_workers_own(installation, workspace):
    names = ("TASK_ID", "TASK_TYPE", "TASK_QUEUE", "TASK_ATTEMPT", "TASK_DEPTH")
    installation.handler("it", "#!/bin/sh\n" + "".join(f'echo "${name}"\n' for name in names))
    worker = installation.worker("notifications", env=dict.fromkeys(names, "7"))
    task = installation.enqueue("notifications", "it", "--task-id", "mine")
    assert installation.finished(task)["result"] == "mine\nit\nnotifications\n1\n1\n"
    wait_for(lambda: worker.poll() is None)
