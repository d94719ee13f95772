"""Takes the wanted frames out of a decoding, with as little decoding as the file allows.

1. Exactly: each wanted frame alone, from the keyframe before it. This is enough for good files.
2. With their surroundings: some packets have no frame of their own, so the frame before is shown.
3. As a plain decode shows them: for damaged files. Short ones are decoded whole, which also counts the
   damage, long ones from a GOP without damage on.
"""

import bisect
import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding.decode import (
    DamagedFrameError,
    Decoded,
    GopDecoder,
    LostFrameError,
    SeekError,
)

if TYPE_CHECKING:
    from av import VideoFrame

    from crosslmm_jax.data.media.packet_index import PacketIndex

THREADS_FROM = 500  # packets to decode from which on several threads open the file
_MOST_HELD_BACK = 32  # packets after which any decoder has given a frame, twice those of H.264 and HEVC
_SEEK_PACKETS = 8  # packets that take as long as a seek and a keyframe

# (frame, first, end): the frame becomes images `first` to `end`.
Put = Callable[["VideoFrame", int, int], None]


def take_exactly(decoder: GopDecoder, index: "PacketIndex", wanted: np.ndarray, put: Put) -> None:
    """Puts the frames of the `wanted` packets (numbers, ascending in time), in this order.

    Raises:
        LostFrameError: one has no frame, or two.
        SeekError, DamagedFrameError: as of `GopDecoder.frames`.
    """
    for part in _parts(decoder, index, wanted, stops=wanted + 1):
        taken = 0
        for frames, from_beginning in _earlier_and_earlier(decoder, part.start, part.stop):
            taken, too_late = _take_in_order(frames, index, part, put)
            if taken == len(part.wanted):
                break
            if from_beginning or not too_late:
                raise LostFrameError
        assert taken == len(part.wanted)


def is_worth_threads(index: "PacketIndex", wanted: np.ndarray, *, threads: int) -> bool:
    """Whether to use `take_in_threads`: each thread opens the file by itself, which takes a while.

    With fewer GOPs than threads some would idle: libav's own threads then decode faster (16 cores, 10 GOPs:
    0.22 against 0.26 s).
    """
    if index.packets is not None or not index.seekable or index.counted:
        return False
    begins = np.maximum.accumulate(np.where(index.keyframes, np.arange(len(index.keyframes)), 0))
    _, gops = np.unique(index.gops[wanted], return_inverse=True)
    packets = np.zeros(gops.max() + 1, np.int64)
    np.maximum.at(packets, gops, wanted - begins[wanted] + 1)
    return len(packets) >= threads > 1 and packets.sum() + _SEEK_PACKETS * len(packets) >= THREADS_FROM


def take_in_threads(
    open_decoder: Callable[[], AbstractContextManager[GopDecoder]], index: "PacketIndex", wanted: np.ndarray,
    put: Put, *, threads: int, stop: Callable[[], None],
) -> None:  # fmt: skip
    """`take_exactly` with GOPs side by side. `put` is called from several threads, in no order.

    Args:
        open_decoder: opens the file; each thread has a decoder of its own.
        index: of the file, without packets.
        wanted: numbers of packets, ascending in time.
        put: as of `take_exactly`.
        threads: at most so many.
        stop: called when a thread fails; those that wait in `put` then give up.

    Raises:
        LostFrameError, SeekError, DamagedFrameError: as `take_exactly`, by the first thread that meets one.
    """
    gops = index.gops[wanted]
    runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(gops)) + 1)
    waiting, stopped, failures = collections.deque(runs), threading.Event(), []

    def fail(error: BaseException) -> None:
        failures.append(error)
        stopped.set()
        stop()

    def work() -> None:
        try:
            with open_decoder() as decoder:
                while not stopped.is_set():
                    try:
                        run = waiting.popleft()  # in order, so that the first frames are there soon
                    except IndexError:
                        return
                    shifted = functools.partial(_put_from, put, int(run[0]))
                    take_exactly(decoder, index, wanted[run], shifted)
        except BaseException as error:
            fail(error)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(work) for _ in range(min(threads, len(runs)))]:
                done.result()
        except BaseException as error:  # Ctrl-C
            fail(error)
    if failures:
        raise failures[0]  # others may follow from it


def _put_from(put: Put, start: int, frame: "VideoFrame", first: int, end: int) -> None:
    put(frame, start + first, start + end)


def take_around(decoder: GopDecoder, index: "PacketIndex", wanted: np.ndarray, put: Put) -> None:
    """Puts for each wanted time the last frame at or before it, or the first frame of the video.

    Raises:
        LostFrameError: nothing can be decoded.
        SeekError, DamagedFrameError: as of `GopDecoder.frames`.
    """
    for part in _parts(decoder, index, wanted, stops=_stops_of_shown(index, wanted)):
        # Frames that are displayed before a keyframe are complete only from the keyframe before that one.
        start = _last_start(decoder.starts, part.start - 1) if part.start else 0
        for frames, from_beginning in _earlier_and_earlier(decoder, start, part.stop):
            if take_shown(frames, index, part, put, from_beginning=from_beginning):
                break
        else:
            raise LostFrameError


def take_from_whole_gops(decoder: GopDecoder, index: "PacketIndex", wanted: np.ndarray, put: Put) -> None:
    """As `take_around`, of a damaged file, with the damaged frames that a plain decode shows.

    Raises:
        LostFrameError: nothing can be decoded.
        SeekError: as of `GopDecoder.frames`.
    """
    # The frames after it push the wanted one out of the decoder, as in a plain decode.
    stops = np.minimum(_stops_of_shown(index, wanted) + _MOST_HELD_BACK, len(index.times))
    for part in _parts(decoder, index, wanted, stops=stops):
        start, step = part.start, 1
        while True:
            for _ in range(step):
                start = _last_start(decoder.starts, start - 1) if start else 0
            step *= 2
            try:
                frames = decoder.frames_after_whole_gop(start, part.stop)
                if take_shown(frames, index, part, put, from_beginning=start == 0):
                    break
            except DamagedFrameError:
                pass
            if start == 0:
                raise LostFrameError
            if not decoder.goes_back:
                raise SeekError("decoding has to begin earlier")


