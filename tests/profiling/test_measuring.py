"""What is measured and how: weights, programs, clocks and memory, at the tiny size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import CrossLMM, flops, init_params
from crosslmm_jax.profiling import memory, timing, worker
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.inputs import (
    config_of,
    num_bytes,
    param_shapes,
    preset_with_tokens,
    random_frames,
    random_params,
    random_prompt,
)
from crosslmm_jax.profiling.record import Record, Request
from crosslmm_jax.profiling.tasks import decode, prefill

ROOT = Path(__file__).resolve().parents[2]


def measured(tmp_path: Path, task: str, system: str = "tiny", **options: Any) -> dict[str, Any]:
    path = tmp_path / "record.json"
    request = Request(
        task=f"crosslmm_jax.profiling.tasks.{task}",
        system=system,
        **{"frames": (2,), "repeats": 2, "steps": 4, **options},
    )
    code = worker.main([str(path), request.to_json()])
    found = json.loads(path.read_text())
    assert found["errors"] == [] and code == 0
    return found


def test_weights_are_the_models_in_the_compute_dtype() -> None:
    config = presets.crosslmm_2b()
    stored, master = (
        param_shapes(config, stacked=True),
        jax.eval_shape(lambda: init_params(config, jax.random.key(0))),
    )
    assert jax.tree.structure(stored) == jax.tree.structure(master)
    assert jax.tree.map(lambda x: x.shape, stored) == jax.tree.map(lambda x: x.shape, master)
    assert stored["decoder"]["layers"]["w_gate"].dtype == jnp.bfloat16
    assert stored["decoder"]["layers"]["attn_norm"].dtype == stored["v2v"]["gate"].dtype == jnp.float32
    assert num_bytes(stored) == pytest.approx(num_bytes(master) / 2, rel=1e-3)
    assert num_bytes(param_shapes(config)) == num_bytes(stored)


@pytest.mark.slow
def test_weights_are_random() -> None:
    config = presets.tiny()
    weights, shapes = random_params(config), param_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    first, second = (weights["decoder"]["layers"][index] for index in "01")
    assert float(jnp.std(first["w_gate"])) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(first["w_gate"], first["w_up"])
    assert not np.array_equal(first["w_gate"], second["w_gate"])
    assert weights["v2v"]["0"]["gate"] == 0.5


@pytest.mark.parametrize(("tokens", "grid"), [(1, 1), (9, 3), (16, 4), (None, 3)])
def test_tokens_per_frame(tokens: int | None, grid: int) -> None:
    assert preset_with_tokens("crosslmm_2b", tokens).merge.grid == grid


@pytest.mark.parametrize("tokens", [0, -4, 8])
def test_tokens_per_frame_is_a_square(tokens: int) -> None:
    with pytest.raises(UserError, match="square number"):
        preset_with_tokens("crosslmm_2b", tokens)


@pytest.mark.slow
def test_both_prefills_give_the_models_logits() -> None:
    """What is timed is the whole model and nothing but it; a cache is what one of them leaves besides."""
    config = presets.tiny()
    request = Request(task="prefill", system="tiny", frames=(3,), text=20, before=4)
    weights = random_params(config)
    batch = random_prompt(config, request.workload(3))._replace(frames=random_frames(config, 3))
    expected = jax.jit(CrossLMM(config, stacked=False).apply)({"params": weights}, batch)[:, -1]
    plans = []
    for cached in (False, True):
        case = prefill.case(config, request, 3, cached=cached)
        compiled = case.lower().compile()
        plans.append(memory.planned(compiled, inputs=case.input_bytes))
        result = case.call(compiled, weights, case.inputs(), None)
        logits, cache = result if cached else (result, None)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert np.all(np.isfinite(logits)) and float(jnp.std(logits)) > 0
    assert cache is not None and len(cache.t2v) == 2 and cache.t2v[0].keys.shape[:3] == (1, 3, 16)
    assert int(cache.num_tokens[0]) == 23 and cache.size == 23 + prefill.ROOM
    assert plans[1]["outputs"] - plans[0]["outputs"] == pytest.approx(num_bytes(cache), rel=0.01)
    assert plans[1]["inputs"] == plans[0]["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "whats"),
    [
        ("encoder", {"encoder", "encode"}),
        ("decode", {"decode"}),
    ],
)
def test_rows_of_a_task(check_measured_rows, tmp_path: Path, task: str, whats: set[str]) -> None:
    found = measured(tmp_path, task)
    assert {row["what"] for row in found["rows"]} == whats
    check_measured_rows(found)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["encoder", "decode"])
def test_rows_in_8_bits(tmp_path: Path, task: str) -> None:
    """The FLOPs are the same; a token's floor counts keys and values in 8 bits, with their scales."""
    wide, *narrow = (
        measured(tmp_path, task, precision=precision)["rows"][0] for precision in ("compute", "fp8", "int8")
    )
    assert [row["precision"] for row in (wide, *narrow)] == ["float32", "fp8", "int8"]
    assert {row["model_tflop"] for row in narrow} == {wide["model_tflop"]}
    if task == "decode":
        numbers, scales = 2 * 2 * 2 * 16 * 2 * 16, 2 * 2 * 2 * 16  # K and V of 2 layers, 2 frames, 16 patches
        assert wide["bytes_read"]["t2v"] == 4 * numbers
        for row in narrow:
            assert row["bytes_read"] == wide["bytes_read"] | {"t2v": numbers + 4 * scales}


