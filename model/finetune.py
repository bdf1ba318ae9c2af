"""Finetuning of the whole tokenizer against a discriminator (paper section 4, stage 2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.discriminator import PatchDiscriminator
from model.losses import adaptive_weight, hinge_discriminator, hinge_generator, lecam_penalty, r1_penalty
from model.objectives import (
    MODEL_TURN,
    Loss,
    RolloutObjective,
    Term,
    Turn,
    latent_health,
    sampled_rollouts,
    unused_parameters,
)
from model.perceptual import build_perceptual
from model.recipes import FinetuneConfig
from model.rollout import RolloutStep
from model.tokenizer import AlitTokenizer

LECAM_DECAY = 0.99


class FinetuneObjective(RolloutObjective):
    """Photographs through the tokenizer, base included, against a discriminator: two players, each a turn a step.

    The discriminator's turn takes ``made`` of the model's loss, so that nothing is reconstructed twice::

        loss = objective(images, generator, Turn(step=step))
        loss = objective(images, generator, Turn("discriminator", step, loss.made))

    Only the player's :meth:`trainable` parameters receive gradients in its turn. (The authors' generator steps move the
    discriminators too, and come once in nine steps, where the code around them suggests eight in nine.)

    Under DDP: find_unused_parameters (the other player, and rollouts that weren't drawn, stay unused), generators in
    the same state on all ranks (so that all draw the same rollouts), and ``average`` set to a mean over the ranks.
    """

    lecam_means: Tensor
    partial = True  # the other player's stay without, and those of rollouts that weren't drawn

    def __init__(self, tokenizer: AlitTokenizer, config: FinetuneConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config
        number = len(tokenizer.budgets) if config.discriminators == "per_rollout" else 1
        self.discriminators = nn.ModuleList(
            PatchDiscriminator(config.discriminator_channels, config.discriminator_layers) for _ in range(number)
        )
        self.register_buffer("lecam_means", torch.zeros(number, 2))  # running means of real and fake logits
        self.perceptual = build_perceptual(config.perceptual)
        self.health = latent_health(tokenizer)

    def players(self, step: int) -> tuple[str, ...]:
        """The model, then the discriminator once it learns."""
        return ("model", "discriminator") if self.config.discriminator_learns(step) else ("model",)

    @property
    def revive_every(self) -> int:
        """As the config has it."""
        return self.config.revive_every

    def trainable(self, player: str = "model") -> dict[str, nn.Parameter]:
        """A player's parameters by name; the model's are all of the tokenizer but a VQGAN's codebook (as the paper)."""
        if player == "discriminator":
            return {name: p for name, p in self.named_parameters() if name.startswith("discriminators.")}
        table = self.tokenizer.base.code_table()
        codebook = None if table is None else table.weight
        unused = unused_parameters(self.tokenizer)
        own = {name: p for name, p in self.named_parameters() if name.startswith("tokenizer.")}
        return {name: p for name, p in own.items() if p is not codebook and not name.startswith(unused)}

    def forward(self, images: Tensor, generator: torch.Generator, turn: Turn = MODEL_TURN) -> Loss:
        """Loss of one player's turn on images [B, 3, H, W] in [0, 1]: a mean over the rollouts drawn.

        ``generator`` draws the rollouts and the halting. ``turn.made``: reconstructions by rollout for the
        discriminator's turn; None makes them anew.
        """
        if turn.player == "model":
            return self._model_turn(images, generator, self.config.adversarial_weight(turn.step))
        made = self._make(images, generator) if turn.made is None else turn.made
        return self._discriminator_turn(images, made)

    def _model_turn(self, images: Tensor, generator: torch.Generator, weight: float) -> Loss:
        judge = partial(self._judged, images, weight)
        rollouts = sampled_rollouts(self.tokenizer, images, self.config.sampled_rollouts, generator)
        total, losses = self.judged(rollouts, judge)
        return _mean(total, losses)

    def _judged(self, images: Tensor, weight: float, rollout: int, state: RolloutStep) -> Loss:
        """The model's loss at one rollout; ``weight``: of the adversarial part, 0 leaves the discriminator out."""
        config, parts = self.config, {"pixel": F.l1_loss(state.images, images)}
        reconstruction = config.pixel_weight * parts["pixel"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, state.images).mean()
            reconstruction = reconstruction + config.perceptual_weight * parts["perceptual"]
        parts["quantizer"] = state.quantized.loss
        total = reconstruction + config.quantizer_weight * parts["quantizer"]
        if weight:
            discriminator = self._discriminator(rollout)
            with _frozen(discriminator):
                parts["adversarial"] = hinge_generator(discriminator(state.images))
            adversarial = weight * parts["adversarial"]
            if config.adaptive and total.requires_grad:
                last = self.tokenizer.base.last_layer
                parts["adaptive"] = adaptive_weight(reconstruction, parts["adversarial"], last, self.average)
                adversarial = parts["adaptive"] * adversarial
            total = total + adversarial
        return replace(_loss(total, parts, state.num_tokens), made={rollout: state.images.detach()})

    def _discriminator_turn(self, images: Tensor, made: Mapping[int, Tensor]) -> Loss:
        config = self.config
        if config.r1_weight:
            images = images.detach().requires_grad_(True)
        losses = []
        for rollout, fakes in made.items():
            discriminator = self._discriminator(rollout)
            real, fake = discriminator(images), discriminator(fakes.detach())
            parts = {"discriminator": hinge_discriminator(real, fake)}
            total = parts["discriminator"]
            if config.r1_weight:
                parts["r1"] = r1_penalty(real, images)
                total = total + config.r1_weight * parts["r1"]
            if config.lecam_weight:
                parts["lecam"] = self._lecam(rollout, real, fake)
                total = total + config.lecam_weight * parts["lecam"]
            parts |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
            losses.append(_loss(total, parts, self.tokenizer.budgets[rollout]))
        return _mean(torch.stack([loss.total for loss in losses]).sum(), losses)

    def _lecam(self, rollout: int, real: Tensor, fake: Tensor) -> Tensor:
        row = self.lecam_means[rollout % len(self.lecam_means)]
        mean_real, mean_fake = row.clone()
        if self.training:
            row.lerp_(torch.stack([real.mean(), fake.mean()]).detach().float(), 1 - LECAM_DECAY)
        return lecam_penalty(real, fake, mean_real, mean_fake)

    @torch.no_grad()
    def _make(self, images: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
        rollouts = sampled_rollouts(self.tokenizer, images, self.config.sampled_rollouts, generator)
        return {rollout: state.images for rollout, state in rollouts}

    def _discriminator(self, rollout: int) -> nn.Module:
        return self.discriminators[rollout % len(self.discriminators)]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for the parameters of ``module`` from what is computed inside; those of its input still flow."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _loss(total: Tensor, parts: Mapping[str, Tensor], num_tokens: int) -> Loss:
    return Loss(total, tuple(Term(name, num_tokens, value.detach()) for name, value in parts.items()))


def _mean(total: Tensor, losses: list[Loss]) -> Loss:
    """Of losses that sum up to ``total``."""
    made = {rollout: images for loss in losses for rollout, images in loss.made.items()}
    return Loss(total / len(losses), tuple(term for loss in losses for term in loss.terms), made)
