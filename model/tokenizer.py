"""The public door: images to as many tokens as they need, and back.

Legend: B batch, K budgets, L latents, D numbers in a latent, E base channels, G = h * w grid tokens, O head outputs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.base import build_base
from model.blocks import initialise
from model.config import AlitConfig
from model.distill import GridDecoder, LatentEncoder
from model.metrics import METRICS
from model.quantizer import Continuous, VectorQuantizer
from model.rollout import HaltingNoise, Rollout, RolloutStep
from model.selection import FixedTokens, Rule
from model.tokens import TokenBatch

FORMAT = "alit-tokenizer"
FORMAT_VERSION = 1


class AlitTokenizer(nn.Module):
    """Adaptive-length image tokenizer by recurrent allocation (arXiv 2411.02393)."""

    def __init__(self, config: AlitConfig) -> None:
        super().__init__()
        self.config = config
        self.base = build_base(config.base)
        self.encoder = LatentEncoder(config)
        self.decoder = GridDecoder(config, self.base.output_dim)
        initialise(self.encoder)
        initialise(self.decoder)
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
        posterior_noise: Tensor | None = None,
        halting_noise: Sequence[Tensor] | torch.Generator | None = None,
    ) -> Rollout:
        """Iterate over the budgets: one :class:`RolloutStep` each, and nothing computed that is not asked for.

        ``images``: float32 [B, 3, H, W] in [0, 1]; raises ValueError when the shape does not fit ``config.image_size``.
        ``posterior_noise``: [B, E, h, w], a sample of a VAE's posterior instead of its mode. ``halting_noise``: uniforms
        in [0, 1), one [B, G] a rollout, or a generator of them; without it halting is deterministic.
        Stop iterating and no further rollout runs. Gradients flow where they are enabled.
        """
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.config.image_size:
            height, width = self.config.image_size
            raise ValueError(f"images have shape {tuple(images.shape)}: [B, 3, {height}, {width}] is needed")
        drawn = isinstance(halting_noise, torch.Generator)
        noise = HaltingNoise(generator=halting_noise) if drawn else HaltingNoise(given=halting_noise)
        return Rollout(self, images, self.base.encode(images, posterior_noise), noise)

    @torch.no_grad()
    def encode(self, images: Tensor, rule: Rule | int) -> TokenBatch:
        """Each image's tokens at the count that ``rule`` chooses for it, alone.

        ``images``: float32 [B, 3, H, W] in [0, 1]. ``rule``: an int is a fixed budget. An image whose choice is settled
        leaves the batch, so it costs no further rollout; reconstructions are decoded only for rules that look at them.
        """
        if isinstance(rule, int):
            return self._encode_fixed(images, rule)
        values = np.full((len(images), len(self.budgets)), np.nan, dtype=np.float32)
        tokens: list[list[NDArray[Any]]] = [[] for _ in range(len(images))]
        rows = np.arange(len(images))
        rollout = self.rollout(images)
        while len(rows) and rollout.num_done < len(self.budgets):
            step = next(rollout)
            column = rollout.num_done - 1
            restored = step.images.clamp(0, 1)
            values[rows, column] = METRICS[rule.metric](images[rows], restored).float().cpu().numpy()
            for row, latents in zip(rows, self._tokens(step), strict=True):
                tokens[row].append(latents)
            going_on = np.flatnonzero(~rule.settled(values[rows, : column + 1]))
            rows = rows[going_on]
            rollout.keep(torch.from_numpy(going_on).to(images.device))
        column = rule.select(values, self.budgets).column
        return TokenBatch.from_list(
            [steps[k] for steps, k in zip(tokens, column, strict=True)], self.config.codebook_size
        )

    def _encode_fixed(self, images: Tensor, num_tokens: int) -> TokenBatch:
        FixedTokens(num_tokens).select(np.zeros((0, len(self.budgets))), self.budgets)  # raises when it is no budget
        for step in self.rollout(images):
            if step.num_tokens == num_tokens:
                break
        return TokenBatch.from_list(list(self._tokens(step)), self.config.codebook_size)

    def _tokens(self, step: RolloutStep) -> NDArray[Any]:
        """Codes [B, L], or float32 latents [B, L, D] when continuous, on the CPU."""
        tokens = step.latents.float() if step.codes is None else step.codes
        return tokens.cpu().numpy()

    @torch.no_grad()
    def decode(self, tokens: TokenBatch) -> Tensor:
        """Images float32 [N, 3, H, W], clamped to [0, 1], in the order of ``tokens``; equal counts are decoded together.

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
        return values

    def grid_to_images(self, output_BGO: Tensor) -> Tensor:
        """The decoder's predictions to images [B, 3, H, W], not clamped."""
        rows, columns = self.config.grid
        code_BGE = self.base.code(output_BGO)
        return self.base.decode(code_BGE.transpose(1, 2).unflatten(2, (rows, columns)))

    def halted(self, output_BGO: Tensor, target: Tensor, uniform_BG: Tensor | None) -> Tensor:
        """Which grid tokens stop, bool [B, G]."""
        threshold = self.config.halting.threshold
        if threshold is None:
            threshold = self.base.default_halting_threshold
        return self.base.halted(output_BGO, target, threshold, uniform_BG)

    def save(self, folder: str | Path) -> None:
        """Write ``weights.safetensors`` and ``config.json`` (with the format's version) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "weights.safetensors"
        )
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "config": self.config.to_dict()}
        (folder / "config.json").write_text(json.dumps(header, indent=2))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "AlitTokenizer":
        """The tokenizer saved in ``folder``, in eval mode; raises ValueError for another or a newer format."""
        folder = Path(folder)
        header = json.loads((folder / "config.json").read_text())
        if header.get("format") != FORMAT:
            raise ValueError(f"{folder}/config.json: format {header.get('format')!r}, {FORMAT!r} is needed")
        if header["format_version"] > FORMAT_VERSION:
            version = header["format_version"]
            raise ValueError(
                f"{folder}/config.json: format_version {version}; this software reads up to {FORMAT_VERSION}"
            )
        tokenizer = cls(AlitConfig.from_dict(header["config"]))
        tokenizer.load_state_dict(load_file(folder / "weights.safetensors"))
        return tokenizer.to(device).eval()
