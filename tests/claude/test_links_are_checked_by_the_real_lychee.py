"""handlers/link_validation checks the links of a workspace with the real lychee."""

# ruff: noqa: F811 -- fixtures are imported, and named again where they are used

import http.server
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import without_overrides
from link_check import (  # noqa: F401
    HANDLER,
    ROOT,
    UV,
    UV_CACHE,
    broken,
    check,
    git,
    not_obeyed,
    refused,
    report,
    skipped,
    waiting_lychee,
    with_limits,
    workspace,
    write,
)

# -------------------------------------------------------------------------------------------------------- the result


def test_a_broken_link_is_found_and_is_no_failure(workspace, check):
    write(workspace, README="# Hello\n\n[here](good.md)\n[gone](missing.md)\n", good="# Good\n")
    done = check()
    assert done.returncode == 0
    summary = done.summary
    assert done.stdout.count(b"\n") == 1
    counts = [summary[name] for name in ("files", "total", "successful", "failed", "excluded")]
    assert (counts, summary["skipped"], summary["online"]) == ([2, 2, 1, 1, 0], [], False)
    (link,) = summary["broken"]
    gone = ("README.md", 4, f"file://{workspace}/missing.md")
    assert (link["file"], link["line"], link["url"]) == gone
    assert "not found" in link["reason"]
    assert summary["workspace_path"] == str(workspace)
    assert summary["summary"] == "1 broken link: README.md:4 → missing.md"
    assert report(done)["total"] == 2
    assert 0 < summary["seconds"] < 30


def test_the_results_file_is_the_whole_report_of_lychee(workspace, check):
    write(workspace, README="".join(f"[{n}](missing-{n}.md)\n" for n in range(200)))
    (workspace / "out").mkdir()
    done = check({"workspace_path": str(workspace), "results_file": "out/links of today.json"})
    whole = json.loads((workspace / "out" / "links of today.json").read_text())
    assert (whole["total"], whole["errors"]) == (200, 200)
    assert len(whole["error_map"]["README.md"]) == 200
    assert (done.summary["failed"], len(done.summary["broken"])) == (200, 50)
    assert sorted(os.listdir(workspace)) == ["README.md", "out"]
    assert os.listdir(workspace / "out") == ["links of today.json"]


def test_the_summary_fits_into_the_history_whatever_the_names_are(workspace, check):
    deep = workspace / "/".join(["ü" * 120] * 6)
    deep.mkdir(parents=True)
    for number in range(60):
        (deep / f"{number}.md").write_text("[x](missing.md)")
        (deep / f"{number}-latin.md").write_bytes(b"caf\xe9")
    done = check()
    assert done.summary["failed"] == 60
    assert 5 < len(done.summary["broken"]) < 50
    assert len(done.stdout) < 65_536


def test_the_report_goes_to_the_state_directory_unless_a_file_is_named(tmp_path, workspace, check):
    write(workspace, README="[x](missing.md)")
    namesake = tmp_path / "other" / "workspace"
    namesake.mkdir(parents=True)
    for task, total in (
        ({"workspace_path": str(workspace), "results_file": None}, 1),
        ({"workspace_path": str(namesake)}, 0),
    ):
        done = check(task, preexec_fn=lambda: os.umask(0))
        place = Path(done.summary["results_file"])
        assert place.parent == tmp_path / "state" / "reports" / "link_validation"
        assert place.name.startswith("workspace-")
        assert report(done)["total"] == total
        for path in (place, *place.parents[:3]):
            assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path == place else 0o700), path
    assert len(os.listdir(place.parent)) == 2
    assert os.listdir(workspace) == ["README.md"]
    # The next check of a workspace replaces its report.
    check()
    assert len(os.listdir(place.parent)) == 2


def test_the_state_directory_is_the_default_one_or_absolute(tmp_path, workspace, check):
    done = check(env={"TASK_QUEUE_STATE": ""})
    default = f"{tmp_path}/home/.claude/automation/lychee/state/reports/link_validation/"
    assert done.summary["results_file"].startswith(default)
    done = check(env={"TASK_QUEUE_STATE": "state"})
    assert (done.returncode, done.stdout, os.listdir(workspace)) == (64, b"", [])
    assert "TASK_QUEUE_STATE" in done.words


