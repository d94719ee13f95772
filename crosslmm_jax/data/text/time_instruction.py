"""The sentence that tells the model how long a video is and when its frames were taken.

"full" is the sentence of LLaVA-Video, with the time of every frame: about 8 tokens per frame with Qwen's
vocabulary. "short" is the sentence of VideoChat-Flash, whose length does not depend on the number of frames.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from crosslmm_jax.config import TimeInstruction
from crosslmm_jax.data.text.tokenizer import Tokenizer

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DECADES = 10.0 ** np.arange(1, 10)
_ROUNDING = 0.01  # seconds by which a written time may exceed the time


class ClipMeta(NamedTuple):
    """Number and times of the frames of a medium.

    Attributes:
        num_frames: frames that the model sees.
        duration: seconds of the video, or of the part within the bounds; 0 for an image.
        times: seconds of each frame; read for "full" only.
    """

    num_frames: int
    duration: float
    times: Sequence[float] = ()


def time_text(clip: ClipMeta, kind: TimeInstruction) -> str | None:
    """The sentence about `clip`; None when `kind` is "none" and for images.

    Raises:
        ValueError: `kind` is "full" and there is not one time per frame.
    """
    if kind == "none" or not clip.duration:
        return None
    text = (
        f"The video lasts for {clip.duration:.2f} seconds, "
        f"and {clip.num_frames} frames are uniformly sampled from it. "
    )
    if kind == "short":
        return text
    if len(clip.times) != clip.num_frames:
        raise ValueError(f"{len(clip.times)} times for {clip.num_frames} frames")
    times = ",".join(f"{time:.2f}s" for time in clip.times)
    return (
        f"{text}These frames are located at {times}."
        "Please answer the following questions related to this video."
    )


def wording_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of each instruction without its numbers, with a single time."""
    counts = {}
    for kind in ("short", "full"):
        words = _NUMBER.split(f"\n{time_text(ClipMeta(1, 1.0, (0.0,)), kind)}\n")
        counts[kind] = sum(len(tokenizer.encode_plain(piece)) for piece in words)
    return counts


def most_time_tokens(
    kind: Literal["short", "full"],
    wording: int,
    *,
    num_frames: np.ndarray,
    duration: np.ndarray,
    last: np.ndarray,
) -> np.ndarray:
    """Upper bound of the tokens of each video's instruction, including the newlines around it: int64[videos].

    A number counts one token per character, as in Qwen's vocabulary. No vocabulary takes more.

    Args:
        kind: the instruction.
        wording: entry of `wording_tokens` for this kind.
        num_frames: int64[videos], upper bound.
        duration: float64[videos], upper bound in seconds.
        last: float64[videos], upper bound of the time of the last frame in seconds.
    """
    tokens = wording + _digits(num_frames) + _digits(duration) + len(".00")
    if kind == "full":
        tokens = tokens + num_frames * (_digits(last) + len(".00s,"))
    return tokens.astype(np.int64)


def _digits(values: np.ndarray) -> np.ndarray:
    """Digits before the decimal point."""
    return 1 + np.searchsorted(_DECADES, np.asarray(values) + _ROUNDING, side="right")
