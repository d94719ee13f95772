"""Measures a list of programs: compiles all of them, makes the weights, then runs them by growing peak."""

import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.stages import Compiled, Lowered
from jaxtyping import PyTree

from crosslmm_jax.model import attention_backends, flops
from crosslmm_jax.profiling import memory, timing
from crosslmm_jax.profiling.record import Record, Row

CompilerOptions = Mapping[str, bool | int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program at one size."""

    row: Row  # what, frames, tokens_per_frame, and the fields that distinguish it from other cases
    lower: Callable[[], Lowered]  # from shapes alone
    inputs: Callable[[], PyTree]  # arrays besides the weights; they live only while the case runs
    call: Callable[[Compiled, PyTree, PyTree, PyTree], PyTree]  # (program, weights, inputs, prepared); timed
    input_bytes: int
    costs: flops.Costs | None = None
    prepare: Callable[[PyTree], PyTree] | None = None  # from the inputs, before each call; not timed
    per_call: int = 1  # results of one call; times are divided by it
    finish: Callable[[Row], Row] | None = None  # adds fields to the finished row
    compiler_options: CompilerOptions | None = None  # of XLA

    @property
    def name(self) -> str:
        """For messages and folders: all words and counts of the row."""
        words = [str(value) for value in self.row.values() if isinstance(value, str | int)]
        return "_".join(words).replace("+", "_with_")


class _Ready(NamedTuple):
    case: Case
    compiled: Compiled
    compile_s: float
    backends: list[str]
    plan: dict[str, int] | None

    @property
    def peak(self) -> int:
        return self.plan["peak"] if self.plan else self.case.row["frames"]


def run_cases(cases: Sequence[Case], record: Record, *, make_weights: Callable[[], PyTree]) -> None:
    """Measures each case and adds its row to `record`. A case that fails is noted, and the others run.

    Args:
      cases: what to measure.
      record: gets the rows.
      make_weights: makes the weights after everything is compiled; peaks are counted over them. For cases
        that have their weights among the inputs, it returns an empty tree.
    """
    ready = _compile_all(cases, record)
    if not ready:
        return
    high_water = memory.HighWater()
    begin = time.perf_counter()
    weights = jax.block_until_ready(make_weights())
    high_water.weights_are_there()
    weights_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 1e6
    record.add_facts(weights_mb=weights_mb, weights_s=time.perf_counter() - begin)
    for item in sorted(ready, key=lambda item: item.peak):
        try:
            _run(item, record, weights, high_water)
        except Exception as error:  # one case must not end the others
            record.add_error(item.case.name, error)


def _compile_all(cases: Sequence[Case], record: Record) -> list[_Ready]:
    ready, waiting = [], []
    with concurrent.futures.ThreadPoolExecutor(max(1, record.request.compile_jobs)) as pool:
        for case in cases:
            try:
                with attention_backends() as backends:
                    lowered = case.lower()
                future = pool.submit(_compile, lowered, case.compiler_options)
                waiting.append((case, sorted(map(str, backends)), future))
            except Exception as error:
                record.add_error(f"{case.name}, lowering", error)
        for case, backends, future in waiting:
            try:
                compiled, seconds = future.result()
                plan = memory.planned(compiled, inputs=case.input_bytes)
                ready.append(_Ready(case, compiled, seconds, backends, plan))
            except Exception as error:
                record.add_error(f"{case.name}, compiling", error)
    return ready


def _compile(lowered: Lowered, options: CompilerOptions | None) -> tuple[Compiled, float]:
    begin = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)  # type: ignore[arg-type]  # it takes integers too
    return compiled, time.perf_counter() - begin


def _run(item: _Ready, record: Record, weights: PyTree, high_water: memory.HighWater) -> None:
    case, request = item.case, record.request
    before = high_water.mark()
    inputs = jax.block_until_ready(case.inputs())

    def call(prepared: PyTree) -> PyTree:
        return case.call(item.compiled, weights, inputs, prepared)

    prepare = None if case.prepare is None else functools.partial(case.prepare, inputs)
    timed = timing.measure(call, repeats=request.repeats, prepare=prepare)
    # Without weights, those among the inputs would count in the mark; then only the plan is comparable.
    after = high_water.mark() if jax.tree.leaves(weights) else None
    timed = timing.summary([sample / case.per_call for sample in timed["samples_ms"]])
    row = {**case.row, **timed, **memory.peak_row(item.plan, before, after)}
    row.setdefault("compiler_options", case.compiler_options)
    row |= {"compile_s": item.compile_s, "attention": item.backends}
    if case.finish is not None:
        row |= case.finish(row)
    record.add_row(row, case.costs)
    if request.trace is not None:
        with jax.profiler.trace(os.path.join(request.trace, request.system, case.name)):
            jax.block_until_ready(call(None if prepare is None else prepare()))
