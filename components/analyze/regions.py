"""regions: where in the image the error is, and whether more tokens, or halting, help where it is hard.

Legend: N images, K budgets, G grid cells.
"""

from typing import TYPE_CHECKING

import numpy as np

from components.analyze import drawing
from components.analyze.attention import strongest_cells
from components.analyze.estimates import Estimate
from components.analyze.inputs import Inputs
from components.analyze.rollouts import batches
from components.analyze.sections import Picture, Section, Table
from components.images import stack

if TYPE_CHECKING:
    from torch import Tensor

    from model import AlitTokenizer

CLAIM = (
    "Later rollouts attend to what is not reconstructed yet: more tokens help most where it is hard, and dynamic "
    "halting helps there further."
)
HARD_SHARE = 0.2
GROUPS = ("hard", "worst", "other", "all")
ABOUT = (
    "L1 of the reconstruction in cells of the grid, an image's mean. hard: the fifth of its cells with the largest "
    "spread of pixel values, the same for any tokenizer; worst: the fifth with the largest error at the fewest tokens; "
    "other: the rest beside hard. fall: share of the error that goes from the fewest to the most tokens. halted: share "
    "of the cells that dynamic halting stops after the rollout, where the tokenizer has it."
)


def regions(inputs: Inputs) -> Section:
    """Error in hard and other cells at every budget."""
    names = inputs.sample(inputs.settings.images)
    tokenizer = inputs.load_tokenizer()
    errors, spread, halted = _measured(tokenizer, stack(inputs.column(names, "image")), inputs.batch_size)
    hard, worst = top_cells(spread, HARD_SHARE), top_cells(errors[:, 0], HARD_SHARE)
    groups = {"hard": hard, "worst": worst, "other": ~hard, "all": np.ones_like(hard)}
    curves = {name: _means(errors, cells) for name, cells in groups.items()}
    found: dict[str, Estimate] = {}
    for at, budget in enumerate(inputs.budgets):
        for name, curve in curves.items():
            found[f"{name} at {budget}"] = inputs.bootstrap.mean(curve[:, at])
        if halted is not None:
            found[f"halted at {budget}"] = inputs.bootstrap.mean(halted[:, at].mean(-1))
            found[f"halted in hard at {budget}"] = inputs.bootstrap.mean(_means(halted, hard)[:, at])
    for name, curve in curves.items():
        found[f"{name}: fall"] = inputs.bootstrap.of([curve[:, 0], curve[:, -1]], _fall, paired=True)
    found["hard less other: fall"] = inputs.bootstrap.of(
        [curves[name][:, at] for name in ("hard", "other") for at in (0, -1)], _fall_more, paired=True
    )
    return Section(
        id="regions",
        title="Where the error is",
        claim=CLAIM,
        finding=_finding(found, inputs.budgets, len(names)),
        images=len(names),
        figures=[_picture(found, inputs.budgets, len(names))],
        tables=[_table(found, inputs.budgets, len(names))],
        estimates=found,
        headline=[f"{name} at {inputs.budgets[-1]}" for name in ("hard", "other")],
    )


def _fall(first: np.ndarray, last: np.ndarray, axis: int) -> np.ndarray:
    return 1 - last.mean(axis=axis) / first.mean(axis=axis)


def _fall_more(
    first: np.ndarray, last: np.ndarray, other_first: np.ndarray, other_last: np.ndarray, axis: int
) -> np.ndarray:
    return _fall(first, last, axis) - _fall(other_first, other_last, axis)


def top_cells(values: np.ndarray, share: float) -> np.ndarray:
    """The cells with the largest ``share`` of values [N, G], as many in every image, at least one; bool [N, G]."""
    return strongest_cells(values, max(1, round(share * values.shape[1])))


def _means(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Mean of [N, K, G] over some of the cells, bool [N, G]: [N, K]."""
    return np.where(cells[:, None], values, 0).sum(-1) / np.maximum(cells.sum(-1), 1)[:, None]


def cell_means(maps: "Tensor", side: int) -> np.ndarray:
    """Means of pixel maps [B, C, H, W] over channels and the cells of a grid of ``side`` x ``side`` rows: [B, G]."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(maps.mean(1, keepdim=True), side).flatten(1).double().cpu().numpy()


def _measured(
    tokenizer: "AlitTokenizer", pixels: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """L1 [N, K, G], spread of the originals [N, G], and which cells halt [N, K, G] (None without halting)."""
    import torch

    side, halting = tokenizer.config.grid[0], tokenizer.config.halting.enabled
    errors, spread, halted = [], [], []
    with torch.inference_mode():
        for images in batches(pixels, batch_size, tokenizer):
            mean, square = cell_means(images, side), cell_means(images.square(), side)
            spread.append(np.sqrt(np.maximum(square - mean**2, 0)))
            of_steps, stopped = [], []
            for step in tokenizer.rollout(images):
                of_steps.append(cell_means((step.images.clamp(0, 1) - images).abs(), side))
                if halting:
                    stopped.append(tokenizer.halted(step.grid, step.target, None).cpu().numpy())
            errors.append(np.stack(of_steps, axis=1))
            halted += [np.stack(stopped, axis=1)] if halting else []
    return np.concatenate(errors), np.concatenate(spread), np.concatenate(halted) if halting else None


def _picture(found: dict[str, Estimate], budgets: list[int], images: int) -> Picture:
    figure, ((axes,),) = drawing.new_figure()
    for number, name in enumerate(GROUPS):
        points = [found[f"{name} at {budget}"] for budget in budgets]
        drawing.curve(axes, budgets, points, drawing.Line(f"{name} cells", number))
    axes.set_ylim(0, None)
    drawing.label(axes, x="tokens", y="L1")
    drawing.legend(figure, axes)
    caption = f"L1 in hard, worst and other cells of the grid against tokens, 95% intervals, n = {images}."
    return Picture("regions.png", "Error in hard, worst and other cells against tokens.", caption, drawing.png(figure))


def _table(found: dict[str, Estimate], budgets: list[int], images: int) -> Table:
    halted = [name for name in ("halted", "halted in hard") if f"{name} at {budgets[0]}" in found]
    rows = [
        [str(budget), *(str(found[f"{name} at {budget}"]) for name in (*GROUPS, *halted)), str(images)]
        for budget in budgets
    ]
    fall = ["fall", *(str(found[f"{name}: fall"]) for name in GROUPS), *("" for _ in halted), str(images)]
    return Table("L1 by region and budget", ["tokens", *GROUPS, *halted, "images"], [*rows, fall], ABOUT)


def _finding(found: dict[str, Estimate], budgets: list[int], images: int) -> str:
    more = found["hard less other: fall"]
    way = "a larger" if more.low > 0 else "a smaller" if more.high < 0 else "no clearly larger"
    return (
        f"From {budgets[0]} to {budgets[-1]} tokens {way} share of the error goes in hard cells "
        f"({found['hard: fall']}) than in others ({found['other: fall']}; difference {more}, {images} images)."
    )
