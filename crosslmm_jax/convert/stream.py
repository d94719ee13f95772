"""Runs a conversion plan into the files of a MODEL folder, one tensor at a time."""

import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from crosslmm_jax.convert.plan import Parameter, Plan
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import WeightsWriter, flatten
from crosslmm_jax.utils import Progress


def run_plan(plan: Plan, writer: WeightsWriter, *, seed: int) -> None:
    """Writes every parameter, holding one tensor of the source at a time.

    Args:
      plan: where the parameters come from.
      writer: the open files.
      seed: of the parameters that are initialised.

    Raises:
      UserError: a value does not fit the type that the user asked for.
    """
    begin = time.perf_counter()
    total = sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in plan.parameters)
    with Progress("convert", unit="bytes", total=total) as progress:
        for parameter in plan.parameters:
            for row, value in _values(plan, parameter, seed):
                writer.write(parameter.name, value, row)
                progress.update(progress.done + value.nbytes)
    plan.report.bytes, plan.report.seconds = total, time.perf_counter() - begin


def _values(plan: Plan, parameter: Parameter, seed: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """(row, value) of all parts of a parameter; row None is all of it."""
    if not parameter.origins:
        initial = _initial_value(plan, parameter.name, seed)
        yield None, cast(initial, parameter.dtype, name=parameter.name)
    for origin in parameter.origins:
        value = origin.slot.into(origin.source.read(origin.key))
        yield origin.row, cast(value, parameter.dtype, name=origin.key)


def _initial_value(plan: Plan, name: str, seed: int) -> np.ndarray:
    """The parameter `name` of `init_params`. jit drops the computation of all others."""

    def one(key: jax.Array) -> jax.Array:
        return flatten(init_params(plan.config, key))[name]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.jit(one)(jax.random.key(seed)))


def cast(value: np.ndarray, dtype: str, *, name: str) -> np.ndarray:
    """`value` as `dtype`. Raises a `UserError` when a number is too large for it."""
    target = jnp.dtype(dtype)
    if value.dtype == target:
        return value
    with np.errstate(over="ignore"):
        changed = value.astype(target)
    if dtype == "float16" and np.any(np.isinf(changed) & np.isfinite(value)):
        raise UserError(f"{name} holds numbers too large for float16; use --dtype bfloat16 or float32")
    return changed
