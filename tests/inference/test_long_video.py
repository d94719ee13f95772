"""A video of more frames than are kept as pixels: encoded while it is decoded, and read again if needed."""

import shutil

import jax
import numpy as np
import pytest

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import read_frames
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import VideoModel, assistant, compiled, load, watching

QUESTION = "What shape is the red object?"
FRAMES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_model) -> VideoModel:
    return load(write_model(tmp_path_factory.mktemp("long")))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    made = write_dataset(tmp_path_factory.mktemp("clips"), num_train=4, num_heldout=4, seed=0)
    return made.heldout_videos


class Ignoring:
    """A consumer that encodes nothing."""

    def begin(self, count: int) -> int:
        return 16

    def add(self, frames: np.ndarray) -> None:
        pass


@pytest.fixture
def long_from_33(monkeypatch):
    """As 600 frames are."""
    for module in (watching, compiled):
        monkeypatch.setattr(module, "writes_in_place", lambda frames: frames > 32)
    monkeypatch.setattr(watching, "keeps_pixels", lambda frames: frames <= 32)


def assert_equal(ours, theirs) -> None:
    """Caches to the bit."""
    assert ours.lengths == theirs.lengths
    for a, b in zip(jax.tree.leaves(ours.cache), jax.tree.leaves(theirs.cache), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_pixels_are_dropped_and_read_again(model, clips, tmp_path, long_from_33):
    path = shutil.copy(clips[0], tmp_path / "a.mp4")
    decoded = read_frames(path, SamplingConfig(frames=FRAMES), size=model.processor.image_size)
    told: list[int] = []
    video = model.watch(path, FRAMES, on_progress=lambda done, total: told.append(done))
    whole = model.watch_frames(decoded.frames, decoded.times, decoded.duration)
    assert told == [16, 32, 40]
    assert_equal(video.prefix, whole.prefix)
    assert video.ask(QUESTION, max_new_tokens=4) == whole.ask(QUESTION, max_new_tokens=4)
    assert sum(clip.frames.nbytes for clip in video.clips) == 0
    with pytest.raises(UserError, match=r"pixels of a long video are not kept; .*video.frames_at"):
        _ = video.frames
    for numbers in ([0], [3, 3, 39]):
        np.testing.assert_array_equal(video.frames_at(numbers), decoded.frames[numbers])
        np.testing.assert_array_equal(whole.frames_at(numbers), decoded.frames[numbers])
    for numbers in ([], [40], [-1], [3, 2]):
        with pytest.raises(UserError, match="give ascending numbers from 0 to 39"):
            video.frames_at(numbers)
    shutil.copy(clips[1], path)  # of the same times
    with pytest.raises(UserError, match="has changed since it was watched; watch it again"):
        video.frames_at([0])
    path.write_bytes(b"")
    with pytest.raises(UserError, match="a.mp4"):
        video.frames_at([0])


@pytest.mark.slow
def test_further_media_in_a_conversation_about_a_long_video(model, clips, long_from_33):
    """Its frames are encoded again, from the file, with those of the new media after them."""
    first, second = (
        read_frames(clip, SamplingConfig(frames=frames), size=model.processor.image_size)
        for clip, frames in ((clips[0], FRAMES), (clips[1], 4))
    )
    chats = [
        video.chat(max_new_tokens=3) for video in (model.watch(clips[0], FRAMES), model.watch_clips([first]))
    ]
    answers = ["".join(chat.ask("And here?", clips[1], frames=4)) for chat in chats]
    assert answers[0] == answers[1]
    assert_equal(*(chat._said.prefix for chat in chats))
    assert len(second.frames) == 4


def test_a_file_in_place_of_the_one_that_was_watched(model, clips, tmp_path):
    """Its times are the same."""
    path = shutil.copy(clips[0], tmp_path / "a.mp4")
    (clip,) = model.read(path, 600, consumer=Ignoring())
    assert len(clip.again(np.array([0, 599])).frames) == 2
    shutil.copy(clips[1], path)
    with pytest.raises(UserError, match="has changed since it was watched; watch it again"):
        clip.again(np.array([0, 599]))
    (clip,) = model.read((data := path.read_bytes()), 600, consumer=Ignoring())
    assert data and len(clip.again(np.array([0])).frames) == 1


@pytest.mark.slow
def test_an_error_holds_no_tokens(model, clips, monkeypatch, long_from_33):
    """Who answers many questions keeps the errors, and with each the frames of its traceback."""
    made = []

    class Failing(watching.Encoding):
        def add(self, frames: np.ndarray) -> None:
            super().add(frames)
            made.append(self)
            raise UserError("no more")

    monkeypatch.setattr(assistant, "Encoding", Failing)
    with pytest.raises(UserError, match="no more"):
        model.watch(clips[0], FRAMES)
    assert made[0]._kept is None and not made[0]._parts


def test_a_file_with_other_times_is_not_taken_for_the_one_that_was_watched(model, clips, tmp_path):
    path = shutil.copy(clips[0], tmp_path / "a.mp4")
    consumer = Ignoring()
    (clip,) = model.read(path, 600, consumer=consumer)
    assert isinstance(clip, watching.UnkeptClip) and len(clip.times) == 600
    part = watching.Medium(path, end=0.5)
    (shorter,) = model.read(part, 600, consumer=consumer)
    changed = watching.UnkeptClip(
        clip.frames, clip.times, clip.duration, read=shorter.read, is_same=lambda: True
    )
    for numbers in (None, np.array([599])):
        with pytest.raises(UserError, match="has changed since it was watched; watch it again"):
            changed.again(numbers, consumer)
