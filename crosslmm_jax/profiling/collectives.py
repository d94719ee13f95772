"""The collectives of a compiled program: what moves between devices in one run, and why.

Read from the text of the optimised HLO, so that a program can be judged from shapes alone, before any weight
exists and without its hardware.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
DTYPE_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations"
    r"|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str  # of `KINDS`
    array_bytes: int  # of the whole array: what is gathered, summed or exchanged within one group
    group: int  # devices that take part together
    runs: int  # how often one run of the program executes it
    is_bounded: bool  # whether `runs` is known: not where the program decides how often a loop runs
    operation: str  # the traced operation that it belongs to, a path of scopes; "" if XLA does not say

    @property
    def total_bytes(self) -> int:
        """Bytes of the array times `runs`. A loop of unknown length counts once."""
        return self.array_bytes * self.runs


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program, `jax.stages.Compiled.as_text()`, those in loops included.

    An all-gather counts what it returns, a reduce-scatter what it sums, so both halves of an all-reduce count
    as the same array. Asynchronous collectives count where they start. Collectives among groups of one device
    move nothing and are left out. Of a conditional all branches count.

    Raises:
      ValueError: the text has no entry computation, or an array of an unknown dtype is moved.
    """
    bodies, entry = _computations(hlo)
    found: list[Collective] = []
    pending = [(entry, 1, True)]  # computation, how often it runs, whether that is known
    while pending:
        name, runs, is_bounded = pending.pop()
        for result, operation, rest in bodies[name]:
            kind = operation.removesuffix("-start")
            if kind in KINDS and (group := _group_size(rest)) > 1:
                size = _result_bytes(result, operation) * (group if kind == "reduce-scatter" else 1)
                scope = _NAME.search(rest)
                found.append(Collective(kind, size, group, runs, is_bounded, scope[1] if scope else ""))
            elif kind not in KINDS:
                trips = _TRIPS.search(rest) if operation == "while" else None
                times = runs * int(trips[1]) if trips else runs
                bounded = is_bounded and (operation != "while" or trips is not None)
                pending.extend((called, times, bounded) for called in _called(rest) if called in bodies)
    return found


def total_bytes(found: list[Collective]) -> int:
    """Bytes of all collectives of a run."""
    return sum(collective.total_bytes for collective in found)


def _computations(hlo: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Computation -> (result type, operation, operands and attributes) of its instructions; the entry."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry, current = None, None
    for line in hlo.splitlines():
        if (begin := _COMPUTATION.match(line)) is not None:
            current = bodies.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)) is not None:
            current.append((instruction[1], instruction[2], instruction[3]))
    if entry is None:
        raise ValueError("this text of HLO has no ENTRY computation; pass `compiled.as_text()`")
    return bodies, entry


def _called(rest: str) -> Iterator[str]:
    for many, one in _CALLED.findall(rest):
        yield from (name.strip().lstrip("%") for name in many.split(",")) if many else (one,)


def _result_bytes(result: str, operation: str) -> int:
    """Bytes of what a collective returns; the start of an asynchronous one returns its operands before it."""
    sizes = [_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(result)]
    if operation.endswith("-start") and operation != "all-reduce-start":
        arrays = [size for size in sizes if size > 4] or sizes  # without contexts, a word each
        return sum(arrays[len(arrays) // 2 :])
    return sum(sizes)


def _array_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype.startswith("f8") else DTYPE_BITS.get(dtype)
    if bits is None:
        raise ValueError(f"a collective moves an array of dtype {dtype!r}, whose size is not known here")
    return math.prod(map(int, dims.split(","))) * bits // 8 if dims else bits // 8


def _group_size(rest: str) -> int:
    """Devices per group: of `{{0,1},{2,3}}`, of `[2,4]<=[8]`, and of `mesh['a'=2,'b'=4] {'b'}`."""
    if "source_target_pairs=" in rest:
        return 2
    if (listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest)) is not None:
        return listed[1].count(",") + 1
    if (tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)) is not None:
        return int(tiled[2])
    if (named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", rest)) is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    raise ValueError(f"the devices of this collective are in no known form: {rest[:300]}")
