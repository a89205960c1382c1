"""A handler that exits 75 with {"hold": "reason", "data": {…}} has its task wait for a person: no
attempt counts, every command tells why, and approval puts `data` into the payload.
"""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from conftest import ROOT

# It asks until `allowed` is set, then prints what it was given.
ASKS = """#!/bin/sh
cat >payload
if grep -q '"allowed"' payload; then cat payload; exit 0; fi
echo 'I looked at it.'
echo '{"hold": "wants:  to push", "data": {"allowed": ["push"], "mode": "careful"}}'
exit 75
"""


def add(installation, task_id: str, *args: str) -> None:
    data = {"workspace_path": str(installation.directory), "mode": "fast"}
    installation.enqueue("approvals", "work", json.dumps(data), "--task-id", task_id, *args)


def column(installation, name: str, queue: str = "approvals") -> dict:
    return dict(installation.rows(f"select task_id, {name} from {queue}"))


def asks(installation, said: str) -> None:
    """Have task w ask with this as its last line."""
    installation.handler("work", f"#!/bin/sh\necho '{said}'\nexit 75\n")
    add(installation, "w")
    installation.drain("approvals")


@pytest.fixture
def asked(installation):
    installation.handler("work", ASKS)
    add(installation, "w")
    log = installation.drain("approvals").stderr
    assert "work w held" in log and "wants: to push" in log and "1 held" in log
    return installation


def given(installation, task_id: str) -> dict:
    """Return the envelope that the handler was given when it was done."""
    return json.loads(installation.history(task_id)["result"])


def test_it_is_held_with_its_reason_and_no_attempt_counts(asked):
    [row] = asked.told("list")
    assert (row["task_id"], row["status"], row["attempts"]) == ("w", "held", 0)
    assert row["error"] == "wants: to push"
    page = asked.directory / "page.html"
    asked.tq("page", str(page))
    shown = asked.tq("show w").stdout
    waited = asked.tq("wait w --timeout 0.1", code=75)
    for text in (asked.tq("list").stdout, shown, waited.stdout + waited.stderr, page.read_text()):
        assert "wants: to push" in text
    assert 'approval changes  allowed: not set → ["push"]' in shown
    assert 'mode: "fast" → "careful"' in shown and "allowed: not set" in page.read_text()
    assert asked.told("show w")["asks"] == {"allowed": ["push"], "mode": "careful"}
    # Nothing runs it, and nothing makes it due.
    assert "retried 0 tasks" in asked.tq("retry --scheduled").stdout
    asked.tq("retry w", code=1)
    asked.drain("approvals")
    assert column(asked, "status") == {"w": 3}


def test_approval_changes_the_payload_and_one_attempt_counts(asked):
    assert asked.tq("approve w").stdout.startswith("approved w\n")
    assert column(asked, "asks") == column(asked, "error") == {"w": None}
    asked.drain("approvals")
    done = asked.history("w")
    assert (done["status"], done["attempts"]) == ("completed", 1)
    data = {"workspace_path": str(asked.directory), "allowed": ["push"], "mode": "careful"}
    assert given(asked, "w")["data"] == data


def test_a_person_may_say_otherwise(asked):
    for fields in ("x", "[]", "3", '{"a": NaN}'):
        assert "approve --help" in asked.tq("approve w --with", fields, code=64).stderr
    assert column(asked, "status") == {"w": 3}
    asked.tq("approve w --with", '{"mode": null, "allowed": "all"}')
    asked.drain("approvals")
    assert given(asked, "w")["data"] == {"workspace_path": str(asked.directory), "allowed": "all"}


def test_a_rejected_one_ends_and_may_be_retried_and_asks_again(asked):
    asked.tq("reject w --reason 'not today'")
    assert asked.history("w")["error"] == "rejected: not today"
    retried = asked.tq("retry w")
    assert "held again" in retried.stdout + retried.stderr
    assert column(asked, "asks") == {"w": None}
    asked.tq("approve w")
    asked.drain("approvals")
    assert column(asked, "error") == {"w": "wants: to push"}
    asked.tq("cancel w")
    assert asked.history("w")["status"] == "cancelled"


