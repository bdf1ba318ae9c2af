"""The page's sections as plain values: text, numbers, tables, pictures. The template only arranges them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.artifacts import Analysis
from components.report.examples import data_uri
from components.report.read import Run, Task, finite
from components.software import git_commit, versions
from components.store import join, read_bytes, read_json

NUMBER = re.compile(r"–|[+−-]?[\d.,]*\d%?")
METRICS = {"l1": "L1", "mse": "squared error", "psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}
QUALITY_COLUMNS = {
    "name": "",
    "mean_tokens": "tokens",
    "frechet_efficientnet": "Fréchet, EfficientNet",
    "kernel_efficientnet": "kernel, EfficientNet",
    "frechet_inception": "rFID",
    "usage": "codes used",
    "perplexity": "perplexity",
    "probe_flat": "probe, flat",
    "probe_pooled": "probe, pooled",
    "recall1": "recall@1",
    "recall5": "recall@5",
}
SIZES = {
    "png": "PNG",
    "jpeg75": "JPEG, quality 75",
    "jpeg_matched": "JPEG as good as the tokens",
    "fixed": "most tokens for all",
    "packed": "packed tokens",
    "entropy": "ideal coder, held out",
}


@dataclass(frozen=True)
class Figure:
    """One number that a reader should take along."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """``rows``: one value a column, text or number; the first names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only, and so stand right."""
        return [
            bool(at and self.rows) and all(is_number(row[at]) for row in self.rows) for at in range(len(self.columns))
        ]


@dataclass(frozen=True)
class Picture:
    """A picture beside the analysis that made it."""

    src: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A finding of an analysis: what is claimed, what was found, over how many images."""

    id: str
    title: str
    claim: str
    finding: str
    images: int | None
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Matrix:
    """Criteria against columns; ``cells``: (mean, gain, share of the column's largest gain), None where missing."""

    sentence: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]]


@dataclass(frozen=True)
class Quality:
    """Of the whole set."""

    table: Table
    context: Sequence[tuple[str, Any]] = field(default_factory=tuple)


def metric_label(name: str) -> str:
    """A column of the score table as people call it."""
    return METRICS.get(name, name.replace("_", " ").replace(".", ": ", 1))


