"""Every example runs, shrunk by SMOKE=1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_runs(script, tmp_path):
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        env={**os.environ, "SMOKE": "1"},
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "out").exists()
