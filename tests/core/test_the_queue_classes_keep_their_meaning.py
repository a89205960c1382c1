"""What people wrote against persist-queue's classes means the same here: methods, errors, threads,
executors, forks.
"""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import persistqueue
import pytest
from conftest import wait_for

pytestmark = pytest.mark.core


def numbers(texts) -> list[int]:
    return [json.loads(text)["n"] for text in texts]


def fill(queue, *values: int, name="notifications") -> None:
    mine = queue.get_queue(name)
    for n in values:
        mine.put({"n": n})


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.fixture
def plain(queue):
    return queue.get_queue("notifications")


@pytest.fixture
def mine(queue):
    """An ack queue; it puts a failed task back at once."""
    return queue.get_ack_queue("notifications", backoff=0)


def test_they_are_persist_queues_and_one_class_each(queue, plain, mine):
    assert isinstance(plain, persistqueue.SQLiteQueue)
    assert isinstance(mine, persistqueue.SQLiteAckQueue)
    assert type(plain) is queue.SQLiteQueue is type(queue.get_queue("approvals"))
    assert type(mine) is queue.SQLiteAckQueue is type(queue.get_ack_queue("approvals"))
    assert queue.Empty is persistqueue.Empty and issubclass(queue.Empty, Exception)


def test_their_signatures_take_what_persist_queues_take(installation, queue):
    state, name = str(installation.state), "notifications"
    off = {"multithreading": False, "auto_commit": False, "serializer": None}
    for made in (
        queue.SQLiteQueue(state, name, True, 5.0, True),
        queue.SQLiteQueue(path=state, name=name, timeout=0.5, **off),
        queue.SQLiteAckQueue(state, True, name=name, multithreading=True),
        queue.SQLiteAckQueue(state, auto_resume=False, name=name, db_file_name="other.db"),
        queue.get_queue(name, timeout=1, multithreading=True),
        queue.get_ack_queue(name, auto_resume=False, max_attempts=2, backoff=0),
    ):
        made.put({"n": 1})
        made.task_done()
        assert made.full() is False and made.name == name
        made.close()
    assert installation.rows("select count(*) from notifications") == [(6,)]
    assert [path.name for path in installation.state.glob("*.db")] == ["tasks.db"]


def test_put_takes_a_dict_or_json_text_and_get_returns_the_text(queue, plain):
    assert [plain.put(each) for each in ({"n": 1}, '{"n":   2}', b'{"n": 3}')] == [1, 2, 3]
    assert plain.put_nowait({"n": 4}) == 4
    assert [plain.get(), plain.get(block=True)] == ['{"n": 1}', '{"n":   2}']
    assert [plain.get(block=False), plain.get_nowait()] == ['{"n": 3}', '{"n": 4}']
    for refused in ("[]", "x", "", [1], 7, None, {"n": float("nan")}):
        with pytest.raises(queue.InvalidTask):
            plain.put(refused)
    assert plain.empty()


@pytest.mark.parametrize("kind", ["plain", "mine"])
def test_get_raises_empty_in_time(queue, kind, request):
    each = request.getfixturevalue(kind)
    with pytest.raises(queue.Empty):
        each.get(block=False)
    with pytest.raises(queue.Empty):
        each.get_nowait()
    for timeout in (0, 0.3):
        began = time.monotonic()
        with pytest.raises(queue.Empty):
            each.get(block=True, timeout=timeout)
        assert timeout <= time.monotonic() - began < timeout + 0.3
    with pytest.raises(ValueError):
        each.get(timeout=-1)


def test_get_takes_the_oldest_first_raw_or_by_id(queue, plain):
    fill(queue, 1, 2, 3, 4)
    raw = plain.get(id=2, raw=True)
    assert raw["pqid"] == 2 and json.loads(raw["data"]) == {"n": 2}
    assert abs(raw["timestamp"] - time.time()) < 60
    with pytest.raises(queue.Empty):
        plain.get(id=2, block=False)
    assert json.loads(plain.get_nowait(id=4)) == {"n": 4}
    assert numbers([plain.get(timeout=0), plain.get()]) == [1, 3]


