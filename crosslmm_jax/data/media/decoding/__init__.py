"""From the packets of a video to the frames that are wanted, each as a plain decode shows it.

chosen_frames  which frames are read: by a rule, within bounds, the nearest keyframes
frame_times    times that rise, from the timestamps of a file
decode         decoding parts of a video, or all of it
nal_units      which packets of H.264 and HEVC no other packet needs
wanted_frames  takes the wanted frames out of a decoding
frame_store    keeps their pixels, or hands them to a consumer and drops them
damage         how much of a video is damaged, and when it is refused
"""

from crosslmm_jax.data.media.decoding.damage import (
    MAX_DAMAGED,
    check_share,
    count_damaged,
    estimate_damaged,
    is_above,
    known_damage,
)
from crosslmm_jax.data.media.decoding.decode import (
    DamagedFrameError,
    GopDecoder,
    LostFrameError,
    PlainDecode,
    SeekError,
)
from crosslmm_jax.data.media.decoding.frame_store import (
    FrameConsumer,
    FrameStore,
    LateFrameError,
    StoppedError,
)
from crosslmm_jax.data.media.decoding.frame_times import Timeline, Timestamps, lay_out, longest_gap, rising
from crosslmm_jax.data.media.decoding.wanted_frames import (
    Part,
    Put,
    is_worth_threads,
    take_around,
    take_exactly,
    take_from_whole_gops,
    take_in_threads,
    take_shown,
)

__all__ = [
    "MAX_DAMAGED", "DamagedFrameError", "FrameConsumer", "FrameStore", "GopDecoder", "LateFrameError",
    "LostFrameError", "Part", "PlainDecode", "Put", "SeekError", "StoppedError", "Timeline", "Timestamps",
    "check_share", "count_damaged", "estimate_damaged", "is_above", "is_worth_threads", "known_damage",
    "lay_out", "longest_gap", "rising", "take_around", "take_exactly", "take_from_whole_gops",
    "take_in_threads", "take_shown",
]  # fmt: skip
