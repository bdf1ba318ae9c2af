"""The stages that train: what they read, how Ray Train is asked, what they leave."""

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

from components.artifacts import Artifact, BaseTokenizer, Figures, ImageSet, Job, read_batches
from components.config import BaseStageConfig, DistillStageConfig, TrainResources


def train_base(job: Job, *, config: BaseStageConfig, resources: TrainResources, images: ImageSet) -> Figures:
    """Train the 2D base tokenizer; the artifact is a BaseTokenizer of the averaged weights."""
    return _train(job, "base", config, resources, {"images": images})


def distill(
    job: Job, *, config: DistillStageConfig, resources: TrainResources, images: ImageSet, base: BaseTokenizer
) -> Figures:
    """Train the recurrent tokenizer around the frozen base (paper stage 1); the artifact is a Tokenizer."""
    return _train(job, "distill", config, resources, {"images": images, "base": base})


def _train(
    job: Job,
    recipe: str,
    config: BaseStageConfig | DistillStageConfig,
    resources: TrainResources,
    inputs: Mapping[str, Any],
) -> Figures:
    """Run the loop on Ray Train and save what its last checkpoint holds."""
    from components.train.loop import TrainRun

    images: ImageSet = inputs["images"]
    number = _count_train(images)
    if number < config.train.batch_size:
        raise ValueError(
            f"training.{recipe}.batch_size = {config.train.batch_size}: the train split has only {number} images"
        )
    size = config.image_size if isinstance(config, BaseStageConfig) else config.tokenizer.image_size[0]
    run = TrainRun(
        recipe=recipe,
        config=config,
        resources=resources,
        images=images,
        inputs={name: artifact for name, artifact in inputs.items() if isinstance(artifact, Artifact)},
        cached=number * 3 * size * size <= resources.cache_mb * 2**20,
        tracking=job.tracking,
        progress=job.progress,
    )
    figures: Figures = {"steps": run.num_steps, "train_images": number}
    return figures | (_fit(job, run) if run.num_steps else _take_over(job, run))


def _count_train(images: ImageSet) -> int:
    batches = read_batches(images.table_uri, columns=["split"])
    return sum(pc.sum(pc.equal(batch.column(0), "train")).as_py() or 0 for batch in batches)


def _take_over(job: Job, run: Any) -> Figures:
    """No steps were asked for: the given weights are the result."""
    from components.train.data import held_out
    from components.train.loop import Learner, Place, evaluate
    from components.train.recipes import RECIPES

    learner = Learner(run, Place(rank=0, world=1))
    RECIPES[run.recipe].save(learner.objective, run.config, job.output)
    figures = evaluate(learner, held_out(run.images, run.config.train.eval_images))
    return {name.removeprefix("val/"): value for name, value in figures.items()}


def _fit(job: Job, run: Any) -> Figures:
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from components.train.data import SHARD, train_dataset
    from components.train.loop import train_loop

    resources: TrainResources = run.resources
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"run": run},
        datasets={SHARD: train_dataset(run.images)},
        dataset_config=DataConfig(datasets_to_split=[] if run.cached else "all"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=job.key,
            storage_path=job.scratch,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    job.progress(f"starting {resources.workers} workers for {run.num_steps} steps")
    return _save(job, run, trainer.fit().checkpoint)


def _save(job: Job, run: Any, checkpoint: Any) -> Figures:
    """The averaged weights of the last checkpoint as the stage's artifact, and its figures."""
    from components.train.loop import Learner, Place, read_state
    from components.train.recipes import RECIPES

    learner = Learner(run, Place(rank=0, world=1))
    with checkpoint.as_directory() as folder:
        learner.load(read_state(folder))
    learner.average.copy_to_parameters(learner.average.values)
    RECIPES[run.recipe].save(learner.objective, run.config, job.output)
    return {name.removeprefix("val/"): value for name, value in learner.metrics.items()}
