"""Decoding the GOPs of a video that hold wanted frames, and as little as possible of the others.

A GOP is decoded from its keyframe to its last wanted frame. Two shortcuts save work and change no frame: a
seek reaches GOPs that are far apart, and frames that no other frame references are skipped unless wanted.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.demux import container_of, packets_of
from crosslmm_jax.data.media.locate import Deadline
from crosslmm_jax.data.media.packet_index import PacketIndex

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

_READ_ON = 32  # packets; reading past this many costs as much as a seek

_EARLIER = (0, 1, 8)  # GOPs before the wanted one at which a seek is tried


class SeekError(Exception):
    """A seek did not lead to the packets of the index: read the file from its beginning."""


def can_seek(index: PacketIndex) -> bool:
    """Whether `decode_gops` can take its packets from a stream that was read before."""
    return index.packets is not None or index.seekable


def decode_gops(
    stream: "VideoStream",
    index: PacketIndex,
    *,
    wanted: np.ndarray,
    whole_gops: bool = False,
    shortcuts: bool = False,
    deadline: Deadline,
) -> "Iterator[VideoFrame]":
    """Decoded frames in order of display: those that the `wanted` packets need, and some between them.

    Args:
        stream: gives the decoder, and the packets when `index` did not keep them. Without shortcuts it must
            then be at its beginning.
        index: packets of the same stream.
        wanted: int[n], positions of packets in decoding order.
        whole_gops: decode GOPs to their end, to find the frame after a lost one.
        shortcuts: seek, and skip frames that no other frame references.
        deadline: checked before every packet.

    Raises:
        SeekError: with shortcuts only.
    """
    shortcuts = shortcuts and not index.untimed  # frames without times are counted, so none may be skipped
    needed = np.flatnonzero(_needed(index, wanted, whole_gops))
    runs = np.split(needed, np.flatnonzero(np.diff(needed) > 1) + 1)
    reader = _PacketReader(stream, index, seek=shortcuts, deadline=deadline)
    context = stream.codec_context
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    may_skip = shortcuts and _marks_references(context)
    chosen, skips = set(wanted.tolist()), False
    for run in runs:
        for number, packet in reader.read(int(run[0]), int(run[-1]) + 1):
            deadline.check()
            if may_skip and skips == (number in chosen):
                skips = not skips
                context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from context.decode(packet)
        yield from context.decode(None)
        context.flush_buffers()


def _needed(index: PacketIndex, wanted: np.ndarray, whole_gops: bool) -> np.ndarray:
    """bool[n], the packets to send to the decoder."""
    count = len(index.times)
    if index.untimed:
        return np.ones(count, bool)
    send_until = np.full(int(index.gops.max()) + 1, -1)  # last packet of each GOP to send, in decoding order
    np.maximum.at(send_until, index.gops[wanted], count if whole_gops else wanted)
    send_until[index.gops[wanted[index.needs_previous_gop[wanted]]] - 1] = count
    return np.arange(count) <= send_until[index.gops]


def _marks_references(context: "VideoCodecContext") -> bool:
    """Whether ffmpeg knows of single packets that no other frame references them.

    H.264 says it for every picture. HEVC says it only within a temporal layer, so there must be a single one.
    VP9 and AV1 do not say it: a frame without references may still set the statistics of the next ones.
    """
    if context.name == "hevc":
        header = context.extradata or b""
        return len(header) > 21 and header[0] == 1 and header[21] >> 3 & 7 == 1  # "hvcC": numTemporalLayers
    return context.name == "h264"


class _PacketReader:
    """Reads packets of an index: those that it kept, or from the stream."""

    def __init__(self, stream: "VideoStream", index: PacketIndex, *, seek: bool, deadline: Deadline) -> None:
        self._stream = stream
        self._index = index
        self._deadline = deadline
        self._seeks = seek and index.packets is None and index.seekable
        self._packets = packets_of(stream)
        self._next = 0  # number of the next packet
        self._sought = False

    def read(self, start: int, stop: int) -> "Iterator[tuple[int, Packet]]":
        """Numbers and packets from `start` to before `stop`; never before those of an earlier call."""
        if self._index.packets is not None:
            yield from zip(range(start, stop), self._index.packets[start:stop], strict=True)
            return
        if self._seeks and not (self._sought and 0 <= start - self._next <= _READ_ON):
            self._seek(start)
        while self._next < stop:
            self._deadline.check()
            packet = next(self._packets, None)
            number, self._next = self._next, self._next + 1
            if self._seeks:
                self._check(packet, number)
            if packet is None:
                return  # the file has become shorter; the caller will miss frames
            if number >= start:
                yield number, packet

    def _seek(self, number: int) -> None:
        """Goes to packet `number`, or to an earlier one from which to read on."""
        import av.error

        index = self._index
        gop = int(index.gops[number])
        for earlier in _EARLIER:  # a format that seeks by decoding time may lead to a later keyframe
            target = int(np.searchsorted(index.gops, max(0, gop - earlier)))
            try:
                container_of(self._stream).seek(int(index.times[target]), stream=self._stream)
            except av.error.FFmpegError as error:
                raise SeekError(str(error)) from error
            packets = packets_of(self._stream)
            first = next(packets, None)
            found = [] if first is None else np.flatnonzero(index.times == first.pts)
            if first is not None and len(found) == 1 and found[0] <= number:
                self._packets = itertools.chain([first], packets)
                self._next, self._sought = int(found[0]), True
                return
        raise SeekError(f"packet {number} was not found")

    def _check(self, packet: "Packet | None", number: int) -> None:
        """Raises SeekError unless `packet` is packet `number` of the index."""
        gops = self._index.gops
        starts_gop = number == 0 or gops[number] != gops[number - 1]
        if (
            packet is None
            or packet.pts != self._index.times[number]
            or (starts_gop and not packet.is_keyframe)
        ):
            raise SeekError(f"packet {number} is not as expected")
