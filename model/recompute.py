"""Less memory for more time in training: activations of transformer blocks are computed again in the backward pass.

Loss and gradients stay what they are, to the last bit. Of the 64 bytes a token and channel that a block leaves behind
in float32, "light" keeps 28: the products, but for the widest, which GELU follows. "full" keeps 4, the block's input,
and runs every block's forward pass twice.
"""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from model.blocks import Block

Recompute = Literal["none", "light", "full"]

_ATTENTION = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)


def recompute_blocks(module: nn.Module, how: Recompute) -> None:
    """Let every transformer block inside ``module`` keep less for its backward pass, in place."""
    if how == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, _policy) if how == "light" else noop_context_fn
    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = partial(again, block.forward)  # type: ignore[method-assign]


def _policy(_context: Any, operation: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    """What is dear to compute for its size is kept."""
    kept = operation in _ATTENTION
    if operation is torch.ops.aten.addmm.default:
        inputs, outputs = arguments[2].shape
        kept = outputs <= 3 * inputs
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
