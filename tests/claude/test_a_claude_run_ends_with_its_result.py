"""A claude task ends with its result: a client that lives on, or a child that holds its output open,
holds neither task nor slot. With a stand-in for claude.
"""

from __future__ import annotations

import json
import signal

import pytest
from claude_stub.fake import DONE, INIT
from claude_stub.task import load_handler
from conftest import end, wait_for
from processes import lives

from taskqueue.claude_stream import Said
from taskqueue.claude_verdict import judge

LIVES_ON = 'echo $$ >"$HOME/pid"; {}'
HANGS = {
    "it lives on": "exec sleep 1000",
    "it ignores TERM": "trap '' TERM; while :; do sleep 1000; done",
    "a child holds stdout": "sleep 1000 2>/dev/null & echo $! >$HOME/pid",
    "a child holds stderr": "sleep 1000 >/dev/null & echo $! >$HOME/pid",
    "a child holds both and ignores TERM": 'sh -c \'trap "" TERM; echo $$ >$HOME/pid; '
    "while :; do sleep 1000; done' & while [ ! -s $HOME/pid ]; do sleep 0.05; done",
    "it prints for ever": "trap '' TERM; while echo '{}'; do sleep 0.01; done",
}


@pytest.mark.parametrize("hangs", HANGS)
def test_what_lives_on_after_the_result_is_ended(fake, hangs):
    fake.then(LIVES_ON.format(HANGS[hangs]))
    done = fake.task().run(timeout=30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"] == "Done."
    assert not lives(int((fake.home / "pid").read_text()))


def test_a_child_that_outlives_a_claude_without_a_result_is_no_wait_either(fake):
    fake.says(INIT)
    fake.then(LIVES_ON.format(HANGS["a child holds stdout"]))
    done = fake.task().run(timeout=30)
    assert done.returncode == 1 and "ended with exit 0, without a result" in done.stderr


@pytest.mark.parametrize("said", [[INIT], [INIT, DONE]], ids=["before", "after"])
def test_term_ends_one_that_ignores_it(fake, said):
    fake.says(*said)
    fake.then(LIVES_ON.format(HANGS["it ignores TERM"]))
    process = fake.task().start()
    wait_for((fake.home / "pid").exists, what="a claude that lives on")
    wait_for((fake.home / "pid").read_text, what="its pid")
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == (143 if len(said) == 1 else 0)
    finally:
        end(process)
    assert not lives(int((fake.home / "pid").read_text()))


@pytest.mark.parametrize("said", [[], [INIT]], ids=["from the start", "after a line"])
@pytest.mark.parametrize("hangs", ["it lives on", "it ignores TERM"])
def test_a_claude_that_says_nothing_is_ended_and_its_session_goes_on(fake, said, hangs):
    fake.says(*said)
    fake.then(LIVES_ON.format(HANGS[hangs]))
    task = fake.task(stall=0.3)
    done = task.run(timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == "no sign of life for 0.3 s"
    assert not lives(int((fake.home / "pid").read_text()))
    assert len(fake.calls()) == 1


def test_a_claude_that_says_something_now_and_then_is_left_alone(fake):
    fake.says(INIT)
    line = json.dumps(DONE)
    fake.then(f"for n in 1 2 3 4 5 6; do sleep 0.2; echo '{{}}'; done; echo '{line}'")
    done = fake.task(stall=1).run(timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_words_for_half_an_hour():
    said = Said(lambda: None)
    said.silent_for = load_handler().STALL_SECONDS
    assert judge(said, {}, 0, False).why == "no sign of life for 30 min"
