"""specialization: do latent tokens come to stand for parts of the image, and for whole objects?

Legend: N images, K budgets, L latents of a budget, G grid cells, h w rows and columns of the grid.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from components.analyze import drawing
from components.analyze.attention import entropy, half_mass_area, half_mass_cells, latent_maps, strongest_cells
from components.analyze.estimates import Estimate
from components.analyze.inputs import Inputs
from components.analyze.rollouts import batches
from components.analyze.sections import Picture, Section, Table
from components.images import decode_png, stack
from components.targets import mask_ids

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from model import AlitTokenizer

CLAIM = (
    "Tokens specialize: with every rollout the latent tokens attend to fewer places, and single tokens come to lie on "
    "whole objects."
)
BEST, BEYOND = "IoU of the best token", "beyond chance"
LOCAL = {"paper": "", "local": " The weights started with each latent tied to a place, so some of it was given."}
ABOUT = (
    "A latent's map: the attention that the grid tokens of the decoder pay to it, mean over layers and heads, shares "
    "of the grid. entropy: of a map, 1 is even and 0 one cell; area: least share of the cells with half of the map, "
    "0.5 is even; means over the latents of an image. IoU: with the cells of a mask's class, mean over the classes in "
    "an image; of the best token: of its strongest cells, as many as the class has; of a subset: of a union of tokens, "
    "the cells with half of each, taken greedily as long as it gains; other image: the same with the maps of another "
    "image, which is what chance gives: it grows with the tokens too, and many sharp ones can make up any region. "
    "beyond chance: the best token's own less the other image's, image by image."
)


def specialization(inputs: Inputs) -> Section:
    """Sparsity of the latents' maps over the rollouts, and their overlap with masks where there are any."""
    number = inputs.settings.attention_images
    masked = inputs.sample(number, having="mask")
    names = masked if len(masked) > 1 else inputs.sample(number)
    tokenizer = inputs.load_tokenizer()
    maps = _maps(tokenizer, stack(inputs.column(names, "image")), inputs.batch_size)
    found: dict[str, Estimate] = {}
    for budget, of_images in zip(inputs.budgets, maps, strict=True):
        found[f"entropy at {budget}"] = inputs.bootstrap.mean(entropy(of_images).mean(1))
        found[f"area at {budget}"] = inputs.bootstrap.mean(half_mass_area(of_images).mean(1))
    overlapped = len(masked) > 1
    if overlapped:
        masks = np.stack([mask_ids(png) for png in inputs.column(names, "mask")])
        found |= _overlaps(inputs, maps, masks)
    return Section(
        id="specialization",
        title="Tokens specialize",
        claim=CLAIM,
        finding=_finding(found, inputs.budgets, len(names)) + LOCAL[tokenizer.config.init],
        images=len(names),
        figures=[_sparsity(found, inputs.budgets, overlapped), _examples(inputs, names, maps)],
        tables=[_table(found, inputs.budgets, len(names), overlapped)],
        estimates=found,
        headline=[f"{name} at {budget}" for name in ("entropy", BEST) for budget in _ends(inputs.budgets)],
    )


def _ends(budgets: Sequence[int]) -> tuple[int, int]:
    return budgets[0], budgets[-1]


