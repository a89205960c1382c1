"""The reference names every option, recipe and exit code; the map of the modules and what the
documents point to is there.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import sys
from contextlib import redirect_stdout
from unittest import mock

import pytest
from conftest import ROOT

REFERENCE = (ROOT / "docs/reference.md").read_text()
README = (ROOT / "README.md").read_text()
HOW = (ROOT / "docs/how-it-works.md").read_text()
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "skills").glob("*/*.md")),
]
# A script has a PEP 723 header; a module has none.
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\n# /// script\n" in path.read_text())
MODULES = sorted(ROOT.glob("taskqueue/[!_]*.py"))
# Commands that another script does, which has a section of its own.
HANDED_OVER = {
    "tasks.py": ("export", "import", "backup", "restore", "doctor", "service"),
}
CODES = ("0", "1", "64", "65", "75")


@functools.cache
def help_of(script: str, *command: str) -> str:
    said = io.StringIO()
    module = importlib.import_module(script.removesuffix(".py"))
    with (
        mock.patch.object(sys, "argv", [script]),
        # A worker's start would change this process's signals.
        mock.patch.object(module, "start_clean", create=True),
        redirect_stdout(said),
    ):
        try:
            code = module.main([*command, "--help"])
        except SystemExit as ended:
            code = ended.code
    assert not code
    return said.getvalue()


def options_of(text: str) -> set[str]:
    """The options that a help text explains: those that begin a line."""
    explained = re.findall(r"^ +(-.*)$", text, re.MULTILINE)
    return {
        option for line in explained for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)
    }


def commands_of(text: str) -> list[str]:
    """The commands that a help text lists, each in a line that begins with four spaces."""
    listed = text.partition("  COMMAND\n")[2]
    return re.findall(r"^    ([a-z]+)(?:\s|$)", listed, re.MULTILINE)


def section(script: str) -> str:
    """Return what the reference says of a script."""
    [text] = re.findall(rf"^## `{re.escape(script)}`\n(.*?)(?=^## |\Z)", REFERENCE, re.M | re.S)
    return text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_in_the_reference(script):
    text = section(script)
    options = options_of(help_of(script))
    for command in commands_of(help_of(script)):
        assert f"`{command}" in text, f"{script} {command}"
        if command not in HANDED_OVER.get(script, ()):
            options |= options_of(help_of(script, command))
    missing = {option for option in options - {"--help"} if f"`{option}" not in text}
    assert missing == set(), f"{script}: {sorted(missing)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_reference_names_no_option_that_is_not_there(script):
    options = options_of(help_of(script)) | {"--help"}
    for command in commands_of(help_of(script)):
        options |= options_of(help_of(script, command))
    named = set(re.findall(r"`(--[a-z][a-z-]*)", section(script)))
    # Of others, this section may speak, too.
    elsewhere = {option for name in SCRIPTS for option in options_of(help_of(name))}
    elsewhere |= {"--hook", "--grace", "--status"}
    assert named - options <= elsewhere, script
    assert named & options or not options - {"--help"}


def test_tasks_and_worker_have_options_to_look_at():
    """The two tests above read help texts; this one holds that they find something in there."""
    assert {"--then", "--on-dead", "--single"} <= options_of(help_of("worker.py"))
    assert {"approve", "wait", "limit", "retry"} <= set(commands_of(help_of("tasks.py")))
    assert {"--failed", "--scheduled"} <= options_of(help_of("tasks.py", "retry"))
    assert {"--once-per", "--ttl", "--nested"} <= options_of(help_of("enqueue.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_the_same_exit_codes(script):
    said = help_of(script)
    assert "exit codes" in said.lower()
    said = re.split("exit codes", said, flags=re.IGNORECASE)[1].partition("\n\n")[0]
    # A code begins its clause; the size of a file or a time-out does not.
    codes = set(re.findall(r"(?:^|[:;.]|\n)\s*(?:Of wait: )?(0|1|64|65|75)\s", said))
    [row] = [line for line in REFERENCE.splitlines() if line.startswith(f"| `{script}` |")]
    cells = zip(CODES, row.split("|")[2:-1], strict=True)
    assert codes == {code for code, cell in cells if cell.strip()}


def test_every_script_is_named_and_every_recipe():
    for script in SCRIPTS:
        assert f"`{script}`" in REFERENCE
    recipes = re.findall(r"^([a-z][a-z-]*)[^:=\n]*:(?!=)", (ROOT / "justfile").read_text(), re.M)
    assert "install" in recipes and "test-core" in recipes
    missing = [
        name
        for name in recipes
        if name != "default"
        and f"just {name}`" not in REFERENCE
        and f"just {name} " not in REFERENCE
    ]
    assert missing == []


def test_the_state_directory_and_the_handlers_are_named():
    for name in ("tasks.db", "workers", "spool", "logs", "runs", "reports", "turn", "wake"):
        assert f"state/{name}" in REFERENCE
    for path in (ROOT / "handlers").glob("[!_.]*"):
        assert f"`{path.name}`" in REFERENCE


def test_each_attribute_of_a_task_is_in_the_reference():
    import queue_helpers as q

    table = REFERENCE.partition("| attribute | type | is |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"(?m)^\| (.*?) \|", table))))
    has = {name for name in vars(q.Task) if not name.startswith("_")} | {*q.Task._fields}
    assert named == has - {"from_row", "unreadable"} | {"task"}


def test_the_map_of_the_modules_is_the_directory():
    [drawn] = re.findall(r"^## The modules\n+```text\n(.*?)^```$", HOW, re.MULTILINE | re.DOTALL)
    scripts, modules = drawn.split("taskqueue/")
    assert set(re.findall(r"[a-z_]+\.py\b", scripts)) == set(SCRIPTS)
    columns = re.findall(r"(?m)^  ([a-z_]+) {2,}|  {2,}([a-z_]+) {2,}", modules.split("core\n")[0])
    assert {a or b for a, b in columns} == {path.stem for path in MODULES}


def test_every_test_that_a_document_names_is_there():
    files = [*(ROOT / "tests").rglob("*.py")]
    there = {path.stem for path in files}
    for path in files:
        there.update(re.findall(r"def (test_\w+)", path.read_text()))
    named = {name for path in DOCUMENTS for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert named - there == set()


def test_every_link_leads_to_a_file():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            if path.parent == ROOT or path.parent == ROOT / "docs":
                # The first task's notes have a broken link on purpose.
                assert (path.parent / target).exists() or target == "pier.md", (
                    f"{path.name}: {target}"
                )


def test_benchmarks_that_readme_names_are_there():
    [line] = [line for line in README.splitlines() if "`just bench NAME` measures" in line]
    names = re.findall(r"`([a-z_]+)`", line)
    assert names and all((ROOT / "bench" / f"{name}.py").is_file() for name in names)
