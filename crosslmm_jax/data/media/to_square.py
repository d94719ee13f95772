"""Frames of a video as square pixels: turned, resized, in several threads."""

import collections
import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding import FrameStore, Put
from crosslmm_jax.data.media.image import Resampling, resize
from crosslmm_jax.data.media.locate import PathOrMedia, check_pixels
from crosslmm_jax.data.media.orientation import Orientation, of_matrix

if TYPE_CHECKING:
    from av import VideoFrame

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
    def into(self, store: FrameStore) -> Iterator[Put]:
        """Gives a function that fills `store`, for one thread. When the block ends, all frames are there."""
        if self._threads == 1:
            yield self.here(store)
            return
        waiting: collections.deque[Future[None]] = collections.deque()
        fill = self.here(store)

        def put(frame: "VideoFrame", first: int, end: int) -> None:
            waiting.append(pool.submit(fill, frame, first, end))
            # Decoded frames are large: few of them wait.
            while waiting and (len(waiting) > 2 * self._threads or waiting[0].done()):
                waiting.popleft().result()

        with ThreadPoolExecutor(self._threads) as pool:
            try:
                yield put
                while waiting:
                    waiting.popleft().result()
            except BaseException:
                store.stop()  # what comes after a frame that failed would wait for it, and the pool for that
                raise

    def here(self, store: FrameStore) -> Put:
        """A function that fills `store` in the thread of the caller, of which there may be several."""

        def put(frame: "VideoFrame", first: int, end: int) -> None:
            store.put(first, end, self(frame))

        return put

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
