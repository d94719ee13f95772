"""`crosslmm ask` and `crosslmm chat`."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeAlias

from jax import process_count

from crosslmm_jax.config import MeshConfig, ModelConfig, Precision
from crosslmm_jax.data.text import check_question, writable
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.assistant import Answer, Chat, Video, VideoModel
from crosslmm_jax.inference.devices import cost_of
from crosslmm_jax.inference.expected_time import (
    ComputeSeconds,
    RemainingTime,
    compute_seconds,
    duration,
)
from crosslmm_jax.inference.figure import check_format, draw_attention
from crosslmm_jax.inference.load import find_model_folder, load
from crosslmm_jax.inference.many import Item, answers_as_ready
from crosslmm_jax.inference.replies import AnswerOptions, Options
from crosslmm_jax.inference.shapes import keeps_pixels
from crosslmm_jax.inference.watching import (
    RESERVED_POSITIONS,
    AnyMedia,
    Medium,
    check_frames,
    check_media,
    most_frames_to_read,
    read_everywhere,
    read_media,
    sampling_of,
)
from crosslmm_jax.model_folder import Processor, load_model_config, load_processor
from crosslmm_jax.parallel import gather, initialize_processes, is_first_process, together
from crosslmm_jax.utils import Progress, atomic_write, cannot_write

Json: TypeAlias = dict[str, Any]  # an object


def ask(
    model: str,
    video: AnyMedia,
    question: str,
    *,
    frames: int | None,
    precision: Precision | None,
    attention_path: str | None,
    options: Options,
    mesh: MeshConfig | None = None,
    yarn: bool = False,
    keyframes: bool = False,
    started: float | None = None,
) -> Json:
    """Answers one question. Several processes do it together, and each returns the report.

    Args:
      model: MODEL folder.
      video: a medium or several.
      question: the question.
      frames: number of frames to read; None: as in training.
      precision: see `load`.
      attention_path: figure of the answer's T2V attention, in a format of its suffix; the first process
        writes it.
      options: fields of `AnswerOptions`.
      mesh: see `load`.
      yarn: scale positions where these frames need more; see `load`.
      keyframes: see `VideoModel.watch`.
      started: when the process started, by `time.perf_counter`: the report then has `timings`, and phases
        are waited for one by one, which takes a little longer. The file is decoded while the model is loaded;
        "decode" is what is left of it then.

    Returns:
      The report that `crosslmm ask --json` writes.

    Raises:
      UserError: an input cannot be read, the figure cannot be written, or an option is out of range.
    """
    check_question(question)
    if attention_path is not None:
        check_format(attention_path)
    AnswerOptions(**options)
    initialize_processes()
    begun = time.perf_counter()
    folder = find_model_folder(model)
    config, processor = _settings(folder, options)
    if attention_path is not None and "t2v" not in config.cross_attention.directions:
        raise UserError(
            f"--attention {attention_path}: {model} has no T2V, so there is no attention to draw; leave the"
            " option out"
        )
    together(lambda: check_media(video))  # before the weights are read
    most = most_frames_to_read(video, processor, frames)
    if yarn:  # as `load` will scale it, but for the text, whose tokens are not known yet
        positions = most * config.merge.tokens_per_frame + RESERVED_POSITIONS
        config = dataclasses.replace(config, decoder=config.decoder.with_positions(positions))
    check_frames(sampling_of(processor, frames).most_frames, config, given="--frames is {}")
    if not keeps_pixels(most):
        # Of these alone it is known how many there will be.
        exact = None if frames is None or keyframes else lambda: most
        loaded = load(folder, precision, mesh=mesh, frames=exact, yarn_frames=most if yarn else 0)
        watched = _watch(loaded, video, frames, keyframes=keyframes, timed=started is not None)
    else:
        with ThreadPoolExecutor(1) as beside:  # the file is decoded while the weights are read
            reading = beside.submit(read_media, video, frames, config, processor, keyframes=keyframes)
            loaded = load(
                folder, precision, mesh=mesh, yarn_frames=most if yarn else 0,
                frames=lambda: sum(len(clip.frames) for clip in reading.result()),
            )  # fmt: skip
            waiting = time.perf_counter()
            clips = read_everywhere(reading.result)
        seconds = None if started is None else {"decode": time.perf_counter() - waiting}
        watched = loaded.watch_clips(clips, seconds=seconds)
    answer = watched.answer(question, **options)
    if attention_path is not None:
        maps = watched.attention(question, answer_prefix=options.get("answer_prefix", ""))
        if is_first_process():
            draw_attention(
                attention_path, watched.frames_at, watched.frame_times, maps,
                title=f"{question} {answer.text}",
            )  # fmt: skip
    report: Json = {
        "question": question,
        "answer": answer.text,
        "video": str(video),
        "frame_times": [round(float(t), 3) for t in watched.frame_times],
        "tokens": answer.num_tokens,
        "seconds": round(answer.seconds, 3),
        "tokens_per_second": round(answer.tokens_per_second, 2),
        "finish_reason": answer.finish_reason,
        "keyframes": keyframes,
        "yarn_factor": loaded.config.decoder.yarn_factor,
    }
    if started is not None:
        phases = {"imports": begun - started, **loaded.seconds, **watched.seconds}
        phases |= {"first_token": answer.first_token_s, "answer": answer.seconds}
        waited = ("imports", "load", "decode", "encode", "prefill", "answer")
        phases["total"] = sum(phases[phase] for phase in waited)
        report["timings"] = {phase: round(value, 4) for phase, value in phases.items()}
    return report


def _watch(
    model: VideoModel, media: AnyMedia, frames: int | None, *, keyframes: bool, timed: bool = False
) -> Video:
    """Watches. What a long video costs is said beforehand; then its progress, and the time that is left."""
    most, first = most_frames_to_read(media, model.processor, frames), is_first_process()
    if keeps_pixels(most):
        return model.watch(media, frames, keyframes=keyframes, timed=timed)
    compute = functools.partial(compute_seconds, model.config, model.compiled.mesh)
    if first:
        print(cost_of(model.config, most) + _time_text(compute(most)), file=sys.stderr)
    remaining = RemainingTime(compute)
    with Progress("watch", unit="frames", total=most, quiet=not first) as progress:

        def tell(done: int, total: int) -> None:
            progress.total = total  # keyframes may be fewer than are wanted
            note, is_new = remaining.note(done, total)
            (progress.report if is_new and note else progress.update)(done, note)

        return model.watch(media, frames, keyframes=keyframes, timed=timed, on_progress=tell)


def _time_text(compute: ComputeSeconds | None) -> str:
    if compute is None:
        return ""
    encode, prefill = map(duration, compute)
    return f"; encoding takes about {encode}, or as long as decoding, and prefill about {prefill}"


def chat(
    model: str, video: AnyMedia, *, frames: int | None, precision: Precision | None, options: Options,
    mesh: MeshConfig | None = None, yarn: bool = False, keyframes: bool = False,
) -> None:  # fmt: skip
    """Reads questions line by line and streams answers, until an empty line or the end of the input.

    Of several processes the first one reads and prints. Arguments as for `ask`.
    """
    AnswerOptions(**options)
    initialize_processes()
    _settings(find_model_folder(model), options)
    together(lambda: check_media(video))  # before the weights are read
    loaded = load(
        model, precision, mesh=mesh, yarn_frames=_yarn_frames(model, [video], frames) if yarn else 0
    )
    watched, first = _watch(loaded, video, frames, keyframes=keyframes), is_first_process()
    conversation = watched.chat(**options)
    if sys.stdin.isatty() and first:
        print(f"{len(watched.frame_times)} frames read. Ask a question; an empty line ends the chat.")
    while (question := gather(_read_question() if first else "")[0]).strip():
        _answer(conversation, question, prints=first)


def _answer(conversation: Chat, question: str, *, prints: bool) -> None:
    """Streams an answer. If it is refused, or stopped by Ctrl-C, the conversation stays as it was.

    Ctrl-C that comes when the answer is complete cannot stop it: a line says that the question counts.
    """
    last = conversation.last
    try:
        for piece in conversation.ask(question):
            print(piece if prints else "", end="", flush=True)
    except UserError as error:  # the same one on every process
        if prints:
            print(f"crosslmm: error: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        if process_count() > 1:  # the others are in the middle of a program that all run
            raise
        print(flush=True)
        counts = "counts: its answer was complete" if conversation.last is not last else "does not count"
        print(f"(stopped; the question {counts}. Ctrl-C again leaves)", file=sys.stderr)
        return
    print(end="\n" if prints else "")


def _settings(folder: Path, options: Options) -> tuple[ModelConfig, Processor]:
    """Config and processor of a MODEL folder, before its weights are read.

    Raises:
      UserError: they cannot be read, or not even an answer of `options` alone has room.
    """
    config, processor = together(lambda: (load_model_config(folder), load_processor(folder)))
    wanted, limit = AnswerOptions(**options).max_new_tokens, config.decoder.max_positions
    if wanted >= limit:
        raise UserError(
            f"--max-new-tokens is {wanted}; this model has {limit} positions, for media and question too"
        )
    return config, processor


def _yarn_frames(model: str, media: Iterable[AnyMedia], frames: int | None) -> int:
    """Frames that positions are scaled for: of the media with most."""
    processor = together(lambda: load_processor(find_model_folder(model)))
    return max(most_frames_to_read(each, processor, frames) for each in media)


def _read_question() -> str:
    """The next line; "" at the end of the input, which ends the chat."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return ""
        except KeyboardInterrupt:
            print(file=sys.stderr)  # what follows begins a line
            raise
        except UnicodeDecodeError:
            print("crosslmm: error: the question is not UTF-8; set the terminal to UTF-8", file=sys.stderr)


