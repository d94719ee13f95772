"""MODEL folders from the weights of a run: at its end, and from any of its checkpoints."""

from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.model_folder import save_model_folder
from crosslmm_jax.train.stages import model_of_stage
from crosslmm_jax.train.state import TrainState


def write_model(config: ExperimentConfig, folder: Path, state: TrainState) -> None:
    """Writes the MODEL folder of a run. Every process of the run calls this; process 0 writes."""
    save_model_folder(
        folder,
        config=model_of_stage(config.model, config.stage),
        params=state.params,
        tokenizer_folder=config.data.tokenizer,
        sampling=config.data.sampling,
        system_prompt=config.data.system_prompt,
        time_instruction=config.data.time_instruction,
        resampling=config.data.resampling,
        started_from=config.run.init_from,
    )
