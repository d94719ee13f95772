"""The device mesh of answering, and how much fits its devices."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.prepare import prepared_shapes
from crosslmm_jax.inference.shapes import PromptShape, frame_sizes, prompt_shape
from crosslmm_jax.model import DTYPES, kv_width
from crosslmm_jax.parallel import gather, make_mesh

WEIGHT_SHARE = 0.7  # of a device's memory that weights may take; the rest is for videos and answers
BATCH_SHARE = (
    0.9  # of the memory beside the weights: what a batch of videos may take, as far as it is counted
)
MOST_VIDEOS = 4  # of a batch, for each group of devices: more make generating hardly cheaper


def answering_mesh(config: ModelConfig, sizes: MeshConfig | None = None) -> Mesh:
    """All devices of all processes: videos divided among them where each can hold the weights, else weights
    sharded.

    The fewest devices that hold the weights together share them (`tensor`); groups of so many divide the
    videos (`data`). Devices that do not say how much memory they have count as large enough.

    Args:
        config: of the model.
        sizes: of the mesh axes, in place of this choice.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    if sizes is not None:
        return make_mesh(sizes)
    count, limit, tensor = jax.device_count(), _memory_limit(), 1
    if limit is not None and count > 1:
        needed = _weight_bytes(config)
        shares = (share for share in range(1, count + 1) if count % share == 0)
        tensor = next((share for share in shares if needed / share <= WEIGHT_SHARE * limit), count)
    return make_mesh(MeshConfig(data=-1, tensor=tensor))


class VideoBytes(NamedTuple):
    """Memory that one video takes, in bytes on each device."""

    original_tokens: int  # until the prompt has been read
    video_cache: int  # T2V's keys and values
    text_cache: int  # self-attention's
    prefill: int  # what a layer needs on the way, until the prompt has been read

    @property
    def total(self) -> int:
        """The most that exists at once."""
        return sum(self)

    @classmethod
    def of(cls, config: ModelConfig, shape: PromptShape, tensor: int = 1) -> "VideoBytes":
        """Of a prompt of `shape`. `tensor` devices share heads and hidden units, and all hold all tokens."""
        decoder, cross, dtype = config.decoder, config.cross_attention, jnp.dtype(config.compute_dtype)
        size, stored = dtype.itemsize, jnp.dtype(DTYPES.get(cross.cache_dtype, dtype)).itemsize
        tokens = shape.frames * config.merge.tokens_per_frame
        patches = shape.frames * config.vision.num_patches
        pair, heads = 2 * decoder.head_dim, decoder.num_kv_heads
        heads //= tensor if heads % tensor == 0 else 1
        cached = shape.cache_frames * config.vision.num_patches * len(config.cross_attention_layers)
        # As in the table of `model.attention.video_attention`.
        # With sharded heads all of a device's at once; see `makes_kv_in_chunks` there.
        at_once = 1 if tensor == 1 else heads
        attending = patches * pair * at_once * size + 5 * tokens * decoder.width * size
        hidden = 3 * tokens * decoder.mlp_width * size // tensor + 2 * tokens * decoder.width * size
        return cls(
            original_tokens=patches * kv_width(config) * size,
            video_cache=cached * pair * heads * stored if "t2v" in cross.directions else 0,
            text_cache=shape.cache_tokens * decoder.num_layers * pair * heads * size,
            prefill=max(attending, hidden),
        )


