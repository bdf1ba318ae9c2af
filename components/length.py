"""length.<task>: a head that predicts a metric at every budget from the first rollout, for predicted rules.

The head is a regression of some ten thousand weights on latents that fit in memory and trains in seconds, so it is a
plain loop in one thread, the same to the bit on any cluster; Ray Data brings the latents, and the predictions of all.

Legend: N images, L latents of the first rollout, W encoder width, K budgets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.artifacts import Figures, ImageSet, Job, ScoreTable, Tokenizer
from components.config import InferenceResources, LengthStageConfig
from components.images import stack, to_float
from components.mapping import Mapping, Totals, load_tokenizer, map_table
from components.scores import budgets_of, score_files, values_of
from components.store import (
    filesystem,
    filled_folder,
    join,
    local_folder,
    read_batches,
    remove,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from model.predicted import LengthHead

HEAD = "head"


def train_length(
    job: Job,
    *,
    config: LengthStageConfig,
    resources: InferenceResources,
    images: ImageSet,
    tokenizer: Tokenizer,
    scores: ScoreTable,
) -> Figures:
    """Train the head on the train split and predict for every image; figures are errors on the held-out images.

    ``error``: mean distance of the prediction from the metric; ``error_of_the_mean``: that of the train split's mean,
    which a head that has learned nothing gives. Raises ValueError when no train image has the metric.
    """
    values = _sample(scores, config)
    if not values:
        raise ValueError(f"metric {config.metric!r}: no image of the train split has a value in {config.column!r}")
    latents, folder = join(job.scratch, "latents"), join(job.output, HEAD)
    remove(latents)
    _mapped(latents, partial(_Latents, tokenizer.uri, frozenset(values)), resources, images, job)
    names, hidden = _read_latents(latents)
    head = fit_head(hidden, np.stack([values[name] for name in names]), config)
    with filled_folder(folder) as here:
        head.save(here)
    remove(latents)
    _mapped(join(job.output, "table"), partial(_Predictor, tokenizer.uri, folder), resources, images, job)
    mean = head.centre.numpy()
    figures = {"train_images": len(names), "steps": config.length.steps} | _errors(job.output, scores, config, mean)
    write_json(join(job.output, "length.json"), {"column": config.column, "metric": config.metric, **figures})
    return figures


def _sample(scores: ScoreTable, config: LengthStageConfig) -> dict[str, np.ndarray]:
    """Values [K] of the train images that have any: the first by id, which is a hash."""
    kept: dict[str, np.ndarray] = {}
    number, width = config.length.images, len(budgets_of(scores))
    for _, table in score_files(scores, ["image_id", "split", config.column]):
        values = values_of(table, config.column, width)
        usable = np.asarray(pc.equal(table["split"], "train")) & np.isfinite(values).any(axis=1)
        names = table["image_id"].filter(pa.array(usable)).to_pylist()
        kept |= dict(zip(names, values[usable], strict=True))
        if len(kept) > 2 * number:
            kept = _first(kept, number)
    return _first(kept, number)


def _first(rows: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in sorted(rows)[:number]}


def _mapped(target: str, build: partial, resources: InferenceResources, images: ImageSet, job: Job) -> None:
    sources, columns = [images.table_uri], [["image_id", "image"]]
    map_table(Mapping(sources, target, build, resources, columns), job.progress)


class _FirstRollout:
    """The hidden latents of the first rollout."""

    def __init__(self, tokenizer_uri: str) -> None:
        self._tokenizer = load_tokenizer(tokenizer_uri)
        self._device = next(self._tokenizer.parameters()).device

    def hidden(self, pngs: list[bytes]) -> "Tensor":
        """float32 [N, L, W]."""
        import torch

        with torch.inference_mode():
            step = next(self._tokenizer.rollout(to_float(torch.from_numpy(stack(pngs)).to(self._device))))
            return step.hidden.float()


class _Latents(_FirstRollout):
    """Keeps the latents of some images, as float16."""

    def __init__(self, tokenizer_uri: str, wanted: frozenset[str]) -> None:
        super().__init__(tokenizer_uri)
        self._wanted = wanted

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Totals]:
        names = [name if name in self._wanted else None for name in table["image_id"].to_pylist()]
        rows = [row for row, name in enumerate(names) if name is not None]
        config = self._tokenizer.config
        width = config.budgets[0] * config.encoder_width
        pngs = [table["image"][row].as_py() for row in rows]
        flat = (
            self.hidden(pngs).half().cpu().numpy().reshape(len(rows), -1) if rows else np.zeros((0, width), np.float16)
        )
        lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
        shape = {"latents": pa.repeat(config.budgets[0], len(rows))}
        return pa.table({"image_id": [names[row] for row in rows], "hidden": lists, **shape}, _schema(width)), {
            "rows": len(rows)
        }


def _schema(width: int) -> pa.Schema:
    return pa.schema([("image_id", pa.string()), ("hidden", pa.list_(pa.float16(), width)), ("latents", pa.int32())])


class _Predictor(_FirstRollout):
    """Predicts the metric at every budget."""

    def __init__(self, tokenizer_uri: str, head_uri: str) -> None:
        from model.predicted import LengthHead

        super().__init__(tokenizer_uri)
        with local_folder(head_uri) as folder:
            self._head = LengthHead.load(folder).to(self._device)

    def __call__(self, table: pa.Table) -> tuple[pa.Table, Totals]:
        import torch

        hidden = self.hidden(table["image"].to_pylist())
        with torch.inference_mode():  # singly, as linear layers may round otherwise in a batch of another size
            predicted = torch.cat([self._head(one[None]) for one in hidden]).cpu().numpy()
        lists = pa.array(list(predicted), pa.list_(pa.float32()))
        return pa.table({"image_id": table["image_id"], "predicted": lists}), {"rows": len(table)}


def _read_latents(uri: str) -> tuple[list[str], "Tensor"]:
    """Names and float16 [N, L, W], in the order of the names, which no resource changes."""
    import torch

    names, parts, latents = [], [], 1
    for batch in read_batches(uri):
        if len(batch):
            names += batch["image_id"].to_pylist()
            parts.append(batch["hidden"].flatten().to_numpy().reshape(len(batch), -1))
            latents = batch["latents"][0].as_py()
    order = np.argsort(names)
    hidden = torch.from_numpy(np.concatenate(parts)[order])
    return [names[at] for at in order], hidden.unflatten(1, (latents, -1))


def fit_head(hidden_NLW: "Tensor", values_NK: np.ndarray, config: LengthStageConfig) -> "LengthHead":
    """The head trained by AdamW with half a cosine down to 0, on images drawn with the config's seed."""
    import torch

    from model.predicted import LengthHead
    from model.recipes import LengthHeadConfig

    settings = config.length
    targets = torch.from_numpy(values_NK)
    shape = LengthHeadConfig(
        config.metric, hidden_NLW.shape[2], values_NK.shape[1], hidden=settings.hidden, quantile=settings.quantile
    )
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = LengthHead(shape)
        head.fit_scale(targets)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
        for _ in range(settings.steps):
            rows = torch.randint(len(targets), (settings.batch_size,))
            optimizer.zero_grad()
            head.loss(hidden_NLW[rows], targets[rows]).backward()
            optimizer.step()
            schedule.step()
    return head.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are rounded in one order whatever the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _errors(output: str, scores: ScoreTable, config: LengthStageConfig, mean: np.ndarray) -> Figures:
    """Mean absolute errors over the budgets of the held-out images, of the predictions and of ``mean`` [K]."""
    sums, values, images = np.zeros(2), 0, 0
    store, folder = filesystem(join(output, "table"))
    for name, table in score_files(scores, ["split", config.column]):
        held_out = np.asarray(pc.equal(table["split"], "val"))
        predicted = pq.read_table(f"{folder}/{name}", filesystem=store, columns=["predicted"])
        truth = values_of(table, config.column, len(mean))[held_out]
        told = values_of(predicted, "predicted", len(mean))[held_out]
        present = np.isfinite(truth)
        sums += [np.abs(guess - truth)[present].sum(dtype=np.float64) for guess in (told, mean[None])]
        values, images = values + int(present.sum()), images + len(truth)
    errors = dict(zip(("error", "error_of_the_mean"), (sums / values).tolist(), strict=True)) if values else {}
    return {"held_out_images": images, **errors}