def _stops_of_shown(index: "PacketIndex", wanted: np.ndarray) -> np.ndarray:
    """int64[w], after the last packet of all that are displayed up to the time of each wanted one."""
    order = np.argsort(index.times, kind="stable")
    last = np.maximum.accumulate(order)
    places = np.searchsorted(index.times[order], index.times[wanted], side="right") - 1
    return last[places] + 1


@dataclasses.dataclass(frozen=True)
class Part:
    """Packets to decode together.

    Attributes:
        start: first packet.
        stop: packet at which to stop.
        wanted: int64[w], the wanted packets among them, ascending in time.
        first: number of wanted packets in earlier parts.
    """

    start: int
    stop: int
    wanted: np.ndarray
    first: int


def _parts(
    decoder: GopDecoder, index: "PacketIndex", wanted: np.ndarray, *, stops: np.ndarray
) -> Iterator[Part]:
    """Parts of a video that hold the wanted packets; each wanted packet ends at its entry of `stops`."""
    place = 0
    while place < len(wanted):
        first, start, stop = place, _start(decoder, index, int(wanted[place])), 0
        while place < len(wanted):
            begin = _start(decoder, index, int(wanted[place]))
            if place > first and not start <= begin <= stop:
                break
            stop = max(stop, _stop(index, int(wanted[place]), int(stops[place])))
            place += 1
        yield Part(start, stop, wanted[first:place], first)


def _start(decoder: GopDecoder, index: "PacketIndex", number: int) -> int:
    """The packet at which to begin for frame `number`."""
    starts = decoder.starts
    start = _last_start(starts, number)
    if index.counted:  # the frames before the keyframe of a GOP are only complete from the GOP before
        return _last_start(starts, start - 1) if start else 0
    while start and index.times[start] > index.times[number]:  # displayed before its keyframe: an open GOP
        start = _last_start(starts, start - 1)
    return start


def _last_start(starts: np.ndarray, number: int) -> int:
    """The last start at or before packet `number`."""
    return number - int(starts[number::-1].argmax())


def _stop(index: "PacketIndex", number: int, stop: int) -> int:
    if not index.counted:
        return stop
    return int(np.searchsorted(index.gops, index.gops[number], side="right"))  # counted to the end of the GOP


def _earlier_and_earlier(decoder: GopDecoder, start: int, stop: int) -> Iterator[tuple[Decoded, bool]]:
    """Decodings up to `stop`, each from an earlier start, and whether it is the beginning of the file."""
    step = 1
    while True:
        yield decoder.frames(start, stop), start == 0
        if start == 0:
            return
        if not decoder.goes_back:
            raise SeekError("decoding has to begin earlier")
        for _ in range(step):
            start = _last_start(decoder.starts, start - 1) if start else 0
        step *= 2


def _take_in_order(frames: Decoded, index: "PacketIndex", part: Part, put: Put) -> tuple[int, bool]:
    """Puts frames whose packets are wanted, in order.

    The frames after the last wanted one are decoded too: it may refer to one of them that is damaged.

    Returns:
        How many were put, and whether the first complete frame came after the first wanted one.
    """
    targets, times = index.times[part.wanted].tolist(), index.times
    taken, first = 0, None
    for number, frame in frames:
        time = times[number]
        first = time if first is None else first
        if taken and number == part.wanted[taken - 1]:
            raise LostFrameError  # two frames of one packet: the second is shown
        if taken == len(targets):
            continue
        if time > targets[taken]:
            break
        if number == part.wanted[taken]:
            put(frame, part.first + taken, part.first + taken + 1)
            taken += 1
    return taken, first is None or first > targets[0]


def take_shown(frames: Decoded, index: "PacketIndex", part: Part, put: Put, *, from_beginning: bool) -> bool:
    """Puts for each wanted time the last frame at or before it. Late frames replace earlier choices.

    Args:
        frames: any frames, usually in order of display.
        index: gives the times.
        part: what is wanted.
        put: may be called again for the same images.
        from_beginning: what is wanted before the first frame is that frame.

    Returns:
        False if there is no frame for one of them, or it might not be the last one.
    """
    targets = index.times[part.wanted].tolist()
    shown: list[int | None] = [None] * len(targets)  # the time of the frame that was put for each target
    held: tuple[int, VideoFrame] | None = None
    for number, frame in frames:
        time = int(index.times[number])
        begin = bisect.bisect_left(targets, time)
        if held is None:
            if not from_beginning and (begin or number >= part.start):
                return False
            _put_span(put, part, frame, 0, begin)
            held = time, frame
        elif time >= held[0]:
            since = bisect.bisect_left(targets, held[0])
            _put_span(put, part, held[1], since, begin)
            shown[since:begin] = [held[0]] * (begin - since)
            held = time, frame
        else:  # a late frame
            end = begin
            while end < len(targets) and targets[end] < held[0] and (shown[end] or time) <= time:
                shown[end] = time
                end += 1
            _put_span(put, part, frame, begin, end)
    if held is None:
        return False
    _put_span(put, part, held[1], bisect.bisect_left(targets, held[0]), len(targets))
    return True


def _put_span(put: Put, part: Part, frame: "VideoFrame", begin: int, end: int) -> None:
    if begin < end:
        put(frame, part.first + begin, part.first + end)
