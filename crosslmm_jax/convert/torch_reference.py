"""CrossLMM in plain PyTorch: one file that needs torch and safetensors and nothing else.

It runs what `crosslmm convert to-hf` wrote and lies beside it as `modeling_crosslmm.py`:

    from modeling_crosslmm import CrossLMM
    model = CrossLMM.from_folder("EXPORT").eval()
    batch = model.prompt(frames, ids_before_the_video, ids_after_it)   # frames uint8[F, R, R, 3]
    ids = model.generate(batch, max_new_tokens=64, stop_tokens=(151645,))

It is written from the paper, for reading and for checking other implementations against: attention builds
its masks in full and generation runs the whole sequence for every token.

Letters in shapes: B batch, F frames, P patches per frame, C compact tokens per frame, T tokens, D decoder
width, W vision width, V vocabulary.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

DIRECTIONS = ("v2v", "t2v")
PROJECTOR_NORM_EPS = 1e-5
FRAMES_AT_ONCE = 16
Batch = Mapping[str, Tensor]


class Reading(NamedTuple):
    """What one direction of cross-attention reads, the same in every layer."""

    slots: Tensor  # int64[B, n]: where the querying tokens sit in the sequence
    times: Tensor  # int64[B, n]: their places on the frame axis
    visible: Tensor  # bool[B, n, F*P]: the original tokens that each may read


class VisionAttention(nn.Module):
    """Self-attention of SigLIP, over the patches of one frame."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float[n, P, W] to float[n, P, W]."""
        q, k, v = (split_heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """One pre-norm layer of SigLIP."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.width, eps=c.layer_norm_eps)
        self.self_attn = VisionAttention(c.width, c.num_heads)
        self.layer_norm2 = nn.LayerNorm(c.width, eps=c.layer_norm_eps)
        self.mlp = linears(fc1=(c.width, c.mlp_width), fc2=(c.mlp_width, c.width))

    def forward(self, x: Tensor) -> Tensor:
        """float[n, P, W] to float[n, P, W]."""
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](hidden)


class VisionTower(nn.Module):
    """SigLIP up to the layer whose output is read."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.config = c
        convolution = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)
        places = nn.Embedding((c.image_size // c.patch_size) ** 2, c.width)
        self.embeddings = nn.ModuleDict({"patch_embedding": convolution, "position_embedding": places})
        depth = c.num_layers + 1 + c.feature_layer  # -1 is the last layer's output, -2 the one before
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(c) for _ in range(depth))})
        self.post_layernorm = nn.LayerNorm(c.width, eps=c.layer_norm_eps)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8[n, R, R, 3] to float[n, P, W]."""
        embed, place = self.embeddings["patch_embedding"], self.embeddings["position_embedding"].weight
        c, dtype = self.config, self.post_layernorm.weight.dtype
        mean, std = (frames.new_tensor(x, dtype=torch.float32) for x in (c.image_mean, c.image_std))
        pixels = ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2)
        x = embed(pixels.to(dtype)).flatten(2).transpose(1, 2) + place
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.post_layernorm(x) if c.post_layernorm else x


class Projector(nn.Module):
    """Linear, exact GELU, Linear; a LayerNorm in front where the config asks for it."""

    def __init__(self, vision_width: int, width: int, *, input_norm: bool) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(vision_width, eps=PROJECTOR_NORM_EPS) if input_norm else None
        self.linear_1, self.linear_2 = nn.Linear(vision_width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """float[..., W] to float[..., D]."""
        if self.input_norm is not None:
            x = self.input_norm(x)
        return self.linear_2(F.gelu(self.linear_1(x)))


class Attention(nn.Module):
    """Qwen2's grouped-query attention: several query heads share a key head; no bias on the output."""

    def __init__(self, c: SimpleNamespace, kv_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.theta = c.num_heads, c.num_kv_heads, c.rope_theta
        self.q_proj = nn.Linear(c.width, c.num_heads * c.head_dim)
        self.k_proj = nn.Linear(kv_width, c.num_kv_heads * c.head_dim)
        self.v_proj = nn.Linear(kv_width, c.num_kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.width, bias=False)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of `source`: float[B, heads, length, head size]."""
        k, v = (split_heads(f(source), self.kv_heads) for f in (self.k_proj, self.v_proj))
        return split_heads(self.q_proj(x), self.heads), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
        """float[B, T, heads * size]; query head n reads key head n // (heads / key heads)."""
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        return F.scaled_dot_product_attention(q, k, v, **mask).transpose(1, 2).flatten(2)


class SelfAttention(Attention):
    """Causal, with rotary positions."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__(c, c.width)
        self.yarn = (c.yarn_factor, c.yarn_trained_positions)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """float[B, T, D], int[B, T] to float[B, T, D]."""
        q, k, v = self.project(x, x)
        q, k = (rotary(part, positions, self.theta, *self.yarn) for part in (q, k))
        return self.o_proj(self.attend(q, k, v, is_causal=True))


class CrossAttention(Attention):
    """Compact visual tokens (V2V) or text tokens (T2V) read the original visual tokens (eq. 4-10)."""

    def __init__(self, config: SimpleNamespace) -> None:
        c, projected = config.decoder, config.cross_attention.kv_source == "projected"
        kv_width = c.width if projected else config.vision.width
        super().__init__(c, kv_width)
        self.by_time = config.cross_attention.cross_attn_rope == "time"
        self.query_norm = nn.RMSNorm(c.width, eps=c.rms_norm_eps)
        self.kv_norm = nn.RMSNorm(kv_width, eps=c.rms_norm_eps)

    def forward(self, x: Tensor, originals: Tensor, reading: Reading) -> Tensor:
        """float[B, n, D] tokens and float[B, F, P, D or W] to float[B, n, D], 0 where nothing is visible."""
        q, k, v = self.project(self.query_norm(x), self.kv_norm(originals.flatten(1, 2)))
        if self.by_time:
            frame = frame_of_keys(originals).expand(len(x), -1)
            q, k = rotary(q, reading.times, self.theta), rotary(k, frame, self.theta)
        sees_any = reading.visible.any(dim=-1, keepdim=True)
        # A softmax over nothing is not a number: such a query reads everything, and is then set to 0.
        mask = (reading.visible | ~sees_any)[:, None]
        return self.o_proj(self.attend(q, k, v, attn_mask=mask).masked_fill(~sees_any, 0))


class DecoderLayer(nn.Module):
    """A layer of Qwen2; some carry dual cross-attention between self-attention and MLP."""

    def __init__(self, config: SimpleNamespace, *, crossed: bool) -> None:
        super().__init__()
        c = config.decoder
        self.directions = tuple(config.cross_attention.directions) if crossed else ()
        self.input_layernorm = nn.RMSNorm(c.width, eps=c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.width, eps=c.rms_norm_eps)
        inward, outward = (c.width, c.mlp_width), (c.mlp_width, c.width)
        self.mlp = linears(bias=False, gate_proj=inward, up_proj=inward, down_proj=outward)
        for direction in DIRECTIONS if crossed else ():  # both hold weights, in use or not
            self.add_module(f"{direction}_attn", CrossAttention(config))
            gate = torch.tensor(float(config.cross_attention.gate_init))
            self.register_parameter(f"{direction}_gate", nn.Parameter(gate))

    def forward(
        self, x: Tensor, positions: Tensor, originals: Tensor, readings: Mapping[str, Reading]
    ) -> Tensor:
        """float[B, T, D] to float[B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), positions)
        update = torch.zeros_like(x)  # both directions read the same x: they are parallel
        for direction in self.directions if readings else ():
            reading = readings[direction]
            where = reading.slots[..., None].expand(-1, -1, x.shape[-1])
            attention, gate = getattr(self, f"{direction}_attn"), getattr(self, f"{direction}_gate")
            read = torch.tanh(gate) * attention(x.gather(1, where), originals, reading)
            update = update.scatter(1, where, read)
        x = x + update
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


