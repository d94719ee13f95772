"""LLaVA's annotations: a JSON list of rows, or JSONL with one row per line.

The names that other trainers give to the same fields are read too (ALIASES).
"""

from collections.abc import Iterator, Mapping

from crosslmm_jax.data.annotations.json_files import read_json_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row

ALIASES = {"messages": "conversations", "images": "image", "videos": "video"}


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows of a file in order. Raises UserError naming a file that cannot be read."""
    yield from read_json_rows(spec.path)


def to_row(value: object, origin: Origin) -> Row:
    """The row of `image` or `video`, `conversations`, and `start` and `end` in seconds of the video.

    `system` is the system prompt of the row, as in ShareGPT's rows. A row with both media is an image row, as
    in LLaVA, unless the data set's media_type says otherwise.
    """
    if not isinstance(value, Mapping):
        raise origin.error("malformed", "must be an object with conversations and image or video")
    value = canonical(value, origin)
    if "conversations" not in value:
        raise origin.error("conversation", "conversations is missing")
    media_type = origin.spec.media_type
    fields = {"image": ["image"], "video": ["video"], "text": []}.get(media_type or "", ["image", "video"])
    media: dict[str, list[str]] = {}
    for field in fields:
        if not media and (names := media_names(value, field, origin)):
            media[f"{field}s"] = names
    bounds = origin.bounds(value.get("start"), value.get("end"))
    options = origin.media_options(value)
    return origin.make_row(_turns(value, origin), bounds=bounds, options=options, **media)


def _turns(value: Mapping[str, object], origin: Origin) -> object:
    """The conversation of a row, with its `system` as the first turn."""
    turns, system = value["conversations"], value.get("system")
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise origin.error("conversation", "system must be a text: the system prompt of the row")
    if not isinstance(turns, list):
        return turns
    first = turns[0] if turns and isinstance(turns[0], Mapping) else {}
    if "system" in (first.get("from"), first.get("role")):
        raise origin.error("conversation", "holds both system and a system turn; keep one")
    return [{"from": "system", "value": system}, *turns]


def canonical(value: Mapping[str, object], origin: Origin) -> Mapping[str, object]:
    """A row with LLaVA's names of its fields. Raises DataError when it has a field under two names."""
    named = dict(value)
    for alias, name in ALIASES.items():
        other = named.pop(alias, None)
        if other and named.get(name):
            raise origin.error("malformed", f"holds both {name} and {alias}; keep one")
        if other:
            named[name] = other
    return named


def media_names(value: Mapping[str, object], field: str, origin: Origin) -> list[str]:
    """The path or paths under `field`, or []. Raises DataError when it holds something else."""
    names = value.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise origin.error("malformed", f"{field} must be a path or a list of paths")
    return names
