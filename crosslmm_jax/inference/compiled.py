"""The programs that answer questions, for the static shapes of `shapes`.

Parameters have separate layers, as `separate_layers` makes them. Only `generate` donates an argument. So all
questions about a video share its prefix, and an answer that fails leaves it as it was.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from crosslmm_jax.batch import Batch, RowOrNone
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.inference.generate import Generation, RowSettings, everywhere, generate, start
from crosslmm_jax.inference.shapes import QUESTION_TOKENS, STEPS, PromptShape, writes_in_place
from crosslmm_jax.model import CrossLMM, KVCache, VideoCache, Visual, apply, kv_width
from crosslmm_jax.parallel import activation_rules, program

_ENCODING = ("encoder", "projector")  # parts of the parameters


class _FrozenRules(dict):
    """Rules as a hashable value, so that a model can be a static argument."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=str)))


def _of_encoder(params: PyTree) -> PyTree:
    """The parameters that encoding reads. Each array that a program is given makes it start later."""
    return {name: params[name] for name in _ENCODING}


def _of_decoder(params: PyTree) -> PyTree:
    """The parameters that everything else reads."""
    return {name: part for name, part in params.items() if name not in _ENCODING}


class Compiled:
    """The programs of one model on one mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        """One device runs without sharding requests; several follow the table of logical axes."""
        rules = _FrozenRules(activation_rules()) if mesh.size > 1 else None
        self.model = CrossLMM(config, rules, stacked=False)
        self.mesh = mesh
        self._blank: dict[tuple[int, ...], Visual] = {}

    def prepare(
        self, params: PyTree, shape: PromptShape, *, frames_at_once: int, image_size: int, vocab_size: int
    ) -> None:
        """Compiles, or reads from disk, all programs that one video of `shape` needs, at the same time.

        Needs shapes only, so it can run while the weights are read. For one device: on several, the layout of
        what a program returns is not known before it is compiled.

        Args:
          params: the parameters, or their shapes.
          shape: of the prompt.
          frames_at_once: frames that the encoder takes at a time.
          image_size: R.
          vocab_size: the tokenizer's.
        """
        here = NamedSharding(self.mesh, PartitionSpec())

        def shapes_of(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

        def compile_it(lowered_later: Callable[[], jax.stages.Lowered]) -> None:
            with jax.set_mesh(self.mesh):
                lowered_later().compile()

        model, tokens = self.model, np.zeros((1, QUESTION_TOKENS), np.int32)
        of_encoder, params = shapes_of(_of_encoder(params)), shapes_of(_of_decoder(params))
        counts, rows = np.ones(1, np.int32), RowSettings.of()
        length = shape.text + shape.frames * model.config.merge.tokens_per_frame
        prompt, slots = np.zeros((1, length), np.int32), np.arange(length - shape.text, dtype=np.int32)[None]
        batch = Batch.create(tokens=prompt, visual_slots=slots, visible_frames=prompt)
        batch = batch._replace(visible_frames=RowOrNone(prompt))
        frames = np.zeros((1, frames_at_once, image_size, image_size, 3), np.uint8)
        encoding, prefilling = program(_encode), program(_prefill, "shape")
        with ThreadPoolExecutor() as pool, jax.set_mesh(self.mesh):
            # Tracing is python, one at a time; what follows runs in parallel.
            compiled = [pool.submit(compile_it, lambda: encoding.lower(model, of_encoder, frames))]
            part = shapes_of(encoding.eval_shape(model, of_encoder, frames))
            parts = (part,) * (shape.frames // frames_at_once)
            if writes_in_place(shape.frames):
                parts = (shapes_of(_no_tokens.eval_shape(model, frames=shape.frames)),)
                written = parts[0], part, np.int32(0)
                compiled += [
                    pool.submit(compile_it, lambda: _no_tokens.lower(model, frames=shape.frames)),
                    pool.submit(compile_it, lambda: _keep.lower(model, *written)),
                ]
            prompts = (parts,), batch, counts
            cache = shapes_of(prefilling.eval_shape(model, params, *prompts, shape=shape))
            compiled += [
                pool.submit(compile_it, lambda: prefilling.lower(model, params, *prompts, shape=shape))
            ]
            question = cache.t2v, cache._replace(t2v=None), tokens, counts, rows
            *_, state = _extend.eval_shape(model, params, *question, vocab_size=vocab_size)
            state, same = shapes_of(state), {"vocab_size": vocab_size}
            compiled += [pool.submit(compile_it, lambda: _extend.lower(model, params, *question, **same))]
            answer = cache.t2v, state, rows
            compiled += [
                pool.submit(compile_it, lambda: generate.lower(model, params, *answer, steps=STEPS, **same))
            ]
        for future in compiled:
            future.result()

    def encode(self, params: PyTree, frames: np.ndarray) -> Visual:
        """uint8[B, f, R, R, 3], f frames of each video, to their compact and original tokens."""
        with jax.set_mesh(self.mesh):
            return program(_encode)(self.model, _of_encoder(params), frames)

    def blank(self, params: PyTree, shape: tuple[int, ...]) -> Visual:
        """The tokens of black frames uint8[shape], which serve as padding."""
        if shape not in self._blank:
            self._blank[shape] = self.encode(params, np.zeros(shape, np.uint8))
        return self._blank[shape]

    def prefill(
        self, params: PyTree, parts: Sequence[tuple[Visual, ...]], batch: Batch[np.ndarray],
        counts: np.ndarray, shape: PromptShape,
    ) -> KVCache:  # fmt: skip
        """Runs prompts.

        Args:
          params: the parameters.
          parts: for each of B rows the tokens of its F frames, some frames each.
          batch: the prompts, padded to `shape`.
          counts: int32[B], tokens that are not padding.
          shape: of the prompt and of the cache.
        """
        with jax.set_mesh(self.mesh):
            prefilling, of_decoder = program(_prefill, "shape"), _of_decoder(params)
            return prefilling(self.model, of_decoder, tuple(parts), batch, counts, shape=shape)

    def empty(self, size: int, frames: int) -> KVCache:
        """A cache that holds nothing, with room for `size` tokens and `frames` frames."""
        with jax.set_mesh(self.mesh):
            return _empty(self.model, size=size, frames=frames)

    def blank_tokens(self, frames: int) -> Visual:
        """Room for the tokens of so many frames, all zero."""
        with jax.set_mesh(self.mesh):
            return _no_tokens(self.model, frames=frames)

    def keep(self, kept: Visual, new: Visual, first: int) -> Visual:
        """`kept` with the tokens of new frames from frame `first` on. `kept` is donated."""
        with jax.set_mesh(self.mesh):
            return _keep(self.model, kept, new, np.int32(first))

    def append(self, params: PyTree, cache: KVCache, kept: Visual, new: Visual, count: int) -> KVCache:
        """Adds frames to what `cache` holds; see `CrossLMM.append`.

        Args:
          params: the parameters.
          cache: left as it is.
          kept: the tokens of all frames from the first in the cache to the last new one, and padding.
          new: the tokens of n frames, which are in `kept` too.
          count: how many of them are real.
        """
        with jax.set_mesh(self.mesh):
            appending, of_decoder = program(_append), _of_decoder(params)
            return appending(self.model, of_decoder, cache, kept.originals, new.compact, np.int32(count))

    def read(
        self, params: PyTree, cache: KVCache, questions: Sequence[np.ndarray], rows: RowSettings, *,
        vocab_size: int,
    ) -> tuple[Int[Array, " b"], Float[Array, "b v"], Generation]:  # fmt: skip
        """Adds a question per row to what `cache` holds, and draws the first tokens of the answers.

        Args:
          params: the parameters.
          cache: left as it is. With fewer rows than questions, each row serves neighbouring questions.
          questions: int32[n] each.
          rows: settings of each row.
          vocab_size: the tokenizer's.

        Returns:
          int32[B] first tokens, float32[B, V] logits that they were drawn from, and the state for `generate`.
        """
        of_text, of_decoder = cache._replace(t2v=None), _of_decoder(params)
        with jax.set_mesh(self.mesh):
            for tokens, counts in parts_of(questions):
                first, logits, state = _extend(
                    self.model, of_decoder, cache.t2v, of_text, tokens, counts, rows, vocab_size=vocab_size
                )
                of_text = state.cache
        return first, logits, state

    def generate(
        self, params: PyTree, t2v: VideoCache | None, state: Generation, rows: RowSettings, *, steps: int,
        vocab_size: int,
    ) -> tuple[Int[Array, "b s"], Bool[Array, " b"], Generation]:  # fmt: skip
        """Up to `steps` further tokens per row; see `generate.generate`. `state` is donated."""
        with jax.set_mesh(self.mesh):
            return generate(
                self.model, _of_decoder(params), t2v, state, rows, steps=steps, vocab_size=vocab_size
            )

    def score(
        self, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: np.ndarray, targets: np.ndarray,
        *, vocab_size: int,
    ) -> Float[Array, "b t"]:  # fmt: skip
        """Log-probabilities of `targets` after what `cache` holds; see `CrossLMM.score`.

        The one row of `cache` serves all rows of `tokens`.
        """
        with jax.set_mesh(self.mesh):
            return _score(self.model, _of_decoder(params), t2v, cache, tokens, targets, vocab_size=vocab_size)

    def observe(self, params: PyTree, cache: KVCache, ids: np.ndarray) -> Float[Array, "x b f p"]:
        """T2V attention of the last token of `ids`, which follow what `cache` holds."""
        *before, (tokens, counts) = parts_of([ids])
        with jax.set_mesh(self.mesh):
            rows = RowSettings.of()
            of_text, params = cache._replace(t2v=None), _of_decoder(params)
            for part in before:
                *_, state = _extend(self.model, params, cache.t2v, of_text, *part, rows, vocab_size=1)
                of_text = state.cache
            return _observe(self.model, params, cache.t2v, of_text, tokens, counts)

    def resize(self, cache: KVCache, size: int) -> KVCache:
        """`cache` with room for `size` tokens."""
        with jax.set_mesh(self.mesh):
            return _resize(cache._replace(t2v=None), size)._replace(t2v=cache.t2v)


def parts_of(questions: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Questions in parts: int32[B, QUESTION_TOKENS] tokens, and int32[B] how many of each row are real.

    Only the last part has tokens of every question, and it alone gives logits.
    """
    longest = max(len(ids) for ids in questions)
    parts = []
    for begin in range(-(-longest // QUESTION_TOKENS) * QUESTION_TOKENS, 0, -QUESTION_TOKENS):
        tokens = np.zeros((len(questions), QUESTION_TOKENS), np.int32)
        counts = np.zeros(len(questions), np.int32)
        for row, ids in enumerate(questions):
            ids = ids[max(0, len(ids) - begin) : max(0, len(ids) - begin + QUESTION_TOKENS)]
            tokens[row, : len(ids)], counts[row] = ids, len(ids)
        parts.append((tokens, counts))
    return parts


def _encode(model: CrossLMM, params: PyTree, frames: Array) -> Visual:
    return apply(model, params, CrossLMM.encode, frames)


def _prefill(
    model: CrossLMM, params: PyTree, parts: tuple[tuple[Visual, ...], ...], batch: Batch[Array],
    counts: Array, *, shape: PromptShape,
) -> KVCache:  # fmt: skip
    rows = [jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *of_row) for of_row in parts]
    visual = jax.tree.map(lambda *x: jnp.concatenate(x, axis=0), *rows)
    _, cache = apply(
        model, params, CrossLMM.prefill, visual, batch, counts,
        cache_size=shape.cache_tokens, cache_frames=shape.cache_frames,
    )  # fmt: skip
    return cache._replace(num_tokens=everywhere(model, cache.num_tokens))


@functools.partial(jax.jit, static_argnames=("model", "frames"))
def _no_tokens(model: CrossLMM, *, frames: int) -> Visual:
    config, dtype = model.config, jnp.dtype(model.config.compute_dtype)
    compact = jnp.zeros((1, frames * config.merge.tokens_per_frame, config.decoder.width), dtype)
    return Visual(compact, jnp.zeros((1, frames, config.vision.num_patches, kv_width(config)), dtype))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="kept")
