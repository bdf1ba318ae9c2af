"""Where the decoder's grid tokens look: attention weights that a hook sees, worked out again beside the model.

The model's attention is fused and gives no weights, so a forward hook keeps what went into each attention module of
the decoder and softmax(Q K^T / sqrt(d)) is made from that here; no forward of the model knows of it.

Legend: B batch, H heads, T tokens of the decoder's sequence (class, grid, latents), G grid tokens, L latents, W width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model import AlitTokenizer
    from model.blocks import Attention

HALF = 0.5


@contextmanager
def attention_inputs(module: "nn.Module") -> "Iterator[dict[Attention, Tensor]]":
    """What went into each attention module below ``module`` at its last call, [B, T, W], while the block lasts."""
    from model.blocks import Attention

    seen: dict[Attention, Tensor] = {}

    def keep(attention: Attention, given: tuple[Any, ...], _: "Tensor") -> None:
        seen[attention] = given[0].detach()

    hooks = [part.register_forward_hook(keep) for part in module.modules() if isinstance(part, Attention)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def weights(attention: "Attention", x_BTW: "Tensor") -> "Tensor":
    """The attention weights for an input, float32 [B, H, T, T]; each row sums to 1."""
    q, k, _ = attention.heads(x_BTW)
    return (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def latent_maps(tokenizer: "AlitTokenizer", latents_BLD: "Tensor") -> "Tensor":
    """Who reads each latent: its share of the attention of every grid token, float32 [B, L, G], a map's sum 1.

    The mean over heads and layers of what grid token g gives latent l, divided by the sum over the grid.
    """
    import torch

    num_grid = tokenizer.config.grid[0] * tokenizer.config.grid[1]
    with torch.inference_mode(), attention_inputs(tokenizer.decoder) as seen:
        tokenizer.decoder(latents_BLD)
        layers = [weights(module, x)[:, :, 1 : 1 + num_grid, 1 + num_grid :].mean(1) for module, x in seen.items()]
    read_BLG = torch.stack(layers).mean(0).transpose(1, 2)
    return read_BLG / read_BLG.sum(-1, keepdim=True)


def entropy(maps: np.ndarray) -> np.ndarray:
    """Entropy of maps [..., G] in units of a uniform map's: 1 is spread evenly, 0 is one cell; [...]."""
    logs = np.log(maps, out=np.zeros_like(maps), where=maps > 0)
    return -(maps * logs).sum(-1) / np.log(maps.shape[-1])


def half_mass_area(maps: np.ndarray) -> np.ndarray:
    """Least share of the cells that hold half of the mass of maps [..., G]: 0.5 for a uniform map; [...]."""
    return _needed(maps) / maps.shape[-1]


def _needed(maps: np.ndarray) -> np.ndarray:
    """How many cells, the strongest first, make up half of the mass."""
    mass = np.cumsum(-np.sort(-maps, axis=-1), axis=-1)
    return 1 + (mass < HALF * (1 - 1e-6)).sum(-1)


def strongest_cells(maps: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """The ``number`` cells where each of the maps [..., G] is largest, bool as the maps."""
    rank = np.argsort(np.argsort(-maps, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < number


def half_mass_cells(maps: np.ndarray) -> np.ndarray:
    """The cells that hold half of the mass, the strongest first, bool as maps [..., G]."""
    return strongest_cells(maps, _needed(maps)[..., None])
