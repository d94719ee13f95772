"""Plans of released configs over the number of devices, as one page: what `crosslmm plan` says of each."""

import json
from collections.abc import Sequence
from pathlib import Path

from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.profiling import plan
from crosslmm_jax.profiling.report import commit, table, versions
from perf.command import command_line, parser_of

DEVICES = [8, 64, 256, 1024]
HEAD = (
    "config",
    "devices",
    "mesh",
    "microbatches",
    "GB per device",
    "of",
    "fits",
    "s per step",
    "of peak",
    "bound by",
)


def main(argv: Sequence[str]) -> None:
    """Plans every config on every number of devices, and writes a report."""
    parser = parser_of("plans", __doc__)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG.py")
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES, metavar="N")
    parser.add_argument("--device", nargs="+", default=["h200"], metavar="KIND", help="default: h200")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    report = {
        "command": command_line(), "commit": commit(), "versions": versions(),
        "assumptions": list(plan.ASSUMPTIONS), "plans": [],
    }  # fmt: skip
    rows = []
    for path in args.configs:
        config = load_experiment(path)
        for device in args.device:
            for count in args.devices:
                made = plan.make_plan(config, devices=count, device=device)
                report["plans"].append({"config": path.name, **plan.as_json(made)})
                rows.append(_row(path.name, made))
    page = [
        "# plans", "", f"`{report['command']}`", "",
        f"Commit {report['commit']}. Predicted, not measured. All rows have the most frames and text that the"
        " config allows.", "",
        *table(HEAD, rows), "", "Assumed:", "", *(f"- {line}" for line in plan.ASSUMPTIONS),
    ]  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join(page) + "\n")
    print("\n".join(page))


def _row(name: str, made: plan.Plan) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in made.mesh.items() if size > 1)
    return [
        name, f"{made.devices} x {made.device}", mesh, str(made.microbatches),
        f"{made.bytes_per_device.total / 1e9:.1f}", f"{made.memory / 1e9:.0f}",
        "yes" if made.fits else "no: " + ("; ".join(made.changes) or "fewer frames"),
        f"{made.step_seconds:.2f}", f"{made.utilisation:.1%}", made.bound,
    ]  # fmt: skip
