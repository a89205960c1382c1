"""handlers/link_validation in workspaces that want to choose a program, a file outside of them, or
a server.
"""

# ruff: noqa: F811 -- fixtures are imported, and named again where they are used

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import wait_for
from link_check import (  # noqa: F401
    broken,
    check,
    git,
    not_obeyed,
    report,
    skipped,
    waiting_lychee,
    with_limits,
    workspace,
    write,
)

from taskqueue.lychee import lychee_binary, read_settings
from taskqueue.markdown import markdown_files


@pytest.fixture
def trap(tmp_path):
    """A program that must not run: trap.path, and trap.sprung()."""

    class Trap:
        path = tmp_path / "a trap"
        sprung = (tmp_path / "sprung").exists

    Trap.path.write_text(f"#!/bin/sh\ntouch '{tmp_path}/sprung'\necho '{{}}'\n")
    Trap.path.chmod(0o755)
    return Trap


# ----------------------------------------------------------------------------------------------------------- programs


def test_a_repository_has_no_program_of_its_own_run(workspace, check, trap, tmp_path):
    """git would run one to list files, and another to fetch a .gitignore that is not there."""
    write(workspace, README="[x](missing.md)", left="[x](missing.md)")
    (workspace / ".gitignore").write_text("left.md\n")
    (tmp_path / "everything").write_text("*\n")
    git(workspace, "init")
    (workspace / "git").symlink_to(trap.path)
    for key in (
        "core.fsmonitor",
        "core.pager",
        "core.sshCommand",
        "filter.x.process",
        "diff.external",
    ):
        git(workspace, "config", key, f"'{trap.path}'")
    (workspace / ".gitattributes").write_text("* filter=x\n")
    settings = {"core.hooksPath": tmp_path, "core.worktree": "/", "remote.o.uploadpack": f"'{trap.path}'",
                "core.excludesFile": tmp_path / "everything", "include.path": tmp_path / "everything"}  # fmt: skip
    for key, value in settings.items():
        git(workspace, "config", key, str(value))
    if os.geteuid() == 0:
        # git distrusts a repository of another user.
        for path in (workspace, *workspace.rglob("*")):
            os.chown(path, 12345, 12345)
    done = check(path=[workspace, ".", ""])
    assert not trap.sprung() and broken(done) == [("README.md", "missing.md")]


# --------------------------------------------------------------------------------------------- what .gitignore means

PATTERNS = """
*.md  docs/  /docs  docs/*.md  **/b  b/**  a/**/b  a/**/b/  **/a/**  !keep.md  *  !*/  !a.md  \\!bang.md  \\#hash.md
[ab].md  [!a].md  [^a]*  [a-c]?  []a].md  [a  a\\  ?.md  a*b*c  **  /**  **/  a**b  /*  !/a  /a/*  !/a/b
*.MD  a/  a.md/  //a  a//b  /  ./a  ../a  a/.  [z-a]  {a,b}.md  a\\*b  "a b  "  a\\ \\ 
""".split("  ")


def ignored_by_git(folder, paths):
    """Those that git would not list, by git's own words."""
    git(folder, "init", "-q")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--others", "--exclude-standard"],
        cwd=folder,
        capture_output=True,
        check=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent)},
    ).stdout
    return set(paths) - set(os.fsdecode(listed).split("\0"))


