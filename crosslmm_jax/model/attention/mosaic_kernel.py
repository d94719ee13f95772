"""The kernel behind `mosaic`: attention over all keys for heads of 72 or 80 columns, for Hopper's GPUs.

Tensor cores take columns by 16, so that 72 become 80: the hardware that fetches blocks of an array fills what
lies outside of it with zeros, and drops it when it stores. A block of threads has three warpgroups that
compute, with 64 queries each, and one that fetches for them. There are as many blocks as multiprocessors, and
each goes from item to item: 192 queries of one head of one row. While one warpgroup takes exponentials, the
others keep the tensor cores busy; and the first half of its weights meets the values while it makes the rest.

Written in Mosaic GPU, the layer that Pallas has on these GPUs: Pallas itself fetches whole tiles only. The
softmax with running maxima is that of FlashAttention (arXiv 2205.14135), in powers of 2; the division of
labour is that of FlashAttention-3 (arXiv 2407.08608).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm, scf

ROWS = 64  # queries of a warpgroup
WARPGROUPS = 3  # that compute
BLOCK = 128  # keys at once
STAGES = 2  # blocks of keys, and of queries, in shared memory
# Of 65,536: three warpgroups with many, one with few.
REGISTERS, REGISTERS_TO_FETCH = 160, 24
# Columns are kept in pieces: the wide one in rows of 128 bytes, the others in rows of 32.
WIDE, NARROW = 64, 16
COLUMNS = 80
SWIZZLE_WIDE, SWIZZLE_NARROW = 128, 32
PIECES = ((0, WIDE, SWIZZLE_WIDE), (WIDE, NARROW, SWIZZLE_NARROW))
LOWEST = -1e30
ALIGNMENT, MOST_BYTES = 1024, 227 * 1024  # bytes, of what is swizzled, and of shared memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of one kernel.

    Attributes:
      batch: rows.
      queries: of a row.
      keys: of a row.
      heads: of queries, keys and values alike.
      size: of a head, from 72 to 80 and divisible by 8.
      read: keys of a row that are read, the first ones.
      dtype: bfloat16 or float16.
      blocks: of threads at most, one a multiprocessor.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    size: int
    read: int
    dtype: str
    blocks: int

    @property
    def query_blocks(self) -> int:
        """Items of a head."""
        return -(-self.queries // (ROWS * WARPGROUPS))

    @property
    def items(self) -> int:
        """Of all rows and heads."""
        return self.batch * self.heads * self.query_blocks

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(self.blocks, self.items)

    @property
    def key_blocks(self) -> tuple[int, int]:
        """Whole ones, and keys of the last one."""
        return divmod(self.read, BLOCK)

    @property
    def steps(self) -> int:
        """Blocks of keys of an item."""
        return -(-self.read // BLOCK)


class _Memory(NamedTuple):
    """Shared memory of a block of threads. Buffers lie in this order, each at a multiple of `ALIGNMENT`."""

    queries: Any  # by piece of columns: [STAGES, WARPGROUPS, 64, columns]
    keys: Any  # by piece: [STAGES, BLOCK, columns]
    values: Any  # [STAGES, pieces, BLOCK, 16]
    out: Any  # by piece: [WARPGROUPS, 64, columns]
    full: Any  # barriers that open when a stage was filled
    free: Any  # barriers that open when all warpgroups have read a stage


@functools.cache
def build(plan: Plan) -> Callable[..., jax.Array]:
    """The function (q, k, v) -> output, all [batch, queries or keys, heads, size]."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(plan.dtype))
    q, kv = (shape((plan.batch, length, plan.heads, plan.size)) for length in (plan.queries, plan.keys))
    grid, block = (plan.grid, 1, 1), ((WARPGROUPS + 1) * 128, 1, 1)

    def pieces(*lead: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(shape((*lead, columns)) for _, columns, _ in PIECES)

    def barriers(arrivals: int) -> dict[str, Any]:
        return {name: mgpu.Barrier(arrivals, STAGES) for name in ("queries", "keys", "values")}

    memory = _Memory(
        queries=pieces(STAGES, WARPGROUPS, ROWS), keys=pieces(STAGES, BLOCK),
        values=shape((STAGES, COLUMNS // NARROW, BLOCK, NARROW)), out=pieces(WARPGROUPS, ROWS),
        full=barriers(1), free=barriers(WARPGROUPS),
    )  # fmt: skip
    _check_layout(memory)
    body = functools.partial(_kernel, plan)
    with mlir.make_ir_context(), ir.Location.unknown():
        return mgpu.as_gpu_kernel(body, grid, block, (q, kv, kv), q, memory, module_name="crosslmm_attention")


def _check_layout(memory: _Memory) -> None:
    """Holds for the numbers above; others may break it, and the kernel would read what is elsewhere."""
    buffers = (*memory.queries, *memory.keys, memory.values, *memory.out)
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in buffers]
    assert all(size % ALIGNMENT == 0 for size in sizes) and sum(sizes) + ALIGNMENT <= MOST_BYTES, sizes


def _kernel(plan: Plan, ctx: Any, q: Any, k: Any, v: Any, out: Any, memory: _Memory) -> None:
    warpgroup = mgpu.warpgroup_idx(sync=True)
    computes = arith.cmpi(arith.CmpIPredicate.ult, warpgroup, _int(WARPGROUPS))
    branch = scf.IfOp(computes, has_else=True)
    with ir.InsertionPoint(branch.then_block):
        nvvm.setmaxregister(REGISTERS, nvvm.SetMaxRegisterAction.increase)
        _Reader(plan, ctx, memory, warpgroup, out).run()
        scf.yield_([])
    with ir.InsertionPoint(cast(Any, branch.else_block)):
        nvvm.setmaxregister(REGISTERS_TO_FETCH, nvvm.SetMaxRegisterAction.decrease)
        # Not `mgpu.single_thread`, which knows by a global variable whether it is in use: two threads of a
        # program that trace kernels at once would spoil each other's.
        with mgpu.when(mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)):
            _Fetcher(plan, ctx, memory, {"queries": q, "keys": k, "values": v}).run()
        scf.yield_([])


class _Role:
    """What both kinds of warpgroups know: the plan, shared memory, and which item comes next."""

    def __init__(self, plan: Plan, ctx: Any, memory: _Memory) -> None:
        self.plan, self.ctx, self.memory = plan, ctx, memory
        self.full, self.free = memory.full, memory.free
        self.block = arith.index_cast(ir.IntegerType.get_signless(32), gpu.block_id(gpu.Dimension.x))

    def run(self) -> None:
        """Goes through the items of this block of threads."""
        plan = self.plan
        count = arith.divui(arith.subi(_int(plan.items + plan.grid - 1), self.block), _int(plan.grid))

        @mgpu.fori(count, ())
        def _(index: Any, _: Any) -> tuple[()]:
            self.item(index)
            return ()

    def item(self, index: Any) -> None:
        """Handles the block's item of this number."""
        raise NotImplementedError

    def place(self, index: Any) -> tuple[Any, Any, Any]:
        """Row of the batch, head and first query; items of a head follow each other, and share its keys."""
        item = arith.addi(self.block, arith.muli(index, _int(self.plan.grid)))
        head = arith.divui(item, _int(self.plan.query_blocks))
        first = arith.muli(arith.remui(item, _int(self.plan.query_blocks)), _int(ROWS * WARPGROUPS))
        heads = _int(self.plan.heads)
        return _index(arith.divui(head, heads)), _index(arith.remui(head, heads)), _index(first)

    def over_keys(self, step: Callable[[Any, Any, int], Any], carry: Any) -> Any:
        """Calls `step(number, carry, keys)` for every block of keys, the last of which may be smaller."""
        whole, rest = self.plan.key_blocks
        if whole:
            carry = mgpu.fori(_int(whole), carry)(lambda n, carry: step(n, carry, BLOCK)).results
        return step(_int(whole), carry, rest) if rest else carry

    def count(self, index: Any, step: Any) -> tuple[Any, Any]:
        """Blocks of keys before this one, and the stage it is held in."""
        before = arith.addi(arith.muli(index, _int(self.plan.steps)), step)
        return before, arith.remui(before, _int(STAGES))


class _Fetcher(_Role):
    """One thread that fills shared memory, as soon as all warpgroups are done with what it held."""

    def __init__(self, plan: Plan, ctx: Any, memory: _Memory, arrays: dict[str, Any]) -> None:
        super().__init__(plan, ctx, memory)
        self.arrays = arrays

    def item(self, index: Any) -> None:
        """Fetches the queries of an item, then its keys and values block by block."""
        row, head, first = self.place(index)
        stage = self.stage("queries", index)
        targets = [mgpu.memref_fold(_at(x, stage), 0, 2) for x in self.memory.queries]
        self.fetch("queries", stage, row, first, head, targets, PIECES)

        def step(number: Any, carry: Any, keys: int) -> Any:
            first = _index(arith.muli(number, _int(BLOCK)))
            before, _ = self.count(index, number)
            for name in ("keys", "values"):
                stage = self.stage(name, before)
                targets, pieces = self.targets(name, stage, _whole_tiles(keys))
                self.fetch(name, stage, row, first, head, targets, pieces)
            return carry

        self.over_keys(step, ())

    def stage(self, name: str, before: Any) -> Any:
        """The stage for what comes after `before` others, once it is free."""
        stage = arith.remui(before, _int(STAGES))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.uge, before, _int(STAGES))):
            self.free[name][stage].wait()
        return stage

    def targets(self, name: str, stage: Any, rows: int) -> tuple[list[Any], Any]:
        """Where the pieces of columns of a block of keys or values go, and the pieces."""
        if name == "keys":
            return [_first(_at(x, stage), rows) for x in self.memory.keys], PIECES
        pieces = [(column, NARROW, SWIZZLE_NARROW) for column in range(0, COLUMNS, NARROW)]
        return [_first(_at(self.memory.values, stage, i), rows) for i in range(len(pieces))], pieces

    def fetch(
        self, name: str, stage: Any, row: Any, first: Any, head: Any, targets: list[Any], pieces: Any
    ) -> None:
        """Starts the copies of rows of one head, whose barrier opens when the bytes of all have arrived."""
        barrier = self.full[name][stage]
        rows = ir.MemRefType(targets[0].type).shape[0]
        size = jnp.dtype(self.plan.dtype).itemsize
        barrier.arrive_expect_tx(rows * size * sum(columns for _, columns, _ in pieces))
        for target, (column, columns, swizzle) in zip(targets, pieces, strict=True):
            self.ctx.async_copy(
                src_ref=self.arrays[name], dst_ref=target, swizzle=swizzle, barrier=barrier, arrive=False,
                predicate=None, gmem_slice=(row, mgpu.ds(first, rows), head, _columns(column, columns)),
            )  # fmt: skip


