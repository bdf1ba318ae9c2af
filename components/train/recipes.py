"""How each training stage builds, evaluates and saves what it trains.

A further stage is one more :class:`Recipe` and one more function in stages.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from components.artifacts import Artifact, BaseTokenizer
from components.config import BaseStageConfig, DistillStageConfig
from components.images import to_float
from model import AlitTokenizer
from model.base import build_base
from model.base.files import load_base, save_base
from model.metrics import METRICS
from model.objectives import BaseObjective, DistillObjective

EVAL_BATCH = 32


@dataclass(frozen=True)
class Recipe:
    """The three places where stages differ."""

    build: Callable[[Any, Mapping[str, Artifact], str | None], Any]  # (stage config, inputs, start) -> objective
    evaluate: Callable[[Any, Tensor], dict[str, float]]  # (objective, uint8 images) -> named values
    save: Callable[[Any, Any, str], None]  # (objective, stage config, folder)


def build_base_objective(config: BaseStageConfig, inputs: Mapping[str, Artifact], start: str | None) -> BaseObjective:
    """A fresh base, or that of the tokenizer in folder ``start``."""
    base = AlitTokenizer.load(start).base if start else build_base(config.base)
    if base.config != config.base:
        raise ValueError(f"training.from: the base in {start} is {base.config}, the config asks for {config.base}")
    return BaseObjective(base.train(), config.objective)


def build_distill_objective(
    config: DistillStageConfig, inputs: Mapping[str, Artifact], start: str | None
) -> DistillObjective:
    """A fresh tokenizer around the trained base, or the one in folder ``start`` with that base."""
    tokenizer = AlitTokenizer.load(start) if start else AlitTokenizer(config.tokenizer)
    if tokenizer.config != config.tokenizer:
        found = f"the tokenizer in {start} is {tokenizer.config}"
        raise ValueError(f"training.from: {found}, the config asks for {config.tokenizer}")
    base = inputs["base"]
    assert isinstance(base, BaseTokenizer)
    tokenizer.base.load_state_dict(load_base(base.uri).state_dict())
    return DistillObjective(tokenizer.train(), config.objective)


def evaluate_base(objective: BaseObjective, images: Tensor) -> dict[str, float]:
    """Held-out L1 and PSNR through the base's own bottleneck."""
    totals = {"l1": 0.0, "psnr": 0.0}
    for part in images.split(EVAL_BATCH):
        pixels = to_float(part)
        restored = objective.base.autoencode(pixels, None).images.clamp(0, 1)
        for name in totals:
            totals[name] += METRICS[name](pixels, restored).sum().item()
    return {f"val/{name}": total / len(images) for name, total in totals.items()}


def evaluate_tokenizer(objective: DistillObjective, images: Tensor) -> dict[str, float]:
    """Held-out L1 at every budget, and how many codes are used."""
    tokenizer = objective.tokenizer
    totals = dict.fromkeys(tokenizer.budgets, 0.0)
    used: list[Tensor] = []
    for part in images.split(EVAL_BATCH):
        pixels = to_float(part)
        for step in tokenizer.rollout(pixels):
            totals[step.num_tokens] += METRICS["l1"](pixels, step.images.clamp(0, 1)).sum().item()
            if step.codes is not None:
                used.append(step.codes.unique())
    values = {f"val/l1@{budget}": total / len(images) for budget, total in totals.items()}
    if used and tokenizer.config.codebook_size:
        values["val/codes_used"] = len(torch.cat(used).unique()) / tokenizer.config.codebook_size
    return values


def save_base_tokenizer(objective: BaseObjective, config: BaseStageConfig, folder: str) -> None:
    """The artifact of the base stage."""
    save_base(objective.base, config.base, Path(folder))


def save_tokenizer(objective: DistillObjective, config: DistillStageConfig, folder: str) -> None:
    """The artifact of the distill stage."""
    objective.tokenizer.save(folder)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "base": Recipe(build_base_objective, evaluate_base, save_base_tokenizer),
        "distill": Recipe(build_distill_objective, evaluate_tokenizer, save_tokenizer),
    }
)
