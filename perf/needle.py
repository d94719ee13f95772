"""From how many frames on a model no longer finds one frame among them, on the demo's world.

The tiny model of `crosslmm demo` goes on learning from videos of 8 to 64 frames. Each of four colours is in
one frame of a video, as one of four shapes; all other frames hold grey shapes only. Then the same questions
are asked about longer videos, at a chance of 25%. More frames than the decoder has positions for are read by
YaRN, without training on it.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crosslmm_jax.config import PARTS, DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.data.index import build_index
from crosslmm_jax.demo.synthetic import (
    CHANCE,
    COLOURS,
    FRAMES_PER_SECOND,
    GRID,
    SCENES,
    SHAPES,
    Glyph,
    balanced_shapes,
    draw_scenes,
    question_of,
    write_video,
)
from crosslmm_jax.inference import load
from crosslmm_jax.model_folder import load_model_config
from crosslmm_jax.profiling import Row
from crosslmm_jax.profiling.report import cell, commit, table, versions
from crosslmm_jax.train import train
from perf.command import command_line, parser_of

FRAMES = [8, 32, 64, 128, 256, 512, 1024, 2048, 4096]
TRAIN_FRAMES = (8, 16, 32, 64)
TEXT_TOKENS = 88  # of a dialogue of four questions, as in the demo
DISTRACTORS = 2  # grey glyphs in each frame
FIELDS = ("frames", "asked", "found", "yarn_factor")


def draw_frames(shapes: Sequence[str], count: int, rng: np.random.Generator) -> np.ndarray:
    """uint8[count, 64, 64, 3]: each colour in a frame of its own, the others with grey glyphs alone."""
    places = rng.choice(count, len(COLOURS), replace=False).tolist()
    shown, frames = dict(zip(places, zip(COLOURS, shapes, strict=True), strict=True)), []
    for begin in range(0, count, SCENES):
        glyphs: list[Glyph] = []
        for scene in range(SCENES):
            cells = [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[: DISTRACTORS + 1]]
            grey = [Glyph(scene, *cell, None, SHAPES[rng.integers(len(SHAPES))]) for cell in cells[1:]]
            found = shown.get(begin + scene)
            glyphs += grey if found is None else [*grey, Glyph(scene, *cells[0], *found)]
        frames.append(draw_scenes(glyphs))
    return np.concatenate(frames)[:count]


def write_training_set(folder: Path, *, videos: int, seed: int) -> Path:
    """Writes videos of TRAIN_FRAMES frames with a dialogue each; returns the annotations."""
    rng, rows = np.random.default_rng(seed), []
    (folder / "videos").mkdir(parents=True)
    for number, row in enumerate(balanced_shapes(videos, rng)):
        shapes = [SHAPES[shape] for shape in row]
        name = f"videos/{number:05d}.mp4"
        frames = draw_frames(shapes, TRAIN_FRAMES[number % len(TRAIN_FRAMES)], rng)
        write_video(folder / name, frames, repeats=1)
        turns = []
        for place in rng.permutation(len(COLOURS)):
            question = question_of(list(COLOURS)[place])
            turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": shapes[place]})
        rows.append({"id": str(number), "video": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def train_on(annotations: Path, folder: Path, model: Path, *, steps: int, batch: int, seed: int) -> Path:
    """Trains all parts of the MODEL folder `model` further; returns the new MODEL folder."""
    tokenizer = str(model)
    build_index(str(annotations), folder / "index", tokenizer=tokenizer, quiet=True)
    config = ExperimentConfig(
        model=load_model_config(model),
        data=DataConfig(
            index=str(folder / "index"), tokenizer=tokenizer, batch_size=batch, seed=seed,
            sampling=SamplingConfig(policy="fps", fps=FRAMES_PER_SECOND, frames=max(TRAIN_FRAMES)),
            text_buckets=(TEXT_TOKENS,), frame_buckets=TRAIN_FRAMES, frame_cache_mb=512,
        ),
        stage=StageConfig(
            name="needle", trainable=PARTS, directions=("v2v", "t2v"), steps=steps, learning_rate=1e-3,
            b2=0.98, vision_lr_scale=0.01,
        ),
        run=RunConfig(out=str(folder / "run"), init_from=str(model), log_every=20, save_every=steps),
    )  # fmt: skip
    train(config)
    return folder / "run" / "model"


def ask(model_folder: Path, *, frames: int, videos: int, seed: int) -> Row:
    """The share of questions that are answered exactly about new videos of so many frames."""
    from PIL import Image

    model = load(model_folder, yarn_frames=frames)
    size, rng, found = model.processor.image_size, np.random.default_rng([seed, frames]), 0
    for row in balanced_shapes(videos, rng):
        drawn = draw_frames([SHAPES[shape] for shape in row], frames, rng)
        squares = (Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC) for frame in drawn)
        times = np.arange(frames, dtype=np.float32) / FRAMES_PER_SECOND
        pixels = np.stack([np.asarray(square) for square in squares])
        video = model.watch_frames(pixels, times, frames / FRAMES_PER_SECOND)
        for colour, shape in zip(COLOURS, row, strict=True):
            found += video.ask(question_of(colour), max_new_tokens=6) == SHAPES[shape]
    asked = videos * len(COLOURS)
    return {
        "frames": frames, "asked": asked, "found": found / asked,
        "yarn_factor": model.config.decoder.yarn_factor,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Trains, asks, and writes a report."""
    parser = parser_of("needle", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="MODEL of `crosslmm demo`: OUT/model")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES, metavar="N")
    parser.add_argument("--videos", type=int, default=16, metavar="N", help="per length; default: 16")
    parser.add_argument("--train-videos", type=int, default=1024, metavar="N", help="default: 1024")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of training; default: 600")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows; default: 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what is made here")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = args.work or Path(name)
        trained = folder / "run" / "model"
        if not trained.exists():
            made = write_training_set(folder / "data", videos=args.train_videos, seed=args.seed)
            trained = train_on(
                made, folder, args.model.resolve(), steps=args.steps, batch=args.batch_size, seed=args.seed
            )  # fmt: skip
        results = []
        for frames in args.frames:
            results.append(ask(trained, frames=frames, videos=args.videos, seed=args.seed))
            print(results[-1], flush=True)
    report = {
        "command": command_line(), "commit": commit(), "versions": versions(), "chance": CHANCE,
        "train_frames": TRAIN_FRAMES, "steps": args.steps, "rows": results,
    }  # fmt: skip
    rows = table(FIELDS, [[cell(row[field]) for field in FIELDS] for row in results])
    page = f"# needle\n\n`{report['command']}`\n\nCommit {report['commit']}. Chance: {CHANCE:.0%}.\n\n"
    page += "\n".join(rows) + "\n"
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(page)
    print(page)
