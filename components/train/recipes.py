"""How each training stage builds, evaluates and saves what it trains.

A further stage is one more :class:`Recipe` and one more function in stages.py.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.artifacts import Artifact, BaseTokenizer
from components.config import (
    BaseStageConfig,
    DistillStageConfig,
    FinetuneStageConfig,
    OptimizerConfig,
    StageTraining,
)
from components.images import to_float, to_uint8
from components.judges.efficientnet import SIZE_PX
from components.judges.probe import Probe, ProbeConfig, ProbeObjective
from components.store import local_folder
from components.task_config import JudgeStageConfig
from components.train.data import Batch
from model import AlitTokenizer
from model.base import build_base
from model.base.files import load_base, save_base
from model.finetune import FinetuneObjective
from model.metrics import METRICS
from model.objectives import BaseObjective, DistillObjective, Objective, Turn
from model.starter import model_folder

EVAL_BATCH = 32


def no_rivals(_: Any) -> dict[str, OptimizerConfig]:
    """The model is the only player."""
    return {}


@dataclass(frozen=True)
class Recipe:
    """The places where stages differ."""

    build: Callable[[Any, Mapping[str, Artifact], str | None], Objective]  # (stage config, inputs, start)
    evaluate: Callable[[Any, Batch], dict[str, float]]  # (objective, held-out images) -> sums over them, by name
    save: Callable[[Any, Any, str], None]  # (objective, stage config, folder)
    scores: tuple[str, ...]  # held-out figures whose names begin so are errors: the mean of the first there are counts
    pictures: Callable[[Any, Tensor], list[np.ndarray]] | None = (
        None  # (objective, uint8 images) -> uint8 [H, W, 3] each
    )
    rivals: Callable[[Any], dict[str, OptimizerConfig]] = no_rivals  # stage config -> the other players' optimizers
    goes_on: bool = False  # begins with trained weights, so their figures are worth knowing
    crops: bool = True  # random resized crop and mirroring, the paper's augmentation; targets are not cropped with them
    targets: tuple[str, ...] = ()  # columns of the ImageSet that the objective learns from: label, depth, mask


def build_base_objective(config: BaseStageConfig, inputs: Mapping[str, Artifact], start: str | None) -> BaseObjective:
    """A fresh base, or that of the tokenizer in folder ``start``."""
    base = _load(start).base if start else build_base(config.base)
    if base.config != config.base:
        raise ValueError(f"training.from: the base in {start} is {base.config}, the config asks for {config.base}")
    return BaseObjective(base.train(), config.objective)


def build_distill_objective(
    config: DistillStageConfig, inputs: Mapping[str, Artifact], start: str | None
) -> DistillObjective:
    """A fresh tokenizer around the trained base, or the one in folder ``start`` with that base."""
    tokenizer = _load(start) if start else AlitTokenizer(config.tokenizer)
    if tokenizer.config != config.tokenizer:
        found = f"the tokenizer in {start} is {tokenizer.config}"
        raise ValueError(f"training.from: {found}, the config asks for {config.tokenizer}")
    base = inputs["base"]
    assert isinstance(base, BaseTokenizer)
    with local_folder(base.uri) as folder:
        tokenizer.base.load_state_dict(load_base(folder).state_dict())
    return DistillObjective(tokenizer.train(), config.objective)


def build_finetune_objective(
    config: FinetuneStageConfig, inputs: Mapping[str, Artifact], start: str | None
) -> FinetuneObjective:
    """The distilled tokenizer and fresh discriminators."""
    distilled = inputs["distilled"]
    return FinetuneObjective(_load(distilled.uri).train(), config.objective)


def _load(uri: str) -> AlitTokenizer:
    with local_folder(model_folder(uri)) as folder:
        return AlitTokenizer.load(folder).to(memory_format=torch.contiguous_format)  # FSDP takes no other


def build_probe_objective(
    config: JudgeStageConfig, inputs: Mapping[str, Artifact], start: str | None
) -> ProbeObjective:
    """A fresh head on the frozen backbone."""
    options, target = config.options, config.target
    assert target is not None
    outputs = {"label": len(config.labels), "depth": 1, "mask": options.num_classes or 0}[target]
    classes = tuple((label,) for label in config.labels)
    made = Probe.fresh(ProbeConfig(target, outputs, options.size or SIZE_PX, classes))
    return ProbeObjective(made.train(), options.ignore)


def evaluate_base(objective: BaseObjective, unseen: Batch) -> dict[str, float]:
    """L1 and PSNR through the base's own bottleneck."""
    sums = {"l1": 0.0, "psnr": 0.0}
    for part in unseen.images.split(EVAL_BATCH):
        pixels = to_float(part)
        restored = objective.base.autoencode(pixels, None).images.clamp(0, 1)
        for name in sums:
            sums[name] += METRICS[name](pixels, restored).sum().item()
    return sums


