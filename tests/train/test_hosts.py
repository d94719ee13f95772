"""What is said of the hosts of a run."""

from pathlib import Path

from crosslmm_jax.train.reporting.hosts import count_gpus, idle_gpus


def test_a_host_with_gpus_that_nobody_uses_is_named() -> None:
    names = ["a", "a", "b", "c"]
    assert idle_gpus(names, [1, 1, 2, 8], [2, 2, 2, 8]) == []
    (line,) = idle_gpus(names, [1, 1, 1, 8], [2, 2, 8, 8])
    assert line.startswith("host b: 1 of 8 GPUs used; ")
    assert idle_gpus(names, [1, 1, 1, 1], [0, 0, 0, 0]) == [], "a run on the CPU"


def test_gpus_are_counted(tmp_path: Path) -> None:
    assert count_gpus(tmp_path / "absent") == 0
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert count_gpus(tmp_path) == 2
