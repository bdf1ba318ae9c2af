"""Running the tokenizer over pixels that the pipeline has not stored anything of.

Legend: N images, K budgets, B batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from components.config import RuleConfig
from components.images import to_float
from components.rules import OVER_THE_SET, build_rule, describe, searched

if TYPE_CHECKING:
    from torch import Tensor

    from model import AlitTokenizer

Choose = Callable[[np.ndarray], np.ndarray]


def batches(pixels: np.ndarray, size: int, tokenizer: "AlitTokenizer") -> "Iterator[Tensor]":
    """uint8 [N, 3, H, W] as float32 [B, 3, H, W] in [0, 1] where the tokenizer is."""
    import torch

    device = next(tokenizer.parameters()).device
    for start in range(0, len(pixels), size):
        yield to_float(torch.from_numpy(pixels[start : start + size]).to(device))


def measured(tokenizer: "AlitTokenizer", pixels: np.ndarray, metric: str, batch_size: int) -> np.ndarray:
    """A metric of pixels at every budget, float64 [N, K], of images uint8 [N, 3, H, W]."""
    import torch

    from model.metrics import METRICS

    rows = []
    with torch.inference_mode():
        for images in batches(pixels, batch_size, tokenizer):
            values = [METRICS[metric](images, step.images.clamp(0, 1)) for step in tokenizer.rollout(images)]
            rows.append(torch.stack(values, dim=1).double().cpu().numpy())
    return np.concatenate(rows)


def chooser(rule: RuleConfig, *, budgets: Sequence[int]) -> Choose:
    """Counts int64 [N] by ``rule`` for values [N, K]; a predicted rule as the threshold it stands for.

    Raises ValueError for a rule that weighs images against each other: there it has no meaning for other images.
    """
    if rule.kind == OVER_THE_SET:
        raise ValueError(f"rule {describe(rule)!r}: it chooses for a whole set at once")
    built = build_rule(searched(rule) if rule.kind == "predicted" else rule)
    return lambda values: np.asarray(built.select(values, budgets).num_tokens)
