"""Time and memory of long videos over the number of frames, one line per V2V scope, with its slope."""

import math

from crosslmm_jax.profiling import Report, Row
from crosslmm_jax.profiling.figure import save, scale_by_frames

PANELS = {"ms": ("time (s)", 1e-3), "peak_mb": ("peak memory over weights (GB)", 1e-3)}
SLOPE_POINTS = 4  # of the longest videos: in short ones, costs that do not grow with the frames count too


def draw(report: Report, path: str) -> None:
    """Writes the figure of a report of `long_video` to `path`; the file's suffix chooses the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.6), layout="constrained")
    for axis, (field, (label, unit)) in zip(axes, PANELS.items(), strict=True):
        for index, (name, points) in enumerate(lines(report["rows"], field).items()):
            frames, values = zip(*((frames, unit * value) for frames, value in points), strict=True)
            grown = slope(points)
            text = name if grown is None else f"{name}: slope {grown:.2f} from {_slope_range(points)}"
            axis.plot(frames, values, "o-", color=f"C{index}", label=text)
        scale_by_frames(axis, report["rows"], title=label)
        axis.legend(fontsize="small")
    save(figure, report, "one prefill of a long video", path)


def lines(rows: list[Row], field: str) -> dict[str, list[tuple[int, float]]]:
    """Label of system and scope -> (frames, value) in the order of frames."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        if row.get(field) is not None:
            name = f"{row['system']}, V2V over the {row['v2v_scope']}"
            found.setdefault(name, []).append((row["frames"], row[field]))
    return found


def slope(points: list[tuple[int, float]]) -> float | None:
    """Slope of a line through the logarithms of the last points: 1 is linear growth, 2 quadratic."""
    if len(points) < 2:
        return None
    logs = [(math.log(frames), math.log(value)) for frames, value in points[-SLOPE_POINTS:]]
    x_mean, y_mean = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    rises = sum((x - x_mean) * (y - y_mean) for x, y in logs)
    return rises / sum((x - x_mean) ** 2 for x, _ in logs)


def _slope_range(points: list[tuple[int, float]]) -> str:
    return f"{points[-SLOPE_POINTS:][0][0]:,} to {points[-1][0]:,}"
