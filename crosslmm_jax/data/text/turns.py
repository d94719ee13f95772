"""Turns of a conversation as text: reading them, and where the media stand in them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from crosslmm_jax.errors import DataError

PLACEHOLDER = re.compile(r"<image>|<video>")
_ROLES = {"human": "user", "gpt": "assistant"}
# Left behind in some of LLaVA's video questions; its own loader deletes it too.
_NOISE = "QA_GT_caption_based_noisy"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: `role` is "system", "user" or "assistant"."""

    role: str
    text: str


def parse_turns(conversations: Any, *, where: str) -> list[Turn]:
    """Reads the LLaVA (`from`/`value`) or chat (`role`/`content`) turns of a row to train on.

    A leading turn that is neither the user's nor the system's is dropped, as LLaVA does. A row without an
    answer would be read and decoded for no loss. An answer without words is refused, as in every other
    format: LLaVA trains it, which teaches the model to say nothing.

    Raises:
        DataError: naming `where`, when a turn is malformed, of an unknown role, or there is no question or
            answer.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise DataError(where, "conversation", "conversations must be a list of turns")
    turns = []
    for number, entry in enumerate(conversations):
        role, text = _role_and_text(entry)
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            detail = f"conversations[{number}] must hold from (human, gpt or system) and value, both text"
            raise DataError(where, "conversation", detail)
        if writable(text) != text:
            raise DataError(where, "conversation", f"conversations[{number}] holds half a character")
        turns.append(Turn(role, text.replace(_NOISE, "")))
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not any(turn.role == "user" for turn in turns):
        raise DataError(where, "conversation", "conversations holds no human turn")
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers:
        raise DataError(where, "conversation", "conversations holds no answer, a gpt turn after a human one")
    if not all(map(str.strip, answers)):
        raise DataError(where, "conversation", "conversations holds an answer without words")
    return turns


def writable(text: str) -> str:
    """`text` with "?" for what no file can hold: halves of characters, which JSON and tars may bring."""
    return text.encode("utf-8", "replace").decode()


def _role_and_text(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping):
        return None, None
    if "from" in entry:
        return entry["from"], entry.get("value")
    return entry.get("role"), entry.get("content")


def count_placeholders(turns: Sequence[Turn]) -> int:
    """Places for media in the user's turns."""
    return sum(len(PLACEHOLDER.findall(turn.text)) for turn in turns if turn.role == "user")


def check_placeholders(turns: Sequence[Turn], num_media: int, *, where: str) -> None:
    """Raises DataError unless the user's turns hold exactly one `<image>` or `<video>` for each medium."""
    found = count_placeholders(turns)
    if found != num_media:
        detail = f"{found} <image>/<video> placeholders for {num_media} media; write one for each medium"
        raise DataError(where, "placeholders", detail)


def split_at_media(text: str) -> list[str]:
    """The pieces of a user's text around its placeholders: one piece more than there are placeholders.

    A lone placeholder that does not stand first is moved to the front, a newline after it, as LLaVA does.
    """
    text = text.strip() if PLACEHOLDER.search(text) else text
    pieces = PLACEHOLDER.split(text)
    if len(pieces) == 2 and pieces[0]:
        return ["", "\n" + (pieces[0] + pieces[1]).strip()]
    return pieces
