"""What one step does, and all that it changes.

Everything random in a step follows from (seed, step), and from an image's place in the batch, so a checkpoint needs no
generator state and the same step comes out on any number of workers, up to the rounding of sums.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.artifacts import Artifact, ImageSet
from components.config import OptimizerConfig, StageTraining, TrainResources
from components.images import Share, random_resized_crop, recolour, to_float
from components.train.data import Batch, Decode
from components.train.optimizer import MovingAverage, build_optimizer, learning_rate
from components.train.order import EpochOrder
from components.train.parallel import Place, gathered, gradients_kept, like, spread, whole
from components.train.recipes import RECIPES
from model.blocks import Block
from model.objectives import Loss, Objective, Turn, train_only
from model.recompute import recompute_blocks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainRun:
    """What a worker needs to know."""

    recipe: str
    config: StageTraining
    resources: TrainResources
    images: ImageSet
    inputs: Mapping[str, Artifact]
    tracking: Mapping[str, str]
    progress: Callable[[str], None]
    checkpoints: str  # folder
    decode: Decode = Decode()
    order: EpochOrder | None = None  # how images are streamed; None: they stay in each worker's memory

    @property
    def num_steps(self) -> int:
        """Steps to do in all."""
        return self.config.train.steps


class Diverged(FloatingPointError):
    """Too many steps in a row without a finite gradient."""


@dataclass
class Player:
    """One side of the objective with its own optimizer; usually there is only the model."""

    parameters: dict[str, nn.Parameter]
    config: OptimizerConfig
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter], config: OptimizerConfig, run: TrainRun, device: str) -> "Player":
        """A player at the first step."""
        scaler = torch.amp.GradScaler(device, enabled=run.config.train.precision == "fp16")
        return cls(parameters, config, build_optimizer(parameters, config), scaler)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; all workers call this."""
        return {
            "weights": gathered({name: p.detach() for name, p in self.parameters.items()}),
            "optimizer": gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(like(state["weights"][name], parameter))
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            number: {name: like(value, ordered[number]) for name, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class Outcome:
    """Sums of a step's numbers over this worker's images, still on its device."""

    values: dict[str, Tensor]
    norm: Tensor
    forward_s: float


class Learner:
    """The objective with all that a step changes; what a checkpoint holds."""

    def __init__(self, run: TrainRun, place: Place) -> None:
        torch.manual_seed(run.config.train.seed)
        self.run, self.place = run, place
        self.share = Share.of_rank(place.rank, place.world, run.config.train.batch_size)
        self.objective: Objective = RECIPES[run.recipe].build(run.config, run.inputs, run.resources.start)
        self.objective.to(place.device).average = place.mean
        self.objective.early = run.resources.strategy == "ddp" and run.config.train.precision != "fp16"
        self.resting: tuple[str, ...] | None = None
        self.steps_done = 0
        self.skips = torch.zeros(2, dtype=torch.int64, device=place.device)  # in all, in a row; read when asked for
        self.metrics: dict[str, float] = {}
        self.model: nn.Module = self.objective
        self._seat()

    def _seat(self) -> None:
        """Players, and their average, for the parameters as they are now."""
        train, device = self.run.config.train, self.place.device.type
        configs = {"model": train.optimizer} | RECIPES[self.run.recipe].rivals(self.run.config)
        self.players = {
            name: Player.of(self.objective.trainable(name), config, self.run, device)
            for name, config in configs.items()
        }
        self.average = MovingAverage(self.players["model"].parameters, train.optimizer.ema_decay)

    def prepare(self, batch: Batch) -> None:
        """Before the first step of fresh weights, with the first batch; rank 0's weights are what all begin with."""
        generator = step_generator(self.run.config.train.seed, 0)
        self.objective.prepare(to_float(self.place.rows(batch.images.to(self.place.device))), generator)
        if self.place.world > 1:
            for parameter in self.objective.parameters():
                dist.broadcast(parameter.data, src=0)
        self.average = MovingAverage(self.players["model"].parameters, self.run.config.train.optimizer.ema_decay)

    def spread_out(self) -> None:
        """Once weights are in place: wrapped for many workers, its blocks as economical as is asked for."""
        if self.run.resources.strategy == "fsdp":
            state = self.state()
            self.model = spread(self.objective, self.place, "fsdp")
            self._seat()
            self.load(state)
        recompute_blocks(self.objective, self.run.resources.recompute)
        if self.run.resources.compile:
            for module in self.objective.modules():
                if isinstance(module, Block):
                    module.compile(dynamic=True)

    def step(self, batch: Batch) -> Outcome:
        """One update on uint8 images [b, 3, H, W]; numbers stay on device."""
        self._let_rest()
        passes = list(self._passes(batch))
        made: list[Any] = [None] * len(passes)
        values: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        forward_s = 0.0
        for name in self.objective.players(self.steps_done):
            player = self.players[name]
            player.optimizer.zero_grad(set_to_none=True)
            for number, (pixels, targets) in enumerate(passes):
                with gradients_kept(self.model, number < len(passes) - 1):
                    began = time.monotonic()
                    loss = self._loss(pixels, Turn(name, self.steps_done, made[number], targets))
                    forward_s += time.monotonic() - began
                    # DDP takes the mean over ranks, whose shares may differ by an image: so it is the batch's mean.
                    weight = len(pixels) * self.place.world / self.share.of
                    player.scaler.scale(loss.total * weight).backward()
                made[number] = loss.made
                _add(values, name, loss, len(pixels))
            norms[name] = self._update(player)
        bad = ~torch.stack([norm.isfinite() for norm in norms.values()]).all()
        self.skips = torch.stack((self.skips[0] + bad, (self.skips[1] + 1) * bad))
        self.average.update(self.steps_done)
        self.steps_done += 1
        self._revive()
        return Outcome(values, norms["model"], forward_s)

    def _passes(self, batch: Batch) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The worker's share, augmented, in parts that fit its memory."""
        train = self.run.config.train
        generator = step_generator(train.seed, self.steps_done)
        pixels = batch.images.to(self.place.device, non_blocking=True)
        if RECIPES[self.run.recipe].crops and train.crop_scale is not None:
            pixels = random_resized_crop(pixels, scale=train.crop_scale, generator=generator, share=self.share)
        else:
            pixels = to_float(pixels)
        if train.recolour:
            pixels = recolour(pixels, part=train.recolour, generator=generator, share=self.share)
        targets = {name: values.to(self.place.device, non_blocking=True) for name, values in batch.targets.items()}
        for rows in torch.arange(len(pixels)).tensor_split(self._num_passes()):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            yield pixels[part], {name: values[part] for name, values in targets.items()}

    def _num_passes(self) -> int:
        """As many on every worker, since they meet in each; so where shares differ a pass may have an image more."""
        smallest, left = divmod(self.share.of, self.place.world)
        largest = smallest + bool(left)
        return min(smallest, -(-largest // (self.run.resources.micro_batch or largest)))

    def _loss(self, pixels: Tensor, turn: Turn) -> Loss:
        # Every pass on every rank draws the same rollouts: a step costs what its longest rollout costs.
        generator = step_generator(self.run.config.train.seed, self.steps_done)
        dtype = AUTOCAST.get(self.run.config.train.precision)
        with torch.autocast(pixels.device.type, dtype, enabled=dtype is not None):
            return self.model(pixels, generator, turn)

    def _update(self, player: Player) -> Tensor:
        """Clip and step, or skip the step where the gradient is not finite, which all workers see alike.

        The device decides, as it does under a gradient scaler, and the host doesn't wait for it.
        """
        player.scaler.unscale_(player.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(player.parameters.values(), player.config.clip_norm)
        norm = gathered(norm.detach())
        for group in player.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, self.run.num_steps, player.config, self.share.of)
        player.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        player.optimizer.step()
        player.scaler.update()
        return norm

    @property
    def skipped(self) -> int:
        """Steps in which a player had no finite gradient so far; waits for the device."""
        return int(self.skips[0])

    def told(self, outcome: Outcome) -> dict[str, float]:
        """The step's numbers over the whole batch; all workers call this, and wait for their device."""
        names = sorted(outcome.values)
        sums = torch.stack([outcome.values[name].detach().float() for name in names])
        means = self.place.sum(sums) / self.share.of
        return dict(zip(names, means.tolist(), strict=True))

    def check_finite(self, outcome: Outcome) -> None:
        """Raises Diverged, on all workers alike, when too many steps in a row were skipped; waits for the device."""
        in_a_row = int(self.skips[1])
        if in_a_row <= self.run.resources.max_skipped:
            return
        total = float(outcome.values["loss"])
        ranks = [rank for rank, value in enumerate(self.place.gather(total)) if not math.isfinite(value)]
        raise Diverged(
            f"no finite gradient in {in_a_row} steps in a row, up to step {self.steps_done}; the loss "
            f"itself is not finite on {f'ranks {ranks}' if ranks else 'no rank'}"
        )

    def _let_rest(self) -> None:
        """Freeze what rests at this step. DDP is told anew when that changes: it waits for every gradient it knows."""
        resting = self.objective.resting(self.steps_done)
        if resting == self.resting:
            return
        self.resting = resting
        everyone = {name: p for player in self.players.values() for name, p in player.parameters.items()}
        train_only(self.objective, {n: p for n, p in everyone.items() if not resting or not n.startswith(resting)})
        if self.run.resources.strategy == "ddp":
            self.model = spread(self.objective, self.place, "ddp")

    def _revive(self) -> None:
        """Move dead codes at times in the first half; what rank 0 drew is what every rank gets."""
        health, every = self.objective.health, self.objective.revive_every
        due = every and self.steps_done % every == 0
        if health is None or not due or self.steps_done > self.run.num_steps / 2:
            return
        self.pool_counts()
        if self.place.leads:
            health.revive(step_generator(self.run.config.train.seed, self.steps_done))
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
        """Everything, as tensors and plain values; all workers call this, rank 0's is the one to keep."""
        health = self.objective.health
        return {
            "health": None if health is None else health.state_dict(),
            "steps_done": self.steps_done,
            "skipped": self.skips,
            "players": {name: player.state() for name, player in self.players.items()},
            "average": gathered(self.average.values),
            "buffers": self._own_buffers(),
            "metrics": self.metrics,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.steps_done = state["steps_done"]
        self.skips = torch.as_tensor(state["skipped"], device=self.place.device)
        for name, player in self.players.items():
            player.load(state["players"][name])
        self.average.load(state["average"])
        for name, buffer in self.objective.named_buffers():
            if name in state["buffers"]:
                buffer.copy_(state["buffers"][name])
        self.metrics = dict(state["metrics"])
        if self.place.leads and state["health"] is not None and self.objective.health is not None:
            self.objective.health.load_state_dict(state["health"])

    def _own_buffers(self) -> dict[str, Tensor]:
        """What training itself changes: all but those of frozen networks."""
        trained = {name.rpartition(".")[0] for player in self.players.values() for name in player.parameters} | {""}
        return {name: b for name, b in self.objective.named_buffers() if name.rpartition(".")[0] in trained}

    @torch.no_grad()
    def evaluate(self, unseen: Batch) -> dict[str, float]:
        """Figures of the averaged weights on the held-out images of all workers; none for no images."""
        recipe = RECIPES[self.run.recipe]
        self.objective.eval()
        with self.average.swapped_in(), whole(self.objective):
            sums = recipe.evaluate(self.objective, unseen.on(self.place.device)) if len(unseen.images) else {}
        self.objective.train()
        return self._pooled(sums, len(unseen.images))

    def _pooled(self, sums: Mapping[str, float], number: int) -> dict[str, float]:
        """Means over the images of all workers; under FSDP each had them all."""
        names = self.place.union(sums)
        values = torch.tensor([number, *(sums.get(name, 0.0) for name in names)], dtype=torch.float64)
        values = self.place.sum(values.to(self.place.device))
        return {f"val/{name}": v / float(values[0]) for name, v in zip(names, values[1:].tolist(), strict=True)}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> list[Any]:
        """uint8 [H, W, 3] strips of the averaged weights, one an image: rank 0 shows what it has held out."""
        draw = RECIPES[self.run.recipe].pictures
        if draw is None or not len(images):
            return []
        self.objective.eval()
        with self.average.swapped_in(), whole(self.objective):
            strips = draw(self.objective, images.to(self.place.device))
        self.objective.train()
        return strips


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step, the same on every worker."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _add(values: dict[str, Tensor], player: str, loss: Loss, number: int) -> None:
    """Add a pass's loss and its parts, weighted by its images."""
    named = {"loss" if player == "model" else f"{player}/loss": loss.total}
    for term in loss.terms:
        named[term.name if term.num_tokens is None else f"{term.name}@{term.num_tokens}"] = term.value
    for name, value in named.items():
        values[name] = values.get(name, 0) + value.detach() * number
