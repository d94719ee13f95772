"""Decoding parts of a video, so that every frame is the one that a plain decode shows.

A plain decode sends all packets in order to one decoder. A part of it begins at a packet that the file calls
a keyframe. That is not believed: some recordings flag points from which the picture is refreshed little by
little, and some files flag every packet. Frames count from the first one that the decoder itself calls a
keyframe. Whoever misses a frame begins earlier.

Two shortcuts save work and change no frame: a seek reaches parts that are far apart, and frames that no other
frame references are skipped unless wanted.
"""

import itertools
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding.nal_units import has_idr_picture, is_unreferenced, knows_references
from crosslmm_jax.data.media.demux import container_of, packets_of
from crosslmm_jax.data.media.locate import Deadline

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

    from crosslmm_jax.data.media.packet_index import PacketIndex

_READ_ON = 32  # packets; reading past this many costs as much as a seek
_INTRA = 1  # av.video.frame.PictureType.I
_EARLIER = (0, 1, 8)  # GOPs before the wanted one at which a seek is tried

Decoded = Iterator[tuple[int, "VideoFrame"]]  # number of a packet, and the frame that has its time


class SeekError(Exception):
    """A seek did not lead to the packets of the index: read the file from its beginning."""


class DamagedFrameError(Exception):
    """The decoder refused a packet or marked a frame: only a plain decode tells what is shown."""


class LostFrameError(Exception):
    """A packet gives no frame, or several."""