@pytest.mark.parametrize("data", ["", ', "data": {}'])
def test_without_fields_approval_leaves_the_payload(installation, data):
    asks(installation, f'{{"hold": "x"{data}}}')
    before = column(installation, "data")
    installation.tq("approve w")
    assert column(installation, "data") == before


@pytest.mark.parametrize("data", ["null", "[1]"])
def test_what_has_no_fields_needs_a_persons(installation, data):
    asks(installation, f'{{"hold": "x", "data": {data}}}')
    assert "the fields that you name" in installation.tq("show w").stdout
    refused = installation.tq("approve w", code=1).stderr
    assert "no exact rule allows what it wants" in refused and "approve w --with" in refused
    assert column(installation, "status") == {"w": 3}
    installation.tq("approve w --with", '{"a": 1}')
    [data] = column(installation, "data").values()
    assert json.loads(data)["data"]["a"] == 1


def test_a_last_line_that_only_looks_so_is_no_question(installation):
    asks(installation, '{"hold": true}')
    assert installation.statuses() == {"w": "scheduled"}


def test_it_keeps_its_groups_turn(installation):
    installation.handler("work", ASKS)
    for name in ("first", "second"):
        add(installation, name, "--group", "g")
    installation.drain("approvals")
    assert column(installation, "status") == {"first": 3, "second": 4}
    installation.tq("approve first")
    assert column(installation, "status") == {"first": 1, "second": 4}
    installation.drain("approvals")
    assert installation.history("first")["status"] == "completed"
    # The second one asks now; its end gives the turn away.
    add(installation, "third", "--group", "g")
    assert column(installation, "status") == {"second": 3, "third": 4}
    installation.tq("reject second")
    assert column(installation, "status") == {"third": 1}


def test_a_later_firing_is_kept_and_comes_after_it(installation):
    data = json.dumps({"workspace_path": str(installation.directory), "fired": "later"})
    fire = shlex.join([sys.executable, str(ROOT / "enqueue.py"), "approvals", "work", data])
    again = f"[ -e ran ] || {fire} --task-id w --on-duplicate rerun; touch ran"
    installation.handler("work", ASKS.replace("cat >payload", f"cat >payload; {again}"))
    add(installation, "w")
    installation.drain("approvals")
    assert column(installation, "status") == {"w": 3}
    # The payload that the person sees does not change; another firing is a duplicate.
    assert '"fired"' not in column(installation, "data")["w"]
    words = ("approvals", "work", "{}", "--task-id", "w", "--on-duplicate", "replace")
    assert installation.run("enqueue.py", *words).stdout.startswith("duplicate w")
    installation.tq("reject w")
    assert '"fired": "later"' in column(installation, "data")["w"]
    assert column(installation, "status") == {"w": 1}


def test_a_move_and_an_export_keep_the_question(asked, tmp_path):
    asks = column(asked, "asks")
    asked.tq("move w notifications")
    assert column(asked, "asks", "notifications") == asks
    file = str(tmp_path / "tasks.jsonl")
    asked.tq("export", file)
    asked.tq("purge notifications --yes")
    asked.tq("import", file)
    assert column(asked, "asks", "notifications") == asks
    assert column(asked, "released_at", "notifications")["w"]
    asked.tq("approve w")
    asked.drain("notifications")
    assert given(asked, "w")["data"]["allowed"] == ["push"]


def test_a_bare_payload_keeps_its_name_and_a_hooks_payload_gets_what_was_approved(installation):
    installation.handler("Stop", ASKS)
    installation.add("approvals seed {} --hold --task-id seed")
    payload = {"hook_event_name": "Stop", "cwd": "/", "workspace_path": str(installation.directory)}
    installation.sqlite3(f"insert into approvals (data) values ('{json.dumps(payload)}')")
    installation.drain("approvals")
    installation.tq("approve approvals-2")
    installation.drain("approvals")
    assert installation.history("approvals-2")["status"] == "completed"
    envelope = given(installation, "approvals-2")
    assert envelope["task_type"] == envelope["data"]["hook_event_name"] == "Stop"
    assert envelope["granted"] == {"allowed": ["push"], "mode": "careful"}