def test_weights_in_8_bits_are_random_too() -> None:
    config = presets.tiny().at_precision("int8")
    weights, shapes = random_params(config), param_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), weights) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    layers = [weights["encoder"]["layers"][index] for index in "01"]
    first, second = (layer["w1"].astype(jnp.float32) * layer["w1_scale"][:, None] for layer in layers)
    assert layers[0]["w1"].dtype == jnp.int8 and float(jnp.std(first)) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_a_train_step(tmp_path: Path) -> None:
    rows = measured(tmp_path, "train", repeats=1, remats=("none", "layer"))["rows"]
    config, work = presets.tiny(), flops.Workload(frames=2, text=64, before=16)
    needed = flops.total(flops.train(config, work, targets=48))
    assert {row["remat"] for row in rows} == {"none", "layer"}
    assert all(row["model_tflop"] == pytest.approx(1e-12 * needed) for row in rows), "recomputed or not"


def test_overrides_change_the_preset_and_name_what_is_wrong() -> None:
    def config(*words: str) -> ModelConfig:
        return config_of(Request(task="prefill", system="tiny", frames=(1,), overrides=words))

    found = config(
        "--vision.frame-chunk", "4", "--compute-dtype", "float32", "--cross-attention.directions", "t2v"
    )
    assert (found.vision.frame_chunk, found.compute_dtype) == (4, "float32")
    assert found.cross_attention.directions == ("t2v",)
    for words in (("--vision.depth", "3"), ("--frames", "2"), ("--vision.width", "3x")):
        with pytest.raises(UserError, match=words[0]):
            config(*words)
    with pytest.raises(UserError, match="VisionConfig.frame_chunk is 0; it must be 1 or more, or None"):
        config("--vision.frame-chunk", "0")


def test_random_frames_fill_the_bytes() -> None:
    frames = np.asarray(random_frames(presets.tiny(), 3))
    assert frames.shape == (1, 3, 32, 32, 3) and frames.dtype == np.uint8
    assert np.bincount(frames.ravel(), minlength=256).min() > 10
    assert not np.array_equal(frames[0, 0], frames[0, 1])


def test_bytes_that_a_token_reads() -> None:
    """By hand, for the 2B model after 256 frames: decoder, tied head, T2V's q and o; 7 layers of K/V."""
    config = presets.crosslmm_2b()
    d, kv = 1536, 2 * 128
    attention = d * d + d + 2 * (d * kv + kv) + d * d
    norms = 4 * (28 * 2 * d + d + 7 * (d + 1))  # float32, gates too
    weights = 2 * (28 * (attention + 3 * d * 8960) + 151936 * d + 7 * (2 * d * d + d)) + norms
    t2v = 7 * 2 * 256 * 729 * kv * 2
    assert decode.bytes_read(config, t2v) == {"weights": weights, "t2v": t2v}
    untied = presets.crosslmm_7b()
    assert decode.bytes_read(untied, 0)["weights"] < num_bytes(param_shapes(untied)["decoder"]) + 400e6


