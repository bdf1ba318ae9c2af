"""What an analysis comes to: sections of findings, figures and tables, as files that a report is made from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import pyarrow as pa

from components.analyze.estimates import Estimate
from components.artifacts import Figures
from components.store import join, write_bytes, write_json, write_table

SECTIONS = "sections.json"
NUMBERS_SCHEMA = pa.schema(
    [
        pa.field("section", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.float64()),  # null: not defined, as a correlation with a constant
        pa.field("low", pa.float64()),  # of the 95% bootstrap interval over images; null where there is none
        pa.field("high", pa.float64()),
        pa.field("images", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    file: str
    alt: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Rows of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One claim and what was found; ``estimates``: every number by its name; ``headline``: the names of the chief."""

    id: str
    title: str
    claim: str
    finding: str
    images: int = 0
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    estimates: dict[str, Estimate] | None = None
    headline: Sequence[str] = ()

    def told(self) -> dict[str, Any]:
        """As JSON: what a report shows."""
        figures = [{"file": one.file, "alt": one.alt, "caption": one.caption} for one in self.figures]
        tables = [asdict(table) for table in self.tables]
        head = {name: getattr(self, name) for name in ("id", "title", "claim", "finding", "images")}
        return head | {"figures": figures, "tables": tables}


def write_sections(output: str, sections: Sequence[Section]) -> Figures:
    """Write ``sections.json``, the pictures beside it and ``table``; returns the headline figures."""
    figures: Figures = {}
    rows = []
    for section in sections:
        for picture in section.figures:
            write_bytes(join(output, picture.file), picture.png)
        for name, one in (section.estimates or {}).items():
            numbers = {key: _or_none(getattr(one, key)) for key in ("value", "low", "high")}
            rows.append({"section": section.id, "name": name, **numbers, "images": one.images})
        named = section.estimates or {}
        figures |= {f"{section.id}.{name}": named[name].value for name in section.headline if _known(named.get(name))}
    write_json(join(output, SECTIONS), {"sections": [section.told() for section in sections]})
    write_table(join(output, "table"), pa.Table.from_pylist(rows, schema=NUMBERS_SCHEMA))
    return figures


def _known(one: Estimate | None) -> bool:
    return one is not None and not isnan(one.value)


def _or_none(value: float) -> float | None:
    return None if isnan(value) else float(value)
