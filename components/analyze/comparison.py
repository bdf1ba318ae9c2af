"""compare: the variants of a sweep side by side, over the same held-out images.

Legend: N images, K budgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from components.analyze import drawing
from components.analyze.estimates import Bootstrap, Estimate
from components.analyze.sections import Picture, Section, Table, write_sections
from components.analyze.settings import CompareStageConfig, Variant
from components.artifacts import Analysis, Artifact, Figures, Job, ScoreTable, TokenCounts, Tokenizer
from components.config import NoConfig
from components.scores import budgets_of, larger_is_better, score_files, told_split, values_of
from components.store import local_folder, read_batches, read_table
from components.tracking import Tracker

DIFFERENCES = {"o": ("difference at the most", -0.12), "s": ("difference", 0.12)}  # mark: which, and where in its row
EQUAL_SHARE = 0.02  # mean counts so close are the same
CLAIM = "Each part of the method earns its place: without it the same tokens give a worse image."
ABOUT = (
    "Held-out images (any, where none is held out), the same for all. "
    "at the most: the metric at the variant's largest budget; chosen: at the counts "
    "that its rule chose; tokens: their mean; differences: to the first variant, image by image, where both have the "
    "same largest budget or spend the same; hard, worst: L1 at the most tokens in hard cells and in those with the "
    "largest error at the fewest. Brackets: 95% bootstrap intervals over images; that a training with another seed "
    "comes out otherwise is not in them. seconds: of the last training stage, on a machine that had other work too."
)


@dataclass(frozen=True)
class _Measured:
    """What is known of one variant."""

    variant: Variant
    budgets: list[int]
    values: dict[str, np.ndarray]  # image -> [K], held-out ones (any, where none is held out)
    tokens: dict[str, int]  # image -> count
    analysis: dict[str, Estimate]  # "section.name" -> number
    seconds: float

    def chosen(self, names: Sequence[str]) -> np.ndarray:
        """The metric at each image's own count, [N]."""
        return np.array([self.values[name][self.budgets.index(self.tokens[name])] for name in names])

    def curve(self, names: Sequence[str]) -> np.ndarray:
        """The metric at each budget, [N, K]."""
        return np.stack([self.values[name] for name in names])


def compare(job: Job, *, config: CompareStageConfig, resources: NoConfig | None, **inputs: Artifact) -> Figures:
    """Write ``sections.json`` with one section, its pictures and ``table``, and log them to MLflow.

    ``inputs``: scores_, counts_, analysis_ and tokenizer_<variant>. Images that a variant lacks count for none.
    """
    measured = [_measured(config, variant, inputs) for variant in config.variants]
    names = sorted(set.intersection(*(set(one.values) for one in measured)))
    first = inputs[f"scores_{config.variants[0].name}"]
    assert isinstance(first, ScoreTable)
    section = _section(config, measured, names, larger=larger_is_better(first)[config.column])
    figures = write_sections(job.output, [section])
    _log(job, section)
    return {"variants": len(measured), "images": len(names), **figures}


def _measured(config: CompareStageConfig, variant: Variant, inputs: Mapping[str, Artifact]) -> _Measured:
    scores, counts = inputs[f"scores_{variant.name}"], inputs[f"counts_{variant.name}"]
    analysis, tokenizer = inputs[f"analysis_{variant.name}"], inputs[f"tokenizer_{variant.name}"]
    assert isinstance(scores, ScoreTable) and isinstance(counts, TokenCounts)
    assert isinstance(analysis, Analysis) and isinstance(tokenizer, Tokenizer)
    values: dict[str, np.ndarray] = {}
    for _, table in score_files(scores, ["image_id", "split", config.column]):
        rows = table.filter(pc.equal(table["split"], told_split(scores)))
        found = values_of(rows, config.column, len(budgets_of(scores))).astype(np.float64)
        whole = np.isfinite(found).all(axis=1)
        values |= {name: row for name, row, ok in zip(rows["image_id"].to_pylist(), found, whole, strict=True) if ok}
    tokens: dict[str, int] = {}
    for batch in read_batches(counts.table_uri, columns=["image_id", "num_tokens"]):
        tokens |= dict(zip(batch["image_id"].to_pylist(), batch["num_tokens"].to_pylist(), strict=True))
    numbers = {
        f"{row['section']}.{row['name']}": Estimate(*_bounds(row), row["images"])
        for row in read_table(analysis.table_uri).to_pylist()
    }
    return _Measured(variant, budgets_of(scores), values, tokens, numbers, tokenizer.manifest.seconds)


