"""quality: the stage.

Legend: N images, K budgets, F features, L tokens of a budget, D numbers in a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.artifacts import CodeBook, Figures, ImageSet, Job, TokenCounts, Tokenizer
from components.config import InferenceResources, QualityConfig
from components.mapping import Mapping as TableMapping
from components.mapping import load_tokenizer, map_table
from components.quality.measures import frechet, kernel, neighbours, probe_top1, recall
from components.quality.sample import Codes, Sample, draw, read_codes
from components.quality.worker import EFFICIENTNET, INCEPTION, Featurizer, Wanted, load_inception
from components.store import (
    filesystem,
    join,
    read_batches,
    read_json,
    remove,
    write_json,
    write_table,
)

if TYPE_CHECKING:
    from model import AlitTokenizer

HOW = (
    "Over `images` originals and their reconstructions. frechet_efficientnet: Fréchet distance of the pooled features "
    "of EfficientNet-Lite0; it is not FID, and it grows as images get fewer: in_halves is the distance between two "
    "halves of the originals, which would be 0 for endless images. kernel_efficientnet: KID's kernel distance of these "
    "features, unbiased. frechet_inception (rFID), kernel_inception: the same with Inception features, where its "
    "weights were given. A task's row: each image at the count its rule chose; fixed_*: one count for all with that "
    "mean, on the line between two budgets. usage, perplexity: of the codes at that budget over `code_images` images. "
    "probe_*: top-1 of a logistic regression on latents (pooled: their mean, flat: all), fitted to `probe_train` "
    "labelled images of the train split, tested on `probe_test` others; probe_chance: the commonest label's share. "
    "recall1, recall5: how often the nearest neighbour of an original by EfficientNet features is the nearest, or one "
    "of five, by quantized latents; *_continuous: by the latents before quantization; recall1_chance: of a guess."
)
NETWORKS = (EFFICIENTNET, INCEPTION)


def quality(
    job: Job,
    *,
    config: QualityConfig,
    resources: InferenceResources,
    images: ImageSet,
    codes: CodeBook,
    tokenizer: Tokenizer,
    **counts: TokenCounts,
) -> Figures:
    """Write ``quality.json``, its rows as ``table`` and ``quality.png``; ``counts``: each task's, as counts_<task>.

    Raises ValueError when fewer than two images are there or the networks' weights aren't.
    """
    sample = draw(images, config)
    if len(sample.images) < 2:
        raise ValueError(f"quality: {len(sample.images)} images; two at least are needed")
    if config.inception is not None:
        load_inception(config.inception)  # what is wrong with it is told before hours of work
    scratch = join(job.scratch, "features")
    remove(scratch)
    wanted = Wanted(tokenizer.uri, frozenset(sample.images), config.inception)
    mapping = TableMapping(
        sources=[images.table_uri, codes.table_uri],
        target=scratch,
        build=partial(Featurizer, wanted),
        resources=resources,
        columns=[["image_id", "image"], ["image_id", "codes"]],
    )
    map_table(mapping, job.progress)
    budgets = [int(budget) for budget in read_json(join(codes.uri, "budgets.json"))]
    model = load_tokenizer(tokenizer.uri)
    measured = _Measured(
        model,
        sample,
        read_codes(images, codes, sample, budgets, model.config.codebook_size),
        _features(scratch, sample),
    )
    fixed = [
        {"name": f"{budget} tokens", "mean_tokens": budget} | measured.at_budget(k) for k, budget in enumerate(budgets)
    ]
    rows = [*fixed, *(_adaptive(measured, fixed, name.removeprefix("counts_"), one) for name, one in counts.items())]
    remove(scratch)
    return _written(job, measured, rows)


def _features(uri: str, sample: Sample) -> dict[str, np.ndarray]:
    """Each column as float32 [N, …], in the order of the ids."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for batch in read_batches(uri, batch_rows=1024):
        for column in batch.schema.names[1:]:
            rows = batch[column].flatten().to_numpy().reshape(len(batch), -1) if len(batch) else []
            parts.setdefault(column, {}).update(zip(batch["image_id"].to_pylist(), rows, strict=True))
    return {column: np.stack([rows[name] for name in sample.images]) for column, rows in parts.items()}


