"""A conversion's source, read for `verify` with other code than the conversion's.

`from_hf` knows whole names of tensors, and reads files by itself. Here the libraries of the formats read the
files, and a tensor is recognised by the end of its name. So a mistake in either shows as a difference.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    import torch

# End of a name in any layout -> name of the same tensor here. A projector's layers are numbered 0 and 2, with
# the activation between them, or 1 and 2.
_ENDS = tuple(
    (re.compile(rf"(?:.*\.)?{end}"), name)
    for end, name in (
        (r"((?:embeddings|encoder\.layers|post_layernorm)\..+)", r"vision_model.\1"),
        (r"(?:mm_projector|multi_modal_projector)\.(?:0|linear_1)\.(\w+)", r"projector.1.\1"),
        (r"(?:mm_projector|multi_modal_projector)\.(?:2|linear_2)\.(\w+)", r"projector.2.\1"),
        (r"(lm_head\.weight)", r"\1"),
        (r"((?:embed_tokens|norm|layers\.\d+\.\w+)\..+)", r"model.\1"),
    )
)
# Buffers that old checkpoints hold although they are computed.
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")
Read = Callable[[], "torch.Tensor"]


class Tensors:
    """The tensors of one or several sources.

    Names begin with `vision_model.`, `projector.1.`, `projector.2.`, `model.` or `lm_head.`.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Opens files and folders; the tensors of a later one take precedence.

        Raises:
          UserError: a file cannot be read, or two tensors of a source are the same.
        """
        paths = list(paths)
        self._paths = ", ".join(map(str, paths))
        self._read: dict[str, Read] = {}
        self._path_of: dict[str, Path] = {}
        for path in paths:
            found: dict[str, str] = {}
            for name, read in _readers(path):
                known = _known_name(name)
                if known is None:
                    continue
                if known in found:
                    raise UserError(f"{path}: {found[known]} and {name} are the same tensor; remove one")
                found[known], self._read[known], self._path_of[known] = name, read, path

    def names(self, prefix: str) -> list[str]:
        """The names below `prefix`, with the prefix removed."""
        return [name[len(prefix) :] for name in self._read if name.startswith(prefix)]

    def rows(self, name: str) -> int:
        """Rows of the tensor `name`. Raises a `UserError` when no source has it."""
        if name not in self._read:
            raise UserError(f"{self._paths}: no tensor {name}; give the source of this MODEL, complete")
        return self._read[name]().shape[0]

    def read(self, prefix: str) -> "dict[str, torch.Tensor]":
        """float32 tensors of all names below `prefix`."""
        return {name: self._read[prefix + name]().float() for name in self.names(prefix)}

    def path(self, prefix: str) -> Path | None:
        """The path of the source that holds the tensors below `prefix`; None if none does."""
        return next((path for name, path in self._path_of.items() if name.startswith(prefix)), None)


def _known_name(name: str) -> str | None:
    if "text_model." in name or name.endswith(_COMPUTED):
        return None
    for end, known in _ENDS:
        match = end.fullmatch(name)
        if match:
            return match.expand(known)
    return None


def _readers(path: Path) -> list[tuple[str, Read]]:
    """Name and reader of every tensor of a file, or of the files of a folder."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        indexes = sorted(path.glob("*.index.json"))
        if indexes:
            named = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
            files = [path / name for name in sorted(named)]
    if not files:
        raise UserError(f"{path}: holds no safetensors and no .bin files; give the source of this MODEL")
    return [reader for file in files for reader in _readers_of_file(file)]


def _readers_of_file(file: Path) -> list[tuple[str, Read]]:
    import safetensors
    import torch

    if file.suffix != ".safetensors":
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        return [(name, lambda value=value: value.detach()) for name, value in loaded.items()]

    def reader(name: str) -> Read:
        def read() -> "torch.Tensor":
            with safetensors.safe_open(file, "pt") as opened:
                return opened.get_tensor(name)

        return read

    with safetensors.safe_open(file, "pt") as opened:
        return [(name, reader(name)) for name in opened.keys()]  # noqa: SIM118 (not a dict)
