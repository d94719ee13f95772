"""Frames and text tokens of each row of an index, without opening a file.

The counts are upper bounds of what the loader returns, so that a row always fits its bucket. They are exact
where the index knows enough: for frames of whole videos, and for text without a time instruction, truncated
rows included. With a time instruction, all turns that might fit are counted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from crosslmm_jax.config import SamplingConfig, TimeInstruction
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.index import Columns
from crosslmm_jax.data.media import count_frames
from crosslmm_jax.data.text import most_time_tokens

_LLAVA_ROUNDING = (
    1.5  # LLaVA rounds its step, so it may read this factor more frames: a step of 1.49 becomes 1
)
_SLACK = 1e-9  # of seconds, for rounding differences between computations


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Upper bounds of the frames and text tokens of rows.

    Attributes:
        frames: int64[rows], frames of all media.
        text: int64[rows], text tokens, at most the limit of a row.
        usable: bool[rows], False where the row does not fit the style or its first exchange is too long.
        truncated: bool[rows], usable rows that may lose their last turns.
        needed: int64[rows], text tokens that a row cannot lose, of any limit; 0 if it does not fit the style.
    """

    frames: np.ndarray
    text: np.ndarray
    usable: np.ndarray
    truncated: np.ndarray
    needed: np.ndarray


def row_token_counts(
    columns: Columns,
    sampling: SamplingConfig,
    *,
    most_text: int,
    style: Literal["chat", "plain"] = "chat",
    time_instruction: TimeInstruction = "none",
    wording: Mapping[str, int],
    more_system: int = 0,
) -> TokenCounts:
    """Counts of all rows.

    Args:
        columns: columns of the index.
        sampling: the rule that chooses frames.
        most_text: limit of a row's text tokens.
        style: style of the prompts.
        time_instruction: what a chat says about each video.
        wording: tokens of the words of each time instruction, from the index.
        more_system: tokens by which the system prompt exceeds the default one.
    """
    per_medium = media_frames(columns, sampling)
    if style == "plain":
        frames = _sum_media(per_medium, columns, columns.media_per_row)
        text = columns.plain_tokens.astype(np.int64)
        usable = (text > 0) & (text <= most_text)
        return TokenCounts(frames, np.minimum(text, most_text), usable, np.zeros(len(text), bool), text)
    times = np.zeros(len(per_medium), np.int64)
    if time_instruction != "none":
        times = _time_tokens(columns, per_medium, time_instruction, wording[time_instruction])
    more = np.where(columns.own_system, 0, more_system)
    whole, first = columns.text_tokens + more, _first_answers(columns)
    rows = np.flatnonzero(whole > most_text)  # they lose turns even without time instructions
    last = _last_answers(columns, rows, most_text - more[rows])
    text, media = whole.copy(), columns.media_per_row.copy()
    text[rows], media[rows] = columns.answer_tokens[last] + more[rows], columns.answer_media[last]
    text += _sum_media(times, columns, media)
    whole += _sum_media(times, columns, columns.media_per_row)
    least = columns.answer_tokens[first] + more + _sum_media(times, columns, columns.answer_media[first])
    usable = least <= most_text
    return TokenCounts(
        _sum_media(per_medium, columns, media), np.minimum(text, most_text), usable,
        usable & (whole > most_text), least,
    )  # fmt: skip


def _first_answers(columns: Columns) -> np.ndarray:
    """int64[rows], position of each row's first answer in the columns."""
    return np.cumsum(columns.answers_per_row) - columns.answers_per_row


def _last_answers(columns: Columns, rows: np.ndarray, most: np.ndarray) -> np.ndarray:
    """int64[n], position of the last answer of each of `rows` within `most` tokens, or of its first one."""
    first, counts = _first_answers(columns)[rows], columns.answers_per_row[rows]
    begins = np.cumsum(counts) - counts
    places = np.arange(counts.sum()) + np.repeat(first - begins, counts)
    fits = columns.answer_tokens[places] <= np.repeat(most, counts)
    held = np.bincount(np.repeat(np.arange(len(rows)), counts), weights=fits, minlength=len(rows))
    return first + np.maximum(held.astype(np.int64), 1) - 1


def media_frames(columns: Columns, sampling: SamplingConfig) -> np.ndarray:
    """int64[media], frames of each medium; an image is one frame."""
    counts = np.ones(len(columns.duration), np.int64)
    is_video, start, end = _videos(columns)
    counts[is_video] = video_frames(
        columns.duration[is_video], columns.num_frames[is_video], sampling, start=start, end=end
    )
    return counts


def video_frames(
    duration: np.ndarray,
    num_frames: np.ndarray,
    sampling: SamplingConfig,
    *,
    start: np.ndarray,
    end: np.ndarray,
) -> np.ndarray:
    """int64[videos], number of frames that `sampling` reads.

    Exact for whole videos. Between bounds it is the maximum over all spacings of the frames.
    """
    whole = (start <= 0) & (end >= duration)
    inside = np.maximum(np.minimum(end, duration) - start, 1e-6)
    seconds = np.where(whole, duration, inside * (1 + _SLACK) + _SLACK)
    count = count_frames(num_frames=num_frames, duration=seconds, sampling=sampling)
    if sampling.policy == "llava" and not sampling.force_sample:
        later = count_frames(num_frames=num_frames, duration=seconds * (1 + _SLACK), sampling=sampling)
        most = np.ceil(_LLAVA_ROUNDING * sampling.fps * seconds).astype(np.int64)
        most = np.minimum(np.minimum(most, num_frames), sampling.frames)
        count = np.where(whole, np.maximum(count, later), np.where(duration > 0, most, 1))
    return count


def _videos(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which media are videos, bool[media], and the bounds of the videos, float64[videos] each."""
    of_row = np.repeat(np.arange(len(columns.modality)), columns.media_per_row)
    is_video = (columns.modality == MODALITIES.index("video"))[of_row]
    rows = of_row[is_video]
    return is_video, columns.start[rows], columns.end[rows]


def _sum_media(values: np.ndarray, columns: Columns, count: np.ndarray) -> np.ndarray:
    """int64[rows], sums of `values` over the first `count` media of each row."""
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(columns.media_per_row)
    begins = ends - columns.media_per_row
    return sums[np.minimum(begins + count, ends)] - sums[begins]


def _time_tokens(
    columns: Columns, frames: np.ndarray, kind: Literal["short", "full"], wording: int
) -> np.ndarray:
    """int64[media], upper bound of the tokens of each time instruction; 0 for images."""
    is_video, start, end = _videos(columns)
    last = np.minimum(end, columns.duration[is_video])
    tokens = np.zeros(len(frames), np.int64)
    tokens[is_video] = most_time_tokens(
        kind, wording, num_frames=frames[is_video], duration=np.maximum(last - start, 0), last=last
    )
    tokens[columns.duration <= 0] = 0
    return tokens
