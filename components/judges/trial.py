"""What a judge scores on originals, beside a constant answer; and the gallery of retrieval."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import Figures, ImageSet
from components.images import stack, to_float
from components.judges.judge import Judge, ask
from components.store import read_batches
from components.targets import decode_targets
from components.task_config import TASK_KINDS, JudgeStageConfig, Target
from components.tasks.classification import Classification
from components.tasks.depth import Depth
from components.tasks.features import unit
from components.tasks.segmentation import Segmentation
from components.tasks.task import Originals, Seen, Task

if TYPE_CHECKING:
    from torch import Tensor

SCORES: Mapping[str, tuple[str, str]] = {  # task -> its metric against the target, and what that is called here
    "classification": ("correct", "accuracy"),
    "depth": ("abs_rel", "abs_rel"),
    "segmentation": ("miou", "miou"),
}


def try_judge(judge: Judge, config: JudgeStageConfig, images: ImageSet, device: str) -> Figures:
    """What ``judge`` scores on at most ``eval_images`` originals that have the target, val ones where there are any.

    ``constant``: what a constant answer scores on them: the commonest label, the median depth or the commonest class
    of a pixel, of as many originals of the train split where that has any, else of these. ``skill``: 0 for as good as
    that, 1 for perfect. A ``note`` instead where nothing can be compared.
    """
    target = TASK_KINDS[config.kind].target if config.kind in SCORES else None
    if target is None:
        return {"note": "nothing to compare this judge with: it is asked about originals and reconstructions alike"}
    sampled, with_target = _sample(images, target, config.options.eval_images)
    split = "val" if with_target["val"] else "train"
    rows = sampled[split]
    told: Figures = {f"{target}_train": with_target["train"], f"{target}_val": with_target["val"]}
    if not len(rows):
        return {"note": f"no image has a {target}: what this judge says can only be compared with itself", **told}
    task, (metric, name) = _task(judge, config), SCORES[config.kind]
    originals = list(_originals(rows, target, device))
    values = np.array([_measured(task, one, ask(judge, one.images), metric) for one in originals])
    usable = [one for one, value in zip(originals, values, strict=True) if not np.isnan(value)]
    if not usable:
        return {"note": f"none of {len(rows)} {target}s tried means anything to this judge", **told}
    train = _originals(sampled["train"], target, device) if with_target["train"] else ()
    answers = _constant(task, [one for one in train if _says(task, one)] or usable)
    constant = float(np.nanmean([_measured(task, one, answers, metric) for one in usable]))
    score = float(np.nanmean(values))
    skill = 1 - score / constant if metric == "abs_rel" else (score - constant) / (1 - constant + 1e-9)
    return {name: score, "constant": constant, "skill": skill, "tried": len(usable), "split": split, **told}


def _task(judge: Judge, config: JudgeStageConfig) -> Task:
    if config.kind == "classification":
        return Classification(judge.classes)
    return Depth() if config.kind == "depth" else Segmentation(config.options.ignore)


def _measured(task: Task, one: Originals, answers: "Mapping[str, Tensor]", metric: str) -> float:
    known = Originals(**{**vars(one), "answers": answers})
    return float(task.measure(known, Seen(one.images, answers))[metric][0])


def _says(task: Task, one: Originals) -> bool:
    """Whether the target says anything that the task can compare with."""
    if isinstance(task, Classification):
        return task.class_of(one.labels[0]) is not None
    if isinstance(task, Segmentation):
        return bool((task.counted(one.mask) >= 0).any())
    return one.depth is not None and bool(one.depth.isfinite().any())


def _constant(task: Task, known: list[Originals]) -> "dict[str, Tensor]":
    """The answers of a judge that says the same of every image, and knows ``known``."""
    import torch

    if isinstance(task, Classification):
        commonest = Counter(task.class_of(one.labels[0]) for one in known).most_common(1)[0][0]
        return {"classes": _only(commonest, task.num_classes)}
    if isinstance(task, Segmentation):
        pixels = torch.cat([task.counted(one.mask).flatten() for one in known])
        commonest = int(torch.bincount(pixels[pixels >= 0]).argmax())
        return {"segments": _only(commonest, commonest + 1)[:, :, None, None].to(pixels.device)}
    readings = torch.cat([one.depth[one.depth.isfinite()] for one in known])
    return {"depth": readings.median().view(1, 1, 1)}


def _only(number: int, width: int) -> "Tensor":
    """Scores [1, width] of the one class ``number``."""
    import torch

    return torch.nn.functional.one_hot(torch.tensor([number]), width).float()


def _sample(images: ImageSet, target: Target, limit: int) -> tuple[dict[str, pa.Table], Counter[str]]:
    """At most ``limit`` rows with a ``target`` of each split, and how many there are."""
    kept: dict[str, pa.Table] = {}
    counts: Counter[str] = Counter()
    for batch in read_batches(images.table_uri, columns=["image_id", "split", "image", target], batch_rows=1024):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.is_valid(rows[target]))
        for split in ("val", "train"):
            found = rows.filter(pc.equal(rows["split"], split))
            counts[split] += len(found)
            kept[split] = smallest_ids(kept.get(split), found, limit)
    return kept, counts


def smallest_ids(kept: pa.Table | None, found: pa.Table, limit: int) -> pa.Table:
    """Of both, the ``limit`` rows with the smallest ids: ids are hashes, so that is a sample that stays the same."""
    together = found if kept is None else pa.concat_tables([kept, found])
    return together.sort_by("image_id").slice(0, limit)


def _originals(rows: pa.Table, target: Target, device: str) -> "Iterator[Originals]":
    """One at a time."""
    import torch

    for number in range(len(rows)):
        row = rows.slice(number, 1)
        values: dict[str, Any] = decode_targets(row, [target])
        yield Originals(
            images=to_float(torch.from_numpy(stack(row["image"].to_pylist())).to(device)),
            ids=tuple(row["image_id"].to_pylist()),
            labels=tuple(values["label"]) if target == "label" else (),
            depth=torch.from_numpy(values["depth"]).to(device) if target == "depth" else None,
            mask=torch.from_numpy(values["mask"]).to(device).long() if target == "mask" else None,
        )


def save_gallery(judge: Judge, images: ImageSet, limit: int, folder: str, device: str) -> int:
    """Write ids and embeddings of at most ``limit`` originals into ``folder``; returns how many."""
    import torch
    from safetensors.torch import save_file

    kept: pa.Table | None = None
    for batch in read_batches(images.table_uri, columns=["image_id", "image"], batch_rows=1024):
        kept = smallest_ids(kept, pa.Table.from_batches([batch]), limit)
    assert kept is not None
    pixels = (to_float(torch.from_numpy(stack([png]))).to(device) for png in kept["image"].to_pylist())
    embeddings = torch.cat([unit(ask(judge, one)["features"]).cpu() for one in pixels])
    save_file({"embeddings": embeddings}, Path(folder) / "gallery.safetensors")
    Path(folder, "gallery.json").write_text(json.dumps(kept["image_id"].to_pylist()))
    return len(embeddings)
