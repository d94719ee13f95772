"""The demo's recipe: the `tiny` preset through both stages, with a control without cross-attention.

The control has the same videos, order of rows, initial weights, steps and learning rates; only its graph
differs. `configs/tiny_stage1.py` and `configs/tiny_stage2.py` hold this recipe as config files.
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import (
    PARTS,
    DataConfig,
    Direction,
    ExperimentConfig,
    Part,
    RunConfig,
    SamplingConfig,
    StageConfig,
)
from crosslmm_jax.demo.synthetic import SCENES
from crosslmm_jax.presets import tiny


@dataclasses.dataclass(frozen=True)
class Size:
    """Amount of data and training."""

    num_train: int  # videos
    num_heldout: int  # videos
    batch_size: int  # rows: one caption, or four questions about one video
    stage1_steps: int
    stage2_steps: int
    log_every: int  # steps


FULL = Size(num_train=512, num_heldout=128, batch_size=16, stage1_steps=40, stage2_steps=520, log_every=10)
QUICK = Size(num_train=16, num_heldout=8, batch_size=8, stage1_steps=4, stage2_steps=8, log_every=1)

DISTRACTORS = 2  # grey glyphs in each scene

# Text tokens of a row: a caption, four questions with answers, one question.
CAPTION_TOKENS, DIALOGUE_TOKENS, QUESTION_TOKENS = 48, 88, 32


def stage1(
    folder: Path, *, out: Path, size: Size = FULL, seed: int = 0, cross_attention: bool = True
) -> ExperimentConfig:
    """Stage 1: projector and V2V learn from captions; encoder and decoder keep their random weights.

    Args:
      folder: Folder with `index` and `tokenizer`.
      out: Run folder.
      size: Videos, rows and steps.
      seed: Of weights and order of rows.
      cross_attention: False removes V2V and T2V from the graph.
    """
    trainable: tuple[Part, ...] = ("projector", "v2v") if cross_attention else ("projector",)
    return ExperimentConfig(
        model=tiny(),
        data=_data(folder, "captions", text=CAPTION_TOKENS, size=size, seed=seed),
        stage=StageConfig(
            name="stage1",
            trainable=trainable,  # sec. 4.1 and table 2c: T2V joins in stage 2
            directions=("v2v",) if cross_attention else (),
            steps=size.stage1_steps,
            learning_rate=2e-3,  # ours: a model 10,000 times smaller learns at a higher rate (sec. 4.1: 1e-4)
            b2=0.98,  # ours: a short run forgets its first gradients sooner
        ),
        run=RunConfig(out=str(out), seed=seed, log_every=size.log_every, save_every=100),
    )


def stage2(
    folder: Path,
    *,
    out: Path,
    init_from: Path,
    size: Size = FULL,
    seed: int = 0,
    cross_attention: bool = True,
) -> ExperimentConfig:
    """Stage 2: every part learns from questions and answers, four per row about one video.

    Args:
      folder: As in `stage1`, and so are `out`, `size`, `seed` and `cross_attention`.
      init_from: MODEL folder of stage 1.
    """
    directions: tuple[Direction, ...] = ("v2v", "t2v") if cross_attention else ()
    return ExperimentConfig(
        model=tiny(),
        data=_data(folder, "dialogues", text=DIALOGUE_TOKENS, size=size, seed=seed),
        stage=StageConfig(
            name="stage2",
            # table 3: the full model, as far as it is in the graph
            trainable=tuple(part for part in PARTS if part not in ("v2v", "t2v") or part in directions),
            directions=directions,
            steps=size.stage2_steps,
            learning_rate=2e-3,  # ours, as in stage 1
            b2=0.98,
            vision_lr_scale=0.01,  # ours: a random encoder diverges at the full rate
        ),
        run=RunConfig(
            out=str(out), init_from=str(init_from), seed=seed, log_every=size.log_every, save_every=100
        ),
    )


def both_stages(
    folder: Path, *, size: Size, seed: int, cross_attention: bool
) -> tuple[ExperimentConfig, ExperimentConfig]:
    """Both stages, the second starting from the first; run folders are in `folder/train`."""
    prefix = "" if cross_attention else "control_"
    first, second = (folder / "train" / f"{prefix}{name}" for name in ("stage1", "stage2"))
    options = {"size": size, "seed": seed, "cross_attention": cross_attention}
    return (
        stage1(folder, out=first, **options),
        stage2(folder, out=second, init_from=first / "model", **options),
    )


def heldout(folder: Path, *, size: Size) -> DataConfig:
    """Questions about held-out videos, in their order in the file."""
    data = _data(folder, "heldout", text=QUESTION_TOKENS, size=size, seed=0)
    return dataclasses.replace(data, shuffle=False, batch_size=64)


def _data(folder: Path, rows: str, *, text: int, size: Size, seed: int) -> DataConfig:
    return DataConfig(
        index=str(folder / "index" / rows),
        tokenizer=str(folder / "tokenizer"),
        batch_size=size.batch_size,
        text_buckets=(text,),
        frame_buckets=(SCENES,),
        sampling=SamplingConfig(policy="uniform", frames=SCENES),  # one frame per scene
        frame_cache_mb=256,  # holds all frames: each video is decoded once
        seed=seed,
    )
