"""What the NAL units of H.264 and HEVC say: which packets no other needs, and which need no other.

ffmpeg can leave out frames that no other frame references. In a damaged file that could hide damage, so a
packet is only left out if it is well formed, and every other packet must give a frame.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import Packet
    from av.video.codeccontext import VideoCodecContext

_H264_SLICES = range(1, 6)
_H264_IDR = 5
_HEVC_SLICES = range(32)
_HEVC_UNREFERENCED = (0, 2, 4, 6, 8, 10, 12, 14)  # sub-layer non-reference pictures


def knows_references(context: "VideoCodecContext") -> bool:
    """Whether `is_unreferenced` can be asked.

    H.264 says it of every picture. HEVC says it only within a temporal layer, so there must be a single one.
    VP9 and AV1 do not say it: a frame without references may still set the statistics of the next ones. The
    packets must hold NAL units with their lengths ("avcC" or "hvcC" with 4 bytes), as in mp4 and Matroska.
    """
    header = context.extradata or b""
    if context.name == "h264":
        return len(header) > 6 and header[0] == 1 and header[4] & 3 == 3
    if context.name == "hevc":
        return len(header) > 21 and header[0] == 1 and header[21] & 3 == 3 and header[21] >> 3 & 7 == 1
    return False


def is_unreferenced(packet: "Packet", codec: str) -> bool:
    """Whether no other frame references the frame of a packet. False for one that is not well formed."""
    slices = 0
    for head in _heads(bytes(packet)):
        if head is None or head & 0x80:
            return False
        if codec == "h264":
            kind, unreferenced = head & 31, head >> 5 & 3 == 0
            is_slice = kind in _H264_SLICES
        else:
            kind = head >> 1 & 63
            unreferenced = kind in _HEVC_UNREFERENCED
            is_slice = kind in _HEVC_SLICES
        if is_slice and not unreferenced:
            return False
        slices += is_slice
    return slices > 0


def has_idr_picture(packet: "Packet", context: "VideoCodecContext") -> bool:
    """Whether a packet of H.264 holds an IDR picture. False for one that is not well formed."""
    content, header = bytes(packet), context.extradata or b""
    if len(header) > 6 and header[0] == 1:
        heads = list(_heads(content)) if header[4] & 3 == 3 else [None]
    else:  # NAL units after start codes, as in MPEG-TS and AVI
        heads = [part[0] for part in content.split(b"\0\0\1")[1:] if part]
    return None not in heads and any(head is not None and head & 31 == _H264_IDR for head in heads)


def _heads(content: bytes) -> Iterator[int | None]:
    """The first byte of each NAL unit; None where the lengths do not fit the packet."""
    place = 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        if place + 4 + size > len(content) or not size:
            yield None
            return
        yield content[place + 4]
        place += 4 + size
