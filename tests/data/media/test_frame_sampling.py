"""Frame choice against the rule in the index and the time domain."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.frame_sampling import choose_frames, count_frames

TICKS = 12800  # per second; 512 ticks per frame at 25 frames per second, as ffmpeg writes mp4


def choose(times: np.ndarray, end: int, ticks: float, sampling: SamplingConfig) -> np.ndarray:
    return choose_frames(times, sampling, end=end, ticks_per_second=ticks)


def times_of(total: int, gap: int = 512) -> np.ndarray:
    return np.arange(total, dtype=np.int64) * gap


@settings(max_examples=300, deadline=None)
@given(total=st.integers(1, 4000), wanted=st.integers(1, 512), first=st.integers(0, 99999))
def test_uniform_is_the_truncated_linspace(total: int, wanted: int, first: int) -> None:
    times = times_of(total) + first
    chosen = choose(times, int(times[-1]) + 512, TICKS, SamplingConfig(frames=wanted))
    assert chosen.min() >= 0 and chosen.max() < total
    exact = [(total - 1) * k // max(wanted - 1, 1) for k in range(wanted)]
    assert chosen.tolist() == exact
    # numpy's float version differs by rounding alone
    llava = np.linspace(0, total - 1, wanted, dtype=int)
    assert np.abs(chosen - llava).max() <= 1


def test_uniform_repeats_the_frames_of_a_short_clip() -> None:
    chosen = choose(times_of(3), 3 * 512, TICKS, SamplingConfig(frames=6))
    assert chosen.tolist() == [0, 0, 0, 1, 1, 2]


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.integers(20, 3000), min_size=1, max_size=60),
    fps=st.sampled_from([0.5, 1.0, 2.0, 8.0]),
    cap=st.integers(1, 40),
)
def test_fps_takes_the_frame_on_display(gaps: list[int], fps: float, cap: int) -> None:
    times = np.concatenate([[0], np.cumsum(gaps)]).astype(np.int64)
    end = int(times[-1]) + gaps[-1]
    chosen = choose(times, end, 1000, SamplingConfig(policy="fps", fps=fps, frames=cap))
    moments = [k * 1000 / fps for k in range(10_000) if k * 1000 / fps < end]
    if len(moments) > cap:
        uniform = choose(times, end, 1000, SamplingConfig(frames=cap))
        assert chosen.tolist() == uniform.tolist()
    else:
        # Within a tick of a change of frame either may be taken.
        for index, moment in zip(chosen, moments, strict=True):
            assert times[index] <= moment + 1.001
            assert index == len(times) - 1 or times[index + 1] > moment


@settings(max_examples=200, deadline=None)
@given(gaps=st.lists(st.integers(20, 3000), min_size=2, max_size=60), wanted=st.integers(1, 40))
def test_uniform_of_a_variable_rate_is_even_in_time(gaps: list[int], wanted: int) -> None:
    times = np.concatenate([[0], np.cumsum(gaps)]).astype(np.int64)
    if np.ptp(gaps) <= 4:
        return
    chosen = choose(times, int(times[-1]) + 1, 1000, SamplingConfig(frames=wanted))
    for k, index in enumerate(chosen):
        moment = int(times[-1]) * k // max(wanted - 1, 1)
        assert times[index] <= moment
        assert index == len(times) - 1 or times[index + 1] > moment


def test_fps_of_a_constant_rate() -> None:
    chosen = choose(times_of(75), 75 * 512, TICKS, SamplingConfig(policy="fps", fps=1, frames=64))
    assert chosen.tolist() == [0, 25, 50]


def test_times_rounded_to_milliseconds() -> None:
    times = np.round(np.arange(90) * 1000 / 30).astype(np.int64)
    assert choose(times, 3000, 1000, SamplingConfig(frames=5)).tolist() == [0, 22, 44, 66, 89]
    every_second = choose(times, 3000, 1000, SamplingConfig(policy="fps", fps=1, frames=5))
    assert every_second.tolist() == [0, 30, 60]


def test_one_tick_a_frame() -> None:
    assert choose(times_of(10, gap=1), 10, 10, SamplingConfig(frames=4)).tolist() == [0, 3, 6, 9]


def llava(total: int, rate: float, fps: float, most: int, force: bool) -> list[int]:
    """LLaVA-NeXT's rule, one frame after the other."""
    stride = max(1, round(rate / fps))
    chosen = [k for k in range(total) if k % stride == 0]
    if force or len(chosen) > most:
        step = (total - 1) / (most - 1) if most > 1 else 0
        chosen = [int(k * step) for k in range(most - 1)] + [total - 1] if most > 1 else [0]
    return chosen


