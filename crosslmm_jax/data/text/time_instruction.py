"""The sentence that tells the model how long a video is and when its frames were taken.

"full" is LLaVA-Video's wording, with the time of every frame: about 8 tokens a frame under Qwen's vocabulary.
"short" is VideoChat-Flash's, which costs the same at any number of frames.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from crosslmm_jax.config import TimeInstruction
from crosslmm_jax.data.text.tokenizer import Tokenizer

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_DECADES = 10.0 ** np.arange(1, 10)
_ROUNDING = 0.01  # seconds by which a time may be written too late


class ClipMeta(NamedTuple):
    """What is known of a medium before or after its frames are decoded.

    Attributes:
        num_frames: frames that the model is shown.
        duration: seconds of the video, or of the part within its bounds; 0 for an image.
        times: seconds of each frame; needed for "full" alone.
    """

    num_frames: int
    duration: float
    times: Sequence[float] = ()


def time_text(clip: ClipMeta, kind: TimeInstruction) -> str | None:
    """The sentence about `clip`; None when `kind` is "none" and for images.

    Raises:
        ValueError: `kind` is "full" and `times` does not hold one time for each frame.
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
    """Tokens of each instruction without its numbers and all but one of its times."""
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
    """int64[videos]: tokens of the instruction about each video, at most, newlines around it included.

    A number counts a token a character, which Qwen's vocabulary takes and none exceeds.

    Args:
        kind: of instruction.
        wording: from `wording_tokens`, of this kind.
        num_frames: int64[videos], at most.
        duration: float64[videos], seconds, at most.
        last: float64[videos], seconds at which the last frame stands, at most.
    """
    tokens = wording + _digits(num_frames) + _digits(duration) + len(".00")
    if kind == "full":
        tokens = tokens + num_frames * (_digits(last) + len(".00s,"))
    return tokens.astype(np.int64)


def _digits(values: np.ndarray) -> np.ndarray:
    """Digits before the point."""
    return 1 + np.searchsorted(_DECADES, np.asarray(values) + _ROUNDING, side="right")
