"""The buckets of a run: from the lengths of an index's rows, or as a config asks for them."""

import dataclasses

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.batching.bucket_search import choose_shapes
from crosslmm_jax.data.batching.buckets import (
    LEFT_OUT,
    Bucket,
    Padding,
    assign,
    make_buckets,
    padding,
    row_cost,
)
from crosslmm_jax.data.batching.token_counts import Lengths, row_lengths
from crosslmm_jax.data.index import Columns, Index
from crosslmm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Which rows a run reads, and padded to what.

    Attributes:
        lengths: of all rows.
        buckets: shapes of batches.
        of_row: int16[rows], the bucket of each row, or LEFT_OUT.
        padding: when each row that has a bucket is read once.
    """

    lengths: Lengths
    buckets: list[Bucket]
    of_row: np.ndarray
    padding: Padding

    @property
    def left_out(self) -> int:
        """Rows without a bucket."""
        return int((self.of_row == LEFT_OUT).sum())

    @property
    def truncated(self) -> int:
        """Rows that are read and may lose turns at their end."""
        return int((self.lengths.truncated & (self.of_row != LEFT_OUT)).sum())


def make_shapes(
    config: DataConfig, index: Index, columns: Columns, *, tokens_per_frame: int, more_system: int = 0
) -> Shapes:
    """The shapes of a run.

    Args:
        config: of the run.
        index: its index.
        columns: of the index.
        tokens_per_frame: C.
        more_system: tokens by which the system prompt exceeds the default one.

    Raises:
        ConfigError: no row fits.
    """
    lengths = row_lengths(
        columns, config.sampling, most_text=config.most_text_tokens, style=config.style,
        time_instruction=config.time_instruction, wording=index.wording, more_system=more_system,
    )  # fmt: skip
    usable = lengths.usable
    if config.frame_buckets:
        usable = usable & (lengths.frames <= config.frame_buckets[-1])
    weights = config.modality_weights.as_dict()
    if weights:
        usable = usable & np.isin(columns.modality, [MODALITIES.index(name) for name in weights])
    if not usable.any():
        raise ConfigError(
            f"DataConfig: none of the {len(usable)} rows of {config.index} fits; look at style,"
            " text_buckets or max_text_tokens, frame_buckets and modality_weights"
        )
    kept = columns.modality[usable], lengths.frames[usable], lengths.text[usable]
    chosen = choose_shapes(*kept[1:], max_shapes=config.max_shapes, tokens_per_frame=tokens_per_frame)
    if config.text_buckets or config.frame_buckets:
        frame_sizes = {0, *(config.frame_buckets or (frames for frames, _ in chosen))}
        text_sizes = config.text_buckets or {text for _, text in chosen}
        pairs = [(frames, text) for frames in frame_sizes for text in text_sizes]
        chosen = sorted(pairs, key=lambda pair: row_cost(*pair))
    buckets = make_buckets(*kept, chosen, min_rows=config.batch_size)
    of_row = np.full(len(usable), LEFT_OUT, np.int16)
    of_row[usable] = assign(*kept, buckets)
    waste = padding(lengths.frames, lengths.text, of_row, buckets, tokens_per_frame=tokens_per_frame)
    return Shapes(lengths, buckets, of_row, waste)
