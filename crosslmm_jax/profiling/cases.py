"""Measures a list of programs: all compiled first, then weights, then the programs by growing peak."""

import concurrent.futures
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from crosslmm_jax.profiling import memory, timing
from crosslmm_jax.profiling.flops import Costs
from crosslmm_jax.profiling.record import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program at one size.

    `lower` sees shapes only. `inputs` makes the arrays it is called with besides the weights; they may be
    large, so they live only while the case runs. `call(compiled, weights, inputs, prepared)` is timed.
    """

    row: dict[str, Any]  # what, frames, tokens_per_frame
    lower: Callable[[], Any]
    inputs: Callable[[], Any]
    call: Callable[[Any, Any, Any, Any], Any]
    input_bytes: int
    costs: Costs | None = None
    prepare: Callable[[Any], Any] | None = None  # of the inputs, before each call, not timed
    per_call: int = 1  # results of one call that the row's time is divided by
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # adds fields to the row
    compiler_options: dict[str, Any] | None = None  # of XLA

    @property
    def name(self) -> str:
        """For messages and folders."""
        kinds = (
            "what", "frames", "tokens_per_frame", "v2v_scope", "remat", "devices", "mesh", "precision",
            "backend", "parts",
        )  # fmt: skip
        named = [self.row[kind] for kind in kinds if kind in self.row]
        return "_".join(map(str, named)).replace("+", "_with_")


@dataclasses.dataclass(kw_only=True)
class _Ready:
    case: Case
    compiled: Any
    compile_s: float
    backends: list[str]
    plan: dict[str, int] | None


def run_cases(cases: Sequence[Case], record: Record, *, make_weights: Callable[[], Any]) -> None:
    """Measures each case and adds its row to `record`; a case that fails is noted and left out.

    Args:
      cases: what to measure.
      record: gets the rows.
      make_weights: the weights, once everything is compiled; memory is counted over them. Where cases bring
        their own as inputs, an empty tree.
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
    for item in sorted(ready, key=lambda item: item.plan["peak"] if item.plan else item.case.row["frames"]):
        try:
            _run(item, record, weights, high_water)
        except Exception as error:  # one case must not end the others
            record.add_error(item.case.name, error)


def _compile_all(cases: Sequence[Case], record: Record) -> list[_Ready]:
    ready = []
    with concurrent.futures.ThreadPoolExecutor(max(1, record.request.compile_jobs)) as pool:
        waiting = []
        for case in cases:
            try:
                with _AttentionBackends() as backends:
                    lowered = case.lower()
                waiting.append(
                    (case, sorted(backends.seen), pool.submit(_compile, lowered, case.compiler_options))
                )
            except Exception as error:
                record.add_error(f"{case.name}, lowering", error)
        for case, seen, future in waiting:
            try:
                compiled, seconds = future.result()
                plan = memory.planned(compiled, inputs=case.input_bytes)
                ready.append(
                    _Ready(case=case, compiled=compiled, compile_s=seconds, backends=seen, plan=plan)
                )
            except Exception as error:
                record.add_error(f"{case.name}, compiling", error)
    return ready


def _compile(lowered: Any, options: dict[str, Any] | None) -> tuple[Any, float]:
    begin = time.perf_counter()
    return lowered.compile(compiler_options=options), time.perf_counter() - begin


def _run(item: _Ready, record: Record, weights: Any, high_water: memory.HighWater) -> None:
    case, request = item.case, record.request
    before = high_water.mark()
    inputs = jax.block_until_ready(case.inputs())

    def call(prepared: Any) -> Any:
        return case.call(item.compiled, weights, inputs, prepared)

    prepare = None if case.prepare is None else _bound(case.prepare, inputs)
    timed = timing.measure(call, repeats=request.repeats, prepare=prepare)
    # Weights that come with the inputs would count in the mark; then only the plan is comparable.
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


def _bound(prepare: Callable[[Any], Any], inputs: Any) -> Callable[[], Any]:
    def bound() -> Any:
        return prepare(inputs)

    return bound


class _AttentionBackends(logging.Handler):
    """Which backend each attention of a traced program took, from what the attention function logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: set[str] = set()
        self._logger = logging.getLogger("crosslmm_jax.model.attention.dispatch")

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the message."""
        self.seen.add(record.getMessage())

    def __enter__(self) -> "_AttentionBackends":
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.addHandler(self)
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]
