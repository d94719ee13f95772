"""Which video stream of a file is read, and a row that chooses another one."""

import json
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from PIL import Image
from video_files import SIZE, write_streams

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.annotations import read_mixture, read_rows
from crosslmm_jax.data.batching import Bucket
from crosslmm_jax.data.index import RowStore, build_index, open_index
from crosslmm_jax.data.loading.example import Example, ExampleLoader
from crosslmm_jax.data.media import Media, MediaOptions, demux, probe, read_frames
from crosslmm_jax.data.reports import check_index
from crosslmm_jax.data.text import Tokenizer
from crosslmm_jax.data.tfds_export import to_tfds
from crosslmm_jax.errors import DataError, Fault

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]


@pytest.mark.parametrize(
    ("name", "widths", "marks", "chosen"),
    [
        ("second_is_default.mkv", (64, 32), {"default": 1}, 32),
        ("second_is_default.mp4", (64, 32), {"default": 1}, 32),
        ("none_is_default.mkv", (64, 32), {"mux": {"default_mode": "passthrough"}}, 64),
        ("transport.ts", (64, 32), {}, 64),
        ("cover_last.mp4", (32, 200), {"cover": 1}, 32),
        ("cover_and_two.mp4", (32, 200, 64), {"cover": 1, "default": 2}, 64),
        ("thumbnail_first.mkv", (200, 32), {"cover": 0}, 32),  # a track that nothing marks
    ],
)
def test_the_stream_that_players_show_is_read(
    tmp_path: Path, name: str, widths: tuple[int, ...], marks: dict, chosen: int
) -> None:
    path = write_streams(tmp_path / name, widths, **marks)
    info = probe(path)
    assert (info.width, info.num_frames) == (chosen, 6)
    frames = read_frames(path, SamplingConfig(frames=6), size=SIZE).frames
    assert np.abs(frames.mean((1, 2, 3)) - [40, 60, 80, 100, 120, 140]).max() < 6


def test_a_stream_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = str(write_streams(tmp_path / "a.mp4", (32, 64, 200), cover=2))
    for stream in (2, 3):  # a cover, and none at all
        with pytest.raises(DataError, match=f"stream {stream} is no video; .* one of 0, 1$") as caught:
            probe(Media(path, options=MediaOptions(stream=stream)))
        assert caught.value.fault.reason == "no_video"
    assert probe(Media(path, options=MediaOptions(stream=1))).width == 64
    frames = tmp_path / "frames"
    frames.mkdir()
    Image.new("RGB", (8, 8)).save(frames / "a.png")
    for medium in (frames / "a.png", frames):  # named as videos
        with pytest.raises(DataError, match="leave stream out of its row"):
            read_frames(
                Media(str(medium), options=MediaOptions(stream=0)), SamplingConfig(frames=1), size=SIZE
            )


def test_a_cover_that_ffmpeg_prefers_is_not_read(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "a.mp4", (32, 64, 200), default=1, cover=2)
    with av.open(str(path)) as container:
        streams: Any = container.streams

        class Streams:
            video = streams.video
            best = staticmethod(lambda kind: streams.video[2])

            def __len__(self) -> int:
                return len(streams)

        class Container:
            streams = Streams()

        assert demux._video_stream(cast(Any, Container()), path).index == 1


def rows_file(folder: Path, rows: list[dict]) -> str:
    (folder / "rows.json").write_text(json.dumps([row | {"conversations": TALK} for row in rows]))
    return str(folder / "rows.json")


def test_a_row_chooses_its_stream(tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    """From the annotation through the index, and through an export, to the frames of the example."""
    write_streams(tmp_path / "a.mkv", (64, 32), default=1, count=3)
    write_streams(tmp_path / "b.mkv", (16, 32), default=1, count=3)
    videos = ("a.mkv", "a.mkv", "b.mkv", "b.mkv")
    streams = (None, 0, 0, 5)
    rows = [{"video": video} | ({} if number is None else {"stream": number})
            for video, number in zip(videos, streams, strict=True)]  # fmt: skip
    index, records = str(tmp_path / "index"), tmp_path / "records"
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    assert build_index(rows_file(tmp_path, rows), index, **options).bad == {"no_video": 1}
    to_tfds(str(tmp_path / "rows.json"), records, quiet=True)
    build_index(str(records), tmp_path / "again", **options)
    for folder in (index, str(tmp_path / "again")):
        store = RowStore(open_index(folder))
        assert [row.media_options.stream for row in store] == [None, 0, 0]
        config = DataConfig(index=folder, tokenizer="", batch_size=1, sampling=SamplingConfig(frames=3))
        loader = ExampleLoader(store, config, tokenizer=tokenizer, image_size=SIZE)
        for number, options_ in enumerate((MediaOptions(), MediaOptions(stream=0), MediaOptions(stream=0))):
            example = loader.load(number, Bucket("video", frames=4, text=256))
            assert isinstance(example, Example)
            medium = Media(str(tmp_path / videos[number]), options=options_)
            expected = read_frames(medium, config.sampling, size=SIZE)
            np.testing.assert_array_equal(example.clips[0].frames, expected.frames)
        assert check_index(folder, sampling=config.sampling, quiet=True) == (3, [])
    # An earlier pass that chose another stream of the same file tells nothing about this one.
    rows[1]["stream"] = 1
    assert build_index(rows_file(tmp_path, rows), index, **options).reused == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"video": "a.mkv", "stream": "v:0"}, "stream is 'v:0'; write the number that ffprobe gives"),
        ({"video": "a.mkv", "stream": -1}, "stream is -1"),
        ({"video": "a.mkv", "stream": True}, "stream is True"),
        ({"image": "a.jpg", "stream": 1}, "stream is that of a video, and the row has none; leave it out"),
        ({"video": "a.mkv", "folder_fps": 0}, "folder_fps is 0; write a number of pictures per second"),
    ],
)
def test_wrong_fields_of_a_row_are_named(tmp_path: Path, row: dict, words: str) -> None:
    [spec] = read_mixture(rows_file(tmp_path, [row]))
    [found] = read_rows(spec, seed=0)
    assert isinstance(found, Fault) and found.reason == "malformed" and words in found.detail
