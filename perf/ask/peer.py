"""The same file and question through LLaVA-OneVision in torch, in a warm process, at the peer's best.

Its own processor, built from parts without the hub: the tokenizer of the MODEL folder, its video processor
and its prompt. Every video loader of transformers that is installed is tried, and the loop over PyAV of its
documentation; resizing is tried on the CPU and on the GPU. The fastest of each counts.
"""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree, UInt8

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling import Record, Request, Row, ask
from perf.peers import OURS, TINY, facts, make_peer

PHASES = ("imports", "load", "decode", "process", "encode", "prefill", "answer")
BACKENDS = ("pyav", "opencv", "torchcodec", "decord", "torchvision")  # of transformers' `load_video`
TEMPLATE = "<|im_start|>user <video>\n{question}<|im_end|><|im_start|>assistant\n"
TRIES = 2  # of each loader and device; the faster counts

Frames = UInt8[np.ndarray, "f h w 3"]
Loader = Callable[[str, int], Frames]  # (path, frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerRequest(Request):
    """A peer, and the file and question that our model of the same size was asked."""

    model: str  # MODEL folder, for its tokenizer
    video: str
    question: str = ask.AskRequest.question
    max_new_tokens: int


class Peer(NamedTuple):
    """Model and processor."""

    model: PyTree
    processor: PyTree
    device: str


def run(record: Record) -> None:
    """Rows of the loaders, of the processor, then of the whole way with the fastest of each."""
    import torch

    request = record.request
    assert isinstance(request, PeerRequest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    peer = open_peer(request.system, get_preset({**OURS, **TINY}[request.system]), request.model, device)
    record.add_facts(**facts(device), load_s=time.perf_counter() - begin)
    frames = request.frames[0]
    loader = _fastest(record, "loader", {
        name: functools.partial(load, request.video, frames) for name, load in loaders().items()
    })  # fmt: skip
    load = loaders()[loader]
    pixels = load(request.video, frames)
    resizer = _fastest(record, "processor on", {
        name: functools.partial(process, peer, pixels, request.question, name)
        for name in dict.fromkeys(("cpu", device))
    })  # fmt: skip
    answer_once = functools.partial(answer, peer, load, request, resizer)
    answer_once()  # warms up
    runs = [answer_once() for _ in range(request.repeats)]
    row = ask.combined(runs)
    record.add_facts(note=f"fastest: {loader}; resized on {resizer}")
    record.add_row({"what": "warm process, the same clip", **row})


def _fastest(record: Record, what: str, ways: dict[str, Callable[[], object]]) -> str:
    """The fastest of several ways, which are rows of the report. One that fails is noted in the facts."""
    import torch

    found: dict[str, float] = {}
    for name, call in ways.items():
        try:
            for _ in range(TRIES):
                begin = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
                found[name] = min(found.get(name, seconds), seconds)
            row = {"what": f"{what} {name}", "frames": record.request.frames[0], "ms": 1e3 * found[name]}
            record.add_row(row)
        except Exception as error:  # a package that is not there, or that does not read the file
            record.add_facts(**{f"{what} {name}": f"{type(error).__name__}: {str(error)[:200]}"})
    return min(found, key=lambda name: found[name])


def loaders() -> dict[str, Loader]:
    """The ways to read frames of a file, by name."""
    from transformers.video_utils import load_video

    read: Callable[..., tuple[Frames, object]] = load_video  # type: ignore[assignment]  # leaves out paths

    def by(backend: str) -> Loader:
        return lambda path, frames: np.asarray(read(path, num_frames=frames, backend=backend)[0])

    return {"PyAV as documented": documented, **{f"load_video {name}": by(name) for name in BACKENDS}}


def documented(path: str, frames: int) -> Frames:
    """The loop over PyAV that transformers documents: every frame is decoded, the chosen ones are kept."""
    import av

    with av.open(path) as container:
        total = container.streams.video[0].frames
        wanted = np.linspace(0, total - 1, frames, dtype=int).tolist()
        kept = {}
        for number, frame in enumerate(container.decode(video=0)):
            if number > wanted[-1]:
                break
            if number in wanted:
                kept[number] = frame.to_ndarray(format="rgb24")
    return np.stack([kept[number] for number in wanted])


def open_peer(name: str, sizes: ModelConfig, tokenizer_folder: str, device: str) -> Peer:
    """The model with random bfloat16 weights made on the device, and its processor."""
    from transformers import (
        AutoTokenizer,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    side, half = sizes.vision.image_size, [0.5, 0.5, 0.5]
    options = {"size": {"height": side, "width": side}, "image_mean": half, "image_std": half}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**options), tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**options), num_image_tokens=sizes.vision.grid**2,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    image, video = (tokenizer.convert_tokens_to_ids(word) for word in ("<image>", "<video>"))
    attention = "flash_attention_2" if device == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    model = make_peer(
        name, sizes, device, image_token=image, video_token=video, attention=attention,
        vocab_size=max(sizes.decoder.vocab_size, len(tokenizer)),
    )  # fmt: skip
    # Random weights must not end an answer: both generate the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Peer(model, processor, device)


def process(peer: Peer, frames: Frames, question: str, resizer: str) -> PyTree:
    """Tensors of the processor on the model's device, pixels resized on the device `resizer`."""
    import torch

    inputs = peer.processor(
        text=TEMPLATE.format(question=question), videos=[frames], return_tensors="pt", device=resizer
    )
    return inputs.to(peer.device, torch.bfloat16)


def answer(peer: Peer, load: Loader, request: PeerRequest, resizer: str) -> Row:
    """From the file to the last token: seconds by phase."""
    import torch

    def now() -> float:
        if peer.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    clock = {"begin": now()}
    frames = load(request.video, request.frames[0])
    clock["decode"] = now()
    inputs = process(peer, frames, request.question, resizer)
    clock["process"] = now()

    def note_first(ids: PyTree, scores: PyTree, **_: object) -> PyTree:
        if "prefill" not in clock:
            clock["prefill"] = now()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with torch.inference_mode():
        ids = peer.model.generate(
            **inputs, max_new_tokens=request.max_new_tokens, min_new_tokens=request.max_new_tokens,
            do_sample=False, stopping_criteria=[note_first],
        )  # fmt: skip
    new = ids[0, inputs["input_ids"].shape[1] :]
    peer.processor.decode(new, skip_special_tokens=True)
    clock["answer"] = now()
    times = list(clock.values())
    phases = {
        name: end - start for name, start, end in zip(list(clock)[1:], times[:-1], times[1:], strict=True)
    }
    return {
        "frames": len(frames), "tokens": len(new), "finish_reason": "length", "phases": phases,
        "total": times[-1] - times[0],
    }  # fmt: skip
