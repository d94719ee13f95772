"""A run that launchers start: small and quick to compile."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

STEPS = 30  # what stops a run lets it pause at each
TINY = """
    import dataclasses
    import time
    from pathlib import Path
    from crosslmm_jax.data.loading import BatchIterator
    from crosslmm_jax.demo import recipe

    def get_config():
        folder = Path(__file__).parent
        if (folder / "pause").exists():
            read_from_slow_disk(float((folder / "pause").read_text()))
        size = dataclasses.replace(recipe.QUICK, batch_size=2, stage1_steps={steps}, log_every=1)
        config = recipe.stage1(folder, out=folder / "run", size=size)
        model = config.model  # as little to compile as shows the same
        vision = dataclasses.replace(model.vision, num_layers=2)
        decoder = dataclasses.replace(model.decoder, num_layers=2)
        model = dataclasses.replace(model, vision=vision, decoder=decoder, attention="reference")
        return dataclasses.replace(config, model=model)

    def read_from_slow_disk(seconds):
        next_batch = BatchIterator.__next__

        def wait_and_read(self):
            time.sleep(seconds)
            return next_batch(self)

        BatchIterator.__next__ = wait_and_read
"""


@pytest.fixture(scope="session")
def launch() -> Path:
    """The folder of the launchers."""
    return Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file; its data and its run folder lie beside it."""
    from crosslmm_jax.data.index.build import build_index
    from crosslmm_jax.demo.synthetic import write_dataset
    from crosslmm_jax.demo.tokenizer import write_default_tokenizer

    folder = tmp_path_factory.mktemp("launch")
    write_dataset(folder / "data", num_train=4, num_heldout=4, seed=0)
    write_default_tokenizer(folder / "tokenizer")
    build_index(
        str(folder / "data" / "captions.json"), folder / "index" / "captions",
        tokenizer=str(folder / "tokenizer"), quiet=True,
    )  # fmt: skip
    (folder / "tiny.py").write_text(textwrap.dedent(TINY.format(steps=STEPS)))
    return folder / "tiny.py"


@pytest.fixture
def pause(config: Path) -> Iterator[Callable[[float], None]]:
    """`pause(seconds)`: each step of each run waits so long for its batch, from the next start on."""
    file = config.with_name("pause")

    def write(seconds: float) -> None:
        file.write_text(str(seconds))

    yield write
    file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def cpu_environment(one_device_flags: str) -> dict[str, str]:
    """Variables for a launcher whose processes train on one CPU device each."""
    return {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device_flags}


@pytest.fixture
def fake_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """`fake_program(name, script)`: a bash script that is found by this name before any other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(script)}")
        (folder / name).chmod(0o755)
        return folder / name

    return write
