"""Frames of all videos of a folder."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import read_frames
from crosslmm_jax.errors import UserError


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