class GopDecoder:
    """Decodes parts of a video, in any order of the parts if its packets are kept or can be sought."""

    def __init__(
        self, stream: "VideoStream", index: "PacketIndex", *, shortcuts: bool, wanted: Container[int] | None,
        deadline: Deadline,
    ) -> None:  # fmt: skip
        """Prepares the decoder of `stream`.

        Args:
            stream: gives the decoder, and the packets when `index` did not keep them. Without shortcuts it
                must then be at its beginning.
            index: packets of the same stream.
            shortcuts: seek, and skip frames that no other frame references.
            wanted: numbers of the packets whose frames are not skipped; None for a file with damage, of which
                none is skipped, and packets need not be the keyframes that the tables list.
            deadline: checked before every packet.
        """
        self._index = index
        self._reader = _PacketReader(
            stream, index, seek=shortcuts, deadline=deadline, checks_keyframes=wanted is not None
        )
        self._context = stream.codec_context
        self._wanted = () if wanted is None else wanted
        # Damage, and frames without times, are counted, so none may be skipped.
        counts = wanted is None or index.counted
        self._may_skip = shortcuts and not counts and knows_references(self._context)
        self._skips = False
        self._notes_idr = wanted is None and self._context.name == "h264"
        self._idr: set[int] = set()  # keyframes from which H.264 needs nothing that was decoded before
        self._expected: set[int] = set()  # packets that must still give a frame
        self._every_frame_is_whole = self._context.codec.intra_only
        self._context.skip_frame = "DEFAULT"
        self.damage_met: set[int] = set()  # packets refused, or of marked frames, in `frames_after_whole_gop`
        self.starts = index.keyframes.copy()  # packets at which decoding may begin, as far as is known
        self.starts[0] = True

    @property
    def goes_back(self) -> bool:
        """Whether a part may begin before the end of an earlier part."""
        return self._reader.goes_back

    def frames(self, start: int, stop: int) -> Decoded:
        """The complete frames of the packets from `start` to before `stop`, in order of display.

        Raises:
            SeekError: with shortcuts, or if the file has become shorter.
            DamagedFrameError: damage after the first complete frame.
            LostFrameError: with shortcuts, a packet that others may need gives no frame.
        """
        frames = self._complete_frames(start, stop)
        if not self._index.counted:
            return frames
        return _count_frames(frames, self._index, from_beginning=start == 0)

    def _complete_frames(self, start: int, stop: int) -> Decoded:
        self._context.flush_buffers()
        self._send_setup(start)
        key = 0 if start == 0 else None  # the packet of the first complete frame
        refused, self._expected = -1, set()
        for number, frame in self._decode(start, stop):
            if frame is None:
                refused = max(refused, number)
            elif key is None and self._is_start(frame):
                key = number
                self.starts[start:key] = False  # they led to no complete frame
            if key is None:
                continue
            # The decoder may refuse a packet before it gives the frame of an earlier one.
            if refused > key or frame is None or frame.is_corrupt:
                raise DamagedFrameError
            self._expected.discard(number)
            yield number, frame
        if key is None:
            self.starts[start:stop] = False
        elif any(self._index.times[number] > self._index.times[key] for number in self._expected):
            raise LostFrameError

    def frames_after_whole_gop(self, start: int, stop: int) -> Decoded:
        """The frames that a plain decode gives of the packets from `start` to before `stop`.

        Damaged ones are among them.

        A GOP without damage leaves the decoder as a plain decode does: what follows is decoded alike. `start`
        is 0, or the GOP there must be whole. That of H.264 must begin with an IDR picture: after another
        keyframe, damage is concealed by what was decoded before. The decoder may skip no frame.

        Raises:
            SeekError: as of `frames`.
            DamagedFrameError: the first GOP is damaged; begin earlier.
        """
        frames = self._frames_after_whole_gop(start, stop)
        return (
            _count_frames(frames, self._index, from_beginning=start == 0) if self._index.counted else frames
        )

    def _frames_after_whole_gop(self, start: int, stop: int) -> Decoded:
        self._context.flush_buffers()
        self._send_setup(start)
        key, until = (0, 0) if start == 0 else (None, stop)  # until: the first packet of the next GOP
        refused: list[int] = []
        for number, frame in self._decode(start, stop):
            if frame is None:
                refused.append(number)
            elif key is None and self._is_start(frame):
                key = number
                if self._context.name == "h264" and key not in self._idr:
                    raise DamagedFrameError
                until = int(np.searchsorted(self._index.gops, self._index.gops[key], side="right"))
            if key is None:
                continue
            if frame is None or frame.is_corrupt:
                self.damage_met.add(number)
            if any(key < one < until for one in refused) or (frame and frame.is_corrupt and number < until):
                raise DamagedFrameError
            if frame is not None:
                yield number, frame
        if key is None:
            raise DamagedFrameError

    def count_damaged(self, start: int, stop: int) -> tuple[int, int]:
        """Damaged frames, and all frames, of the packets from `start` to before `stop`.

        Refused packets count, and frames from the first complete one on. The decoder may skip no frame.
        """
        self._context.flush_buffers()
        self._send_setup(start)
        damaged, total, begun = 0, 0, start == 0
        for _, frame in self._decode(start, stop):
            begun = begun or (frame is not None and self._is_start(frame))
            if frame is None or begun:
                damaged += frame is None or frame.is_corrupt
                total += 1
        return damaged, total

    def _is_start(self, frame: "VideoFrame") -> bool:
        """Whether this frame and those displayed after it need nothing that was decoded before."""
        if frame.is_corrupt:
            return False
        return self._every_frame_is_whole or bool(frame.key_frame and frame.pict_type == _INTRA)

    def _decode(self, start: int, stop: int) -> "Iterator[tuple[int, VideoFrame | None]]":
        """Frames with the numbers of their packets; None for an error of the decoder."""
        for number, packet in self._reader.read(start, stop):
            if self._notes_idr and self._index.keyframes[number] and has_idr_picture(packet, self._context):
                self._idr.add(number)
            if self._may_skip:
                skips = number not in self._wanted and is_unreferenced(packet, self._context.name)
                if not skips and self._index.shown[number]:
                    self._expected.add(number)
                if skips != self._skips:
                    self._skips = skips
                    self._context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from decode_packet(self._context, packet, number)
        yield from decode_packet(self._context, None, stop - 1)
        self._context.flush_buffers()

    def _send_setup(self, start: int) -> None:
        """Sends the latest packet before `start` with a description of the stream. Its frames are ignored."""
        setups = self._index.setups
        before = int(np.searchsorted(setups, start)) - 1
        if before >= 0:
            setup = int(setups[before])
            for _ in self._decode(setup, setup + 1):
                pass


def decode_packet(
    context: "VideoCodecContext", packet: "Packet | None", number: int
) -> "Iterator[tuple[int, VideoFrame | None]]":
    """Sends packet `number` (None: the end) to a decoder. Gives frames as `GopDecoder._decode`."""
    import av.error

    if packet is not None:
        packet.pts = number  # the decoder hands it on to the frame
    try:
        frames = context.decode(packet)
    except av.error.FFmpegError:
        yield number, None
        return
    for frame in frames:
        yield number if frame.pts is None else frame.pts, frame


