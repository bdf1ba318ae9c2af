"""single_pass: does a length predicted after one rollout do as well as one found by trying?

Legend: N images, K budgets.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.analyze import drawing
from components.analyze.estimates import Estimate
from components.analyze.inputs import Inputs
from components.analyze.rollouts import batches
from components.analyze.sections import Picture, Section, Table
from components.config import RuleConfig
from components.images import stack
from components.rules import build_rule, describe, rule_with_head, searched
from components.store import join, local_folder, read_batches

if TYPE_CHECKING:
    from torch import Tensor

    from model import AlitTokenizer
    from model.predicted import PredictedThreshold
    from model.selection import Rule

CLAIM = "The count can be predicted in a single pass, without trying budgets: as good, and faster."
TIMED_BATCH = 8
ABOUT = (
    "same: share of the images for which both give one count. tokens, value and met: mean count, mean of the metric "
    "at that count, and share of images where the condition truly holds. rank: Spearman's correlation of the counts. "
    "speed: images a second of encoding with the prediction over those of encoding with the search, which decodes "
    f"every rollout it tries; {TIMED_BATCH} images at once, each batch both ways; the interval is over batches."
)


@dataclass(frozen=True)
class _Case:
    """A task's predicted rule."""

    task: str
    rule: RuleConfig
    column: str


def single_pass(inputs: Inputs) -> Section:
    """Predicted against searched counts of each task that has a predicted rule: agreement, quality, time."""
    head = {"id": "single_pass", "title": "Lengths predicted in a single pass", "claim": CLAIM}
    cases = [
        _Case(criterion.task, rule, column)
        for criterion in inputs.criteria
        for rule, column in criterion.rules
        if rule.kind == "predicted" and criterion.task in inputs.lengths
    ]
    cases = list({case.task: case for case in reversed(cases)}.values())[::-1]  # the first such rule of a task
    if not cases:
        return Section(**head, finding="Not measured: no task has a predicted rule.")
    names = inputs.sample(inputs.settings.images)
    found: dict[str, Estimate] = {}
    pictures, rows, told = [], [], []
    for case in cases:
        of_case, picture = _compared(inputs, case, names)
        of_case |= _timed(inputs, case, names)
        found |= {f"{case.task}: {name}": one for name, one in of_case.items()}
        pictures.append(picture)
        rows.append([describe(case.rule), *(str(of_case[name]) if name in of_case else "" for name in COLUMNS)])
        told.append(_finding(case, of_case))
    return Section(
        **head,
        finding=" ".join(told),
        images=len(names),
        figures=pictures,
        tables=[Table("Predicted against searched", ["rule", *COLUMNS], rows, ABOUT)],
        estimates=found,
        headline=[f"{case.task}: {name}" for case in cases for name in ("same", "speed")],
    )


COLUMNS = (
    "same",
    "rank",
    "predicted tokens",
    "searched tokens",
    "predicted value",
    "searched value",
    "predicted met",
    "searched met",
    "speed",
)


def _compared(inputs: Inputs, case: _Case, names: list[str]) -> tuple[dict[str, Estimate], Picture]:
    threshold = build_rule(searched(case.rule))
    truth = inputs.values_of(names, case.column)
    rows = np.isfinite(truth).all(axis=1)
    truth, guessed = truth[rows], _predictions(inputs, case, names)[rows]
    by_search, by_guess = (threshold.select(values, inputs.budgets).column for values in (truth, guessed))
    every, tokens, mean = np.arange(len(truth)), np.asarray(inputs.budgets, dtype=np.float64), inputs.bootstrap.mean
    found = {
        "same": mean((by_search == by_guess).astype(np.float64)),
        "rank": inputs.bootstrap.spearman(tokens[by_search], tokens[by_guess]),
    }
    for name, at in (("predicted", by_guess), ("searched", by_search)):
        value = truth[every, at]
        found[f"{name} tokens"] = mean(tokens[at])
        found[f"{name} value"] = mean(value)
        found[f"{name} met"] = mean(threshold.settled(value[:, None]).astype(np.float64))
    return found, _picture(inputs, case, by_search, by_guess)


