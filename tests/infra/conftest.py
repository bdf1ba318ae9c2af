"""The registry that nightly runs find."""

from pathlib import Path

import pytest

from tests.registered import register, registry_at, tracker_in


@pytest.fixture(scope="session")
def _champions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    for name in ("alit-demo", "alit-imagenet100"):
        register(tracker_in(folder), name=name, alias="champion")
    return folder


@pytest.fixture
def registry(_champions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_TRACKING_URI, as deployments set it: the champions are there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_at(_champions))
