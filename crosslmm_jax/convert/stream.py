"""Runs a conversion plan into the files of a MODEL folder, one tensor at a time."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crosslmm_jax.convert.plan import Parameter, Plan
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import WeightsWriter, flatten
from crosslmm_jax.utils import Progress

_STRIP = 2**20  # numbers that are looked at together
_MOST_NAMED = 8  # damaged tensors in a message


def run_plan(plan: Plan, writer: WeightsWriter, *, seed: int) -> None:
    """Writes every parameter, holding one tensor of the source at a time.

    Args:
      plan: where the parameters come from.
      writer: the open files.
      seed: of the parameters that are initialised.

    Raises:
      UserError: a value does not fit the type that the user asked for, or numbers are NaN or infinite; all
        tensors that hold such numbers are listed.
    """
    begin, damaged = time.perf_counter(), {}
    total = sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for p in plan.parameters)
    with Progress("convert", unit="bytes", total=total) as progress:
        for parameter in plan.parameters:
            for row, value in _values(plan, parameter, seed, damaged):
                writer.write(parameter.name, value, row)
                progress.update(progress.done + value.nbytes)
    check_finite(damaged)
    plan.report.bytes, plan.report.seconds = total, time.perf_counter() - begin


def _values(
    plan: Plan, parameter: Parameter, seed: int, damaged: "dict[str, NotFinite]"
) -> Iterator[tuple[int | None, np.ndarray]]:
    """(row, value) of all parts of a parameter; row None is all of it. Source tensors may go to `damaged`."""
    if not parameter.origins:
        initial = _initial_value(plan, parameter.name, seed)
        yield None, cast(initial, parameter.dtype, name=parameter.name)
    for origin in parameter.origins:
        value = origin.slot.into(origin.source.read(origin.key))
        found = count_not_finite(value)
        if found is not None:
            damaged[f"{origin.source.path}: {origin.key}"] = found
        yield origin.row, cast(value, parameter.dtype, name=origin.key)


def _initial_value(plan: Plan, name: str, seed: int) -> np.ndarray:
    """The parameter `name` of `init_params`. jit drops the computation of all others."""

    def one(key: jax.Array) -> jax.Array:
        return flatten(init_params(plan.config, key))[name]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.jit(one)(jax.random.key(seed)))


class NotFinite(NamedTuple):
    """How many numbers of a tensor are no numbers."""

    nan: int
    infinite: int
    size: int

    def __str__(self) -> str:
        return f"{self.nan} NaN and {self.infinite} infinite of {self.size:,} numbers"


def count_not_finite(value: np.ndarray) -> NotFinite | None:
    """Counts NaN and infinite numbers of float32, float16 or bfloat16; None if there are none."""
    words = np.dtype(f"u{value.dtype.itemsize}")
    # Shifting the sign out leaves the exponent in front: all ones in these numbers, and in no other.
    least = value.dtype.type(np.inf).reshape(1).view(words)[0] << 1
    flat, bits = value.reshape(-1), value.reshape(-1).view(words)
    strips = range(0, len(bits), _STRIP)
    if all((bits[begin : begin + _STRIP] << 1).max() < least for begin in strips):
        return None
    flat = flat.astype(np.float32)
    return NotFinite(int(np.isnan(flat).sum()), int(np.isinf(flat).sum()), len(flat))


def check_finite(damaged: Mapping[str, NotFinite]) -> None:
    """Raises a `UserError` that names tensors with numbers that are not finite."""
    if damaged:
        named = [f"{name}: {found}" for name, found in damaged.items()]
        more = f"; and {len(named) - _MOST_NAMED} tensors more" if len(named) > _MOST_NAMED else ""
        raise UserError(
            f"{len(named)} tensor(s) hold numbers that are not finite"
            f" ({'; '.join(named[:_MOST_NAMED])}{more}); copy or download them again, or use an"
            " earlier checkpoint"
        )


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
