"""`just bench all` writes a page, its plot and the figures, and keeps what it did not measure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


def test_a_part_is_measured_and_the_others_are_kept(tmp_path):
    pytest.importorskip("jinja2", reason="jinja2 is not installed beside pytest")
    kept = {"idle": {"processes": 2, "mb": 27.0, "cpu_share": 0.0, "seconds": 70}}
    (tmp_path / "benchmarks.json").write_text(json.dumps(kept))
    options = ["--only", "commands", "writers", "--rounds", "1", "--to", tmp_path]
    done = subprocess.run(
        [sys.executable, ROOT / "bench/all.py", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "benchmarks.md").read_text()
    assert "27 MB in 2 processes" in page and "| ours | " in page
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert found["commands"]["tq run -- true"] > 0 and found["writers"]["put-8"]["busy"] == 0
    assert "<svg" in (tmp_path / "benchmarks.svg").read_text()
