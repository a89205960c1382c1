"""The git worktree of a claude task with `"worktree": true`.

It lies beside the repository and is named after the task, so each run of the task finds it again.
When the task is done it goes, unless it holds work: a file that is not committed, or a commit.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from taskqueue.text import plural

# The commit that the worktree began with. Only the worktree sees such a ref, and it goes with it.
BASE = "refs/worktree/tq-base"
NAME_CHARACTERS = 40


class NoWorktree(Exception):
    """The worktree cannot be made; the message says why. `is_final`: no retry helps."""

    def __init__(self, why: str, is_final: bool = False) -> None:
        super().__init__(why)
        self.is_final = is_final


class Worktree(NamedTuple):
    """A worktree, its branch, the directory in it that stands for the workspace, and its repository."""

    path: Path
    branch: str
    workspace: Path
    repository: Path


def git(directory: Path, *words: str | Path) -> str:
    """Return the output of a git command in a directory. Raises NoWorktree."""
    # A worker that was started by a hook of git has variables that name that repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", directory, *words], env=env, capture_output=True, check=True
        )
    except OSError as error:
        raise NoWorktree(f"git could not be run: {error.strerror}") from None
    except subprocess.CalledProcessError as failed:
        said = failed.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NoWorktree(f"git {words[0]}: {said[-1] if said else failed.returncode}") from None
    return os.fsdecode(done.stdout).removesuffix("\n")


def worktree_for(workspace: Path, task_id: str, session: str) -> Worktree:
    """Return the task's worktree, made if it is not there. Raises NoWorktree.

    `session` tells tasks apart that have one id, one after the other.
    """
    try:
        repository = Path(git(workspace, "rev-parse", "--show-toplevel"))
        git(workspace, "rev-parse", "--verify", "--quiet", "HEAD")
    except NoWorktree as none:
        why = f"no worktree of {workspace}: it is not in a git repository with a commit ({none})"
        raise NoWorktree(why, is_final=True) from None
    words = re.sub(r"[^A-Za-z0-9]+", "-", task_id)[:NAME_CHARACTERS].strip("-") or "task"
    name = f"{words}-{session[:8]}"
    path, branch = repository.with_name(f"{repository.name}-{name}"), f"tq/{name}"
    found = Worktree(path, branch, path / git(workspace, "rev-parse", "--show-prefix"), repository)
    if not (path / ".git").is_file():
        make(found)
    # A folder without a committed file is not in the worktree yet.
    found.workspace.mkdir(parents=True, exist_ok=True)
    return found


def make(worktree: Worktree) -> None:
    """Make the worktree, on its branch if that is left of an earlier one. Raises NoWorktree."""
    repository, branch = worktree.repository, worktree.branch
    git(repository, "worktree", "prune")
    is_known = bool(git(repository, "branch", "--list", branch))
    how = [worktree.path, branch] if is_known else ["--no-track", "-b", branch, worktree.path]
    git(repository, "worktree", "add", *how)
    if not is_known:
        git(worktree.path, "update-ref", BASE, "HEAD")


def remove_if_clean(worktree: Worktree) -> dict:
    """Remove a worktree that holds no work; return what became of it, for the task's result."""
    told = {"path": str(worktree.path), "branch": worktree.branch, "removed": False}
    try:
        why = work_in(worktree.path, worktree.branch)
        if why is None:
            git(worktree.repository, "worktree", "remove", worktree.path)
            git(worktree.repository, "branch", "--delete", "--force", worktree.branch)
            return told | {"removed": True}
    except NoWorktree as error:
        why = str(error)
    return told | {"why": why}


def work_in(path: Path, branch: str) -> str | None:
    """Return what a worktree holds that its removal would lose, or None. Raises NoWorktree."""
    changed = git(path, "status", "--porcelain", "--untracked-files=all").splitlines()
    if changed:
        return f"{plural(len(changed), 'file')} not committed"
    # The branch may have commits that the worktree was taken away from.
    count = int(git(path, "rev-list", "--count", "HEAD", branch, f"^{BASE}"))
    return plural(count, "new commit") if count else None
