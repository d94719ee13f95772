"""How much of a video is damaged, and from which share on it is refused.

The share is that of the file, not of the frames that somebody wants: frames that the decoder marks, packets
that it refuses, and packets that the file lists and does not hold, over all packets. Only decoding everything
tells, so it is counted once damage shows, or when asked for.
"""

from typing import TYPE_CHECKING

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.media.decoding.decode import PlainDecode
from crosslmm_jax.data.media.locate import PathOrMedia
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from crosslmm_jax.data.media.packet_index import PacketIndex

MAX_DAMAGED = DataConfig.max_damaged  # the default of every reader


def shows_damage(index: "PacketIndex", *, above: float = 0.0) -> bool:
    """Whether a file is known to be damaged, by a larger share than `above`, before anything is decoded."""
    return index.missing + index.flagged > above * (len(index.times) + index.missing)


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
    total = int(index.shown.sum()) + index.missing
    damaged = min(total, decode.damaged + index.missing)
    if decode.given and damaged <= most * total:
        return damaged
    reason = "truncated" if index.missing > decode.damaged else "corrupt"
    what = "it gives no frame"
    if damaged:
        what = f"{damaged} of its {total} frames are lost, above max_damaged, {most:g}"
    raise DataError(path, reason, f"is truncated or damaged ({what}); fetch or encode it again")
