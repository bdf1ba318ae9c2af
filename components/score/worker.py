"""The actor that decodes each budget once and measures it for every task.

Legend: B images of a batch, K budgets.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.images import stack, to_float
from components.judges.judge import ask
from components.judges.record import JudgeRecord, open_judge
from components.mapping import Totals, load_tokenizer
from components.store import local_folder
from components.targets import decode_targets
from components.task_config import ScoredTask, ScoreStageConfig
from components.tasks.build import build_task
from components.tasks.pixels import build_pixel_metrics
from components.tasks.task import Originals, Seen, Task

KEYS = ("image_id", "split")  # of a score table, as the images have them

if TYPE_CHECKING:
    from torch import Tensor

    from components.judges.judge import Judge


@dataclass(frozen=True)
class Order:
    """What an actor measures."""

    config: ScoreStageConfig
    columns: tuple[str, ...]  # of the table, in its order
    tokenizer: str  # URI
    judges: dict[str, str]  # task -> URI of its Judge


class Scorer:
    """Called with the same rows of the images and the codes."""

    def __init__(self, order: Order) -> None:
        self._measuring = Measuring(order)

    def __call__(self, images: pa.Table, codes: pa.Table) -> tuple[pa.Table, Totals]:
        """image_id, split and the columns."""
        if images["image_id"] != codes["image_id"]:
            raise AssertionError("images and codes are not the same rows in the same order")
        made = {name: as_lists(values) for name, values in self._measuring(images, codes).items()}
        return pa.table({name: images[name] for name in KEYS} | made), {"rows": len(images)}


def as_lists(values: np.ndarray) -> pa.Array:
    """float32 [B, K] as lists; null where all of a row is NaN, which says that the image lacks the target."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    missing = np.isnan(values).all(axis=1)
    flat = pa.array(values.astype(np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(missing))


class Measuring:
    """The models and tasks, loaded once."""

    def __init__(self, order: Order) -> None:
        self.tokenizer = load_tokenizer(order.tokenizer, order.config.precision)
        self._device = str(next(self.tokenizer.parameters()).device)
        self._new = order.columns
        pixels = tuple(metric for metric in order.config.metrics if metric in order.columns)
        self._pixels = build_pixel_metrics(pixels, order.config.perceptual)
        for metric in self._pixels.values():
            if hasattr(metric, "to"):
                metric.to(self._device)
        self._tasks: dict[str, Task] = {}
        self._judge_of: dict[str, str] = {}  # task -> identity: one judge may serve several tasks
        self._judges: dict[str, Judge] = {}
        for task in order.config.tasks:
            if any(f"{task.name}.{metric}" in order.columns for metric in task.metrics):
                self._load(task, order.judges.get(task.name))

    def _load(self, task: ScoredTask, judge: str | None) -> None:
        with ExitStack() as open_folders:
            folder = open_folders.enter_context(local_folder(judge)) if judge else None
            self._tasks[task.name] = build_task(task.kind, folder)
            _check(task, self._tasks[task.name])
            if folder:
                identity = JudgeRecord.read(folder).identity
                self._judge_of[task.name] = identity
                if identity not in self._judges:
                    self._judges[identity] = open_judge(folder, self._device)

    def __call__(self, images: pa.Table, codes: pa.Table) -> dict[str, np.ndarray]:
        """Each new column as float32 [B, K]."""
        return self.measure(images, self._decoded(codes))

    def measure(self, images: pa.Table, restorations: "Iterable[Tensor]") -> dict[str, np.ndarray]:
        """Each new column as float32 [B, K] of K ``restorations`` [B, 3, H, W] of the same images."""
        import torch

        measured: dict[str, list[np.ndarray]] = {name: [] for name in self._new}
        with torch.inference_mode():
            parts = list(self._originals(images))
            for restored in restorations:
                for column in measured.values():
                    column.append(np.full(len(images), np.nan, dtype=np.float32))
                for rows, originals, answers in parts:
                    for name, numbers in self._measured(originals, answers, restored[rows]).items():
                        measured[name][-1][rows] = numbers.float().cpu().numpy()
        return {name: np.stack(columns, axis=1) for name, columns in measured.items()}

    def _originals(self, images: pa.Table) -> "Iterator[tuple[slice, Originals, dict[str, dict[str, Tensor]]]]":
        """Rows, what is known of them, and what each judge answers; on a CPU one image at a time."""
        import torch

        wanted = sorted({task.target for task in self._tasks.values() if task.target} & set(images.schema.names))
        targets = decode_targets(images, wanted)
        dense = {name: torch.from_numpy(targets[name]) for name in ("depth", "mask") if name in targets}
        labels = targets.get("label", np.full(len(images), None))
        pixels = to_float(torch.from_numpy(stack(images["image"].to_pylist())).to(self._device))
        step = 1 if self._device == "cpu" else len(images)
        for start in range(0, len(images), step):
            rows = slice(start, start + step)
            originals = Originals(
                images=pixels[rows],
                ids=tuple(images["image_id"][rows].to_pylist()),
                labels=tuple(labels[rows]),
                depth=dense["depth"][rows].to(self._device) if "depth" in dense else None,
                mask=dense["mask"][rows].to(self._device).long() if "mask" in dense else None,
            )
            yield rows, originals, self._asked(originals.images)

    def _asked(self, images: "Tensor") -> "dict[str, dict[str, Tensor]]":
        """Every judge's answers, by its identity."""
        return {identity: ask(judge, images) for identity, judge in self._judges.items()}

    def _decoded(self, codes: pa.Table) -> "Iterator[Tensor]":
        """The reconstructions of each budget, float32 [B, 3, H, W] in [0, 1]."""
        from model.tokens import TokenBatch

        lists = codes["codes"].combine_chunks()
        flat = lists.values.to_numpy().reshape(len(lists), -1)
        config = self.tokenizer.config
        per_token = 1 if config.codebook_size else config.channels_per_latent
        start = 0
        for budget in self.tokenizer.budgets:
            part = flat[:, start : start + budget * per_token]
            tokens = part if config.codebook_size else part.reshape(len(part), budget, per_token)
            yield self.tokenizer.decode(TokenBatch.from_numpy(list(tokens), config.codebook_size))
            start += budget * per_token

    def _measured(
        self, originals: Originals, answers: "dict[str, dict[str, Tensor]]", images: "Tensor"
    ) -> "dict[str, Tensor]":
        """Column -> values [B] of one budget."""
        values = {name: metric(originals.images, images) for name, metric in self._pixels.items()}
        after = self._asked(images)
        for name, task in self._tasks.items():
            judge = self._judge_of.get(name, "")
            known = Originals(**{**vars(originals), "answers": answers.get(judge, {})})
            measured = task.measure(known, Seen(images, after.get(judge, {})))
            values |= {f"{name}.{metric}": numbers for metric, numbers in measured.items()}
        return {name: numbers for name, numbers in values.items() if name in self._new}


def _check(scored: ScoredTask, task: Task) -> None:
    """Raises ValueError when a task of one's own doesn't measure what the config names."""
    unknown: Sequence[str] = [metric for metric in scored.metrics if metric not in task.metrics]
    if unknown:
        raise ValueError(f"tasks: {scored.name!r} has metrics {unknown}, {scored.kind} measures {sorted(task.metrics)}")
