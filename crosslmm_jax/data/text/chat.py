"""Turns of a conversation to token ids, with places for media, and the targets that become the loss mask.

The template is Qwen's ChatML, with one system prompt for training and inference. Targets of the loss:

    label_mode "clean"  the assistant's words and the `<|im_end|>` after them
    label_mode "llava"  also the assistant's header, and every newline, `<|im_start|>` and `<|im_end|>` of the
                        row, as in LLaVA-NeXT
    style "plain"       a caption and the newline after it, without a template, as in LLaVA's projector
                        pretraining

A time instruction follows its video as "\\n{sentence}\\n". It is encoded apart from the question after it, so
that a video can be prefilled once for many questions with the ids that training saw.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from crosslmm_jax.config import TimeInstruction
from crosslmm_jax.data.text.time_instruction import ClipMeta, time_text
from crosslmm_jax.data.text.tokenizer import Tokenizer
from crosslmm_jax.data.text.turns import PLACEHOLDER, Turn, count_placeholders, split_at_media, writable
from crosslmm_jax.errors import DataError, UserError

MEDIUM = -1  # in a token sequence, the place of the frames of one image or video
_Piece = tuple[str | int, bool]  # text to encode by itself, a special token or MEDIUM; whether it is a target
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """The tokens of a row before its frame counts are known.

    Attributes:
        ids: int32[n], token ids, and MEDIUM once per image or video, in order.
        targets: bool[n], True where the loss is taken on the token, predicted from those before it.
        dropped_turns: turns dropped at the end of a row that was too long. Their media are dropped too: the
            row keeps its first `num_media`.
    """

    ids: np.ndarray
    targets: np.ndarray
    dropped_turns: int = 0

    @classmethod
    def of_text(cls, ids: Sequence[int]) -> "TokenSequence":
        """Text without targets."""
        return cls(np.array(ids, np.int32), np.zeros(len(ids), bool))

    def followed_by(self, other: "TokenSequence") -> "TokenSequence":
        """This and then `other`. Neither may have dropped turns."""
        ids, targets = ((self.ids, other.ids), (self.targets, other.targets))
        return TokenSequence(np.concatenate(ids), np.concatenate(targets))

    @property
    def num_media(self) -> int:
        """Number of images and videos."""
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

    def add_pieces(self, pieces: Iterable[_Piece], tokenizer: Tokenizer) -> None:
        for content, target in pieces:
            self.add(tokenizer.encode_plain(content) if isinstance(content, str) else [content], target)

    def add_media(self, times: Sequence[str | None], tokenizer: Tokenizer) -> None:
        """Several media in a row, on a line each."""
        for number, time in enumerate(times):
            if number:
                self.add(tokenizer.encode_plain("\n"))
            self.add_pieces(_medium(time), tokenizer)

    def finish(self) -> TokenSequence:
        if self.targets:
            self.targets[0] = False  # nothing predicts the first token
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
    """Ids and targets of a row for training. `<image>` and `<video>` in user turns become MEDIUM.

    Args:
        turns: turns of the row. A first system turn replaces `system_prompt`.
        tokenizer: gives the ids.
        where: file and row, for messages.
        style: "plain" keeps media and caption only, without system prompt and time instruction.
        label_mode: which tokens of a chat are targets; see the module's docstring.
        system_prompt: for rows without a system turn.
        time_instruction: what a chat says about each video.
        clips: one per medium of the row; read only with a time instruction.
        max_text_tokens: a longer row is truncated to the most turns that fit and end with an answer.

    Raises:
        DataError: a plain row is not a single exchange, there are not as many clips as placeholders, or not
            even the first exchange fits (reason "too_long").
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
    """The longest beginning that fits.

    Args:
        sequence: the row.
        ends: number of turns, the last an answer -> length of their ids.
        num_turns: turns of the row.
        max_text_tokens: the limit.
        where: file and row, for messages.
    """
    text_tokens = np.cumsum(sequence.ids != MEDIUM)
    for kept, end in sorted(ends.items(), reverse=True):
        if text_tokens[end - 1] <= max_text_tokens:
            return TokenSequence(sequence.ids[:end], sequence.targets[:end], num_turns - kept)
    shortest = text_tokens[min(ends.values(), default=len(text_tokens)) - 1]
    detail = f"its first exchange has {shortest} text tokens, more than max_text_tokens ({max_text_tokens})"
    raise DataError(where, "too_long", detail)


