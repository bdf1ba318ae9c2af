"""Less memory for more time in training: activations of transformer blocks are computed again in the backward pass.

Loss and gradients stay what they are, to the last bit. Of the 64 bytes a token and channel that a block leaves behind
in float32, "light" keeps 40, the products: what is computed again is GELU, norms and sums. "medium" keeps 24, without
the widest product, which GELU follows. "full" keeps 4, the block's input, and runs every block's forward pass twice.
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

Recompute = Literal["none", "light", "medium", "full"]

_WIDEST = {"light": 4, "medium": 3}  # outputs of a product that is kept, over its inputs
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
    contexts: Any = noop_context_fn
    if how != "full":
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, _WIDEST[how]))
    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = partial(again, block.forward)  # type: ignore[method-assign]


def _policy(widest: int, _context: Any, operation: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    """What is dear to compute for its size is kept, but for the block's last product, which no gradient needs."""
    kept = operation in _ATTENTION
    if operation is torch.ops.aten.addmm.default:
        inputs, outputs = arguments[2].shape
        kept = inputs <= outputs <= widest * inputs
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
