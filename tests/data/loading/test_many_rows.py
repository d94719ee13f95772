"""What a row costs where there are millions: reading it, and its share of a start."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from paper_like import STAGE2, write_index

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index.probe import fingerprint
from crosslmm_jax.data.index.table import RowStore, open_index
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.text.tokenizer import Tokenizer

COPIES = 40


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An index of 40 tables of 16,384 rows."""
    folder = tmp_path_factory.mktemp("many") / "index"
    write_index(folder, STAGE2, rows=2**14, copies=COPIES, tokenizer=fingerprint(tokenizer))
    return folder


def test_a_shuffled_row_is_read_alone(many_rows: Path) -> None:
    """Decoding the thousand rows around it would take milliseconds."""
    store = RowStore(open_index(many_rows))
    numbers = np.random.default_rng(0).permutation(len(store))[:4000].tolist()
    whole = len(store) // COPIES
    for number in range(0, len(store), whole):
        store[number]  # maps every table
    begin = time.process_time()
    rows = [store[number] for number in numbers]
    seconds = (time.process_time() - begin) / len(numbers)
    assert seconds < 150e-6  # about 20 on an idle core
    # Data sets follow one another in a table; each counts its rows from 0.
    assert [row.where for row in rows] == [f"{row.dataset}.json: row {row.row}" for row in rows]
    assert len({(row.dataset, row.row) for row in rows}) > 3000
    assert all(len(row.turns[1].text) == 380 for row in rows)


def test_a_start_holds_a_few_bytes_per_row(many_rows: Path, tokenizer: Tokenizer) -> None:
    config = DataConfig(
        index=str(many_rows), tokenizer=str(tokenizer.folder), batch_size=64,
        sampling=SamplingConfig(policy="dynamic_fps1"),
    )  # fmt: skip
    Dataset(config, tokens_per_frame=9, image_size=32)  # imports what it needs
    tracemalloc.start()
    dataset = Dataset(config, tokens_per_frame=9, image_size=32)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = len(dataset.rows)
    assert rows > 650_000
    # 4 bytes for the kind of a row and 4 in the schedule, and what does not grow with the rows.
    assert kept < 8 * rows + 10e6 and most < 14 * rows + 60e6