def _keep(model: CrossLMM, kept: Visual, new: Visual, first: Array) -> Visual:
    write, tokens = jax.lax.dynamic_update_slice_in_dim, model.config.merge.tokens_per_frame
    compact = write(kept.compact, new.compact, first * tokens, axis=1)
    return Visual(compact, write(kept.originals, new.originals, first, axis=1))


@functools.partial(jax.jit, static_argnames=("model", "size", "frames"))
def _empty(model: CrossLMM, *, size: int, frames: int) -> KVCache:
    return KVCache.empty(model.config, size, frames)


def _append(
    model: CrossLMM, params: PyTree, cache: KVCache, originals: Array, compact: Array, count: Array
) -> KVCache:
    # As they come from the encoder they are sharded over devices by their frames, for which XLA partitions
    # the attention of a few frames wrongly where heads are sharded too: it fails to compile.
    new = Visual(everywhere(model, compact), originals)
    cache = apply(model, params, CrossLMM.append, cache, new, count)
    return cache._replace(num_tokens=everywhere(model, cache.num_tokens))


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def _extend(
    model: CrossLMM, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: Array, counts: Array,
    rows: RowSettings, *, vocab_size: int,
) -> tuple[Int[Array, " b"], Float[Array, "b v"], Generation]:  # fmt: skip
    cache = cache.repeated(len(tokens) // len(cache.num_tokens))._replace(t2v=t2v)
    logits, cache = apply(model, params, CrossLMM.extend, cache, tokens, counts)
    none = jnp.zeros(len(tokens), jnp.int32)
    state = start(logits, cache._replace(t2v=None), rows, none, vocab_size=vocab_size)
    return everywhere(model, state.token), everywhere(model, logits), state


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def _score(
    model: CrossLMM, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: Array, targets: Array,
    *, vocab_size: int,
) -> Float[Array, "b t"]:  # fmt: skip
    cache = cache.repeated(len(tokens))._replace(t2v=t2v)
    scores = apply(model, params, CrossLMM.score, cache, tokens, targets, vocab_size=vocab_size)
    return everywhere(model, scores)


@functools.partial(jax.jit, static_argnames="model")
def _observe(
    model: CrossLMM, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: Array, counts: Array
) -> Float[Array, "x b f p"]:
    maps = apply(model, params, CrossLMM.observe, cache._replace(t2v=t2v), tokens, counts)
    return everywhere(model, maps)


@functools.partial(jax.jit, static_argnames="size")
def _resize(cache: KVCache, size: int) -> KVCache:
    return cache.resized(size)
