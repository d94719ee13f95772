"""The MODEL folder: what is written is read back, and every defect is named."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from crosslmm_jax.config import MeshConfig, SamplingConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params, logical_axes
from crosslmm_jax.model_folder import (
    END_TOKENS,
    Generation,
    Reader,
    load_model_config,
    load_processor,
    load_weights,
    save_model_folder,
    weights,
    write_settings,
)
from crosslmm_jax.parallel import make_mesh, param_shardings
from crosslmm_jax.presets import tiny


@pytest.fixture(scope="module")
def params():
    """Arbitrary values in the shapes of the tiny preset."""
    shapes = jax.eval_shape(lambda key: init_params(tiny(), key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "unrelated.bin").write_text("x")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, params, tokenizer):
    """A MODEL folder; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save(folder, params, tokenizer)
    return folder


@pytest.fixture
def copied(tmp_path, written):
    return shutil.copytree(written, tmp_path / "copy")


def save(folder, params, tokenizer, **changes) -> None:
    arguments = {
        "config": tiny(), "params": params, "tokenizer_folder": tokenizer, "system_prompt": "Be brief.",
        "sampling": SamplingConfig(policy="fps", frames=8, fps=0.5),
    }  # fmt: skip
    save_model_folder(folder, **(arguments | changes))


def shapes_of(params) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in weights.flatten(params).items()}


def assert_equal(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_disk_that_cannot_reserve_space(tmp_path, params, tokenizer, monkeypatch, code) -> None:
    def refuse(*_) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    save(tmp_path / "model", params, tokenizer)
    assert_equal(load_weights(tmp_path / "model", tiny()), params)


def test_training_keeps_how_answers_end_and_are_drawn(tmp_path, params, tokenizer, caplog) -> None:
    first, generation = tmp_path / "first", Generation(do_sample=True, temperature=0.7, top_k=20)
    save(first, params, tokenizer)
    ends = ("<|im_end|>", "!")
    processor = dataclasses.replace(load_processor(first), end_tokens=ends, generation=generation)
    write_settings(first, tiny(), processor)
    save(tmp_path / "trained", params, tokenizer, started_from=first)
    assert load_processor(tmp_path / "trained") == processor
    shutil.rmtree(first)
    save(tmp_path / "trained", params, tokenizer, started_from=first)
    assert load_processor(tmp_path / "trained").end_tokens == END_TOKENS and "first is gone" in caplog.text


def test_weights_are_readable_for_all(tmp_path, params, tokenizer) -> None:
    before = os.umask(0o077)
    try:
        save(tmp_path / "model", params, tokenizer)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_model_may_be_a_link_to_another_disk(tmp_path, params, tokenizer) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for prompt in ("First.", "Second."):
        save(tmp_path / "link", params, tokenizer, system_prompt=prompt)
        assert load_processor(tmp_path / "disk" / "model").system_prompt == prompt
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))


