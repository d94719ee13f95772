"""Turns files on disk into numpy batches. Nothing here imports jax or the model.

text/         conversations to token ids; the layout of one row
media/        images, videos and frames in folders, tars and ArrayRecords to uint8 frames
annotations/  rows of every annotation format, and mixtures of them
index/        the rows of a mixture and the probes of their media, on disk
batching/     token counts, buckets, and the schedule of global batches
loading/      examples, batches, and the iterator that training reads
tfds_export/  a mixture as a dataset of TensorFlow Datasets
reports/      `crosslmm data stats` and `check`
"""

from crosslmm_jax.data.media import probe, read_frames

__all__ = ["probe", "read_frames"]
