"""MODEL folders of a run: at its end, and from any of its checkpoints, also while the run goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from crosslmm_jax.config import ExperimentConfig, MeshConfig
from crosslmm_jax.data.index import fingerprint
from crosslmm_jax.data.text import load_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import Params, merge_adapters
from crosslmm_jax.model_folder import check_replaceable, save_model_folder
from crosslmm_jax.parallel import make_mesh
from crosslmm_jax.train.checkpoint import read_items
from crosslmm_jax.train.checksum import array_checksums, check_undamaged
from crosslmm_jax.train.settings import Settings, config_of
from crosslmm_jax.train.stages import model_of_stage
from crosslmm_jax.train.state import TrainState, abstract_state
from crosslmm_jax.utils import check_local


class Exported(NamedTuple):
    """What was written, and of which step."""

    folder: Path
    step: int


def export(
    run: str | Path, *, step: int | None = None, best: bool = False, out: str | Path | None = None,
    tokenizer: str | None = None,
) -> Exported:  # fmt: skip
    """Writes a MODEL folder with the weights of a checkpoint. One process reads it, on all its devices.

    Args:
      run: folder of a run, `run.out` of its config.
      step: of the checkpoint; None: the newest.
      best: take that with the smallest validation loss.
      out: MODEL folder to write; None: `model_STEP` in the run's folder.
      tokenizer: folder of the tokenizer; None: as the run's config says.

    Raises:
      UserError: there is no such checkpoint, it is damaged, the tokenizer is not the run's, or `out` cannot
        be written.
    """
    check_local(run)
    step, checkpoint = _find(Path(run), _best_step(Path(run)) if best else step)
    out = Path(run) / f"model_{step}" if out is None else Path(out)
    check_replaceable(out)
    saved = _read(checkpoint, config=ocp.args.JsonRestore())["config"]
    config = config_of(saved, source=str(checkpoint))
    tokenizer = _check_tokenizer(tokenizer or config.data.tokenizer, saved)
    write_model(out, config, _read_params(checkpoint, config), tokenizer=tokenizer)
    return Exported(out, step)


def write_model(folder: Path, config: ExperimentConfig, params: Params, *, tokenizer: str) -> None:
    """Writes the MODEL folder of a run, adapters merged. Every process calls this; process 0 writes."""
    data = config.data
    save_model_folder(
        folder, config=model_of_stage(config.model, config.stage), params=merge_adapters(params),
        tokenizer_folder=tokenizer,
        sampling=data.sampling, system_prompt=data.system_prompt, time_instruction=data.time_instruction,
        resampling=data.resampling, started_from=config.run.init_from,
    )  # fmt: skip


def _find(run: Path, step: int | None) -> tuple[int, Path]:
    """The checkpoint of `step`, or the newest one."""
    folder = run / "checkpoints"
    steps = _steps(folder)
    if not steps:
        raise UserError(f"{run}: holds no checkpoints; give the folder of a run, as run.out of its config")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{run}: has no checkpoint of step {step}; --step takes {_listed(steps)}")
    return step, folder.absolute() / str(step)


def _best_step(run: Path) -> int:
    """The step with the smallest validation loss, as the newest checkpoint has it."""
    _, newest = _find(run, None)
    best = _read(newest, data=ocp.args.JsonRestore())["data"].get("best")
    if best is None:
        raise UserError(f"{run}: has validated nothing yet, so no step is the best; name one with --step")
    return int(best["step"])


def _steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, in order."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def _listed(steps: list[int]) -> str:
    return " or ".join(map(str, steps))


def _read(checkpoint: Path, **items: ocp.args.CheckpointArgs) -> Mapping[str, PyTree]:
    try:
        return read_items(checkpoint, **items)
    except Exception as error:  # Orbax raises errors of many types over a damaged file
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Path, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    others = [step for step in _steps(checkpoint.parent) if step != int(checkpoint.name)]
    fix = f"choose --step {_listed(others)}" if others else "there is no other"
    return UserError(f"{checkpoint}: damaged, or removed by a run that goes on ({reason}); {fix}")


def _check_tokenizer(folder: str, saved: Settings) -> str:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: the run's tokenizer is not there; name its folder with --tokenizer DIR")
    expected = saved.get("tokenizer_digest")
    if expected is not None and fingerprint(load_tokenizer(folder)) != expected:
        raise UserError(
            f"{folder}: is not the tokenizer that the run was trained with; name that with --tokenizer DIR"
        )
    return folder


def _read_params(checkpoint: Path, config: ExperimentConfig) -> Params:
    """The parameters of a checkpoint, without the optimiser's state, checked by their checksums."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
    abstract = abstract_state(config.model, config.stage, mesh)
    item = {"trainable": abstract.trainable, "frozen": abstract.frozen}
    found = _read(
        checkpoint,
        state=ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        ),
        checksums=ocp.args.JsonRestore(),
    )
    state = TrainState(step=(), opt_state=(), **found["state"])  # type: ignore[arg-type]
    try:
        check_undamaged(array_checksums(state), found["checksums"])
    except ValueError as error:
        raise _damaged(checkpoint, error) from error
    return state.params
