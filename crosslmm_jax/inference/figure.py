"""T2V attention drawn over the frames of a video."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".pdf")
MAX_DRAWN_FRAMES = 16  # with more of them each is too small to see anything


def draw_attention(
    path: str | Path,
    frames_at: Callable[[np.ndarray], np.ndarray],
    times: Float[np.ndarray, " f"],
    maps: Float[np.ndarray, "x f p"],
    *,
    title: str,
) -> None:
    """Writes a figure of the frames with the most attention, each shaded by its attention.

    Args:
      path: the file, with a suffix of FORMATS, which chooses the format.
      frames_at: numbers of frames, ascending -> their pixels uint8[n, R, R, 3].
      times: float32[F], seconds.
      maps: float32[X, F, P] of `Video.attention`; layers are averaged.
      title: shown above the frames.

    Raises:
      UserError: the file cannot be written, or its suffix is no format.
    """
    check_format(path)
    from matplotlib.figure import Figure

    attention = maps.mean(axis=0)
    most_read = np.sort(np.argsort(attention.sum(axis=1))[::-1][:MAX_DRAWN_FRAMES])
    columns = min(4, len(most_read))
    rows = -(-len(most_read) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index, frame in zip(axes, most_read, frames_at(most_read), strict=False):
        draw_frame(axis, frame, attention[index], highest=float(attention.max()))
        axis.set_title(f"{times[index]:.1f} s: {attention[index].sum():.0%}", fontsize=8)
    figure.suptitle(title, fontsize=9, wrap=True)
    try:
        figure.savefig(path, dpi=120, format=_suffix(path)[1:])
    except OSError as error:
        raise UserError(f"--attention {path}: {error.strerror}; name a file that can be written") from error


def check_format(path: str | Path) -> None:
    """Raises a UserError unless the suffix of `path` is a format that figures are written in."""
    if _suffix(path) not in FORMATS:
        raise UserError(f"--attention {path}: end the name in {', '.join(FORMATS)}")


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def draw_frame(
    axis: "Axes", frame: UInt8[np.ndarray, "r r 3"], attention: Float[np.ndarray, " p"], *, highest: float
) -> None:
    """Draws one frame on a matplotlib axis, its P patches shaded by their attention relative to `highest`."""
    size, side = frame.shape[0], round(len(attention) ** 0.5)
    # A patch is a whole number of pixels; the model does not read the rest at the right and bottom edges.
    extent = (0, size // side * side, size // side * side, 0)
    axis.imshow(frame, extent=(0, size, size, 0))
    axis.imshow(
        attention.reshape(side, side), extent=extent, cmap="inferno", vmin=0, vmax=highest, alpha=0.55
    )
    axis.axis("off")