def test_round_trip(written, params) -> None:
    assert load_model_config(written) == tiny()
    processor = load_processor(written)
    assert processor.sampling == SamplingConfig(policy="fps", frames=8, fps=0.5)
    assert (processor.system_prompt, processor.image_size, processor.tokens_per_frame) == ("Be brief.", 32, 1)
    assert_equal(load_weights(written, tiny()), params)
    assert sorted(path.name for path in written.iterdir()) == [
        "config.json", "model.safetensors", "processor.json", "tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in written.parent.iterdir()] == ["model"]


def test_a_folder_from_before_there_were_end_tokens(copied) -> None:
    described = json.loads((copied / "processor.json").read_text())
    assert described.pop("end_tokens") == ["<|im_end|>", "<|endoftext|>"]
    (copied / "processor.json").write_text(json.dumps(described))
    assert load_processor(copied).end_tokens == ("<|im_end|>", "<|endoftext|>")


def test_bfloat16(tmp_path, params, tokenizer) -> None:
    save(tmp_path / "model", params, tokenizer, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    kept = load_weights(tmp_path / "model", tiny())
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    assert_equal(kept, rounded)
    wide = load_weights(tmp_path / "model", tiny(), dtype="float32")
    assert_equal(wide, jax.tree.map(lambda x: x.astype(np.float32), rounded))


def test_shards_and_index(tmp_path, params) -> None:
    weights.write_weights(tmp_path, params, dtype="float32", max_shard_bytes=200_000)
    index = json.loads((tmp_path / weights.INDEX_FILE).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all(file.stat().st_size < max(200_000, largest) + 10_000 for file in files)
    assert_equal(weights.read_weights(tmp_path, shapes_of(params)), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_equal_those_of_the_library(tmp_path, params, dtype: str) -> None:
    weights.write_weights(tmp_path, params, dtype=dtype)
    tensors = {name: leaf.astype(dtype) for name, leaf in weights.flatten(params).items()}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "np"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_only_the_parts_of_a_process_are_read(tmp_path) -> None:
    values = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    params = {"a": values, "b": values.astype(jnp.bfloat16), "scalar": np.float32(3), "empty": values[:0]}
    weights.write_weights(tmp_path, params, dtype="bfloat16")
    reader = Reader(tmp_path / "model.safetensors")
    everything = slice(None)
    for index in ((everything, slice(1, 2), everything, slice(3, 5)), (slice(1, 2), *3 * (everything,))):
        for name in ("a", "b"):
            np.testing.assert_array_equal(reader.read_part(name, index), params["b"][index])
    assert reader.read_part("scalar", ()) == 3 and reader.read_part("empty", 4 * (everything,)).size == 0
    reader.close()


def test_sharded_in_and_out(tmp_path, written, params, tokenizer) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = param_shardings(logical_axes(tiny()), params, mesh)
    sharded = load_weights(written, tiny(), shardings=shardings)
    assert_equal(sharded, params)
    leaves = zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings), strict=True)
    assert all(leaf.sharding == sharding for leaf, sharding in leaves)
    save(tmp_path / "again", sharded, tokenizer)
    first, second = ((folder / weights.SINGLE_FILE).read_bytes() for folder in (written, tmp_path / "again"))
    assert first == second


@pytest.fixture
def pieces(monkeypatch) -> list[tuple[str, int]]:
    """Name and bytes of every piece that `read_weights` reads, in pieces of a few rows."""
    found, read_into = [], Reader.read_into

    def recorded(self, out, name, index) -> None:
        found.append((name, out.nbytes))
        read_into(self, out, name, index)

    monkeypatch.setattr(Reader, "read_into", recorded)
    monkeypatch.setattr(weights, "PIECE_BYTES", 4096)
    return found


def test_every_byte_is_read_once_whatever_the_mesh(written, params, pieces) -> None:
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    meshes = (MeshConfig(data=1, fsdp=4, tensor=2), MeshConfig(data=8), MeshConfig(data=1, tensor=8))
    for config in (None, *meshes):
        pieces.clear()
        shardings = config and param_shardings(logical_axes(tiny()), params, make_mesh(config))
        assert_equal(load_weights(written, tiny(), shardings=shardings), params)
        assert sum(nbytes for _, nbytes in pieces) == total, config
        assert len(pieces) > 2 * len(jax.tree.leaves(params)), "large tensors in pieces"


def test_a_process_reads_what_its_devices_hold(written, params, pieces) -> None:
    name = "decoder.embedding"
    shape = params["decoder"]["embedding"].shape
    rows = slice(shape[0] // 2, shape[0])  # one of two processes

    class Half:
        def addressable_devices_indices_map(self, shape):
            return {0: (rows, slice(0, shape[1] // 2)), 1: (rows, slice(shape[1] // 2, None)),
                    2: (rows, slice(0, shape[1] // 2))}  # fmt: skip

    with weights.open_weights(written, shapes_of(params)) as readers, ThreadPoolExecutor(4) as pool:
        tensor = weights._Reading(readers[name], name, Half(), "bfloat16")
        tensor.start(pool)
        for future in tensor._futures:
            future.result()
    expected = params["decoder"]["embedding"][rows].astype(jnp.bfloat16)
    assert sum(nbytes for _, nbytes in pieces) == tensor.nbytes == expected.nbytes
    np.testing.assert_array_equal(np.concatenate(list(tensor._buffers.values()), axis=1), expected)


def test_threads_read_at_once_and_hold_a_bounded_part(written, params, pieces, monkeypatch) -> None:
    monkeypatch.setattr(weights, "HOST_BYTES", 300_000)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert largest < 300_000 < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2
    together, first = threading.Barrier(2), itertools.count()
    held, most = 0, 0
    read_into, start, array = Reader.read_into, weights._Reading.start, weights._Reading.array

    def meeting(self, *args) -> None:
        if next(first) < 2:
            together.wait(60)  # breaks, and fails, if one thread reads after the other
        read_into(self, *args)

    def starting(self, pool) -> None:
        nonlocal held, most
        held += self.nbytes
        most = max(held, most)
        start(self, pool)

    def moving(self):
        nonlocal held
        held -= self.nbytes
        return array(self)

    monkeypatch.setattr(Reader, "read_into", meeting)
    monkeypatch.setattr(weights._Reading, "start", starting)
    monkeypatch.setattr(weights._Reading, "array", moving)
    assert_equal(load_weights(written, tiny()), params)
    assert held == 0 and largest < most <= 300_000


@pytest.mark.parametrize("tensor", [1, 8])
def test_a_file_that_ends_while_it_is_read(copied, params, monkeypatch, tensor: int) -> None:
    mesh = make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
    shardings = param_shardings(logical_axes(tiny()), params, mesh)
    path, open_weights = copied / "model.safetensors", weights.open_weights

    @contextlib.contextmanager
    def shortened(folder, shapes):
        with open_weights(folder, shapes) as readers:
            os.truncate(path, path.stat().st_size // 2)
            yield readers

    monkeypatch.setattr(weights, "open_weights", shortened)
    with pytest.raises(UserError, match=r"model\.safetensors: ended inside [\w.]+; copy it again"):
        load_weights(copied, tiny(), shardings=shardings)


def test_all_defects_in_one_message(tmp_path, params) -> None:
    damaged = {part: dict(values) for part, values in params.items()}
    del damaged["v2v"]["gate"]
    damaged["decoder"]["final_norm"] = np.zeros(65, np.float32)
    damaged["decoder"]["extra"] = np.zeros((2, 3), np.float32)
    weights.write_weights(tmp_path, damaged, dtype="float32")
    with pytest.raises(UserError) as error:
        weights.read_weights(tmp_path, shapes_of(params))
    message = str(error.value)
    assert "\n" not in message
    assert "v2v.gate [2] is missing" in message
    assert "decoder.extra [2, 3] is unknown" in message
    assert "decoder.final_norm has shape [65] instead of [64]" in message


@pytest.mark.parametrize("name", ["config.json", "processor.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(copied, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_weights(copied, tiny())
    with pytest.raises(UserError, match=f"lacks {name}"):
        load_model_config(copied)


def test_truncated_weights(copied) -> None:
    path = copied / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes instead of \d+; it is truncated"):
        load_weights(copied, tiny())


def test_missing_shard(tmp_path, params) -> None:
    weights.write_weights(tmp_path, params, dtype="float32", max_shard_bytes=200_000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"names {gone.name}, which are missing"):
        weights.read_weights(tmp_path, shapes_of(params))


def test_index_does_not_lead_out_of_the_folder(tmp_path, params) -> None:
    (tmp_path / weights.INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="files beside it"):
        weights.read_weights(tmp_path, shapes_of(params))


def test_bad_field_in_config(copied) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    del config["decoder"]["rope_theta"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: field decoder\.rope_theta is missing"):
        load_model_config(copied)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is no readable JSON"):
        load_model_config(copied)


def test_failure_leaves_the_older_folder(copied, params, tmp_path) -> None:
    before = (copied / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        save(copied, jax.tree.map(np.zeros_like, params), tmp_path)
    assert (copied / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_replaces_an_older_model_but_nothing_else(copied, params, tokenizer, tmp_path) -> None:
    save(copied, jax.tree.map(np.zeros_like, params), tokenizer)
    assert not np.any(jax.tree.leaves(load_weights(copied, tiny()))[0])
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("x")
    with pytest.raises(UserError, match="no MODEL folder; it is left alone"):
        save(other, params, tokenizer)
    assert [path.name for path in other.iterdir()] == ["cat.png"]
