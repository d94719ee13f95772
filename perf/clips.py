"""Frames of all videos of a folder, and clips to measure with."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import read_frames
from crosslmm_jax.errors import UserError

RATE, HEIGHT, WIDTH, GOP = 25, 360, 640, 50  # of `write_clip`


def write_clip(path: Path, *, seconds: int, seed: int) -> None:
    """Writes an h264 file of moving texture."""
    import av

    texture = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    picture = np.kron(texture, np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(GOP)}
        for step in range(seconds * RATE):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * step, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_clips(folder: str | Path, *, frames: int, size: int) -> dict[str, UInt8[np.ndarray, "f r r 3"]]:
    """Name of each file in `folder` -> uint8[frames, size, size, 3], frames spread evenly over the video.

    Raises:
      UserError: no such folder, nothing in it, or a file that is no video.
    """
    path = Path(folder)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
    if not files:
        raise UserError(f"--videos {folder}: name a folder that holds videos")
    sampling = SamplingConfig(policy="uniform", frames=frames)
    return {
        file.name: read_frames(
            file, sampling, size=size, num_threads=0, resampling="bicubic", deadline_s=None
        ).frames
        for file in files
    }  # fmt: skip
