"""The memory of a step, from sizes: against what steps on one and two H200s have taken."""

import dataclasses
import json
from pathlib import Path

import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import PARTS, StageConfig
from crosslmm_jax.parallel import abstract_mesh
from crosslmm_jax.train.memory import Shape, StepBytes, fewest_microbatches, step_bytes
from crosslmm_jax.train.state import TrainState, abstract_state

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STAGE = StageConfig(
    name="stage2", trainable=PARTS, directions=("v2v", "t2v"), steps=1, learning_rate=1e-5, microbatches=1
)


def readings() -> list[tuple[str, dict, dict]]:
    """(file, its settings, a row) of every stage-2 step that docs/results has."""
    found = []
    for name in ("h200_train", "h200_train_no_recompute", "h200_scaling"):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        settings = dict(each.split("=") for each in result["systems"][0]["request"]["overrides"])
        found += [(name, settings, row) for row in result["rows"] if row["what"] == "train"]
    return found


@pytest.mark.parametrize(("name", "settings", "row"), readings())
def test_bytes_are_those_that_steps_took(name: str, settings: dict, row: dict) -> None:
    config = presets.crosslmm_2b()
    chunk = int(settings.get("vision.frame_chunk", 32))
    vision = dataclasses.replace(config.vision, remat=row["remat"], frame_chunk=chunk)
    decoder = dataclasses.replace(config.decoder, remat=settings.get("decoder.remat") != "false")
    config = dataclasses.replace(config, vision=vision, decoder=decoder)
    count = row.get("devices", 1)
    mesh = abstract_mesh({row.get("mesh", "data"): count})
    found = step_bytes(
        config, STAGE, abstract_state(config, STAGE, mesh), mesh.shape,
        Shape(row["frames"], row["text_tokens"]), batch_size=count, microbatches=1,
    )  # fmt: skip
    besides_state = found.total - found.weights - found.moments
    assert besides_state == pytest.approx(row["memory_mb"]["peak"] * 1e6, rel=0.02)


def stage2(preset: str, memory: int | None, **sizes: int) -> tuple[int, StepBytes]:
    """Microbatches of the paper's stage 2 at 512 frames, and the bytes of a device."""
    config, mesh = presets.PRESETS[preset](), abstract_mesh(sizes)
    state: TrainState = abstract_state(config, STAGE, mesh)
    shape = Shape(512, 1024)
    count = fewest_microbatches(
        config, STAGE, state, mesh.shape, [Shape(64, 2048), shape], batch_size=128, memory=memory
    )
    return count, step_bytes(
        config, STAGE, state, mesh.shape, shape, batch_size=128, microbatches=count, memory=memory
    )


def test_microbatches_follow_from_memory_and_devices() -> None:
    h200, b200 = int(141e9 * 0.94), int(192e9 * 0.94)
    few, at_8 = stage2("crosslmm_2b", h200, fsdp=8)
    fewer, on_larger = stage2("crosslmm_2b", b200, fsdp=8)
    assert 1 <= fewer < few <= 16 and at_8.total <= 0.92 * h200 and on_larger.total <= 0.92 * b200
    fewest, at_64 = stage2("crosslmm_2b", h200, data=8, fsdp=8)
    assert fewest < few and at_64.total <= 0.92 * h200
    assert stage2("crosslmm_2b", None, fsdp=8)[0] == 1, "a CPU says nothing of its memory"
