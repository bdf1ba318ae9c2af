"""A manifest of real images with labels (CIFAR-10), masks (CamVid) and depth (indoor RGB-D) together."""

import csv
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TypeVar

Row = dict[str, str]
Item = TypeVar("Item")

HELD_OUT_SCENES = {"parts_bin", "dining_room", "tum_desk", "sun_a"}  # 17 of the 149 RGB-D frames
TEST_EVERY = 5  # of the CIFAR-10 images one in so many is from its test folder


def write_manifest(folder: Path, data: Path, *, cifar: int, camvid: int, rgbd: int) -> Path:
    """``folder/manifest.csv`` with so many images of each set below ``data`` (ALIT_TEST_DATA), by absolute paths.

    CIFAR-10 is taken evenly from its classes, train and test folders in turn; CamVid and RGB-D evenly over their own
    lists, with CamVid's own splits and RGB-D split by scene. Raises ValueError when there are fewer.
    """
    data = data.absolute()
    rows = [*_cifar(data / "cifar10", cifar), *_camvid(data / "segmentation", camvid), *_rgbd(data / "depth", rgbd)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "manifest.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["uri", "label", "depth", "mask", "split"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return file


def _cifar(root: Path, count: int) -> list[Row]:
    tests = count // TEST_EVERY
    return [*_folder(root / "train", count - tests), *_folder(root / "test", tests)]


def _folder(root: Path, count: int) -> list[Row]:
    classes = [sorted(path for path in folder.iterdir()) for folder in sorted(root.iterdir())]
    in_turn = (file for files in zip_longest(*classes) for file in files if file is not None)
    found = list(islice(in_turn, count))
    if len(found) < count:
        raise ValueError(f"{root}: {count} images asked for, {len(found)} are there")
    return [{"uri": str(file), "label": file.parent.name, "split": root.name} for file in found]


def _camvid(root: Path, count: int) -> Iterator[Row]:
    for row in _evenly(_read(root / "manifest.csv"), count):
        image, mask = root / "images" / row["image"], root / "masks" / row["mask"]
        yield {"uri": str(image), "mask": str(mask), "split": row["split"]}


def _rgbd(root: Path, count: int) -> Iterator[Row]:
    for row in _evenly(_read(root / "manifest.csv"), count):
        image, depth = root / "rgb" / f"{row['name']}.jpg", root / "depth" / f"{row['name']}.png"
        split = "val" if row["scene"] in HELD_OUT_SCENES else "train"
        yield {"uri": str(image), "depth": str(depth), "split": split}


def _read(file: Path) -> list[Row]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` items, spread over all of ``items`` in their order."""
    if count > len(items):
        raise ValueError(f"{count} rows asked for, {len(items)} are there")
    return [items[place * len(items) // count] for place in range(count)]
