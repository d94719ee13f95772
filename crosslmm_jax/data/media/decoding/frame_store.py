"""The pixels of a clip's frames: kept in one array, or handed to a consumer and dropped.

Decoders store frames in any order, from several threads. The consumer gets them in order, while later ones
are decoded. Frames that are not kept exist from when they are stored to when the consumer lets go of them:
at most `MOST_WAITING` at a time, since whoever stores a frame too far ahead waits.
"""

import threading
from typing import Protocol

import numpy as np

# At 384 x 384 pixels these are 0.45 GB. Fewer would leave threads without work: 16 of them, each in a GOP of
# 10 s, hold 16 * 45 frames of an hour that is read at 16,384 frames.
MOST_WAITING = 1024


class FrameConsumer(Protocol):
    """Takes the frames of a clip in order, while later ones are decoded."""

    def begin(self, count: int) -> int:
        """Says that `count` frames will follow; returns how many of them `add` takes at a time.

        A file that turns out to be damaged is read again: what was added before then counts no more.
        """
        ...

    def add(self, frames: np.ndarray) -> None:
        """Takes the next frames, uint8[n, R, R, 3]; only the last ones may be fewer than asked for.

        Called by one thread at a time. The array is not written again.
        """
        ...


class LateFrameError(Exception):
    """A frame would replace one that the consumer has: only reading all frames at once can tell."""


class StoppedError(Exception):
    """Storing was stopped because something else failed."""


class FrameStore:
    """The frames of one clip. Use it as a context manager; when the block ends, the consumer has all of them.

    Attributes:
      images: uint8[F, R, R, 3], all frames of the clip; none of them if they are not kept.
      size: R.
    """

    def __init__(
        self, repeats: np.ndarray, size: int, consumer: FrameConsumer | None = None, *, keep: bool = True,
        may_replace: bool = False,
    ) -> None:  # fmt: skip
        """Prepares for a clip.

        Args:
          repeats: int64[F], ascending: for each frame of the clip the number of the one that is stored.
          size: R, pixels of each side.
          consumer: is given the frames.
          keep: keep the pixels of all frames. If not, a consumer is needed.
          may_replace: frames may be stored again, with other pixels. The consumer then gets frames as late as
            possible.
        """
        assert keep or consumer is not None
        count = len(repeats)
        self.images = np.empty((count if keep else 0, size, size, 3), np.uint8)
        self._places = np.searchsorted(repeats, np.arange(repeats[-1] + 2))  # in the clip, of stored frames
        self._count, self.size, self._consumer, self._keep = count, size, consumer, keep
        self._may_replace = may_replace
        self._most_ahead = count if keep else MOST_WAITING
        self._step = count if consumer is None else consumer.begin(count)
        self._there = np.zeros(count + 1, bool)
        self._chunks: dict[int, np.ndarray] = {}  # number of a chunk of `step` frames -> its frames
        self._begun = 0  # frames that the consumer has been given, or is being given
        self._taken = 0  # those that it has let go of
        self._needed = 0  # frames that somebody waits to store, or has stored
        self._complete = self._stopped = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, first: int, end: int, pixels: np.ndarray) -> None:
        """Stores uint8[R, R, 3] as the frames `first` to before `end` of those that are read.

        Raises:
          LateFrameError: the consumer has one of them already.
          StoppedError: nothing needs to be stored any more.
        """
        first, end = int(self._places[first]), int(self._places[end])
        if self._consumer is None:
            if self._stopped:
                raise StoppedError
            self.images[first:end] = pixels
            return
        while first < end:
            until = min(end, (first // self._step + 1) * self._step)
            self._put(first, until, pixels)
            first = until

    def _put(self, first: int, end: int, pixels: np.ndarray) -> None:
        """Stores frames of one chunk, once they are near enough to those that the consumer takes."""
        with self._changed:
            self._needed = max(self._needed, end)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or end <= self._taken + self._most_ahead)
            if self._stopped:
                raise StoppedError
            if first < self._begun:
                raise LateFrameError
            number = first // self._step
            chunk = self._chunk(number)
            begin = number * self._step
            chunk[first - begin : end - begin] = pixels
            self._there[first:end] = True
            self._changed.notify_all()

    def _chunk(self, number: int) -> np.ndarray:
        if number not in self._chunks:
            begin, end = number * self._step, min((number + 1) * self._step, self._count)
            shape = (end - begin, self.size, self.size, 3)
            self._chunks[number] = self.images[begin:end] if self._keep else np.empty(shape, np.uint8)
        return self._chunks[number]

    def stop(self) -> None:
        """Lets those who wait to store a frame give up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __enter__(self) -> "FrameStore":
        if self._consumer is not None:
            # Not kept here: a circle of store and thread would keep the pixels until garbage is collected.
            threading.Thread(target=self._feed, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._consumer is None:
            return
        with self._changed:
            self._complete, self._stopped = kind is None, self._stopped or kind is not None
            self._changed.notify_all()
        try:
            self._wait_for_consumer()
        except BaseException:  # Ctrl-C: it gets no more
            self.stop()
            self._wait_for_consumer()
            raise
        if self._error is not None:
            raise self._error

    def _wait_for_consumer(self) -> None:
        with self._changed:  # Thread.join cannot be called again once it was interrupted
            self._changed.wait_for(lambda: self._ended)

    def _feed(self) -> None:
        """Gives the consumer its frames; runs in a thread of its own."""
        assert self._consumer is not None
        try:
            while self._begun < self._count:
                frames = self._next()
                if frames is None:
                    return
                self._consumer.add(frames)
                del frames
                with self._changed:
                    self._taken = self._begun
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
            self.stop()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next(self) -> np.ndarray | None:
        """The next chunk once it is complete; None when there will be none."""
        with self._changed:
            end = min(self._begun + self._step, self._count)
            self._changed.wait_for(lambda: self._stopped or self._complete or self._is_ready(end))
            if self._stopped:
                return None
            assert self._there[self._begun : end].all()
            number, self._begun = self._begun // self._step, end
            return self._chunks.pop(number)

    def _is_ready(self, end: int) -> bool:
        if not self._there[self._begun : end].all():
            return False
        return not self._may_replace or self._complete or self._needed > self._taken + self._most_ahead
