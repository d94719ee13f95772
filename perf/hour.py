"""An hour of video through `watch` and an answer: time by phase and memory, over the number of frames.

The file is made of real clips: 1280 x 720, h264 at 25 frames per second and 2.5 Mbit/s or more, GOPs of 250
with B-frames. The clips are encoded once, and their packets repeated. Each case is a process of its own that
compiles before it watches, and watches twice up to 256 frames: the second time is what the table shows. The
file is dropped from the page cache before. A case is a number of frames, then "k" for keyframes, then "/8"
for a model in 8 bits.
"""

import dataclasses
import functools
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from crosslmm_jax.cli.profile import add_output_options, outputs_of
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.expected_time import ComputeSeconds, RemainingTime, compute_seconds
from crosslmm_jax.profiling import Presentation, Record, Report, Request, profile, timing
from crosslmm_jax.profiling.report import cell, markdown, table
from perf.ask.folder import FolderRequest
from perf.command import command_line, parser_of

RATE, WIDTH, HEIGHT, GOP, BITS = 25, 1280, 720, 250, 2_500_000
CASES = ["256", "256k", "4096", "16384/8", "1024"]
QUESTION = "What happens in this video?"
PHASES = ("decode", "encode", "prefill", "answer")
HEAD = ("what", "frames", *PHASES, "first token", "total", "expected", "device GB", "host GB", "YaRN")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HourRequest(Request):
    """A MODEL folder, a file, and how its frames are chosen."""

    model: str
    video: str
    keyframes: bool
    eight_bits: bool
    tokens: int = 64
    times: int = 2
    users_allocator: bool = True


