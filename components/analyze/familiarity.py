"""familiarity: do images of an unfamiliar kind need more tokens under the same rule?

Legend: N images, K budgets, H W px.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from components.analyze import drawing
from components.analyze.complexity import image_statistics
from components.analyze.estimates import Estimate, mann_whitney, superiority
from components.analyze.inputs import Inputs
from components.analyze.rollouts import OVER_THE_SET, Choose, chooser, measured
from components.analyze.sections import Picture, Section, Table
from components.analyze.settings import StrangeSource
from components.config import DataConfig, RuleConfig
from components.image_files import BadImage
from components.images import encode_png, prepare, stack
from components.sources import open_source

CLAIM = "Familiar images need fewer tokens: the further a set is from the training data, the more tokens it is given."
HELD_OUT = "held out"
COMPARED = ("difference", "more", "p", "matched")
MAX_PIXELS = 100_000_000
ABOUT = (
    "upside down, negative, phases, shuffled: the held-out images themselves, turned over, with inverted colours, "
    "with random Fourier phases (the same spectrum without any contours), with their pixels in random order; noise: "
    "uniform. kind: near keeps the images' shapes, far does not; of another source as the config "
    "says. difference: of the mean count to the held-out images'. more: chance that an image of the set gets more "
    "tokens than a held-out one, ties half (0.5: alike). p: Mann-Whitney. matched: mean difference of an image's count "
    "to that of the held-out image with the nearest bytes as JPEG, since a set can need fewer tokens because it "
    "is simpler; for noise no held-out image is near. jpeg bytes: mean."
)


@dataclass(frozen=True)
class _Set:
    """A set of images under the rule."""

    pixels: np.ndarray
    tokens: np.ndarray  # int64 [N]
    values: np.ndarray  # float64 [N, K]
    bytes: np.ndarray  # as JPEG, float64 [N]
    kind: str  # near or far out of distribution; "in": held out; "": not said


def familiarity(inputs: Inputs) -> Section:
    """Counts of held-out images, of other sources and of spoilt held-out images under the first rule of pixels."""
    from model.metrics import METRICS

    head = {"id": "familiarity", "title": "Familiar images get fewer tokens", "claim": CLAIM}
    rules = [criterion.rules[0] for criterion in inputs.criteria]
    usable = [(rule, column) for rule, column in rules if rule.metric in METRICS and rule.kind != OVER_THE_SET]
    if not usable:
        return Section(**head, finding="Not measured: no task has a rule on pixels that judges an image alone.")
    rule, column = usable[0]
    sets = _sets(inputs, rule, column)
    known, found = sets[HELD_OUT], dict[str, Estimate]()
    for name, one in sets.items():
        found[f"{name}: tokens"] = inputs.bootstrap.mean(one.tokens)
        found[f"{name}: jpeg bytes"] = inputs.bootstrap.mean(one.bytes)
        found[f"{name}: {rule.metric} at {inputs.budgets[0]}"] = inputs.bootstrap.mean(one.values[:, 0])
        if name != HELD_OUT:
            found[f"{name}: difference"] = inputs.bootstrap.difference(one.tokens, known.tokens)
            found[f"{name}: more"] = inputs.bootstrap.of([one.tokens, known.tokens], superiority)
            found[f"{name}: matched"] = inputs.bootstrap.mean(one.tokens - _matched(one, known))
            p = mann_whitney(one.tokens, known.tokens)
            found[f"{name}: p"] = Estimate(p, np.nan, np.nan, len(one.tokens))
    return Section(
        **head,
        finding=_finding(sets, found),
        images=sum(len(one.tokens) for one in sets.values()),
        figures=[_picture(sets, found, rule, inputs)],
        tables=[_table(sets, found, rule, inputs)],
        estimates=found,
        headline=[f"{name}: tokens" for name in sets],
    )


def _sets(inputs: Inputs, rule: RuleConfig, column: str) -> dict[str, _Set]:
    names = inputs.sample(inputs.settings.images)
    held_out = stack(inputs.column(names, "image"))
    choose = chooser(rule, budgets=inputs.budgets)
    sets = {HELD_OUT: _set(inputs, held_out, inputs.values_of(names, column), choose, "in")}
    number, generator = inputs.settings.strange_images, np.random.default_rng(inputs.settings.seed)
    pixels = {one.name: read_source(one, held_out.shape[2], number) for one in inputs.settings.ood}
    pixels |= {name: spoil(held_out[:number], generator) for name, spoil in SPOILT.items()}
    kinds = {one.name: one.kind or "" for one in inputs.settings.ood} | SPOILT_KINDS
    tokenizer = inputs.load_tokenizer()
    for name, images in pixels.items():
        values = measured(tokenizer, images, rule.metric, inputs.batch_size)
        sets[name] = _set(inputs, images, values, choose, kinds[name])
    return sets


def _set(inputs: Inputs, pixels: np.ndarray, values: np.ndarray, choose: Choose, kind: str) -> _Set:
    sizes = image_statistics([_png(image) for image in pixels], inputs.settings.jpeg_quality)["jpeg bytes"]
    return _Set(pixels, choose(values), values, sizes, kind)


def _matched(one: _Set, known: _Set) -> np.ndarray:
    """Counts of the held-out images that are as complex as those of the set, one for each."""
    return known.tokens[nearest(one.bytes, known.bytes)]


def nearest(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each of [M] the place of the nearest of ``among`` [N], int64 [M]."""
    return np.abs(values[:, None] - among).argmin(axis=1)


def _png(image_CHW: np.ndarray) -> bytes:
    from PIL import Image

    return encode_png(Image.fromarray(image_CHW.transpose(1, 2, 0)))


