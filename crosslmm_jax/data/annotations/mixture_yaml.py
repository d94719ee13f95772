"""Reads YAML so that nothing that its author wrote is lost, and the map of paths that goes with a mixture."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from crosslmm_jax.data.annotations.json_files import unreadable
from crosslmm_jax.errors import UserError

_LOG = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Refuses a map with two values for a key, of which YAML would keep the last.

    Attributes:
        repeated: keys that appear twice with the same value, as text and line. The second one is left out.
        with_anchors: values at the top level that define anchors for others to use.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[tuple[str, int]] = []
        self.with_anchors: list[yaml.Node] = []
        self._depth = self._anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
        event = self.peek_event()
        before = self._anchors
        self._anchors += not isinstance(event, yaml.AliasEvent) and getattr(event, "anchor", None) is not None
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if self._depth == 1 and self._anchors > before:
            self.with_anchors.append(node)
        return node

    def compose_mapping_node(self, anchor: dict[object, yaml.Node]) -> yaml.MappingNode:
        # Here and not when the map is constructed: it may then hold keys that were merged into it.
        node = super().compose_mapping_node(anchor)
        found: dict[str, yaml.Node] = {}
        kept = []
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in found:
                if yaml.serialize(found[name]) != yaml.serialize(value):
                    problem = f"{name!r} appears twice with different values{_of_data_set(found)}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                self.repeated.append((name, key.start_mark.line + 1))
                continue
            if name is not None:
                found[name] = value
            kept.append((key, value))
        node.value = kept
        return node


def _of_data_set(found: Mapping[str, yaml.Node]) -> str:
    """Which data set a map describes, for a message."""
    names = [found[key].value for key in ("path", "json_path", "name") if key in found]
    return f" in the data set {names[0]}" if names else ""


def read_yaml(path: str) -> dict[str, object] | None:
    """Reads a YAML file that holds a map, with its keys as text; None for another one.

    Keys at the top level that only define anchors are left out.

    Raises:
        UserError: the file cannot be read, is no YAML, or gives a key two values.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            return None
        for name, line in loader.repeated:
            _LOG.warning("%s: line %d repeats %r with the same value", path, line, name)
        anchors = {
            key.value for key, value in root.value
            if isinstance(key, yaml.ScalarNode) and value in loader.with_anchors
        }  # fmt: skip
        content = loader.construct_document(root)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "it"
        why = getattr(error, "problem", None) or "unknown characters"
        raise UserError(f"{path}: {line} is no valid YAML ({why}); fix it") from error
    return {str(key): value for key, value in content.items() if key == "datasets" or key not in anchors}


class PathMap:
    """Local folders in place of the beginnings of paths and addresses that a mixture names."""

    def __init__(self, folders: Mapping[str, str | None] | None = None) -> None:
        """`folders`: beginning -> folder, or None to leave out the data sets that it names."""
        self._folders = {start.rstrip("/"): folder for start, folder in (folders or {}).items()}

    def local(self, path: str) -> str | None:
        """The local form of a path: by the longest beginning that fits, else `path`. None: to be left out."""
        fitting = [start for start in self._folders if path == start or path.startswith(f"{start}/")]
        if not fitting:
            return path
        start = max(fitting, key=len)
        folder = self._folders[start]
        rest = path[len(start) :].strip("/")
        return folder if folder is None or not rest else os.path.join(folder, rest)


def read_path_map(path: str | None) -> PathMap:
    """Reads a PathMap from a YAML file; folders are relative to it. None: an empty map.

    Raises:
        UserError: the file cannot be read, or a line is no path and folder.
    """
    if path is None:
        return PathMap()
    folders: dict[str, str | None] = {}
    for start, folder in (read_yaml(path) or {}).items():
        if not (folder is None or (isinstance(folder, str) and folder)):
            fix = "write the beginning of a path, a colon and a folder, or null to leave its data sets out"
            raise UserError(f"{path}: {start!r}: {folder!r} is no mapping to a folder; {fix}")
        folders[start] = None if folder is None else os.path.join(os.path.dirname(path), folder)
    if not folders:
        raise UserError(f"{path}: maps no path; write one `beginning of a path: folder` per line")
    return PathMap(folders)
