"""How stored pictures are turned and mirrored to be shown: display matrices of videos, EXIF of pictures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXIF_FIELD = 0x0112  # number of the field in the EXIF data


class Orientation(NamedTuple):
    """One of the eight ways in which a rectangle fits on its sides. The steps are done in this order.

    Attributes:
        transposed: rows become columns.
        mirrored: left and right change places.
        flipped: top and bottom change places.
    """

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    @property
    def is_mirror_image(self) -> bool:
        """Whether no rotation alone gives it."""
        return sum(self) % 2 == 1

    @property
    def rotation(self) -> int:
        """Degrees anticlockwise. A mirror image is mirrored left to right after that."""
        mirrored = self.mirrored != self.is_mirror_image  # without the last step of a mirror image
        if self.transposed:
            return 270 if mirrored else 90
        return 180 if mirrored else 0

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """uint8[H, W, 3] as stored -> uint8[H, W, 3] or uint8[W, H, 3] as shown."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        step = [-1 if turned else 1 for turned in (self.flipped, self.mirrored)]
        return np.ascontiguousarray(pixels[:: step[0], :: step[1]])


_OF_EXIF = {
    2: Orientation(mirrored=True),
    3: Orientation(mirrored=True, flipped=True),
    4: Orientation(flipped=True),
    5: Orientation(transposed=True),
    6: Orientation(transposed=True, mirrored=True),
    7: Orientation(transposed=True, mirrored=True, flipped=True),
    8: Orientation(transposed=True, flipped=True),
}


def of_exif(value: object) -> Orientation:
    """The orientation of a value of EXIF_FIELD. Unknown values say nothing."""
    return _OF_EXIF.get(value, Orientation()) if isinstance(value, int) else Orientation()


def of_matrix(matrix: Sequence[int]) -> Orientation:
    """The orientation of a display matrix, as ffmpeg gives it: [a, b, u, c, d, v, x, y, w].

    A stored point (column p, row q) is shown at column a*p + c*q and row b*p + d*q. Scales are left out: a
    frame becomes a square in any case. Of an angle between two orientations the nearer one is taken.
    """
    a, b, _, c, d = matrix[:5]
    if a * d == b * c:  # such a matrix shows nothing, and players ignore it
        return Orientation()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(mirrored=a < 0, flipped=d < 0)
    return Orientation(transposed=True, mirrored=c < 0, flipped=b < 0)
