"""A loss of many parts whose backward passes run as soon as each part is known.

What a part keeps for its backward pass is then gone before the next one is computed, so that memory is that of the
largest part, not of all of them. Values and gradients are those of one backward pass over the sum, up to the order in
which gradients are added.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class EarlyBackward:
    """Takes parts that each begin at a tensor of their own and share ``parameters``; their sum is the loss.

    For each part: ``leaf = early.leaf(start)``, then a scalar from ``leaf`` and parameters, then ``early.take``. What
    lies before ``start`` gets its gradients in the sum's backward pass, which can be run once.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._starts: list[tuple[Tensor, Tensor]] = []  # and their gradients
        self._value: Tensor | None = None

    @staticmethod
    def leaf(start: Tensor) -> Tensor:
        """``start`` without what led to it, for a part to begin at.

        A view, because what hooks modules' inputs (torch.utils.flop_counter) can't follow a true leaf here.
        """
        leaf = start.detach().requires_grad_(start.requires_grad)
        return leaf.view_as(leaf)

    def take(self, start: Tensor, leaf: Tensor, part: Tensor) -> None:
        """Add the scalar ``part``, computed from ``leaf``, and run its backward pass."""
        self._value = part.detach() if self._value is None else self._value + part.detach()
        if not part.requires_grad:
            return
        inputs = [leaf, *self._parameters] if leaf.requires_grad else self._parameters
        gradients = list(torch.autograd.grad(part, inputs, allow_unused=True))
        if leaf.requires_grad and (gradient := gradients.pop(0)) is not None:
            self._starts.append((start, gradient.clone()))
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                before = self._sums[number]  # ours alone, while what autograd returns may share memory
                self._sums[number] = gradient.clone() if before is None else before.add_(gradient)

    def total(self) -> Tensor:
        """The sum of the parts, whose backward pass hands on what was found; raises ValueError when there are none."""
        if self._value is None:
            raise ValueError("EarlyBackward.total: no part was taken")
        known = [(p, total) for p, total in zip(self._parameters, self._sums, strict=True) if total is not None]
        tensors, gradients = zip(*self._starts, *known, strict=True) if self._starts or known else ((), ())
        return _Known.apply(self._value, gradients, *tensors)  # type: ignore[no-untyped-call]


class _Known(torch.autograd.Function):
    """A value whose gradients are there already."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: Sequence[Tensor], *_tensors: Tensor) -> Tensor:
        context.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Any:
        gradients, context.gradients = context.gradients, None
        return None, None, *(known.mul_(gradient) for known in gradients)
