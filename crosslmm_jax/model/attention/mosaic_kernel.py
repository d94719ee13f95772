"""The kernel of `mosaic`: attention over all keys for heads of 72 or 80 columns, for Hopper GPUs.

Layout of the work:

- Tensor cores take columns by 16, so that 72 become 80. The hardware that copies blocks of an array fills
  what lies outside of it with zeros, and drops it when it stores.
- A thread block has three consumer warpgroups with 64 queries each, and one producer warpgroup that fetches.
- There are as many thread blocks as multiprocessors. Each loops over items: 192 queries of one head and row.
- While one warpgroup computes exponentials, the others keep the tensor cores busy. Within a warpgroup, the
  first half of the weights is multiplied with the values while the second half is computed.

Written in Mosaic GPU, the layer below Pallas on these GPUs: Pallas itself fetches only whole tiles. The
softmax with running maxima is FlashAttention's (arXiv 2205.14135), in powers of 2. Producer and consumers are
FlashAttention-3's (arXiv 2407.08608).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm, scf

ROWS = 64  # queries of a consumer warpgroup
CONSUMERS = 3  # warpgroups
KEY_BLOCK = 128  # keys of one step
STAGES = 2  # blocks of keys, and of queries, in shared memory
# Registers per thread, of 65,536 in all: many for the consumers, few for the producer.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 160, 24
# Columns are kept in pieces: the wide one in rows of 128 bytes, the narrow ones in rows of 32.
WIDE, NARROW = 64, 16
COLUMNS = 80
SWIZZLE_WIDE, SWIZZLE_NARROW = 128, 32
PIECES = ((0, WIDE, SWIZZLE_WIDE), (WIDE, NARROW, SWIZZLE_NARROW))  # first column, columns, swizzle
MASKED = -1e30  # score of a key that is not read
ALIGNMENT, MAX_SHARED_BYTES = 1024, 227 * 1024  # of swizzled buffers, and of shared memory

Pieces = Sequence[tuple[int, int, int]]
Value = ir.Value  # a scalar, or a reference to memory
Registers = mgpu.FragmentedArray  # an array in the registers of a warpgroup
Carry = TypeVar("Carry")
# Running maxima [64], sums [64, 8] and outputs [64, 80] of a consumer's queries.
Running = tuple[Registers, Registers, Registers]


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """Sizes of one kernel."""

    batch: int  # rows
    queries: int  # of a row
    keys: int  # of a row
    heads: int  # of queries, keys and values alike
    size: int  # of a head, from 72 to 80 and divisible by 8
    read: int  # keys of a row that are read, the first ones
    dtype: str  # bfloat16 or float16
    blocks: int  # thread blocks at most, one per multiprocessor

    @property
    def query_blocks(self) -> int:
        """Items of a head."""
        return -(-self.queries // (ROWS * CONSUMERS))

    @property
    def items(self) -> int:
        """Items of all rows and heads."""
        return self.batch * self.heads * self.query_blocks

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return min(self.blocks, self.items)

    @property
    def key_blocks(self) -> tuple[int, int]:
        """Whole blocks of keys, and keys of the last one."""
        return divmod(self.read, KEY_BLOCK)

    @property
    def steps(self) -> int:
        """Blocks of keys of an item."""
        return -(-self.read // KEY_BLOCK)


# Within `build` a shape, a barrier or a dict of them; within the kernel what Mosaic GPU makes of it.
Buffer = Any


class _Memory(NamedTuple):
    """Shared memory of a thread block. Buffers lie in this order, each at a multiple of `ALIGNMENT`."""

    queries: Buffer  # by piece of columns: [STAGES, CONSUMERS, 64, columns]
    keys: Buffer  # by piece: [STAGES, KEY_BLOCK, columns]
    values: Buffer  # [STAGES, pieces, KEY_BLOCK, 16]
    out: Buffer  # by piece: [CONSUMERS, 64, columns]
    full: Buffer  # by name of an array: barriers that open when a stage is filled
    free: Buffer  # by name: barriers that open when all consumers have read a stage


@functools.cache
def build(shape: KernelShape) -> Callable[..., jax.Array]:
    """The function (q, k, v) -> output, all [batch, queries or keys, heads, size]."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(shape.dtype))
    q, kv = (array((shape.batch, length, shape.heads, shape.size)) for length in (shape.queries, shape.keys))
    grid, block = (shape.grid, 1, 1), ((CONSUMERS + 1) * 128, 1, 1)

    def pieces(*lead: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(array((*lead, columns)) for _, columns, _ in PIECES)

    def barriers(arrivals: int) -> dict[str, mgpu.Barrier]:
        return {name: mgpu.Barrier(arrivals, STAGES) for name in ("queries", "keys", "values")}

    memory = _Memory(
        queries=pieces(STAGES, CONSUMERS, ROWS), keys=pieces(STAGES, KEY_BLOCK),
        values=array((STAGES, COLUMNS // NARROW, KEY_BLOCK, NARROW)), out=pieces(CONSUMERS, ROWS),
        full=barriers(1), free=barriers(CONSUMERS),
    )  # fmt: skip
    _check_layout(memory)
    body = functools.partial(_kernel, shape)
    with mlir.make_ir_context(), ir.Location.unknown():
        return mgpu.as_gpu_kernel(body, grid, block, (q, kv, kv), q, memory, module_name="crosslmm_attention")


def _check_layout(memory: _Memory) -> None:
    """Asserts that every buffer is aligned and all fit; otherwise the kernel would read other buffers."""
    buffers = (*memory.queries, *memory.keys, memory.values, *memory.out)
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in buffers]
    assert all(size % ALIGNMENT == 0 for size in sizes) and sum(sizes) + ALIGNMENT <= MAX_SHARED_BYTES, sizes


def _kernel(
    shape: KernelShape, ctx: mgpu.LaunchContext, q: Value, k: Value, v: Value, out: Value, memory: _Memory
) -> None:
    warpgroup = mgpu.warpgroup_idx(sync=True)
    computes = arith.cmpi(arith.CmpIPredicate.ult, warpgroup, _int(CONSUMERS))
    branch = scf.IfOp(computes, has_else=True)
    with ir.InsertionPoint(branch.then_block):
        nvvm.setmaxregister(CONSUMER_REGISTERS, nvvm.SetMaxRegisterAction.increase)
        _Consumer(shape, ctx, memory, warpgroup, out).run()
        scf.yield_([])
    with ir.InsertionPoint(cast(ir.Block, branch.else_block)):
        nvvm.setmaxregister(PRODUCER_REGISTERS, nvvm.SetMaxRegisterAction.decrease)
        # Not `mgpu.single_thread`: a global variable says whether it is in use, so that two threads of a
        # program that trace kernels at once would break each other's.
        with mgpu.when(mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)):
            _Producer(shape, ctx, memory, {"queries": q, "keys": k, "values": v}).run()
        scf.yield_([])


class _Worker:
    """What producer and consumers share: sizes, shared memory, and the order of items."""

    def __init__(self, shape: KernelShape, ctx: mgpu.LaunchContext, memory: _Memory) -> None:
        self.shape, self.ctx, self.memory = shape, ctx, memory
        self.full, self.free = memory.full, memory.free
        self.block = arith.index_cast(ir.IntegerType.get_signless(32), gpu.block_id(gpu.Dimension.x))

    def run(self) -> None:
        """Handles all items of this thread block."""
        shape = self.shape
        count = arith.divui(arith.subi(_int(shape.items + shape.grid - 1), self.block), _int(shape.grid))

        @mgpu.fori(count, ())
        def _(index: Value, _: object) -> tuple[()]:
            self.item(index)
            return ()

    def item(self, index: Value) -> None:
        """Handles item number `index` of this thread block."""
        raise NotImplementedError

    def coordinates(self, index: Value) -> tuple[Value, Value, Value]:
        """Row, head and first query of an item. Items of one head, which share its keys, are consecutive."""
        item = arith.addi(self.block, arith.muli(index, _int(self.shape.grid)))
        head = arith.divui(item, _int(self.shape.query_blocks))
        first = arith.muli(arith.remui(item, _int(self.shape.query_blocks)), _int(ROWS * CONSUMERS))
        heads = _int(self.shape.heads)
        return _index(arith.divui(head, heads)), _index(arith.remui(head, heads)), _index(first)

    def over_keys(self, step: Callable[[Value, Carry, int], Carry], carry: Carry) -> Carry:
        """Calls `step(number, carry, keys)` for every block of keys; the last one may have fewer keys."""
        whole, rest = self.shape.key_blocks
        if whole:
            carry = mgpu.fori(_int(whole), carry)(lambda n, carry: step(n, carry, KEY_BLOCK)).results  # type: ignore[assignment]
        return step(_int(whole), carry, rest) if rest else carry

    def count(self, index: Value, step: Value) -> tuple[Value, Value]:
        """Number of blocks of keys before this one, and the stage that holds it."""
        before = arith.addi(arith.muli(index, _int(self.shape.steps)), step)
        return before, arith.remui(before, _int(STAGES))


class _Producer(_Worker):
    """One thread that fills the stages of shared memory, each as soon as all consumers have read it."""

    def __init__(
        self, shape: KernelShape, ctx: mgpu.LaunchContext, memory: _Memory, arrays: dict[str, Value]
    ) -> None:
        super().__init__(shape, ctx, memory)
        self.arrays = arrays

    def item(self, index: Value) -> None:
        """Fetches the queries of an item, then its keys and values block by block."""
        row, head, first = self.coordinates(index)
        stage = self.stage("queries", index)
        targets = [mgpu.memref_fold(_at(x, stage), 0, 2) for x in self.memory.queries]
        self.fetch("queries", stage, row, first, head, targets, PIECES)

        def step(number: Value, carry: tuple[()], keys: int) -> tuple[()]:
            first = _index(arith.muli(number, _int(KEY_BLOCK)))
            before, _ = self.count(index, number)
            for name in ("keys", "values"):
                stage = self.stage(name, before)
                targets, pieces = self.targets(name, stage, _whole_tiles(keys))
                self.fetch(name, stage, row, first, head, targets, pieces)
            return carry

        self.over_keys(step, ())

    def stage(self, name: str, before: Value) -> Value:
        """The stage of block number `before` of an array, once it is free."""
        stage = arith.remui(before, _int(STAGES))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.uge, before, _int(STAGES))):
            self.free[name][stage].wait()
        return stage

    def targets(self, name: str, stage: Value, rows: int) -> tuple[list[Value], Pieces]:
        """Buffers for the pieces of columns of a block of keys or values, and the pieces."""
        if name == "keys":
            return [_first(_at(x, stage), rows) for x in self.memory.keys], PIECES
        pieces = [(column, NARROW, SWIZZLE_NARROW) for column in range(0, COLUMNS, NARROW)]
        return [_first(_at(self.memory.values, stage, i), rows) for i in range(len(pieces))], pieces

    def fetch(
        self, name: str, stage: Value, row: Value, first: Value, head: Value, targets: list[Value],
        pieces: Pieces,
    ) -> None:  # fmt: skip
        """Starts to copy rows of one head. The barrier of the stage opens when all bytes have arrived."""
        barrier = self.full[name][stage]
        rows = ir.MemRefType(targets[0].type).shape[0]
        size = jnp.dtype(self.shape.dtype).itemsize
        barrier.arrive_expect_tx(rows * size * sum(columns for _, columns, _ in pieces))
        for target, (column, columns, swizzle) in zip(targets, pieces, strict=True):
            self.ctx.async_copy(
                src_ref=self.arrays[name], dst_ref=target, swizzle=swizzle, barrier=barrier, arrive=False,
                predicate=None, gmem_slice=(row, mgpu.ds(first, rows), head, _columns(column, columns)),
            )  # fmt: skip


