"""The driver of a rerun is killed at a random moment, over and over: the next run ends as an unbroken one does.

No temporary files remain after ``alit gc --delete``, which leaves the finished tables.

ALIT_SEEDS says how many moments, 3 by default; ALIT_FIRST_SEED which is the first. One Ray serves all runs.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.garbage import collect
from tests.integration.conftest import ROOT, environment
from tests.nightly import TABLES, change, config_of, figures, leftovers, photographs, rows, run_nightly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

FIRST, SEEDS = (int(os.environ.get(name, default)) for name, default in (("ALIT_FIRST_SEED", 0), ("ALIT_SEEDS", 3)))
IMAGES = 40


@dataclass(frozen=True)
class Nights:
    """A source after its changes, the workspace of the night before, and the tables of an unbroken second night."""

    source: Path
    before: Path
    tables: dict
    seconds: float
    address: str


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    import ray

    folder = tmp_path_factory.mktemp("nights")
    source, before = folder / "photos", folder / "before"
    photographs(source, range(IMAGES))
    (source / "00005x.png").write_bytes(b"no image")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        figures(run_nightly(source, before))
        change(source, new=6, deleted=(0, 7, 30))
        began = time.monotonic()
        whole = run_nightly(source, copy_of(before, folder / "unbroken"))
        seconds = time.monotonic() - began
        assert figures(whole)["tokenize"]["encoded"] == 9
        tables = {stage: rows(whole, stage) for stage in TABLES}
        yield Nights(source, before, tables, seconds, ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def copy_of(workspace: Path, target: Path) -> Path:
    """By hard links: no finished file is ever written to again."""
    subprocess.run(["cp", "-al", str(workspace), str(target)], check=True)
    return target


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_killed_at_any_moment(nights: Nights, tmp_path: Path, seed: int) -> None:
    space = copy_of(nights.before, nights.before.parent / f"seed{seed}")
    killed = kill_after(random.Random(seed).uniform(0, nights.seconds), nights, space, tmp_path / "log")
    record = run_nightly(nights.source, space)
    told = figures(record)
    for stage in TABLES:
        assert rows(record, stage).equals(nights.tables[stage]), (killed, stage)
    assert told["ingest"]["added"] == 6 and told["tokenize"]["encoded"] == told["score"]["scored"] == 9, killed
    *_, collected = collect(config_of(nights.source, f"workspace={space}"), delete=True)
    left = [*leftovers(space), *(path for path in space.glob("scratch/**/*") if path.is_file())]
    assert not left, (killed, collected)
    for stage in TABLES:
        assert rows(record, stage).equals(nights.tables[stage]), (killed, collected, stage)


def kill_after(seconds: float, nights: Nights, space: Path, log: Path) -> str:
    """Run, and kill the run's whole process group so long after its plan is made; returns what it had said."""
    command = [sys.executable, "-m", "tests.nightly", str(nights.source), str(space), nights.address]
    with log.open("wb") as sink:
        run = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            cwd=ROOT,
            env=environment() | {"RAY_AUTH_MODE": "token"},  # as the Ray of this process has it
            start_new_session=True,
        )
    while " stages to run" not in log.read_text():
        assert run.poll() is None, log.read_text()
        time.sleep(0.02)
    try:
        run.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return f"killed after {seconds:.1f} s: {log.read_text()}"
