"""What commands and their workers import, and how often they read a vocabulary."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python runs a module of this name at the start of every process, workers too.
SITECUSTOMIZE = '''
import os, sys

HEAVY = {"transformers", "torch", "tensorflow", "flax", "jax", "grain"}


def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{os.getpid()} {what}\\n")


def heed(event, arguments):
    if event == "import" and arguments[0] in HEAVY and sys.modules.get(arguments[0], "absent") is not None:
        note(arguments[0])  # None: it is barred


sys.addaudithook(heed)
import tokenizers


class Counted:
    """Takes the place of `tokenizers.Tokenizer`, and notes each vocabulary that is read."""

    def __new__(cls, *arguments, real=tokenizers.Tokenizer):
        return real(*arguments)


def noting(read):
    def noted(*arguments):
        note("vocabulary")
        return read(*arguments)

    return staticmethod(noted)


for name in ("from_file", "from_buffer", "from_str"):
    setattr(Counted, name, noting(getattr(tokenizers.Tokenizer, name)))
tokenizers.Tokenizer = Counted
note("start")
'''
SCRIPT = """
import os, sys

if __name__ == "__main__":
    mixture, index, tokenizer, sets, stage, run, clip = sys.argv[1:]
    from crosslmm_jax.cli import main

    assert main(["data", "index", mixture, "--out", index, "--tokenizer", tokenizer, "--workers", "2"]) == 0
    assert main(["data", "stats", index]) == 0
    os.environ["NOTES"] += ".check"
    assert main(["data", "check", index, "--sample", "4", "--workers", "1"]) == 0
    os.environ["NOTES"] += ".tfds"
    assert main(["data", "to-tfds", mixture, "--out", sets, "--shards", "2", "--workers", "1"]) == 0
    os.environ["NOTES"] += ".load"
    from crosslmm_jax.config import DataConfig, SamplingConfig
    from crosslmm_jax.data.loading import BatchIterator, Dataset

    config = DataConfig(
        index=index, tokenizer=tokenizer, batch_size=4, num_workers=1, sampling=SamplingConfig(frames=2)
    )
    batches = BatchIterator(Dataset(config, tokens_per_frame=1, image_size=32))
    next(batches), next(batches)  # the second is made by the worker
    batches.close()
    os.environ["NOTES"] += ".train"
    words = ["--data.index", index, "--data.tokenizer", tokenizer, "--data.batch-size", "2"]
    assert main(["train", stage, *words, "--stage.steps", "1", "--run.out", run]) == 0
    os.environ["NOTES"] += ".ask"
    assert main(["ask", run, clip, "What?", "--frames", "2", "--max-new-tokens", "2"]) == 0
"""
ROOT = Path(__file__).resolve().parents[2]
Notes = dict[str, collections.Counter[str]]  # process -> what it noted, with how often


@pytest.fixture(scope="module")
def notes(synthetic, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Notes]:
    """The notes of each step: all processes that worked in it."""
    folder = tmp_path_factory.mktemp("lean")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (folder / "script.py").write_text(SCRIPT)
    mixture = folder / "mixture.yaml"  # 96 rows: more than one task of a worker
    mixture.write_text(f"datasets: [{{json_path: {synthetic.train}}}, {{json_path: {synthetic.heldout}}}]\n")
    words = [folder / "script.py", mixture, folder / "index", tokenizer_folder, folder / "set"]
    words += [ROOT / "configs" / "tiny_stage1.py", folder / "run", synthetic.heldout_videos[0]]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"NOTES": str(folder / "index.notes"), "PYTHONPATH": path}
    environment["XLA_FLAGS"] = ""  # one device
    subprocess.run([sys.executable, *map(str, words)], env=environment, check=True, timeout=300)
    found: dict[str, Notes] = {}
    for file in folder.glob("index.notes*"):
        step: Notes = collections.defaultdict(collections.Counter)
        for line in file.read_text().splitlines():
            process, what = line.split()
            step[process][what] += 1
        found[file.name.removeprefix("index.notes").rpartition(".")[2] or "index"] = dict(step)
    return found


@pytest.mark.slow
def test_no_process_imports_transformers_or_torch(notes: dict[str, Notes]) -> None:
    everything = [noted for step in notes.values() for noted in step.values()]
    for noted in everything:
        assert not noted.keys() & {"transformers", "torch", "tensorflow"}
    for noted in [*notes["index"].values(), *notes["check"].values()]:
        assert not noted.keys() & {"jax", "flax", "grain"}, "indexing and checking need none of them"
    assert any("grain" in noted for noted in notes["load"].values()), "the imports are seen"


@pytest.mark.slow
def test_each_process_reads_the_vocabulary_once_if_it_counts_tokens(notes: dict[str, Notes]) -> None:
    def times_read(step: str) -> list[int]:
        return [noted["vocabulary"] for noted in notes[step].values()]

    assert max(times_read("index")) == 1 and sum(times_read("index")) >= 2, "this process and its workers"
    assert max(times_read("load")) == 1 and sum(times_read("load")) == 2, "this process and its worker"
    assert max(times_read("train")) == 1 and times_read("ask") == [1]
    assert set(times_read("check") + times_read("tfds")) == {0}
