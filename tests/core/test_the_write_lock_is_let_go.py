"""Whatever ends a transaction, the write lock and the turn are free afterwards, and the connection
goes on.
"""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.core

# Says what is left held: each of these has to be free for others, with the connection still open.
LEFT = """
import fcntl, os, random, signal, sqlite3, sys, threading, time
import queue_helpers as q

q.enqueue_task("notifications", "t", {})
other = sqlite3.connect(q.QUEUE_DB, timeout=0, isolation_level=None)
turn = [os.open(q.STATE_DIR / "turn" / name, os.O_RDWR) for name in ("next", "turn")]

def left():
    found = []
    for fd, name in zip(turn, ("next", "turn")):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
        except BlockingIOError:
            found.append(name)
    try:
        other.execute("begin immediate")
        other.execute("rollback")
    except sqlite3.OperationalError as error:
        found.append(str(error))
    return found
"""

STORM = """
class Alarm(Exception):
    pass

def raise_alarm(number, frame):
    if armed:
        raise Alarm

signal.signal(signal.SIGALRM, raise_alarm)
random.seed(7)
tries, struck, armed = {tries}, 0, False
conn = q.connect()
for number in range(tries):
    done = False
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0006), {again})
            with q.transaction(conn):
                q.insert(conn, "notifications", q.new_row("t", {{}}, f"n{{number}}"))
            done = True
        finally:
            # Nothing is called before this: no signal is handled in between.
            armed = False
    except Alarm:
        struck += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not left(), (number, left())
    found = conn.execute("select count(*) from notifications where task_id = ?", (f"n{{number}}",))
    assert found.fetchone()[0] or not done, number
    assert q.connect() is conn
q.enqueue_task("notifications", "t", {{}}, "the last")
assert not left()
print(struck)
"""


def run(installation, code: str) -> str:
    """Return what a process of its own prints, which must succeed and print nothing on stderr."""
    done = installation.python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("tries", "again"), [(4000, 0), (1000, 0.0003)], ids=["one signal each", "storms"]
)
def test_an_exception_out_of_a_signals_handler_leaves_nothing_held(installation, tries, again):
    code = LEFT + STORM.format(tries=tries, again=again)
    struck = int(run(installation, code).split()[-1])
    # Neither all before nor all after: the signals strike in the middle.
    assert struck > tries / 10
    assert installation.rows("select count(*) from notifications where task_id = 'the last'") == [
        (1,)
    ]


def test_what_raises_in_its_block_undoes_all_of_it(installation):
    code = f"""{LEFT}
conn = q.connect()
for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
    try:
        with q.transaction(conn):
            q.insert(conn, "notifications", q.new_row("t", {{}}))
            q.ensure_queue(conn, "another")
            raise error
    except error:
        assert not left() and not conn.in_transaction
    assert q.ensure_queue(conn, "another") and conn.execute("drop table another")
    conn.queues.discard("another")
try:
    with q.transaction(conn):
        conn.execute("insert into nowhere values (1)")
except q.QueueUnavailable as error:
    assert "no such table" in str(error) and not left()
print(conn.execute("select count(*) from notifications").fetchone()[0])
"""
    assert run(installation, code).split() == ["1"]


def test_one_within_another_is_refused_and_the_outer_one_is_whole(installation):
    code = f"""{LEFT}
conn = q.connect()
with q.transaction(conn):
    q.insert(conn, "notifications", q.new_row("t", {{}}))
    try:
        with q.transaction(conn):
            print("never")
    except RuntimeError:
        assert conn.in_transaction
    q.insert(conn, "notifications", q.new_row("t", {{}}))
assert not left()
print(conn.execute("select count(*) from notifications").fetchone()[0])
"""
    assert run(installation, code).split() == ["3"]


@pytest.mark.parametrize("parent", ["commits", "is killed"])
def test_a_fork_while_another_thread_writes_keeps_nothing_held(installation, parent):
    """The child has copies of the turn's descriptors: they neither keep it nor give it away."""
    code = f"""{LEFT}
import subprocess, warnings
warnings.simplefilter("ignore", DeprecationWarning)
written, forked = threading.Event(), threading.Event()

def write():
    with q.transaction(q.connect()):
        written.set()
        forked.wait()

thread = threading.Thread(target=write, daemon=True)
thread.start()
written.wait()
closed, told = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(told[1])
    os.write(closed[1], b"x")
    # While the parent has let go or died, the child lives on, and others write.
    os.read(told[0], 1)
    check = sys.argv[1] + "assert not left(), left(); print('free')"
    os._exit(subprocess.run([sys.executable, "-c", check]).returncode)
os.read(closed[0], 1)
assert "turn" in left(), left()
if {parent!r} == "is killed":
    os.kill(os.getpid(), 9)
forked.set()
thread.join()
assert not left(), left()
q.enqueue_task("notifications", "t", {{}}, "of the parent")
os.close(told[1])
_, status = os.wait()
sys.exit(status)
"""
    process = installation.start_python(code, LEFT)
    said, _ = process.communicate(timeout=60)
    assert said == "free\n"
    assert process.returncode == (-9 if parent == "is killed" else 0)


def test_a_fork_within_a_transaction_leaves_it_to_the_parent(installation):
    code = f"""{LEFT}
with q.transaction(q.connect()) as conn:
    q.insert(conn, "notifications", q.new_row("t", {{}}, "in the midst"))
    child = os.fork()
    if child == 0:
        # The child falls out of the block, too.
        sys.excepthook = lambda *_: print(_[1], flush=True)
        raise SystemExit(3) if len(sys.argv) > 1 else ValueError("of the child")
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) != 0
    q.insert(conn, "notifications", q.new_row("t", {{}}, "afterwards"))
assert not left()
"""
    for args in ([], ["exit"]):
        done = installation.python(code, *args)
        assert done.returncode == 0, done.stderr
        found = installation.rows("select count(*) from notifications where task_id = 'afterwards'")
        assert found == [(1,)]
        installation.sqlite3("delete from notifications")


def test_threads_take_their_turns_and_leave_no_descriptor(installation):
    code = f"""{LEFT}

def write(name):
    for number in range(40):
        q.enqueue_task("notifications", "t", {{}}, f"{{name}}-{{number}}")

# SQLite keeps some descriptors of closed connections for the next ones: the first round is no measure.
opened = []
for turn_of in range(4):
    names = [f"{{turn_of}}-{{name}}" for name in range(8)]
    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [os.readlink(f"/dev/fd/{{fd}}") for fd in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{{fd}}")]
    opened.append(sum("/turn/" in file for file in files))
assert not left()
# The main thread's two, and the two of this test.
assert opened == [4] * 4, opened
print(other.execute("select count(*) from notifications").fetchone()[0])
"""
    assert run(installation, code).split() == [str(1 + 4 * 8 * 40)]


def test_a_writer_that_is_killed_in_its_turn_holds_nobody_up(installation):
    code = f"""{LEFT}
if os.fork() == 0:
    with q.transaction(q.connect()):
        os.kill(os.getpid(), 9)
os.wait()
assert not left(), left()
"""
    run(installation, code)
    assert os.path.isdir(installation.state / "turn")
