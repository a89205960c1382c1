"""tasks.py import --legacy: the JSON files of a file-based queue become tasks, once, however often
it runs.
"""

from __future__ import annotations

import json
import os
import signal

import pytest
from conftest import wait_for


@pytest.fixture
def legacy(installation):
    directory = installation.directory / "old queue"
    directory.mkdir()
    return directory


def write(directory, name: str, content: object) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    write.clock += 1
    os.utime(directory / name, (write.clock, write.clock))


write.clock = 1_000_000


def migrate(installation, legacy, *args, code: int = 0) -> dict:
    done = installation.run("tasks.py", "import", "--legacy", legacy, "--json", *args)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_each_kind_of_file_goes_to_its_queue_and_then_to_migrated(installation, legacy):
    write(legacy, "notify_ws1_123.json", {"workspace_path": "/x", "n": 1})
    write(legacy, "approval_a.json", {"task_type": "review", "decision": "fix"})
    write(legacy, "completion_c.json", "\ufeff" + json.dumps({"ok": True, "text": "ä"}))
    write(legacy, "notes.txt", "not ours")
    write(legacy, "notify.json", "{}")
    assert migrate(installation, legacy) == {"imported": 3, "already_there": 0, "refused": []}
    assert names(legacy) == ["migrated", "notes.txt", "notify.json"]
    assert names(legacy / "migrated") == [
        "approval_a.json",
        "completion_c.json",
        "notify_ws1_123.json",
    ]
    rows = installation.rows(
        "select queue, task_type, json_extract(data, '$.data') from task_queue order by queue"
    )
    assert rows == [("approvals", "review", '{"task_type":"review","decision":"fix"}'),
                    ("completions", "completion", '{"ok":true,"text":"ä"}'),
                    ("notifications", "notification", '{"workspace_path":"/x","n":1}')]  # fmt: skip


def test_they_are_claimed_in_the_order_in_which_the_files_were_written(installation, legacy):
    for name in ("notify_z.json", "notify_a.json", "notify_m.json"):
        write(legacy, name, {"name": name})
    migrate(installation, legacy)
    rows = installation.rows(
        "select json_extract(data, '$.data.name') from notifications order by id"
    )
    assert rows == [("notify_z.json",), ("notify_a.json",), ("notify_m.json",)]


def test_a_type_can_be_given_for_files_that_name_none(installation, legacy):
    write(legacy, "notify_a.json", {})
    write(legacy, "notify_b.json", {"task_type": "own"})
    migrate(installation, legacy, "--type", "link_validation")
    assert installation.rows("select task_type from notifications order by id") == [
        ("link_validation",),
        ("own",),
    ]


def test_the_same_file_never_becomes_a_second_task_not_even_when_the_first_is_done(
    installation, legacy
):
    installation.handler("notification", "#!/bin/sh\n")
    write(legacy, "notify_a.json", {"n": 1})
    migrate(installation, legacy)
    write(legacy, "notify_a.json", {"n": 1})
    assert migrate(installation, legacy) == {"imported": 0, "already_there": 1, "refused": []}
    assert (
        installation.run(
            "worker.py", "notifications", "--handlers", installation.handlers, "--drain"
        ).returncode
        == 0
    )
    write(legacy, "notify_a.json", {"n": 1})
    assert migrate(installation, legacy) == {"imported": 0, "already_there": 1, "refused": []}
    assert installation.rows("select status from task_queue") == [("completed",)]
    write(legacy, "notify_a.json", {"n": 2})
    assert migrate(installation, legacy)["imported"] == 1
    assert names(legacy) == ["migrated"] and len(names(legacy / "migrated")) == 3


def test_unreadable_files_stay_and_are_named_and_the_others_come_in(installation, legacy):
    bad = {"notify_broken.json": "{", "notify_array.json": "[1]", "approval_empty.json": "", "completion_deep.json": "[" * 9000,
           "notify_type.json": '{"task_type": "../../evil"}', "notify_nan.json": '{"a": NaN}'}  # fmt: skip
    for name, text in bad.items():
        write(legacy, name, text)
    (legacy / "notify_bytes.json").write_bytes(b'{"a": "\xff\xfe"}')
    (legacy / "notify_directory.json").mkdir()
    os.symlink(legacy / "nowhere", legacy / "notify_dangling.json")
    os.mkfifo(legacy / "notify_fifo.json")
    stay = [
        *bad,
        "notify_bytes.json",
        "notify_directory.json",
        "notify_dangling.json",
        "notify_fifo.json",
    ]
    write(legacy, "notify_good.json", {"n": 1})
    done = installation.run("tasks.py", "import", "--legacy", legacy, timeout=20)
    assert done.returncode == 65 and "imported 1 task;" in done.stdout
    assert len(done.stderr.splitlines()) == len(stay) and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in stay)
    assert names(legacy) == sorted([*stay, "migrated"])
    assert installation.rows("select count(*) from task_queue") == [(1,)]
    os.unlink(legacy / "notify_fifo.json")


def test_a_migration_that_is_killed_is_finished_by_the_next_one(installation, legacy):
    for n in range(400):
        write(legacy, f"notify_{n:03}.json", {"n": n})
    for _ in range(3):
        process = installation.start("tasks.py", "import", "--legacy", legacy)
        before = len(names(legacy))
        wait_for(
            lambda before=before, process=process: (
                len(names(legacy)) < before - 20 or process.poll() is not None
            )
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    migrate(installation, legacy)
    assert names(legacy) == ["migrated"] and len(names(legacy / "migrated")) == 400
    assert installation.rows(
        "select count(*), count(distinct json_extract(data, '$.data.n')) from notifications"
    ) == [(400, 400)]


def test_a_directory_that_cannot_be_moved_into_is_said_and_nothing_comes_twice(
    installation, legacy
):
    write(legacy, "notify_a.json", {"n": 1})
    (legacy / "migrated").write_text("in the way")
    done = installation.run("tasks.py", "import", "--legacy", legacy)
    assert done.returncode == 65 and "could not be moved" in done.stderr
    (legacy / "migrated").unlink()
    assert migrate(installation, legacy) == {"imported": 0, "already_there": 1, "refused": []}
    assert installation.rows("select count(*) from notifications") == [(1,)]


def test_a_missing_directory_is_said(installation, legacy):
    done = installation.run("tasks.py", "import", "--legacy", legacy / "nowhere")
    assert (
        done.returncode == 1
        and "is not a directory" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )
