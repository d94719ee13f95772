"""One batch, from the data room through a mesh of devices to the loss: `Batch`.

Nothing here imports jax. jax treats named tuples as pytrees, so the same type holds numpy arrays on the host
and jax arrays on the devices, and a field that is None is an empty subtree.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

ArrayT = TypeVar("ArrayT")


class VisibleFrames(NamedTuple, Generic[ArrayT]):
    """How many frames each token sees, counted from the first frame of its row's media.

    The type says what is known about all counts before a program runs:

        VisibleFrames   nothing: every token has a number of its own
        RowOrNone       a token sees the frames of its row without the padded ones, or none
        AllOrNone       the same, and no row has padded frames
        VisualOnly      the same, and no text token sees a frame: a prompt that ends with its video
        SamePerRow      all tokens of a row see the same frames: text after a KV cache

    The type of a named tuple is part of jax's tree structure, so jax compiles one program per type. All
    processes of a run must use the same type for the same batch, since they must run the same program.

    With `VisibleFrames` a GPU decides in every cross-attention which kernel to run and waits for the host:
    0.1 to 0.2 ms per cross-attention that runs alone on one H200.
    """

    counts: ArrayT  # int32[B, T]


class RowOrNone(VisibleFrames[ArrayT]):
    """Every token sees the frames of its row, or none. Padded frames come last and are seen by no token."""

    __slots__ = ()


class AllOrNone(RowOrNone[ArrayT]):
    """Every token sees all frames of its row, or none."""

    __slots__ = ()


class VisualOnly(AllOrNone[ArrayT]):
    """Every visual token sees all frames of its row, or none; text tokens see none."""

    __slots__ = ()


class SamePerRow(VisibleFrames[ArrayT]):
    """All tokens of a row see the same frames."""

    __slots__ = ()


class Batch(NamedTuple, Generic[ArrayT]):
    """Rows of text and media in static shapes: B rows, T tokens, F frames, C compact tokens per frame.

        field           dtype and shape          meaning
        tokens          int32[B, T]              a placeholder at every visual slot
        positions       int32[B, T]              for the rotary embedding
        visual_slots    int32[B, F*C]            places of the compact tokens, in frame order
        text_slots      int32[B, T - F*C]        all other places
        visible_frames  int32[B, T] in `counts`  number of frames that each token sees
        frames          uint8[B, F, R, R, 3]     pixels
        frame_times     float32[B, F]            seconds from the start of the frame's video
        loss_mask       float32[B, T]            1 where tokens[b, t] is predicted from t - 1
        row_index       int32[B]                 number of the row in its index

    A prompt has no `loss_mask` and `row_index`, and no `frames` once they are encoded: these are None.

    Padding: a row with fewer than F frames has black frames at the end. Their slots come after the row's
    tokens, and no token of the row counts them in `visible_frames`. Padded text comes last. Tokens at both
    see 0 frames and have a loss mask of 0.

    Several media per row: their frames follow each other along F, their runs of tokens sit anywhere. A visual
    token sees the frames of its own medium and of earlier ones, a text token those of earlier ones.

    Appended frames: counts start at the first frame of the row's media, not of this batch. A batch that
    continues a cache may therefore carry the new frames alone.
    """

    tokens: ArrayT
    positions: ArrayT
    visual_slots: ArrayT
    text_slots: ArrayT
    visible_frames: VisibleFrames[ArrayT]
    frames: ArrayT | None = None
    frame_times: ArrayT | None = None
    loss_mask: ArrayT | None = None
    row_index: ArrayT | None = None

    @classmethod
    def create(
        cls,
        *,
        tokens: np.ndarray,
        visual_slots: np.ndarray,
        visible_frames: np.ndarray,
        positions: np.ndarray | None = None,
        frames: np.ndarray | None = None,
        frame_times: np.ndarray | None = None,
        loss_mask: np.ndarray | None = None,
        row_index: np.ndarray | None = None,
    ) -> "Batch[np.ndarray]":
        """A batch of numpy arrays, checked. `text_slots` follow from `visual_slots`.

        Args:
          tokens: int32[B, T].
          visual_slots: int32[B, F*C].
          visible_frames: int32[B, T], the counts.
          positions: int32[B, T]; None: 0 to T - 1 in every row.
          frames: uint8[B, F, R, R, 3].
          frame_times: float32[B, F].
          loss_mask: float32[B, T].
          row_index: int32[B].

        Raises:
          ValueError: a field has another dtype or shape, or two visual tokens share a slot.
        """
        if tokens.ndim == 2 and positions is None:
            positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (tokens.shape[0], 1))
        given = {
            "tokens": tokens, "positions": positions, "visual_slots": visual_slots,
            "visible_frames": visible_frames, "frames": frames, "frame_times": frame_times,
            "loss_mask": loss_mask, "row_index": row_index,
        }  # fmt: skip
        present = {name: array for name, array in given.items() if array is not None}
        _check(present)
        text_slots = _other_slots(visual_slots, tokens.shape[1])
        fields: dict[str, Any] = present | {"visible_frames": VisibleFrames(visible_frames)}
        return Batch(text_slots=text_slots, **fields)

    def arrays(self) -> dict[str, ArrayT]:
        """Every array that is there under its field's name; `visible_frames` are the counts."""
        arrays = {name: array for name, array in self._asdict().items() if array is not None}
        return arrays | {"visible_frames": self.visible_frames.counts}


