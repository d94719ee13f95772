"""The layout of a row: where its visual and text tokens sit, given the frame counts of its media; padding."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

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


class PaddedRows(NamedTuple):
    """Rows of one static shape, as fields of a `Batch`: B rows, F frames, C tokens per frame, T tokens."""

    tokens: np.ndarray  # int32[B, T]
    targets: np.ndarray  # bool[B, T]
    visual_slots: np.ndarray  # int32[B, F*C]
    visible_frames: np.ndarray  # int32[B, T]


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


def pad_rows(
    layouts: Sequence[Layout], *, num_frames: int, num_text: int, tokens_per_frame: int, pad: int,
    placeholder: int,
) -> PaddedRows:  # fmt: skip
    """Pads rows to `num_frames` frames and `num_text` tokens of text. No row may have more.

    A row holds its tokens, then the slots of padded frames, then padded text.

    Args:
        layouts: the rows.
        num_frames: F.
        num_text: T - F * C.
        tokens_per_frame: C.
        pad: token of padded text.
        placeholder: token at the slots of padded frames.
    """
    batch, slots = len(layouts), num_frames * tokens_per_frame
    rows = PaddedRows(
        np.full((batch, num_text + slots), pad, np.int32), np.zeros((batch, num_text + slots), bool),
        np.zeros((batch, slots), np.int32), np.zeros((batch, num_text + slots), np.int32),
    )  # fmt: skip
    for row, layout in enumerate(layouts):
        end, visual = len(layout.tokens), np.flatnonzero(layout.visual)
        padded = np.arange(end, end + slots - len(visual))
        rows.tokens[row, :end], rows.tokens[row, padded] = layout.tokens, placeholder
        rows.targets[row, :end] = layout.targets
        rows.visual_slots[row] = np.concatenate([visual, padded])
        rows.visible_frames[row, :end] = layout.visible_frames
    return rows