@dataclass(frozen=True)
class _Measured:
    """What all rows are made from."""

    model: "AlitTokenizer"
    sample: Sample
    codes: Codes
    features: Mapping[str, np.ndarray]

    @property
    def names(self) -> list[str]:
        """The sampled images."""
        return list(self.sample.images)

    def distances(self, column: np.ndarray) -> dict[str, float]:
        """Of the reconstructions at each image's own budget, ``column`` int64 [N]."""
        found = {}
        for network in NETWORKS:
            if f"{network}_original" in self.features:
                originals = self.features[f"{network}_original"]
                restored = self.features[f"{network}_restored"].reshape(len(originals), -1, originals.shape[1])
                chosen = restored[np.arange(len(column)), column]
                found[f"frechet_{network}"] = frechet(originals, chosen)
                found[f"kernel_{network}"] = kernel(originals, chosen)
        return found

    def at_budget(self, column: int) -> dict[str, Any]:
        """Every measure at one budget."""
        distances = self.distances(np.full(len(self.names), column))
        return distances | self.codes.use(column) | self._probe(column) | self._retrieval(column)

    def _latents(self, names: Sequence[str], column: int) -> np.ndarray:
        """What the decoder reads, float32 [N, L, D]."""
        import torch

        values = torch.from_numpy(self.codes.at(names, column))
        device = next(self.model.parameters()).device
        if self.model.config.codebook_size is None:
            return values.float().reshape(len(names), self.codes.budgets[column], -1).numpy()
        with torch.inference_mode():
            return self.model.latents(values.to(device)).float().cpu().numpy()

    def _probe(self, column: int) -> dict[str, float | None]:
        train = list(self.sample.probe)
        test = [name for name, label in self.sample.images.items() if label is not None]
        if not train or not test:
            return {}
        labels = [[str(self.sample.probe[n]) for n in train], [str(self.sample.images[n]) for n in test]]
        one, other = self._latents(train, column), self._latents(test, column)
        flat = [one.reshape(len(one), -1), other.reshape(len(other), -1)]
        return {
            "probe_pooled": probe_top1(one.mean(axis=1), labels[0], other.mean(axis=1), labels[1]),
            "probe_flat": probe_top1(flat[0], labels[0], flat[1], labels[1]),
        }

    def _retrieval(self, column: int) -> dict[str, float]:
        truth = neighbours(self.features[f"{EFFICIENTNET}_original"], 1)[:, 0]
        number = min(5, len(truth) - 1)
        before = self._projected(column)
        found = {"recall1_continuous": recall(truth, before, 1), "recall5_continuous": recall(truth, before, number)}
        if self.model.config.codebook_size is not None:
            after = self._latents(self.names, column).reshape(len(truth), -1)
            found |= {"recall1": recall(truth, after, 1), "recall5": recall(truth, after, number)}
        return found

    def _projected(self, column: int) -> np.ndarray:
        """Latents before quantization [N, L * D], of unit length a token, as the quantizer compares them."""
        width, budgets = self.model.config.channels_per_latent, self.codes.budgets
        start = sum(budgets[:column]) * width
        latents = self.features["projected"][:, start : start + budgets[column] * width].reshape(
            len(self.names), -1, width
        )
        if self.model.config.codebook_size is not None:
            latents = latents / np.maximum(np.linalg.norm(latents, axis=2, keepdims=True), 1e-12)
        return latents.reshape(len(latents), -1)

    def context(self) -> dict[str, Any]:
        """How many images there were, and what chance gives."""
        originals = self.features[f"{EFFICIENTNET}_original"]
        half = len(originals) // 2
        labels = [label for label in self.sample.images.values() if label is not None] if self.sample.probe else []
        told = {
            "images": len(originals),
            "split": self.sample.split,
            "code_images": self.codes.images,
            "probe_train": len(self.sample.probe),
            "probe_test": len(labels),
            "probe_chance": max(labels.count(label) for label in set(labels)) / len(labels) if labels else None,
            "recall1_chance": 1 / (len(originals) - 1),
        }
        if half < 2:
            return told
        return told | {
            "in_halves": {"images": half, "frechet_efficientnet": frechet(originals[:half], originals[half : 2 * half])}
        }


def _adaptive(measured: _Measured, fixed: list[dict[str, Any]], task: str, counts: TokenCounts) -> dict[str, Any]:
    """The row of a task: distances at its counts, and what the same mean of tokens for all images gives."""
    tokens: dict[str, int] = {}
    for batch in read_batches(counts.table_uri, columns=["image_id", "num_tokens"]):
        tokens |= {
            name: number
            for name, number in zip(batch["image_id"].to_pylist(), batch["num_tokens"].to_pylist(), strict=True)
            if name in measured.sample.images
        }
    chosen = np.array([tokens[name] for name in measured.names])
    found = measured.distances(np.searchsorted(measured.codes.budgets, chosen))
    mean = float(chosen.mean())
    curves = {
        f"fixed_{name}": float(np.interp(mean, measured.codes.budgets, [row[name] for row in fixed])) for name in found
    }
    return {"name": task, "mean_tokens": mean} | found | curves


def _written(job: Job, measured: _Measured, rows: list[dict[str, Any]]) -> Figures:
    context = measured.context()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    complete = [{name: row.get(name) for name in columns} | {"images": context["images"]} for row in rows]
    write_json(join(job.output, "quality.json"), {"rows": rows, **context, "how": HOW})
    write_table(join(job.output, "table"), pa.Table.from_pylist(complete))
    budgets = len(measured.codes.budgets)
    _draw(rows[:budgets], rows[budgets:], join(job.output, "quality.png"), context["images"])
    figures: Figures = {"images": context["images"], "split": context["split"]}
    for row in rows:
        name = str(row["name"]).removesuffix(" tokens")
        figures |= {f"{measure}@{name}": row[measure] for measure in row if measure.startswith(("frechet_", "kernel_"))}
    return figures


def _draw(fixed: list[dict[str, Any]], tasks: list[dict[str, Any]], uri: str, images: int) -> None:
    """Fréchet distance against tokens: fixed length as a line, each task's own counts as a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    name = "frechet_efficientnet"
    axes.plot([row["mean_tokens"] for row in fixed], [row[name] for row in fixed], "o-", label="fixed length")
    for row in tasks:
        axes.plot(row["mean_tokens"], row[name], "s", label=row["name"])
    axes.set_xlabel("tokens, mean over images")
    axes.set_ylabel(f"{name} (not FID)")
    axes.set_title(f"n = {images} images", fontsize=9)
    axes.legend(fontsize=7)
    store, path = filesystem(uri)
    with store.open_output_stream(path) as stream:
        FigureCanvasAgg(figure).print_png(stream)
