"""What each training stage minimises and which parameters it trains. The models know nothing of losses.

Legend: B batch, G grid tokens, K codebook entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import BaseTokenizer
from model.config import BaseObjectiveConfig, DistillConfig
from model.early_backward import EarlyBackward
from model.local_start import fill_codebook
from model.quantizer import CodebookHealth, VectorQuantizer
from model.rollout import RolloutStep
from model.tokenizer import AlitTokenizer


@dataclass(frozen=True)
class Term:
    """One part of a loss, detached: its name, the budget it belongs to (None: the whole model), its mean."""

    name: str
    num_tokens: int | None
    value: Tensor


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise and what it is made of; ``made``: by rollout, the reconstructions it judged, detached."""

    total: Tensor
    terms: tuple[Term, ...]
    made: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """Whose move a call of an objective is, and what it may use.

    ``made``: reconstructions by rollout, from the player that moved before in this step. ``targets``: what the images'
    source says of them, by name (label, depth, mask), for objectives that learn from it, and ``grid``, the base's
    features float32 [B, E * h * w], where they are known.
    """

    player: str = "model"
    step: int = 0
    made: Mapping[int, Tensor] | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)


MODEL_TURN = Turn()
PREPARED = 16  # images at once, for their activations' sake


class Objective(nn.Module, ABC):
    """What a training stage minimises. Usually one player, the model; a game has more, each with its own optimizer.

    A training step is, for each of :meth:`players`, a call, backward, clip and step of that player's own optimizer.
    Under DDP ``average`` is set to a mean over the ranks, for what is not linear in the images. ``early`` lets a call
    run the backward pass of each rollout's decoder and losses itself (``model/early_backward.py``): not under FSDP,
    which gathers and scatters as one backward pass goes by, nor at fp16, where only a scaled loss has gradients.
    """

    health: CodebookHealth | None
    early = True

    def __init__(self) -> None:
        super().__init__()
        self.average: Callable[[Tensor], Tensor] = _same

    def players(self, step: int) -> tuple[str, ...]:
        """Who has a turn at ``step``, in order."""
        return ("model",)

    @abstractmethod
    def trainable(self, player: str = "model") -> dict[str, nn.Parameter]:
        """A player's parameters by name."""

    @abstractmethod
    def forward(self, images: Tensor, generator: torch.Generator, turn: Turn = MODEL_TURN) -> Loss:
        """Loss of one player's turn on images [B, 3, H, W] in [0, 1]; ``generator`` draws all that is random."""

    @property
    def partial(self) -> bool:
        """Whether a call may leave some of the trainable parameters without a gradient, which DDP must know."""
        return False

    @property
    def revive_every(self) -> int:
        """Steps between revivals of unused codes (see ``health``); 0 is never."""
        return 0

    def prepare(self, images: Tensor, generator: torch.Generator) -> None:
        """Before the first step of fresh weights."""

    def resting(self, step: int) -> tuple[str, ...]:
        """Prefixes of the trainable parameters that are left alone at ``step``."""
        return ()


def _same(x: Tensor) -> Tensor:
    return x


