"""A handler that exits 75 with {"hold": "reason", "data": {…}} has its task wait for a person: no
attempt counts, everybody tells why, and approval puts `data` into the payload.
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


def drain(installation, queue: str = "approvals", **options):
    done = installation.run(
        "worker.py", queue, "--handlers", installation.handlers, "--drain", **options
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def tasks(installation, *args: str, code: int = 0):
    done = installation.call("tasks.py", [*args])
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def add(installation, task_id: str, *args: str, data: dict | None = None) -> None:
    data = {"workspace_path": str(installation.directory), "mode": "fast", **(data or {})}
    installation.enqueue("approvals", "work", json.dumps(data), "--task-id", task_id, *args)


def column(installation, name: str, queue: str = "approvals") -> dict:
    return dict(installation.rows(f"select task_id, {name} from {queue}"))


@pytest.fixture
def asked(installation):
    installation.handler("work", ASKS)
    add(installation, "w")
    log = drain(installation)
    assert "work w held" in log and "wants: to push" in log and "1 held" in log
    return installation


def envelope_of(installation, task_id: str) -> dict:
    """What the handler was given when it was done."""
    return json.loads(installation.history(task_id)["result"])


def test_it_is_held_with_its_reason_and_no_attempt_counts(asked):
    rows = json.loads(tasks(asked, "list", "--json"))
    assert [(r["task_id"], r["status"], r["attempts"], r["error"]) for r in rows] == [
        ("w", "held", 0, "wants: to push")
    ]
    assert "wants: to push" in tasks(asked, "list")
    assert "wants: to push" in tasks(asked, "wait", "w", "--timeout", "0.1", code=75)
    shown = tasks(asked, "show", "w")
    assert "wants: to push" in shown
    assert 'approval changes  allowed: not set → ["push"]' in shown
    assert 'mode: "fast" → "careful"' in shown
    assert json.loads(tasks(asked, "show", "w", "--json"))["asks"] == {
        "allowed": ["push"],
        "mode": "careful",
    }
    page = asked.directory / "page.html"
    tasks(asked, "page", str(page))
    assert "wants: to push" in page.read_text() and "allowed: not set" in page.read_text()
    # Nothing runs it, and nothing makes it due.
    assert "retried 0 tasks" in tasks(asked, "retry", "--scheduled")
    tasks(asked, "retry", "w", code=1)
    drain(asked)
    assert column(asked, "status") == {"w": 3}


def test_approval_changes_the_payload_and_one_attempt_counts(asked):
    assert tasks(asked, "approve", "w").startswith("approved w\n")
    assert column(asked, "asks") == {"w": None} and column(asked, "error") == {"w": None}
    drain(asked)
    done = asked.history("w")
    assert (done["status"], done["attempts"]) == ("completed", 1)
    given = envelope_of(asked, "w")["data"]
    assert (given["allowed"], given["mode"]) == (["push"], "careful")
    assert given["workspace_path"] == str(asked.directory)


def test_a_person_may_say_otherwise(asked):
    fields = '{"mode": null, "allowed": "all"}'
    tasks(asked, "approve", "w", "--with", fields)
    drain(asked)
    given = envelope_of(asked, "w")["data"]
    assert given["allowed"] == "all" and "mode" not in given


@pytest.mark.parametrize("fields", ["x", "[]", "3", '{"a": NaN}'])
def test_fields_that_are_no_object_are_refused(asked, fields):
    assert "approve --help" in tasks(asked, "approve", "w", "--with", fields, code=64)
    assert column(asked, "status") == {"w": 3}


def test_a_rejected_one_ends_and_may_be_retried_and_asks_again(asked):
    tasks(asked, "reject", "w", "--reason", "not today")
    assert asked.history("w")["error"] == "rejected: not today"
    assert "held again" in tasks(asked, "retry", "w")
    assert column(asked, "asks") == {"w": None}
    tasks(asked, "approve", "w")
    drain(asked)
    assert column(asked, "error") == {"w": "wants: to push"}


def test_it_is_cancelled_like_any_other(asked):
    tasks(asked, "cancel", "w")
    assert asked.history("w")["status"] == "cancelled"


@pytest.mark.parametrize(
    "data, approves, given",
    [
        ('{"hold": "x"}', True, {}),
        ('{"hold": "x", "data": {}}', True, {}),
        ('{"hold": "x", "data": null}', False, None),
        ('{"hold": "x", "data": [1]}', False, None),
    ],
)
def test_without_fields_approval_goes_on_unchanged_or_needs_them(
    installation, data, approves, given
):
    installation.handler("work", f"#!/bin/sh\necho '{data}'\nexit 75\n")
    add(installation, "w")
    drain(installation)
    before = column(installation, "data")
    if approves:
        tasks(installation, "approve", "w")
        assert column(installation, "data") == before
        return
    assert "the fields that you name" in tasks(installation, "show", "w")
    refused = tasks(installation, "approve", "w", code=1)
    assert "no exact rule allows what it wants" in refused and "approve w --with" in refused
    assert column(installation, "status") == {"w": 3}
    tasks(installation, "approve", "w", "--with", '{"a": 1}')
    [data] = column(installation, "data").values()
    assert json.loads(data)["data"]["a"] == 1


def test_a_last_line_that_only_looks_so_is_no_question(installation):
    installation.handler("work", "#!/bin/sh\necho '{\"hold\": true}'\nexit 75\n")
    add(installation, "w")
    drain(installation)
    assert [
        status for _, status in installation.rows("select task_id, status from task_queue")
    ] == ["scheduled"]


def test_it_keeps_its_groups_turn(installation):
    installation.handler("work", ASKS)
    for name in ("first", "second"):
        add(installation, name, "--group", "g")
    drain(installation)
    assert column(installation, "status") == {"first": 3, "second": 4}
    tasks(installation, "approve", "first")
    assert column(installation, "status") == {"first": 1, "second": 4}
    drain(installation)
    assert installation.history("first")["status"] == "completed"
    # The second one asks now; its end gives the turn away.
    add(installation, "third", "--group", "g")
    assert column(installation, "status") == {"second": 3, "third": 4}
    tasks(installation, "reject", "second")
    assert column(installation, "status") == {"third": 1}


def test_a_later_firing_is_kept_and_comes_after_it(installation):
    data = json.dumps({"workspace_path": str(installation.directory), "fired": "later"})
    fire = shlex.join([sys.executable, str(ROOT / "enqueue.py"), "approvals", "work", data])
    again = f"[ -e ran ] || {fire} --task-id w --on-duplicate rerun; touch ran"
    installation.handler("work", ASKS.replace("cat >payload", f"cat >payload; {again}"))
    add(installation, "w")
    drain(installation)
    assert column(installation, "status") == {"w": 3}
    # What the person sees does not change; another firing is a duplicate.
    assert '"fired"' not in column(installation, "data")["w"]
    done = installation.run(
        "enqueue.py", "approvals", "work", "{}", "--task-id", "w", "--on-duplicate", "replace"
    )
    assert done.stdout.startswith("duplicate w")
    tasks(installation, "reject", "w")
    assert '"fired": "later"' in column(installation, "data")["w"]
    assert column(installation, "status") == {"w": 1}


def test_a_move_an_export_and_a_backup_keep_the_question(asked, tmp_path):
    asks = column(asked, "asks")
    tasks(asked, "move", "w", "notifications")
    assert column(asked, "asks", "notifications") == asks
    file = tmp_path / "tasks.jsonl"
    tasks(asked, "export", str(file))
    tasks(asked, "purge", "notifications", "--yes")
    tasks(asked, "import", str(file))
    assert column(asked, "asks", "notifications") == asks
    assert column(asked, "released_at", "notifications")["w"]
    tasks(asked, "approve", "w")
    drain(asked, "notifications")
    assert envelope_of(asked, "w")["data"]["allowed"] == ["push"]


def test_a_bare_payload_keeps_its_name_and_a_hooks_payload_gets_what_was_approved(installation):
    installation.handler("Stop", ASKS)
    installation.enqueue("approvals", "seed", "{}", "--hold", "--task-id", "seed")
    payload = json.dumps({"hook_event_name": "Stop", "cwd": "/", "allowe": 1,
                          "workspace_path": str(installation.directory)})  # fmt: skip
    installation.sqlite3(f"insert into approvals (data) values ('{payload}')")
    drain(installation)
    ident = "approvals-2"
    tasks(installation, "approve", ident)
    drain(installation)
    assert installation.history(ident)["status"] == "completed"
    given = envelope_of(installation, ident)
    assert given["task_type"] == "Stop"
    assert given["granted"] == {"allowed": ["push"], "mode": "careful"}
    assert given["data"]["hook_event_name"] == "Stop"


def test_the_report_tells_it_once(asked):
    def report() -> str:
        done = asked.run("report.py", cwd=asked.directory)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = report()
    assert "wait for a person" in said and '"wants: to push" (task w)' in said.replace("\n", " ")
    assert "wants" not in report()
    tasks(asked, "approve", "w", "--with", "{}")
    drain(asked)
    # It asks again, which is news.
    assert "wants: to push" in report()
    tasks(asked, "reject", "w")
    report()
    assert not asked.rows("select * from task_told where task_type = ''")


class TestAsk:
    """`tq ask` goes through the held tasks."""

    def ask(self, installation, answers: str, **env: str):
        done = installation.run("tasks.py", "ask", input=answers, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_each_answer_is_obeyed(self, installation):
        installation.handler("work", ASKS)
        for name in ("yes", "no", "skip", "edit"):
            add(installation, name)
        drain(installation)
        editor = installation.handler("editor", "#!/bin/sh\nsed -i 's/careful/edited/' \"$1\"\n")
        said = self.ask(installation, "?\ny\nNO\ns\ne\n", EDITOR=str(editor))
        assert "1 of 4: yes, work in approvals" in said and "wants: to push" in said
        assert 'yes changes mode: "fast" → "careful"' in said
        for line in ("approved yes", "rejected no", "skipped skip", "approved edit", "1 task left"):
            assert line in said
        assert column(installation, "status") == {"yes": 1, "skip": 3, "edit": 1}
        drain(installation)
        assert envelope_of(installation, "edit")["data"]["mode"] == "edited"
        assert installation.history("no")["status"] == "cancelled"

    @pytest.mark.parametrize("answers", ["", "q\n", "maybe\n"])
    def test_an_end_of_the_answers_leaves_the_rest(self, asked, answers):
        assert "1 task left" in self.ask(asked, answers)
        assert column(asked, "status") == {"w": 3}

    @pytest.mark.parametrize(
        "editor, says",
        [
            ("false", "false ended with exit 1"),
            ("/nowhere", "/nowhere: No such file"),
            ("sh -c 'echo [] >\"$1\"' x", "not a JSON object"),
            ("sh -c ': >\"$1\"' x", "not JSON"),
        ],
    )
    def test_an_edit_that_fails_changes_nothing(self, asked, editor, says):
        assert says in self.ask(asked, "e\n", EDITOR=editor)
        assert column(asked, "status") == {"w": 3}

    def test_what_has_no_fields_needs_an_edit(self, installation):
        installation.handler("work", '#!/bin/sh\necho \'{"hold": "x", "data": null}\'\nexit 75\n')
        add(installation, "w")
        drain(installation)
        said = self.ask(installation, "y\ne\n", EDITOR="sed -i s/fast/slow/")
        assert "so name the fields" in said and "approved w" in said

    def test_a_task_that_changed_while_the_person_looked_is_left_alone(self, asked):
        """It was answered elsewhere, ran, and asks again."""
        steps = [["tasks.py", "approve", "w", "--with", "{}"],
                 ["worker.py", "approvals", "--drain", "--handlers", str(asked.handlers)]]  # fmt: skip
        lines = [shlex.join([sys.executable, str(ROOT / step[0]), *step[1:]]) for step in steps]
        editor = asked.handler("editor", "#!/bin/sh\n" + "\n".join(lines) + "\n")
        said = self.ask(asked, "e\n", EDITOR=str(editor))
        assert "skipped, since it is not held any more as it was shown" in said
        assert column(asked, "status") == {"w": 3}

    def test_a_row_that_python_cannot_read_is_no_trouble_of_the_others(self, installation):
        installation.enqueue("approvals", "work", "{}", "--hold", "--task-id", "w")
        row = """insert into approvals (data, status) values ('{"a": 1e400}', 3)"""
        installation.sqlite3(row)
        said = self.ask(installation, "y\ne\ny\n")
        assert "approved w" in said and "its data cannot be read: 1e400" in said
        assert "approved approvals-2" in said
        installation.sqlite3(row)
        refused = tasks(installation, "approve", "approvals-3", "--with", '{"b": 1}', code=1)
        assert "its data cannot be read: 1e400" in refused

    def test_nothing_held_is_said(self, installation):
        installation.enqueue("approvals", "work", "{}")
        assert self.ask(installation, "") == "no task is held\n"
