"""What a judge scores on originals, beside a constant answer; and the gallery of retrieval."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.artifacts import Figures, ImageSet, read_batches
from components.images import stack, to_float
from components.judges.judge import Judge, ask
from components.targets import decode_targets
from components.task_config import TASK_KINDS, JudgeStageConfig, Target
from components.tasks.classification import Classification, normal
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

    ``skill``: 0 for as good as the best constant answer (the commonest label, the median depth, the commonest class of
    a pixel, all of these very images), 1 for perfect. A ``note`` instead where nothing can be compared.
    """
    target = TASK_KINDS[config.kind].target if config.kind in SCORES else None
    if target is None:
        return {"note": "nothing to compare this judge with: it is asked about originals and reconstructions alike"}
    rows, split, with_target = _sample(images, target, config.options.eval_images)
    told: Figures = {f"{target}_train": with_target["train"], f"{target}_val": with_target["val"]}
    if not len(rows):
        return {"note": f"no image has a {target}: what this judge says can only be compared with itself", **told}
    task, (metric, name) = _task(judge, config), SCORES[config.kind]
    originals = list(_originals(rows, target, device))
    values = np.array([_measured(task, one, ask(judge, one.images), metric) for one in originals])
    usable = [one for one, value in zip(originals, values, strict=True) if not np.isnan(value)]
    if not usable:
        return {"note": f"none of {len(rows)} {target}s tried means anything to this judge", **told}
    constant = _constant(task, config, usable, metric)
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


def _constant(task: Task, config: JudgeStageConfig, originals: list[Originals], metric: str) -> float:
    """What the best constant answer scores."""
    import torch

    if config.kind == "classification":
        (_, most), *_ = Counter(normal(one.labels[0]) for one in originals).most_common(1)
        return most / len(originals)
    if config.kind == "depth":
        readings = torch.cat([one.depth[torch.isfinite(one.depth)] for one in originals if one.depth is not None])
        answers = {"depth": readings.median().view(1, 1, 1)}
    else:
        masks = torch.cat([one.mask.flatten() for one in originals if one.mask is not None])
        for ignored in config.options.ignore:
            masks = masks[masks != ignored]
        most_of_all = int(torch.bincount(masks[masks >= 0]).argmax())
        scores = torch.zeros(1, most_of_all + 1, 1, 1, device=masks.device)
        scores[0, most_of_all] = 1
        answers = {"segments": scores}
    return float(np.nanmean([_measured(task, one, answers, metric) for one in originals]))


def _sample(images: ImageSet, target: Target, limit: int) -> tuple[pa.Table, str, Counter[str]]:
    """Rows with a ``target``, of val where any is; which split they are of; how many there are in each."""
    kept: dict[str, pa.Table | None] = {"val": None, "train": None}
    counts: Counter[str] = Counter()
    for batch in read_batches(images.table_uri, columns=["image_id", "split", "image", target], batch_rows=1024):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.is_valid(rows[target]))
        for split in ("val", "train"):
            found = rows.filter(pc.equal(rows["split"], split))
            counts[split] += len(found)
            kept[split] = smallest_ids(kept[split], found, limit)
    split = "val" if counts["val"] else "train"
    rows = kept[split]
    assert rows is not None
    return rows, split, counts


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
