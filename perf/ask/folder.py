"""Clips, and a MODEL folder of random weights at true size whose answers never end by themselves."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from jaxtyping import Array, PyTree

from crosslmm_jax.config import ModelConfig, SamplingConfig
from crosslmm_jax.data.text import DEFAULT_SYSTEM_PROMPT, Tokenizer, load_tokenizer
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import is_model_folder, save_model_folder
from crosslmm_jax.profiling import Record, Request
from crosslmm_jax.profiling.inputs import config_of, random_params
from perf.clips import write_clip

CLIP_S, OTHER_S = 20, 13  # seconds of the two clips
VIDEOS = 10  # clips in the folder `videos`


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderRequest(Request):
    """A preset whose MODEL folder is made, with the clips beside it."""

    folder: str  # MODEL folder to write
    tokenizer: str | None  # folder with the files of Qwen2.5's tokenizer; None: a small one
    work: str  # where clips are written


def run(record: Record) -> None:
    """Writes what is not there yet; the row says how long the weights took."""
    request = record.request
    assert isinstance(request, FolderRequest)
    begin = time.perf_counter()
    write_clips(Path(request.work), seconds=(2, 1) if request.system == "tiny" else (CLIP_S, OTHER_S))
    record.add_facts(clips_s=time.perf_counter() - begin)
    begin = time.perf_counter()
    if not is_model_folder(request.folder):
        write_folder(request, config_of(request))
    size = sum(path.stat().st_size for path in Path(request.folder).iterdir())
    milliseconds = 1e3 * (time.perf_counter() - begin)
    record.add_row({"what": "MODEL folder written", "ms": milliseconds, "gigabytes": size / 1e9})


def write_clips(work: Path, *, seconds: tuple[int, int]) -> None:
    """`clip.mp4`, `other.mp4` and a folder `videos` of clips of several lengths."""
    length, other = seconds
    files = {work / "clip.mp4": length, work / "other.mp4": other}
    files |= {work / "videos" / f"{number}.mp4": other + number % 3 for number in range(VIDEOS)}
    for seed, (path, duration) in enumerate(files.items()):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, seconds=duration, seed=seed)


def write_folder(request: FolderRequest, config: ModelConfig) -> None:
    """Writes the MODEL folder in bfloat16.

    Raises:
      UserError: no tokenizer at the folder that the request names.
    """
    source = request.tokenizer
    if source is None:
        source = str(Path(request.work) / "tokenizer")
        write_default_tokenizer(source)
    elif not (Path(source) / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {source}: has no tokenizer.json; name a folder of Qwen2.5's tokenizer")
    params = without_ends(random_params(config, stacked=True), config, load_tokenizer(source))
    save_model_folder(
        request.folder, config=config, params=params, tokenizer_folder=source,
        sampling=SamplingConfig(frames=request.frames[0]), system_prompt=DEFAULT_SYSTEM_PROMPT,
        dtype="bfloat16",
    )  # fmt: skip


def without_ends(params: PyTree[Array], config: ModelConfig, tokenizer: Tokenizer) -> PyTree[Array]:
    """Parameters that give the tokens that end an answer a logit of 0, below the largest of the others."""
    ends = np.array([tokenizer.im_end, tokenizer.pad])
    decoder = dict(params["decoder"])
    if config.decoder.tie_embeddings:
        decoder["embedding"] = decoder["embedding"].at[ends].set(0)
    else:
        decoder["lm_head"] = decoder["lm_head"].at[:, ends].set(0)
    return {**params, "decoder": decoder}
