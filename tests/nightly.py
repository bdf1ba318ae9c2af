"""The stages of a nightly rerun: the main job with a tokenizer that no listing changes, here a small random one.

``python -m tests.nightly SOURCE WORKSPACE [ADDRESS]`` runs them in a process of their own.
"""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from skimage import data

from components.artifacts import Figures, Job
from components.config import MlflowSettings, NoConfig, RaySettings
from pipelines import train
from pipelines.config import RunConfig, load_config
from pipelines.dag import Pipeline, Stage
from pipelines.recorder import RunRecord
from pipelines.runner import RunOptions, run
from tests.model.conftest import SMALL as SMALL_TOKENIZER
from tests.model.conftest import build

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
TABLES = ("ingest", "tokenize", "score", "select.reconstruction", "pack.reconstruction")
LAST = TABLES[-1]
SMALL = (
    "data.image_size=32",
    "training.from=scratch",
    "inference.batch_size=64",
    "ingest.files_per_block=32",
    "tasks.0.rule={kind: best, metric: l1}",
)


def photographs(folder: Path, numbers: range, *, shift: int = 0) -> None:
    """Crops of real photographs, called by their numbers; ``shift`` takes them elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    shots = [Image.open(Path(data.__file__).parent / name).convert("RGB") for name in PHOTOGRAPHS]
    for number in numbers:
        shot = shots[number % len(shots)]
        left, top = (7 * number + shift) % (shot.width - 96), (5 * number + shift) % (shot.height - 96)
        shot.crop((left, top, left + 96, top + 96)).save(folder / f"{number:05d}.png")


def small_tokenizer(job: Job, *, config: NoConfig, resources: NoConfig) -> Figures:
    """A tokenizer of fixed random weights as an artifact."""
    build(SMALL_TOKENIZER).save(job.output)
    return {}


def config_of(source: Path, *overrides: str) -> RunConfig:
    """The demo's, of ``source``, small."""
    config = load_config("demo", [*SMALL, *overrides, f"data.source={source}", f"mlflow.uri={store_of(source)}"])
    assert isinstance(config, RunConfig)
    return config


def store_of(source: Path) -> str:
    """The MLflow database, beside the source."""
    return f"sqlite:///{source}.db"


def nightly(source: Path, *overrides: str) -> Pipeline:
    """From ``source`` to packed tokens."""
    stages = [
        stage
        for stage in train.build(config_of(source, *overrides)).until(LAST).stages
        if stage.name not in ("base", "distill")
    ]
    model = Stage(
        "model", run="tests.nightly:small_tokenizer", produces="Tokenizer", config=NoConfig(), resources=NoConfig()
    )
    renamed = {"distill": "model"}
    return Pipeline(
        "nightly",
        (
            model,
            *(
                replace(stage, needs={name: renamed.get(need, need) for name, need in stage.needs.items()})
                for stage in stages
            ),
        ),
    )


def run_nightly(
    source: Path, workspace: Path | str, *overrides: str, force: tuple[str, ...] = (), address: str | None = None
) -> RunRecord:
    """Run it on the Ray that is connected, or at ``address``; the record is kept beside the source."""
    options = RunOptions(force=force, mlflow=MlflowSettings(uri=store_of(source)), ray=RaySettings(address=address))
    return run(nightly(source, *overrides), workspace=str(workspace), options=options)


def figures(record: RunRecord) -> dict[str, Any]:
    """Stage -> its figures; raises AssertionError when one did not end well."""
    assert record.exit_code == 0, [(stage.name, stage.error) for stage in record.stages if stage.error]
    return {stage.name: stage.figures for stage in record.stages}


def rows(record: RunRecord, stage: str) -> pa.Table:
    """The table of a stage, sorted by image."""
    (uri,) = (one.uri for one in record.stages if one.name == stage)
    return pq.read_table(f"{uri}/table").sort_by("image_id").combine_chunks()


def leftovers(workspace: Path) -> Iterator[Path]:
    """What a run should not leave: drafts, partial files, files to decode, a lock."""
    for path in workspace.rglob("*"):
        if path.name.endswith(".part") or path.parent.name == ".drafts" or path.name in ("blocks", ".lock"):
            yield path


def change(source: Path, *, new: int = 12, changed: range = range(10, 13), deleted: tuple[int, ...] = ()) -> None:
    """What happens to the source between two nights."""
    photographs(source, range(1000, 1000 + new))
    photographs(source, changed, shift=40)
    for number in deleted:
        (source / f"{number:05d}.png").unlink()


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    source, workspace, *address = sys.argv[1:]
    record = run_nightly(Path(source), Path(workspace), address=address[0] if address else None)
    print(json.dumps(figures(record)))


if __name__ == "__main__":
    main()
