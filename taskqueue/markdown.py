"""Find the Markdown files of a workspace that is not trusted.

This runs no program and follows no symbolic link. Outside of the workspace's repository, it reads
only the user's own rules of git.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

SUFFIXES = (".md", ".markdown", ".mdx", ".mkd", ".mkdn", ".mkdown", ".mdown", ".mdwn")
# Folders of these names are left out, and so are all names with a leading dot.
LEFT_OUT = ("node_modules", "site-packages")
FILE_BYTES = 2 * 2**20
RULES_BYTES = 2**20
# For each file of rules: the length of its folder's path, and pathspec's GitIgnoreSpec.
Levels = list[tuple]


class Unfit(Exception):
    """A file or a setting of the workspace is not used; the message is the reason."""


def markdown_files(workspace: str, skip: Callable[[str, str], None]) -> dict[str, int]:
    """Return the sizes of the files to check; call skip(path, reason) for those that cannot be.

    Neither lychee nor git lists the files: lychee's walk stops at the first folder that it may not
    read, and git runs programs that a repository's settings name. As with lychee, a file that
    .gitignore matches is left out, tracked or not. Raises OSError if the workspace cannot be read.
    """
    root, prefix = repository_of(workspace)
    files: dict[str, int] = {}
    waiting = [(prefix, rules_above(root, prefix, skip))]
    while waiting:
        # Paths in here are relative to the root.
        folder, levels = waiting.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as listing:
                entries = {entry.name: entry for entry in listing}
        except OSError as error:
            if folder == prefix:
                raise
            skip(folder[len(prefix) : -1], str(error.strerror))
            continue
        if ".git" in entries and levels is not None and folder != prefix:
            continue  # It is another repository.
        if ".git" in entries or levels is not None:
            levels = with_rules_of(root, folder, levels or [], skip)
        for name, entry in entries.items():
            is_folder = entry.is_dir(follow_symlinks=False)
            path = f"{folder}{name}/" if is_folder else folder + name
            if name.startswith(".") or name in LEFT_OUT or is_ignored(path, levels):
                continue
            if is_folder:
                waiting.append((path, levels))
            elif name.lower().endswith(SUFFIXES) and entry.is_file(follow_symlinks=False):
                if reason := why_not_checked(entry, path[len(prefix) :]):
                    skip(path[len(prefix) :], reason)
                else:
                    files[path[len(prefix) :]] = entry.stat(follow_symlinks=False).st_size
    return files


def why_not_checked(entry: os.DirEntry, path: str) -> str | None:
    """Return the reason why a file cannot be checked, or None."""
    if os.fsencode(path).decode("utf-8", "replace") != path:
        return "its name is not UTF-8"
    if not os.access(entry.path, os.R_OK):
        return "Permission denied"
    size = entry.stat(follow_symlinks=False).st_size
    return f"it has more than {FILE_BYTES} bytes" if size > FILE_BYTES else None


def repository_of(workspace: str) -> tuple[str, str]:
    """Return the root of the repository around the workspace, and the path from there to it.

    The path ends in a slash. Without a repository, the root is the workspace and the path is empty.
    """
    root = workspace = os.path.realpath(workspace)
    while not os.path.lexists(os.path.join(root, ".git")):
        if root == os.path.dirname(root):
            return workspace, ""
        root = os.path.dirname(root)
    inside = os.path.relpath(workspace, root)
    return root, "" if inside == "." else f"{inside}/"


def rules_above(root: str, prefix: str, skip: Callable) -> Levels | None:
    """Return the rules from above the workspace; None outside of a repository, where no rules count."""
    if not prefix:
        return [] if os.path.lexists(os.path.join(root, ".git")) else None
    levels, folder = [], ""
    for name in prefix.split("/")[:-1]:
        levels = with_rules_of(root, folder, levels, skip)
        folder += f"{name}/"
        # A person who names an ignored workspace wants its files checked.
        if is_ignored(folder, levels):
            return []
    return levels


def with_rules_of(root: str, folder: str, levels: Levels, skip: Callable) -> Levels:
    """Return the rules and those of a folder; at a repository's root, the user's own come first."""
    length, place = len(in_bytes(folder)), os.path.join(root, folder)
    git = os.path.join(place, ".git")
    if os.path.lexists(git):
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        own = rules_in(os.path.join(config, "git", "ignore"), lambda *_: None)
        levels = [*levels, (length, own)]
        # In a linked worktree, .git is a file that names a folder somewhere else.
        if all(
            stat.S_ISDIR(os.lstat(p).st_mode) for p in (git, f"{git}/info") if os.path.exists(p)
        ):
            levels.append((length, rules_in(f"{git}/info/exclude", skip)))
    return [*levels, (length, rules_in(os.path.join(place, ".gitignore"), skip))]


def rules_in(path: str, skip: Callable):
    """Return a file's rules as a GitIgnoreSpec, without lines that pathspec does not understand."""
    from pathspec import GitIgnoreSpec

    try:
        content = read_plain(path, RULES_BYTES) or b""
    except Unfit as unfit:
        skip(path, str(unfit))
        content = b""
    lines = []
    for line in content.removeprefix(b"\xef\xbb\xbf").decode("latin-1").split("\n"):
        line = line.removesuffix("\r")
        # a/** matches everything inside of a. pathspec would match a itself.
        line += "/*" if line.endswith("/**") else ""
        try:
            GitIgnoreSpec.from_lines([line])
            lines.append(line)
        except (ValueError, re.error):
            pass
    return GitIgnoreSpec.from_lines(lines)


def is_ignored(path: str, levels: Levels | None) -> bool:
    """Return whether the rules ignore a path: the last match in the nearest folder decides."""
    path = in_bytes(path)
    for length, rules in reversed(levels or ()):
        verdict = rules.check_file(path[length:]).include
        if verdict is not None:
            return verdict
    return False


def in_bytes(path: str) -> str:
    """Return one character for each byte, because git's patterns are about bytes."""
    return os.fsencode(path).decode("latin-1")


def read_plain(path: str, limit: int) -> bytes | None:
    """Return a file's content, or None if it does not exist. Raises Unfit if it is no small file."""
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise Unfit("it is a symbolic link, which is not followed")
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unfit("it is not a file")
            content = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unfit(str(error.strerror)) from None
    if len(content) > limit:
        raise Unfit(f"it has more than {limit} bytes")
    return content
