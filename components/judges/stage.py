"""judge.<task>: a judge becomes an artifact: pinned, tried on originals, refused when it is near chance."""

import tempfile
from typing import Any

from pyarrow import fs

from components.artifacts import Figures, ImageSet, Job
from components.config import InferenceResources
from components.judges.judge import Judge
from components.judges.record import build_judge, save_judge
from components.judges.trial import save_gallery, try_judge
from components.plugins import load_class
from components.store import filesystem
from components.task_config import TASK_KINDS, Answer, JudgeStageConfig
from components.tasks.task import Task
from components.tracking import Tracker


def make_judge(job: Job, *, config: JudgeStageConfig, resources: InferenceResources, images: ImageSet) -> Figures:
    """Write a Judge; figures are what it scored on originals that have the target.

    Raises ValueError when the judge can't be had, doesn't answer what the task asks, or is near chance.
    """
    import ray

    remote = ray.remote(num_cpus=resources.cpus_per_actor, num_gpus=resources.gpus_per_actor, max_retries=2)
    return ray.get(remote(_make).remote(job, config, images))


def _make(job: Job, config: JudgeStageConfig, images: ImageSet) -> Figures:
    judge = build_judge(config, answer_of(config))
    return finish(job, config, images, judge)


def finish(job: Job, config: JudgeStageConfig, images: ImageSet, judge: Judge) -> Figures:
    """Try ``judge`` and leave it as the stage's artifact; for those that are built and those that were trained."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge.to(device)
    with torch.inference_mode():
        scored = try_judge(judge, config, images, device)
        refuse_near_chance(config, scored)
        judge.to("cpu")
        with tempfile.TemporaryDirectory() as folder:
            record = save_judge(judge, config, folder, scored)
            if config.kind == "retrieval":
                judge.to(device)
                scored["gallery"] = save_gallery(judge, images, config.options.gallery, folder, device)
            Tracker(**job.tracking).artifact(folder, "judge")
            store, output = filesystem(job.output)
            fs.copy_files(folder, output, destination_filesystem=store)
    if "note" in scored:
        job.progress(str(scored["note"]))
    return {**scored, "digest": record.digest[:12]}


def answer_of(config: JudgeStageConfig) -> Answer:
    """What the task asks of its judge; raises ValueError when a task of one's own doesn't say."""
    kind = TASK_KINDS.get(config.kind)
    answer = kind.answer if kind else load_class(config.kind, Task).answer
    if answer is None:
        raise ValueError(f"{config.kind!r} has a judge, {config.spec!r}, and doesn't say in `answer` what it asks it")
    return answer


def refuse_near_chance(config: JudgeStageConfig, scored: dict[str, Any]) -> None:
    """Raises ValueError, with the numbers, when what a judge scored is hardly better than a constant answer."""
    if "skill" not in scored or scored["skill"] >= config.options.min_skill:
        return
    name = next(iter(scored))
    raise ValueError(
        f"judge {config.spec!r} is near chance: {name} {scored[name]:.4g} on {scored['tried']} originals "
        f"({scored['split']}), a constant answer has {scored['constant']:.4g}; skill {scored['skill']:.3g} is below "
        f"judge_options.min_skill = {config.options.min_skill:g}"
    )
