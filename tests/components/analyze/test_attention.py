"""The decoder's attention, seen from outside, is the attention that it uses."""

import numpy as np
import pytest
import torch

from components.analyze.attention import (
    attention_inputs,
    entropy,
    half_mass_area,
    half_mass_cells,
    latent_maps,
    weights,
)
from components.images import stack, to_float
from model import AlitTokenizer
from model.starter import STARTER
from tests.by_hand import photographs


@pytest.fixture(scope="module")
def tokenizer() -> AlitTokenizer:
    return AlitTokenizer.load(STARTER)


@pytest.fixture(scope="module")
def latents(tokenizer: AlitTokenizer) -> torch.Tensor:
    images = to_float(torch.from_numpy(stack([row["image"] for row in photographs(40).rows[:3]])))
    with torch.inference_mode():
        return next(tokenizer.rollout(images)).latents


@torch.inference_mode()
def test_the_weights_give_the_modules_own_output(tokenizer: AlitTokenizer, latents: torch.Tensor) -> None:
    with attention_inputs(tokenizer.decoder) as seen:
        plain = tokenizer.decoder(latents)
    assert len(seen) == tokenizer.config.decoder_layers
    for module, x in seen.items():
        found = weights(module, x)
        assert torch.allclose(found.sum(-1), torch.ones(()))
        _, _, values = module.heads(x)
        mixed = (found @ values).transpose(1, 2).reshape(x.shape)
        assert torch.allclose(module.out(mixed), module(x), atol=1e-5)
    assert torch.equal(tokenizer.decoder(latents), plain)


@torch.inference_mode()
def test_hooks_go_when_the_block_ends(tokenizer: AlitTokenizer, latents: torch.Tensor) -> None:
    with pytest.raises(RuntimeError), attention_inputs(tokenizer.decoder) as seen:
        raise RuntimeError
    tokenizer.decoder(latents)
    assert not seen


def test_a_latents_map_is_a_share_of_the_grid(tokenizer: AlitTokenizer, latents: torch.Tensor) -> None:
    maps = latent_maps(tokenizer, latents)
    assert maps.shape == (3, tokenizer.budgets[0], 64)
    assert torch.allclose(maps.sum(-1), torch.ones(())) and maps.min() >= 0


def test_sparsity_of_maps_that_are_known() -> None:
    even, one = np.full(64, 1 / 64), np.eye(64)[5]
    half = np.zeros(64)
    half[:16] = 1 / 16
    maps = np.stack([even, one, half])
    assert entropy(maps) == pytest.approx([1, 0, np.log(16) / np.log(64)])
    assert half_mass_area(maps) == pytest.approx([32 / 64, 1 / 64, 8 / 64])
    cells = half_mass_cells(maps)
    assert cells.sum(1).tolist() == [32, 1, 8] and cells[1, 5]
