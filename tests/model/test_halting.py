"""Dynamic halting masks what it should, in both bases, with explicit numbers."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL, SMALL_CONFIGS, build, seeded
from hypothesis import given
from hypothesis import strategies as st

from model.config import HaltingConfig
from model.halting import halt_by_error, halt_by_probability, true_probability


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_by_probability(seed, threshold):
    probability, uniform = torch.rand(2, 3, 7, generator=seeded(seed))
    drawn = halt_by_probability(probability, threshold, uniform)
    assert torch.equal(drawn, (uniform < probability) & (probability >= threshold))
    certain = halt_by_probability(probability, threshold, None)
    assert torch.equal(certain, probability >= threshold)
    assert not (drawn & ~certain).any()
    # The share that halts in training is p among those above the threshold.
    many = halt_by_probability(torch.full((1, 4000), 0.7), 0.5, torch.rand(1, 4000, generator=seeded(seed)))
    assert many.float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_by_error_is_not_the_authors_no_op():
    target = torch.zeros(1, 3, 4)
    code = torch.tensor([0.0, 0.02, 0.03]).view(1, 3, 1).expand(1, 3, 4)
    assert halt_by_error(code, target, 0.025).tolist() == [[True, True, False]]


def test_true_probability():
    logits = torch.randn(2, 5, 8, generator=seeded())
    indices = torch.arange(10).view(2, 5) % 8
    found = true_probability(logits, indices)
    assert found[1, 2].item() == pytest.approx(logits[1, 2].softmax(0)[7].item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
@torch.no_grad()
def test_halted_grid_tokens_become_the_mask_and_nothing_else(photographs, kind):
    config = replace(SMALL_CONFIGS[kind], halting=HaltingConfig(True, 1e-9 if kind == "vqgan" else 0.05))
    tokenizer, images = build(config), photographs(3, (32, 32))
    uniform = [torch.rand(3, 64, generator=seeded(k)) * 0.03 for k in range(4)]
    rollout = tokenizer.rollout(images, halting_noise=uniform)
    first = next(rollout)
    halted = tokenizer.halted(first.grid, first.target, uniform[0])
    assert 0 < halted.float().mean() < 1
    x = rollout._x.clone()
    seen = []
    tokenizer.encoder.norm_rollout.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    next(rollout)
    grid, mask = seen[0][:, 1:65], tokenizer.encoder.mask_token + tokenizer.encoder.positions[1:]
    assert torch.equal(grid[halted], mask.expand(3, -1, -1)[halted])
    assert torch.equal(grid[~halted], x[:, 1:65][~halted])
    assert torch.equal(seen[0][:, 0], x[:, 0]) and torch.equal(seen[0][:, 65:69], x[:, 65:69])


@torch.no_grad()
def test_the_generator_is_explicit_and_inference_has_none(photographs):
    config = replace(SMALL, halting=HaltingConfig(True, 1e-9))
    tokenizer, images = build(config), photographs(2, (32, 32))

    def last(noise: object) -> torch.Tensor:
        *_, step = tokenizer.rollout(images, halting_noise=noise)
        return step.hidden

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(last(seeded(3)), last(seeded(3)))
    assert not torch.equal(last(seeded(3)), last(seeded(4)))
    assert torch.equal(last(None), last(None))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


@pytest.mark.parametrize(("kind", "threshold"), [("vqgan", 0.55), ("vae", 0.025)])
def test_the_default_threshold_is_the_papers(kind, threshold):
    assert build(SMALL_CONFIGS[kind]).base.default_halting_threshold == threshold