def train_only(objective: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Let gradients reach ``parameters`` alone, so that nothing is computed for what is frozen."""
    objective.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)


def sampled_rollouts(
    tokenizer: AlitTokenizer,
    images: Tensor,
    sampled: int | None,
    generator: torch.Generator,
    features: Tensor | None = None,
) -> Iterator[tuple[int, RolloutStep]]:
    """The rollouts that enter this step's loss: ``sampled`` different ones drawn anew, or all when that is None.

    ``generator`` draws them, then the halting. Rollouts after the last chosen one don't run.
    """
    number = len(tokenizer.budgets)
    chosen = set(range(number))
    if sampled is not None:
        chosen = set(torch.randperm(number, generator=generator, device=generator.device)[:sampled].tolist())
    halting = generator if tokenizer.config.halting.enabled else None
    for rollout, step in enumerate(tokenizer.rollout(images, features=features, halting_noise=halting)):
        if rollout in chosen:
            yield rollout, step
        if rollout == max(chosen):
            return


def latent_health(tokenizer: AlitTokenizer) -> CodebookHealth | None:
    """The health of the 1D codebook; None when the latents are continuous."""
    if isinstance(tokenizer.quantizer, VectorQuantizer):
        return CodebookHealth(tokenizer.quantizer.codebook, unit_length=True)
    return None


def unused_parameters(tokenizer: AlitTokenizer) -> tuple[str, ...]:
    """Beginnings of the names of what no loss can reach: the halting mask where nothing halts, and, with one rollout,
    the norm before the next.
    """
    single = len(tokenizer.budgets) == 1
    mask = () if tokenizer.config.halting.enabled and not single else ("tokenizer.encoder.mask_token",)
    return (*mask, "tokenizer.encoder.norm_rollout.") if single else mask


class BaseObjective(Objective):
    """Reconstruction through the base's own bottleneck."""

    def __init__(self, base: BaseTokenizer, config: BaseObjectiveConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config
        table = base.code_table()
        self.health = None if table is None else CodebookHealth(table, unit_length=False)

    @property
    def revive_every(self) -> int:
        """As the config has it."""
        return self.config.revive_every

    def trainable(self, player: str = "model") -> dict[str, nn.Parameter]:
        """Every parameter of the base, by name."""
        return dict(self.named_parameters())

    def forward(self, images: Tensor, generator: torch.Generator, turn: Turn = MODEL_TURN) -> Loss:
        """Loss of images [B, 3, H, W] in [0, 1]."""
        result = self.base.autoencode(images, generator)
        if self.training and self.health is not None and result.codes is not None:
            self.health.record(result.codes, result.latents_BGE)
        l1, mse = F.l1_loss(result.images, images), F.mse_loss(result.images, images)
        config = self.config
        total = config.l1_weight * l1 + config.mse_weight * mse + config.regulariser_weight * result.regulariser
        parts = {"l1": l1, "mse": mse, "regulariser": result.regulariser}
        return Loss(total, tuple(Term(name, None, value.detach()) for name, value in parts.items()))


class RolloutObjective(Objective):
    """What is minimised over the rollouts of a tokenizer."""

    tokenizer: AlitTokenizer

    def judged(
        self, rollouts: Iterator[tuple[int, RolloutStep]], judge: Callable[[int, RolloutStep], Loss]
    ) -> tuple[Tensor, list[Loss]]:
        """The sum of what ``judge`` finds for each of ``rollouts``, and each of them."""
        early = EarlyBackward(self.tokenizer.parameters()) if self.early and torch.is_grad_enabled() else None
        losses = list[Loss]()
        for rollout, step in rollouts:
            judged = step if early is None else step.apart(early.leaf(step.hidden))
            if self.training and self.health is not None and judged.codes is not None:
                self.health.record(judged.codes, judged.projected)
            loss = judge(rollout, judged)
            if early is not None:
                early.take(step.hidden, judged.hidden, loss.total)
                step.grid = judged.grid.detach()  # for halting
                loss = replace(loss, total=loss.total.detach())
            losses.append(loss)
        total = torch.stack([loss.total for loss in losses]).sum() if early is None else early.total()
        return total, losses


class DistillObjective(RolloutObjective):
    """Predict the frozen base's grid from the latents of every rollout."""

    def __init__(self, tokenizer: AlitTokenizer, config: DistillConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        self.health = latent_health(tokenizer)

    @property
    def partial(self) -> bool:
        """When the first rollout alone may be drawn: what only a second one uses has no gradient then."""
        return self.config.sampled_rollouts == 1 and len(self.tokenizer.budgets) > 1

    @property
    def revive_every(self) -> int:
        """As the config has it."""
        return self.config.revive_every

    def trainable(self, player: str = "model") -> dict[str, nn.Parameter]:
        """All but the base and what no loss can reach."""
        frozen = ("tokenizer.base.", *unused_parameters(self.tokenizer))
        return {name: p for name, p in self.named_parameters() if not name.startswith(frozen)}

    def resting(self, step: int) -> tuple[str, ...]:
        """At first everything but the decoder, when ``decoder_first_steps`` says so."""
        resting = step < self.config.decoder_first_steps
        return ("tokenizer.encoder.", "tokenizer.quantizer.") if resting else ()

    @torch.no_grad()
    def prepare(self, images: Tensor, generator: torch.Generator) -> None:
        """Before the first step of fresh weights: a local start takes its codebook from latents of real images."""
        quantizer = self.tokenizer.quantizer
        if self.tokenizer.config.init == "local" and isinstance(quantizer, VectorQuantizer):
            few = torch.split(images, PREPARED)
            parts = [[step.projected for step in self.tokenizer.rollout(part)] for part in few]
            latents = [torch.cat(of_rollout).flatten(0, 1) for of_rollout in zip(*parts, strict=True)]
            fill_codebook(quantizer, torch.cat(latents), generator)

    def forward(self, images: Tensor, generator: torch.Generator, turn: Turn = MODEL_TURN) -> Loss:
        """Loss of images [B, 3, H, W] in [0, 1]; ``generator`` draws the rollouts and the halting."""
        features, sampled = turn.targets.get("grid"), self.config.sampled_rollouts
        if features is not None:
            features = features.view(len(features), -1, *self.tokenizer.config.grid)
        rollouts = sampled_rollouts(self.tokenizer, images, sampled, generator, features)
        total, losses = self.judged(rollouts, partial(self._judged, images))
        return Loss(total, tuple(term for loss in losses for term in loss.terms))

    def _judged(self, images: Tensor, rollout: int, step: RolloutStep) -> Loss:
        """Loss of one rollout."""
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