def test_a_gitignore_means_what_it_means_to_git(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("a", "b", "c", "docs", "a.md", "b.md", "c.md", "keep.md", "!bang.md", "#hash.md", "abc", "axbyc.md", "].md", "a b",
             "a*b.md", "ü.md")  # fmt: skip
    folders = ("", "a/", "b/", "docs/", "a/b/", "a/docs/", "a/b/a/", "docs/a/b/")
    files = [name + ("" if name.endswith(".md") else "/page.md") for name in names]
    paths = {folder + name for folder in folders for name in files}
    repository = tmp_path / "repository"
    for path in paths:
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text("")
    single = [pattern.strip("\n") for pattern in PATTERNS if pattern.strip("\n")]
    pairs = itertools.permutations(single[:20:2] + single[1:20:4], 2)
    for text in (*single, *map("\n".join, pairs), "\ufeff*.md", "a\r\nb.md\r\n", "b.md \n"):
        (repository / ".gitignore").write_text(text, newline="")
        ignored = ignored_by_git(repository, paths)
        assert paths - set(markdown_files(str(repository), print)) == ignored, repr(text)


def test_rules_hold_from_the_repository_s_root_down(tmp_path, workspace, check):
    pages = (
        "a",
        "docs/a",
        "docs/b",
        "docs/in/a",
        "docs/in/b",
        "docs/in/c",
        "excluded",
        "docs/mine",
    )
    write(workspace, **{name: "[x](missing.md)" for name in pages})
    git(workspace, "init")
    (workspace / ".gitignore").write_text("/a.md\ndocs/in/b.md\n")
    (workspace / "docs" / ".gitignore").write_text("/b.md\n")
    (workspace / "docs" / "in" / ".gitignore").write_text("!b.md\nc.md\n")
    (workspace / ".git" / "info" / "exclude").write_text("excluded.md\n")
    (tmp_path / "home" / ".config" / "git").mkdir(parents=True)
    (tmp_path / "home" / ".config" / "git" / "ignore").write_text("mine.md\n")
    kept = [(f"docs/{name}.md", "missing.md") for name in ("a", "in/a", "in/b")]
    assert broken(check()) == kept
    below = [(file.removeprefix("docs/"), link) for file, link in kept]
    assert broken(check({"workspace_path": str(workspace / "docs")})) == below


def test_other_repositories_inside_are_left_out_but_a_folder_of_repositories_is_not(
    workspace, check
):
    for name in ("one", "two"):
        write(workspace, **{f"{name}/page": "[x](missing.md)", f"{name}/left": "[x](missing.md)"})
        git(workspace / name, "init")
        (workspace / name / ".gitignore").write_text("left.md\n")
    write(workspace, left="[x](missing.md)")
    (workspace / ".gitignore").write_text("left.md\n")
    expected = [(name, "missing.md") for name in ("left.md", "one/page.md", "two/page.md")]
    assert broken(check()) == expected
    git(workspace, "init")
    assert broken(check()) == []


def test_a_linked_worktree_is_a_repository_and_names_no_other_place(tmp_path, workspace, check):
    write(workspace, **{"left": "[x](missing.md)", "page": "[x](missing.md)"})
    (workspace / ".gitignore").write_text("left.md\n")
    os.mkfifo(tmp_path / "exclude")
    (workspace / ".git").write_text(f"gitdir: {tmp_path}\n")
    assert broken(check()) == [("page.md", "missing.md")]


def test_hostile_rules_end_the_check_with_a_reason(workspace, check, with_limits):
    write(workspace, **{"a" * 250: "[x](missing.md)"})
    git(workspace, "init")
    (workspace / ".gitignore").write_text("*a" * 100 + "*b\n")
    done = check(handler=with_limits(WALK_SECONDS=1))
    assert (done.returncode, done.stdout) == (65, b"")
    assert f"{workspace} is too big: its files cannot be listed in 1 s" in done.words


ODD = {
    "outside": lambda path, outside: path.symlink_to(outside),
    "pipe": lambda path, outside: os.mkfifo(path),
    "device": lambda path, outside: path.symlink_to("/dev/zero"),
    "folder": lambda path, outside: path.mkdir(),
    "huge": lambda path, outside: path.write_text("#" * 2**21 + "\nmissing\n"),
}


@pytest.mark.parametrize("kind", ODD)
def test_settings_that_are_no_plain_file_are_not_read_and_said_so(tmp_path, workspace, check, kind):
    write(workspace, README="[x](missing.md)")
    git(workspace, "init")
    outside = tmp_path / "outside"
    for name, text in {".gitignore": "*\n", "lychee.toml": "exclude = ['missing']\n"}.items():
        outside.write_text(text)
        ODD[kind](workspace / name, outside)
        done = check()
        assert broken(done) == [("README.md", "missing.md")]
    assert (list(skipped(done)), list(not_obeyed(done))) == ([".gitignore"], ["lychee.toml"])
    # lychee opens this one by itself.
    outside.write_text("missing\n")
    ODD[kind](workspace / ".lycheeignore", outside)
    done = check()
    assert (done.returncode, done.stdout) == (65, b"")
    assert f"lychee's settings in {workspace}/.lycheeignore are not read: " in done.words


def test_a_repository_s_own_folder_is_not_left_through_a_link(tmp_path, workspace, check):
    write(workspace, README="[x](missing.md)")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "exclude").write_text("*\n")
    (workspace / ".git").mkdir()
    (workspace / ".git" / "info").symlink_to(tmp_path / "elsewhere")
    assert broken(check()) == [("README.md", "missing.md")]


