"""drift: whether new images are like those of the training: their token counts, and their scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from components.artifacts import Figures, ImageSet, Job, ScoreTable, TokenCounts, finished
from components.config import DriftConfig, RegisteredModel, RuleConfig
from components.distributions import Difference, compare_counts, compare_scores, histogram, tokens_of
from components.parts import part_names
from components.registry import ModelVersion, read_reference
from components.rules import describe
from components.scores import budgets_of, score_files, values_of
from components.store import exists, filesystem, join, read_json, write_json, write_table
from components.tracking import Tracker

PICTURE = "drift.png"
ADDED = "added.json"  # of an ImageSet: names of the files in its table that are new; without it all are
HOW = (
    "psi: population stability index of the new images against those of the training, over token counts or over the "
    "training's deciles of a score. p_value: of the chi-square test of one distribution for both (counts), of the "
    "Kolmogorov-Smirnov test (scores). flagged: psi above its limit and p_value below its own."
)
NONE, TOO_FEW = "none", "too few to say"


@dataclass(frozen=True)
class Row:
    """One thing that was compared; see HOW."""

    name: str  # "TASK tokens", or COLUMN@BUDGET
    images: int  # new ones with a value
    mean: float
    reference_mean: float
    psi: float
    p_value: float
    flagged: bool


@dataclass(frozen=True)
class _New:
    """The new images' part of the tables."""

    parts: tuple[str, ...]  # names of files
    images: int


def drift(
    job: Job,
    *,
    config: DriftConfig,
    resources: RegisteredModel,
    images: ImageSet,
    scores: ScoreTable,
    **counts: TokenCounts,
) -> Figures:
    """Write ``drift.json``, its rows as ``table``, a section of the page and, where something was compared, a picture.

    New are the images that were added since the run of this workspace before that was published: those of a night that
    failed count in the next. ``counts``: of each task, as counts_<task>. Figures: images (new ones), flags, ``drift``
    (in words), and psi.NAME.
    """
    model = ModelVersion(resources.name, resources.version)
    reference = read_reference(Tracker(**job.tracking).uri, model)
    new = _new(job, images, scores)
    by_task = {chosen.manifest.config["name"]: chosen for chosen in counts.values()}
    rows: list[Row] = []
    if reference and new.images >= config.min_images:
        rows = [*_count_rows(config, reference["counts"], by_task, new)]
        rows += _score_rows(config, reference["scores"], scores, new)
    said = _verdict(rows, reference, new, config)
    told = {"drift": said, "images": new.images, "rows": [asdict(row) for row in rows], "how": HOW}
    write_json(join(job.output, "drift.json"), told)
    write_table(join(job.output, "table"), pa.Table.from_pylist([asdict(row) for row in rows], _schema()))
    if rows:
        _draw(reference["counts"], by_task, new, join(job.output, PICTURE))
    write_json(join(job.output, "sections.json"), {"sections": [_section(said, new, rows)]})
    flags = sum(row.flagged for row in rows)
    return {"images": new.images, "flags": flags, "drift": said} | {f"psi.{row.name}": row.psi for row in rows}


def _new(job: Job, images: ImageSet, scores: ScoreTable) -> _New:
    added = {name for one in (images, *_unpublished(job, images)) for name in _added(one)}
    parts = tuple(name for name in part_names(images.table_uri) if name in added)
    return _New(parts, sum(len(table) for name, table in score_files(scores, ["image_id"]) if name in parts))


def _unpublished(job: Job, images: ImageSet) -> Iterator[ImageSet]:
    """Those that came before ``images``, back to the one that a run was last published with."""
    published = {manifest.inputs.get("images") for _, manifest in finished(job.workspace, "publish")}
    same, reached = (images.manifest.config, images.manifest.code), False
    for uri, manifest in finished(job.workspace, "ingest"):
        if reached and (manifest.config, manifest.code) == same:
            if manifest.key in published:
                return
            yield ImageSet(uri, manifest.key)
        reached = reached or manifest.key == images.key


def _added(images: ImageSet) -> Sequence[str]:
    uri = join(images.uri, ADDED)
    return read_json(uri)["parts"] if exists(uri) else part_names(images.table_uri)


def _count_rows(
    config: DriftConfig, reference: Mapping[str, Any], counts: Mapping[str, TokenCounts], new: _New
) -> list[Row]:
    rows = []
    for task, chosen in counts.items():
        if not _comparable(reference, task, chosen):
            continue
        known = reference[task]
        budgets, tokens = known["tokens"], tokens_of(chosen, new.parts)
        before = float(np.average(budgets, weights=known["images"]))
        difference = compare_counts(known["images"], histogram(tokens, budgets))
        rows.append(_row(config, f"{task} tokens", tokens, before, difference))
    return rows


