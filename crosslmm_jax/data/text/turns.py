"""Turns of a conversation as text: parsing them, and the placeholders of media in them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from crosslmm_jax.errors import DataError

PLACEHOLDER = re.compile(r"<image>|<video>")
_ROLES = {"human": "user", "gpt": "assistant"}
# Remains in some of LLaVA's video questions. LLaVA's loader deletes it too.
_NOISE = "QA_GT_caption_based_noisy"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: `role` is "system", "user" or "assistant"."""

    role: str
    text: str


def parse_turns(conversations: object, *, where: str) -> list[Turn]:
    """Parses the LLaVA (`from`/`value`) or chat (`role`/`content`) turns of a row to train on.

    A greeting, an assistant turn before the first human one, is dropped as in LLaVA, also after a system
    turn. A row without an answer is refused, because it would be decoded without adding to the loss. An
    answer without words is refused in every format; LLaVA trains on it, which teaches to say nothing.

    Raises:
        DataError: a turn is malformed or of an unknown role, or there is no question or no answer.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise DataError(where, "conversation", "conversations must be a list of turns")
    turns = []
    for number, entry in enumerate(conversations):
        role, text = _role_and_text(entry)
        role = _ROLES.get(role, role) if isinstance(role, str) else ""
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            detail = f"conversations[{number}] must hold from (human, gpt or system) and value, both text"
            raise DataError(where, "conversation", detail)
        if writable(text) != text:
            raise DataError(where, "conversation", f"conversations[{number}] holds an unpaired surrogate")
        turns.append(Turn(role, text.replace(_NOISE, "")))
    first = next((number for number, turn in enumerate(turns) if turn.role != "system"), len(turns))
    if turns[first:] and turns[first].role == "assistant":
        del turns[first]
    if not any(turn.role == "user" for turn in turns):
        raise DataError(where, "conversation", "conversations holds no human turn")
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers:
        raise DataError(where, "conversation", "conversations holds no answer, a gpt turn after a human one")
    if not all(map(str.strip, answers)):
        raise DataError(where, "conversation", "conversations holds an answer without words")
    return turns


def writable(text: str) -> str:
    """`text` with "?" for unpaired surrogates, which JSON and tars may hold and UTF-8 files cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _role_and_text(entry: object) -> tuple[object, object]:
    if not isinstance(entry, Mapping):
        return None, None
    if "from" in entry:
        return entry["from"], entry.get("value")
    return entry.get("role"), entry.get("content")


def count_placeholders(turns: Sequence[Turn]) -> int:
    """Number of placeholders in the user's turns."""
    return sum(len(PLACEHOLDER.findall(turn.text)) for turn in turns if turn.role == "user")


def check_placeholders(turns: Sequence[Turn], num_media: int, *, where: str) -> None:
    """Raises DataError unless the user's turns hold exactly one `<image>` or `<video>` per medium."""
    found = count_placeholders(turns)
    if found != num_media:
        detail = f"{found} <image>/<video> placeholders for {num_media} media; write one for each medium"
        raise DataError(where, "placeholders", detail)


def split_at_media(text: str) -> list[str]:
    """The pieces of a user's text around its placeholders: one more piece than placeholders.

    A single placeholder that is not first moves to the front, followed by a newline, as in LLaVA.
    """
    text = text.strip() if PLACEHOLDER.search(text) else text
    pieces = PLACEHOLDER.split(text)
    if len(pieces) == 2 and pieces[0]:
        return ["", "\n" + (pieces[0] + pieces[1]).strip()]
    return pieces
