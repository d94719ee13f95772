"""What the demo trains: the `tiny` preset through both stages, and the same with cross-attention off.

The control has the same videos, order of rows, first weights, steps and learning rates; its graph alone
differs. `configs/tiny_stage1.py` and `configs/tiny_stage2.py` are this recipe as config files.
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
    """How much of everything."""

    num_train: int  # videos
    num_heldout: int  # videos
    batch_size: int  # rows: one caption, or four questions about one video
    stage1_steps: int
    stage2_steps: int
    log_every: int  # steps


FULL = Size(num_train=512, num_heldout=128, batch_size=16, stage1_steps=40, stage2_steps=520, log_every=10)
QUICK = Size(num_train=16, num_heldout=8, batch_size=8, stage1_steps=4, stage2_steps=8, log_every=1)

DISTRACTORS = 2  # grey glyphs in each scene

# Tokens of a row that are not visual: a caption, four questions with answers, one question.
CAPTION_TOKENS, DIALOGUE_TOKENS, QUESTION_TOKENS = 48, 88, 32


def stage1(
    folder: Path, *, out: Path, size: Size = FULL, seed: int = 0, cross_attention: bool = True
) -> ExperimentConfig:
    """Projector and V2V learn on captions; encoder and decoder stay at their random weights.

    Args:
      folder: holds `index` and `tokenizer`.
      out: of the run.
      size: videos, rows and steps.
      seed: of weights and order.
      cross_attention: False leaves V2V and T2V out.
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
            learning_rate=2e-3,  # ours: four orders of magnitude fewer weights than the paper's
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
    """Everything learns on questions and answers, four about a video in a row; arguments as of `stage1`.

    Args:
      init_from: MODEL folder of stage 1.
    """
    directions: tuple[Direction, ...] = ("v2v", "t2v") if cross_attention else ()
    return ExperimentConfig(
        model=tiny(),
        data=_data(folder, "dialogues", text=DIALOGUE_TOKENS, size=size, seed=seed),
        stage=StageConfig(
            name="stage2",
            # sec. 4.1: the full model, as far as it is in the graph
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
    """Stage 1, and stage 2 from where it ended; run folders are in `folder/train`."""
    prefix = "" if cross_attention else "control_"
    first, second = (folder / "train" / f"{prefix}{name}" for name in ("stage1", "stage2"))
    options = {"size": size, "seed": seed, "cross_attention": cross_attention}
    return (
        stage1(folder, out=first, **options),
        stage2(folder, out=second, init_from=first / "model", **options),
    )


def heldout(folder: Path, *, size: Size) -> DataConfig:
    """The questions about videos that no training row shows, in order."""
    data = _data(folder, "heldout", text=QUESTION_TOKENS, size=size, seed=0)
    return dataclasses.replace(data, shuffle=False, batch_size=64)


def _data(folder: Path, rows: str, *, text: int, size: Size, seed: int) -> DataConfig:
    return DataConfig(
        index=str(folder / "index" / rows),
        tokenizer=str(folder / "tokenizer"),
        batch_size=size.batch_size,
        text_buckets=(text,),
        frame_buckets=(SCENES,),
        sampling=SamplingConfig(policy="uniform", frames=SCENES),  # one frame of each scene
        frame_cache_mb=256,  # all of it: each video is decoded once
        seed=seed,
    )
