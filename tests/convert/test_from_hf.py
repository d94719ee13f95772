"""Weights of every layout into a MODEL folder: the right values, every key accounted for, the same bytes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.model import CrossLMM, init_params, logical_axes
from crosslmm_jax.model.encoder import SiglipEncoder
from crosslmm_jax.model_folder import load_model_config, load_processor, load_weights
from crosslmm_jax.parallel import make_mesh, param_shardings

CROSS = ("--cross-attention.cross-attn-every", "2")
FLOAT32 = ("--compute-dtype", "float32")


def llava_request(sources, layout, **changes) -> Request:
    """All layouts as the same model: the original names its tower only, Hugging Face's pad the vocabulary."""
    vision = str(sources.vision) if layout == "original" else None
    arguments = {"overrides": (*CROSS, "--decoder.vocab-size", "512"), "vision": vision}
    return Request(llava=str(sources.llava[layout]), **(arguments | changes))


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["tied", "untied"])
@pytest.mark.parametrize("vision", ["vision", "two_tower"])
def test_the_models_compute_what_torch_computes(sources, tmp_path, make_batch, vision, llm) -> None:
    request = Request(
        vision=str(getattr(sources, vision)), llm=str(getattr(sources, llm)),
        overrides=(*CROSS, *FLOAT32, "--merge.grid", "2", "--cross-attention.directions", "v2v"),
    )  # fmt: skip
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    config = load_model_config(tmp_path / "model")
    assert config.merge.grid == 2 and config.cross_attention.directions == ("v2v",)
    assert (config.decoder.rope_theta, config.decoder.tie_embeddings) == (5e4, llm == "tied")
    params = load_weights(tmp_path / "model", config, dtype="float32")

    frames = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    tower = transformers.SiglipVisionModel.from_pretrained(getattr(sources, vision)).eval()
    pixels = torch.tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1
    hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    encode = jax.jit(SiglipEncoder(config.vision, "float32", "blockwise").apply)
    ours = encode({"params": params["encoder"]}, frames)
    np.testing.assert_allclose(ours, hidden.detach(), atol=2e-5)

    model = transformers.Qwen2ForCausalLM.from_pretrained(getattr(sources, llm), dtype=torch.float32).eval()
    batch = make_batch(config, frames=0, text=9)
    logits = jax.jit(CrossLMM(config).apply)({"params": params}, batch)
    expected = model(torch.tensor(batch.tokens, dtype=torch.long)).logits
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-4)


def test_the_report_accounts_for_everything(sources, tmp_path) -> None:
    request = Request(vision=str(sources.two_tower), llm=str(sources.untied), overrides=CROSS)
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    with safetensors.safe_open(sources.two_tower / "model.safetensors", "np") as file:
        keys = set(file.keys())
    index = json.loads((sources.untied / "model.safetensors.index.json").read_text())
    keys |= set(index["weight_map"])
    ignored = {key for names in report.ignored.values() for key in names}
    assert set(report.used) | ignored == keys and not set(report.used) & ignored
    assert {key.split(".")[0] for key in ignored} == {
        "text_model", "vision_model", "logit_scale", "logit_bias",
    }  # fmt: skip
    config = load_model_config(tmp_path / "model")
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert len(report.filled) + len(report.copied) + len(report.fresh) == len(jax.tree.leaves(shapes))
    assert report.fresh == [
        "projector.b1", "projector.b2", "projector.w1", "projector.w2", "t2v.gate", "v2v.gate"
    ]  # fmt: skip
    assert report.dtypes["encoder"] == "float32" and report.dtypes["decoder"] == "bfloat16"
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert 0 < size - report.bytes < 20_000
    text = "\n".join(report.lines())
    assert "vision_model.encoder.layers.2.mlp.fc1.weight" in text and "above the layer" in text
    assert "v2v.wq" in text and f"{report.bytes:,} bytes" in text