def _predictions(inputs: Inputs, case: _Case, names: list[str]) -> np.ndarray:
    """float64 [N, K] of the length stage."""
    wanted, found = pa.array(names, pa.string()), {}
    for batch in read_batches(inputs.lengths[case.task].table_uri, columns=["image_id", "predicted"]):
        chosen = batch.filter(pc.is_in(batch["image_id"], value_set=wanted))
        found |= dict(zip(chosen["image_id"].to_pylist(), chosen["predicted"].to_pylist(), strict=True))
    return np.array([found[name] for name in names], dtype=np.float64)


def _timed(inputs: Inputs, case: _Case, names: list[str]) -> dict[str, Estimate]:
    """How much faster; nothing for a metric that needs a judge, which encoding alone can't search by."""
    from pathlib import Path

    from model.metrics import METRICS

    if case.rule.metric not in METRICS:
        return {}
    tokenizer = inputs.load_tokenizer()
    with local_folder(join(inputs.lengths[case.task].uri, "head")) as folder:
        rules = [rule_with_head(case.rule, Path(folder)), build_rule(searched(case.rule))]
    rules[0].head.to(next(tokenizer.parameters()).device)
    pixels = stack(inputs.column(names[: inputs.settings.timed_images], "image"))
    for images in batches(pixels[:TIMED_BATCH], TIMED_BATCH, tokenizer):  # to warm up
        _seconds(tokenizer, images, rules)
    seconds = [_seconds(tokenizer, images, rules) for images in batches(pixels, TIMED_BATCH, tokenizer)]
    predicted, tried = np.array(seconds).T
    ratio = inputs.bootstrap.of([tried, predicted], lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), paired=True)
    return {"speed": Estimate(ratio.value, ratio.low, ratio.high, len(pixels))}


def _seconds(tokenizer: "AlitTokenizer", images: "Tensor", rules: "Sequence[Rule | PredictedThreshold]") -> list[float]:
    """How long encoding takes with each rule."""
    taken = []
    for rule in rules:
        started = time.perf_counter()
        tokenizer.encode(images, rule)
        taken.append(time.perf_counter() - started)
    return taken


def _picture(inputs: Inputs, case: _Case, by_search: np.ndarray, by_guess: np.ndarray) -> Picture:
    """How many images got which pair of counts."""
    size = len(inputs.budgets)
    pairs = np.zeros((size, size), dtype=np.int64)
    np.add.at(pairs, (by_search, by_guess), 1)
    figure, ((axes,),) = drawing.new_figure(3.4)
    axes.imshow(pairs, cmap="Blues", origin="lower")
    for row, column in zip(*np.nonzero(pairs), strict=True):
        dark = pairs[row, column] > pairs.max() / 2
        axes.text(
            column, row, pairs[row, column], ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )
    axes.plot([-0.5, size - 0.5], [-0.5, size - 0.5], color="#888888", linewidth=0.8)
    axes.set_xticks(range(size), inputs.budgets)
    axes.set_yticks(range(size), inputs.budgets)
    drawing.label(axes, x="predicted tokens", y="searched tokens", title=case.task)
    caption = f"Images by predicted and searched count ({describe(case.rule)}), n = {pairs.sum()}."
    alt = "How many images got each pair of predicted and searched counts."
    return Picture(f"single_pass_{case.task}.png", alt, caption, drawing.png(figure))


def _finding(case: _Case, found: dict[str, Estimate]) -> str:
    text = (
        f"For {case.task}, {describe(case.rule)}: the same count for {found['same']} of {found['same'].images} images; "
        f"{found['predicted tokens']} tokens instead of {found['searched tokens']}, the condition met by "
        f"{found['predicted met']} instead of {found['searched met']}."
    )
    if "speed" not in found:
        return text
    ratio = found["speed"]
    return f"{text} Encoding was {ratio} times as fast as with the search, over {ratio.images} images."
