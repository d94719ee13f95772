"""TODO."""

from crosslmm_jax.data.media.array_record import (
    FOLDER_MARK,
    is_record_file,
    mean_record_size,
    parse_example,
    read_record,
    value_member,
)
from crosslmm_jax.data.media.frame_sampling import count_frames
from crosslmm_jax.data.media.frames_folder import list_pictures
from crosslmm_jax.data.media.image import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, is_image, stack_clips
from crosslmm_jax.data.media.locate import (
    DEADLINE_S,
    Media,
    PathOrMedia,
    direct_reference,
    look_at,
    open_file,
    open_media,
    resolve,
    size_of,
    split_reference,
    suffix_by_content,
)
from crosslmm_jax.data.media.tar import read_member, spanned, walk
from crosslmm_jax.data.media.video import VideoInfo, probe, read_frames

__all__ = [
    "Clip",
    "DEADLINE_S",
    "FOLDER_MARK",
    "IMAGE_SUFFIXES",
    "Media",
    "PathOrMedia",
    "VIDEO_SUFFIXES",
    "VideoInfo",
    "count_frames",
    "direct_reference",
    "is_image",
    "is_record_file",
    "list_pictures",
    "look_at",
    "mean_record_size",
    "open_file",
    "open_media",
    "parse_example",
    "probe",
    "read_frames",
    "read_member",
    "read_record",
    "resolve",
    "size_of",
    "spanned",
    "split_reference",
    "stack_clips",
    "suffix_by_content",
    "value_member",
    "walk",
]