def test_the_report_tells_it_once(asked):
    def report() -> str:
        done = asked.run("report.py", cwd=asked.directory)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = report()
    assert "wait for a person" in said and '"wants: to push" (task w)' in said.replace("\n", " ")
    assert "wants" not in report()
    asked.tq("approve w --with {}")
    asked.drain("approvals")
    # It asks again, which is news.
    assert "wants: to push" in report()
    asked.tq("reject w")
    report()
    assert not asked.rows("select * from task_told where task_type = ''")


# ---------------------------------------- `tq ask` goes through the held tasks


def ask(installation, answers: str, **env: str) -> str:
    return installation.tq("ask", input=answers, env=env).stdout


def test_each_answer_is_obeyed(installation):
    installation.handler("work", ASKS)
    for name in ("yes", "no", "skip", "edit"):
        add(installation, name)
    installation.drain("approvals")
    editor = installation.handler("editor", "#!/bin/sh\nsed -i 's/careful/edited/' \"$1\"\n")
    said = ask(installation, "?\ny\nNO\ns\ne\n", EDITOR=str(editor))
    assert "1 of 4: yes, work in approvals" in said and "wants: to push" in said
    assert 'yes changes mode: "fast" → "careful"' in said
    for line in ("approved yes", "rejected no", "skipped skip", "approved edit", "1 task left"):
        assert line in said
    assert column(installation, "status") == {"yes": 1, "skip": 3, "edit": 1}
    installation.drain("approvals")
    assert given(installation, "edit")["data"]["mode"] == "edited"
    assert installation.history("no")["status"] == "cancelled"


def test_no_clear_answer_and_no_good_edit_change_anything(asked):
    for answers in ("", "q\n", "maybe\n"):
        assert "1 task left" in ask(asked, answers)
    for editor, says in (
        ("false", "false ended with exit 1"),
        ("/nowhere", "/nowhere: No such file"),
        ("sh -c 'echo [] >\"$1\"' x", "not a JSON object"),
        ("sh -c ': >\"$1\"' x", "not JSON"),
    ):
        assert says in ask(asked, "e\n", EDITOR=editor)
    assert column(asked, "status") == {"w": 3}


def test_a_yes_without_fields_needs_an_edit(installation):
    asks(installation, '{"hold": "x", "data": null}')
    said = ask(installation, "y\ne\n", EDITOR="sed -i s/fast/slow/")
    assert "so name the fields" in said and "approved w" in said


def test_a_task_that_changed_while_the_person_looked_is_left_alone(asked):
    """It was answered elsewhere, ran, and asks again."""
    steps = [["tasks.py", "approve", "w", "--with", "{}"],
             ["worker.py", "approvals", "--drain", "--handlers", str(asked.handlers)]]  # fmt: skip
    commands = [shlex.join([sys.executable, str(ROOT / step[0]), *step[1:]]) for step in steps]
    editor = asked.handler("editor", "#!/bin/sh\n" + "\n".join(commands) + "\n")
    said = ask(asked, "e\n", EDITOR=str(editor))
    assert "skipped, since it is not held any more as it was shown" in said
    assert column(asked, "status") == {"w": 3}


def test_a_row_that_python_cannot_read_is_no_trouble_of_the_others(installation):
    installation.add("approvals work {} --hold --task-id w")
    row = """insert into approvals (data, status) values ('{"a": 1e400}', 3)"""
    installation.sqlite3(row)
    said = ask(installation, "y\ne\ny\n")
    assert "its data cannot be read: 1e400" in said
    assert "approved w" in said and "approved approvals-2" in said
    assert ask(installation, "") == "no task is held\n"
    installation.sqlite3(row)
    refused = installation.tq("approve approvals-3 --with", '{"b": 1}', code=1).stderr
    assert "its data cannot be read: 1e400" in refused
