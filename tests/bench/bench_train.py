"""`make bench-train`: how fast training is, and what it spends beside the steps; every figure from runs of one call.

Real runs of the pipeline on the demo's photographs: one worker and two with the same batch, images kept in memory and
streamed, and the paper's ALIT small at 256 px, streamed. Figures are what the runs told MLflow: medians over the
intervals between two lines of the log, the first of which is left out.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from components.train.optimizer import MovingAverage
from model import SIZES, AlitTokenizer

COMMON = ("data.crops=160", "training.base.further_steps=0", "training.log_every=5", "training.pictures=0")
DEMO = ("training.distill.further_steps=40", "training.checkpoint_every=10", "training.eval_every=40")
PAPER = (
    "data.image_size=256",
    "data.crops=24",
    "tokenizer.size=alit_small",
    "training.from=scratch",
    "training.base.steps=1",
    "training.base.batch_size=1",
    "training.base_objective.revive_every=0",
    "training.base.eval_images=1",
    "training.distill.steps=4",
    "training.distill.batch_size=2",
    "training.distill.eval_images=1",
    "training.distill.recolour=0",
    "training.distill_objective.pixel_weight=0",
    "training.log_every=1",
    "training.checkpoint_every=2",
    "training.eval_every=4",
    "training.cpus_per_worker=1",
)
METRICS = ("train/images_per_s", "train/data_wait", "train/checkpoint_s")


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    settings: tuple[str, ...]


CASES = (
    Case("demo, 1 worker", (*DEMO, "training.workers=1", "training.cpus_per_worker=1")),
    Case("demo, 2 workers", (*DEMO, "training.workers=2", "training.cpus_per_worker=1")),
    Case(
        "demo, 2 workers, streamed", (*DEMO, "training.workers=2", "training.cpus_per_worker=1", "training.cache_mb=0")
    ),
    Case("ALIT small 256 px, 1 worker, streamed", (*PAPER, "training.workers=1", "training.cache_mb=0")),
)


def run(case: Case, folder: Path) -> dict[str, float]:
    """Medians of the metrics of the case's distill stage. Raises CalledProcessError."""
    arguments = [f"workspace={folder}", "ray.num_cpus=2", *COMMON, *case.settings]
    command = [sys.executable, "-m", "pipelines", "run", "demo", "--until", "distill"]
    for argument in arguments:
        command += ["--set", argument]
    subprocess.run(command, check=True, capture_output=True, text=True)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name == "alit"]
    (distill,) = client.search_runs(experiments, "tags.`alit.stage` = 'distill'")
    medians = {}
    for name in METRICS:
        history = [metric.value for metric in client.get_metric_history(distill.info.run_id, name)]
        medians[name] = statistics.median(history[1:] or history)
    return medians


def average_cost(size: str, repeats: int = 5) -> tuple[float, float]:
    """Seconds of one update of the moving average, and millions of parameters in it."""
    tokenizer = AlitTokenizer(SIZES[size])
    named = {name: p for name, p in tokenizer.named_parameters() if not name.startswith("base.")}
    average = MovingAverage(named, 0.999)
    times = []
    for step in range(repeats):
        began = time.monotonic()
        average.update(step)
        times.append(time.monotonic() - began)
    return statistics.median(times), sum(p.numel() for p in named.values()) / 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the paper's size")
    quick = parser.parse_args().quick
    cases = [case for case in CASES if not (quick and "ALIT" in case.name)]
    print("| case | images/s | waiting for data | a checkpoint, seen by the loop |\n|---|---|---|---|", flush=True)
    rates = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            values = run(case, Path(folder) / "w")
        rate, wait, checkpoint = (values[name] for name in METRICS)
        rates[case.name] = rate
        print(f"| {case.name} | {rate:.2f} | {wait:.1%} | {checkpoint:.2f} s |", flush=True)
    print(f"\n2 workers: {rates['demo, 2 workers'] / rates['demo, 1 worker']:.2f} times 1 worker")
    for size in ("demo", "alit_small"):
        seconds, millions = average_cost(size)
        print(f"moving average, {size} ({millions:.1f} M): {seconds * 1e3:.1f} ms a step")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
