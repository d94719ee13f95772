"""From opened checkpoints to a plan: where every parameter comes from, checked before anything is written."""

import dataclasses
from collections.abc import Mapping, Sequence

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert import cross, llava, qwen2, siglip
from crosslmm_jax.convert.hf_files import FLOATS, NpzSource, Source
from crosslmm_jax.convert.report import Report, condense, summed_dtypes
from crosslmm_jax.convert.rules import Ignored, Rule, Shape, Slot, expand
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import COPIED


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One opened source and the tables that are to explain all of it.

    Attributes:
      option: the command line's.
      source: its tensors.
      names: name in the tables -> name in the files.
      rules: what is taken.
      ignored: what is left out on purpose.
      by_part: each part has a type of its own, as in our exports; else one holds for all.
    """

    option: str
    source: Source
    names: Mapping[str, str]
    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...]
    by_part: bool = False


@dataclasses.dataclass(frozen=True)
class Origin:
    """The foreign tensor that fills row `row` (None: all) of a parameter."""

    row: int | None
    source: Source
    key: str  # in the files
    slot: Slot


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours and where it comes from; no origins: initialised."""

    name: str
    shape: Shape
    dtype: str
    origins: tuple[Origin, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All parameters, in the order of their names."""

    config: ModelConfig
    leaves: tuple[Leaf, ...]
    report: Report


def make_checkpoint(
    option: str, source: Source, config: ModelConfig, *, replaced: bool = False
) -> Checkpoint:
    """The tables for a source.

    Args:
      option: "--vision", "--llm", "--llava", "--projector" or "--crosslmm".
      source: its tensors.
      config: of the model that is to be made.
      replaced: another source brings the projector.

    Raises:
      UserError: two of its names mean the same parameter.
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


def make_plan(
    config: ModelConfig, checkpoints: Sequence[Checkpoint], shapes: Mapping[str, Shape], *, dtype: str | None
) -> Plan:
    """Where every parameter of `config` comes from.

    Args:
      config: of the model.
      checkpoints: opened sources.
      shapes: of the parameters, by path.
      dtype: of the result; None keeps each source's.

    Raises:
      UserError: keys that no rule explains, parameters that nothing fills, wrong shapes, mixed types; all
        of them in one message.
    """
    report, problems = Report(), []
    origins: dict[str, dict[int | None, Origin]] = {}
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
    # A name of which a tensor of another shape is there has been named already.
    problems += [f"nothing fills {name}" for name in condense(missing)]
    if problems:
        raise UserError(_message(checkpoints, problems))
    _initialise(config, shapes, origins, kinds, report)
    leaves = []
    for name in sorted(shapes):
        target = dtype or kinds.get(name) or kinds["decoder.embedding"]
        rows = origins.get(name, {})
        leaves.append(
            Leaf(name, tuple(shapes[name]), target, tuple(rows[row] for row in sorted(rows, key=_row)))
        )
    report.dtypes = summed_dtypes({leaf.name: leaf.dtype for leaf in leaves})
    return Plan(config, tuple(leaves), report)


def _row(row: int | None) -> int:
    return -1 if row is None else row


def _place(
    checkpoint: Checkpoint, slots: Sequence[Slot], report: Report, problems: list[str]
) -> list[Origin]:
    """The tensors of one source on their slots; what is neither used nor ignored is a problem."""
    found, left = [], dict(checkpoint.names)
    for slot in slots:
        key = left.pop(slot.hf, None)
        if key is None:
            continue
        info = checkpoint.source.tensors[key]
        if not slot.accepts(info.shape):
            problems.append(f"{key} has shape {list(info.shape)} instead of {list(slot.foreign_shape)}")
        if slot.rule.cut_rows and info.shape[0] > slot.foreign_shape[0]:
            extra = info.shape[0] - slot.foreign_shape[0]
            report.notes.append(f"{extra} rows of {key} lie beyond the vocabulary and are left out")
        report.used.append(key)
        found.append(Origin(slot.row, checkpoint.source, key, slot))
    unknown = []
    for name, key in left.items():
        reason = next((rule.reason for rule in checkpoint.ignored if rule.matches(name)), None)
        if reason is None:
            unknown.append(key)
        else:
            report.ignored.setdefault(reason, []).append(key)
    problems += [f"{key} is unknown" for key in condense(unknown)]
    return found


def _dtypes(
    checkpoint: Checkpoint, found: Sequence[Origin], dtype: str | None, problems: list[str]
) -> dict[str, str]:
    """Parameter -> type of the tensors that fill it."""
    groups: dict[str, list[Origin]] = {}
    for origin in found:
        groups.setdefault(origin.slot.ours.split(".")[0] if checkpoint.by_part else "", []).append(origin)
    return {
        origin.slot.ours: kind
        for group in groups.values()
        for kind in [_one_dtype(checkpoint, group, dtype, problems)]
        for origin in group
    }


def _one_dtype(
    checkpoint: Checkpoint, found: Sequence[Origin], dtype: str | None, problems: list[str]
) -> str:
    """The one type of these tensors; several are a problem unless the user says what they become."""
    kinds: dict[str, list[str]] = {}
    for origin in found:
        kinds.setdefault(checkpoint.source.tensors[origin.key].dtype, []).append(origin.key)
    for kind in set(kinds) - set(FLOATS):
        names = ", ".join(condense(kinds.pop(kind)))
        problems.append(f"{names} has the type {kind} instead of one of {', '.join(FLOATS)}")
    if len(kinds) > 1 and dtype is None:
        listed = "; ".join(f"{kind}: {', '.join(condense(names))}" for kind, names in sorted(kinds.items()))
        problems.append(
            f"types are mixed ({listed}): say with --dtype what all become, float32 loses nothing"
        )
    return next(iter(kinds), "float32")


def _missing(
    required: set[str],
    config: ModelConfig,
    origins: Mapping[str, Mapping[int | None, Origin]],
    shapes: Mapping[str, Shape],
) -> list[str]:
    """Names, in our export's spelling, of the tensors that should fill the parameters `required`."""
    missing = []
    for slot in expand(llava.EXPORT_RULES, config, shapes):
        if slot.ours in required and slot.row not in origins.get(slot.ours, {}):
            missing.append(slot.hf)
    return missing


def _message(checkpoints: Sequence[Checkpoint], problems: Sequence[str]) -> str:
    paths = ", ".join(f"{checkpoint.option} {checkpoint.source.path}" for checkpoint in checkpoints)
    return f"{paths}: {len(problems)} thing(s) do not fit the model: {'; '.join(problems)}"


def copied_parameters(config: ModelConfig) -> dict[str, str]:
    """Parameter of V2V or T2V -> that of the decoder's layers which it starts as a copy of."""
    if config.cross_attention.cross_attn_init != "copy":
        return {}
    projected = config.cross_attention.kv_source == "projected"
    names = {name: name for name in (COPIED if projected else ("wq", "bq", "wo"))}
    names["query_norm"] = "attn_norm"
    if projected:
        names["kv_norm"] = "attn_norm"
    return {
        f"{direction}.{name}": f"decoder.layers.{source}"
        for direction in ("v2v", "t2v")
        for name, source in names.items()
    }


def _initialise(
    config: ModelConfig,
    shapes: Mapping[str, Shape],
    origins: dict[str, dict[int | None, Origin]],
    kinds: dict[str, str],
    report: Report,
) -> None:
    """Adds the copies, and notes what is left to be initialised."""
    for name, source in copied_parameters(config).items():
        if name in origins:
            continue
        rows = origins[source]
        origins[name] = {
            x: dataclasses.replace(rows[layer], row=x)
            for x, layer in enumerate(config.cross_attention_layers)
        }
        kinds[name] = kinds[source]
        report.copied.append(name)
    report.fresh = sorted(set(shapes) - set(origins))