def test_an_ack_queues_get_raw_by_id_and_next_in_order(queue, mine):
    fill(queue, 1, 2, 3, 4)
    raw = mine.get(id=3, raw=True)
    assert raw["pqid"] == 3 and json.loads(raw["data"]) == {"n": 3}
    assert mine.get(id=2, next_in_order=True)[0] == 4
    assert mine.get(id=4, next_in_order=True)[0] == 1  # past the end it starts over
    with pytest.raises(queue.Empty):
        mine.get(id=3, block=False)
    with pytest.raises(ValueError):
        mine.get(next_in_order=True)
    assert mine.ack(raw) == 3  # a raw item is as good as its id
    assert [row["status"] for row in mine.queue()] == [2, 1, 2]


def test_both_kinds_and_enqueue_task_meet_in_one_table(queue, plain, mine):
    task_id = queue.enqueue_task("notifications", "t", {"n": 1})
    plain.put({"n": 2})
    mine.put({"n": 3})
    row_id, text = mine.get()
    assert json.loads(text)["task_id"] == task_id and json.loads(text)["data"] == {"n": 1}
    assert mine.ack(row_id) == row_id and numbers([plain.get()]) == [2]
    bare = queue.dequeue_task("notifications")
    assert (bare["data"], bare["task_id"], bare["task_type"]) == (
        {"n": 3}, "notifications-3", "notifications",
    )  # fmt: skip
    assert queue.dequeue_task("notifications") is None


def test_dequeue_task_waits_as_long_as_it_is_told(installation, queue):
    began = time.monotonic()
    assert queue.dequeue_task("notifications") is None
    assert queue.dequeue_task("notifications", 0) is None and time.monotonic() - began < 0.3
    assert queue.dequeue_task("notifications", timeout=0.3) is None
    assert 0.3 <= time.monotonic() - began < 1
    later = threading.Timer(0.3, installation.enqueue, ["notifications", "t"])
    later.start()
    assert queue.dequeue_task("notifications", timeout=10)["task_type"] == "t"
    later.join()


def test_queue_lists_waiting_tasks_and_update_changes_one(queue, plain, mine):
    fill(queue, 1, 2)
    for each in (plain, mine):
        assert [(row["id"], row["data"]) for row in each.queue()] == [(1, '{"n": 1}'), (2, '{"n": 2}')]  # fmt: skip
        assert all(abs(row["timestamp"] - time.time()) < 60 for row in each.queue())
    assert mine.update({"n": 9}, id=2) == 2
    assert numbers([mine.get()[1], mine.get()[1]]) == [1, 9]


# ------------------------------------------------------------------------------------------------------- ack and the like


def test_ack_nack_and_ack_failed_take_an_id_an_item_or_the_pair_of_get(queue, mine, installation):
    fill(queue, *range(8))
    got = [mine.get() for _ in range(8)]
    # The item alone, too, as persist-queue has it.
    assert [mine.ack(each) for each in (got[0][0], got[1], got[2][1])] == [1, 2, 3]
    assert mine.ack(id=got[3][0]) == 4 and mine.ack(id="5") == 5
    assert mine.ack_failed(got[5][0], error="broken") == 6 and mine.nack(got[6][0]) == 7
    with pytest.raises(ValueError):
        mine.ack()
    with pytest.raises(ValueError):
        mine.ack(8, id=8)
    counts = mine.unack_count(), mine.acked_count(), mine.ack_failed_count(), mine.ready_count()
    assert counts == (1, 5, 1, 1)
    assert installation.rows("select error from task_history where status = 'failed'") == [("broken",)]  # fmt: skip
    assert mine.get(timeout=2)[0] == 7


