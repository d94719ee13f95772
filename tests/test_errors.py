"""What a row or medium that cannot be used says, wherever it is carried."""

import json
import pickle
from pathlib import PurePosixPath
from typing import get_args

from crosslmm_jax.errors import REASONS, DataError, Fault, Reason


def test_a_data_error_carries_its_fault_between_processes() -> None:
    error = DataError(PurePosixPath("a.mp4"), "corrupt", "is damaged; fetch it again", "a.mp4")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert one.fault == Fault("a.mp4", "corrupt", "is damaged; fetch it again", "a.mp4")
        assert str(one) == "a.mp4: is damaged; fetch it again"


def test_a_line_of_bad_jsonl_is_the_fault() -> None:
    fault = Fault("a.json: row 3", "missing", "é.mp4: no such file", "é.mp4", "a", 3)
    assert Fault(**json.loads(fault.line())) == fault
    assert list(json.loads(fault.line())) == ["dataset", "row", "path", "reason", "where", "detail"]
    assert "é" in fault.line()


def test_every_reason_is_described() -> None:
    assert tuple(REASONS) == get_args(Reason)
