"""Describes an index: counts, durations, frames, tokens, and how full the buckets of a config are."""

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.batching import FRAME_COST, BucketedRows, bucket_rows
from crosslmm_jax.data.index import Index, open_index

_BAR = 40  # characters
_BINS = 10


def describe(config: DataConfig, *, tokens_per_frame: int) -> list[str]:
    """Describes the index of a config, as lines of text.

    Args:
        config: index, sampling, lengths, style, batch size and buckets; the tokenizer is not read.
        tokens_per_frame: compact tokens per frame (C).

    Raises:
        UserError: the index cannot be read, or none of its rows fits.
    """
    index = open_index(config.index)
    bucketed = bucket_rows(
        config, index, index.tables_of_columns, num_rows=len(index), tokens_per_frame=tokens_per_frame
    )
    kinds = bucketed.kinds
    durations = np.concatenate([columns.duration for columns in index.tables_of_columns()])
    lines = [f"{len(index)} rows, {len(durations)} media, {durations.sum() / 3600:.2f} hours"]
    lines += _counts(index, bucketed)
    lines += _histogram("seconds of a video", durations[durations > 0])
    lines += _histogram("frames of a row", np.repeat(kinds.frames, kinds.rows))
    lines += _histogram("text tokens of a row", np.repeat(kinds.text, kinds.rows))
    return lines + _buckets(bucketed, tokens_per_frame)


def _counts(index: Index, bucketed: BucketedRows) -> list[str]:
    lines = []
    for code, name in enumerate(MODALITIES):
        if count := int(bucketed.kinds.rows[bucketed.kinds.modality == code].sum()):
            lines.append(f"  {name:<12} {count:>10}")
    counts = np.bincount(bucketed.dataset_of_row, minlength=len(index.datasets)).tolist()
    for name, count, weight in zip(index.datasets, counts, index.weights, strict=True):
        lines.append(f"  {name:<24} {count:>10}  weight {weight:g}")
    return lines


def _buckets(bucketed: BucketedRows, tokens_per_frame: int) -> list[str]:
    """Each bucket and how full it is, then the padding over all buckets."""
    kinds = bucketed.kinds
    count = len({(bucket.frames, bucket.text) for bucket in bucketed.buckets})
    lines = [
        f"buckets: {count} shapes (F, T), T = text + {tokens_per_frame} F",
        f"  {'modality':<12} {'F':>5} {'text':>6} {'T':>6} {'rows':>10} {'F full':>7} {'T full':>7}",
    ]
    for number, bucket in enumerate(bucketed.buckets):
        inside = kinds.where(bucketed.bucket_of_kind == number)
        count, total = int(inside.rows.sum()), bucket.text + bucket.frames * tokens_per_frame
        frames, text = int(inside.rows @ inside.frames), int(inside.rows @ inside.text)
        full = frames / (count * bucket.frames) if count and bucket.frames else 1.0
        used = (text + frames * tokens_per_frame) / (count * total) if count else 1.0
        lines.append(
            f"  {bucket.modality:<12} {bucket.frames:>5} {bucket.text:>6} {total:>6} {count:>10}"
            f" {full:>7.1%} {used:>7.1%}"
        )
    waste = bucketed.padding
    lines += [
        "padding, each row read once:",
        f"  {waste.frames:>6.1%}  padded frames over all frames",
        f"  {waste.positions:>6.1%}  padded positions over all positions of the decoder (T, visual and text)",
        f"  {waste.work:>6.1%}  of the work, encoding one frame counted as {FRAME_COST} positions",
        f"truncated: {bucketed.truncated} rows lose turns at their end to fit max_text_tokens",
        f"left out: {bucketed.num_without_bucket} rows",
    ]
    return lines


def _histogram(title: str, values: np.ndarray) -> list[str]:
    """A text histogram; the bins are logarithmic where the values span a factor of 20."""
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    lines = [f"{title}: mean {values.mean():.1f}, median {np.median(values):.1f}, {low:g} to {high:g}"]
    if low == high:
        return lines
    wide = low > 0 and high / low > 20
    edges = np.geomspace(low, high, _BINS + 1) if wide else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high
    counts, _ = np.histogram(values, edges)
    for count, begin, end in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR * count / counts.max())
        lines.append(f"  {begin:>10.1f} - {end:>10.1f}  {count:>10}  {bar}")
    return lines
