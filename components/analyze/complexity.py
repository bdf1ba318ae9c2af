"""complexity: do images that are harder to describe get more tokens?

Legend: N images, K budgets.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from components.analyze import drawing
from components.analyze.estimates import Estimate
from components.analyze.inputs import Inputs
from components.analyze.sections import Picture, Section, Table
from components.images import decode_png

CLAIM = (
    "Complex images need more tokens: the count that an image is given, and its error where all get the same few "
    "tokens, rise with its complexity."
)
QUINTILES = 5
CANNY_SIGMA = 1.0
ABOUT = (
    "Spearman's rank correlation over images, in brackets its 95% bootstrap interval. jpeg bytes: of the image at the "
    "working size; entropy: of its grey levels; edges: share of pixels that Canny's detector calls an edge. at: the "
    "metric at that many tokens, its sign turned where more is better."
)

ABOUT_FIFTHS = (
    "Fifths by bytes as JPEG, the simplest images first. Mean at each number of tokens, in brackets its 95% bootstrap "
    "interval over the images of the fifth."
)


def complexity(inputs: Inputs) -> Section:
    """Rank correlations of counts and of the error at the fewest tokens with what the pixels alone tell."""
    names = inputs.sample(inputs.settings.images)
    statistics = image_statistics(inputs.column(names, "image"), inputs.settings.jpeg_quality)
    about = ABOUT
    people = np.array(inputs.column(names, "complexity"), dtype=np.float64)  # NaN where they said nothing
    if np.isfinite(people).any():
        statistics["people"] = people
        about += f" people: the source's column complexity, which {np.isfinite(people).sum()} of the images have."
    found: dict[str, Estimate] = {}
    for target, values in _targets(inputs, names).items():
        for name, statistic in statistics.items():
            found[f"{target} ~ {name}"] = inputs.bootstrap.spearman(values, statistic)
    curves = _curves(inputs, names, statistics["jpeg bytes"], found)
    targets = list(dict.fromkeys(name.partition(" ~ ")[0] for name in found if " ~ " in name))
    return Section(
        id="complexity",
        title="Complex images get more tokens",
        claim=CLAIM,
        finding=_finding(found, inputs, targets, len(names)),
        images=len(names),
        figures=[
            Picture(
                "complexity_correlation.png",
                "Rank correlations of token counts and errors with image statistics, with intervals.",
                f"Rank correlation with the image's complexity, 95% intervals, n = {len(names)}.",
                _draw_correlations(found, targets, list(statistics)),
            ),
            *curves,
        ],
        tables=[
            Table(
                "Rank correlation with complexity",
                ["what", *statistics, "images"],
                [
                    [target, *(str(found[f"{target} ~ {name}"]) for name in statistics), str(len(names))]
                    for target in targets
                ],
                about,
            ),
            *_fifths_table(inputs, found),
        ],
        estimates=found,
        headline=[f"{targets[0]} ~ {name}" for name in statistics],
    )


def _targets(inputs: Inputs, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What may follow complexity, by name: each task's counts, and its loss at the fewest tokens."""
    targets: dict[str, np.ndarray] = {}
    for criterion in inputs.criteria:
        _, column = criterion.rules[0]
        targets[f"{criterion.task}: tokens"] = inputs.counts_of(criterion.task, names).astype(np.float64)
        targets[f"{column} at {inputs.budgets[0]}"] = inputs.losses_of(names, column)[:, 0]
    return targets


def image_statistics(pngs: Sequence[bytes], jpeg_quality: int) -> dict[str, np.ndarray]:
    """Bytes as JPEG, grey-level entropy in bits, and share of pixels on an edge, float64 [N] each."""
    from skimage.feature import canny
    from skimage.measure import shannon_entropy

    sizes, entropies, edges = [], [], []
    for png in pngs:
        image = Image.fromarray(decode_png(png))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=jpeg_quality)
        grey = np.asarray(image.convert("L"))
        sizes.append(buffer.tell())
        entropies.append(shannon_entropy(grey))
        edges.append(canny(grey, sigma=CANNY_SIGMA).mean())
    return {
        "jpeg bytes": np.array(sizes, dtype=np.float64),
        "entropy": np.array(entropies),
        "edges": np.array(edges, dtype=np.float64),
    }


