"""One step of stage 2: forward, backward and update of all parameters, with float32 master weights."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from crosslmm_jax.config import PARTS, MeshConfig, ModelConfig, StageConfig
from crosslmm_jax.model import flops
from crosslmm_jax.parallel import batch_shardings, make_mesh, matmul_options, to_global
from crosslmm_jax.profiling.cases import Case, Compiled, Lowered, run_cases
from crosslmm_jax.profiling.inputs import config_of, num_bytes, random_prompt
from crosslmm_jax.profiling.record import Record, Request
from crosslmm_jax.profiling.timing import device_facts
from crosslmm_jax.train import abstract_state, compile_train_step, random_state, with_step_visibility

STAGE = StageConfig(
    name="stage2", trainable=PARTS, directions=("v2v", "t2v"), steps=1000, learning_rate=1e-5,
    vision_lr_scale=0.2,
)  # fmt: skip


def run(record: Record) -> None:
    """Measures a step on one row, for each number of frames and form of recomputation, on one device."""
    record.add_facts(**device_facts())
    request = record.request
    config = config_of(request)
    visions = [dataclasses.replace(config.vision, remat=remat) for remat in request.remats] or [config.vision]
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    cases = [
        case(dataclasses.replace(config, vision=vision), request, frames, mesh)
        for frames in request.frames
        for vision in visions
    ]
    # A step donates its state, so each call takes the state that the last one returned.
    run_cases(cases, record, make_weights=lambda: [random_state(config, STAGE, mesh, seed=0)])


def case(config: ModelConfig, request: Request, frames: int, mesh: Mesh) -> Case:
    """A step on one row per device, with `frames` frames and targets in all text after the video.

    The weights of its call are a list that holds the state. FLOPs are those of one row.
    """
    work = request.workload(frames)
    row = with_step_visibility(random_prompt(config, work))
    batch = jax.tree.map(lambda x: np.repeat(x, mesh.size, axis=0), row)

    def lower() -> Lowered:
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            batch, batch_shardings(batch, mesh),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            step: PyTree = compile_train_step(config, STAGE, mesh)
            return step.lower(abstract_state(config, STAGE, mesh), shapes)

    def call(compiled: Compiled, state: list[PyTree], inputs: PyTree, _: None) -> PyTree:
        state[0], metrics = compiled(state[0], inputs)
        return metrics

    facts = {
        "what": "train",
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "text_tokens": work.text,
        "remat": config.vision.remat,
        "compiler_options": matmul_options(),
    }
    return Case(
        row=facts, lower=lower, inputs=functools.partial(to_global, batch, mesh), call=call,
        input_bytes=num_bytes(row), costs=flops.train(config, work, targets=work.text - work.before),
    )  # fmt: skip
