"""The driver is killed in the middle of training; the next run goes on from the last checkpoint."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import LONG, STREAMED, run_of, weights
from tests.faults.nodes import start
from tests.integration.conftest import alit, settings

pytestmark = pytest.mark.slow


def test_kill_the_driver_in_the_middle_of_distill(tmp_path: Path, prepared: Path, unbroken: Path) -> None:
    """The next run skips what stands, goes on from the last checkpoint, and ends with the weights of an unbroken run.

    Bitwise: each step follows from the seed and its number, and the checkpoint has all the rest.
    """
    arguments = run_of(prepared, *STREAMED)
    first = start(arguments, tmp_path / "first.log")
    first.wait_for(r"distill +step 1[2-9]/20")
    first.process.send_signal(signal.SIGKILL)
    first.finish()
    assert not list((prepared / "distill").glob("*/artifact.json"))

    second = alit("run", *arguments)
    assert second.code == 0, second.out + second.err
    for stage in ("ingest", "base"):
        assert re.search(rf"^{stage} +reused", second.out, re.MULTILINE), second.out
    resumed = re.search(r"distill +going on from step (\d+)", second.err)
    assert resumed and int(resumed[1]) >= 5, second.err
    assert not list(prepared.glob(".drafts/*"))

    assert weights(prepared) == weights(unbroken)


def test_interrupt_stops_cleanly(tmp_path: Path, prepared: Path) -> None:
    """Ctrl-C in a terminal, which every process of the run gets."""
    arguments = ["demo", *settings(f"workspace={prepared}", *LONG)]
    run = start(arguments, tmp_path / "log", own_group=True)
    run.wait_for(r"distill +step [5-9]/20")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish(timeout_s=60) == 128 + signal.SIGINT
    assert re.search(r"^distill +cancelled", (tmp_path / "log").read_text(), re.MULTILINE)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{prepared}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == "alit"])
    states = {run.data.tags.get("alit.stage", "parent"): run.info.status for run in runs}
    assert states["parent"] == states["distill"] == "KILLED"
    assert states["ingest"] == "FINISHED"
    assert not (prepared / ".lock").exists() and not list(prepared.glob(".drafts/*"))
