"""`python -m perf index_scale` on a few rows: every stage runs, and the table holds what they found."""

import json
from pathlib import Path

import pytest

from crosslmm_jax.data.index import blocks, build
from crosslmm_jax.data.index import probe as probing
from crosslmm_jax.errors import UserError
from perf import index_scale


def test_every_stage_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_scale, "measure", index_scale._measured)  # in this process
    monkeypatch.setattr(probing, "_probe", probing._probe)  # a stage replaces it
    for name, value in {"VIDEOS": 4, "CLIPS": 2, "READS": 20, "BATCHES": 2}.items():
        monkeypatch.setattr(index_scale, name, value)
    for module in (blocks, build):
        monkeypatch.setattr(module, "BLOCK", 64)
    out = tmp_path / "scale.json"
    words = ["--sizes", "100", "300", "--at-once", "2", "--copies", "2"]
    words += ["--folder", str(tmp_path), "--out", str(out)]
    index_scale.main(words)
    result = json.loads(out.read_text())
    small, made, copied = result["sizes"]
    assert small["index"]["rows"] == 100 and "at_once" not in small["index"]
    assert result["probe"]["files"] == 4
    assert made["index"] | {"rows": 300, "unchanged": 0, "bad": 0, "at_once": 2} == made["index"]
    assert made["again"]["unchanged"] == 300
    assert [part["rows"] for part in made["shards"]] == [128, 108, 64] and made["merge"]["rows"] == 300
    assert made["merged_is_equal"] and made["start"]["rows"] == 300
    assert copied["rows"] == copied["start"]["rows"] == 600
    table = [line for line in out.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    starts = [line.split(" | ")[0] for line in table]
    assert starts == ["| rows", "| ---", "| 100", "| 300", "| 600 (2 copies)"]
    assert "2 shards at once" in table[3] and not any("NO" in line for line in table)
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json", "scale.md"]
    with pytest.raises(UserError, match="--sizes and --at-once must be above 0"):
        index_scale.main(["--sizes", "0"])
