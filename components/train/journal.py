"""What a person and MLflow see of a training: rank 0 writes it, and never waits for it."""

import statistics
import time
from typing import Any

import torch

from components.tracking import Behind, Tracker, system_metrics
from components.train.learner import Learner, Outcome, TrainRun

STRAGGLER_S = 1.0  # a worker less than so much slower than the middle one is not worth a word


class Journal:
    """The progress line, the metrics, the pictures, and who is slow."""

    def __init__(self, run: TrainRun, learner: Learner) -> None:
        self._run, self._learner = run, learner
        self._leads = learner.place.leads
        self._behind = Behind(Tracker(**run.tracking)) if self._leads else None
        self._began, self._first = time.monotonic(), learner.steps_done
        self._mark, self._mark_step = self._began, learner.steps_done
        self._waited, self._away, self._forward_s = 0.0, 0.0, 0.0
        self._left = self._began

    def data_came(self) -> None:
        """Count the time since the last step as waiting for data."""
        self._waited += time.monotonic() - self._left

    def stepped(self, outcome: Outcome) -> None:
        """After each step, on every rank; reads numbers off the device only every ``log_every`` steps."""
        step = self._learner.steps_done
        self._forward_s += outcome.forward_s
        if step % self._run.resources.log_every == 0 or step == self._run.num_steps:
            values = self._learner.told(outcome)
            busy = self._learner.place.gather(self._forward_s + self._waited)
            if self._leads:
                self._write(step, values, float(outcome.norm), busy)
            self._mark, self._mark_step = time.monotonic(), step
            self._waited, self._away, self._forward_s = 0.0, 0.0, 0.0
        self._left = time.monotonic()

    def interlude(self, began: float) -> None:
        """Something other than steps took the time since ``began``: it is no part of their speed."""
        self._away += time.monotonic() - began
        self._left = time.monotonic()

    def _write(self, step: int, values: dict[str, float], norm: float, busy: list[float]) -> None:
        now, learner = time.monotonic(), self._learner
        span = max(1e-9, now - self._mark - self._away)
        rate = (step - self._mark_step) * learner.share.of / span
        metrics = {f"train/{name}": value for name, value in values.items()}
        metrics |= {
            "train/grad_norm": norm,
            "train/lr": learner.players["model"].optimizer.param_groups[0]["lr"],
            "train/images_per_s": rate,
            "train/data_wait": self._waited / span,
            "train/workers": learner.place.world,
            "train/skipped_steps": learner.skipped,
            **system_metrics(),
        }
        if learner.objective.health is not None:
            metrics["train/code_perplexity"] = float(learner.objective.health.perplexity())
            metrics["train/code_usage"] = float(learner.objective.health.usage())
        self._slow(busy, metrics)
        learner.metrics |= {"loss": values["loss"], "images_per_s": rate}
        self.metrics(metrics, step)
        left = (now - self._began) / max(1, step - self._first) * (self._run.num_steps - step)
        skipped = f"  {learner.skipped} skipped" if learner.skipped else ""
        done = f"step {step}/{self._run.num_steps}  loss {values['loss']:.4f}"
        self._run.progress(f"{done}  {rate:.0f} images/s{skipped}  {_clock(left)} left")

    def _slow(self, busy: list[float], metrics: dict[str, float]) -> None:
        """``busy``: how long each rank worked by itself, without waiting for others."""
        middle, worst = statistics.median_low(busy), max(busy)
        metrics["train/slowest_worker"] = worst / max(middle, 1e-9)
        if worst > self._run.resources.straggler_ratio * middle + STRAGGLER_S:
            self._run.progress(
                f"worker {busy.index(worst)} is slow: {worst:.1f} s where the middle one takes {middle:.1f} s"
            )

    def evaluated(self, values: dict[str, float], pictures: list[Any]) -> None:
        """After an evaluation; ``pictures`` come under one name each, so that MLflow has a slider over the steps."""
        step = self._learner.steps_done
        self._learner.metrics |= values
        if not self._leads:
            return
        self.metrics(values, step)
        for row, picture in enumerate(pictures):
            self._behind and self._behind.picture(picture, f"held_out_{row:02d}", step)
        self._run.progress(f"step {step}/{self._run.num_steps}  held out: {_in_short(values)}")

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers for MLflow."""
        if self._behind is not None:
            self._behind.metrics(values, step)

    def close(self) -> None:
        """Let MLflow catch up."""
        if self._behind is not None:
            self._behind.close()


def _in_short(values: dict[str, float]) -> str:
    """Each figure once: of those that come for every budget, the fewest and the most tokens."""
    spans: dict[str, list[str]] = {}
    for name, value in values.items():
        metric, _, budget = name.removeprefix("val/").partition("@")
        spans.setdefault(metric, []).append(f"{metric}{'@' if budget else ''}{budget} {value:.4f}")
    return "  ".join(" … ".join(dict.fromkeys((span[0], span[-1]))) for span in spans.values())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def out_of_memory(error: BaseException, run: TrainRun, share: int) -> MemoryError | None:
    """``error`` as advice when it says that memory ran out, on a GPU or for one allocation on a CPU."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate" not in text:
        return None
    now = run.resources.micro_batch or share
    return MemoryError(
        f"a worker ran out of memory with {now} images at once: set training.micro_batch={max(1, now // 2)}; "
        "the batch of a step stays what it is"
    )
