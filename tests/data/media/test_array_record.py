"""Records of ArrayRecord files: what cannot be read, what one record costs, and open files."""

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lookalikes import write_records
from video_files import assert_same

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.archives import array_record as records
from crosslmm_jax.data.media.archives.array_record import read_record
from crosslmm_jax.data.media.locate import open_media
from crosslmm_jax.data.media.video import read_frames
from crosslmm_jax.errors import DataError

FOUR = SamplingConfig(frames=4)
FILE = "invented-train.array_record-00000"


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (f"{FILE}::0/image/1.jpg", "missing"), (f"{FILE}::0/image/1-0.jpg", "missing"),
        (f"{FILE}::0/other/0.jpg", "missing"), (f"{FILE}::99/image/0.jpg", "missing"),
        (f"{FILE}::x", "missing"), (f"{FILE}::-1", "missing"), (f"{FILE}::" + "9" * 30, "missing"),
        (f"{FILE}::0/../../../x", "missing"), ("none.array_record::0", "missing"),
        (f"../pictures/{FILE}::0/image/0.jpg", "outside_root"), ("link.array_record::0", "outside_root"),
        ("pipe.array_record::0", "not_a_file"), ("folder.array_record::0", "not_a_file"),
        ("text.array_record::0", "corrupt"), ("raw.array_record::0/image/0", "corrupt"),
        ("empty.array_record::0", "empty"),
    ],
)  # fmt: skip
def test_references_that_cannot_be_read(
    lookalikes: Path, tmp_path: Path, reference: str, reason: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    source = lookalikes / "pictures" / FILE
    (root / FILE).write_bytes(source.read_bytes())
    (root / "link.array_record").symlink_to(source)
    os.mkfifo(root / "pipe.array_record")
    (root / "folder.array_record").mkdir()
    (root / "text.array_record").write_bytes(b"x" * 70_000)
    (root / "empty.array_record").touch()
    write_records(root / "raw.array_record", [b"\xff" * 99])
    with pytest.raises(DataError) as caught:
        open_media(str(root), reference)
    assert caught.value.fault.reason == reason and "\n" not in str(caught.value)


def test_a_record_may_be_a_medium(lookalikes: Path, tmp_path: Path) -> None:
    video, picture = lookalikes / "media" / "one.mp4", lookalikes / "media" / "a.jpg"
    write_records(tmp_path / "x.array_record", [video.read_bytes(), picture.read_bytes(), b"", b"text"])
    for number, path in ((0, video), (1, picture)):
        medium = open_media(str(tmp_path), f"x.array_record::{number}")
        assert_same(read_frames(medium, FOUR, size=24), read_frames(path, FOUR, size=24))
    for number, reason in ((2, "empty"), (3, "wrong_type")):
        with pytest.raises(DataError) as caught:
            read_frames(open_media(str(tmp_path), f"x.array_record::{number}"), FOUR, size=24)
        assert caught.value.fault.reason == reason


def test_no_damage_to_records_is_fatal(lookalikes: Path, tmp_path: Path) -> None:
    content = (lookalikes / "pictures" / FILE).read_bytes()
    numbers = random.Random(5)
    reasons = set()
    for _ in range(150):
        damaged = bytearray(content)
        if numbers.random() < 0.3:
            damaged = damaged[: numbers.randrange(len(damaged))]
        else:
            for _ in range(numbers.choice((1, 10, 1000))):
                damaged[numbers.randrange(len(damaged))] ^= numbers.randrange(1, 256)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            read_frames(open_media(str(tmp_path), f"{FILE}::0/image/0.jpg"), FOUR, size=24)
            reasons.add("none")
        except DataError as error:
            reasons.add(error.fault.reason)
    assert reasons >= {"none", "corrupt"} and reasons <= {"none", "corrupt", "empty", "missing"}


def _bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_one_record_is_read_without_the_others(tmp_path: Path) -> None:
    path = tmp_path / "large.array_record"
    write_records(path, [os.urandom(2**20)] * 96)
    begin = _bytes_read()
    assert len(read_record(str(path), 70)) == 2**20
    assert _bytes_read() - begin < 2**20 + 2**18  # of 96 MB; its footer is read too


def test_few_files_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(140):
        write_records(tmp_path / f"{number}.array_record", [b"%d" % number])
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(140), *range(140)]:
        assert read_record(str(tmp_path / f"{number}.array_record"), 0) == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) <= before + records._KEPT_READERS
    records._reader.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_is_written_anew_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.array_record"
    for content in (b"one", b"other"):
        write_records(path, [content])
        os.utime(path, ns=(0, len(content)))
        assert read_record(str(path), 0) == content


FORKING = """
import multiprocessing, sys
from crosslmm_jax.data.media.archives.array_record import read_record

def read(number):
    numbers = [(number + step) % 64 for step in range(300)]
    return all(read_record(sys.argv[1], number)[:1] == bytes([number]) for number in numbers)

if __name__ == "__main__":
    assert read(0)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        print(all(pool.map(read, range(8), chunksize=1)), read(5))
"""


def test_forked_processes_read_side_by_side(tmp_path: Path) -> None:
    """With readers that their parent had opened before."""
    write_records(tmp_path / "a.array_record", [bytes([number]) * 5000 for number in range(64)])
    command = [sys.executable, "-c", FORKING, str(tmp_path / "a.array_record")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.stdout == "True True\n", found.stderr


def test_threads_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "a.array_record")
    write_records(Path(path), [bytes([number]) * 5000 for number in range(64)])
    numbers = random.Random(1)
    wanted = [numbers.randrange(64) for _ in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: read_record(path, number), wanted))
    assert found == [bytes([number]) * 5000 for number in wanted]


def test_one_thread_at_a_time_loads_what_reads_examples() -> None:
    """Two that did so at once have been seen to wait for each other for ever."""
    reader = threading.Thread(target=records.parse_example, args=(b"", "x"), daemon=True)
    with records._LOADING:
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
    reader.join(60)
    assert not reader.is_alive()
