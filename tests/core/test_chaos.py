import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_nothing_is_lost_and_nothing_runs_twice_at_once(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("bench/soak.py looks into /proc")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "soak.py", "4", "--seed", "42"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("clean\n") and "SIGKILL: " in done.stdout
