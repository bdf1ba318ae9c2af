"""A training step: the same on any number of workers, in any number of passes, cut up or whole; what it survives."""

import faulthandler
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from components.artifacts import BaseTokenizer, ImageSet, Tokenizer
from components.config import (
    BaseStageConfig,
    DistillStageConfig,
    FinetuneStageConfig,
    OptimizerConfig,
    StageTraining,
    TrainConfig,
    TrainResources,
)
from components.images import Share
from components.train.data import Batch
from components.train.journal import out_of_memory
from components.train.learner import Diverged, Learner, TrainRun, step_generator
from components.train.parallel import Place
from model import SIZES, AlitTokenizer
from model.base.files import save_base
from model.config import BaseObjectiveConfig, DistillConfig
from model.recipes import FinetuneConfig, PerceptualConfig
from model.starter import STARTER

BATCH, STEPS = 12, 4
STUCK_S = 300
SMALL_BASE = replace(SIZES["demo"].base, channels=8, num_groups=4)


def photographs(number: int) -> Tensor:
    """uint8 [number, 3, 64, 64]: squares of a photograph."""
    from skimage.data import astronaut, chelsea

    whole = torch.from_numpy(astronaut()).permute(2, 0, 1)
    other = torch.from_numpy(chelsea()).permute(2, 0, 1)
    tiles = [
        source[:, y : y + 64, x : x + 64] for source in (whole, other) for y in range(0, 256, 40) for x in (20, 90, 160)
    ]
    return torch.stack(tiles[:number])


@dataclass(frozen=True)
class Case:
    """What a worker process is told."""

    run: TrainRun
    images: Tensor  # [STEPS, BATCH, 3, 64, 64]
    fresh: bool = False  # prepared with the first batch


def training(steps: int = 20, **more: Any) -> TrainConfig:
    return TrainConfig(steps=steps, batch_size=BATCH, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1), **more)


def base_run(train: TrainConfig | None = None, **resources: Any) -> TrainRun:
    config = BaseStageConfig(image_size=64, base=SMALL_BASE, objective=BaseObjectiveConfig(), train=train or training())
    return made_run("base", config, {}, **resources)


def distill_run(folder: Path, *, fresh: bool = False, sampled: int = 2, **resources: Any) -> TrainRun:
    tokenizer = AlitTokenizer.load(STARTER)
    save_base(tokenizer.base, tokenizer.config.base, folder)
    config = DistillStageConfig(
        image_size=64,
        tokenizer=tokenizer.config,
        objective=DistillConfig(sampled_rollouts=sampled, pixel_weight=10.0),
        train=training(seed=4),  # of one rollout a step it draws the first one twice
    )
    start = None if fresh else str(STARTER)
    return made_run("distill", config, {"base": BaseTokenizer(str(folder), "")}, start=start, **resources)


def finetune_run(**resources: Any) -> TrainRun:
    objective = FinetuneConfig(
        perceptual=PerceptualConfig("efficientnet"),
        adversarial_weights=((1, 0.5),),
        discriminators="shared",
        discriminator_channels=8,
        discriminator_layers=2,
    )
    config = FinetuneStageConfig(
        image_size=64, objective=objective, train=training(), discriminator=OptimizerConfig(lr=1e-3, warmup_steps=1)
    )
    return made_run("finetune", config, {"distilled": Tokenizer(str(STARTER), "")}, **resources)


def made_run(recipe: str, config: StageTraining, inputs: Any, **resources: Any) -> TrainRun:
    return TrainRun(recipe, config, TrainResources(**resources), ImageSet("", ""), inputs, {}, print, "")


def go(learner: Learner, images: Tensor) -> list[float]:
    """Some steps; the loss over the whole batch of each."""
    learner.spread_out()
    share = learner.share
    losses = []
    for whole in images:
        outcome = learner.step(Batch(whole[share.start : share.stop]))
        losses.append(learner.told(outcome)["loss"])
    return losses


