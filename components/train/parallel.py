"""One objective on many workers: DDP, or FSDP2 for weights that are too large for one device."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.blocks import Block
from model.objectives import Objective


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the others."""

    rank: int
    world: int
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over all workers."""
        return self.sum(x.clone()) / self.world

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value: float) -> list[float]:
        """Every worker's ``value``, by rank."""
        one = torch.tensor([value], dtype=torch.float64, device=self.device)
        if self.world == 1:
            return one.tolist()
        every = [torch.empty_like(one) for _ in range(self.world)]
        dist.all_gather(every, one)
        return torch.cat(every).tolist()

    def rows(self, part: Tensor) -> Tensor:
        """The rows of every worker's ``part``, which may be unevenly many, by rank."""
        if self.world == 1:
            return part
        sizes = [int(size) for size in self.gather(len(part))]
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded)
        return torch.cat([one[:size] for one, size in zip(every, sizes, strict=True)])

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any worker has, in the order of the first that has them."""
        every: list[Any] = [list(names)]
        if self.world > 1:
            every = every * self.world
            dist.all_gather_object(every, list(names))
        return list(dict.fromkeys(name for one in every for name in one))

    def same(self, value: Any) -> Any:
        """Rank 0's ``value``, a plain Python object, on every worker."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def spread(objective: Objective, place: Place, strategy: Literal["ddp", "fsdp"]) -> nn.Module:
    """What to call in place of ``objective``. FSDP changes the objective itself: its parameters become DTensors."""
    if strategy == "fsdp":
        blocks = [module for module in objective.modules() if isinstance(module, Block)]
        for module in [*blocks, objective]:
            fully_shard(module)
        return objective
    if place.world == 1:
        return objective
    return DistributedDataParallel(objective, find_unused_parameters=objective.partial)


@contextmanager
def gradients_kept(model: nn.Module, kept: bool) -> Iterator[None]:
    """While ``kept``, gradients add up on their worker: the last pass of a step shares them for all."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not kept)
        yield
    elif isinstance(model, DistributedDataParallel) and kept:
        with model.no_sync():
            yield
    else:
        yield


@contextmanager
def whole(objective: nn.Module) -> Iterator[None]:
    """Within the block the objective's parts can be called one by one, not only the objective."""
    if not isinstance(objective, FSDPModule):
        yield
        return
    objective.unshard()
    try:
        yield
    finally:
        objective.reshard()


def gathered(value: Any) -> Any:
    """``value`` with every DTensor in it as the whole tensor; all workers call this."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {name: gathered(inner) for name, inner in value.items()}
    return [gathered(inner) for inner in value] if isinstance(value, list) else value


def like(full: Tensor, pattern: Tensor) -> Tensor:
    """This worker's piece of ``full``, where ``pattern`` is in pieces and of the same shape."""
    if isinstance(pattern, DTensor) and full.shape == pattern.shape:
        return distribute_tensor(full.to(pattern.device), pattern.device_mesh, pattern.placements)
    return full
