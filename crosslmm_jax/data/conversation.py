"""Turns of a conversation to token ids, with places for the media and the targets of the loss.

The template is Qwen's ChatML with one system text for training and inference. Three label rules exist:
"clean" trains the assistant's words and the `<|im_end|>` after them; "llava" copies LLaVA-NeXT, which also
trains the assistant header and every newline, `<|im_start|>` and `<|im_end|>` of the whole row; the "plain"
style (LLaVA's projector pretraining) has no template and trains a caption and the newline after it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from crosslmm_jax.data.tokenizer import Tokenizer
from crosslmm_jax.errors import UserError

MEDIUM = -1  # stands in a token sequence where the frames of one image or video go
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
_PLACEHOLDER = re.compile(r"<image>|<video>")
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: `role` is "system", "user" or "assistant"."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """A row before its frame counts are known.

    Attributes:
        ids: int32[n], token ids, and MEDIUM once for each image or video, in order.
        targets: bool[n], True where the token is predicted from what stands before it.
    """

    ids: np.ndarray
    targets: np.ndarray

    @property
    def num_media(self) -> int:
        """Images and videos of the row."""
        return int((self.ids == MEDIUM).sum())

    @property
    def num_text_tokens(self) -> int:
        """Tokens that are not visual."""
        return len(self.ids) - self.num_media


class _Builder:
    """Collects ids and targets piece by piece."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.targets: list[bool] = []

    def add(self, ids: Sequence[int], target: bool = False) -> None:
        self.ids.extend(ids)
        self.targets.extend([target] * len(ids))

    def finish(self) -> TokenSequence:
        if self.targets:
            self.targets[0] = False  # nothing stands before the first token
        return TokenSequence(np.array(self.ids, np.int32), np.array(self.targets, bool))


def parse_turns(conversations: Any, *, where: str) -> list[Turn]:
    """Reads LLaVA (`from`/`value`) or chat (`role`/`content`) turns.

    A leading turn that is neither the user's nor the system's is dropped, as LLaVA does.

    Raises:
        UserError: naming `where`, when a turn is malformed, of an unknown role, or nothing is left.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise UserError(f"{where}: conversations must be a list of turns")
    turns = []
    for number, entry in enumerate(conversations):
        role, text = _role_and_text(entry)
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise UserError(
                f"{where}: conversations[{number}] must hold from (human, gpt or system) and value, both text"
            )
        turns.append(Turn(role, text))
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if not any(turn.role == "user" for turn in turns):
        raise UserError(f"{where}: conversations holds no human turn")
    return turns


def _role_and_text(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping):
        return None, None
    if "from" in entry:
        return entry["from"], entry.get("value")
    return entry.get("role"), entry.get("content")


def check_placeholders(turns: Sequence[Turn], num_media: int, *, where: str) -> None:
    """Raises UserError unless the user's turns hold exactly one `<image>` or `<video>` for each medium."""
    found = sum(len(_PLACEHOLDER.findall(turn.text)) for turn in turns if turn.role == "user")
    if found != num_media:
        raise UserError(
            f"{where}: {found} <image>/<video> placeholders for {num_media} media; write one for each medium"
        )


def split_at_media(text: str) -> list[str]:
    """The pieces of a user's text around its placeholders: one piece more than there are placeholders.

    A lone placeholder that does not stand first is moved to the front, a newline after it, as LLaVA does.
    """
    text = text.strip() if _PLACEHOLDER.search(text) else text
    pieces = _PLACEHOLDER.split(text)
    if len(pieces) == 2 and pieces[0]:
        return ["", "\n" + (pieces[0] + pieces[1]).strip()]
    return pieces


def chat_sequence(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    label_mode: Literal["clean", "llava"] = "clean",
    add_generation_prompt: bool = False,
) -> TokenSequence:
    """ChatML ids of a conversation. `<image>` and `<video>` in user turns become MEDIUM.

    Args:
        turns: from `parse_turns`; a first system turn replaces `system_prompt`.
        tokenizer: gives the ids.
        system_prompt: of rows that bring none.
        label_mode: which tokens are targets (see the module's docstring).
        add_generation_prompt: end with the assistant's header, ready for an answer.
    """
    if turns[0].role != "system":
        turns = [Turn("system", system_prompt), *turns]
    builder = _Builder()
    for turn in turns:
        _add_turn(builder, turn, tokenizer, whole_turn=label_mode == "llava")
    if add_generation_prompt:
        builder.add([tokenizer.im_start, *tokenizer.encode_plain("assistant\n")])
    if label_mode == "llava":
        always = {tokenizer.im_start, tokenizer.im_end, *tokenizer.encode_plain("\n")}
        targets = [
            target or token in always for token, target in zip(builder.ids, builder.targets, strict=True)
        ]
        builder.targets = targets
    return builder.finish()


