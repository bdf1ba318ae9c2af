"""Dynamic halting: which 2D tokens need no more processing (paper section 3, "dynamic halting"). Pure functions.

Legend: B batch, G grid tokens, K codebook entries, E channels of a code.
"""

import torch
from torch import Tensor


def halt_by_probability(probability_BG: Tensor, threshold: float, uniform_BG: Tensor | None) -> Tensor:
    """For indices: a token whose true index has probability p halts when p >= threshold and, in training, u < p.

    ``uniform_BG`` in [0, 1) makes the authors' Bernoulli draw explicit; None is the deterministic rule of inference,
    which halts every token that reaches the threshold. Returns bool [B, G].
    """
    enough = probability_BG >= threshold
    return enough if uniform_BG is None else enough & (uniform_BG < probability_BG)


def halt_by_error(code_BGE: Tensor, target_BGE: Tensor, threshold: float) -> Tensor:
    """For codes: a token whose mean absolute error is below ``threshold`` halts. Returns bool [B, G].

    The authors' code means this and never does it (it fills a copy of the mask).
    """
    return (code_BGE - target_BGE).abs().mean(-1) < threshold


def true_probability(logits_BGK: Tensor, indices_BG: Tensor) -> Tensor:
    """Probability that the softmax of ``logits_BGK`` gives to each true index, float32 [B, G]."""
    return logits_BGK.float().softmax(-1).gather(-1, indices_BG.unsqueeze(-1)).squeeze(-1)


def draw_uniform(shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniforms in [0, 1) from ``generator``, drawn on its own device so that a CPU seed gives the same everywhere."""
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
