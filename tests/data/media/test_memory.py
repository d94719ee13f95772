"""Memory stays flat however many videos a process reads, damaged ones among them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from damaged import write_damaged

from perf.decode_speed import memory_growth

READS, MOST_MIB = 1000, 50
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, HERE.parents[2]]))}


def measure(root: str) -> None:
    """Prints the growth over files of every kind, good and damaged."""
    files = write_damaged(Path(root), seed=0)
    names = {file.reference for file in files if not file.reference.startswith(("/", ".."))}
    paths = [Path(root) / name for name in sorted(names)] + 3 * sorted((Path(root) / "good").iterdir())
    print(json.dumps(memory_growth(paths, reads=READS)))


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_videos(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import test_memory; test_memory.measure({str(tmp_path / 'root')!r})"],
        cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert 100 < found["failures"] < 900
    assert found["growth_mib"] < MOST_MIB, found
