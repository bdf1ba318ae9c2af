"""The loop that every training worker runs."""

import time
from typing import Any

from components.images import Share
from components.train.checkpoints import Checkpoints
from components.train.data import SHARD, Batches, CachedBatches, StreamedBatches, held_out, read_train
from components.train.journal import Journal, out_of_memory
from components.train.learner import Diverged, Learner, TrainRun
from components.train.parallel import Place
from components.train.recipes import RECIPES
from model.memory import keep_freed_memory


def train_loop(loop_config: dict[str, TrainRun]) -> dict[str, str]:
    """Ray Train's entry: train ``loop_config["run"]`` from its newest whole checkpoint to its last step.

    Returns what no other try could mend as ``{"error": …}``; anything else that goes wrong is raised, and Ray Train
    starts the group of workers again.
    """
    import ray.train
    import ray.train.torch

    keep_freed_memory()
    run, context = loop_config["run"], ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    learner = Learner(run, place)
    checkpoints = Checkpoints(run.checkpoints, keep=run.resources.keep_checkpoints, say=run.progress)
    fresh = not _resume(learner, checkpoints)
    batches = _batches(run, learner)
    if fresh and run.resources.start is None:
        learner.prepare(batches.at(0))
    learner.spread_out()
    try:
        _steps(run, learner, batches, checkpoints)
    except Diverged as error:
        standing = checkpoints.standing()
        good = f"step {standing[-1].step}" if standing else "none"
        return {"error": f"{error}; last good checkpoint: {good}; try a lower learning rate, or precision fp32"}
    except (RuntimeError, MemoryError) as error:
        advice = out_of_memory(error, run, len(learner.share))
        if advice is None:
            raise
        raise advice from error
    return {}


def _resume(learner: Learner, checkpoints: Checkpoints) -> bool:
    """Load the newest whole checkpoint, rank 0's choice, on every worker; whether there was one."""
    place, state = learner.place, None
    if place.leads:
        checkpoints.clean()
        state = checkpoints.newest()
    step = place.same(None if state is None else state["steps_done"])
    if step is None:
        return False
    learner.load(checkpoints.read(step) if state is None else state)
    if place.leads:
        learner.run.progress(f"going on from step {step} with {place.world} workers")
    return True


def _batches(run: TrainRun, learner: Learner) -> Batches:
    import ray.train

    if run.order is None:
        split = read_train(run.images, run.decode, run.resources.data_tasks)
        return CachedBatches(split, share=learner.share, seed=run.config.train.seed)
    order = run.order.on(learner.place.world)
    return StreamedBatches(ray.train.get_dataset_shard(SHARD), share=learner.share, skip=order.skip(learner.steps_done))


def _steps(run: TrainRun, learner: Learner, batches: Batches, checkpoints: Checkpoints) -> None:
    """Until the last step is done and kept."""
    resources, place = run.resources, learner.place
    share = None if resources.strategy == "fsdp" else Share.of_rank(place.rank, place.world, place.world)
    unseen = held_out(run.images, run.config.train.eval_images, run.decode, share)
    journal = Journal(run, learner)
    if learner.steps_done == 0 and RECIPES[run.recipe].goes_on:
        values = learner.evaluate(unseen)
        journal.evaluated({f"start/{name.removeprefix('val/')}": value for name, value in values.items()}, [])
        journal.metrics(values, 0)
    while learner.steps_done < run.num_steps:
        batch = batches.at(learner.steps_done)
        journal.data_came()
        outcome = learner.step(batch)
        journal.stepped(outcome)
        step, last = learner.steps_done, learner.steps_done == run.num_steps
        if last or step % resources.log_every == 0:
            learner.check_finite(outcome)
        if last or step % resources.eval_every == 0:
            began = time.monotonic()
            number = resources.pictures if place.leads or resources.strategy == "fsdp" else 0
            shown = unseen.images[:number]
            journal.evaluated(learner.evaluate(unseen), learner.pictures(shown))
            journal.interlude(began)
        if last or step % resources.checkpoint_every == 0:
            began = time.monotonic()
            _save(learner, checkpoints)
            journal.metrics({"train/checkpoint_s": time.monotonic() - began}, step)
            journal.interlude(began)
    if place.leads:
        checkpoints.close()
    journal.close()


def _save(learner: Learner, checkpoints: Checkpoints) -> None:
    """Every rank has a part in the state; rank 0 writes it."""
    learner.pool_counts()
    state = learner.state()
    if learner.place.leads:
        checkpoints.save(state, step=learner.steps_done, score=_score(learner))


def _score(learner: Learner) -> float | None:
    """The mean held-out error, where this step was evaluated."""
    due = learner.steps_done % learner.run.resources.eval_every == 0 or learner.steps_done == learner.run.num_steps
    for metric in RECIPES[learner.run.recipe].scores:
        errors: list[Any] = [value for name, value in learner.metrics.items() if name.startswith(f"val/{metric}")]
        if errors and due:
            return sum(errors) / len(errors)
    return None