def _bounds(row: Mapping[str, float | None]) -> list[float]:
    return [np.nan if row[name] is None else row[name] for name in ("value", "low", "high")]


def _section(
    config: CompareStageConfig, measured: Sequence[_Measured], names: Sequence[str], *, larger: bool
) -> Section:
    bootstrap, found = Bootstrap(config.resamples, config.seed), dict[str, Estimate]()
    for one in measured:
        name, chosen, curve = one.variant.name, one.chosen(names), one.curve(names)
        for at, budget in enumerate(one.budgets):
            found[f"{name}: {config.column} at {budget}"] = bootstrap.mean(curve[:, at])
        found[f"{name}: at the most"] = bootstrap.mean(curve[:, -1])
        found[f"{name}: chosen"] = bootstrap.mean(chosen)
        found[f"{name}: tokens"] = bootstrap.mean(np.array([one.tokens[image] for image in names], dtype=np.float64))
        found |= _differences(measured[0], one, names, bootstrap)
        for region in ("hard", "worst"):
            known = one.analysis.get(f"regions.{region} at {one.budgets[-1]}")
            found |= {f"{name}: {region}": known} if known else {}
    return Section(
        id="comparison",
        title="Variants side by side",
        claim=CLAIM,
        finding=_finding(config, measured, found, larger, len(names)),
        images=len(names),
        figures=[_curves(config, measured, found, len(names)), *_axes(config, found, len(names))],
        tables=[_table(config, measured, found, len(names))],
        estimates=found,
        headline=[f"{one.variant.name}: {what}" for one in measured for what in ("chosen", "tokens")],
    )


def _differences(first: _Measured, one: _Measured, names: Sequence[str], bootstrap: Bootstrap) -> dict[str, Estimate]:
    """What can be compared with the first variant: the same budget at the most, or the same mean count by the rule."""
    if one is first:
        return {}
    found, name = {}, one.variant.name
    if one.budgets[-1] == first.budgets[-1]:
        difference = one.curve(names)[:, -1] - first.curve(names)[:, -1]
        found[f"{name}: difference at the most"] = bootstrap.mean(difference)
    spent = [np.mean([variant.tokens[image] for image in names]) for variant in (first, one)]
    if abs(spent[1] - spent[0]) <= EQUAL_SHARE * spent[0]:
        found[f"{name}: difference"] = bootstrap.mean(one.chosen(names) - first.chosen(names))
    return found


def _finding(
    config: CompareStageConfig, measured: Sequence[_Measured], found: Mapping[str, Estimate], larger: bool, images: int
) -> str:
    """Which variants are better or worse than the first, beyond their intervals, at equal tokens."""
    first = measured[0].variant.name
    most, chosen, tokens = (found[f"{first}: {what}"] for what in ("at the most", "chosen", "tokens"))
    text = (
        f"{first} has {config.column} {most} at {measured[0].budgets[-1]} tokens, {chosen} at {tokens.value:.1f} a mean"
    )
    text += f" image ({images} images)."
    for words, what in (("At the most tokens", "difference at the most"), ("At equal mean counts", "difference")):
        sides: dict[str, list[str]] = {"better": [], "worse": [], "no different": []}
        for one in measured[1:]:
            if difference := found.get(f"{one.variant.name}: {what}"):
                sides[_side(difference, larger)].append(f"{one.variant.name} ({difference.value:+.3g})")
        told = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
        text += f" {words} {told}." if told else ""
    return text


def _side(difference: Estimate, larger: bool) -> str:
    gains = (difference.low, difference.high) if larger else (-difference.high, -difference.low)
    return "better" if gains[0] > 0 else "worse" if gains[1] < 0 else "no different"


