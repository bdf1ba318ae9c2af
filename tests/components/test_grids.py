"""Grids kept for distilling: made once, of new images alone, and training sees no difference."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components.artifacts import BaseTokenizer, GridSet, ImageSet, Job, Manifest
from components.config import (
    DataConfig,
    DistillStageConfig,
    InferenceResources,
    IngestResources,
    IngestStageConfig,
    NoConfig,
    OptimizerConfig,
    TrainConfig,
    TrainResources,
)
from components.grids import make_grids
from components.images import Share, to_float
from components.ingest import ingest
from components.store import write_json
from components.train.data import Batch, CachedBatches, Decode, count_train, held_out, read_train
from components.train.learner import Learner, TrainRun
from components.train.order import EpochOrder
from components.train.parallel import Place
from model import AlitTokenizer
from model.base.files import save_base
from model.config import DistillConfig
from model.starter import STARTER

BATCH = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    tokenizer, folder = AlitTokenizer.load(STARTER), tmp_path_factory.mktemp("base")
    save_base(tokenizer.base, tokenizer.config.base, folder)
    return BaseTokenizer(str(folder), "b")


@pytest.fixture(scope="module")
def workspace(base, tmp_path_factory: pytest.TempPathFactory):
    """An ImageSet of photographs and the grids of it; then both with more images. (folder, figures of each)"""
    import ray

    folder, figures = tmp_path_factory.mktemp("workspace"), []
    crops = folder / "crops"
    crops.mkdir()
    ray.init("local", num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        for first, last in ((0, 30), (30, 40)):
            add_crops(crops, first, last)
            images = made(ImageSet, folder / "ingest" / str(last), crops)
            grids = made(GridSet, folder / "grids" / str(last), {"images": images, "base": base})
            figures.append(grids.manifest.counts)
    finally:
        ray.shutdown()
    return folder, figures


def add_crops(folder: Path, first: int, last: int) -> None:
    from PIL import Image
    from skimage.data import astronaut, coffee

    for number in range(first, last):
        photo, left = (astronaut, coffee)[number % 2](), 6 * number
        Image.fromarray(photo[left : left + 150, left : left + 150]).save(folder / f"{number:03d}.png")


def made(kind, output: Path, given):
    """Run ingest of a folder, or grids of inputs, as the runner would."""
    output.mkdir(parents=True)
    stage, key, keys = output.parent.name, output.name, {}
    job = Job(stage, key, str(output.parents[1]), str(output), str(output))
    if kind is ImageSet:
        config = IngestStageConfig(data=DataConfig(source=str(given), image_size=64, held_out=0.2))
        figures = ingest(job, config=config, resources=IngestResources(tasks=1, files_per_block=10))
    else:
        config, keys = NoConfig(), {name: artifact.key for name, artifact in given.items()}
        figures = make_grids(job, config=config, resources=InferenceResources(batch_size=4), **given)
    values = Manifest(kind.schema, kind.version, stage, key, keys, config.model_dump(mode="json"), figures)
    write_json(str(output / "artifact.json"), dataclasses.asdict(values))
    return kind.open(str(output))


@pytest.mark.slow
def test_every_image_has_the_grid_that_the_base_makes_of_it_and_new_ones_alone_are_encoded(workspace, base):
    folder, figures = workspace
    assert figures == [{"images": 30, "encoded": 30}, {"images": 40, "encoded": 10}]
    images, grids = (pq.read_table(folder / stage / "40" / "table") for stage in ("ingest", "grids"))
    for name in ("image_id", "split", "image"):
        assert grids[name] == images[name]
    decoded = Decode(grids=True)(grids)
    tokenizer = AlitTokenizer.load(STARTER)
    with torch.inference_mode():
        for number in (0, 17, 39):
            expected = tokenizer.base.encode(to_float(torch.from_numpy(decoded["image"][number : number + 1])))
            found = torch.tensor(decoded["grid"][number]).view(1, -1, *tokenizer.config.grid)
            assert torch.allclose(found, expected.features_BEhw, atol=1e-5)
            assert torch.equal(tokenizer.base.grid(found).target, expected.target)


@pytest.mark.slow
def test_training_on_grids_is_training_on_images(workspace, base):
    folder, _ = workspace
    images, grids = ImageSet.open(str(folder / "ingest" / "40")), GridSet.open(str(folder / "grids" / "40"))
    losses = [steps(images, base, Decode()), steps(grids, base, Decode(grids=True))]
    assert losses[0][1] != pytest.approx(losses[0][0], rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def steps(images: ImageSet, base: BaseTokenizer, decode: Decode) -> list[float]:
    """Losses of two steps from the starter, whose base's encoder runs only where no grid is given."""
    tokenizer = AlitTokenizer.load(STARTER)
    train = TrainConfig(steps=9, batch_size=BATCH, crop_scale=None, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1))
    config = DistillStageConfig(
        image_size=64, tokenizer=tokenizer.config, objective=DistillConfig(sampled_rollouts=2), train=train
    )
    resources = TrainResources(start=str(STARTER), micro_batch=4)
    run = TrainRun("distill", config, resources, images, {"base": base}, {}, print, "", decode)
    learner = Learner(run, Place(0, 1))
    encoded = []
    learner.objective.tokenizer.base.encoder.register_forward_hook(lambda *_: encoded.append(1))
    learner.spread_out()
    batches = CachedBatches(read_train(images, decode, threads=2), share=Share(0, BATCH, BATCH), seed=0)
    losses = [learner.told(learner.step(batches.at(step)))["loss"] for step in range(2)]
    assert len(encoded) == (0 if decode.grids else 4)
    return losses


@pytest.mark.slow
def test_grids_are_streamed_beside_their_images_and_not_read_for_what_is_held_out(workspace):
    folder, _ = workspace
    grids, decode = GridSet.open(str(folder / "grids" / "40")), Decode(grids=True)
    whole = read_train(grids, decode, threads=1)
    assert grids.grid_bytes == whole["grid"][0].nbytes
    counts = count_train(grids, decode)
    order = EpochOrder(grids.table_uri, counts, decode, BATCH, 3 * 64**2 + grids.grid_bytes, seed=3)
    part = next(order.parts(0))
    streamed = decode(order.read(part))
    places = [list(whole["image_id"]).index(one) for one in streamed["image_id"]]
    assert len(places) == part.stop - part.start and places != sorted(places)
    for column in ("image", "grid"):
        assert np.array_equal(streamed[column], whole[column][places])
    unseen = held_out(grids, 100, decode)
    assert isinstance(unseen, Batch) and not unseen.targets
    assert len(unseen.images) == 40 - sum(counts.values()) > 0