def short(value: Any) -> str:
    """A cell of a table: numbers at four digits, nothing as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return (
        f"{value:,.0f}"
        if isinstance(value, float) and abs(value) >= 10_000
        else (f"{value:.4g}" if isinstance(value, float) else str(value))
    )


def three(value: float) -> str:
    """A measured value at three digits, zeros kept."""
    return f"{value:#.3g}".rstrip(".")


def is_number(cell: Any) -> bool:
    """Whether a cell is a number, as text too, or empty."""
    return cell is None or isinstance(cell, int | float) or bool(NUMBER.fullmatch(cell))


def percent(share: float | None) -> str:
    """A share of one."""
    return "–" if share is None else f"{share:.0%}"


def headline(run: Run) -> list[Figure]:
    """The numbers at the top."""
    counts = run.images.manifest.counts
    found = [Figure("images", short(counts["images"]), f"{counts['val']:,} held out, {counts['rejected']:,} rejected")]
    for task in run.tasks:
        saved = task.mine["saved_share"]
        note = "no fixed length is as good" if saved is None else f"{saved:+.0%} against a fixed length as good"
        note = note.replace("+", "saves ", 1) if saved is not None and saved >= 0 else note.replace("-", "costs ", 1)
        found.append(Figure(f"tokens a mean image, {task.name}", f"{task.mine['mean_tokens']:.1f}", note))
    smallest, largest = run.budgets[0], run.budgets[-1]
    known = {curve.name: curve for curve in run.curves}
    for name in ("l1", "psnr"):
        if name in known and len(known[name].rows) == len(run.budgets):
            few, many = (three(known[name].at(budget)) for budget in (smallest, largest))
            note = f"mean of {run.split} images at {smallest} and at {largest} tokens"
            found.append(Figure(metric_label(name), f"{few} → {many}", note))
    return [*found, Figure("model", run.model, f"{smallest} to {largest} tokens an image")]


def rules_table(run: Run) -> Table:
    """Every rule of every task against fixed length."""
    columns = [
        "task",
        "rule",
        "mean tokens",
        "satisfied",
        "metric there",
        "fixed length as good",
        "saved",
        "saved share",
    ]
    rows = [
        [
            task.name,
            row["rule"],
            _rounded(row["mean_tokens"]),
            percent(task.satisfied(row)),
            row["value"],
            _rounded(row["fixed_tokens"]),
            _rounded(row["saved"]),
            percent(row["saved_share"]),
        ]
        for task in run.tasks
        for row in task.rules
    ]
    missing = [f"{task.mine['missing']:,} for {task.name}" for task in run.tasks if task.mine["missing"]]
    note = f"Images without a value get the most tokens: {', '.join(missing)}." if missing else ""
    return Table("Rules", columns, rows, note)


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def matrix_of(run: Run) -> Matrix | None:
    """Criterion against task at equal mean tokens, where there is one."""
    for _, found in run.analyses("matrix.json"):
        cells = found["cells"]
        criteria = list(dict.fromkeys(cell["criterion"] for cell in cells))
        columns = list(dict.fromkeys(cell["column"] for cell in cells))
        at = {(cell["criterion"], cell["column"]): cell for cell in cells}
        largest = {c: max(abs(one["gain"]) for one in cells if one["column"] == c) or 1.0 for c in columns}
        rows = [(name, [_cell(at.get((name, column)), largest[column]) for column in columns]) for name in criteria]
        note = f"{found['images']:,} images, {found['mean_tokens']:g} tokens a mean image for every criterion."
        return Matrix(found["sentence"], note, columns, rows)
    return None


def _cell(cell: Mapping[str, Any] | None, largest: float) -> tuple[float, float, float] | None:
    return None if cell is None else (cell["mean"] + 0.0, cell["gain"] + 0.0, cell["gain"] / largest)


def quality_of(run: Run) -> Quality | None:
    """Whole-set quality, where it was measured."""
    for _, found in run.analyses("quality.json"):
        names = [name for name in QUALITY_COLUMNS if any(row.get(name) is not None for row in found["rows"])]
        rows = [[row.get(name) for name in names] for row in found["rows"]]
        note = f"Over {found['images']:,} images of the {found['split']} split. Fréchet distances of EfficientNet "
        note += "features are not FID, and grow as images get fewer."
        return Quality(Table("Quality of the whole set", [QUALITY_COLUMNS[name] for name in names], rows, note))
    return None


def sizes_of(task: Task) -> dict[str, float]:
    """Mean bits an image, by how it is stored."""
    return {label: task.sizes[name] for name, label in SIZES.items() if task.sizes.get(name)}


def sizes_table(run: Run) -> Table | None:
    """The same for every task, where anything was packed."""
    packed = [task for task in run.tasks if task.sizes]
    names = [name for name in SIZES if any(task.sizes.get(name) for task in packed)]
    columns = ["task", *(SIZES[name] for name in names), "quality of that JPEG"]
    rows = [
        [task.name, *(task.sizes.get(name) for name in names), task.sizes.get("jpeg_matched_at")] for task in packed
    ]
    whole = [[round(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]
    return Table("Mean bits an image", columns, whole) if packed else None


def sections_of(run: Run) -> list[Section]:
    """The findings of every analysis that keeps to the contract of ``sections.json``."""
    return [_section(analysis, one) for analysis, found in run.analyses("sections.json") for one in found["sections"]]


def _section(analysis: Analysis, one: Mapping[str, Any]) -> Section:
    return Section(
        id=f"section-{analysis.manifest.stage}-{one['id']}",
        title=one["title"],
        claim=one.get("claim", ""),
        finding=one.get("finding", ""),
        images=one.get("images"),
        pictures=[
            Picture(
                data_uri(read_bytes(join(analysis.uri, figure["file"])), "image/png"),
                figure.get("alt", ""),
                figure.get("caption", ""),
            )
            for figure in one.get("figures", ())
        ],
        tables=[
            Table(table["title"], table["columns"], finite(table["rows"]), table.get("note", ""))
            for table in one.get("tables", ())
        ],
    )


def lineage_tables(run: Run) -> list[Table]:
    """What the numbers were made from."""
    data = run.images.manifest.config["data"]
    facts = [
        ["data", data["source"]],
        ["digest of its listing", run.images.manifest.fingerprint.get("listing", "")],
        ["model", run.model],
        ["digest of the tokenizer", _tokenizer_digest(run)],
        *([name, text] for name, text in versions().items()),
        *([["git commit", commit]] if (commit := git_commit()) else []),
    ]
    made = [
        [one.manifest.stage, one.schema, one.key, one.manifest.created, (one.manifest.mlflow_run_id or "")[:8]]
        for one in run.artifacts
    ]
    return [
        Table("What went in", ["what", "which"], facts),
        Table("Artifacts", ["stage", "kind", "key", "finished", "MLflow run"], made),
    ]


def _tokenizer_digest(run: Run) -> str:
    """sha256 of the weights, as archives and the registered model carry it."""
    from components.artifacts import TokenArchive

    for one in run.made.values():
        if isinstance(one, TokenArchive):
            return str(read_json(join(one.uri, "tokenizer.json"))["digest"])
    return hashlib.sha256(read_bytes(join(run.tokenizer.uri, "weights.safetensors"))).hexdigest()
