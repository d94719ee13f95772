"""The layout of one row: where its visual and text tokens sit, given the frame counts of its media."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crosslmm_jax.data.text.chat import MEDIUM, TokenSequence


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row of known frame counts, without padding. All arrays have the row's length.

    Attributes:
        tokens: int32, the placeholder's id where a visual token goes.
        targets: bool, predicted from the position before.
        visual: bool, a visual token goes here.
        visible_frames: int32, number of frames of the row that the token at each position sees.
    """

    tokens: np.ndarray
    targets: np.ndarray
    visual: np.ndarray
    visible_frames: np.ndarray


def lay_out(
    sequence: TokenSequence, frame_counts: Sequence[int], *, tokens_per_frame: int, placeholder: int
) -> Layout:
    """Gives each medium its run of tokens.

    A visual token sees all frames of its own medium and of earlier ones. A text token sees all frames of the
    media before it.

    Args:
        sequence: tokens with a MEDIUM for each medium.
        frame_counts: frames of each medium, as many as `sequence.num_media`.
        tokens_per_frame: C.
        placeholder: id written where visual tokens go.
    """
    is_medium = sequence.ids == MEDIUM
    frames = np.zeros(len(sequence.ids), np.int64)
    frames[is_medium] = frame_counts
    lengths = np.where(is_medium, frames * tokens_per_frame, 1)
    return Layout(
        tokens=np.repeat(np.where(is_medium, placeholder, sequence.ids), lengths).astype(np.int32),
        targets=np.repeat(sequence.targets & ~is_medium, lengths),
        visual=np.repeat(is_medium, lengths),
        visible_frames=np.repeat(np.cumsum(frames), lengths).astype(np.int32),
    )
