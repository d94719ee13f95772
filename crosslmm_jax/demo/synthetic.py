"""A small set of real mp4 files whose questions can only be answered by looking closely.

A video shows four scenes. Each of four colours appears once in the video, as one of four shapes of equal
area, in one cell of a 4 x 4 grid. Grey shapes in other cells are distractors.

    question   What shape is the red object?
    answer     ring

Averaging all patches of a frame keeps the colours but blurs the shapes, so compact tokens alone say little.
For every question each answer occurs equally often: no guess without the video is right more than 25% of the
time.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np

from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import atomic_folder, is_vacant

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 200, 40),
    "blue": (30, 60, 255),
    "yellow": (245, 235, 20),
}
SHAPES = ("ring", "square", "triangle", "cross")
CHANCE = 1 / len(SHAPES)
GREY = (130, 130, 130)
SCENES = 4
GRID = 4  # cells along one side of a frame
CELL = 16  # pixels; a frame is 64 x 64
FRAMES_PER_SCENE = 2
FRAMES_PER_SECOND = 4
_MANIFEST = "synthetic.json"


class Row(TypedDict):
    """A LLaVA-style annotation."""

    id: str
    video: str
    conversations: list[dict[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticSet:
    """Files of a written set. Media paths in the annotations are relative to `folder`."""

    folder: Path
    captions: Path  # LLaVA rows, one caption per training video (stage 1)
    train: Path  # LLaVA rows, one question each
    dialogues: Path  # the same questions, all four about a video as the turns of one row (stage 2)
    heldout: Path  # one question each, on videos that are not in the training rows
    heldout_videos: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Glyph:
    """One shape on the screen: `colour` is a key of COLOURS, or None for a grey one."""

    scene: int
    row: int
    column: int
    colour: str | None
    shape: str


def question_of(colour: str) -> str:
    """The question about one colour."""
    return f"What shape is the {colour} object?"


def caption_of(shapes: Sequence[str]) -> str:
    """A caption that names every coloured object; `shapes` follow the order of COLOURS."""
    return ", ".join(f"{colour} {shape}" for colour, shape in zip(COLOURS, shapes, strict=True))


def balanced_shapes(num_videos: int, rng: np.random.Generator) -> np.ndarray:
    """int[num_videos, 4]: the shape of each colour, every shape equally often in every column."""
    column = np.arange(num_videos) % len(SHAPES)
    return np.stack([rng.permutation(column) for _ in COLOURS], axis=1)


def place_glyphs(shapes: Sequence[str], rng: np.random.Generator, *, distractors: int) -> list[Glyph]:
    """Spreads the coloured glyphs evenly over the scenes, and `distractors` grey ones in each scene."""
    colours = list(COLOURS)
    per_scene = len(colours) // SCENES
    order = rng.permutation(len(colours))
    glyphs = []
    for scene in range(SCENES):
        cells = rng.permutation(GRID * GRID)[: per_scene + distractors]
        for position, cell in enumerate(cells):
            row, column = divmod(int(cell), GRID)
            if position < per_scene:
                index = int(order[scene * per_scene + position])
                glyphs.append(Glyph(scene, row, column, colours[index], shapes[index]))
            else:
                glyphs.append(Glyph(scene, row, column, None, SHAPES[rng.integers(len(SHAPES))]))
    return glyphs


def shape_mask(shape: str) -> np.ndarray:
    """float[CELL, CELL] in 0..1: the coverage of each pixel. All shapes cover the same area."""
    fine = 8  # sub-pixels per side, averaged to smooth the edge
    axis = (np.arange(CELL * fine) + 0.5) / (CELL * fine) * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    area = 1.8  # of the cell's 4 square units
    if shape == "ring":
        outer = 0.95
        inside = (x**2 + y**2 <= outer**2) & (x**2 + y**2 >= outer**2 - area / np.pi)
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= np.sqrt(area) / 2
    elif shape == "triangle":  # as wide as high, tip at the top
        side = np.sqrt(2 * area)
        inside = (abs(y) <= side / 2) & (abs(x) <= (y + side / 2) / 2)
    else:  # a plus whose arms are a third of its width
        width = np.sqrt(area * 9 / 5)
        arm, reach = width / 6, width / 2
        inside = ((abs(x) <= arm) & (abs(y) <= reach)) | ((abs(y) <= arm) & (abs(x) <= reach))
    return inside.reshape(CELL, fine, CELL, fine).mean(axis=(1, 3))


_MASKS = {shape: shape_mask(shape) for shape in SHAPES}


def draw_scenes(glyphs: Sequence[Glyph]) -> np.ndarray:
    """uint8[SCENES, 64, 64, 3]: the scenes, on black."""
    scenes = np.zeros((SCENES, GRID * CELL, GRID * CELL, 3))
    for glyph in glyphs:
        colour = COLOURS[glyph.colour] if glyph.colour else GREY
        top, left = glyph.row * CELL, glyph.column * CELL
        scenes[glyph.scene, top : top + CELL, left : left + CELL] = _MASKS[glyph.shape][..., None] * colour
    return np.round(scenes).astype(np.uint8)


def write_video(path: Path, scenes: np.ndarray, *, repeats: int = FRAMES_PER_SCENE) -> None:
    """Encodes `scenes` (uint8[scenes, height, width, 3]) as h264 in mp4, `repeats` frames each."""
    import av

    with av.open(str(path), "w", format="mp4", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = scenes.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.options = {"preset": "ultrafast", "crf": "8"}
        for scene in scenes:
            for _ in range(repeats):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(scene, format="rgb24")))
        container.mux(stream.encode(None))


def write_dataset(
    folder: str | os.PathLike[str],
    *,
    num_train: int,
    num_heldout: int,
    seed: int,
    distractors: int = 4,
    num_threads: int = 2,
) -> SyntheticSet:
    """Writes videos and annotations; the content depends on the numbers and the seed alone.

    A set that was written before with the same arguments is kept. Another synthetic set in `folder` is
    replaced.

    Args:
        folder: the set's folder; parents are created if they do not exist.
        num_train: training videos, a multiple of 4; each has one caption and four questions, as single rows
            and as one dialogue.
        num_heldout: held-out videos, a multiple of 4; each has four questions.
        seed: of shapes and their cells.
        distractors: grey glyphs in each scene.
        num_threads: videos encoded at once.

    Raises:
        UserError: a number is not a multiple of 4, or `folder` has other content or cannot be written.
    """
    target = Path(folder)
    manifest = {
        "num_train": num_train, "num_heldout": num_heldout, "seed": seed, "distractors": distractors,
        "version": 2,
    }  # fmt: skip
    for name in ("num_train", "num_heldout"):
        if manifest[name] <= 0 or manifest[name] % len(SHAPES):
            raise UserError(f"{name} is {manifest[name]}; it must be a positive multiple of {len(SHAPES)}")
    if _already_written(target, manifest):
        return _describe(target, num_heldout)
    with atomic_folder(target, resume=False) as building:
        (building / "videos").mkdir()
        options = {"distractors": distractors, "num_threads": num_threads}
        train = _write_split(building, "train", num_videos=num_train, seed=[seed, 0], **options)
        heldout = _write_split(building, "heldout", num_videos=num_heldout, seed=[seed, 1], **options)
        _write_json(building / "captions.json", [_caption_row(*video) for video in train])
        _write_json(building / "train.json", [row for video in train for row in _question_rows(*video)])
        _write_json(building / "dialogues.json", _dialogues(train, np.random.default_rng([seed, 2])))
        _write_json(building / "heldout.json", [row for video in heldout for row in _question_rows(*video)])
        _write_json(building / _MANIFEST, manifest)
    return _describe(target, num_heldout)


def _already_written(target: Path, manifest: dict[str, int]) -> bool:
    """Whether `target` is this set. Raises a UserError if it is anything else than a synthetic set."""
    if is_vacant(target):
        return False
    try:
        return json.loads((target / _MANIFEST).read_text(encoding="utf-8")) == manifest
    except (OSError, ValueError):
        raise UserError(f"{target}: exists and is not a synthetic set; name another folder") from None


def _describe(folder: Path, num_heldout: int) -> SyntheticSet:
    return SyntheticSet(
        folder=folder,
        captions=folder / "captions.json",
        train=folder / "train.json",
        dialogues=folder / "dialogues.json",
        heldout=folder / "heldout.json",
        heldout_videos=tuple(folder / _video_name("heldout", index) for index in range(num_heldout)),
    )


def _video_name(split: str, index: int) -> str:
    return f"videos/{split}_{index:05d}.mp4"


def _write_split(
    folder: Path, split: str, *, num_videos: int, seed: Sequence[int], distractors: int, num_threads: int
) -> list[tuple[str, list[str]]]:
    """Writes the videos of one split; returns (name, shape of each colour) per video."""
    table = balanced_shapes(num_videos, np.random.default_rng(seed))
    videos = [
        (_video_name(split, index), [SHAPES[shape] for shape in row]) for index, row in enumerate(table)
    ]

    def write(index: int) -> None:
        name, shapes = videos[index]
        rng = np.random.default_rng([*seed, index])
        write_video(folder / name, draw_scenes(place_glyphs(shapes, rng, distractors=distractors)))

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(write, range(num_videos)))
    return videos


def _row(video: str, question: str, *, answer: str, suffix: str) -> Row:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"{Path(video).stem}_{suffix}", "video": video, "conversations": turns}


def _caption_row(video: str, shapes: Sequence[str]) -> Row:
    return _row(video, "Describe the video.", answer=caption_of(shapes), suffix="caption")


def _question_rows(video: str, shapes: Sequence[str]) -> list[Row]:
    pairs = zip(COLOURS, shapes, strict=True)
    return [_row(video, question_of(colour), answer=shape, suffix=colour) for colour, shape in pairs]


def _dialogues(videos: Sequence[tuple[str, list[str]]], rng: np.random.Generator) -> list[Row]:
    """One row per video: its questions in random order, the video before the first of them."""
    rows: list[Row] = []
    for video, shapes in videos:
        single = _question_rows(video, shapes)
        turns = [turn for index in rng.permutation(len(single)) for turn in single[index]["conversations"]]
        for turn in turns[2::2]:
            turn["value"] = turn["value"].removeprefix("<image>\n")
        rows.append({"id": f"{Path(video).stem}_dialogue", "video": video, "conversations": turns})
    return rows


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