def read_source(wanted: StrangeSource, size: int, number: int) -> np.ndarray:
    """uint8 [N, 3, H, W] of up to ``number`` images that can be read, spread over the listing; ValueError if none."""
    source = open_source(DataConfig(source=wanted.source, image_size=size))
    items = list(source.list())
    chosen = [items[at] for at in sorted({round(at) for at in np.linspace(0, len(items) - 1, min(number, len(items)))})]
    pngs = []
    for item in chosen:
        try:
            pngs.append(encode_png(prepare(source.read(item.path, item.etag), size=size, max_pixels=MAX_PIXELS).image))
        except (BadImage, OSError):
            continue
    if not pngs:
        raise ValueError(f"analyze.ood {wanted.name!r}: none of {len(chosen)} files in {wanted.source!r} can be read")
    return stack(pngs)


def upside_down(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Turned over: the same content and complexity, never seen so."""
    return np.ascontiguousarray(images[:, :, ::-1])


def negative(images: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Inverted colours."""
    return 255 - images


def random_phases(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The amplitude spectrum of each image with the phases of one noise image added to all its channels."""
    noise = np.fft.fft2(generator.standard_normal((len(images), 1, *images.shape[2:])))
    turned = np.fft.fft2(images / 255) * noise / np.abs(noise)
    turned[:, :, 0, 0] = np.abs(turned[:, :, 0, 0])  # the mean stays
    return np.clip(np.round(np.fft.ifft2(turned).real * 255), 0, 255).astype(np.uint8)


def shuffled(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each image's pixels in an order of their own."""
    flat = images.reshape(*images.shape[:2], -1)
    order = generator.permuted(np.tile(np.arange(flat.shape[2]), (len(flat), 1)), axis=1)
    return np.take_along_axis(flat, order[:, None], axis=2).reshape(images.shape)


def noise(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Uniform noise of the same shape."""
    return generator.integers(0, 256, images.shape, dtype=np.uint8)


SPOILT: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "upside down": upside_down,
    "negative": negative,
    "phases": random_phases,
    "shuffled": shuffled,
    "noise": noise,
}
SPOILT_KINDS = {  # near: the shapes of the images are still there
    "upside down": "near",
    "negative": "near",
    "phases": "far",
    "shuffled": "far",
    "noise": "far",
}


def _picture(sets: Mapping[str, _Set], found: Mapping[str, Estimate], rule: RuleConfig, inputs: Inputs) -> Picture:
    """Example, histogram and mean count of each set, one row a set."""
    figure, axes = drawing.new_figure(0.55 + 0.5 * len(sets), rows=len(sets), columns=2)
    axes[0, 0].get_gridspec().set_width_ratios([1, 5])
    budgets = np.asarray(inputs.budgets)
    for number, (name, one) in enumerate(sets.items()):
        picture, bars = axes[number]
        picture.imshow(one.pixels[0].transpose(1, 2, 0))
        picture.axis("off")
        shares = np.array([(one.tokens == budget).mean() for budget in budgets])
        bars.bar(range(len(budgets)), shares, color=drawing.COLOURS[0 if name == HELD_OUT else 1])
        bars.set_ylim(0, 1)
        bars.set_yticks([])
        last = number == len(sets) - 1
        bars.set_xticks(range(len(budgets)), budgets if last else [""] * len(budgets), fontsize=8)
        told = f"{_named(name, one)}: {found[f'{name}: tokens']}, n = {len(one.tokens)}"
        bars.text(0.02, 0.95, told, transform=bars.transAxes, va="top", fontsize=8)
    drawing.label(axes[-1, 1], x=f"tokens an image ({rule.kind} on {rule.metric})")
    alt = "For each set an example and the share of its images at each token count."
    caption = (
        "Share of the images at each count, and the mean count with its 95% interval and number of images, under the "
        "same rule; near, far: out of distribution; left an example of the set."
    )
    return Picture("familiarity_counts.png", alt, caption, drawing.png(figure))


def _named(name: str, one: _Set) -> str:
    return f"{name} ({one.kind})" if one.kind in ("near", "far") else name


def _table(sets: Mapping[str, _Set], found: Mapping[str, Estimate], rule: RuleConfig, inputs: Inputs) -> Table:
    error = f"{rule.metric} at {inputs.budgets[0]}"
    rows = []
    for name, one in sets.items():
        compared = [""] * len(COMPARED)
        if name != HELD_OUT:
            compared = [str(found[f"{name}: {what}"]) for what in COMPARED]
        rows.append(
            [
                name,
                one.kind,
                str(len(one.tokens)),
                str(found[f"{name}: tokens"]),
                *compared,
                str(found[f"{name}: {error}"]),
                str(found[f"{name}: jpeg bytes"]),
            ]
        )
    columns = ["set", "kind", "images", "tokens", *COMPARED, error, "jpeg bytes"]
    return Table("Counts under the same rule", columns, rows, ABOUT)


def _finding(sets: Mapping[str, _Set], found: Mapping[str, Estimate]) -> str:
    """Which sets get more than the held-out images, which fewer, beyond their intervals."""
    told: dict[str, list[str]] = {"more": [], "fewer": [], "as many": []}
    for name in sets:
        if name != HELD_OUT:
            one = found[f"{name}: difference"]
            side = "more" if one.low > 0 else "fewer" if one.high < 0 else "as many"
            told[side].append(
                f"{_named(name, sets[name])} ({one.value:+.1f}, matched {found[f'{name}: matched'].value:+.1f})"
            )
    known = found[f"{HELD_OUT}: tokens"]
    sentence = "; ".join(f"{side}: {', '.join(names)}" for side, names in told.items() if names)
    return (
        f"Held-out images get {known} tokens; {sentence} (difference in mean tokens, judged by its 95% interval; "
        "matched: to held-out images as complex)."
    )
