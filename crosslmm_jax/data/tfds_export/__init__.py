"""A mixture written as a data set of TensorFlow Datasets, media included: `crosslmm data to-tfds`.

to_tfds.py       plans the shards, writes them in parallel, describes the data set
shard_writer.py  writes one ArrayRecord file of rows with the bytes of their media
"""

from crosslmm_jax.data.tfds_export.to_tfds import to_tfds

__all__ = ["to_tfds"]
