"""Parity with torch at the true depth and width of the 2B model: about seven minutes and 15 GB of memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.nightly


def test_the_2b_model_equals_torch(one_device_flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0: features and logits within 1e-4, greedy tokens identical."""
    monkeypatch.setenv("XLA_FLAGS", one_device_flags)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = ROOT / "tests" / "nightly" / "full_depth.py"
    result = ROOT / "docs" / "results" / "full_depth_parity.json"
    command = [sys.executable, str(program), "--json", str(result.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