@pytest.mark.parametrize("pages, line", [
    ({}, "all 0 links fine"),
    ({"README": "[a](README.md)"}, "the 1 link is fine"),
    ({"README": "[a](README.md) [b](README.md) [c](http://127.0.0.1:1/)"}, "all 2 links fine, 1 not checked"),
    ({"README": "\n\n[a](pier%20a.md)", "a": "[b](/x.md)"}, "2 broken links: README.md:3 → pier a.md; a.md:1 → x.md"),
])  # fmt: skip
def test_what_was_found_is_said_in_one_line(workspace, check, pages, line):
    (workspace / "main.c").write_text("/* [x](nope.md) */")
    write(workspace, **pages)
    done = check()
    assert (done.summary["summary"], done.summary["files"]) == (line, len(pages))


def test_the_one_line_is_bounded_and_says_what_was_not_read(workspace, check):
    write(workspace, **{f"{'a' * 200}{number}": "[x](" + "b" * 300 + ")" for number in range(60)})
    (workspace / "latin.md").write_bytes(b"caf\xe9")
    line = check().summary["summary"]
    assert line.startswith("60 broken links: aaa")
    assert line.endswith("; …; 1 file not read") and len(line) < 500


def test_absolute_links_start_at_the_repository_or_the_workspace(workspace, check):
    write(workspace, **{"docs/a": "[up](/README.md) [gone](/sub/missing.md)", "README": "x"})
    assert broken(check()) == [("docs/a.md", "missing.md")]
    # In a linked worktree, .git is a file.
    (workspace / ".git").write_text("gitdir: /nowhere\n")
    for folder in ("docs", "docs/"):
        done = check({"workspace_path": f"{workspace}/{folder}"})
        assert done.summary["summary"] == "1 broken link: a.md:1 → /sub/missing.md"


def test_a_base_url_hides_no_broken_link(workspace, check):
    write(workspace, README="[x](missing.md) [y](/missing.md)")
    for text in ("base_url = 'https://example.com/'", f"base_url = '{workspace}/'"):
        (workspace / "lychee.toml").write_text(text)
        done = check()
        assert (done.summary["failed"], list(not_obeyed(done))) == (2, ["base_url"])


def test_anchors_are_checked_when_the_task_asks_and_else_named_as_not_checked(
    workspace, check, refused
):
    write(workspace, README="[a](page.md#there) [b](page.md#gone) [c][undefined]", page="# There")
    done = check()
    assert done.summary["failed"] == 0
    not_checked = [said.split()[0] for said in done.summary["not_checked"]]
    assert not_checked == ["anchors", "undefined", "wiki"]
    done = check({"workspace_path": str(workspace), "include_fragments": True})
    assert broken(done) == [("README.md", "page.md#gone")]
    assert [said.split()[0] for said in done.summary["not_checked"]] == ["undefined", "wiki"]
    assert refused({"workspace_path": str(workspace), "include_fragments": "yes"})


@contextmanager
def web_server():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            code = self.path.strip("/").partition("?")[0]
            self.send_response(int(code) if code.isdigit() else 200 if code == "ok" else 404, "x")
            if code == "429":
                self.send_header("Retry-After", "3600")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_the_network_is_asked_only_when_told_so(workspace, check):
    (workspace / "lychee.toml").write_text("offline = false\nmax_retries = 0\n")
    with web_server() as (url, asked):
        write(workspace, README=f"[ok]({url}/ok) [gone]({url}/gone)")
        summary = check().summary
        counts = [summary[name] for name in ("excluded", "failed", "online")]
        assert (counts, asked) == ([2, 0, False], [])
        summary = check(env={"LYCHEE_ONLINE": "1"}).summary
        assert [summary[name] for name in ("successful", "failed", "online")] == [1, 1, True]
        [gone] = summary["broken"]
        assert gone["url"] == f"{url}/gone" and "404" in gone["reason"]
        assert set(asked) == {"/ok", "/gone"}


def test_a_server_that_refuses_leaves_a_link_unchecked_not_broken(workspace, check):
    codes = (401, 403, 404, 410, 429, 500, 503, 999)
    with web_server() as (url, _), socket.create_server(("127.0.0.1", 0)) as silent:
        links = [f"[x]({url}/{code})" for code in codes]
        links.append(f"[silent](http://127.0.0.1:{silent.getsockname()[1]}/)")
        write(workspace, README=" ".join([*links, f"[y]({url}/ok)"]))
        (workspace / "lychee.toml").write_text("timeout = 1\n")
        done = check(env={"LYCHEE_ONLINE": "1"})
    assert [name for _, name in broken(done)] == ["404", "410", "500"]
    assert (done.summary["unchecked"], done.summary["failed"], done.summary["total"]) == (6, 3, 10)
    assert len(done.summary["unchecked_links"]) == 6
    assert done.summary["summary"].endswith(", 6 could not be checked")


