"""The options of `crosslmm profile`. Nothing heavy is imported here, so that `--help` answers at once."""

import argparse
from typing import Any, get_args

from crosslmm_jax.config import Precision

TASKS = ("prefill", "decode", "train", "encoder", "attention", "long_video", "scaling", "precision")
SCOPES = ("video", "frame", "window")
REMATS = ("none", "elementwise", "layer", "chunk")


def add_profile(commands: Any) -> None:
    """Adds the parser of `profile` to `commands`; its `run` measures."""
    profile = commands.add_parser(
        "profile", help="time, FLOPs, peak memory and precision at real size, random weights"
    )
    profile.add_argument("task", choices=TASKS)
    profile.add_argument(
        "--preset", nargs="+", default=[], metavar="NAME", help="e.g. crosslmm_2b crosslmm_7b"
    )
    profile.add_argument(
        "--peer", nargs="+", default=[], metavar="NAME",
        help="measured behind ours: llava-onevision-7b, llava-onevision-0.5b (prefill), siglip (encoder);"
        " with -compiled behind the name under torch.compile",
    )  # fmt: skip
    profile.add_argument("--frames", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N")
    profile.add_argument(
        "--tokens-per-frame", type=int, nargs="+", metavar="N", help="1, 9 or 16 (default: the preset's)"
    )
    profile.add_argument(
        "--precision", nargs="+", choices=get_args(Precision), default=["compute"],
        help="of encoder, projector and T2V's cache (encoder, prefill, decode); compute: bfloat16",
    )  # fmt: skip
    profile.add_argument("--videos", metavar="DIR", help="whose frames `precision` compares all of them on")
    _add_choices(profile)
    profile.add_argument(
        "--text-tokens", type=int, default=64, metavar="N", help="of the prompt; default: 64"
    )
    profile.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs; default: 5")
    profile.add_argument("--compile-jobs", type=int, default=1, metavar="N", help="programs compiled at once")
    profile.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for each system; what is there is kept"
    )
    profile.add_argument("--json", metavar="PATH")
    profile.add_argument("--markdown", metavar="PATH")
    profile.add_argument("--figure", metavar="PATH", help=".png, .svg or .pdf")
    profile.add_argument("--trace", metavar="DIR", help="a profile of one call each, for XProf")
    profile.set_defaults(run=_profile)


def _add_choices(profile: argparse.ArgumentParser) -> None:
    """What of the model may differ from the preset."""
    profile.add_argument(
        "--v2v-scope", nargs="+", default=[], choices=SCOPES, help="each is measured (prefill, long_video)"
    )
    profile.add_argument(
        "--remat", nargs="+", default=[], choices=REMATS,
        help="what is recomputed of the encoder; each is measured (train)",
    )  # fmt: skip
    profile.add_argument(
        "--parts", type=int, nargs="+", default=[], metavar="N",
        help="that cuDNN reads keys in; each that divides them is measured (attention)",
    )  # fmt: skip
    profile.add_argument(
        "--devices", type=int, nargs="+", default=[], metavar="N", help="compared (scaling); default: 1 2"
    )
    profile.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of the model, e.g. decoder.remat=false"
    )


def _profile(args: argparse.Namespace) -> None:
    from crosslmm_jax.profiling import Outputs, profile

    profile(
        args.task, presets=args.preset, peer_names=args.peer,
        tokens_per_frame=args.tokens_per_frame or [None], precisions=args.precision,
        options={
            "frames": tuple(args.frames), "text": args.text_tokens, "repeats": args.repeats,
            "compile_jobs": args.compile_jobs, "trace": args.trace,
            "videos": args.videos, "overrides": tuple(args.set),
            "v2v_scopes": tuple(args.v2v_scope), "remats": tuple(args.remat), "devices": tuple(args.devices),
            "parts": tuple(args.parts),
        },
        outputs=Outputs(json=args.json, markdown=args.markdown, figure=args.figure), timeout=args.timeout,
    )  # fmt: skip
