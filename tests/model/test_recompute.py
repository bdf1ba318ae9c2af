"""Activations computed again: the same loss and gradients to the last bit, and less kept."""

import pytest
import torch

from model.config import DistillConfig
from model.objectives import DistillObjective, train_only
from model.recompute import recompute_blocks


def trained_once(tokenizer, images, how):
    """Loss, gradients, and the bytes that the forward pass left for the backward pass."""
    objective = DistillObjective(tokenizer, DistillConfig()).train()
    train_only(objective, objective.trainable())
    recompute_blocks(objective, how)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = objective(images, torch.Generator().manual_seed(1)).total
    total.backward()
    gradients = {name: parameter.grad for name, parameter in objective.trainable().items()}
    return total.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize(("how", "share"), [("light", 0.75), ("medium", 0.5), ("full", 0.25)])
@pytest.mark.parametrize("name", ["vqgan", "halting"])
def test_same_loss_and_gradients_less_kept(small, photographs, name, how, share):
    images = photographs(2, (32, 32))
    total, gradients, kept = trained_once(small(name), images, "none")
    again, same, less = trained_once(small(name), images, how)
    assert torch.equal(total, again) and less < share * kept
    for parameter, gradient in gradients.items():
        assert gradient is same[parameter] is None or torch.equal(gradient, same[parameter]), parameter
