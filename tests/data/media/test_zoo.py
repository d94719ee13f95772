"""Frames read at random against a plain decode, pixel for pixel, over hundreds of generated files."""

import collections
import random
from pathlib import Path

import av.error
import numpy as np
import pytest
from plain_decode import Plain, plain_decode
from zoo import FRAMES, SIDE, Animal, damaged_animals, good_animals

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.media import packet_index, video
from crosslmm_jax.data.media.locate import Deadline, Media
from crosslmm_jax.data.media.packet_index import open_indexed
from crosslmm_jax.data.media.video import WHOLE_UP_TO, probe, read_frames
from crosslmm_jax.errors import DataError

KEPT, NOT_KEPT = 2**26, 0  # of packets, as for small and for large files
MOST_DAMAGED = DataConfig.max_damaged
LONG = "as of a very long video"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def good(folder: Path) -> list[Animal]:
    """All files without damage. ffmpeg writes some that nobody can read; those are left out."""
    return [animal for animal in good_animals(folder) if _plain(animal.path) is not None]


@pytest.mark.slow
def test_every_undamaged_file_is_read(good: list[Animal], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for animal in good:
        plain = _plain(animal.path)
        assert plain is not None
        try:
            info = probe(animal.path)
            wrong += [f"{animal.path.name}: {fault}" for fault in _differences(animal, plain, monkeypatch)]
        except DataError as error:
            wrong.append(str(error))
            continue
        if info.damaged or info.num_frames < len(plain.images):
            wrong.append(f"{animal.path.name}: {info}")
        if abs(info.duration - plain.times.max() * len(plain.images) / (len(plain.images) - 1)) > 0.5:
            wrong.append(f"{animal.path.name}: lasts {info.duration}, by its frames {plain.times.max()}")
    kinds = collections.Counter(animal.kind for animal in good)
    print(f"{len(good)} undamaged files are read: {dict(kinds)}")
    assert not wrong, "\n".join(wrong)
    assert len(good) >= 400


@pytest.mark.slow
def test_damaged_files_are_read_as_decoded_or_refused(
    folder: Path, good: list[Animal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What probe refuses, reading refuses with the same reason, and only if a plain decode loses much.

    Reads know the count of the probe, as those of an index do. So only files in which nothing reports damage
    may differ, and a read as of a very long video, which is not decoded from its beginning. What is shown can
    depend on all that was decoded before, even across a keyframe. Such files are few.
    """
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong, unnoticed, long = [], [], []
    animals = list(damaged_animals(folder, random.Random(0)))
    for animal in animals:
        plain = _plain(animal.path)
        lost = 1.0 if plain is None else _lost(plain)
        try:
            damaged = probe(animal.path).damaged
        except DataError as error:
            reason = error.fault.reason
            counts[animal.kind, "refused"] += 1
            counts[animal.kind, "bound"] += lost > 0.9 * MOST_DAMAGED or _is_cut(animal)
            with pytest.raises(DataError) as caught:
                read_frames(animal.path, SamplingConfig(frames=FRAMES), size=SIDE)
            if caught.value.fault.reason != reason:
                wrong.append(f"{animal.path.name}: {reason} and {caught.value}")
            continue
        counts[animal.kind, "read"] += 1
        if plain is None:
            wrong.append(f"{animal.path.name}: read, and a plain decode gives nothing")
            continue
        plain = plain._replace(times=_times_of(animal.path, plain))
        for different in _differences(animal, plain, monkeypatch, damaged=damaged):
            found = long if LONG in different else wrong if damaged else unnoticed
            found.append(f"{animal.path.name}: {different}")
    for kind in sorted({kind for kind, _ in counts}):
        refused, read, bound = (counts[kind, name] for name in ("refused", "read", "bound"))
        print(f"{kind}: {refused} of {refused + read} refused; a plain decode loses much of {bound}")
        if refused > bound:
            wrong.append(f"{kind}: {refused} refused, at most {bound} may be")
    print(f"of {len(animals)} differ {unnoticed} without known damage and {long}")
    assert not wrong, "\n".join(wrong)
    assert len(unnoticed) + len(long) <= 0.01 * len(animals), "\n".join([*unnoticed, *long])


def _plain(path: Path) -> Plain | None:
    try:
        plain = plain_decode(path, SIDE)
    except (av.error.FFmpegError, AttributeError, IndexError):
        return None
    return plain if len(plain.images) else None


def _lost(plain: Plain) -> float:
    """Share of the frames that a plain decode loses or marks."""
    missing = max(0, FRAMES - plain.packets)
    return (plain.errors + plain.corrupt + missing) / (plain.packets + missing)


def _is_cut(animal: Animal) -> bool:
    """An mp4 without its end has no tables, and one with its tables in front lists what is missing."""
    return animal.kind == "cut" and animal.path.suffix == ".mp4"


def _differences(
    animal: Animal, plain: Plain, monkeypatch: pytest.MonkeyPatch, *, damaged: int | None = None
) -> list[str]:
    """Reads all frames, some, and one, with packets kept and not, and compares with the plain decode.

    One is also read as of a very long video, which is not decoded whole where it is damaged. `damaged` is the
    count of an index.
    """
    rng, found = random.Random(animal.path.name), []
    middle = float(plain.times[rng.randrange(len(plain.times))])
    one = (max(0.0, middle - 1e-3), middle + 1e-3)
    uncertain = None
    for keep, frames, bounds, is_long in (
        (KEPT, len(plain.images), None, False), (KEPT, 1, one, animal.damaged), (NOT_KEPT, 3, None, False),
        (NOT_KEPT, 1, one, False),
    ):  # fmt: skip
        monkeypatch.setattr(packet_index, "KEEP_BYTES", keep)
        monkeypatch.setattr(video, "WHOLE_UP_TO", 0 if is_long else WHOLE_UP_TO)
        clip = read_frames(
            Media(str(animal.path), damaged=0 if is_long else damaged), SamplingConfig(frames=frames),
            size=SIDE, bounds=bounds, max_damaged=1.0 if is_long else MOST_DAMAGED,
        )  # fmt: skip
        numbers = plain.at(clip.times)
        same = (plain.images[numbers] == clip.frames).all((1, 2, 3))
        if animal.damaged and not same.all():
            uncertain = _uncertain(animal.path, plain) if uncertain is None else uncertain
            same |= uncertain[numbers]
            same |= _shown_together(plain, clip.frames, clip.times)
        if not same.all():
            kind = LONG if is_long else f"kept {keep > 0}"
            found.append(f"{frames} frames, {kind}: {np.flatnonzero(~same)} differ at {clip.times}")
        off = np.abs(clip.times[:, None] - plain.times[None]).min(1).max()
        if not animal.damaged and off > 2e-3:
            found.append(f"{frames} frames: times are {off} s off")
    return found


def _times_of(path: Path, plain: Plain) -> np.ndarray:
    """Times of the plain decode's images by the reader, which alone decides on damaged timestamps."""
    with open_indexed(path, Deadline(path, None), use_tables=False) as (_, index):
        numbers = plain.numbers
        if index.counted:
            begins = np.searchsorted(index.gops, np.arange(index.gops[-1] + 2))
            gops = index.gops[numbers]
            nth = np.array([(gops[:place] == gop).sum() for place, gop in enumerate(gops)])
            numbers = np.minimum(begins[gops] + nth, begins[gops + 1] - 1)
        return (index.times[numbers] - index.times[index.shown].min()) * index.tick


def _uncertain(path: Path, plain: Plain) -> np.ndarray:
    """bool[n], images with parts that were never decoded: they show what was in memory before."""
    uncertain = np.zeros(len(plain.images), bool)
    again = [plain_decode(path, SIDE, twice=True), *(plain_decode(path, SIDE, held=held) for held in (3, 9))]
    if "vp8" in path.name:  # reads maps of frames that are gone, so that threads change what it shows
        again.append(plain_decode(path, SIDE, threads=4))
    for other in again:
        if other.images.shape != plain.images.shape:
            return ~uncertain
        uncertain |= (other.images != plain.images).any((1, 2, 3))
    return uncertain


def _shown_together(plain: Plain, images: np.ndarray, times: np.ndarray) -> np.ndarray:
    """bool[n], whether an image is one of several at the same time, which damaged timestamps can bring."""
    near = np.abs(plain.times[None] - times[:, None]) < 1e-3
    equal = (plain.images[None] == images[:, None]).all((2, 3, 4))
    return (near & equal).any(1)
