"""Where an answer looked: T2V attention drawn over the frames."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from crosslmm_jax.errors import UserError

# Frames beyond this many are too small to see anything on.
MOST_FRAMES = 16


def draw_attention(
    path: str | Path,
    frames: UInt8[np.ndarray, "f r r 3"],
    times: Float[np.ndarray, " f"],
    maps: Float[np.ndarray, "x f p"],
    *,
    title: str,
) -> None:
    """Writes a PNG of the frames that were read most, each with its attention laid over it.

    Args:
      path: where to.
      frames: uint8[F, R, R, 3].
      times: float32[F], seconds.
      maps: float32[X, F, P] of `Video.attention`; layers are averaged.
      title: written above.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    attention = maps.mean(axis=0)
    most_read = np.sort(np.argsort(attention.sum(axis=1))[::-1][:MOST_FRAMES])
    columns = min(4, len(most_read))
    rows = -(-len(most_read) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, most_read, strict=False):
        draw_frame(axis, frames[index], attention[index], highest=float(attention.max()))
        axis.set_title(f"{times[index]:.1f} s: {attention[index].sum():.0%}", fontsize=8)
    figure.suptitle(title, fontsize=9, wrap=True)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--attention {path}: {error.strerror}; name a file that can be written") from error


def draw_frame(
    axis: Any, frame: UInt8[np.ndarray, "r r 3"], attention: Float[np.ndarray, " p"], *, highest: float
) -> None:
    """One frame on a matplotlib axis, its P patches shaded by their share of `highest`."""
    size, side = frame.shape[0], round(len(attention) ** 0.5)
    # Patches cover a whole number of pixels; what is left over at the right and bottom is not read.
    extent = (0, size // side * side, size // side * side, 0)
    axis.imshow(frame, extent=(0, size, size, 0))
    axis.imshow(
        attention.reshape(side, side), extent=extent, cmap="inferno", vmin=0, vmax=highest, alpha=0.55
    )
    axis.axis("off")
