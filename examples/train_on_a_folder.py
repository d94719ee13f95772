"""Index annotations, train stage 2 of a model on them, and ask the result, all from Python.

Run: python examples/train_on_a_folder.py annotations.json videos/ --model runs/demo --out runs/mine
"""

import argparse
import json
from pathlib import Path

from crosslmm_jax import load
from crosslmm_jax.config import DataConfig, ExperimentConfig, RunConfig, StageConfig
from crosslmm_jax.data.index import build_index
from crosslmm_jax.model_folder import load_model_config, load_processor
from crosslmm_jax.train import train


def main() -> None:
    """Trains `--steps` steps and asks the first question of the annotations."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("annotations", type=Path, help="LLaVA's JSON list")
    parser.add_argument("videos", type=Path, help="folder that its paths are relative to")
    parser.add_argument("--model", type=Path, default=Path("runs/demo"), help="MODEL folder to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()

    model = args.model / "model" if (args.model / "model").is_dir() else args.model
    index = args.out / "index"
    report = build_index(
        str(args.annotations), index, tokenizer=str(model), media_root=str(args.videos), workers=2
    )
    print("\n".join(report.lines()))

    processor = load_processor(model)
    config = ExperimentConfig(
        model=load_model_config(model),
        data=DataConfig(
            index=str(index), tokenizer=str(model), batch_size=args.batch_size,
            sampling=processor.sampling, system_prompt=processor.system_prompt,
        ),
        stage=StageConfig(
            name="mine", trainable=("encoder", "projector", "v2v", "t2v", "decoder"),
            directions=("v2v", "t2v"), steps=args.steps, learning_rate=1e-4,
        ),
        run=RunConfig(out=str(args.out), init_from=str(model)),
    )  # fmt: skip
    result = train(config)  # called again with the same folder, it resumes

    row = json.loads(args.annotations.read_text())[0]
    question = row["conversations"][0]["value"].replace("<video>", "").strip()
    video = load(result.model_folder).watch(args.videos / row["video"])
    print(f"Q: {question}\nA: {video.ask(question, max_new_tokens=16)}")


if __name__ == "__main__":
    main()
