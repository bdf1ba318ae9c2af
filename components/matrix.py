"""matrix: each selection criterion against each task's quality, at equal mean tokens (the paper's TSC x TOI).

A criterion is a column of the score table. It allocates tokens as MeanTokens does, which is the best that it can do on
the hulls; what it leaves unspent, because it sees no gain, goes to images drawn at random, so that all criteria spend
the same. Beside it stand fixed length at the same mean and the same counts dealt to images at random.

Legend: N images, K budgets, C cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import Figures, Job, ScoreTable, TokenCounts
from components.config import MatrixStageConfig, NoConfig
from components.scores import budgets_of, larger_is_better, score_files, values_of
from components.store import filesystem, join, read_batches, write_json, write_table
from model.selection import MeanTokens

HOW = (
    "mean: of the metric `column` over the `images` that have a finite value of it and of the criterion at every "
    "budget, at the counts the criterion chose. fixed: the same metric at mean_tokens for every image, between two "
    "budgets on the image's line between them. random: the criterion's counts dealt to the images at random (in "
    "expectation). gain: by how much mean is better than fixed, positive is better whatever the metric's direction; "
    "low, high: its 95% bootstrap interval over images, the counts held. unsteered: mean tokens an image that the "
    "criterion had no use for and that went to images at random. best: the criterion with the best mean for a task, "
    "its own among equals. clear: no other criterion's gain (where another is best: not that one's) lies in the "
    "interval of the task's own."
)
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Cell:
    """One criterion's counts judged by one column; see HOW."""

    criterion: str
    column: str
    images: int
    mean_tokens: float
    unsteered: float
    mean: float
    fixed: float
    random: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class _Scores:
    """Values as losses: lower is better."""

    losses: Mapping[str, np.ndarray]  # column -> float32 [N, K], NaN where missing
    sign: Mapping[str, int]  # -1: more is better
    budgets: np.ndarray
    counts: Mapping[str, np.ndarray]  # task -> column index of its own rule's choice [N]


def matrix(
    job: Job, *, config: MatrixStageConfig, resources: NoConfig, scores: ScoreTable, **counts: TokenCounts
) -> Figures:
    """Write ``matrix.json``, the cells as ``table`` and ``matrix.png``; ``counts``: each task's own, counts_<task>.

    Over the held-out images, or all where none is held out. Raises ValueError when ``mean_tokens`` is below the
    smallest budget.
    """
    read = _read(scores, {name.removeprefix("counts_"): artifact for name, artifact in counts.items()})
    settings = config.settings
    mean_tokens = settings.mean_tokens or max(read.budgets[-1] / 2, read.budgets[0])
    criteria = list(dict.fromkeys([*config.criteria.values(), *(name for name in read.losses if "." not in name)]))
    cells = [cell for name in criteria for cell in _judged(read, name, mean_tokens, settings.resamples, settings.seed)]
    across = [cell for task in read.counts for cell in _across(read, task, config)]
    best = {task: _verdict(cells, column) for task, column in config.criteria.items()}
    own = sum(verdict["own_is_best"] for verdict in best.values())
    sentence = _sentence(best, mean_tokens)
    found = {"cells": [asdict(cell) for cell in cells], "across": [asdict(cell) for cell in across]}
    images = len(next(iter(read.losses.values())))
    head = {"mean_tokens": mean_tokens, "images": images, "best": best, "sentence": sentence, "how": HOW}
    write_json(join(job.output, "matrix.json"), head | found)
    write_table(join(job.output, "table"), pa.Table.from_pylist(found["cells"]))
    write_table(join(job.output, "across"), pa.Table.from_pylist(found["across"]))
    _draw(cells, f"{join(job.output, 'matrix.png')}", f"{mean_tokens:g} tokens a mean image, n = {images}")
    return {
        "images": images,
        "mean_tokens": mean_tokens,
        "best_under_own": f"{own} of {len(best)} tasks",
        "sentence": sentence,
    }


