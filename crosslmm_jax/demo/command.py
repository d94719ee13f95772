"""`crosslmm demo`: makes videos, trains both stages, evaluates, compares with a control, asks questions.

    OUT/data/        mp4 files and LLaVA-style annotations
    OUT/index/       indexes of their rows
    OUT/tokenizer/   a small tokenizer
    OUT/train/       run folders of both stages, and of the control
    OUT/model/       MODEL folder: `crosslmm ask OUT ...` works
    OUT/demo.json    accuracies, seconds, questions
    OUT/demo.png     loss, gates and attention

The same command with the same OUT, seed and size resumes: what is trained is not trained again.
"""

import contextlib
import json
import shlex
import shutil
import time
from pathlib import Path

from crosslmm_jax.demo import recipe
from crosslmm_jax.demo.ask import AskedVideo, ask_heldout_video
from crosslmm_jax.demo.report import demo_json, print_questions, print_table
from crosslmm_jax.demo.train_and_evaluate import InBackground, TrainedModel, train_and_evaluate
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import atomic_folder, atomic_write, check_local

_SETTINGS = "settings.json"


def run(out: str | Path, *, seed: int = 0, quick: bool = False) -> dict[str, object]:
    """Runs the demo, prints a table and the answers, and writes `demo.json` and `demo.png`.

    Args:
      out: folder for everything; created if it does not exist.
      seed: of videos, weights and order of rows.
      quick: few videos and steps. Shows that everything runs; the model learns little.

    Returns:
      The content of `demo.json`.

    Raises:
      UserError: `out` cannot be written, or has other content, or the demo with another seed or size.
    """
    begin = time.perf_counter()
    folder = claim_folder(Path(out), seed=seed, quick=quick)
    size = recipe.QUICK if quick else recipe.FULL
    _write_inputs(folder, size, seed)
    seconds = {"data": time.perf_counter() - begin}
    trained, control, in_parallel = _train_both(folder, size, seed)
    seconds |= trained.seconds | {"control": sum(control.seconds.values())}
    since = time.perf_counter()
    with atomic_folder(folder / "model", resume=False) as model:
        shutil.copytree(trained.model, model, dirs_exist_ok=True)
    asked = ask_heldout_video(folder, seed=seed)
    figure = _write_figure(folder / "demo.png", trained, control, asked)
    seconds["questions"] = time.perf_counter() - since
    seconds["total"] = time.perf_counter() - begin
    result = demo_json(folder, trained, control, seconds, asked, seed=seed, quick=quick)
    atomic_write(folder / "demo.json", _as_json(result))
    print_table(trained, control, seconds, in_parallel=in_parallel)
    print_questions(asked)
    print(f"\n{figure}\n{folder / 'demo.json'}\n{folder / 'model'}: a MODEL folder; ask it:")
    print(shlex.join(["crosslmm", "ask", str(folder), str(asked.video), asked.questions[0].question]))
    return result


def claim_folder(out: Path, *, seed: int, quick: bool) -> Path:
    """Writes this demo's settings to the folder `out` and returns its absolute path.

    Raises:
      UserError: it cannot be written, or has other content than this demo with this seed and size.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed is {seed}; it must be 0 or more and below 2^31")
    check_local(out)
    settings = {"seed": seed, "quick": quick}
    path = out / _SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if found is None and any(out.iterdir()):
            raise UserError(f"--out {out}: holds files that are not a demo's; name a new folder")
        if found not in (None, settings):
            raise UserError(
                f"--out {out}: has the demo of another seed or size, {found}; name another folder, or give"
                " the same --seed and --quick"
            )
        atomic_write(path, _as_json(settings))  # fails if the folder cannot be written
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: {reason}; name a folder that can be written") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); name another folder with --out") from error
    return out.resolve()


def _as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_inputs(folder: Path, size: recipe.Size, seed: int) -> None:
    from crosslmm_jax.data.index import build_index
    from crosslmm_jax.demo.synthetic import write_dataset
    from crosslmm_jax.demo.tokenizer import write_default_tokenizer

    write_dataset(
        folder / "data", num_train=size.num_train, num_heldout=size.num_heldout, seed=seed,
        distractors=recipe.DISTRACTORS,
    )  # fmt: skip
    write_default_tokenizer(folder / "tokenizer")
    for rows in ("captions", "dialogues", "heldout"):
        build_index(
            str(folder / "data" / f"{rows}.json"), folder / "index" / rows, quiet=True,
            tokenizer=str(folder / "tokenizer"),
        )  # fmt: skip


def _train_both(folder: Path, size: recipe.Size, seed: int) -> tuple[TrainedModel, TrainedModel, bool]:
    """The model, the control, and whether they were trained at the same time."""
    import jax

    heldout = recipe.heldout(folder, size=size)
    stages, control_stages = (
        recipe.both_stages(folder, size=size, seed=seed, cross_attention=on) for on in (True, False)
    )
    # Only one process can use an accelerator: there the control is trained afterwards.
    in_parallel = jax.default_backend() == "cpu"
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(InBackground(control_stages, heldout)) if in_parallel else None
        trained = train_and_evaluate(stages, heldout)
        control = (
            background.result() if background else train_and_evaluate(control_stages, heldout, quiet=True)
        )
    return trained, control, in_parallel


def _write_figure(path: Path, trained: TrainedModel, control: TrainedModel, asked: AskedVideo) -> str:
    """Writes the figure. Returns its path, or why there is none: a figure stops no demo."""
    from crosslmm_jax.demo.figure import draw

    first = asked.questions[0]
    try:
        figure = draw(
            trained.metrics, control.metrics, frames=asked.frames, times=asked.times,
            attention=asked.attention, title=f"{first.question}  {first.answer}  (true: {first.true_answer})",
        )  # fmt: skip
        atomic_write(path, figure)
    except OSError as error:
        return f"{path}: the figure is not written ({error.strerror or error})"
    return str(path)
