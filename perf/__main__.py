"""`python -m perf NAME [options]`: imports the module of that name and runs its `main`.

A mistake of the user, or a package that is not installed, ends in one line and exit code 2.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import xla_flags

COMMANDS = {
    "peers": "prefill or encoder of ours and of LLaVA-OneVision or SigLIP in torch",
    "ask": "from a file to an answer: new and warm processes, many questions, LLaVA-OneVision, the loader",
    "attention": "the model's attentions one by one, with every backend",
    "long_video": "prefill over the number of frames, up to what the device holds, for each V2V scope",
    "scaling": "encoder and training step on several devices and on one",
    "precision": "errors of encoder, tokens and logits in 8 bits, on frames of real videos",
    "decode_speed": "our video reader, decord and OpenCV on the same files",
    "input_throughput": "frames per second of the input pipeline, and how long training waits for it",
    "index_scale": "an index over the number of rows: making it, making it again, starting, reading",
    "hour": "an hour of video: time and memory from the file to an answer, over the number of frames",
    "needle": "one frame among up to 4,096: from how many on a model no longer finds it",
    "plans": "what `crosslmm plan` says of several configs and numbers of devices",
    "report": "a report of `crosslmm profile` with the project's bars and goals and the paper's numbers",
}
HELP = "\n".join(
    ["usage: python -m perf NAME [options]", "", "What the project measures about itself. NAME is one of", ""]
    + [f"  {name:<18}{line}" for name, line in COMMANDS.items()]
    + ["", "`python -m perf NAME --help` lists its options."]
)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` and returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    name, *words = argv
    try:
        if name not in COMMANDS:
            raise UserError(f"{name!r} is unknown; choose one of {', '.join(COMMANDS)}")
        xla_flags.apply(os.environ)  # before a module imports jax, which reads them once
        importlib.import_module(f"perf.{name}").main(words)
    except UserError as error:
        print(f"perf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