def ask_many(
    model: str,
    questions: str,
    out: str,
    *,
    media_root: str = "",
    frames: int | None = None,
    precision: Precision | None = None,
    mesh: MeshConfig | None = None,
    yarn: bool = False,
    keyframes: bool = False,
    videos_at_once: int | None = None,
    options: Options | None = None,
    quiet: bool = False,
) -> str:
    """Answers the questions of a JSONL file. Of several processes the first one writes the answers.

    A line of `questions` is {"video": path or list of paths, "question": text}. It may have "start" and "end"
    in seconds, and fields of `AnswerOptions` but for `sampling`. A line of `out` has all keys of a line of
    `questions`, its number "line" from 1 on, and "response", "tokens" and "finish_reason", or "error".

    The same command continues after a stop: lines of `out` are kept if they answer the same line, and those
    with an error are tried again. Neighbouring lines with the same video share it.

    Args:
      model: MODEL folder.
      questions: JSONL file to read.
      out: JSONL file to write.
      media_root: folder that paths start from.
      frames: of each video; None: as in training.
      precision: see `load`.
      mesh: see `load`.
      yarn: scale positions, for all questions alike, where the one with most frames needs more; see `load`.
      keyframes: see `VideoModel.watch`.
      videos_at_once: see `answers_as_ready`.
      options: fields of `AnswerOptions`, where a line has none.
      quiet: show no progress on stderr.

    Returns:
      A line that says what was written.

    Raises:
      UserError: a file cannot be read or written, a line is not as above, or the processes have other
        questions.
    """
    AnswerOptions(**(options or {}))
    initialize_processes()
    _settings(find_model_folder(model), options or {})
    lines = together(
        lambda: [_Line(number, row, questions) for number, row in _rows(questions)],
        same=lambda lines: hashlib.sha256(json.dumps([line.row for line in lines]).encode()).hexdigest(),
        what="the questions",
    )
    given = together(lambda: [line.item(media_root, options or {}) for line in lines])
    first = is_first_process()
    # The first process says what is left to do: others need not see what it has written.
    done = set(gather(sorted(together(lambda: _answered(Path(out), lines) if first else set())))[0])
    left = [place for place in range(len(lines)) if lines[place].number not in done]
    errors = 0
    if left:
        quiet = quiet or not first
        with (
            together(lambda: _open(out if first else os.devnull)) as file,
            Progress("ask", unit="questions", total=len(lines), done=len(done), quiet=quiet) as progress,
        ):
            most = _yarn_frames(model, (item.media for item in given), frames) if yarn else 0
            loaded = load(model, precision, mesh=mesh, yarn_frames=most)
            items = (given[place] for place in left)
            ready = answers_as_ready(
                loaded, items, frames=frames, keyframes=keyframes, videos_at_once=videos_at_once
            )
            for number, answer in ready:
                errors += isinstance(answer, UserError)
                together(functools.partial(_write, file, lines[left[number]].answered(answer)))
                progress.update(progress.done + 1, f"{errors} errors")
    again = "; the same command tries those with an error again" if errors else ""
    return f"{len(lines) - errors} answers and {errors} errors in {out}{again}"