def _maps(tokenizer: "AlitTokenizer", pixels: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The maps of every budget's latents, float32 [N, L, G] each."""
    import torch

    parts: list[list[np.ndarray]] = [[] for _ in tokenizer.budgets]
    with torch.inference_mode():
        for images in batches(pixels, batch_size, tokenizer):
            for part, step in zip(parts, tokenizer.rollout(images), strict=True):
                part.append(latent_maps(tokenizer, step.latents).cpu().numpy())
    return [np.concatenate(part) for part in parts]


def to_grid(mask: np.ndarray, cells: int, ignore: Sequence[int]) -> dict[int, np.ndarray]:
    """Cells of each class of a mask [H, W] over a square grid of ``cells``: those it has most pixels of, bool [G].

    A class that has no cell, and those in ``ignore``, are left out.
    """
    side = round(cells**0.5)
    tiles = mask.reshape(side, len(mask) // side, side, -1).transpose(0, 2, 1, 3).reshape(cells, -1)
    classes = np.unique(mask)
    shares = np.stack([(tiles == number).sum(1) for number in classes])
    most = classes[shares.argmax(0)]
    return {int(number): most == number for number in np.unique(most) if number not in ignore}


def iou(regions: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Intersection over union of bool [..., G] with bool [G]; [...]."""
    return (regions & region).sum(-1) / np.maximum((regions | region).sum(-1), 1)


def best_token(maps: np.ndarray, region: np.ndarray) -> float:
    """The best overlap with ``region`` of a single map of [L, G], at as many of its strongest cells as that has."""
    return float(iou(strongest_cells(maps, region.sum()), region).max())


def best_subset(maps: np.ndarray, region: np.ndarray) -> float:
    """The overlap of a union of maps [L, G], each the cells with half of it, taken greedily until none gains."""
    cells, union, best = half_mass_cells(maps), np.zeros_like(region), 0.0
    while True:
        gains = iou(cells | union, region)
        if gains.max() <= best:
            return best
        best, union = float(gains.max()), union | cells[gains.argmax()]


def _overlaps(inputs: Inputs, maps: Sequence[np.ndarray], masks: np.ndarray) -> dict[str, Estimate]:
    """IoU of tokens and classes per budget; an image's is the mean over its classes."""
    grids = [to_grid(mask, maps[0].shape[2], inputs.settings.ignore) for mask in masks]
    rows = [at for at, grid in enumerate(grids) if grid]
    found: dict[str, Estimate] = {}
    for budget, of_images in zip(inputs.budgets, maps, strict=True):
        values: dict[str, np.ndarray] = {}
        for name, (measure, shift) in OVERLAPS.items():
            shifted = np.roll(of_images, -shift, axis=0)
            values[name] = np.array(
                [np.mean([measure(shifted[at], region) for region in grids[at].values()]) for at in rows]
            )
            found[f"{name} at {budget}"] = inputs.bootstrap.mean(values[name])
        own, chance, *_ = values.values()
        found[f"{BEYOND} at {budget}"] = inputs.bootstrap.mean(own - chance)
    return found


OVERLAPS: Mapping[str, tuple[Callable[[np.ndarray, np.ndarray], float], int]] = {
    BEST: (best_token, 0),
    "the same, other image": (best_token, 1),
    "IoU of a subset": (best_subset, 0),
    "subset, other image": (best_subset, 1),
}


def _sparsity(found: Mapping[str, Estimate], budgets: Sequence[int], overlapped: bool) -> Picture:
    figure, axes = drawing.new_figure(4.4 if overlapped else 2.8, rows=1 + overlapped)
    lines = [("entropy", "entropy (1: even)"), ("area", "area of half a map (0.5: even)")]
    _lines(axes[0, 0], found, budgets, lines)
    axes[0, 0].set_ylim(0, 1.02)
    if overlapped:
        _lines(axes[1, 0], found, budgets, [(name, name) for name in OVERLAPS])
        drawing.label(axes[1, 0], y="IoU with masks")
        drawing.legend(figure, axes[1, 0])
        axes[1, 0].set_ylim(0, None)
    axes[0, 0].legend(fontsize=8, frameon=False)
    drawing.label(axes[-1, 0], x="tokens", y="IoU with masks" if overlapped else "")
    images = found[f"entropy at {budgets[0]}"].images
    caption = f"How spread the latents' attention maps are after each rollout, 95% intervals, n = {images}."
    if overlapped:
        caption += " Below: their overlap with the classes of the masks."
    return Picture(
        "specialization.png", "Entropy and area of attention maps against tokens.", caption, drawing.png(figure)
    )


def _lines(
    axes: "Axes", found: Mapping[str, Estimate], budgets: Sequence[int], lines: Sequence[tuple[str, str]]
) -> None:
    for number, (name, words) in enumerate(lines):
        points = [found[f"{name} at {budget}"] for budget in budgets]
        drawing.curve(axes, budgets, points, drawing.Line(words, number))


def _examples(inputs: Inputs, names: Sequence[str], maps: Sequence[np.ndarray]) -> Picture:
    """Images, the sharpest map of a latent at the fewest and the sharpest ones at the most tokens."""
    rows, last = min(inputs.settings.pictures, len(names)), inputs.budgets[-1]
    columns = [(0, 0), (0, 1), *((len(maps) - 1, rank) for rank in range(3))]
    figure, axes = drawing.new_figure(0.62 * rows + 0.3, rows=rows, columns=1 + len(columns))
    for row, image in enumerate(decode_png(png) for png in inputs.column(names[:rows], "image")):
        axes[row, 0].imshow(image)
        for place, (at, rank) in enumerate(columns, start=1):
            of_image = maps[at][row]
            token = np.argsort(entropy(of_image))[min(rank, len(of_image) - 1)]
            _overlay(axes[row, place], image, of_image[token])
            if row == 0:
                axes[row, place].set_title(f"of {inputs.budgets[at]}", fontsize=8)
    for one in axes.flat:
        one.axis("off")
    caption = (
        f"Left the image; then the maps of its two sharpest latents of {inputs.budgets[0]}, and of its three sharpest "
        f"of {last}; red: where the grid reads the latent most, each map scaled to its largest value."
    )
    return Picture("specialization_maps.png", "Attention maps over example images.", caption, drawing.png(figure))


def _overlay(axes: "Axes", image: np.ndarray, one: np.ndarray) -> None:
    """A map [G] over the grey image, opaque where it is largest."""
    side = round(len(one) ** 0.5)
    extent = (0, side, side, 0)
    strength = (one / one.max()).reshape(side, side)
    axes.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.imshow(np.ones_like(strength), cmap="autumn", vmin=1, vmax=2, alpha=0.8 * strength, extent=extent)


def _table(found: Mapping[str, Estimate], budgets: Sequence[int], images: int, overlapped: bool) -> Table:
    names = ["entropy", "area", *((*OVERLAPS, BEYOND) if overlapped else ())]
    rows = [[str(budget), *(str(found[f"{name} at {budget}"]) for name in names), str(images)] for budget in budgets]
    return Table("Attention maps by rollout", ["tokens", *names, "images"], rows, ABOUT)


def _finding(found: Mapping[str, Estimate], budgets: Sequence[int], images: int) -> str:
    first, last = _ends(budgets)
    one, other = found[f"entropy at {first}"], found[f"entropy at {last}"]
    way = "sharpen" if other.high < one.low else "widen" if other.low > one.high else "stay as they are"
    text = f"The maps {way} over the rollouts: entropy {one} at {first} tokens, {other} at {last} ({images} images)."
    if f"{BEST} at {last}" not in found:
        return f"{text} There are no masks to compare with."
    own, beyond = found[f"{BEST} at {last}"], found[f"{BEYOND} at {last}"]
    verdict = "more" if beyond.low > 0 else "less" if beyond.high < 0 else "not clearly more"
    return (
        f"{text} At {last} tokens the best token overlaps a class by {own}, which is {verdict} than by chance "
        f"(difference to another image's maps {beyond})."
    )