def worker(rank: int, world: int, folder: str, case: Case) -> None:
    faulthandler.dump_traceback_later(STUCK_S, exit=True)  # one that hangs says where, and the others end with it
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    learner = Learner(case.run, Place(rank, world))
    if case.fresh:
        learner.prepare(Batch(case.images[0][learner.share.start : learner.share.stop]))
    losses = go(learner, case.images)
    state = learner.state()
    if rank == 0:
        torch.save({"losses": losses, "state": state}, f"{folder}/result.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads and the interpreter can wait for each other when both end; Ray kills its workers too


def on_workers(world: int, folder: Path, run: TrainRun, fresh: bool = False) -> tuple[list[float], dict[str, Any]]:
    folder.mkdir()
    images = torch.stack([photographs(36)[torch.randperm(36)[:BATCH]] for _ in range(STEPS)])
    args = world, str(folder), Case(run, images, fresh)
    torch.multiprocessing.start_processes(worker, args=args, nprocs=world, start_method="forkserver")
    result = torch.load(folder / "result.pt", weights_only=True)
    return result["losses"], result["state"]


def compare(one: tuple[list[float], dict[str, Any]], other: tuple[list[float], dict[str, Any]]) -> None:
    """The losses to 1e-4. Weights to 1 %: AdamW moves by the learning rate even where a gradient is rounding alone."""
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    for values in (lambda state: state["players"]["model"]["weights"], lambda state: state["average"]):
        for name, tensor in values(one[1]).items():
            assert near(tensor, values(other[1])[name]), name


def near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).detach().norm()) <= 0.01 * float(other.detach().norm()) + 1e-3


@pytest.fixture(autouse=True)
def _same_images() -> None:
    torch.manual_seed(5)


@pytest.mark.slow
def test_the_same_curve_on_1_2_4_and_5_workers(tmp_path: Path) -> None:
    """Same batch, same steps: shares, augmentation and gradients add up, even where 12 images on 5 are not even."""
    whole = on_workers(1, tmp_path / "1", base_run())
    for world in (2, 4, 5):
        torch.manual_seed(5)
        compare(on_workers(world, tmp_path / str(world), base_run()), whole)


@pytest.mark.slow
def test_fresh_weights_and_single_rollouts_are_the_same_on_5_workers(tmp_path: Path) -> None:
    """A local start takes its codebook from the whole batch, and parameters that a step leaves out end nothing."""
    drawn = [int(torch.randperm(8, generator=step_generator(4, step))[0]) for step in range(STEPS)]
    assert 0 in drawn[:-1]
    run = distill_run(tmp_path / "base", fresh=True, sampled=1)
    torch.manual_seed(5)
    whole = on_workers(1, tmp_path / "1", run, fresh=True)
    torch.manual_seed(5)
    compare(on_workers(5, tmp_path / "5", run, fresh=True), whole)


@pytest.mark.slow
def test_two_players_on_several_workers(tmp_path: Path) -> None:
    """Batch norm in the discriminator knows only its own images, so losses are near and not equal."""
    whole = on_workers(1, tmp_path / "1", finetune_run())
    torch.manual_seed(5)
    several = on_workers(5, tmp_path / "5", finetune_run(micro_batch=1))
    assert several[0] == pytest.approx(whole[0], rel=0.1)
    for state in (whole[1], several[1]):
        assert set(state["players"]) == {"model", "discriminator"}
        assert all(torch.isfinite(t).all() for t in state["players"]["discriminator"]["weights"].values())


@pytest.mark.slow
def test_fsdp_is_ddp_in_pieces(tmp_path: Path) -> None:
    """And what it saves is whole: a learner of its own goes on from it."""
    ddp = on_workers(2, tmp_path / "ddp", distill_run(tmp_path / "base"))
    torch.manual_seed(5)
    fsdp = on_workers(2, tmp_path / "fsdp", distill_run(tmp_path / "base", strategy="fsdp"))
    compare(fsdp, ddp)
    alone = Learner(distill_run(tmp_path / "base"), Place(0, 1))
    alone.load(fsdp[1])
    assert alone.steps_done == STEPS
    assert all(p.ndim == fsdp[1]["average"][name].ndim for name, p in alone.players["model"].parameters.items())


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_passes_add_up_to_the_batch(micro_batch: int) -> None:
    images = photographs(BATCH)[None].repeat(2, 1, 1, 1, 1)
    one, several = Learner(base_run(), Place(0, 1)), Learner(base_run(micro_batch=micro_batch), Place(0, 1))
    assert go(several, images) == pytest.approx(go(one, images), rel=1e-4)
    for name, parameter in one.players["model"].parameters.items():
        assert near(several.players["model"].parameters[name], parameter), name


