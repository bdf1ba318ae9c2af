"""judge.<task> for a judge of kind probe: its head is trained here, the rest is as for any judge."""

from components.artifacts import Figures, ImageSet, Job
from components.config import TrainResources
from components.judges.stage import finish
from components.task_config import JudgeStageConfig


def train_probe(job: Job, *, config: JudgeStageConfig, resources: TrainResources, images: ImageSet) -> Figures:
    """Train the head, try it on held-out originals, leave a Judge.

    Raises ValueError for too few images with the target, fewer than two labels, or a judge near chance.
    """
    import ray

    from components.train.data import label_names
    from components.train.stages import train

    labels = label_names(images) if config.target == "label" else ()
    if config.target == "label" and len(labels) < 2:
        raise ValueError(f"judge 'probe': two labels at least are needed, the train split has {list(labels)}")
    known = config.model_copy(update={"labels": labels})
    fresh = resources.model_copy(update={"start": None, "strategy": "ddp"})
    figures = train(job, f"probe_{config.target}", known, fresh, {"images": images})
    remote = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=2)
    tried = ray.get(remote(_finish).remote(job, config, images))
    return {**figures, **tried}


def _finish(job: Job, config: JudgeStageConfig, images: ImageSet) -> Figures:
    from components.judges.probe import Probe, ProbeJudge
    from components.store import local_folder

    with local_folder(job.output) as folder:
        judge = ProbeJudge(Probe.load(folder))
    return finish(job, config, images, judge)
