"""Imports run one way, each script declares what it needs, and queue_helpers.py works alone."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
FILES |= {f"taskqueue.{path.stem}": path for path in sorted(ROOT.glob("taskqueue/[!_]*.py"))}
MODULES = {name for name in FILES if name == "queue_helpers" or name.startswith("taskqueue.")}
SCRIPTS = FILES.keys() - MODULES
# What each third-party import is called in a header.
PACKAGES = {"persistqueue": "persist-queue"}
# The only module that may import it.
ONLY_IN = {"persistqueue": "taskqueue.persist", "watchdog": "taskqueue.wake"}

# What a process has once: all module-level state that changes while it runs, and why.
STATE = {
    "queue_helpers._process": "connections and ownership; a forked child begins anew",
    "queue_helpers._inherited": "what a forked child must neither close nor collect",
    "taskqueue.persist._claims": "the claims of this process's ack queues; a forked child has none",
}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imports(name: str, deferred: bool, optional: bool = False) -> set[str]:
    """The modules that a file imports: while it is loaded, or (deferred) in its functions, too.

    Those for type checking alone are left out, and (not optional) those that may fail.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if (
            not optional
            and isinstance(node, ast.Try)
            and "ImportError"
            in "".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        ):
            return
        if not deferred and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(top_or_ours(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "taskqueue":
            found.update(f"taskqueue.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(top_or_ours(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(name))
    return found - {name}


def top_or_ours(name: str) -> str:
    return name if name in FILES else name.partition(".")[0]


@functools.cache
def late() -> dict[str, str]:
    """The module that queue_helpers loads when one of these names is asked for."""
    [table] = [
        node.value
        for node in tree("queue_helpers").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LATER"
    ]
    return {
        word: module for module, words in ast.literal_eval(table).items() for word in words.split()
    }


def asks_for(name: str) -> set[str]:
    """The modules whose names a file asks queue_helpers for."""
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
    return {
        late()[node.attr]
        for node in nodes
        if node.attr in late() and ast.unparse(node.value) in ("q", "queue_helpers")
    }


def third_party(names: set[str]) -> set[str]:
    return {name for name in names if name not in FILES and name not in sys.stdlib_module_names}


def loads(name: str, deferred: bool) -> set[str]:
    """All modules of ours that a script loads with its own imports, or (deferred) may load at all."""
    found, wanted, own = set(), {name}, name
    while wanted:
        name = wanted.pop()
        found.add(name)
        wanted |= imports(name, deferred or name == own) & FILES.keys() | asks_for(name)
        wanted -= found
    return found


def test_there_is_something_to_read():
    assert {"queue_helpers", "taskqueue.persist", "taskqueue.wake"} <= MODULES
    assert {"enqueue", "worker", "tasks"} <= SCRIPTS
    assert "persistqueue" in imports("taskqueue.persist", deferred=False)
    assert "taskqueue.wake" in loads("worker", deferred=False)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_modules_and_no_script(name):
    assert imports(name, deferred=True) & SCRIPTS == set()


def test_the_modules_import_each_other_one_way():
    """In functions, too. The one way back is queue_helpers' late re-export of names."""
    left = {name: imports(name, deferred=True) & MODULES for name in MODULES}
    assert left["queue_helpers"] == set()
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, "these import each other in a circle"


def test_queue_helpers_needs_the_standard_library_alone():
    assert third_party(imports("queue_helpers", deferred=True)) == set()
    # Its error names a module that is missing: no import statement can do that.
    assert imports("queue_helpers", deferred=True) & MODULES == set()
    assert set(late().values()) <= MODULES
    calls = [
        ast.unparse(node) for node in ast.walk(tree("queue_helpers")) if isinstance(node, ast.Call)
    ]
    named = {m[1] for call in calls if (m := re.fullmatch(r"_module\('([\w.]+)'\)", call))}
    assert named and named <= MODULES


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_library_has_one_door(package):
    users = {name for name in FILES if package in imports(name, deferred=True)}
    assert users == {ONLY_IN[package]}


def declared(name: str) -> set[str]:
    """The packages of a script's header (PEP 723)."""
    header = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", FILES[name].read_text())
    assert header, f"{name}.py has no header of PEP 723"
    listed = re.search(r"(?m)^# dependencies = (\[.*\])$", header[1])
    assert listed and re.search(r'(?m)^# requires-python = ">=3\.11"$', header[1])
    return {re.match(r"[\w-]+", spec)[0] for spec in ast.literal_eval(listed[1])}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_declares_what_its_imports_need(name):
    packages = declared(name)
    # Its own imports, and what comes along with them; a function of another module may want more.
    own, most = imports(name, deferred=True), set()
    for each in loads(name, deferred=False):
        own |= imports(each, deferred=False)
    for each in loads(name, deferred=True):
        most |= imports(each, deferred=True, optional=True)
    needed, wanted = (
        {PACKAGES.get(package, package.replace("_", "-")) for package in third_party(them)}
        for them in (own, most)
    )
    if "sys.executable" in FILES[name].read_text():
        # It starts others in its own environment.
        started = [each for each in SCRIPTS if f"{each}.py" in FILES[name].read_text()]
        wanted |= set().union(*map(declared, started))
    assert needed <= packages <= wanted


def state_of(name: str) -> set[str]:
    """The module-level names of a file that are made to change: mutable, or assigned with `global`."""
    found = set()
    for node in tree(name).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            text = ast.unparse(node.value)
            empty = text in ("[]", "{}", "set()", "list()", "dict()")
            made = re.match(r"_Process|deque|defaultdict|Weak|weakref|threading|\w*Lock\(", text)
            if empty or made:
                found.update(f"{name}.{ast.unparse(target)}" for target in targets)
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Global):
            found.update(f"{name}.{each}" for each in node.names)
    return found


def test_what_a_process_has_once_is_listed_and_explained():
    assert set().union(*map(state_of, FILES)) == STATE.keys()


def test_the_classes_rely_on_the_private_names_that_they_list():
    import inspect

    import persistqueue

    module = tree("taskqueue.persist")
    text = ast.get_docstring(module)
    listed = {
        kind: set(re.search(rf"(?m)^ *{kind} +(.*)$", text)[1].split())
        for kind in ("overridden", "called")
    }
    kinds = {*persistqueue.SQLiteQueue.__mro__, *persistqueue.SQLiteAckQueue.__mro__} - {object}
    text = "".join(inspect.getsource(kind) for kind in kinds)
    theirs = {*re.findall(r"\bself\.(_[a-zA-Z]\w*)", text)}
    theirs |= {name for kind in kinds for name in vars(kind) if re.match("_[a-zA-Z]", name)}
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    defined = set()
    for node in (node for each in classes for node in each.body):
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets)
    used = {
        node.attr
        for each in classes
        for node in ast.walk(each)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    private = {name for name in theirs if not name.startswith("__")}
    assert listed["overridden"] == defined & private
    assert listed["called"] == (used & private) - defined


def test_queue_helpers_alone_enqueues_claims_and_acks(installation, tmp_path):
    """Vendored: one file in a fresh directory, a fresh state, and no package at all."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "queue_helpers.py", alone)
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import queue_helpers as q
        task_id = q.enqueue_task("reviews", "t", {"n": 1})
        q.enqueue_tasks("reviews", [{"task_type": "t", "data": {"n": n}} for n in (2, 3, 4)])
        conn = q.connect()
        def take():
            [task] = q.claim_ready(conn, "reviews")
            return task
        task = take()
        assert task.task_id == task_id and task.data == {"n": 1}
        with q.transaction(conn):
            assert q.ack(conn, task, result="good") and not q.ack(conn, task)
        for verb, told in ((q.bury, {"error": "e"}), (q.nack, {"error": "e"}), (q.release, {})):
            task = take()
            with q.transaction(conn):
                assert verb(conn, task, **told)
        q.resign()
        assert [name for name in sys.modules if name.startswith(("queue_", "taskqueue"))] == ["queue_helpers"]
        for ask in (lambda: q.get_ack_queue("reviews"), lambda: q.consume, lambda: q.recover()):
            try:
                ask()
            except ImportError as error:
                print(error)
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, alone],
        env=installation.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    modules = ("persist", "aio", "recovery")
    assert done.stdout.splitlines() == [
        f"taskqueue/{module}.py is missing in {alone}: put taskqueue/ beside queue_helpers.py"
        for module in modules
    ]
    history = installation.rows("select status from task_history order by id")
    assert history == [("completed",), ("failed",)]
    assert installation.rows("select count(*) from reviews") == [(2,)]


@pytest.mark.parametrize("name", ["queue_helpers", "taskqueue.persist"])
def test_pyright_is_content(name):
    if not shutil.which("pyright"):
        pytest.skip("pyright is not installed")
    command = ["pyright", "--pythonpath", sys.executable, "--level", "error", FILES[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
