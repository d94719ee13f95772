"""What the loader returns fits the bucket that was planned from the index, whatever the row."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from prompts import whole_prompt
from video_files import write_video

from crosslmm_jax.config import DataConfig, SamplingConfig, TimeInstruction
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.annotations.rows import Row
from crosslmm_jax.data.batching.buckets import NO_BUCKET, bucket_rows
from crosslmm_jax.data.batching.token_counts import row_token_counts, video_frames
from crosslmm_jax.data.index.table import Columns, Index
from crosslmm_jax.data.loading.collate import Example
from crosslmm_jax.data.loading.example import ExampleLoader
from crosslmm_jax.data.media.frame_sampling import choose_frames
from crosslmm_jax.data.media.image import Clip
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.data.text.chat import count_tokens
from crosslmm_jax.data.text.time_instruction import ClipMeta, time_text, wording_tokens
from crosslmm_jax.data.text.tokenizer import Tokenizer
from crosslmm_jax.data.text.turns import Turn
from crosslmm_jax.errors import ConfigError, Fault

TICKS = 12_800  # a second
WORDS = st.text(alphabet="ab c,1.\n", min_size=1, max_size=80).filter(str.strip)
SAMPLINGS = st.one_of(
    st.builds(SamplingConfig, frames=st.integers(1, 40)),
    st.builds(
        SamplingConfig, policy=st.just("fps"), frames=st.integers(1, 60), fps=st.sampled_from([0.5, 1.0, 2.0])
    ),
    st.builds(
        SamplingConfig, policy=st.just("llava"), frames=st.integers(1, 60), fps=st.sampled_from([1.0, 2.0]),
        force_sample=st.booleans(),
    ),
    st.builds(SamplingConfig, policy=st.just("dynamic_fps1"), min_frames=st.just(8), max_frames=st.just(64)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Film:
    """Times of the frames of a video in ticks, the last one that at which the last frame leaves."""

    times: tuple[int, ...]


@st.composite
def films(draw: st.DrawFn) -> Film:
    """Of constant or of variable rate, up to a few hours."""
    count, gap = draw(st.integers(1, 300)), draw(st.sampled_from([512, 853, 1280, 12_800, 400_000]))
    if draw(st.booleans()):
        gaps = np.full(count, gap)
    else:
        seed = draw(st.integers(0, 999))
        gaps = np.random.default_rng(seed).integers(1, 2 * gap, count)
    return Film((0, *np.cumsum(gaps).tolist()))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Row, tuple[Film, ...]]:
    """A chat about several videos, or about one within bounds."""
    pairs = draw(st.lists(st.tuples(WORDS, WORDS, st.integers(0, 2)), min_size=1, max_size=4))
    turns, media = [], []
    for question, answer, count in pairs:
        turns += [Turn("user", "<video>" * count + question), Turn("assistant", answer)]
        media += [draw(films()) for _ in range(count)]
    bounds = None
    if media and draw(st.booleans()):
        length = min(film.times[-1] for film in media) / TICKS
        begin = draw(st.floats(0, 0.9)) * length
        bounds = (begin, draw(st.one_of(st.just(float("inf")), st.floats(begin + 1e-3, begin + length + 1))))
    names = tuple(str(number) for number in range(len(media)))
    modality = "video" if media else "text"
    return Row("file: row", "set", 0, modality, names, "/root", bounds, tuple(turns)), tuple(media)


def read(film: Film, bounds: tuple[float, float] | None, sampling: SamplingConfig) -> Clip | None:
    """What decoding returns, black and of one pixel; None where the film ends before the bounds."""
    times, end = np.array(film.times[:-1]), film.times[-1]
    if bounds is not None:
        if bounds[0] >= end / TICKS:
            return None
        seconds = times / TICKS
        times = times[(seconds >= bounds[0]) & (seconds < bounds[1])]
        times = times if len(times) else np.array([bounds[0] * TICKS])
        end = min(end, bounds[1] * TICKS)
    chosen = choose_frames(times, sampling, end=end, ticks_per_second=TICKS)
    shown = (times[chosen] / TICKS).astype(np.float32)
    return Clip(np.zeros((len(chosen), 1, 1, 3), np.uint8), shown, float(end - times[0]) / TICKS)


def columns_of(row: Row, media: tuple[Film, ...], tokenizer: Tokenizer) -> Columns:
    """What an index of this row alone says."""
    seconds = np.array([film.times[-1] / TICKS for film in media])
    frames = np.array([len(film.times) - 1 for film in media], np.int64)
    start, end = row.bounds or (0.0, np.inf)
    counted: dict[str, Any] = {
        name: np.atleast_1d(np.array(value, np.int32))
        for name, value in count_tokens(row.turns, tokenizer).items()
    }
    return Columns(
        modality=np.array([MODALITIES.index(row.modality)], np.uint8), dataset=np.zeros(1, np.int32),
        plain_tokens=np.zeros(1, np.int32), own_system=np.zeros(1, bool), start=np.array([start]),
        end=np.array([end]), answers_per_row=np.array([len(counted["answer_tokens"])]),
        media_per_row=np.array([len(media)]), duration=seconds, fps=frames / np.maximum(seconds, 1e-9),
        num_frames=frames, **counted,
    )  # fmt: skip


class OneRow(list):
    """The row of a store, of whose media no damaged frames were counted."""

    def damaged(self, number: int) -> list[int | None]:
        return [None] * len(self[number].media)


class FilmLoader(ExampleLoader):
    """Decodes films."""

    media: tuple[Film, ...] = ()

    def _read_clip(self, row: Row, reference: str, damaged: int | None) -> Clip:
        clip = read(self.media[int(reference)], row.bounds, self.config.sampling)
        assert clip is not None
        return clip


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=rows(), sampling=SAMPLINGS, time=st.sampled_from(["none", "short", "full"]),
    most=st.integers(30, 1200),
)  # fmt: skip
def test_what_the_loader_returns_fits_the_planned_bucket(
    any_tokenizer: Tokenizer, made: tuple[Row, tuple[Film, ...]], sampling: SamplingConfig,
    time: TimeInstruction, most: int,
) -> None:  # fmt: skip
    row, media = made
    clips = [read(film, row.bounds, sampling) for film in media]
    assume(all(clips))
    config = DataConfig(
        index="x", tokenizer="x", batch_size=1, sampling=sampling, time_instruction=time, max_text_tokens=most
    )
    wording = wording_tokens(any_tokenizer)
    index = Index("x", (), (), (), (), "", wording, "")
    columns = columns_of(row, media, any_tokenizer)
    loader = FilmLoader(OneRow([row]), config, tokenizer=any_tokenizer, image_size=1)  # type: ignore[arg-type]
    loader.media = media
    try:
        bucketed = bucket_rows(config, index, lambda: [columns], num_rows=1, tokens_per_frame=9)
    except ConfigError:
        return
    assert bucketed.bucket_of_row[0] != NO_BUCKET
    bucket = bucketed.buckets[bucketed.bucket_of_row[0]]
    found = loader.load(0, bucket)
    assert isinstance(found, Example), found
    text = found.sequence.num_text_tokens
    assert text <= bucketed.kinds.text[0] <= min(bucket.text, most)
    assert found.num_frames <= bucketed.kinds.frames[0] <= bucket.frames
    assert len(found.clips) == found.sequence.num_media
    if found.sequence.dropped_turns:
        assert bucketed.truncated == 1
    if row.bounds is None and not found.sequence.dropped_turns:
        frames = sum(len(clip.frames) for clip in clips if clip)
        assert found.num_frames == frames == bucketed.kinds.frames[0]
    if time == "none":
        assert text == bucketed.kinds.text[0]
        assert row.bounds is not None or found.num_frames == bucketed.kinds.frames[0]
    elif row.bounds is None and not found.sequence.dropped_turns:  # the bound is no wild guess
        slack = sum(3 + len(clip.frames) * 4 for clip in clips if clip)
        assert bucketed.kinds.text[0] <= text + slack


@pytest.mark.parametrize("kind", ["short", "full"])
def test_training_and_inference_read_the_same_words_about_a_video(
    any_tokenizer: Tokenizer, kind: TimeInstruction
) -> None:
    film = Film(tuple(range(0, 300 * 512, 512)))
    sampling = SamplingConfig(frames=12)
    question = "What moves?"
    row = Row(
        "file: row", "set", 0, "video", ("0",), "/root", None,
        (Turn("user", f"<video>\n{question}"), Turn("assistant", "A bar.")),
    )  # fmt: skip
    config = DataConfig(index="x", tokenizer="x", batch_size=1, sampling=sampling, time_instruction=kind)
    loader = FilmLoader(OneRow([row]), config, tokenizer=any_tokenizer, image_size=1)  # type: ignore[arg-type]
    loader.media = (film,)
    bucketed = bucket_rows(
        config, Index("x", (), (), (), (), "", wording_tokens(any_tokenizer), ""),
        lambda: [columns_of(row, (film,), any_tokenizer)], num_rows=1, tokens_per_frame=1,
    )  # fmt: skip
    trained = loader.load(0, bucketed.buckets[0])
    assert isinstance(trained, Example)
    (clip,) = trained.clips
    text = time_text(ClipMeta(len(clip.frames), clip.duration, clip.times.tolist()), kind)
    asked = whole_prompt(question, any_tokenizer, time_text=text).ids.tolist()
    answer = [*any_tokenizer.encode_plain("A bar."), any_tokenizer.im_end, *any_tokenizer.encode_plain("\n")]
    assert trained.sequence.ids.tolist() == asked + answer


def test_a_row_whose_placeholders_do_not_fit_is_rejected_by_name(tokenizer: Tokenizer) -> None:
    film = Film((0, 512, 1024))
    turns = (Turn("user", "<video><video>What?"), Turn("assistant", "That."))
    row = Row("file: row 7", "set", 7, "video", ("0",), "/root", None, turns)
    for time in ("none", "short"):
        config = DataConfig(index="x", tokenizer="x", batch_size=1, time_instruction=time)
        loader = FilmLoader(OneRow([row]), config, tokenizer=tokenizer, image_size=1)  # type: ignore[arg-type]
        loader.media = (film,)
        bucketed = bucket_rows(
            config, Index("x", (), (), (), (), "", wording_tokens(tokenizer), ""),
            lambda: [columns_of(row, (film,), tokenizer)], num_rows=1, tokens_per_frame=1,
        )  # fmt: skip
        found = loader.load(0, bucketed.buckets[0])
        assert isinstance(found, Fault) and found.reason == "placeholders"
        assert str(found).startswith("file: row 7: 2 <image>/<video> placeholders for 1 media")


def test_the_plain_style_has_no_place_for_a_time_instruction() -> None:
    with pytest.raises(ConfigError, match="time_instruction is 'short'; it must be \"none\" with style"):
        DataConfig(index="x", tokenizer="x", batch_size=1, style="plain", time_instruction="short")


def test_token_counts_of_many_rows_at_once(tokenizer: Tokenizer) -> None:
    """Media belong to their rows, and only those before the first answer count for what cannot be cut."""
    columns = Columns(
        modality=np.array([0, 3, 3], np.uint8), dataset=np.zeros(3, np.int32),
        text_tokens=np.array([10, 20, 30], np.int32), plain_tokens=np.array([0, 5, 0], np.int32),
        own_system=np.array([False, True, False]), start=np.zeros(3), end=np.full(3, np.inf),
        answers_per_row=np.array([1, 2, 3]), answer_tokens=np.array([10, 12, 20, 14, 22, 30], np.int32),
        answer_media=np.array([0, 1, 1, 1, 1, 2], np.int32), media_per_row=np.array([0, 1, 2]),
        duration=np.array([9.0, 10.0, 100.0]), fps=np.full(3, 10.0), num_frames=np.array([90, 100, 1000]),
    )  # fmt: skip
    sampling, wording = SamplingConfig(policy="fps", fps=1.0, frames=64), {"short": 25, "full": 40}
    found = row_token_counts(columns, sampling, most_text=80, wording=wording, more_system=5)
    assert found.frames.tolist() == [0, 9, 74] and found.text.tolist() == [15, 20, 35]
    found = row_token_counts(columns, sampling, most_text=80, wording=wording, time_instruction="short")
    one, two, three = 25 + 1 + 1 + 3, 25 + 2 + 2 + 3, 25 + 2 + 3 + 3
    assert found.text.tolist() == [10, 20 + one, 80] and 30 + two + three > 80
    assert found.usable.tolist() == [True] * 3 and found.truncated.tolist() == [False, False, True]
    found = row_token_counts(columns, sampling, most_text=45, wording=wording, time_instruction="short")
    assert found.usable.tolist() == [True, True, False] and 14 + two > 45 >= 12 + one
    found = row_token_counts(columns, sampling, most_text=26, wording=wording, more_system=3)
    assert found.text.tolist() == [13, 20, 25] and found.frames.tolist() == [0, 9, 10]
    assert found.truncated.tolist() == [False, False, True] and found.usable.all()
    found = row_token_counts(columns, sampling, most_text=16, wording=wording, more_system=3)
    assert found.text.tolist()[:2] == [13, 12] and found.usable.tolist() == [True, True, False]
    found = row_token_counts(columns, sampling, most_text=29, wording=wording, time_instruction="short")
    assert found.text[2] == 29 and found.frames[2] == 10  # the second answer might fit, the third cannot
    found = row_token_counts(columns, sampling, most_text=80, wording=wording, style="plain")
    assert found.usable.tolist() == [False, True, False]


def test_files_bring_as_many_frames_as_their_probe_promises(tmp_path: Path) -> None:
    """Exactly, and between bounds at most, with constant and variable rates."""
    rng = np.random.default_rng(3)
    ticks = np.cumsum(rng.integers(10, 90, 90)).tolist()
    files = [
        write_video(tmp_path / "constant.mp4", 90),
        write_video(tmp_path / "variable.mp4", 90, ticks=ticks),
        write_video(tmp_path / "variable.mkv", 90, ticks=ticks, options={"g": "7"}),
        write_video(tmp_path / "mpeg4.avi", 60, codec="mpeg4"),
        write_video(tmp_path / "stream.ts", 60, options={"g": "10"}),
    ]
    samplings = [
        SamplingConfig(frames=5), SamplingConfig(policy="fps", fps=5.0, frames=16),
        SamplingConfig(policy="llava", fps=7.0, frames=32),
        SamplingConfig(policy="dynamic_fps1", min_frames=8, max_frames=16),
    ]  # fmt: skip
    for path in files:
        info = probe(path)
        for sampling in samplings:
            for bounds in (None, (0.0, 1.0), (0.37, 1.61), (1.2, 99.0)):
                start, end = bounds or (0.0, np.inf)
                most = video_frames(
                    np.array([info.duration]), np.array([info.num_frames]), sampling,
                    start=np.array([start]), end=np.array([end]),
                )  # fmt: skip
                found = len(read_frames(path, sampling, size=8, bounds=bounds).frames)
                assert found <= most[0], (path.name, sampling, bounds)
                assert bounds is not None or found == most[0], (path.name, sampling)
