"""Predicted against searched lengths where there are few images."""

from pathlib import Path

import pytest

from components.analyze.settings import AnalyzeConfig
from components.analyze.single_pass import single_pass
from tests.by_hand import photographs
from tests.components.analyze.by_hand import PREDICTED, inputs_of


@pytest.mark.parametrize(("images", "timed"), [(4, 64), (12, 1), (12, 10)])
def test_any_number_of_images_can_be_timed(images: int, timed: int, tmp_path: Path) -> None:
    settings = AnalyzeConfig(images=images, timed_images=timed, resamples=20)
    found = single_pass(inputs_of(tmp_path, photographs(40), settings, [PREDICTED])).estimates
    assert found["reconstruction: speed"].images == min(images, timed)
    assert found["reconstruction: speed"].value > 0