class _Reader(_Role):
    """A warpgroup that computes the outputs of its 64 queries of an item."""

    def __init__(self, plan: Plan, ctx: Any, memory: _Memory, warpgroup: Any, out: Any) -> None:
        super().__init__(plan, ctx, memory)
        self.warpgroup, self.out = warpgroup, out
        self.one_thread = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)

    def run(self) -> None:
        """Goes through all items, and waits for the last store."""
        super().run()
        self.ctx.await_async_copy(0)

    def item(self, index: Any) -> None:
        """Reads all keys with these queries; what is carried is the running maximum, sums and outputs."""
        stage = arith.remui(index, _int(STAGES))
        self.full["queries"][stage].wait()
        pieces = zip(self.memory.queries, PIECES, strict=True)
        queries = [_tiles(_at(x, stage, self.warpgroup), columns) for x, (_, columns, _) in pieces]
        step = functools.partial(self.step, index, queries)
        top = _splat(LOWEST, (ROWS,), mgpu.WGMMA_ROW_LAYOUT)
        _, sums, out = self.over_keys(step, (top, _splat(0, (ROWS, 8)), _splat(0, (ROWS, COLUMNS))))
        self.leave("queries", stage)
        self.store(index, out / sums.reduce("add", axis=1).broadcast_minor(COLUMNS))

    def step(self, index: Any, queries: list[Any], number: Any, carry: Any, keys: int) -> Any:
        """One block of keys: (maxima [64], sums [64, 8], outputs [64, 80]) -> the same."""
        top, sums, out = carry
        _, stage = self.count(index, number)
        scores = self.scores(queries, stage, keys)
        scale = self.plan.size**-0.5 * math.log2(math.e)
        blocks = [scores[:, i : i + 8] for i in range(0, scores.shape[1], 8)]
        highest = functools.reduce(lambda a, b: a.max(b), blocks).reduce("max", axis=1) * _float(scale)
        before, top = top, top.max(highest)
        shrink = (before - top).exp2(approx=True)
        sums = sums * shrink.broadcast_minor(8)
        out = mgpu.WGMMAAccumulator.from_registers(out * shrink.broadcast_minor(COLUMNS))
        self.full["values"][stage].wait()
        for begin, end in _halves(scores.shape[1]):
            part = scores[:, begin:end] * _float(scale) - top.broadcast_minor(end - begin)
            weights = part.exp2(approx=True)
            out = self.add_values(out, weights, stage, begin)
            # Summed by eight columns, across which threads need not talk to each other; and only now, while
            # the tensor cores are at work.
            sums = functools.reduce(
                lambda a, b: a + b, [weights[:, i : i + 8] for i in range(0, end - begin, 8)], sums
            )
        nvvm.wgmma_wait_group_sync_aligned(0)
        self.leave("values", stage)
        return top, sums, out.value

    def scores(self, queries: list[Any], stage: Any, keys: int) -> Any:
        """float32[64, keys up to a multiple of 16], lowest where there is no key to read."""
        rows = _whole_tiles(keys)
        self.full["keys"][stage].wait()
        scores = mgpu.WGMMAAccumulator.zero(ROWS, rows)
        for query, piece, (_, columns, swizzle) in zip(queries, self.memory.keys, PIECES, strict=True):
            tiles = _tiles(_first(_at(piece, stage), rows), columns)
            scores = mgpu.wgmma(scores, query, mgpu.memref_transpose(tiles, (1, 0, 3, 2)), swizzle=swizzle)
        nvvm.wgmma_commit_group_sync_aligned()
        nvvm.wgmma_wait_group_sync_aligned(0)
        self.leave("keys", stage)
        scores = scores.value
        if keys == rows:
            return scores
        positions = mgpu.FragmentedArray.broadcasted_iota(
            ir.IntegerType.get_signless(32), scores.shape, 1, layout=mgpu.WGMMA_LAYOUT, is_signed=True
        )
        return (positions < _int(keys)).select(scores, _splat(LOWEST, scores.shape))

    def add_values(self, out: Any, weights: Any, stage: Any, begin: int) -> Any:
        """Starts adding weights [64, n] times the values from `begin` on."""
        tiles = mgpu.memref_transpose(
            mgpu.memref_unfold(_at(self.memory.values, stage), 1, (None, 8)), (1, 0, 2, 3)
        )
        tiles = mgpu.memref_slice(tiles, slice(begin // 8, (begin + weights.shape[1]) // 8))
        out = mgpu.wgmma(out, weights.astype(self.dtype()), tiles, swizzle=SWIZZLE_NARROW)
        nvvm.wgmma_commit_group_sync_aligned()
        return out

    def leave(self, name: str, stage: Any) -> None:
        """Says that this warpgroup needs what the stage holds no more."""
        self.free[name][stage].arrive(predicate=self.one_thread)

    def store(self, index: Any, out: Any) -> None:
        """Writes outputs [64, 80]; rows and columns that the array does not have are dropped on the way."""
        row, head, first = self.place(index)
        first = arith.addi(first, arith.muli(_index(self.warpgroup), mgpu.c(ROWS, ir.IndexType.get())))
        self.ctx.await_async_copy(0, await_read_only=True)  # the last item's
        out, staged = out.astype(self.dtype()), [_at(x, self.warpgroup) for x in self.memory.out]
        for target, (column, columns, swizzle) in zip(staged, PIECES, strict=True):
            out[:, column : column + columns].store_tiled(_tiles(target, columns), swizzle=swizzle)
        mgpu.commit_shared()
        queries = mgpu.c(self.plan.queries, ir.IndexType.get())
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, first, queries)):
            for target, (column, columns, swizzle) in zip(staged, PIECES, strict=True):
                self.ctx.async_copy(
                    src_ref=target, dst_ref=self.out, swizzle=swizzle,
                    gmem_slice=(row, mgpu.ds(first, ROWS), head, _columns(column, columns)),
                )  # fmt: skip

    def dtype(self) -> Any:
        """Of inputs and outputs."""
        return ir.BF16Type.get() if self.plan.dtype == "bfloat16" else ir.F16Type.get()


