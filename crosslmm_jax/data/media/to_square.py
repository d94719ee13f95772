"""Frames of a video as square pixels: turned, resized, in several threads."""

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding import Put
from crosslmm_jax.data.media.image import Resampling, resize
from crosslmm_jax.data.media.locate import PathOrMedia, check_pixels
from crosslmm_jax.data.media.orientation import Orientation, of_matrix

if TYPE_CHECKING:
    from av import VideoFrame

# Called with the array of all frames of a clip, uint8[F, R, R, 3], and how many of them are there. A file
# that is read again starts with another array. The clip that is returned has the last one.
OnFrames = Callable[[np.ndarray, int], None]

_RESIZING_THREADS = 8  # at most; decoding keeps no more busy


class ToSquare:
    """Converts video frames to uint8[size, size, 3], in several threads or in the caller's."""

    def __init__(self, size: int, resampling: Resampling, path: PathOrMedia, num_threads: int) -> None:
        """`num_threads` as of `read_frames`."""
        self.size = size
        self.path = path
        self._resampling: Resampling = resampling
        self._threads = min(num_threads or os.cpu_count() or 1, _RESIZING_THREADS)
        self._of_thread = threading.local()  # ffmpeg's converter, kept between frames

    @contextlib.contextmanager
    def into(self, images: np.ndarray, on_frames: OnFrames | None) -> Iterator[Put]:
        """Gives a function that fills `images`. When the block ends, all of them are there."""
        tell = on_frames or (lambda images, count: None)
        waiting: collections.deque[tuple[int, Future[None]]] = collections.deque()

        def fill(frame: "VideoFrame", first: int, end: int) -> None:
            images[first:end] = self(frame)

        def collect() -> None:
            end, future = waiting.popleft()
            future.result()
            tell(images, end)

        def put_now(frame: "VideoFrame", first: int, end: int) -> None:
            fill(frame, first, end)
            tell(images, end)

        def put(frame: "VideoFrame", first: int, end: int) -> None:
            waiting.append((end, pool.submit(fill, frame, first, end)))
            # Decoded frames are large: few of them wait.
            while waiting and (len(waiting) > 2 * self._threads or waiting[0][1].done()):
                collect()

        if self._threads == 1:
            yield put_now
            return
        with ThreadPoolExecutor(self._threads) as pool:
            yield put
            while waiting:
                collect()

    @contextlib.contextmanager
    def at_any_time(self, images: np.ndarray, on_frames: OnFrames | None) -> Iterator[Put]:
        """Gives a function that fills `images` in the caller's thread, from several threads in any order.

        `on_frames` is told of images that are there with all those before them.
        """
        there, known, lock = np.zeros(len(images) + 1, bool), 0, threading.Lock()

        def put(frame: "VideoFrame", first: int, end: int) -> None:
            nonlocal known
            images[first:end] = self(frame)
            with lock:
                there[first:end] = True
                before, known = known, known + int(there[known:].argmin())
                if on_frames is not None and known > before:
                    on_frames(images, known)

        yield put

    def __call__(self, frame: "VideoFrame") -> np.ndarray:
        """The frame turned and mirrored as its metadata says, and resized."""
        from PIL import Image

        check_pixels(self.path, frame.width, frame.height)
        if not hasattr(self._of_thread, "reformatter"):
            from av.video.reformatter import VideoReformatter

            self._of_thread.reformatter = VideoReformatter()
        pixels = self._of_thread.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        orientation = orientation_of(frame)
        if any(orientation):
            pixels = orientation.apply(pixels)
        return resize(Image.fromarray(pixels), self.size, self._resampling)


def orientation_of(frame: "VideoFrame") -> Orientation:
    """How the metadata turn and mirror the frame."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know a kind of side data, such as the EXIF data of a TIFF picture
        return Orientation()
    if matrix is None or matrix.buffer_size != 36:
        return Orientation()
    return of_matrix(np.frombuffer(matrix, np.int32).tolist())
