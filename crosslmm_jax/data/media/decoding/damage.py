"""How much of a video is damaged, and from which share on it is refused.

The share is that of the file, not of the frames that somebody wants: frames that the decoder marks, packets
that it refuses, and packets that the file lists and does not hold, over all packets.

Of a short video all frames are counted. That takes too long for a long one, so its share is estimated first
at places that are spread evenly over it, always the same ones. All are counted if one of these is damaged, or
in a very long video, if too many are.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.media.decoding.decode import GopDecoder, LostFrameError, PlainDecode
from crosslmm_jax.data.media.locate import PathOrMedia
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from crosslmm_jax.data.media.packet_index import PacketIndex

MAX_DAMAGED = DataConfig.max_damaged  # the default of every reader
_PLACES, _FRAMES = 32, 256  # where the damage of a long video is estimated, and frames of all places together


def known_damage(index: "PacketIndex") -> int:
    """Number of damaged frames that are known before anything is decoded."""
    return index.missing + index.flagged


def count_damaged(decode: PlainDecode, index: "PacketIndex", path: PathOrMedia, *, most: float) -> int:
    """Number of damaged frames of a file, after all of it was decoded.

    Args:
        decode: of the whole file.
        index: its packets.
        path: the file.
        most: share of damaged frames, within 0..1, above which it is refused.

    Raises:
        DataError: the share is larger, or the file gives no frame at all.
    """
    damaged = min(_total(index), decode.damaged + index.missing)
    if not decode.given and not is_above(damaged, index, most=most):
        raise _refusal(path, index, damaged, what="it gives no frame")
    return check_share(damaged, index, path, most=most)


def estimate_damaged(decoder: GopDecoder, index: "PacketIndex") -> int:
    """Estimates the number of damaged frames of a file from some of them.

    It may be far too high where the file calls packets keyframes that are none. So nothing is refused for it.

    Args:
        decoder: of the file, which skips no frame.
        index: its packets.

    Raises:
        LostFrameError: no complete frame is found at most places, so they tell nothing.
        SeekError: as of `GopDecoder.frames`.
    """
    keyframes = np.union1d(np.flatnonzero(index.keyframes), [0])
    starts = np.unique(keyframes[np.linspace(0, len(keyframes) - 1, _PLACES).astype(int)])
    lengths = np.minimum(np.diff(starts, append=len(index.times)), _FRAMES // len(starts))
    places = zip(starts.tolist(), lengths.tolist(), strict=True)
    found = [decoder.count_damaged(start, start + length) for start, length in places]
    damaged, frames = np.array(found).sum(0).tolist()
    if sum(total > 0 for _, total in found) <= len(found) / 2:
        raise LostFrameError
    shown = int(index.shown.sum())
    return index.missing + max(index.flagged, math.ceil(damaged / frames * shown))


def check_share(damaged: int, index: "PacketIndex", path: PathOrMedia, *, most: float) -> int:
    """Returns the number of `damaged` frames of a file. Raises DataError if their share is above `most`."""
    if not is_above(damaged, index, most=most):
        return damaged
    what = f"{damaged} of its {_total(index)} frames are lost, above max_damaged, {most:g}"
    raise _refusal(path, index, damaged, what=what)


def is_above(damaged: int, index: "PacketIndex", *, most: float) -> bool:
    """Whether the share of `damaged` frames of a file is above `most`."""
    return damaged > most * _total(index)


def _refusal(path: PathOrMedia, index: "PacketIndex", damaged: int, *, what: str) -> DataError:
    reason = "truncated" if index.missing > damaged - index.missing else "corrupt"
    return DataError(path, reason, f"is truncated or damaged ({what}); fetch or encode it again")


def _total(index: "PacketIndex") -> int:
    """Frames that the file should show."""
    return int(index.shown.sum()) + index.missing