@pytest.mark.parametrize("number", [0, -1, 2**62, 2**63, 2**70, -(2**70)])
def test_an_ack_of_any_number_is_answered(queue, mine, number):
    fill(queue, 1)
    row_id, _ = mine.get()
    for verb in (mine.ack, mine.nack, mine.ack_failed):
        assert verb(number) is False and verb(id=number) is False
    assert mine.ack(row_id) == row_id


def test_nack_backs_off_and_ends(installation, queue):
    fill(queue, 1)
    mine = queue.get_ack_queue("notifications", max_attempts=3, backoff=0.2)
    began = time.monotonic()
    for _ in range(3):
        row_id, _ = mine.get(timeout=5)
        assert mine.nack(row_id) == row_id
    assert 0.3 <= time.monotonic() - began < 4
    [row] = installation.rows("select status, attempts, error from task_history")
    assert row[:2] == ("failed", 3) and "3 of 3" in row[2]


def test_an_ack_that_found_the_database_locked_can_be_repeated(installation, queue):
    fill(queue, 1, 2, 3)
    mine = queue.get_ack_queue("notifications", timeout=0.05)
    ends = [(verb, mine.get()[0]) for verb in (mine.ack, mine.nack, mine.ack_failed)]
    lock = sqlite3.connect(installation.db, isolation_level=None)
    lock.execute("begin immediate")
    for verb, row_id in ends:
        with pytest.raises(queue.QueueBusy):
            verb(row_id)
    lock.execute("rollback")
    lock.close()
    assert all(verb(row_id) == row_id for verb, row_id in ends) and mine.unack_count() == 0


def test_a_claim_is_the_whole_processs_and_opening_takes_nothing_from_it(queue, mine):
    """README: get_ack_queue(…).get() here and get_ack_queue(…).ack(id) there."""
    fill(queue, 1)
    row_id, _ = mine.get()
    other = queue.get_ack_queue("notifications", auto_resume=True)
    other.resume_unack_tasks()
    assert other.qsize() == 0 and mine.unack_count() == other.unack_count() == 1
    assert other.ack(row_id) == row_id


def test_clear_acked_data_forgets_finished_tasks_but_the_latest(queue, mine):
    def counts() -> tuple:
        return mine.acked_count(), mine.ack_failed_count(), mine.qsize()

    fill(queue, *range(6))
    for _ in range(4):
        mine.ack(mine.get()[0])
    mine.ack_failed(mine.get()[0])
    mine.clear_acked_data(max_delete=1000, keep_latest=1)
    assert counts() == (1, 1, 1)
    mine.clear_acked_data(keep_latest=0, clear_ack_failed=True)
    assert counts() == (0, 0, 1)


# ------------------------------------------------------------------------------------------------ threads and executors


def test_eight_threads_share_one_queue_object(queue, mine):
    def put(part: int) -> list[int]:
        for n in range(part, 240, 4):
            mine.put({"n": n})
        return []

    def take(_) -> list[int]:
        taken = []
        while True:
            try:
                row_id, text = mine.get(timeout=1.0)
            except queue.Empty:
                return taken
            assert mine.ack(row_id) == row_id
            taken += numbers([text])

    with ThreadPoolExecutor(8) as pool:
        parts = [pool.submit(verb, part) for verb in (put, take) for part in range(4)]
        taken = [n for part in parts for n in part.result()]
    assert sorted(taken) == list(range(240))
    assert (mine.unack_count(), mine.acked_count()) == (0, 240)


def test_one_thread_may_ack_what_another_took_that_has_ended(queue, mine):
    fill(queue, 1)
    with ThreadPoolExecutor(1) as pool:
        row_id, _ = pool.submit(mine.get).result()
    assert mine.ack(row_id) == 1