class PlainDecode:
    """All packets to one decoder, in order; a packet that it refuses is skipped.

    Attributes:
        damaged: number of packets that the decoder refused and of frames that it marked, so far.
        given: number of frames so far.
    """

    def __init__(self, stream: "VideoStream", index: "PacketIndex", deadline: Deadline) -> None:
        """Unless `index` kept the packets, `stream` must be at its beginning."""
        self._stream, self._index, self._deadline = stream, index, deadline
        self.damaged = 0
        self.given = 0

    def frames(self) -> Decoded:
        """The frames in the order in which the decoder gives them."""
        frames = self._frames()
        return _count_frames(frames, self._index, from_beginning=True) if self._index.counted else frames

    def _frames(self) -> Decoded:
        context = self._stream.codec_context
        context.flush_buffers()
        context.skip_frame = "DEFAULT"
        reader = _PacketReader(self._stream, self._index, seek=False, deadline=self._deadline)
        count = len(self._index.times)
        packets: Iterator[tuple[int, Packet | None]] = reader.read(0, count)
        for number, packet in itertools.chain(packets, [(count - 1, None)]):
            for time, frame in decode_packet(context, packet, number):
                if frame is None:
                    self.damaged += 1
                    continue
                self.damaged += frame.is_corrupt
                self.given += 1
                yield time, frame


def _count_frames(frames: Decoded, index: "PacketIndex", *, from_beginning: bool) -> Decoded:
    """Numbers the frames of each GOP in order of display, instead of decoding.

    Unless they come `from_beginning`, the first is a keyframe. Frames displayed before it may be missing, so
    its GOP is left out.
    """
    begins = np.searchsorted(index.gops, np.arange(int(index.gops[-1]) + 2))
    counts = np.zeros(len(begins), np.int64)
    first_gop = 0 if from_beginning else None
    for number, frame in frames:
        gop = int(index.gops[number])
        if first_gop is None:
            first_gop = gop + 1
        if gop >= first_gop:
            yield int(min(begins[gop] + counts[gop], begins[gop + 1] - 1)), frame
            counts[gop] += 1


class _PacketReader:
    """Reads packets of an index: those that it kept, or from the stream."""

    def __init__(
        self, stream: "VideoStream", index: "PacketIndex", *, seek: bool, deadline: Deadline,
        checks_keyframes: bool = True,
    ) -> None:  # fmt: skip
        self._stream = stream
        self._index = index
        self._deadline = deadline
        self._checks_keyframes = checks_keyframes
        self._seeks = seek and index.packets is None and index.seekable
        self._packets = packets_of(stream)
        self._next = 0  # number of the next packet
        self._sought = False

    @property
    def goes_back(self) -> bool:
        """Whether `read` may begin before the end of an earlier call."""
        return self._index.packets is not None or self._seeks

    def read(self, start: int, stop: int) -> "Iterator[tuple[int, Packet]]":
        """Numbers and packets from `start` to before `stop`."""
        if self._index.packets is not None:
            for number, packet in zip(range(start, stop), self._index.packets[start:stop], strict=True):
                self._deadline.check()
                yield number, packet
            return
        if self._seeks and not (self._sought and 0 <= start - self._next <= _READ_ON):
            self._seek(start)
        elif start < self._next:
            raise SeekError(f"packet {start} was read before")
        while self._next < stop:
            self._deadline.check()
            packet = self._read()
            number, self._next = self._next, self._next + 1
            if self._seeks:
                self._check(packet, number)
            if packet is None:
                return  # the file has become shorter; the caller will miss frames
            if number >= start:
                yield number, packet

    def _read(self) -> "Packet | None":
        """The next packet; None at the end, also where ffmpeg cannot read on."""
        import av.error

        try:
            return next(self._packets, None)
        except av.error.ExitError:
            raise
        except av.error.FFmpegError:
            return None

    def _seek(self, number: int) -> None:
        """Goes to packet `number`, or to an earlier one from which to read on."""
        import av.error

        index = self._index
        gop = int(index.gops[number])
        for earlier in _EARLIER:  # a format that seeks by decoding time may lead to a later keyframe
            target = int(np.searchsorted(index.gops, max(0, gop - earlier)))
            try:
                container_of(self._stream).seek(int(index.stamps[target]), stream=self._stream)
            except av.error.FFmpegError as error:
                raise SeekError(str(error)) from error
            self._packets = packets_of(self._stream)
            first = self._read()
            found = [] if first is None else np.flatnonzero(index.stamps == first.pts)
            if first is not None and len(found) == 1 and found[0] <= number:
                self._packets = itertools.chain([first], self._packets)
                self._next, self._sought = int(found[0]), True
                return
        raise SeekError(f"packet {number} was not found")

    def _check(self, packet: "Packet | None", number: int) -> None:
        """Raises SeekError unless `packet` is packet `number` of the index."""
        gops = self._index.gops
        starts_gop = number == 0 or gops[number] != gops[number - 1]
        if (
            packet is None
            or packet.pts != self._index.stamps[number]
            or (starts_gop and self._checks_keyframes and not packet.is_keyframe)
        ):
            raise SeekError(f"packet {number} is not as expected")