def _add_turn(builder: _Builder, turn: Turn, tokenizer: Tokenizer, *, whole_turn: bool) -> None:
    """Adds one turn; of an assistant's turn the header and last newline are targets if `whole_turn`."""
    spoken = turn.role == "assistant"
    builder.add([tokenizer.im_start], spoken and whole_turn)
    if turn.role == "user":
        first, *others = split_at_media(turn.text)
        builder.add(tokenizer.encode_plain("user\n" + first))
        for piece in others:
            builder.add([MEDIUM])
            builder.add(tokenizer.encode_plain(piece))
    else:
        # Header and words are encoded apart, since an answer is generated after the header alone.
        builder.add(tokenizer.encode_plain(turn.role + "\n"), spoken and whole_turn)
        builder.add(tokenizer.encode_plain(turn.text), spoken)
    builder.add([tokenizer.im_end], spoken)
    builder.add(tokenizer.encode_plain("\n"), spoken and whole_turn)


def plain_sequence(turns: Sequence[Turn], tokenizer: Tokenizer, *, where: str) -> TokenSequence:
    """LLaVA's "plain" style: the media, then the caption and a newline, which are the targets.

    Raises:
        UserError: naming `where`, unless there is one user turn with a placeholder and one answer.
    """
    spoken = [turn for turn in turns if turn.role != "system"]
    media = len(_PLACEHOLDER.findall(spoken[0].text)) if spoken else 0
    if [turn.role for turn in spoken] != ["user", "assistant"] or not media:
        raise UserError(
            f'{where}: style "plain" needs one human turn with <image> and one answer; use style "chat"'
        )
    builder = _Builder()
    builder.add([MEDIUM] * media)
    builder.add(tokenizer.encode_plain(spoken[1].text.strip() + "\n"), True)
    return builder.finish()


def check_question(question: str) -> str:
    """`question` without white space around it. Raises UserError when nothing is left."""
    if not question.strip():
        raise UserError("question is empty; write what you want to know, in quotes")
    return question.strip()


def video_prefix(tokenizer: Tokenizer, *, system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> TokenSequence:
    """The prompt up to and including the video: the same for every question, so it is run once."""
    builder = _Builder()
    _add_turn(builder, Turn("system", system_prompt), tokenizer, whole_turn=False)
    builder.add([tokenizer.im_start, *tokenizer.encode_plain("user\n"), MEDIUM])
    return builder.finish()


def question_suffix(question: str, tokenizer: Tokenizer) -> TokenSequence:
    """What follows `video_prefix`: the first question, and the header of the answer."""
    return _question(question, tokenizer, opening=[], before="\n")


def next_question(question: str, tokenizer: Tokenizer) -> TokenSequence:
    """What follows the words of an answer: its end, the next question, and the header of the next answer."""
    opening = [tokenizer.im_end, *tokenizer.encode_plain("\n"), tokenizer.im_start]
    return _question(question, tokenizer, opening=opening, before="user\n")


def _question(question: str, tokenizer: Tokenizer, *, opening: Sequence[int], before: str) -> TokenSequence:
    """Text only: `<image>` or `<video>` in a question that is asked stay plain text."""
    builder = _Builder()
    builder.add([*opening, *tokenizer.encode_plain(before + check_question(question)), tokenizer.im_end])
    builder.add(tokenizer.encode_plain("\n"))
    builder.add([tokenizer.im_start, *tokenizer.encode_plain("assistant\n")])
    return builder.finish()


def prompt_segments(
    question: str,
    tokenizer: Tokenizer,
    *,
    with_video: bool = True,
    history: Sequence[tuple[str, str]] = (),
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> TokenSequence:
    """The whole prompt of `question`, ending with "<|im_start|>assistant\\n".

    Args:
        question: what is asked now.
        tokenizer: gives the ids.
        with_video: put one video (or image) before the first question.
        history: earlier (question, answer) pairs.
        system_prompt: the one the model was trained with.
    """
    builder = _Builder()
    if with_video:
        builder.add(video_prefix(tokenizer, system_prompt=system_prompt).ids.tolist())
    else:
        _add_turn(builder, Turn("system", system_prompt), tokenizer, whole_turn=False)
    questions = [asked for asked, _ in history] + [question]
    for number, asked in enumerate(questions):
        if number:
            builder.add(tokenizer.encode_plain(history[number - 1][1]))
            builder.add(next_question(asked, tokenizer).ids.tolist())
        elif with_video:
            builder.add(question_suffix(asked, tokenizer).ids.tolist())
        else:
            opening = [tokenizer.im_start]
            builder.add(_question(asked, tokenizer, opening=opening, before="user\n").ids.tolist())
    return builder.finish()