def test_from_run_in_executor(queue, mine):
    async def main():
        run = asyncio.get_running_loop().run_in_executor
        waiting = [run(None, lambda: mine.get(timeout=10)) for _ in range(3)]
        await run(None, lambda: fill(queue, 1, 2, 3))
        taken = await asyncio.gather(*waiting)
        return await asyncio.gather(*(run(None, mine.ack, row_id) for row_id, _ in taken))

    assert sorted(asyncio.run(main())) == [1, 2, 3] and mine.acked_count() == 3


def test_threads_leave_no_connection_behind(queue, plain):
    def descriptors_after(threads: int) -> int:
        for _ in range(threads):
            thread = threading.Thread(target=plain.qsize)
            thread.start()
            thread.join()
        return len(os.listdir("/proc/self/fd"))

    before = descriptors_after(20)
    assert descriptors_after(40) <= before + 4


def test_asked_for_by_many_threads_at_once_they_are_still_one_class(installation):
    code = """if True:
        import sys, threading
        sys.setswitchinterval(1e-6)
        import queue_helpers as q
        made, barrier = [], threading.Barrier(8)
        def make():
            barrier.wait()
            made.append(q.SQLiteAckQueue)
        threads = [threading.Thread(target=make) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(set(map(id, made))))
    """
    assert installation.python(code).stdout == "1\n"


# ----------------------------------------------------------------------------------------------------------------- fork

# These run in a process of their own: a child of the tests' process would run pytest's end.
FORK = """
import json, os, sys, time
import logging; logging.disable()
# What is called once in a fork, after the queue's own preparations.
BEFORE = []
os.register_at_fork(before=lambda: BEFORE and BEFORE.pop()())
import queue_helpers as q

def forked(action):
    '''The child's result of action, by a pipe; the child ends at once.'''
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            result = action()
        except BaseException as error:
            result = repr(error)
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        said = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(said)

def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
"""


def run_forking(installation, code: str):
    """What the code prints, which is JSON. Its children end with it, even those that hang."""
    # Python 3.12 and later warn of each fork of a process with threads. That such a child can go on
    # is what is tested.
    silent = {"PYTHONWARNINGS": "ignore:This process:DeprecationWarning"}
    process = installation.start_python(
        FORK + code, env=silent, start_new_session=True, stderr=subprocess.PIPE
    )
    try:
        said, errors = process.communicate(timeout=30)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert (process.returncode, errors) == (0, "")
    return json.loads(said)


def test_a_child_uses_the_parents_queue_objects(installation):
    said = run_forking(
        installation,
        """
mine, plain = q.get_ack_queue("notifications"), q.get_queue("notifications")
mine.put({"n": 1}); mine.put({"n": 2}); mine.put({"n": 3})
def child():
    row, text = mine.get(timeout=5)
    return [row, mine.ack(row), json.loads(plain.get())["n"], mine.qsize(), mine.put({"n": 4}), q.enqueue_task("notifications", "t", {}, "five")]
print(json.dumps([forked(child), mine.qsize(), mine.unack_count(), mine.acked_count()]))
""",
    )
    assert said == [[1, 1, 2, 1, 4, "five"], 3, 0, 2]


def test_the_parent_keeps_its_claim_when_the_child_ends(installation):
    said = run_forking(
        installation,
        """
mine = q.get_ack_queue("notifications")
mine.put({"n": 1})
row, _ = mine.get()
owner = q.owner_name()
child = forked(lambda: [q.recover()[0], q.get_ack_queue("notifications").unack_count(), q.owner_name()])
recovered = q.recover()
print(json.dumps([child[:2], child[2] != owner, recovered, owner == q.owner_name(), mine.ack(row)]))
""",
    )
    assert said == [[[], 1], True, [[], 0], True, 1]


def test_the_child_cannot_end_what_the_parent_claimed(installation):
    said = run_forking(
        installation,
        """
mine = q.get_ack_queue("notifications")
for n in range(3):
    mine.put({"n": n})
rows = [mine.get()[0] for _ in range(3)]
child = forked(lambda: [mine.ack(rows[0]), mine.nack(rows[1]), mine.ack_failed(rows[2])])
print(json.dumps([child, mine.unack_count(), [mine.ack(row) for row in rows]]))
""",
    )
    assert said == [[False, False, False], 3, [1, 2, 3]]