def _open(path: str) -> IO[str]:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(Path(path), error, resume=True) from error


def _write(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()


class _Line:
    """One line of a file of questions."""

    def __init__(self, number: int, row: Json, path: str) -> None:
        """Raises UserError when a field is missing or of the wrong type."""
        self.number, self.row, self.where = number, row, f"{path}, line {number}"
        video = row.get("video")
        paths = [video] if isinstance(video, str) else video
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
            raise UserError(f'{self.where}: "video" must be a path or a list of paths')
        if not isinstance(row.get("question"), str):
            raise UserError(f'{self.where}: "question" must be a text')
        try:
            check_question(row["question"])
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error
        for field in _WRITTEN:
            if field in row:
                raise UserError(f'{self.where}: "{field}" is a key of the answers; give it another name')
        for field in ("start", "end"):
            if not isinstance(row.get(field), int | float | None) or isinstance(row.get(field), bool):
                raise UserError(f'{self.where}: "{field}" must be a number of seconds')
        self._paths = paths

    def item(self, media_root: str, options: Options) -> Item:
        """The question, with `options` where the line has none of its own."""
        media: list[AnyMedia] = [
            Medium(os.path.join(media_root, path), self.row.get("start"), self.row.get("end"))
            for path in self._paths
        ]
        own: Any = {name: self.row[name] for name in _OWN_OPTIONS if name in self.row}
        try:
            return Item(media, self.row["question"], AnswerOptions(**options | own))  # type: ignore[arg-type]
        except (TypeError, UserError) as error:
            raise UserError(f"{self.where}: {error}") from error

    def answered(self, answer: Answer | UserError) -> str:
        """The line of the output."""
        result = (
            {"error": str(answer)}
            if isinstance(answer, UserError)
            else {
                "response": answer.text,
                "tokens": answer.num_tokens,
                "finish_reason": answer.finish_reason,
            }  # fmt: skip
        )
        return writable(json.dumps({"line": self.number, **self.row, **result}, ensure_ascii=False)) + "\n"


_WRITTEN = ("line", "response", "tokens", "finish_reason", "error")
_OWN_OPTIONS = ("max_new_tokens", "seed", "stop", "answer_prefix")


def _rows(path: str) -> Iterator[tuple[int, Json]]:
    """Number and object of each line that is not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: cannot be read ({error}); give a JSONL file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); correct the line") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: write an object, {{"video": ..., "question": ...}}')
        yield number, row


def _answered(out: Path, lines: list[_Line]) -> set[int]:
    """Numbers of the lines that `out` answers already. Errors and answers to other lines are taken out of it.

    Raises:
      UserError: `out` holds what this command has not written.
    """
    if not out.exists():
        return set()
    by_number, kept = {line.number: line for line in lines}, {}
    *complete, last = out.read_text(encoding="utf-8", errors="replace").split("\n")
    if last and not '{"line": '.startswith(last[:9]):  # what a stopped run leaves begins like this
        complete.append(last)
    for place, text in enumerate(complete, start=1):
        try:
            row: Json = json.loads(text)
            line = by_number.get(row["line"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--out {out}, line {place}: no answer that this command wrote; name another file"
            ) from None
        same = line is not None and {key: row[key] for key in row if key not in _WRITTEN} == line.row
        if line is not None and same and "response" in row:
            kept[line.number] = text + "\n"
    atomic_write(out, "".join(kept.values()).encode())
    return set(kept)
