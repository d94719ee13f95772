"""Damaged files end within two seconds, with a reason that fits, and take no process with them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from damaged import write_damaged
from video_files import SIZE, decode_all, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.locate import resolve_path
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import DataError

SECONDS_EACH = 2.0
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, HERE.parents[2]]))}


def read_all(root: str, references: list[str]) -> None:
    """Reads every file and prints a line of JSON for each: reference, reason or "", seconds, message."""
    for reference in references:
        start, reason, message = time.monotonic(), "", ""
        try:
            path = resolve_path(root, reference)
            probe(path)
            clip = read_frames(path, SamplingConfig(frames=6), size=16)
            assert clip.frames.shape[1:] == (16, 16, 3) and len(clip.times) == len(clip.frames) > 0
        except DataError as error:
            reason, message = error.fault.reason, str(error)
        print(json.dumps([reference, reason, time.monotonic() - start, message]), flush=True)


def whole_gops(path: Path, begin: int, end: int, *, length: int) -> list[bool]:
    """For each GOP of `length` frames, whether no packet of it touches the bytes from `begin` to `end`."""
    whole = []
    with av.open(str(path)) as container:
        for number, packet in enumerate(packet for packet in container.demux(video=0) if packet.size):
            if number % length == 0:
                whole.append(True)
            if (packet.pos or 0) < end and begin < (packet.pos or 0) + packet.size + 16:
                whole[-1] = False
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_damaged_place_in_a_large_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ends in time, and if frames are given, those of intact GOPs are right."""
    monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    good = write_video(tmp_path / f"good{suffix}", 400, options={"g": "10", "sc_threshold": "0"})
    frames, times = decode_all(good)
    content = good.read_bytes()
    rng = random.Random(suffix)
    read = 0
    for number in range(40):
        begin = rng.randrange(1000, len(content) - 12_000)  # the tables of the mp4 stand at the end
        end = begin + rng.choice([4, 50, 3000])
        path = tmp_path / f"{number}{suffix}"
        filling = rng.choice([bytes(end - begin), rng.randbytes(end - begin)])
        path.write_bytes(content[:begin] + filling + content[end:])
        whole = whole_gops(good, begin, end, length=10)
        start = time.monotonic()
        try:
            clip = read_frames(path, SamplingConfig(frames=rng.choice([5, 30])), size=SIZE)
        except DataError:
            clip = None
        assert time.monotonic() - start < SECONDS_EACH
        for image, second in zip(clip.frames, clip.times, strict=True) if clip else ():
            chosen = int(np.abs(times - second).argmin())
            if whole[chosen // 10]:
                read += 1
                np.testing.assert_array_equal(image, frames[chosen])
    assert read > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 10])
def test_damaged_files_are_told_apart_and_cost_little(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "root"
    files = write_damaged(root, seed=seed)
    assert len(files) >= 60
    program = f"import test_damaged; test_damaged.read_all({str(root)!r}, {[f.reference for f in files]!r})"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    lines = {reference: rest for reference, *rest in map(json.loads, result.stdout.splitlines())}
    wrong = []
    for file in files:
        reason, seconds, message = lines[file.reference]
        allowed = reason in file.reasons or (reason == "" and file.may_be_read)
        if not allowed or seconds > SECONDS_EACH or "\n" in message:
            wrong.append((file.reference, reason, round(seconds, 2), message))
    assert wrong == []
