"""The model as pure functions: random parameters, a random batch, two training steps.

Run: python examples/one_training_step.py
"""

import jax
import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import MeshConfig, StageConfig
from crosslmm_jax.parallel import make_mesh, to_global
from crosslmm_jax.presets import tiny
from crosslmm_jax.train import compile_train_step, random_state


def random_batch(rows: int, frames: int, text: int) -> Batch[np.ndarray]:
    """`rows` rows: three text tokens, one video, then the text to predict, which sees all frames."""
    config, rng, before = tiny(), np.random.default_rng(0), 3
    visual = frames * config.merge.tokens_per_frame
    length = visual + text
    slots = np.tile(np.arange(before, before + visual, dtype=np.int32), (rows, 1))
    visible = np.zeros((rows, length), np.int32)
    visible[:, before:] = frames
    loss_mask = np.zeros((rows, length), np.float32)
    loss_mask[:, before + visual + 1 :] = 1
    size = config.vision.image_size
    return Batch.create(
        tokens=rng.integers(0, config.decoder.vocab_size, (rows, length), dtype=np.int32),
        visual_slots=slots,
        visible_frames=visible,
        frames=rng.integers(0, 256, (rows, frames, size, size, 3), dtype=np.uint8),
        loss_mask=loss_mask,
    )


def main() -> None:
    """Prints the loss before and after one step."""
    config, mesh = tiny(), make_mesh(MeshConfig(data=1, fsdp=-1))
    stage = StageConfig(
        name="example", trainable=("projector", "v2v", "t2v", "decoder"), directions=("v2v", "t2v"),
        steps=2, learning_rate=1e-3, warmup_ratio=0.0,
    )  # fmt: skip
    batch = random_batch(rows=jax.device_count(), frames=4, text=12)
    with jax.set_mesh(mesh):
        state = random_state(config, stage, mesh, seed=0)
        step = compile_train_step(config, stage, mesh)
        for _ in range(stage.steps):
            state, metrics = step(state, to_global(batch, mesh))
            print(f"step {int(state.step)}: loss {float(metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
