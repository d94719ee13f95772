"""One host of a run that only reads: what each row of its batches holds, as digests, in a JSON file.

    python tests/data/host_process.py CONFIG.json BEGIN END OUT.json

Joins the other hosts as training does (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID) and takes its part of
the batches BEGIN to before END.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import DataConfig, MeshConfig
from crosslmm_jax.config_io import from_dict
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.parallel import initialize_processes, make_mesh, row_shard, to_global

TOKENS_PER_FRAME, IMAGE_SIZE = 1, 32


def row_digests(batch: Batch[np.ndarray]) -> list[str]:
    """A digest of all that each row holds."""
    digests = []
    arrays = batch.arrays()
    for row in range(len(arrays["row_index"])):
        digest = hashlib.blake2b(digest_size=12)
        for name in sorted(arrays):
            part = np.ascontiguousarray(arrays[name][row])
            digest.update(f"{name} {part.shape} {part.dtype}".encode() + part.tobytes())
        digests.append(digest.hexdigest())
    return digests


def main(config: str, begin: str, end: str, out: str) -> None:
    """See the module's docstring."""
    initialize_processes()
    mesh = make_mesh(MeshConfig())
    index, count = row_shard(mesh)
    data = from_dict(DataConfig, json.loads(Path(config).read_text()), source=config)
    dataset = Dataset(data, tokens_per_frame=TOKENS_PER_FRAME, image_size=IMAGE_SIZE)
    iterator = BatchIterator(
        dataset, global_next_index=int(begin) * data.batch_size, shard_index=index, shard_count=count
    )
    batches, placed = [], []
    for number in range(int(begin), int(end)):
        batch = next(iterator)
        batches.append(row_digests(batch))
        if number < int(begin) + 3:
            whole: Any = to_global(batch, mesh, num_shards=count).row_index
            shards = whole.addressable_shards
            placed.append({str(s.index[0].start or 0): np.asarray(s.data).tolist() for s in shards})
    result = {"batches": batches, "placed": placed, "state": iterator.get_state(), "hosts": count}
    iterator.close()
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
