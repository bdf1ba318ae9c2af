"""The loop that every training worker runs.

Everything random in a step follows from (seed, step, rank), so a checkpoint needs no generator state: weights, their
moving average, the optimizer, what was seen of the codes and the number of steps done are the whole of a run.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from components.artifacts import Artifact, ImageSet
from components.config import BaseStageConfig, DistillStageConfig, TrainResources
from components.images import random_resized_crop, recolour, to_float
from components.tracking import Tracker
from components.train.data import SHARD, Batches, CachedBatches, StreamedBatches, held_out
from components.train.optimizer import MovingAverage, build_optimizer, learning_rate
from components.train.recipes import RECIPES
from model.objectives import train_only

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrainRun:
    """What a worker needs to know."""

    recipe: str
    config: BaseStageConfig | DistillStageConfig
    resources: TrainResources
    images: ImageSet
    inputs: Mapping[str, Artifact]
    cached: bool  # the train split stays in each worker's memory
    tracking: Mapping[str, str]
    progress: Callable[[str], None]

    @property
    def num_steps(self) -> int:
        """Steps to do in all."""
        return self.config.train.steps


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


class Learner:
    """The objective with all that a step changes; what a checkpoint holds."""

    def __init__(self, run: TrainRun, place: Place) -> None:
        torch.manual_seed(run.config.train.seed)
        self.run, self.place = run, place
        self.objective = RECIPES[run.recipe].build(run.config, run.inputs, run.resources.start).to(place.device)
        self.trainable: dict[str, nn.Parameter] = self.objective.trainable()
        self.optimizer = build_optimizer(self.trainable, run.config.train.optimizer)
        self.average = MovingAverage(self.trainable, run.config.train.optimizer.ema_decay)
        self.model: nn.Module = self.objective
        self.resting: tuple[str, ...] | None = None
        self.steps_done = 0
        self.metrics: dict[str, float] = {}

    def prepare(self, images: Tensor) -> None:
        """Before the first step of fresh weights, with the first uint8 images; DDP then spreads rank 0's weights."""
        generator = step_generator(self.run.config.train.seed, 0, self.place.rank)
        self.objective.prepare(to_float(images.to(self.place.device)), generator)
        self.average = MovingAverage(self.trainable, self.run.config.train.optimizer.ema_decay)

    def step(self, images: Tensor) -> tuple[Any, Tensor]:
        """One update on uint8 images [b, 3, H, W]; returns the loss and the gradient's norm, both still on device."""
        train = self.run.config.train
        self._let_rest()
        pixels = self._augmented(images)
        # All ranks draw the same rollouts: a step costs what its longest rollout costs, on every worker.
        shared = step_generator(train.seed, self.steps_done, 0)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = self.model(pixels, shared)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), train.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, self.run.num_steps, train)
        self.optimizer.step()
        self.average.update(self.steps_done)
        self.steps_done += 1
        self._revive()
        return loss, norm

    def _augmented(self, images: Tensor) -> Tensor:
        train = self.run.config.train
        generator = step_generator(train.seed, self.steps_done, self.place.rank)
        pixels = random_resized_crop(images.to(self.place.device), scale=train.crop_scale, generator=generator)
        return recolour(pixels, share=train.recolour, generator=generator) if train.recolour else pixels

    def _let_rest(self) -> None:
        """Freeze what rests at this step. DDP is told anew when that changes: it waits for every gradient it knows."""
        resting = self.objective.resting(self.steps_done)
        if resting == self.resting:
            return
        self.resting = resting
        train_only(self.objective, {n: p for n, p in self.trainable.items() if not n.startswith(resting)})
        if self.place.world > 1:
            self.model = DistributedDataParallel(self.objective)

    def _revive(self) -> None:
        """Move dead codes at times in the first half; what rank 0 drew is what every rank gets."""
        train, health = self.run.config.train, self.objective.health
        every = self.objective.config.revive_every
        due = every and self.steps_done % every == 0
        if health is None or not due or self.steps_done > self.run.num_steps / 2:
            return
        self.pool_counts()
        if self.place.leads:
            health.revive(step_generator(train.seed, self.steps_done, 0))
        health.reset()
        if self.place.world > 1:
            dist.broadcast(health.codebook.weight.data, src=0)

    def pool_counts(self) -> None:
        """Bring what all ranks counted of the codes to rank 0; every rank calls this."""
        health = self.objective.health
        if health is None or self.place.world == 1:
            return
        dist.all_reduce(health.counts)
        if not self.place.leads:
            health.reset()

    def state(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        health = self.objective.health
        return {
            "health": None if health is None else health.state_dict(),
            "steps_done": self.steps_done,
            "weights": {name: p.detach() for name, p in self.trainable.items()},
            "average": self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.steps_done = state["steps_done"]
        self.average.copy_to_parameters(state["weights"])
        self.average.values = {name: value.clone() for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.metrics = dict(state["metrics"])
        if self.place.leads and state["health"] is not None:
            self.objective.health.load_state_dict(state["health"])


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of one step on one worker."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_099 + rank)


def read_state(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's state; nothing in it is unpickled but tensors and plain values."""
    return torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)


def train_loop(loop_config: dict[str, TrainRun]) -> None:
    """Ray Train's entry: train ``loop_config["run"]`` from its last checkpoint to its last step."""
    import ray.train
    import ray.train.torch

    run, context = loop_config["run"], ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    learner = Learner(run, place)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            learner.load(read_state(folder))
        if place.leads:
            run.progress(f"going on from step {learner.steps_done}")
    batches = _batches(run, place, learner.steps_done)
    if checkpoint is None and run.resources.start is None:
        learner.prepare(batches.at(0))
    unseen = held_out(run.images, run.config.train.eval_images) if place.leads else None
    journal = Journal(run, learner)
    while learner.steps_done < run.num_steps:
        images = batches.at(learner.steps_done)
        journal.data_came()
        loss, norm = learner.step(images)
        journal.stepped(loss, norm)
        step, last = learner.steps_done, learner.steps_done == run.num_steps
        if unseen is not None and (last or step % run.resources.eval_every == 0):
            journal.evaluated(evaluate(learner, unseen))
        if last or step % run.resources.checkpoint_every == 0:
            report(learner)


def _batches(run: TrainRun, place: Place, first_step: int) -> Batches:
    import ray.train

    shard, train = ray.train.get_dataset_shard(SHARD), run.config.train
    if run.cached:
        return CachedBatches(shard, batch=train.batch_size, rank=place.rank, world=place.world, seed=train.seed)
    return StreamedBatches(shard, batch=train.batch_size, world=place.world, seed=train.seed, first_step=first_step)


@torch.no_grad()
def evaluate(learner: Learner, images: Tensor) -> dict[str, float]:
    """Figures of the averaged weights on held-out uint8 images [n, 3, H, W]; none for no images."""
    if not len(images):
        return {}
    learner.objective.eval()
    with learner.average.swapped_in():
        values = RECIPES[learner.run.recipe].evaluate(learner.objective, images.to(learner.place.device))
    learner.objective.train()
    return values


def report(learner: Learner) -> None:
    """Hand a checkpoint to Ray Train; every rank calls this, rank 0 has the files."""
    import ray.train

    name = f"step-{learner.steps_done:08d}"
    learner.pool_counts()
    if not learner.place.leads:
        ray.train.report(learner.metrics, checkpoint=None, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(learner.state(), Path(folder) / STATE_FILE)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(learner.metrics, checkpoint=checkpoint, checkpoint_dir_name=name)


class Journal:
    """What a person and MLflow see of the loop; rank 0 writes it, every rank checks its own loss."""

    def __init__(self, run: TrainRun, learner: Learner) -> None:
        self._run, self._learner = run, learner
        self._tracker = Tracker(**run.tracking)
        self._began, self._first = time.monotonic(), learner.steps_done
        self._mark, self._mark_step, self._waited = self._began, learner.steps_done, 0.0
        self._left = self._began

    def data_came(self) -> None:
        """Count the time since the last step as waiting for data."""
        self._waited += time.monotonic() - self._left

    def stepped(self, loss: Any, norm: Tensor) -> None:
        """After each step; reads numbers off the device only every ``log_every`` steps."""
        step = self._learner.steps_done
        if step % self._run.resources.log_every == 0 or step == self._run.num_steps:
            total = float(loss.total)
            if not math.isfinite(total):
                raise FloatingPointError(f"loss is {total} at step {step} on rank {self._learner.place.rank}")
            if self._learner.place.leads:
                self._write(step, total, loss, float(norm))
        self._left = time.monotonic()

    def _write(self, step: int, total: float, loss: Any, norm: float) -> None:
        now, train = time.monotonic(), self._run.config.train
        span = max(1e-9, now - self._mark)
        rate = (step - self._mark_step) * train.batch_size / span
        values = {
            "train/loss": total,
            "train/grad_norm": norm,
            "train/lr": learning_rate(step - 1, self._run.num_steps, train),
            "train/images_per_s": rate,
            "train/data_wait": self._waited / span,
        }
        if self._learner.objective.health is not None:
            values["train/code_perplexity"] = float(self._learner.objective.health.perplexity())
        for term in loss.terms:
            at = "" if term.num_tokens is None else f"@{term.num_tokens}"
            values[f"train/{term.name}{at}"] = float(term.value)
        self._learner.metrics |= {"loss": total, "images_per_s": rate}
        self._tracker.metrics(values, step)
        left = (now - self._began) / max(1, step - self._first) * (self._run.num_steps - step)
        self._run.progress(
            f"step {step}/{self._run.num_steps}  loss {total:.4f}  {rate:.0f} images/s  {_clock(left)} left"
        )
        self._mark, self._mark_step, self._waited = now, step, 0.0

    def evaluated(self, values: dict[str, float]) -> None:
        """After an evaluation."""
        step = self._learner.steps_done
        self._learner.metrics |= values
        self._tracker.metrics(values, step)
        errors = [f"{name.removeprefix('val/')} {value:.4f}" for name, value in values.items()]
        self._run.progress(f"step {step}/{self._run.num_steps}  held out: " + "  ".join(errors))
        self._left = time.monotonic()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
