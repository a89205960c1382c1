"""Decide whose a task is: the directory and the project that it was enqueued for.

A task belongs to the project whose hook enqueued it, else to its directory and to the project around
that. A git worktree is a workspace of its own; a submodule is a part of its project. Paths are bytes,
since a directory's name need not be Unicode.
"""

from __future__ import annotations

import functools
import os
import re
from collections import namedtuple

# SQL: (project, directory) of a task as it was enqueued. A task that a handler's output enqueued has
# those of the handler's own task, in "source".
DIRECTORIES = """
case when json_type(data, '$.source') = 'object' and json_type(data, '$.data') = 'object'
  then json_extract(data, '$.source.project_dir')
  else coalesce(json_extract(data, '$.data.project_dir'), json_extract(data, '$.project_dir')) end,
case when json_type(data, '$.source') = 'object' and json_type(data, '$.data') = 'object'
  then json_extract(data, '$.source.workspace_path')
  else coalesce(json_extract(data, '$.data.workspace_path'), json_extract(data, '$.data.cwd'),
                json_extract(data, '$.workspace_path'), json_extract(data, '$.cwd')) end"""

# The audience of a report: the name of its mark, its directory, and whether Claude Code named the
# project.
Reader = namedtuple("Reader", "name directory has_project")


def session(project_dir: str, cwd: str) -> Reader:
    """Return the reader that a session is, or a person, who has no project_dir."""
    # A name that is not Unicode cannot be in the database.
    project, here = (
        real(path.encode(errors="replace").decode().encode()) for path in (project_dir, cwd)
    )
    directory = worktree_of(here) or project or here
    return Reader(as_text(directory), directory, bool(project))


def hears(reader: Reader, project: bytes | None, directory: bytes | None) -> bool:
    """Return whether the reader hears of a task that was enqueued for this project and directory."""
    here = directory_of(project, directory)
    worktree = worktree_of(here)
    if reader.directory == (worktree or real(project or b"") or here):
        return True
    # A task that was enqueued by hand names no project: it belongs to the one around its directory.
    is_open = not project or not reader.has_project
    return is_open and is_within(worktree or here, reader.directory)


def readers_of(project: bytes | None, directory: bytes | None) -> list[bytes]:
    """Return the directories of the sessions that a task belongs to, the nearest first.

    The list is empty for a task that belongs to nobody.
    """
    here = directory_of(project, directory)
    if not os.path.isabs(here):
        return []
    place = worktree_of(here) or real(project or b"") or here
    places = [place]
    while not project and not begins_checkout(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
        places.append(place)
    return places


def directory_of(project: bytes | None, directory: bytes | None) -> bytes:
    """Return the one identity of the directory that a task was enqueued for; b"" for none."""
    return real(directory or project or b"")


def relative(directory: bytes, to: bytes) -> str:
    """Return a directory's name for its reader; "" for the reader's own directory."""
    if not directory or directory == to:
        return ""
    inside = directory.startswith(to.rstrip(b"/") + b"/")
    return as_text(os.path.relpath(directory, to) if inside else directory)


@functools.cache
def is_within(directory: bytes, project: bytes) -> bool:
    """Return whether a directory is the project's or below it, and in no checkout of its own there."""
    while directory != project:
        if directory == os.path.dirname(directory) or begins_checkout(directory):
            return False
        directory = os.path.dirname(directory)
    return True


@functools.cache
def worktree_of(directory: bytes) -> bytes | None:
    """Return the git worktree around a directory, or None; the main checkout is no worktree."""
    while not (kind := begins_checkout(directory)):
        if directory == os.path.dirname(directory):
            return None
        directory = os.path.dirname(directory)
    return directory if kind == "worktree" else None


@functools.cache
def begins_checkout(directory: bytes) -> str | None:
    """Return "main" or "worktree" if a checkout begins at the directory, else None."""
    git = os.path.join(directory, b".git")
    try:
        if os.path.isdir(git):
            return "main"
        with open(os.open(git, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            is_worktree = re.match(rb"gitdir: .*/worktrees/[^/\n]+\n?$", file.read(5000))
            return "worktree" if is_worktree else None
    # Most directories have no .git. ValueError: a task's path may hold a NUL.
    except (OSError, ValueError):
        return None


@functools.cache
def real(path: bytes) -> bytes:
    """Return the directory that a path names, without symbolic links and a slash at its end."""
    try:
        return os.path.realpath(path) if os.path.isabs(path) else path
    # ValueError: a task's path may hold a NUL.
    except (OSError, ValueError):
        return path


def as_text(path: bytes) -> str:
    return path.decode("utf-8", "replace")
