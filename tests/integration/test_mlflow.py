"""MLflow as its users meet it: the page in a browser, the model server, the model in an environment of its own."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from packaging.requirements import Requirement
from PIL import Image

from tests.browser import chromium
from tests.integration.conftest import Workspace, environment

pytestmark = pytest.mark.slow

MODEL = "alit-demo"
START_S = 120.0
PREDICT = """
import sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
image = pd.DataFrame({"image": [open(sys.argv[2], "rb").read()]})
print(model.predict(image, params={"rule": "reconstruction"}).to_json(orient="records"))
"""


@pytest.fixture(scope="module")
def store(finished: Workspace) -> str:
    return f"sqlite:///{finished.path}/mlflow.db"


@pytest.fixture(scope="module")
def client(store: str) -> MlflowClient:
    return MlflowClient(tracking_uri=store, registry_uri=store)


@contextmanager
def serving(*command: str, path: str, store: str) -> Iterator[str]:
    """``mlflow COMMAND`` on a free port until the block ends; its address, once it answers at ``path``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = environment() | {"MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--host", "127.0.0.1", "--port", str(port)],
        env=told | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}{path}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    raise AssertionError(f"{address} does not answer: {process.communicate()[0]}")


def first_image(finished: Workspace) -> bytes:
    return pq.read_table(finished.artifact("ingest") / "table")["image"][0].as_py()


