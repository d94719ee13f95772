"""How much memory a conversion takes: some tensors' worth, never the model's."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.convert import export_settings
from crosslmm_jax.convert.families import qwen2
from crosslmm_jax.convert.rules import expand
from crosslmm_jax.model_folder import WeightsWriter, parameter_shapes

PROGRAM = """
import resource, sys
import jax.numpy, rich.progress
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.model import init_params
vision, llm, tokenizer, out = sys.argv[1:]
convert_from_hf(Request(vision=vision, llm=vision + "/../tied"), out + "/warm", tokenizer=tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = convert_from_hf(Request(vision=vision, llm=llm), out + "/model", tokenizer=tokenizer)
convert_to_hf(out + "/model", out + "/export")
print(report.bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_a_few_tensors(sources, tmp_path) -> None:
    """A source of 0.4 GB, whose largest tensor has 17 MB and whose largest stacked parameter 0.1 GB."""
    tiny = presets.tiny()
    decoder = dataclasses.replace(
        tiny.decoder, width=2048, num_layers=6, num_heads=16, head_dim=128, mlp_width=4096,
        tie_embeddings=False,
    )  # fmt: skip
    config = dataclasses.replace(tiny, decoder=decoder)
    slots = expand(qwen2.RULES, config, parameter_shapes(config))
    folder = tmp_path / "llm"
    folder.mkdir()
    # As random as the largest needs to be: drawing all of them would take longer than converting them.
    drawn = np.random.default_rng(0).standard_normal(2048 * 4096, np.float32).astype(ml_dtypes.bfloat16)
    tensors = {slot.hf: (slot.source_shape, "bfloat16") for slot in slots}
    with WeightsWriter(folder, tensors, kind="pt", max_shard_bytes=2 * 10**8) as writer:
        for slot in slots:
            writer.write(slot.hf, np.resize(drawn, slot.source_shape))
    (folder / "config.json").write_text(json.dumps(export_settings.text_config(config, "bfloat16", {})))
    words = [sys.executable, "-c", PROGRAM, sources.vision, folder, sources.tokenizer, tmp_path / "out"]
    (tmp_path / "out").mkdir()
    result = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    written, peak = map(int, result.stdout.split()[-2:])
    assert written > 3.5e8
    assert peak < 2.5e8, f"{peak:,} bytes over the start for {written:,} bytes of weights"
