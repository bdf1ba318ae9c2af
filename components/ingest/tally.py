"""What became of the files of a part, of all that were read so far, or of a whole ImageSet."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import Figures

REASONS_TOLD = 3
COUNTED = ("images", "rejected", "train", "val", "bytes", "depth", "mask")

PARTS_SCHEMA = pa.schema(
    [
        pa.field("part", pa.int32(), nullable=False),  # number in the files' names
        pa.field("file", pa.string(), nullable=False),  # of `table`; empty where no image of the part is left
        pa.field("rejects", pa.string(), nullable=False),  # file of `rejected`; empty where there is none
        *(pa.field(name, pa.int64(), nullable=False) for name in COUNTED),
        pa.field("labels", pa.list_(pa.string()), nullable=False),  # different ones, sorted
    ]
)


@dataclass
class Tally:
    """Numbers that add up; ``part``, ``file`` and ``rejects`` are those of a part (PARTS_SCHEMA)."""

    part: int = -1
    file: str = ""
    rejects: str = ""
    images: int = 0
    rejected: int = 0
    train: int = 0
    val: int = 0
    bytes: int = 0  # of the images at the working size
    depth: int = 0  # images that have it
    mask: int = 0
    labels: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)  # the first few

    def add(self, other: "Tally") -> None:
        """Count what ``other`` counted too."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.labels |= other.labels
        self.reasons = (self.reasons + other.reasons)[:REASONS_TOLD]

    def row(self) -> dict[str, Any]:
        """As a row of PARTS_SCHEMA."""
        return {name: value for name, value in asdict(self).items() if name != "reasons"} | {
            "labels": sorted(self.labels)
        }

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Self:
        """The reverse of :meth:`row`."""
        return cls(**row | {"labels": set(row["labels"])})

    def to_json(self) -> str:
        """As text: the one column type that is the same for every block."""
        return json.dumps(asdict(self) | {"labels": sorted(self.labels)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls.of_row(json.loads(text))


def figures_of(parts: pa.Table) -> Figures:
    """The figures of an ImageSet with these parts; ``labels``: how many different ones."""
    figures: Figures = {name: int(pc.sum(parts[name]).as_py() or 0) for name in COUNTED}
    return figures | {"labels": len(pc.unique(pc.list_flatten(parts["labels"])))}
