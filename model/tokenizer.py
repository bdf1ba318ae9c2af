"""The public door: images to as many tokens as they need, and back.

Legend: B batch, K budgets, L latents, D numbers in a latent, E base channels, G = h * w grid tokens, O head outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.base import build_base
from model.blocks import initialise
from model.config import AlitConfig
from model.distill import GridDecoder, LatentEncoder
from model.files import SkipRandomWeights, load_folder, save_folder
from model.inference import Precision, prepare_for_inference
from model.local_start import start_locally
from model.metrics import METRICS
from model.predicted import PredictedThreshold
from model.quantizer import Continuous, VectorQuantizer
from model.rollout import HaltingNoise, Rollout, RolloutStep
from model.selection import FixedTokens, MeanTokens, Rule
from model.singly import image_by_image
from model.tokens import TokenBatch

FORMAT = "alit-tokenizer"
FORMAT_VERSION = 1
PIXELS_AT_ONCE = 2**20  # of images that convolutions take at once: feature maps are some 2 KB a pixel


class AlitTokenizer(nn.Module):
    """Adaptive-length image tokenizer by recurrent allocation (arXiv 2411.02393)."""

    def __init__(self, config: AlitConfig, *, filled: bool = True) -> None:
        """Fresh weights; ``filled`` False leaves what is in memory, see :meth:`unfilled`."""
        super().__init__()
        self.config = config
        self.precision: Precision = "fp32"
        self.base = build_base(config.base)
        self.encoder = LatentEncoder(config)
        self.decoder = GridDecoder(config, self.base.output_dim)
        if filled:
            initialise(self.encoder)
            initialise(self.decoder)
            if config.init == "local":
                start_locally(self.encoder, self.decoder, config)
        self.quantizer: VectorQuantizer | Continuous = Continuous()
        if config.codebook_size is not None:
            self.quantizer = VectorQuantizer(config.codebook_size, config.channels_per_latent)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Token counts after each rollout, increasing."""
        return self.config.budgets

    def rollout(
        self,
        images: Tensor,
        *,
        features: Tensor | None = None,
        posterior_noise: Tensor | None = None,
        halting_noise: Sequence[Tensor] | torch.Generator | None = None,
    ) -> Rollout:
        """Iterate over the budgets: one :class:`RolloutStep` each, and nothing computed that is not asked for.

        ``images``: float32 [B, 3, H, W] in [0, 1]; raises ValueError when the shape does not fit ``config.image_size``.
        ``features``: [B, E, h, w] of the base's grid, where they are known (``base.encode``): its encoder doesn't run.
        ``posterior_noise``: [B, E, h, w], a sample of a VAE's posterior instead of its mode. ``halting_noise``: uniform
        numbers in [0, 1), one [B, G] a rollout, or a generator of them; without it halting is deterministic.
        Stop iterating and no further rollout runs. Gradients flow where they are enabled.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.config.image_size:
            height, width = self.config.image_size
            raise ValueError(f"images have shape {tuple(images.shape)}: [B, 3, {height}, {width}] is needed")
        if isinstance(halting_noise, torch.Generator):
            noise = HaltingNoise(generator=halting_noise)
        else:
            noise = HaltingNoise(given=halting_noise)
        return Rollout(self, *self._embedded(images, features, posterior_noise), noise)

    def _embedded(self, images: Tensor, features: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image tokens [B, S, W] and targets."""
        if self._one_by_one(images):
            parts = image_by_image(self._embedded, self._at_once, images, features, noise)
            return torch.cat([tokens for tokens, _ in parts]), torch.cat([target for _, target in parts])
        grid = self.base.encode(images, noise) if features is None else self.base.grid(features)
        return self.encoder.image_tokens(images, grid.features_BEhw), grid.target.detach()

    def _one_by_one(self, batch: Tensor) -> bool:
        """Whether convolutions take images singly: on a CPU they round differently in a batch of another size.

        So an image's tokens don't depend on its company. Linear layers and attention round alike in any batch there;
        accelerators promise neither, and training wants the speed.
        """
        return not self.training and batch.device.type == "cpu" and len(batch) > 1

    @property
    def _at_once(self) -> int:
        """How many of those may go at once: at bf16 one, since there torch rounds differently with more threads."""
        return 1 if self.precision == "bf16" else PIXELS_AT_ONCE // math.prod(self.config.image_size)

    @torch.no_grad()
    def encode(self, images: Tensor, rule: Rule | PredictedThreshold | int) -> TokenBatch:
        """Each image's tokens at the count that ``rule`` chooses for it, alone.

        ``images``: float32 [B, 3, H, W] in [0, 1]. ``rule``: an int is a fixed budget. An image whose choice is settled
        leaves the batch, so it costs no further rollout; only rules that look at reconstructions have them decoded.
        Raises ValueError for a budget that isn't one and for MeanTokens, which weighs images against each other.
        """
        if isinstance(rule, MeanTokens):
            raise ValueError("rule MeanTokens chooses over a whole data set: select from its scores instead")
        rule = FixedTokens(rule) if isinstance(rule, int) else rule
        rollout = self.rollout(images)
        if not len(images):
            return TokenBatch.from_numpy([], self.config.codebook_size)
        if isinstance(rule, FixedTokens):
            blank = np.zeros((len(images), len(self.budgets)))
            return self._gathered(rollout, next(rollout), rule.select(blank, self.budgets).column)
        if isinstance(rule, PredictedThreshold):
            first = next(rollout)
            return self._gathered(rollout, first, rule.select(rule.predict(first), self.budgets).column)
        return self._measured(rollout, images, rule)

    def _gathered(self, rollout: Rollout, step: RolloutStep, column: NDArray[np.int64]) -> TokenBatch:
        """Counts are known: run each image's rollouts, decode nothing."""
        tokens = [np.zeros(0)] * len(column)
        rows = np.arange(len(column))
        while True:
            done = column[rows] == rollout.num_done - 1
            if done.any():
                finished = step.narrowed(_index(np.flatnonzero(done), step.hidden))
                for row, values in zip(rows[done], self._tokens(finished), strict=True):
                    tokens[row] = values
                rows = rows[~done]
                if not len(rows):
                    return TokenBatch.from_numpy(tokens, self.config.codebook_size)
                rollout.keep(_index(np.flatnonzero(~done), step.hidden))
            step = next(rollout)

    def _measured(self, rollout: Rollout, images: Tensor, rule: Rule) -> TokenBatch:
        """Counts depend on how well each budget reconstructs: decode and measure as far as the rule needs."""
        values = np.full((len(images), len(self.budgets)), np.nan, dtype=np.float32)
        tokens: list[list[NDArray[Any]]] = [[] for _ in range(len(images))]
        rows = np.arange(len(images))
        for step in rollout:
            column = rollout.num_done - 1
            if rule.reads_last or column < len(self.budgets) - 1:
                measured = METRICS[rule.metric](images, step.images.clamp(0, 1))
                values[rows, column] = measured.float().cpu().numpy()
            for row, latents in zip(rows, self._tokens(step), strict=True):
                tokens[row].append(latents)
            going_on = np.flatnonzero(~rule.settled(values[rows, : column + 1]))
            if not len(going_on):
                break
            if len(going_on) < len(rows):
                rollout.keep(_index(going_on, images))
                rows, images = rows[going_on], images[_index(going_on, images)]
        chosen = rule.select(values, self.budgets).column
        return TokenBatch.from_numpy(
            [steps[k] for steps, k in zip(tokens, chosen, strict=True)], self.config.codebook_size
        )

    def _tokens(self, step: RolloutStep) -> NDArray[Any]:
        """Codes [B, L], or float32 latents [B, L, D] when continuous, on the CPU."""
        tokens = step.latents.float() if step.codes is None else step.codes
        return tokens.cpu().numpy()

    @torch.no_grad()
    def decode(self, tokens: TokenBatch) -> Tensor:
        """Images float32 [N, 3, H, W], clamped to [0, 1], in the order of ``tokens``; equal counts go together.

        Raises ValueError when a count is above the largest budget or the tokens are of another kind of tokenizer.
        """
        if tokens.codebook_size != self.config.codebook_size:
            raise ValueError(
                f"tokens have codebook_size {tokens.codebook_size}, the tokenizer {self.config.codebook_size}"
            )
        if len(tokens) and not 1 <= tokens.num_tokens.min() <= tokens.num_tokens.max() <= self.budgets[-1]:
            raise ValueError(f"num_tokens {set(tokens.num_tokens.tolist())}: allowed is 1 to {self.budgets[-1]}")
        device = next(self.parameters()).device
        images = torch.empty(len(tokens), 3, *self.config.image_size, device=device)
        arrays = tokens.to_numpy()
        for count in np.unique(tokens.num_tokens):
            rows = np.flatnonzero(tokens.num_tokens == count)
            latents = self.latents(torch.from_numpy(np.stack([arrays[row] for row in rows])).to(device))
            images[torch.from_numpy(rows).to(device)] = self.grid_to_images(self.decoder(latents)).clamp(0, 1).float()
        return images

    def latents(self, values: Tensor) -> Tensor:
        """What the decoder reads for codes [B, L] (any integer type) or latents [B, L, D]."""
        if isinstance(self.quantizer, VectorQuantizer):
            return self.quantizer.lookup(values.long())
        return values.float()

    def grid_to_images(self, output_BGO: Tensor) -> Tensor:
        """The decoder's predictions to images [B, 3, H, W], not clamped."""
        if self._one_by_one(output_BGO):
            return torch.cat(image_by_image(self.grid_to_images, self._at_once, output_BGO))
        rows, columns = self.config.grid
        code_BGE = self.base.code(output_BGO)
        return self.base.decode(code_BGE.transpose(1, 2).reshape(len(code_BGE), -1, rows, columns))

    def halted(self, output_BGO: Tensor, target: Tensor, uniform_BG: Tensor | None) -> Tensor:
        """Which grid tokens stop, bool [B, G]."""
        threshold = self.config.halting.threshold
        if threshold is None:
            threshold = self.base.default_halting_threshold
        return self.base.halted(output_BGO, target, threshold, uniform_BG)

    def resized(self, image_size: tuple[int, int]) -> "AlitTokenizer":
        """A copy for images of another (height, width) in px, its grid positions interpolated (bicubic).

        Raises ValueError when the size is no multiple of the base's patch, or the precision is not fp32.
        """
        self._check_exact("resized")
        config = replace(self.config, image_size=image_size)
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        for name in ("encoder.positions", "decoder.positions"):
            state[name] = resize_positions(state[name], self.config.grid, config.grid)
        return self.with_weights(config, state).train(self.training)

    def _check_exact(self, what: str) -> None:
        if self.precision != "fp32":
            raise ValueError(f"{what}: precision = {self.precision!r} has rounded the weights, fp32 is needed")

    def save(self, folder: str | Path) -> None:
        """Write ``weights.safetensors`` and ``config.json`` (with the format's version) into ``folder``.

        Raises ValueError when it was loaded at another precision than fp32, which has rounded its weights.
        """
        self._check_exact("save")
        save_folder(folder, self.state_dict(), kind=FORMAT, version=FORMAT_VERSION, config=self.config.to_dict())

    @classmethod
    def load(
        cls, folder: str | Path, device: str | torch.device = "cpu", *, precision: Precision = "fp32"
    ) -> "AlitTokenizer":
        """The tokenizer saved in ``folder``, in eval mode.

        ``precision`` "bf16" or "int8" is faster where hardware has it, and changes some codes (``model/inference.py``).
        Raises ValueError for another or a newer format, and for "int8" on another device than a CPU.
        """
        config, weights = load_folder(folder, kind=FORMAT, version=FORMAT_VERSION)
        tokenizer = cls.with_weights(AlitConfig.from_dict(config), weights).eval()
        prepare_for_inference(tokenizer, precision, device)
        return tokenizer.to(device)

    @classmethod
    def with_weights(cls, config: AlitConfig, weights: Mapping[str, Tensor]) -> "AlitTokenizer":
        """A tokenizer that holds ``weights`` (names of ``state_dict``) themselves; torch raises when they don't fit."""
        tokenizer = cls.unfilled(config)
        tokenizer.load_state_dict(weights, assign=True)
        return tokenizer

    @classmethod
    def unfilled(cls, config: AlitConfig) -> "AlitTokenizer":
        """With whatever is in memory for weights: quick, for those that come with their own."""
        with SkipRandomWeights():
            return cls(config, filled=False)


def resize_positions(table_SW: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1 + h * w, W] (row 0: the class token's, kept) for another grid, interpolated per channel."""
    class_1W, grid_GW = table_SW[:1], table_SW[1:]
    picture = grid_GW.T.reshape(1, -1, *grid)
    shrinks = new_grid[0] < grid[0] or new_grid[1] < grid[1]
    resized = F.interpolate(picture.float(), size=new_grid, mode="bicubic", align_corners=False, antialias=shrinks)
    return torch.cat([class_1W, resized.to(table_SW.dtype).flatten(2)[0].T])


def _index(rows: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)
