"""The times of frames, from the timestamps of a file: the one place where they are made.

Timestamps are not trusted blindly. In joined files they start again, and a recorder may let them jump back or
stand still. Where they do not rise, a new segment begins, and segments are laid one after another, as players
do. A single timestamp that lies before those around it is damaged, and begins no segment. A file without
presentation times, such as H.264 with B-frames in AVI, counts its frames instead.
"""

import bisect
from typing import NamedTuple

import numpy as np

# Most frames that a decoder holds back to bring frames into the order of display (H.264 and HEVC: 16).
_MOST_HELD_BACK = 16
_MOST_DAMAGED = 100  # timestamps of a file that are looked at one by one
_LONGEST_GAP_S = 10.0  # between two frames of a broadcast; a longer one is a join


class Timestamps(NamedTuple):
    """Timestamps of the packets of a stream, in decoding order.

    Attributes:
        presentation: int64[n], in ticks.
        decoding: int64[n], in ticks; None where the file has none of its own.
        durations: int64[n], in ticks; 0 where it is not known.
        shown: bool[n], False for packets that an edit list hides.
    """

    presentation: np.ndarray
    decoding: np.ndarray | None
    durations: np.ndarray
    shown: np.ndarray


class Timeline(NamedTuple):
    """Times that rise from segment to segment.

    Attributes:
        times: int64[n], time of each packet in ticks, in decoding order.
        end: tick at which the display of the last frame ends.
        segments: int64[s], the first packet of each segment.
    """

    times: np.ndarray
    end: int
    segments: np.ndarray


def lay_out(stamps: Timestamps, *, reorders: bool, longest_gap: int | None, gap: int) -> Timeline:
    """The timeline of a file.

    Args:
        stamps: of all its packets, at least one of them shown.
        reorders: the codec may show frames in another order than it decodes them.
        longest_gap: a step forward by more ticks also begins a segment; None: any step is a pause.
        gap: ticks from frame to frame where no segment has two frames.
    """
    if stamps.decoding is None:
        stamps = stamps._replace(presentation=_replace_damaged(stamps.presentation, reorders=reorders))
    breaks = _breaks(stamps, reorders=reorders, longest_gap=longest_gap)
    segments = np.concatenate([np.zeros(1, np.int64), breaks])
    parts = [part for part in np.split(np.arange(len(stamps.shown)), breaks) if stamps.shown[part].any()]
    shown = [part[stamps.shown[part]] for part in parts]
    spans = [int(np.ptp(stamps.presentation[part])) for part in shown]
    gap = round(sum(spans) / max(1, sum(map(len, shown)) - len(shown))) or gap
    times = stamps.presentation.copy()
    end = None
    for part, visible in zip(parts, shown, strict=True):
        if end is not None:
            times[part] += end - int(times[visible].min())
        last = visible[times[visible].argmax()]
        end = int(times[last]) + (int(stamps.durations[last]) or max(1, gap))
    assert end is not None
    return Timeline(times, end, segments)


def rising(stamps: np.ndarray, *, gap: int) -> np.ndarray:
    """Timestamps int64[n] in which each that does not rise comes `gap` ticks after the one before."""
    times = stamps.copy()
    for number in np.flatnonzero(np.diff(stamps) <= 0).tolist():
        reached = int(times[number])
        while number + 1 < len(times) and times[number + 1] <= reached:
            number, reached = number + 1, reached + gap
            times[number] = reached
    return times


def longest_gap(format_name: str, tick: float) -> int | None:
    """The argument of `lay_out` for ffmpeg's name of a format: broadcasts may also jump forward."""
    return round(_LONGEST_GAP_S / tick) if format_name in ("mpegts", "mpeg") else None


def _breaks(stamps: Timestamps, *, reorders: bool, longest_gap: int | None) -> np.ndarray:
    """int64[b], the packets before which the timestamps do not rise."""
    if stamps.decoding is not None:
        steps = np.diff(stamps.decoding)
        broken = steps <= 0
        if longest_gap is not None:
            broken |= steps > longest_gap
        return np.flatnonzero(broken) + 1
    return _breaks_of_presentation(stamps.presentation, reorders=reorders)


def _breaks_of_presentation(stamps: np.ndarray, *, reorders: bool) -> np.ndarray:
    return _breaks_of_reordered(stamps) if reorders else np.flatnonzero(np.diff(stamps) <= 0) + 1


def _replace_damaged(stamps: np.ndarray, *, reorders: bool) -> np.ndarray:
    """Presentation times int64[n] in which a single damaged one is replaced by one after those before it.

    It is single if the times before and after it rise without it: after a join they do not. A time that only
    stands still stays as it is.
    """
    breaks = _breaks_of_presentation(stamps, reorders=reorders)
    if len(breaks) > _MOST_DAMAGED:  # a file of many parts, as of a recorder that starts again
        return stamps
    times = stamps.copy()
    for number in breaks.tolist():
        before, after = times[:number], times[number + 1 :]
        reached = int(before.max())
        room = int(after[after > reached].min(initial=np.iinfo(np.int64).max)) - reached
        if not (after > reached).any() or room < 2:
            continue
        stands_still = times[number] >= np.sort(before)[-2:][0]
        goes_on_earlier = after[:_MOST_HELD_BACK].min() < before[-_MOST_HELD_BACK:].min()
        if stands_still or goes_on_earlier:
            continue
        others = _breaks_of_presentation(np.concatenate([before, after]), reorders=reorders)
        if (others < number).all():
            gaps = np.diff(np.sort(before))
            times[number] = reached + min(int(gaps[gaps > 0].min(initial=room)), room // 2)
    return times


def _breaks_of_reordered(stamps: np.ndarray) -> np.ndarray:
    """As `_breaks`, from presentation times alone.

    A decoder holds back some frames and shows the earliest of them. A packet that is to be shown before a
    frame that was shown, or together with one that waits, begins a segment.
    """
    held = _MOST_HELD_BACK
    highest = np.maximum.accumulate(stamps)
    if len(np.unique(stamps)) == len(stamps) and (stamps[held:] > highest[:-held]).all():
        return np.zeros(0, np.int64)  # no decoder has shown a later one: the case of good files, quickly
    breaks: list[int] = []
    waiting: list[int] = []
    shown: int | None = None
    for number, stamp in enumerate(stamps.tolist()):
        place = bisect.bisect_left(waiting, stamp)
        repeats = place < len(waiting) and waiting[place] == stamp
        if repeats or (shown is not None and stamp <= shown):
            breaks.append(number)
            waiting, shown, place = [], None, 0
        waiting.insert(place, stamp)
        if len(waiting) > held:
            shown = waiting.pop(0)
    return np.array(breaks, np.int64)