def test_a_server_that_wants_to_be_waited_for_keeps_no_other_link_from_its_check(
    workspace, check, with_limits
):
    with web_server() as (url, _):
        links = [f"[x]({url}/429?{n})" for n in range(30)]
        write(workspace, README=" ".join([*links, "[y](missing.md)"]))
        done = check(env={"LYCHEE_ONLINE": "1"}, handler=with_limits(CHECK_SECONDS=4))
    assert (broken(done), done.summary["excluded"]) == ([("README.md", "missing.md")], 30)
    assert skipped(done) == {} and "the network took too long" in done.words


# ------------------------------------------------------------------------------------------------- awkward workspaces

AWKWARD = ("sp ace", "-dash", "--help", "#hash", "~home", "umläut ☃", "quote'\"", "back\\slash", "new\nline", "br[1]",
           "star*", "what?", "[", "]", "$(true)`", "http:", "tab\there", "a,b", "%20", "CAPS", "!bang", "{a,b}")  # fmt: skip


def test_every_file_name_is_checked(workspace, check):
    for name in AWKWARD:
        write(workspace, **{f"{name}/{name}": "[x](missing.md)", name: "[x](missing.md)"})
    (workspace / "UPPER.MD").write_text("[x](missing.md)")
    summary = check().summary
    names = [f"{folder}{name}.md" for name in AWKWARD for folder in ("", f"{name}/")]
    names = sorted([*names, "UPPER.MD"])
    assert [link["file"] for link in summary["broken"]] == names
    assert (summary["total"], summary["files"], summary["skipped"]) == (len(names), len(names), [])


@pytest.mark.parametrize("name", ['it\'s "a" [work]\nspace ü', os.fsdecode(b"caf\xe9")])
def test_a_workspace_path_may_have_any_name(tmp_path, check, name):
    folder = tmp_path / name
    folder.mkdir()
    write(folder, README="[x](missing.md) [y](README.md) [z](/README.md)")
    done = check({"workspace_path": str(folder)})
    assert (done.summary["successful"], done.summary["failed"]) == (2, 1)


def test_a_name_or_content_that_is_not_utf8_is_skipped_and_the_rest_checked(workspace, check):
    write(workspace, README="[x](missing.md)")
    (workspace / "latin.md").write_bytes(b"caf\xe9 [x](missing.md)")
    reasons = {"latin.md": "its content is not UTF-8"}
    # Elsewhere the file system refuses such names.
    if sys.platform == "linux":
        (workspace / os.fsdecode(b"caf\xe9.md")).write_text("[x](missing.md)")
        reasons |= {"caf\\udce9.md": "its name is not UTF-8"}
    done = check()
    assert broken(done) == [("README.md", "missing.md")] and skipped(done) == reasons


@pytest.mark.parametrize("in_git", [True, False])
def test_what_may_not_be_read_is_skipped_and_the_rest_checked(workspace, check, in_git):
    names = ("a", "closed/b", "open/c", "secret", "z")
    write(workspace, **{name: "[x](missing.md)" for name in names})
    if in_git:
        git(workspace, "init")
    (workspace / "secret.md").chmod(0)
    (workspace / "closed").chmod(0)
    try:
        done = check(preexec_fn=without_overrides)
    finally:
        (workspace / "closed").chmod(0o700)
    assert broken(done) == [(f"{name}.md", "missing.md") for name in ("a", "open/c", "z")]
    assert (done.summary["total"], done.summary["failed"]) == (3, 3)
    assert list(skipped(done)) == ["closed", "secret.md"]
    assert all("ermission denied" in reason for reason in skipped(done).values())


def test_symbolic_links_pipes_and_loops_are_not_followed(workspace, check):
    write(workspace, AGENTS="[x](missing.md)")
    (workspace / "CLAUDE.md").symlink_to("AGENTS.md")
    (workspace / "dangling.md").symlink_to("nowhere.md")
    (workspace / "loop").symlink_to(".")
    os.mkfifo(workspace / "pipe.md")
    (workspace / "folder.md").mkdir()
    done = check()
    assert (done.summary["files"], broken(done)) == (1, [("AGENTS.md", "missing.md")])