def test_what_a_dead_child_claimed_comes_back(installation):
    said = run_forking(
        installation,
        """
mine = q.get_ack_queue("notifications")
mine.put({"n": 1})
row = forked(lambda: mine.get()[0])
began = time.monotonic()
again = mine.get(timeout=10)[0]
print(json.dumps([row, again, time.monotonic() - began < 2, mine.ack(again)]))
""",
    )
    assert said == [1, 1, True, 1]


def test_a_child_keeps_no_owner_alive(installation):
    """A parent that was killed is dead, although its child lives on."""
    said = run_forking(
        installation,
        """
import signal
q.connect()
read, write = os.pipe()
if not (parent := os.fork()):
    mine = q.get_ack_queue("notifications")
    mine.put({"n": 1})
    mine.get()
    if not os.fork():
        os.write(write, b"%d " % os.getpid())
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
grandchild = int(os.read(read, 20))
os.kill(parent, signal.SIGKILL)
os.waitpid(parent, 0)
began = time.monotonic()
row, _ = q.get_ack_queue("notifications").get(timeout=10)
os.kill(grandchild, signal.SIGKILL)
print(json.dumps([row, time.monotonic() - began < 2]))
""",
    )
    assert said == [1, True]


def test_a_sleeper_wakes_in_a_child_of_a_process_that_watches(installation):
    said = run_forking(
        installation,
        """
mine = q.get_queue("notifications")
mine.put({"n": 0})
mine.get(timeout=5)
try:
    mine.get(timeout=0.1)  # now the parent's watch runs
except q.Empty:
    pass
read, write = os.pipe()
if not (pid := os.fork()):
    os.write(write, b"sleeps")
    waited = []
    for _ in range(3):
        mine.get(timeout=20)
        waited.append(time.monotonic())
        os.write(write, b"had")
    os.write(write, json.dumps(waited).encode())
    os._exit(0)
os.read(read, 100)
put = []
for n in range(3):
    time.sleep(0.4)
    mine.put({"n": n})
    put.append(time.monotonic())
    os.read(read, 3)
waited = json.loads(os.read(read, 1000))
print(json.dumps([had - at < 0.5 for had, at in zip(waited, put)]))
""",
    )
    assert said == [True, True, True]


def test_a_fork_waits_for_the_watch_to_finish_its_look(installation):
    """A fork closes the watch's connection, which crashed the process where the watch was at work."""
    said = run_forking(
        installation,
        """
import subprocess
from taskqueue import wake as queue_wake
queue_wake.OWNER_CLOSED_SECONDS = 1e9  # so that every look recovers, too
mine = q.get_ack_queue("notifications")
mine.put({"n": 1})
mine.get(timeout=5)
q.Watch.of()
code = "import queue_helpers as q\\nwhile True: q.enqueue_task('other', 't', {})"
writer = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
until(lambda: q.connect().execute("select count(*) from sqlite_master where name = 'other'").fetchone()[0])
codes = set()
for _ in range(250):
    if not (pid := os.fork()):
        os._exit(0)
    codes.add(os.waitpid(pid, 0)[1])
writer.kill()
writer.wait()
print(json.dumps([sorted(codes)]))
""",
    )
    assert said == [[0]]


def test_a_child_keeps_its_parents_connections_where_two_threads_fork_at_once(installation):
    """To close its copies would drop its parent's locks."""
    said = run_forking(
        installation,
        """
import gc, threading
held, done = threading.Event(), threading.Event()

def hold():
    q.connect()
    held.set()
    done.wait()

def alive():
    gc.collect()
    return sum(isinstance(each, q.Connection) for each in gc.get_objects())

forks = []
def fork():
    forks.append(forked(alive))

threading.Thread(target=hold).start()
held.wait()
second = threading.Thread(target=fork)
BEFORE.append(lambda: (second.start(), second.join()))
fork()
done.set()
print(json.dumps(forks))
""",
    )
    assert said == [1, 1]