def quintiles(values: np.ndarray) -> np.ndarray:
    """Which fifth of the images each is in by rank, int64 [N] in 0..4; equal sizes up to one."""
    rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return rank * QUINTILES // len(values)


def _curves(inputs: Inputs, names: Sequence[str], sizes: np.ndarray, found: dict[str, Estimate]) -> list[Picture]:
    """The first task's error against the budget, a line a fifth of the images; adds the numbers to ``found``."""
    if len(names) < QUINTILES:
        return []
    _, column = inputs.criteria[0].rules[0]
    values, fifth = inputs.values_of(names, column), quintiles(sizes)
    figure, ((axes,),) = drawing.new_figure()
    for number, colour in enumerate(drawing.shades(QUINTILES)):
        points = [inputs.bootstrap.mean(values[fifth == number, at]) for at in range(len(inputs.budgets))]
        for budget, point in zip(inputs.budgets, points, strict=True):
            found[f"{column} at {budget}, fifth {number + 1}"] = point
        name = {0: "simplest fifth", QUINTILES - 1: "most complex"}.get(number, f"{number + 1}")
        drawing.curve(axes, inputs.budgets, points, drawing.Line(name, number, colour))
    drawing.label(axes, x="tokens", y=column)
    drawing.legend(figure, axes, columns=3)
    sizes_told = " + ".join(str(number) for number in np.bincount(fifth))
    caption = (
        f"{column} against tokens by fifths of the images in bytes as JPEG, 95% intervals, n = {sizes_told}, simplest "
        "first."
    )
    alt = f"{column} against tokens, one line for each fifth of the images by complexity."
    return [Picture("complexity_budgets.png", alt, caption, drawing.png(figure))]


def _fifths_table(inputs: Inputs, found: Mapping[str, Estimate]) -> list[Table]:
    """The numbers of the curves, a row a fifth."""
    _, column = inputs.criteria[0].rules[0]
    rows = []
    for number in range(1, QUINTILES + 1):
        points = [found.get(f"{column} at {budget}, fifth {number}") for budget in inputs.budgets]
        present = [point for point in points if point is not None]
        if present:
            rows.append([str(number), *(str(point) for point in present), str(present[0].images)])
    columns = ["fifth", *(f"at {budget}" for budget in inputs.budgets), "images"]
    return [Table(f"{column} by fifths of the images", columns, rows, ABOUT_FIFTHS)] if rows else []


def _draw_correlations(found: Mapping[str, Estimate], targets: Sequence[str], statistics: Sequence[str]) -> bytes:
    figure, ((axes,),) = drawing.new_figure(1.4 + 0.5 * len(targets))
    for number, name in enumerate(statistics):
        for row, target in enumerate(targets):
            one = found[f"{target} ~ {name}"]
            place = row + 0.18 * (number - (len(statistics) - 1) / 2)
            colour, mark = drawing.COLOURS[number], drawing.MARKS[number]
            axes.plot([one.low, one.high], [place, place], color=colour, linewidth=1.5)
            axes.plot(one.value, place, mark, color=colour, markersize=5, label=name if row == 0 else None)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(targets)), [_wrapped(target) for target in targets], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-1, 1)
    drawing.label(axes, x="rank correlation")
    drawing.legend(figure, axes, columns=3)
    return drawing.png(figure)


def _wrapped(target: str) -> str:
    return target.replace(": ", ":\n").replace(" at ", "\nat ")


def _finding(found: Mapping[str, Estimate], inputs: Inputs, targets: Sequence[str], images: int) -> str:
    task, error = targets[0], targets[1]
    count, size = found[f"{task} ~ jpeg bytes"], found[f"{error} ~ jpeg bytes"]
    if np.isnan(count.value):
        first = (
            f"Every one of {images} images got the same count under {inputs.criteria[0].task!r}, so nothing follows."
        )
    else:
        first = f"{_verdict(count)}: {task} correlate with bytes as JPEG by {count} over {images} images."
    return f"{first} The loss {error} tokens correlates by {size}."


def _verdict(one: Estimate) -> str:
    if one.low > 0:
        return "Borne out"
    return "The opposite" if one.high < 0 else "Not borne out, the interval holds 0"
