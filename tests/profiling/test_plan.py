"""`crosslmm plan`: released configs fit, and what is said follows from the sizes."""

import json
from pathlib import Path

import pytest

from crosslmm_jax.cli import main
from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import plan

CONFIGS = Path(__file__).parents[2] / "configs"
STAGE2 = CONFIGS / "stage2_instruct.py"


@pytest.mark.parametrize("name", ["stage1_align", "stage1_align_7b", "stage2_instruct", "stage2_instruct_7b"])
def test_released_configs_fit_any_number_of_devices(name: str) -> None:
    config = load_experiment(CONFIGS / f"{name}.py")
    plans = [plan.make_plan(config, devices=count) for count in (8, 64, 256, 1024)]
    assert all(made.fits for made in plans)
    assert {made.batch_size for made in plans} == {config.data.batch_size}
    seconds = [made.step_seconds for made in plans]
    assert seconds == sorted(seconds, reverse=True) and 0.1 < min(made.utilisation for made in plans) < 0.41
    last = plans[-1]
    assert last.mesh["context"] == (8 if name.startswith("stage2") else 2) and last.microbatches == 1


def test_the_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(STAGE2), "--devices", "16", "--frames", "64", "--text", "256", "--json", "-"]
    assert main([*words, "--mesh.data", "2", "--stage.microbatches", "4"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["devices"], made["frames"], made["microbatches"]) == (16, 64, 4)
    assert made["mesh"] == {"data": 2, "fsdp": 8, "tensor": 1, "context": 1} and made["fits"] is True
    parts = dict(made["bytes_per_device"])
    assert parts.pop("limit") > parts.pop("total") == sum(parts.values())
    gathered = next(each for each in made["collectives"] if each["what"] == "gathering weights")
    weights = parts["weights"] * 8 / 4 * 2  # of all devices, in bfloat16
    assert gathered["bytes"] == pytest.approx(2 * 4 * weights * 7 / 8, rel=2e-3), "twice per microbatch"
    assert made["collective_bytes_per_step"] == sum(each["bytes"] for each in made["collectives"])
    assert made["executed_flops_per_step"] > made["flops_per_step"] > 0 and made["step_seconds"] > 0


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(STAGE2), "--devices", "8", "--frames", "512", "--stage.microbatches", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "does not fit" in text and "fits with any of: --stage.microbatches None" in text
    config = load_experiment(STAGE2, ["--stage.microbatches", "1"])
    for change in plan.make_plan(config, devices=8).changes:
        followed = change.split()
        devices = int(followed[1]) if followed[0] == "--devices" else 8
        overrides = ["--stage.microbatches", "1"] if followed[0] == "--devices" else []
        overrides += followed if followed[0] != "--devices" else []
        changed = load_experiment(STAGE2, overrides or ["--stage.microbatches", "1"])
        assert plan.make_plan(changed, devices=devices).fits, change


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "0"], "--devices is 0; it must be 1 or more"),
        (["--devices", "8", "--device", "gtx"], "--device 'gtx' is unknown; choose one of a100"),
        ([], "--devices N is required"),
        (["--devices", "8", "--mesh.fsdp", "3"], "MeshConfig data=-1 x fsdp=3"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(STAGE2), *words]) == 2
    assert message in capsys.readouterr().err


def test_memory_that_jax_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_experiment(STAGE2)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    half = plan.make_plan(config, devices=8, frames=64)
    assert half.memory == int(0.5 * plan.DEVICES["h200"].memory)
    with pytest.raises(UserError):
        plan.make_plan(config, devices=8, device="tpu")
