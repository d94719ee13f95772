"""What a conversion reports at its end: where every tensor went."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence


def condense(names: Iterable[str]) -> list[str]:
    """Joins names that differ only in one number: `a.{0-3,5}.b`."""
    numbered: dict[tuple[str, str], set[int]] = {}  # (before, after) the number -> numbers
    condensed = []
    for name in names:
        match = re.match(r"(.*?(?:^|[._/]))(\d+)((?:[./].*)?)$", name)
        if match:
            numbered.setdefault((match[1], match[3]), set()).add(int(match[2]))
        else:
            condensed.append(name)
    for (before, after), numbers in numbered.items():
        text = _ranges(sorted(numbers))
        condensed.append(f"{before}{{{text}}}{after}" if len(numbers) > 1 else f"{before}{text}{after}")
    return sorted(condensed)


def _ranges(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


@dataclasses.dataclass
class Report:
    """Where every tensor went. Source tensors have the names in their files."""

    used: list[str] = dataclasses.field(default_factory=list)
    ignored: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # by reason
    filled: list[str] = dataclasses.field(default_factory=list)  # parameters, from the source
    copied: list[str] = dataclasses.field(default_factory=list)  # parameters, from self-attention
    fresh: list[str] = dataclasses.field(default_factory=list)  # parameters, initialised
    written: list[str] = dataclasses.field(default_factory=list)  # keys of an export
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)  # part of the model -> dtype written
    notes: list[str] = dataclasses.field(default_factory=list)
    bytes: int = 0  # written
    seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """For people. Names that differ only in the layer number are joined."""
        if self.written:
            return [
                f"parameters read: {len(self.used)}",
                f"keys written: {len(self.written)}",
                *self._amounts(),
            ]
        lines = [f"keys used: {len(self.used)}"]
        lines.append(f"keys ignored: {sum(map(len, self.ignored.values()))}")
        for reason, names in self.ignored.items():
            lines.append(f"  {reason}: {', '.join(condense(names))}")
        lines.append(f"parameters filled: {len(self.filled)}")
        for title, names in (("copied from self-attention", self.copied), ("initialised fresh", self.fresh)):
            lines.append(f"parameters {title}: {len(names)}" + (f" ({', '.join(names)})" if names else ""))
        return lines + [f"note: {note}" for note in self.notes] + self._amounts()

    def _amounts(self) -> list[str]:
        kinds = ", ".join(f"{part} {dtype}" for part, dtype in sorted(self.dtypes.items()))
        rate = self.bytes / 1e6 / max(self.seconds, 1e-9)
        return [f"dtype: {kinds}", f"{self.bytes:,} bytes in {self.seconds:.1f} s ({rate:.0f} MB/s)"]


def dtypes_by_part(dtypes: Mapping[str, str]) -> dict[str, str]:
    """Part of the model -> dtype of its parameters; several are joined by "/"."""
    parts: dict[str, set[str]] = {}
    for name, dtype in dtypes.items():
        parts.setdefault(name.split(".")[0], set()).add(dtype)
    return {part: "/".join(sorted(kinds)) for part, kinds in parts.items()}
