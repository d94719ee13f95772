"""The measuring tasks of `python -m perf`, at the tiny size: their rows, and their cases."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.model import flops, init_params
from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.attention.blockwise import blockwise_attention
from crosslmm_jax.profiling import Case, Record, Request, memory, worker
from perf import attention, peers
from perf.attention import AttentionRequest
from perf.scaling import ScalingRequest


def measured(
    tmp_path: Path, kind: type[Request], task: str, system: str = "tiny", **options: Any
) -> dict[str, Any]:
    path = tmp_path / "record.json"
    request = kind(task=f"perf.{task}", system=system, **{"frames": (2,), "repeats": 2, **options})
    code = worker.main([str(path), request.to_json()])
    found = json.loads(path.read_text())
    assert found["errors"] == [] and code == 0
    return found


@pytest.mark.slow
def test_rows_of_the_attentions(check_measured_rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BACKENDS", ("auto", "cudnn"))  # off the GPU both leave the same one
    found = measured(tmp_path, AttentionRequest, "attention")
    assert {row["what"] for row in found["rows"]} == {
        "encoder", "self_attention", "v2v", "t2v", "t2v_decode",
    }  # fmt: skip
    check_measured_rows(found)


def test_each_case_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces lie in folders by name, and errors are known by it."""
    request = AttentionRequest(task="perf.attention", system="tiny", frames=(2,))
    found = Record(str(tmp_path / "r.json"), request)
    names: list[str] = []
    monkeypatch.setattr(attention, "run_cases", lambda cases, *_, **__: names.extend(c.name for c in cases))
    attention.run(found)
    assert len(names) == len(set(names)) == 10


def by_blocks(q, k, v, lengths):
    """What cuDNN would compute for each KV split, all keys."""
    start, stop = jnp.zeros(q.shape[:2], jnp.int32), jnp.full(q.shape[:2], k.shape[1])
    return blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5)


@pytest.mark.slow
def test_kv_splits_are_cases_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that divides the keys, for cross-attention alone; results equal those of no split."""
    request = AttentionRequest(task="perf.attention", system="tiny", frames=(2,), kv_splits=(2, 4, 5))
    monkeypatch.setattr(attention, "_applies", lambda *_: True)
    monkeypatch.setattr(cudnn, "_with_log_sum_exp", by_blocks)
    cases: list[Case] = []
    monkeypatch.setattr(attention, "run_cases", lambda found, *_, **__: cases.extend(found))
    attention.run(Record(str(tmp_path / "r.json"), request))
    split = [case for case in cases if "kv_splits" in case.row]
    assert {(case.row["what"], case.row["kv_splits"]) for case in split} == {
        (what, count) for what in ("v2v", "t2v", "t2v_decode") for count in (2, 4)
    }
    assert len({case.name for case in cases}) == len(cases)
    whole = {case.row["what"]: case for case in cases if case.row["backend"] == "blockwise"}
    for case in split:
        arrays = case.inputs()
        got, expected = (c.lower().compile()(*arrays) for c in (case, whole[case.row["what"]]))
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_the_same_work_on_two_devices(tmp_path: Path, monkeypatch) -> None:
    marks = itertools.count(10**9, 10**9)  # of an allocator that weights and states raise from case to case
    monkeypatch.setattr(memory.HighWater, "mark", lambda _: next(marks))
    found = measured(tmp_path, ScalingRequest, "scaling", repeats=1, devices=(2, 1))
    rows = {(row["what"], row["devices"], row["mesh"]): row for row in found["rows"]}
    assert set(rows) == {
        ("encode", 1, "data"), ("encode", 2, "data"),
        ("train", 1, "data"), ("train", 2, "data"), ("train", 2, "fsdp"),
    }  # fmt: skip
    for (what, _, _), row in rows.items():
        alone = rows[what, 1, "data"]
        assert row["efficiency"] == pytest.approx(alone["ms"] / row["ms"])
        assert row["model_tflop"] == alone["model_tflop"], "the work of one device"
        assert row["peak_from"] == "compiler"
    # Gradients are whole on each device, or half of them.
    assert rows["train", 2, "fsdp"]["peak_mb"] < rows["train", 2, "data"]["peak_mb"]


def test_too_few_devices_are_a_mistake(tmp_path: Path) -> None:
    request = ScalingRequest(task="perf.scaling", system="tiny", frames=(2,), devices=(1, 99))
    path = tmp_path / "record.json"
    assert worker.main([str(path), request.to_json()]) == 1
    assert "--devices 99: there are" in json.loads(path.read_text())["errors"][0]


@pytest.mark.slow
def test_long_videos_by_scope(tmp_path: Path) -> None:
    scopes = ("video", "frame", "window")
    found = measured(tmp_path, Request, "long_video", frames=(2, 20), repeats=1, v2v_scopes=scopes)
    assert {(row["v2v_scope"], row["frames"]) for row in found["rows"]} == {
        (scope, frames) for scope in scopes for frames in (2, 20)
    }
    assert {row["what"] for row in found["rows"]} == {"prefill"}
    work = {(row["v2v_scope"], row["frames"]): row["model_tflop"] for row in found["rows"]}
    assert work["frame", 20] < work["window", 20] < work["video", 20]


def test_the_peer(tmp_path: Path) -> None:
    found = measured(tmp_path, Request, "peers", "llava-onevision-tiny", repeats=1)
    assert [row["what"] for row in found["rows"]] == ["prefill", "prefill+cache"]
    assert {row["tokens_per_frame"] for row in found["rows"]} == {4}, "4 x 4 patches, halved"
    attention = found["facts"]["attention"]
    assert attention and all(line.endswith("sdpa") for line in attention)
    (row,) = measured(tmp_path, Request, "peers", "siglip-tiny", repeats=1)["rows"]
    ours = flops.encoder(presets.tiny(), 2)["encoder"].total
    assert row["model_tflop"] == pytest.approx(1e-12 * ours)


def test_the_peers_parameters_are_llava_onevisions() -> None:
    """Counted on no device: 7.6B of Qwen2-7B, the tower without its last layer, the projector."""
    import torch

    config = presets.crosslmm_7b()
    model = peers.make_peer("llava-onevision-7b", config, "meta")
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    ours = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    for theirs, part in (("vision_tower", "encoder"), ("multi_modal_projector", "projector")):
        assert sizes[theirs] == sum(math.prod(x.shape) for x in jax.tree.leaves(ours[part]))
    decoder = sizes["language_model"] + sum(p.numel() for p in model.lm_head.parameters())
    assert decoder == sum(math.prod(x.shape) for x in jax.tree.leaves(ours["decoder"]))
    assert peers.tokens_per_frame(config) == 196


def test_flops_of_the_peer_by_hand() -> None:
    config, work = presets.crosslmm_7b(), flops.Workload(frames=32, text=64)
    peer, ours = peers.llava_onevision_flops(config, work), flops.prefill(config, work)
    assert peer["encoder"] == ours["encoder"]
    assert peer["mlp"].total == 28 * 6 * (32 * 196 + 65) * 3584 * 18944
    assert flops.total(peer) > 3 * flops.total(ours)
