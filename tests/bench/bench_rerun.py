"""Times what a rerun costs that finds little or nothing new: ``python -m tests.bench.bench_rerun``.

Planning and comparing: a folder of empty files and a standing ImageSet with their listing, each in a process of its
own, whose peak memory is told too, beside that of a process which only imports. Ingest: crops of real photographs, from
scratch, then with one in a hundred more, as the stage's own seconds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from components.artifacts import MANIFEST, Manifest
from components.ingest.listing import Changes, Listed, Numbering, merge, read_listing, sort_out
from components.sources import open_source
from components.sources.folder import FolderSource
from components.store import write_json
from pipelines.config import load_config
from pipelines.dag import plan
from pipelines.runner import RunOptions, run
from tests.nightly import SMALL, nightly, photographs

FOLDERS = 100


def empty_files(folder: Path, number: int) -> None:
    """``number`` files without content, spread over folders."""
    for index in range(number):
        place = folder / f"{index % FOLDERS:03d}"
        place.mkdir(parents=True, exist_ok=True)
        os.close(os.open(place / f"{index:07d}.png", os.O_CREAT | os.O_WRONLY))


def source_of(folder: Path) -> FolderSource:
    return open_source(load_config("demo", [*SMALL, f"data.source={folder}"]).data)


def standing(folder: Path, space: Path) -> Path:
    """An ImageSet of ``folder`` that stands, as far as planning and comparing look at one."""
    stage = nightly(folder)["ingest"]
    uri = space / "ingest" / stage.key({})
    source, changes = source_of(folder), Changes()
    listed = (Listed(item, "added") for item in source.list())
    for _ in sort_out(listed, source, Numbering(0, 64), str(uri / "listing"), changes):
        pass
    config = stage.config.model_dump(mode="json")
    made = Manifest("image_set", 3, "ingest", uri.name, {}, config, {}, stage.version, dict(stage.fingerprint))
    write_json(str(uri / MANIFEST), asdict(made))
    return uri


def plan_again(folder: Path, space: Path) -> None:
    states = {one.stage.name: one.state for one in plan(nightly(folder), str(space))}
    assert states["ingest"] == "stands"


def compare(folder: Path, space: Path) -> None:
    (uri,) = (space / "ingest").iterdir()
    source, changes = source_of(folder), Changes()
    found = merge(read_listing(str(uri / "listing")), source.list())
    assert not list(sort_out(found, source, Numbering(10**6, 64), str(space / "compared"), changes))
    assert changes.reused and not changes.to_decode


def nothing(folder: Path, space: Path) -> None:
    """What importing costs."""


ALONE = {"plan": plan_again, "compare": compare, "nothing": nothing}


def alone(what: str, folder: Path, space: Path) -> dict[str, float]:
    """Seconds and peak MB of a process that does one of ALONE."""
    command = [sys.executable, "-m", "tests.bench.bench_rerun", "--alone", what, str(folder), str(space)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def ingest_seconds(source: Path, space: Path) -> tuple[float, dict]:
    record = run(nightly(source).until("ingest"), workspace=str(space), options=RunOptions())
    assert record.exit_code == 0, record.stages[0].error
    return record["ingest"].seconds, record["ingest"].figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        what, folder, space = options.alone
        began = time.monotonic()
        ALONE[what](Path(folder), Path(space))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"s": round(time.monotonic() - began, 2), "peak_mb": round(peak, 1)}))
        return
    with tempfile.TemporaryDirectory() as home:
        for number in options.objects:
            folder, space = Path(home, f"in{number}"), Path(home, f"w{number}")
            empty_files(folder, number)
            standing(folder, space)
            for what in ALONE:
                print(f"{number} objects, {what}: {alone(what, folder, space)}", flush=True)
        source, space = Path(home, "photographs"), Path(home, "w")
        photographs(source, range(options.images))
        print("from scratch:", *ingest_seconds(source, space), flush=True)
        photographs(source, range(options.images, options.images + options.images // 100))
        print("with 1% more:", *ingest_seconds(source, space), flush=True)


if __name__ == "__main__":
    main()