def test_a_lycheeignore_that_is_swapped_meanwhile_makes_no_result(tmp_path, workspace):
    (workspace / ".lycheeignore").write_text("nothing\n")
    (tmp_path / "outside").write_text("missing\n")
    with waiting_lychee(workspace, tmp_path) as (handler, finish, _):
        (workspace / "swap").symlink_to(tmp_path / "outside")
        os.replace(workspace / "swap", workspace / ".lycheeignore")
        output, words = finish()
    assert handler.returncode in (65, 75) and output == b"" and b".lycheeignore" in words


# ---------------------------------------------------------------------------------------------------- lychee's settings

# lychee's options that are no settings, and those whose values are tested below.
NO_SETTINGS = {"base", "config", "generate", "help", "version", "quiet"}
OBEYED = {
    "accept": ["200..=204", 429], "accept_timeouts": True, "exclude": ["nothing"], "exclude_all_private": True,
    "exclude_link_local": False, "exclude_loopback": False, "exclude_path": ["nothing"], "exclude_private": True,
    "fallback_extensions": ["htm"], "host_concurrency": 2, "include": ["nothing"], "include_mail": False,
    "include_verbatim": False, "index_files": ["."], "max_concurrency": 9, "max_redirects": 3, "method": "head",
    "min_tls": "TLSv1_2", "offline": True, "require_https": True, "root_dir": ".", "scheme": ["file"], "threads": 1,
    "timeout": 5,
}  # fmt: skip
# An unknown name is one that a later lychee dropped, or has not heard of yet.
REFUSED = ("preprocess", "cache", "cookie_jar", "output", "files_from", "include_fragments", "header", "hosts", "remap",
           "insecure", "base_url", "dump", "max_retries", "progress", "exclude_mail", "generate", "\x7f\x1b")  # fmt: skip


def test_harmless_settings_are_obeyed_and_all_others_named(workspace, check, trap):
    write(workspace, README="[x](missing.md)")
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in OBEYED.items())
    (workspace / "lychee.toml").write_text(text)
    done = check()
    assert (not_obeyed(done), broken(done)) == ({}, [("README.md", "missing.md")])
    help_text = subprocess.run([lychee_binary(), "--help"], capture_output=True, text=True).stdout
    known = re.findall(r"^ +(?:-\w, |    )?--([a-z-]+)", help_text, re.MULTILINE)
    known = {name.replace("-", "_") for name in known} - NO_SETTINGS
    assert known > set(OBEYED)
    refused = {*known - set(OBEYED), *REFUSED}
    values = {name: "x" for name in refused - {"hosts", "preprocess"}}
    values |= {"cache": True, "output": str(workspace / "out")}
    text = "".join(f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in values.items())
    text += f"[hosts.a]\nheaders = {{a = 'b'}}\n[preprocess]\ncommand = {str(trap.path)!r}\n"
    (workspace / "lychee.toml").write_text(text.replace("\x7f", "\\u007f"))
    done = check()
    assert set(not_obeyed(done)) == refused and not trap.sprung() and all(not_obeyed(done).values())
    assert f"`cache` in {workspace}/lychee.toml is not obeyed: " in done.words
    assert broken(done) == [("README.md", "missing.md")]
    assert sorted(os.listdir(workspace)) == ["README.md", "lychee.toml"]


