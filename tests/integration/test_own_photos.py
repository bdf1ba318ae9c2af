"""A folder of one's own photographs with ``--set`` alone."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import SMALL, alit, settings

pytestmark = pytest.mark.slow


@pytest.mark.skipif("ALIT_TEST_DATA" not in os.environ, reason="ALIT_TEST_DATA names no folder of photographs")
def test_photographs_with_set_alone(tmp_path: Path) -> None:
    photos = Path(os.environ["ALIT_TEST_DATA"]) / "photos"
    small = (*SMALL, "data.limit=60", "training.workers=1")
    own = settings(f"data.source={photos}", f"workspace={tmp_path}/w", *small)
    result = alit("run", "demo", *own, "--until", "pack.reconstruction")
    assert result.code == 0, result.out + result.err
    (table,) = (tmp_path / "w" / "pack.reconstruction").glob("*/table")
    assert pq.read_table(table).num_rows == 60
