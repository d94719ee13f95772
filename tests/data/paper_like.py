"""Writes an INDEX of invented rows whose lengths are distributed like those of the paper's two stages.

    python tests/data/paper_like.py FOLDER [--stage 1|2] [--rows N]

Shares of the data sets are guesses from the paper's list of them; durations follow the folders of
LLaVA-Video-178K (up to 30 s, 60 s, 2 min, 3 min), InternVid's clips of a dozen seconds, and films of up to an
hour; texts are questions with short answers, captions of a few hundred tokens, and conversations of several
turns. The media of the rows do not exist.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.index.table import META, SCHEMA, VERSION, write_table

_TURNS = json.dumps([["user", "<image>\nWhat?"], ["assistant", "Ünïcode and words. " * 20]])


class Part(NamedTuple):
    """One data set: its share of the rows, its kind, median and spread of the text, seconds of its videos."""

    name: str
    share: float
    modality: str
    text: float
    spread: float
    seconds: tuple[float, float] = (0.0, 0.0)


STAGE1 = (
    Part("capsfusion", 0.75, "image", 52, 0.35),
    Part("internvid", 0.25, "video", 45, 0.3, (3, 25)),
)
STAGE2 = (
    Part("llava-next", 0.19, "image", 260, 0.8),
    Part("allava", 0.12, "image", 330, 0.45),
    Part("sharegpt4o-image", 0.02, "image", 420, 0.4),
    Part("text", 0.03, "text", 350, 0.8),
    Part("m4-instruct", 0.12, "multi_image", 170, 0.7),
    Part("videochat2-it", 0.17, "video", 90, 0.5, (3, 40)),
    Part("llava-video-0-30s", 0.09, "video", 110, 0.8, (3, 30)),
    Part("llava-video-30-60s", 0.05, "video", 130, 0.8, (30, 60)),
    Part("llava-video-1-2m", 0.06, "video", 130, 0.8, (60, 120)),
    Part("llava-video-2-3m", 0.05, "video", 130, 0.8, (120, 180)),
    Part("llava-hound", 0.05, "video", 110, 0.5, (5, 60)),
    Part("vript", 0.02, "video", 300, 0.4, (5, 40)),
    Part("moviechat", 0.01, "video", 80, 0.5, (400, 600)),
    Part("longvid", 0.02, "video", 150, 0.7, (120, 3600)),
)


def write_index(
    folder: Path, parts: tuple[Part, ...], *, rows: int, seed: int = 0, copies: int = 1, tokenizer: str = ""
) -> None:
    """Writes an index of about `rows` rows, or of `copies` times as many.

    Its table has several names on disk then, but is stored once. `tokenizer` is the fingerprint of one.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tables = [_table(part, round(part.share * rows), rng) for part in parts]
    table = pa.concat_tables(tables)
    names = [f"rows-{number:05d}.arrow" for number in range(copies)]
    write_table(folder / names[0], table)
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    meta = {
        "version": VERSION, "files": [{"file": name, "rows": len(table)} for name in names],
        "tokenizer": tokenizer,
        "wording": {"short": 22, "full": 35}, "digest": "", "bad": {},
        "datasets": [{"name": part.name, "weight": 1.0} for part in parts],
    }  # fmt: skip
    (folder / META).write_text(json.dumps(meta))


def _table(part: Part, count: int, rng: np.random.Generator) -> pa.Table:
    text = np.clip(35 + rng.lognormal(np.log(part.text), part.spread, count), 40, 8000).astype(int)
    media = np.full(count, 1 if part.modality in ("image", "video") else 0)
    if part.modality == "multi_image":
        media = 2 + np.minimum(rng.geometric(0.35, count) - 1, 14)
    low, high = part.seconds
    seconds = rng.uniform(low, high, count) if low < 1000 else rng.lognormal(6, 1, count)
    if high >= 1000:
        seconds = np.exp(rng.uniform(np.log(low), np.log(high), count))
    answers = rng.integers(1, 5, count)
    turn = np.arange(answers.sum()) - np.repeat(np.cumsum(answers) - answers, answers) + 1
    said = 35 + np.repeat(text - 35, answers) * turn // np.repeat(answers, answers)

    def per_answer(values: np.ndarray) -> pa.Array:
        return _lists(answers, values, pa.int32())

    def per_medium(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return _lists(media, values, kind)

    duration = np.repeat(seconds, media) if part.modality == "video" else np.zeros(media.sum())
    frames = np.maximum(np.round(duration * 25), 1).astype(int)
    columns: dict[str, Any] = {
        "where": [f"{part.name}.json: row {row}" for row in range(count)], "root": ["/media"] * count,
        "turns": [_TURNS] * count, "media": per_medium(np.full(media.sum(), "a.mp4"), pa.string()),
        "dataset": [part.name] * count, "row": np.arange(count), "modality": [part.modality] * count,
        "own_system": np.zeros(count, bool), "text_tokens": text, "answer_tokens": per_answer(said),
        "answer_media": per_answer(np.repeat(media, answers)),
        "plain_tokens": np.maximum(text - 33, 1), "row_hash": np.arange(count),
        "duration": per_medium(duration, pa.float64()), "num_frames": per_medium(frames, pa.int64()),
        "fps": per_medium(np.where(duration > 0, 25.0, 0.0), pa.float64()),
    }  # fmt: skip
    arrays = []
    for field in SCHEMA:
        value = columns.get(field.name, pa.nulls(count, field.type))
        arrays.append(value if isinstance(value, pa.Array) else pa.array(value, field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _lists(lengths: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Splits the values, in order, into lists of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--rows", type=int, default=200_000)
    args = parser.parse_args()
    write_index(args.folder, STAGE1 if args.stage == 1 else STAGE2, rows=args.rows)


if __name__ == "__main__":
    main()
