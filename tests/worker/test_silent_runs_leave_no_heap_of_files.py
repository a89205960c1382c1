"""What a run printed is kept until clean-up; of one that printed nothing, no file is left unless
somebody may still write it.
"""

import pytest
from conftest import wait_for

SILENT = "#!/bin/sh\n"


@pytest.fixture
def run(installation):
    """run(task_type, number): run that many tasks, one after the other, by one worker for all."""
    installation.handler("silent", SILENT)
    installation.worker("notifications")
    total = 0

    def run(task_type: str, number: int = 1) -> None:
        nonlocal total
        total += number
        installation.enqueue("notifications", task_type, "--jsonl", input='{"n": 1}\n' * number)
        wait_for(
            lambda: installation.rows("select count(*) from task_history") == [(total,)],
            what="the end of all",
        )

    return run


def files(installation) -> dict[str, int]:
    """{name: inode} of the runs' output files."""
    return {
        path.name: path.stat().st_ino
        for path in (installation.state / "logs/notifications").iterdir()
    }


def test_no_file_is_left_of_many(installation, run):
    run("silent", 200)
    wait_for(lambda: not files(installation), what="the end of the last files")


def test_what_was_printed_stays(installation, run):
    installation.handler("loud", '#!/bin/sh\necho "$TASK_ID"\necho "$TASK_ID" >&2\n')
    for _ in range(5):
        run("loud", 4)
        run("silent", 20)
    ids = sorted(
        task
        for (task,) in installation.rows(
            "select task_id from task_history where task_type = 'loud'"
        )
    )
    for ending in ("out", "err"):
        texts = [
            path.read_text()
            for path in (installation.state / "logs/notifications").glob(f"*.{ending}")
        ]
        assert sorted(text.strip() for text in texts if text) == ids


@pytest.mark.parametrize("stream, other", [(1, 2), (2, 1)])
def test_a_file_that_a_daemon_may_write_stays(installation, run, stream, other):
    installation.handler(
        "daemon",
        f"""#!/bin/sh
( until [ -e "$HOME/go" ]; do sleep 0.02; done; echo late >&{stream} ) </dev/null {other}>/dev/null &
""",
    )
    run("daemon")
    run("silent", 20)
    (task,) = installation.rows("select row_id from task_history where task_type = 'daemon'")[0]
    (installation.directory / "go").touch()
    logs = installation.state / "logs/notifications"
    ending = {1: "out", 2: "err"}[stream]
    wait_for(
        lambda: (
            [
                path.name.split("-")[0]
                for path in logs.glob(f"*.{ending}")
                if path.read_text() == "late\n"
            ]
            == [str(task)]
        )
    )
