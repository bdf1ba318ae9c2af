"""What the sections measure, on cases whose answer is known."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components.analyze import familiarity
from components.analyze.complexity import image_statistics, quintiles
from components.analyze.estimates import Estimate
from components.analyze.familiarity import read_source
from components.analyze.regions import cell_means, top_cells
from components.analyze.representation import probed
from components.analyze.rollouts import chooser
from components.analyze.sections import Picture, Section, Table, write_sections
from components.analyze.settings import StrangeSource
from components.analyze.specialization import best_subset, best_token, iou, to_grid
from components.config import RuleConfig
from components.images import encode_png, stack
from tests.by_hand import photographs

RNG = np.random.default_rng(0)


def pixels(number: int) -> np.ndarray:
    return stack([row["image"] for row in photographs(40).rows[:number]])


def test_statistics_order_images_as_people_would() -> None:
    flat = np.full((64, 64, 3), 130, np.uint8)
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pngs = [encode_png(Image.fromarray(flat)), photographs(40).rows[0]["image"], encode_png(Image.fromarray(noise))]
    found = image_statistics(pngs, 90)
    for name in ("jpeg bytes", "entropy"):
        assert np.all(np.diff(found[name]) > 0), name
    assert found["entropy"][0] == 0 and found["entropy"][2] > 7
    assert found["edges"][0] == 0 < found["edges"][1] < 1


def test_fifths_are_of_one_size_and_in_order() -> None:
    values = RNG.normal(size=52)
    fifth = quintiles(values)
    assert set(np.bincount(fifth)) == {10, 11}
    assert all(values[fifth == at].max() < values[fifth == at + 1].min() for at in range(4))


def test_spoilt_images_keep_what_they_should() -> None:
    images = pixels(3)
    assert np.array_equal(familiarity.negative(familiarity.negative(images, RNG), RNG), images)
    assert np.array_equal(familiarity.upside_down(images, RNG)[:, :, 0], images[:, :, -1])
    mixed = familiarity.shuffled(images, RNG)
    assert mixed.shape == images.shape and not np.array_equal(mixed, images)
    for before, after in zip(images, mixed, strict=True):  # the same colours, each as often
        colours = [np.unique(one.reshape(3, -1), axis=1, return_counts=True) for one in (before, after)]
        assert np.array_equal(colours[0][0], colours[1][0]) and np.array_equal(colours[0][1], colours[1][1])


def test_images_are_matched_by_complexity() -> None:
    assert familiarity.nearest(np.array([9.0, 1.2, 5.1]), np.array([1.0, 5.0, 2.0])).tolist() == [1, 0, 1]


def test_random_phases_keep_the_spectrum() -> None:
    grey = np.clip(RNG.normal(128, 8, (1, 3, 64, 64)), 0, 255).astype(np.uint8)  # so that nothing is clipped
    turned = familiarity.random_phases(grey, np.random.default_rng(1))
    one, other = (np.abs(np.fft.fft2(image[0, 0].astype(float))) for image in (grey, turned))
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99
    assert turned.mean() == pytest.approx(grey.mean(), abs=0.5)
    assert np.corrcoef(grey.ravel(), turned.ravel())[0, 1] < 0.3


def test_a_source_is_read_at_the_working_size_without_its_bad_files(tmp_path: Path) -> None:
    for number in range(5):
        Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert read_source(StrangeSource(name="noise", source=str(tmp_path)), 16, 100).shape == (5, 3, 16, 16)
    assert len(read_source(StrangeSource(name="noise", source=str(tmp_path)), 16, 2)) <= 2
    for file in tmp_path.glob("[0-9].png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="'noise': none of"):
        read_source(StrangeSource(name="noise", source=str(tmp_path)), 16, 100)


def test_a_mask_over_the_grid() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:4, :4] = 3  # a quarter: one cell of four
    mask[4:, 4:7] = 5  # most of another cell
    mask[0, 7] = 9  # too small for any
    found = to_grid(mask, 4, ignore=(0,))
    assert {number: cells.tolist() for number, cells in found.items()} == {
        3: [True, False, False, False],
        5: [False, False, False, True],
    }


def test_overlaps_of_tokens_that_are_known() -> None:
    region = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    cells = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]], bool)
    assert iou(cells, region) == pytest.approx([0.5, 0.5, 1 / 6])
    maps = (cells + 0.01 * np.array([0, 0, 0, 0, 0, 0, 1, 2])) / 3  # beyond their own cells they look at the end
    assert best_token(maps, region) == pytest.approx(2 / 6)
    assert best_token(region[None] / 4, region) == 1
    assert best_subset(np.eye(8)[[1, 5, 0, 3, 2]], region) == 1  # the second would only spoil it
    assert best_subset(np.eye(8)[[5, 0]], region) == 1 / 4
    assert best_subset(np.array([[0.3, 0.3, 0.2, 0.2, 0, 0, 0, 0]]), region) == 2 / 4  # half of it is two cells


def test_a_probe_tells_apart_what_can_be_told_apart() -> None:
    labels = np.array(["a", "b"] * 40)
    features = RNG.normal(size=(80, 4)) + 10 * (labels == "a")[:, None]
    assert probed(features[:40], labels[:40], features[40:], labels[40:]).all()
    mixed = RNG.permutation(labels)
    assert probed(RNG.normal(size=(80, 4)), mixed, RNG.normal(size=(80, 4)), labels).mean() < 0.75


def test_cells_of_the_grid() -> None:
    maps = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert cell_means(maps, 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert top_cells(np.array([[1.0, 9.0, 3.0, 9.0]]), 0.25).tolist() == [[False, True, False, False]]


def test_counts_of_other_images_by_a_tasks_rule() -> None:
    values = np.array([[0.1, 0.05, 0.01], [0.5, 0.4, 0.3]])
    for kind in ("threshold", "predicted"):
        choose = chooser(RuleConfig(kind=kind, metric="l1", max=0.05), budgets=(8, 16, 24))
        assert choose(values).tolist() == [16, 24]
    with pytest.raises(ValueError, match="a whole set at once"):
        chooser(RuleConfig(kind="mean_tokens", metric="l1", mean=16), budgets=(8, 16, 24))


def test_sections_as_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    section = Section(
        id="made",
        title="Made",
        claim="c",
        finding="f",
        images=7,
        figures=[Picture("made.png", "alt", "caption", buffer.getvalue())],
        tables=[Table("t", ["a"], [["1"]])],
        estimates={"known": Estimate(0.5, 0.4, 0.6, 7), "undefined": Estimate(*[float("nan")] * 3, 7)},
        headline=["known", "undefined"],
    )
    assert write_sections(str(tmp_path), [section]) == {"made.known": 0.5}
    (told,) = json.loads((tmp_path / "sections.json").read_text())["sections"]
    assert set(told) == {"id", "title", "claim", "finding", "images", "figures", "tables"}
    assert told["figures"] == [{"file": "made.png", "alt": "alt", "caption": "caption"}]
    assert told["tables"] == [{"title": "t", "columns": ["a"], "rows": [["1"]], "note": ""}]
    assert (tmp_path / "made.png").read_bytes() == buffer.getvalue()
    rows = pq.read_table(tmp_path / "table").to_pylist()
    assert rows[0] == {"section": "made", "name": "known", "value": 0.5, "low": 0.4, "high": 0.6, "images": 7}
    assert rows[1]["value"] is None