class _Consumer(_Worker):
    """A warpgroup that computes the outputs of 64 queries of each item."""

    def __init__(
        self, shape: KernelShape, ctx: mgpu.LaunchContext, memory: _Memory, warpgroup: Value, out: Value
    ) -> None:
        super().__init__(shape, ctx, memory)
        self.warpgroup, self.out = warpgroup, out
        self.one_thread = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)

    def run(self) -> None:
        """Handles all items, and waits for the last store."""
        super().run()
        self.ctx.await_async_copy(0)

    def item(self, index: Value) -> None:
        """Attends to all keys with the queries of an item, and stores the outputs."""
        stage = arith.remui(index, _int(STAGES))
        self.full["queries"][stage].wait()
        pieces = zip(self.memory.queries, PIECES, strict=True)
        queries = [_tiles(_at(x, stage, self.warpgroup), columns) for x, (_, columns, _) in pieces]
        step = functools.partial(self.step, index, queries)
        top = _splat(MASKED, (ROWS,), mgpu.WGMMA_ROW_LAYOUT)
        _, sums, out = self.over_keys(step, (top, _splat(0, (ROWS, 8)), _splat(0, (ROWS, COLUMNS))))
        self.release("queries", stage)
        self.store(index, out / sums.reduce("add", axis=1).broadcast_minor(COLUMNS))

    def step(self, index: Value, queries: list[Value], number: Value, carry: Running, keys: int) -> Running:
        """Adds one block of keys."""
        top, sums, out = carry
        _, stage = self.count(index, number)
        scores = self.scores(queries, stage, keys)
        scale = self.shape.size**-0.5 * math.log2(math.e)
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
            # Summed by eight columns, so that threads need not communicate; and only now, while the tensor
            # cores are at work.
            sums = functools.reduce(
                lambda a, b: a + b, [weights[:, i : i + 8] for i in range(0, end - begin, 8)], sums
            )
        nvvm.wgmma_wait_group_sync_aligned(0)
        self.release("values", stage)
        return top, sums, out.value

    def scores(self, queries: list[Value], stage: Value, keys: int) -> Registers:
        """float32[64, keys rounded up to a multiple of 16], `MASKED` beyond the keys."""
        rows = _whole_tiles(keys)
        self.full["keys"][stage].wait()
        scores = mgpu.WGMMAAccumulator.zero(ROWS, rows)
        for query, piece, (_, columns, swizzle) in zip(queries, self.memory.keys, PIECES, strict=True):
            tiles = _tiles(_first(_at(piece, stage), rows), columns)
            scores = mgpu.wgmma(scores, query, mgpu.memref_transpose(tiles, (1, 0, 3, 2)), swizzle=swizzle)
        nvvm.wgmma_commit_group_sync_aligned()
        nvvm.wgmma_wait_group_sync_aligned(0)
        self.release("keys", stage)
        scores = scores.value
        if keys == rows:
            return scores
        positions = mgpu.FragmentedArray.broadcasted_iota(
            ir.IntegerType.get_signless(32), scores.shape, 1, layout=mgpu.WGMMA_LAYOUT, is_signed=True
        )
        return (positions < _int(keys)).select(scores, _splat(MASKED, scores.shape))

    def add_values(
        self, out: mgpu.WGMMAAccumulator, weights: Registers, stage: Value, begin: int
    ) -> mgpu.WGMMAAccumulator:
        """Starts to add weights [64, n] times the values from `begin` on."""
        tiles = mgpu.memref_transpose(
            mgpu.memref_unfold(_at(self.memory.values, stage), 1, (None, 8)), (1, 0, 2, 3)
        )
        tiles = mgpu.memref_slice(tiles, slice(begin // 8, (begin + weights.shape[1]) // 8))
        out = mgpu.wgmma(out, weights.astype(self.dtype()), tiles, swizzle=SWIZZLE_NARROW)
        nvvm.wgmma_commit_group_sync_aligned()
        return out

    def release(self, name: str, stage: Value) -> None:
        """Tells the producer that this consumer has read the stage."""
        self.free[name][stage].arrive(predicate=self.one_thread)

    def store(self, index: Value, out: Registers) -> None:
        """Writes outputs [64, 80]. The copy drops rows and columns that the array does not have."""
        row, head, first = self.coordinates(index)
        first = arith.addi(first, arith.muli(_index(self.warpgroup), mgpu.c(ROWS, ir.IndexType.get())))
        self.ctx.await_async_copy(0, await_read_only=True)  # of the last item
        out, staged = out.astype(self.dtype()), [_at(x, self.warpgroup) for x in self.memory.out]
        for target, (column, columns, swizzle) in zip(staged, PIECES, strict=True):
            out[:, column : column + columns].store_tiled(_tiles(target, columns), swizzle=swizzle)
        mgpu.commit_shared()
        queries = mgpu.c(self.shape.queries, ir.IndexType.get())
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, first, queries)):
            for target, (column, columns, swizzle) in zip(staged, PIECES, strict=True):
                self.ctx.async_copy(
                    src_ref=target, dst_ref=self.out, swizzle=swizzle,
                    gmem_slice=(row, mgpu.ds(first, ROWS), head, _columns(column, columns)),
                )  # fmt: skip

    def dtype(self) -> ir.Type:
        """Element type of inputs and outputs."""
        return ir.BF16Type.get() if self.shape.dtype == "bfloat16" else ir.F16Type.get()


