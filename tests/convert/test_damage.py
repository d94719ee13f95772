"""Headers, indices and configs with anything in them: a `UserError` that names the file, or a conversion."""

import copy
import json
import shutil
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.source.config import decoder_sizes, llava_sizes, vision_sizes
from crosslmm_jax.convert.source.files import open_source
from crosslmm_jax.convert.source.processor import image_settings
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder.safetensors_file import Reader, read_header

QUICK = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
JUNK = (
    None, True, -1, 0, 3.5, 10**40, float("nan"), float("inf"), "", "384", [], [384, 384], {}, {"height": 28},
    {"rope_type": 3}, {"rope_theta": "x"},
)  # fmt: skip


def write_header(path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(begin, end, shape=None, dtype="F32") -> dict:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 16)}, "b overlaps a"),
        ({"a": tensor(0, 16), "b": tensor(0, 16)}, "b overlaps a"),
        ({"a": tensor(0, 4), "b": tensor(8, 16)}, "b leaves a gap after a"),
        ({"a": tensor(4, 16)}, "a leaves a gap after the header"),
        ({"a": tensor(0, 12)}, "has 8[0-9] bytes instead of 7[0-9]|truncated"),
        ({"a": tensor(16, 0, shape=[-4])}, "no size"),
        ({"a": tensor(0, 16, shape=[-2, -2])}, "no size"),
        ({"a": tensor(0, 16, shape=[2.0, 2])}, "no size"),
        ({"a": tensor(0, 16, shape="22")}, "no size"),
        ({"a": tensor(0, 16, shape=[3])}, "do not fit its shape"),
        ({"a": tensor(0, 16, dtype="F8_E4M3", shape=[16])}, "1 tensor.s., such as a, have the type F8_E4M3"),
        ({"a": tensor(0, 16, dtype=["F32"])}, "has the type"),
        ({"a": tensor(0, 16) | {"data_offsets": [0, 8, 16]}}, "no whole safetensors"),
        ({"a": {"dtype": "F32"}}, "no whole safetensors"),
        ([], "no whole safetensors"),
        (b"[" * 100_000, "no whole safetensors"),
        (b"\xff\xfe", "no whole safetensors"),
    ],
)
def test_headers_that_do_not_describe_the_file(tmp_path, header, match) -> None:
    path = tmp_path / "some.safetensors"
    write_header(path, header, bytes(16))
    with pytest.raises(UserError, match=rf"some\.safetensors: .*({match})"):
        read_header(path)
    if "F8" not in match:  # the library reads types that no checkpoint of ours has
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load_file(path)


def test_headers_in_any_order_and_with_empty_tensors(tmp_path) -> None:
    path = tmp_path / "some.safetensors"
    header = {"b": tensor(4, 16), "empty": tensor(4, 4, shape=[0, 7]), "a": tensor(0, 4)}
    write_header(path, header, np.arange(4, dtype=np.float32).tobytes())
    assert list(read_header(path)) == ["a", "empty", "b"]
    reader, expected = Reader(path), safetensors.numpy.load_file(path)
    for name in header:
        np.testing.assert_array_equal(reader.read(name), expected[name], strict=True)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    safetensors.numpy.save_file(
        {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.float16)}, folder / "x.safetensors"
    )
    return folder / "x.safetensors"


@QUICK
@given(position=st.integers(0, 160), value=st.integers(0, 255), cut=st.integers(0, 3))
def test_any_byte_of_a_file_may_be_wrong(small_file, tmp_path, position, value, cut) -> None:
    """What we read, the library reads as well, and as the same."""
    data = bytearray(small_file.read_bytes())
    data[position % len(data)] = value
    path = tmp_path / "y.safetensors"
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        reader = Reader(path)
    except UserError as error:
        assert "y.safetensors" in str(error)
        return
    expected = safetensors.numpy.load_file(path)
    assert set(reader.entries) == set(expected)
    for name, tensor in expected.items():
        assert reader.read(name).tobytes() == tensor.tobytes()
    reader.close()


def swap(where: dict) -> None:
    first, last = sorted(where)[0], sorted(where)[-1]
    where[first], where[last] = where[last], where[first]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (swap, r"lm_head\.weight, model\.norm\.weight: in another file than it names"),
        (lambda where: where.pop("model.norm.weight"), r"model\.norm\.weight: not in it"),
        (
            lambda where: where.update(more=where["model.norm.weight"]),
            "more: missing in the file it names",
        ),
        (lambda where: where.update(more=3), "field weight_map is no object of file names"),
    ],
)
def test_an_index_that_is_not_of_these_files(sources, tmp_path, change, match) -> None:
    folder = shutil.copytree(sources.untied, tmp_path / "llm")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json: .*{match}"), open_source(folder):
        pass


