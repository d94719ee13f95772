"""Rows of different lengths to one batch of static shapes.

A row of a batch is laid out as: its text tokens and the runs of its media in order, then the slots of padded
frames, then padded text. With F frames, C compact tokens a frame and a text bucket, T = text bucket + F * C
whatever the rows hold, so a few pairs (F, text bucket) are all the shapes that are ever compiled.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crosslmm_jax.data.media import Clip, stack_clips
from crosslmm_jax.data.text import MEDIUM, TokenSequence
from crosslmm_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Example:
    """A row ready for a batch.

    Attributes:
        sequence: its tokens, with a MEDIUM for each clip.
        clips: its images and videos, in order.
        row_index: number of the row.
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
        visible_frames: int32, how many frames of the row a query here may see.
    """

    tokens: np.ndarray
    targets: np.ndarray
    visual: np.ndarray
    visible_frames: np.ndarray


def lay_out(
    sequence: TokenSequence, frame_counts: Sequence[int], *, tokens_per_frame: int, placeholder: int
) -> Layout:
    """Gives each medium its run of tokens.

    A visual token sees all frames of its own and earlier media; a text token those of media before it.

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


def choose_bucket(needed: int, buckets: Sequence[int], *, what: str, field: str, where: str) -> int:
    """The smallest of the ascending `buckets` that holds `needed`. Raises UserError naming `where`."""
    for bucket in buckets:
        if needed <= bucket:
            return bucket
    raise UserError(f"{where}: has {needed} {what}, more than {field} holds ({buckets[-1]}); raise {field}")


def collate(
    examples: Sequence[Example],
    *,
    tokens_per_frame: int,
    image_size: int,
    frame_buckets: Sequence[int],
    text_buckets: Sequence[int],
    pad_id: int,
    placeholder: int,
) -> Batch:
    """One batch out of `examples`, in the smallest pair of buckets that holds them all.

    Args:
        examples: B of them.
        tokens_per_frame: C.
        image_size: R, pixels a side.
        frame_buckets: sizes that F may take, ascending.
        text_buckets: sizes that T - F * C may take, ascending.
        pad_id: token of padded text.
        placeholder: token at the slots of visual tokens.

    Returns:
        frames uint8[B, F, R, R, 3], frame_mask bool[B, F], frame_times float32[B, F] (seconds),
        tokens int32[B, T], positions int32[B, T], loss_mask float32[B, T] (1 where tokens[b, t] is a target),
        visual_slots int32[B, F * C], text_slots int32[B, T - F * C], visible_frames int32[B, T],
        row_index int32[B].

    Raises:
        UserError: naming the row that fits no bucket.
    """
    most_frames = max(examples, key=_frames_of)
    most_text = max(examples, key=_text_of)
    num_frames = choose_bucket(
        most_frames.num_frames, frame_buckets, what="frames", field="frame_buckets", where=most_frames.where
    )
    num_text = choose_bucket(
        most_text.sequence.num_text_tokens, text_buckets, what="text tokens", field="text_buckets",
        where=most_text.where,
    )  # fmt: skip
    rows = [
        _collate_row(
            example, num_frames=num_frames, num_text=num_text, tokens_per_frame=tokens_per_frame,
            image_size=image_size, pad_id=pad_id, placeholder=placeholder,
        )
        for example in examples
    ]  # fmt: skip
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _frames_of(example: Example) -> int:
    return example.num_frames


def _text_of(example: Example) -> int:
    return example.sequence.num_text_tokens


def _collate_row(
    example: Example,
    *,
    num_frames: int,
    num_text: int,
    tokens_per_frame: int,
    image_size: int,
    pad_id: int,
    placeholder: int,
) -> dict[str, np.ndarray]:
    """The arrays of one row, without the batch axis."""
    counts = [len(clip.frames) for clip in example.clips]
    layout = lay_out(example.sequence, counts, tokens_per_frame=tokens_per_frame, placeholder=placeholder)
    length, total = len(layout.tokens), num_text + num_frames * tokens_per_frame
    valid = sum(counts)
    padded_visual = (num_frames - valid) * tokens_per_frame

    tokens = np.full(total, pad_id, np.int32)
    tokens[:length] = layout.tokens
    tokens[length : length + padded_visual] = placeholder
    visual = np.zeros(total, bool)
    visual[:length] = layout.visual
    visual[length : length + padded_visual] = True
    loss_mask = np.zeros(total, np.float32)
    loss_mask[:length] = layout.targets
    visible_frames = np.zeros(total, np.int32)
    visible_frames[:length] = layout.visible_frames

    pixels, seconds = stack_clips(example.clips, image_size)
    frames = np.zeros((num_frames, image_size, image_size, 3), np.uint8)
    frames[:valid] = pixels
    frame_times = np.zeros(num_frames, np.float32)
    frame_times[:valid] = seconds
    return {
        "frames": frames,
        "frame_mask": np.arange(num_frames) < valid,
        "frame_times": frame_times,
        "tokens": tokens,
        "positions": np.arange(total, dtype=np.int32),
        "loss_mask": loss_mask,
        "visual_slots": np.flatnonzero(visual).astype(np.int32),
        "text_slots": np.flatnonzero(~visual).astype(np.int32),
        "visible_frames": visible_frames,
        "row_index": np.array(example.row_index, np.int32),
    }
