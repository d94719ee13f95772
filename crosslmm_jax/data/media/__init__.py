"""Images and videos, wherever they are stored, to uint8 frames with their times.

video           `read_frames` and `probe`: the way in
frame_sampling  the rules that choose frames by their times
locate          references of annotations to files, folders and parts of files; deadlines
archives        files that hold many media: tar, ArrayRecord, Parquet
content         what a file holds, by its first bytes
image           still images; `Clip`
animation       animated pictures as videos
orientation     how stored pictures are turned and mirrored
frames_folder   a folder of pictures as a video
demux           opening a video with PyAV; its packets
packet_index    times and keyframes of all packets of a video
mp4_tables      the same from the tables of an mp4
decoding        times of frames, and the decoding of those that are wanted
live            `follow`: a video that is still being written
"""

from crosslmm_jax.data.media.archives import (
    FRAMES_PREFIX,
    cell_member,
    is_parquet,
    is_record_file,
    mean_cell_size,
    mean_record_size,
    parse_example,
    read_member,
    read_record,
    tar_member,
    value_member,
    walk_tar,
)
from crosslmm_jax.data.media.content import suffix_by_content
from crosslmm_jax.data.media.decoding import MAX_DAMAGED, FrameConsumer
from crosslmm_jax.data.media.frame_sampling import count_frames
from crosslmm_jax.data.media.frames_folder import list_pictures
from crosslmm_jax.data.media.image import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Clip,
    is_image,
    stack_clips,
)
from crosslmm_jax.data.media.live import LiveFrames, follow
from crosslmm_jax.data.media.locate import (
    DEADLINE_S,
    Media,
    MediaOptions,
    PathOrMedia,
    direct_reference,
    from_bytes,
    kind_of,
    open_file,
    open_media,
    resolve_path,
    size_of,
    split_reference,
    stamp_of,
)
from crosslmm_jax.data.media.video import DECODE_UP_TO, VideoInfo, import_readers, probe, read_frames

__all__ = [
    "Clip", "DEADLINE_S", "DECODE_UP_TO", "FRAMES_PREFIX", "FrameConsumer", "IMAGE_SUFFIXES", "LiveFrames",
    "MAX_DAMAGED", "Media", "MediaOptions", "PathOrMedia", "VIDEO_SUFFIXES", "VideoInfo", "cell_member",
    "count_frames", "direct_reference", "follow", "from_bytes", "import_readers", "is_image", "is_parquet",
    "is_record_file", "kind_of", "list_pictures", "mean_cell_size", "mean_record_size", "open_file",
    "open_media", "parse_example", "probe", "read_frames", "read_member", "read_record", "resolve_path",
    "size_of", "split_reference", "stack_clips", "stamp_of", "suffix_by_content", "tar_member",
    "value_member", "walk_tar",
]  # fmt: skip
