"""VideoChat2-IT: a JSON list of {"video" or "image", "QA": [{"i", "q", "a"}], "start", "end"}.

`i` of the first item is the instruction for the whole conversation. It becomes the start of the first
question, where inference can put one too, and not the system prompt. A caption has an empty `q`.
"""

from collections.abc import Mapping

from crosslmm_jax.data.annotations.formats.llava import canonical, media_names
from crosslmm_jax.data.annotations.rows import Origin, Row


def to_row(value: object, origin: Origin) -> Row:
    """The row of all questions about all media of one object."""
    if not isinstance(value, Mapping):
        raise origin.error("malformed", "must be an object with video or image and QA")
    value = canonical(value, origin)
    pairs = value.get("QA")
    if not isinstance(pairs, list) or not pairs:
        raise origin.error("conversation", "QA must be a list of objects with i, q and a")
    fields = ("image",) if origin.spec.media_type == "image" else ("video", "image")
    field = next((field for field in fields if value.get(field)), fields[0])
    if not (names := media_names(value, field, origin)):
        raise origin.error("malformed", f"{' or '.join(fields)} must be the path of a medium")
    turns: list[dict[str, str]] = []
    for number, pair in enumerate(pairs):
        texts = [pair.get(key, "") for key in ("i", "q", "a")] if isinstance(pair, Mapping) else []
        texts = [text.strip() for text in texts if isinstance(text, str)]
        if len(texts) != 3:
            raise origin.error("conversation", f"QA[{number}] must hold i, q and a, all text")
        instruction, question, answer = texts
        parts = [question]
        if number == 0:
            parts = ["<image>" * len(names), instruction, question]
        if not answer or not any(parts):
            raise origin.error("conversation", f"QA[{number}] has no answer or nothing to ask")
        turns.append({"from": "human", "value": "\n".join(part for part in parts if part)})
        turns.append({"from": "gpt", "value": answer})
    bounds = origin.bounds(value.get("start"), value.get("end")) if field == "video" else None
    media = {"videos": names} if field == "video" else {"images": names}
    return origin.make_row(turns, bounds=bounds, options=origin.media_options(value), **media)