@pytest.mark.parametrize("in_git", [True, False])
def test_dependencies_and_hidden_folders_are_left_out(workspace, check, in_git):
    left_out = ["node_modules/x/README", ".venv/lib/y", "venv/lib/site-packages/z/README"]
    left_out += [".git/notes", ".hidden"]
    write(workspace, **{name: "[x](missing.md)" for name in (*left_out, "docs/a")})
    if in_git:
        git(workspace, "init")
    assert broken(check()) == [("docs/a.md", "missing.md")]


def test_what_git_ignores_is_left_out_and_untracked_files_are_not(workspace, check):
    names = ("build/out", "tracked", "new", "deleted", "sub/local")
    write(workspace, **{name: "[x](missing.md)" for name in names})
    (workspace / ".gitignore").write_text("build/\nlocal.md\n")
    git(workspace, "init")
    git(workspace, "add", "tracked.md", "deleted.md")
    (workspace / "deleted.md").unlink()
    # A hook of git's has these variables.
    for env in ({}, {"GIT_DIR": "/nonexistent", "GIT_WORK_TREE": "/"}):
        found = [("new.md", "missing.md"), ("tracked.md", "missing.md")]
        assert broken(check(env=env)) == found
    # Asked for by name, an ignored folder is checked: its files cannot all have been meant to be
    # left out.
    assert broken(check({"workspace_path": str(workspace / "build")})) == [("out.md", "missing.md")]


def test_more_files_than_an_argument_list_holds(workspace, check):
    names = [f"{'long-' * 48}{number}" for number in range(8_700)]
    for name in names:
        (workspace / f"{name}.md").write_text("[x](README.md)")
    # This is Linux's limit.
    assert sum(len(name) + 6 for name in names) > 2**21
    write(workspace, README="x")
    summary = check().summary
    assert (summary["files"], summary["total"], summary["successful"]) == (8_701, 8_700, 8_700)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file system refuses such names")
@pytest.mark.parametrize("odd", [b"caf\xe9", b"sub/caf\xe9", b"caf\xe9.md"])
def test_each_file_is_answered_or_named_where_names_are_not_utf8(workspace, check, odd):
    """lychee stops in the middle where it looks for a?.md beside such a name, and exits 0."""
    names = ["README", "a?", "sub/b*", "sub/c", "[x]/d"]
    write(workspace, **{name: "[x](missing.md)" for name in names})
    path = os.path.join(os.fsencode(workspace), odd)
    if odd.endswith(b".md"):
        with open(path, "w"):
            pass
    else:
        os.mkdir(path)
    done = check()
    answered = {file for file, _ in broken(done)}
    named = {file for file in skipped(done) if "caf" not in file}
    assert answered >= {"README.md", "sub/c.md"} and named
    assert answered | named == {f"{name}.md" for name in names} and not answered & named
    assert done.summary["summary"].endswith(f"; {len(skipped(done))} files not read")


# ------------------------------------------------------------------------------------------------------------ bounds


def test_a_file_that_keeps_lychee_busy_is_named_and_the_rest_checked(workspace, check, with_limits):
    write(workspace, README="[x](missing.md)", busy="*a_" * 350_000, large="x" * 2**21 + "x")
    done = check(handler=with_limits(CHECK_SECONDS=3))
    assert broken(done) == [("README.md", "missing.md")]
    assert skipped(done) == {
        "busy.md": "lychee had not checked it when 3 s were over",
        "large.md": "it has more than 2097152 bytes",
    }
    assert report(done)["skipped"] == done.summary["skipped"]


def test_files_together_and_their_report_are_bounded(workspace, check, with_limits):
    write(workspace, **{f"{n}": "[x](y.md) " * 2_000 for n in range(4)}, small="[x](y.md)")
    done = check(handler=with_limits(BATCH_BYTES=30_000, ALL_BYTES=70_000))
    assert (done.summary["files"], done.summary["failed"]) == (4, 6_001)
    assert skipped(done) == {"3.md": "the files together have more than 70000 bytes"}
    done = check(handler=with_limits(BATCH_BYTES=30_000, REPORT_BYTES=100_000))
    assert done.summary["files"] == 2 and len(skipped(done)) == 3
    assert all(why.startswith("the report has more") for why in skipped(done).values())


def test_memory_is_bounded_whatever_an_anchor_leads_to(workspace, check, with_limits):
    write(workspace, README="[x](zero.md#x) [y](missing.md)")
    (workspace / "zero.md").symlink_to("/dev/zero")
    data = {"workspace_path": str(workspace), "include_fragments": True}
    done = check(data, handler=with_limits(MEMORY_BYTES=2**31))
    assert broken(done) == [("README.md", "missing.md")]
    os.mkfifo(workspace / "pipe.md")
    write(workspace, README="[x](pipe.md#x)")
    done = check(data, handler=with_limits(CHECK_SECONDS=2))
    assert list(skipped(done)) == ["README.md"]


