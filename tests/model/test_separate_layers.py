"""Separate layers, as inference reads them, against the stacks that training scans."""

import collections
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model import CrossLMM, decoder, encoder, init_params, logical_axes, ops, separate_layers
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.parallel.sharding import param_shardings


def leaves(tree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("every,offset", [(2, 0), (3, 1), (1, 2)])
def test_the_model_is_the_same(tiny_config, replace_config, make_batch, every, offset):
    placement = {"cross_attn_every": every, "cross_attn_offset": offset}
    config = replace_config(tiny_config, cross_attention=placement, decoder={"num_layers": 5})
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, frames=3, text=9, valid_frames=(3, 1))
    expected = jax.jit(CrossLMM(config).apply)({"params": params}, batch)
    got = jax.jit(CrossLMM(config, stacked=False).apply)({"params": separate_layers(params)}, batch)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_prefill_and_decode_are_the_same(tiny_config, make_batch):
    params = init_params(tiny_config, jax.random.key(0))
    batch = make_batch(tiny_config, frames=3, text=7)
    counts = np.full(2, batch.tokens.shape[1], np.int32)
    results = []
    for stacked in (True, False):
        model = CrossLMM(tiny_config, stacked=stacked)
        variables = {"params": params if stacked else separate_layers(params)}
        visual = model.apply(variables, batch.frames, method="encode")
        logits, cache = model.apply(variables, visual, batch, counts, cache_size=20, method="prefill")
        more, cache = model.apply(
            variables, cache, np.array([[5], [7]]), np.ones(2, np.int32), method="extend"
        )
        results.append((logits, more, cache))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_every_entry_is_kept_under_its_layer(tiny_config):
    params = init_params(tiny_config, jax.random.key(0))
    separated = leaves(separate_layers(params))
    for path, stack in leaves(params).items():
        before, found, name = path.rpartition("['layers']")
        if not found and not path.startswith(("['v2v']", "['t2v']")):
            assert separated.pop(path) is stack
            continue
        before, name = (path[: path.index("]") + 1], path[path.index("]") + 1 :]) if not found else (
            before + found, name)  # fmt: skip
        for index, layer in enumerate(stack):
            np.testing.assert_array_equal(separated.pop(f"{before}['{index}']{name}"), layer)
    assert not separated


def test_the_tree_is_the_one_that_the_module_declares(tiny_config):
    made = jax.eval_shape(
        lambda: CrossLMM(tiny_config, stacked=False).init(jax.random.key(0), method="declare")
    )
    made = jax.tree.map(lambda box: box.value, made["params"], is_leaf=lambda x: hasattr(x, "value"))
    separated = separate_layers(init_params(tiny_config, jax.random.key(0)))
    assert jax.tree.structure(made) == jax.tree.structure(separated)
    jax.tree.map(lambda a, b: None if a.shape == b.shape else pytest.fail(f"{a} {b}"), made, separated)


@pytest.mark.slow
def test_consuming_frees_each_stack_and_nothing_else(tiny_config):
    params = init_params(tiny_config, jax.random.key(0))
    kept = separate_layers(params)
    assert params["v2v"] and params["decoder"]["layers"]
    stacks = {path: weakref.ref(leaf) for path, leaf in leaves(params).items()}
    gone = separate_layers(params, consume=True)
    assert (
        not params["v2v"] and not params["decoder"]["layers"] and params["decoder"]["embedding"] is not None
    )
    gc.collect()
    for path, stack in stacks.items():
        was_stacked = "['layers']" in path or path.startswith(("['v2v']", "['t2v']"))
        assert (stack() is None) == was_stacked, path
    jax.tree.map(np.testing.assert_array_equal, kept, gone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "tensor": 8}, {"data": 1, "fsdp": 4, "tensor": 2}], ids=str)
def test_layers_stay_on_their_devices_and_answer_alike(tiny_config, make_batch, mesh):
    params = init_params(tiny_config, jax.random.key(0))
    batch = make_batch(tiny_config, batch=8, frames=4, text=6)
    expected = jax.jit(CrossLMM(tiny_config).apply)({"params": params}, batch)
    devices = make_mesh(MeshConfig(**mesh))
    placed = jax.device_put(params, param_shardings(logical_axes(tiny_config), params, devices))
    separated = separate_layers(placed)
    stack, layer = placed["decoder"]["layers"]["w_up"], separated["decoder"]["layers"]["1"]["w_up"]
    assert layer.sharding.spec == jax.sharding.PartitionSpec(*stack.sharding.spec[1:])
    assert layer.addressable_shards[0].data.nbytes * 8 == layer.nbytes
    with jax.set_mesh(devices):
        model = CrossLMM(tiny_config, activation_rules(), stacked=False)
        got = jax.jit(model.apply)({"params": separated}, batch)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 3), (8,), (2, 5)])
