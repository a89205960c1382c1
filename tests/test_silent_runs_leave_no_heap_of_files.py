"""What a run printed is kept until clean-up; a file in which nothing is goes to a later run, if nobody else has it open."""

import sys

import pytest
from conftest import wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says who has a file open")
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
        wait_for(lambda: installation.rows("select count(*) from task_history") == [(total,)], what="the end of all")

    return run


def files(installation) -> dict[str, int]:
    """{name: inode} of the runs' output files."""
    return {path.name: path.stat().st_ino for path in (installation.state / "logs/notifications").iterdir()}


def test_two_files_do_for_many(installation, run):
    run("silent", 500)
    assert len(files(installation)) < 200
    assert len(set(files(installation).values())) == len(files(installation))


def test_what_was_printed_stays(installation, run):
    installation.handler("loud", '#!/bin/sh\necho "$TASK_ID"\necho "$TASK_ID" >&2\n')
    for _ in range(5):
        run("loud", 4)
        run("silent", 20)
    ids = sorted(task for (task,) in installation.rows("select task_id from task_history where task_type = 'loud'"))
    for ending in ("out", "err"):
        texts = [path.read_text() for path in (installation.state / "logs/notifications").glob(f"*.{ending}")]
        assert sorted(text.strip() for text in texts if text) == ids


def test_a_file_that_a_person_reads_stays(installation, run):
    run("silent")
    read = sorted((installation.state / "logs/notifications").iterdir())
    opened = [open(path, "rb") for path in read]  # noqa: SIM115
    run("silent", 50)
    installation.handler("loud", "#!/bin/sh\necho out\necho err >&2\n")
    run("loud", 50)
    assert [file.read() for file in opened] == [b"", b""]
    assert all(path.exists() for path in read)
    for file in opened:
        file.close()


@pytest.mark.parametrize("how", ["2>&2", "2>/dev/stderr"])
def test_a_file_that_a_daemon_may_write_stays(installation, run, how):
    installation.handler("daemon", f"""#!/bin/sh
( until [ -e "$HOME/go" ]; do sleep 0.02; done; echo late >&2 ) </dev/null >/dev/null {how} &
""")
    run("silent", 5)
    run("daemon")
    run("silent", 50)
    (task,) = installation.rows("select row_id from task_history where task_type = 'daemon'")[0]
    (installation.directory / "go").touch()
    logs = installation.state / "logs/notifications"
    wait_for(lambda: [path.name.split("-")[0] for path in logs.glob("*.err") if path.read_text() == "late\n"] == [str(task)])
    run("silent", 50)
    assert [path.name.split("-")[0] for path in logs.iterdir() if path.read_text()] == [str(task)]