class CrossLMM(nn.Module):
    """Frames and tokens in, logits out.

    A batch is a mapping of tensors; rows put padding at their end, first that of frames, then that of text:

        frames          uint8[B, F, R, R, 3]
        tokens          int[B, T]        any id at the places of visual tokens
        positions       int[B, T]        0, 1, ...
        visual_slots    int[B, F*C]      where the visual tokens sit, in frame order
        text_slots      int[B, T - F*C]  all other places
        visible_frames  int[B, T]        how many frames, from the first on, a token may read
        loss_mask       float[B, T]      for `loss`: 1 where the token is to be predicted
    """

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        c, cross = config.decoder, config.cross_attention
        crossed = range(cross.cross_attn_offset, c.num_layers, cross.cross_attn_every)
        self.vision_model = VisionTower(config.vision)
        input_norm = config.merge.projector_input_norm
        self.multi_modal_projector = Projector(config.vision.width, c.width, input_norm=input_norm)
        layers = nn.ModuleList(DecoderLayer(config, crossed=i in crossed) for i in range(c.num_layers))
        embed, norm = nn.Embedding(c.vocab_size, c.width), nn.RMSNorm(c.width, eps=c.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.width, c.vocab_size, bias=False)

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> "CrossLMM":
        """The model in an exported folder: config.json and safetensors files.

        Raises:
          ValueError: tensors are missing, unknown or of another shape; all are listed.
        """
        folder = Path(folder)
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = cls(namespace(stored.get("crosslmm", stored)))
        wanted, found, problems = model.state_dict(), set(), []
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file, device=device)
            for name, tensor in tensors.items():
                if name not in wanted:
                    problems += [] if model._may_ignore(name) else [f"{name} is unknown"]
                    continue
                found.add(name)
                if tensor.shape == wanted[name].shape:
                    model.load_state_dict({name: tensor.to(dtype)}, strict=False, assign=True)
                else:
                    problems.append(f"{name} is {list(tensor.shape)}, not {list(wanted[name].shape)}")
        problems += [f"{name} is missing" for name in wanted if name not in found]
        if problems:
            raise ValueError(f"{folder}: {'; '.join(problems)}")
        return model

    def _may_ignore(self, name: str) -> bool:
        """Parts of a whole tower above the layer that is read, and a head stored although it is tied."""
        above = name.startswith(("vision_model.encoder.layers.", "vision_model.head."))
        return above or (self.lm_head is None and name == "lm_head.weight")

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """uint8[B, F, R, R, 3] to float[B, F*C, D] compact and float[B, F, P, D or W] original tokens."""
        batch, length = frames.shape[:2]
        c, projector = self.config, self.multi_modal_projector
        compact, originals = [], []
        for chunk in frames.flatten(0, 1).split(FRAMES_AT_ONCE):
            features = self.vision_model(chunk)
            compact.append(projector(merge(features, c.merge.grid, c.merge.pooling)))
            originals.append(projector(features) if c.cross_attention.kv_source == "projected" else features)
        compact, originals = (torch.cat(x).unflatten(0, (batch, length)) for x in (compact, originals))
        return compact.flatten(1, 2), originals

    def forward(self, batch: Batch) -> Tensor:
        """float[B, T, V] logits."""
        visual = self.encode(batch["frames"]) if batch["frames"].shape[1] else None
        return self.decode(batch, visual)

    def decode(self, batch: Batch, visual: tuple[Tensor, Tensor] | None) -> Tensor:
        """Logits float[B, T, V] of a batch whose frames `encode` has seen (None: there are none)."""
        x = self.model["embed_tokens"](batch["tokens"].long())
        originals, readings = x, {}
        if visual is not None:
            compact, originals = visual
            where = batch["visual_slots"].long()[..., None].expand(-1, -1, x.shape[-1])
            x = x.scatter(1, where, compact.to(x.dtype))
            readings = {name: self._reading(name, batch, originals) for name in DIRECTIONS}
        for layer in self.model["layers"]:  # type: ignore[attr-defined]
            x = layer(x, batch["positions"], originals, readings)
        head = self.model["embed_tokens"] if self.lm_head is None else self.lm_head
        return F.linear(self.model["norm"](x), head.weight)  # type: ignore[arg-type]

    def _reading(self, direction: str, batch: Batch, originals: Tensor) -> Reading:
        """Which original tokens each token of one direction may read."""
        cross = self.config.cross_attention
        slots = batch["visual_slots" if direction == "v2v" else "text_slots"].long()
        count = batch["visible_frames"].long().gather(1, slots)
        key_frame = frame_of_keys(originals)
        visible = key_frame < count[..., None]
        if direction == "t2v":
            return Reading(slots, count, visible)  # text comes after the frames that it sees
        tokens = slots.shape[1] // originals.shape[1]
        own = torch.arange(originals.shape[1], device=slots.device).repeat_interleave(tokens)
        reach = {"video": None, "frame": 0, "window": cross.v2v_window}[cross.v2v_scope]
        if reach is not None:
            visible = visible & ((key_frame - own[:, None]).abs() <= reach)
        return Reading(slots, own.expand(len(slots), -1), visible)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of the targets in nats, and the sum of their weights."""
        logits, weights = self(batch)[:, :-1].float(), batch["loss_mask"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:].long(), reduction="none")
        return (losses * weights).sum(), weights.sum()

    def prompt(self, frames: Tensor, before: Sequence[int], after: Sequence[int]) -> dict[str, Tensor]:
        """One row: the ids `before`, one video uint8[F, R, R, 3], the ids `after`."""
        count = len(frames) * self.config.merge.grid**2
        total, end = len(before) + count + len(after), len(before) + count
        place, tokens = torch.arange(total), torch.tensor([*before, *[0] * count, *after])
        batch = {"frames": frames, "tokens": tokens, "positions": place}
        batch["visual_slots"] = place[len(before) : end]
        batch["text_slots"] = torch.cat([place[: len(before)], place[end:]])
        batch["visible_frames"] = torch.where(place < len(before), 0, len(frames))
        device = self.model["embed_tokens"].weight.device
        return {name: value[None].to(device) for name, value in batch.items()}  # type: ignore[call-overload]

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), limit: int | None = None
    ) -> list[int]:  # fmt: skip
        """The likeliest ids after one row without padding, up to a stop token, which is left out.

        Ids from `limit` on are never chosen: the vocabulary may have more rows than the tokenizer ids.
        """
        visual = self.encode(batch["frames"]) if batch["frames"].shape[1] else None
        batch, chosen = dict(batch), []
        while len(chosen) < max_new_tokens:
            token = int(self.decode(batch, visual)[0, -1, :limit].argmax())
            if token in stop_tokens:
                break
            chosen.append(token)
            length = batch["tokens"].shape[1]
            new = {
                "tokens": token, "positions": int(batch["positions"][0, -1]) + 1, "text_slots": length,
                "visible_frames": int(batch["visible_frames"][0, -1]),
            }  # fmt: skip
            batch |= {name: F.pad(batch[name], (0, 1), value=value) for name, value in new.items()}
        return chosen


def namespace(value: Any) -> Any:
    """Nested dicts as objects with fields."""
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: namespace(item) for name, item in value.items()})


def linears(*, bias: bool = True, **sizes: tuple[int, int]) -> nn.ModuleDict:
    """Linear maps under their names, each given as (width in, width out)."""
    return nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})


def split_heads(x: Tensor, heads: int) -> Tensor:
    """float[B, length, heads * size] to float[B, heads, length, size]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotary(x: Tensor, positions: Tensor, theta: float, factor: float = 1.0, trained: int = 1) -> Tensor:
    """float[B, heads, length, size] turned by int[B, length]; the halves of a head form the pairs.

    A factor above 1 is YaRN's, for so many times the trained positions (arXiv:2309.00071).
    """
    size = x.shape[-1]
    rates = 1 / theta ** (torch.arange(0, size, 2, device=x.device).float() / size)
    if factor != 1:
        # The pairs that turn 32 times and once within the trained positions: the ramp lies between them.
        low, high = (size * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
        ramp = (torch.arange(size // 2, device=x.device) - low) / ((high - low) or 0.001)
        rates = torch.lerp(rates, rates / factor, ramp.clamp(0, 1))
    angles = (positions[..., None].float() * rates)[:, None].repeat(1, 1, 1, 2)
    a, b = x.float().chunk(2, dim=-1)
    turned = x.float() * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()
    return (turned * (0.1 * math.log(factor) + 1)).to(x.dtype)


def frame_of_keys(originals: Tensor) -> Tensor:
    """int64[F*P]: the frame of every original token of float[B, F, P, ...]."""
    frames, patches = originals.shape[1:3]
    return torch.arange(frames, device=originals.device).repeat_interleave(patches)


def merge(features: Tensor, grid: int, pooling: str) -> Tensor:
    """Initial token merge (sec. 3.1): float[n, P, W] to float[n, grid * grid, W]."""
    side = round(features.shape[1] ** 0.5)
    square = features.transpose(1, 2).unflatten(2, (side, side))
    if pooling == "average":
        pooled = F.adaptive_avg_pool2d(square, grid)
    else:
        antialias = pooling == "bilinear_antialias"
        pooled = F.interpolate(square, size=(grid, grid), mode="bilinear", antialias=antialias)
    return pooled.flatten(2).transpose(1, 2)