def test_a_wake_is_written_into_no_other_file(installation):
    """Where a thread opens a connection meanwhile, the database may get the number of a descriptor
    that was closed.
    """
    said = run_forking(
        installation,
        """
import threading
q.enqueue_task("notifications", "t", {})

def late(write):
    def slow(fd, *args):
        os.write, os.pwrite = really
        thread = threading.Thread(target=q.connect)
        thread.start()
        thread.join()
        return write(fd, *args)
    return slow

really = os.write, os.pwrite
os.write, os.pwrite = map(late, really)
q.wake(q.STATE_DIR)
os.write, os.pwrite = really
print(json.dumps([open(q.QUEUE_DB, "rb").read(15).decode()]))
""",
    )
    assert said == ["SQLite format 3"]


@pytest.mark.parametrize("leaves", ["ends", "is killed"])
def test_nothing_that_a_child_puts_after_its_parent_has_gone_is_lost(installation, leaves):
    """The parent's end must not take the write-ahead log from under the child."""
    code = (
        FORK
        + """
q.enqueue_task("notifications", "t", {}, "by the parent")
parent = os.getpid()
if os.fork():
    until(lambda: q.connect().execute("select count(*) from notifications").fetchone()[0] == 2)
    if sys.argv[1] == "is killed":
        os.kill(os.getpid(), 9)
    sys.exit()
q.enqueue_task("notifications", "t", {}, "by the child, before")
until(lambda: os.getppid() != parent)
import subprocess
look = ["sqlite3", q.QUEUE_DB, "select count(*) from notifications"]
subprocess.run(look, stdout=subprocess.DEVNULL, check=True)  # somebody comes, and is the last to leave
q.enqueue_task("notifications", "t", {}, "by the child, after")
print("put", flush=True)
until(lambda: not sys.stdin.read(1))
"""
    )
    process = installation.start_python(code, leaves)
    with process:
        assert process.stdout.readline() == "put\n"
        ids = installation.sqlite3("select task_id from notifications order by id").splitlines()
        process.stdin.close()
    assert ids == ["by the parent", "by the child, before", "by the child, after"]
    assert installation.sqlite3("pragma integrity_check") == "ok"


# ------------------------------------------------------------------------------------------------------------- accidents


def test_a_deleted_state_directory_is_made_anew(installation, queue, mine):
    fill(queue, 1, 2)
    mine.get()
    shutil.rmtree(installation.state)
    assert mine.qsize() == 0 and mine.put({"n": 3}) == 1
    row_id, text = mine.get(timeout=5)
    assert numbers([text]) == [3] and mine.ack(row_id) == row_id


def test_a_sleeping_get_survives_a_replaced_state_directory(installation, queue):
    mine, taken = queue.get_queue("notifications"), []
    sleeper = threading.Thread(target=lambda: taken.append(mine.get(timeout=20)), daemon=True)
    sleeper.start()
    wait_for(lambda: getattr(queue.Watch.instances.get(installation.state), "listening", False))
    installation.state.rename(installation.directory / "moved away")
    installation.enqueue("notifications", "t")
    began = time.monotonic()
    sleeper.join(20)
    assert taken and time.monotonic() - began < 6  # a safety tick at most


def test_rows_that_persist_queue_itself_claimed_are_recovered_by_who_owns_nothing(
    installation, queue
):
    fill(queue, 1)
    # As persist-queue marks what it hands out: no owner, and no time.
    installation.sqlite3("update notifications set status = 2")
    done = installation.python("import queue_helpers as q; print(len(q.recover()[0]))")
    assert done.stdout == "1\n", done.stderr
    assert installation.rows("select status in (1, 3) from notifications") == [(1,)]
