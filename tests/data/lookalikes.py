"""Invented look-alike files in every format of annotations, with tiny real media, and a mixture of them all.

    python tests/data/lookalikes.py FOLDER

Names and keys are those of the real sets, all content is made here. Some rows are bad on purpose.
"""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

MIXTURE = """\
datasets:
  - {json_path: llava.json, data_root: media, media_type: mix}
  - {json_path: llava.jsonl, data_root: media, media_type: video, sampling_strategy: "first:100%"}
  - {json_path: "{frames,gifs}.json", data_root: media/odd, sampling_strategy: "end:1"}
  - {json_path: videochat2.json, format: videochat2, data_root: media}
  - {json_path: moviechat, format: moviechat, data_root: media, weight: 2}
  - {json_path: vript, format: vript, data_root: media/vript}
  - {json_path: moviechat_list.json, data_root: media}
  - {json_path: vript_list.json, data_root: media/vript}
  - {json_path: sharegpt4video.jsonl, data_root: media}
  - {json_path: video_chatgpt.json, data_root: media}
  - {json_path: internvid.jsonl, format: internvid, data_root: media}
  - json_path: internvid_cut.jsonl
    format: internvid
    data_root: media/cut
    options: {clips: cut, fields: {video: id, start: from, end: to, caption: text}}
  - {json_path: "capsfusion/*.parquet"}
  - {json_path: "onevision/*.parquet"}
  - {json_path: "shards/shard-{000..002}.tar"}
  - {path: pictures, weight: 2}
  - path: clips/1.0.0
    options: {split: "train[1:]", fields: {conversations: talk, videos: film, start: from_s, end: to_s}}
  - {json_path: never_released.json, skip_missing: true}
"""


def write_lookalikes(folder: Path) -> Path:
    """Writes annotations and media to `folder`, created if missing. Returns the path of the mixture."""
    media = folder / "media"
    for name in ("one.mp4", "two.mp4", "dQw-invented.mp4", "AWA-1.mp4"):
        write_video(media / name)
    for name in ("a.jpg", "b.jpg"):
        write_image(media / name)
    _write_llava(folder)
    _write_videochat2(folder)
    _write_moviechat(folder)
    _write_vript(folder)
    _write_sharegpt4video(folder)
    _write_video_chatgpt(folder)
    _write_internvid(folder)
    _write_capsfusion(folder)
    _write_onevision(folder)
    _write_webdataset(folder)
    _write_tfds(folder)
    mixture = folder / "mixture.yaml"
    mixture.write_text(MIXTURE, encoding="utf-8")
    return mixture


def write_video(path: Path, *, seconds: int = 2, fps: int = 10) -> None:
    """Writes a video of 64x48 pixels with a moving bar."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(number), format="rgb24")))
        container.mux(stream.encode(None))


def write_image(path: Path, number: int = 0) -> None:
    """A JPEG of 64x48 pixels."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_picture(number)).save(path)


def _picture(number: int) -> np.ndarray:
    pixels = np.full((48, 64, 3), 60, np.uint8)
    pixels[:, number * 3 % 60 : number * 3 % 60 + 4] = (250, 120, 20)
    return pixels


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _dump_lines(path: Path, values: list[Any], *more: str) -> None:
    path.write_text("\n".join([*(json.dumps(value) for value in values), *more]), encoding="utf-8")


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def _write_llava(folder: Path) -> None:
    chat = [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello."},
    ]
    _dump(folder / "llava.json", [
        {"id": "i0", "image": "a.jpg", "conversations": _talk("<image>\nWhat is it?", "A bar.")},
        {"id": "i1", "image": ["a.jpg", "b.jpg"],
         "conversations": _talk("Is <image> like <image>?", "Yes.", "Why?", "Both show a bar.")},
        {"id": "t0", "conversations": chat},
        {"id": "v0", "video": "one.mp4", "data_source": "invented",
         "conversations": _talk("<image>\nWhat moves?", "A bar.")},
        {"id": "bad0", "image": ["a.jpg", "b.jpg"], "conversations": _talk("<image>\nWhich?", "None.")},
        {"id": "bad1", "image": "../../secret.jpg", "conversations": _talk("<image>\nWhat?", "No.")},
        {"id": "bad2", "image": "a.jpg"},
    ])  # fmt: skip
    rows = [
        {"id": 0, "video": "one.mp4", "start": 0.5, "end": 1.5, "conversations": _talk("<image>\nA?", "B.")},
        {"id": 1, "video": "two.mp4", "conversations": _talk("<video>\nC?", "D.")},
        {"id": 2, "video": "two.mp4", "start": 3, "end": 1, "conversations": _talk("<image>\nE?", "F.")},
    ]
    _dump_lines(folder / "llava.jsonl", rows, '{"id": 3, "video": "two.mp4", "conver')
    odd = folder / "media" / "odd"
    for number in range(4):
        write_image(odd / "clip" / f"{number:04d}.jpg", number)
    _write_gif(odd / "bar.gif")
    rows = [
        {"id": number, "video": "clip", "video_read_type": "img", "conversations": _talk("<image>\nG?", "H.")}
        for number in range(2)
    ]
    _dump(folder / "frames.json", rows)
    rows = [
        {"id": 0, "video": "bar.gif", "video_read_type": "gif", "conversations": _talk("<image>", "Bar.")}
    ]
    _dump(folder / "gifs.json", rows)


