"""What a run will take on devices that are not here: memory, traffic, FLOPs and time of a step, from sizes.

Nothing is compiled and no array exists. Memory follows `train.memory`; traffic follows the layout of weights
and rows (`parallel.axis_rules`); time is that of the matrix products at a rate read on one H200, plus the
traffic that nothing hides. The assumptions are part of the result.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import flops
from crosslmm_jax.parallel import abstract_mesh, check_batch_size, mesh_sizes
from crosslmm_jax.train import (
    Shape,
    StepBytes,
    abstract_state,
    adapter_sizes,
    fewest_microbatches,
    model_of_stage,
    step_bytes,
    trained_shares,
)

MIB, GIB = 2**20, 2**30


class Device(NamedTuple):
    """One kind of device, by its maker's data sheet."""

    kind: str  # `jax.Device.device_kind`
    memory: int  # bytes
    fast: float  # bytes per second and direction between devices of a node: NVLink, or all ICI links
    node: int  # devices of a node, or the most of a TPU slice
    slow: float  # bytes per second and device between nodes: InfiniBand, or a TPU host's network
    usable: float  # share of the memory that jax may take


_GPU = 0.75  # jax's default, XLA_PYTHON_CLIENT_MEM_FRACTION
DEVICES = {
    "a100": Device("NVIDIA A100-SXM4-80GB", 81_920 * MIB, 300e9, 8, 25e9, _GPU),
    "h100": Device("NVIDIA H100 80GB HBM3", 81_559 * MIB, 450e9, 8, 50e9, _GPU),
    "h200": Device("NVIDIA H200", 143_771 * MIB, 450e9, 8, 50e9, _GPU),
    "b200": Device("NVIDIA B200", 183_359 * MIB, 900e9, 8, 50e9, _GPU),
    "v4": Device("TPU v4", 32 * GIB, 300e9, 4096, 6.25e9, 0.98),
    "v5e": Device("TPU v5e", 16 * GIB, 200e9, 256, 6.25e9, 0.98),
    "v5p": Device("TPU v5p", 95 * GIB, 600e9, 8960, 6.25e9, 0.98),
    "v6e": Device("TPU v6e", 32 * GIB, 448e9, 256, 6.25e9, 0.98),
}
# Executed FLOPs per second over the data sheet's: 181 TFLOP, recomputation included, in 447 ms on one H200
# (docs/results/h200_train.md, `layer`).
ATTAINED = 0.41


class Collective(NamedTuple):
    """Traffic of one purpose in a step, as each device receives it."""

    what: str
    axis: str
    devices: int
    bytes: int
    link: str  # "fast" or "slow"
    seconds: float
    hidden: bool  # runs while the device computes


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a run on devices that are not here."""

    device: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    shape: Shape
    memory: int  # bytes of a device that jax may take
    bytes_per_device: StepBytes
    collectives: list[Collective]
    flops_per_step: float  # model FLOPs of the global batch
    executed_flops_per_step: float  # with what is computed again
    compute_seconds: float
    changes: list[str]  # what makes it fit, if it does not

    @property
    def fits(self) -> bool:
        """Whether a step fits the memory of a device."""
        return self.bytes_per_device.total <= self.memory

    @property
    def step_seconds(self) -> float:
        """Computing, or the traffic behind it if that takes longer, and the traffic that nothing hides."""
        hidden = sum(each.seconds for each in self.collectives if each.hidden)
        return max(self.compute_seconds, hidden) + sum(
            each.seconds for each in self.collectives if not each.hidden
        )

    @property
    def utilisation(self) -> float:
        """Model FLOPs over those of all devices at the data sheet's rate."""
        peak = flops.PEAK_TFLOPS[DEVICES[self.device].kind] * 1e12
        return self.flops_per_step / (self.step_seconds * self.devices * peak)

    @property
    def bound(self) -> str:
        """What takes most of a step: computing, or a collective."""
        slowest = max(self.collectives, key=lambda each: each.seconds, default=None)
        if slowest is None or slowest.seconds < self.compute_seconds:
            return "matrix products"
        return f"{slowest.what} over {slowest.axis}"


ASSUMPTIONS = (
    f"matrix products run at {ATTAINED:.0%} of the data sheet's rate, as read on one H200"
    " (docs/results/h200_train.md)",
    "the weights' traffic over fsdp and data is hidden behind computing, as far as that lasts",
    "batches are always ready, and all rows have the shape above",
    "links reach their data sheet's rate; a ring moves (n - 1) / n of an array",
)


