"""With `"worktree": true`, a claude task works in a git worktree of its own, which goes unless it
holds work. With a stand-in for claude, and real git.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from claude_stub.fake import DONE, INIT


def git(directory: Path, *words: str) -> str:
    name = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", str(directory), *name, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(fake):
    git(fake.workspace, "init", "-q")
    (fake.workspace / ".gitignore").write_text("built\n")
    (fake.workspace / "a.md").write_text("a\n")
    git(fake.workspace, "add", ".")
    git(fake.workspace, "commit", "-qm", "first")
    return fake.workspace


def run(fake, repository, script: str = "", **data):
    """Run a task whose Claude does what a shell script does; return its end and its worktree."""
    fake.then(f"git config user.name t; git config user.email t@localhost; {script}")
    task = fake.task(workspace_path=str(repository), worktree=True, **data)
    done = task.call()
    return done, json.loads(done.stdout)["worktree"] if done.returncode == 0 else None


def beside(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.parent.glob(f"{repository.name}-*"))


@pytest.mark.parametrize("script", ["", "echo x >built", "git checkout -q --detach"])
def test_it_lies_beside_the_repository_and_goes_when_it_is_clean(fake, repository, script):
    done, told = run(fake, repository, script)
    assert done.returncode == 0, done.stderr
    place = Path(fake.calls()[0][2])
    assert place.parent == repository.parent and place.name.startswith("workspace-t-1-")
    assert told == {"path": str(place), "branch": f"tq/{place.name[10:]}", "removed": True}
    assert beside(repository) == []
    assert git(repository, "branch", "--list", "tq/*") == ""
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    "script, why",
    [
        ("echo x >new", "1 file not committed"),
        ("mkdir d; echo x >d/new; echo y >d/other", "2 files not committed"),
        ("echo b >a.md", "1 file not committed"),
        ("rm a.md", "1 file not committed"),
        ("echo b >a.md; git add a.md", "1 file not committed"),
        ("git config status.showUntrackedFiles no; echo x >new", "1 file not committed"),
        ("git commit -q --allow-empty -m two", "1 new commit"),
        ("git commit -q --allow-empty -m two; git checkout -q HEAD~1", "1 new commit"),
        ("git checkout -q -b mine; git commit -q --allow-empty -m two", "1 new commit"),
    ],
)
def test_it_stays_where_it_holds_work_and_the_result_says_so(fake, repository, script, why):
    done, told = run(fake, repository, script)
    assert done.returncode == 0, done.stderr
    assert (told["removed"], told["why"]) == (False, why)
    assert Path(told["path"]).is_dir() and beside(repository) == [Path(told["path"]).name]
    assert json.loads(done.stdout)["summary"].startswith(
        f"(its worktree stays, {told['path']}: {why})"
    )
    assert git(repository, "status", "--porcelain") == ""


def test_a_later_attempt_works_in_the_same_one(fake, repository):
    fake.says(INIT)
    run(fake, repository, "echo x >half-done")
    fake.says(INIT, DONE)
    done, told = run(fake, repository, "git add .; git commit -qm done")
    assert (done.returncode, told["why"]) == (0, "1 new commit")
    first, second = (call[2] for call in fake.calls()[-2:])
    assert first == second == told["path"]
    assert git(Path(told["path"]), "show", "--stat", "--format=").startswith("half-done")


def test_one_that_was_deleted_by_hand_is_made_again_with_its_commits(fake, repository):
    _, told = run(fake, repository, "git commit -q --allow-empty -m two")
    subprocess.run(["rm", "-r", told["path"]], check=True)
    done, told = run(fake, repository)
    assert (done.returncode, told["removed"]) == (0, False), done.stderr
    assert git(Path(told["path"]), "log", "-1", "--format=%s") == "two"


def test_tasks_with_one_id_one_after_the_other_have_one_each(fake, repository):
    places = set()
    for day in "26", "27":
        fake.then("echo x >new")
        task = fake.task(workspace_path=str(repository), worktree=True)
        task.envelope["enqueued_at"] = f"2026-11-{day} 09:00:00.000"
        places.add(json.loads(task.call().stdout)["worktree"]["path"])
    assert len(places) == 2


@pytest.mark.parametrize("task_id", ["../../x", "-b", "a b\tc", "é" * 300, "..", "@{1}.lock"])
def test_its_name_is_one_for_git_whatever_the_tasks_id(fake, repository, task_id):
    fake.then("")
    task = fake.task(workspace_path=str(repository), worktree=True)
    task.envelope["task_id"] = task_id
    done = task.call()
    assert done.returncode == 0, done.stderr
    assert Path(fake.calls()[0][2]).parent == repository.parent


def test_a_workspace_within_the_repository_is_the_same_folder_there(fake, repository):
    (repository / "docs").mkdir()
    done, told = run(fake, repository / "docs")
    assert done.returncode == 0 and fake.calls()[0][2] == f"{told['path']}/docs"


def test_a_hook_of_git_that_started_the_worker_names_no_other_repository(
    fake, repository, tmp_path
):
    fake.env |= {"GIT_DIR": str(tmp_path / "elsewhere"), "GIT_INDEX_FILE": str(tmp_path / "index")}
    fake.then("")
    done = fake.task(workspace_path=str(repository), worktree=True).call()
    assert json.loads(done.stdout)["worktree"]["removed"], done.stderr


@pytest.mark.parametrize("has_git", [False, True])
def test_a_directory_without_a_commit_is_a_dead_letter_at_once(fake, has_git):
    if has_git:
        git(fake.workspace, "init", "-q")
    done = fake.task(workspace_path=str(fake.workspace), worktree=True).call()
    assert done.returncode == 65 and "not in a git repository with a commit" in done.stderr
    assert fake.calls() == []


def test_a_place_that_is_taken_is_a_failed_attempt(fake, repository):
    _, told = run(fake, repository)
    Path(told["path"]).mkdir()
    Path(told["path"], "theirs").touch()
    done = fake.task(workspace_path=str(repository), worktree=True).call()
    assert done.returncode == 1 and "already exists" in done.stderr
    assert len(fake.calls()) == 1


def test_the_real_claude_code_asks_and_goes_on_in_its_worktree(claude):
    git(claude.workspace, "init", "-q")
    git(claude.workspace, "commit", "-q", "--allow-empty", "-m", "first")
    claude.answer("tool", commands=["touch one"], text="I may not.")
    task = claude.task(worktree=True)
    asked = task.run()
    assert asked.returncode == 75, asked.stderr
    task.envelope["data"] |= json.loads(asked.stdout)["data"]
    claude.answer("tool", commands=[None, "touch one"], text="Done.")
    done = task.run()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["worktree"]
    assert told["why"] == "1 file not committed" and Path(told["path"], "one").exists()
    assert len(claude.sessions()) == 1 and not (claude.workspace / "one").exists()