def test_the_clock_counts_only_what_it_should() -> None:
    calls = []
    timed = timing.measure(
        lambda given: calls.append(given), repeats=3, warmup=2, prepare=lambda: len(calls), wait=lambda x: x
    )
    assert calls == [0, 1, 2, 3, 4]
    assert len(timed["samples_ms"]) == 3
    assert timing.summary([3.0, 1.0, 9.0]) == {
        "ms": 3.0, "ms_min": 1.0, "ms_max": 9.0, "samples_ms": [3.0, 1.0, 9.0],
    }  # fmt: skip


def test_a_long_call_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 11.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.measure(lambda _: None, repeats=5)["samples_ms"] == [11_000.0]


def test_a_high_water_mark_counts_only_when_it_rises() -> None:
    plan = {"inputs": 1, "outputs": 2, "temporaries": 3, "peak": 6_000_000}
    assert memory.peak_row(plan, 10, 7_000_000)["peak_mb"] == 7
    covered = memory.peak_row(plan, 8_000_000, 8_000_000)
    assert (covered["peak_mb"], covered["peak_from"]) == (6, "compiler")
    assert memory.peak_row(None, None, None)["peak_mb"] is None


class FakeDevice:
    """A device whose allocator counts."""

    def __init__(self) -> None:
        self.stats = {"bytes_in_use": 100, "peak_bytes_in_use": 120}

    def memory_stats(self) -> dict[str, int]:
        return self.stats


def test_the_mark_is_over_the_weights() -> None:
    device = FakeDevice()
    mark = memory.HighWater(device)
    mark.weights_are_there()
    device.stats["peak_bytes_in_use"] = 170
    assert mark.mark() == 70


def test_a_failing_case_leaves_the_others(tmp_path: Path) -> None:
    record = Record(str(tmp_path / "r.json"), Request(task="x", system="s", frames=(1,), repeats=1))
    double = jax.jit(lambda x: 2 * x)

    def fail() -> Any:
        raise ValueError("no such kernel")

    def case(what: str, **changes: Any) -> Case:
        parts: dict[str, Any] = {
            "lower": lambda: double.lower(jnp.ones(3)),
            "inputs": lambda: jnp.ones(3),
            "call": lambda compiled, weights, inputs, _: compiled(inputs),
        }
        return Case(row={"what": what, "frames": 1}, input_bytes=12, **parts | changes)

    run_cases([case("a", lower=fail), case("b"), case("c", inputs=fail)], record, make_weights=dict)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["what"] for row in found["rows"]] == ["b"]
    assert len(found["errors"]) == 2
    assert "a_1, lowering: ValueError: no such kernel" in found["errors"][0]


def test_measuring_needs_no_reader_of_files() -> None:
    blocked = "; ".join(
        f"sys.modules[{name!r}] = None" for name in ("av", "grain", "tensorflow_datasets", "tyro")
    )
    paths = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("crosslmm_jax/profiling/**/*.py")]
    modules = ", ".join(".".join(path.parts) for path in paths if path.name != "__init__")
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; {blocked}; import {modules}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_memory_is_as_fast_as_its_fastest_use() -> None:
    facts = timing.memory_facts(repeats=1)
    found = facts["memory"]
    assert (
        facts["memory_tb_per_s"]
        == found["memory_tb_per_s"]
        == max(way["tb_per_s"] for way in found["ways"].values())
    )
    for name, passes in (("sum", 1), ("copy", 2), ("negate", 2)):  # reading alone, reading and writing
        way = found["ways"][name]
        assert way["tb_per_s"] == pytest.approx(1e-9 * passes * found["bytes"] / way["ms"])