# ------------------------------------------------------------------------------------------ payloads that never work


NO_TASKS = [
    b"",
    b"nonsense",
    b"[]",
    b"null",
    b'{"data": 3}',
    b'{"data": []}',
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
]
NO_WORKSPACES = [None, 3, "", [], {}, True, "relative/path", ".", "/nonexistent/folder", "/etc/passwd", "/etc/passwd/x",
                 "/" + "x" * 5000, "/no\nsuch", "/a\0b", "/\ud800", "~"]  # fmt: skip


def test_what_is_no_task_or_no_workspace_is_refused_for_good(refused):
    for task in NO_TASKS:
        assert "stdin is not a task" in refused(task=task), task
    for path in NO_WORKSPACES:
        assert "workspace_path" in refused({"workspace_path": path}), path


RESULTS = ["../out.json", "/out.json", "sub/../../out.json", "link/out.json", "sub", "", ".", "sub/..", "sub/",
           "missing/out.json", "a\0b", 7, True, ["a"], {"a": "b"}, "\ud800"]  # fmt: skip


def test_results_never_leave_the_workspace(tmp_path, workspace, refused):
    (workspace / "sub").mkdir()
    (workspace / "link").symlink_to(tmp_path)
    write(workspace, README="[x](missing.md)")
    before = sorted(tmp_path.rglob("*"))
    for name in RESULTS:
        data = {"workspace_path": str(workspace), "results_file": name}
        assert "results_file" in refused(data), name
    assert sorted(tmp_path.rglob("*")) == before