def make_plan(
    config: ExperimentConfig, *, devices: int, device: str = "h200", frames: int | None = None,
    text: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a step.

    Args:
      config: the experiment.
      devices: number of devices.
      device: one of DEVICES.
      frames: of a row; None: the most that `data.sampling` gives.
      text: text tokens of a row; None: the most that the config allows.

    Raises:
      UserError: an unknown device, or a mesh that does not fit the devices or the rows.
    """
    if device not in DEVICES:
        raise UserError(f"--device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    if devices < 1:
        raise UserError(f"--devices is {devices}; it must be 1 or more")
    frames = config.data.sampling.most_frames if frames is None else frames
    shape = Shape(frames, config.data.most_text_tokens if text is None else text)
    made = _plan(config, devices, device, shape)
    return made if made.fits else dataclasses.replace(made, changes=list(_changes(config, made)))


def _plan(config: ExperimentConfig, devices: int, device: str, shape: Shape) -> Plan:
    hardware, rows = DEVICES[device], config.data.batch_size
    node = math.gcd(devices, hardware.node) if devices > hardware.node else devices
    sizes = mesh_sizes(config.mesh, devices, rows=rows, node=node)
    mesh = abstract_mesh(sizes)
    check_batch_size(rows, mesh, microbatches=config.stage.microbatches or 1)
    abstract = abstract_state(config.model, config.stage, mesh)
    memory = int(hardware.memory * _usable(hardware))
    microbatches = config.stage.microbatches or fewest_microbatches(
        config.model, config.stage, abstract, sizes, [shape], batch_size=rows, memory=memory
    )
    needed = step_bytes(
        config.model, config.stage, abstract, sizes, shape,
        batch_size=rows, microbatches=microbatches, memory=memory,
    )  # fmt: skip
    useful, executed = _flops(config, shape)
    peak = flops.PEAK_TFLOPS[hardware.kind] * 1e12
    return Plan(
        device=device, devices=devices, mesh=sizes, batch_size=rows, microbatches=microbatches, shape=shape,
        memory=memory, bytes_per_device=needed,
        collectives=list(_collectives(config, sizes, shape, microbatches, hardware, node)),
        flops_per_step=rows * useful, executed_flops_per_step=rows * executed,
        compute_seconds=rows * executed / (devices * peak * ATTAINED), changes=[],
    )  # fmt: skip


def _usable(hardware: Device) -> float:
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(given) if given and hardware.kind.startswith("NVIDIA") else hardware.usable


def _flops(config: ExperimentConfig, shape: Shape) -> tuple[float, float]:
    """FLOPs of one row: those of the model, and with what is computed again."""
    model, stage = model_of_stage(config.model, config.stage), config.stage
    work = flops.Workload(shape.frames, shape.text)
    learns, adapters = trained_shares(model, stage), adapter_sizes(model, stage)
    useful = flops.total(flops.train(model, work, targets=shape.text, learns=learns, adapters=adapters))
    forward = flops.prefill(model, work, logits=shape.text)
    again = 0.0
    if "encoder" in learns and model.vision.remat in ("layer", "chunk"):
        again += forward["encoder"].total * (2 if model.vision.remat == "chunk" else 1)
    if model.decoder.remat:
        again += sum(forward[part].total for part in forward if part not in ("encoder", "pool", "projector"))
    return useful, useful + again


def _collectives(
    config: ExperimentConfig, sizes: dict[str, int], shape: Shape, microbatches: int, hardware: Device,
    node: int,
) -> Iterator[Collective]:  # fmt: skip
    model = model_of_stage(config.model, config.stage)
    d, size = model.decoder, jnp.dtype(model.compute_dtype).itemsize
    counts = {part: _parameters(config, part) // sizes["tensor"] for part in ("all", "trainable")}
    rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"])
    tokens = rows * (shape.text + shape.frames * model.merge.tokens_per_frame)
    crossed = len(model.cross_attention_layers) * len(model.cross_attention.directions)

    def collective(what: str, axis: str, moved: float, *, times: int = 1, hidden: bool) -> Collective:
        count = sizes[axis]
        received = int(times * moved * (count - 1) / count)
        inside = math.prod(sizes[name] for name in ("context", "tensor", "fsdp", "data")[: _ORDER[axis] + 1])
        link = "fast" if inside <= node else "slow"
        rate = hardware.fast if link == "fast" else hardware.slow
        return Collective(what, axis, count, received, link, received / rate, hidden)

    if sizes["fsdp"] > 1:
        passes = 2 if d.remat else 1  # gathered again where a group of layers is computed again
        gathers = passes * microbatches
        yield collective("gathering weights", "fsdp", counts["all"] * size, times=gathers, hidden=True)
        gradients = counts["trainable"] * 4
        yield collective("sharing out gradients", "fsdp", gradients, times=microbatches, hidden=True)
    if sizes["data"] > 1:
        shard = counts["trainable"] * 4 / sizes["fsdp"]
        yield collective("summing gradients", "data", 2 * shard, times=microbatches, hidden=True)
    if sizes["context"] > 1:
        # Outputs and log-sum-exps of each device's frames; again when computed again, and their gradients.
        merged = tokens * (d.num_heads // sizes["tensor"]) * (d.head_dim + 1) * 4
        yield collective("merging cross-attention", "context", merged, times=3 * crossed, hidden=False)
        compact = rows * shape.frames * model.merge.tokens_per_frame * d.width * size
        yield collective("gathering compact tokens", "context", 2 * compact, hidden=False)
        whole = counts["trainable"] * 4 / sizes["fsdp"]
        yield collective("summing gradients", "context", 2 * whole, times=microbatches, hidden=True)
    if sizes["tensor"] > 1:
        sums = 3 * (2 * d.num_layers + crossed)  # forward, computed again, backward
        yield collective(
            "summing over heads", "tensor", 2 * tokens * d.width * size, times=sums, hidden=False
        )


# Axes from the innermost of the mesh.
_ORDER = {"context": 0, "tensor": 1, "fsdp": 2, "data": 3}


def _parameters(config: ExperimentConfig, which: str) -> int:
    state = abstract_state(config.model, config.stage, abstract_mesh({}))
    params = state.trainable if which == "trainable" else state.params
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _changes(config: ExperimentConfig, made: Plan) -> Iterator[str]:
    """Options, each of which alone makes the plan fit; the last resort is more devices."""
    vision = config.model.vision
    recomputed = dataclasses.replace(config.model, vision=dataclasses.replace(vision, remat="chunk"))
    options: list[tuple[str, ExperimentConfig]] = []
    if vision.remat != "chunk" and "encoder" in trained_shares(config.model, config.stage):
        options.append(("--model.vision.remat chunk", dataclasses.replace(config, model=recomputed)))
    if config.stage.microbatches is not None:
        free = dataclasses.replace(config.stage, microbatches=None)
        options.append(("--stage.microbatches None", dataclasses.replace(config, stage=free)))
    chosen = dataclasses.replace(config.mesh, data=-1, fsdp=-1)
    if config.mesh != chosen:
        options.append(("--mesh.data -1 --mesh.fsdp -1", dataclasses.replace(config, mesh=chosen)))
    for words, changed in options:
        try:
            if _plan(changed, made.devices, made.device, made.shape).fits:
                yield words
        except UserError:
            continue
    for factor in (2, 4, 8, 16):
        try:
            if _plan(config, made.devices * factor, made.device, made.shape).fits:
                yield f"--devices {made.devices * factor}"
                return
        except UserError:
            continue


def as_json(made: Plan) -> dict[str, object]:
    """The plan as `--json` writes it. Bytes and seconds; bytes of collectives are those a device receives."""
    parts = made.bytes_per_device._asdict()
    return {
        "device": made.device, "devices": made.devices, "mesh": made.mesh, "batch_size": made.batch_size,
        "microbatches": made.microbatches, "frames": made.shape.frames, "text": made.shape.text,
        "fits": made.fits,
        "bytes_per_device": {**parts, "total": made.bytes_per_device.total, "limit": made.memory},
        "collective_bytes_per_step": sum(each.bytes for each in made.collectives),
        "collectives": [each._asdict() for each in made.collectives],
        "flops_per_step": made.flops_per_step, "executed_flops_per_step": made.executed_flops_per_step,
        "compute_seconds": made.compute_seconds, "step_seconds": made.step_seconds,
        "utilisation": made.utilisation, "bound": made.bound, "changes": made.changes,
        "assumptions": list(ASSUMPTIONS),
    }  # fmt: skip


def lines(made: Plan) -> Iterator[str]:
    """The plan as text."""
    mesh = " ".join(f"{name}={size}" for name, size in made.mesh.items())
    split = f"{made.batch_size} rows in {made.microbatches} microbatch{'es' * (made.microbatches != 1)}"
    yield f"{made.devices} x {DEVICES[made.device].kind}, mesh {mesh}; {split}"
    yield f"rows of {made.shape.frames} frames and {made.shape.text} text tokens"
    yield ""
    yield "memory per device, GB"
    for name, size in made.bytes_per_device._asdict().items():
        yield f"  {name:<26}{size / 1e9:9.2f}"
    verdict = "fits" if made.fits else "does not fit"
    yield f"  {'total':<26}{made.bytes_per_device.total / 1e9:9.2f}  of {made.memory / 1e9:.1f}: {verdict}"
    if made.collectives:
        yield ""
        yield f"{'collectives of a step':<38}{'devices':>9}{'GB':>9}  link {'seconds':>9}"
        for each in made.collectives:
            where = f"{each.what}, {each.axis}"
            note = "  hidden" if each.hidden else ""
            size = f"{each.bytes / 1e9:9.2f}"
            yield f"  {where:<36}{each.devices:>9}{size}  {each.link}{each.seconds:10.3f}{note}"
    yield ""
    executed = f"{made.executed_flops_per_step / 1e12:,.0f} with what is computed again"
    yield f"{made.flops_per_step / 1e12:,.0f} TFLOP per step, {executed}"
    yield f"{made.step_seconds:.2f} s per step, {made.utilisation:.1%} of peak FLOPs; bound by {made.bound}"
    if made.changes:
        yield "fits with any of: " + "; ".join(made.changes)
    elif not made.fits:
        yield "no option tried makes it fit: fewer frames (data.sampling), LoRA, or larger devices"
    yield ""
    yield "assumed: " + "; ".join(ASSUMPTIONS)
