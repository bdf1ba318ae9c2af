"""A predicted length: the head learns a photograph's metric at every budget from its first rollout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL, build, seeded

from model import LengthHead, PredictedThreshold
from model.metrics import METRICS
from model.predicted import pinball_loss
from model.recipes import LengthHeadConfig

CONFIG = LengthHeadConfig("l1", encoder_width=SMALL.encoder_width, num_budgets=4, hidden=32)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_pinball_loss_is_least_at_the_quantile(quantile):
    values = torch.linspace(0, 1, 1001)
    guesses = torch.linspace(0, 1, 101)
    losses = torch.stack([pinball_loss(guess.expand_as(values), values, quantile) for guess in guesses])
    assert guesses[losses.argmin()].item() == pytest.approx(quantile, abs=0.011)


def test_missing_values_count_for_nothing():
    values = torch.tensor([[1.0, float("nan")], [float("nan"), 3.0]])
    predicted = torch.tensor([[0.0, 9.0], [9.0, 5.0]], requires_grad=True)
    loss = pinball_loss(predicted, values, 0.5)
    assert loss.item() == pytest.approx((0.5 * 1 + 0.5 * 2) / 2)
    loss.backward()
    assert (predicted.grad == 0).tolist() == [[False, True], [True, False]]
    assert pinball_loss(predicted, torch.full((2, 2), float("nan")), 0.5) == 0


def test_scale_is_that_of_the_values():
    head, values = LengthHead(CONFIG), torch.rand(50, 4, generator=seeded())
    values[0, 0] = float("nan")
    head.fit_scale(values)
    assert head.centre[0].item() == pytest.approx(values[1:, 0].mean().item(), rel=1e-5)
    assert head.spread[3].item() == pytest.approx(values[:, 3].std(correction=0).item(), rel=1e-5)
    with pytest.raises(ValueError, match="a budget has none"):
        head.fit_scale(torch.full((3, 4), float("nan")))


def test_the_head_learns_and_the_tokenizer_stays(photographs):
    # The local start: with the paper's, untrained latents say nothing of the image.
    tokenizer, images = build(replace(SMALL, init="local")), photographs(18, (32, 32))
    with torch.no_grad():
        steps = list(tokenizer.rollout(images))
        values = torch.stack([METRICS["l1"](images, step.images.clamp(0, 1)) for step in steps], dim=1)
    hidden = next(tokenizer.rollout(images)).hidden
    assert hidden.requires_grad
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = LengthHead(CONFIG)
    head.fit_scale(values)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(hidden, values)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is None for p in tokenizer.parameters())
    error = (head(hidden) - values).abs().mean() / values.std()
    print(f"pinball {losses[0]:.3f} -> {losses[-1]:.3f}, error {error:.2f} deviations")
    assert losses[-1] < 0.5 * losses[0]
    rule = PredictedThreshold(head, max=float(values[:, 1].median()))
    expected = rule.select(values.numpy(), tokenizer.budgets).num_tokens
    found = tokenizer.encode(images, rule).num_tokens
    assert np.mean(found == expected) > 0.6


def test_save_and_load(tmp_path):
    head = LengthHead(CONFIG)
    head.fit_scale(torch.rand(9, 4))
    head.save(tmp_path)
    again = LengthHead.load(tmp_path)
    assert again.config == CONFIG and not again.training
    hidden = torch.randn(2, 4, SMALL.encoder_width)
    assert torch.equal(head(hidden), again(hidden))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="exactly one"):
        PredictedThreshold(LengthHead(CONFIG))
    with pytest.raises(ValueError, match="quantile"):
        LengthHeadConfig("l1", 8, 4, quantile=1.0)
    assert PredictedThreshold(LengthHead(CONFIG), max=0.1).metric == "l1"
