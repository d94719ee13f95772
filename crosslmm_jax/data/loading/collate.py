"""Collates rows of different lengths into one batch of static shapes.

Rows are laid out and padded by `text/layout.py`. With F frames, C compact tokens per frame and a text
bucket, T = text bucket + F * C for any rows, so a few pairs (F, text bucket) are all the shapes that are ever
compiled.
"""

from collections.abc import Sequence

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.data.loading.example import Example
from crosslmm_jax.data.media import stack_clips
from crosslmm_jax.data.text import lay_out, pad_rows
from crosslmm_jax.errors import UserError


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
    batch, layouts = len(examples), []
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
        layouts.append(
            lay_out(example.sequence, counts, tokens_per_frame=tokens_per_frame, placeholder=placeholder)
        )
        frames[row, :valid], frame_times[row, :valid] = stack_clips(example.clips, image_size)
    rows = pad_rows(
        layouts, num_frames=num_frames, num_text=num_text, tokens_per_frame=tokens_per_frame, pad=pad_id,
        placeholder=placeholder,
    )  # fmt: skip
    return Batch.create(
        tokens=rows.tokens, visual_slots=rows.visual_slots, visible_frames=rows.visible_frames,
        frames=frames, frame_times=frame_times, loss_mask=rows.targets.astype(np.float32),
        row_index=np.array([example.row_index for example in examples], np.int32),
    )  # fmt: skip