@pytest.mark.slow
@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_new_parameters(sources, tmp_path, init) -> None:
    choices = (*CROSS, "--cross-attention.cross-attn-init", init, "--cross-attention.gate-init", "-0.5")
    request = Request(
        vision=str(sources.vision), llm=str(sources.tied), overrides=choices, dtype="float32", seed=7
    )  # fmt: skip
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    config = load_model_config(tmp_path / "model")
    params = load_weights(tmp_path / "model", config)
    random = init_params(config, jax.random.key(7))
    np.testing.assert_allclose(params["projector"]["w1"], random["projector"]["w1"], rtol=1e-6)
    np.testing.assert_array_equal(params["t2v"]["gate"], [-0.5] * 3)
    own = params["decoder"]["layers"]["wk"][jnp.array(config.cross_attention_layers)]
    if init == "copy":
        np.testing.assert_array_equal(params["v2v"]["wk"], own)
    else:
        np.testing.assert_allclose(params["v2v"]["wk"], random["v2v"]["wk"], rtol=1e-6)
        assert not np.allclose(params["v2v"]["wk"], params["t2v"]["wk"])


@pytest.fixture(scope="module")
def from_llava(sources, tmp_path_factory):
    """layout -> (MODEL folder, report)."""
    root, models = tmp_path_factory.mktemp("llava_models"), {}
    for layout in sources.llava:
        request = llava_request(sources, layout)
        models[layout] = root / layout, convert_from_hf(request, root / layout, tokenizer=sources.tokenizer)
    return models


def test_llava_layouts_give_the_same_model(from_llava) -> None:
    folders = [folder for folder, _ in from_llava.values()]
    for name in ("model.safetensors", "config.json", "processor.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    config = load_model_config(folders[0])
    assert (config.vision.depth, config.decoder.vocab_size, config.merge.grid) == (2, 512, 3)


def test_llava_keeps_type_and_names_what_it_leaves_out(from_llava) -> None:
    for layout, (_, report) in from_llava.items():
        assert set(report.dtypes.values()) == {"float16"}
        (newline,) = (names for reason, names in report.ignored.items() if "rows of an image" in reason)
        assert len(newline) == 1 and newline[0].endswith("image_newline")
        rows = [note for note in report.notes if "beyond the vocabulary" in note]
        assert len(rows) == (0 if layout == "original" else 2)
        assert "projector.w1" in report.filled and "projector.w1" not in report.fresh


def test_a_projector_alone(sources, tmp_path) -> None:
    values = {"0.weight": (64, 48), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    tensors = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in values.items()}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    for name, source in (
        ("parts", {"vision": str(sources.vision), "llm": str(sources.tied)}),
        ("llava", {"llava": str(sources.llava["hf"])}),
    ):
        overrides = ("--decoder.vocab-size", "512", *CROSS)
        request = Request(
            **source, projector=str(tmp_path / "mm_projector.bin"), overrides=overrides, dtype="float32"
        )  # fmt: skip
        report = convert_from_hf(request, tmp_path / name, tokenizer=sources.tokenizer)
        params = load_weights(tmp_path / name, load_model_config(tmp_path / name))
        np.testing.assert_array_equal(params["projector"]["w1"], tensors["model.mm_projector.0.weight"].T)
        assert ("replaced by --projector" in report.ignored) == (name == "llava")


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_big_vision(sources, tmp_path, load_tensors, monkeypatch, stacked) -> None:
    """The same tower in big_vision's file gives the same encoder."""
    tower = load_tensors(sources.vision)
    arrays = {name.removeprefix("vision_model."): value.numpy() for name, value in tower.items()}
    npz = {
        "params/img/embedding/kernel": arrays["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "params/img/embedding/bias": arrays["embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": arrays["embeddings.position_embedding.weight"][None],
        "params/img/Transformer/encoder_norm/scale": arrays["post_layernorm.weight"],
        "params/img/Transformer/encoder_norm/bias": arrays["post_layernorm.bias"],
        "params/img/MAPHead_0/probe": np.zeros((1, 1, 48), np.float32),
        "params/txt/head/kernel": np.zeros((4, 4), np.float32), "params/t": np.zeros(1, np.float32),
    }  # fmt: skip
    blocks = [big_vision_block(arrays, i) for i in range(3)]
    if stacked:
        for name in blocks[0]:
            npz[f"params/img/Transformer/encoderblock/{name}"] = np.stack([block[name] for block in blocks])
    else:
        for i, block in enumerate(blocks):
            npz |= {f"params/img/Transformer/encoderblock_{i}/{name}": x for name, x in block.items()}
    np.savez(tmp_path / "siglip2.npz", **npz)
    plain = Request(vision=str(sources.vision), llm=str(sources.tied), overrides=CROSS)
    convert_from_hf(plain, tmp_path / "expected", tokenizer=sources.tokenizer)
    config = load_model_config(tmp_path / "expected")
    monkeypatch.setattr("crosslmm_jax.presets.PRESETS", {"small": lambda: config})
    request = Request(vision=str(tmp_path / "siglip2.npz"), llm=str(sources.tied), preset="small")
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    left, right = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "model"))
    assert left == right
    assert load_processor(tmp_path / "model").resampling == "bilinear"