def _read(scores: ScoreTable, counts: Mapping[str, TokenCounts]) -> _Scores:
    """The held-out rows of every metric, and the counts that each task chose for them."""
    budgets, larger = budgets_of(scores), larger_is_better(scores)
    held_out = np.concatenate([_is_val(table) for _, table in score_files(scores, ["split"])])
    rows = held_out if held_out.any() else np.ones_like(held_out)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in larger}
    start = 0
    for _, table in score_files(scores, list(larger)):
        kept = rows[start : start + len(table)]
        start += len(table)
        for name, files in parts.items():
            files.append((-1 if larger[name] else 1) * values_of(table, name, len(budgets))[kept])
    return _Scores(
        losses={name: np.concatenate(files) for name, files in parts.items()},
        sign={name: -1 if more else 1 for name, more in larger.items()},
        budgets=np.asarray(budgets),
        counts={task: np.searchsorted(budgets, _tokens(chosen)[rows]) for task, chosen in counts.items()},
    )


def _is_val(table: pa.Table) -> np.ndarray:
    return np.asarray(pc.equal(table["split"], "val"))


def _tokens(counts: TokenCounts) -> np.ndarray:
    return np.concatenate([np.asarray(batch[0]) for batch in read_batches(counts.table_uri, columns=["num_tokens"])])


def _judged(read: _Scores, criterion: str, mean_tokens: float, resamples: int, seed: int) -> list[Cell]:
    """The row of the matrix of one criterion: every column at its counts."""
    by_rows: dict[bytes, list[str]] = {}
    for name, losses in read.losses.items():
        present = np.isfinite(losses).all(axis=1) & np.isfinite(read.losses[criterion]).all(axis=1)
        if present.any():
            by_rows.setdefault(present.tobytes(), []).append(name)
    cells: dict[str, Cell] = {}
    for packed, names in by_rows.items():
        rows = np.frombuffer(packed, dtype=bool)
        chosen, unsteered = allocate(read.losses[criterion][rows], read.budgets, mean_tokens, seed)
        for cell in _cells(read, criterion, names, _Choice(rows, chosen, unsteered, resamples, seed)):
            cells[cell.column] = cell
    return [cells[name] for name in read.losses if name in cells]


def _across(read: _Scores, task: str, config: MatrixStageConfig) -> list[Cell]:
    """Every task's metric at the counts that ``task``'s own rule chose, whatever their mean."""
    found = []
    for column in dict.fromkeys(config.criteria.values()):
        rows = np.isfinite(read.losses[column]).all(axis=1)
        if rows.any():
            choice = _Choice(rows, read.counts[task][rows], 0.0, config.settings.resamples, config.settings.seed)
            found += _cells(read, task, [column], choice)
    return found


def allocate(losses: np.ndarray, budgets: np.ndarray, mean_tokens: float, seed: int) -> tuple[np.ndarray, float]:
    """Columns [N] for losses [N, K] with ``mean_tokens`` an image, and the tokens an image spent at random.

    Images are weighed in a random order, since MeanTokens gives equals in the order of the rows.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(losses))
    column = np.empty(len(losses), dtype=np.int64)
    column[order] = MeanTokens("loss", mean_tokens, larger_is_better=False).select(losses[order], list(budgets)).column
    left = spare = int(np.floor(mean_tokens * len(losses))) - int(budgets[column].sum())
    while True:
        able = generator.permutation(np.flatnonzero(column < len(budgets) - 1))
        cost = budgets[column[able] + 1] - budgets[column[able]]
        fits = able[np.cumsum(cost) <= left]
        if not len(fits):
            return column, (spare - left) / len(losses)
        left -= int((budgets[column[fits] + 1] - budgets[column[fits]]).sum())
        column[fits] += 1


@dataclass(frozen=True)
class _Choice:
    """Counts for some of the rows, and how their gain is resampled."""

    rows: np.ndarray  # bool [N]
    column: np.ndarray  # of those rows
    unsteered: float
    resamples: int
    seed: int


def _cells(read: _Scores, criterion: str, names: Sequence[str], choice: _Choice) -> list[Cell]:
    """What each column says of the counts; the same resamples for all of them."""
    tokens = float(read.budgets[choice.column].mean())
    shares = np.bincount(choice.column, minlength=len(read.budgets)) / len(choice.column)
    every = np.arange(len(choice.column))
    losses = [read.losses[name][choice.rows].astype(np.float64) for name in names]
    chosen = np.stack([loss[every, choice.column] for loss in losses], axis=1)
    fixed = np.stack([_at(loss, read.budgets, tokens) for loss in losses], axis=1)
    low, high = _interval(fixed - chosen, choice.resamples, choice.seed)
    return [
        Cell(
            criterion=criterion,
            column=name,
            images=len(every),
            mean_tokens=tokens,
            unsteered=choice.unsteered,
            mean=read.sign[name] * float(chosen[:, at].mean()),
            fixed=read.sign[name] * float(fixed[:, at].mean()),
            random=read.sign[name] * float(losses[at].mean(axis=0) @ shares),
            gain=float((fixed - chosen)[:, at].mean()),
            low=float(low[at]),
            high=float(high[at]),
        )
        for at, name in enumerate(names)
    ]


def _at(losses: np.ndarray, budgets: np.ndarray, tokens: float) -> np.ndarray:
    """Each image's loss [N] at ``tokens``, on the line between the budgets around it."""
    above = int(np.clip(np.searchsorted(budgets, tokens), 1, len(budgets) - 1)) if len(budgets) > 1 else 0
    if not above:
        return losses[:, 0]
    share = (tokens - budgets[above - 1]) / (budgets[above] - budgets[above - 1])
    return (1 - share) * losses[:, above - 1] + share * losses[:, above]


