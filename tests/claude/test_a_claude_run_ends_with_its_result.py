"""A claude task ends with its result: a client that lives on, or a child that holds its output open,
holds neither task nor slot. With a stand-in for claude.
"""

from __future__ import annotations

import json
import signal

from claude_stub.fake import DONE, INIT, Fake
from claude_stub.task import load_handler
from conftest import wait_for
from processes import lives

from taskqueue.claude_stream import Said
from taskqueue.claude_verdict import judge

LIVES_ON, IGNORES_TERM = "exec sleep 1000", "trap '' TERM; while :; do sleep 1000; done"
HOLDS_STDOUT = "sleep 1000 2>/dev/null & echo $! >$HOME/pid"
HANGS = (
    LIVES_ON,
    IGNORES_TERM,
    HOLDS_STDOUT,
    "sleep 1000 >/dev/null & echo $! >$HOME/pid",
    'sh -c \'trap "" TERM; echo $$ >$HOME/pid; '
    "while :; do sleep 1000; done' & while [ ! -s $HOME/pid ]; do sleep 0.05; done",
    "trap '' TERM; while echo '{}'; do sleep 0.01; done",
)


class Run:
    """A task whose Claude says lines and goes on with a script. Those of a test run side by side."""

    def __init__(self, directory, script: str, *said: dict, **data) -> None:
        directory.mkdir()
        self.fake, self.script = Fake(directory), script
        self.fake.says(*said)
        self.fake.then(f'echo $$ >"$HOME/pid"; {script}')
        self.task = self.fake.task(**data)
        self.process = self.task.start()
        self.pid = self.fake.home / "pid"

    def ended(self):
        """Return the handler's end; what went on has ended, too."""
        done = self.task.ended(self.process)
        assert not lives(int(self.pid.read_text())), self.script
        return done


def test_what_lives_on_after_claudes_end_or_its_result_is_ended(tmp_path):
    runs = [Run(tmp_path / str(n), script, INIT, DONE) for n, script in enumerate(HANGS)]
    without = Run(tmp_path / "without a result", HOLDS_STDOUT, INIT)
    for done in [run.ended() for run in runs]:
        assert done.returncode == 0 and json.loads(done.stdout)["result"] == "Done.", done.stderr
    done = without.ended()
    assert done.returncode == 1 and "ended with exit 0, without a result" in done.stderr


def test_term_ends_one_that_ignores_it(tmp_path):
    told = {143: [INIT], 0: [INIT, DONE]}
    runs = {code: Run(tmp_path / str(code), IGNORES_TERM, *said) for code, said in told.items()}
    for run in runs.values():
        wait_for(lambda pid=run.pid: pid.exists() and pid.read_text(), what="one that lives on")
        run.process.send_signal(signal.SIGTERM)
    assert all(run.ended().returncode == code for code, run in runs.items())


def test_a_claude_that_says_nothing_is_ended_and_its_session_goes_on(tmp_path):
    ways = [(script, said) for script in (LIVES_ON, IGNORES_TERM) for said in ([], [INIT])]
    runs = [Run(tmp_path / str(n), way, *said, stall=1) for n, (way, said) in enumerate(ways)]
    for run in runs:
        done = run.ended()
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1] == "no sign of life for 1 s"
        assert len(run.fake.calls()) == 1


def test_a_claude_that_says_something_now_and_then_is_left_alone(fake):
    fake.says(INIT)
    line = json.dumps(DONE)
    fake.then(f"for n in 1 2 3 4 5 6; do sleep 0.2; echo '{{}}'; done; echo '{line}'")
    done = fake.task(stall=1).run()
    assert done.returncode == 0, done.stderr


def test_the_words_for_half_an_hour():
    said = Said(lambda: None)
    said.silent_for = load_handler().STALL_SECONDS
    assert judge(said, {}, 0, False).why == "no sign of life for 30 min"
