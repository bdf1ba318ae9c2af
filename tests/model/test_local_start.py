"""The local start: latents mean something before the first step, and nothing else of the model changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.data import astronaut, chelsea, coffee

from model import SIZES, AlitTokenizer
from model.config import AlitConfig, DistillConfig
from model.local_start import Layout
from model.objectives import DistillObjective

DEMO = SIZES["demo"]


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """24 crops of three photographs, float32 [24, 3, 64, 64]."""
    crops = [
        p[y : y + 64, x : x + 64]
        for p in (astronaut(), chelsea(), coffee())
        for y in (40, 200)
        for x in range(0, 400, 100)
    ]
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2)).float() / 255


def share_of_content(config: AlitConfig, images: torch.Tensor) -> torch.Tensor:
    """Of the variance of unit-length latents, the share that is between images at the same latent, per rollout."""
    torch.manual_seed(0)
    tokenizer = AlitTokenizer(config)
    shares = []
    with torch.inference_mode():
        for step in tokenizer.rollout(images):
            latents = torch.nn.functional.normalize(step.projected, dim=-1)
            shares.append(latents.var(0).sum(-1).mean() / latents.flatten(0, 1).var(0).sum())
    return torch.stack(shares)


def test_latents_differ_between_images_from_the_start(photographs: torch.Tensor) -> None:
    local = share_of_content(DEMO, photographs)
    paper = share_of_content(replace(DEMO, init="paper"), photographs)
    assert (local > 0.5).all(), local
    assert (paper < 0.2).all(), paper


def test_the_model_is_the_same_but_for_its_weights() -> None:
    local, paper = AlitTokenizer(DEMO), AlitTokenizer(replace(DEMO, init="paper"))
    assert {n: p.shape for n, p in local.named_parameters()} == {n: p.shape for n, p in paper.named_parameters()}


def test_prepare_fills_the_codebook_with_latents(photographs: torch.Tensor) -> None:
    torch.manual_seed(0)
    objective = DistillObjective(AlitTokenizer(DEMO), DistillConfig())
    before = [step.codes.unique().numel() for step in objective.tokenizer.rollout(photographs)]
    objective.prepare(photographs, torch.Generator().manual_seed(0))
    after = [step.codes.unique().numel() for step in objective.tokenizer.rollout(photographs)]
    assert all(b > 1.5 * a for a, b in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("size", ["alit_tiny", "demo"])
def test_layout_divides_the_width(size: str) -> None:
    config = SIZES[size]
    layout = Layout.of(config.encoder_width, config.base.embed_dim)
    used = torch.cat([layout.content, layout.key, layout.query, torch.tensor([layout.rest, layout.anchor])])
    assert len(used.unique()) == len(used) and int(used.max()) < config.encoder_width


def test_a_width_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room"):
        Layout.of(40, 32)
