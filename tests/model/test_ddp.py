"""Finetuning with its two players under DistributedDataParallel: two processes, gloo, one machine."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import SMALL, build, seeded
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from model.finetune import FinetuneObjective
from model.objectives import Turn, train_only
from model.recipes import FinetuneConfig

CONFIG = FinetuneConfig(
    discriminator_channels=8, discriminator_layers=2, adversarial_weights=((1, 0.5),), discriminator_warm_up=1
)
STEPS, IMAGES = 3, 4


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    total = x.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def train(objective: FinetuneObjective, call: torch.nn.Module, images: torch.Tensor) -> None:
    """As the class's documentation says."""
    players = {player: objective.trainable(player) for player in ("model", "discriminator")}
    optimizers = {name: torch.optim.SGD(parameters.values(), lr=0.01) for name, parameters in players.items()}
    generator = seeded(5)  # the same on all ranks
    for step in range(STEPS):
        made = None
        for player in objective.players(step):
            optimizers[player].zero_grad()
            loss = call(images, generator, Turn(player, step, made))
            loss.total.backward()
            optimizers[player].step()
            made = loss.made


def objective() -> FinetuneObjective:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        # Batch norm's statistics are a rank's own; in eval mode the two runs can be compared.
        made = FinetuneObjective(build(replace(SMALL, codebook_size=None)), CONFIG).eval()
    train_only(made, made.trainable("model") | made.trainable("discriminator"))
    return made


def worker(rank: int, folder: str, images: torch.Tensor) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    made = objective()
    made.average = mean_over_ranks
    share = images[rank * IMAGES // 2 : (rank + 1) * IMAGES // 2]
    train(made, DistributedDataParallel(made, find_unused_parameters=True), share)
    torch.save(made.state_dict(), f"{folder}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads and the interpreter can wait for each other when both end


@pytest.mark.slow
def test_two_ranks_end_as_one_does(photographs, tmp_path: Path):
    images = photographs(IMAGES, (32, 32))
    torch.multiprocessing.start_processes(worker, args=(str(tmp_path), images), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone, fresh = objective(), objective().state_dict()
    train(alone, alone, images)
    moved = 0
    for name, tensor in alone.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        assert torch.allclose(ranks[0][name], tensor, atol=2e-5), name
        moved += not torch.equal(tensor, fresh[name])
    assert moved > 100
    assert any("discriminators" in name and not torch.equal(ranks[0][name], fresh[name]) for name in fresh)
