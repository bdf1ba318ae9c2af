"""Most of these tests want a workspace with an MLflow database of its own."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from mlflow.store.db import utils


@pytest.fixture(scope="session", autouse=True)
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow makes an empty database by a second of migrations: all but a process's first are copies of that one."""
    first, make = tmp_path_factory.mktemp("mlflow") / "empty.db", utils._initialize_tables

    def copy(engine: Any) -> None:
        source, target = first, engine.url.database
        if not first.exists():
            make(engine)
            source, target = target, source
        with closing(sqlite3.connect(source)) as made, closing(sqlite3.connect(target)) as fresh:
            made.backup(fresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copy)
        yield
