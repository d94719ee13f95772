"""Why no row of an index fits the settings of a run, in numbers, and the smallest settings that do."""

from collections.abc import Iterable

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.batching.token_counts import TokenCounts


def why_none_fits(config: DataConfig, counted: Iterable[tuple[np.ndarray, TokenCounts]]) -> str:
    """The lengths of all rows, and what must be changed for the one that lacks least.

    Args:
        config: settings that leave every row out.
        counted: modalities and counts of the rows, in parts.
    """
    modality, frames, needed = _kinds(counted)
    if weights := config.modality_weights.as_dict():
        found = [MODALITIES[code] for code in np.unique(modality).tolist()]
        weighted = np.isin(modality, [MODALITIES.index(name) for name in weights])
        if not weighted.any():
            return (
                f"they are {' and '.join(found)}, and modality_weights gives steps to {' and '.join(weights)}"
                f" only; give a weight to {' or '.join(found)}"
            )
        frames, needed = frames[weighted], needed[weighted]
    if not needed.any():
        return f"none is of style {config.style!r}; set style to 'chat'"
    frames, needed = frames[needed > 0], needed[needed > 0]
    most_frames = config.frame_buckets[-1] if config.frame_buckets else np.inf
    too_long, too_many = needed > config.most_text_tokens, frames > most_frames
    nearest = np.lexsort([frames, needed, too_long.astype(int) + too_many])[0]
    fixes = []
    if too_long[nearest]:
        name = "the largest of text_buckets" if config.text_buckets else "max_text_tokens"
        fixes.append(f"raise {name} from {config.most_text_tokens} to {needed[nearest]} or more")
    if too_many[nearest]:
        fixes.append(
            f"raise the largest of frame_buckets from {most_frames} to {frames[nearest]} or more, or read"
            " fewer frames (sampling)"
        )
    return (
        f"up to the first answer they have {_range(needed)} text tokens, and {_range(frames)} frames;"
        f" {' and '.join(fixes)}"
    )


def _kinds(counted: Iterable[tuple[np.ndarray, TokenCounts]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Modality, frames and needed text tokens, once for all rows that agree in them."""
    keys = np.unique(np.concatenate([
        np.unique(modality.astype(np.int64) << 56 | counts.frames.astype(np.int64) << 32 | counts.needed)
        for modality, counts in counted
    ]))  # fmt: skip
    return keys >> 56, keys >> 32 & (2**24 - 1), keys & (2**32 - 1)


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"
