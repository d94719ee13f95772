"""Weak scaling: the same work a device on one device and on several, over the efficiency t1 / tN.

`encode` spreads rows over replicated weights. `train` is a step of stage 2, with its state whole on every
device (mesh "data") or cut over all (mesh "fsdp").
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from crosslmm_jax.batch import BATCH_AXES
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import CrossLMM
from crosslmm_jax.parallel import partition_spec
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.compiler_options import matmul_options
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.parallel.sharding import replicated
from crosslmm_jax.profiling import encoder, flops, train
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.inputs import config_of, frames_shape, num_bytes, param_shapes, random_params
from crosslmm_jax.profiling.record import Record, Request
from crosslmm_jax.train.state import random_state


def run(record: Record) -> None:
    """Measures all device counts that the request names, with one row of each frame count a device."""
    request = record.request
    config, there, counts = config_of(request), jax.device_count(), sorted({*request.devices} or {1, 2})
    if counts[-1] > there:
        raise UserError(f"--devices {counts[-1]}: there are {there}; give at most {there}")
    cases = []
    for frames in request.frames:
        for count in counts:
            for axis in ("data", "fsdp") if count > 1 else ("data",):
                mesh = make_mesh(MeshConfig(**{"data": 1, axis: count}), devices=jax.devices()[:count])
                if axis == "data":
                    cases.append(_encode_case(config, frames, mesh))
                cases.append(_train_case(config, request, frames, mesh, axis))
    record.add_facts(device_count=there)
    run_cases(cases, record, make_weights=dict)
    compare(record.rows)
    record.save()


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row the efficiency against the row of the same work on one device, where there is one."""
    alone = {(row["what"], row["frames"]): row["ms"] for row in rows if row["devices"] == 1}
    for row in rows:
        if (row["what"], row["frames"]) in alone:
            row["efficiency"] = alone[row["what"], row["frames"]] / row["ms"]


def _train_case(config: ModelConfig, request: Request, frames: int, mesh: Mesh, axis: str) -> Case:
    """A training step whose state lives only while it is measured."""
    case = train.case(config, request, frames, mesh)

    def inputs() -> Any:
        return [random_state(config, train.STAGE, mesh, seed=0)], case.inputs()

    def call(compiled: Any, _: Any, inputs: Any, __: None) -> Any:
        state, batch = inputs
        return case.call(compiled, state, batch, None)

    row = {**case.row, "devices": mesh.size, "mesh": axis}
    return dataclasses.replace(case, row=row, inputs=inputs, call=call)


def _encode_case(config: ModelConfig, frames: int, mesh: Mesh) -> Case:
    """One row of frames a device to compact and original tokens."""
    one, model = frames_shape(config, frames), CrossLMM(config, activation_rules(), stacked=False)
    shape = (mesh.size, *one.shape[1:])
    sharding = NamedSharding(mesh, partition_spec(BATCH_AXES["frames"], shape, mesh.shape))

    def lower() -> Any:
        def encode(params: Any, frames: Any) -> Any:
            return model.apply({"params": params}, frames, method="encode")

        whole = replicated(mesh)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            param_shapes(config, encoder.PARTS),
        )
        with jax.set_mesh(mesh):
            return jax.jit(encode).lower(params, jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding))

    def inputs() -> Any:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        params = jax.device_put(random_params(config, encoder.PARTS), replicated(mesh))
        return params, jax.device_put(pixels, sharding)

    def call(compiled: Any, _: Any, inputs: Any, __: None) -> Any:
        return compiled(*inputs)

    row = {
        "what": "encode",
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "devices": mesh.size,
        "mesh": "data",
    }
    return Case(
        row=row, lower=lower, inputs=inputs, call=call, input_bytes=num_bytes(one),
        costs=flops.encoder(config, frames), compiler_options=matmul_options(),
    )  # fmt: skip