def _write_gif(path: Path) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(_picture(number)) for number in range(4)]
    first.save(path, save_all=True, append_images=others, duration=200)


def _write_videochat2(folder: Path) -> None:
    instruction = "Watch the video and answer."
    _dump(folder / "videochat2.json", [
        {"video": "one.mp4", "QA": [{"i": instruction, "q": "What moves?", "a": "A bar."},
                                    {"i": instruction, "q": "Where to?", "a": "To the right."}]},
        {"video": "two.mp4", "start": 0.25, "end": 1.75,
         "QA": [{"i": "Describe the video.", "q": "", "a": "A bar moves."}]},
        {"image": "b.jpg", "QA": [{"i": "", "q": "Which colour?", "a": "Orange."}]},
        {"video": "one.mp4", "QA": []},
    ])  # fmt: skip


def _write_moviechat(folder: Path) -> None:
    info = {"video_path": "AWA-1.mp4", "fps": 10, "num_frame": 20, "w": 64, "h": 48, "class": "x", "url": ""}
    video = {
        "info": info,
        "caption": "A bar crosses a grey field.",
        "global": [{"question": "Does anything move?", "answer": "Yes."},
                   {"question": "What?", "answer": "A bar."}],
        "breakpoint": [{"question": "Where is it now?", "time": 9, "answer": "In the middle."},
                       {"question": "And now?", "time": "late", "answer": "Right."}],
    }  # fmt: skip
    _dump(folder / "moviechat" / "AWA-1.json", video)
    _dump(folder / "moviechat_list.json", [video, {"info": info, "global": []}])
    (folder / "moviechat" / "AWA-2.json").write_text('{"info": {', encoding="utf-8")


def _write_vript(folder: Path) -> None:
    scenes: dict[str, Any] = {}
    for number in (1, 2):
        clip = f"vid0-Scene-{number:03d}"
        write_video(folder / "media" / "vript" / "vid0" / f"{clip}.mp4", seconds=1)
        caption = {
            "shot_type": "Close-up", "camera_movement": "Static", "content": f"Bar {number} moves.",
            "scene_title": "Bar",
        }  # fmt: skip
        scenes[clip] = {"video_id": "vid0", "clip_id": clip, "video_title": "Bars", "caption": caption}
        scenes[clip]["voiceover"] = []
    scenes["vid0-Scene-003"] = {"video_id": "vid0", "clip_id": "vid0-Scene-003", "caption": {"content": ""}}
    meta = {"video_id": "vid0", "video_title": "Bars", "num_clips": 3, "integrity": True}
    _dump(folder / "vript" / "vid0.json", {"meta": meta, "data": scenes})
    _dump(folder / "vript_list.json", [{"meta": meta, "data": scenes}, {"meta": meta}])


def _write_sharegpt4video(folder: Path) -> None:
    captions = [{"idx": "0", "content": "A bar."}, {"idx": "-1", "content": "A bar crosses a grey field."}]
    video = {"video_id": "invented", "video_path": "one.mp4", "zip_folder": "a.zip", "keyframe": ["00:00:00"]}
    _dump_lines(folder / "sharegpt4video.jsonl", [
        {**video, "captions": captions},
        {**video, "captions": captions[:1]},
    ])  # fmt: skip


def _write_video_chatgpt(folder: Path) -> None:
    _dump(folder / "video_chatgpt.json", [
        {"q": "What moves?", "a": "A bar.", "video_id": "one"},
        {"q": "Where to?", "a": "", "video_id": "two"},
    ])  # fmt: skip


