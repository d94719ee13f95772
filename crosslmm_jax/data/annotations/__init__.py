"""Annotation files to rows: a mixture lists data sets, each in one of several formats.

mixture.py        YAML -> DatasetSpec (`read_mixture`); DatasetSpec -> rows (`read_rows`)
strategies.py     which rows of a data set are used (`sampling_strategy`)
formats/          one file per data format; its docstring says how to add one
detect_format.py  the format of files whose mixture names none
rows.py           Row, DatasetSpec, and the checks that all formats share
options.py        settings of a format
json_files.py     reading JSON and JSONL, patterns of files
json_stream.py    the values of a JSON list, one at a time
parquet_files.py  opening Parquet files
"""

from crosslmm_jax.data.annotations.mixture import (
    annotation_files,
    make_row,
    read_entries,
    read_mixture,
    read_rows,
)
from crosslmm_jax.data.annotations.rows import MODALITIES, DatasetSpec, Entry, Row

__all__ = [
    "MODALITIES", "DatasetSpec", "Entry", "Row", "annotation_files", "make_row", "read_entries",
    "read_mixture", "read_rows",
]  # fmt: skip
