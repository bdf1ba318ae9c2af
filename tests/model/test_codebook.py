"""Codebook health: counts, perplexity, revival; without a host sync, and equal on all ranks."""

import pytest
import torch
from conftest import SMALL, SMALL_CONFIGS, build, seeded
from torch import nn

from model.base import build_base
from model.config import BaseObjectiveConfig, DistillConfig
from model.objectives import BaseObjective, DistillObjective
from model.quantizer import CodebookHealth


def health(entries: int = 8, unit_length: bool = False) -> CodebookHealth:
    return CodebookHealth(nn.Embedding(entries, 3), unit_length=unit_length)


def test_usage_and_perplexity_by_hand():
    watched = health(8)
    assert watched.usage() == 0 and watched.perplexity() == 1
    watched.record(torch.tensor([[0, 0], [1, 1]]), torch.zeros(2, 2, 3))
    assert watched.usage().item() == pytest.approx(2 / 8)
    assert watched.perplexity().item() == pytest.approx(2.0)
    watched.record(torch.tensor([2, 2, 2, 2, 2, 2, 2, 2]), torch.zeros(8, 3))
    share = torch.tensor([2, 2, 8]) / 12
    assert watched.perplexity().item() == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-6)
    watched.reset()
    assert watched.usage() == 0


@pytest.mark.parametrize("unit_length", [False, True])
def test_dead_entries_move_onto_recent_latents_each_its_own(unit_length):
    watched = health(8, unit_length)
    before = watched.codebook.weight.detach().clone()
    latents = torch.randn(20, 3, generator=seeded())
    watched.record(torch.arange(20) % 3, latents)
    assert watched.revive(seeded()) == 5
    after = watched.codebook.weight.detach()
    assert torch.equal(after[:3], before[:3])
    seen = nn.functional.normalize(latents, dim=-1) if unit_length else latents
    distances = torch.cdist(after[3:], seen)
    assert distances.min(1).values.max() < 1e-3
    assert len(set(distances.argmin(1).tolist())) == 5
    assert watched.counts.sum() == 0


def test_more_dead_entries_than_latents_wait():
    watched = health(8)
    watched.record(torch.tensor([0, 1]), torch.randn(2, 3, generator=seeded()))
    assert watched.revive(seeded()) == 2
    assert health(8).revive(seeded()) == 0


def test_what_is_kept_stays_bounded_and_recent():
    watched = CodebookHealth(nn.Embedding(4, 3), unit_length=False, keep=16)
    for step in range(50):
        watched.record(torch.zeros(2, 40, dtype=torch.int64), torch.full((2, 40, 3), float(step)))
    assert watched.recent.shape == (16, 3)
    assert watched.recent.min() >= 45
    assert watched.counts[0] == 50 * 80


def test_the_state_goes_into_a_checkpoint():
    watched, other = health(), health()
    watched.record(torch.tensor([1, 2]), torch.randn(2, 3, generator=seeded()))
    other.load_state_dict(watched.state_dict())
    watched.reset()
    assert other.counts.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert torch.equal(other.recent, watched.recent)


def test_objectives_count_in_training_only(photographs):
    images = photographs(2, (32, 32))
    objective = DistillObjective(build(SMALL), DistillConfig()).eval()
    objective(images, seeded())
    assert objective.health.counts.sum() == 0
    objective.train()(images, seeded())
    assert objective.health.counts.sum() == 2 * sum(SMALL.budgets)
    assert DistillObjective(build(SMALL_CONFIGS["continuous"]), DistillConfig()).health is None
    base = BaseObjective(build_base(SMALL.base), BaseObjectiveConfig()).train()
    base(images, seeded())
    assert base.health.counts.sum() == 2 * 64


def test_counts_are_no_buffers_that_ddp_would_overwrite():
    objective = DistillObjective(build(SMALL), DistillConfig())
    assert not any("counts" in name or "recent" in name for name in objective.state_dict())


@pytest.mark.parametrize("which", ["latent", "base"])
def test_revival_brings_a_dead_codebook_back(photographs, which):
    images = photographs(12, (32, 32))
    if which == "latent":
        objective = DistillObjective(build(SMALL).train(), DistillConfig())
        torch.nn.init.ones_(objective.tokenizer.quantizer.codebook.weight)
    else:
        objective = BaseObjective(build_base(SMALL.base).train(), BaseObjectiveConfig())
        torch.nn.init.constant_(objective.base.codebook.weight, 9.0)
    with torch.no_grad():
        objective(images, seeded())
        before = objective.health.perplexity().item()
        objective.health.revive(seeded())
        objective(images, seeded())
    after = objective.health.perplexity().item()
    print(f"{which}: perplexity {before:.1f} -> {after:.1f}")
    assert before == pytest.approx(1.0) and after > 5