def videochat_flash(total: int, rate: float, low: int, high: int) -> list[int]:
    """VideoChat-Flash's dynamic_fps1, one interval after the other."""
    count = 4 * max(1, int(total / rate / 4 + 1e-9))
    count = max(min(count, high), low if total >= low else total // 4 * 4)
    parts = min(count, total)
    starts = [int(k * (total / parts)) for k in range(parts)] + [total]
    chosen = [(starts[k] + starts[k + 1] - 1) // 2 for k in range(parts)]
    return chosen + [chosen[-1]] * (count - parts)


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(1, 3000), rate=st.sampled_from([10, 25, 32, 50]), most=st.integers(1, 64),
    fps=st.sampled_from([0.5, 1.0, 2.0]), force=st.booleans(),
)  # fmt: skip
@example(total=69, rate=25, most=6, fps=2.0, force=False)  # 69 / 2.76 is a hair more than 25
def test_llava(total: int, rate: int, most: int, fps: float, force: bool) -> None:
    sampling = SamplingConfig(policy="llava", frames=most, fps=fps, force_sample=force)
    chosen = choose(times_of(total, gap=12800 // rate), 12800 // rate * total, TICKS, sampling)
    assert chosen.tolist() == llava(total, rate, fps, most, force)
    assert len(chosen) == count_frames(num_frames=total, duration=total / rate, sampling=sampling)


@settings(max_examples=300, deadline=None)
@given(total=st.integers(1, 30_000), rate=st.sampled_from([1, 10, 25, 50]))
def test_dynamic_fps1(total: int, rate: int) -> None:
    sampling = SamplingConfig(policy="dynamic_fps1")
    chosen = choose(times_of(total, gap=12800 // rate), 12800 // rate * total, TICKS, sampling)
    assert chosen.tolist() == videochat_flash(total, rate, 64, 512)
    assert len(chosen) % 4 == 0 and len(chosen) <= sampling.most_frames
    assert len(chosen) == count_frames(num_frames=total, duration=total / rate, sampling=sampling)


def test_counts_of_many_videos_and_images() -> None:
    many = {"num_frames": np.array([1, 1, 250, 90_000]), "duration": np.array([0, 0.04, 10, 3600])}
    assert count_frames(**many, sampling=SamplingConfig(frames=8)).tolist() == [1, 8, 8, 8]
    assert count_frames(**many, sampling=SamplingConfig(policy="fps", frames=64)).tolist() == [1, 1, 10, 64]
    assert count_frames(**many, sampling=SamplingConfig(policy="dynamic_fps1")).tolist() == [1, 4, 64, 512]


def test_llava_at_a_variable_rate_ends_with_the_last_frame() -> None:
    sampling = SamplingConfig(policy="llava", frames=32, force_sample=True)
    rng = np.random.default_rng(0)
    for _ in range(400):
        times = np.cumsum(rng.integers(200, 1500, int(rng.integers(60, 600))))
        assert choose(times, float(times[-1] + 500), 15360.0, sampling)[-1] == len(times) - 1
    times = np.cumsum(rng.integers(2**21, 2**23, 2**20))  # products beyond 64 bits
    chosen = choose(times, float(times[-1] + 500), 1e9, sampling)
    assert chosen[-1] == len(times) - 1 and (np.diff(chosen) > 0).all()