def write_hour(clips: Path, out: Path, *, seconds: float) -> None:
    """Writes at least `seconds` of the clips, one after another and again from the first.

    Raises:
      UserError: there are no clips.
    """
    import av

    files = sorted(clips.glob("*.mp4"))
    if not files:
        raise UserError(f"--clips {clips}: holds no .mp4 file; name a folder of real clips")
    out.parent.mkdir(parents=True, exist_ok=True)
    once = out.with_name(f"once-{out.name}")
    with av.open(str(once), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BITS
        rate = f"nal-hrd=cbr:vbv-maxrate={BITS // 1000}:vbv-bufsize={BITS // 1000}"
        gops = f"keyint={GOP}:min-keyint={GOP}:scenecut=0:bframes=3"
        stream.options = {"preset": "veryfast", "x264-params": f"{rate}:{gops}"}
        number = 0
        for file in files:
            with av.open(str(file)) as source:
                for frame in source.decode(video=0):
                    picture = frame.reformat(WIDTH, HEIGHT, "yuv420p")
                    picture.pts, picture.time_base = number, Fraction(1, RATE)
                    container.mux(stream.encode(picture))
                    number += 1
        container.mux(stream.encode(None))
    incomplete = out.with_name(f"incomplete-{out.name}")
    with av.open(str(once)) as source, av.open(str(incomplete), "w") as target:
        before = source.streams.video[0]
        after = target.add_stream_from_template(before)
        packets = [
            (bytes(packet), packet.pts or 0, packet.dts or 0, packet.is_keyframe)
            for packet in source.demux(before) if packet.size
        ]  # fmt: skip
        tick = before.time_base
        assert tick is not None
        length = round(number / RATE / tick)
        for repeat in range(int(seconds * RATE / number) + 1):
            for content, pts, dts, is_keyframe in packets:
                packet = av.Packet(content)
                packet.pts, packet.dts = pts + repeat * length, dts + repeat * length
                packet.time_base, packet.stream, packet.is_keyframe = tick, after, is_keyframe
                target.mux(packet)
    once.unlink()
    incomplete.replace(out)


def drop_from_cache(path: str) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Expected:
    """The whole time to the answer, as it is said first while a file is decoded.

    Attributes:
      total: seconds; None while nothing is said.
    """

    def __init__(self, compute: Callable[[int], ComputeSeconds | None]) -> None:
        """`compute`: as of `RemainingTime`."""
        self.total: float | None = None
        self._remaining, self._begun = RemainingTime(compute), time.perf_counter()

    def tell(self, done: int, total: int) -> None:
        """Takes progress, as `VideoModel.watch` gives it."""
        left = self._remaining.seconds(done, total)
        if self.total is None and left is not None:
            self.total = time.perf_counter() - self._begun + left


def run(record: Record) -> None:
    """Measures one case."""
    import jax

    from crosslmm_jax.inference import load

    request = record.request
    assert isinstance(request, HourRequest)
    what = ("keyframes" if request.keyframes else "exact") + (", 8 bits" if request.eight_bits else "")
    for frames in request.frames:
        try:
            precision = "int8" if request.eight_bits else None
            model = load(request.model, precision, frames=lambda count=frames: count, yarn_frames=frames)
            compute = functools.partial(compute_seconds, model.config, model.compiled.mesh)
            for _ in range(request.times):
                drop_from_cache(request.video)
                begin, expected = time.perf_counter(), Expected(compute)
                video = model.watch(
                    request.video, frames, timed=True, keyframes=request.keyframes, on_progress=expected.tell
                )
                answer = video.answer(QUESTION, max_new_tokens=request.tokens)
                total = time.perf_counter() - begin
            peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            seconds = {**video.seconds, "answer": answer.seconds, "first token": answer.first_token_s}
            record.add_row({
                "what": what, "frames": frames, "ms": 1e3 * total, **seconds, "total": total,
                "expected": expected.total,
                "device GB": None if peak is None else peak / 1e9,
                "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "YaRN": model.config.decoder.yarn_factor, "tokens": answer.num_tokens,
            })  # fmt: skip
        except Exception as error:
            record.add_error(f"{what}, {frames} frames", error)
    record.add_facts(**timing.device_facts())


def page(report: Report) -> str:
    """The report with a row per case."""
    rows = [row for row in report["rows"] if "total" in row]
    lines = table(HEAD, ([cell(row.get(name)) for name in HEAD] for row in rows))
    units = "seconds; expected: the total, as `crosslmm ask` says it first, while the file is decoded"
    units += "; GB: 10^9 bytes, the most that the process had of device and host, weights included"
    rest = [row for row in report["rows"] if "total" not in row]
    return markdown({**report, "rows": rest}, summary=[*lines, "", f"Units: {units}."])


def draw(report: Report, path: str) -> None:
    """Draws time and memory over the number of frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    rows = [row for row in report["rows"] if "total" in row]
    for what in dict.fromkeys(row["what"] for row in rows):
        some = sorted((row for row in rows if row["what"] == what), key=lambda row: row["frames"])
        frames = [row["frames"] for row in some]
        times.plot(frames, [row["total"] for row in some], "o-", label=what)
        for name, style in (("device GB", "o-"), ("host GB", "o:")):
            if some[0][name] is not None:
                memory.plot(frames, [row[name] for row in some], style, label=f"{what}, {name[:-3]}")
    for axes, label in ((times, "seconds from the file to the last token"), (memory, "GB")):
        axes.set(xscale="log", yscale="log", xlabel="frames", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def request_of(case: str, preset: str, folder: str, video: str) -> HourRequest:
    """The request of a case such as "256k". Raises a UserError for anything else."""
    parts = re.fullmatch(r"(\d+)(k?)(/8)?", case)
    if parts is None:
        raise UserError(f"--cases {case}: write frames, then k for keyframes, then /8 for 8 bits")
    return HourRequest(
        task="perf.hour", system=preset, frames=(int(parts[1]),), model=folder, video=video,
        keyframes=bool(parts[2]), eight_bits=bool(parts[3]), times=2 if int(parts[1]) <= 256 else 1,
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Makes MODEL and file if they are not there, and measures each case."""
    parser = parser_of("hour", __doc__)
    parser.add_argument("--preset", default="crosslmm_2b", metavar="NAME", help="default: crosslmm_2b")
    parser.add_argument("--tokenizer", metavar="DIR", help="of Qwen2.5; default: a small one, made here")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="real clips, .mp4")
    parser.add_argument("--seconds", type=float, default=3700.0, metavar="S", help="default: 3700")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps MODEL and file")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE", help=f"of {' '.join(CASES)}")
    add_output_options(parser)
    args = parser.parse_args(argv)
    video, folder = args.work / "hour.mp4", str(args.work / args.preset)
    requests: list[Request] = [FolderRequest(
        task="perf.ask.folder", system=args.preset, frames=(32,), folder=folder, tokenizer=args.tokenizer,
        work=str(args.work),
    )]  # fmt: skip
    requests += [request_of(case, args.preset, folder, str(video)) for case in args.cases]
    if not video.exists():
        write_hour(args.clips, video, seconds=args.seconds)
    profile(
        "hour", requests, command=command_line(), outputs=outputs_of(args), timeout=args.timeout,
        presentation=Presentation(page=page, draw=draw),
    )  # fmt: skip