def count_tokens(turns: Sequence[Turn], tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Token counts of a chat for an index, with the default system prompt and no time instruction.

    Returns:
        text_tokens: of all turns.
        answer_tokens, answer_media: for each answer the text tokens and media up to its end, which is what
            a truncated row can have.
    """
    tokens = media = 0
    answer_tokens: list[int] = []
    answer_media: list[int] = []
    for turn in _with_system(turns, DEFAULT_SYSTEM_PROMPT):
        for content, _ in _pieces(turn, tokenizer, whole_turn=False, times=iter(())):
            if isinstance(content, str):
                tokens += tokenizer.count_plain(content)
            elif content == MEDIUM:
                media += 1
            else:
                tokens += 1
        if turn.role == "assistant":
            answer_tokens.append(tokens)
            answer_media.append(media)
    return {"text_tokens": tokens, "answer_tokens": answer_tokens, "answer_media": answer_media}


def count_plain_tokens(turns: Sequence[Turn], tokenizer: Tokenizer) -> int:
    """Text tokens of `plain_sequence`; 0 for a row that does not fit that style."""
    caption = _caption(turns)
    return 0 if caption is None else tokenizer.count_plain(caption.text)


def _chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    system_prompt: str,
    label_mode: Literal["clean", "llava"],
    times: Iterator[str | None],
) -> tuple[TokenSequence, dict[int, int]]:
    """A conversation, and for each answer: number of turns up to it -> length of their ids.

    `times` gives the time instruction of each medium, or None.
    """
    builder = _Builder()
    whole_turn = label_mode == "llava"
    every = _with_system(turns, system_prompt)
    ends = {}
    for number, turn in enumerate(every, start=1 + len(turns) - len(every)):
        builder.add_pieces(_pieces(turn, tokenizer, whole_turn=whole_turn, times=times), tokenizer)
        if turn.role == "assistant":
            ends[number] = len(builder.ids)
    if whole_turn:
        always = {tokenizer.im_start, tokenizer.im_end, *tokenizer.encode_plain("\n")}
        pairs = zip(builder.ids, builder.targets, strict=True)
        builder.targets = [target or token in always for token, target in pairs]
    return builder.finish(), ends


def _with_system(turns: Sequence[Turn], system_prompt: str) -> Sequence[Turn]:
    """`turns`, after one of `system_prompt` where they have no system turn."""
    return turns if turns[0].role == "system" else [Turn("system", system_prompt), *turns]


def _pieces(
    turn: Turn, tokenizer: Tokenizer, *, whole_turn: bool, times: Iterator[str | None]
) -> list[_Piece]:
    """One turn in ChatML. With `whole_turn` the header and last newline of an answer are targets too."""
    answer = turn.role == "assistant"
    pieces: list[_Piece] = [(tokenizer.im_start, answer and whole_turn)]
    if turn.role == "user":
        first, *others = split_at_media(turn.text)
        pieces.append(("user\n" + first, False))
        for text in others:
            pieces += [*_medium(next(times, None)), (text, False)]
    else:
        # Header and words are encoded apart, as in inference, where the answer is generated after the header.
        pieces += [(turn.role + "\n", answer and whole_turn), (turn.text, answer)]
    return [*pieces, (tokenizer.im_end, answer), ("\n", answer and whole_turn)]


def _medium(time: str | None) -> list[_Piece]:
    """The place of a medium, and its time instruction."""
    return [(MEDIUM, False)] if time is None else [(MEDIUM, False), (f"\n{time}\n", False)]


def plain_sequence(turns: Sequence[Turn], tokenizer: Tokenizer, *, where: str) -> TokenSequence:
    """LLaVA's "plain" style: the media, then the caption and a newline, which are the targets.

    Raises:
        DataError: unless there is one user turn with a placeholder, and one answer.
    """
    caption = _caption(turns)
    if caption is None:
        detail = 'style "plain" needs one human turn with <image> and one answer; use style "chat"'
        raise DataError(where, "conversation", detail)
    builder = _Builder()
    builder.add([MEDIUM] * caption.media)
    builder.add(tokenizer.encode_plain(caption.text), True)
    return builder.finish()


class _Caption(NamedTuple):
    """A row in the plain style: its number of media, and the text after them."""

    media: int
    text: str


def _caption(turns: Sequence[Turn]) -> _Caption | None:
    """The row in the plain style; None unless it is one question with media and one answer."""
    exchange = [turn for turn in turns if turn.role != "system"]
    if [turn.role for turn in exchange] != ["user", "assistant"]:
        return None
    media = len(PLACEHOLDER.findall(exchange[0].text))
    return _Caption(media, exchange[1].text.strip() + "\n") if media else None


def check_question(question: str) -> str:
    """`question` without white space around it. Raises UserError if it is empty, or no text."""
    if not question.strip():
        raise UserError("question is empty; write what you want to know, in quotes")
    if writable(question) != question:
        raise UserError(f"question {question!r} has half of a character (a surrogate); write the whole one")
    return question.strip()


def media_prefix(
    tokenizer: Tokenizer, times: Sequence[str | None], *, system_prompt: str = DEFAULT_SYSTEM_PROMPT
) -> TokenSequence:
    """The prompt up to its media and their time instructions: the same for every question, so prefilled once.

    Args:
        tokenizer: gives the ids.
        times: one entry per medium: its time instruction (`time_instruction.time_text`) or None.
        system_prompt: as in training.
    """
    builder = _Builder()
    system = Turn("system", system_prompt)
    builder.add_pieces(_pieces(system, tokenizer, whole_turn=False, times=iter(())), tokenizer)
    builder.add([tokenizer.im_start, *tokenizer.encode_plain("user\n")])
    builder.add_media(times, tokenizer)
    return builder.finish()


def question_suffix(question: str, tokenizer: Tokenizer, *, answer_prefix: str = "") -> TokenSequence:
    """The continuation of `media_prefix`: the first question, and the header of its answer."""
    return _question(question, tokenizer, before="\n", answer_prefix=answer_prefix)


def further_media(tokenizer: Tokenizer, times: Sequence[str | None], *, answered: bool) -> TokenSequence:
    """Media that come later in a conversation, before `question_suffix`.

    Args:
        tokenizer: gives the ids.
        times: one entry per medium, as of `media_prefix`.
        answered: they come with a question after an answer; False: after media of the same turn.
    """
    builder = _Builder()
    if answered:
        builder.add([tokenizer.im_end, *tokenizer.encode_plain("\n"), tokenizer.im_start])
    builder.add(tokenizer.encode_plain("user\n" if answered else "\n"))
    builder.add_media(times, tokenizer)
    return builder.finish()


def next_question(question: str, tokenizer: Tokenizer, *, answer_prefix: str = "") -> TokenSequence:
    """The continuation of an answer: its end, the next question, and the header of the next answer."""
    opening = [tokenizer.im_end, *tokenizer.encode_plain("\n"), tokenizer.im_start]
    return _question(question, tokenizer, opening, before="user\n", answer_prefix=answer_prefix)


def _question(
    question: str, tokenizer: Tokenizer, opening: Sequence[int] = (), *, before: str, answer_prefix: str
) -> TokenSequence:
    """A question without media: `<image>` and `<video>` in it stay plain text."""
    builder = _Builder()
    builder.add([*opening, *tokenizer.encode_plain(before + check_question(question)), tokenizer.im_end])
    builder.add(tokenizer.encode_plain("\n"))
    builder.add([tokenizer.im_start, *tokenizer.encode_plain("assistant\n")])
    builder.add(tokenizer.encode_plain(answer_prefix))
    return builder.finish()