@pytest.fixture(scope="module")
def configs(sources) -> dict:
    """kind -> (config.json, how its sizes are read)."""
    tower = vision_sizes(sources.vision)

    def original_sizes(folder):
        return llava_sizes(folder, has_head=True, tower=tower)

    found = {
        "vision": (sources.vision, vision_sizes), "two_tower": (sources.two_tower, vision_sizes),
        "llm": (sources.tied, decoder_sizes),
        "original": (sources.llava["original"], original_sizes),
        "hf": (sources.llava["hf"], lambda folder: llava_sizes(folder, has_head=True)),
    }  # fmt: skip
    return {kind: (json.loads((f / "config.json").read_text()), read) for kind, (f, read) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vision", "two_tower", "llm", "original", "hf"])
@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_any_field_of_a_config_may_hold_anything(configs, tmp_path, kind, junk) -> None:
    config, read = configs[kind]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read(tmp_path)  # as it is
    places = [(config, (name,)) for name in config]
    for outer in ("vision_config", "text_config", "rope_parameters"):
        places += [(config, (outer, name)) for name in config.get(outer) or {}]
    for _, keys in places:
        changed = copy.deepcopy(config)
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = junk
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            read(tmp_path)
        except UserError as error:
            assert str(tmp_path / "config.json") in str(error), keys


@pytest.mark.parametrize(
    ("kind", "keys", "value", "match"),
    [
        ("vision", ("hidden_size",), "48", "field hidden_size is '48'; it must be a whole number"),
        ("vision", ("image_size",), [28, 28], r"field image_size is \[28, 28\]; it must be a whole number"),
        ("llm", ("num_attention_heads",), 0, "num_heads is 0"),
        ("llm", ("num_hidden_layers",), True, "field num_hidden_layers is True"),
        (
            "llm",
            ("tie_word_embeddings",),
            "no",
            "field tie_word_embeddings is 'no'; it must be true or false",
        ),
        ("llm", ("rms_norm_eps",), "1e-6", "field rms_norm_eps is '1e-6'; it must be a number"),
        ("llm", ("rope_parameters",), "x", "field rope_parameters is 'x'; it must be an object"),
        ("hf", ("vision_config",), "so400m", "field vision_config is 'so400m' instead of an object"),
        ("hf", ("vision_feature_layer",), [-1, -2], "field vision_feature_layer is"),
        ("hf", ("text_config", "vocab_size"), 512.0, "field vocab_size is 512.0"),
        (
            "hf",
            ("text_config", "attention_dropout"),
            "x",
            "Qwen2Config rejects its fields .*attention_dropout",
        ),
    ],
)
def test_fields_of_another_type(configs, tmp_path, kind, keys, value, match) -> None:
    config, read = configs[kind]
    changed = copy.deepcopy(config)
    inner = changed if len(keys) == 1 else changed[keys[0]]
    inner[keys[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=match):
        read(tmp_path)


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_any_field_of_a_processor_may_hold_anything(tmp_path, junk) -> None:
    whole = {
        "size": {"height": 28, "width": 28}, "resample": 2, "image_mean": [0.4, 0.5, 0.6], "do_resize": True,
        "image_std": [0.2, 0.3, 0.4], "do_center_crop": False, "rescale_factor": 1 / 255,
    }  # fmt: skip
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"image_processor": whole}))
    image_settings(tmp_path, 28)  # as it is
    inside = [{"image_processor": whole | {name: junk}} for name in whole]
    inside += [{"image_processor": whole | {name: [junk] * 3}} for name in ("image_mean", "image_std")]
    for content in [*inside, {"image_processor": junk}]:
        path.write_text(json.dumps(content))
        try:
            image_settings(tmp_path, 28)
        except UserError as error:
            assert str(path) in str(error)


def test_a_conversion_stops_at_a_size_of_another_type(sources, tmp_path) -> None:
    folder = shutil.copytree(sources.tied, tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "5"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="field num_hidden_layers is '5'"):
        convert_from_hf(
            Request(vision=str(sources.vision), llm=str(folder)),
            tmp_path / "model",
            tokenizer=sources.tokenizer,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]
