"""The order of streamed training: every image once an epoch, and the same from wherever it goes on."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from components.artifacts import IMAGES_SCHEMA, ImageSet
from components.images import encode_png, stack
from components.train.data import Decode, count_train, held_out, read_train
from components.train.order import EpochOrder, Part

SIDE = 16
FILES = (5, 0, 13, 8, 1, 9)  # images of the train split in each


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Tiles of a photograph; every third row of a file is held out."""
    from skimage.data import astronaut

    folder, photo = tmp_path_factory.mktemp("images"), astronaut()
    (folder / "table").mkdir()
    number = 0
    for index, count in enumerate(FILES):
        rows = []
        for place in range(count + count // 2 + 1):
            y, x = divmod(number * SIDE, 480)
            rows.append(
                {
                    "image_id": f"{number:04d}", "uri": f"{number}.png", "label": None, "width": SIDE, "height": SIDE,
                    "split": "train" if place < count else "val",
                    "image": encode_png(Image.fromarray(photo[y % 480 : y % 480 + SIDE, x : x + SIDE])),
                }
            )  # fmt: skip
            number += 1
        pq.write_table(pa.Table.from_pylist(rows, IMAGES_SCHEMA), folder / "table" / f"part-{index:06d}.parquet")
    return ImageSet(str(folder), "")


def order(images: ImageSet, batch: int, world: int, steps_per_window: int, seed: int = 0) -> EpochOrder:
    class Narrow(EpochOrder):
        @property
        def steps_per_window(self) -> int:
            return steps_per_window

    return Narrow(images.table_uri, count_train(images, Decode()), Decode(), batch, 3 * SIDE * SIDE, seed, world)


def ids(plan: EpochOrder, part: Part) -> list[str]:
    return plan.read(part)["image_id"].to_pylist()


def batches(plan: EpochOrder, epoch: int, first_step: int = 0) -> list[list[list[str]]]:
    """[step][rank][image]: what each worker would get."""
    parts = list(plan.parts(epoch, first_step))
    share, steps = plan.batch // plan.world, []
    for at in range(0, len(parts), plan.world):
        ranks = [ids(plan, part) for part in parts[at : at + plan.world]]
        for row in range(0, len(ranks[0]), share):
            steps.append([rank[row : row + share] for rank in ranks])
    return steps


def test_the_counts_are_those_of_the_train_split(images: ImageSet) -> None:
    assert tuple(count_train(images, Decode()).values()) == FILES


def test_a_split_that_is_kept_is_the_whole_train_split_by_id(images: ImageSet) -> None:
    rows = pq.read_table(images.table_uri).to_pandas().query("split == 'train'").sort_values("image_id")
    for threads in (1, 4):
        split = read_train(images, Decode(), threads)
        assert split["image_id"].tolist() == rows["image_id"].tolist()
        assert np.array_equal(split["image"], stack(rows["image"].tolist()))


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 3), share=st.integers(1, 4), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_is_every_image_at_most_once(
    images: ImageSet, world: int, share: int, window: int, epoch: int
) -> None:
    plan = order(images, share * world, world, window)
    steps = batches(plan, epoch)
    assert len(steps) == plan.steps_per_epoch == sum(FILES) // plan.batch
    seen = [image for step in steps for rank in step for image in rank]
    assert len(seen) == len(set(seen)) == plan.steps_per_epoch * plan.batch
    assert all(len(rank) == share for step in steps for rank in step)


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 3), window=st.integers(1, 5), step=st.integers(0, 11))
def test_a_training_that_goes_on_reads_what_an_unbroken_one_would_have(
    images: ImageSet, world: int, window: int, step: int
) -> None:
    plan = order(images, 3 * world, world, window)
    step %= plan.steps_per_epoch
    whole = batches(plan, 1)
    resumed = batches(plan, 1, step)[plan.skip(plan.steps_per_epoch + step) :]
    assert resumed == whole[step:]


def test_epochs_and_seeds_differ(images: ImageSet) -> None:
    plan = order(images, 6, 2, 2)
    assert batches(plan, 0) == batches(plan, 0)
    assert batches(plan, 0) != batches(plan, 1)
    assert batches(plan, 0) != batches(order(images, 6, 2, 2, seed=1), 0)


def test_an_uneven_batch_is_refused_before_work_starts(images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"batch_size = 7: .* 2, is needed.*cache_mb"):
        order(images, 7, 2, 1)


def test_held_out_images_are_the_first_by_id_and_shared_among_workers(images: ImageSet) -> None:
    from components.images import Share

    every = held_out(images, 1000, Decode()).images
    assert len(every) == sum(count // 2 + 1 for count in FILES) and every.dtype.is_floating_point is False
    few = held_out(images, 7, Decode()).images
    assert np.array_equal(few, every[:7])
    shared = [held_out(images, 7, Decode(), Share.of_rank(rank, 3, 3)).images for rank in range(3)]
    assert np.array_equal(np.concatenate(shared), few)
