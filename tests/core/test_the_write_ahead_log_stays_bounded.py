import sqlite3

from conftest import wait_for

MIB = 2**20


def test_after_a_long_reader_has_ended_and_a_warning_comes_before(installation, queue):
    installation.enqueue("notifications", "any", "--delay", "3600")
    worker = installation.worker("notifications")
    wal = installation.state / "tasks.db-wal"
    reader = sqlite3.connect(installation.db, isolation_level=None)
    reader.execute("begin")
    reader.execute("select count(*) from notifications").fetchone()
    for _ in range(5):
        queue.enqueue_task("notifications", "any", {"text": "x" * 15 * MIB}, delay=3600)
    size = wal.stat().st_size
    assert size > 64 * MIB
    wait_for(lambda: str(wal) in worker.log.read_text(), 15, "a warning")
    assert "long read" in worker.log.read_text() and wal.stat().st_size >= size
    reader.execute("commit")
    reader.close()
    wait_for(lambda: wal.stat().st_size <= queue.WAL_BYTES, 60, "the end of the write-ahead log")
    assert worker.log.read_text().count("long read") == 1 and worker.poll() is None