def evaluate_tokenizer(objective: DistillObjective | FinetuneObjective, unseen: Batch) -> dict[str, float]:
    """L1 at every budget, and the perceptual distance where the objective has one."""
    distances = {"l1": METRICS["l1"]}
    if isinstance(objective, FinetuneObjective) and objective.perceptual is not None:
        distances["perceptual"] = objective.perceptual
    sums: Counter[str] = Counter()
    for part in unseen.images.split(EVAL_BATCH):
        pixels = to_float(part)
        for step in objective.tokenizer.rollout(pixels):
            restored = step.images.clamp(0, 1)
            for name, distance in distances.items():
                sums[f"{name}@{step.num_tokens}"] += distance(pixels, restored).sum().item()
    return dict(sums)


def evaluate_probe(objective: ProbeObjective, unseen: Batch) -> dict[str, float]:
    """The loss."""
    total = 0.0
    for start in range(0, len(unseen.images), EVAL_BATCH):
        rows = slice(start, start + EVAL_BATCH)
        turn = Turn(targets={name: values[rows] for name, values in unseen.targets.items()})
        images = to_float(unseen.images[rows])
        total += objective(images, torch.Generator(), turn).total.item() * len(images)
    return {"loss": total}


def draw_base(objective: BaseObjective, images: Tensor) -> list[np.ndarray]:
    """Each image beside its reconstruction."""
    pixels = to_float(images)
    return strips([pixels, objective.base.autoencode(pixels, None).images])


def draw_tokenizer(objective: DistillObjective | FinetuneObjective, images: Tensor) -> list[np.ndarray]:
    """Each image beside its reconstruction at every budget, the fewest tokens first."""
    pixels = to_float(images)
    return strips([pixels, *(step.images for step in objective.tokenizer.rollout(pixels))])


def strips(columns: Sequence[Tensor]) -> list[np.ndarray]:
    """Float [n, 3, H, W] columns in [0, 1] side by side, as n uint8 pictures [H, W, 3]."""
    return list(to_uint8(torch.cat([column.float() for column in columns], dim=3)))


def save_base_tokenizer(objective: BaseObjective, config: BaseStageConfig, folder: str) -> None:
    """The artifact of the base stage."""
    save_base(objective.base, config.base, Path(folder))


def save_tokenizer(objective: DistillObjective | FinetuneObjective, config: StageTraining, folder: str) -> None:
    """The artifact of the distill and the finetune stage."""
    objective.tokenizer.save(folder)


def save_probe(objective: ProbeObjective, config: JudgeStageConfig, folder: str) -> None:
    """What the stage of the judge goes on with."""
    objective.probe.save(folder)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "base": Recipe(build_base_objective, evaluate_base, save_base_tokenizer, ("l1",), draw_base),
        "distill": Recipe(build_distill_objective, evaluate_tokenizer, save_tokenizer, ("l1",), draw_tokenizer),
        "finetune": Recipe(
            build_finetune_objective,
            evaluate_tokenizer,
            save_tokenizer,
            ("perceptual", "l1"),
            draw_tokenizer,
            rivals=lambda config: {"discriminator": config.discriminator},
            goes_on=True,
        ),
        **{
            f"probe_{target}": Recipe(
                build_probe_objective, evaluate_probe, save_probe, ("loss",), crops=False, targets=(target,)
            )
            for target in ("label", "depth", "mask")
        },
    }
)