def _comparable(reference: Mapping[str, Any], task: str, chosen: TokenCounts) -> bool:
    """Whether the task chose by the same rule then; another rule's counts are other counts."""
    rule = describe(RuleConfig.model_validate(chosen.manifest.config["rule"]))
    return task in reference and reference[task]["rule"] == rule


def _score_rows(config: DriftConfig, reference: Mapping[str, Any], scores: ScoreTable, new: _New) -> list[Row]:
    budgets, rows = budgets_of(scores), []
    for column in read_json(join(scores.uri, "metrics.json")):
        if column not in reference:
            continue
        tables = [values_of(t, column, len(budgets)) for name, t in score_files(scores, [column]) if name in new.parts]
        values = np.concatenate(tables)
        for budget, known in reference[column].items():
            here = values[:, budgets.index(int(budget))]
            here = here[np.isfinite(here)]
            if len(here) >= config.min_images and len(known) >= config.min_images:
                difference = compare_scores(known, here)
                rows.append(_row(config, f"{column}@{budget}", here, float(np.mean(known)), difference))
    return rows


def _row(config: DriftConfig, name: str, values: np.ndarray, before: float, difference: Difference) -> Row:
    flagged = difference.psi > config.psi and difference.p_value < config.p_value
    return Row(name, len(values), float(values.mean()), before, difference.psi, difference.p_value, flagged)


def _verdict(rows: Sequence[Row], reference: Mapping[str, Any] | None, new: _New, config: DriftConfig) -> str:
    if reference is None:
        return "the model has no reference to compare with"
    if new.images < config.min_images:
        return f"{TOO_FEW}: {new.images} new images, {config.min_images} are needed"
    flagged = sorted((row for row in rows if row.flagged), key=lambda row: -row.psi)
    return ", ".join(f"{row.name} (psi {row.psi:.2f})" for row in flagged) or NONE


def _schema() -> pa.Schema:
    kinds = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return pa.schema([(name, kinds[kind]) for name, kind in Row.__annotations__.items()])


def _section(said: str, new: _New, rows: Sequence[Row]) -> dict[str, Any]:
    """What a report shows (the contract of ``sections.json``: components/analyze/sections.py)."""
    flagged = any(row.flagged for row in rows)
    finding = f"Flagged: {said}." if flagged else "Nothing is flagged." if said == NONE else f"{said.capitalize()}."
    told = {
        "id": "drift",
        "title": "Drift",
        "claim": "New images are like those that the model was trained on.",
        "finding": finding,
        "images": new.images,
    }
    if not rows:
        return told
    alt = "Bars of the share of images at each token count, the training's beside the new ones'"
    caption = "Token counts of the training's images and of the new ones."
    columns = ("what", "new images", "mean", "the training's", "psi", "p", "flagged")
    title = "New images beside those of the training"
    return told | {
        "figures": [{"file": PICTURE, "alt": alt, "caption": caption}],
        "tables": [{"title": title, "columns": columns, "rows": [_cells(row) for row in rows], "note": HOW}],
    }


def _cells(row: Row) -> Sequence[str]:
    means = f"{row.mean:.4g}", f"{row.reference_mean:.4g}"
    return (
        row.name,
        str(row.images),
        *means,
        f"{row.psi:.3f}",
        f"{row.p_value:.2g}",
        "yes" if row.flagged else "no",
    )


def _draw(reference: Mapping[str, Any], counts: Mapping[str, TokenCounts], new: _New, uri: str) -> None:
    """Bars: which share of the images has each count, the training's beside the new ones', a panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task, chosen in counts.items() if _comparable(reference, task, chosen)]
    figure = Figure(figsize=(5, 0.4 + 2.2 * max(1, len(tasks))), dpi=120, layout="constrained")
    for number, task in enumerate(tasks, start=1):
        known, axes = reference[task], figure.add_subplot(len(tasks), 1, number)
        budgets = known["tokens"]
        told = {"training": known["images"], "new": histogram(tokens_of(counts[task], new.parts), budgets)}
        for at, (name, images) in enumerate(told.items()):
            axes.bar(np.arange(len(budgets)) + 0.4 * at, np.array(images) / max(1, sum(images)), 0.4, label=name)
        axes.set_xticks(np.arange(len(budgets)) + 0.2, budgets, fontsize=7)
        axes.set_title(f"{task}: {known['rule']}", fontsize=8)
        axes.set_ylabel("share of images", fontsize=7)
        axes.legend(fontsize=7)
    store, path = filesystem(uri)
    with store.open_output_stream(path) as stream:
        FigureCanvasAgg(figure).print_png(stream)