def big_vision_block(arrays, i: int) -> dict[str, np.ndarray]:
    get, block = f"encoder.layers.{i}.", {}
    attention = "MultiHeadDotProductAttention_0"
    for theirs, hf in (("query", "q"), ("key", "k"), ("value", "v")):
        weight = arrays[f"{get}self_attn.{hf}_proj.weight"]
        block[f"{attention}/{theirs}/kernel"] = weight.T.reshape(48, 4, 12)
        block[f"{attention}/{theirs}/bias"] = arrays[f"{get}self_attn.{hf}_proj.bias"].reshape(4, 12)
    block[f"{attention}/out/kernel"] = arrays[f"{get}self_attn.out_proj.weight"].T.reshape(4, 12, 48)
    block[f"{attention}/out/bias"] = arrays[f"{get}self_attn.out_proj.bias"]
    for n in (0, 1):
        block[f"MlpBlock_0/Dense_{n}/kernel"] = arrays[f"{get}mlp.fc{n + 1}.weight"].T
        block[f"MlpBlock_0/Dense_{n}/bias"] = arrays[f"{get}mlp.fc{n + 1}.bias"]
        block[f"LayerNorm_{n}/scale"] = arrays[f"{get}layer_norm{n + 1}.weight"]
        block[f"LayerNorm_{n}/bias"] = arrays[f"{get}layer_norm{n + 1}.bias"]
    return block


def test_a_conversion_loads_onto_a_mesh(from_llava) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    folder, report = from_llava["hf"]
    config = load_model_config(folder)
    expected = load_weights(folder, config)
    shardings = param_shardings(logical_axes(config), expected, mesh)
    params = load_weights(folder, config, shardings=shardings)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    leaves = zip(*map(jax.tree.leaves, (params, expected, shardings)), strict=True)
    for ours, wanted, sharding in leaves:
        assert (ours.sharding, ours.dtype) == (sharding, wanted.dtype)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wanted))
    assert report.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_dtype_is_changed_on_request(sources, tmp_path) -> None:
    request = Request(vision=str(sources.vision), llm=str(sources.tied), overrides=CROSS, dtype="bfloat16")
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    assert set(report.dtypes.values()) == {"bfloat16"}


@pytest.mark.slow
def test_torch_files(sources, tmp_path, load_tensors) -> None:
    """`.bin` shards with an index give what safetensors give."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((sources.untied / "config.json").read_bytes())
    tensors, where = load_tensors(sources.untied), {}
    for number in (1, 2):
        part = {name: value for i, (name, value) in enumerate(tensors.items()) if i % 2 == number - 1}
        torch.save(part, folder / f"pytorch_model-{number}.bin")
        where |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for name, llm in (("a", folder), ("b", sources.untied)):
        request = Request(vision=str(sources.vision), llm=str(llm), overrides=CROSS)
        convert_from_hf(request, tmp_path / name, tokenizer=sources.tokenizer)
    left, right = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert left == right