def _interval(gains: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap percentiles of the mean gain, [2, C] for gains [N, C]."""
    generator, number = np.random.default_rng(seed), len(gains)
    means = np.empty((resamples, gains.shape[1]))
    for sample in range(resamples):
        weights = np.bincount(generator.integers(0, number, number), minlength=number)
        means[sample] = weights @ gains / number
    return np.percentile(means, INTERVAL, axis=0)


def _verdict(cells: Sequence[Cell], column: str) -> dict[str, Any]:
    """Which criterion serves ``column`` best, and whether that is its own."""
    gains = {cell.criterion: cell for cell in cells if cell.column == column}
    if column not in gains:
        return {"own": column, "best": None, "own_is_best": False, "clear": False}
    own = gains[column]
    best = max(gains.values(), key=lambda cell: (cell.gain, cell.criterion == column))
    rivals = [cell for cell in gains.values() if cell is not own] if best is own else [best]
    clear = all(not own.low <= rival.gain <= own.high for rival in rivals)
    return {
        "own": column,
        "best": best.criterion,
        "own_is_best": best is own,
        "clear": clear,
        "own_mean": own.mean,
        "best_mean": best.mean,
    }


def _sentence(best: Mapping[str, Mapping[str, Any]], mean_tokens: float) -> str:
    def told(task: str, words: str) -> str:
        return f"{words}, within the noise" if best[task]["best"] and not best[task]["clear"] else words

    own = [told(task, task) for task, verdict in best.items() if verdict["own_is_best"]]
    others = [told(t, f"{t} does under {v['best']}") for t, v in best.items() if not v["own_is_best"]]
    text = f"At {mean_tokens:g} tokens a mean image {len(own)} of {len(best)} tasks do best under their own criterion"
    text += f" ({'; '.join(own)})" if own else ""
    return f"{text}; {'; '.join(others)}." if others else f"{text}."


def _draw(cells: Sequence[Cell], uri: str, title: str) -> None:
    """A heatmap: rows criteria, columns metrics, colour the gain over fixed length in units of the column's largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(cell.criterion for cell in cells))
    columns = list(dict.fromkeys(cell.column for cell in cells))
    gains = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        gains[rows.index(cell.criterion), columns.index(cell.column)] = cell.gain
    largest = np.nanmax(np.abs(gains), axis=0, keepdims=True)
    figure = Figure(figsize=(3 + 0.8 * len(columns), 2.5 + 0.45 * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(gains / np.where(largest > 0, largest, 1), cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto", alpha=0.6)
    for cell in cells:
        at = (columns.index(cell.column), rows.index(cell.criterion))
        axes.text(*at, f"{cell.mean + 0.0:.3g}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(f"{title}\ngreen: better than fixed length", fontsize=8)
    store, path = filesystem(uri)
    with store.open_output_stream(path) as stream:
        FigureCanvasAgg(figure).print_png(stream)
