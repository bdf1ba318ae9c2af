"""The recurrence: every rollout refines all tokens and adds latents (paper section 3).

Legend: B batch, G grid tokens, S = 1 + G image tokens, L latents so far, D numbers in a latent, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.blocks import ALL
from model.halting import draw_uniform
from model.quantizer import Quantized

if TYPE_CHECKING:
    from model.tokenizer import AlitTokenizer


class RolloutStep:
    """What one rollout yields. Everything past the hidden latents is computed when it is first asked for."""

    def __init__(self, tokenizer: "AlitTokenizer", hidden_BLW: Tensor, target: Tensor) -> None:
        self._tokenizer = tokenizer
        self.hidden = hidden_BLW  # the encoder's latents before norm, projection and quantization
        self.target = target  # of the base tokenizer: indices [B, G] or codes [B, G, E]
        self.num_tokens = hidden_BLW.shape[1]

    @cached_property
    def projected(self) -> Tensor:
        """Latents before quantization, [B, L, D]."""
        return self._tokenizer.encoder.to_latents(self.hidden)

    @cached_property
    def quantized(self) -> Quantized:
        """Latents, codes and the quantizer's loss."""
        return self._tokenizer.quantizer(self.projected)

    @property
    def latents(self) -> Tensor:
        """What the decoder reads: unit-length codebook entries, or continuous latents; float [B, L, D]."""
        return self.quantized.latents_BLD

    @property
    def codes(self) -> Tensor | None:
        """Codebook indices int64 [B, L]; None when continuous."""
        return self.quantized.codes_BL

    @cached_property
    def grid(self) -> Tensor:
        """The decoder's prediction: logits [B, G, K] for a VQGAN base, codes [B, G, E] for a VAE."""
        return self._tokenizer.decoder(self.latents)

    def decided_grid(self) -> Tensor:
        """The grid for a decision: without gradient, and where it wasn't asked for before, leaving nothing behind."""
        if "grid" in self.__dict__ or not torch.is_grad_enabled():
            return self.grid.detach()
        with torch.no_grad():
            return RolloutStep(self._tokenizer, self.hidden, self.target).grid

    def apart(self, hidden_BLW: Tensor) -> "RolloutStep":
        """The same step from ``hidden`` of one's own, for another graph."""
        return RolloutStep(self._tokenizer, hidden_BLW, self.target)

    def narrowed(self, rows: Tensor) -> "RolloutStep":
        """The same step for some images (int64 [b]) of the batch, with the grid if it was computed."""
        step = RolloutStep(self._tokenizer, self.hidden[rows], self.target[rows])
        if "grid" in self.__dict__:
            step.grid = self.grid[rows]
        return step

    @cached_property
    def images(self) -> Tensor:
        """Reconstructions [B, 3, H, W] as the base decodes them: nominally [0, 1], not clamped."""
        return self._tokenizer.grid_to_images(self.grid)


@dataclass(frozen=True)
class HaltingNoise:
    """Where the uniform numbers of the halting draw come from; with neither, halting is deterministic."""

    given: Sequence[Tensor] | None = None  # one [B, G] in [0, 1) a rollout
    generator: torch.Generator | None = None

    def draw(self, rollout: int, rows: Tensor, num_grid: int) -> Tensor | None:
        """Uniforms [b, G] for the images ``rows`` (int64 [b]) of the batch after ``rollout``."""
        if self.given is not None:
            return self.given[rollout][rows]
        if self.generator is not None:
            return draw_uniform((len(rows), num_grid), self.generator, rows.device)
        return None


class Rollout(Iterator[RolloutStep]):
    """Iterator over the rollouts of a batch; :meth:`keep` drops images that need no more of them."""

    def __init__(
        self, tokenizer: "AlitTokenizer", image_tokens_BSW: Tensor, target: Tensor, noise: HaltingNoise
    ) -> None:
        self._tokenizer = tokenizer
        self._noise = noise
        self._rows = torch.arange(len(target), device=target.device)  # of the batch, those that are still here
        self._target = target
        self._x = image_tokens_BSW
        self._previous: RolloutStep | None = None
        self.num_done = 0

    def keep(self, rows: Tensor) -> None:
        """Go on with only these rows (int64 [b]) of the last step."""
        self._rows, self._target, self._x = self._rows[rows], self._target[rows], self._x[rows]
        if self._previous is not None and self._tokenizer.config.halting.enabled:
            self._previous = self._previous.narrowed(rows)

    def __next__(self) -> RolloutStep:
        """Run one more rollout; StopIteration after the last budget."""
        config, encoder = self._tokenizer.config, self._tokenizer.encoder
        rollout = self.num_done
        if rollout == len(config.budgets):
            raise StopIteration
        if config.halting.enabled and self._previous is not None:
            self._x = encoder.masked(self._x, self._halted(self._previous, rollout - 1))
        added = encoder.new_latents(rollout, config.steps[rollout], len(self._x))
        x = torch.cat([self._x, added.to(self._x.dtype)], dim=1)
        self.num_done += 1
        latents = slice(-config.budgets[rollout], None)
        wanted = latents if self.num_done == len(config.budgets) else ALL  # nothing follows the last rollout
        self._x = encoder(encoder.norm_in(x) if rollout == 0 else encoder.norm_rollout(x), wanted)
        self._previous = RolloutStep(self._tokenizer, self._x[:, latents], self._target)
        return self._previous

    def _halted(self, step: RolloutStep, rollout: int) -> Tensor:
        """Which grid tokens stop after ``rollout``; no gradient flows through the decision."""
        grid = step.decided_grid()
        uniform = self._noise.draw(rollout, self._rows, grid.shape[1])
        return self._tokenizer.halted(grid, self._target, uniform)