def _whole_tiles(keys: int) -> int:
    """Keys up to what tensor cores take at once."""
    return -(-keys // NARROW) * NARROW


def _halves(count: int) -> list[tuple[int, int]]:
    middle = count // 2 // NARROW * NARROW
    return [(0, middle), (middle, count)] if middle else [(0, count)]


def _int(value: int) -> Any:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _float(value: float) -> Any:
    return mgpu.c(float(value), ir.F32Type.get())


def _index(value: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), value)


def _splat(value: float, shape: tuple[int, ...], layout: Any = mgpu.WGMMA_LAYOUT) -> Any:
    return mgpu.FragmentedArray.splat(_float(value), shape, layout)


def _at(ref: Any, *index: Any) -> Any:
    """The part of a buffer at these leading indices."""
    return mgpu.memref_slice(ref, tuple(x if isinstance(x, int) else _index(x) for x in index))


def _first(ref: Any, rows: int) -> Any:
    return ref if ir.MemRefType(ref.type).shape[0] == rows else mgpu.memref_slice(ref, slice(0, rows))


def _columns(first: int, count: int) -> Any:
    return mgpu.ds(mgpu.c(first, ir.IndexType.get()), count)


def _tiles(ref: Any, columns: int) -> Any:
    """[rows, columns] as the tiles [rows / 8, 1, 8, columns] that tensor cores read."""
    ref = mgpu.memref_unfold(mgpu.memref_unfold(ref, 1, (None, columns)), 0, (None, 8))
    return mgpu.memref_transpose(ref, (0, 2, 1, 3))
