"""Configurations: what is checked on construction, JSON round trips, config files and overrides."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crosslmm_jax import config as c
from crosslmm_jax.config_io import describe, from_dict, load_experiment, option_of, print_help, to_dict
from crosslmm_jax.demo import recipe
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.presets import PRESETS, get_preset, tiny
from crosslmm_jax.train.stages import trained_shares

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def experiment() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        model=tiny(),
        data=c.DataConfig(index="index", tokenizer="tok", batch_size=8, text_buckets=(32, 64)),
        stage=c.StageConfig(
            name="stage1", trainable=("projector", "v2v"), directions=("v2v",), steps=10, learning_rate=1e-3
        ),
        run=c.RunConfig(out="runs/x"),
    )


# What a value outside its range does -------------------------------------------------------------

WRONG = [
    (lambda m: m.vision, {"image_size": 0}, "VisionConfig.image_size is 0"),
    (lambda m: m.vision, {"patch_size": 64}, "VisionConfig.patch_size is 64; it must be at most image_size"),
    (lambda m: m.vision, {"num_heads": 5}, "VisionConfig.num_heads is 5; it must be a divisor of width 48"),
    (lambda m: m.vision, {"feature_layer": 0}, "VisionConfig.feature_layer is 0; it must be within -3..-1"),
    (lambda m: m.vision, {"feature_layer": -4}, "VisionConfig.feature_layer is -4"),
    (lambda m: m.vision, {"frame_chunk": -1}, "VisionConfig.frame_chunk is -1"),
    (lambda m: m.merge, {"grid": 0}, "MergeConfig.grid is 0; it must be greater than 0"),
    (lambda m: m.decoder, {"width": -64}, "DecoderConfig.width is -64"),
    (lambda m: m.decoder, {"num_kv_heads": 3}, "DecoderConfig.num_kv_heads is 3; it must be a divisor of"),
    (lambda m: m.decoder, {"head_dim": 15}, "DecoderConfig.head_dim is 15; it must be even"),
    (lambda m: m.cross_attention, {"cross_attn_every": 0}, "CrossAttentionConfig.cross_attn_every is 0"),
    (lambda m: m.cross_attention, {"cross_attn_offset": -1}, "cross_attn_offset is -1; it must be 0 or more"),
    (lambda m: m.cross_attention, {"directions": ("v2v", "v2v")}, "directions is ('v2v', 'v2v')"),
    (lambda m: m, {"merge": c.MergeConfig(grid=5)}, "MergeConfig.grid is 5; it must be at most"),
    (
        lambda m: m,
        {"cross_attention": c.CrossAttentionConfig(cross_attn_offset=4)},
        "CrossAttentionConfig.cross_attn_offset is 4; it must be below",
    ),
    (
        lambda m: m,
        {"attention": "cudnn"},
        "ModelConfig.attention is 'cudnn'; it must be 'auto' or 'blockwise'",
    ),
    (
        lambda m: get_preset("crosslmm_2b"),
        {"attention": "cudnn", "cross_attention": c.CrossAttentionConfig(v2v_scope="window")},
        "no v2v_scope 'window'",
    ),
]


@pytest.mark.parametrize(("part", "change", "message"), WRONG)
def test_a_wrong_model_value_is_named(part: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(part(tiny()), **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_ELSEWHERE = [
    ("data", {"text_buckets": (64, 32)}, "DataConfig.text_buckets is (64, 32); it must be positive and asc"),
    ("data", {"frame_buckets": (0,)}, "DataConfig.frame_buckets is (0,)"),
    ("data", {"index": ""}, "DataConfig.index is ''; it must be the name of a folder"),
    ("data", {"max_bad_fraction": 1.5}, "DataConfig.max_bad_fraction is 1.5; it must be within 0..1"),
    (
        "data",
        {"deadline_s": 0.0},
        "DataConfig.deadline_s is 0.0; it must be a finite number greater than 0",
    ),
    ("data", {"batch_size": 0}, "DataConfig.batch_size is 0"),
    ("data", {"num_workers": -1}, "DataConfig.num_workers is -1; it must be 0 or more"),
    ("stage", {"trainable": ()}, "StageConfig.trainable is (); it must be some of encoder, projector"),
    (
        "stage",
        {"trainable": ("decodr.layers",)},
        "StageConfig.trainable is ('decodr.layers',); it must be some",
    ),
    ("stage", {"frozen": ("projectr",)}, "StageConfig.frozen is ('projectr',); it must be some of encoder"),
    ("stage", {"trainable": ("t2v.w*",)}, "StageConfig.directions is ('v2v',); it must be with 't2v'"),
    ("stage", {"trainable": ("t2v",)}, "StageConfig.directions is ('v2v',); it must be with 't2v'"),
    ("stage", {"warmup_ratio": 1.0}, "StageConfig.warmup_ratio is 1.0; it must be in [0, 1)"),
    ("data", {"deadline_s": math.inf}, "DataConfig.deadline_s is inf; it must be a finite number"),
    ("data", {"seed": 2**32}, "DataConfig.seed is 4294967296; it must be within 0..4294967295"),
    ("run", {"seed": -1}, "RunConfig.seed is -1; it must be within 0..4294967295"),
    ("run", {"out": "gs://bucket/run"}, "a folder of a mounted disk; object stores are not supported yet"),
    ("run", {"init_from": "gs://bucket/model"}, "a folder of a mounted disk"),
    ("data", {"index": "s3://bucket/index"}, "a folder of a mounted disk"),
    ("data", {"tokenizer": "gs:/bucket/tokenizer"}, "a folder of a mounted disk"),
    ("stage", {"learning_rate": math.inf}, "StageConfig.learning_rate is inf; it must be finite"),
    ("stage", {"learning_rate": math.nan}, "StageConfig.learning_rate is nan; it must be greater than 0"),
    ("stage", {"b1": 1.0}, "StageConfig.b1 is 1.0; it must be in [0, 1)"),
    ("stage", {"b2": math.nan}, "StageConfig.b2 is nan; it must be in [0, 1)"),
    ("stage", {"b2": -0.1}, "StageConfig.b2 is -0.1; it must be in [0, 1)"),
    ("stage", {"eps": 0.0}, "StageConfig.eps is 0.0; it must be greater than 0"),
    ("stage", {"weight_decay": -0.1}, "StageConfig.weight_decay is -0.1; it must be 0 or more"),
    ("stage", {"weight_decay": math.nan}, "StageConfig.weight_decay is nan; it must be 0 or more"),
    ("stage", {"vision_lr_scale": -1.0}, "StageConfig.vision_lr_scale is -1.0; it must be 0 or more"),
    ("stage", {"cross_attn_lr_scale": math.inf}, "StageConfig.cross_attn_lr_scale is inf; it must be 0 or"),
    ("stage", {"gate_lr_scale": math.nan}, "StageConfig.gate_lr_scale is nan; it must be 0 or more"),
    ("stage", {"clip_norm": math.nan}, "StageConfig.clip_norm is nan; it must be greater than 0"),
    ("stage", {"learning_rate": 0.0}, "StageConfig.learning_rate is 0.0; it must be greater than 0"),
    ("stage", {"microbatches": 3}, "StageConfig.microbatches is 3; it must divide DataConfig.batch_size 8"),
    ("run", {"out": ""}, "RunConfig.out is ''; it must be the name of a folder"),
    ("run", {"save_every": 0}, "RunConfig.save_every is 0"),
    ("model", {"visual_matmul": "fp8"}, "ModelConfig.visual_matmul is 'fp8'; it must be 'compute' to train"),
    ("mesh", {"fsdp": 0}, "MeshConfig.fsdp is 0; it must be 1 or more, or -1"),
    ("stage", {"microbatches": 0}, "StageConfig.microbatches is 0; it must be 1 or more, or None"),
]


@pytest.mark.parametrize(("part", "change", "message"), WRONG_ELSEWHERE)
def test_a_wrong_run_value_is_named(part: str, change: dict[str, Any], message: str) -> None:
    whole = experiment()
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(whole, **{part: dataclasses.replace(getattr(whole, part), **change)})
    assert message in str(caught.value)


@pytest.mark.parametrize("precision", ["fp8", "int8", "compute"])
def test_a_precision_is_of_products_and_cache(precision: c.Precision) -> None:
    model = tiny().at_precision(precision)
    assert (model.visual_matmul, model.cross_attention.cache_dtype) == (precision, precision)
    assert model.at_precision("compute") == tiny()


# The released sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patches", "vision", "decoder"),
    [
        ("crosslmm_0.5b", 729, (1152, 27, 16, 4304), (151936, 896, 24, 14, 2, 64, 4864, True)),
        ("crosslmm_2b", 729, (1152, 27, 16, 4304), (151936, 1536, 28, 12, 2, 128, 8960, True)),
        ("crosslmm_7b", 729, (1152, 27, 16, 4304), (152064, 3584, 28, 28, 4, 128, 18944, False)),
        ("crosslmm_7b_vitg", 576, (1536, 40, 16, 6144), (152064, 3584, 28, 28, 4, 128, 18944, False)),
    ],
)
def test_released_sizes(name: str, patches: int, vision: tuple[int, ...], decoder: tuple[int, ...]) -> None:
    """As in the config.json files of google/siglip2-* and Qwen/Qwen2.5-*-Instruct."""
    preset = get_preset(name)
    v, d = preset.vision, preset.decoder
    assert v.num_patches == patches
    assert (v.width, v.num_layers, v.num_heads, v.mlp_width) == vision
    sizes = (d.vocab_size, d.width, d.num_layers, d.num_heads, d.num_kv_heads, d.head_dim, d.mlp_width)
    assert (*sizes, d.tie_embeddings) == decoder
    assert (d.rope_theta, d.rms_norm_eps) == (1e6, 1e-6)
    assert preset.cross_attention.gate_init == 0
    assert preset.merge.tokens_per_frame == (16 if name == "crosslmm_7b_vitg" else 9)


def test_cross_attention_sits_in_seven_layers() -> None:
    assert get_preset("crosslmm_2b").cross_attention_layers == (0, 4, 8, 12, 16, 20, 24)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="--preset '2b' is unknown; choose one of tiny, crosslmm_0.5b"):
        get_preset("2b")


# Stored configurations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name: str) -> None:
    preset = get_preset(name)
    stored = json.loads(json.dumps(to_dict(preset)))
    assert from_dict(c.ModelConfig, stored, source="config.json") == preset


def test_an_experiment_round_trips_and_whole_numbers_become_floats() -> None:
    stored = json.loads(json.dumps(to_dict(experiment())))
    stored["stage"]["learning_rate"] = 1
    read = from_dict(c.ExperimentConfig, stored, source="config.json")
    assert isinstance(read.stage.learning_rate, float)
    assert read == dataclasses.replace(
        experiment(), stage=dataclasses.replace(experiment().stage, learning_rate=1.0)
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.vision.width", "48", "field model.vision.width is '48'; it must be an integer"),
        ("model.vision.width", 48.0, "field model.vision.width is 48.0; it must be an integer"),
        ("model.vision.width", True, "field model.vision.width is True; it must be an integer"),
        (
            "model.vision.width",
            47,
            "field model.vision: VisionConfig.num_heads is 4; it must be a divisor of",
        ),
        ("model.decoder.remat", 1, "field model.decoder.remat is 1; it must be true or false"),
        ("model.decoder.rope_theta", None, "field model.decoder.rope_theta is None; it must be a number"),
        ("model.decoder.rope_theta", 10**400, "field model.decoder.rope_theta is an integer too large"),
        ("model.merge", [1], "field model.merge is [1]; it must be an object with the fields of MergeConfig"),
        (
            "model.merge.pooling",
            "max",
            "is 'max'; it must be 'average' or 'bilinear' or 'bilinear_antialias'",
        ),
        ("data.text_buckets", 32, "field data.text_buckets is 32; it must be a list, each item an integer"),
        ("data.text_buckets", [32, "x"], "field data.text_buckets[1] is 'x'; it must be an integer"),
        ("run.init_from", 3, "field run.init_from is 3; it must be a string or null"),
        ("run.ouput", "x", "field run.ouput is unknown; did you mean out?"),
        ("run.zzz", "x", "field run.zzz is unknown; RunConfig has out, init_from, seed"),
    ],
)
def test_a_wrong_stored_value_is_named(path: str, value: object, message: str) -> None:
    stored = to_dict(experiment())
    *parents, name = path.split(".")
    inner = stored
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(ConfigError) as caught:
        from_dict(c.ExperimentConfig, stored, source="runs/x/config.json")
    assert str(caught.value).startswith("runs/x/config.json: ")
    assert message in str(caught.value)


def paths_of(stored: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in stored.items():
        found.append((*prefix, name))
        found += paths_of(value, (*prefix, name)) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("path", paths_of(to_dict(experiment())), ids=".".join)
def test_a_missing_value_is_never_guessed(path: tuple[str, ...]) -> None:
    """Not even where the dataclass has a default."""
    stored = to_dict(experiment())
    inner = stored
    for parent in path[:-1]:
        inner = inner[parent]
    del inner[path[-1]]
    with pytest.raises(ConfigError, match=rf"^c.json: field {'.'.join(path)} is missing; add it: "):
        from_dict(c.ExperimentConfig, stored, source="c.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(path=st.sampled_from(paths_of(to_dict(experiment()))), value=JSON)
@example(path=("model",), value={"\n": None})
def test_any_stored_value_is_read_as_it_is_or_named(path: tuple[str, ...], value: object) -> None:
    stored = to_dict(experiment())
    inner = stored
    for parent in path[:-1]:
        inner = inner[parent]
    inner[path[-1]] = value
    try:
        read = from_dict(c.ExperimentConfig, stored, source="c.json")
    except ConfigError as error:
        message = str(error)
        assert message.startswith("c.json: ")
        assert "\n" not in message
        # The field itself, or the check of the object that it is a part of.
        assert ".".join(path) in message or ".".join(path[:-1]) in message or path[-1] in message
    else:
        kept = to_dict(read)
        for name in path:
            kept = kept[name]
        assert kept == value or (isinstance(value, float) and math.isnan(value))
        assert type(kept) is type(value) or (type(kept) is float and type(value) is int)


@pytest.mark.parametrize("whole", [None, [], "x", 3])
def test_a_file_that_holds_no_object(whole: object) -> None:
    with pytest.raises(ConfigError, match="c.json: the configuration is .*; it must be an object"):
        from_dict(c.ModelConfig, whole, source="c.json")


# Config files and overrides ----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_config_files_load(path: Path) -> None:
    config = load_experiment(path)
    assert config.run.out == f"runs/{path.stem}"
    assert f"crosslmm train {path.relative_to(CONFIGS.parent)}" in path.read_text()
    start = Path(config.run.init_from or "models/")
    assert start.parts[0] == "models" or any(CONFIGS.rglob(f"{start.parts[1]}.py")), start


# Row of a table -> directions of both stages, parts of which nothing learns in both, K.
ROWS = {
    "table2a_none": ((), (), {"encoder", "v2v", "t2v", "decoder"}, {"v2v", "t2v"}, 4),
    "table2a_t2v": ((), ("t2v",), {"encoder", "v2v", "t2v", "decoder"}, {"v2v"}, 4),
    "table2a_v2v": (("v2v",), ("v2v",), {"encoder", "t2v", "decoder"}, {"t2v"}, 4),
    "table2": (("v2v",), ("v2v", "t2v"), {"encoder", "t2v", "decoder"}, set(), 4),
    "table2b_k1": (("v2v",), ("v2v", "t2v"), {"encoder", "t2v", "decoder"}, set(), 1),
    "table2b_k2": (("v2v",), ("v2v", "t2v"), {"encoder", "t2v", "decoder"}, set(), 2),
    "table2b_k8": (("v2v",), ("v2v", "t2v"), {"encoder", "t2v", "decoder"}, set(), 8),
    "table2c_t2v_in_both": (("v2v", "t2v"), ("v2v", "t2v"), {"encoder", "decoder"}, set(), 4),
    "table4_10m": (("v2v",), ("v2v", "t2v"), {"encoder", "t2v", "decoder"}, set(), 4),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_papers_tables(name: str) -> None:
    second = load_experiment(CONFIGS / "tables" / f"{name}_stage2.py")
    first = load_experiment(CONFIGS / "tables" / f"{Path(second.run.init_from or '').parts[1]}.py")
    of_stages, every = ROWS[name][:4], ROWS[name][4]
    for config, directions, frozen in zip((first, second), of_stages[:2], of_stages[2:], strict=True):
        assert config.stage.directions == directions
        learning = trained_shares(config.model, config.stage)
        assert set(c.PARTS) - learning.keys() == frozen and set(learning.values()) == {1.0}
        assert config.model.cross_attention.cross_attn_every == every
        assert config.model.merge.tokens_per_frame == (9 if name == "table4_10m" else 1)
    samples = 10e6 if name == "table4_10m" else 5e6
    assert first.stage.steps * first.data.batch_size == pytest.approx(samples, rel=1e-3)


def test_the_frozen_row_of_table_5_differs_by_its_encoder() -> None:
    trained, frozen = (
        load_experiment(CONFIGS / name) for name in ("stage2_instruct.py", "tables/table5_frozen.py")
    )
    assert trained_shares(frozen.model, frozen.stage).keys() == set(c.PARTS) - {"encoder"}
    assert dataclasses.replace(frozen.stage, frozen=()) == trained.stage and frozen.data == trained.data


def test_gates_can_open_in_every_second_stage() -> None:
    """Adam moves a scalar by about one learning rate per step: those of a gate that starts at 0 sum to 1."""
    for path in sorted(CONFIGS.rglob("*stage2*.py")):
        config = load_experiment(path)
        stage, begin = config.stage, config.model.cross_attention.gate_init
        reach = stage.steps / 2 * stage.learning_rate * stage.cross_attn_lr_scale * stage.gate_lr_scale
        assert not stage.directions or begin + reach > 1, path


def test_the_tiny_configs_are_the_demos_recipe() -> None:
    demo, out = Path("runs/demo"), Path("runs/tiny_stage1")
    assert load_experiment(CONFIGS / "tiny_stage1.py") == recipe.stage1(demo, out=out)
    second = recipe.stage2(demo, out=Path("runs/tiny_stage2"), init_from=out / "model")
    assert load_experiment(CONFIGS / "tiny_stage2.py") == second


def test_own_data_fit_one_device() -> None:
    one, two = (load_experiment(CONFIGS / f"small_own_data{name}.py") for name in ("", "_stage2"))
    assert two.run.init_from == f"{one.run.out}/model" and two.data.index == one.data.index
    for config in (one, two):
        assert "encoder" not in config.stage.trainable and config.model.vision.keep_features
        rows = config.data.batch_size // config.stage.microbatches
        assert rows * config.data.sampling.frames <= 64, "frames per microbatch"


def test_the_papers_recipe() -> None:
    one, two = (load_experiment(CONFIGS / f"{name}.py") for name in ("stage1_align", "stage2_instruct"))
    assert (one.data.batch_size, one.stage.learning_rate, one.data.sampling.frames) == (512, 1e-4, 32)
    assert (one.stage.trainable, one.stage.directions) == (("projector", "v2v"), ("v2v",))
    assert one.data.modality_weights.as_dict() == {"image": 1.0, "video": 1.0}
    assert (two.data.batch_size, two.stage.learning_rate) == (128, 1e-5)
    sampling = two.data.sampling
    assert (sampling.policy, sampling.min_frames, sampling.max_frames) == ("dynamic_fps1", 64, 512)
    assert two.stage.learning_rate * two.stage.vision_lr_scale == pytest.approx(2e-6)
    assert (set(two.stage.trainable), two.stage.directions) == (set(c.PARTS), ("v2v", "t2v"))
    assert two.run.init_from == f"{one.run.out}/model"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "x.py"
    values = f"import json\nstored = json.loads({json.dumps(to_dict(experiment()))!r})\n"
    path.write_text(
        "from crosslmm_jax.config import ExperimentConfig\nfrom crosslmm_jax.config_io import from_dict\n"
        f"{values}def get_config():\n    return from_dict(ExperimentConfig, stored, source='x')\n"
    )
    return path


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--stage.learning-rate", "1e-4"], "stage.learning_rate", 1e-4),
        (["--stage.learning_rate=1e-4"], "stage.learning_rate", 1e-4),
        (["--stage.steps", "3"], "stage.steps", 3),
        (["--model.cross-attention.gate-init", "0.5"], "model.cross_attention.gate_init", 0.5),
        (["--model.cross-attention.gate-init", "-0.5"], "model.cross_attention.gate_init", -0.5),
        (["--model.merge.pooling", "bilinear"], "model.merge.pooling", "bilinear"),
        (["--data.text-buckets", "16", "48"], "data.text_buckets", (16, 48)),
        (["--data.frame-buckets"], "data.frame_buckets", ()),
        (["--data.shuffle", "False"], "data.shuffle", False),
        (["--run.init-from", "None"], "run.init_from", None),
        (["--run.init-from", "some/folder"], "run.init_from", "some/folder"),
        (["--mesh.data", "-1"], "mesh.data", -1),
        (["--stage.trainable", "v2v"], "stage.trainable", ("v2v",)),
    ],
)
def test_typed_overrides(config_file: Path, words: list[str], field: str, value: object) -> None:
    read: Any = load_experiment(config_file, words)
    for name in field.split("."):
        read = getattr(read, name)
    assert read == value
    assert type(read) is type(value)


def test_every_field_has_an_override() -> None:
    leaves = {path for path in paths_of(to_dict(experiment()))}
    leaves -= {path[:-1] for path in leaves if len(path) > 1}  # those that hold fields of their own
    fields = c.leaf_fields(c.ExperimentConfig)
    assert set(fields) == {".".join(path) for path in leaves}
    assert all(describe(field.type) for field in fields.values())


def test_help_says_what_every_field_means(capsys: pytest.CaptureFixture[str]) -> None:
    print_help(experiment(), command="crosslmm train x.py")
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert text.startswith("usage: crosslmm train x.py ")
    for name in c.leaf_fields(c.ExperimentConfig):
        meaning = re.search(rf" {option_of(name)} [^ ]+(?: [^a-z]*\]| FLOAT)* (.*?) \(default: (.*?)\)", text)
        assert meaning and len(meaning[1].split()) > 1, name
    assert "peak rate of every part without a scale below (default: 0.001)" in text


# Roles -------------------------------------------------------------------------------------------


def test_every_field_declares_its_role() -> None:
    leaves = c.leaf_fields(c.ExperimentConfig)
    assert [name for name, leaf in leaves.items() if leaf.role is None] == []


def test_a_field_without_a_role_may_not_change() -> None:
    """A role that somebody forgot refuses too much, never too little."""
    forgetful = dataclasses.make_dataclass("Forgetful", [("size", int), ("threads", c.Host[int])])
    assert c.leaf_fields(forgetful) == {"size": c.Leaf(int, None), "threads": c.Leaf(int, "host")}
    assert c.names_with_role(forgetful, "performance", "host") == ("threads",)


def test_fields_that_may_change_when_a_run_resumes() -> None:
    assert set(c.names_with_role(c.ExperimentConfig, "performance", "host")) == {
        "data.index", "data.deadline_s", "data.num_workers", "data.num_threads", "data.prefetch",
        "data.frame_cache_mb", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "model.attention",
        "model.cross_attention.cache_dtype", "model.decoder.remat", "model.vision.frame_chunk",
        "model.vision.keep_features", "model.vision.remat", "run.out", "run.log_every", "run.save_every",
        "run.keep_checkpoints", "run.tensorboard", "run.wandb", "run.profile_steps",
        "run.accept_changes", "run.stop_deadline_s",
        *(f"run.watchdog.{each.name}" for each in dataclasses.fields(c.WatchdogConfig)),
        "stage.microbatches", "data.validation.index", "data.validation.every", "data.validation.rows",
        "data.validation.keep_best",
    }  # fmt: skip


def test_fields_that_weights_depend_on() -> None:
    names = set(c.names_with_role(c.ModelConfig, "architecture", "identity"))
    assert {name for name in c.leaf_fields(c.ModelConfig) if name not in names} == {
        "vision.frame_chunk", "vision.remat", "vision.keep_features", "merge.grid", "merge.pooling",
        "decoder.max_positions", "decoder.yarn_factor", "decoder.yarn_trained_positions", "decoder.remat",
        "cross_attention.directions", "cross_attention.v2v_scope",
        "cross_attention.v2v_window", "cross_attention.cross_attn_rope", "cross_attention.cache_dtype",
        "compute_dtype", "visual_matmul", "attention",
    }  # fmt: skip
    assert c.names_with_role(c.DataConfig, "identity") == ("tokenizer", "resampling", "time_instruction")


@pytest.mark.parametrize(
    ("factor", "positions", "needed", "expected"),
    [
        (1.0, 1000, 1000, (1.0, 1000)), (1.0, 1000, 1001, (2.0, 2000)),
        (4.0, 2000, 2500, (4.0, 4000)), (2.5, 2000, 2400, (2.5, 2500)),  # trained with YaRN, on short videos
        (2.5, 2000, 2501, (3.0, 3000)),
    ],
)  # fmt: skip
def test_yarn_is_scaled_further_only_where_its_factor_does_not_reach(factor, positions, needed, expected):
    decoder = dataclasses.replace(
        tiny().decoder, yarn_factor=factor, yarn_trained_positions=1000, max_positions=positions
    )
    scaled = decoder.with_positions(needed)
    assert (scaled.yarn_factor, scaled.max_positions) == expected
    assert scaled.yarn_trained_positions == 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--stage.learning-rat", "1e-4"],
            "unknown override --stage.learning-rat; did you mean --stage.learning-",
        ),
        (["--stage.learning-rate", "fast"], "'fast'; --stage.learning-rate takes a number"),
        (["--stage.steps", "1.5"], "'1.5'; --stage.steps takes an integer"),
        (["--stage.steps"], "--stage.steps takes an integer"),
        (["--stage.steps", "-3"], "StageConfig.steps is -3; it must be greater than 0"),
        (["--model.attention", "flash"], "'flash' for argument '--model.attention'"),
        (["--data.shuffle", "perhaps"], "'perhaps' for argument '--data.shuffle'"),
        (["--model.vision.frame-chunk", "few"], "--model.vision.frame-chunk takes an integer or None"),
        (["--data.text-buckets", "a"], "--data.text-buckets takes a list, each item an integer"),
        (["--model", "tiny"], "unknown override --model"),
        (["stray"], "stray; write --field value"),
        (
            ["--stage.microbatches", "3"],
            "StageConfig.microbatches is 3; it must divide DataConfig.batch_size 8",
        ),
    ],
)
def test_a_wrong_override_is_named(
    config_file: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(config_file, words)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{config_file}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "the message is the caller's to print"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no get_config()"),
        ("get_config = 3\n", "defines no get_config()"),
        (
            "def get_config():\n    return {}\n",
            "get_config() returned dict; it must return an ExperimentConfig",
        ),
        ("x = 1\ndef get_config():\n    return 1 / 0\n", ":3: ZeroDivisionError: division by zero"),
        ("import nothing_of_that_name\n", ":1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def get_config(:\n", ":1: SyntaxError: "),
        (
            "from crosslmm_jax.config import MergeConfig\ndef get_config():\n    MergeConfig(grid=0)\n",
            "MergeConfig.grid is 0; it must be greater than 0",
        ),
        (
            "from crosslmm_jax.config import MergeConfig\ndef get_config():\n    MergeConfig(gird=1)\n",
            ":3: TypeError: ",
        ),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nope.py: no such config file"):
        load_experiment(tmp_path / "nope.py")
    with pytest.raises(UserError, match="gs://bucket/a.py: object stores are not supported"):
        load_experiment("gs://bucket/a.py")
