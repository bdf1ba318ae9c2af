"""What models leave in memory: while they are trained, and for the next layer."""

import ctypes
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_CONFIGS, build, seeded

from model.config import DistillConfig, HaltingConfig
from model.early_backward import EarlyBackward
from model.finetune import FinetuneObjective
from model.objectives import DistillObjective, Turn, train_only
from model.recipes import FinetuneConfig


class Live:
    """Bytes that wait for a backward pass, and the most that ever did; each tensor's own, shared or not."""

    def __init__(self):
        self.now = self.most = 0

    def keep(self, tensor):
        held = [tensor]
        box = type("Box", (), {"held": held})()
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(box, self._gone, tensor.nbytes)
        return box

    def _gone(self, number):
        self.now -= number


def trained_once(objective, images, early):
    """Loss, gradients and the most that waited for the backward pass."""
    objective.train().early = early
    train_only(objective, objective.trainable())
    objective.zero_grad(set_to_none=True)
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.keep, lambda box: box.held[0]):
        loss = objective(images, seeded(), Turn(step=1))
        (loss.total / 3).backward()
    return loss, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, live.most


def objective_of(recipe, name):
    config = SMALL_CONFIGS[name]
    if config.halting.enabled:  # random weights reconstruct nothing so well: let chance alone decide
        config = replace(config, halting=HaltingConfig(True, 1e-6 if config.base.kind == "vqgan" else 10.0))
    if recipe == "distill":
        return DistillObjective(build(config), DistillConfig(pixel_weight=0.1))
    torch.manual_seed(2)
    settings = {"discriminator_channels": 8, "discriminator_layers": 2, "adversarial_weights": ((0, 0.5),)}
    return FinetuneObjective(build(config), FinetuneConfig(**settings, sampled_rollouts=None))


@pytest.mark.parametrize("recipe", ["distill", "finetune"])
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_rollouts_that_go_back_early_have_the_same_gradients_and_keep_less(photographs, recipe, name):
    objective, images = objective_of(recipe, name), photographs(2, (32, 32))
    loss, gradients, most = trained_once(objective, images, early=False)
    again, same, less = trained_once(objective, images, early=True)
    assert again.total.item() == pytest.approx(loss.total.item(), rel=1e-6)
    assert [term.value.item() for term in again.terms] == [term.value.item() for term in loss.terms]
    assert gradients.keys() == same.keys()
    for parameter, gradient in gradients.items():
        assert torch.allclose(gradient, same[parameter], rtol=1e-4, atol=1e-6), parameter
    assert less < 0.7 * most


@pytest.mark.parametrize("recipe", ["distill", "finetune"])
def test_weights_that_autocast_has_rounded_once_serve_every_part(photographs, recipe):
    objective, images = objective_of(recipe, "vqgan"), photographs(2, (32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients, _ = trained_once(objective, images, early=False)
        _, same, _ = trained_once(objective, images, early=True)
    assert gradients.keys() == same.keys()
    for parameter, gradient in gradients.items():
        assert (gradient - same[parameter]).norm() <= 0.02 * gradient.norm() + 1e-6, parameter


def test_gradients_that_share_memory_are_added_up_alone():
    """What autograd returns for two addends of one sum is one tensor twice."""
    first, second = (torch.zeros(3, requires_grad=True) for _ in range(2))
    early = EarlyBackward([first, second])
    for factor in (1.0, 2.0, 3.0):
        start = torch.ones(3, requires_grad=True)
        leaf = early.leaf(start)
        early.take(start, leaf, (factor * (first + second + leaf)).sum())
    (2 * early.total()).backward()
    assert first.grad.tolist() == second.grad.tolist() == [12.0] * 3


def test_a_loss_of_no_parts_is_refused():
    with pytest.raises(ValueError, match="no part was taken"):
        EarlyBackward([]).total()


FAULTS = """
import resource, sys
import torch
from model.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(16):
    torch.ones(16 << 20)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library isn't glibc")
def test_memory_that_is_freed_comes_again_without_the_kernel():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("give back") / 2