class BatchMemory:
    """How many videos, and questions about them, the devices hold together.

    Attributes:
        most_videos: more of them together make generating hardly cheaper. Devices that do not say how much
            memory they have take one each.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        """Asks the devices. All processes must do it together."""
        limit, self._config, self._tensor = _memory_limit(), config, int(mesh.shape["tensor"])
        self._groups = int(mesh.shape["data"] * mesh.shape["fsdp"])
        self._room = None if limit is None else BATCH_SHARE * _beside_weights(config, mesh, limit)
        self.most_videos = self._groups * (1 if limit is None else MOST_VIDEOS)

    def fits(self, num_frames: int, videos: int, questions: int = 1) -> bool:
        """Whether the devices hold a batch.

        Args:
            num_frames: of the longest video.
            videos: of the batch.
            questions: about each video, that are answered together.
        """
        if self._room is None:
            return True
        one = VideoBytes.of(self._config, _shape_of(self._config, num_frames), self._tensor)
        here, caches = -(-videos // self._groups), one.video_cache + one.text_cache
        # Each device has the original tokens of all videos, and those of its own once more in one array.
        tokens = one.original_tokens * (videos + here * (videos > 1))
        reading = tokens + here * (caches + one.prefill)
        # Each question has a text cache, twice while the question is read.
        answering = here * (caches + 2 * questions * one.text_cache)
        return max(reading, answering) <= self._room

    def questions_at_once(self, num_frames: int, videos: int, most: int) -> int:
        """Questions about each video that fit together: a power of two up to `most`, and at least 1."""
        count = 1
        while 2 * count <= most and self.fits(num_frames, videos, 2 * count):
            count *= 2
        return count


def check_memory(config: ModelConfig, mesh: Mesh, num_frames: int, *, stream: bool = False) -> None:
    """Raises a UserError if the devices cannot hold a video of so many frames, with the number that they can.

    Devices that do not say how much memory they have count as large enough. Of a `stream`, the caches exist
    twice while frames are appended.
    """
    limit, tensor = _memory_limit(), int(mesh.shape["tensor"])
    if limit is None:
        return

    def needed(config: ModelConfig, frames: int) -> int:
        of_video = VideoBytes.of(config, _shape_of(config, frames), tensor)
        return of_video.total + (of_video.video_cache + of_video.text_cache if stream else 0)

    wanted, here = needed(config, num_frames), _beside_weights(config, mesh, limit)
    if wanted <= here:
        return
    fits = max((size for size in frame_sizes(num_frames) if needed(config, size) <= here), default=0)
    narrow = config.at_precision("int8")
    narrower = not stream and needed(narrow, num_frames) <= _beside_weights(narrow, mesh, limit)
    ways = [f"read at most {fits} frames"] * bool(fits) + ["give --precision int8"] * narrower
    raise UserError(
        f"{num_frames} frames need {wanted / 1e9:.1f} GB beside the weights; this device has"
        f" {here / 1e9:.1f} GB: {' or '.join(ways) or 'use devices with more memory'}"
    )


def cost_of(config: ModelConfig, num_frames: int) -> str:
    """What a video of so many frames costs, in a line."""
    of_video = VideoBytes.of(config, _shape_of(config, num_frames))
    unit, name_of_unit = (1e9, "GB") if of_video.total >= 1e9 else (1e6, "MB")
    parts = [f"{name.replace('_', ' ')} {size / unit:.1f}" for name, size in of_video._asdict().items()]
    return (
        f"{num_frames:,} frames take {num_frames * config.merge.tokens_per_frame:,} positions and"
        f" {of_video.total / unit:.1f} {name_of_unit} beside the weights: {', '.join(parts)}"
    )


def _shape_of(config: ModelConfig, num_frames: int) -> PromptShape:
    return prompt_shape(num_frames, 0, tokens_per_frame=config.merge.tokens_per_frame, usual_text=0)


def _beside_weights(config: ModelConfig, mesh: Mesh, limit: int) -> float:
    """Bytes of a device that are left beside its share of the weights."""
    return limit - _weight_bytes(config) / (mesh.shape["tensor"] * mesh.shape["fsdp"])


def _memory_limit() -> int | None:
    """Bytes that a process may use on a device, of the one with the fewest; None where one does not say."""
    here = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limits = gather(here)  # all processes must choose the same
    return None if None in limits else min(limits)


def _weight_bytes(config: ModelConfig) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(prepared_shapes(config)))
