"""`convert verify`: agreement with every kind of source, and the block in which a fault sits."""

import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

from crosslmm_jax.cli import app as cli
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.verify import Difference, compare, verify
from crosslmm_jax.errors import UserError

GRID = ("--merge.grid", "2")
KINDS = ("tied", "untied", "original", "hf", "hf_4_52", "hf_5")


def arguments(sources, kind: str) -> dict[str, str]:
    """The source `kind` as both commands take it."""
    if kind in sources.llava:
        # The original layout names a tower whose sizes nobody knows.
        vision = {"vision": str(sources.vision)} if kind == "original" else {}
        return {"llava": str(sources.llava[kind])} | vision
    vision = sources.vision if kind == "tied" else sources.two_tower
    return {"vision": str(vision), "llm": str(getattr(sources, kind))}


def convert(sources, kind: str, out, *overrides: str):
    request = Request(**arguments(sources, kind), overrides=(*GRID, *overrides))
    convert_from_hf(request, out, tokenizer=sources.tokenizer)
    return out


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory):
    """A MODEL folder of two sources; tests that damage it take a copy."""
    return convert(sources, "untied", tmp_path_factory.mktemp("verify") / "model")


def damage(folder, name: str, at) -> None:
    """Moves one number of one parameter by a little."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    changed = tensors[name].copy()
    changed[at] += 0.25
    safetensors.numpy.save_file(tensors | {name: changed}, file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_agrees_with_its_source(sources, tmp_path, kind):
    result = verify(convert(sources, kind, tmp_path / "model"), **arguments(sources, kind))
    assert result.diverging is None
    names = [d.block for d in result.differences]
    depth = sum(name.startswith("encoder layer") for name in names)
    projector = ["projector"] if kind in sources.llava else []
    assert names == [
        "patch embedding", *(f"encoder layer {i}" for i in range(depth)), "features", *projector,
        "token embedding", *(f"decoder layer {i}" for i in range(5)), "final norm", "logits",
    ]  # fmt: skip
    assert depth == 2
    assert all(d.within(5e-5) for d in result.differences)
    assert min(d.rms for d in result.differences) > 0.05  # of something, not of zeros
    assert bool(result.notes) == (not projector)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at", "block"),
    [
        ("encoder.patch_embedding", (0, 0), "patch embedding"),
        ("encoder.layers.w2", (1, 3, 4), "encoder layer 1"),
        ("decoder.layers.bk", (3, 0, 1), "decoder layer 3"),
        ("decoder.layers.w_down", (0, 2, 2), "decoder layer 0"),
        ("decoder.final_norm", (5,), "final norm"),
        ("decoder.lm_head", (7, 11), "logits"),
    ],
)
def test_the_first_block_with_a_fault_is_named(sources, converted, tmp_path, name, at, block):
    folder = shutil.copytree(converted, tmp_path / "model")
    damage(folder, name, at)
    result = verify(folder, **arguments(sources, "untied"))
    assert result.diverging is not None and result.diverging.block == block
    assert f"first block that diverges: {block} " in result.lines()[-1]


def test_the_last_layernorm_is_part_of_the_features(sources, tmp_path):
    """A wrong scale there shows only where the features pass it."""
    overrides = ("--vision.feature-layer", "-1", "--vision.post-layernorm", "True")
    folder = convert(sources, "tied", tmp_path / "model", *overrides)
    assert verify(folder, **arguments(sources, "tied")).diverging is None
    damage(folder, "encoder.post_norm_scale", (2,))
    result = verify(folder, **arguments(sources, "tied"))
    assert result.diverging is not None and result.diverging.block == "features"


def test_other_pixels_than_the_source_expects_are_found(sources, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["image_mean"] = [0.4, 0.5, 0.5]
    (folder / "config.json").write_text(json.dumps(config))
    result = verify(folder, **arguments(sources, "untied"))
    assert result.diverging is not None and result.diverging.block == "patch embedding"


def test_exit_codes_and_the_table(sources, converted, tmp_path, capsys):
    command = ["convert", "verify", str(converted)]
    command += ["--vision", str(sources.two_tower), "--llm", str(sources.untied)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "all 12 blocks agree within 0.0001" in out and "decoder layer 4" in out
    assert cli.main([*command, "--tolerance", "1e-9", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first_diverging"] == "patch embedding" and len(report["blocks"]) == 12


def test_another_source_is_refused_or_diverges(sources, converted):
    result = verify(converted, vision=str(sources.vision), llm=str(sources.untied))
    assert result.diverging is not None and result.diverging.block == "patch embedding"
    with pytest.raises(UserError, match="give either --vision and --llm, or --llava"):
        verify(converted, vision=str(sources.vision))
    with pytest.raises(UserError, match="torch reads no .npz"):
        verify(converted, vision="tower.npz", llm=str(sources.untied))


def test_a_source_that_lacks_a_part_is_named(sources, converted, tmp_path):
    tower, decoder = str(sources.two_tower), shutil.copytree(sources.untied, tmp_path / "llm")
    with pytest.raises(
        UserError, match=r"two_tower.*: no tensor model\.embed_tokens\.weight; give the source"
    ):
        verify(converted, vision=tower, llm=tower)
    config = json.loads((decoder / "config.json").read_text())
    layers = {"num_hidden_layers": 2, "layer_types": config.get("layer_types", [])[:2]}
    (decoder / "config.json").write_text(json.dumps(config | layers))
    with pytest.raises(UserError, match="decoder layer 2: the source has no such block"):
        verify(converted, vision=tower, llm=str(decoder))


def test_without_torch_it_says_what_to_install(sources, converted, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    command = ["convert", "verify", str(converted), "--vision", "x", "--llm", "y"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "torch is not installed; pip install 'crosslmm_jax[test]'" in error and error.count("\n") == 1


def test_what_counts_as_agreement():
    assert not Difference("x", float("nan"), 0.0, 1.0).within(1e-4)
    assert Difference("x", 9e-5, 0.0, 0.01).within(1e-4)
    assert not Difference("x", 2e-4, 0.0, 0.01).within(1e-4)  # small outputs get no smaller allowance ...
    assert Difference("x", 2e-4, 0.0, 3.0).within(1e-4)  # ... but large ones a larger
    difference = compare("x", np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    assert (difference.max_abs, difference.mean_abs) == (2.0, 1.0)
    with pytest.raises(UserError, match=r"x: is \[2\], the source's \[3\]"):
        compare("x", np.zeros(2), np.zeros(3))
