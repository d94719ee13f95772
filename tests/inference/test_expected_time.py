"""The time of a long video that is said beforehand, against what was measured on one H200."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from crosslmm_jax import presets
from crosslmm_jax.inference.expected_time import RemainingTime, compute_seconds, duration

ROOT = Path(__file__).resolve().parents[2]
HOUR = json.loads((ROOT / "docs/results/h200_hour.json").read_text(encoding="utf-8"))
READINGS = [row for row in HOUR["rows"] if "total" in row]
CONFIG = presets.crosslmm_2b()


def mesh(kind: str = "NVIDIA H200", devices: int = 1, tensor: int = 1) -> SimpleNamespace:
    device = SimpleNamespace(device_kind=kind)
    return SimpleNamespace(
        devices=SimpleNamespace(flat=[device] * devices), size=devices, shape={"tensor": tensor}
    )


@pytest.mark.parametrize("row", READINGS, ids=lambda row: f"{row['what']}, {row['frames']}")
def test_expected_times_are_those_that_were_measured(row):
    compute = compute_seconds(CONFIG, mesh(), row["frames"])
    assert 0.8 < compute.prefill / row["prefill"] < 1.25
    now = [0.0]
    remaining = RemainingTime(lambda frames: compute, clock=lambda: now[0])
    assert remaining.seconds(1, row["frames"]) is None
    now[0] = max(2.0, row["decode"] / 8)  # decoding goes on at one rate
    done = round(min(1.0, now[0] / row["decode"]) * row["frames"])
    whole = now[0] + remaining.seconds(done, row["frames"])
    assert 0.8 < whole / max(row["total"], 2.0) < 1.25


def test_frames_that_come_in_bursts_do_not_mislead():
    now, compute = [0.0], compute_seconds(CONFIG, mesh(), 16384)
    remaining, said = RemainingTime(lambda frames: compute, clock=lambda: now[0]), []
    burst, seconds = 16 * 45, 2.0  # 16 threads, 45 frames of a GOP each
    decode = 16384 / burst * seconds
    while now[0] < decode - seconds:
        now[0] += 0.1
        done = round(burst * (now[0] // seconds))
        if (left := remaining.seconds(done, 16384)) is not None:
            said.append((now[0] + left) / (decode + compute.prefill))
    assert len(said) > 100 and 0.7 < min(said) and max(said) < 1.4


def test_the_readings_are_many_and_far_apart():
    assert {row["frames"] for row in READINGS} >= {256, 1024, 4096, 16384}


def test_several_devices_encode_together_and_those_that_share_weights_prefill():
    one, four = (compute_seconds(CONFIG, mesh(devices=n, tensor=t), 1024) for n, t in ((1, 1), (4, 2)))
    assert (four.encode, four.prefill) == pytest.approx((one.encode / 4, one.prefill / 2))


@pytest.mark.parametrize("kind", ["cpu", "a new device"])
def test_nothing_is_said_of_the_time_of_an_unknown_device(kind):
    assert compute_seconds(CONFIG, mesh(kind), 1024) is None
    now = [0.0]
    remaining = RemainingTime(lambda frames: None, clock=lambda: now[0])
    now[0] = 10.0
    assert remaining.note(250, 1000) == ("about 30 s to the last frame", True)
    assert remaining.note(500, 1000) == ("about 10 s to the last frame", False)
    assert remaining.note(1000, 1000) == ("", True)


def test_a_file_that_is_read_again_begins_again():
    now = [0.0]
    compute = compute_seconds(CONFIG, mesh(), 16384)
    remaining = RemainingTime(lambda frames: compute, clock=lambda: now[0])
    now[0] = 50.0
    assert remaining.note(8192, 16384) == (f"about {duration(50 + compute.prefill)} to the answer", True)
    assert remaining.note(16, 16384) == ("", False)
    now[0] = 60.0
    assert remaining.seconds(4096, 16384) == pytest.approx(30 + compute.prefill)
    assert remaining.note(16384, 16384) == (f"about {duration(compute.prefill)} to the answer", True)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1, "1 s"), (8.4, "8 s"), (59.8, "1 min"), (62, "1 min"), (204, "3 min 20 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