def test_a_usage_error_is_64(check):
    env = {**os.environ, "UV_CACHE_DIR": UV_CACHE}
    command = [UV, "run", "--script", HANDLER, "--bogus"]
    done = subprocess.run(command, capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (64, b"")


# ------------------------------------------------------------------------------------------------------ what can fail


def test_old_results_stay_whole_when_new_ones_cannot_be_written(workspace, check):
    write(workspace, README="[x](missing.md)\n" * 300)
    results = workspace / "links.json"
    results.write_text("old")
    done = check(
        {"workspace_path": str(workspace), "results_file": "links.json"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert "File too large" in done.words
    assert results.read_text() == "old"
    assert sorted(os.listdir(workspace)) == ["README.md", "links.json"]


def test_a_hooks_payload_chooses_the_workspace_and_nothing_else(workspace, check):
    write(workspace, README="[x](README.md#gone)")
    rest = {"results_file": "links.json", "include_fragments": True}
    for granted, failed, files in ((None, 1, 2), (rest, 1, 2), ({}, 0, 1)):
        data = {"workspace_path": str(workspace), **({} if granted else rest)}
        task = {"data": data} if granted is None else {"data": data, "granted": granted}
        assert check(task=json.dumps(task).encode()).summary["failed"] == failed
        assert len(os.listdir(workspace)) == files
        (workspace / "links.json").unlink(missing_ok=True)


def test_results_are_replaced_not_rewritten(tmp_path, workspace, check):
    write(workspace, README="x")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (workspace / "links.json").symlink_to(precious)
    assert check({"workspace_path": str(workspace), "results_file": "links.json"}).returncode == 0
    assert precious.read_text() == "precious"
    assert stat.S_ISREG((workspace / "links.json").lstat().st_mode)


def test_a_full_disk_is_not_now(workspace, check, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        write(disk, README="[x](missing.md)\n" * 300)
        done = check({"workspace_path": str(disk), "results_file": "links.json"})
        assert done.returncode == 75
        assert json.loads(done.stdout)["retry_after"] > 0
        assert "No space left" in done.words
        assert os.listdir(disk) == ["README.md"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_that_go_away_during_the_check_are_not_now(tmp_path, workspace):
    """lychee ends as it does with any trouble; a file that went away is nobody's failure."""
    # This one is large enough to come after the page that waits.
    write(workspace, large="x" * 600_000)
    with waiting_lychee(workspace, tmp_path) as (handler, finish, _):
        (workspace / "large.md").unlink()
        output, words = finish()
    assert (handler.returncode, output) == (75, b"") and b"files went away" in words


def test_without_the_package_it_says_how_to_get_it(workspace):
    task = json.dumps({"data": {"workspace_path": str(workspace)}}).encode()
    done = subprocess.run([sys.executable, "-S", HANDLER], input=task, capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"uv run --script" in done.stderr and b"Traceback" not in done.stderr


def test_the_binary_is_that_of_the_package_not_just_any_in_path(tmp_path, workspace, check):
    impostor = tmp_path / "bin" / "lychee"
    impostor.parent.mkdir()
    impostor.write_text("#!/bin/sh\necho '{}'\nexit 0\n")
    impostor.chmod(0o755)
    write(workspace, README="[x](missing.md)")
    assert broken(check(path=[impostor.parent])) == [("README.md", "missing.md")]


# ------------------------------------------------------------------------------------------- settings in the workspace


@pytest.mark.parametrize("name", ["lychee.toml", ".lychee.toml", ".lycheeignore"])
def test_the_settings_of_the_workspace_are_obeyed(workspace, check, name):
    write(workspace, README="[x](missing.md) [y](left-out.md)")
    text = "exclude = ['left-out']\n" if name.endswith("toml") else "left-out\n"
    (workspace / name).write_text(text)
    done = check()
    assert broken(done) == [("README.md", "missing.md")]
    assert done.summary["excluded"] == 1


def test_settings_do_not_change_where_and_how_results_are_written(workspace, check):
    write(workspace, README="[x](missing.md)")
    (workspace / "lychee.toml").write_text(
        "format = 'markdown'\noutput = 'elsewhere.md'\ndump = true\ndump_inputs = true\nfiles_from = 'x'\n"
        "mode = 'emoji'\nno_progress = false\nverbose = 'debug'\n"
    )
    assert broken(check()) == [("README.md", "missing.md")]
    assert not (workspace / "elsewhere.md").exists()


def test_a_root_of_the_workspace_s_own_is_obeyed(workspace, check):
    write(workspace, **{"site/a": "x", "README": "[x](/a.md)"})
    (workspace / "lychee.toml").write_text(f"root_dir = '{workspace}/site'\n")
    assert check().summary["successful"] == 1


@pytest.mark.parametrize("pattern, left", [
    ("^src/ext/", ["src/a.md"]), ("^\\./src/ext/", ["src/a.md"]), ("^./src", []), ("ext", ["src/a.md"]), ("^ext/", ["src/a.md", "src/ext/b.md"]),
    ("src/ext/b[.]md$", ["src/a.md"]), ("^/", ["src/a.md", "src/ext/b.md"]),
])  # fmt: skip
def test_exclude_path_matches_the_path_in_the_workspace(workspace, check, pattern, left):
    write(workspace, **{"src/a": "[x](missing.md)", "src/ext/b": "[x](missing.md)"})
    (workspace / "lychee.toml").write_text(f"exclude_path = [{json.dumps(pattern)}]\n")
    done = check()
    assert [file for file, _ in broken(done)] == left
    assert (done.summary["files"], done.summary["skipped"]) == (len(left), [])


@pytest.mark.parametrize("name, text, why", [
    ("lychee.toml", "exclude = ['(']", "unclosed group"),
    ("lychee.toml", "include = ['(']", "unclosed group"),
    ("lychee.toml", "exclude_path = ['(']", "unclosed group"),
    ("lychee.toml", "exclude = ['a{1000}{1000}']", "exceeds size limit"),
    ("lychee.toml", "exclude = [7]", "expected a string"),
    ("lychee.toml", "accept = ['abc']", "no range pattern found"),
    (".lycheeignore", "(", "unclosed group"),
])  # fmt: skip
def test_a_setting_that_lychee_refuses_is_a_dead_letter_at_once(workspace, check, name, text, why):
    write(workspace, README="[x](missing.md)")
    (workspace / name).write_text(f"{text}\n")
    done = check()
    assert (done.returncode, done.stdout) == (65, b"")
    last = done.words.strip().splitlines()[-1]
    assert last.startswith(f"link_validation: lychee refuses its settings in {workspace}: ")
    assert why in last


def test_a_stopped_check_leaves_nothing_behind(tmp_path, workspace):
    """TERM to the whole process group, as a worker does at a timeout, while lychee waits."""
    with waiting_lychee(workspace, tmp_path) as (handler, _, connection):
        os.killpg(handler.pid, signal.SIGTERM)
        connection.settimeout(10)
        # This ends when lychee is gone.
        while connection.recv(4096):
            pass
        assert handler.communicate(timeout=10)[0] == b"" and handler.returncode != 0
    assert os.listdir(workspace) == ["waits.md"]
    assert os.listdir(tmp_path / "state" / "reports" / "link_validation") == []
