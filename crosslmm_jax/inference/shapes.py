"""The static shapes of answering: few enough that a new video or question compiles nothing.

A program is compiled for shapes. So frames, prompts and caches are padded to one of a few sizes, and masks
leave the padding out exactly:

    frames    4, 32, 64, 128, 256, 384, 512, then multiples of 256: over 1 to 512 frames, 21% of padding
    encoder   16 frames at a time, 4 where there are no more: a clip is encoded while its file is decoded
    caches    of 32, 256 or 512 frames: fewer sizes, because each has two programs, which read and generate
    question  64 tokens at a time

These are 2 programs that encode, 7 that prefill, and 3 each that read a question and generate: 15.
"""

import dataclasses

FRAMES_AT_ONCE = (4, 16)
FRAME_SIZES = (4, 32, 64, 128, 256, 384, 512)
CACHE_FRAME_SIZES = (32, 256, 512)
FRAME_STEP = 256  # of sizes beyond these
QUESTION_TOKENS = 64
STEPS = 32  # tokens that are generated before the host reads them; streaming shows so many at once
CACHE_ROOM = 1024  # tokens of questions and answers that a cache holds before it grows
TOKEN_STEP = 256  # the size of a cache is a multiple


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that holds `size`."""
    return -(-size // step) * step


@dataclasses.dataclass(frozen=True)
class PromptShape:
    """Sizes of a prompt and of the caches that it leaves.

    Attributes:
        frames: F, frames with the padded ones.
        text: tokens of text with the padded ones.
        cache_frames: frames that the video KV cache has room for.
        cache_tokens: tokens that the cache of self-attention has room for.
    """

    frames: int
    text: int
    cache_frames: int
    cache_tokens: int


def frames_at_once(num_frames: int) -> int:
    """Frames that the encoder takes at a time, for a prompt of so many."""
    return FRAMES_AT_ONCE[num_frames > FRAMES_AT_ONCE[0]]


def frame_sizes(most: int) -> list[int]:
    """The sizes that prompts of up to `most` frames are padded to."""
    longest = padded_frames(most)
    larger = range(FRAME_SIZES[-1] + FRAME_STEP, longest + 1, FRAME_STEP)
    return [size for size in (*FRAME_SIZES, *larger) if size <= longest]


def writes_in_place(num_frames: int) -> bool:
    """Whether tokens of so many frames are written to one place, instead of being joined from parts.

    For a moment, joining holds them twice.
    """
    return num_frames > FRAME_SIZES[-1]


def keeps_pixels(most_frames: int) -> bool:
    """Whether the pixels of a video of up to so many frames are kept after they are encoded."""
    return most_frames <= FRAME_SIZES[-1]


def padded_frames(num_frames: int) -> int:
    """Frames of a prompt, padded."""
    return _size(num_frames, FRAME_SIZES)


def prompt_shape(num_frames: int, num_text: int, *, tokens_per_frame: int, usual_text: int) -> PromptShape:
    """The shape of a prompt up to its last medium.

    Args:
        num_frames: frames of all its media.
        num_text: tokens of its text.
        tokens_per_frame: C.
        usual_text: tokens of text that prompts rarely exceed.
    """
    frames = padded_frames(num_frames)
    cache_frames = max(_size(frames, CACHE_FRAME_SIZES), frames) if frames else 0
    text = usual_text
    while text < num_text:
        text *= 2
    tokens = cache_frames * tokens_per_frame + text + CACHE_ROOM
    return PromptShape(frames, text, cache_frames, round_up(tokens, TOKEN_STEP))


def grown(cache_tokens: int, needed: int) -> int:
    """Room of a cache that has to hold `needed` tokens: doubled until it does."""
    while cache_tokens < needed:
        cache_tokens *= 2
    return cache_tokens


def _size(count: int, sizes: tuple[int, ...]) -> int:
    return next((size for size in sizes if size >= count), round_up(count, FRAME_STEP)) if count else 0