def test_products_of_few_rows_are_padded_on_a_gpu_alone(monkeypatch, shape, precise):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*shape, 24)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(24, 40)), jnp.bfloat16)
    expected = ops.matmul(x, weight, precise=precise)
    assert "pad" not in str(jax.make_jaxpr(lambda x: ops.matmul(x, weight))(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = ops.matmul(x, weight, precise=precise)
    assert got.shape == (*shape, 40) and got.dtype == (jnp.float32 if precise else jnp.bfloat16)
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=1e-2, atol=1e-2)
    assert ("pad" in str(jax.make_jaxpr(lambda x: ops.matmul(x, weight))(x))) == (np.prod(shape) < 8)


@pytest.mark.slow
@pytest.mark.parametrize("batch,length", [(1, 1), (1, 5), (3, 1), (3, 3)])
def test_text_after_a_cache_is_padded_once_on_a_gpu(
    monkeypatch, tiny_config, replace_config, make_batch, batch, length
):
    """Padding before the layers changes neither logits nor cache, and replaces other padding."""
    config = replace_config(tiny_config, attention="reference")
    model, params = CrossLMM(config, stacked=False), separate_layers(init_params(config, jax.random.key(0)))
    prompt = make_batch(config, batch=batch, frames=3, text=7)
    counts = np.full(batch, prompt.tokens.shape[1], np.int32)
    visual = model.apply({"params": params}, prompt.frames, method="encode")
    _, cache = model.apply({"params": params}, visual, prompt, counts, cache_size=24, method="prefill")
    cache = cache._replace(num_tokens=cache.num_tokens - np.arange(batch))  # a different place in each row
    tokens = np.random.default_rng(0).integers(0, 100, (batch, length)).astype(np.int32)
    new = np.arange(length, length - batch, -1).clip(1).astype(np.int32)

    def extend(cache, tokens):
        return model.apply({"params": params}, cache, tokens, new, method="extend")

    expected = jax.jit(extend)(cache, tokens)
    assert "_pad" not in jax.jit(extend).lower(cache, tokens).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    padded = jax.jit(lambda *x: extend(*x))  # a new function: the other is compiled already
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), padded(cache, tokens), expected)
    assert 0 < len(config.cross_attention_layers) < config.decoder.num_layers
    pads = padded.lower(cache, tokens).as_text().count("call @_pad")
    # A layer is lowered once with and once without cross-attention.
    embedding_and_logits, attended = 1 + (batch < ops.MIN_ROWS), 2 + 1
    assert pads == (embedding_and_logits + attended if batch * length < ops.MIN_ROWS else 1)


@pytest.mark.parametrize("num_layers", [4, 12])
def test_a_layer_is_traced_once_with_and_once_without_cross_attention(
    monkeypatch, tiny_config, replace_config, make_batch, num_layers
):
    """At any depth: tracing and lowering layer by layer took seconds per program at 28 layers."""
    config = replace_config(tiny_config, decoder={"num_layers": num_layers})
    assert 0 < len(config.cross_attention_layers) < num_layers and config.vision.depth > 1
    model = CrossLMM(config, stacked=False)
    params = separate_layers(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    prompt, counts = make_batch(config, frames=3, text=7), np.full(2, 10, np.int32)
    traced = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            traced.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(encoder, "encoder_layer")
    count(decoder, "self_attention")
    count(decoder, "mlp")

    def traces_of(method, *args, **kwargs):
        traced.clear()
        result = jax.eval_shape(
            lambda params, args: model.apply({"params": params}, *args, method=method, **kwargs), params, args
        )
        return result, collections.Counter(traced)

    visual, found = traces_of("encode", prompt.frames)
    assert found == {"encoder_layer": 1}
    (_, cache), found = traces_of("prefill", visual, prompt, counts, cache_size=64)
    assert found == {"self_attention": 2, "mlp": 2}
    for method in ("extend", "observe"):
        _, found = traces_of(method, cache, np.zeros((2, 3), np.int32), np.full(2, 3, np.int32))
        assert found == {"self_attention": 2, "mlp": 2}, method


def test_a_missing_or_misshapen_parameter_is_named(tiny_config, make_batch):
    model = CrossLMM(tiny_config, stacked=False)
    params = separate_layers(init_params(tiny_config, jax.random.key(0)))
    frames = make_batch(tiny_config, frames=1).frames
    layer = params["encoder"]["layers"]["1"]
    w1 = layer.pop("w1")
    with pytest.raises(ValueError, match=r"parameter encoder\.layers\.1\.w1 is missing"):
        model.apply({"params": params}, frames, method="encode")
    layer["w1"] = w1[:-1]
    with pytest.raises(ValueError, match=r"layers\.1\.w1 has shape \(47, 96\) instead of \(48, 96\)"):
        model.apply({"params": params}, frames, method="encode")
