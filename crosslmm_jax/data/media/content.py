"""What a file holds, told by its first bytes and not by its name."""

HEAD_BYTES = 64  # what the functions here need of a file

_PICTURE_STARTS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png", b"BM": ".bmp", b"GIF8": ".gif"}
_VIDEO_STARTS = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
# "hevc" and "hevx" are moving pictures, which ffmpeg reads.
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis"}
_AVIF_BRANDS = {b"avif", b"avis"}


def picture_suffix(head: bytes) -> str:
    """The usual suffix of the picture format of a file; "" if it holds no picture.

    Args:
        head: the first HEAD_BYTES of the file, or all of it.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if is_mp4(head):
        brands = _brands(head)
        return ".avif" if brands & _AVIF_BRANDS else ".heic" if brands & _HEIC_BRANDS else ""
    return next((suffix for start, suffix in _PICTURE_STARTS.items() if head.startswith(start)), "")


def is_video(head: bytes) -> bool:
    """Whether a file holds a video of a format that its first bytes tell. Others may hold one too."""
    avi = head[:4] == b"RIFF" and head[8:11] == b"AVI"
    return avi or head.startswith(_VIDEO_STARTS) or (is_mp4(head) and not picture_suffix(head))


def is_mp4(head: bytes) -> bool:
    """Whether a file is made of the boxes of the mp4 family, to which AVIF and HEIC belong too."""
    return head[4:8] in _MP4_BOXES


def suffix_by_content(content: bytes) -> str:
    """A suffix for a medium without a name: that of its picture format, or ".mp4" for anything else."""
    return picture_suffix(content[:HEAD_BYTES]) or ".mp4"


def _brands(head: bytes) -> set[bytes]:
    """The major brand of a file, and the compatible ones."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[place : place + 4] for place in (8, *range(16, end, 4))}
