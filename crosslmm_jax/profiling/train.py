"""One step of stage 2: forward, backward and update of all parameters, float32 master weights."""

import functools
from typing import Any

import jax

from crosslmm_jax.config import PARTS, MeshConfig, ModelConfig, StageConfig
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.profiling import flops
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.inputs import num_bytes, preset_with_tokens, random_prompt, shapes_of
from crosslmm_jax.profiling.record import Record, Request
from crosslmm_jax.train.state import abstract_state, random_state
from crosslmm_jax.train.step import compile_train_step

STAGE = StageConfig(
    name="stage2", trainable=PARTS, directions=("v2v", "t2v"), steps=1000, learning_rate=1e-5,
    vision_lr_scale=0.2,
)  # fmt: skip


def run(record: Record) -> None:
    """Measures a step with one row at each of the frame counts that the request names, on one device."""
    request = record.request
    config = preset_with_tokens(request.system, request.tokens_per_frame)
    cases = [case(config, request, frames) for frames in request.frames]

    def holder() -> list[Any]:  # a step uses up its state: the next one takes what it left
        return [random_state(config, STAGE, _mesh(), seed=0)]

    run_cases(cases, record, make_weights=holder)


def _mesh() -> Any:
    return make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])


def case(config: ModelConfig, request: Request, frames: int) -> Case:
    """A step on one row with `frames` frames and targets in all text behind the video."""
    work = request.workload(frames)
    batch = random_prompt(config, work)
    mesh = _mesh()

    def lower() -> Any:
        with jax.set_mesh(mesh):
            step: Any = compile_train_step(config, STAGE, mesh)
            return step.lower(abstract_state(config, STAGE, mesh), shapes_of(batch))

    def call(compiled: Any, state: list[Any], inputs: Any, _: None) -> Any:
        state[0], metrics = compiled(state[0], inputs)
        return metrics

    row = {
        "what": "train",
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "text_tokens": work.text,
    }
    return Case(
        row=row, lower=lower, inputs=functools.partial(jax.device_put, batch), call=call,
        input_bytes=num_bytes(batch), costs=flops.train(config, work, targets=work.text - work.before),
    )  # fmt: skip
