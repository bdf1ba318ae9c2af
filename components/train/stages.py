"""The stages that train: what they read, how Ray Train is asked, what they leave."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from components.artifacts import (
    Artifact,
    BaseTokenizer,
    Figures,
    GridSet,
    ImageSet,
    Job,
    Tokenizer,
    silent,
)
from components.config import (
    BaseStageConfig,
    DistillStageConfig,
    FinetuneStageConfig,
    StageTraining,
    TrainResources,
)
from components.store import filled_folder, join

if TYPE_CHECKING:
    from components.train.checkpoints import Checkpoints
    from components.train.learner import TrainRun


def train_base(job: Job, *, config: BaseStageConfig, resources: TrainResources, images: ImageSet) -> Figures:
    """Train the 2D base tokenizer; the artifact is a BaseTokenizer of the averaged weights."""
    return train(job, "base", config, resources, {"images": images})


def distill(
    job: Job, *, config: DistillStageConfig, resources: TrainResources, images: ImageSet, base: BaseTokenizer
) -> Figures:
    """Train the recurrent tokenizer around the frozen base (paper stage 1); the artifact is a Tokenizer.

    Of a GridSet the base's grids are read; else they are computed in every step.
    """
    return train(job, "distill", config, resources, {"images": images, "base": base})


def finetune(
    job: Job, *, config: FinetuneStageConfig, resources: TrainResources, images: ImageSet, distilled: Tokenizer
) -> Figures:
    """Train all of the tokenizer against a discriminator (paper stage 2); the artifact is a Tokenizer.

    Figures: held-out errors at each budget, and under ``start/`` those of the distilled tokenizer.
    """
    return train(job, "finetune", config, resources, {"images": images, "distilled": distilled})


def train(
    job: Job,
    recipe: str,
    config: StageTraining,
    resources: TrainResources,
    inputs: Mapping[str, Artifact],
) -> Figures:
    """Run the loop on Ray Train and save what its checkpoint holds. Raises ValueError for too few images."""
    from components.train.data import Decode, count_train, label_names
    from components.train.learner import TrainRun
    from components.train.order import EpochOrder
    from components.train.recipes import RECIPES

    images = inputs["images"]
    assert isinstance(images, ImageSet)
    targets = RECIPES[recipe].targets
    grid_bytes = images.grid_bytes if isinstance(images, GridSet) else 0
    decode = Decode(targets, label_names(images) if "label" in targets else (), grids=grid_bytes > 0)
    counts, batch = count_train(images, decode), config.train.batch_size
    number, image_bytes = sum(counts.values()), decode.image_bytes(config.image_size, grid_bytes)
    if number < batch:
        having = f" with a {' and a '.join(targets)}" if targets else ""
        raise ValueError(f"{recipe}: batch_size = {batch}, the train split has only {number} images{having}")
    order = None
    if number * image_bytes > resources.cache_mb * 2**20:
        order = EpochOrder(images.table_uri, counts, decode, batch, image_bytes, config.train.seed)
        for world in range(resources.worker_range.min, resources.worker_range.max + 1):
            order.on(world)  # says what doesn't fit before workers start
    run = TrainRun(
        recipe=recipe,
        config=config,
        resources=resources,
        images=images,
        inputs=inputs,
        decode=decode,
        order=order,
        checkpoints=join(job.scratch, "checkpoints"),
        tracking=job.tracking,
        progress=job.progress,
    )
    figures: Figures = {"steps": run.num_steps, "train_images": number}
    if not run.num_steps:
        return figures | _take_over(job, run)
    _fit(job, run)
    return figures | _save(job, run)


def _take_over(job: Job, run: "TrainRun") -> Figures:
    """No steps were asked for: the given weights are the result."""
    from components.train.data import held_out
    from components.train.learner import Learner
    from components.train.parallel import Place
    from components.train.recipes import RECIPES

    learner = Learner(run, Place(rank=0, world=1))
    with filled_folder(job.output) as folder:
        RECIPES[run.recipe].save(learner.objective, run.config, folder)
    figures = learner.evaluate(held_out(run.images, run.config.train.eval_images, run.decode))
    return {name.removeprefix("val/"): value for name, value in figures.items()}


def _fit(job: Job, run: "TrainRun") -> None:
    """Raises FloatingPointError for a training that diverged."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from components.train.data import SHARD
    from components.train.loop import train_loop
    from components.train.order import InOrder, streamed
    from components.train.trainer import Trainer

    resources = run.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    if resources.memory_mb_per_worker:
        per_worker["memory"] = resources.memory_mb_per_worker << 20  # bytes
    span = resources.worker_range
    ingest: dict[str, Any] = {}
    if run.order is not None:
        in_order = InOrder(run.order, partial(_newest_step, run.checkpoints), resources.data_tasks)
        ingest = {"datasets": {SHARD: streamed(run.order, 0, resources.data_tasks)}, "dataset_config": in_order}
    trainer = Trainer(
        train_loop,
        train_loop_config={"run": run},
        **ingest,
        torch_config=TorchConfig(timeout_s=int(resources.stall_s)),
        scaling_config=ScalingConfig(
            num_workers=span.max if span.min == span.max else (span.min, span.max),
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=resources.resize_s,
        ),
        run_config=RunConfig(
            name=job.key,
            storage_path=job.scratch,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    workers = f"{span.max} workers" if span.min == span.max else f"{span.min} to {span.max} workers"
    job.progress(f"starting {workers} for {run.num_steps} steps")
    said = trainer.fit().return_value or {}
    if "error" in said:
        raise FloatingPointError(said["error"])


def _newest_step(checkpoints: str) -> int:
    """The step that a group of workers goes on from."""
    standing = _open(checkpoints, silent).standing()
    return standing[-1].step if standing else 0


def _open(uri: str, say: Callable[[str], None]) -> "Checkpoints":
    from components.train.checkpoints import Checkpoints

    return Checkpoints(uri, keep=1, say=say)


def _save(job: Job, run: "TrainRun") -> Figures:
    """The averaged weights of the checkpoint that the config asks for as the stage's artifact, and its figures."""
    from components.train.learner import Learner
    from components.train.parallel import Place
    from components.train.recipes import RECIPES

    checkpoints = _open(run.checkpoints, job.progress)
    step = checkpoints.best() if run.config.train.result == "best" else run.num_steps
    learner = Learner(run, Place(rank=0, world=1))
    learner.load(checkpoints.read(step))
    learner.average.copy_to_parameters(learner.average.values)
    with filled_folder(job.output) as folder:
        RECIPES[run.recipe].save(learner.objective, run.config, folder)
    figures: dict[str, Any] = {name.removeprefix("val/"): value for name, value in learner.metrics.items()}
    return {**figures, "step": step, "skipped_steps": learner.skipped}