def test_a_step_without_a_finite_gradient_is_skipped_and_counted() -> None:
    learner, images = Learner(base_run(), Place(0, 1)), photographs(BATCH)[None]
    go(learner, images)
    parameters = learner.players["model"].parameters
    before = {name: p.detach().clone() for name, p in parameters.items()}
    hook = next(iter(parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
    go(learner, images)
    hook.remove()
    assert (learner.skips.tolist(), learner.steps_done) == ([1, 1], 2)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    go(learner, images)
    assert learner.skips.tolist() == [1, 0]
    assert any(not torch.equal(p, before[name]) for name, p in parameters.items())


def test_a_player_that_never_moves_is_noticed_though_the_other_does() -> None:
    learner, images = Learner(finetune_run(max_skipped=3), Place(0, 1)), photographs(BATCH)
    next(iter(learner.players["model"].parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Diverged, match="4 steps in a row"):
        for _ in range(6):
            learner.check_finite(learner.step(Batch(images)))


def test_too_many_in_a_row_end_the_training() -> None:
    train = training().model_copy(update={"optimizer": OptimizerConfig(lr=1e30, warmup_steps=0)})
    learner, images = Learner(base_run(train, max_skipped=3), Place(0, 1)), photographs(BATCH)
    with pytest.raises(Diverged, match=r"4 steps in a row, up to step \d+; .*ranks \[0\]"):
        for _ in range(20):
            learner.check_finite(learner.step(Batch(images)))
    assert learner.skipped == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_near_and_keeps_its_scale(precision: str) -> None:
    learner, images = (
        Learner(base_run(training(precision=precision)), Place(0, 1)),
        photographs(36).view(3, BATCH, 3, 64, 64),
    )
    losses, exact = go(learner, images), go(Learner(base_run(), Place(0, 1)), images)
    assert losses == pytest.approx(exact, rel=0.03) and losses != exact
    state = learner.state()
    scaler = state["players"]["model"]["scaler"]
    assert bool(scaler) == (precision == "fp16")
    if scaler:
        scaler["scale"] = 128.0
        learner.load(state)
        assert learner.players["model"].scaler.get_scale() == 128.0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_step(tmp_path: Path) -> None:
    images = photographs(BATCH)[None]
    plain = Learner(distill_run(tmp_path), Place(0, 1))
    compiled = Learner(distill_run(tmp_path, compile=True), Place(0, 1))
    assert go(compiled, images) == pytest.approx(go(plain, images), rel=1e-4)


def test_a_finetuning_goes_on_from_its_checkpoint() -> None:
    """Both players, their optimizers and the discriminator's statistics are in it."""
    images = photographs(36).view(3, BATCH, 3, 64, 64)
    whole, first = Learner(finetune_run(), Place(0, 1)), Learner(finetune_run(), Place(0, 1))
    go(whole, images)
    go(first, images[:2])
    second = Learner(finetune_run(), Place(0, 1))
    second.load(first.state())
    go(second, images[2:])
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(value, second.objective.state_dict()[name]), name


def test_evaluation_is_of_the_average_and_leaves_the_weights() -> None:
    learner, images = Learner(base_run(), Place(0, 1)), photographs(BATCH)
    go(learner, images[None].repeat(3, 1, 1, 1, 1))
    before = {name: p.detach().clone() for name, p in learner.players["model"].parameters.items()}
    values = learner.evaluate(Batch(images))
    assert set(values) == {"val/l1", "val/psnr"}
    assert all(torch.equal(p, before[name]) for name, p in learner.players["model"].parameters.items())
    learner.average.copy_to_parameters(learner.average.values)
    pixels = images.float() / 255
    with torch.no_grad():
        restored = learner.objective.eval().base.autoencode(pixels, None).images.clamp(0, 1)  # type: ignore[attr-defined]
    assert values["val/l1"] == pytest.approx(float((restored - pixels).abs().mean()), rel=1e-4)
    assert [picture.shape for picture in learner.pictures(images[:2])] == [(64, 128, 3)] * 2


def test_out_of_memory_names_what_to_set() -> None:
    def allocate() -> None:
        torch.empty(1 << 50)

    def fail() -> None:
        raise RuntimeError("another error")

    def caught(call: Callable[[], None]) -> BaseException:
        with pytest.raises(RuntimeError) as error:
            call()
        return error.value

    advice = out_of_memory(caught(allocate), base_run(), share=12)
    assert advice is not None and "12 images at once: set training.micro_batch=6" in str(advice)
    assert "micro_batch=2" in str(out_of_memory(caught(allocate), base_run(micro_batch=5), share=12))
    assert out_of_memory(caught(fail), base_run(), share=12) is None


def test_shares_cover_the_batch() -> None:
    for world in range(1, 9):
        shares = [Share.of_rank(rank, world, BATCH) for rank in range(world)]
        assert [n for share in shares for n in range(share.start, share.stop)] == list(range(BATCH))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
