"""AdamW as the paper uses it, its learning rate, and the moving average of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from components.config import OptimizerConfig
from components.train.parallel import like

TABLES = ("codebook", "class_token", "mask_token", "latent_tokens", "positions", "rollout_embedding")


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay; norms, biases, tokens, positions and codebooks don't.

    The authors decay everything that is not one-dimensional, tokens and codebook included.
    """
    flat = {name for name, p in parameters.items() if p.ndim < 2 or any(word in name for word in TABLES)}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in flat], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name in flat], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1.0, betas=config.betas, fused=True)


def learning_rate(step: int, num_steps: int, settings: OptimizerConfig, batch_size: int) -> float:
    """The rate of ``step`` (from 0): linear warm-up, then half a cosine that reaches min_lr where ``num_steps`` end."""
    peak = settings.lr if settings.lr is not None else settings.base_lr * batch_size / 256
    warmup = min(settings.warmup_steps, num_steps // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return settings.min_lr + (peak - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """An exponential moving average of parameters. Early on it follows faster, so that fresh weights are soon gone."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [self.values[name] for name in self.parameters]
        torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take ``values``, of whole tensors, as the average."""
        for name, average in self.values.items():
            average.copy_(like(values[name], average))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block the model has the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters(self.values)
        try:
            yield
        finally:
            self.copy_to_parameters(kept)

    @torch.no_grad()
    def copy_to_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set the model's parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
