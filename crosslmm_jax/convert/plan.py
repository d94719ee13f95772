"""Plans a conversion: where every parameter comes from, checked before anything is written."""

import dataclasses
from collections.abc import Mapping, Sequence

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert.families import cross, llava, qwen2, siglip
from crosslmm_jax.convert.report import Report, condense, dtypes_by_part
from crosslmm_jax.convert.rules import Ignored, Rule, Slot, expand
from crosslmm_jax.convert.source.files import NpzSource, Source
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import COPIED
from crosslmm_jax.model_folder import FLOATS, Shape, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One opened source, and the tables that must explain every tensor in it.

    Attributes:
      option: the command-line option that names it.
      source: its tensors.
      names: name in the tables -> name in the files.
      rules: tensors that are used.
      ignored: tensors that are ignored on purpose.
      by_part: each part of the model has its own type, as in our exports; else one type holds for all.
    """

    option: str
    source: Source
    names: Mapping[str, str]
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...]
    by_part: bool = False


@dataclasses.dataclass(frozen=True)
class TensorOrigin:
    """The source tensor that fills row `row` (None: all) of a parameter."""

    row: int | None
    source: Source
    key: str  # in the files
    slot: Slot


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of ours and the tensors that fill it. Without any, it is initialised."""

    name: str
    shape: Shape
    dtype: str
    origins: tuple[TensorOrigin, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All parameters, in the order of their names."""

    config: ModelConfig
    parameters: tuple[Parameter, ...]
    report: Report


def make_checkpoint(
    option: str, source: Source, config: ModelConfig, *, replaced: bool = False
) -> Checkpoint:
    """The tables for a source.

    Args:
      option: "--vision", "--llm", "--llava", "--projector" or "--crosslmm".
      source: its tensors.
      config: the model configuration.
      replaced: another source holds the projector.

    Raises:
      UserError: two of its tensors are the same parameter.
    """
    if isinstance(source, NpzSource):
        names = {name: name for name in source.tensors}
        return Checkpoint(option, source, names, siglip.BIG_VISION_RULES, siglip.big_vision_ignored(config))
    if option == "--crosslmm":
        names = {name: name for name in source.tensors}
        return Checkpoint(option, source, names, llava.EXPORT_RULES, (), by_part=True)
    names = {}
    for name in source.tensors:
        known = llava.canonical(name)
        if known in names:
            raise UserError(f"{source.path}: {names[known]} and {name} are the same parameter; remove one")
        names[known] = name
    projector = llava.PROJECTOR_RULES + cross.PROJECTOR_RULES
    rules, ignored = {
        "--vision": (llava.VISION_RULES, siglip.ignored(config)),
        "--llm": (qwen2.RULES, qwen2.ignored(config)),
        "--projector": (projector, (llava.NEWLINE,)),
        "--llava": (llava.VISION_RULES + llava.PROJECTOR_RULES + qwen2.RULES, llava.ignored(config)),
    }[option]
    if replaced:
        rules = tuple(rule for rule in rules if not rule.ours.startswith("projector."))
        ignored = (*ignored, Ignored(r"multi_modal_projector\.", "replaced by --projector"))
    return Checkpoint(option, source, names, rules, ignored)


def make_plan(config: ModelConfig, checkpoints: Sequence[Checkpoint], *, dtype: str | None) -> Plan:
    """Finds the tensors that fill every parameter of `config`.

    Args:
      config: the model configuration.
      checkpoints: opened sources.
      dtype: of the result; None keeps that of each source.

    Raises:
      UserError: keys that no rule explains, parameters that nothing fills, wrong shapes, mixed types; all
        of them in one message.
    """
    shapes, report, problems = parameter_shapes(config), Report(), []
    origins: dict[str, dict[int | None, TensorOrigin]] = {}
    kinds: dict[str, str] = {}  # parameter -> dtype
    for checkpoint in checkpoints:
        found = _place(checkpoint, expand(checkpoint.rules, config, shapes), report, problems)
        kinds |= _dtypes(checkpoint, found, dtype, problems)
        for origin in found:
            origins.setdefault(origin.slot.ours, {})[origin.row] = origin
    required = {rule.ours for checkpoint in checkpoints for rule in checkpoint.rules}
    required |= {name for name in shapes if name.split(".")[0] in ("encoder", "decoder")}
    report.filled = sorted(origins)
    missing = _missing(required, config, origins, shapes)
    problems += [f"nothing fills {name}" for name in condense(missing)]
    if problems:
        raise UserError(_message(checkpoints, problems))
    _initialise(config, shapes, origins, kinds, report)
    parameters = []
    for name in sorted(shapes):
        target = dtype or kinds.get(name) or kinds["decoder.embedding"]
        rows = origins.get(name, {})
        ordered = sorted(rows, key=lambda row: row or 0)  # the row None is always alone
        parameters.append(Parameter(name, shapes[name], target, tuple(rows[row] for row in ordered)))
    report.dtypes = dtypes_by_part({parameter.name: parameter.dtype for parameter in parameters})
    return Plan(config, tuple(parameters), report)


def _place(
    checkpoint: Checkpoint, slots: Sequence[Slot], report: Report, problems: list[str]
) -> list[TensorOrigin]:
    """Assigns the tensors of one source to slots. A tensor that is neither used nor ignored is a problem."""
    found, unused = [], dict(checkpoint.names)
    for slot in slots:
        key = unused.pop(slot.hf, None)
        if key is None:
            continue
        info = checkpoint.source.tensors[key]
        if not slot.accepts(info.shape):
            problems.append(f"{key} has shape {list(info.shape)} instead of {list(slot.source_shape)}")
        if slot.rule.drop_rows and info.shape[0] > slot.source_shape[0]:
            extra = info.shape[0] - slot.source_shape[0]
            report.notes.append(f"{extra} rows of {key} are beyond the vocabulary and are dropped")
        report.used.append(key)
        found.append(TensorOrigin(slot.row, checkpoint.source, key, slot))
    unknown = []
    for name, key in unused.items():
        reason = next((rule.reason for rule in checkpoint.ignored if rule.matches(name)), None)
        if reason is None:
            unknown.append(key)
        else:
            report.ignored.setdefault(reason, []).append(key)
    problems += [f"{key} is unknown" for key in condense(unknown)]
    return found


def _dtypes(
    checkpoint: Checkpoint, found: Sequence[TensorOrigin], dtype: str | None, problems: list[str]
) -> dict[str, str]:
    """Parameter -> type of the tensors that fill it."""
    parts: dict[str, list[TensorOrigin]] = {}
    for origin in found:
        parts.setdefault(origin.slot.ours.split(".")[0] if checkpoint.by_part else "", []).append(origin)
    kinds: dict[str, str] = {}
    for part in parts.values():
        kinds |= dict.fromkeys(
            (origin.slot.ours for origin in part), _one_dtype(checkpoint, part, dtype, problems)
        )
    return kinds


def _one_dtype(
    checkpoint: Checkpoint, found: Sequence[TensorOrigin], dtype: str | None, problems: list[str]
) -> str:
    """The type of these tensors. Several types are a problem unless the user chooses one for the result."""
    kinds: dict[str, list[str]] = {}
    for origin in found:
        kinds.setdefault(checkpoint.source.tensors[origin.key].dtype, []).append(origin.key)
    for kind in set(kinds) - set(FLOATS):
        names = ", ".join(condense(kinds.pop(kind)))
        problems.append(f"{names} has the type {kind} instead of one of {', '.join(FLOATS)}")
    if len(kinds) > 1 and dtype is None:
        listed = "; ".join(f"{kind}: {', '.join(condense(names))}" for kind, names in sorted(kinds.items()))
        problems.append(f"types are mixed ({listed}): choose one for all with --dtype; float32 loses nothing")
    return next(iter(kinds), "float32")


def _missing(
    required: set[str],
    config: ModelConfig,
    origins: Mapping[str, Mapping[int | None, TensorOrigin]],
    shapes: Mapping[str, Shape],
) -> list[str]:
    """Tensors that should fill the parameters `required` and are not there, under the names of our export."""
    missing = []
    for slot in expand(llava.EXPORT_RULES, config, shapes):
        if slot.ours in required and slot.row not in origins.get(slot.ours, {}):
            missing.append(slot.hf)
    return missing


def _message(checkpoints: Sequence[Checkpoint], problems: Sequence[str]) -> str:
    paths = ", ".join(f"{checkpoint.option} {checkpoint.source.path}" for checkpoint in checkpoints)
    return f"{paths}: {len(problems)} thing(s) do not fit the model: {'; '.join(problems)}"


def copied_parameters(config: ModelConfig) -> dict[str, str]:
    """Parameter of V2V or T2V -> parameter of the decoder layers that it starts as a copy of."""
    if config.cross_attention.cross_attn_init != "copy":
        return {}
    projected = config.cross_attention.kv_source == "projected"
    names = {name: name for name in (COPIED if projected else ("wq", "bq", "wo"))}
    names["query_norm"] = "attn_norm"
    if projected:
        names["kv_norm"] = "attn_norm"
    return {
        f"{direction}.{name}": f"decoder.layers.{copied}"
        for direction in ("v2v", "t2v")
        for name, copied in names.items()
    }


def _initialise(
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    origins: dict[str, dict[int | None, TensorOrigin]],
    kinds: dict[str, str],
    report: Report,
) -> None:
    """Adds the parameters that are copies, and reports those that remain to be initialised."""
    for name, copied in copied_parameters(config).items():
        if name in origins:
            continue
        rows = origins[copied]
        origins[name] = {
            x: dataclasses.replace(rows[layer], row=x)
            for x, layer in enumerate(config.cross_attention_layers)
        }
        kinds[name] = kinds[copied]
        report.copied.append(name)
    report.fresh = sorted(set(shapes) - set(origins))