def _table(
    config: CompareStageConfig, measured: Sequence[_Measured], found: Mapping[str, Estimate], images: int
) -> Table:
    numbers = ("at the most", "difference at the most", "chosen", "tokens", "difference", "hard", "worst")
    rows = [
        [
            one.variant.name,
            one.variant.about,
            " ".join(str(budget) for budget in one.budgets),
            *(str(found.get(f"{one.variant.name}: {number}", "")) for number in numbers),
            f"{one.seconds:.0f}",
            str(images),
        ]
        for one in measured
    ]
    columns = ["variant", "what", "budgets", *numbers, "seconds", "images"]
    return Table(f"{config.column} of the variants", columns, rows, ABOUT)


def _curves(
    config: CompareStageConfig, measured: Sequence[_Measured], found: Mapping[str, Estimate], images: int
) -> Picture:
    """Every variant's metric against tokens, and below its differences to the first."""
    first = measured[0].variant.name
    figure, axes = drawing.new_figure(3.4 + 0.28 * len(measured), rows=2, columns=1)
    axes[0, 0].get_gridspec().set_height_ratios([2.2, 0.6 + 0.25 * len(measured)])
    for number, one in enumerate(measured):
        points = [found[f"{one.variant.name}: {config.column} at {budget}"] for budget in one.budgets]
        drawing.curve(axes[0, 0], one.budgets, points, drawing.Line(one.variant.name, number))
        for mark, (what, place) in DIFFERENCES.items():
            if known := found.get(f"{one.variant.name}: {what}"):
                colour = drawing.COLOURS[number % len(drawing.COLOURS)]
                axes[1, 0].plot([known.low, known.high], [number + place] * 2, color=colour, lw=1.5)
                axes[1, 0].plot(
                    known.value, number + place, mark, color=colour, ms=5, mfc="white" if place > 0 else None
                )
    axes[1, 0].axvline(0, color="#888888", linewidth=0.8)
    axes[1, 0].set_yticks(range(1, len(measured)), [one.variant.name for one in measured[1:]], fontsize=8)
    axes[1, 0].invert_yaxis()
    drawing.label(axes[0, 0], x="tokens", y=config.column)
    drawing.label(axes[1, 0], x=f"{config.column}, difference to {first}")
    drawing.legend(figure, axes[0, 0])
    caption = (
        f"{config.column} against tokens, one line a variant; below, image by image, its difference to {first}: filled "
        f"at the most tokens, open at equal mean counts; 95% intervals, n = {images} images."
    )
    alt = f"{config.column} against tokens for each variant, and differences to the first."
    return Picture("comparison.png", alt, caption, drawing.png(figure))


def _axes(config: CompareStageConfig, found: Mapping[str, Estimate], images: int) -> list[Picture]:
    """The metric at the most tokens along each axis that variants have a place on."""
    names = list(dict.fromkeys(axis for variant in config.variants for axis in variant.at))
    if not names:
        return []
    figure, axes = drawing.new_figure(0.4 + 1.8 * len(names), rows=len(names))
    for row, axis in enumerate(names):
        others = {name: place for name, place in config.variants[0].at.items() if name != axis}
        along = [
            one for one in config.variants if axis in one.at and all(one.at.get(n) == v for n, v in others.items())
        ]
        along.sort(key=lambda one: one.at[axis])
        points = [found[f"{one.name}: at the most"] for one in along]
        drawing.curve(axes[row, 0], [one.at[axis] for one in along], points, drawing.Line(axis, row))
        axes[row, 0].set_xscale("log", base=2)
        axes[row, 0].set_xticks([one.at[axis] for one in along], [f"{one.at[axis]:g}" for one in along])
        axes[row, 0].minorticks_off()
        drawing.label(axes[row, 0], x=axis, y=config.column)
    caption = (
        f"{config.column} at the most tokens along each axis, the others as in {config.variants[0].name!r}, 95% "
        f"intervals, n = {images}."
    )
    return [Picture("comparison_scale.png", f"{config.column} against scale.", caption, drawing.png(figure))]


def _log(job: Job, section: Section) -> None:
    """The table, and everything as files, in MLflow."""
    tracker = Tracker(**job.tracking)
    (table,) = section.tables
    rows = {name: [row[at] for row in table.rows] for at, name in enumerate(table.columns)}
    for target in (tracker, tracker.parent):
        target.table(rows, "comparison")
    with local_folder(job.output) as folder:
        for file in sorted(Path(folder).glob("*.*")):
            tracker.artifact(file, "analyses")