def environment_with(requirements: list[str], folder: Path) -> Path:
    """A fresh environment with ``requirements`` and what they need, and nothing else; its python.

    The packages are links to those of this one: pip would take minutes to copy the same files.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in with_dependencies(requirements):
        package = distribution(name)
        for top in {Path(file).parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            source, link = Path(str(package.locate_file(top))), site / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return folder / "bin" / "python"


def with_dependencies(requirements: list[str]) -> set[str]:
    """Names of the pinned ``requirements``, which must be installed as pinned, and of all that they need."""
    found: set[str] = set()
    queue = [Requirement(one) for one in requirements]
    for one in queue:
        assert one.specifier.contains(distribution(one.name).version, prereleases=True), one
    while queue:
        name = queue.pop().name
        if name in found:
            continue
        found.add(name)
        needs = (Requirement(text) for text in distribution(name).requires or ())
        queue += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def child(client: MlflowClient, stage: str):
    """The run of a stage that ran."""
    experiment = client.get_experiment_by_name("alit")
    search = f"tags.alit.stage = '{stage}' and tags.alit.state = 'done'"
    return client.search_runs([experiment.experiment_id], search)[0]


def test_a_run_says_what_it_was_made_of(finished: Workspace, client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("alit")
    found = client.search_runs([experiment.experiment_id], "tags.alit.pipeline = 'train'")
    parent = min(found, key=lambda run: run.info.start_time)
    listing = json.loads((finished.artifact("ingest") / "artifact.json").read_text())["fingerprint"]["listing"]
    assert parent.data.tags["alit.data_digest"] == listing
    for stage in ("ingest", "distill", "publish"):
        assert parent.data.tags[f"alit.key.{stage}"] == finished.artifact(stage).name
    assert parent.data.tags["alit.code_version"]
    distill = child(client, "distill")
    assert [item.dataset.digest for item in distill.inputs.dataset_inputs] == [listing[:36]]
    images = [file.path for file in client.list_artifacts(distill.info.run_id, "images")]
    steps = {re.split(r"[%+]", path)[2] for path in images if "held_out_00" in path}
    assert steps == {"4"}  # a slider over the steps that were evaluated
    tables = [file.path for file in client.list_artifacts(child(client, "publish").info.run_id)]
    assert {"budgets.json", "counts_reconstruction.json", "rules_reconstruction.json"} <= set(tables)
    for run in (child(client, "report"), parent):
        assert "report.html" in [file.path for file in client.list_artifacts(run.info.run_id)]


def test_a_version_has_a_card(finished: Workspace, client: MlflowClient) -> None:
    version = client.get_model_version(MODEL, "1")
    summary = json.loads((finished.artifact("score") / "summary.json").read_text())["rows"]
    for row in summary:
        assert f"{row['mean']:.4g}" in version.description
    for heading in ("# alit-demo", "## Rules", "## Licence and limits", "## How to load it", "## Lineage"):
        assert heading in version.description
    assert version.tags["alit.key.tokenizer"] == finished.artifact("distill").name
    assert version.tags["alit.data_digest"] in version.description


def test_the_card_can_be_followed(
    finished: Workspace, client: MlflowClient, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    card = client.get_model_version(MODEL, "1").description
    (code,) = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    (tmp_path / "photo.jpg").write_bytes(first_image(finished))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    mlflow.set_tracking_uri(store)
    names: dict = {}
    exec(code.replace(f"models:/{MODEL}@champion", f"models:/{MODEL}/1"), names)
    assert names["tokens"]["num_tokens"].tolist() == [len(names["tokens"]["token_ids"][0])]
    assert Image.open(io.BytesIO(base64.b64decode(names["pictures"]["image"][0]))).size == (64, 64)


def test_a_model_server_answers_with_a_picture(finished: Workspace, store: str) -> None:
    image = base64.b64encode(first_image(finished)).decode()
    asked = {
        "dataframe_split": {"columns": ["image"], "data": [[image]]},
        "params": {"num_tokens": 64, "output": "images"},
    }
    command = ("models", "serve", "--model-uri", f"models:/{MODEL}/1", "--env-manager", "local")
    with serving(*command, path="/ping", store=store) as address:
        request = urllib.request.Request(
            f"{address}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (row,) = json.load(answer)["predictions"]
    assert row["num_tokens"] == 64
    picture = Image.open(io.BytesIO(base64.b64decode(row["image"])))
    assert (picture.format, picture.size) == ("PNG", (64, 64))


def test_a_model_runs_with_its_stated_requirements_alone(
    finished: Workspace, client: MlflowClient, store: str, tmp_path: Path
) -> None:
    version = client.get_model_version(MODEL, "1")
    folder = Path(client.get_model_version_download_uri(MODEL, version.version).removeprefix("file://"))
    (tmp_path / "photo.png").write_bytes(first_image(finished))
    python = environment_with((folder / "requirements.txt").read_text().split(), tmp_path / "venv")
    told = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", PREDICT, f"models:/{MODEL}/1", "photo.png"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=told | {"MLFLOW_TRACKING_URI": store},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])
    packed = pq.read_table(finished.artifact("pack.reconstruction") / "table").to_pylist()[0]
    assert row["token_ids"] == packed["token_ids"]


def test_the_page_of_mlflow_shows_it(finished: Workspace, client: MlflowClient, store: str, tmp_path: Path) -> None:
    distill, publish, report = (child(client, stage).info for stage in ("distill", "publish", "report"))
    picture = next(
        file.path.removeprefix("images/")
        for file in client.list_artifacts(publish.run_id, "images")
        if file.path.endswith(".png")
    )
    base = f"/#/experiments/{publish.experiment_id}"
    shown = {
        "runs": (f"{base}/runs", ["train 20", "demo"]),
        "metrics": (f"{base}/runs/{distill.run_id}/model-metrics", ["03 distill (train/"]),
        "artifacts": (f"{base}/runs/{publish.run_id}/artifacts", ["budgets.json", "images"]),
        "page": (f"{base}/runs/{report.run_id}/artifacts", ["report.html"]),
        "version": (f"/#/models/{MODEL}/versions/1", ["An adaptive-length image tokenizer", "Licence and limits"]),
    }
    command = ("ui", "--backend-store-uri", store, "--workers", "1")
    with serving(*command, path="/health", store=store) as address, chromium() as browser:
        for name, (path, texts) in shown.items():
            browser.visit(f"{address}{path}")
            for text in texts:
                browser.wait_for(text)
            if name == "metrics":
                browser.wait_until("document.querySelector('.js-plotly-plot .trace')")
            browser.glance(tmp_path / f"mlflow-{name}.png")
        browser.visit(f"{address}{shown['artifacts'][0]}")
        browser.press("images")
        browser.press(picture)
        browser.wait_until(
            "document.querySelector('.js-plotly-plot image') || document.querySelector('img[src^=blob]')"
        )
        browser.glance(tmp_path / "mlflow-picture.png")
