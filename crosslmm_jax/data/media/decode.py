"""Decoding the groups of pictures of a video that hold wanted frames, and as little as can be of the others.

A group is decoded from its key frame up to its last wanted frame. Shortcuts make that cheaper: groups far
apart are sought, and frames that no other is made from are not decoded unless wanted. Frames stay the same.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from crosslmm_jax.data.media.demux import PacketIndex, packets_of
from crosslmm_jax.data.media.locate import Deadline

_READ_ON = 32  # packets; to read past so many costs as much as a seek

_EARLIER = (0, 1, 8)  # groups of pictures to go further back until a seek leads far enough


class SeekError(Exception):
    """Seeking did not lead to the packets of the index: read the file from its beginning."""


def can_seek(index: PacketIndex) -> bool:
    """Whether `decode_gops` can take its packets from a stream that has been read."""
    return index.packets is not None or index.seekable


def decode_gops(
    stream: Any,
    index: PacketIndex,
    *,
    wanted: np.ndarray,
    whole_groups: bool = False,
    shortcuts: bool = False,
    deadline: Deadline,
) -> Iterator[Any]:
    """Decoded frames in order of display: those that the `wanted` packets need, and some between them.

    Args:
        stream: gives the decoder, and the packets when `index` did not keep them. Without shortcuts it must
            then be at its beginning.
        index: of the same stream.
        wanted: int[n], positions of packets in decoding order.
        whole_groups: decode groups of pictures to their end, for the frame after a lost one.
        shortcuts: seek, and leave out frames that no other needs.
        deadline: checked before every packet.

    Raises:
        SeekError: with shortcuts.
    """
    shortcuts = shortcuts and not index.by_order  # the count of frames must not skip any
    numbers = np.flatnonzero(_needed(index, wanted, whole_groups))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    source = _Source(stream, index, seek=shortcuts, deadline=deadline)
    context = stream.codec_context
    context.flush_buffers()
    context.skip_frame = "DEFAULT"
    leave_out = shortcuts and _knows_references(context)
    chosen, skips = set(wanted.tolist()), False
    for run in runs:
        for number, packet in source.read(int(run[0]), int(run[-1]) + 1):
            deadline.check()
            if leave_out and skips == (number in chosen):
                skips = not skips
                context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from context.decode(packet)
        yield from context.decode(None)
        context.flush_buffers()


def _needed(index: PacketIndex, wanted: np.ndarray, whole_groups: bool) -> np.ndarray:
    """bool[n], the packets to send to the decoder."""
    count = len(index.times)
    if index.by_order:
        return np.ones(count, bool)
    groups_before = index.groups[wanted[index.needs_previous[wanted]]] - 1
    send_until = np.full(int(index.groups.max()) + 1, -1)  # of each group, in decoding order
    np.maximum.at(send_until, index.groups[wanted], count if whole_groups else wanted)
    send_until[groups_before] = count
    return np.arange(count) <= send_until[index.groups]


def _knows_references(context: Any) -> bool:
    """Whether ffmpeg can tell of single packets that no frame is made from them.

    H.264 says so of every picture. HEVC says it only within a temporal layer, so there must be one. VP9 and
    AV1 do not say it: a frame that no other copies from may still set the statistics of the next ones.
    """
    if context.name == "hevc":
        header = context.extradata or b""
        return len(header) > 21 and header[0] == 1 and header[21] >> 3 & 7 == 1  # "hvcC": numTemporalLayers
    return context.name == "h264"


class _Source:
    """The packets of an index, kept or read from the stream."""

    def __init__(self, stream: Any, index: PacketIndex, *, seek: bool, deadline: Deadline) -> None:
        self._stream = stream
        self._index = index
        self._deadline = deadline
        self._seeks = seek and index.packets is None and index.seekable
        self._packets = packets_of(stream)
        self._next = 0  # number of the packet that comes next
        self._sought = False

    def read(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Numbers and packets from `start` up to `stop`; not before those of an earlier call."""
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
            elif packet is None:
                return  # the file has become shorter; frames will be missed
            if number >= start:
                yield number, packet

    def _seek(self, number: int) -> None:
        """Goes to packet `number`, or to one before, from which on to read."""
        import av.error

        index = self._index
        group = int(index.groups[number])
        for earlier in _EARLIER:  # a format may go by times of decoding, and so lead to a later key frame
            target = int(np.searchsorted(index.groups, max(0, group - earlier)))
            try:
                self._stream.container.seek(int(index.times[target]), stream=self._stream)
            except av.error.FFmpegError as error:
                raise SeekError(str(error)) from error
            packets = packets_of(self._stream)
            first = next(packets, None)
            found = [] if first is None else np.flatnonzero(index.times == first.pts)
            if len(found) == 1 and found[0] <= number:
                self._packets = itertools.chain([first], packets)
                self._next, self._sought = int(found[0]), True
                return
        raise SeekError(f"packet {number} was not found")

    def _check(self, packet: Any, number: int) -> None:
        """Raises SeekError unless `packet` is that of the index."""
        groups = self._index.groups
        is_start = number == 0 or groups[number] != groups[number - 1]
        if packet is None or packet.pts != self._index.times[number] or (is_start and not packet.is_keyframe):
            raise SeekError(f"packet {number} is not as expected")