# Field -> dtype, and letters of its dimensions: the same letter is the same size. A field that is not int32,
# uint8 or float32 would compile a program of its own.
_LAYOUT = {
    "tokens": ("int32", "BT"), "positions": ("int32", "BT"), "visual_slots": ("int32", "BN"),
    "visible_frames": ("int32", "BT"), "frames": ("uint8", "BFRR3"), "frame_times": ("float32", "BF"),
    "loss_mask": ("float32", "BT"), "row_index": ("int32", "B"),
}  # fmt: skip


def _check(arrays: dict[str, np.ndarray]) -> None:
    """Raises ValueError naming the first field whose dtype or shape is wrong."""
    sizes = {"3": 3}
    for name, array in arrays.items():
        dtype, letters = _LAYOUT[name]
        for letter, size in zip(letters, array.shape, strict=False):
            sizes.setdefault(letter, size)
        if array.dtype != dtype or array.shape != tuple(sizes.get(letter) for letter in letters):
            wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(f"Batch.{name} is {array.dtype}{list(array.shape)}, expected {dtype}[{wanted}]")
    frames = sizes.get("F", 1)
    if sizes["N"] % frames if frames else sizes["N"]:
        raise ValueError(f"Batch.visual_slots has {sizes['N']} slots per row for {sizes['F']} frames")


def _other_slots(slots: np.ndarray, length: int) -> np.ndarray:
    """int32[B, T - N]: the places of each row that are not among `slots`, ascending."""
    rows, count = slots.shape
    free = np.ones((rows, length), bool)
    if count and not 0 <= slots.min() <= slots.max() < length:
        raise ValueError(
            f"Batch.visual_slots go from {slots.min()} to {slots.max()} in rows of {length} tokens"
        )
    np.put_along_axis(free, slots, False, axis=1)
    if free.sum() != rows * (length - count):
        raise ValueError("Batch.visual_slots: two visual tokens of a row share a slot")
    return np.nonzero(free)[1].reshape(rows, length - count).astype(np.int32)


# Logical axes of each field's dimensions; `parallel` maps them to mesh axes.
BATCH_AXES: dict[str, tuple[str | None, ...]] = {
    "tokens": ("act_batch", "act_len"),
    "positions": ("act_batch", "act_len"),
    "visual_slots": ("act_batch", None),
    "text_slots": ("act_batch", None),
    "visible_frames": ("act_batch", "act_len"),
    "frames": ("act_batch", "act_context", None, None, None),
    "frame_times": ("act_batch", "act_context"),
    "loss_mask": ("act_batch", "act_len"),
    "row_index": ("act_batch",),
}


def batch_axes(batch: Batch[ArrayT]) -> Batch[tuple[str | None, ...]]:
    """The tree of `batch` with a tuple of logical axes in place of each array."""
    axes: dict[str, Any] = {name: BATCH_AXES[name] for name in batch.arrays()}
    axes["visible_frames"] = batch.visible_frames._replace(counts=axes["visible_frames"])
    return Batch(**axes)


def with_known_visibility(batch: Batch[np.ndarray], num_frames: int) -> Batch[np.ndarray]:
    """`batch` with the narrowest of `AllOrNone`, `VisualOnly`, `VisibleFrames` that holds for all its rows.

    Args:
      batch: numpy arrays. Of several processes each has other rows, so that types may differ.
      num_frames: frames of a row that cross-attention can read, padding included.
    """
    counts = batch.visible_frames.counts
    if not np.isin(counts, (0, num_frames)).all():
        return batch._replace(visible_frames=VisibleFrames(counts))
    seen_by_text = np.take_along_axis(counts, batch.text_slots, axis=1).any()
    return batch._replace(visible_frames=AllOrNone(counts) if seen_by_text else VisualOnly(counts))


def needed(array: ArrayT | None, field: str) -> ArrayT:
    """The field of a batch. Raises ValueError naming it when the batch does not have it."""
    if array is None:
        raise ValueError(f"this batch has no {field}, which is needed here")
    return array
