"""What each training stage minimises and which parameters it trains. The models know nothing of losses.

Legend: B batch, G grid tokens, K codebook entries.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import BaseTokenizer
from model.rollout import RolloutStep
from model.tokenizer import AlitTokenizer

PAPER_ROLLOUT_WEIGHTS = (2.5, 2.0, 1.5, 1.25)  # of the first rollouts; 1 for those that follow


@dataclass(frozen=True)
class Term:
    """One part of a loss, detached: its name, the budget it belongs to (None: the whole model), its mean."""

    name: str
    num_tokens: int | None
    value: Tensor


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise and what it is made of."""

    total: Tensor
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class BaseObjectiveConfig:
    """Pixel losses of the base tokenizer's own training."""

    l1_weight: float = 1.0
    mse_weight: float = 1.0
    regulariser_weight: float = 1.0

    __pydantic_config__ = {"extra": "forbid"}


class BaseObjective(nn.Module):
    """Reconstruction through the base's own bottleneck."""

    def __init__(self, base: BaseTokenizer, config: BaseObjectiveConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter of the base, by name."""
        return dict(self.named_parameters())

    def forward(self, images: Tensor, generator: torch.Generator) -> Loss:
        """Loss of images [B, 3, H, W] in [0, 1]."""
        result = self.base.autoencode(images, generator)
        l1, mse = F.l1_loss(result.images, images), F.mse_loss(result.images, images)
        config = self.config
        total = config.l1_weight * l1 + config.mse_weight * mse + config.regulariser_weight * result.regulariser
        parts = {"l1": l1, "mse": mse, "regulariser": result.regulariser}
        return Loss(total, tuple(Term(name, None, value.detach()) for name, value in parts.items()))


@dataclass(frozen=True)
class DistillConfig:
    """Latent distillation (paper section 4, stage 1). Defaults are the paper's, but for the label smoothing.

    The authors build their criterion with smoothing 0.1 and then use its unsmoothed part; here it smooths when set.
    ``pixel_weight``: L1 of the images through the frozen base decoder; 0 in the paper's stage 1.
    ``sampled_rollouts``: how many rollouts, drawn anew each step, are decoded and enter the loss; None is all of them.
    """

    token_weight: float = 1.0
    label_smoothing: float = 0.0
    code_weight: float = 1.0
    quantizer_weight: float = 1.0
    pixel_weight: float = 0.0
    rollout_weights: tuple[float, ...] | None = None
    sampled_rollouts: int | None = None

    __pydantic_config__ = {"extra": "forbid"}

    def weight(self, rollout: int) -> float:
        """Weight of the token loss after ``rollout``."""
        weights = self.rollout_weights or PAPER_ROLLOUT_WEIGHTS
        return weights[rollout] if rollout < len(weights) else 1.0


class DistillObjective(nn.Module):
    """Predict the frozen base's grid from the latents of every rollout."""

    def __init__(self, tokenizer: AlitTokenizer, config: DistillConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config

    def trainable(self) -> dict[str, nn.Parameter]:
        """All but the base; the halting mask only where halting is on."""
        frozen = ["tokenizer.base."]
        if not self.tokenizer.config.halting.enabled:
            frozen.append("tokenizer.encoder.mask_token")
        return {name: p for name, p in self.named_parameters() if not name.startswith(tuple(frozen))}

    def forward(self, images: Tensor, generator: torch.Generator) -> Loss:
        """Loss of images [B, 3, H, W] in [0, 1]; ``generator`` draws the rollouts and the halting."""
        chosen = self._chosen(generator)
        total, terms = images.new_zeros(()), []
        halting = generator if self.tokenizer.config.halting.enabled else None
        for rollout, step in enumerate(self.tokenizer.rollout(images, halting_noise=halting)):
            if rollout in chosen:
                loss = self._step(images, rollout, step)
                total = total + loss.total
                terms.extend(loss.terms)
            if rollout == max(chosen):
                break
        return Loss(total, tuple(terms))

    def _chosen(self, generator: torch.Generator) -> set[int]:
        number = len(self.tokenizer.budgets)
        if self.config.sampled_rollouts is None:
            return set(range(number))
        order = torch.randperm(number, generator=generator, device=generator.device)
        return set(order[: self.config.sampled_rollouts].tolist())

    def _step(self, images: Tensor, rollout: int, step: RolloutStep) -> Loss:
        base, config = self.tokenizer.base, self.config
        token = base.distance(step.grid, step.target, config.label_smoothing).mean()
        parts = {"token": token, "quantizer": step.quantized.loss}
        total = config.weight(rollout) * config.token_weight * token + config.quantizer_weight * step.quantized.loss
        if step.target.dtype == torch.int64 and config.code_weight:  # for a VAE the token loss is the code loss
            parts["code"] = F.mse_loss(base.code(step.grid), base.target_code(step.target))
            total = total + config.code_weight * parts["code"]
        if config.pixel_weight:
            parts["pixel"] = F.l1_loss(step.images, images)
            total = total + config.pixel_weight * parts["pixel"]
        return Loss(total, tuple(Term(name, step.num_tokens, value.detach()) for name, value in parts.items()))
