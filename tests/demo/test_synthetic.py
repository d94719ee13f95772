"""The synthetic set: no guess beats chance, every colour shows once, videos survive the codec."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.video import read_frames
from crosslmm_jax.demo.synthetic import (
    CELL,
    CHANCE,
    COLOURS,
    SCENES,
    SHAPES,
    SyntheticSet,
    balanced_shapes,
    caption_of,
    draw_scenes,
    place_glyphs,
    shape_mask,
    write_dataset,
)
from crosslmm_jax.errors import UserError


def questions_and_answers(path: Path) -> list[tuple[str, str]]:
    rows = json.loads(path.read_text())
    return [(row["conversations"][0]["value"], row["conversations"][1]["value"]) for row in rows]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_no_guess_without_the_video_beats_chance(synthetic: SyntheticSet, split: str) -> None:
    pairs = questions_and_answers(getattr(synthetic, split))
    by_question = defaultdict(Counter)
    for question, answer in pairs:
        by_question[question][answer] += 1
    assert len(by_question) == len(COLOURS)
    for answers in by_question.values():
        assert set(answers) == set(SHAPES) and len(set(answers.values())) == 1
    best = sum(max(answers.values()) for answers in by_question.values())
    assert best / len(pairs) == CHANCE == 0.25


def test_dialogues_hold_the_training_questions(synthetic: SyntheticSet) -> None:
    single, order = Counter(), Counter()
    for row in json.loads(synthetic.train.read_text()):
        human, gpt = row["conversations"]
        single[row["video"], human["value"].removeprefix("<image>\n"), gpt["value"]] += 1
    dialogues = json.loads(synthetic.dialogues.read_text())
    for row in dialogues:
        turns = row["conversations"]
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * 7
        order[turns[0]["value"]] += 1
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            single[row["video"], human["value"].removeprefix("<image>\n"), gpt["value"]] -= 1
    assert len(dialogues) == 16 and not any(single.values())
    assert len(order) > 2  # no colour always comes first


@pytest.mark.parametrize("seed", range(3))
def test_other_answers_of_a_video_tell_nothing(seed: int) -> None:
    """Knowing the shape of one colour, the best guess of another's stays near chance."""
    table = balanced_shapes(4000, np.random.default_rng(seed))
    for first in range(len(COLOURS)):
        second = (first + 1) % len(COLOURS)
        joint = np.histogram2d(table[:, first], table[:, second], bins=len(SHAPES))[0]
        assert joint.max(axis=1).sum() / joint.sum() < CHANCE + 0.04


def test_each_colour_shows_once_and_places_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    shapes = [SHAPES[index % 4] for index in range(len(COLOURS))]
    seen = Counter()
    for _ in range(400):
        glyphs = place_glyphs(shapes, rng, distractors=4)
        coloured = [glyph for glyph in glyphs if glyph.colour]
        assert sorted(glyph.colour for glyph in coloured if glyph.colour) == sorted(COLOURS)
        assert len({(g.scene, g.row, g.column) for g in glyphs}) == len(glyphs) == len(COLOURS) + 4 * SCENES
        assert {glyph.scene for glyph in coloured} == set(range(SCENES))
        seen.update((glyph.colour, glyph.scene) for glyph in coloured)
        for glyph in coloured:
            assert glyph.colour and glyph.shape == shapes[list(COLOURS).index(glyph.colour)]
    assert min(seen.values()) > 60 and max(seen.values()) < 140  # 100 expected for each colour and scene


def test_shapes_have_one_area_so_that_mean_colours_tell_nothing() -> None:
    areas = [shape_mask(shape).mean() for shape in SHAPES]
    assert max(areas) / min(areas) < 1.02


