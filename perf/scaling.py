"""Weak scaling: the same work per device on one device and on several. The efficiency is t1 / tN.

- `encode`: rows over the devices, weights replicated.
- `train`: a step of stage 2, with its state replicated (mesh "data") or sharded over all (mesh "fsdp").
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from crosslmm_jax.batch import BATCH_AXES
from crosslmm_jax.cli.profile import requests_of
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import CrossLMM, flops
from crosslmm_jax.parallel import activation_rules, make_mesh, matmul_options, partition_spec, replicated
from crosslmm_jax.profiling import (
    Case,
    Record,
    Request,
    Row,
    check_counts,
    run_cases,
    timing,
)
from crosslmm_jax.profiling.cases import Compiled, Lowered
from crosslmm_jax.profiling.inputs import config_of, frames_shape, num_bytes, param_shapes, random_params
from crosslmm_jax.profiling.tasks import encoder, train
from crosslmm_jax.train import random_state
from perf.measure import measure, measuring_parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingRequest(Request):
    """Also says which numbers of devices are compared."""

    devices: tuple[int, ...] = (1, 2)


def main(argv: Sequence[str]) -> None:
    """Measures encoder and training step on each number of devices."""
    parser = measuring_parser("scaling", __doc__)
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2], metavar="N", help="compared; default: 1 2"
    )
    args = parser.parse_args(argv)
    check_counts("--devices", args.devices)
    requests = requests_of(args, ScalingRequest, __name__, devices=tuple(args.devices), preallocate=True)
    measure("scaling", requests, args)


def run(record: Record) -> None:
    """Measures each number of devices, with one row of each number of frames per device."""
    request = record.request
    assert isinstance(request, ScalingRequest)
    config, there, counts = config_of(request), jax.device_count(), sorted({*request.devices})
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
    record.add_facts(**timing.device_facts(), device_count=there)
    run_cases(cases, record, make_weights=dict)
    compare(record.rows)
    record.save()


def compare(rows: list[Row]) -> None:
    """Adds the efficiency to each row, if the same work was measured on one device."""
    alone = {(row["what"], row["frames"]): row["ms"] for row in rows if row["devices"] == 1}
    for row in rows:
        if (row["what"], row["frames"]) in alone:
            row["efficiency"] = alone[row["what"], row["frames"]] / row["ms"]


def _train_case(config: ModelConfig, request: Request, frames: int, mesh: Mesh, axis: str) -> Case:
    """A training step whose state lives only while it is measured."""
    case = train.case(config, request, frames, mesh)

    def inputs() -> PyTree:
        return [random_state(config, train.STAGE, mesh, seed=0)], case.inputs()

    def call(compiled: Compiled, _: PyTree, inputs: PyTree, __: None) -> PyTree:
        state, batch = inputs
        return case.call(compiled, state, batch, None)

    row = {**case.row, "devices": mesh.size, "mesh": axis}
    return dataclasses.replace(case, row=row, inputs=inputs, call=call)


def _encode_case(config: ModelConfig, frames: int, mesh: Mesh) -> Case:
    """One row of frames per device to compact and original tokens."""
    one, model = frames_shape(config, frames), CrossLMM(config, activation_rules(), stacked=False)
    shape = (mesh.size, *one.shape[1:])
    sharding = NamedSharding(mesh, partition_spec(BATCH_AXES["frames"], shape, mesh.shape))

    def lower() -> Lowered:
        def encode(params: PyTree, frames: PyTree) -> PyTree:
            return model.apply({"params": params}, frames, method="encode")

        whole = replicated(mesh)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            param_shapes(config, encoder.PARTS),
        )
        with jax.set_mesh(mesh):
            return jax.jit(encode).lower(params, jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding))

    def inputs() -> PyTree:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        params = jax.device_put(random_params(config, encoder.PARTS), replicated(mesh))
        return params, jax.device_put(pixels, sharding)

    def call(compiled: Compiled, _: PyTree, inputs: PyTree, __: None) -> PyTree:
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