def _write_internvid(folder: Path) -> None:
    names = ("YoutubeID", "Start_timestamp", "End_timestamp", "Caption", "UMT_Score")
    rows = [
        ("dQw-invented", "00:00:00.500", "00:00:01.250", "a bar moves", 0.4),
        ("dQw-invented", 1, 1.5, "a bar goes on", 0.5),
        ("dQw-invented", "00:00:71.000", "00:00:72.000", "no such time", 0.1),
    ]
    _dump_lines(folder / "internvid.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    write_video(folder / "media" / "cut" / "k_00:00:01.000_00:00:02.000.mp4", seconds=1)
    rows = [
        {"id": "k", "from": "00:00:01.000", "to": "00:00:02.000", "text": "a bar that was cut out"},
        {"id": "k", "from": "00:00:02.000", "to": "00:00:03.000", "text": " "},
    ]
    _dump_lines(folder / "internvid_cut.jsonl", rows)


def _write_capsfusion(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for shard in ("00000", "00001"):
        keys = [f"{shard}{number:04d}" for number in range(2)]
        write_image(folder / "capsfusion" / shard / f"{keys[0]}.jpg")
        columns = {
            "key": keys,
            "status": ["success", "failed_to_download"],
            "url": ["https://example.org/0.jpg", "https://example.org/1.jpg"],
            "caption": ["alt text", "alt text"],
            "capsfusion": [f"An orange bar, shard {shard}.", "A picture that is gone."],
        }
        parquet.write_table(pyarrow.table(columns), folder / "capsfusion" / f"{shard}.parquet")


def _write_onevision(folder: Path) -> None:
    """Parquet as the library `datasets` writes it, with the bytes of the images."""
    import pyarrow
    from pyarrow import parquet

    picture, clip = ((folder / "media" / name).read_bytes() for name in ("a.jpg", "one.mp4"))
    rows = [
        ("p0", {"bytes": picture, "path": "a.jpg"}, _talk("<image>\nWhat is it?", "A bar.")),
        ("p1", None, _talk("Say hello.", "Hello.")),
        ("p2", {"bytes": picture, "path": None}, _talk("What is it?", "A bar.")),
    ]
    names = ("id", "image", "conversations")
    table = pyarrow.table({name: [row[place] for row in rows] for place, name in enumerate(names)})
    (folder / "onevision").mkdir(exist_ok=True)
    parquet.write_table(table, folder / "onevision" / "train-00000.parquet", row_group_size=2)
    table = pyarrow.table({
        "messages": [_talk("<image> or <image>?", "Both.")],
        "images": [[{"bytes": picture, "path": "a.jpg"}, {"bytes": picture + bytes(9), "path": None}]],
    })  # fmt: skip
    parquet.write_table(table, folder / "onevision" / "train-00001.parquet")
    table = pyarrow.table({
        "conversations": [_talk("<video>\nWhat moves?", "A bar.")], "start": [0.5],
        "video": [{"bytes": clip, "path": "one.mp4"}],
    })  # fmt: skip
    parquet.write_table(table, folder / "onevision" / "train-00002.parquet")


def _write_webdataset(folder: Path) -> None:
    video = (folder / "media" / "one.mp4").read_bytes()
    image = (folder / "media" / "a.jpg").read_bytes()
    talk = {"conversations": _talk("<image>\nWhat moves?", "A bar."), "start": 0.5}
    pair = {"conversations": _talk("<image><image>\nThe same?", "Yes.")}
    files = {
        "v0.mp4": video, "v0.json": json.dumps(talk).encode(),
        "i0.jpg": image, "i0.json": b'{"caption": "alt text", "key": "i0"}', "i0.txt": b"An orange bar.",
        f"long/{'n' * 120}.0.jpg": image, f"long/{'n' * 120}.1.jpg": image,
        f"long/{'n' * 120}.json": json.dumps(pair).encode(),
        "x0.jpg": image, "x0.json": b"{oops",
        "x1.txt": b"alone",
    }  # fmt: skip
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    write_tar(shards / "shard-000.tar", files)
    write_tar(shards / "shard-001.tar", {"i1.jpg": image, "i1.txt": b"A bar.", "i2.jpg": image})
    content = (shards / "shard-001.tar").read_bytes()
    (shards / "shard-002.tar").write_bytes(content[: content.index(b"i2.jpg") + 700])


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Writes a tar of files in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _write_tfds(folder: Path) -> None:
    from tensorflow_datasets import features

    write_tfds(
        folder / "pictures",
        {"image": features.Image(encoding_format="jpeg"), "caption": features.Text()},
        [
            {"image": str(folder / "media" / "a.jpg"), "caption": text}
            for text in ("An orange bar.", "", "Bar.")
        ],
    )
    film = (folder / "media" / "one.mp4").read_bytes()
    talk = [{"from": "human", "value": "<image>\nWhat moves?"}, {"from": "gpt", "value": "A bar."}]
    write_tfds(
        folder / "clips" / "1.0.0",
        {
            "talk": features.Sequence({"from": features.Text(), "value": features.Text()}),
            "film": features.Text(), "from_s": np.float32, "to_s": np.float32, "subject": features.Text(),
        },
        [
            {"talk": talk, "film": film, "from_s": start, "to_s": 1.5, "subject": "x"}
            for start in (0, 0.25, 2)
        ],
    )  # fmt: skip


def write_tfds(folder: Path, features: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    """Writes a data set with TensorFlow Datasets itself, two records per file."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="invented", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=2, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": examples})
    writer.close_splits(["train"])


def write_records(path: Path, content: list[bytes]) -> None:
    """Writes an ArrayRecord file, one record per group, for random reads."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in content:
        writer.write(record)
    writer.close()


if __name__ == "__main__":
    print(write_lookalikes(Path(sys.argv[1])))