@pytest.mark.parametrize("name, text", [
    ("pyproject.toml", "[tool.lychee]\nexclude = ['missing']\n"),
    ("Cargo.toml", "[workspace.metadata.lychee]\nexclude = ['missing']\n"),
    ("package.json", '{"lychee": {"exclude": ["missing"]}}'),
    ("lychee.toml", "this is not TOML"),
    ("lychee.toml", "exclude = " + "[" * 100_000),
])  # fmt: skip
def test_a_file_whose_settings_are_not_obeyed_is_named(workspace, name, text):
    (workspace / name).write_text(text)
    obeyed, [refused] = read_settings(str(workspace))
    assert (obeyed, refused["setting"]) == ({}, name) and refused["reason"]


def test_a_setting_with_a_wrong_value_is_not_obeyed(workspace):
    wrong = {"exclude": "missing", "include": [[7]], "scheme": [True], "timeout": "5", "threads": 0, "include_mail": 1,
             "max_redirects": True, "host_concurrency": 10**9, "offline": 3, "accept": 1.5, "method": "post"}  # fmt: skip
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in wrong.items())
    (workspace / "lychee.toml").write_text(text)
    obeyed, refused = read_settings(str(workspace))
    assert obeyed == {} and {setting["setting"] for setting in refused} == set(wrong)


@pytest.mark.parametrize("text, expected", [
    ("include = ['gone']\nexclude = ['.']", ["gone.md", "gone.md"]),
    ("exclude_path = ['docs/']", ["gone.md", "html"]),
    ("scheme = ['http']", ["gone.md", "gone.md", "html"]),
    ("fallback_extensions = ['html']", ["gone.md", "gone.md"]),
    ("index_files = ['README.md']", ["docs", "gone.md", "gone.md", "html"]),
    ("exclude = " + json.dumps(["x" * 1000] * 200 + ["html", "\x7f\0☃"]), ["gone.md", "gone.md"]),
    ("include_verbatim = true", ["code.md", "gone.md", "gone.md", "html"]),
])  # fmt: skip
def test_what_is_obeyed_has_its_effect(workspace, check, text, expected):
    page = "[x](gone.md) [y](html) [z](docs)\n\n    [c](code.md) file:///code.md\n"
    write(workspace, **{"README": page, "docs/a": "[x](gone.md)"})
    (workspace / "html.html").write_text("x")
    (workspace / "lychee.toml").write_text(text.replace("\x7f", "\\u007f"))
    done = check()
    assert sorted(name for _, name in broken(done)) == expected
    assert done.summary["not_obeyed"] == []


def lychee_of(session):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text() == "lychee\n" and os.getsid(
                int(folder.name)
            ) == session:
                return folder
        except OSError:
            continue
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_environment_of_a_session_is_not_handed_on(tmp_path, workspace):
    env = {"GITHUB_TOKEN": "t", "https_proxy": "", "RUST_LOG": "trace", "LYCHEE_USE_HTML5EVER": "1", "TASK_ID": "7",
           "CLAUDE_PID": "1", "SSLKEYLOGFILE": str(tmp_path / "keys"), "MALLOC_CONF": "x"}  # fmt: skip
    with waiting_lychee(workspace, tmp_path, env=env) as (handler, finish, _):
        lychee = wait_for(lambda: lychee_of(handler.pid), what="lychee")
        names = {line.partition(b"=")[0] for line in (lychee / "environ").read_bytes().split(b"\0")}
        output, words = finish()
    assert handler.returncode == 0, words
    ours = {b"NO_COLOR", b"RUST_BACKTRACE", b"RUST_LIB_BACKTRACE"}
    assert names - {b""} == {b"GITHUB_TOKEN", b"https_proxy", *ours}
    assert json.loads(output)["successful"] == 1


# ----------------------------------------------------------------------------------------------------- files elsewhere


