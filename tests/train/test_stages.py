"""What a stage trains: patterns of parameter names."""

import math

import pytest

from crosslmm_jax.config import PARTS
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder import parameter_shapes
from crosslmm_jax.presets import tiny
from crosslmm_jax.train.stages import merge, model_of_stage, split, trained_names, trained_shares

NAMES = parameter_shapes(tiny())
PARAMS = {part: {"w": index, "layers": {"wq": index}} for index, part in enumerate(PARTS)}


def test_split_covers_every_parameter_once(make_stage) -> None:
    trainable, frozen = split(PARAMS, make_stage(trainable=("projector", "decoder.layers")))
    assert trainable == {"projector": PARAMS["projector"], "decoder": {"layers": {"wq": 4}}}
    assert set(frozen) == set(PARTS) - {"projector"} and frozen["decoder"] == {"w": 4}
    assert merge(trainable, frozen) == PARAMS


def test_unknown_and_missing_parts(make_stage) -> None:
    for params in ({**PARAMS, "head": {}}, {part: PARAMS[part] for part in PARTS if part != "t2v"}):
        with pytest.raises(ValueError, match="parts are"):
            split(params, make_stage())


def test_merge_rejects_a_parameter_in_both(make_stage) -> None:
    trainable, frozen = split(PARAMS, make_stage(trainable=("projector",)))
    with pytest.raises(ValueError, match="do not make up"):
        merge(trainable, {**frozen, "projector": {"w": 1}})


PATTERNS = [
    (("decoder",), (), {n for n in NAMES if n.startswith("decoder.")}),
    (("decoder.layers",), (), {n for n in NAMES if n.startswith("decoder.layers.")}),
    (("decoder.final_norm",), (), {"decoder.final_norm"}),
    (("*.gate",), (), {"v2v.gate", "t2v.gate"}),
    (("v2v.w[qk]", "v2v.w?"), ("v2v.wo",), {"v2v.wq", "v2v.wk", "v2v.wv"}),
    (PARTS, ("decoder.embedding", "encoder"), {
        n for n in NAMES if not n.startswith("encoder.") and n != "decoder.embedding"
    }),
]  # fmt: skip


@pytest.mark.parametrize(
    ("trainable", "frozen", "expected"),
    PATTERNS,
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_patterns(make_stage, trainable, frozen, expected) -> None:
    assert trained_names(NAMES, make_stage(trainable=trainable, frozen=frozen)) == expected


WRONG = [
    ({"trainable": ("decoder.layer.wq",)}, "StageConfig.trainable: 'decoder.layer.wq' matches no parameter of"
     " the model; near it are decoder.layers.wq"),
    ({"trainable": ("decoder", "*.gates")}, "'*.gates' matches no parameter of the model; near it are"),
    ({"trainable": ("v2v",), "frozen": ("decoder.embedding",)}, "StageConfig.frozen: 'decoder.embedding'"
     " matches no parameter that StageConfig.trainable names"),
    ({"trainable": ("v2v",), "frozen": ("v2v",)}, "it must leave some of what trainable names to learn"),
    ({"trainable": ("*.gate",), "directions": ("v2v",)}, "names parameters of t2v; directions is"
     " ('v2v',), so that they would not learn: add 't2v' to directions or to frozen"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_patterns_that_do_nothing_are_refused(make_stage, fields, message) -> None:
    with pytest.raises(ConfigError) as error:
        trained_names(NAMES, make_stage(**fields))
    assert message in str(error.value)


def test_the_fix_that_the_message_names_works(make_stage) -> None:
    stage = make_stage(trainable=("*.gate",), directions=("v2v",), frozen=("t2v",))
    assert trained_names(NAMES, stage) == {"v2v.gate"}


def test_shares_count_parameters(make_stage) -> None:
    shares = trained_shares(tiny(), make_stage(trainable=("projector", "v2v.gate", "decoder.embedding")))
    decoder = sum(math.prod(shape) for name, shape in NAMES.items() if name.startswith("decoder."))
    assert shares.keys() == {"projector", "v2v", "decoder"} and shares["projector"] == 1
    assert shares["decoder"] == pytest.approx(math.prod(NAMES["decoder.embedding"]) / decoder)


def test_directions_of_the_stage_are_in_the_graph(make_stage) -> None:
    stage = make_stage(trainable=("projector", "v2v"), directions=("v2v",))
    model = model_of_stage(tiny(), stage)
    assert model.cross_attention.directions == ("v2v",)
    assert model.decoder == tiny().decoder
