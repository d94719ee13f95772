"""Files that hold many media. A reference names the file, then "::" and the medium in it.

tar            members of tar files
array_record   records of ArrayRecord files
parquet_cells  cells of Parquet files
"""

from crosslmm_jax.data.media.archives.array_record import (
    FRAMES_PREFIX,
    is_record_file,
    mean_record_size,
    parse_example,
    read_record,
    read_values,
    value_member,
)
from crosslmm_jax.data.media.archives.parquet_cells import cell_member, is_parquet, mean_cell_size, read_cell
from crosslmm_jax.data.media.archives.tar import (
    is_tar,
    member_name,
    member_span,
    read_member,
    tar_member,
    walk_tar,
)

__all__ = [
    "FRAMES_PREFIX", "cell_member", "is_parquet", "is_record_file", "is_tar", "mean_cell_size",
    "mean_record_size", "member_name", "member_span", "parse_example", "read_cell", "read_member",
    "read_record", "read_values", "tar_member", "value_member", "walk_tar",
]  # fmt: skip