def test_nothing_outside_is_read_as_a_page(tmp_path, workspace, check):
    secret = tmp_path / "secret.md"
    secret.write_text("[secret](words.md)")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", page="[secret](words.md)")
    write(workspace, **{"new\nline": "[x](missing.md)"})
    for name in ("page.md", "new\tline.md", "new\vline.md"):
        (workspace / name).symlink_to(secret)
    (workspace / "folder").symlink_to(tmp_path / "folder")
    (workspace / "zero.md").symlink_to("/dev/zero")
    os.mkfifo(workspace / "pipe.md")
    with open(workspace / "huge.md", "wb") as huge:
        huge.truncate(2**40)
    done = check()
    assert broken(done) == [("new\nline.md", "missing.md")]
    assert "words" not in json.dumps([done.summary, report(done)])
    assert skipped(done) == {"huge.md": "it has more than 2097152 bytes"}


def test_where_a_link_leads_is_looked_up_but_never_read(tmp_path, workspace, check):
    """Whether a target exists is what a link check is about; the report is the user's alone."""
    os.mkfifo(tmp_path / "pipe")
    page = f"[a](../pipe#x) [b](file://{tmp_path}/pipe#y) [c](../gone.md) [d](file:///dev/zero#z)"
    write(workspace, README=page)
    (workspace / "lychee.toml").write_text("include_fragments = 'full'\n")
    done = check()
    assert broken(done) == [("README.md", "gone.md")]
    assert list(not_obeyed(done)) == ["include_fragments"]


@pytest.mark.parametrize("value", ["..", "/", "/etc", "out", "../workspace-2", 7, "", "a\0b"])
def test_roots_outside_of_the_workspace_are_refused(tmp_path, workspace, value):
    (workspace / "out").symlink_to(tmp_path)
    (tmp_path / "workspace-2").mkdir()
    (workspace / "lychee.toml").write_text(f"root_dir = {json.dumps(value)}\n")
    obeyed, [refused] = read_settings(str(workspace))
    assert (obeyed, refused["setting"]) == ({}, "root_dir")
    assert refused["reason"] == "it must lie inside of the workspace"


# ----------------------------------------------------------------------------------------------------------- the report


def test_a_folder_that_becomes_a_symbolic_link_meanwhile_leads_nowhere(tmp_path, workspace):
    (workspace / "out").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "links.json").write_text("precious")
    results = {"results_file": "out/links.json"}
    with waiting_lychee(workspace, tmp_path, results) as (handler, finish, _):
        os.rename(workspace / "out", workspace / "moved")
        (workspace / "out").symlink_to(outside)
        _, words = finish()
    assert handler.returncode == 0, words
    assert os.listdir(outside) == ["links.json"]
    assert (outside / "links.json").read_text() == "precious"
    assert os.listdir(workspace / "moved") == ["links.json"]


def test_the_state_directory_s_folders_are_not_taken_through_links(tmp_path, workspace, check):
    (tmp_path / "state").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state" / "reports").symlink_to(tmp_path / "elsewhere")
    done = check()
    assert done.returncode == 1 and os.listdir(tmp_path / "elsewhere") == []


# --------------------------------------------------------------------------------------------------------- what is said

STEERING = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\x7f\u202e\u200b"


def test_what_would_steer_a_terminal_never_reaches_it(workspace, check):
    name = f"a{STEERING}"
    write(workspace, **{name: f"[x](<missing{STEERING}.md>)"})
    (workspace / f"latin{STEERING}.md").write_bytes(b"caf\xe9")
    (workspace / "lychee.toml").write_text("cache = true\n")
    done = check()
    assert done.summary["broken"][0]["file"] == f"{name}.md" and "\\x1b" in done.summary["summary"]
    (workspace / "lychee.toml").write_text(f'{json.dumps(STEERING)} = 1\nexclude = ["("]\n')
    wrong = check()
    assert wrong.returncode == 65 and "\\x1b" in wrong.words
    refused = check({"workspace_path": f"/nowhere{STEERING}"})
    assert refused.returncode == 65
    for text in (done.stdout.decode(), done.words, wrong.words, refused.words):
        steers = [char for char in text if char in STEERING and not char.isprintable()]
        assert not steers, text
