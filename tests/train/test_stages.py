"""Splitting parameters by part."""

import pytest

from crosslmm_jax.config import PARTS
from crosslmm_jax.presets import tiny
from crosslmm_jax.train.stages import merge, model_of_stage, split

PARAMS = {part: {"w": index} for index, part in enumerate(PARTS)}


def test_split_covers_every_part_once() -> None:
    trainable, frozen = split(PARAMS, ("projector", "v2v"))
    assert set(trainable) == {"projector", "v2v"}
    assert set(frozen) == {"encoder", "t2v", "decoder"}
    assert merge(trainable, frozen) == PARAMS


@pytest.mark.parametrize(
    ("params", "trainable"),
    [
        ({**PARAMS, "head": {}}, ("decoder",)),
        ({part: {} for part in PARTS if part != "t2v"}, ("decoder",)),
        (PARAMS, ("decoder", "head")),
    ],
)
def test_unknown_and_missing_parts(params, trainable) -> None:
    with pytest.raises(ValueError, match="parts are"):
        split(params, trainable)


def test_merge_rejects_a_part_in_both() -> None:
    trainable, frozen = split(PARAMS, ("projector",))
    with pytest.raises(ValueError, match="do not make up"):
        merge(trainable, {**frozen, "projector": {}})


def test_directions_of_the_stage_are_in_the_graph(make_stage) -> None:
    stage = make_stage(trainable=("projector", "v2v"), directions=("v2v",))
    model = model_of_stage(tiny(), stage)
    assert model.cross_attention.directions == ("v2v",)
    assert model.decoder == tiny().decoder