def _whole_tiles(keys: int) -> int:
    """Keys rounded up to the 16 that tensor cores take at once."""
    return -(-keys // NARROW) * NARROW


def _halves(count: int) -> list[tuple[int, int]]:
    middle = count // 2 // NARROW * NARROW
    return [(0, middle), (middle, count)] if middle else [(0, count)]


def _int(value: int) -> Value:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _float(value: float) -> Value:
    return mgpu.c(float(value), ir.F32Type.get())


def _index(value: Value) -> Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _splat(value: float, shape: tuple[int, ...], layout: mgpu.TiledLayout = mgpu.WGMMA_LAYOUT) -> Registers:
    return mgpu.FragmentedArray.splat(_float(value), shape, layout)


def _at(ref: Value, *index: Value | int) -> Value:
    """The slice of a buffer at these leading indices."""
    return mgpu.memref_slice(ref, tuple(x if isinstance(x, int) else _index(x) for x in index))


def _first(ref: Value, rows: int) -> Value:
    return ref if ir.MemRefType(ref.type).shape[0] == rows else mgpu.memref_slice(ref, slice(0, rows))


def _columns(first: int, count: int) -> mgpu.DynamicSlice:
    return mgpu.ds(mgpu.c(first, ir.IndexType.get()), count)


def _tiles(ref: Value, columns: int) -> Value:
    """[rows, columns] as the tiles [rows / 8, 1, 8, columns] that tensor cores read."""
    ref = mgpu.memref_unfold(mgpu.memref_unfold(ref, 1, (None, columns)), 0, (None, 8))
    return mgpu.memref_transpose(ref, (0, 2, 1, 3))
