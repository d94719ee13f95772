"""`crosslmm convert to-hf`: a MODEL folder under the names of the PyTorch world.

OUT/vision/    loads into `SiglipVisionModel`
OUT/llm/       loads into `Qwen2ForCausalLM`
OUT/crosslmm/  everything: the files of the two above (linked, not copied, where the disk can), and
               cross.safetensors with the projector, V2V, T2V and the gates
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from crosslmm_jax.convert import cross, hf_export, llava, qwen2
from crosslmm_jax.convert.hf_files import FLOATS
from crosslmm_jax.convert.report import Report, summed_dtypes
from crosslmm_jax.convert.rules import Rule, Slot, expand, shapes_of
from crosslmm_jax.convert.stream import FileSink, cast, write_index
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    Processor,
    Reader,
    check_tensors,
    copy_tokenizer,
    files_of,
    load_model_config,
    load_processor,
    write_json,
)
from crosslmm_jax.utils import Progress, atomic_folder, is_vacant

PARTS: dict[str, tuple[Rule, ...]] = {
    "vision": llava.VISION_RULES,
    "llm": qwen2.RULES,
    "cross": llava.PROJECTOR_RULES + cross.RULES,
}
MODULE_FILE = "modeling_crosslmm.py"


def convert_to_hf(
    model: str | Path, out: str | Path, *, dtype: str | None = None, torch_reference: bool = False
) -> Report:
    """Writes the folder `out`, under another name until it is complete.

    Args:
      model: a MODEL folder.
      out: must not exist, be empty, or be an older export, which is replaced.
      dtype: of the result; None keeps that of the files.
      torch_reference: also write a PyTorch module that runs the export.

    Raises:
      UserError: the model is damaged, or `out` cannot be written.
    """
    model, out = Path(model), Path(out)
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(FLOATS)}")
    _check_out(out)
    config, processor = load_model_config(model), load_processor(model)
    shapes, begin, report = shapes_of(config), time.perf_counter(), Report()
    with _opened(model, shapes) as readers, atomic_folder(out, resume=False) as folder:
        slots = {part: expand(rules, config, shapes) for part, rules in PARTS.items()}
        for part in ("vision", "llm", "crosslmm"):
            (folder / part).mkdir()
        total = sum(reader.entries[name].nbytes for name, reader in readers.items())
        with Progress("convert", unit="bytes", total=total) as progress:
            where = {}
            for part, group in slots.items():
                where |= _write_part(folder, part, group, readers, dtype, progress, report)
        write_index(folder / "crosslmm", where, report.bytes)
        kinds = summed_dtypes({name: dtype or reader.entries[name].dtype for name, reader in readers.items()})
        _write_settings(folder, model, processor, kinds)
        if torch_reference:
            shutil.copyfile(Path(__file__).with_name("torch_reference.py"), folder / "crosslmm" / MODULE_FILE)
    report.used, report.dtypes = sorted(shapes), kinds
    report.seconds = time.perf_counter() - begin
    return report


def _check_out(out: Path) -> None:
    is_export = (out / "crosslmm" / "config.json").is_file() and (out / "llm").is_dir()
    if not is_export and not is_vacant(out):
        raise UserError(f"{out}: exists and is no export; it is left alone: give another name")


@contextlib.contextmanager
def _opened(model: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Reader]]:
    """Parameter -> the file that holds it; raises `UserError` unless exactly the right ones are there."""
    with contextlib.ExitStack() as stack:
        readers, problems = {}, []
        for file in files_of(model):
            try:
                reader = Reader(file)
            except UserError as error:
                problems.append(str(error))
                continue
            stack.callback(reader.close)
            readers |= dict.fromkeys(reader.entries, reader)
        found = {name: reader.entries[name].shape for name, reader in readers.items()}
        check_tensors(model, found=found, wanted=shapes, problems=problems)
        yield readers


def _write_part(
    folder: Path,
    part: str,
    slots: Sequence[Slot],
    readers: dict[str, Reader],
    dtype: str | None,
    progress: Progress,
    report: Report,
) -> dict[str, str]:
    """Writes one part, and links its files into crosslmm/; returns tensor -> file there."""
    kinds = {slot.hf: dtype or readers[slot.ours].entries[slot.ours].dtype for slot in slots}
    tensors = {slot.hf: (slot.foreign_shape, kinds[slot.hf]) for slot in slots}
    whole, own = folder / "crosslmm", part == "cross"
    target = whole if own else folder / part
    stem = "cross" if own else "model"
    with FileSink(target, tensors, kind="pt", stem=stem, max_shard_bytes=MAX_SHARD_BYTES) as sink:
        for slot in slots:
            value = readers[slot.ours].read(slot.ours, slot.row)
            progress.update(progress.done + value.nbytes)
            sink.write_tensor(slot.hf, cast(slot.out_of(value), kinds[slot.hf], name=slot.ours))
        report.written += tensors
        report.bytes += sink.nbytes
        where = dict(sink.where)
    if own:
        return _without_index(whole, where)
    named = {file: file.replace("model", part, 1) for file in set(where.values())}
    for file, link in named.items():
        _link(target / file, whole / link)
    return {name: named[file] for name, file in where.items()}


def _without_index(folder: Path, where: dict[str, str]) -> dict[str, str]:
    """`where`; the index of this part alone gives way to that of all parts."""
    (folder / INDEX_FILE).unlink(missing_ok=True)
    return where


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _write_settings(folder: Path, model: Path, processor: Processor, kinds: dict[str, str]) -> None:
    config = load_model_config(model)
    tokens = hf_export.special_tokens(model) if (model / "tokenizer.json").is_file() else {}
    vision = hf_export.vision_config(config, kinds["encoder"].split("/")[0])
    text = hf_export.text_config(config, kinds["decoder"].split("/")[0], tokens)
    pictures = hf_export.preprocessor_config(processor)
    _write_all(folder / "vision", {"config.json": vision, "preprocessor_config.json": pictures})
    _write_all(folder / "llm", {"config.json": text})
    whole = hf_export.crosslmm_config(config, processor, vision, text)
    _write_all(folder / "crosslmm", {"config.json": whole, "preprocessor_config.json": pictures})
    for part in ("llm", "crosslmm"):
        hf_export.write_generation_config(folder / part, tokens)
        copy_tokenizer(model, folder / part)


def _write_all(folder: Path, files: dict[str, dict]) -> None:
    for name, value in files.items():
        write_json(folder / name, value)
