"""A start in which latents already mean something: attention biased to position, content passed through.

From the paper's start a small model first has to find out that latents carry anything at all: at random weights 99 % of
what a latent says is its own index, all images get the same codes, and the decoder learns to ignore them. Here every
latent has a home on the grid; encoder latents look at the grid tokens near home and take over their base features,
grid queries of the decoder look at the latents near them. Architecture and training are the paper's.

The width is divided into: content (the base's channels), the key and the query half of a code of position, and two
numbers, ``rest`` and ``anchor``, by which a token that has nothing to fetch looks at the class token, which has nothing
to give.

Legend: W width, E content, P numbers in a code of position, N tokens, d width of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import Attention
from model.config import AlitConfig
from model.distill import GridDecoder, LatentEncoder
from model.quantizer import VectorQuantizer

REACH = 1.5  # cells: how far attention looks around a home
PEAK = 12.0  # attention logit of a token at home
NOISE = 0.15  # what is left of random attention weights
FAINT = 0.05  # what is left of random tokens and positions
ENCODER_GAIN, DECODER_GAIN = 0.18, 1.0  # of fetched content; small where the pass recurs, so that homes aren't drowned
ANCHOR_WEIGHT = 1.5
# Steps of the sequence that fills a square evenly at any length (Roberts: the plastic number's powers).
SPREAD = (0.7548776662466927, 0.5698402909980532)


@dataclass(frozen=True)
class Layout:
    """Which of the W numbers of a token mean what."""

    content: Tensor
    key: Tensor
    query: Tensor
    rest: int
    anchor: int

    @classmethod
    def of(cls, width: int, content: int) -> "Layout":
        """The division of ``width``; raises ValueError when it leaves no room for positions."""
        half = (width - content - 2) // 4 * 2
        if half < 4:
            raise ValueError(f"init = 'local': width {width} leaves no room beside {content} channels of the base")
        key = content + torch.arange(half)
        return cls(torch.arange(content), key, key + half, width - 2, width - 1)


@torch.no_grad()
def start_locally(encoder: LatentEncoder, decoder: GridDecoder, config: AlitConfig) -> None:
    """Change freshly initialised weights to the local start; takes its random numbers from torch's global state."""
    _start_encoder(encoder, config)
    _start_decoder(decoder, config)


def _start_encoder(encoder: LatentEncoder, config: AlitConfig) -> None:
    layout = Layout.of(config.encoder_width, config.base.embed_dim)
    grid, homes = _codes(config, len(layout.key))
    encoder.patch_embed.weight.mul_(2 * FAINT)
    for table in (encoder.positions, encoder.class_token, encoder.latent_tokens, encoder.latent_positions):
        table.mul_(FAINT)
    encoder.rollout_embedding.mul_(FAINT)
    encoder.positions[1:, layout.key] += grid
    encoder.positions[1:, layout.rest] += 0.5
    _anchor(encoder.class_token, layout)
    for rollout, (home, step) in enumerate(zip(torch.split(homes, list(config.steps)), config.steps, strict=True)):
        encoder.rollout_embedding[rollout, :step, layout.query] += home
    if isinstance(encoder.project, nn.Linear):
        encoder.project.weight.mul_(0.1)
        encoder.project.weight[:, layout.content] += _orthonormal(len(encoder.project.weight), len(layout.content))
    _localise(encoder, layout, ENCODER_GAIN)


def _start_decoder(decoder: GridDecoder, config: AlitConfig) -> None:
    layout = Layout.of(config.decoder_width, config.base.embed_dim)
    grid, homes = _codes(config, len(layout.key))
    for table in (decoder.positions, decoder.class_token, decoder.mask_token, decoder.latent_positions):
        table.mul_(FAINT)
    decoder.positions[1:, layout.query] += grid
    _anchor(decoder.class_token, layout)
    decoder.latent_positions[:, layout.key] += homes
    decoder.latent_positions[:, layout.rest] += 0.5
    if isinstance(decoder.embed, nn.Linear):
        decoder.embed.weight.mul_(0.1)
        decoder.embed.weight[layout.content] += _orthonormal(decoder.embed.in_features, len(layout.content)).T
    _localise(decoder, layout, DECODER_GAIN)


def _anchor(class_token: Tensor, layout: Layout) -> None:
    class_token[:, layout.anchor] += 1.0
    class_token[:, layout.rest] += 0.5


def _codes(config: AlitConfig, size: int) -> tuple[Tensor, Tensor]:
    """Codes [N, P] of unit length of the grid's cells and of the latents' homes; near places have alike codes."""
    rows, columns = config.grid
    cells = torch.cartesian_prod(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5)
    number = torch.arange(1, config.budgets[-1] + 1, dtype=torch.float64)
    homes = (number[:, None] * torch.tensor(SPREAD, dtype=torch.float64) + 0.5) % 1 * torch.tensor([rows, columns])
    frequencies = torch.randn(2, size // 2) / REACH
    angles = torch.cat([cells, homes.float()]) @ frequencies
    codes = torch.cat([angles.cos(), angles.sin()], dim=1) / math.sqrt(size // 2)
    return codes[: len(cells)], codes[len(cells) :]


def _localise(module: nn.Module, layout: Layout, gain: float) -> None:
    for part in module.modules():
        if isinstance(part, Attention):
            _localise_attention(part, layout, gain)


def _localise_attention(attention: Attention, layout: Layout, gain: float) -> None:
    """Each head compares a random part of the codes of position and carries a random part of the content."""
    width = attention.out.in_features
    head = width // attention.num_heads
    compared = min(head, len(layout.key)) - 1  # one number of the head is for resting
    carried = min(head, len(layout.content))
    # A resting query has all its length in the code, a grid token's key shares its own with the content.
    lengths = width / math.sqrt(2)
    scale = math.sqrt(PEAK * math.sqrt(head) * len(layout.key) / (compared * lengths))
    queries, keys, values = torch.split(attention.qkv.weight.mul_(NOISE), width)
    attention.out.weight.mul_(NOISE)
    for start in range(0, width, head):
        code = scale * _orthonormal(compared, len(layout.key))
        queries[start : start + compared, layout.query] += code
        keys[start : start + compared, layout.key] += code
        queries[start + compared, layout.rest] += ANCHOR_WEIGHT
        keys[start + compared, layout.anchor] += ANCHOR_WEIGHT
        content = _orthonormal(carried, len(layout.content))
        values[start : start + carried, layout.content] += content
        share = gain * len(layout.content) / (carried * attention.num_heads)
        attention.out.weight[layout.content, start : start + carried] += share * content.T


def _orthonormal(rows: int, columns: int) -> Tensor:
    """A random matrix [rows, columns] with orthonormal rows, or orthonormal columns where it has more rows."""
    if rows > columns:
        return _orthonormal(columns, rows).T
    return torch.linalg.qr(torch.randn(columns, rows)).Q.T


@torch.no_grad()
def fill_codebook(quantizer: VectorQuantizer, latents_ND: Tensor, generator: torch.Generator) -> None:
    """Put codebook entries onto random latents of real images, as many as there are."""
    chosen = torch.randperm(len(latents_ND), generator=generator)[: len(quantizer.codebook.weight)]
    quantizer.codebook.weight[: len(chosen)] = F.normalize(latents_ND[chosen].float(), dim=-1)
