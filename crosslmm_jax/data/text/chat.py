"""Turns of a conversation to token ids, with places for the media and the targets of the loss.

The template is Qwen's ChatML with one system text for training and inference. Three label rules exist:
"clean" trains the assistant's words and the `<|im_end|>` after them; "llava" copies LLaVA-NeXT, which also
trains the assistant header and every newline, `<|im_start|>` and `<|im_end|>` of the whole row; the "plain"
style (LLaVA's projector pretraining) has no template and trains a caption and the newline after it.

A time instruction follows its video as "\\n{sentence}\\n", encoded apart from the question after it, so that
a video is run once for many questions and training still sees the same ids.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from crosslmm_jax.config import TimeInstruction
from crosslmm_jax.data.text.time_instruction import ClipMeta, time_text
from crosslmm_jax.data.text.tokenizer import Tokenizer
from crosslmm_jax.data.text.turns import PLACEHOLDER, Turn, count_placeholders, split_at_media
from crosslmm_jax.errors import DataError, UserError

MEDIUM = -1  # stands in a token sequence where the frames of one image or video go
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """A row before its frame counts are known.

    Attributes:
        ids: int32[n], token ids, and MEDIUM once for each image or video, in order.
        targets: bool[n], True where the token is predicted from what stands before it.
        dropped_turns: turns left out at the end because the row was too long; their media are left out too,
            so the row has only its first `num_media`.
    """

    ids: np.ndarray
    targets: np.ndarray
    dropped_turns: int = 0

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

    def add_medium(self, time: str | None, tokenizer: Tokenizer) -> None:
        self.add([MEDIUM])
        if time is not None:
            self.add(tokenizer.encode_plain(f"\n{time}\n"))

    def finish(self) -> TokenSequence:
        if self.targets:
            self.targets[0] = False  # nothing stands before the first token
        return TokenSequence(np.array(self.ids, np.int32), np.array(self.targets, bool))


def tokenise(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    where: str,
    style: Literal["chat", "plain"] = "chat",
    label_mode: Literal["clean", "llava"] = "clean",
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    time_instruction: TimeInstruction = "none",
    clips: Sequence[ClipMeta] = (),
    max_text_tokens: int | None = None,
) -> TokenSequence:
    """Ids and targets of a row for training.

    Args:
        turns: of the row.
        tokenizer: gives the ids.
        where: file and row, for messages.
        style: "plain" has room for media and caption only: no system text, no time instruction.
        label_mode: which tokens of a chat are targets (see the module's docstring).
        system_prompt: of rows that bring none.
        time_instruction: what a chat says about each video.
        clips: one for each medium of the row; needed with a time instruction alone.
        max_text_tokens: a longer row keeps the longest head of whole turns that ends with an answer.

    Raises:
        DataError: a plain row is no single exchange, there are not as many clips as placeholders, or not even
            the first exchange fits (reason "too_long").
    """
    if style == "plain":
        sequence = plain_sequence(turns, tokenizer, where=where)
        ends = {len(turns): len(sequence.ids)}
    else:
        times: list[str | None] = []
        if time_instruction != "none":
            if len(clips) != (places := count_placeholders(turns)):
                detail = f"{places} <image>/<video> placeholders for {len(clips)} media; write one for each"
                raise DataError(where, "placeholders", detail)
            times = [time_text(clip, time_instruction) for clip in clips]
        sequence, ends = _chat(turns, tokenizer, system_prompt, label_mode, iter(times))
    if max_text_tokens is None or sequence.num_text_tokens <= max_text_tokens:
        return sequence
    return _truncate(sequence, ends, len(turns), max_text_tokens, where)


def _truncate(
    sequence: TokenSequence, ends: dict[int, int], num_turns: int, max_text_tokens: int, where: str
) -> TokenSequence:
    """The longest head that fits. `ends[n]`: length of the ids of the first n turns, the last an answer."""
    text_tokens = np.cumsum(sequence.ids != MEDIUM)
    for kept, end in sorted(ends.items(), reverse=True):
        if text_tokens[end - 1] <= max_text_tokens:
            return TokenSequence(sequence.ids[:end], sequence.targets[:end], num_turns - kept)
    shortest = text_tokens[min(ends.values(), default=len(text_tokens)) - 1]
    detail = f"its first exchange has {shortest} text tokens, more than max_text_tokens ({max_text_tokens})"
    raise DataError(where, "too_long", detail)


def count_tokens(turns: Sequence[Turn], tokenizer: Tokenizer) -> dict[str, Any]:
    """What an index holds of a chat with the default system prompt and no time instruction.

    Returns:
        text_tokens of all turns; answer_tokens and answer_media up to and with each answer, lists of what
        truncation may leave.
    """
    sequence, ends = _chat(turns, tokenizer, DEFAULT_SYSTEM_PROMPT, "clean", iter(()))
    media = np.cumsum(sequence.ids == MEDIUM)[[end - 1 for end in ends.values()]]
    return {
        "text_tokens": sequence.num_text_tokens,
        "answer_tokens": (list(ends.values()) - media).tolist(),
        "answer_media": media.tolist(),
    }


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
    return _chat(turns, tokenizer, system_prompt, label_mode, iter(()), add_generation_prompt)[0]


def _chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    system_prompt: str,
    label_mode: Literal["clean", "llava"],
    times: Iterator[str | None],
    add_generation_prompt: bool = False,
) -> tuple[TokenSequence, dict[int, int]]:
    """The ids of a conversation, and for each answer the turns up to it and the length of their ids."""
    builder = _Builder()
    whole_turn = label_mode == "llava"
    if turns[0].role != "system":
        _add_turn(builder, Turn("system", system_prompt), tokenizer, whole_turn=whole_turn, times=times)
    ends = {}
    for number, turn in enumerate(turns, start=1):
        _add_turn(builder, turn, tokenizer, whole_turn=whole_turn, times=times)
        if turn.role == "assistant":
            ends[number] = len(builder.ids)
    if add_generation_prompt:
        builder.add([tokenizer.im_start, *tokenizer.encode_plain("assistant\n")])
    if whole_turn:
        always = {tokenizer.im_start, tokenizer.im_end, *tokenizer.encode_plain("\n")}
        pairs = zip(builder.ids, builder.targets, strict=True)
        builder.targets = [target or token in always for token, target in pairs]
    return builder.finish(), ends


def _add_turn(
    builder: _Builder, turn: Turn, tokenizer: Tokenizer, *, whole_turn: bool, times: Iterator[str | None]
) -> None:
    """Adds one turn; of an assistant's turn the header and last newline are targets if `whole_turn`."""
    spoken = turn.role == "assistant"
    builder.add([tokenizer.im_start], spoken and whole_turn)
    if turn.role == "user":
        first, *others = split_at_media(turn.text)
        builder.add(tokenizer.encode_plain("user\n" + first))
        for piece in others:
            builder.add_medium(next(times, None), tokenizer)
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
        DataError: naming `where`, unless there is one user turn with a placeholder and one answer.
    """
    spoken = [turn for turn in turns if turn.role != "system"]
    media = len(PLACEHOLDER.findall(spoken[0].text)) if spoken else 0
    if [turn.role for turn in spoken] != ["user", "assistant"] or not media:
        detail = 'style "plain" needs one human turn with <image> and one answer; use style "chat"'
        raise DataError(where, "conversation", detail)
    builder = _Builder()
    builder.add([MEDIUM] * media)
    builder.add(tokenizer.encode_plain(spoken[1].text.strip() + "\n"), True)
    return builder.finish()


def check_question(question: str) -> str:
    """`question` without white space around it. Raises UserError when nothing is left."""
    if not question.strip():
        raise UserError("question is empty; write what you want to know, in quotes")
    return question.strip()


def video_prefix(
    tokenizer: Tokenizer, *, system_prompt: str = DEFAULT_SYSTEM_PROMPT, time_text: str | None = None
) -> TokenSequence:
    """The prompt up to and including the video: the same for every question, so it is run once.

    Args:
        tokenizer: gives the ids.
        system_prompt: the one the model was trained with.
        time_text: the time instruction it was trained with, from `time_instruction.time_text`.
    """
    builder = _Builder()
    _add_turn(builder, Turn("system", system_prompt), tokenizer, whole_turn=False, times=iter(()))
    builder.add([tokenizer.im_start, *tokenizer.encode_plain("user\n")])
    builder.add_medium(time_text, tokenizer)
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
    time_text: str | None = None,
) -> TokenSequence:
    """The whole prompt of `question`, ending with "<|im_start|>assistant\\n".

    Args:
        question: what is asked now.
        tokenizer: gives the ids.
        with_video: put one video (or image) before the first question.
        history: earlier (question, answer) pairs.
        system_prompt: the one the model was trained with.
        time_text: the video's time instruction.
    """
    builder = _Builder()
    if with_video:
        prefix = video_prefix(tokenizer, system_prompt=system_prompt, time_text=time_text)
        builder.add(prefix.ids.tolist())
    else:
        _add_turn(builder, Turn("system", system_prompt), tokenizer, whole_turn=False, times=iter(()))
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