def test_videos_show_the_scenes_after_the_codec(synthetic: SyntheticSet) -> None:
    rows = json.loads(synthetic.captions.read_text())
    for row in rows[:6]:
        clip = read_frames(synthetic.folder / row["video"], SamplingConfig(frames=SCENES), size=64)
        shapes = [part.split()[1] for part in row["conversations"][1]["value"].split(", ")]
        assert caption_of(shapes) == row["conversations"][1]["value"]
        for colour, shape in zip(COLOURS.values(), shapes, strict=True):
            assert glyph_of(clip.frames, np.array(colour)) == shape
        assert clip.duration == pytest.approx(2.0)


def glyph_of(frames: np.ndarray, colour: np.ndarray) -> str:
    """The shape of `colour` by matching every cell with every shape."""
    best = (np.inf, "")
    for frame in frames:
        for top in range(0, 64, CELL):
            for left in range(0, 64, CELL):
                cell = frame[top : top + CELL, left : left + CELL].astype(float)
                for shape in SHAPES:
                    distance = abs(cell - shape_mask(shape)[..., None] * colour).mean()
                    best = min(best, (distance, shape))
    assert best[0] < 18  # grey levels of 255
    return best[1]


def test_shapes_differ_at_the_size_the_tiny_model_sees() -> None:
    """At 8 x 8 pixels a cell, each pair of shapes differs by more than a tenth of full brightness a pixel."""
    small = {shape: shape_mask(shape).reshape(8, 2, 8, 2).mean(axis=(1, 3)) for shape in SHAPES}
    for first in SHAPES:
        for second in SHAPES:
            if first != second:
                assert abs(small[first] - small[second]).mean() > 0.1


def test_same_arguments_same_bytes(tmp_path: Path, synthetic: SyntheticSet) -> None:
    again = write_dataset(tmp_path / "again", num_train=16, num_heldout=8, seed=3, num_threads=1)
    files = sorted(path.relative_to(again.folder) for path in again.folder.rglob("*") if path.is_file())
    assert len(files) == 24 + 5
    for file in files:
        assert (again.folder / file).read_bytes() == (synthetic.folder / file).read_bytes(), file
    other = write_dataset(tmp_path / "other", num_train=16, num_heldout=8, seed=4)
    assert other.train.read_bytes() != again.train.read_bytes()


def test_heldout_videos_are_not_trained_on(synthetic: SyntheticSet) -> None:
    train, heldout = (
        {(synthetic.folder / row["video"]).read_bytes() for row in json.loads(path.read_text())}
        for path in (synthetic.train, synthetic.heldout)
    )
    assert len(train) == 16 and len(heldout) == 8 and not train & heldout
    assert [path.is_file() for path in synthetic.heldout_videos] == [True] * 8


def test_existing_folders(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "set", num_train=4, num_heldout=4, seed=0)
    stamp = first.train.stat().st_mtime_ns
    write_dataset(tmp_path / "set", num_train=4, num_heldout=4, seed=0)
    assert first.train.stat().st_mtime_ns == stamp  # kept
    write_dataset(tmp_path / "set", num_train=8, num_heldout=4, seed=0)
    assert len(questions_and_answers(first.train)) == 8 * len(COLOURS)  # replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="mine: exists and is not a synthetic set"):
        write_dataset(tmp_path / "mine", num_train=4, num_heldout=4, seed=0)
    with pytest.raises(UserError, match="num_train is 6; it must be a positive multiple of 4"):
        write_dataset(tmp_path / "six", num_train=6, num_heldout=4, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "set"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, scenes: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crosslmm_jax.demo.synthetic.write_video", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_dataset(tmp_path / "set", num_train=4, num_heldout=4, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_scenes_are_black_but_for_glyphs() -> None:
    glyphs = place_glyphs([SHAPES[0]] * len(COLOURS), np.random.default_rng(0), distractors=0)
    scenes = draw_scenes(glyphs)
    assert scenes.shape == (SCENES, 64, 64, 3)
    assert (scenes.any(axis=-1).mean(axis=(1, 2)) < 2 * CELL**2 / 64**2).all()
