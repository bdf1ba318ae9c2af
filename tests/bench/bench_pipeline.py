"""`make bench-pipeline`: what the pipeline costs beside plain loops over the same photographs and the same model.

Stages run on a Ray of this process with as many CPUs as the loops have, on data sets of several sizes. Images/s are
what more images cost, between one size and the next: starting processes and loading models are left out, as they are
of the loops. Peak memory is the private memory of every process of this tree, sampled while the stage runs.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import torch

from components.artifacts import CodeBook, ImageSet, Job, Manifest, ScoreTable, Tokenizer
from components.config import DataConfig, InferenceResources, IngestResources, IngestStageConfig, PrecisionConfig
from components.images import encode_png, prepare, stack, to_float
from components.ingest import ingest
from components.score import score
from components.sources.demo import DemoSource
from components.store import write_json
from components.task_config import ScoreStageConfig
from components.tokenize_images import tokenize
from model import AlitTokenizer
from model.starter import model_folder
from model.tokens import TokenBatch

SIZE, BATCH, DISTINCT, ROWS = 64, 32, 200, 50
SAMPLE_S = 4.0  # between looks at memory, which themselves take a tenth of a second of CPU
SCORES = ScoreStageConfig(metrics=("l1", "mse", "psnr"))


@dataclass
class Watch:
    """The most memory that this process tree had for itself."""

    peak_gb: float = 0.0

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Samples memory for as long as the block lasts."""
        done = threading.Event()
        thread = threading.Thread(target=self._sample, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _sample(self, done: threading.Event) -> None:
        while not done.wait(SAMPLE_S):
            total = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.peak_gb = max(self.peak_gb, total / 1e9)


def photographs(folder: Path, number: int, side: int) -> Path:
    """``number`` JPEG files of ``side`` px, links to ``DISTINCT`` crops of the demo's photographs."""
    source, made = DemoSource(crops=DISTINCT), []
    (folder / "distinct").mkdir(parents=True)
    for item in source.list():
        image = prepare(source.read(item.path), size=side, max_pixels=10**8).image
        made.append(folder / "distinct" / f"{len(made):03d}.jpg")
        image.save(made[-1], quality=90)
    images = folder / "images"
    images.mkdir()
    for index in range(number):
        os.link(made[index % len(made)], images / f"{index:06d}.jpg")
    return images


def job(output: Path) -> Job:
    output.mkdir(parents=True)
    return Job(stage="bench", key=output.name, workspace="", output=str(output), scratch="")


def finished(folder: Path, kind: type) -> None:
    """The manifest that a run would leave."""
    values = vars(Manifest(kind.schema, kind.version, "bench", folder.name, {}, {}, {}))
    write_json(str(folder / "artifact.json"), values)


def stages_of(folder: Path, images: Path, cpus: int) -> dict[str, Callable[[Job], object]]:
    """ingest, tokenize and score of a folder of images."""
    tokenizer = Tokenizer(uri=model_folder("starter"), key="starter")
    actors = InferenceResources(batch_size=BATCH, actors=cpus)
    config = IngestStageConfig(data=DataConfig(source=str(images), image_size=SIZE))
    image_set, codes = ImageSet(str(folder / "ingest"), "a"), CodeBook(str(folder / "tokenize"), "b")
    tasks = IngestResources(tasks=cpus, files_per_block=ROWS)
    model = {"resources": actors, "images": image_set, "tokenizer": tokenizer}
    return {
        "ingest": lambda job: ingest(job, config=config, resources=tasks),
        "tokenize": lambda job: tokenize(job, config=PrecisionConfig(), **model),
        "score": lambda job: score(job, config=SCORES, codes=codes, **model),
    }


KINDS = {"ingest": ImageSet, "tokenize": CodeBook, "score": ScoreTable}


def measure(folder: Path, number: int, stages: list[str], cpus: int, side: int) -> dict[str, tuple[float, float]]:
    """Stage -> seconds and peak GB over ``number`` images."""
    known, found = stages_of(folder, photographs(folder, number, side), cpus), {}
    for name in stages:
        watch, began = Watch(), time.monotonic()
        with watch.memory():
            known[name](job(folder / name))
        found[name] = time.monotonic() - began, watch.peak_gb
        finished(folder / name, KINDS[name])
    return found


def _prepared(path: str) -> int:
    return len(encode_png(prepare(Path(path).read_bytes(), size=SIZE, max_pixels=10**8).image))


def loop_ingest(images: Path, cpus: int) -> float:
    """Images/s of a pool of processes that read, decode, resize and encode; starting them is left out."""
    paths = [str(path) for path in sorted(images.iterdir())]
    with get_context("spawn").Pool(cpus) as pool:
        pool.map(_prepared, paths[: 4 * cpus], chunksize=1)
        began = time.monotonic()
        for _ in pool.imap_unordered(_prepared, paths, chunksize=16):
            pass
        return len(paths) / (time.monotonic() - began)


def _loop_model(part: tuple[str, int, int]) -> tuple[float, float, int]:
    """Seconds of encoding, of decoding and measuring, and images, in a process with one thread."""
    table, start, number = part
    torch.set_num_threads(1)
    tokenizer = AlitTokenizer.load(model_folder("starter"))
    rows = pq.read_table(table, columns=["image"]).slice(start, number)["image"].to_pylist()
    encoding = scoring = 0.0
    with torch.inference_mode():
        for at in range(0, len(rows), BATCH):
            began = time.monotonic()
            pixels = to_float(torch.from_numpy(stack(rows[at : at + BATCH])))
            codes = [step.codes.numpy() for step in tokenizer.rollout(pixels) if step.codes is not None]
            encoded = time.monotonic()
            for ids in codes:
                restored = tokenizer.decode(TokenBatch.from_numpy(list(ids), tokenizer.config.codebook_size))
                error = restored - pixels
                mse = error.square().mean((1, 2, 3))
                np.stack([error.abs().mean((1, 2, 3)), mse, -10 * torch.log10(mse)])
            encoding, scoring = encoding + encoded - began, scoring + time.monotonic() - encoded
    return encoding, scoring, len(rows)


def loop_model(table: Path, number: int, cpus: int) -> tuple[float, float]:
    """Images/s of encoding and of decoding and measuring, in as many processes as the stages have actors."""
    parts = [(str(table), share * number // cpus, number // cpus) for share in range(cpus)]
    with get_context("spawn").Pool(cpus) as pool:
        measured = pool.map(_loop_model, parts, chunksize=1)
    return tuple(sum(images / seconds[which] for *seconds, images in measured) for which in (0, 1))  # type: ignore[return-value]


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 5000, 20000], help="sizes for ingest")
    parser.add_argument("--model-images", type=int, nargs="+", default=[250, 1000], help="sizes for tokenize and score")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--side", type=int, default=500, help="of the JPEG files, px; ImageNet's have some 500 x 375")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="alit-bench-"))
    limits = {"object_store_memory": 300 * 2**20, "include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=options.cpus, **limits)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        rates = table({number: ["ingest"] for number in options.images}, home / "ingest", options.cpus, options.side)
        sizes = {number: ["ingest", "tokenize", "score"] for number in options.model_images}
        rates |= table(sizes, home / "all", options.cpus, options.side)
        files = home / "ingest" / str(options.images[-1]) / "images"
        made = home / "all" / str(options.model_images[-1]) / "ingest" / "table"
        loops = {"ingest": loop_ingest(files, options.cpus)}
        loops["tokenize"], loops["score"] = loop_model(made, options.model_images[-1], options.cpus)
        print("\n| stage | plain loop, images/s | the stage against it |\n|---|---|---|")
        for stage, rate in loops.items():
            print(f"| {stage} | {rate:.0f} | {rates[stage] / rate:.2f} |")
        print(f"\n{options.cpus} CPUs, {options.side} to {SIZE} px, batches of {BATCH}, files of {ROWS} images")
    finally:
        ray.shutdown()
        shutil.rmtree(home)


def table(sizes: dict[int, list[str]], home: Path, cpus: int, side: int) -> dict[str, float]:
    """Print a row a stage and size; returns the last images/s of each stage but those that only lead to others."""
    print("\n| images | stage | s | more images/s | peak GB |\n|---|---|---|---|---|", flush=True)
    rates: dict[str, float] = {}
    before: dict[str, tuple[int, float]] = {}
    for number, stages in sizes.items():
        for stage, (seconds, peak_gb) in measure(home / str(number), number, stages, cpus, side).items():
            less, earlier = before.get(stage, (0, 0.0))
            rates[stage] = (number - less) / (seconds - earlier)
            shown = f"{rates[stage]:.0f}" if less else "-"
            print(f"| {number} | {stage} | {seconds:.1f} | {shown} | {peak_gb:.2f} |", flush=True)
            before[stage] = number, seconds
    if len(stages) > 1:
        rates.pop("ingest")
    return rates


if __name__ == "__main__":
    main()
