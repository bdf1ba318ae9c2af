"""Times selection over a million images: ``make bench-select``.

A ScoreTable of the demo's real scores, drawn and jittered, is written where the demo config would have it. Then every
rule chooses in a process of its own, `alit select` where the command has the rule; wall clock from start to exit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.artifacts import Manifest, ScoreTable
from components.config import NoConfig, RuleConfig
from components.select_counts import select
from components.store import write_json
from pipelines.config import load_config
from pipelines.train import build
from tests.by_hand import job, photographs, score_lists

COMMANDS = {
    "threshold": ("--max", "0.08"),
    "within": ("--within", "1.1"),
    "mean_tokens": ("--mean-tokens", "24"),
}
RULES = {"best": {"metric": "l1"}, "fixed": {"metric": "l1", "num_tokens": 32}}


def write(folder: Path, rows: int, rows_per_file: int) -> None:
    """``rows`` rows: each a crop's scores, all its values scaled by one random number near 1."""
    made, generator = photographs(64), np.random.default_rng(0)
    (folder / "table").mkdir(parents=True)
    for number, start in enumerate(range(0, rows, rows_per_file)):
        count = min(rows_per_file, rows - start)
        drawn = generator.integers(0, len(made.rows), count)
        scale = generator.lognormal(0, 0.2, (count, 1)).astype(np.float32)
        columns = {
            "l1": made.scores["l1"][drawn] * scale,
            "mse": made.scores["mse"][drawn] * scale**2,
            "psnr": made.scores["psnr"][drawn] - 20 * np.log10(scale),
        }
        split = np.where(generator.random(count) < 0.1, "val", "train")
        lists = {name: score_lists(values) for name, values in columns.items()}
        table = pa.table({"image_id": [f"{start + row:020x}" for row in range(count)], "split": split, **lists})
        pq.write_table(table, folder / "table" / f"part-{number:06d}.parquet", compression="zstd")
    write_json(str(folder / "budgets.json"), list(made.budgets))
    ways = {"l1": "lower", "mse": "lower", "psnr": "higher"}
    write_json(str(folder / "metrics.json"), {name: {"direction": way} for name, way in ways.items()})
    manifest = Manifest(ScoreTable.schema, ScoreTable.version, "score", folder.name, {}, {}, {"images": rows})
    write_json(str(folder / "artifact.json"), asdict(manifest))


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GB of a command; raises RuntimeError when it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command}: {said.read().decode()}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    """Write the table, choose by every rule, print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-file", type=int, default=1000)
    parser.add_argument("--one", nargs=2, metavar=("RULE", "SCORES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        choose_one(*options.one)
        return
    with tempfile.TemporaryDirectory() as workspace:
        key = build(load_config("demo", [f"workspace={workspace}"])).keys()["score"]
        folder = Path(workspace, "score", key)
        write(folder, options.rows, options.rows_per_file)
        print(f"{options.rows} images, {len(list((folder / 'table').iterdir()))} files, {os.cpu_count()} cores\n")
        print("| rule | s | peak GB |\n|---|---|---|")
        alit = [sys.executable, "-m", "pipelines", "select", "demo", "--set", f"workspace={workspace}"]
        for name, rule in COMMANDS.items():
            seconds, peak = timed([*alit, "--task", "reconstruction", *rule])
            print(f"| `alit select {' '.join(rule)}` ({name}) | {seconds:.1f} | {peak:.2f} |", flush=True)
        for name in RULES:
            seconds, peak = timed([sys.executable, "-m", "tests.bench.bench_select", "--one", name, str(folder)])
            print(f"| {name} | {seconds:.1f} | {peak:.2f} |", flush=True)


def choose_one(name: str, scores: str) -> None:
    """One rule that the command line lacks, by the stage itself."""
    (task,) = load_config("demo").tasks
    task = task.model_copy(update={"rule": RuleConfig(kind=name, **RULES[name])})
    with tempfile.TemporaryDirectory() as output:
        select(job(Path(output)), config=task, resources=NoConfig(), scores=ScoreTable.open(scores))


if __name__ == "__main__":
    main()
