"""A JSON list is read value by value: the same values and the same refusals as when it is read whole."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.data.annotations import json_stream
from crosslmm_jax.data.annotations.json_files import read_json_rows
from crosslmm_jax.data.annotations.json_stream import InvalidJsonError, NoListError, stream_list

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_VALUES = st.recursive(
    _LEAVES,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(), some, max_size=3),
    max_leaves=9,
)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(_VALUES, max_size=5), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]),
    damage=st.none() | st.tuples(st.integers(0, 400), st.sampled_from(['"', "]", ",", "x", "", "\n1", "-"])),
    piece=st.sampled_from([1, 2, 7, 1000]),
)  # fmt: skip
def test_the_values_of_any_list(rows, ascii_only, indent, damage, piece) -> None:
    text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    if damage is not None:
        place = damage[0] % (len(text) + 1)
        text = text[:place] + damage[1] + text[place + 1 :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "_PIECE", piece)
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(InvalidJsonError if text.lstrip()[:1] in ("[", "") else NoListError) as caught:
                list(stream_list(io.StringIO(text)))
            if isinstance(caught.value, InvalidJsonError) and error.msg != "Extra data":
                assert caught.value.line == error.lineno
            return
        if not isinstance(expected, list):
            with pytest.raises(NoListError):
                list(stream_list(io.StringIO(text)))
            return
        assert repr(list(stream_list(io.StringIO(text)))) == repr(
            expected
        )  # repr: NaN is not equal to itself


def test_a_long_list_is_never_in_memory(tmp_path: Path) -> None:
    """Read whole, it took about three times the size of the file."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A long answer. " * 20}]
    row = json.dumps({"id": 1, "video": "a.mp4", "conversations": turns})
    path = tmp_path / "rows.json"
    path.write_text("[" + ",\n".join([row] * 50_000) + "]")
    assert path.stat().st_size > 15e6
    tracemalloc.start()
    count = sum(1 for _ in read_json_rows(str(path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 50_000 and most < 8e6
