"""The parts of the training loop: optimizer groups, learning rate, moving average, batches."""

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.config import OptimizerConfig, TrainConfig
from components.images import Share, recolour
from components.train.data import Batch, CachedBatches, StreamedBatches
from components.train.learner import Learner, TrainRun
from components.train.optimizer import MovingAverage, build_optimizer, learning_rate
from components.train.parallel import Place
from model import SIZES, AlitTokenizer
from model.config import DistillConfig
from model.objectives import DistillObjective


@pytest.fixture(scope="module")
def objective() -> DistillObjective:
    torch.manual_seed(0)
    return DistillObjective(AlitTokenizer(SIZES["demo"]), DistillConfig())


def test_norms_biases_and_tables_do_not_decay(objective: DistillObjective) -> None:
    named = objective.trainable()
    optimizer = build_optimizer(named, OptimizerConfig(weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(named)
    for name, parameter in named.items():
        matrix = name.endswith(".weight") and parameter.ndim >= 2 and "codebook" not in name
        assert decay[id(parameter)] == (0.05 if matrix else 0.0), name


@given(steps=st.integers(2, 500), warmup=st.integers(0, 100))
def test_learning_rate_rises_then_falls(steps: int, warmup: int) -> None:
    config = OptimizerConfig(base_lr=1.5e-4, warmup_steps=warmup)
    rates = [learning_rate(step, steps, config, 64) for step in range(steps)]
    top = int(np.argmax(rates))
    assert max(rates) <= 1.5e-4 * 64 / 256 * (1 + 1e-9)
    assert all(a <= b for a, b in zip(rates[:top], rates[1 : top + 1], strict=True))
    assert all(a >= b for a, b in zip(rates[top:-1], rates[top + 1 :], strict=True))
    assert all(rate > 0 for rate in rates)


def test_moving_average_is_the_weighted_mean() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = MovingAverage({"p": parameter}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(20):
        parameter.data += 1
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.data
    assert torch.allclose(average.values["p"], expected)
    with average.swapped_in():
        assert torch.allclose(parameter.data, expected)
    assert torch.equal(parameter.data, torch.full((3,), 20.0))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_batches_depend_on_seed_and_step_alone(world: int) -> None:
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    split = {"image_id": np.array([f"{i:04d}" for i in range(50)]), "image": images}
    ranks = [CachedBatches(split, share=Share.of_rank(rank, world, 8), seed=3) for rank in range(world)]
    alone = CachedBatches(split, share=Share(0, 8, 8), seed=3)
    for step in (0, 5, 6, 23):
        assert torch.equal(torch.cat([rank.at(step).images for rank in ranks]), alone.at(step).images)
    epoch = torch.cat([alone.at(step).images[:, 0, 0, 0] for step in range(6)])
    assert len(epoch.unique()) == 48


class Stream:
    """What Ray Train hands a worker: five batches an epoch, numbered on."""

    def __init__(self) -> None:
        self.epoch = 0

    def iter_batches(self, **_: Any) -> Iterator[dict[str, np.ndarray]]:
        self.epoch += 1
        for number in range(5 * (self.epoch - 1), 5 * self.epoch):
            yield {"image_id": np.array(["x"]), "image": np.full((1, 3, 2, 2), number, np.uint8)}


def test_a_streamed_batch_stays_that_of_its_step_however_often_it_is_asked_for() -> None:
    batches = StreamedBatches(Stream(), share=Share(0, 1, 1), skip=2)  # type: ignore[arg-type]
    seen = [int(batches.at(step).images[0, 0, 0, 0]) for step in (2, 2, 3, 4, 4, 5, 6)]
    assert seen == [2, 2, 3, 4, 4, 5, 6]


def test_recolour_keeps_shape_range_and_its_share() -> None:
    from skimage.data import astronaut

    photo = torch.from_numpy(astronaut()[:64, :64].transpose(2, 0, 1).copy()).float()[None].repeat(200, 1, 1, 1) / 255
    changed = recolour(photo, part=0.5, generator=torch.Generator().manual_seed(0))
    assert changed.shape == photo.shape and changed.min() >= 0 and changed.max() <= 1
    different = (changed != photo).flatten(1).any(1).float().mean()
    assert 0.35 < different < 0.65
    assert torch.equal(recolour(photo, part=0.0, generator=torch.Generator()), photo)


def test_a_checkpoint_holds_all_that_a_step_needs(tmp_path: Any) -> None:
    """Three steps, saved, read back and three more, dead codes revived among them, are the same as six."""
    from components.artifacts import ImageSet
    from components.config import BaseStageConfig, TrainResources
    from model.config import BaseObjectiveConfig

    base = replace(SIZES["demo"].base, channels=8, num_groups=4)
    config = BaseStageConfig(
        image_size=64,
        base=base,
        objective=BaseObjectiveConfig(revive_every=4),
        train=TrainConfig(steps=12, batch_size=4, recolour=0.5),
    )
    run = TrainRun("base", config, TrainResources(), ImageSet("", ""), {}, {}, print, "")
    images = torch.randint(0, 256, (6, 4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = Learner(run, Place(0, 1))
    for step in range(6):
        whole.step(Batch(images[step]))
    first = Learner(run, Place(0, 1))
    for step in range(3):
        first.step(Batch(images[step]))
    stored = io.BytesIO()
    torch.save(first.state(), stored)
    stored.seek(0)
    second = Learner(run, Place(0, 1))
    second.load(torch.load(stored, weights_only=True))
    for step in range(3, 6):
        second.step(Batch(images[step]))
    for name, parameter in whole.players["model"].parameters.items():
        assert torch.equal(parameter, second.players["model"].parameters[name]), name
        assert torch.equal(whole.average.values[name], second.average.values[name]), name


def test_what_rests_is_left_alone(objective: DistillObjective) -> None:
    resting = DistillObjective(objective.tokenizer, DistillConfig(decoder_first_steps=5))
    assert resting.resting(5) == ()
    prefixes = resting.resting(4)
    named = resting.trainable()
    assert any(name.startswith(prefixes) for name in named)
    assert all(name.startswith("tokenizer.decoder.") for name in named if not name.startswith(prefixes))
