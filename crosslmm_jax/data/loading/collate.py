"""Rows of different lengths to one batch of static shapes.

A row of a batch holds, in this order:

1. its text tokens and the runs of its media, as they follow each other in the row
2. the slots of padded frames
3. padded text

With F frames, C compact tokens per frame and a text bucket, T = text bucket + F * C for any rows, so a few
pairs (F, text bucket) are all the shapes that are ever compiled.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.data.media import Clip, stack_clips
from crosslmm_jax.data.text import MEDIUM, TokenSequence
from crosslmm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """A row ready for a batch.

    Attributes:
        sequence: tokens of the row, with a MEDIUM for each clip.
        clips: images and videos of the row, in order.
        row_index: number of the row in the index.
        where: file, row and id, for messages.
    """

    sequence: TokenSequence
    clips: tuple[Clip, ...]
    row_index: int
    where: str = "row"

    @property
    def num_frames(self) -> int:
        """Frames of all media."""
        return sum(len(clip.frames) for clip in self.clips)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One row of known frame counts, without padding. All arrays have the row's length.

    Attributes:
        tokens: int32, the placeholder's id where a visual token goes.
        targets: bool, predicted from the position before.
        visual: bool, a visual token goes here.
        visible_frames: int32, how many frames of the row a token here sees.
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


def collate(
    examples: Sequence[Example],
    *,
    num_frames: int,
    num_text: int,
    tokens_per_frame: int,
    image_size: int,
    pad_id: int,
    placeholder: int,
) -> Batch[np.ndarray]:
    """One batch of B examples.

    Args:
        examples: B of them.
        num_frames: F.
        num_text: T - F * C.
        tokens_per_frame: C.
        image_size: R, pixels per side.
        pad_id: token of padded text.
        placeholder: token at the slots of visual tokens.

    Raises:
        UserError: a row has more frames or text than the batch holds.
    """
    batch, length = len(examples), num_text + num_frames * tokens_per_frame
    tokens = np.full((batch, length), pad_id, np.int32)
    visual_slots = np.zeros((batch, num_frames * tokens_per_frame), np.int32)
    visible_frames = np.zeros((batch, length), np.int32)
    loss_mask = np.zeros((batch, length), np.float32)
    frames = np.zeros((batch, num_frames, image_size, image_size, 3), np.uint8)
    frame_times = np.zeros((batch, num_frames), np.float32)
    for row, example in enumerate(examples):
        text, valid = example.sequence.num_text_tokens, example.num_frames
        if text > num_text or valid > num_frames:
            raise UserError(
                f"{example.where}: has {text} text tokens and {valid} frames, more than the {num_text} and"
                f" {num_frames} of its bucket; run `crosslmm data index` again"
            )
        counts = [len(clip.frames) for clip in example.clips]
        layout = lay_out(example.sequence, counts, tokens_per_frame=tokens_per_frame, placeholder=placeholder)
        end = len(layout.tokens)
        padded_slots = np.arange(end, end + (num_frames - valid) * tokens_per_frame)
        tokens[row, :end] = layout.tokens
        tokens[row, padded_slots] = placeholder
        visual_slots[row] = np.concatenate([np.flatnonzero(layout.visual), padded_slots])
        visible_frames[row, :end] = layout.visible_frames
        loss_mask[row, :end] = layout.targets
        frames[row, :valid], frame_times[row, :valid] = stack_clips(example.clips, image_size)
    return Batch.create(
        tokens=tokens, visual_slots=visual_slots, visible_frames=visible_frames, frames=frames,
        frame_times=frame_times, loss_mask=loss_mask,
        row_index=np.array([example.row_index for example in examples], np.int32),
    )  # fmt: skip
