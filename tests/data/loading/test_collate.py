"""Slots, visible frames and padding of a batch, against slow loops over the row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.batch import Batch
from crosslmm_jax.data.loading.collate import collate
from crosslmm_jax.data.loading.example import Example
from crosslmm_jax.data.media.image import Clip
from crosslmm_jax.data.text.chat import MEDIUM, TokenSequence
from crosslmm_jax.errors import UserError

SIZE, PAD, PLACEHOLDER = 2, 90, 91


def clip(count: int, start: int) -> Clip:
    frames = np.arange(start, start + count, dtype=np.uint8)[:, None, None, None]
    times = np.arange(count, dtype=np.float32) + start
    return Clip(np.broadcast_to(frames, (count, SIZE, SIZE, 3)), times, float(count))


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Up to three media of one to three frames among up to eight text tokens."""
    counts = draw(st.lists(st.integers(1, 3), max_size=3))
    text = draw(st.lists(st.integers(0, 80), min_size=1, max_size=8))
    kinds = draw(st.permutations([MEDIUM] * len(counts) + text))
    targets = [token != MEDIUM and draw(st.booleans()) for token in kinds]
    clips = tuple(clip(count, 10 * number) for number, count in enumerate(counts))
    sequence = TokenSequence(np.array(kinds, np.int32), np.array(targets, bool))
    return Example(sequence, clips, row_index=draw(st.integers(0, 99)))


def make(rows: list[Example], compact: int, *, num_frames: int = 4, num_text: int = 8) -> Batch[np.ndarray]:
    return collate(
        rows, num_frames=num_frames, num_text=num_text, tokens_per_frame=compact, image_size=SIZE,
        pad_id=PAD, placeholder=PLACEHOLDER,
    )  # fmt: skip


def slow_row(example: Example, compact: int) -> list[tuple[int, bool, bool, int]]:
    """(token, target, visual, visible frames) position by position."""
    out, seen, medium = [], 0, 0
    for token, target in zip(example.sequence.ids, example.sequence.targets, strict=True):
        if token == MEDIUM:
            count = len(example.clips[medium].frames)
            medium, seen = medium + 1, seen + count
            out += [(PLACEHOLDER, False, True, seen)] * (count * compact)
        else:
            out.append((int(token), bool(target), False, seen))
    return out


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(examples(), min_size=1, max_size=3), compact=st.sampled_from([1, 4]))
def test_batch_against_a_slow_reference(rows: list[Example], compact: int) -> None:
    num_frames = 4 if max(row.num_frames for row in rows) <= 4 else 9
    num_text = 4 if max(row.sequence.num_text_tokens for row in rows) <= 4 else 8
    batch = make(rows, compact, num_frames=num_frames, num_text=num_text)
    total = num_text + num_frames * compact
    assert batch.frames.shape == (len(rows), num_frames, SIZE, SIZE, 3)
    assert batch.tokens.shape == batch.loss_mask.shape == (len(rows), total)
    assert batch.visual_slots.shape == (len(rows), num_frames * compact)
    for index, row in enumerate(rows):
        expected = slow_row(row, compact)
        visual, text = batch.visual_slots[index], batch.text_slots[index]
        assert sorted([*visual, *text]) == list(range(total))
        assert (np.diff(visual) > 0).all() and (np.diff(text) > 0).all()
        for position, (token, target, is_visual, visible) in enumerate(expected):
            assert batch.tokens[index, position] == token
            assert batch.loss_mask[index, position] == target
            assert (position in visual) == is_visual
            assert batch.visible_frames.counts[index, position] == visible
        end, spare = len(expected), (num_frames - row.num_frames) * compact
        assert (batch.tokens[index, end : end + spare] == PLACEHOLDER).all()
        assert (batch.tokens[index, end + spare :] == PAD).all()
        assert not batch.visible_frames.counts[index, end:].any()
        assert not batch.loss_mask[index, end:].any()
        assert set(range(end, end + spare)) <= set(visual.tolist())
        values = [value for one in row.clips for value in one.frames[:, 0, 0, 0]]
        assert batch.frames[index, : row.num_frames, 1, 1, 2].tolist() == values
        assert batch.frame_times[index, : row.num_frames].tolist() == values
        assert not batch.frames[index, row.num_frames :].any()
    assert batch.row_index.tolist() == [row.row_index for row in rows]
    assert (batch.positions == np.arange(total)).all()


def test_types() -> None:
    row = Example(TokenSequence(np.array([MEDIUM, 5], np.int32), np.array([False, True])), (clip(2, 0),), 0)
    kinds = {name: value.dtype.name for name, value in make([row], 1).arrays().items()}
    assert kinds == {
        "frames": "uint8", "frame_times": "float32", "tokens": "int32",
        "positions": "int32", "loss_mask": "float32", "visual_slots": "int32", "text_slots": "int32",
        "visible_frames": "int32", "row_index": "int32",
    }  # fmt: skip


def test_row_of_text_only() -> None:
    row = Example(TokenSequence(np.array([1, 2, 3], np.int32), np.array([False, True, True])), (), 5)
    batch = make([row], 4)
    assert not batch.frames.any() and not batch.visible_frames.counts.any()
    assert batch.loss_mask.sum() == 2


def test_rows_that_do_not_fit_are_named() -> None:
    def row(text: int, frames: int, where: str) -> Example:
        ids = np.array([MEDIUM] + [1] * text, np.int32)
        return Example(TokenSequence(ids, ids == 1), (clip(frames, 0),), 0, where)

    short = row(2, 2, "short")
    with pytest.raises(UserError, match=r"^long: has 9 text tokens and 2 frames, more than the 8 and 9 of"):
        make([short, row(9, 2, "long")], 1, num_frames=9)
    with pytest.raises(UserError, match=r"^many: has 2 text tokens and 10 frames, more than the 8 and 9 of"):
        make([short, row(2, 10, "many")], 1, num_frames=9)
