"""`crosslmm convert to-hf`: a MODEL folder under the names of Hugging Face.

OUT/vision/    loads into `SiglipVisionModel`
OUT/llm/       loads into `Qwen2ForCausalLM`
OUT/crosslmm/  everything: the files of the two above (hard links where the file system has them), and
               cross.safetensors with the projector, V2V, T2V and the gates
"""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from crosslmm_jax.convert import export_settings
from crosslmm_jax.convert.families import cross, llava, qwen2
from crosslmm_jax.convert.report import Report, dtypes_by_part
from crosslmm_jax.convert.rules import Rule, Slot, expand
from crosslmm_jax.convert.source.processor import read_vocabulary
from crosslmm_jax.convert.stream import NotFinite, cast, check_finite, count_not_finite
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import (
    FLOATS,
    MAX_SHARD_BYTES,
    Processor,
    Reader,
    WeightsWriter,
    copy_tokenizer,
    find_model_folder,
    load_model_config,
    load_processor,
    open_weights,
    parameter_shapes,
    write_index,
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
    """Exports a MODEL folder to `out`, which appears only when it is complete.

    Args:
      model: a MODEL folder.
      out: must be absent, empty, or an older export, which is replaced.
      dtype: of the result; None keeps that of the files.
      torch_reference: also write a PyTorch module that runs the export.

    Raises:
      UserError: the model is damaged, or `out` cannot be written.
    """
    model, out = find_model_folder(model), Path(out)
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f"--dtype is {dtype!r}; choose one of {', '.join(FLOATS)}")
    _check_out(out)
    config, processor = load_model_config(model), load_processor(model)
    shapes, begin, report = parameter_shapes(config), time.perf_counter(), Report()
    with open_weights(model, shapes) as readers, atomic_folder(out, resume=False) as folder:
        slots = {part: expand(rules, config, shapes) for part, rules in PARTS.items()}
        for part in ("vision", "llm", "crosslmm"):
            (folder / part).mkdir()
        total = sum(reader.entries[name].nbytes for name, reader in readers.items())
        with Progress("convert", unit="bytes", total=total) as progress:
            file_of = {}
            for part, part_slots in slots.items():
                file_of |= _write_part(folder, part, part_slots, readers, dtype, progress, report)
        write_index(folder / "crosslmm", file_of, report.bytes)
        dtypes = dtypes_by_part(
            {name: dtype or reader.entries[name].dtype for name, reader in readers.items()}
        )
        _write_settings(folder, model, processor, dtypes)
        if torch_reference:
            shutil.copyfile(Path(__file__).with_name("torch_reference.py"), folder / "crosslmm" / MODULE_FILE)
    report.used, report.dtypes = sorted(shapes), dtypes
    report.seconds = time.perf_counter() - begin
    return report


def _check_out(out: Path) -> None:
    is_export = (out / "crosslmm" / "config.json").is_file() and (out / "llm").is_dir()
    if not is_export and not is_vacant(out):
        raise UserError(f"{out}: exists and is no export; it is left alone: give another name")


def _write_part(
    folder: Path,
    part: str,
    slots: Sequence[Slot],
    readers: Mapping[str, Reader],
    dtype: str | None,
    progress: Progress,
    report: Report,
) -> dict[str, str]:
    """Writes one part and links its files into crosslmm/. Returns tensor -> file in crosslmm/."""
    dtypes = {slot.hf: dtype or readers[slot.ours].entries[slot.ours].dtype for slot in slots}
    tensors = {slot.hf: (slot.source_shape, dtypes[slot.hf]) for slot in slots}
    only_ours = part == "cross"
    part_folder = folder / ("crosslmm" if only_ours else part)
    damaged: dict[str, NotFinite] = {}
    writer = WeightsWriter(
        part_folder, tensors, kind="pt", max_shard_bytes=MAX_SHARD_BYTES,
        stem="cross" if only_ours else "model",
    )  # fmt: skip
    with writer:
        for slot in slots:
            value = readers[slot.ours].read(slot.ours, slot.row)
            progress.update(progress.done + value.nbytes)
            found = count_not_finite(value)
            if found is not None:
                row = "" if slot.row is None else f"[{slot.row}]"
                damaged[f"{readers[slot.ours].path}: {slot.ours}{row}"] = found
            writer.write(slot.hf, cast(slot.out_of(value), dtypes[slot.hf], name=slot.ours))
    check_finite(damaged)
    report.written += tensors
    report.bytes += writer.nbytes
    if only_ours:
        return writer.file_of
    links = {file: file.replace("model", part, 1) for file in set(writer.file_of.values())}
    for file, link in links.items():
        _link(part_folder / file, folder / "crosslmm" / link)
    return {name: links[file] for name, file in writer.file_of.items()}


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, link)


def _write_settings(folder: Path, model: Path, processor: Processor, dtypes: Mapping[str, str]) -> None:
    config = load_model_config(model)
    tokens = read_vocabulary(model) if (model / "tokenizer.json").is_file() else {}
    vision = export_settings.vision_config(config, dtypes["encoder"].split("/")[0])
    text = export_settings.text_config(config, dtypes["decoder"].split("/")[0], tokens)
    images = export_settings.preprocessor_config(processor)
    for part, described in (("vision", vision), ("llm", text)):
        write_json(folder / part / "config.json", described)
    everything = export_settings.crosslmm_config(config, processor, vision, text)
    write_json(folder / "crosslmm" / "config.json", everything)
    for part in ("vision", "crosslmm"):
        write_json(folder / part / "preprocessor_config.json", images)
    for part in ("llm", "crosslmm"):
        if tokens:
            generation = export_settings.generation_config(processor, tokens, source=model)
            write_json(folder / part / "generation_config.json", generation)
        copy_tokenizer(model, folder / part)
