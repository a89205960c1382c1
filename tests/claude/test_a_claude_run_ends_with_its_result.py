"""A claude task ends with its result: a client that lives on, or a child that holds its output open,
holds neither task nor slot. With a stand-in for claude.
"""

from __future__ import annotations

import json
import signal

import pytest
from claude_stub.fake import DONE, INIT
from conftest import end, wait_for
from processes import lives

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
